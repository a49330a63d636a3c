"""Four baselines end to end: they return what their neurons isolate, and no more than they see."""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.attacks.imprint import ImprintOptions, loki, qbi, rtf, trap_weights
from jgia.config import ClientConfig
from jgia.federated import client_update
from jgia.models import Conv, Dense, Victim, make_victim
from jgia.models.imprint_block import ImprintBlock
from jgia.normalization import Normalization
from jgia.observation import Status, ThreatModel

MODELS = {rtf: "imprint_mlp", trap_weights: "mlp", qbi: "mlp", loki: "cnn"}
METHODS = list(MODELS)
BATCH = 8

methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__.split(".")[-1])


@pytest.fixture(scope="module")
def small(pools):
    """8 x 8 crops: (client images, labels, public images)."""
    images, labels, public = pools
    return images[:, 4:12, 4:12], labels, public[:, 4:12, 4:12]


@pytest.fixture(scope="module")
def run(small):
    """Victim, crafted parameters, plan, observation and reconstruction of one client."""
    images, labels, public = small

    @functools.cache
    def one(method: ModuleType, *, normalize=True, batch=BATCH, client=None, options=None):
        channels = public.shape[-1]
        norm = Normalization.fit(public) if normalize else Normalization.identity(channels)
        widths = {"mlp": (192,), "imprint_mlp": (16,), "cnn": (3, 4)}[MODELS[method]]
        victim = make_victim(
            MODELS[method],  # pyright: ignore[reportArgumentType]
            input_shape=public.shape[1:],
            num_classes=int(labels.max()) + 1,
            normalization=norm,
            widths=widths,
            fc_width=64,
        )
        params, plan = method.craft(
            jax.random.key(0), victim, public, options=options, num_examples=batch
        )
        observation = client_update(
            jax.random.key(1),
            victim,
            params,
            images[:batch],
            labels[:batch],
            client or ClientConfig(),
        )
        result = method.attack(jax.random.key(2), observation, plan=plan, options=options)
        return victim, params, plan, observation, result

    return one


def first_outputs(victim: Victim, params, layer: str, images) -> np.ndarray:
    """What the read layer computes before its ReLU, with JAX's own convolutions: (N, K)."""
    x = victim.normalization.normalize(jnp.asarray(images, jnp.float32))
    for name in sorted(n for n in params if n.startswith("conv")):
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.maximum(x + params[name]["bias"][None, None, None, :], 0)
    flat = np.asarray(x, np.float64).reshape(len(images), -1)
    kernel = np.asarray(params[layer]["kernel"], np.float64)
    return flat @ kernel + np.asarray(params[layer]["bias"], np.float64)[None, :]


def isolated(method: ModuleType, on: np.ndarray) -> np.ndarray:
    """Which examples some neuron, or some bin, has for itself (the truth): (N,)."""
    if method in (rtf, loki):
        bins = on.sum(axis=1)  # the number of thresholds below an example
        return np.array([b > 0 and (bins == b).sum() == 1 for b in bins])
    return np.any(on[:, on.sum(axis=0) == 1], axis=1)


@methods
@pytest.mark.parametrize("batch", [1, BATCH, 24])
def test_what_is_isolated_is_returned_to_the_last_digits(
    run, small, best_psnr, method: ModuleType, batch: int
):
    victim, params, plan, _, result = run(method, normalize=method is not loki, batch=batch)
    images = small[0][:batch]
    on = first_outputs(victim, params, plan.layer, images) > 0
    alone = isolated(method, on)
    assert alone.sum() >= min(batch, 4)
    found = best_psnr(images, result.images)
    assert found[alone].min() > 80
    if (~alone).any():  # and what shares everything is not
        assert np.median(found[~alone]) < 40


def test_agreement_trades_mixtures_for_misses(run, small, best_psnr):
    images = small[0][:24]
    lax = run(qbi, batch=24)[-1]
    strict = run(qbi, batch=24, options=ImprintOptions(min_agreement=2))[-1]
    assert 4 <= len(strict.images) < len(lax.images)
    assert (best_psnr(strict.images, images) > 80).mean() > 0.9
    assert best_psnr(lax.images, images).min() < 40


@pytest.mark.parametrize("method", [qbi, trap_weights], ids=["qbi", "trap_weights"])
def test_higher_scores_are_better_images(run, small, best_psnr, method):
    result = run(method, batch=24)[-1]
    good = best_psnr(result.images, small[0][:24]) > 80
    assert good[result.scores >= 3].all()
    assert not good[result.scores < 2].all()


