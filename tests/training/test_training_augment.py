import numpy as np
import pytest

from jgia.training.augment import augmented


def _images(count, dtype="uint8"):
    rng = np.random.default_rng(count)
    return rng.integers(1, 255, (count, 16, 8, 2)).astype(dtype)


def _shifted(image, down, right):
    padded = np.pad(image, ((2, 2), (1, 1), (0, 0)))
    return padded[2 + down : 18 + down, 1 + right : 9 + right]


def test_nothing_on_is_nothing_done():
    images = _images(3)
    assert augmented(np.random.default_rng(0), images, flip=False, crop=False) is images


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_every_image_is_a_mirrored_and_shifted_copy_of_its_own(dtype):
    images = _images(400, dtype)
    found = augmented(np.random.default_rng(0), images, flip=True, crop=True)
    assert found.dtype == images.dtype
    counts = dict.fromkeys(
        [(m, i, j) for m in (1, -1) for i in range(-2, 3) for j in (-1, 0, 1)], 0
    )
    for image, got in zip(images, found, strict=True):
        fits = [
            (m, i, j) for m, i, j in counts if np.array_equal(_shifted(image[:, ::m], i, j), got)
        ]
        assert len(fits) == 1
        counts[fits[0]] += 1
    # 30 equal cells of 400 draws: each 13.3 expected, standard deviation 3.6
    assert min(counts.values()) > 2
    assert max(counts.values()) < 28


@pytest.mark.parametrize(("flip", "crop"), [(True, False), (False, True)])
def test_each_kind_alone(flip, crop):
    images = _images(50)
    found = augmented(np.random.default_rng(0), images, flip=flip, crop=crop)
    kept = np.array([np.array_equal(a, b) for a, b in zip(images, found, strict=True)])
    assert 0 < kept.sum() < 50
    sums = images.sum(axis=(1, 2, 3), dtype=int), found.sum(axis=(1, 2, 3), dtype=int)
    assert np.array_equal(*sums) == flip  # mirroring moves pixels, shifting drops some


def test_switching_one_kind_off_does_not_change_the_draws_of_the_other():
    images = _images(20)
    both = augmented(np.random.default_rng(0), images, flip=True, crop=True)
    mirrored = augmented(np.random.default_rng(0), images, flip=True, crop=False)
    again = augmented(np.random.default_rng(0), mirrored, flip=False, crop=True)
    np.testing.assert_array_equal(both, again)


def test_small_images_are_not_shifted():
    images = _images(9)[:, :7, :7]
    found = augmented(np.random.default_rng(0), images, flip=False, crop=True)
    np.testing.assert_array_equal(found, images)
