"""Presets hold the paper's numbers, and options replace them one by one."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jgia.attacks.gifd.settings import Settings, rates, settings
from jgia.config.commands import AttackConfig, AuditConfig
from jgia.config.fields import flat_fields
from jgia.config.gifd import GifdOptions


def _load(name) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny = _load("tiny_generator")


def _settings(options=None, resolution=32, num_blocks=4):
    generator = tiny.TinyGenerator(resolution=resolution, num_blocks=num_blocks)
    return settings(options, generator=generator)


def test_the_papers_presets():
    faces = settings(GifdOptions(preset="paper_stylegan2_ffhq"))
    assert faces.last_stage == 4
    assert (faces.num_steps, faces.restarts, faces.learning_rate) == (1000, 4, 0.1)
    assert [faces.radii_of(k)[0] for k in range(1, 5)] == [2000, 3000, 4000, 5000]
    assert [faces.radii_of(k)[1] for k in range(5)] == [1000, 2000, 3000, 4000, 5000]
    assert [faces.radii_of(k)[2] for k in range(5)] == [1000, 2000, 3000, 4000, 5000]
    objects = settings(GifdOptions(preset="paper_biggan_imagenet"))
    assert objects.last_stage == 9
    assert [objects.radii_of(k)[0] for k in range(1, 10)] == [2000 + 500 * k for k in range(9)]
    assert objects.radii_of(0)[1] == math.inf
    for preset in (faces, objects, settings()):
        assert (preset.distance, preset.total_variation, preset.image_l2) == ("cosine", 1e-4, 1e-6)
        assert preset.skip == "carry"


@pytest.mark.parametrize(("resolution", "blocks", "last"), [(32, 4, 3), (64, 5, 4), (8, 2, 1)])
def test_native_stages_follow_the_generator(resolution, blocks, last):
    found = _settings(None, resolution, blocks)
    assert found.last_stage == last
    assert found.radii_of(1)[0] == 0.07
    assert found.radii_of(last)[0] == (0.07, 0.03, 0.01, 0.01)[last - 1]


def test_options_replace_single_settings():
    found = _settings(GifdOptions(gifd_steps=7, gifd_tv=0.0, l1_scale=2.0, last_stage=1))
    assert (found.num_steps, found.total_variation, found.last_stage) == (7, 0.0, 1)
    assert found.radii_of(1)[0] == pytest.approx(0.14)
    assert _settings(GifdOptions(radius_mode="none")).radii_of(2) == (math.inf,) * 3
    other = GifdOptions(radius_mode="relative", radii=(0.5,), side_radii=(0.2,))
    assert _settings(other).radii_of(3) == (0.5, 0.2, math.inf)


def test_a_budget_of_steps_is_shared_out():
    for budget, last in itertools.product((4, 9, 100), (0, 2, 3)):
        found = Settings(last_stage=last, budget_steps=budget)
        steps = [found.steps_of(k) for k in range(last + 1)]
        assert sum(steps) == budget
        assert max(steps) - min(steps) <= 1


def test_learning_rates_are_those_of_the_paper():
    total = 200
    found = rates(np.arange(total) / total, 0.1)
    t = np.arange(total) / total
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.minimum(1, (1 - t) / 0.75))
    np.testing.assert_allclose(found, 0.1 * ramp * np.minimum(1, t / 0.05))
    assert found[0] == 0
    assert found.max() == pytest.approx(0.1)
    assert np.all(found[10:50] == found.max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radii": (0.1, 0.0)}, "radii must be positive"),
        ({"side_radii": (-1.0,)}, "side_radii must be positive"),
        ({"noise_radii": (math.nan,)}, "noise_radii must be positive"),
        ({"l1_scale": 0.0}, "l1_scale must be positive"),
        ({"gifd_steps": 0}, "gifd_steps must be at least 1"),
        ({"gifd_restarts": 0}, "gifd_restarts must be at least 1"),
        ({"gifd_rate": -0.1}, "gifd_rate must be positive"),
        ({"budget_seconds": 0.0}, "budget_seconds must be positive"),
        ({"last_stage": -1}, "last_stage must be at least 0"),
        ({"last_stage": 4}, "the largest is 3"),
        ({"preset": "paper_biggan_imagenet"}, "last_stage=9"),
        ({"radius_mode": "absolute"}, "needs radii and side_radii"),
        ({"budget_steps": 3}, "leave no step"),
    ],
)
def test_wrong_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _settings(GifdOptions(**fields))


def test_names_share_a_command_line():
    own = set(vars(GifdOptions()))
    for command in (AuditConfig, AttackConfig):
        others = {name for name, (path, _) in flat_fields(command).items() if path[0] != "gifd"}
        assert not own & others
