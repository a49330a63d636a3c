"""Commands that run in this process, a report that must not change, and crafted parameters."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jgia import cli
from jgia.attacks import ares
from jgia.data import load_dataset, split_client_public
from jgia.exchange import _read_description, _victim
from jgia.federated import client_update, load_params, save_update

_CRAFT = ["--fc-width", "64", "--front-end-trials", "2"]
_SMALL = ["audit", *_CRAFT, "--microbatch", "4", "--batch", "4"]


@pytest.fixture
def run(capsys):
    """Run one command: exit code, standard output and standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(str(stop.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def audit(run):
    """A small audit into a folder, with further options."""
    return lambda out, *arguments: run(*_SMALL, "--out", out, *arguments)


@pytest.fixture
def attack(run):
    """An attack on an update file, with further options."""

    def command(crafted: Path, update: Path, out: Path, *arguments: object):
        files = ["--crafted", crafted, "--update", update, "--out", out]
        return run("attack", *files, "--microbatch", 4, *arguments)

    return command


@pytest.fixture(scope="session")
def contents():
    """The bytes of every file in a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return read


@pytest.fixture(scope="session")
def check_refused():
    """Exit code 2, nothing on standard output, one clear line on standard error."""

    def check(code: int, out: str, err: str, message: str) -> None:
        assert code == 2
        assert out == ""
        assert re.search(message, err), err
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("error: ")

    return check


@pytest.fixture(scope="session")
def reported(tmp_path_factory) -> Path:
    """A folder with a report."""
    folder = tmp_path_factory.mktemp("report")
    assert cli.main([*_SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def report(reported, tmp_path, contents):
    """A copy of the report, which must be the same after the test."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    for name, content in contents(reported).items():
        (folder / name).write_bytes(content)
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.fixture(scope="session")
def exchange(tmp_path_factory) -> Path:
    """Crafted parameters and the update of a client on them."""
    folder = tmp_path_factory.mktemp("exchange")
    assert cli.main(["craft", *_CRAFT, "--out", str(folder)]) == 0
    victim = _victim(_read_description(folder / "victim.json"))
    params = load_params(folder / "params.npz", victim)
    assert ares.read_plan(victim, params).num_bins == 64
    client, _ = split_client_public(load_dataset("sample"), seed=0, num_client=4, num_public=16)
    images, labels = client.take(np.arange(4))
    observation = client_update(jax.random.key(0), victim, params, images, labels)
    save_update(folder / "update.npz", observation.update)
    np.savez(folder / "truth.npz", x=images, y=labels)
    return folder
