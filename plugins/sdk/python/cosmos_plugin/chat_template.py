"""The student's own chat template. Needs `chat-template` among the `imports` of `plugin.toml`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from . import _host
from ._types import Message


def render(messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any) -> str:
    """The conversation as the student's text. `options` are template variables, for example `enable_thinking=True`."""
    host = _host.borrow("chat-template")
    types = _host.borrow("types")
    made = [types.Message(role=message.role, content=message.content) for message in messages]
    try:
        text: str = host.render(made, add_generation_prompt, json.dumps(options))
    except Exception as error:
        raise _host.refusal(error) from None
    return text
