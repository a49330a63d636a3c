"""How time and memory grow with batch, image, restarts and clients; and the section for a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradient_matching import Setup


def scaling(setup: Setup) -> dict[str, Any]:
    """Seconds an iteration and peak memory, each point in a process of its own."""
    smoke = setup.smoke
    steps = 5 if smoke else 30
    grown: list[tuple[str, str, list[dict[str, int]]]] = [
        ("batch", "convnet", [{"batch": n} for n in (() if smoke else (1, 2, 4, 8, 16, 32))]),
        ("side", "convnet", [{"side": 32 * n} for n in (() if smoke else (1, 2, 4, 7))]),
    ]
    for size in (1, None):
        points = [{"restarts": n, "microbatch": size or n} for n in (1, 2, 4, 8)]
        kind = "restarts, one at a time" if size else "restarts, all at once"
        grown.append((kind, "cnn6", [] if smoke else points))
    rows = []
    for kind, model, points in grown:
        for point in points:
            row = _point(setup, model, point, steps)
            rows.append({"grows": kind, "model": model, "steps": steps} | point | row)
            print(_point_line(rows[-1]), flush=True)
    return {"rows": rows, "clients": _clients(setup)}


def _point(setup: Setup, model: str, point: dict[str, int], steps: int) -> dict[str, Any]:
    """First call, then the best of the repeats, and the process's peak memory."""
    from gradient_matching import TV

    load = {"batch": point.get("batch", 1), "side": point.get("side")}
    search = {name: point[name] for name in ("restarts", "microbatch") if name in point}
    command: dict[str, Any] = {"do": "attack", "steps": steps, "total_variation": TV} | search
    with setup.ours() as worker:
        loaded = worker.ask(do="load", model=model, data=setup.data, **load)
        first = worker.ask(**command)
        times = [worker.ask(**command) for _ in range(setup.repeats)]
    return {
        "compile_s": first["seconds"] - min(reply["seconds"] for reply in times),
        "ms_per_iteration": 1e3 * min(reply["seconds"] for reply in times) / steps,
        "cpu_ms_per_iteration": 1e3 * min(reply["cpu_s"] for reply in times) / steps,
        "loaded_mb": loaded["peak_mb"],
        "peak_mb": times[-1]["peak_mb"],
    }


def _point_line(row: dict[str, Any]) -> str:
    point = ", ".join(f"{key} {row[key]}" for key in ("batch", "side", "restarts") if key in row)
    return (
        f"{row['grows']:24s} {row['model']:8s} {point:12s} {row['ms_per_iteration']:8.2f} ms/it, "
        f"peak {row['peak_mb']:.0f} MiB ({row['loaded_mb']:.0f} before), compile "
        f"{row['compile_s']:.1f} s"
    )


def _clients(setup: Setup) -> dict[str, Any]:
    """Seconds an image: clients attacked together, and one call after another."""
    from gradient_matching import TV

    counts, steps = ((2,), 5) if setup.smoke else ((1, 4, 16), 200)
    command = {"do": "clients", "steps": steps, "total_variation": TV, "batch": 1}
    found: dict[str, Any] = {"model": "lenet", "steps": steps, "together": []}
    load = {"do": "load", "model": "lenet", "data": setup.data, "batch": counts[-1]}
    for size in ("1",) if setup.smoke else ("1", "all"):
        for count in counts:
            with setup.ours() as worker:
                worker.ask(**load)
                microbatch = 1 if size == "1" else count
                reply = worker.ask(
                    **command,
                    clients=count,
                    together=True,
                    microbatch=microbatch,
                    repeats=setup.repeats,
                )
            each = reply["seconds"] / count
            peak = reply["peak_mb"]
            found["together"].append(
                {"clients": count, "microbatch": size, "s_per_image": each, "peak_mb": peak}
            )
            print(f"{count} clients together, microbatch {size}: {each:.3f} s each", flush=True)
    with setup.ours() as worker:
        worker.ask(**load)
        reply = worker.ask(**command, clients=counts[-1], together=False)
    found["in_turn"] = {"s_per_image": reply["each_s"], "peak_mb": reply["peak_mb"]}
    print(f"in turn: {', '.join(f'{s:.3f}' for s in reply['each_s'])} s")
    return found


def device(setup: Setup) -> dict[str, Any]:
    """ResNet-18 at 224 x 224, and 64 clients at once at 32 x 32, on whatever device there is."""
    from gradient_matching import TV

    smoke = setup.smoke
    model, side = ("lenet", 32) if smoke else ("resnet18", 224)
    steps = 5 if smoke else 200
    command: dict[str, Any] = {"do": "attack", "steps": steps, "total_variation": TV}
    count, name = (2, "lenet") if smoke else (64, "convnet")
    with setup.ours(threads=0) as worker:
        worker.ask(do="load", model=model, batch=1, side=side, data=setup.data)
        first = worker.ask(**command)["seconds"]
        best = min(worker.ask(**command)["seconds"] for _ in range(setup.repeats))
        worker.ask(do="load", model=name, batch=count, data=setup.data)
        reply = worker.ask(
            do="clients",
            steps=5 if smoke else 1000,
            total_variation=TV,
            batch=1,
            clients=count,
            together=True,
            microbatch=count,
            repeats=setup.repeats,
        )
    large = {
        "model": model,
        "side": side,
        "steps": steps,
        "iterations_per_s": steps / best,
        "compile_s": first - best,
    }
    print(f"{model} {side} x {side}: {large['iterations_per_s']:.1f} it/s")
    many = {
        "model": name,
        "clients": count,
        "steps": 5 if smoke else 1000,
        "seconds": reply["seconds"],
        "compile_s": reply["first_s"] - reply["seconds"],
        "images_per_hour": 3600 * count / reply["seconds"],
    }
    print(f"{count} clients, {many['steps']} steps: {many['images_per_hour']:.0f} images an hour")
    return {"one_large_image": large, "many_clients": many}
