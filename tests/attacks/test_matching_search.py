"""The search loop: its optimizers by hand, its guard, its drivers, its memory."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jgia.attacks.gradient_matching import Settings, Variables, loss, make_problem, run, search
from jgia.attacks.gradient_matching.drive import resolve_driver
from jgia.attacks.gradient_matching.optimizers import direction, scale_by_adam, schedule
from jgia.federated import client_update
from jgia.models import make_victim
from jgia.normalization import Normalization

VICTIM = make_victim(
    "lenet",
    input_shape=(6, 6, 1),
    num_classes=3,
    widths=(3,),
    normalization=Normalization((0.4,), (0.2,)),
)
IMAGES = np.random.default_rng(0).uniform(size=(2, 6, 6, 1))
LABELS = np.array([0, 2])


def _observe():
    params = jax.tree.map(lambda leaf: 4 * leaf.astype("float64"), VICTIM.init(jax.random.key(0)))
    return client_update(jax.random.key(1), VICTIM, params, IMAGES, LABELS)


OBSERVATION = _observe()


def _problem(**fields):
    return make_problem(OBSERVATION, jnp.asarray(LABELS), Settings(**{"num_steps": 20, **fields}))


def _states(problem, restarts):
    keys = jax.random.split(jax.random.key(5), restarts)
    return jax.vmap(search.init, in_axes=(0, None))(keys, problem)


@pytest.mark.slow
def test_the_true_images_have_no_loss():
    problem = _problem(distance="l2", box=False)
    inputs = VICTIM.normalization.normalize(jnp.asarray(IMAGES))
    value, fit = loss(problem, Variables(inputs, None), inputs)
    assert float(value) == float(fit) == pytest.approx(0, abs=1e-25)
    other, _ = loss(problem, Variables(inputs + 0.1, None), inputs)
    assert float(other) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_the_loss_has_derivatives(joint):
    problem = _problem(
        total_variation=0.1, tv_form="l2", image_l2=0.1, labels="joint" if joint else "auto"
    )
    start = search.init(jax.random.key(1), problem).variables
    assert (start.label_logits is not None) == joint
    check_grads(
        lambda v: loss(problem, jax.tree.map(jnp.asarray, v), start.inputs)[0],
        (start,),
        order=1,
        modes=["rev"],
        rtol=1e-3,
    )


@pytest.mark.slow
def test_signed_adam_by_hand():
    problem = _problem(optimizer="signed_adam", schedule="step", num_steps=3, learning_rate=0.05)
    state = search.init(jax.random.key(1), problem)
    x, m, v = np.asarray(state.variables.inputs), 0.0, 0.0
    # n // 2.667, n // 1.6, n // 1.142 of 3 steps are 1, 1 and 2: the rate falls after 1 and 2.
    rates = [0.05, 0.005, 0.0005]
    low, high = (
        np.asarray(VICTIM.normalization.normalize(jnp.full((1, 1, 1, 1), p))) for p in (0.0, 1.0)
    )
    for t, rate in enumerate(rates, start=1):
        gradient = jax.grad(lambda x: loss(problem, Variables(x, None), x)[0])(jnp.asarray(x))
        g = np.sign(np.asarray(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = np.clip(x, low, high)
        state, _ = search.step(state, problem)
        np.testing.assert_allclose(state.variables.inputs, x, rtol=1e-9)


def test_schedules():
    kinds = ("constant", "step", "cosine", "warmup_cosine")
    with jax.numpy_dtype_promotion("standard"):
        values = {k: np.array([schedule(k, 0.2, 100)(t) for t in range(101)]) for k in kinds}
    assert np.all(values["constant"] == 0.2)
    np.testing.assert_allclose(
        values["step"][[0, 36, 37, 61, 62, 86, 87]],
        [0.2, 0.2, 0.02, 0.02, 0.002, 0.002, 0.0002],
        rtol=1e-6,
    )
    assert values["cosine"][0] == pytest.approx(0.2)
    assert values["cosine"][100] == pytest.approx(0, abs=1e-8)
    assert values["warmup_cosine"][0] == pytest.approx(0.02)
    assert values["warmup_cosine"].argmax() == 10


def _adam_steps(optimizer, dtype):
    """Steps for gradients that are scaled differently every time; float64 at the end."""
    rng = np.random.default_rng(0)
    state = optimizer.init(jnp.zeros(50, dtype))
    steps = []
    for scale in (1.0, 3.0, 0.1, 2.0, 0.5):
        gradient = jnp.asarray(scale * rng.standard_normal(50), dtype)
        with jax.numpy_dtype_promotion("standard"):
            step, state = optimizer.update(gradient, state)
        steps.append(np.asarray(step, np.float64))
    return np.stack(steps)


def test_adam_is_optax_in_float64_and_keeps_float32s_digits():
    exact = _adam_steps(optax.scale_by_adam(), "float64")
    np.testing.assert_allclose(_adam_steps(scale_by_adam(), "float64"), exact, rtol=1e-12)
    with jax.enable_x64(False):
        assert np.abs(_adam_steps(scale_by_adam(), "float32") - exact).max() < 1e-6
        assert np.abs(_adam_steps(optax.scale_by_adam(), "float32") - exact).max() > 1e-5


@pytest.mark.slow
def test_lbfgs_minimizes_a_quadratic_faster_than_gradient_descent():
    scales = jnp.array([1.0, 0.3, 0.02])
    optimizer = direction("lbfgs")
    x: Any = jnp.ones(3)
    state = optimizer.init(x)
    for _ in range(25):
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(scales * x, state, x)
        x = optax.apply_updates(x, jax.tree.map(jnp.negative, change))
    assert float(jnp.abs(x).max()) < 1e-6
    assert (1 - 0.02) ** 25 > 0.5  # what the stiff direction leaves to gradient descent


@pytest.mark.slow
def test_drivers_and_groups_agree():
    problem = _problem(restarts=3)
    whole = [_states(problem, 3)]
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1] + 0, whole[0]) for i in range(3)]
    losses = []

    def keep(event):
        losses.append(event.losses)
        return False

    args = {"num_steps": 20, "stretch": 8, "on_event": keep}
    copies = [jax.tree.map(jnp.copy, state) for state in whole]
    one = run([problem], copies, driver="python", **args)
    two = run([problem], whole, driver="scan", **args)
    three = run([problem] * 3, parts, driver="python", **args)
    merged = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *three)
    for other in (two[0], merged):
        chex.assert_trees_all_close(one[0], other, rtol=1e-6, atol=1e-9)
    assert [part.shape for part in losses[:3]] == [(3, 8), (3, 8), (3, 4)]
    np.testing.assert_allclose(
        np.concatenate(losses[:3], axis=1), np.concatenate(losses[6:], axis=1), rtol=1e-6
    )


def test_the_best_point_is_kept():
    problem = _problem(learning_rate=5.0, box=False, num_steps=15)
    state = search.init(jax.random.key(2), problem)
    step, seen = jax.jit(search.step), []
    for _ in range(15):
        before = state.variables
        state, info = step(state, problem)
        seen.append((float(info.loss), before))
    smallest = min(range(15), key=lambda i: seen[i][0])
    assert float(state.best_loss) == seen[smallest][0]
    chex.assert_trees_all_equal(state.best, seen[smallest][1])
    assert smallest < 14  # such large steps make it worse in the end


def test_a_step_out_of_the_finite_numbers_is_undone():
    problem = _problem(distance="l2", box=False)
    state = search.init(jax.random.key(2), problem)
    good, _ = search.step(state, problem)
    broken = good._replace(variables=jax.tree.map(lambda leaf: leaf * jnp.nan, good.variables))
    after, info = search.step(broken, problem)
    assert np.isnan(info.loss)
    chex.assert_trees_all_equal(after.variables, good.best)
    assert float(after.rate) == 0.5
    assert int(after.num_nonfinite) == 1
    again, info = search.step(after, problem)
    assert np.isfinite(info.loss)
    assert int(again.num_nonfinite) == 1


def test_the_box_holds():
    problem = _problem(learning_rate=10.0)
    state, _ = search.step(search.init(jax.random.key(2), problem), problem)
    images = VICTIM.normalization.denormalize(state.variables.inputs)
    assert float(images.min()) == pytest.approx(0, abs=1e-12)
    assert float(images.max()) == pytest.approx(1)
    free = dataclasses.replace(problem, settings=dataclasses.replace(problem.settings, box=False))
    state, _ = search.step(search.init(jax.random.key(2), free), free)
    assert float(VICTIM.normalization.denormalize(state.variables.inputs).max()) > 1.5


@pytest.mark.slow
def test_the_group_prior_pulls_restarts_together():
    fields = {"restarts": 3, "optimizer": "adam", "num_steps": 220, "learning_rate": 0.05}
    spread = []
    for weight in (0.0, 100.0):
        problem = _problem(group_prior=weight, **fields)
        done = run([problem], [_states(problem, 3)], num_steps=220, stretch=110, driver="scan")
        inputs = np.asarray(done[0].variables.inputs)
        spread.append(inputs.std(axis=0).mean())
    assert spread[1] < spread[0] / 3


def test_starts_differ_by_key_alone():
    problem = _problem()
    first, again = (search.init(jax.random.key(4), problem) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    other = search.init(jax.random.key(5), problem)
    assert not np.array_equal(first.variables.inputs, other.variables.inputs)
    gray = search.init(jax.random.key(4), _problem(start="gray"))
    assert not np.any(gray.variables.inputs)
    uniform = search.init(jax.random.key(4), _problem(start="uniform")).variables.inputs
    assert -1 <= float(uniform.min()) < float(uniform.max()) <= 1


def test_layer_weights_follow_the_depth_of_the_layers():
    problem = _problem(layer_weights="exponential", distance="layer_cosine")
    inputs = VICTIM.normalization.normalize(jnp.asarray(IMAGES))
    assert float(loss(problem, Variables(inputs, None), inputs)[0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "expected"), [(6, "scan"), (128, "python")])
def test_driver_is_python_on_cpu_only_where_xla_convolves(side, expected):
    victim = make_victim("lenet", input_shape=(side, side, 1), num_classes=3, widths=(2,))
    params = victim.init(jax.random.key(0))
    images = np.full((1, side, side, 1), 0.5)
    observation = client_update(jax.random.key(1), victim, params, images, np.array([1]))
    problem = make_problem(observation, np.array([1]), Settings(num_steps=2))
    state = jax.vmap(search.init, in_axes=(0, None))(
        jax.random.split(jax.random.key(2), 1), problem
    )
    assert resolve_driver("auto", problem, state) == expected
    assert resolve_driver("scan", problem, state) == "scan"
