"""ARES on a CNN: what it recovers, what it refuses, how fast, at what size.

    python benchmarks/ares_cnn.py --data npz:PATH/cifar10_test10k.npz --out results.json
    python benchmarks/ares_cnn.py --smoke

Every section prints its figures; ``--sections`` picks some. Speed is the ratio of a peer and this
library in one run on the same leaked activations, and counts only where both reach 60 dB.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ares_peers
import harness
import jax
import jax.numpy as jnp
import numpy as np

from jgia.attacks import ares
from jgia.config import AresOptions, PerformanceFlags
from jgia.data import Dataset, load_dataset, split_client_public
from jgia.federated import client_update
from jgia.metrics import pairwise_mse
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, Reconstruction

SECTIONS = ("quality", "singletons", "specificity", "front_ends", "speed", "large", "startup")


@dataclasses.dataclass(frozen=True)
class Bench:
    """One victim, one crafted model, private and public images."""

    victim: Victim
    private: Dataset
    calibration: np.ndarray
    params: Any
    plan: ares.Plan
    options: AresOptions

    @classmethod
    def build(
        cls,
        private: Dataset,
        public: Dataset,
        *,
        seed: int = 0,
        options: AresOptions | None = None,
        normalize: bool = True,
    ) -> Bench:
        """Craft on public images; normalization from public statistics."""
        calibration, _ = public.take(np.arange(len(public)))
        channels = private.image_shape[-1]
        victim = make_victim(
            "cnn",
            input_shape=private.image_shape,
            num_classes=max(2, private.num_classes),
            normalization=(
                Normalization.fit(calibration) if normalize else Normalization.identity(channels)
            ),
        )
        options = options or AresOptions()
        params, plan = ares.craft(jax.random.key(seed), victim, calibration, options=options)
        return cls(victim, private, calibration, params, plan, options)

    def observe(self, rows: np.ndarray, params: Any = None) -> tuple[Observation, np.ndarray]:
        """One client update on the given private rows."""
        images, labels = self.private.take(rows)
        sent = self.params if params is None else params
        key = jax.random.key(0)
        return client_update(key, self.victim, sent, images, labels), images

    def bins_of(self, images: np.ndarray) -> np.ndarray:
        """The bin each true image falls into (evaluation only)."""
        planes = self.victim.normalization.normalize(images).transpose(3, 1, 2, 0)
        measured = self.plan.measurement(self.victim)
        q = ares.query_features(measured, self.plan.query, jnp.asarray(planes))
        return np.searchsorted(self.plan.thresholds, q, side="left") - 1

    def invert(self, candidates: ares.Candidates) -> Reconstruction:
        """The attack's second half."""
        key = jax.random.key(1)
        return ares.invert(key, candidates, self.plan, self.victim, options=self.options)


def best_psnr(reconstruction: Reconstruction, images: np.ndarray) -> np.ndarray:
    """Per true image, the PSNR of the nearest reconstruction; 0 where there is none."""
    if not len(reconstruction.images):
        return np.zeros(len(images))
    return harness.psnr(pairwise_mse(reconstruction.images, images).min(axis=0))


def quality(bench: Bench, smoke: bool) -> dict[str, Any]:
    """PSNR of every image alone in its bin, B = 1 and B = 32."""
    rng = np.random.default_rng(0)
    result = {}
    for batch, repeats in ((1, 3 if smoke else 32), (8 if smoke else 32, 2 if smoke else 20)):
        values, statuses, singles, images_seen = [], Counter(), 0, 0
        for _ in range(repeats):
            rows = rng.choice(len(bench.private), batch, replace=False)
            observation, images = bench.observe(rows)
            reconstruction = bench.invert(ares.leak(observation, bench.plan))
            statuses.update(str(c["status"]) for c in reconstruction.candidates)
            bins = bench.bins_of(images)
            alone = np.array([b >= 0 and np.sum(bins == b) == 1 for b in bins])
            values.extend(best_psnr(reconstruction, images)[alone])
            singles += int(alone.sum())
            images_seen += batch
        psnr = np.array(values)
        result[f"B={batch}"] = block = {
            "batches": repeats,
            "images": images_seen,
            "alone_in_their_bin": singles,
            "median_psnr_of_those": float(np.median(psnr)),
            "minimum_psnr_of_those": float(psnr.min()),
            "share_of_those_at_60_db": float(np.mean(psnr >= 60)),
            "share_of_those_at_120_db": float(np.mean(psnr >= 120)),
            "candidates_by_status": dict(statuses),
        }
        print(f"quality B={batch}: {block}")
    return result


