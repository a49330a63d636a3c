"""The versioned schema of ``result.json``: every problem is named by its JSON path."""

from __future__ import annotations

import collections
import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, is_typeddict

from jgia.report import records
from jgia.report.records import Bounds, Result

SCHEMA_VERSION = "1.4"
"""Version of the schema: minor versions add keys, major versions change or remove them."""

_SLACK = 1e-9  # a closed-form interval at rate 1 can round to just past 1
_UNIONS = (types.UnionType, Union)
_NUMBERS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def validate_result(result: object) -> None:
    """Raise unless ``result`` is a complete, self-consistent result of this schema version.

    Checked: the major version; that every required key is there; the type and range of every
    value; that every number is finite (JSON has no NaN); and that counts, lists and matching agree
    with each other. Keys that the schema does not know are allowed, as minor versions add some,
    but must hold JSON values.

    Args:
      result: the mapping to check, as made by the audit or read back by ``json.load``. Tuples
        stand for JSON arrays.

    Raises:
      ValueError: the first problem found, as ``result.scores.psnr.median: expected ...``.

    >>> validate_result({"version": "1.4"})
    Traceback (most recent call last):
    ValueError: result.command: this key is missing; expected a string.
    """
    version = result.get("version") if isinstance(result, Mapping) else None
    if isinstance(version, str) and version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"result.version: this library reads schema {SCHEMA_VERSION}, got {version!r}; "
            "use the jgia version that wrote the result."
        )
    _check(result, Result, "result")
    checked: Any = result
    if len(checked["data"]["image_shape"]) != 3:
        raise _problem("result.data.image_shape", "[H, W, C]", checked["data"]["image_shape"])
    _check_attack(checked["attack"])
    if checked["scores"] is not None:
        _check_scores(checked["scores"])
    if "staged_search" in checked:
        _check_staged_search(checked["staged_search"], checked["scores"])
    if "risk" in checked and len(checked["risk"]["images"]) != checked["risk"]["num_images"]:
        raise _problem(
            "result.risk.images",
            f"one entry per estimated image, {checked['risk']['num_images']}",
            len(checked["risk"]["images"]),
        )


def in_schema_order(result: Mapping[str, Any]) -> dict[str, Any]:
    """Copy with keys in the order of the schema; keys outside of it follow, sorted by name.

    Tuples become lists, so that the copy equals what ``json.load`` gives back.
    """
    return _order(result, Result)


def _order(value: Any, hint: Any) -> Any:
    hint, _ = _unwrap(hint)
    if get_origin(hint) in _UNIONS:
        hint, _ = _unwrap(_without_none(hint)[0])
    if isinstance(value, Mapping):
        fields = _fields(hint) if is_typeddict(hint) else {}
        default = get_args(hint)[1] if get_origin(hint) is dict else Any
        keys = [*(key for key in fields if key in value), *sorted(set(value) - set(fields))]
        return {key: _order(value[key], fields.get(key, default)) for key in keys}
    if isinstance(value, list | tuple):
        inner = get_args(hint)[0] if get_origin(hint) is list else Any
        return [_order(item, inner) for item in value]
    return value


def _fields(typed_dict: Any) -> dict[str, Any]:
    return dict(typed_dict.__annotations__)


def _unwrap(hint: Any) -> tuple[Any, Bounds | None]:
    """The annotation inside ``NotRequired`` and ``Annotated``, and its bounds."""
    bounds = None
    while get_origin(hint) in (NotRequired, Annotated):
        bounds = next((extra for extra in get_args(hint) if isinstance(extra, Bounds)), bounds)
        hint = get_args(hint)[0]
    return hint, bounds


def _without_none(union: Any) -> list[Any]:
    return [option for option in get_args(union) if option is not type(None)]


def _problem(path: str, expected: str, value: object) -> ValueError:
    hint = ""
    if type(value).__module__.split(".")[0] in ("numpy", "jax", "jaxlib"):
        hint = "; convert arrays with .tolist() and array scalars with .item()"
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ValueError(f"{path}: expected {expected}, got {shown}{hint}.")


