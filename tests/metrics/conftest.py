"""Fixtures of the scorer's tests."""

from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """Annotations are not checked outside tests: the ValueErrors must stand on their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def photographs() -> np.ndarray:
    """Five crops of a photograph: (5, 40, 33, 3) float64 in [0, 1]."""
    datasets = pytest.importorskip("sklearn.datasets")  # ships the photograph
    picture = datasets.load_sample_image("china.jpg") / 255.0
    corners = [(0, 0), (100, 50), (200, 300), (300, 120), (150, 500)]
    return np.stack([picture[i : i + 40, j : j + 33] for i, j in corners])
