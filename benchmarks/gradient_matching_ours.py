"""Our side of the gradient-matching benchmark in a process of its own: JSON lines in and out."""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import gradient_matching_cases as cases
import jax
import jax.numpy as jnp
import numpy as np

from jgia.attacks import gradient_matching as matching
from jgia.config.performance import PerformanceFlags
from jgia.data import Dataset, load_dataset
from jgia.models import Victim
from jgia.observation import Observation
from jgia.training import load_victim

KEY = 7
_IMAGES = 512  # of the data set, from its start


def settings(
    steps: int, *, total_variation: float, restarts: int = 1, **others: Any
) -> matching.Settings:
    """What breaching's ``invertinggradients`` does, in our words."""
    return matching.Settings(
        distance="cosine",
        total_variation=total_variation,
        tv_form="zero_padded",
        optimizer="signed_adam",
        learning_rate=0.1,
        schedule="step",
        num_steps=steps,
        restarts=restarts,
        box=True,
        start="normal",
        **others,
    )


class Problem:
    """An observation, the images behind it, and where searches start."""

    def __init__(self, command: dict[str, Any]) -> None:
        data, side = command["data"], command.get("side")
        dataset, client, _ = _dataset(data)
        first, batch = command.get("first", 0), command["batch"]
        self.images, labels = dataset.take(client[first : first + batch])
        self.images = _enlarged(self.images, side)
        model, self.dtype = command["model"], command.get("dtype", "float32")
        victim, params = _victim(data, model, command.get("trained"), side)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), params)
        labels = labels % victim.num_classes
        self.observation = cases.observe(victim, params, self.images, labels)
        shape = (1, batch, *victim.input_shape)
        rng = np.random.default_rng(first)
        self.start = rng.standard_normal(shape).astype(self.dtype)
        if command.get("truth"):
            np.save(command["truth"], self.images)
        if command.get("path"):
            path = Path(command["path"])
            cases.export(path, self.observation, self.images, self.start[0], model)


@functools.cache
def _dataset(data: str) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """The data, the rows that are a client's, and 64 others for running statistics."""
    dataset = load_dataset(data, limit=_IMAGES)
    public = np.zeros(len(dataset), bool) if dataset.public is None else dataset.public
    client, shown = np.flatnonzero(~np.asarray(public)), np.flatnonzero(public)
    return dataset, client, (shown if len(shown) else client)[-64:]


@functools.cache
def _victim(data: str, model: str, trained: str | None, side: int | None) -> tuple[Victim, Any]:
    if trained is not None:
        return load_victim(Path(trained))
    dataset, _, shown = _dataset(data)
    images = _enlarged(dataset.take(shown)[0], side)
    return cases.untrained(model, images, images.shape[1])


def _enlarged(images: np.ndarray, side: int | None) -> np.ndarray:
    """Every pixel repeated, up to a multiple of the images' own side."""
    times = 1 if side is None else side // images.shape[1]
    return images.repeat(times, axis=1).repeat(times, axis=2)


def curve(observation: Observation, start: np.ndarray, steps: int, tv: float) -> list[float]:
    """The losses of every step from a given start, as breaching records them."""
    chosen = settings(steps, total_variation=tv)
    labels = jnp.asarray(observation.threat_model.labels)
    problem = matching.make_problem(observation, labels, chosen)
    variables = matching.Variables(jnp.asarray(start), None)
    states = jax.vmap(matching.search.start_from, in_axes=(None, 0))(problem, variables)
    kept: list[np.ndarray] = []

    def remember(event: matching.Event) -> bool:
        kept.append(event.losses)
        return False

    matching.run([problem], [states], num_steps=steps, stretch=steps, on_event=remember)
    return np.concatenate(kept, axis=1)[0].astype(float).tolist()


def attack(problem: Problem, command: dict[str, Any]) -> dict[str, Any]:
    """One call of :func:`jgia.attacks.gradient_matching.attack`, timed whole."""
    chosen = settings(
        command["steps"],
        total_variation=command["total_variation"],
        restarts=command.get("restarts", 1),
    )
    performance = PerformanceFlags(microbatch=command.get("microbatch"))
    start = None
    if command.get("from_file"):
        start = problem.observation.victim.normalization.denormalize(problem.start)
    cpu, begin = time.process_time(), time.perf_counter()
    found = matching.attack(
        jax.random.key(KEY),
        problem.observation,
        options=chosen,
        performance=performance,
        start=start,
    )
    seconds = time.perf_counter() - begin
    if command.get("images"):
        np.save(command["images"], found.images)
    return {"seconds": seconds, "cpu_s": time.process_time() - cpu}


def clients(problem: Problem, command: dict[str, Any]) -> dict[str, Any]:
    """Many clients of one round: together, or one call after another."""
    batch, victim = command["batch"], problem.observation.victim
    labels = np.asarray(problem.observation.threat_model.labels)
    observations = [
        cases.observe(
            victim,
            problem.observation.params,
            problem.images[i : i + batch],
            labels[i : i + batch],
        )
        for i in range(0, command["clients"] * batch, batch)
    ]
    chosen = settings(command["steps"], total_variation=command["total_variation"])
    performance = PerformanceFlags(microbatch=command.get("microbatch"))
    key, times = jax.random.key(KEY), []
    if command["together"]:
        for _ in range(1 + command.get("repeats", 1)):
            begin = time.perf_counter()
            matching.attack_clients(key, observations, options=chosen, performance=performance)
            times.append(time.perf_counter() - begin)
        return {"first_s": times[0], "seconds": min(times[1:])}
    for each, observation in zip(
        jax.random.split(key, len(observations)), observations, strict=True
    ):
        begin = time.perf_counter()
        matching.attack(each, observation, options=chosen, performance=performance)
        times.append(time.perf_counter() - begin)
    return {"each_s": times}


def answer(problem: Problem, command: dict[str, Any]) -> dict[str, Any]:
    """The answer to one command on a problem that is loaded."""
    if command["do"] == "curve":
        start = problem.start
        tv = command["total_variation"]
        return {"losses": curve(problem.observation, start, command["steps"], tv)}
    if command["do"] == "clients":
        return clients(problem, command)
    return attack(problem, command)


def main() -> None:
    """Serve commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    problem: Problem | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                problem = Problem(command)
                sizes = [leaf.size for leaf in jax.tree.leaves(problem.observation.params)]
                reply: dict[str, Any] = {"parameters": sum(sizes)}
            elif problem is None:
                raise ValueError("nothing is loaded.")
            else:
                reply = answer(problem, command)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            reply["peak_mb"] = peak
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            reply = {"failed": text.splitlines()[0][:300]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