def test_loki_loses_what_is_darker_than_the_mean(run, small):
    """On normalized inputs the image comes back with every pixel raised to the channel's mean."""
    victim, _, _, _, result = run(loki)
    mean = np.asarray(victim.normalization.mean)
    raised = np.maximum(small[0][:BATCH], mean[None, None, None, :])
    assert set(result.statuses) == {Status.RANK_DEFICIENT}
    errors = np.abs(result.images[:, None] - raised[None, :]).max(axis=(2, 3, 4)).min(axis=1)
    assert np.median(errors) < 1e-4
    plain = np.abs(result.images[:, None] - small[0][None, :BATCH]).max(axis=(2, 3, 4)).min(axis=1)
    assert plain.min() > 0.05
    accepted = [c for c in result.candidates if c["status"] == "rank_deficient"]
    assert all(c["determined"] < 1 for c in accepted)
    assert 0.05 < np.median([c["determined"] for c in accepted]) < 0.95


def test_loki_with_a_constant_head_reads_nothing(run, small):
    """The loss sends ``sum_c (p_c - y_c) = 0`` back; what is left is rounding."""
    victim, params, _, _, _ = run(loki, normalize=False)
    ones = {**params["head"], "kernel": jnp.ones_like(params["head"]["kernel"])}
    images, labels, _ = small
    blind = client_update(
        jax.random.key(1), victim, {**params, "head": ones}, images[:BATCH], labels[:BATCH]
    )
    signal = np.abs(np.asarray(blind.update["fc"]["bias"])).max()
    assert signal < 1e-5
    good = run(loki, normalize=False)[3]
    assert np.abs(np.asarray(good.update["fc"]["bias"])).max() > 1e-3


@pytest.mark.parametrize("method", [qbi, trap_weights], ids=["qbi", "trap_weights"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "pixels"])
def test_rows_are_on_for_one_example_in_the_batch(run, small, method, normalize):
    victim, params, plan, _, _ = run(method, normalize=normalize, batch=24)
    share = (first_outputs(victim, params, plan.layer, small[2]) > 0).mean()
    # One-colored crops are never on for a trap, which the tuned scale cannot make up for.
    assert 0.25 / 24 < share < 2.5 / 24
    unbiased = {plan.layer: {**params[plan.layer], "bias": jnp.zeros(192, jnp.float32)}}
    if method is qbi:  # without the quantile half of the rows are on
        assert (first_outputs(victim, unbiased, plan.layer, small[2]) > 0).mean() > 0.4


def test_a_trap_has_as_many_negative_weights_as_positive_ones(run):
    _, params, plan, _, _ = run(trap_weights, normalize=False)
    kernel = np.asarray(params[plan.layer]["kernel"])
    assert set((kernel < 0).sum(axis=0)) == {kernel.shape[0] // 2}
    positive, negative = np.sort(np.where(kernel > 0, kernel, 0), 0), np.sort(-kernel, 0)
    half = kernel.shape[0] // 2
    ratio = positive[half:] / negative[half:]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)  # one scale, the same magnitudes
    fixed = run(trap_weights, normalize=False, options=ImprintOptions(trap_scale=0.5))[1]
    kernel = np.asarray(fixed[plan.layer]["kernel"])
    np.testing.assert_allclose(kernel.max() / -kernel.min(), 0.5, rtol=1e-5)


def test_trap_weights_undo_the_normalization(run, small):
    """The same key gives the same rows on pixels, whatever the client normalizes by."""
    outputs = []
    for normalize in (True, False):
        victim, params, plan, _, _ = run(trap_weights, normalize=normalize)
        outputs.append(first_outputs(victim, params, plan.layer, small[0][:BATCH]))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_every_neuron_of_the_block_gets_the_same_signal(run, small):
    victim, params, plan, observation, _ = run(rtf)
    images, labels, _ = small
    one = client_update(jax.random.key(1), victim, params, images[:1], labels[:1])
    signal = np.asarray(one.update[plan.layer]["bias"])
    on = signal != 0
    assert 2 <= on.sum() < 64
    np.testing.assert_allclose(signal[on], signal[on][0], rtol=1e-5)
    assert isinstance(victim.module, ImprintBlock)
    assert set(observation.update) == {"imprint", "restore", "inner"}