def _check(value: Any, hint: Any, path: str) -> None:
    hint, bounds = _unwrap(hint)
    origin = get_origin(hint)
    if origin in _UNIONS:
        _check_union(value, hint, path)
    elif hint is Any:
        _check_json(value, path)
    elif is_typeddict(hint):
        _check_typed_dict(value, hint, path)
    elif origin is dict:
        for key, item in _items(value, path):
            _check(item, get_args(hint)[1], f"{path}.{key}")
    elif origin is list:
        if not isinstance(value, list | tuple):
            raise _problem(path, "a list", value)
        for index, item in enumerate(value):
            _check(item, get_args(hint)[0], f"{path}[{index}]")
    elif origin is Literal:
        if value not in get_args(hint):
            raise _problem(path, f"one of {', '.join(map(repr, get_args(hint)))}", value)
    else:
        _check_scalar(value, hint, bounds, path)


def _check_union(value: Any, union: Any, path: str) -> None:
    """``T | None`` reports the problems of T; a union of scalars must hold one of them."""
    others = _without_none(union)
    if value is None:
        return
    if len(others) == 1:
        _check(value, others[0], path)
    elif isinstance(value, Mapping | list | tuple):
        raise _problem(path, "a JSON scalar (string, number, boolean or null)", value)
    else:
        _check_json(value, path)


def _check_typed_dict(value: Any, typed_dict: Any, path: str) -> None:
    items = dict(_items(value, path))
    for key, hint in _fields(typed_dict).items():
        if key in items:
            _check(items[key], hint, f"{path}.{key}")
        elif get_origin(hint) is not NotRequired:
            raise ValueError(f"{path}.{key}: this key is missing; expected {_describe(hint)}.")
    for key in items.keys() - _fields(typed_dict).keys():
        _check(items[key], records.EXTRA.get(typed_dict, Any), f"{path}.{key}")


def _describe(hint: Any) -> str:
    hint, _ = _unwrap(hint)
    if get_origin(hint) in _UNIONS:
        return f"{_describe(_without_none(hint)[0])} or null"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is list:
        return "a list"
    return _NUMBERS.get(hint, "an object")


def _items(value: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise _problem(path, "an object", value)
    for key in value:
        if not isinstance(key, str):
            raise _problem(path, "an object whose keys are strings", key)
    return list(value.items())


def _check_scalar(value: Any, kind: type, bounds: Bounds | None, path: str) -> None:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind in (int, float) and isinstance(value, bool)):
        raise _problem(path, _NUMBERS[kind], value)
    if kind is float and not math.isfinite(value):
        raise _problem(path, "a finite number (null where a value is undefined)", value)
    if bounds is not None and not bounds.low - _SLACK <= value <= bounds.high + _SLACK:
        raise _problem(path, f"a value from {bounds.low:g} to {bounds.high:g}", value)


def _check_json(value: Any, path: str) -> None:
    """Any JSON value, all the way down."""
    if isinstance(value, Mapping):
        for key, item in _items(value, path):
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{path}[{index}]")
    elif isinstance(value, float):
        _check_scalar(value, float, None, path)
    elif not (value is None or isinstance(value, str | int)):
        raise _problem(path, "a JSON value", value)


def _check_attack(attack: Mapping[str, Any]) -> None:
    path = "result.attack"
    if attack["num_candidates"] != len(attack["candidates"]):
        raise _problem(
            f"{path}.num_candidates",
            f"the length of {path}.candidates, {len(attack['candidates'])}",
            attack["num_candidates"],
        )
    counts = collections.Counter(candidate["status"] for candidate in attack["candidates"])
    given = {status: count for status, count in attack["status_counts"].items() if count}
    if given != counts:
        raise _problem(
            f"{path}.status_counts", f"the counts of the candidates' statuses {dict(counts)}", given
        )


