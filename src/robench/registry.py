"""Names for attacks, defenses, data sets, models and reports.

    @DEFENSES.register("trades", paper="Zhang et al. 2019", description="...")
    class TRADES(Defense): ...

    DEFENSES["trades"].value    # the class
    DEFENSES.names()            # sorted

Packages outside robench register through entry points of the registry's group, for example
`robench.defenses`; the entry point names a module, whose import runs the decorator.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from robench.errors import UsageError

T = TypeVar("T")
U = TypeVar("U")
log = logging.getLogger("robench")


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name nobody knows: suggests the nearest one."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean: {close[0]}?" if close else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered thing, as `robench list` shows it."""

    name: str
    value: T
    description: str
    paper: str

    @property
    def origin(self) -> str:
        module = getattr(self.value, "__module__", "?")
        return f"{module}.{getattr(self.value, '__qualname__', self.name)}"


class Registry(Generic[T]):
    """A mapping from names to things, filled by a decorator and by plugins.

    Args:
        kind: what is registered, for messages ("attack").
        group: the entry-point group through which other packages add to it, if any.
        builtin: called once before the first look-up; imports robench's own modules.
    """

    def __init__(
        self, kind: str, group: str | None = None, builtin: Callable[[], object] | None = None
    ) -> None:
        self.kind = kind
        self._group = group
        self._builtin = builtin
        self._entries: dict[str, Entry[T]] = {}
        self._loaded = False

    def register(
        self, name: str, *, description: str, paper: str = ""
    ) -> Callable[[U], U]:
        """Decorator. Raises ValueError if the name is taken by another object."""

        def add(value: U) -> U:
            entry: Entry[T] = Entry(name, value, description, paper)  # type: ignore[arg-type]
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} is taken by {self._entries[name].origin}; "
                    f"refusing {entry.origin}"
                )
            self._entries[name] = entry
            return value

        return add

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        if self._builtin is not None:
            self._builtin()
        for point in entry_points(group=self._group) if self._group else ():
            try:
                point.load()
            except Exception:  # a broken plugin must not take robench down with it
                log.warning("plugin %s of %s is broken and was skipped", point.name, self._group,
                            exc_info=True)

    def __getitem__(self, name: str) -> Entry[T]:
        self._load()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def names(self) -> list[str]:
        return [entry.name for entry in self]
