"""From an exception to the one line that the run's log shows."""

from __future__ import annotations

import os
import re
from types import TracebackType

_SDK_FOLDER = os.path.dirname(__file__)
# componentize-py mounts the folders of its path as `/0`, `/1` and so on.
_MOUNT = re.compile(r"^/\d+/")
_MESSAGE_CHARS_MAX = 1000


class SampleError(Exception):
    """This sample cannot be scored, or this example cannot be given. The message goes to the log as it is.

    A wrong answer is not an error: return a low score for it.
    """


class SettingsError(ValueError):
    """The run's settings are wrong: the user's mistake, so no line of the plugin is told."""


class HostError(Exception):
    """The host refused something, or `plugin.toml` does not list the import."""


def where(traceback: TracebackType | None) -> str:
    """`file.py:12 in name` of the innermost frame in the author's own files, or an empty text."""
    found = ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        name = code.co_filename
        own = not name.startswith(("<", _SDK_FOLDER))
        # Modules of the standard library sit outside the author's folder, under /python.
        if own and not name.startswith("/python"):
            found = f"{_MOUNT.sub('', name)}:{traceback.tb_lineno} in `{code.co_name}`"
        traceback = traceback.tb_next
    return found


def explain(error: BaseException) -> str:
    """Type, message and place in one line; the message alone where that says it all."""
    message = str(error)
    if len(message) > _MESSAGE_CHARS_MAX:
        message = message[:_MESSAGE_CHARS_MAX] + "…"
    if isinstance(error, (SampleError, SettingsError)):
        return message
    kind = type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        message += " (a component holds only what was imported while it was built: import it at the top of the file)"
    text = f"{kind}: {message}" if message else kind
    place = where(error.__traceback__)
    return f"{text} ({place})" if place else text
