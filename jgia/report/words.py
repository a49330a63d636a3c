"""The report's sentences: verdict, threat model, statuses and metrics in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jgia.report.records import EXACT_PSNR, HEADLINE_DB, RECOGNIZABLE_DB, Number

STATUS_MEANINGS = {
    "exact": "More equations than unknowns, solved down to the numerical noise of the update.",
    "noisy": "More equations than unknowns, solved down to noise or rounding in the update.",
    "regularised": "Fewer equations than unknowns in places; a sparse prior filled in the rest.",
    "rank_deficient": "Enough equations by count, but they leave some pixels undetermined.",
    "matched": "The point of a search whose update is closest to the client's. Nothing proves it.",
    "not_converged": "The solver reached its iteration limit; this is its best image so far.",
    "mixture": "Several images share one measurement and were not told apart; not returned.",
    "duplicate": "The same image as a candidate with a better score; not returned.",
    "nonfinite": "The arithmetic overflowed or gave NaN; not returned.",
}

METRIC_MEANINGS = (
    (
        "PSNR",
        f"Pixel error in decibels, higher is closer: at {RECOGNIZABLE_DB} dB an image is "
        f"recognizable, at 25 details show, at {HEADLINE_DB} no difference is visible. Identical "
        "images have infinite PSNR, "
        f"written as {EXACT_PSNR:g} dB.",
    ),
    (
        "Capped mean",
        "Mean PSNR with every image capped at 60 dB, so that a few exact images cannot hide "
        "failed ones.",
    ),
    ("PSNR of mean MSE", "PSNR of the average squared error; the worst images dominate it."),
    ("SSIM", "Structural similarity, 1 for identical images and about 0 for unrelated ones."),
    ("LPIPS", "Learned perceptual distance, 0 for identical images; lower is closer."),
    (
        "Success rate",
        "Share of all true images at or above a PSNR, unmatched ones counted as failures, with "
        "its 95% Wilson interval.",
    ),
    (
        "Baselines",
        "What a guess scores without seeing the update. A result near them says nothing leaked "
        "through this attack.",
    ),
)


def plural(count: int, noun: str) -> str:
    """``1 image``, ``2 images``.

    >>> plural(1, "image"), plural(0, "image")
    ('1 image', '0 images')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def decibel(value: Number | None) -> str:
    """PSNR as text: ``31.4 dB``, ``identical`` at the ceiling, a dash when undefined.

    >>> decibel(31.42), decibel(200.0), decibel(None)
    ('31.4 dB', 'identical', '–')
    """
    if value is None:
        return "–"
    return "identical" if value >= EXACT_PSNR else f"{value:.1f} dB"


def number(value: Number | None, digits: int = 3) -> str:
    """A number to so many significant digits, or a dash."""
    return "–" if value is None else f"{value:.{digits}g}"


def seconds(value: Number) -> str:
    """A duration at a readable resolution.

    >>> seconds(0.0123), seconds(4.56), seconds(754.2)
    ('12 ms', '4.6 s', '12 min 34 s')
    """
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def percent(share: Number) -> str:
    """A share in [0, 1] as whole percent; 0% and 100% only when exactly so.

    >>> percent(0.875), percent(0.999), percent(1.0)
    ('88%', '>99%', '100%')
    """
    whole = round(100 * share)
    if whole == 100 and share < 1:
        return ">99%"
    return "<1%" if whole == 0 and share > 0 else f"{whole}%"


def server_words(threat_model: Mapping[str, Any]) -> str:
    """``a malicious server`` or ``an honest-but-curious server``."""
    if threat_model["server"] == "malicious":
        return "a malicious server"
    return "an honest-but-curious server"


def num_reaching(result: Mapping[str, Any], threshold: Number) -> int:
    """How many true images have a PSNR of at least ``threshold`` dB (0 without scores)."""
    scores = result["scores"]
    values = scores["psnr"]["per_image"] if scores else []
    return sum(value is not None and value >= threshold for value in values)


def verdict(result: Mapping[str, Any]) -> str:
    """The headline: one sentence that says what was recovered, in plain words."""
    server = server_words(result["threat_model"])
    scores = result["scores"]
    if scores is None:
        accepted = num_accepted(result)
        if accepted == 0:
            return f"No image reconstructed from this update by {server}"
        return f"{plural(accepted, 'image')} reconstructed from this update: what {server} sees"
    total = scores["num_true"]
    recovered = num_reaching(result, HEADLINE_DB)
    if recovered == 0:
        subject = "The image was not" if total == 1 else f"None of {total} images was"
        return f"{subject} recovered at ≥ {HEADLINE_DB} dB by {server}"
    verb = "was" if total == 1 else "were"
    subject = "The image" if total == 1 else f"{recovered} of {total} images"
    if total == 1 or recovered < total:
        verb = "recovered" if total > 1 else f"{verb} recovered"
        return f"{subject} {verb} at ≥ {HEADLINE_DB} dB: what {server} sees"
    return f"All {total} images recovered at ≥ {HEADLINE_DB} dB: what {server} sees"


