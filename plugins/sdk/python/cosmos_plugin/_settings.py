"""The run's settings: its dataset section, and the plugin's own table of `[custom]` as a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from ._errors import SettingsError

T = TypeVar("T")

_PLAIN: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
_SAID: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def option(
    default: T,
    *,
    help: str = "",
    minimum: Union[float, None] = None,
    maximum: Union[float, None] = None,
) -> T:
    """A field of an options dataclass with a description and bounds for the settings schema."""
    extra: dict[str, Any] = {"description": help, "minimum": minimum, "maximum": maximum}
    metadata = {"cosmos": {key: value for key, value in extra.items() if value not in (None, "")}}
    if isinstance(default, list):
        made: Any = dataclasses.field(default_factory=default.copy, metadata=metadata)
    else:
        made = dataclasses.field(default=default, metadata=metadata)
    return typing.cast(T, made)


@dataclass(frozen=True)
class DatasetSettings:
    """A dataset section of the run: for a validation dataset or reward, the validation section's."""

    name: str = ""
    """Hub id or local path."""
    subset: str = ""
    revision: str = ""
    splits: Sequence[str] = ()
    test_size: Union[int, float, None] = None
    """How many of the first rows to use, a count or a fraction."""

    def limit(self, rows: int) -> int:
        """How many of `rows` rows `test_size` leaves: the first ones, never a random choice."""
        size = self.test_size
        if size is None:
            return rows
        if isinstance(size, int):
            return min(rows, max(size, 0))
        if not 0.0 <= size <= 1.0:
            raise SettingsError(f"`dataset.test_size` is {size}: give a number of rows, or a fraction between 0 and 1")
        return int(rows * size)


class Settings:
    """What the run says to a plugin."""

    def __init__(self, plugin_name: str, dataset: DatasetSettings, custom: Mapping[str, Any]) -> None:
        self.dataset = dataset
        self.custom = custom
        """The run's whole `[custom]` section, one table per plugin."""
        self._plugin_name = plugin_name
        self._own: dict[type[Any], Any] = {}

    @classmethod
    def parse(cls, plugin_name: str, text: str) -> Settings:
        """From the host's JSON."""
        try:
            value = json.loads(text) if text.strip() else {}
        except ValueError as error:
            raise SettingsError(f"the settings are not JSON: {error}") from None
        section = _table(value, "the settings")
        raw = _table(section.get("dataset"), "`dataset`")
        split = raw.get("split")
        splits = [split] if isinstance(split, str) else list(split or ())
        dataset = DatasetSettings(
            name=_text(raw, "name"),
            subset=_text(raw, "subset"),
            revision=_text(raw, "revision"),
            splits=[one for one in splits if one],
            test_size=raw.get("test_size"),
        )
        return cls(plugin_name, dataset, _table(section.get("custom"), "`custom`"))

    def own(self, options: type[T]) -> T:
        """The plugin's own table, `[custom.<plugin>]`, as the dataclass `options`."""
        if options not in self._own:
            place = f"custom.{self._plugin_name}"
            table = _table(self.custom.get(self._plugin_name), f"`{place}`")
            self._own[options] = _read(options, table, place)
        return typing.cast(T, self._own[options])


def schema(plugin_name: str, options: type[Any]) -> str:
    """The JSON schema of the settings of a plugin with these options."""
    hints = typing.get_type_hints(options)
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        kind = _schema_of(hints[field.name], f"{options.__name__}.{field.name}")
        default = _default(field)
        if default is dataclasses.MISSING:
            raise TypeError(f"`{options.__name__}.{field.name}` has no default: a run may leave any setting out")
        properties[field.name] = {**kind, "default": default, **field.metadata.get("cosmos", {})}
    own = {"type": "object", "additionalProperties": False, "properties": properties}
    return json.dumps(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {"custom": {"type": "object", "properties": {plugin_name: own}}},
        },
        ensure_ascii=False,
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _table(value: Any, place: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{place} is not a table")
    return value


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise SettingsError(f"`dataset.{key}` is not a text")
    return value or ""


def _variants(hint: Any) -> tuple[list[Any], bool]:
    """The types of a union without `None`, and whether `None` was among them."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = list(typing.get_args(hint))
        return [part for part in parts if part is not type(None)], type(None) in parts
    return [hint], False


def _schema_of(hint: Any, place: str) -> dict[str, Any]:
    kinds, optional = _variants(hint)
    if len(kinds) != 1:
        raise TypeError(f"`{place}`: a setting has one type, or one type and `None`")
    kind = kinds[0]
    made: dict[str, Any]
    if kind in _PLAIN:
        made = {"type": _PLAIN[kind]}
    elif typing.get_origin(kind) is Literal:
        made = {"enum": list(typing.get_args(kind))}
    elif typing.get_origin(kind) is list and typing.get_args(kind)[0] in _PLAIN:
        made = {"type": "array", "items": {"type": _PLAIN[typing.get_args(kind)[0]]}}
    else:
        raise TypeError(f"`{place}`: a setting is a bool, int, float, str, a list of those or a Literal, not {kind}")
    if optional and "type" in made:
        made["type"] = [made["type"], "null"]
    elif optional:
        made["enum"].append(None)
    return made


def _read(options: type[T], table: Mapping[str, Any], place: str) -> T:
    if not (dataclasses.is_dataclass(options) and isinstance(options, type)):
        raise TypeError(f"`{options!r}` is not a dataclass")
    hints = typing.get_type_hints(options)
    fields = {field.name: field for field in dataclasses.fields(options)}
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            known = f"did you mean `{near[0]}`?" if near else "it has " + ", ".join(f"`{name}`" for name in fields)
            raise SettingsError(f"`{place}` has no setting `{key}`: {known}")
    values = {key: _value(hints[key], fields[key], value, f"{place}.{key}") for key, value in table.items()}
    return typing.cast(T, options(**values))


def _value(hint: Any, field: dataclasses.Field[Any], value: Any, place: str) -> Any:
    kinds, optional = _variants(hint)
    if value is None and optional:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise SettingsError(f"`{place}` is {json.dumps(value)}: choose {' or '.join(map(json.dumps, choices))}")
        return value
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise SettingsError(f"`{place}` is {json.dumps(value)}, not a list")
        return [_plain(item, one, f"{place}[{index}]") for index, one in enumerate(value)]
    checked = _plain(kind, value, place)
    bounds = field.metadata.get("cosmos", {})
    if "minimum" in bounds and checked < bounds["minimum"]:
        raise SettingsError(f"`{place}` is {checked}, below {bounds['minimum']}")
    if "maximum" in bounds and checked > bounds["maximum"]:
        raise SettingsError(f"`{place}` is {checked}, above {bounds['maximum']}")
    return checked


def _plain(kind: Any, value: Any, place: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise SettingsError(f"`{place}` is {json.dumps(value)}, not {_SAID[kind]}")
    return value
