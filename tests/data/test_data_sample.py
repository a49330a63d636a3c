"""The bundled crops: consistent files, honest pools, and pixels that the photographs confirm."""

import copy
import hashlib
import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jgia.data import DataError, load_dataset, split_client_public

FOLDER = importlib.resources.files("jgia.data") / "_sample"
SIZES = [32, 64]


def facts_of(size: int) -> dict:
    return json.loads((FOLDER / f"sample_{size}.json").read_text(encoding="utf-8"))


def pools_share_pixels(crops: list[dict]) -> bool:
    """Whether a client window and a public window of one photograph overlap."""
    masks: dict[tuple[str, str], np.ndarray] = {}
    for crop in crops:
        key = (crop["source"], crop["pool"])
        mask = masks.setdefault(key, np.zeros((1500, 1500), bool))
        left, top, side = crop["box"]
        mask[top : top + side, left : left + side] = True
    sources = {source for source, _ in masks}
    return any((masks[s, "client"] & masks[s, "public"]).any() for s in sources)


@pytest.mark.parametrize("size", SIZES)
def test_bundled_files_load_and_agree(size: int) -> None:
    data = load_dataset(f"sample:{size}")
    facts = facts_of(size)
    assert data.image_shape == (size, size, 3)
    assert data.images.dtype == np.uint8
    assert len(data) == len(facts["crops"])
    assert data.public is not None
    assert (~data.public).sum() >= {32: 96, 64: 24}[size]
    assert data.public.sum() >= 16
    assert 2 * (~data.public).sum() >= len(data)
    for pool in (data.public, ~data.public):
        assert set(data.labels[pool]) == set(range(data.num_classes))  # every class on both sides
    shares = np.bincount(data.labels) / len(data)
    assert shares.max() < 0.25
    spread = data.take(range(len(data)))[0].std(axis=(1, 2)).mean(axis=-1)
    assert spread.min() >= 0.06
    assert len(np.unique(data.images.reshape(len(data), -1), axis=0)) == len(data)


@pytest.mark.parametrize("size", SIZES)
def test_client_and_public_pools_share_no_pixel_of_a_photograph(size: int) -> None:
    crops = facts_of(size)["crops"]
    assert not pools_share_pixels(crops)
    tampered = copy.deepcopy(crops)
    client = next(crop for crop in crops if crop["pool"] == "client")
    public = next(c for c in tampered if c["pool"] == "public" and c["source"] == client["source"])
    public["box"] = client["box"]
    assert pools_share_pixels(tampered)


def test_the_two_sizes_keep_the_same_boundary() -> None:
    assert not pools_share_pixels(facts_of(32)["crops"] + facts_of(64)["crops"])


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_area_averages_of_the_photographs(size: int) -> None:
    skimage = pytest.importorskip("skimage")
    photos = Path(skimage.__file__).parent / "data"
    data, facts = load_dataset("sample", image_size=size), facts_of(size)
    label_of: dict[str, int] = {}
    for source, about in facts["sources"].items():
        content = (photos / source).read_bytes()
        assert hashlib.sha256(content).hexdigest() == about["sha256"]
    for i in range(0, len(data), 5):
        crop = facts["crops"][i]
        assert label_of.setdefault(crop["source"], crop["label"]) == crop["label"]
        with Image.open(photos / crop["source"]) as photo:
            pixels = np.asarray(photo.convert("RGB"), np.float64)
        left, top, side = crop["box"]
        window = pixels[top : top + side, left : left + side]
        # Box filter as Pillow defines it: the mean of the samples whose centers fall in a cell.
        edges = np.arange(size + 1) * side / size
        start = np.floor(edges[:-1] + 0.5).astype(int)
        stop = np.floor(edges[1:] + 0.5).astype(int)
        weights = np.zeros((size, side))
        for row, (a, b) in enumerate(zip(start, stop, strict=True)):
            weights[row, a:b] = 1 / (b - a)
        mean = np.einsum("ip,jq,pqc->ijc", weights, weights, window, optimize=True)
        error = np.abs(mean - data.images[i])
        assert error.max() <= 1 + 1e-9  # rounded to bytes twice: after columns, after rows
        assert error.mean() <= 0.5
        other = data.images[(i + 1) % len(data)]
        assert np.abs(mean - other).mean() > 4  # the neighbor's pixels do not pass for it


def test_sources_are_public_domain_and_documented() -> None:
    text = (FOLDER / "PROVENANCE.md").read_text(encoding="utf-8")
    sources = facts_of(32)["sources"]
    assert facts_of(64)["sources"] == sources
    for source, about in sources.items():
        assert about["license"].startswith(("CC0", "public domain"))
        assert source in text
    files = ["PROVENANCE.md", *(f"sample_{s}.{e}" for s in SIZES for e in ("png", "json"))]
    assert sum(len((FOLDER / name).read_bytes()) for name in files) <= 10**6


def test_limit_and_default_size() -> None:
    whole, part = load_dataset("sample"), load_dataset("sample:32", limit=10)
    assert len(part) == 10
    np.testing.assert_array_equal(part.images, whole.images[:10])
    np.testing.assert_array_equal(part.labels, whole.labels[:10])
    assert len(set(part.labels)) >= 3
    assert len(load_dataset("sample", limit=10**6)) == len(whole)


def test_split_of_the_sample_uses_its_pools() -> None:
    client, public = split_client_public(load_dataset("sample"), seed=3, num_client=128)
    assert client.public is not None
    assert public.public is not None
    assert not client.public.any()
    assert public.public.all()
    with pytest.raises(DataError, match="at most 128"):
        split_client_public(load_dataset("sample"), seed=3, num_client=129)


def test_smaller_sizes_are_the_crops_resized() -> None:
    whole, small = load_dataset("sample", limit=6), load_dataset("sample", image_size=8, limit=6)
    assert small.images.shape == (6, 8, 8, 3)
    assert small.images.dtype == whole.images.dtype
    np.testing.assert_array_equal(small.labels, whole.labels)
    assert small.public is not None
    np.testing.assert_array_equal(small.public, whole.public)
    means = whole.images.reshape(6, 8, 4, 8, 4, 3).mean((2, 4))
    assert np.abs(small.images - means).mean() < 8
    assert np.abs(small.images[::-1] - means).mean() > 16


@pytest.mark.parametrize(
    ("spec", "image_size"),
    [("sample:48", None), ("sample", 128), ("sample:32", 64), ("sample:", None)],
)
def test_sizes_that_are_not_bundled_tell_the_choices(spec: str, image_size: int | None) -> None:
    with pytest.raises(DataError, match="sample:32 or sample:64"):
        load_dataset(spec, image_size=image_size)


@pytest.mark.parametrize("spec", ["", "mnist", "npz:", "folder:", "tfds:", "zip:a", "SAMPLE"])
def test_unknown_specifications_list_the_known_ones(spec: str) -> None:
    with pytest.raises(DataError, match="npz:PATH, folder:PATH, or tfds:NAME"):
        load_dataset(spec)


@pytest.mark.parametrize("options", [{"limit": 0}, {"image_size": 0}, {"image_size": 10**6}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(DataError, match="must"):
        load_dataset("sample", **options)
