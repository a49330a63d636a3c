"""The whole estimate: routes agree, attacks confirm it, bad input is refused."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.risk import (
    EmbeddingRelease,
    Prior,
    RiskError,
    RiskSettings,
    function_of_image,
    invre,
    jacobian,
)

QUICK: dict[str, Any] = {"num_draws": 200}


def public(count=60, shape=(4, 4, 1)):
    rng = np.random.default_rng(9)
    smooth = rng.uniform(size=(count, 2, 2, shape[-1])).repeat(2, 1).repeat(2, 2)
    return 0.8 * smooth + 0.2 * rng.uniform(size=(count, *shape))


PRIORS = {
    "isotropic": lambda: Prior.isotropic(16, variance=0.08, dtype="float64"),
    "gaussian": lambda: Prior.from_data(public(), shrinkage=1e-2),
}


def run(case, prior, name="mlp", count=2, noise_std=0.01, **settings):
    release, params, images, labels = case(name, count)
    report = invre(
        jax.random.key(0),
        release,
        params,
        images,
        labels,
        prior=prior,
        noise_std=noise_std,
        settings=RiskSettings(**QUICK | settings),
    )
    return report, (release, params, images, labels)


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("labels_known", [True, False])
def test_routes_agree_with_a_dense_oracle(case, prior, labels_known):
    made = PRIORS[prior]()
    release, params, images, labels = case("mlp", 1)
    x, y = jnp.asarray(images[0]), int(labels[0])
    if labels_known:
        j = np.asarray(jacobian(function_of_image(release, params, jnp.asarray(y)), x))
        precision = j.T @ j / 0.01**2
    else:
        classes = jax.nn.one_hot(y, 3, dtype="float64")
        joint = jnp.concatenate([classes, x.reshape(-1)])
        j = np.asarray(jacobian(lambda z: release(params, z[3:].reshape(x.shape), z[:3]), joint))
        k = j.T @ j / 0.01**2
        label_prior = np.eye(3) / 3 - np.ones((3, 3)) / 9
        root = np.linalg.cholesky(label_prior + 1e-13 * np.eye(3))
        unknown = np.linalg.inv(np.eye(3) + root.T @ k[:3, :3] @ root)
        precision = k[3:, 3:] - k[3:, :3] @ root @ unknown @ root.T @ k[:3, 3:]
    rows = np.asarray(made.rows())
    covariance = np.linalg.inv(np.linalg.inv(rows.T @ rows) + precision)
    routes = ["svd", "qr", "rows", "gram"] + ["structured"] * labels_known
    for route in routes[:: 1 if prior == "isotropic" and labels_known else 2]:
        report, _ = run(case, made, count=1, route=route, labels_known=labels_known)
        found = report.estimates
        np.testing.assert_allclose(found.invloss[0], np.trace(covariance), rtol=1e-6)
        np.testing.assert_allclose(found.pixel_errors[0], np.diag(covariance), rtol=1e-6)
        np.testing.assert_allclose(
            found.risk[0], 1 - np.trace(covariance) / report.energy, rtol=1e-8
        )
        if labels_known:
            sigma = np.linalg.svd(j, compute_uv=False) / 0.01
            np.testing.assert_allclose(found.fil[0], sigma[0], rtol=1e-5)
            np.testing.assert_allclose(found.dfil[0], np.mean(sigma**2), rtol=1e-8)
            assert found.dfil_bound[0] <= found.invloss_isotropic[0] * (1 + 1e-9)
        assert ((found.layer_risk >= 0) & (found.layer_risk <= found.risk[:, None] + 1e-9)).all()


def test_dense_layers_take_the_structured_route(case, monkeypatch):
    spectra = importlib.import_module("jgia.risk.spectrum")
    monkeypatch.setattr(spectra, "_SVD_ENTRIES", 10)
    monkeypatch.setattr(spectra, "_SAVING", 1)
    report, _ = run(case, PRIORS["isotropic"](), count=1)
    assert report.choice.route == "structured"
    other, _ = run(case, PRIORS["isotropic"](), count=1, route="rows")
    np.testing.assert_allclose(report.estimates.invloss, other.estimates.invloss, rtol=1e-9)
    np.testing.assert_allclose(report.estimates.layer_risk, other.estimates.layer_risk, rtol=1e-8)
    unknown, _ = run(case, PRIORS["isotropic"](), count=1, labels_known=False)
    assert unknown.choice.route != "structured"


@pytest.mark.slow
def test_the_posterior_mean_reaches_the_prediction(case):
    """An attack that knows J: its mean error over prior draws and noise is the InvLoss."""
    prior = PRIORS["gaussian"]()
    report, (release, params, images, labels) = run(case, prior, count=1, noise_std=0.05)
    j = np.asarray(
        jacobian(function_of_image(release, params, jnp.asarray(labels[0])), jnp.asarray(images[0]))
    )
    rows = np.asarray(prior.rows())
    sigma = rows.T @ rows
    gain = sigma @ j.T @ np.linalg.inv(j @ sigma @ j.T + 0.05**2 * np.eye(len(j)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 16)) @ rows
    o = x @ j.T + 0.05 * rng.normal(size=(20_000, len(j)))
    errors = np.sum((x - o @ gain.T) ** 2, axis=1)
    predicted = float(report.estimates.invloss[0])
    np.testing.assert_allclose(errors.mean(), predicted, rtol=0.02)
    thresholds = 16 * 10 ** (-np.array([18.0, 25.0, 30.0, 40.0]) / 10)
    rates = np.mean(errors[:, None] <= thresholds, axis=0)
    np.testing.assert_allclose(report.estimates.success_rates[0], rates, atol=0.16)


def test_more_noise_is_less_risk_and_fewer_layers_too(case):
    prior = PRIORS["isotropic"]()
    risks = [
        run(case, prior, noise_std=tau, route="svd")[0].estimates.risk.mean()
        for tau in (1e-3, 1e-2, 1e-1)
    ]
    assert risks == sorted(risks, reverse=True)


@pytest.mark.slow
def test_low_rank_prior_brackets_the_full_one(case):
    """The truth under the whole covariance lies between the two, and the bracket closes."""
    data = public()
    gaps = []
    for rank in (4, 12):
        low = Prior.low_rank(data, rank=rank)
        rows = np.asarray(low.rows())
        basis = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        whole = rows.T @ rows + float(low.tail_variance) * (np.eye(16) - basis.T @ basis)
        truth = run(case, Prior.gaussian(whole), route="svd")[0].estimates.invloss
        found = run(case, low, route="svd")[0].estimates
        np.testing.assert_allclose(found.pixel_errors.sum(1), found.invloss, rtol=1e-9)
        tail = float(low.tail_variance) * (1 - np.sum(basis**2, axis=0))
        assert (found.pixel_errors >= tail * (1 - 1e-9)).all()
        assert (found.invloss_lower <= truth * (1 + 1e-9)).all()
        assert (truth <= found.invloss_upper * (1 + 1e-9)).all()
        gaps.append(float(np.mean(found.invloss_upper - found.invloss_lower)))
    assert gaps[1] < gaps[0]


@pytest.mark.slow
def test_batches_and_microbatches(case):
    prior = PRIORS["isotropic"]()
    release, params, images, labels = case("mlp", 4)
    settings = RiskSettings(route="svd", diagnostics=False, **QUICK)

    def report(x, y, **options):
        return invre(
            jax.random.key(0),
            release,
            params,
            x,
            y,
            prior=prior,
            noise_std=0.01,
            settings=settings,
            **options,
        )

    whole = report(images, labels).estimates
    parts = report(images, labels, microbatch=3).estimates
    np.testing.assert_allclose(whole.invloss, parts.invloss, rtol=1e-9)
    np.testing.assert_array_equal(whole.success_rates, parts.success_rates)
    pairs = report(images.reshape(2, 2, 4, 4, 1), labels.reshape(2, 2))
    assert pairs.num_inputs == 32
    assert pairs.estimates.risk.mean() < whole.risk.mean()
    summary = report(images, labels).aggregate(labels)
    assert summary["count"] == 4
    assert set(summary["per_class"]) == {0, 1, 2}
    np.testing.assert_allclose(summary["worst"], whole.risk.max(), rtol=1e-9)


@pytest.mark.slow
def test_embedding_below_the_inputs_size(build):
    """Fewer outputs than pixels: independent pixels call most of it safe, real images do not."""
    victim, params = build("mlp")
    release = EmbeddingRelease(victim=victim, layer="fc1")
    images = public(3)

    def report(prior):
        return invre(
            jax.random.key(0),
            release,
            params,
            images,
            np.zeros(3, int),
            prior=prior,
            noise_std=1e-3,
            settings=RiskSettings(**QUICK),
        ).estimates

    isotropic = report(Prior.isotropic(16, variance=float(public().var()), dtype="float64"))
    gaussian = report(PRIORS["gaussian"]())
    assert (isotropic.risk <= 7 / 16 + 1e-6).all()
    assert gaussian.risk.mean() > isotropic.risk.mean() + 0.1
    assert (isotropic.dimensions <= 7 + 1e-6).all()


def test_bad_input_is_refused_before_compute(case):
    prior = PRIORS["isotropic"]()
    release, params, images, labels = case("mlp", 2)

    def call(**options):
        given = {"prior": prior, "noise_std": 0.01, "images": images, "labels": labels}
        given |= options
        return invre(
            jax.random.key(0), release, params, given.pop("images"), given.pop("labels"), **given
        )

    for noise in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="noise_std"):
            call(noise_std=noise)
    with pytest.raises(ValueError, match="describes 5 pixels"):
        call(prior=Prior.isotropic(5, variance=0.1, dtype="float64"))
    with pytest.raises(ValueError, match="agree in N"):
        call(labels=labels[:1])
    with pytest.raises(ValueError, match="finite"):
        call(images=images * np.nan)
    with pytest.raises(ValueError, match="structured"):
        call(settings=RiskSettings(route="structured", labels_known=False))
    with pytest.raises(ValueError, match=r"float32 or float64"):
        call(images=images.astype("float16"))


def test_a_release_with_nan_is_an_error(case):
    release, params, images, labels = case("mlp", 2)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(RiskError, match=r"inputs \[0, 1\]"):
        invre(
            jax.random.key(0),
            release,
            broken,
            images,
            labels,
            prior=PRIORS["isotropic"](),
            noise_std=0.01,
            settings=RiskSettings(route="svd", **QUICK),
        )
