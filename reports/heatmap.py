"""A table of numbers as colored cells that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from robench.reports.style import house_style, shorten

COLORS = "cividis"  # the same for all eyes, and its lightness grows evenly
DARK, LIGHT = "#000000", "#fefefe"  # of the numbers; on the page, ink and white follow the theme
LARGE = 12  # from so many columns on there is room for whole numbers only


@house_style()
def heat_map(
    values: npt.NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], title: str,
    labels: tuple[str, str], unit: str, highest: float = 100.0,
) -> Figure:
    """Cells for values (R, C) in [0, highest], NaN left empty, with the numbers in them.

    labels: of the columns, below, and of the rows, at the left. A cell is drawn, not painted, so
    that the figure stays sharp at any size.
    """
    long = max(len(shorten(name)) for name in (*rows, *columns))
    width, height = (0.42 if len(columns) >= LARGE else 0.55,
                     0.42 if len(columns) >= LARGE else 0.3 if len(rows) >= LARGE else 0.55)
    figure = Figure(figsize=(width * len(columns) + 0.075 * long + 1.9,
                             height * len(rows) + 0.06 * long + 1.2), layout="constrained")
    axes = figure.subplots()
    norm, colors = Normalize(0, highest), colormaps[COLORS]
    for (i, j), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        color = colors(norm(value))
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=color, edgecolor="none",
                                 gid=f"cell-{i}-{j}"))
        axes.text(j, i, f"{value:.{0 if len(columns) >= LARGE else 1}f}", ha="center",
                  va="center", fontsize=8, color=_readable(color[:3]), gid=f"on-cell-{i}-{j}")
    axes.set_xticks(range(len(columns)), [shorten(name) for name in columns], rotation=40,
                    ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [shorten(name) for name in rows])
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=labels[0],
             ylabel=labels[1], title=shorten(title, 80),
             aspect="equal" if width == height else "auto")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # From 50 steps on, matplotlib would paint the bar, and a page allows no picture.
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, shrink=0.8,
                          boundaries=np.linspace(0, highest, 41).tolist(),
                          ticks=np.linspace(0, highest, 6).tolist())
    bar.set_label(unit)
    return figure


def _readable(color: tuple[float, ...]) -> str:
    """Black or white, whichever has more contrast (WCAG 2.1) on this color."""
    def light(rgb: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    below = light(color) + 0.05
    return LIGHT if (light(to_rgb(LIGHT)) + 0.05) / below > below / 0.05 else DARK
