"""The figures of landscapes: curves over displaced weights, contours over planes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from robench.reports.landscape import RADIUS, Setting, setting_of, sharpness_by_direction
from robench.reports.record import Landscape
from robench.reports.store import Results
from robench.reports.style import INK, Drawing, Looks, house_style, legend_below, shorten
from robench.reports.surveys import Net, grouped, net_names

COLUMNS = 3  # planes side by side
AXES = {
    "weight-2d": ("first direction (filter lengths)", "second direction (filter lengths)"),
    "input": ("steepest direction (eps)", "random signs (eps)"),
}


def draw_landscapes(results: Results, look: Looks) -> Iterator[Drawing]:
    """One figure for each set of landscapes that may be compared."""
    for setting, nets in grouped(results.landscapes, setting_of, results.records).items():
        names = net_names(nets)
        if setting.kind == "weight":
            yield _curves(setting, {names[net]: (net, some) for net, some in nets.items()}, look)
        else:
            planes = {_seed_name(names[net], one, some): one
                      for net, some in nets.items() for one in some}
            yield _planes(setting, planes)


def _seed_name(name: str, one: Landscape, some: Sequence[Landscape]) -> str:
    return f"{name}, seed {one.seed}" if len(some) > 1 else name


def _curves(
    setting: Setting, nets: Mapping[str, tuple[Net, Sequence[Landscape]]], look: Looks
) -> Drawing:
    numbers = {name: fmean(x for one in some for x in sharpness_by_direction(one))
               for name, (_, some) in nets.items()}
    return Drawing(
        f"weight-landscape {setting.title}",
        f"{setting.title}: cross-entropy on adversarial examples, crafted anew at every point, as "
        "the weights move along random filter-normalized directions; an alpha of 1 is a step as "
        "long as each filter. Lines are medians over directions and seeds, bands go from the "
        "lowest to the highest. Right: the increase over the network itself, whose mean over "
        f"|alpha| <= {RADIUS:g} is the sharpness.",
        "Sharpness in nats: " + "; ".join(f"{name} {x:.3f}" for name, x in numbers.items()),
        weight_curves({name: (net.label, some) for name, (net, some) in nets.items()},
                      setting.title, look),
    )


def _planes(setting: Setting, planes: Mapping[str, Landscape]) -> Drawing:
    where = ("as the weights move over the plane of two random filter-normalized directions; "
             "examples are crafted anew at every point" if setting.kind == "weight-2d" else
             "over a plane through each image: along its gradient and along random signs, in units "
             "of eps")
    facts = {name: np.array(one.losses) for name, one in planes.items()}
    return Drawing(
        f"{setting.kind}-landscape {setting.title}",
        f"{setting.title}: mean cross-entropy {where}. The cross is the "
        f"{'network' if setting.kind == 'weight-2d' else 'image'} itself; all panels have one "
        "logarithmic scale.",
        "Cross-entropy in nats at the center, and lowest to highest: " + "; ".join(
            f"{name} {_center(grid):.3f}, {np.nanmin(grid):.3f} to {np.nanmax(grid):.3f}"
            if np.isfinite(grid).any() else f"{name} not finite" for name, grid in facts.items()),
        plane_contours(planes, setting.title, AXES[setting.kind]),
    )


def _center(grid: npt.NDArray[np.float64]) -> float:
    return float(grid[len(grid) // 2, len(grid) // 2])


@house_style()
def weight_curves(
    nets: Mapping[str, tuple[str, Sequence[Landscape]]], title: str, look: Looks
) -> Figure:
    """The loss over alpha, and its increase near the network.

    `nets` maps the name of each line to the label that gives its look, and its landscapes, one
    for each seed.
    """
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    whole, near = figure.subplots(1, 2)
    for name, (label, some) in nets.items():
        seen, alphas = look[label], np.array(some[0].alphas)
        losses = np.array([line for one in some for line in one.losses])
        losses[~np.isfinite(losses)] = np.nan
        increase = losses - losses[:, [some[0].alphas.index(0.0)]]
        inside = np.abs(alphas) <= RADIUS + 1e-9
        for axes, lines, part in ((whole, losses, slice(None)), (near, increase, inside)):
            axes.plot(alphas[part], np.median(lines, axis=0)[part], label=shorten(name),
                      color=seen.color, marker=seen.marker, markersize=4,
                      markevery=max(1, int(inside.sum()) // 6))
            axes.fill_between(alphas[part], lines.min(axis=0)[part], lines.max(axis=0)[part],
                              color=seen.color, alpha=0.15, linewidth=0)
    whole.set(ylabel="adversarial loss (nats)", title="loss")
    near.set(ylabel="increase of the adversarial loss (nats)", title="increase near the network")
    for axes in (whole, near):
        axes.set_xlabel("alpha (filter lengths)")
    figure.suptitle(shorten(title, 80), fontsize=11)
    legend_below(figure, *whole.get_legend_handles_labels())
    return figure


@house_style()
def plane_contours(
    planes: Mapping[str, Landscape], title: str, labels: tuple[str, str]
) -> Figure:
    """Filled contours of the loss over a plane, a panel for each network, on one scale."""
    rows, columns = math.ceil(len(planes) / COLUMNS), min(COLUMNS, len(planes))
    figure = Figure(figsize=(3.2 * columns + 1.2, 3.1 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    grids = {name: np.array(one.losses) for name, one in planes.items()}
    levels = _levels(list(grids.values()))
    for axes, (name, grid) in zip(panels.flat, grids.items(), strict=False):
        alphas = planes[name].alphas
        losses = np.ma.masked_invalid(grid)
        drawn = axes.contourf(alphas, alphas, losses, levels, cmap="cividis",
                              norm=LogNorm(levels[0], levels[-1]), extend="both")
        axes.contour(alphas, alphas, losses, levels, colors=INK, linewidths=0.4)
        axes.plot(0, 0, marker="+", markersize=9, markeredgewidth=1.5, color="white")
        axes.set(title=shorten(name, 30), aspect="equal")
        axes.grid(visible=False)
    for axes in panels.flat[len(planes):]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel(labels[0])
    for axes in panels[:, 0]:
        axes.set_ylabel(labels[1])
    bar = figure.colorbar(drawn, ax=panels, ticks=levels[::3], format="%.3g", shrink=0.9)
    bar.minorticks_off()
    bar.set_label("loss (nats)")
    figure.suptitle(shorten(title, 80), fontsize=11)
    return figure


def _levels(grids: Sequence[npt.NDArray[np.float64]]) -> list[float]:
    """From the lowest to the highest of all panels, in equal ratios: far from the network the loss
    is many times what it is there, and what counts is there."""
    values = np.concatenate([grid[np.isfinite(grid) & (grid > 0)] for grid in grids])
    low, high = (values.min(), values.max()) if len(values) else (1.0, 1.0)
    return [float(level) for level in np.geomspace(low, max(high, low * 1.01), 13)]