def test_the_block_is_what_it_says(small):
    shape = {"input_shape": (8, 8, 3), "num_classes": 4, "widths": (6,)}
    victim = make_victim("imprint_mlp", fc_width=5, **shape)
    params = victim.init(jax.random.key(0))
    x = jnp.asarray(small[0][:2], jnp.float32)
    bins = np.maximum(np.asarray(x).reshape(2, -1) @ np.asarray(params["imprint"]["kernel"]), 0)
    restored = jnp.asarray((bins @ np.asarray(params["restore"]["kernel"])).reshape(x.shape))
    inner = make_victim("mlp", **shape)
    np.testing.assert_allclose(
        victim.apply(params, x), inner.apply(params["inner"], restored), rtol=1e-4, atol=1e-6
    )
    layers = victim.layers()
    assert layers[1] == Dense("restore", 192, "none")
    assert layers[2:] == (Dense("inner/fc1", 6, "relu"), Dense("inner/head", 4, "none"))
    cnn = make_victim("imprint_cnn", input_shape=(8, 8, 3), num_classes=4)
    assert [layer.name for layer in cnn.layers() if isinstance(layer, Conv)] == [
        "inner/conv1",
        "inner/conv2",
    ]


@pytest.mark.parametrize(
    ("method", "model", "widths", "message"),
    [
        (rtf, "cnn", None, "no imprint block in front .* imprint_mlp or imprint_cnn"),
        (rtf, "mlp", (192, 192), "no imprint block in front"),
        (trap_weights, "cnn", None, "first layer is not a fully connected .* --model mlp"),
        (qbi, "lenet", None, "first layer is not a fully connected .* --model mlp"),
        (loki, "mlp", None, "fewer channels|not convolutions|--model cnn"),
        (loki, "lenet", None, "not convolutions|no ReLU|strides"),
        (loki, "convnet", None, "not convolutions"),
        (loki, "cnn", (2, 4), "layer conv1 has fewer channels than the image's 3"),
    ],
)
def test_what_cannot_be_attacked_is_refused_with_the_reason(small, method, model, widths, message):
    victim = make_victim(model, input_shape=(8, 8, 3), num_classes=4, widths=widths)
    name = method.__name__.split(".")[-1]
    for refuse in (
        lambda: method.check(victim),
        lambda: method.craft(jax.random.key(0), victim, small[2]),
    ):
        with pytest.raises(ValueError, match=rf"{name} cannot attack the model .*({message})"):
            refuse()


def test_rows_also_read_the_block_of_another_model(small, best_psnr):
    """A fully connected first layer is all that quantile biases need."""
    victim = make_victim("imprint_mlp", input_shape=(8, 8, 3), num_classes=4, fc_width=64)
    images, labels, public = small
    params, plan = qbi.craft(jax.random.key(0), victim, public, num_examples=2)
    observation = client_update(jax.random.key(1), victim, params, images[:2], labels[:2] % 4)
    result = qbi.attack(jax.random.key(2), observation, plan=plan)
    assert best_psnr(images[:2], result.images).max() > 80


@methods
def test_the_parameters_are_plan_enough(run, method: ModuleType):
    *_, observation, result = run(method)
    again = method.attack(jax.random.key(5), observation)
    np.testing.assert_array_equal(again.images, result.images)
    assert again.candidates == result.candidates


@methods
def test_an_honest_server_is_not_served(run, method: ModuleType):
    observation = run(method)[3]
    curious = dataclasses.replace(
        observation, threat_model=ThreatModel(server="honest_but_curious")
    )
    with pytest.raises(ValueError, match="needs a server that chooses"):
        method.attack(jax.random.key(0), curious)


@methods
def test_one_local_step_leaks_as_much_as_a_gradient(run, small, best_psnr, method: ModuleType):
    client = ClientConfig(protocol="fedavg", learning_rate=0.1)
    whole = run(method, normalize=method is not loki)[-1]
    local = run(method, normalize=method is not loki, client=client)[-1]
    images = small[0][:BATCH]
    limit = 30  # float32 parameters round what is subtracted from them
    good = np.sum(best_psnr(images, local.images) > limit)
    assert good >= 0.6 * np.sum(best_psnr(images, whole.images) > limit)


@methods
def test_calibration_images_must_fit(small, run, method: ModuleType):
    victim = run(method)[0]
    with pytest.raises(ValueError, match="at least 16"):
        method.craft(jax.random.key(0), victim, small[2][:4])
    with pytest.raises(ValueError, match="must have shape"):
        method.craft(jax.random.key(0), victim, small[2][:, :4])


@methods
def test_noise_that_is_declared_makes_fewer_and_worse_images(run, small, method: ModuleType):
    """With noise far above every signal nothing is returned as an image."""
    observation, plan = run(method)[3], run(method)[2]
    key = jax.random.key(9)
    leaves, structure = jax.tree.flatten(observation.update)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + 10 * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    update = jax.tree.unflatten(structure, noisy)
    loud = dataclasses.replace(observation, update=update)
    result = method.attack(jax.random.key(0), loud, plan=plan, noise_std=10.0)
    assert len(result.candidates) < 8
    assert len(result.images) <= len(result.candidates)
