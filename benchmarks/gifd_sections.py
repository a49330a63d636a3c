"""What each section of fidelity runs, and what its rows say together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import numpy as np
from gifd_cases import Case, Method
from gifd_search import available, gifd, pixel, run_case
from scipy import stats

from jgia._io import atomic_write_bytes

if TYPE_CHECKING:
    from gifd import Setup

_METRICS = ("psnr", "ssim", "lpips")


# ---- what is run


def ladder(setup: Setup) -> dict[str, Any]:
    """All methods: at equal iterations, at the time that GIFD took, and with long budgets."""
    steps = setup.steps
    methods = [
        pixel("IG", steps),
        pixel("IG, as published", steps, published=True),
        gifd("latent only", steps, last_stage=0),
        gifd("GIFD", steps),
        Method("GIAS", "gias", steps, {}),
        Method("GGL", "ggl", steps, {}),
    ]
    if setup.smoke:
        methods = [methods[0], *methods[2:4]]
    methods = [method for method in methods if setup.wants(method.name)]
    found = run(setup, "ladder", [Case(method) for method in methods])
    found["against"] = _against(found["rows"], "GIFD")
    if setup.equal_time:
        lengths = found.get("equal_time_steps") or _equal_time(found["rows"], methods)
        found["equal_time_steps"] = lengths
        timed = [
            Case(method._replace(name=f"{method.name}, equal time", steps=lengths[method.name]))
            for method in methods
            if lengths.get(method.name) and method.name != "GIFD"
        ]
        found = run(setup, "ladder", timed, found)
        found["against_at_equal_time"] = _against(found["rows"], "GIFD", ", equal time")
    if setup.long:
        long = [
            Case(pixel(f"IG, {setup.long} steps", setup.long)),
            Case(gifd(f"GIFD, {setup.long_gifd} steps", setup.long_gifd)),
            Case(Method(f"GIAS, {setup.long_gifd} steps", "gias", setup.long_gifd, {})),
        ]
        long = [case for case in long if setup.wants(case.name.split(",")[0])]
        found = run(setup, "ladder", long, found, clients=setup.long_victims)
        found["against_at_length"] = _against(
            found["rows"], f"GIFD, {setup.long_gifd} steps", " steps"
        )
    return found


def ablation(setup: Setup) -> dict[str, Any]:
    """One option of GIFD changed at a time, at the same number of steps."""
    steps, last = setup.steps, setup.problem().prior.generator.num_blocks - 1
    methods = [gifd("as it is", steps), gifd("no l1 balls", steps, radius_mode="none")]
    methods += [gifd(f"l1 x {scale:g}", steps, l1_scale=scale) for scale in (10.0, 3.0, 0.3, 0.1)]
    methods += [gifd(f"last stage {k}", steps, last_stage=k) for k in range(last + 1)]
    methods += [
        gifd("features alone", steps, search="features"),
        gifd("features and styles", steps, search="features_styles"),
        gifd("skip dropped", steps, skip="drop"),
        gifd("skip optimized", steps, skip="optimize"),
        gifd("Gaussian start", steps, start="gaussian"),
        gifd("last stage's image", steps, gifd_selection="last"),
    ]
    if setup.smoke:
        methods = [methods[0], methods[2]]
    found = run(setup, "ablation", [Case(m) for m in methods if setup.wants(m.name)])
    found["against"] = _against(found["rows"], "as it is")
    return found


def batch(setup: Setup) -> dict[str, Any]:
    """Several images behind one gradient; labels are inferred, images matched by the scorer."""
    if setup.smoke:
        return run(setup, "batch", [Case(pixel("IG", setup.steps), batch=2)])
    plan = [Case(method, batch=size) for size in (1, 2, 4, 8) for method in _three(setup)]
    return run(setup, "batch", plan)


def ood(setup: Setup) -> dict[str, Any]:
    """Clients' images unlike those that the prior was trained on."""
    specs = ["faces:cartoon", "faces:art"]
    if setup.data_dir is not None:
        files = ("fashion_mnist_test10k", "bccd_cells64", "noto_emoji_faces64")
        specs += [f"npz:{setup.data_dir / name}.npz" for name in files]
    if setup.smoke:
        specs = ["sample:64"]
    return run(setup, "ood", [Case(m, data=spec) for spec in specs for m in _three(setup)])


