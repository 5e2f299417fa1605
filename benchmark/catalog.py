"""What `robench list` shows."""

from __future__ import annotations

from typing import Any

from robench.attacks.base import ADAPTERS, ATTACKS
from robench.benchmark.data import DATASETS
from robench.benchmark.models import MODELS
from robench.benchmark.recipe import load_recipe, recipe_names
from robench.defenses.base import DEFENSES
from robench.registry import Entry, Registry


def catalog(kind: str) -> list[Entry[Any]]:
    """The entries of a kind: attacks, defenses, datasets, models or recipes."""
    if kind == "recipes":
        return [Entry(name, None, load_recipe(name).description, "") for name in recipe_names()]
    registries: dict[str, Registry[Any]] = {
        "attacks": ATTACKS, "defenses": DEFENSES, "datasets": DATASETS, "models": MODELS,
    }
    rows = list(registries[kind])
    if kind == "attacks":
        rows += [Entry(f"{e.name}:NAME", e.value, e.description, e.paper) for e in ADAPTERS]
    return rows
