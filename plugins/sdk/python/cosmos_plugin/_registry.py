"""What the author's module declares."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union

from . import _settings
from ._settings import Settings
from ._types import Dataset, DatasetRole, Environment, RewardRole, Sample, Score

ScoreResult = Union[float, Score]
Scorer = Callable[[Sample], ScoreResult]
RewardMaker = Union[Scorer, Callable[[Sample, Settings], ScoreResult], Callable[[Settings], Scorer]]

RewardT = TypeVar("RewardT", bound=RewardMaker)
DatasetT = TypeVar("DatasetT", bound=Callable[[Settings], Dataset])
EnvironmentT = TypeVar("EnvironmentT", bound=Callable[[Settings], Environment])

_NAME = re.compile(r"^[A-Za-z0-9_-]+$")


@dataclass
class Offer:
    """A dataset, reward or environment by name."""

    name: str
    role: str
    make: Callable[..., Any]


@dataclass
class Registry:
    """All that one plugin declares."""

    name: str = ""
    version: str = ""
    summary: str = ""
    settings_schema: str = ""
    options: Union[type[Any], None] = None
    wants: list[str] = field(default_factory=list)
    datasets: dict[str, Offer] = field(default_factory=dict)
    rewards: dict[str, Offer] = field(default_factory=dict)
    environments: dict[str, Offer] = field(default_factory=dict)


REGISTRY = Registry()


def plugin(
    *,
    name: str,
    version: str,
    summary: str = "",
    options: Union[type[Any], None] = None,
    wants: Sequence[str] = (),
) -> None:
    """Says what the plugin is.

    `options` is a dataclass whose fields a run may set in `[custom.<name>]`; read them with `settings.own(Options)`.
    `wants` names folders the plugin would like to read, as grants: `dir:/data:ro`. The imports of `plugin.toml` are
    added by themselves.
    """
    if not _NAME.match(name):
        raise ValueError(f"`{name}` is not a plugin's name: use letters, digits, `-` and `_`")
    if REGISTRY.name:
        raise ValueError(f"`plugin` is called twice, for `{REGISTRY.name}` and for `{name}`")
    if options is not None and not dataclasses.is_dataclass(options):
        raise TypeError(f"`options` is {options!r}, not a dataclass")
    REGISTRY.name = name
    REGISTRY.version = version
    REGISTRY.summary = summary
    REGISTRY.wants = list(wants)
    REGISTRY.options = options
    if options is not None:
        REGISTRY.settings_schema = _settings.schema(name, options)


def reward(name: str, *, role: RewardRole = "train") -> Callable[[RewardT], RewardT]:
    """Declares a reward: a function of the sample, or of the sample and the settings, or a class that is made with the
    settings and called with each sample. It returns a number or a `Score`."""
    return _declare("reward", REGISTRY.rewards, name, role)


def dataset(name: str, *, role: DatasetRole = "train") -> Callable[[DatasetT], DatasetT]:
    """Declares a dataset: a class that is made with the settings and has `__len__` and `__getitem__`, or a function
    that returns such a thing, for example a list of `Example`."""
    return _declare("dataset", REGISTRY.datasets, name, role)


def environment(name: str) -> Callable[[EnvironmentT], EnvironmentT]:
    """Declares an environment: a class that is made with the settings and has `reset` and `step`."""
    return _declare("environment", REGISTRY.environments, name, "")


MakerT = TypeVar("MakerT", bound=Callable[..., Any])


def _declare(kind: str, offers: dict[str, Offer], name: str, role: str) -> Callable[[MakerT], MakerT]:
    roles = {"reward": ("train", "validation", "filter"), "dataset": ("train", "validation")}.get(kind, ("",))
    if role not in roles:
        raise ValueError(f"{kind} `{name}`: `{role}` is no role: choose " + " or ".join(f"`{one}`" for one in roles))

    def declare(make: MakerT) -> MakerT:
        if not callable(make):
            raise TypeError(f"{kind} `{name}` is {make!r}: put `@{kind}(...)` before a function or a class")
        if name in offers:
            raise ValueError(f"{kind} `{name}` is declared twice")
        offers[name] = Offer(name, role, make)
        return make

    return declare


def make_scorer(make: Callable[..., Any], settings: Settings) -> Scorer:
    """The function to call with each sample."""
    if isinstance(make, type):
        made = make(settings) if _takes(make, 1) else make()
        if not callable(made):
            raise TypeError(f"`{make.__name__}` has no `__call__(self, sample)`")
        scorer: Scorer = made
        return scorer
    if _takes(make, 2):
        return lambda sample: make(sample, settings)
    return make


def _takes(function: Callable[..., Any], count: int) -> bool:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(one.kind in positional for one in parameters) >= count
