"""Options that arrive as text or YAML, checked against a signature before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from robench.errors import UsageError


def parse_number(text: str | float) -> float:
    """"8/255" -> 0.03137..., "0.5" -> 0.5. Raises UsageError on anything else."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.eE+-]+)\s*)?", str(text))
    try:
        if match is None:
            raise ValueError
        value = float(match[1]) / float(match[2] or 1)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{text!r} is not a number: write 0.03 or 8/255") from None
    if not math.isfinite(value):
        raise UsageError(f"{text!r} is not a finite number")
    return value


def checked(
    options: Mapping[str, Any], function: Callable[..., Any], kind: str, name: str
) -> dict[str, Any]:
    """The options as the annotated parameters of a function or dataclass want them.

    A float may be written as a fraction, "2/255". `threat` is no option. Raises UsageError
    for an unknown option and for a value of another type.
    """
    hints = get_type_hints(function)
    others = ("threat", "return", "trained", "given", "kind", "inner")
    known = [hint for hint in hints if hint not in others]
    result = {}
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"{kind} {name!r} has no option {option!r}; "
                             f"it has {', '.join(known) or 'none'}")
        if isinstance(value, str) and "/" in value:
            value = parse_number(value)
        try:
            result[option] = TypeAdapter(
                hints[option], config=ConfigDict(arbitrary_types_allowed=True)
            ).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"{kind} {name!r}, option {option}: {reason}, not {value!r}"
                             ) from None
    return result


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong, and where, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return " ".join(f"{where}: {first['msg']}".removeprefix(": ").split())
