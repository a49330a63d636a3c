import dataclasses
import json

import jax
import numpy as np
import pytest

from jgia.generators.prior import Prior, PriorError, bundled_priors, load_prior, save_prior
from jgia.generators.stylegan2 import StyleGAN2
from jgia.models import flatten_params

TINY = StyleGAN2(resolution=8, base=64, max_features=8, latent_dim=4, style_dim=4)


@pytest.fixture(scope="module")
def prior() -> Prior:
    with jax.enable_x64(False):
        params = jax.device_get(TINY.init(jax.random.key(0)))
    return Prior(name="tiny", generator=TINY, params=params, record={"license": "CC0-1.0"})


@pytest.fixture
def folder(prior, tmp_path):
    save_prior(tmp_path, prior)
    return tmp_path


def test_what_is_written_is_read_back(prior, folder):
    found = load_prior(folder)
    assert (found.name, found.generator) == ("tiny", TINY)
    assert found.record["license"] == "CC0-1.0"
    jax.tree.map(np.testing.assert_array_equal, found.params, prior.params)
    assert load_prior(folder / "prior.json").generator == TINY
    assert load_prior(folder / "prior.safetensors").generator == TINY


def test_a_truncated_or_changed_file_is_refused(folder):
    path = folder / "prior.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-4], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(PriorError, match="SHA-256 differs"):
            load_prior(folder)
    path.unlink()
    with pytest.raises(PriorError, match="cannot read"):
        load_prior(folder)


def test_parameters_of_another_generator_are_refused(prior, folder):
    wider = dataclasses.replace(TINY, max_features=6)
    with pytest.raises(ValueError, match="must have shape"):
        save_prior(folder, dataclasses.replace(prior, generator=wider))
    description = json.loads((folder / "prior.json").read_text())
    description["generator"]["max_features"] = 6
    (folder / "prior.json").write_text(json.dumps(description))
    with pytest.raises(PriorError, match="must have shape"):
        load_prior(folder)


def test_numbers_that_are_not_finite_are_refused(prior, tmp_path):
    params = jax.tree.map(np.copy, prior.params)
    params["styles"]["mean"][0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        save_prior(tmp_path, dataclasses.replace(prior, params=params))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "biggest"}, "unknown kind"),
        ({"depth": 3}, "unknown options"),
        ({"resolution": 12}, "power of two"),
        ({"resolution": 1 << 40}, "must be an integer"),
        ({"style_dim": -1}, "must be an integer"),
        ({"latent_dim": "4"}, "must be an integer"),
        ({"dtype": "float16"}, "dtype must be one of"),
    ],
)
def test_a_damaged_description_is_refused(folder, change, says):
    description = json.loads((folder / "prior.json").read_text())
    description["generator"] |= change
    (folder / "prior.json").write_text(json.dumps(description))
    with pytest.raises(PriorError, match=says):
        load_prior(folder)


def test_other_files_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(PriorError, match="save_prior"):
        load_prior(tmp_path / "network.pkl")
    with pytest.raises(PriorError, match="faces32"):
        load_prior("no such prior")
    (tmp_path / "prior.json").write_text("{")
    with pytest.raises(PriorError, match="not valid JSON"):
        load_prior(tmp_path)
    (tmp_path / "prior.json").write_text("{}")
    with pytest.raises(PriorError, match="jgia-prior-1"):
        load_prior(tmp_path)


def test_bundled_priors_say_where_they_come_from():
    assert "faces32" in bundled_priors()
    for name in bundled_priors():
        found = load_prior(name)
        assert found.name == name
        assert {"license", "data", "metrics", "training"} <= set(found.record)
        leaves = flatten_params(found.params).values()
        assert 4 * sum(leaf.size for leaf in leaves) < 3 << 20