def num_accepted(result: Mapping[str, Any]) -> int:
    """How many candidates were returned as images."""
    if result["scores"] is not None:
        return result["scores"]["num_reconstructed"]
    rejected = ("mixture", "duplicate", "nonfinite")
    counts = result["attack"]["status_counts"]
    return sum(count for status, count in counts.items() if status not in rejected)


def summary(result: Mapping[str, Any]) -> str:
    """One or two sentences under the headline: the numbers behind it, and how to read them."""
    attack, scores = result["attack"], result["scores"]
    looked = f"{attack['name']} looked at {plural(attack['num_candidates'], 'candidate')}"
    if scores is None:
        return (
            f"{looked}. No true images were given, so nothing here is scored: judge the images "
            "by eye and by the attack's own statuses."
        )
    median = scores["psnr"]["median"]
    returned = plural(scores["num_reconstructed"], "image")
    numbers = f"{looked} and returned {returned}"
    if median is not None:
        single = scores["num_reconstructed"] == 1
        subject = "its PSNR" if single else "the median PSNR of those matched"
        numbers += f"; {subject} is {decibel(median)}"
    numbers += "."
    if num_reaching(result, HEADLINE_DB):
        return numbers
    recognizable = num_reaching(result, RECOGNIZABLE_DB)
    if recognizable:
        verb = "reaches" if recognizable == 1 else "reach"
        numbers += f" {recognizable} of {scores['num_true']} {verb} {RECOGNIZABLE_DB} dB, "
        numbers += "where an image is recognizable."
    elif scores["num_reconstructed"]:
        numbers += f" None reaches {RECOGNIZABLE_DB} dB, where an image is recognizable."
    return f"{numbers} A failed attack bounds nothing: a stronger one may succeed."


def threat_model_words(threat_model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The threat model as (question, answer) pairs."""
    malicious = threat_model["server"] == "malicious"
    who = (
        "Whoever runs the training server, or controls what it sends to a client."
        if malicious
        else "Whoever runs the training server, or reads the updates that reach it."
    )
    changes = (
        "Only parameter values. The architecture is the one that the client agreed to: same "
        "layers, same shapes, same loss. The client computes its update as usual."
        if malicious
        else "Nothing. It sends the parameters that training produced, and only looks."
    )
    if threat_model["protocol"] == "fedsgd":
        sees = "One gradient of the mean loss over the client's batch (FedSGD)."
    else:
        number = threat_model["local_steps"]
        steps = plural(number, "local step") if number else "an unknown number of local steps"
        sees = f"The change of the parameters after {steps} of training (FedAvg)."
    if (clients := threat_model.get("num_clients", 1)) > 1:
        sees += f" Summed over {clients} clients by secure aggregation: no single update is seen."
    if layers := threat_model.get("visible_layers"):
        sees += f" Of the layers {', '.join(layers)} only."
    pairs = [
        ("Who can do this", who),
        ("What it changes", changes),
        ("What it sees", sees),
        ("What clients do against it", _defense(threat_model)),
        ("What it assumes", _knowledge(threat_model)),
        ("Public data", threat_model["public_data"]),
    ]
    if malicious:
        pairs.append(
            (
                "What this is not",
                "Not an honest-but-curious result: a server that sends the parameters that "
                "training produced cannot run this attack.",
            )
        )
    else:
        pairs.append(
            (
                "What this is not",
                "Not a bound on a malicious server, which chooses the parameters and can see more.",
            )
        )
    return pairs


def _defense(threat_model: Mapping[str, Any]) -> str:
    defense, noise_std = threat_model.get("defense", "none"), threat_model.get("noise_std", 0.0)
    if defense == "none":
        return "Nothing that is known: updates are taken for what training computed."
    told = f" The attacker is told the noise: {noise_std:.3g} on every entry." if noise_std else ""
    return f"They defend with {defense}.{told}"


def _knowledge(threat_model: Mapping[str, Any]) -> str:
    examples, rate = threat_model["num_examples"], threat_model["local_learning_rate"]
    known = [
        f"the batch size is known ({examples})" if examples else "the batch size is not known",
        "labels are known" if threat_model["labels_known"] else "labels are not known",
    ]
    if threat_model["protocol"] == "fedavg":
        given = f"is known ({rate:g})" if rate is not None else "is not known"
        known.append(f"the client's learning rate {given}")
    text = "; ".join(known)
    return f"{text[0].upper()}{text[1:]}."
