"""What commands of their own measured on networks: which of it belongs together, under which name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from robench.reports.grouping import canonical, defense_options, distinct, newest
from robench.reports.record import Network, Record, Survey
from robench.reports.runs import run_labels

S = TypeVar("S", bound=Survey)
K = TypeVar("K")
Names = Mapping[tuple[str, ...], str]  # by `identity`


class Net(NamedTuple):
    """What networks share that differ only in their seed."""

    label: str
    options: str  # of the defense, as JSON
    model: str
    recipe: str
    checkpoint: str
    selection: str
    source: str  # "" unless it is another network of the same seed


def grouped(
    surveys: Sequence[S], setting: Callable[[S], K], records: Iterable[Record] = ()
) -> dict[K, dict[Net, list[S]]]:
    """Surveys that may be compared, network by network, in order of first appearance.

    `setting` is what they must have in common. The newest survey of a network counts, and of
    several networks of one seed the one surveyed last: the others are told apart from it by where
    they came from.
    """
    labels = survey_labels(surveys, records)
    groups: dict[K, dict[Net, list[S]]] = {}
    for one in surveys:
        groups.setdefault(setting(one), {}).setdefault(net_of(one, labels), []).append(one)
    return {key: dict(_apart(nets)) for key, nets in groups.items()}


def net_of(network: Network, labels: Names) -> Net:
    return Net(labels[identity(network)], defense_options(network.defense_config), network.model,
               network.recipe, network.checkpoint, network.selection, "")


def another(net: Net, network: Network) -> Net:
    """For a network of a seed of which there is one already: told apart by where it came from."""
    return net._replace(source=f"{network.source} {network.weights_sha256[:12]}")


def net_names(nets: Iterable[Net]) -> dict[Net, str]:
    """Labels, with what tells networks of one label apart."""
    return distinct({
        net: ((), net.label, canonical({
            "checkpoint": net.checkpoint, "model": net.model, "recipe": net.recipe,
            "selected on": net.selection, **({"source": net.source} if net.source else {})}))
        for net in nets
    })


def survey_labels(networks: Iterable[Network], records: Iterable[Record] = ()) -> Names:
    """The label of each network's defense, that of the `records` of the same run if there are."""
    known = run_labels(records)
    ids = dict.fromkeys(map(identity, networks))
    own = distinct({one: ((one[1],), one[2], one[3]) for one in ids})
    return {one: known.get(one[0], own[one]) for one in ids}


def identity(network: Network) -> tuple[str, ...]:
    """What the label of a network depends on."""
    return network.run, network.dataset, network.defense, defense_options(network.defense_config)


def _apart(nets: Mapping[Net, list[S]]) -> Iterable[tuple[Net, list[S]]]:
    for net, some in nets.items():
        by_age = sorted(some, key=lambda one: one.created)
        networks = {(one.seed, one.weights_sha256): one for one in by_age}
        kept, others = newest(networks.values())
        yield net, kept
        yield from ((another(net, one), [one]) for one in others)
