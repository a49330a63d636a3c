"""The page's section on a search in stages, its part of the schema, and how it is made."""

import copy
import re

import numpy as np
import pytest

from jgia.audit_stages import staged_search
from jgia.observation import History, Reconstruction, Status
from jgia.report import validate_result
from jgia.report.html import render_html
from jgia.report.search import SearchHistory, search_section
from jgia.report.stages import stages_section

DISTANCES = [[0.5, 0.4, None], [0.2, 0.1, 0.3], [0.25, 0.15, 0.2]]


def _search(**fields):
    return {
        "prior": "faces",
        "stage": 1,
        "restart": 1,
        "why": "stage 1 (features 4x4x8) of restart 1 has the smallest gradient distance, 0.1",
        "budget_steps": None,
        "budget_seconds": None,
        "stopped_early": False,
        "stages": [
            {
                "searched": name,
                "steps": 20,
                "seconds": 1.5,
                "distances": line,
                "curve_steps": [1, 20],
                "curve_losses": [[1.0, 0.5], [1.0, None], [1.0, 0.4]],
                "psnr": [30.0 + k, 20.0, 10.0, None],
            }
            for k, (name, line) in enumerate(
                zip(("latent codes", "features 4x4x8", "features 8x8x8"), DISTANCES, strict=True)
            )
        ],
        **fields,
    }


def _history(images=3, stages=3):
    rng = np.random.default_rng(0)
    return SearchHistory(
        steps=np.arange(1, 61),
        losses=np.linspace(1, 0.1, 60),
        frame_steps=20 * np.arange(1, stages + 1),
        frames=rng.uniform(size=(stages, images, 8, 8, 3)),
    )


@pytest.fixture
def result(case):
    return {**case.result, "staged_search": _search()}


def test_an_attack_without_stages_has_no_section(case):
    assert stages_section(case.result, case.originals, _history(), None) == ""


def test_every_returned_image_has_its_original_and_every_stage(case, result):
    page = stages_section(result, case.originals, _history(), ["cat", "dog", "<b>", "owl"])
    assert page.count("data:image/png;base64,") == 3 * (1 + 3)  # the fourth was not matched
    assert page.count('alt="Original image') == 3
    assert page.count("after stage 2") == 3
    assert "image 3 (&lt;b&gt;)" in page
    assert "image 4" not in page
    assert "stage 1, returned" in page
    assert "32.0 dB" in page


def test_rows_follow_the_matching(case, result):
    frames = np.zeros((3, 3, 8, 8, 3))
    frames[:, 2] = 1.0  # what the first original is matched with
    history = SearchHistory(
        steps=np.array([1]), losses=np.ones(1), frame_steps=np.array([1, 2, 3]), frames=frames
    )
    page = stages_section(result, case.originals, history, None)
    rows = re.findall(r"<tr>.*?</tr>", page[page.index("original</th>") :])
    first, second = (re.findall(r'src="([^"]+)"', row)[1:] for row in rows[:2])
    assert case.result["scores"]["matching"][0] == 2
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_the_choice_is_in_words_and_in_bold(case, result):
    page = stages_section(result, case.originals, _history(), None)
    assert "of restart 1 has the smallest gradient distance" in page
    assert page.count("<strong>0.1</strong>") == 1
    assert "none set" in page
    limited = _search(budget_seconds=60.0, stopped_early=True)
    page = stages_section({**result, "staged_search": limited}, case.originals, _history(), None)
    assert "1 min 0 s, used up" in page


def test_each_restart_has_a_line_and_the_returned_one_is_in_front(case, result):
    page = stages_section(result, case.originals, _history(), None)
    lines = re.findall(r"<polyline[^>]*>", page)
    assert [("aside" in line) for line in lines] == [True, True, False]
    counts = [len(re.findall(r"[\d.]+,[\d.]+", line)) for line in lines]
    assert counts == [3, 2, 3]  # one distance of the third restart was not finite


