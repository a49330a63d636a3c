"""The parameters that a malicious server sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.attacks import ares
from jgia.attacks.ares.calibrate import smoothed_bin_masses
from jgia.attacks.ares.filters import _conditioning
from jgia.config import AresOptions
from jgia.models import flatten_params, make_victim
from jgia.sparse import to_planes

FRONT_ENDS = ("random", "signed", "direct")


@pytest.fixture(params=FRONT_ENDS)
def crafted(request, make_setting):
    return make_setting(options=AresOptions(front_end=request.param, front_end_trials=4))


def _inputs(setting, images):
    return setting.victim.normalization.normalize(jnp.asarray(images))


def _features(setting, params, images):
    """Outputs of both convolutions and of the imprint layer before ReLU, recomputed with lax."""

    def conv(x, layer):
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
        )
        return jax.nn.relu(y + layer["bias"][None, None, None])

    first = conv(_inputs(setting, images), params["conv1"])
    second = conv(first, params["conv2"])
    flat = second.reshape(len(images), -1)
    return first, second, flat @ params["fc"]["kernel"] + params["fc"]["bias"][None]


def test_architecture_is_untouched(crafted):
    expected = flatten_params(crafted.victim.param_shapes())
    got = flatten_params(crafted.params)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in got.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()
    }
    assert all(np.all(np.isfinite(leaf)) for leaf in got.values())


def test_later_convolutions_pass_on_what_comes_in(crafted):
    first, second, _ = _features(crafted, crafted.params, crafted.images[:4])
    assert float(jnp.abs(first).max()) > 0
    np.testing.assert_array_equal(first, second)


def test_random_filters_have_unit_norm(setting):
    kernel = np.asarray(setting.params["conv1"]["kernel"], np.float64)
    np.testing.assert_allclose(np.sqrt((kernel**2).sum(axis=(0, 1, 2))), 1, rtol=1e-6)
    assert np.linalg.matrix_rank(kernel.reshape(-1, kernel.shape[-1])) == kernel.shape[-1]


def test_signed_filters_are_plus_and_minus_the_pixel(make_setting):
    signed = make_setting(options=AresOptions(front_end="signed"))
    first, _, _ = _features(signed, signed.params, signed.images[:4])
    x = _inputs(signed, signed.images[:4])
    np.testing.assert_array_equal(first[..., :3] - first[..., 3:6], x)
    assert not np.any(first[..., 6:])


def test_columns_are_identical_and_biases_are_sorted_thresholds(crafted):
    fc = crafted.params["fc"]
    kernel, bias = np.asarray(fc["kernel"]), np.asarray(fc["bias"])
    assert np.all(kernel == kernel[:, :1])
    assert kernel[:, 0].max() > 0
    assert np.all(kernel >= 0)
    assert np.all(np.diff(crafted.plan.thresholds) > 0)
    np.testing.assert_array_equal(-bias.astype(np.float64), crafted.plan.thresholds)


def test_first_threshold_loses_no_calibration_image(crafted):
    _, _, scores = _features(crafted, crafted.params, crafted.public)
    q = np.asarray(scores - crafted.params["fc"]["bias"][None])[:, 0]
    assert crafted.plan.thresholds[0] <= q.min()
    np.testing.assert_array_equal(np.asarray(scores[:, 0]) > 0, True)


def _neuron_signals(params, label: int, size: float = 0.5) -> np.ndarray:
    """dL/da of one example at the imprint neurons, in float64 from the definition."""
    head = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params["head"])
    shape = head["kernel"].shape[:1]
    activation = size * jax.random.uniform(jax.random.key(3), shape, jnp.float64)

    def loss(a):
        logits = a @ head["kernel"] + head["bias"]
        return jax.nn.logsumexp(logits) - logits[label]

    return np.asarray(jax.grad(loss)(activation))


def test_every_label_sends_the_same_signal_to_all_neurons_and_not_zero(crafted):
    for label in range(crafted.victim.num_classes):
        for size in (0.0, 0.5):
            signals = _neuron_signals(crafted.params, label, size) * crafted.plan.num_bins
            assert np.ptp(signals) <= 1e-14 * np.abs(signals).max()
            # E_p[u] - u_label; for uniform predictions at least 1 - 1/C.
            assert abs(signals[0]) > (0.5 if size else 1 - 1.001 / crafted.victim.num_classes)


def test_constant_head_sends_nothing(setting):
    kernel = np.ones_like(setting.params["head"]["kernel"])
    released = {**setting.params, "head": {**setting.params["head"], "kernel": kernel}}
    for label in range(setting.victim.num_classes):
        assert np.abs(_neuron_signals(released, label)).max() < 1e-14


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_head_is_never_constant(num_classes, setting):
    victim = make_victim("cnn", input_shape=(16, 16, 3), num_classes=num_classes, fc_width=4)
    options = AresOptions(front_end="direct", head_gain=3.0)
    params, _ = ares.craft(jax.random.key(0), victim, setting.public, options=options)
    head = np.asarray(params["head"]["kernel"])
    assert np.all(head == head[:1])
    assert np.ptp(head[0]) > 0
    np.testing.assert_allclose(np.abs(head), 3.0 / 4, rtol=1e-6)


def test_read_plan_recovers_the_plan(crafted):
    plan = ares.read_plan(crafted.victim, crafted.params)
    np.testing.assert_array_equal(plan.kernel, crafted.plan.kernel)
    np.testing.assert_array_equal(plan.query, crafted.plan.query)
    np.testing.assert_array_equal(plan.thresholds, crafted.plan.thresholds)
    np.testing.assert_array_equal(plan.order, crafted.plan.order)
    known = crafted.plan.front_end
    assert plan.front_end == ("unknown" if known == "random" else known)


def test_same_key_same_bits_and_other_key_other_filters(setting, make_setting):
    options = AresOptions(front_end_trials=4)
    params, plan = ares.craft(jax.random.key(0), setting.victim, setting.public, options=options)
    for name, leaf in flatten_params(params).items():
        np.testing.assert_array_equal(leaf, flatten_params(setting.params)[name])
    np.testing.assert_array_equal(plan.thresholds, setting.plan.thresholds)
    other = make_setting(seed=5)
    assert not np.array_equal(other.plan.kernel, setting.plan.kernel)
    assert not np.array_equal(other.plan.query, setting.plan.query)


def test_best_of_several_filter_banks_conditions_best(pools, setting):
    probes = to_planes(_inputs(setting, setting.public)[:48])
    scores = []
    for trials in (1, 4, 8):
        options = AresOptions(front_end_trials=trials)
        _, plan = ares.craft(jax.random.key(7), setting.victim, setting.public, options=options)
        scores.append(float(_conditioning(plan.kernel, probes)))
    assert scores[2] > 0
    assert scores[2] >= scores[0]
    assert max(scores[1:]) > scores[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mlp", "two hidden layers"),
        ("lenet", "ends in sigmoid"),
        ("convnet", "group normalization"),
    ],
)
def test_models_that_cannot_carry_the_attack_are_refused(model, message, setting):
    victim = make_victim(model, input_shape=(16, 16, 3), num_classes=7)
    with pytest.raises(ValueError, match=message) as refusal:
        ares.craft(jax.random.key(0), victim, setting.public)
    assert "never changes an architecture" in str(refusal.value)
    with pytest.raises(ValueError, match=message):
        ares.read_plan(victim, {})


@pytest.mark.parametrize(
    ("front_end", "widths", "needed"), [("signed", (12, 5), 6), ("direct", (2,), 3)]
)
def test_too_few_channels_are_refused(front_end, widths, needed, setting):
    victim = make_victim("cnn", input_shape=(16, 16, 3), num_classes=7, widths=widths, fc_width=8)
    options = AresOptions(front_end=front_end)
    with pytest.raises(ValueError, match=rf"needs {needed} channels .* front_end='random'"):
        ares.craft(jax.random.key(0), victim, setting.public, options=options)


def test_one_neuron_makes_no_bins(setting):
    victim = make_victim("cnn", input_shape=(16, 16, 3), num_classes=7, fc_width=1)
    with pytest.raises(ValueError, match="bins need at least 2"):
        ares.craft(jax.random.key(0), victim, setting.public)


def _with(images: np.ndarray, value: float) -> np.ndarray:
    changed = images.copy()
    changed[3, 2, 1, 0] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:15], "at least 16 public calibration images, got 15"),
        (
            lambda x: x[:, :8],
            r"shape \(N, 16, 16, 3\), got \(128, 8, 16, 3\)|got \(\d+, 8, 16, 3\)",
        ),
        (lambda x: x[0], r"got \(16, 16, 3\)"),
        (lambda x: np.full_like(x, 0.25), "same query feature"),
        (lambda x: np.repeat(x[:1], 20, axis=0), "same query feature"),
        (lambda x: _with(x, np.nan), r"finite floats in \[0, 1\]"),
        (lambda x: _with(x, np.inf), r"finite floats in \[0, 1\]"),
        (lambda x: _with(x, 1.5), r"finite floats in \[0, 1\]"),
        (lambda x: _with(x, -0.1), r"finite floats in \[0, 1\]"),
        (lambda x: (255 * x).astype(np.uint8), r"finite floats in \[0, 1\]"),
    ],
    ids=["few", "shape", "one-image", "one-colour", "copies", "nan", "inf", "high", "low", "bytes"],
)
def test_calibration_that_does_not_fit_is_refused(change, message, setting):
    options = AresOptions(front_end_trials=1)
    with pytest.raises(ValueError, match=message):
        ares.craft(jax.random.key(0), setting.victim, change(setting.public), options=options)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_calibration_of_other_precision_is_taken(dtype, setting):
    public = setting.public.astype(dtype)
    options = AresOptions(front_end="direct")
    params, plan = ares.craft(jax.random.key(0), setting.victim, public, options=options)
    assert {leaf.dtype for leaf in flatten_params(params).values()} == {np.dtype(np.float32)}
    assert np.all(np.diff(plan.thresholds) > 0)


_numbers = st.floats(-50, 50).filter(lambda x: abs(x) > 1e-6)


@given(
    features=st.lists(_numbers, min_size=2, max_size=40, unique=True),
    num_bins=st.integers(2, 300),
    widening=st.floats(1.0, 2.0),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_thresholds_increase_and_cover_the_lowest_feature(features, num_bins, widening):
    values = np.array(features)
    if np.log(values).std() < 1e-6 if np.all(values > 0) else values.std() < 1e-6:
        return
    thresholds = ares.fit_thresholds(values, num_bins, widening=widening)
    assert thresholds.shape == (num_bins,)
    assert np.all(np.diff(thresholds) > 0)
    assert thresholds[0] < values.min()


@pytest.mark.parametrize("positive", [True, False])
def test_thresholds_are_quantiles_of_the_fitted_law(positive):
    rng = np.random.default_rng(0)
    features = rng.normal(1.0, 0.3, 20000)
    features = np.exp(features) if positive else features - 1
    thresholds = ares.fit_thresholds(features, 16, widening=1.0)
    counts = np.histogram(features, np.append(thresholds[1:], np.inf))[0]
    # 1/16 of the mass in every bin but the last, which is half as wide above (j + 1/2) / K.
    np.testing.assert_allclose(counts[:-1] / 20000, 1 / 16, rtol=0.15)
    np.testing.assert_allclose(counts[-1] / 20000, 1 / 32, rtol=0.2)


def test_bin_masses_are_probabilities_near_the_frequencies():
    features = np.exp(np.random.default_rng(1).normal(size=5000) * 0.4)
    thresholds = ares.fit_thresholds(features, 20)
    masses = smoothed_bin_masses(features, thresholds)
    seen = np.histogram(features, np.append(thresholds, np.inf))[0] / 5000
    assert np.all(masses >= 0)
    assert masses.sum() <= 1 + 1e-12
    assert np.abs(masses - seen).max() < 0.02
