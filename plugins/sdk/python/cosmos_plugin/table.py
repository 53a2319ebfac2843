"""Rows of Hugging Face datasets, read by the host. Needs `table` among the `imports` of `plugin.toml`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Union

from . import _host
from ._settings import DatasetSettings

ROWS_MAX = 64
"""Rows of one call to the host."""


class Rows:
    """An open table: a sequence of rows, each a dictionary of its columns."""

    def __init__(self, rows: Any, columns: Sequence[str]) -> None:
        self._rows = rows
        self._wanted = list(columns)
        self._len = int(rows.len())
        self.columns: list[str] = list(rows.columns())
        missing = [name for name in self._wanted if name not in self.columns]
        if missing:
            raise ValueError(f"the table has no column `{missing[0]}`; it has {', '.join(self.columns)}")

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> dict[str, Any]:
        at = index + self._len if index < 0 else index
        if not 0 <= at < self._len:
            raise IndexError(f"row {index} of {self._len}")
        return self.read(at, 1)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self._len, ROWS_MAX):
            yield from self.read(start, min(ROWS_MAX, self._len - start))

    def read(self, start: int, count: int) -> list[dict[str, Any]]:
        """At most 64 rows from `start`."""
        try:
            rows = self._rows.read(start, count, self._wanted)
        except Exception as error:
            raise _host.refusal(error) from None
        return [json.loads(row) for row in rows]


def open(
    source: Union[str, DatasetSettings],
    *,
    subset: str = "",
    revision: str = "",
    splits: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Rows:
    """Opens a hub dataset, a folder or a file: by name, or as the run's dataset section says (`settings.dataset`).

    `columns` limits what is read; all of them when empty. Raises when one is missing.
    """
    if isinstance(source, DatasetSettings):
        if not source.name:
            raise ValueError("`dataset.name` is empty: name a hub dataset, a folder or a file")
        subset, revision = subset or source.subset, revision or source.revision
        name, splits = source.name, splits or source.splits
    else:
        name = source
    host = _host.borrow("table")
    try:
        rows = host.open(host.Source(name=name, subset=subset, revision=revision, splits=list(splits)))
    except Exception as error:
        raise _host.refusal(error) from None
    return Rows(rows, columns)
