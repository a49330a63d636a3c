"""Many audits in one TOML file: what crosses, what goes together, which seeds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jgia.config.commands import AuditConfig
from jgia.config.fields import FieldError, build, convert, flat_fields, flatten

MAX_CELLS = 10_000
"""More cells than this are taken for a slip of the pen."""

_TABLES = ("name", "seeds", "base", "axes", "zip", "cells")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One audit of a sweep.

    Attributes:
      config: what is run.
      fields: the options that vary within the sweep, by flat name, with this cell's values.
    """

    config: AuditConfig
    fields: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The cell in words: ``batch=8 front_end=signed seed=0``."""
        return " ".join(f"{name}={shown(value)}" for name, value in self.fields.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as it was read.

    Attributes:
      name: for tables and figures.
      cells: in the order of the file: axes (the first varies slowest), zipped groups, seeds;
        then single cells.
      varying: flat names of the options that differ between cells, ``seed`` last.
      source: the text of the file.
    """

    name: str
    cells: tuple[Cell, ...]
    varying: tuple[str, ...]
    source: str = ""


def read_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep; every cell's options are built before anything runs.

    The cells are the product of all ``[axes]``, all ``[[zip]]`` groups and all ``seeds``, each on
    top of ``[base]``; every one of ``[[cells]]`` adds a single cell on top of ``[base]``, for each
    seed. Fields have their names on the command line, with ``-`` or ``_``.

    Args:
      path: the TOML file.

    Raises:
      OSError: the file cannot be read.
      ValueError: no TOML; an unknown table or field; a value of the wrong type or out of range; an
        empty axis; zipped lists of different lengths; a field set twice in one place; a cell that
        appears twice. The message names file, key and what is allowed.
    """
    location = Path(path)
    try:
        source = location.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location} is not UTF-8 text, as TOML has to be.") from error
    return parse_sweep(source, where=str(location))


def parse_sweep(source: str, *, where: str = "sweep") -> Sweep:
    """:func:`read_sweep` of a text; ``where`` begins every message.

    >>> sweep = parse_sweep('''
    ... seeds = [0, 1]
    ... [axes]
    ... batch = [4, 8]
    ... ''')
    >>> [cell.label for cell in sweep.cells]
    ['batch=4 seed=0', 'batch=4 seed=1', 'batch=8 seed=0', 'batch=8 seed=1']
    """
    try:
        tables = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is no TOML: {error}.") from error
    return _Reader(where).sweep(tables, source)


def shown(value: Any) -> str:
    """An option's value in a label or a table."""
    if isinstance(value, tuple):
        return "+".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Reader:
    """The checks of one file, each naming it."""

    def __init__(self, where: str) -> None:
        self.where = where

    def refuse(self, key: str, message: str) -> NoReturn:
        raise ValueError(f"{self.where}: {key}: {message}")

    def sweep(self, tables: Mapping[str, Any], source: str) -> Sweep:
        for key in tables:
            if key not in _TABLES:
                known = key.replace("-", "_") in flat_fields(AuditConfig)
                remedy = "options go into [base]; " if known else ""
                self.refuse(key, f"unknown key; {remedy}a sweep has {', '.join(_TABLES)}.")
        name = tables.get("name", Path(self.where).stem)
        if not isinstance(name, str) or not name.strip():
            self.refuse("name", f"expected a string, got {name!r}.")
        base = self._fields("base", self._table("base", tables.get("base", {})))
        groups = self._axes(tables) + self._zips(tables)
        self._disjoint(groups)
        singles = [
            self._fields(f"cells[{i}]", table)
            for i, table in enumerate(self._tables(tables, "cells"))
        ]
        for i, single in enumerate(singles):
            if not single:
                self.refuse(f"cells[{i}]", "sets no field; leave it out.")
        seeds = self._seeds(tables)
        number = (math.prod(map(len, groups)) if groups or not singles else 0) + len(singles)
        if number * len(seeds) > MAX_CELLS:
            self.refuse("axes", f"{number * len(seeds)} cells; at most {MAX_CELLS} are allowed.")
        grid = list(_product(groups)) if groups or not singles else []
        return self._assemble(name, base, [*grid, *singles], seeds, source)

    def _assemble(
        self,
        name: str,
        base: dict[str, Any],
        points: list[dict[str, Any]],
        seeds: list[int],
        source: str,
    ) -> Sweep:
        used = dict.fromkeys(key for point in points for key in point)
        built: dict[AuditConfig, None] = {}
        for point, seed in itertools.product(points, seeds):
            label = " ".join(f"{k}={shown(v)}" for k, v in {**point, "seed": seed}.items())
            try:
                config = build(AuditConfig, {**base, **point, "seed": seed})
            except ValueError as error:
                self.refuse(f"cell {label}", str(error))
            if config in built:
                self.refuse(f"cell {label}", "this cell is there twice; drop one.")
            built[config] = None
        flat = [flatten(config) for config in built]
        varying = [k for k in used if any(row[k] != flat[0][k] for row in flat)]
        varying = tuple([*varying, "seed"] if len(seeds) > 1 or not varying else varying)
        cells = tuple(
            Cell(config=config, fields={key: row[key] for key in varying})
            for config, row in zip(built, flat, strict=True)
        )
        return Sweep(name=name, cells=cells, varying=varying, source=source)

    def _axes(self, tables: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        axes = []
        for key, values in self._table("axes", tables.get("axes", {})).items():
            where = f"axes.{key}"
            items = self._list(where, values)
            axes.append([self._field(f"{where}[{i}]", key, v) for i, v in enumerate(items)])
        return axes

    def _zips(self, tables: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        groups = []
        for i, table in enumerate(self._tables(tables, "zip")):
            columns = {key: self._list(f"zip[{i}].{key}", values) for key, values in table.items()}
            lengths = {key: len(values) for key, values in columns.items()}
            if not columns:
                self.refuse(f"zip[{i}]", "names no field.")
            if len(set(lengths.values())) > 1:
                listed = ", ".join(f"{key} has {count}" for key, count in lengths.items())
                self.refuse(f"zip[{i}]", f"the lists must have the same length; {listed}.")
            group = []
            for j, row in enumerate(zip(*columns.values(), strict=True)):
                values = dict(zip(columns, row, strict=True))
                group.append(self._fields(f"zip[{i}]", values, f"[{j}]"))
            groups.append(group)
        return groups

    def _disjoint(self, groups: list[list[dict[str, Any]]]) -> None:
        seen: set[str] = set()
        for group in groups:
            twice = seen & set(group[0])
            if twice:
                self.refuse(min(twice), "is in two axes or zipped groups; each may be in one.")
            seen |= set(group[0])

    def _seeds(self, tables: Mapping[str, Any]) -> list[int]:
        seeds = self._list("seeds", tables.get("seeds", [0]))
        return [self._convert(f"seeds[{i}]", "seed", seed) for i, seed in enumerate(seeds)]

    def _fields(self, where: str, table: Mapping[str, Any], index: str = "") -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in table.items():
            field = self._field(f"{where}.{key}{index}", key, value)
            if fields.keys() & field.keys():
                self.refuse(f"{where}.{key}", "is there twice, once with - and once with _.")
            fields |= field
        return fields

    def _field(self, where: str, key: str, value: Any) -> dict[str, Any]:
        name = key.replace("-", "_")
        if name == "seed":
            self.refuse(where, "seeds go to the top of the file: seeds = [0, 1].")
        return {name: self._convert(where, name, value)}

    def _convert(self, where: str, name: str, value: Any) -> Any:
        try:
            return convert(AuditConfig, name, value)
        except FieldError as error:
            self.refuse(where, str(error))

    def _table(self, where: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.refuse(where, f"expected a table [{where}], got {value!r}.")
        return value

    def _tables(self, tables: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        value = tables.get(key, [])
        if not isinstance(value, list):
            self.refuse(key, f"expected [[{key}]], with two brackets.")
        return [self._table(f"{key}[{i}]", table) for i, table in enumerate(value)]

    def _list(self, where: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            self.refuse(where, f"expected a list of values, got {value!r}.")
        if not value:
            self.refuse(where, "is an empty list, so there would be no cell; leave it out.")
        return value


def _product(groups: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for points in itertools.product(*groups):
        yield {key: value for point in points for key, value in point.items()}
