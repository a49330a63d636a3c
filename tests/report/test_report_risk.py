"""The section of a risk estimate, and its part of the schema."""

import copy
import json

import numpy as np
import pytest

from jgia.report import validate_result, write_report
from jgia.report.html import render_html


def record(psnr=(40.0, 12.0)):
    return {
        "num_images": 2,
        "mean": 0.5,
        "worst": 0.75,
        "noise_std": 0.01,
        "noise_from": "the defense",
        "prior": "gaussian",
        "prior_rank": 192,
        "prior_energy": 12.0,
        "route": "qr",
        "left_out": ["top_k"],
        "images": [
            {
                "risk": risk,
                "predicted_psnr": predicted,
                "invloss": 3.0,
                "information": 100.0,
                "linearization_ratio": 0.1,
                "attack_psnr": attained,
            }
            for risk, predicted, attained in zip((0.25, 0.75), (14.0, 20.0), psnr, strict=True)
        ],
        "layers": {"a<b": {"mean": 0.2, "worst": 0.3}, "head": {"mean": 0.4, "worst": 0.5}},
        "spectrum": {"ranks": [1, 10, 192], "signal_over_noise": [100.0, 3.0, 0.01]},
    }


@pytest.fixture
def result(case):
    made = copy.deepcopy(case.result)
    made["risk"] = record()
    return made


def rendered(case, result, **changes):
    return render_html(
        result | {"risk": result["risk"] | changes},
        case.originals,
        case.aligned,
        pixel_errors=np.full((2, *case.originals.shape[1:]), 0.01),
    )


def test_section_shows_everything(case, result):
    page = rendered(case, result)
    for text in (
        "Risk without an attack",
        "75% at worst",
        "Noise on every shared entry: standard deviation 0.01. Not in the estimate: top_k.",
        "Predicted and attained",
        "a&lt;b",
        "Attained over predicted PSNR of 2 images",
        "Which pixels leak",
        "below 1 the noise hides a direction",
    ):
        assert text in page, text
    assert page.index(">head<") < page.index("a&lt;b")  # the layer that leaks most comes first
    assert "Risk without" not in render_html(case.result, case.originals, case.aligned)
    assert page.count("<circle") == 2


def test_assumed_noise_is_said_and_missing_parts_are_left_out(case, result):
    images = [row | {"attack_psnr": None} for row in result["risk"]["images"]]
    page = rendered(
        case, result, noise_from="assumed", spectrum=None, layers={}, images=images, left_out=[]
    )
    assert "the attack may do better" in page
    assert "Attained over" not in page
    assert "hides a direction" not in page
    assert "Risk of each layer" not in page


def test_schema_checks_the_estimate(result):
    validate_result(result)
    for path, value, message in (
        (("mean",), 1.5, "result.risk.mean"),
        (("num_images",), 3, "one entry per estimated image, 3"),
        (("noise_from",), "hearsay", "result.risk.noise_from"),
        (("images", 0, "risk"), float("nan"), r"result.risk.images\[0\].risk"),
    ):
        wrong = copy.deepcopy(result)
        place = wrong["risk"]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(ValueError, match=message):
            validate_result(wrong)


def test_pixel_errors_are_written(case, result, tmp_path):
    errors = np.full((2, *case.originals.shape[1:]), 0.01, np.float32)
    paths = write_report(
        tmp_path,
        result,
        originals=case.originals,
        reconstructions=case.reconstructions,
        scores=case.scores,
        statuses=case.statuses,
        pixel_errors=errors,
    )
    with np.load(paths["reconstructions.npz"]) as arrays:
        np.testing.assert_array_equal(arrays["pixel_errors"], errors)
    assert json.loads(paths["result.json"].read_text())["risk"] == result["risk"]