def singletons(bench: Bench, smoke: bool) -> dict[str, Any]:
    """Images alone in their bin against ``n sum p (1-p)^(n-1)``, drawn with replacement.

    The bins' masses p are those of the whole private pool, so the formula is exact for
    independent draws; the 95 % interval is that of the mean over the batches.
    """
    rng = np.random.default_rng(1)
    all_images, _ = bench.private.take(np.arange(len(bench.private)))
    bins = np.concatenate(
        [bench.bins_of(all_images[i : i + 500]) for i in range(0, len(all_images), 500)]
    )
    masses = np.bincount(bins[bins >= 0], minlength=bench.plan.num_bins) / len(bins)
    batches = 3 if smoke else 20
    result = {}
    for n in (8, 32) if smoke else (8, 32, 64, 128, 256, 384):
        alone, recovered = [], []
        for _ in range(batches):
            rows = rng.choice(len(bench.private), n, replace=True)
            observation, images = bench.observe(rows)
            # Measured in the update itself: bins that hold one example, recovered to 60 dB.
            counts = np.bincount(np.maximum(bins[rows], 0), minlength=bench.plan.num_bins)
            single = (bins[rows] >= 0) & (counts[np.maximum(bins[rows], 0)] == 1)
            reconstruction = bench.invert(ares.leak(observation, bench.plan))
            alone.append(int(single.sum()))
            recovered.append(int(np.sum(best_psnr(reconstruction, images)[single] >= 60)))
        expected = ares.expected_singletons(masses, n)
        half = 1.96 * ares.singleton_standard_deviation(masses, n) / np.sqrt(batches)
        mean = float(np.mean(alone))
        result[f"n={n}"] = block = {
            "batches": batches,
            "expected": expected,
            "interval": [float(expected - half), float(expected + half)],
            "measured_alone": mean,
            "measured_recovered_at_60_db": float(np.mean(recovered)),
            "inside": bool(abs(mean - expected) <= max(half, 1e-9)),
            "inside_recovered": bool(abs(np.mean(recovered) - expected) <= max(half, 1e-9)),
            "rtf_bound": ares.rtf_bound(bench.plan.num_bins, n),
            "forecast_from_calibration": ares.expected_singletons(bench.plan.bin_masses, n)
            if bench.plan.bin_masses is not None
            else None,
        }
        print(f"singletons n={n}: {block}")
    return result


