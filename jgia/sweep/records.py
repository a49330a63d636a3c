"""What is kept of one cell: a JSON file that is there whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jgia._io import atomic_write_bytes
from jgia.config import AuditConfig
from jgia.config.fields import flatten
from jgia.report import SCHEMA_VERSION, validate_result

CellStatus = Literal["ok", "refused", "failed"]

FORMAT = "jgia-cell-1"
_STATUSES = ("ok", "refused", "failed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One finished cell.

    Attributes:
      key: :func:`cell_key` of the configuration; the name of the file.
      config: every option by flat name, as JSON holds it.
      status: ``"ok"``; ``"refused"``: the library said no before any compute; ``"failed"``:
        something went wrong on the way, and another try may succeed.
      error: why, in one sentence; empty for ``"ok"``.
      seconds: wall time, with everything.
      cpu_seconds: processor time of all threads: what remains comparable on a busy machine.
      peak_rss_bytes: largest resident memory; ``None`` where the system does not tell.
      peak_rss_scope: ``"cell"``, or ``"process"`` where it cannot be reset between cells.
      environment: versions and device.
      result: the documented schema of ``result.json`` with ``attack.candidates`` and what the
        record has itself (``config``, ``environment``, ``command``) left out; ``None`` unless
        ``"ok"``.
    """

    key: str
    config: Mapping[str, Any]
    status: CellStatus
    error: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int | None = None
    peak_rss_scope: str = "cell"
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    result: Mapping[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        """Write ``folder/KEY.json`` atomically."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        path = folder / f"{self.key}.json"
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        atomic_write_bytes(path, text.encode())
        return path


def cell_key(config: AuditConfig) -> str:
    """16 hexadecimal digits that depend on every option and on the result schema's version.

    Not on the content of data files: after changing one, sweep into another folder.

    >>> cell_key(AuditConfig()) == cell_key(AuditConfig(batch=32))
    True
    >>> cell_key(AuditConfig()) == cell_key(AuditConfig(batch=31))
    False
    """
    content = {"schema": SCHEMA_VERSION, "config": json_ready(flatten(config))}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def json_ready(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options as JSON reads them back: tuples to lists, paths to strings."""
    return json.loads(json.dumps(dict(values), default=str))


def trimmed(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what is long or in the record already.

    Raises:
      ValueError: the result does not follow the schema.
    """
    validate_result(result)
    kept = {k: v for k, v in result.items() if k not in ("config", "environment", "command")}
    kept["attack"] = {k: v for k, v in result["attack"].items() if k != "candidates"}
    return json.loads(json.dumps(kept, allow_nan=False))


def read_record(path: Path) -> CellRecord | None:
    """A record, or ``None`` if there is none or the file is not one of this format."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("format") != FORMAT or content["key"] != path.stem:
            return None
        record = CellRecord(**content)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    complete = isinstance(record.result, Mapping) == (record.status == "ok")
    return record if record.status in _STATUSES and complete else None
