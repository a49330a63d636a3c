"""TensorFlow Datasets without TensorFlow: both file formats, splits, and every refusal."""

import importlib
import io
import logging
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jgia.data import DataError, load_dataset
from jgia.data.tfrecord import masked_crc32c

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    tf_example_pb2 = importlib.import_module("tensorflow_datasets.proto.tf_example_generated_pb2")

RNG = np.random.Generator(np.random.PCG64(7))
IMAGES = RNG.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
LABELS = [0, 2, 1, 1, 0, 2, 1]
NAMES = ("ant", "bee", "cow")
SHARDS = (3, 4)
FORMATS = ("array_record", "tfrecord")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def example(image: bytes, label: int) -> bytes:
    """A serialized tf.train.Example, made without TensorFlow Datasets' own writer."""
    proto = tf_example_pb2.Example()
    proto.features.feature["image"].bytes_list.value.append(image)
    proto.features.feature["label"].int64_list.value.append(label)
    return proto.SerializeToString()


def framed(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, record))
    return length + next(checksums) + record + next(checksums)


def write_shard(path: Path, records: list[bytes], file_format: str) -> None:
    if file_format == "tfrecord":
        path.write_bytes(b"".join(map(framed, records)))
        return
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def prepare(
    root: Path,
    file_format: str,
    *,
    features: dict | None = None,
    images: list[np.ndarray] | None = None,
    labels: list[int] | None = None,
    name: str = "tiny",
    splits: tuple[str, ...] = ("train", "test"),
) -> Path:
    """Write a prepared data set of two shards per split; ``test`` is ``train`` reversed."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    spec = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=list(NAMES)),
    }
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="none"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(spec if features is None else features),
    )
    info.set_file_format("tfrecord" if file_format not in FORMATS else file_format)
    pairs = zip(images or IMAGES, LABELS if labels is None else labels, strict=True)
    records = [example(png(image), label) for image, label in pairs]
    infos = []
    for split in splits:
        template = tfds.core.ShardedFileTemplate(
            dataset_name=name, data_dir=folder, split=split, filetype_suffix=file_format
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=list(SHARDS), num_bytes=1, filename_template=template
            )
        )
        ordered = records if split == "train" else records[::-1]
        start = 0
        for path, length in zip(template.sharded_filepaths(2), SHARDS, strict=True):
            write_shard(Path(path), ordered[start : start + length], file_format)
            start += length
    info.set_splits(tfds.core.splits.SplitDict(infos))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info.write_to_directory(folder)
    return folder


def load(root: Path, spec: str = "tiny", **options):
    return load_dataset(f"tfds:{spec}", data_dir=str(root), **options)


def refuse(root: Path, message: str, spec: str = "tiny", **options) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(root, spec, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file_format", FORMATS)
def test_examples_come_back_without_tensorflow(tmp_path: Path, file_format: str, capfd) -> None:
    prepare(tmp_path, file_format)
    capfd.readouterr()
    level = logging.getLogger("absl").level
    data = load(tmp_path)
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")  # no banner of the library reaches the terminal
    assert logging.getLogger("absl").level == level
    np.testing.assert_array_equal(data.images, IMAGES)
    assert data.labels.tolist() == LABELS
    assert data.class_names == NAMES
    assert data.name == "tiny:train"
    assert "tiny/1.0.0" in data.provenance


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("tiny:test", [6, 5, 4, 3, 2, 1, 0]),
        ("tiny:1.0.0:test", [6, 5, 4, 3, 2, 1, 0]),
        ("tiny:1.*.*", [0, 1, 2, 3, 4, 5, 6]),
        ("tiny:train[2:5]", [2, 3, 4]),
        ("tiny:test[-2:]", [1, 0]),
        ("tiny:train[:1]+test[:1]", [0, 6]),
    ],
)
def test_splits(tmp_path: Path, file_format: str, spec: str, rows: list[int]) -> None:
    prepare(tmp_path, file_format)
    for limit in (None, 2, 4):
        data = load(tmp_path, spec, limit=limit)
        np.testing.assert_array_equal(data.images, IMAGES[rows[:limit]])
        assert data.labels.tolist() == [LABELS[i] for i in rows[:limit]]


def test_an_only_split_is_the_default(tmp_path: Path) -> None:
    prepare(tmp_path, "tfrecord", splits=("test",))
    assert load(tmp_path).name == "tiny:test"


def test_a_limit_leaves_later_shards_unread(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "tfrecord")
    (last,) = folder.glob("tiny-train.tfrecord-00001*")
    last.write_bytes(b"damaged")
    assert len(load(tmp_path, limit=3)) == 3
    refuse(tmp_path, "ends inside", limit=4)


@pytest.mark.parametrize("file_format", FORMATS)
def test_sizes_that_differ_need_an_image_size(tmp_path: Path, file_format: str) -> None:
    images = [*IMAGES[:6], np.full((9, 9, 3), 7, np.uint8)]
    prepare(tmp_path, file_format, images=images)
    refuse(tmp_path, "give image_size")
    data = load(tmp_path, image_size=4)
    assert data.image_shape == (4, 4, 3)
    assert (data.images[6] == 7).all()


def test_grey_images(tmp_path: Path) -> None:
    features = {
        "image": tfds.features.Image(shape=(6, 5, 1)),
        "label": tfds.features.ClassLabel(num_classes=4),
    }
    prepare(tmp_path, "tfrecord", features=features, images=list(IMAGES[..., 0]))
    data = load(tmp_path)
    np.testing.assert_array_equal(data.images, IMAGES[..., :1])
    assert data.class_names == ("0", "1", "2", "3")


def test_missing_data_says_how_to_get_it(tmp_path: Path) -> None:
    refuse(tmp_path, f"tiny is not in {tmp_path}; run again with --download")
    refuse(tmp_path, "run again with --download", "mnist")
    refuse(tmp_path, "run again with --download", "mnist:3.0.1:test")
    prepare(tmp_path, "tfrecord")
    refuse(tmp_path, "run again with --download", "tiny:2.0.0")


@pytest.mark.parametrize("name", ["a b", "../tiny", "tiny/"])
def test_impossible_names(tmp_path: Path, name: str) -> None:
    refuse(tmp_path, "check its name|--download", name)


@pytest.mark.parametrize("split", ["validation", "train[", "train[a:b]", "train[:200%]"])
def test_unknown_splits_list_the_known_ones(tmp_path: Path, split: str) -> None:
    prepare(tmp_path, "tfrecord")
    refuse(tmp_path, "its splits are test, train", f"tiny:{split}")


def test_empty_split(tmp_path: Path) -> None:
    prepare(tmp_path, "tfrecord")
    refuse(tmp_path, "empty", "tiny:train[3:3]")


@pytest.mark.parametrize("missing", ["image", "label"])
def test_data_without_images_or_classes(tmp_path: Path, missing: str) -> None:
    features = {
        "image": tfds.features.Image(shape=(6, 5, 3)),
        "label": tfds.features.ClassLabel(names=list(NAMES)),
    }
    features[missing] = tfds.features.Scalar(np.int64)
    prepare(tmp_path, "tfrecord", features=features)
    refuse(tmp_path, "no image" if missing == "image" else "no class label")


def test_unlabeled_examples_are_refused(tmp_path: Path) -> None:
    prepare(tmp_path, "tfrecord", labels=[-1] * 7)
    refuse(tmp_path, r"lie in -1\.\.-1")


@pytest.mark.parametrize("file_format", FORMATS)
def test_missing_and_damaged_files(tmp_path: Path, file_format: str) -> None:
    folder = prepare(tmp_path, file_format)
    (shard,) = folder.glob(f"tiny-train.{file_format}-00001*")
    good = shard.read_bytes()
    shard.write_bytes(good[:40])
    refuse(tmp_path, "prepare")
    shard.unlink()
    refuse(tmp_path, "is missing; prepare")
    (folder / "dataset_info.json").write_text("{")
    refuse(tmp_path, "cannot open")


@pytest.mark.parametrize("file_format", FORMATS)
def test_bytes_that_are_no_example(tmp_path: Path, file_format: str) -> None:
    folder = prepare(tmp_path, file_format)
    (shard,) = folder.glob(f"tiny-train.{file_format}-00000*")
    for content in (b"\xff\xff\xff", example(b"no image", 0), b""):
        write_shard(shard, [content] * SHARDS[0], file_format)
        refuse(tmp_path, "cannot decode example 0")


def test_other_file_formats_are_refused(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "riegeli")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("tfrecord", "riegeli"))
    refuse(tmp_path, "array_record")


def test_memory_is_bounded(tmp_path: Path, monkeypatch) -> None:
    prepare(tmp_path, "tfrecord")
    monkeypatch.setattr("jgia.data.pixels.MAX_BYTES", 300)
    refuse(tmp_path, "limit")
    assert len(load(tmp_path, limit=3)) == 3


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refuse(tmp_path, "pip install tensorflow-datasets")


class JgiaTestBlobs(tfds.core.GeneratorBasedBuilder):
    """A registered data set that "downloads" from memory."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(shape=(6, 5, 3)),
            "label": tfds.features.ClassLabel(names=list(NAMES)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator:
        if JgiaTestBlobs.failure is not None:
            raise JgiaTestBlobs.failure
        for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
            yield i, {"image": io.BytesIO(png(image)), "label": label}

    failure: Exception | None = None


@pytest.fixture
def offline(monkeypatch) -> None:
    """TensorFlow Datasets looks for metadata online before it prepares; keep it at home."""
    gcs = importlib.import_module("tensorflow_datasets.core.utils.gcs_utils")
    monkeypatch.setattr(gcs, "gcs_dataset_info_files", lambda *_: None)
    monkeypatch.setattr(gcs, "is_dataset_on_gcs", lambda *_: False)


@pytest.mark.usefixtures("offline")
def test_download_prepares_only_when_asked(tmp_path: Path, capfd) -> None:
    refuse(tmp_path, "run again with --download", "jgia_test_blobs")
    assert not any(tmp_path.iterdir())
    data = load(tmp_path, "jgia_test_blobs", download=True)
    order = [int(np.flatnonzero((image == IMAGES).all((1, 2, 3)))[0]) for image in data.images]
    assert sorted(order) == list(range(7))  # the library shuffles what it prepares
    assert data.labels.tolist() == [LABELS[i] for i in order]
    assert list(tmp_path.rglob("*.array_record-*"))
    assert capfd.readouterr().out == ""
    again = load(tmp_path, "jgia_test_blobs")
    np.testing.assert_array_equal(again.images, data.images)


@pytest.mark.usefixtures("offline")
def test_failed_downloads_end_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(JgiaTestBlobs, "failure", ConnectionError("no route\nto host"))
    refuse(tmp_path, "failed .*check the network", "jgia_test_blobs", download=True)
    missing = ModuleNotFoundError("no cv9", name="cv9.core")
    monkeypatch.setattr(JgiaTestBlobs, "failure", missing)
    refuse(tmp_path, "pip install cv9,", "jgia_test_blobs", download=True)
    refuse(tmp_path, "knows no 'jgia_no_such_data'", "jgia_no_such_data", download=True)