def _check_staged_search(search: Mapping[str, Any], scores: Mapping[str, Any] | None) -> None:
    """Every list must have one entry per restart (or true image), and the choice be one of them."""
    path, stages = "result.staged_search", search["stages"]
    if search["stage"] >= len(stages):
        raise _problem(f"{path}.stage", f"an index below {len(stages)}", search["stage"])
    restarts = len(stages[0]["distances"])
    if search["restart"] >= restarts:
        raise _problem(f"{path}.restart", f"an index below {restarts}", search["restart"])
    for index, stage in enumerate(stages):
        where = f"{path}.stages[{index}]"
        for name in ("distances", "curve_losses"):
            if len(stage[name]) != restarts:
                raise _problem(f"{where}.{name}", f"one per restart, {restarts}", stage[name])
        points = len(stage["curve_steps"])
        if any(len(line) != points for line in stage["curve_losses"]):
            raise _problem(
                f"{where}.curve_losses", f"lists of {points}, as curve_steps", stage["curve_losses"]
            )
        if "psnr" in stage:
            expected = 0 if scores is None else scores["num_true"]
            if len(stage["psnr"]) != expected:
                raise _problem(
                    f"{where}.psnr", f"one entry per true image, {expected}", stage["psnr"]
                )


def _check_scores(scores: Mapping[str, Any]) -> None:
    path = "result.scores"
    num_true, matching = scores["num_true"], scores["matching"]
    lists = {
        "matching": matching,
        "psnr.per_image": scores["psnr"]["per_image"],
        "ssim.per_image": scores["ssim"]["per_image"],
    }
    if "lpips" in scores:
        lists["lpips.per_image"] = scores["lpips"]["per_image"]
    for name, values in lists.items():
        if len(values) != num_true:
            raise _problem(f"{path}.{name}", f"one entry per true image, {num_true}", values)
        for index, (value, match) in enumerate(zip(values, matching, strict=True)):
            if match is None and value is not None:
                raise _problem(f"{path}.{name}[{index}]", "null, as matching has null here", value)
            if match is not None and value is None and name == "psnr.per_image":
                raise _problem(f"{path}.{name}[{index}]", "a number: this image is matched", value)
    matched = [match for match in matching if match is not None]
    if len(set(matched)) != len(matched):
        raise _problem(f"{path}.matching", "each reconstruction at most once", matching)
    if any(match >= scores["num_reconstructed"] for match in matched):
        raise _problem(
            f"{path}.matching", f"indices below {scores['num_reconstructed']}", max(matched)
        )
    _check_rates(scores)


def _check_rates(scores: Mapping[str, Any]) -> None:
    """Rates and counts must be those of the values per image; baselines' only consistent."""
    path, num_true = "result.scores", scores["num_true"]
    values = [value for value in scores["psnr"]["per_image"] if value is not None]
    limit = scores.get("recovered_threshold_db", records.RECOGNIZABLE_DB)
    recovered = sum(value >= limit for value in values)
    if scores["num_recovered"] != recovered:
        raise _problem(
            f"{path}.num_recovered",
            f"the number of true images at >= {limit:g} dB, {recovered}",
            scores["num_recovered"],
        )
    for threshold in records.THRESHOLDS:
        rate = scores["success_rate"][threshold]
        share = sum(value >= float(threshold) for value in values) / num_true
        if abs(rate["rate"] - share) > _SLACK:
            raise _problem(
                f"{path}.success_rate.{threshold}.rate",
                f"the share of true images at >= {threshold} dB, {share:g}",
                rate["rate"],
            )
    tables = {"success_rate": scores["success_rate"]}
    for name, baseline in scores["baselines"].items():
        if "success_rate" in baseline:
            tables[f"baselines.{name}.success_rate"] = baseline["success_rate"]
    for name, by_threshold in tables.items():
        for threshold in records.THRESHOLDS:
            rate = by_threshold[threshold]
            if not rate["low"] - _SLACK <= rate["rate"] <= rate["high"] + _SLACK:
                raise _problem(f"{path}.{name}.{threshold}", "low <= rate <= high", rate)
