"""The figure of overlaps: bars for each set of attacks, above a matrix of dots that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from robench.reports.boards import group_title
from robench.reports.overlap import Fooled, overlap
from robench.reports.store import Results
from robench.reports.style import GRID, INK, Drawing, Looks, house_style, legend_below, shorten
from robench.reports.text import TITLES

MOST = 15  # sets in one figure; the caption says what the others sum up to


def draw_overlaps(results: Results, look: Looks) -> Iterator[Drawing]:
    """One for each group of the leaderboard on which images fall to several attacks."""
    for _, group in overlap(results.records).groupby("group", sort=False):
        attacks, n, title = group["attacks"].iloc[0], group["n"].iloc[0], group_title(group)
        withstand = group[group["fooled_by"].map(len) == 0].set_index("name")["count"]
        sizes = group[group["fooled_by"].map(len) > 0].groupby("fooled_by")["count"].sum()
        sets = sorted(sizes.index, key=lambda fooled: (-sizes[fooled], fooled))
        if not sets:
            continue
        names = list(dict.fromkeys(group["name"]))
        left = sizes[sets[MOST:]].sum() / len(names)
        shares = {
            str(name): (str(label), [100 * dict(zip(some["fooled_by"], some["count"], strict=True))
                           .get(fooled, 0.0) / n for fooled in sets[:MOST]])
            for (name, label), some in group.groupby(["name", "label"], sort=False)
        }
        more = (f" {len(sets) - MOST} more sets hold {100 * left / n:.1f} % of the images, the "
                "mean over the networks." if left else "")
        yield Drawing(
            f"overlap {title}",
            f"{title}: images that are classified right without an attack, by the attacks that "
            "fool them: filled dots name exactly these attacks, the others fail. In percent of the "
            f"first {n:,} images, which all of these attacks saw; means over seeds. Withstand "
            "all: " + ", ".join(f"{name} {100 * withstand.get(name, 0.0) / n:.1f} %"
                                for name in names) + f".{more}",
            "Images in percent by the attacks that fool them: " + "; ".join(
                f"{' and '.join(fooled)}: " + ", ".join(
                    f"{name} {values[i]:.1f}" for name, (_, values) in shares.items())
                for i, fooled in enumerate(sets[:MOST])),
            overlap_bars(attacks, sets[:MOST], shares, title, look),
        )


@house_style()
def overlap_bars(
    attacks: Sequence[str], sets: Sequence[Fooled],
    shares: Mapping[str, tuple[str, Sequence[float]]], title: str, look: Looks,
) -> Figure:
    """Bars for the sets, one of each network side by side, above a matrix of attacks and sets.

    `shares` maps the name of each network to the label that gives its color, and its percentages
    in the order of `sets`.
    """
    matrix = 0.3 * len(attacks) + 0.2
    figure = Figure(figsize=(max(6.5, 0.7 * len(sets) + 3.0), 3.0 + matrix), layout="constrained")
    bars, dots = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, matrix])
    width = 0.8 / len(shares)
    for i, (label, values) in enumerate(shares.values()):
        places = [x + (i - (len(shares) - 1) / 2) * width for x in range(len(sets))]
        bars.bar(places, values, 0.92 * width, color=look[label].color)
        for x, value in zip(places, values, strict=True):
            bars.annotate(f"{value:.1f}", (x, value), (0, 2), textcoords="offset points",
                          ha="center", fontsize=8)
    bars.margins(y=0.12)
    bars.grid(visible=False, axis="x")
    bars.tick_params(axis="x", length=0)
    bars.set(ylabel="images (%)", title=shorten(title, 80))
    for x, fooled in enumerate(sets):
        hit = [y for y, attack in enumerate(attacks) if attack in fooled]
        dots.plot([x] * len(attacks), range(len(attacks)), "o", color=GRID, markersize=8)
        dots.plot([x] * len(hit), hit, "o-", color=INK, markersize=8, linewidth=1.5)
    dots.set_yticks(range(len(attacks)), [shorten(TITLES.get(a, a)) for a in attacks])
    dots.set(xlim=(-0.6, len(sets) - 0.4), ylim=(len(attacks) - 0.5, -0.5),
             xlabel="fooled by exactly (filled dots)")
    dots.xaxis.set_major_locator(NullLocator())
    dots.grid(visible=False)
    dots.tick_params(length=0)
    dots.spines[:].set_visible(False)
    legend_below(figure, [Patch(color=look[label].color) for label, _ in shares.values()],
                 [shorten(name) for name in shares])
    return figure
