"""Between what componentize-py generates for a world and what the author declared.

The build writes an entry module that lends the imports, imports the author's module and takes the classes of
`exports` as its own. `wit` is duck-typed, so that the same code runs under plain Python in `testing`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from . import _errors, _host, _registry
from ._registry import REGISTRY, Offer
from ._settings import Settings
from ._types import Action, Message, Opened, Outcome, Sample, Score, Start

_EXPORTS = ("dataset", "reward", "environment")


class Wit:
    """The generated names that the bridge needs."""

    def __init__(self, ok: Any, err: Any, types: Any, **exports: Any) -> None:
        self.ok = ok
        self.err = err
        self.types = types
        self.exports = exports


def exports(wit: Wit, imports: Sequence[str], source: str) -> dict[str, type[Any]]:
    """The classes that componentize-py looks for: `Metadata`, and those of the world's exports.

    `imports` are those of `plugin.toml`, `source` is the author's file, for messages.
    """
    if not REGISTRY.name:
        raise SystemExit(f"{source}: call `plugin(name=..., version=...)` once, at the top")
    for kind in _EXPORTS:
        offers: Mapping[str, Offer] = getattr(REGISTRY, kind + "s")
        if kind in wit.exports and not offers:
            raise SystemExit(f"plugin.toml exports `{kind}`, but {source} declares none: write `@{kind}(...)`")
        if offers and kind not in wit.exports:
            raise SystemExit(f'{source} declares `@{kind}(...)`: add "{kind}" to `exports` in plugin.toml')
    made: dict[str, type[Any]] = {"Metadata": _metadata(wit, imports)}
    makers: dict[str, Callable[[Wit], type[Any]]] = {
        "dataset": _dataset,
        "reward": _reward,
        "environment": _environment,
    }
    for kind, make in makers.items():
        if kind in wit.exports:
            made[kind.capitalize()] = make(wit)
    return made


def _metadata(wit: Wit, imports: Sequence[str]) -> type[Any]:
    meta = wit.exports["metadata"]

    class Metadata:
        def describe(self) -> Any:
            _host.start()
            dataset_role = {"train": meta.DatasetRole.TRAIN, "validation": meta.DatasetRole.VALIDATION}
            reward_role = {
                "train": meta.RewardRole.TRAIN,
                "validation": meta.RewardRole.VALIDATION,
                "filter": meta.RewardRole.FILTER,
            }
            return meta.Description(
                name=REGISTRY.name,
                version=REGISTRY.version,
                summary=REGISTRY.summary,
                datasets=[
                    meta.DatasetOffer(name=one.name, role=dataset_role[one.role]) for one in REGISTRY.datasets.values()
                ],
                rewards=[
                    meta.RewardOffer(name=one.name, role=reward_role[one.role]) for one in REGISTRY.rewards.values()
                ],
                environments=[meta.EnvironmentOffer(name=one.name) for one in REGISTRY.environments.values()],
                settings_schema=REGISTRY.settings_schema,
                wants=[*imports, *(one for one in REGISTRY.wants if one not in imports)],
            )

    return Metadata


class _Opening:
    """Shared by the exports: what `init` chose."""

    def __init__(self) -> None:
        self.chosen: Any = None

    def need(self) -> Any:
        if self.chosen is None:
            raise _errors.HostError("`init` was not called")
        return self.chosen

    def choose(self, wit: Wit, kind: str, name: str, settings: str, make: Callable[[Offer, Settings], Any]) -> None:
        _host.start()
        offers: Mapping[str, Offer] = getattr(REGISTRY, kind + "s")
        # Everything is caught: an exception that leaves the component is a trap without a message.
        try:
            if name not in offers:
                known = ", ".join(f"`{one}`" for one in offers)
                raise _errors.SampleError(f"no {kind} `{name}` here: choose {known}")
            given = Settings.parse(REGISTRY.name, settings)
            if REGISTRY.options is not None:
                # A wrong setting is said before the first sample, whether or not this offer reads it.
                given.own(REGISTRY.options)
            self.chosen = make(offers[name], given)
        except BaseException as error:
            raise wit.err(_errors.explain(error)) from None


def _each(wit: Wit, items: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
    random = sys.modules.get("random")
    results: list[Any] = []
    for item in items:
        try:
            if random is not None:
                # A score must not depend on what was scored before it.
                random.seed(0)
            results.append(wit.ok(work(item)))
        except BaseException as error:
            results.append(wit.err(wit.types.SampleError(message=_errors.explain(error))))
    return results


def _pairs(wit: Wit, metadata: Mapping[str, str]) -> list[Any]:
    return [wit.types.StringPair(key=str(key), value=str(value)) for key, value in metadata.items()]


def _metrics(wit: Wit, metrics: Mapping[str, float]) -> list[Any]:
    return [wit.types.Metric(name=name, value=float(value)) for name, value in metrics.items()]


def _mapping(pairs: Sequence[Any]) -> dict[str, str]:
    return {pair.key: pair.value for pair in pairs}


def _lower_messages(wit: Wit, messages: Sequence[Message]) -> list[Any]:
    return [wit.types.Message(role=one.role, content=one.content) for one in messages]


def _lift_messages(messages: Sequence[Any]) -> list[Message]:
    return [Message(one.role, one.content) for one in messages]


def _json(value: Any) -> Union[str, None]:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _dataset(wit: Wit) -> type[Any]:
    generated, opening = wit.exports["dataset"], _Opening()

    def example(index: int) -> Any:
        rows = opening.need()
        # A class with `__getitem__` alone would take any index for one of its own.
        if index >= len(rows):
            raise IndexError(f"example {index} of {len(rows)}")
        made = rows[index]
        if isinstance(made.prompt, str):
            prompt = wit.types.Prompt_Text(made.prompt)
        else:
            prompt = wit.types.Prompt_Messages(_lower_messages(wit, made.prompt))
        return generated.Example(
            prompt=prompt,
            reference=_json(made.reference),
            response=made.response,
            metadata=_pairs(wit, made.metadata),
        )

    class Dataset:
        def init(self, name: str, settings: str) -> None:
            opening.choose(wit, "dataset", name, settings, lambda offer, given: offer.make(given))

        def len(self) -> int:
            try:
                return len(opening.need())
            except BaseException as error:
                raise wit.err(_errors.explain(error)) from None

        def get_batch(self, indices: Sequence[int]) -> list[Any]:
            return _each(wit, indices, example)

    return Dataset


def _reward(wit: Wit) -> type[Any]:
    generated, opening = wit.exports["reward"], _Opening()

    def score(sample: Any) -> Any:
        scorer = opening.need()
        made = scorer(Sample(sample.prompt, sample.completion, sample.reference, _mapping(sample.metadata)))
        if isinstance(made, Score):
            return generated.Score(value=float(made.value), metrics=_metrics(wit, made.metrics))
        if not isinstance(made, (int, float)):
            raise TypeError(f"the reward returned {made!r:.100}, not a number or a `Score`")
        return generated.Score(value=float(made), metrics=[])

    class Reward:
        def init(self, name: str, settings: str) -> None:
            opening.choose(wit, "reward", name, settings, lambda o, given: _registry.make_scorer(o.make, given))

        def score_batch(self, samples: Sequence[Any]) -> list[Any]:
            return _each(wit, samples, score)

    return Reward


def _environment(wit: Wit) -> type[Any]:
    generated, opening = wit.exports["environment"], _Opening()

    def pack(state: Any) -> bytes:
        return b"" if state is None else json.dumps(state, ensure_ascii=False).encode()

    def reset(start: Any) -> Any:
        reference = json.loads(start.reference) if start.reference else None
        given = Start(_lift_messages(start.messages), reference, _mapping(start.metadata))
        made: Opened = opening.need().reset(given)
        return generated.Opened(
            messages=_lower_messages(wit, made.messages),
            tools=json.dumps(list(made.tools), ensure_ascii=False) if made.tools else "",
            state=pack(made.state),
        )

    def step(action: Any) -> Any:
        state = json.loads(bytes(action.state)) if action.state else None
        made: Outcome = opening.need().step(Action(action.completion, action.turn, action.complete, state))
        return generated.Outcome(
            messages=_lower_messages(wit, made.messages),
            state=pack(made.state),
            done=made.done,
            reward=float(made.reward),
            metrics=_metrics(wit, made.metrics),
        )

    class Environment:
        def init(self, name: str, settings: str) -> None:
            opening.choose(wit, "environment", name, settings, lambda offer, given: offer.make(given))

        def reset_batch(self, starts: Sequence[Any]) -> list[Any]:
            return _each(wit, starts, reset)

        def step_batch(self, actions: Sequence[Any]) -> list[Any]:
            return _each(wit, actions, step)

    return Environment
