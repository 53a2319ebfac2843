"""What the host lends: the imports of the component, or a stand-in under plain Python."""

from __future__ import annotations

from typing import Any

from ._errors import HostError

_lent: dict[str, Any] = {}
# False while the component is built: the module is imported then, without a host.
_running = True


def hold() -> None:
    """Called by the build's entry, before the author's module is imported."""
    global _running
    _running = False


def start() -> None:
    """Called by every function that the host calls first."""
    global _running
    _running = True


def lend(name: str, module: Any) -> None:
    """Makes the import `name` (`log`, `table`, `chat-template`, and the `types` they share) available."""
    _lent[name] = module


def borrow(name: str) -> Any:
    """The import `name`.

    Raises `HostError` when the component was built without it.
    """
    module = _lent.get(name)
    if module is None:
        raise HostError(f"`{name}` is not lent here: add it to `imports` in `plugin.toml`, and grant it in the run")
    if not _running:
        raise HostError(f"`{name}` is not there while the plugin is built: call it from a function that the host calls")
    return module


def refusal(error: BaseException) -> BaseException:
    """The host's error text out of a generated `Err`."""
    value = getattr(error, "value", None)
    return HostError(value) if isinstance(value, str) else error