def test_without_originals_the_images_stand_alone(case, result):
    blind = copy.deepcopy(result)
    blind["scores"] = None
    for stage in blind["staged_search"]["stages"]:
        del stage["psnr"]
    blind["attack"] |= {
        "num_candidates": 3,
        "candidates": [{"status": "matched"}] * 3,
        "status_counts": {"matched": 3},
    }
    validate_result(blind)
    page = stages_section(blind, None, _history(), None)
    assert page.count("data:image/png;base64,") == 9
    assert "original</th>" not in page


def test_a_search_that_found_nothing_shows_no_images(case, result):
    empty = copy.deepcopy(result)
    empty["scores"]["matching"] = [None] * 4
    assert "data:image" not in stages_section(empty, case.originals, _history(), None)


def test_the_page_shows_stages_once(case, result):
    page = render_html(result, case.originals, case.aligned, history=_history())
    assert page.index('id="stages"') < page.index('id="search"')
    assert "Best images after so many steps" not in page
    assert "upright lines where a stage ends" in page
    assert "Best images after so many steps" in search_section(_history())


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        (("stage",), 3, "an index below 3"),
        (("restart",), 3, "an index below 3"),
        (("stages", 1, "distances"), [0.1], "one per restart, 3"),
        (("stages", 1, "curve_losses"), [[1.0, 0.5]], "one per restart, 3"),
        (("stages", 2, "curve_steps"), [1], "lists of 1"),
        (("stages", 0, "psnr"), [1.0], "one entry per true image, 4"),
        (("stages", 0, "seconds"), -1.0, "from 0"),
        (("why",), None, "a string"),
    ],
)
def test_inconsistent_searches_are_rejected(result, path, value, hint):
    validate_result(result)
    changed = copy.deepcopy(result)
    place = changed["staged_search"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=hint):
        validate_result(changed)


def _reconstruction(frames):
    stats = {
        "settings": {"budget_steps": 40, "budget_seconds": None},
        "labels_by": "idlg",
        "prior": "faces",
        "stage": 1,
        "restart": 0,
        "why": "because",
        "stopped_early": False,
        "stage_names": ["latent codes", "features 4x4x8"],
        "stage_distances": [[0.2], [0.1]],
        "stage_steps": [20, 20],
        "stage_seconds": [1.0, 2.0],
        "stage_curves": [{"steps": [1], "losses": [[0.3]]}] * 2,
    }
    return Reconstruction(
        images=frames[-1],
        scores=np.zeros(2),
        statuses=(Status.MATCHED,) * 2,
        selected_by="gradient distance",
        stats=stats,
        history=History(steps=[1], losses=[0.3], frame_steps=[20, 40], frames=frames),
    )


def test_every_stage_is_scored_with_the_matching_of_the_returned_images():
    originals = np.zeros((3, 8, 8, 3), np.float32)
    frames = np.zeros((2, 2, 8, 8, 3), np.float32)
    frames[0, 1] = 0.1
    frames[1, 0] = np.nan
    stats, record = staged_search(_reconstruction(frames), originals, {"matching": [1, None, 0]})
    assert record is not None
    assert stats == {"settings": {"budget_steps": 40, "budget_seconds": None}, "labels_by": "idlg"}
    assert record["budget_steps"] == 40
    first, second = (stage["psnr"] for stage in record["stages"])
    assert first == [pytest.approx(20), None, 200.0]
    assert second == [200.0, None, None]
    _, blind = staged_search(_reconstruction(frames), None, None)
    assert blind is not None
    assert "psnr" not in blind["stages"][0]


def test_attacks_without_stages_keep_their_statistics(case):
    plain = Reconstruction(
        images=case.reconstructions,
        scores=case.scores,
        statuses=(Status.MATCHED,) * 3,
        selected_by="x",
        stats={"restart": 0, "prior": "mine"},
    )
    assert staged_search(plain, None, None) == ({"restart": 0, "prior": "mine"}, None)
