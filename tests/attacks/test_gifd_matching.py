"""The rule of gradient matching against reverse over reverse, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks import gifd
from jgia.attacks import gradient_matching as general
from jgia.attacks.gifd.matching import stack, vmapped
from jgia.models import Victim, make_victim
from jgia.normalization import Normalization
from jgia.observation import Observation, ThreatModel
from jgia.replay import simulated_update

BATCH = 2
LABELS, OTHERS = np.array([0, 3]), np.array([1, 2])


@functools.cache
def _victim(name) -> Victim:
    common = {"input_shape": (6, 6, 3), "num_classes": 4}
    if name == "resnet":
        return make_victim("resnet", **common, widths=(3,), strides=(2,), norm="batch", head="pool")
    if name == "mlp":
        return make_victim("mlp", **common, widths=(5,))
    return make_victim(
        "lenet", **common, widths=(4,), normalization=Normalization((0.5,) * 3, (0.25,) * 3)
    )


def _wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


@functools.cache
def _observation(name, **threat) -> Observation:
    victim = _victim(name)
    params = _wide(jax.jit(victim.init)(jax.random.key(0)))
    model = ThreatModel(server="honest_but_curious", num_examples=BATCH, **threat)
    update = _update(victim, params, _inputs(7), jnp.asarray(LABELS), model)
    return Observation(update=update, params=params, victim=victim, threat_model=model)


def _inputs(seed):
    return jax.random.normal(jax.random.key(seed), (BATCH, 6, 6, 3), jnp.float64)


_update = jax.jit(simulated_update, static_argnums=(0, 4))


def _masks(observation):
    rng = np.random.default_rng(3)
    flat = {"head/kernel": observation.update["head"]["kernel"]}
    masks = {n: jnp.asarray(rng.random(leaf.shape) < 0.5, jnp.float64) for n, leaf in flat.items()}
    return gifd.Transform(masks, jnp.asarray(0.7, jnp.float64))


def _plain(problem, inputs):
    """The same function, differentiated as it stands."""
    update = simulated_update(
        problem.victim, problem.params, inputs, problem.labels, problem.threat_model
    )
    return general.distance(problem.distance, problem.transform.apply(update), problem.update)


CASES = [
    ("lenet", "cosine", False, {}),
    pytest.param("resnet", "cosine", True, {}, marks=pytest.mark.slow),
    ("mlp", "l2", True, {}),
    ("mlp", "layer_cosine", False, {"visible_layers": ("fc1", "head")}),
    ("mlp", "cosine", False, {"protocol": "fedavg", "local_steps": None}),
    ("mlp", "l2", False, {"protocol": "fedavg", "local_steps": 2, "local_learning_rate": 0.3}),
]


@pytest.mark.parametrize(("name", "distance", "masked", "threat"), CASES)
def test_it_equals_reverse_over_reverse(name, distance, masked, threat):
    observation = _observation(name, **threat)
    problem = gifd.make_matching(
        observation,
        OTHERS,
        distance=distance,
        transform=_masks(observation) if masked else None,
    )
    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(fn, problem)))(_inputs(8))
        for fn in (gifd.matching_distance, _plain)
    )
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-12)
    scale = float(jnp.abs(wanted[1]).max())
    assert scale > 1e-6
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-12 * scale)
    np.testing.assert_raises(
        AssertionError, np.testing.assert_allclose, found[1], 1.001 * wanted[1], atol=1e-6 * scale
    )


def test_it_equals_finite_differences():
    problem = gifd.make_matching(_observation("mlp"), OTHERS)
    value = jax.jit(functools.partial(gifd.matching_distance, problem))
    x, d = _inputs(8), _inputs(9)
    slope = jnp.vdot(jax.jit(jax.grad(value))(x), d)
    step = 1e-5
    assert float((value(x + step * d) - value(x - step * d)) / (2 * step)) == pytest.approx(
        float(slope), rel=1e-7
    )


def test_its_cotangent_is_the_cosines_closed_form():
    observation = _observation("mlp")
    problem = gifd.make_matching(observation, OTHERS)
    victim, params = problem.victim, problem.params
    g = _update(victim, params, _inputs(8), problem.labels, problem.threat_model)

    def dot(a, b):
        return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))

    target = observation.update
    c, a, b = dot(g, target), jnp.sqrt(dot(g, g)), jnp.sqrt(dot(target, target))
    v = jax.tree.map(lambda t, g: -(t / (a * b) - c * g / (a**3 * b)), target, g)

    def along(x):
        return jax.jvp(lambda p: victim.loss_of_inputs(p, x, problem.labels), (params,), (v,))[1]

    found = jax.jit(jax.grad(functools.partial(gifd.matching_distance, problem)))(_inputs(8))
    np.testing.assert_allclose(found, jax.jit(jax.grad(along))(_inputs(8)), atol=1e-13)


def test_the_clients_own_images_are_at_distance_zero_and_others_are_not():
    problem = gifd.make_matching(_observation("mlp"), LABELS)
    value = jax.jit(functools.partial(gifd.matching_distance, problem))
    assert abs(float(value(_inputs(7)))) < 1e-12
    assert float(value(_inputs(8))) > 1e-2


@pytest.mark.slow
def test_searches_vmap_with_one_client_or_many():
    observation = _observation("lenet")
    other = jax.tree.map(lambda g: 2 * g + 0.01, observation.update)
    first = gifd.make_matching(observation, LABELS)
    second = gifd.make_matching(dataclasses.replace(observation, update=other), OTHERS)
    points = jnp.stack([_inputs(8), _inputs(9)])

    def both(problem, x):
        return jax.value_and_grad(functools.partial(gifd.matching_distance, problem))(x)

    run = jax.jit(lambda problem, points: vmapped(problem, both, points))
    single = jax.jit(both)
    stacked = run(stack([first, second]), points)
    for i, problem in enumerate((first, second)):
        for wanted, found in zip(single(problem, points[i]), stacked, strict=True):
            np.testing.assert_allclose(found[i], wanted, atol=1e-12)
    alone = run(stack([second]), points[1:])
    np.testing.assert_allclose(alone[1][0], stacked[1][1], atol=1e-12)
    shared = run(first, points)
    np.testing.assert_allclose(shared[1][1], single(first, points[1])[1], atol=1e-12)


def test_what_cannot_be_matched_is_refused():
    observation = _observation("lenet")
    bad = jax.tree.map(jnp.copy, observation.update)
    bad["head"]["bias"] = bad["head"]["bias"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="head/bias has 1 NaN"):
        gifd.make_matching(dataclasses.replace(observation, update=bad), np.array([0, 1]))
    zero = jax.tree.map(jnp.zeros_like, observation.update)
    with pytest.raises(ValueError, match="zero everywhere"):
        gifd.make_matching(dataclasses.replace(observation, update=zero), np.array([0, 1]))
    unknown = _observation("lenet", protocol="fedavg", local_steps=None)
    with pytest.raises(ValueError, match="compares lengths"):
        gifd.make_matching(unknown, np.array([0, 1]), distance="l2")
    same = gifd.make_matching(observation, np.array([0, 1]))
    with pytest.raises(ValueError, match="must share"):
        stack([same, gifd.make_matching(observation, np.array([0, 1]), distance="l2")])
    with pytest.raises(ValueError, match="equally many"):
        stack([same, gifd.make_matching(observation, np.array([0, 1, 2]))])