def defenses(setup: Setup) -> dict[str, Any]:
    """What clients do against it; what the update shows of that is replayed, or not."""
    kinds = ("none", "noise 0.1", "noise 0.5", "noise 2", "clip 0.1", "top_k 0.5", "top_k 0.1")
    kinds += ("top_k 0.01", "soteria 0.2")
    if setup.smoke:
        kinds = ("top_k 0.1",)
    methods = [gifd("GIFD", setup.steps), gifd("GIFD, no replay", setup.steps, replay="none")]
    if not setup.smoke:
        methods += [pixel("IG", setup.steps), gifd("latent only", setup.steps, last_stage=0)]
    plan = [Case(m, defense=kind) for kind in kinds for m in methods if setup.wants(m.name)]
    found = run(setup, "defenses", [c for c in plan if _tells(c)])
    for kind in kinds:
        pair = [c.name for c in plan if c.defense == kind and c.method.kind == "gifd"][:2]
        found.setdefault("replay_gain", {})[kind] = _paired(found["rows"], *pair)
    return found


def mapping(setup: Setup) -> dict[str, Any]:
    """A conditional prior whose classes are not the victim's: which class it is given."""
    told = {"classes of the victim": "victim", "mapped": "mapped", "true classes": "truth"}
    methods = [Method(n, "mapping", setup.steps, {"told": t}) for n, t in told.items()]
    if setup.classifier is None:
        methods = [methods[0], methods[2]]
    if setup.smoke:
        methods = methods[1:2]
    found = run(setup, "mapping", [Case(method) for method in methods], conditional=True)
    found["against"] = _against(found["rows"], "classes of the victim")
    return found


def _three(setup: Setup) -> list[Method]:
    methods = [gifd("latent only", setup.steps, last_stage=0), gifd("GIFD", setup.steps)]
    methods = [pixel("IG", setup.steps), *methods]
    return [m for m in (methods[2:] if setup.smoke else methods) if setup.wants(m.name)]


def _tells(case: Case) -> bool:
    """Without a defense that shows, replay changes nothing."""
    shows = case.defense.split(" ")[0] in ("top_k", "soteria")
    return shows or case.method.options.get("replay") != "none"


# ---- running it


