"""Runs what a plugin declares under plain Python, through the same bridge as in the component.

    from cosmos_plugin import testing
    import app

    def test_right_answer() -> None:
        assert testing.score("gsm8k", completion="#### 4", reference={"answer": "#### 4"}).value == 1.0
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Union

from . import _bridge, _host
from ._registry import REGISTRY
from ._types import Example, Message, Score

__all__ = ["PluginFailed", "examples", "export", "lend_log", "lend_table", "reset", "score"]


class PluginFailed(Exception):
    """What the host would show as the error of `init` or of a sample."""


@dataclass
class _Ok:
    value: Any


class _Err(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.value = value


class _DatasetRole(enum.Enum):
    TRAIN = 0
    VALIDATION = 1


class _RewardRole(enum.Enum):
    TRAIN = 0
    VALIDATION = 1
    FILTER = 2


class _Level(enum.Enum):
    TRACE = 0
    DEBUG = 1
    INFO = 2
    WARN = 3
    ERROR = 4


class _PromptText(SimpleNamespace):
    pass


class _PromptMessages(SimpleNamespace):
    pass


def _wit() -> _bridge.Wit:
    """Stand-ins for what componentize-py generates: records by keyword, variants by position."""
    types = SimpleNamespace(
        Message=SimpleNamespace,
        Metric=SimpleNamespace,
        StringPair=SimpleNamespace,
        SampleError=SimpleNamespace,
        Prompt_Text=lambda value: _PromptText(value=value),
        Prompt_Messages=lambda value: _PromptMessages(value=value),
    )
    record = SimpleNamespace
    modules = {
        "metadata": record(
            DatasetRole=_DatasetRole,
            RewardRole=_RewardRole,
            DatasetOffer=record,
            RewardOffer=record,
            EnvironmentOffer=record,
            Description=record,
        ),
        "dataset": record(Example=record),
        "reward": record(Score=record),
        "environment": record(Opened=record, Outcome=record),
    }
    used = {kind: module for kind, module in modules.items() if kind == "metadata" or getattr(REGISTRY, kind + "s")}
    return _bridge.Wit(_Ok, _Err, types, **used)


def export(kind: str, imports: Sequence[str] = ()) -> Any:
    """An instance of the component's `metadata`, `dataset`, `reward` or `environment`."""
    return _bridge.exports(_wit(), imports, "the module")[kind.capitalize()]()


def _open(kind: str, name: str, settings: Union[Mapping[str, Any], None]) -> Any:
    opened = export(kind)
    _unwrapped(opened.init, name, json.dumps(settings or {}))
    return opened


def _unwrapped(call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except _Err as error:
        raise PluginFailed(error.value) from None


def _payload(result: Any) -> Any:
    if isinstance(result, _Err):
        raise PluginFailed(result.value.message)
    return result.value


def score(
    name: str,
    *,
    completion: str,
    reference: Any = None,
    prompt: str = "",
    metadata: Union[Mapping[str, str], None] = None,
    settings: Union[Mapping[str, Any], None] = None,
) -> Score:
    """The score of one completion. `settings` is what the host sends: `{"dataset": {...}, "custom": {...}}`."""
    sample = SimpleNamespace(
        prompt=prompt,
        completion=completion,
        reference="" if reference is None else json.dumps(reference),
        metadata=[SimpleNamespace(key=key, value=value) for key, value in (metadata or {}).items()],
    )
    made = _payload(_open("reward", name, settings).score_batch([sample])[0])
    return Score(made.value, {metric.name: metric.value for metric in made.metrics})


def examples(
    name: str,
    indices: Union[Sequence[int], None] = None,
    *,
    settings: Union[Mapping[str, Any], None] = None,
) -> list[Example]:
    """Examples of a dataset, all of them unless `indices` names some."""
    opened = _open("dataset", name, settings)
    chosen = range(_unwrapped(opened.len)) if indices is None else indices
    return [_example(_payload(result)) for result in opened.get_batch(list(chosen))]


def _example(made: Any) -> Example:
    prompt = made.prompt.value
    if isinstance(made.prompt, _PromptMessages):
        prompt = [Message(one.role, one.content) for one in prompt]
    reference = None if made.reference is None else json.loads(made.reference)
    return Example(prompt, reference, made.response, {pair.key: pair.value for pair in made.metadata})


def lend_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Every `table.open` gives these rows."""
    texts = [dict(row) for row in rows]
    names = list(texts[0]) if texts else []

    def read(start: int, count: int, columns: Sequence[str]) -> list[str]:
        if count > 64 or start + count > len(texts):
            raise _Err(f"{count} rows from {start} reach beyond the table's {len(texts)}, or are more than 64")
        return [json.dumps({key: row[key] for key in columns or names}) for row in texts[start : start + count]]

    opened = SimpleNamespace(len=lambda: len(texts), columns=lambda: names, read=read)
    _host.lend("table", SimpleNamespace(Source=SimpleNamespace, open=lambda _: opened))


def lend_log(lines: list[str]) -> None:
    """Log lines are added to `lines`."""

    def write(level: _Level, message: str) -> None:
        lines.append(f"{level.name.lower()}: {message}")

    _host.lend("log", SimpleNamespace(Level=_Level, write=write))


def reset() -> None:
    """Forgets every declaration and everything lent: for tests that declare a plugin themselves."""
    REGISTRY.__init__()  # type: ignore[misc]
    _host._lent.clear()
