import numpy as np
import pytest

from jgia.data.faces import render
from jgia.generators.quality import features, kernel_distance


@pytest.fixture(scope="module")
def faces():
    return render(0, 400)[0]


def test_equal_distributions_are_at_distance_zero(faces):
    seen = features(faces)
    distance, error = kernel_distance(seen[:200], seen[200:])
    assert abs(distance) < 6 * error


def test_damage_moves_images_away_the_more_the_larger_it_is(faces):
    seen = features(faces)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=faces[200:].shape)
    found = [
        kernel_distance(
            features(np.clip(faces[200:] + scale * noise, 0, 255).astype(np.uint8)), seen[:200]
        )[0]
        for scale in (0, 10, 40)
    ]
    assert found[0] < found[1] < found[2]


def test_the_estimate_is_that_of_all_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 5)) + 1
    z = [(part - y.mean(axis=0)) / y.std(axis=0) for part in (x, y)]

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    same = [np.mean([kernel(p[i], p[j]) for i in range(8) for j in range(8) if i != j]) for p in z]
    cross = np.mean([kernel(a, b) for a in z[0] for b in z[1]])
    distance, error = kernel_distance(x, y)
    assert distance == pytest.approx(same[0] + same[1] - 2 * cross)
    assert error == pytest.approx(0, abs=1e-12)


def test_floats_and_bytes_are_the_same_images(faces):
    some = faces[:10]
    scaled = np.asarray(some / 255, np.float32)
    np.testing.assert_allclose(features(scaled), features(some), rtol=1e-4, atol=1e-5)


def test_too_few_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))