def run(
    setup: Setup,
    section: str,
    cases: list[Case],
    found: dict[str, Any] | None = None,
    *,
    clients: int | None = None,
    conditional: bool = False,
) -> dict[str, Any]:
    """Every case against every client, all cases of a client in turn; finished rows are kept."""
    left_out = [case.name for case in cases if not available(case.method)]
    cases = [case for case in cases if available(case.method)]
    problem = setup.problem(conditional=conditional)
    plan = setup.plan(problem)
    path = setup.path(section)
    if found is None:
        found = _kept(path, plan)
        found |= {"plan": plan, "left_out": left_out}
    records = found["cases"]
    for case in cases:
        if records.get(case.name, record := case.record()) != record:
            found["rows"] = [row for row in found["rows"] if row["case"] != case.name]
        records[case.name] = record
    done = {(row["case"], row["client"]) for row in found["rows"]}
    for index in range(clients or setup.victims):
        for case in cases:
            if (case.name, index) in done:
                continue
            row = run_case(
                problem,
                case,
                index,
                restarts=setup.restarts,
                microbatch=setup.microbatch,
                compilation=setup.compilation,
                lpips=setup.lpips,
                classifier=setup.classifier,
            )
            found["rows"].append(row)
            print(_line(row), flush=True)
            if path is not None:
                write(path, found | {"machine": harness.machine()})
    found["summary"] = {
        name: _summary([row for row in found["rows"] if row["case"] == name], setup.restarts)
        for name in records
    }
    for name, entry in found["summary"].items():
        if entry and any(case.name == name for case in cases):
            print(_table_line(name, entry), flush=True)
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON as in :func:`harness.write_json`, but a row is one line."""
    rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in content["rows"])
    options: dict[str, Any] = {"indent": 1, "sort_keys": True, "allow_nan": False}
    text = json.dumps(content | {"rows": "ROWS"}, **options)
    text = text.replace('"rows": "ROWS"', f'"rows": [\n  {rows}\n ]')
    atomic_write_bytes(path, (text + "\n").encode())


def _kept(path: Path | None, plan: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {"rows": [], "cases": {}}
    if path is None or not path.is_file() or plan["smoke"]:
        return empty
    before = json.loads(path.read_text())
    if before.get("plan") != plan:
        raise SystemExit(
            f"{path.name} is of another plan ({before.get('plan')}, now {plan}); give another "
            "--tag, or remove it."
        )
    kept = ("rows", "cases", "equal_time_steps")
    return empty | {name: before[name] for name in kept if name in before}


def _line(row: dict[str, Any]) -> str:
    best = row["best"]
    text = f"{row['client']:3d} {row['case']:44s} {row['psnr'][best]:6.2f} dB"
    text += f" (restarts {' '.join(f'{v:.1f}' for v in row['psnr'])})"
    text += f", {row['seconds']:.1f} s"
    return text + (f" + compile {row['compile_s']:.1f}" if row["compile_s"] > 0.5 else "")


# ---- what rows say


def _best(row: dict[str, Any], metric: str) -> float | None:
    return row[metric][row["best"]]


def _summary(rows: list[dict[str, Any]], restarts: int) -> dict[str, Any]:
    """Over clients: the best restart by gradient distance, single ones, stages, time."""
    if not rows:
        return {}
    entry: dict[str, Any] = {"clients": len(rows), "restarts": restarts}
    for metric in _METRICS:
        values = [_best(row, metric) for row in rows if row.get(metric)]
        if values and None not in values:
            entry[metric] = _interval(np.asarray(values, float))
    every = np.asarray([row["psnr"] for row in rows], float)
    entry["psnr_of_a_single_restart"] = float(every.mean())
    entry["psnr_of_the_best_by_truth"] = float(every.max(axis=1).mean())
    entry["seconds_per_client"] = float(np.median([row["seconds"] for row in rows]))
    entry["cpu_s_per_client"] = float(np.median([row["cpu_s"] for row in rows]))
    entry["labels_right"] = float(np.mean([row["labels_right"] for row in rows]))
    distances = [_best(row, "distance") for row in rows]
    if None not in distances:
        entry["distance"] = float(np.mean(np.asarray(distances, float)))
    if all(row.get("stage_psnr") and len(row["stage_psnr"][0]) > 1 for row in rows):
        curve = np.asarray([row["stage_psnr"] for row in rows], float)
        entry["stage_psnr"] = curve.mean(axis=(0, 1)).tolist()
        chosen = np.asarray([row["stage"][row["best"]] for row in rows])
        entry["stage_chosen"] = np.bincount(chosen, minlength=curve.shape[2]).tolist()
    return entry


def _interval(values: np.ndarray) -> dict[str, float]:
    """Mean, median, standard deviation and the 95 % interval of the mean by Student's t."""
    out = {"mean": float(values.mean()), "median": float(np.median(values))}
    if len(values) < 2:
        return out
    spread = float(values.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return out | {"std": spread, "low": out["mean"] - half, "high": out["mean"] + half}


def _against(rows: list[dict[str, Any]], name: str, suffix: str = "") -> dict[str, Any]:
    """One case less each other, client by client; only those with the suffix if there is one."""
    others = dict.fromkeys(row["case"] for row in rows)
    chosen = [other for other in others if other != name and other.endswith(suffix)]
    return {other: _paired(rows, name, other) for other in chosen}


def _paired(rows: list[dict[str, Any]], one: str, other: str) -> dict[str, Any]:
    """Mean difference, its 95 % interval, and the p-value of the paired t-test, by metric."""
    found: dict[str, Any] = {}
    sides = [{row["client"]: row for row in rows if row["case"] == name} for name in (one, other)]
    shared = sorted(set(sides[0]) & set(sides[1]))
    for metric in _METRICS:
        pairs = [
            [_best(side[i], metric) for side in sides] for i in shared if metric in sides[0][i]
        ]
        pairs = [pair for pair in pairs if None not in pair]
        if len(pairs) < 2:
            continue
        a, b = np.asarray(pairs, float).T
        entry: dict[str, Any] = {"difference": float((a - b).mean()), "clients": len(pairs)}
        if np.ptp(a - b) > 0:
            test = stats.ttest_rel(a, b)
            low, high = test.confidence_interval(0.95)
            entry |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
        found[metric] = entry
    return found


def _equal_time(rows: list[dict[str, Any]], methods: list[Method]) -> dict[str, int]:
    """Steps that take each method as long as GIFD takes for its own, from the rows so far."""
    pace = {}
    for method in methods:
        own = [row["seconds"] for row in rows if row["case"] == method.name]
        if own:
            pace[method.name] = float(np.median(own)) / method.steps
    if "GIFD" not in pace:
        return {}
    target = pace["GIFD"] * next(m.steps for m in methods if m.name == "GIFD")
    return {name: max(round(target / each), 1) for name, each in pace.items()}


def _table_line(name: str, entry: dict[str, Any]) -> str:
    psnr = entry["psnr"]
    text = f"{name:44s} {psnr['mean']:6.2f} dB"
    if "low" in psnr:
        text += f" [{psnr['low']:.2f}, {psnr['high']:.2f}]"
    if "ssim" in entry:
        text += f", SSIM {entry['ssim']['mean']:.3f}"
    text += f"; single {entry['psnr_of_a_single_restart']:.2f} dB"
    if "stage_psnr" in entry:
        text += "; stages " + " ".join(f"{v:.1f}" for v in entry["stage_psnr"])
    return text + f"; {entry['seconds_per_client']:.1f} s a client ({entry['clients']})"
