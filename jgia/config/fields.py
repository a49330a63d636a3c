"""Options by their flat names, as on the command line, from plain values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


class FieldError(ValueError):
    """A field that does not exist, or a value that it cannot take; ``where`` is added later."""


@functools.cache
def flat_fields(kind: type) -> Mapping[str, tuple[tuple[str, ...], Any]]:
    """Every option of a configuration: flat name to (path of attributes, type).

    Args:
      kind: a dataclass; fields that are dataclasses themselves are groups, not options.

    Raises:
      ValueError: two options share a name.

    >>> from jgia.config.commands import AuditConfig
    >>> flat_fields(AuditConfig)["fc_width"]
    (('model', 'fc_width'), <class 'int'>)
    """
    hints = get_type_hints(kind)
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        group = flat_fields(hint) if dataclasses.is_dataclass(hint) else {field.name: ((), hint)}
        for name, (path, inner) in group.items():
            if name in found:
                raise ValueError(f"{kind.__name__} has two options named {name!r}.")
            found[name] = ((field.name, *path), inner)
    return types.MappingProxyType(found)


def flatten(config: Any) -> dict[str, Any]:
    """The options of a configuration by flat name, the inverse of :func:`build`."""
    return {
        name: functools.reduce(getattr, path, config)
        for name, (path, _) in flat_fields(type(config)).items()
    }


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """A configuration from options by flat name; the others keep their defaults.

    Args:
      kind: the dataclass.
      values: of the right types already (:func:`convert`).

    Raises:
      ValueError: what the configuration itself refuses.
    """
    direct: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    fields = flat_fields(kind)
    for name, value in values.items():
        path, _ = fields[name]
        if len(path) == 1:
            direct[name] = value
        else:
            groups.setdefault(path[0], {})[name] = value
    hints = get_type_hints(kind)
    return kind(**direct, **{group: build(hints[group], inner) for group, inner in groups.items()})


def convert(kind: type, name: str, value: Any) -> Any:
    """A plain value (of TOML or JSON) as the option's type; lists become tuples.

    ``"None"`` stands for a value that is left out, where the option allows it.

    Raises:
      FieldError: no such option, or a value of another type; says what is allowed.

    >>> from jgia.config.commands import AuditConfig
    >>> convert(AuditConfig, "widths", [12, 12])
    (12, 12)
    """
    fields = flat_fields(kind)
    if name not in fields:
        close = difflib.get_close_matches(name, fields, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise FieldError(f"no such field{hint}; the fields are {', '.join(sorted(fields))}.")
    hint = fields[name][1]
    if not _fits(value, hint):
        raise FieldError(f"expected {describe(hint)}, got {value!r}.")
    return _as(value, hint)


def describe(hint: Any) -> str:
    """A type in words.

    >>> describe(tuple[int, ...] | None)
    'a list (each a whole number) or "None"'
    """
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        parts = [describe(part) for part in get_args(hint) if part is not type(None)]
        return " or ".join([*parts, '"None"'] if type(None) in get_args(hint) else parts)
    if get_origin(hint) is tuple:
        return f"a list (each {describe(get_args(hint)[0])})"
    return _WORDS.get(hint, "a path")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is type(None):
        return value is None or value == "None"
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(part, item) for part in value)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        accepted = int if hint is int else int | float
        return isinstance(value, accepted) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, str | Path) if hint is Path else isinstance(value, str)


def _as(value: Any, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not type(None) and _fits(value, part)]
        return _as(value, parts[0]) if parts else None
    if get_origin(hint) is tuple:
        return tuple(_as(part, get_args(hint)[0]) for part in value)
    return hint(value) if hint in (float, Path) else value
