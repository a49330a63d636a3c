import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from scipy import stats

from jgia.defenses import dp_sgd_gradient, dp_sgd_noise_std
from jgia.models import make_victim

MLP = make_victim("mlp", input_shape=(3, 2, 1), num_classes=3, widths=(5,))
CNN = make_victim("cnn", input_shape=(4, 4, 1), num_classes=3, widths=(2,), fc_width=4)
CASES = hypothesis.settings(derandomize=True, deadline=None, max_examples=5)


def drawn(victim, count=7, spread=3.0):
    rng = np.random.default_rng(count)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, spread * leaf.shape[0] ** -0.5, leaf.shape)),
        victim.param_shapes(),
    )
    images = jnp.asarray(rng.random((count, *victim.input_shape)))
    return params, (images, jnp.asarray(rng.integers(0, 3, count)))


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def one_by_one(victim, params, examples):
    """Per-example gradients as rows, one ``jax.grad`` each."""
    grad = jax.jit(jax.grad(victim.loss))
    return np.stack(
        [
            flat(grad(params, images, labels))
            for images, labels in zip(
                np.split(examples[0], len(examples[0])),
                np.split(examples[1], len(examples[1])),
                strict=True,
            )
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "microbatch"), [(MLP, None), (CNN, 1), (CNN, 3)])
def test_clipped_mean_against_a_loop(victim, microbatch):
    params, examples = drawn(victim)
    rows = one_by_one(victim, params, examples)
    norms = np.linalg.norm(rows, axis=1)
    bound = 1.01 * float(np.median(norms))
    found, counts = dp_sgd_gradient(
        jax.random.key(0),
        victim.loss,
        params,
        examples,
        clip_norm=bound,
        noise_multiplier=0.0,
        microbatch=microbatch,
    )
    expected = (rows * np.minimum(1, bound / norms)[:, None]).mean(axis=0)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-11, atol=1e-14)
    assert int(counts.num_clipped) == int((norms > bound).sum()) == 3
    assert int(counts.num_nonfinite) == 0
    unclipped = rows.mean(axis=0)
    assert np.abs(expected - unclipped).max() > 1e-3


@pytest.mark.slow
def test_clipped_mean_against_optax():
    params, examples = drawn(MLP)
    per_example = jax.vmap(jax.grad(lambda p, x, y: MLP.loss(p, x[None], y[None])), (None, 0, 0))
    gradients = jax.jit(per_example)(params, *examples)
    oracle = optax.contrib.differentially_private_aggregate(
        l2_norm_clip=0.5, noise_multiplier=0.0, key=jax.random.key(0)
    )
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = oracle.update(gradients, oracle.init(params))
    found, _ = dp_sgd_gradient(
        jax.random.key(1), MLP.loss, params, examples, clip_norm=0.5, noise_multiplier=0.0
    )
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-11, atol=1e-14)


def test_loose_bound_and_no_noise_is_the_ordinary_gradient():
    params, examples = drawn(CNN)
    found, counts = dp_sgd_gradient(
        jax.random.key(0), CNN.loss, params, examples, clip_norm=1e6, noise_multiplier=0.0
    )
    expected = jax.jit(jax.grad(CNN.loss))(params, *examples)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-11, atol=1e-14)
    assert int(counts.num_clipped) == 0


def no_loss(params, x):
    """A loss whose gradient is zero, so that only noise is left."""
    return jnp.sum(x) * 0.0 + 0.0 * jnp.sum(params)


@pytest.mark.parametrize(("clip_norm", "noise_multiplier"), [(0.1, 3.0), (5.0, 0.2)])
def test_noise_has_the_declared_size_and_known_mistakes_are_seen(clip_norm, noise_multiplier):
    count, size = 8, 20_000
    found, counts = dp_sgd_gradient(
        jax.random.key(1),
        no_loss,
        jnp.zeros(size),
        (jnp.ones((count, 1)),),
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
    )
    declared = noise_multiplier * clip_norm / count

    def accepted(std):
        tail = stats.chi2.cdf(float(jnp.sum(found**2)) / std**2, size)
        return 1e-5 < tail < 1 - 1e-5

    assert counts.noise_std == pytest.approx(declared, rel=1e-14)
    assert accepted(declared)
    assert stats.kstest(np.asarray(found) / declared, "norm").pvalue > 1e-4
    mistakes = {
        "noise on the mean instead of the sum": noise_multiplier * clip_norm,
        "clip norm left out": noise_multiplier / count,
        "divided by the root of the batch": declared * np.sqrt(count),
        "three percent": 1.03 * declared,
    }
    assert [name for name, std in mistakes.items() if accepted(std)] == []


