"""What goes in and out of a plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, Union

DatasetRole = Literal["train", "validation"]
RewardRole = Literal["train", "validation", "filter"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def system(content: str) -> Message:
    """A message with the role `system`."""
    return Message("system", content)


def user(content: str) -> Message:
    """A message with the role `user`."""
    return Message("user", content)


def assistant(content: str) -> Message:
    """A message with the role `assistant`."""
    return Message("assistant", content)


@dataclass(frozen=True)
class Example:
    """What the student is asked, and what its answer is judged by."""

    prompt: Union[str, Sequence[Message]]
    """Finished text, or messages that the host renders with the student's chat template."""
    reference: Any = None
    """Any JSON value; the reward gets it back as `sample.reference`."""
    response: Union[str, None] = None
    """The completion to imitate, for supervised fine-tuning."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Sample:
    """A completion to score."""

    prompt: str
    completion: str
    reference_json: str = ""
    """The example's reference as JSON text; empty when it has none."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Any:
        """The example's reference; `None` when it has none."""
        return json.loads(self.reference_json) if self.reference_json else None


@dataclass(frozen=True)
class Score:
    """A number, and named numbers beside it whose means the run logs as `reward/<plugin>/<name>`."""

    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """What a conversation starts from: one example of the dataset."""

    messages: Sequence[Message]
    reference: Any
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Opened:
    """The conversation that the model first sees."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    """Tool definitions for the chat template's `tools`."""
    state: Any = None
    """Any JSON value of at most 65,536 bytes; comes back with the next step. Nothing else is remembered."""


@dataclass(frozen=True)
class Action:
    """What the model said."""

    completion: str
    turn: int
    """How many messages the model has said before this one."""
    complete: bool
    """Whether the model ended its message itself; otherwise a limit cut it off and no further turn follows."""
    state: Any = None


@dataclass(frozen=True)
class Outcome:
    """What the model hears next."""

    messages: Sequence[Message] = ()
    """Not empty, unless `done`."""
    done: bool = False
    reward: float = 0.0
    """Added to the conversation's reward."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Any = None


class Dataset(Protocol):
    """A sequence of examples. Any list of them is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Environment(Protocol):
    """Conversations of several turns. It keeps nothing between calls but what travels in `state`."""

    def reset(self, start: Start) -> Opened:
        """Opens a conversation."""
        ...

    def step(self, action: Action) -> Outcome:
        """Answers one message of the model."""
        ...
