"""GIFD against latent codes alone, GIAS, GGL and pixels: fidelity, ablations, defenses, speed.

    python benchmarks/gifd.py --prior FOLDER --data npz:PATH --out FOLDER --sections ladder
    python benchmarks/gifd.py --peer-python PYTHON --out FOLDER --sections speed
    python benchmarks/gifd.py --smoke

Clients hold images that the prior was not trained on; the server knows neither labels nor defense.
Every restart is scored; the one that counts is the one of the smallest gradient distance. A section
of fidelity writes ``gifd_SECTION_TAG.json`` into ``--out`` after every search, and a second run of
the same command goes on from there. Seconds are without compilation.

``--peer-python`` is an interpreter with PyTorch, for the section ``speed`` (``gifd_speed.json``).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gifd_sections
import harness
import jax
import numpy as np
from gifd_cases import KEY, Problem, data_name, make_problem
from gifd_figures import draw
from gifd_search import Compilation
from gifd_speed import device, speed

from jgia.models import Victim
from jgia.training import load_victim

Section = Callable[["Setup"], dict[str, Any]]

FIDELITY: dict[str, Section] = {
    "ladder": gifd_sections.ladder,
    "ablation": gifd_sections.ablation,
    "batch": gifd_sections.batch,
    "ood": gifd_sections.ood,
    "defenses": gifd_sections.defenses,
    "mapping": gifd_sections.mapping,
}
SPEED: dict[str, Section] = {"speed": speed, "device": device}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What the command line says."""

    prior: str
    conditional_prior: str | None
    classifier_folder: Path | None
    victim: str
    trained: str | None
    data: str
    data_dir: Path | None
    victims: int
    restarts: int
    steps: int
    equal_time: bool
    long: int
    long_gifd: int
    long_victims: int
    only: tuple[str, ...]
    microbatch: int | None
    lpips: bool
    peer: str | None
    repeats: int
    smoke: bool
    tag: str
    out: Path | None
    folder: Path
    compilation: Compilation

    def problem(self, *, conditional: bool = False) -> Problem:
        """The prior, the victim and where clients come from."""
        spec = self.conditional_prior if conditional else self.prior
        assert spec is not None
        return _problem(spec, self.victim, self.trained, self.data)

    @property
    def classifier(self) -> tuple[Victim, Any] | None:
        """Of the conditional prior's classes."""
        if self.smoke:
            problem = self.problem(conditional=True)
            return problem.victim, problem.params
        return None if self.classifier_folder is None else load_victim(self.classifier_folder)

    def wants(self, method: str) -> bool:
        """Whether a method was asked for."""
        return not self.only or method in self.only

    def path(self, section: str) -> Path | None:
        """Where a section of fidelity keeps its rows."""
        return None if self.out is None else self.out / f"gifd_{section}_{self.tag}.json"

    def plan(self, problem: Problem) -> dict[str, Any]:
        """What all rows of a file have in common."""
        prior, victim = problem.prior, problem.victim
        return {
            "prior": prior.name,
            "prior_digest": _digest(prior.params),
            "generator": dataclasses.asdict(prior.generator),  # pyright: ignore[reportArgumentType]
            "victim": victim.name,
            "victim_parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
            "victim_digest": _digest(problem.params),
            "trained": self.trained is not None,
            "data": data_name(self.data),
            "restarts": self.restarts,
            "key": KEY,
            "smoke": self.smoke,
        }


