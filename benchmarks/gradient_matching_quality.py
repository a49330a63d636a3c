"""What both sides recover from the same updates, starts, labels, steps and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jgia.metrics import score, success_rate

if TYPE_CHECKING:
    from gradient_matching import Setup

MODELS = ("lenet", "convnet", "resnet18_small")
BATCHES = (1, 4, 8)
PEER_IMAGES = 10
"""Images of each model and batch that the peer attacks too."""

_DRAWS = 2000


def quality(setup: Setup) -> dict[str, Any]:
    """PSNR and SSIM of each image, by model and batch, with intervals, beside the peer's."""
    from gradient_matching import TV

    models: dict[str, str | None] = dict.fromkeys(("lenet",) if setup.smoke else MODELS)
    models |= {name: str(folder) for name, folder in setup.trained.items()}
    steps, images = (5, 2) if setup.smoke else (setup.steps, setup.images)
    rows = []
    for model, folder in models.items():
        for batch in (1,) if setup.smoke else BATCHES:
            rows.append(_row(setup, model, folder, batch, max(images, batch), steps))
            print(_line(rows[-1]), flush=True)
    return {"rows": rows, "steps": steps, "images": images, "total_variation": TV}


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
                    if first and first + batch > PEER_IMAGES:
                        continue
                    worker.ask(do="load", path=str(path))
                reply = worker.ask(**command)
                scores = score(np.load(found), np.load(truth))
                sides[name].append(
                    {
                        "seconds": reply["seconds"],
                        "psnr": scores["psnr"]["per_image"],
                        "ssim": scores["ssim"]["per_image"],
                    }
                )
    finally:
        for worker in workers.values():
            worker.close()
    row: dict[str, Any] = {"model": model, "trained": trained is not None, "batch": batch}
    row |= {name: _summary(runs) for name, runs in sides.items() if runs}
    if sides["breaching"]:
        row["difference"] = {
            key: _difference(sides["jgia"], sides["breaching"], key) for key in ("psnr", "ssim")
        }
    return row


def _values(runs: list[dict[str, Any]], key: str) -> np.ndarray:
    """One value per image, PSNR limited to 60 dB; a blank one for an image not returned."""
    values = [0.0 if v is None else min(v, 60.0) for run in runs for v in run[key]]
    return np.asarray(values, float)


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    psnr = _values(runs, "psnr")
    rate = success_rate(psnr, 18.0)
    return {
        "images": len(psnr),
        "psnr": _interval(psnr) | {"per_image": psnr.round(3).tolist()},
        "ssim": _interval(_values(runs, "ssim")),
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
            psnr, ssim = row[name]["psnr"], row[name]["ssim"]
            parts.append(
                f"{name} {psnr['mean']:.2f} dB [{psnr['low']:.2f}, {psnr['high']:.2f}], SSIM "
                f"{ssim['mean']:.3f} ({row[name]['images']} images, "
                f"{row[name]['seconds_per_image']:.1f} s each)"
            )
    if "difference" in row:
        away = row["difference"]["psnr"]
        parts.append(f"difference {away['mean']:+.2f} [{away['low']:+.2f}, {away['high']:+.2f}] dB")
    return "; ".join(parts)
