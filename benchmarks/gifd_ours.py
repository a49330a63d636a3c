"""Our side of GIFD's speed in a process of its own: JSON lines in and out."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import gifd_cases as cases
import jax
import jax.numpy as jnp
import numpy as np

from jgia.attacks.gifd.attack import attack, attack_clients
from jgia.attacks.gifd.matching import make_matching, matching_distance
from jgia.attacks.gifd.settings import Settings, rates, settings
from jgia.attacks.gradient_matching.distances import distance
from jgia.config.gifd import GifdOptions
from jgia.config.gradient_matching import RunOptions
from jgia.config.performance import PerformanceFlags
from jgia.models import flatten_params
from jgia.models.convolutions import fast_convolutions
from jgia.observation import Observation
from jgia.replay import simulated_update

PyTree = Any


class Loaded:
    """A problem, an observation of one image, and where the search starts."""

    def __init__(self, command: dict[str, Any]) -> None:
        dtype = command.get("dtype", "float32")
        problem = cases.make_problem(command["prior"], command["victim"], None, command["data"])
        # Random weights have no noise strength and no biases: without these, parts go untested.
        perturbed = _cast(_perturbed(problem.prior.params), dtype)
        prior = dataclasses.replace(problem.prior, params=perturbed)
        self.problem = dataclasses.replace(
            problem, prior=prior, params=_cast(problem.params, dtype)
        )
        self.observation = self.observe(0)
        side = prior.generator.draw(prior.params, jax.random.key(3), 1)
        self.side = jax.tree.map(lambda leaf: leaf.astype(dtype), side)
        if command.get("path"):
            self.export(Path(command["path"]), command["steps"])

    def observe(self, index: int) -> Observation:
        """What client ``index`` shared, with its label, which both sides are given."""
        images, labels = self.problem.client(None, 1, index)
        seen = self.problem.observe(images, labels, "none")
        told = tuple(int(label) for label in labels)
        threat = dataclasses.replace(seen.threat_model, labels=told)
        return dataclasses.replace(seen, threat_model=threat)

    def settings(self, steps: int, restarts: int = 1) -> Settings:
        """So many steps for every stage."""
        options = GifdOptions(gifd_steps=steps, gifd_restarts=restarts)
        return settings(options, generator=self.problem.prior.generator)

    def export(self, path: Path, steps: int) -> None:
        """Weights, update, start and settings for the peer, in this library's axes."""
        chosen, generator = self.settings(steps), self.problem.prior.generator
        arrays: dict[str, Any] = {}
        trees = {
            "generator": self.problem.prior.params,
            "victim": self.observation.params,
            "update": self.observation.update,
        }
        for part, tree in trees.items():
            arrays |= {f"{part}/{n}": np.asarray(leaf) for n, leaf in flatten_params(tree).items()}
        arrays |= {f"noise/{name}": np.asarray(v) for name, v in self.side["noise"].items()}
        arrays["styles"] = np.asarray(self.side["styles"])
        parts = np.arange(steps) / steps
        normalization = self.problem.victim.normalization
        about = {
            "blocks": generator.num_blocks,
            "labels": self.observation.threat_model.labels,
            "mean": normalization.mean,
            "std": normalization.std,
            "radii": [chosen.radii_of(k) for k in range(chosen.last_stage + 1)],
            "rates": rates(parts, chosen.learning_rate).astype(np.float32).tolist(),
            "total_variation": chosen.total_variation,
            "image_l2": chosen.image_l2,
            "noise_up_to": [16 << k for k in range(chosen.last_stage + 1)],
        }
        np.savez(path, **arrays, about=json.dumps(about))


def search(loaded: Loaded, command: dict[str, Any]) -> dict[str, Any]:
    """One call of the attack, timed whole; or of many clients together."""
    steps, restarts = command["steps"], command.get("restarts", 1)
    chosen = loaded.settings(steps, restarts)
    performance = PerformanceFlags(microbatch=command.get("microbatch"))
    clients = command.get("clients", 0)
    observations = [loaded.observe(i) for i in range(clients)]
    start = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], restarts, axis=0), loaded.side)
    key, prior = jax.random.key(cases.KEY), loaded.problem.prior
    cpu, begin = time.process_time(), time.perf_counter()
    if clients:
        attack_clients(key, observations, prior, options=chosen, performance=performance)
        found = None
    else:
        found = attack(
            key,
            loaded.observation,
            prior,
            options=chosen,
            performance=performance,
            run_options=RunOptions(report_every=steps),
            start_side=start,
        )
    reply: dict[str, Any] = {"seconds": time.perf_counter() - begin}
    reply["cpu_s"] = time.process_time() - cpu
    if found is not None and command.get("losses"):
        curves = found.stats["stage_curves"]
        reply["losses"] = [value for curve in curves for value in curve["losses"][0]]
    return reply


def rule(loaded: Loaded, command: dict[str, Any]) -> dict[str, Any]:
    """The distance and its derivative in the image: as jgia has it, and reverse over reverse."""
    labels = np.asarray(loaded.observation.threat_model.labels, np.int32)
    matching = make_matching(loaded.observation, labels)
    images, _ = loaded.problem.client(None, 1, 1)
    inputs = jnp.asarray(loaded.problem.victim.normalization.normalize(images))

    def plain(inputs: jax.Array) -> jax.Array:
        with fast_convolutions(vmapped=False):
            update = simulated_update(
                matching.victim, matching.params, inputs, matching.labels, matching.threat_model
            )
        return distance("cosine", update, matching.update, target_square=matching.target_square)

    ours = lambda inputs: matching_distance(matching, inputs)  # noqa: E731
    chosen = {"jvp": ours, "reverse": plain}[command["which"]]
    compiled = jax.jit(jax.value_and_grad(chosen)).lower(inputs).compile()
    value, slope = jax.block_until_ready(compiled(inputs))
    cpu, begin = time.process_time(), time.perf_counter()
    for _ in range(command["calls"]):
        jax.block_until_ready(compiled(inputs))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    memory = compiled.memory_analysis()
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "value": float(value),
        "slope_norm": float(jnp.sqrt(jnp.vdot(slope, slope))),
        "temporary_mb": getattr(memory, "temp_size_in_bytes", 0) / 2**20,
    }


def _perturbed(params: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    moved = [np.asarray(x) + 0.1 * rng.standard_normal(np.shape(x)) for x in leaves]
    return jax.tree.unflatten(structure, [x.astype(np.float32) for x in moved])


def _cast(tree: PyTree, dtype: str) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def main() -> None:
    """Serve commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded: Loaded | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                loaded = Loaded(command)
                stages = loaded.settings(1).last_stage + 1
                reply: dict[str, Any] = {"stages": stages}
            elif loaded is None:
                raise ValueError("nothing is loaded.")
            else:
                reply = {"search": search, "rule": rule}[command["do"]](loaded, command)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            reply["peak_mb"] = peak
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            reply = {"failed": text.splitlines()[0][:300]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
