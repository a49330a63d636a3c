"""Run what documents show, in the current folder: their ``jgia`` lines and Python blocks.

Usage: ``python documented_commands.py README.md docs/index.md ...`` in an empty folder. The files
that the commands name are made from the bundled sample; crafted parameters, by the command that
README.md shows. What needs the network, or a package that is not installed, is left out and named.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import jgia
from jgia.federated import load_params, save_update

CRAFT = "jgia craft --layout torch"
CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:import|from)\s+(\w+)", re.MULTILINE)


def make_inputs() -> None:
    """Write images.npz, private.npz and the folder photos/."""
    sample = jgia.load_dataset("sample")
    np.savez("images.npz", x=sample.images, y=sample.labels)
    private = sample.subset(np.flatnonzero(~np.asarray(sample.public))[:16])
    np.savez("private.npz", x=private.images, y=private.labels)
    for i, (image, label) in enumerate(zip(sample.images, sample.labels, strict=True)):
        folder = Path("photos", sample.class_names[label])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")


def make_update(crafted: Path) -> None:
    """Write update.npz: what a client elsewhere would send back for the crafted parameters."""
    about = json.loads((crafted / "victim.json").read_text("utf-8"))
    victim = jgia.make_victim(
        about["model"],
        input_shape=tuple(about["input_shape"]),
        num_classes=about["num_classes"],
        normalization=jgia.Normalization(*map(tuple, about["normalization"].values())),
        fc_width=about["fc_width"],
    )
    layout = about["layout"]
    params = load_params(crafted / about["params"], victim, layout=layout)
    with np.load("private.npz", allow_pickle=False) as private:
        images, labels = private["x"].astype(np.float32) / 255, private["y"]
    seen = jgia.client_update(jax.random.key(0), victim, params, images, labels)
    save_update("update.npz", seen.update, layout=layout, victim=victim)


def run(command: list[str]) -> None:
    """Run a command and time it; stop at the first that fails."""
    print(f"$ {' '.join(shlex.join(command).split())[:100]}", flush=True)
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"  {time.perf_counter() - begin:.1f} s", flush=True)


def main(documents: list[str]) -> None:
    """Run every document's commands in the order in which they stand; once each."""
    make_inputs()
    done: set[str] = set()
    for document in documents:
        for language, code in CODE.findall(Path(document).read_text("utf-8")):
            commands = [line for line in code.splitlines() if line.startswith("jgia ")]
            commands = [code] if language == "python" else commands if language == "sh" else []
            for command in commands:
                if command in done:
                    continue
                done.add(command)
                needs = [n for n in IMPORT.findall(command) if not importlib.util.find_spec(n)]
                if language == "python" and needs:
                    print(f"left out of {document}: Python that needs {', '.join(needs)}")
                elif language == "python":
                    run([sys.executable, "-c", command])
                elif "--download" in command:
                    print(f"left out of {document}, needs the network: {command}")
                else:
                    crafted = command.startswith(("jgia attack", "jgia inspect"))
                    if crafted and CRAFT not in done:
                        done.add(CRAFT)
                        run(shlex.split(CRAFT))
                    if command.startswith("jgia attack") and not Path("update.npz").exists():
                        make_update(Path("jgia-crafted"))
                    run(shlex.split(command))


if __name__ == "__main__":
    main(sys.argv[1:])
