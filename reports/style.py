"""How figures look, and how they become files. Object-oriented matplotlib: no pyplot state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

INK, GRID = "#23272f", "#d5d9e0"  # text and lines; the page replaces them in dark mode
# Okabe and Ito's colors without black and yellow (invisible on black, on white), then Tol's.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
NEUTRAL = "#6b7280"  # readable on black and on white
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 160

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,  # names are names: a dollar sign in one is not TeX
    "svg.fonttype": "none",  # text stays text: searchable, and read aloud
}


@dataclass(frozen=True)
class Look:
    """The color and the marker of one defense, the same in every figure."""

    color: str
    marker: str


Looks = Mapping[str, Look]  # by the label of the defense


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name, its caption, and its content in words."""

    name: str
    caption: str
    alt: str
    figure: Figure


def looks(names: Iterable[str]) -> Looks:
    """One look for each name, given by its place in the alphabet."""
    return {
        name: Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(sorted(set(names)))
    }


def shorten(name: str, length: int = 36) -> str:
    """A name that fits into a figure, on one line.

    Without the leading underscores that would hide it from a legend.
    """
    name = " ".join(name.split()).lstrip("_")
    return name if len(name) <= length else name[: length - 1] + "…"


def pale(color: str) -> str:
    """The color mixed with white, half and half."""
    red, green, blue = to_rgb(color)
    return to_hex(((1 + red) / 2, (1 + green) / 2, (1 + blue) / 2))


@contextmanager
def house_style() -> Iterator[None]:
    """The look of all figures, for drawing and for saving. Works as a decorator too."""
    with warnings.catch_warnings(), rc_context(_RC):
        # A name may hold characters the font lacks; boxes in a label are no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(
    width: float, height: float, panels: int = 1, share: Literal["x", "y"] = "x"
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with panels side by side that have one axis in common."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharex=share == "x", sharey=share == "y")
    return figure, list(axes[0])


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend in as many columns as fit; the figure grows by its height, the axes keep theirs."""
    width, height = figure.get_size_inches()
    longest = max(map(len, labels), default=0)
    columns = min(max(1, int(width / (0.08 * longest + 0.65))), max(1, len(labels)))
    figure.set_figheight(height + 0.21 * math.ceil(len(labels) / columns) + 0.1)
    figure.legend(handles=handles, labels=labels, loc="outside lower center", ncols=columns)


@house_style()
def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@house_style()
def to_svg(figure: Figure, name: str, background: str = "white") -> str:
    """The same bytes for the same figure and name; `name` makes the ids of its parts."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor=background,
                       metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