@functools.cache
def _problem(prior: str, victim: str, trained: str | None, data: str) -> Problem:
    return make_problem(prior, victim, trained, data)


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny sizes: shows that it runs")
    add("--sections", nargs="*", choices=[*FIDELITY, *SPEED], help="all but device when left out")
    add("--device", action="store_true", help="only the section for a GPU")
    add("--out", type=Path, help="folder for JSON files and figures")
    add("--tag", help="end of the files' names; from prior, victim and data when left out")
    add("--prior", default="untrained", help="bundled name or folder; untrained for random weights")
    add("--data", default="faces", help="clients' images, as for jgia: npz:PATH")
    add("--data-dir", type=Path, help="folder of the images out of distribution")
    add("--victim", choices=("small", "resnet18"), default="small")
    add("--trained", help="folder of jgia train-victim, instead of --victim")
    add("--victims", type=int, default=32, help="clients that are attacked")
    add("--restarts", type=int, default=4)
    add("--steps", type=int, default=300, help="of each restart, all stages together")
    add("--no-equal-time", action="store_true", help="ladder: only equal iterations")
    add("--long", type=int, default=0, metavar="STEPS", help="ladder: also IG with so many steps")
    add("--long-gifd", type=int, default=4000, metavar="STEPS", help="GIFD and GIAS beside that")
    add("--long-victims", type=int, default=8, metavar="N", help="clients with long budgets")
    add("--methods", nargs="*", default=[], help="only those of these names")
    add("--microbatch", type=int, help="restarts advanced at once; what jgia does when left out")
    add("--lpips", action="store_true", help="also LPIPS (needs the extra)")
    add("--conditional-prior", help="mapping: a prior of classes")
    add("--classifier", type=Path, help="mapping: folder of a classifier of its classes")
    add("--peer-python", help="speed: interpreter that has PyTorch")
    add("--repeats", type=int, default=5, help="speed: timed calls of each contender")
    return parser.parse_args()


def _setup(given: argparse.Namespace, folder: Path) -> Setup:
    smoke = given.smoke
    prior = "untrained8" if smoke else given.prior
    tag = given.tag or "_".join(
        (
            Path(prior).name,
            given.victim if given.trained is None else f"trained-{Path(given.trained).name}",
            data_name(given.data).partition(":")[2].removesuffix(".npz") or given.data,
        )
    )
    return Setup(
        prior=prior,
        conditional_prior="untrained8c" if smoke else given.conditional_prior,
        classifier_folder=given.classifier,
        victim="tiny" if smoke else given.victim,
        trained=given.trained,
        data="sample" if smoke else given.data,
        data_dir=given.data_dir,
        victims=2 if smoke else given.victims,
        restarts=1 if smoke else given.restarts,
        steps=4 if smoke else given.steps,
        equal_time=not (smoke or given.no_equal_time),
        long=0 if smoke else given.long,
        long_gifd=given.long_gifd,
        long_victims=given.long_victims,
        only=tuple(given.methods),
        microbatch=given.microbatch,
        lpips=given.lpips and not smoke,
        peer=given.peer_python,
        repeats=1 if smoke else given.repeats,
        smoke=smoke,
        tag="smoke" if smoke else tag,
        out=given.out,
        folder=folder,
        compilation=Compilation(),
    )


def main() -> None:
    """Run the sections and write one file for each."""
    given = _arguments()
    chosen = given.sections or [
        name
        for name in (*FIDELITY, *SPEED)
        if given.smoke
        or (name != "device" and (name != "mapping" or given.conditional_prior is not None))
    ]
    chosen = ["device"] if given.device else chosen
    if "mapping" in chosen and given.conditional_prior is None and not given.smoke:
        raise SystemExit("the section mapping needs --conditional-prior.")
    with tempfile.TemporaryDirectory() as folder:
        setup = _setup(given, Path(folder))
        for name in chosen:
            print(f"# {name}", flush=True)
            before, begin = harness.machine(), time.perf_counter()
            content = (FIDELITY | SPEED)[name](setup)
            content |= {
                "machine": before,
                "load_average_after": round(os.getloadavg()[0], 2),
                "seconds_in_all": time.perf_counter() - begin,
            }
            if setup.out is None:
                continue
            if name in SPEED:
                harness.write_json(setup.out / f"gifd_{name}.json", content)
            elif (path := setup.path(name)) is not None:
                gifd_sections.write(path, content)
                print(f"wrote {path}")
    if given.out is not None and not given.smoke:
        draw(given.out)


if __name__ == "__main__":
    main()