@CASES
@hypothesis.given(seed=st.integers(0, 2**20), bound=st.sampled_from([1e-3, 0.3, 2.0]))
def test_sensitivity_to_one_example(seed, bound):
    params, (images, labels) = drawn(MLP)
    rng = np.random.default_rng(seed)
    other = images.at[2].set(jnp.asarray(rng.random(images.shape[1:])) * 50)

    def total(pixels, classes):
        mean, _ = dp_sgd_gradient(
            jax.random.key(0),
            MLP.loss,
            params,
            (pixels, classes),
            clip_norm=bound,
            noise_multiplier=0.0,
        )
        return flat(mean) * len(classes)

    everyone = total(images, labels)
    without = total(jnp.delete(images, 2, axis=0), jnp.delete(labels, 2))
    replaced = total(other, labels)
    assert np.linalg.norm(everyone - without) <= bound * (1 + 1e-9)
    assert np.linalg.norm(everyone - replaced) <= 2 * bound * (1 + 1e-9)


def quotient(params, x):
    return jnp.sum(params / x[0])


def test_nonfinite_example_contributes_zero_and_is_counted():
    examples = (jnp.array([[1.0], [0.0], [2.0]]),)
    found, counts = dp_sgd_gradient(
        jax.random.key(0), quotient, jnp.ones(1), examples, clip_norm=10.0, noise_multiplier=0.0
    )
    np.testing.assert_allclose(found, [(1 + 0.5) / 3])
    assert int(counts.num_nonfinite) == 1


def linear(params, x):
    return jnp.sum(params * x[0])


def test_gradient_whose_square_overflows_is_clipped_and_not_lost():
    examples = (jnp.asarray([[3e30, 4e30], [3e-30, 4e-30]], "float32"),)
    found, _ = dp_sgd_gradient(
        jax.random.key(0),
        linear,
        jnp.ones(2, "float32"),
        examples,
        clip_norm=1.0,
        noise_multiplier=0.0,
    )
    np.testing.assert_allclose(found, [0.3, 0.4], rtol=1e-6)


def test_second_call_traces_nothing():
    traced = []

    def loss(params, x):
        traced.append(1)
        return jnp.sum(params * x[0])

    for seed in (0, 1):
        dp_sgd_gradient(
            jax.random.key(seed),
            loss,
            jnp.ones(2),
            (jnp.ones((4, 2)),),
            clip_norm=1.0,
            noise_multiplier=1.0,
            microbatch=2,
        )
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"microbatch": 0}, "microbatch"),
    ],
)
def test_bad_options_are_refused(fields, word):
    options = {"clip_norm": 1.0, "noise_multiplier": 1.0, **fields}
    with pytest.raises(ValueError, match=word):
        dp_sgd_gradient(jax.random.key(0), linear, jnp.ones(1), (jnp.ones((2, 1)),), **options)


def test_examples_must_share_their_leading_axis():
    for examples in [(jnp.ones((2, 1)), jnp.ones(3)), (jnp.ones((0, 1)),), (jnp.ones(()),)]:
        with pytest.raises(ValueError, match="leading axis"):
            dp_sgd_gradient(
                jax.random.key(0),
                linear,
                jnp.ones(1),
                examples,
                clip_norm=1.0,
                noise_multiplier=1.0,
            )


def test_noise_std_needs_a_batch():
    with pytest.raises(ValueError, match="num_examples"):
        dp_sgd_noise_std(clip_norm=1.0, noise_multiplier=1.0, num_examples=0)
