"""The page's section on a search, and what goes into the arrays."""

import itertools
import re

import numpy as np
import pytest

from jgia.report.search import SearchHistory, search_section


def _history(**fields):
    rng = np.random.default_rng(0)
    values = {
        "steps": np.array([1, 50, 100]),
        "losses": np.array([1.0, 0.1, 0.01]),
        "frame_steps": np.array([50, 100]),
        "frames": rng.uniform(size=(2, 3, 8, 8, 1)),
    }
    return SearchHistory(**{**values, **fields})


def test_no_search_no_section():
    assert search_section(None) == ""


def test_the_curve_falls_from_left_to_right():
    page = search_section(_history())
    points = re.search(r'points="([^"]+)"', page)
    assert points is not None
    places = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
    assert len(places) == 3
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(places))
    steps = np.diff([y for _, y in places])
    assert steps[0] == pytest.approx(steps[1], abs=0.2)  # logarithmic
    assert "from 1 to 0.01" in page


def test_every_kept_step_has_its_images():
    page = search_section(_history())
    assert page.count("data:image/png;base64,") == 6
    assert "<span>50</span>" in page
    many = _history(frames=np.zeros((2, 12, 8, 8, 1)))
    assert search_section(many).count("data:image/png;base64,") == 16
    assert "The first 8 of 12 images" in search_section(many)


def test_losses_that_are_not_finite_are_left_out():
    page = search_section(_history(losses=np.array([1.0, np.nan, 0.01])))
    points = re.search(r'points="([^"]+)"', page)
    assert points is not None
    assert len(points[1].split()) == 2
    nothing = _history(
        losses=np.full(3, np.nan), frame_steps=np.zeros(0, int), frames=np.zeros((0, 3, 8, 8, 1))
    )
    assert search_section(nothing) == ""


def test_a_flat_curve_is_drawn():
    assert "polyline" in search_section(_history(losses=np.full(3, 0.5)))


def test_arrays_have_one_row_per_step():
    arrays = _history().arrays()
    assert arrays["frames"].dtype == np.float32
    assert arrays["curve_losses"].tolist() == [1.0, 0.1, 0.01]
    with pytest.raises(ValueError, match="as many"):
        _history(losses=np.zeros(2))
    with pytest.raises(ValueError, match="as many"):
        _history(frame_steps=np.zeros(1, int))