def specificity(bench: Bench, smoke: bool) -> dict[str, Any]:
    """Nothing from an un-crafted model; mixtures flagged (ROC of the residual)."""
    rng = np.random.default_rng(2)
    accepted = looked_at = 0
    for seed in range(2 if smoke else 10):
        benign = bench.victim.init(jax.random.key(100 + seed))
        rows = rng.choice(len(bench.private), 8 if smoke else 32, replace=False)
        observation, _ = bench.observe(rows, benign)
        for plan in (bench.plan, ares.read_plan(bench.victim, benign)):
            candidates = ares.leak(observation, plan)
            reconstruction = ares.invert(jax.random.key(0), candidates, plan, bench.victim)
            accepted += len(reconstruction.images)
            looked_at += len(candidates)
    print(f"un-crafted models: {accepted} of {looked_at} candidates accepted")

    single, residual, took = [], [], []
    for _ in range(1 if smoke else 8):
        n = min(64 if smoke else 384, len(bench.private) // 2)
        rows = rng.choice(len(bench.private), n, replace=False)
        observation, images = bench.observe(rows)
        candidates = ares.leak(observation, bench.plan)
        occupancy = np.bincount(np.maximum(bench.bins_of(images), 0), minlength=bench.plan.num_bins)
        # Solve every candidate, also those that the read-out already shows to be mixtures.
        everything = np.ones(len(candidates), bool)
        forced = dataclasses.replace(candidates, in_bracket=everything, non_negative=everything)
        inversion = ares.solve_candidates(
            jax.random.key(0),
            forced,
            bench.plan,
            bench.victim,
            options=bench.options,
            performance=PerformanceFlags(),
        )
        statuses = bench.invert(candidates).candidates
        single.append(occupancy[candidates.bins] == 1)
        residual.append(inversion.residual)
        took.append([c["status"] not in ("mixture", "nonfinite") for c in statuses])
    is_single, score = np.concatenate(single), -np.concatenate(residual)
    kept = np.concatenate(took)
    false, true, auc = roc(score, is_single)
    result = {
        "uncrafted": {"candidates": looked_at, "accepted": accepted},
        "candidates": len(is_single),
        "single": int(is_single.sum()),
        "mixtures": int(np.sum(~is_single)),
        "accepted": int(kept.sum()),
        "accepted_that_are_single": float(is_single[kept].mean()),
        "singles_accepted": float(kept[is_single].mean()),
        "mixtures_flagged": float(np.mean(~kept[~is_single])) if (~is_single).any() else None,
        "roc_auc_of_residual": auc,
        "roc": [[float(f), float(t)] for f, t in zip(false, true, strict=True)],
        "largest_residual_of_a_single": float(-score[is_single].min()),
        "smallest_residual_of_a_mixture": float(-score[~is_single].max())
        if (~is_single).any()
        else None,
    }
    print(f"specificity: { {k: v for k, v in result.items() if k != 'roc'} }")
    print(f"ROC (false positive rate, true positive rate): {result['roc']}")
    return result


def roc(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, float | None]:
    """ROC at the corner points of a score, and the area under it (ties counted half)."""
    if positive.all() or not positive.any():
        return np.array([0.0, 1.0]), np.array([0.0, 1.0]), None
    a, b = score[positive], score[~positive]
    area = np.mean((a[:, None] > b[None, :]) + 0.5 * (a[:, None] == b[None, :]))
    cuts = np.quantile(score, np.linspace(1, 0, 11))
    false = np.array([np.mean(b >= cut) for cut in cuts])
    true = np.array([np.mean(a >= cut) for cut in cuts])
    return false, true, float(area)


def front_ends(private: Dataset, public: Dataset, smoke: bool) -> dict[str, Any]:
    """Random, signed and direct first layers on normalized inputs and on raw pixels."""
    rng = np.random.default_rng(3)
    rows = rng.choice(len(private), 8 if smoke else 32, replace=False)
    result = {}
    for normalize in (True, False):
        for name in ("random", "signed", "direct"):
            options = AresOptions(front_end=name)
            bench = Bench.build(private, public, options=options, normalize=normalize)
            observation, images = bench.observe(rows)
            reconstruction = bench.invert(ares.leak(observation, bench.plan))
            psnr = best_psnr(reconstruction, images)
            label = f"{name}, {'normalized' if normalize else '[0,1]'} inputs"
            result[label] = {
                "median_psnr": float(np.median(psnr)),
                "share_at_40_db": float(np.mean(psnr >= 40)),
                "statuses": dict(Counter(str(c["status"]) for c in reconstruction.candidates)),
            }
            print(f"front end {label}: {result[label]}")
    return result


def speed(bench: Bench, smoke: bool, peer_images: int, band: float) -> dict[str, Any]:
    """Our batched inversion against cvxpy basis pursuit and an LSQR loop, same activations."""
    rng = np.random.default_rng(4)
    height, width, channels = bench.victim.input_shape
    matrix = ares_peers.first_layer_matrix(bench.plan.kernel, height, width)
    result: dict[str, Any] = {}
    for batch in (8,) if smoke else (32, 256):
        rows = rng.choice(len(bench.private), batch, replace=False)
        observation, images = bench.observe(rows)
        candidates = ares.leak(observation, bench.plan)
        bins = bench.bins_of(images)
        owner = {int(b): i for i, b in enumerate(bins) if np.sum(bins == b) == 1}
        rows_kept = np.flatnonzero([int(b) in owner for b in candidates.bins])
        chosen = candidates.take(rows_kept)
        truth = images[[owner[int(b)] for b in chosen.bins]]
        count = len(chosen)

        solve = lambda chosen=chosen: ares.solve_candidates(  # noqa: E731
            jax.random.key(0),
            chosen,
            bench.plan,
            bench.victim,
            options=bench.options,
            performance=PerformanceFlags(),
        )
        ours = harness.repeat(solve, repeats=5)
        ours_psnr = harness.psnr(np.mean((np.clip(solve().images, 0, 1) - truth) ** 2, (1, 2, 3)))

        def to_psnr(inputs: np.ndarray, true: np.ndarray) -> np.ndarray:
            norm = bench.victim.normalization
            pixels = inputs.reshape(true.shape) * np.array(norm.std) + np.array(norm.mean)
            return harness.psnr(np.mean((np.clip(pixels, 0, 1) - true) ** 2, axis=(1, 2, 3)))

        block: dict[str, Any] = {
            "images": count,
            "ours": ours | {"median_s_per_image": ours["median_s"] / count},
            "ours_psnr": [float(ours_psnr.min()), float(np.median(ours_psnr))],
        }
        # The operator is what scales to any image; the explicit matrix is LSQR's best case.
        for name, rows_of in (("scipy_lsqr", None), ("scipy_lsqr_explicit_matrix", matrix)):
            loop, seconds = ares_peers.lsqr_loop(chosen.activations, bench.plan.kernel, rows_of)
            loop_psnr = to_psnr(loop, truth)
            block[name] = {
                "s_per_image": seconds / count,
                "psnr": [float(loop_psnr.min()), float(np.median(loop_psnr))],
                "ratio": seconds / ours["median_s"],
                "equal_outcome": bool(min(loop_psnr.min(), ours_psnr.min()) >= 60),
            }
        if peer_images and (height * width * channels) % 64 == 0:
            block |= _against_cvxpy(bench, matrix, chosen, truth, ours, peer_images, band, to_psnr)
        result[f"B={batch}"] = block
        print(f"speed B={batch}: {block}")
    return result


def _against_cvxpy(
    bench: Bench,
    matrix: Any,
    chosen: ares.Candidates,
    truth: np.ndarray,
    ours: dict[str, float],
    peer_images: int,
    band: float,
    to_psnr: Any,
) -> dict[str, Any]:
    basis = ares_peers.raster_dct_basis(*bench.victim.input_shape)
    seconds, psnr, statuses = [], [], []
    for i in range(min(peer_images, len(chosen))):
        inputs, elapsed, status = ares_peers.basis_pursuit(
            chosen.activations[i], matrix, basis, band=band
        )
        seconds.append(elapsed)
        statuses.append(status)
        psnr.append(
            -np.inf if inputs is None else float(to_psnr(inputs[None], truth[i : i + 1])[0])
        )
        print(f"  cvxpy image {i}: {elapsed:.1f} s, {status}, {psnr[-1]:.1f} dB", flush=True)
    per_image = float(np.median(seconds))
    return {
        "cvxpy_images": len(seconds),
        "cvxpy_median_s_per_image": per_image,
        "cvxpy_psnr": [max(-1e3, float(min(psnr))), max(-1e3, float(np.median(psnr)))],
        "cvxpy_statuses": dict(Counter(statuses)),
        "cvxpy_band": band,
        "ratio_cvxpy": per_image / (ours["median_s"] / len(chosen)),
        "equal_outcome_cvxpy": bool(min(psnr) >= 60),
    }


def large(side: int, batch: int) -> dict[str, Any]:
    """Photographs at 224 x 224 x 3, 12 filters, 1024 bins, without forming a matrix."""
    private, public = photographs(side, batch)
    start = time.perf_counter()
    bench = Bench.build(private, public)
    craft_s = time.perf_counter() - start
    start = time.perf_counter()
    observation, images = bench.observe(np.arange(batch))
    jax.block_until_ready(observation.update)
    client_s = time.perf_counter() - start
    start = time.perf_counter()
    candidates = ares.leak(observation, bench.plan)
    leak_s = time.perf_counter() - start
    start = time.perf_counter()
    reconstruction = bench.invert(candidates)
    invert_s = time.perf_counter() - start
    bins = bench.bins_of(images)
    alone = np.array([b >= 0 and np.sum(bins == b) == 1 for b in bins])
    psnr = best_psnr(reconstruction, images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {
        "image": [side, side, 3],
        "batch": batch,
        "unknowns_per_image": side * side * 3,
        "alone_in_their_bin": int(alone.sum()),
        "psnr_of_those": [float(psnr[alone].min()), float(np.median(psnr[alone]))],
        "statuses": dict(Counter(str(c["status"]) for c in reconstruction.candidates)),
        "iterations": [int(c["iterations"]) for c in reconstruction.candidates],
        "peak_resident_gib": float(peak),
        "dense_matrix_would_be_gib": side**4 * 36 * 4 / 2**30,
        "seconds": {
            "craft": craft_s,
            "client": client_s,
            "leak": leak_s,
            "invert": invert_s,
        },
    }
    print(f"large: {result}")
    return result


def photographs(side: int, batch: int) -> tuple[Dataset, Dataset]:
    """Crops of photographs inside the scikit-image and scikit-learn wheels, at full detail.

    Private and public crops come from different photographs.
    """
    import skimage.data
    import skimage.io
    import sklearn.datasets

    names = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")
    photos = [getattr(skimage.data, name)()[..., :3] for name in names]
    photos += [np.asarray(image) for image in sklearn.datasets.load_sample_images().images]
    rng = np.random.default_rng(0)

    def crops(sources: list[np.ndarray], count: int, name: str) -> Dataset:
        images = []
        for k in range(count):
            photo = sources[k % len(sources)]
            top = rng.integers(photo.shape[0] - side + 1)
            left = rng.integers(photo.shape[1] - side + 1)
            images.append(photo[top : top + side, left : left + side])
        labels = np.arange(count, dtype=np.int32) % 10
        classes = tuple(str(i) for i in range(10))
        return Dataset(np.stack(images), labels, classes, name, "photographs in the wheels")

    return crops(photos[::2], batch, "private crops"), crops(photos[1::2], 64, "public crops")


def startup() -> dict[str, Any]:
    """Seconds of ``import jgia`` and ``jgia --help``, best and median of 7 processes."""
    commands = {
        "import jgia": [sys.executable, "-c", "import jgia"],
        "jgia --help": [sys.executable, "-m", "jgia", "--help"],
    }
    result = {}
    for name, command in commands.items():
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        result[name] = {"best_s": min(times), "median_s": float(np.median(times))}
        print(f"startup {name}: {result[name]}")
    return result


def main() -> None:
    """Run the sections and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", default="tfds:cifar10:test", help="private and public images")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the bundled sample")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--peer-images", type=int, default=8, help="images given to cvxpy")
    parser.add_argument("--band", type=float, default=1e-5, help="cvxpy's equality band")
    arguments = parser.parse_args()
    smoke: bool = arguments.smoke
    sections = set(arguments.sections)
    result: dict[str, Any] = {"machine": harness.machine(), "command": sys.argv[1:]}
    # The large section first: peak memory is that of the whole process.
    if "large" in sections:
        result["large"] = large(48, 3) if smoke else large(224, 16)
    dataset = load_dataset("sample" if smoke else arguments.data)
    num_client = 96 if smoke else len(dataset) - 1024
    private, public = split_client_public(dataset, seed=0, num_client=num_client)
    result["data"] = {"name": dataset.name, "private": len(private), "public": len(public)}
    bench = Bench.build(private, public)
    if "quality" in sections:
        result["quality"] = quality(bench, smoke)
    if "singletons" in sections:
        result["singletons"] = singletons(bench, smoke)
    if "specificity" in sections:
        result["specificity"] = specificity(bench, smoke)
    if "front_ends" in sections:
        result["front_ends"] = front_ends(private, public, smoke)
    if "speed" in sections:
        peer_images = 0 if smoke else arguments.peer_images
        result["speed"] = speed(bench, smoke, peer_images, arguments.band)
    if "startup" in sections:
        result["startup"] = startup()
    if arguments.out:
        harness.write_json(arguments.out, result)


if __name__ == "__main__":
    main()
