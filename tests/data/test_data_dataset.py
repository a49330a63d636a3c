"""The data set as arrays: checks, rows, and the division between client and attacker."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.data import DataError, Dataset, split_client_public

STRICT = settings(derandomize=True, max_examples=40, deadline=None)


def make(count: int = 60, public: np.ndarray | None = None) -> Dataset:
    """Every image is filled with its own row number, so that rows can be recognized."""
    images = np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 3, 1)
    )
    labels = (np.arange(count) % 3).astype(np.int32)
    return Dataset(images, labels, ("a", "b", "c"), "rows", "Row numbers.", public)


def rows(dataset: Dataset) -> list[int]:
    return [int(row) for row in dataset.images[:, 0, 0, 0]]


def test_take_divides_bytes_by_255_with_correct_rounding() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    data = Dataset(values, np.zeros(256, np.int32), ("a", "b"), "bytes", "All bytes.")
    images, labels = data.take(range(256))
    assert images.dtype == np.float32
    assert labels.dtype == np.int32
    exact = [float(np.float32(float(Fraction(v, 255)))) for v in range(256)]
    assert images.ravel().tolist() == exact
    wrong = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    assert wrong.tolist() != exact  # the comparison sees one unit in the last place


def test_take_keeps_float_pixels_and_copies() -> None:
    pixels = np.full((2, 2, 2, 3), 0.25, np.float32)
    data = Dataset(pixels, np.zeros(2, np.int32), ("a", "b"), "grey", "Constant.")
    images, labels = data.take([1, 1, 0])
    assert images.shape == (3, 2, 2, 3)
    assert (images == 0.25).all()
    images[:] = 0
    labels[:] = 1
    assert (data.images == 0.25).all()
    assert (data.labels == 0).all()


def test_subset_follows_the_order_and_carries_everything() -> None:
    public = np.arange(60) % 2 == 0
    part = make(public=public).subset([5, 2, 5])
    assert rows(part) == [5, 2, 5]
    assert part.labels.tolist() == [2, 2, 2]
    assert part.public is not None
    assert part.public.tolist() == [False, True, False]
    assert (part.name, part.class_names, part.image_shape) == ("rows", ("a", "b", "c"), (2, 3, 1))


@pytest.mark.parametrize("indices", [[], [60], [-1], np.array([0.5]), np.eye(3, dtype=int)])
def test_rows_that_do_not_exist_are_refused(indices) -> None:
    with pytest.raises(DataError):
        make().take(indices)
    with pytest.raises(DataError):
        make().subset(indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 4, 4, 2), np.uint8)}, "C of 1 or 3"),
        ({"images": np.zeros((0, 4, 4, 1), np.uint8), "labels": np.zeros(0, np.int32)}, "shape"),
        ({"images": np.zeros((2, 4, 4, 1), np.float64)}, "uint8 or float32"),
        ({"images": np.full((2, 4, 4, 1), 1.5, np.float32)}, r"\[0, 1\]"),
        ({"images": np.full((2, 4, 4, 1), np.nan, np.float32)}, "finite"),
        ({"labels": np.zeros(3, np.int32)}, "labels"),
        ({"labels": np.zeros(2, np.int64)}, "int32"),
        ({"labels": np.array([0, 2], np.int32)}, r"0\.\.1"),
        ({"labels": np.array([-1, 0], np.int32)}, r"0\.\.1"),
        ({"class_names": ("only",)}, "two names"),
        ({"public": np.zeros(3, bool)}, "public"),
        ({"public": np.zeros(2, np.uint8)}, "public"),
    ],
)
def test_malformed_arrays_are_refused(change: dict, message: str) -> None:
    good = {
        "images": np.zeros((2, 4, 4, 1), np.uint8),
        "labels": np.zeros(2, np.int32),
        "class_names": ("a", "b"),
        "name": "x",
        "provenance": "y",
    }
    Dataset(**good)
    with pytest.raises(DataError, match=message):
        Dataset(**{**good, **change})


@STRICT
@given(
    seed=st.integers(0, 2**64),
    num_client=st.integers(1, 44),
    num_public=st.integers(16, 100),
)
def test_split_is_disjoint_deterministic_and_of_the_size_asked(
    seed: int, num_client: int, num_public: int
) -> None:
    client, public = split_client_public(
        make(), seed=seed, num_client=num_client, num_public=num_public
    )
    mine, theirs = rows(client), rows(public)
    assert len(mine) == num_client
    assert len(theirs) == min(num_public, 60 - num_client)
    assert len(set(mine) | set(theirs)) == len(mine) + len(theirs)
    assert all(label == row % 3 for label, row in zip(client.labels, mine, strict=True))
    again, more = split_client_public(make(), seed=seed, num_client=num_client)
    assert rows(again) == mine  # whatever num_public is
    assert rows(more)[: len(theirs)] == theirs


def test_split_keeps_to_the_public_mask() -> None:
    mask = np.arange(60) >= 40
    for seed in range(20):
        client, public = split_client_public(make(public=mask), seed=seed, num_client=40)
        assert sorted(rows(client)) == list(range(40))
        assert sorted(rows(public)) == list(range(40, 60))


def test_seeds_draw_every_row_alike() -> None:
    counts = np.zeros(60)
    for seed in range(400):
        client, _ = split_client_public(make(), seed=seed, num_client=15)
        counts[rows(client)] += 1
    # Each row is drawn with probability 1/4: mean 100, standard deviation 8.7.
    assert abs(counts - 100).max() < 5 * 8.7
    assert counts.std() > 4  # and not by a fixed rota


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_client": 0}, "batch of 0"),
        ({"num_client": -3}, "batch of -3"),
        ({"num_client": 45}, "at most 44"),
        ({"num_client": 10**9}, "at most 44"),
        ({"num_client": 4, "num_public": 15}, "at least 16"),
        ({"num_client": 4, "seed": -1}, "seed"),
    ],
)
def test_impossible_splits_say_what_to_do(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        split_client_public(make(), **{"seed": 0, **arguments})
    assert "\n" not in str(caught.value)


def test_split_needs_enough_in_each_pool() -> None:
    few_private = make(public=np.arange(60) >= 10)
    with pytest.raises(DataError, match="at most 10"):
        split_client_public(few_private, seed=0, num_client=11)
    few_public = make(public=np.arange(60) >= 45)
    with pytest.raises(DataError, match="larger data set"):
        split_client_public(few_public, seed=0, num_client=4)
    with pytest.raises(DataError, match="larger data set"):
        split_client_public(make(16), seed=0, num_client=1)
