"""What both sides recover from the same updates, starts, labels, steps and settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from jgia.metrics import score, success_rate

if TYPE_CHECKING:
    from gradient_matching import Setup

MODELS = ("lenet", "convnet", "resnet18_small")
BATCHES = (1, 4, 8)
_METRICS = ("psnr", "ssim", "lpips")
_DRAWS = 2000


def quality(setup: Setup) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS of each image, by model and batch, with intervals, beside the peer's.

    Rows that the output file has already, with the same images and steps, are kept.
    """
    from gradient_matching import TV

    models: dict[str, str | None] = dict.fromkeys(("lenet",) if setup.smoke else MODELS)
    models |= {name: str(folder) for name, folder in setup.trained.items()}
    steps = 5 if setup.smoke else setup.steps
    found: dict[str, Any] = {"rows": [], "steps": steps, "total_variation": TV}
    found["rows"] = [] if setup.smoke else _kept(setup, found)
    done = {(row["model"], row["batch"]) for row in found["rows"]}
    for model, folder in models.items():
        for batch in (1,) if setup.smoke else BATCHES:
            if (model, batch) in done or (setup.only and model not in setup.only):
                continue
            images = 2 if setup.smoke else max(setup.images, batch)
            found["rows"].append(_row(setup, model, folder, batch, images, steps))
            print(_line(found["rows"][-1]), flush=True)
            if setup.out is not None and not setup.smoke:
                setup.write("quality", found)
    return found


def _kept(setup: Setup, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    path = None if setup.out is None else setup.out / "gradient_matching_quality.json"
    if path is None or not path.is_file():
        return []
    before = json.loads(path.read_text())
    same = all(before[name] == wanted[name] for name in ("steps", "total_variation"))
    return before["rows"] if same else []


def _row(
    setup: Setup, model: str, trained: str | None, batch: int, images: int, steps: int
) -> dict[str, Any]:
    """One model and batch: ours on all images, the peer on the first ones."""
    from gradient_matching import TV

    path, truth, found = (setup.folder / name for name in ("case.npz", "truth.npy", "found.npy"))
    command = {"do": "attack", "steps": steps, "total_variation": TV, "from_file": True}
    command["images"] = str(found)
    sides: dict[str, list[dict[str, Any]]] = {"jgia": [], "breaching": []}
    workers = {"jgia": setup.ours()}
    if setup.peer is not None:
        workers["breaching"] = setup.breaching(threads=1)
    try:
        for first in range(0, images - batch + 1, batch):
            workers["jgia"].ask(
                do="load",
                model=model,
                trained=trained,
                batch=batch,
                first=first,
                data=setup.data,
                path=str(path),
                truth=str(truth),
            )
            for name, worker in workers.items():
                if name == "breaching":
                    if first and first + batch > setup.peer_images:
                        continue
                    worker.ask(do="load", path=str(path))
                reply = worker.ask(**command)
                scores = score(np.load(found), np.load(truth), lpips=True)
                sides[name].append(
                    {
                        "seconds": reply["seconds"],
                        "psnr": scores["psnr"]["per_image"],
                        "ssim": scores["ssim"]["per_image"],
                        "lpips": scores["lpips"]["per_image"],
                    }
                )
    finally:
        for worker in workers.values():
            worker.close()
    row: dict[str, Any] = {"model": model, "trained": trained is not None, "batch": batch}
    row |= {name: _summary(runs) for name, runs in sides.items() if runs}
    if sides["breaching"]:
        row["difference"] = {
            key: _difference(sides["jgia"], sides["breaching"], key) for key in _METRICS
        }
    return row


def _values(runs: list[dict[str, Any]], key: str) -> np.ndarray:
    """One value per image, PSNR limited to 60 dB; the worst for an image not returned."""
    worst = 1.0 if key == "lpips" else 0.0
    values = [worst if v is None else min(v, 60.0) for run in runs for v in run[key]]
    return np.asarray(values, float)


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    psnr = _values(runs, "psnr")
    rate = success_rate(psnr, 18.0)
    return {
        "images": len(psnr),
        "psnr": _interval(psnr) | {"per_image": psnr.round(3).tolist()},
        "ssim": _interval(_values(runs, "ssim")),
        "lpips": _interval(_values(runs, "lpips")),
        "success_18_db": {"rate": rate.rate, "low": rate.low, "high": rate.high},
        "first_seconds": runs[0]["seconds"],
        "seconds_per_image": float(
            np.median([run["seconds"] for run in (runs[1:] or runs)]) / len(runs[0]["psnr"])
        ),
    }


def _difference(ours: list[dict[str, Any]], peer: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Ours less the peer's, image by image."""
    theirs = _values(peer, key)
    return _interval(_values(ours, key)[: len(theirs)] - theirs)


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Mean, its 95 % bootstrap interval, and the median."""
    draws = np.random.default_rng(0).choice(values, (_DRAWS, len(values))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "median": float(np.median(values)),
    }


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['model']:15s} B={row['batch']}"]
    for name in ("jgia", "breaching"):
        if name in row:
            psnr, ssim, lpips = (row[name][key] for key in _METRICS)
            parts.append(
                f"{name} {psnr['mean']:.2f} dB [{psnr['low']:.2f}, {psnr['high']:.2f}], SSIM "
                f"{ssim['mean']:.3f}, LPIPS {lpips['mean']:.3f} ({row[name]['images']} images, "
                f"{row[name]['seconds_per_image']:.1f} s each)"
            )
    if "difference" in row:
        away = row["difference"]["psnr"]
        parts.append(f"difference {away['mean']:+.2f} [{away['low']:+.2f}, {away['high']:+.2f}] dB")
    return "; ".join(parts)
