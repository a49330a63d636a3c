"""Drawn faces: the same bits for the same numbers, disjoint pools, and labels that are visible."""

from typing import Any

import numpy as np
import pytest

from jgia.data import DataError, _face_drawing, _face_traits, faces, load_dataset
from jgia.data.faces import render
from jgia.models import make_victim

LABELS = [8, 6, 5, 2, 3, 0]
MEANS = np.array(
    [
        [171.7, 133.6, 108.03],
        [100.01, 108.12, 104.89],
        [146.8, 92.91, 97.74],
        [116.12, 90.02, 127.71],
        [167.51, 117.48, 83.21],
        [104.14, 76.35, 93.12],
    ]
)


def keys(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_the_default_set_is_half_public_and_complete() -> None:
    data = load_dataset("faces", image_size=16)
    assert data.images.shape == (2000, 16, 16, 3)
    assert data.images.dtype == np.uint8
    assert data.class_names == faces.CLASS_NAMES
    assert data.class_names[:3] == ("black short", "black long", "brown short")
    assert "no person" in data.provenance
    assert data.public is not None
    assert data.public.sum() == 1000
    for pool in (data.public, ~data.public):
        assert set(data.labels[pool]) == set(range(10))
    assert len(keys(data.images)) == len(data)  # no image twice, in either pool
    spread = data.take(range(len(data)))[0].std(axis=(1, 2)).mean(axis=-1)
    assert spread.min() >= 0.05


def test_public_images_are_of_the_public_stream_and_the_clients_are_not() -> None:
    data = load_dataset("faces:400", image_size=16)
    assert data.public is not None
    trained_on = keys(render(faces.PUBLIC_SEED, 1000, size=16)[0])
    assert keys(data.images[data.public]) <= trained_on
    assert not keys(data.images[~data.public]) & trained_on
    for style in faces.STYLES:
        assert faces.CLIENT_SEEDS[style] != faces.PUBLIC_SEED
    assert len(set(faces.CLIENT_SEEDS.values())) == len(faces.STYLES)


@pytest.mark.parametrize("style", faces.STYLES)
def test_an_image_depends_on_its_seed_and_place_only(style: str) -> None:
    images, labels = render(5, 80, size=16, style=style)
    again, _ = render(5, 80, size=16, style=style)
    np.testing.assert_array_equal(images, again)
    part, part_labels = render(5, 37, size=16, style=style, start=29)  # across chunks
    np.testing.assert_array_equal(part, images[29:66])
    np.testing.assert_array_equal(part_labels, labels[29:66])
    assert not keys(render(6, 80, size=16, style=style)[0]) & keys(images)


def test_the_stream_stays_what_a_generator_was_trained_on() -> None:
    images, labels = render(0, 6)
    assert labels.tolist() == LABELS
    means = images.astype(np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(means, MEANS, atol=0.1)  # other machines round differently
    assert np.abs(render(1, 6)[0].astype(np.float64).mean(axis=(1, 2)) - MEANS).max() > 10


def test_smaller_sets_are_prefixes() -> None:
    whole = load_dataset("faces:cartoon:41", image_size=16)
    limited = load_dataset("faces:cartoon", image_size=16, limit=7)
    for part in (load_dataset("faces:cartoon:7", image_size=16), limited):
        np.testing.assert_array_equal(part.images, whole.images[:7])
        np.testing.assert_array_equal(part.labels, whole.labels[:7])
        assert part.public is not None
        assert part.public.tolist() == [False, True] * 3 + [False]
    assert limited.name == "faces:cartoon"
    assert len(load_dataset("faces:3", limit=9, image_size=16)) == 3
    assert len(load_dataset("faces:1")) == 1
    photo = load_dataset("faces:photo:4")
    np.testing.assert_array_equal(photo.images, load_dataset("faces:4").images)
    assert photo.name == "faces"


def test_sizes_show_the_same_persons() -> None:
    large, labels = render(0, 8, size=64)
    small, small_labels = render(0, 8)
    np.testing.assert_array_equal(labels, small_labels)
    means = large.reshape(8, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(means - small).mean() < 3
    assert np.abs(means[::-1] - small).mean() > 20
    for size in (16, 33):
        assert load_dataset("faces:2", image_size=size).image_shape == (size, size, 3)


def test_styles_show_the_same_persons_differently() -> None:
    photo, labels = render(0, 64)
    pixels = photo.astype(np.float64)
    for style in ("cartoon", "art"):
        images, same = render(0, 64, style=style)
        np.testing.assert_array_equal(labels, same)
        assert np.abs(images - pixels).mean(axis=(1, 2, 3)).min() > 5

    def sharpness(images: np.ndarray) -> float:
        gray = images.astype(np.float64).mean(axis=-1)
        return float(np.abs(np.diff(gray, 2, axis=2)).mean() / gray.std(axis=(1, 2)).mean())

    blurred, outlined = render(0, 64, style="art")[0], render(0, 64, style="cartoon")[0]
    assert 1.4 * sharpness(blurred) < sharpness(photo) < sharpness(outlined)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2).sum() / expected)


def test_classes_are_equally_frequent() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    counts = np.bincount(_face_traits.draw(rng, 20_000).labels, minlength=10)
    assert chi_square(counts) < 27.9  # 9 degrees of freedom: exceeded once in a thousand
    counts[0] += 300  # 15 % too many of one class is noticed
    assert chi_square(counts) > 27.9


def test_labels_can_be_seen() -> None:
    """A linear classifier fitted to one stream names the classes of another."""
    images, labels = render(0, 1500, size=16)
    held_out, truth = render(1, 500, size=16)

    def accuracy(fitted_to: np.ndarray) -> float:
        inputs = np.c_[images.reshape(1500, -1) / 255.0, np.ones(1500)]
        ridge = inputs.T @ inputs + 3.0 * np.eye(inputs.shape[1])
        weights = np.linalg.solve(ridge, inputs.T @ np.eye(10)[fitted_to])
        scores = np.c_[held_out.reshape(500, -1) / 255.0, np.ones(500)] @ weights
        return float((scores.argmax(axis=1) == truth).mean())

    assert accuracy(labels) > 0.5
    assert accuracy(np.roll(labels, 1)) < 0.2


def test_edges_cover_the_area_of_the_shape() -> None:
    """The shares of an ellipse's pixels add up to its area, pi a b, wherever it lies."""
    side = ((np.arange(48) + 0.5) / 24 - 1).astype(np.float32)
    x, y = np.meshgrid(side, side)
    for shift in (0.0, 0.013, 0.02):
        frame = _face_drawing.Frame(
            x=x[None] - np.float32(shift), y=y[None], sharp=np.full((1, 1, 1), 24, np.float32)
        )
        distance = _face_drawing._ellipse(frame.x, frame.y, 0.61, 0.53)
        area = _face_drawing._inside(frame, distance).sum() / 24**2
        assert area == pytest.approx(np.pi * 0.61 * 0.53, rel=5e-3)
        assert (distance < 0).sum() / 24**2 != pytest.approx(np.pi * 0.61 * 0.53, rel=1e-5)


def test_a_victim_takes_the_images() -> None:
    data = load_dataset("faces:4", image_size=16)
    victim = make_victim("lenet", input_shape=data.image_shape, num_classes=data.num_classes)
    assert victim.input_shape == (16, 16, 3)
    assert victim.num_classes == 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("faces:oil", "unknown style of faces 'oil'"),
        ("faces:", "unknown style of faces ''"),
        ("faces::5", "unknown style"),
        ("faces:5:5", "unknown style of faces '5'"),
        ("faces:art:", "at least 1, got ''"),
        ("faces:art:many", "at least 1, got 'many'"),
        ("faces:art:3:4", "at least 1, got '3:4'"),
        ("faces:0", "at least 1, got '0'"),
        ("faces:-3", "at least 1, got '-3'"),
        ("faces:art:0", "at least 1, got '0'"),
        ("faces:1.5", "unknown style of faces '1.5'"),
    ],
)
def test_malformed_specifications_say_what_to_do(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_dataset(spec)
    assert "use " in str(error.value)


@pytest.mark.parametrize("size", [15, 65, 1])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(DataError, match="16 to 64"):
        load_dataset("faces", image_size=size)
    with pytest.raises(DataError, match="16 to 64"):
        render(0, 1, size=size)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"seed": 2**32},
        {"start": -1},
        {"start": 2**32},
        {"count": 0},
        {"style": "oil"},
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"seed": 0, "count": 1}
    assert len(render(**arguments)[0]) == 1
    with pytest.raises(DataError):
        render(**(arguments | options))
