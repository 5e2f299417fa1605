"""Recipes: named sets of training settings, one YAML file each in recipes/."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robench.defenses.config import TrainConfig
from robench.errors import UsageError
from robench.registry import unknown

FOLDER = files("robench.benchmark") / "recipes"


class ModelSpec(BaseModel):
    """A network by name; `normalize` names the data set whose mean and std its first layer uses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    normalize: str | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether it is a user's package.module:factory."""
        return ":" in self.name

    def __str__(self) -> str:
        return self.name if self.normalize is None else f"{self.name}({self.normalize})"


class Settings(BaseModel):
    """A set of settings; a more special one overrides a more general one key by key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSpec | str | None = None
    threat: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def over(self, base: Settings) -> Settings:
        return Settings(
            model=self.model or base.model,
            threat=self.threat or base.threat,
            options={**base.options, **self.options},
            train={**base.train, **self.train},
            notes=(*base.notes, *self.notes),
        )


class MethodSettings(Settings):
    source: str = ""
    datasets: dict[str, Settings] = Field(default_factory=dict)


class Recipe(Settings):
    description: str
    datasets: dict[str, Settings] = Field(default_factory=dict)
    defenses: dict[str, MethodSettings] = Field(default_factory=dict)

    def resolve(self, defense: str, dataset: str) -> Settings:
        """The settings of a method on a data set: general, data set, method, method on it.

        They are those of a data set whatever its options (`tiny-imagenet,order=sorted`).
        Those of `trades+awp` lie over those of `trades` where the recipe is one for all methods.
        """
        nothing, dataset = Settings(), _plain(dataset)
        layers: list[Settings] = [self, self.datasets.get(dataset, nothing)]
        shared = any("epochs" in layer.train for layer in layers)
        for name in dict.fromkeys([*([defense.split("+")[0]] if shared else []), defense]):
            method = self.defenses.get(name, MethodSettings())
            layers += [method, method.datasets.get(dataset, nothing)]
        settings = nothing
        for layer in layers:
            settings = layer.over(settings)
        return settings


    def method_threat(self, defense: str, dataset: str) -> str | None:
        """The threat model that the method itself is trained at, if the recipe names one."""
        method = self.defenses.get(defense, MethodSettings())
        return method.datasets.get(_plain(dataset), Settings()).threat or method.threat


def _plain(dataset: str) -> str:
    """The name of a data set without the path to it and its options."""
    return re.split("[:,]", dataset, maxsplit=1)[0]


@cache
def load_recipe(name: str) -> Recipe:
    """A recipe by the name of its file. Raises UsageError for an unknown one."""
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return Recipe.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


@cache
def recipe_names() -> tuple[str, ...]:
    return tuple(sorted(p.name[:-5] for p in FOLDER.iterdir() if p.name.endswith(".yaml")))


def documented(recipe: str, defense: str, dataset: str) -> bool:
    """Whether the recipe has settings for the pair."""
    return "epochs" in load_recipe(recipe).resolve(defense, dataset).train


def settings_for(recipe: str, defense: str, dataset: str) -> Settings:
    """Like Recipe.resolve, but raises UsageError if the recipe says nothing about the pair."""
    loaded = load_recipe(recipe)
    if not documented(recipe, defense, dataset):
        known = sorted(loaded.defenses.get(defense, MethodSettings()).datasets)
        where = f"only on {', '.join(known)}" if known else "nowhere"
        raise UsageError(
            f"recipe {recipe!r} documents {defense!r} {where}, not on {dataset!r}; "
            "use --recipe unified"
        )
    return loaded.resolve(defense, dataset)


def default_threat(dataset: str) -> str:
    """The threat model at which a data set is attacked unless the user names one."""
    threat = load_recipe("unified").resolve("", dataset).threat
    assert threat is not None, "unified.yaml names a threat model"
    return threat


def train_config(settings: Settings, overrides: dict[str, Any]) -> TrainConfig:
    """Raises UsageError, in one line, for an unknown or impossible setting."""
    for name in overrides:
        if name not in TrainConfig.model_fields:
            raise unknown("training setting", name, TrainConfig.model_fields)
    try:
        return TrainConfig.model_validate({**settings.train, **overrides})
    except ValidationError as error:
        raise UsageError(explain(error, "train")) from None


def explain(error: ValidationError, where: str) -> str:
    """The first problem of a pydantic error in one line."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown setting {path}{more}"
    return f"{path}: {first['msg']}, not {str(first['input'])[:60]!r}{more}"
