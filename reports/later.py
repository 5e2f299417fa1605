"""Options that came when there were trainings and records already.

Where one of them is not named, an older version did what its value here says. So a training keeps
its key, and a record its row and column, whichever version wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By where they are: in the training, among the options of a defense, in a record's attack and in
# each of its stages.
LATER: Mapping[str, Mapping[str, Any]] = {
    "train": {"optimizer": "sgd", "beta2": 0.999, "clip": None, "precision": "fp32",
              "schedule": "multistep", "pct_start": 0.3, "warmup": 0.0, "ema": None,
              "ema_start": 0.0},
    "options": {"label_smoothing": 0.0},
    "attack": {"precision": "exact"},
    "stage": {"momentum": 0.0, "targets": 9, "share": 1.0},
}
ALONE = "pgd"  # an attack of this one stage was written without stages


def earlier(options: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The options without those that say what was done before they came."""
    later = LATER[place]
    return {name: value for name, value in options.items()
            if name not in later or value != later[name]}


def earlier_defense(config: Mapping[str, Any]) -> dict[str, Any]:
    """A record's `defense_config`, likewise."""
    found = earlier(config, "options")
    train = found.get("train")
    return {**found, "train": earlier(train, "train")} if isinstance(train, Mapping) else found


def earlier_attack(config: Mapping[str, Any]) -> dict[str, Any]:
    """A record's `attack_config`, likewise; of PGD as the first versions wrote it."""
    found = earlier(config, "attack")
    stages = found.pop("stages", None)
    if not isinstance(stages, Mapping):
        return dict(config) if stages is None else {**found, "stages": stages}
    plain = {name: earlier(stage, "stage") if isinstance(stage, Mapping) else stage
             for name, stage in stages.items()}
    alone = plain.get(ALONE)
    if set(plain) == {ALONE} and isinstance(alone, dict) and not found:
        untargeted = alone.get("units") == alone.get("restarts")  # each unit is a restart
        return {name: value for name, value in alone.items()
                if not (name == "units" and untargeted)}
    return {**found, "stages": plain}
