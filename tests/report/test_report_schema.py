from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.metrics import score
from jgia.report import SCHEMA_VERSION, in_schema_order, records, to_json, validate_result

FREE = ("config", "stats", "candidates", "status_counts")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Every key and index below ``value``."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        found.append((*prefix, key))
        if isinstance(item, dict | list):
            found += paths(item, (*prefix, key))
    return found


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def dotted(path: tuple) -> str:
    return "result" + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path)


def replaced(result: dict, path: tuple, value: Any) -> dict:
    changed = copy.deepcopy(result)
    at(changed, path[:-1])[path[-1]] = value
    return changed


def message(result: object) -> str:
    with pytest.raises(ValueError, match="result") as error:
        validate_result(result)
    return str(error.value)


def test_accepts_a_valid_result_with_and_without_scores(case):
    validate_result(case.result)
    validate_result({**case.result, "scores": None})
    validate_result(json.loads(to_json(case.result)))


@pytest.mark.parametrize("unmatched", [0, 4])
def test_accepts_all_and_none_matched(make_case, unmatched):
    validate_result(make_case(unmatched=unmatched).result)


def test_each_missing_key_is_rejected_by_its_path(case):
    optional = {("scores", "baselines", "dataset_mean", "success_rate"), ("timings", "leak_s")}
    tried = 0
    for path in paths(case.result):
        free = any(key in FREE for key in path[:-1]) or path[:2] == ("scores", "baselines")
        if path in optional or isinstance(path[-1], int) or (free and path[-1] != "status"):
            continue
        broken = copy.deepcopy(case.result)
        del at(broken, path[:-1])[path[-1]]
        assert message(broken).startswith(f"{dotted(path)}: this key is missing"), path
        tried += 1
    assert tried > 75


def test_wrong_types_are_rejected_by_their_path(case):
    for path in paths(case.result):
        if path[0] == "config" or path[1:2] == ("stats",):
            continue  # free JSON
        wrong = replaced(case.result, path, {1, 2})
        assert message(wrong).startswith(f"{dotted(path)}: expected"), path


def test_nan_and_infinity_are_rejected_everywhere(case):
    for path in paths(case.result):
        if isinstance(at(case.result, path), float):
            for bad in (float("nan"), float("inf")):
                assert dotted(path) in message(replaced(case.result, path, bad)), path


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        (("seed",), True, "an integer"),
        (("seed",), np.int64(3), ".item()"),
        (("seed",), 3.0, "an integer"),
        (("timings", "run_s"), -1.0, "from 0"),
        (("timings", "leak_s"), "fast", "a number"),
        (("timings", "run_s"), np.float32(1), ".item()"),
        (("data", "image_shape"), [8, 8], "[H, W, C]"),
        (("threat_model", "server"), "evil", "'honest_but_curious'"),
        (("attack", "candidates", 0, "bin"), [1], "a JSON scalar"),
        (("attack", "num_candidates"), 99, "the length of"),
        (("attack", "status_counts", "exact"), 2, "the counts"),
        (("scores", "matching"), [2, 1, 1, None], "at most once"),
        (("scores", "matching"), [7, 1, 0, None], "indices below 3"),
        (("scores", "matching"), [2, 1, 0], "one entry per true image"),
        (("scores", "psnr", "per_image", 3), 20.0, "null, as matching"),
        (("scores", "psnr", "per_image", 0), None, "a number: this image is matched"),
        (("scores", "num_recovered"), 1, "number of true images at >= 18 dB, 3"),
        (("scores", "recovered_threshold_db"), 40, "number of true images at >= 40 dB, 1"),
        (("scores", "success_rate", "40", "rate"), 0.5, "share of true images"),
        (("scores", "success_rate", "40", "low"), 0.9, "low <= rate <= high"),
        (("scores", "success_rate", "18", "high"), 1.5, "from 0 to 1"),
        (("version",), "2.0", "reads schema 1.4"),
    ],
)
def test_inconsistent_values_are_rejected(case, path, value, hint):
    text = message(replaced(case.result, path, value))
    assert dotted(path[:1]) in text
    assert hint in text


@pytest.mark.parametrize("result", [None, [], "x", 3])
def test_something_else_than_an_object_is_rejected(result):
    assert "expected an object" in message(result)


def test_keys_that_are_not_strings_are_rejected(case):
    assert "keys are strings" in message(replaced(case.result, ("config", "attack"), {1: 2}))


def test_minor_versions_may_add_keys(case):
    validate_result({**case.result, "version": "1.7", "new": {"a": [1, None]}})
    assert "result.new.a" in message({**case.result, "new": {"a": object()}})


def test_scores_of_the_metrics_pass_unchanged(make_case):
    case = make_case(6, (12, 12, 3), unmatched=2)
    block = score(case.reconstructions, case.originals, pool=case.originals[::-1])
    validate_result({**case.result, "scores": block})
    tiny = make_case(3, (8, 8, 1), unmatched=3)
    block = score(tiny.reconstructions, tiny.originals)
    assert "note" in block["ssim"]
    validate_result({**tiny.result, "scores": block})


def test_a_rate_one_rounding_error_past_its_interval_is_accepted(case):
    validate_result(replaced(case.result, ("scores", "success_rate", "18", "high"), 1 + 1e-15))


def test_key_order_is_that_of_the_schema_whatever_the_input(case):
    shuffled = dict(sorted(case.result.items(), reverse=True))
    shuffled["data"] = dict(sorted(shuffled["data"].items()))
    shuffled["zeta"], shuffled["alpha"] = 1, 2
    order = in_schema_order(shuffled)
    known = [key for key in records.Result.__annotations__ if key not in ("staged_search", "risk")]
    assert list(order) == [*known, "alpha", "zeta"]
    assert list(order["data"]) == list(records.Data.__annotations__)
    assert list(order["scores"]["success_rate"]["18"]) == ["rate", "low", "high"]
    assert list(order["timings"]) == ["setup_s", "compile_s", "run_s", "total_s", "leak_s"]
    assert order == shuffled


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tree=JSON)
def test_free_json_survives_unchanged(tree):
    text = json.dumps(in_schema_order({"config": {"x": tree}}), allow_nan=False)
    assert json.loads(text) == {"config": {"x": tree}}


def test_json_is_strict_and_ends_with_a_newline(case):
    text = to_json(case.result)
    assert text.endswith("}\n")
    assert json.loads(text) == case.result
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(replaced(case.result, ("attack", "stats", "gap"), float("nan")))


def test_every_key_is_documented():
    page = Path(__file__).parents[2] / "docs" / "result-schema.md"
    text = page.read_text("utf-8")
    assert f"**{SCHEMA_VERSION}**" in text
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    typed = [item for item in vars(records).values() if hasattr(item, "__required_keys__")]
    assert len(typed) >= 14
    for item in typed:
        for name in item.__annotations__:
            assert name in named, (item, name)
