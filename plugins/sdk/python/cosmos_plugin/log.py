"""Log lines. Needs `log` among the `imports` of `plugin.toml`."""

from __future__ import annotations

from . import _host


def trace(message: str) -> None:
    """The finest detail."""
    _write("TRACE", message)


def debug(message: str) -> None:
    """Detail for the author."""
    _write("DEBUG", message)


def info(message: str) -> None:
    """What a user may want to know."""
    _write("INFO", message)


def warn(message: str) -> None:
    """Something looks wrong."""
    _write("WARN", message)


def error(message: str) -> None:
    """Something is wrong."""
    _write("ERROR", message)


def _write(level: str, message: str) -> None:
    host = _host.borrow("log")
    host.write(getattr(host.Level, level), str(message))
