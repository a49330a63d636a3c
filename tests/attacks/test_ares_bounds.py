"""Error bounds hold, on instances where their assumptions can be checked, and are not vacuous."""

import math

import numpy as np
import pytest
from scipy import optimize

from jgia.attacks.ares import bounds

cvxpy = pytest.importorskip("cvxpy")


def _denoised(a: np.ndarray, y: np.ndarray, eps: float) -> np.ndarray:
    """Basis pursuit denoising by an interior-point method."""
    x = cvxpy.Variable(a.shape[1])
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.norm1(x)), [cvxpy.norm2(y - a @ x) <= eps])
    problem.solve(solver="CLARABEL")
    assert problem.status == "optimal"
    return np.asarray(x.value)


@pytest.fixture(scope="module")
def frame():
    """(30, 40) with unit columns and a restricted isometry constant of order 2 below 0.41."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 40))
    for _ in range(400):  # lower the coherence: pull the Gram matrix towards the identity
        a /= np.linalg.norm(a, axis=0)
        gram = a.T @ a
        a = a - 0.1 * a @ (np.sign(gram) * np.maximum(np.abs(gram) - 0.2, 0) - 0.8 * np.eye(40))
    return a / np.linalg.norm(a, axis=0)


def test_constants_of_the_theorem():
    assert bounds.rip_constants(0.0) == (2.0, 4.0)
    tail, noise = bounds.rip_constants(0.2)
    assert tail < 4.2  # the figures that follow theorem 1.2 of Candes 2008
    assert noise < 8.5
    for delta in (math.sqrt(2) - 1, 0.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="delta must lie in"):
            bounds.rip_constants(delta)


def test_restricted_isometry_constant_of_order_two_is_the_coherence(frame):
    coherence = np.abs(frame.T @ frame - np.eye(40)).max()
    assert bounds.restricted_isometry_constant(frame, 2) == pytest.approx(coherence, rel=1e-12)
    assert bounds.restricted_isometry_constant(2 * np.eye(3), 1) == 3.0


def test_restricted_isometry_constant_bounds_every_sparse_vector(frame):
    delta = bounds.restricted_isometry_constant(frame, 3)
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(300):
        x = np.zeros(40)
        x[rng.choice(40, 3, replace=False)] = rng.normal(size=3)
        ratios.append(np.linalg.norm(frame @ x) ** 2 / np.linalg.norm(x) ** 2)
    assert np.abs(np.array(ratios) - 1).max() <= delta


def test_basis_pursuit_stays_within_its_bound(frame):
    delta = bounds.restricted_isometry_constant(frame, 2)
    assert delta < math.sqrt(2) - 1
    rng = np.random.default_rng(2)
    errors, limits = [], []
    for eps in (0.0, 0.01, 0.1):
        for _ in range(4):
            x = 0.002 * rng.normal(size=40)
            x[rng.integers(40)] = rng.choice([-1.0, 1.0])
            noise = rng.normal(size=30)
            noise *= eps / np.linalg.norm(noise)
            tail = np.abs(x).sum() - np.abs(x).max()
            found = _denoised(frame, frame @ x + noise, max(eps, 1e-9))
            errors.append(np.linalg.norm(found - x))
            limits.append(bounds.basis_pursuit_bound(delta, 1, tail_l1=float(tail), noise_norm=eps))
    assert np.all(np.array(errors) <= np.array(limits))


def test_noise_constant_cannot_be_small(frame):
    """The worst noise for one column moves the answer by 2 eps: a constant below 2 is wrong."""
    eps = 0.1
    x = np.zeros(40)
    x[3] = 1.0
    found = _denoised(frame, frame @ x - eps * frame[:, 3], eps)
    error = np.linalg.norm(found - x)
    assert error == pytest.approx(2 * eps, rel=1e-4)
    delta = bounds.restricted_isometry_constant(frame, 2)
    bound = bounds.basis_pursuit_bound(delta, 1, noise_norm=eps)
    assert error < bound
    assert error > bound / 10


def test_lasso_bound_is_half_attained_on_an_orthonormal_design():
    """A^T A = m I makes the Lasso a soft threshold; the worst noise costs 1.5 lam per entry."""
    m, s, lam = 64, 5, 0.2
    a = np.linalg.qr(np.random.default_rng(0).normal(size=(m, 20)))[0] * math.sqrt(m)
    x = np.zeros(20)
    x[:s] = [3, -2, 4, -5, 2]
    noise = a @ (-lam / 2 * np.sign(x))  # A^T e / m = -lam / 2 on the support
    correlation = a.T @ noise / m
    assert 2 * np.abs(correlation).max() == pytest.approx(lam)
    z = a.T @ (a @ x + noise) / m
    found = np.sign(z) * np.maximum(np.abs(z) - lam, 0)
    bound = bounds.lasso_bound(lam, s, 1.0)
    error = np.linalg.norm(found - x)
    assert error == pytest.approx(1.5 * lam * math.sqrt(s), rel=1e-12)
    assert error <= bound.l2 == pytest.approx(3 * lam * math.sqrt(s))
    assert np.abs(found - x).sum() <= bound.l1
    assert error > bound.l2 * 1.4 / 3  # a constant of 1.4 instead of 3 would be violated


def test_lasso_bound_holds_on_correlated_designs():
    m, n, s, std = 120, 30, 3, 0.3
    rng = np.random.default_rng(3)
    for _ in range(4):
        a = rng.normal(size=(m, n)) + 0.5 * rng.normal(size=(m, 1))
        a *= math.sqrt(m) / np.linalg.norm(a, axis=0)
        x = np.zeros(n)
        x[rng.choice(n, s, replace=False)] = rng.choice([-2.0, 2.0], size=s)
        noise = std * rng.normal(size=m)
        lam = bounds.lasso_lam(std, m, n)
        assert lam >= 2 * np.abs(a.T @ noise / m).max()
        variable = cvxpy.Variable(n)
        objective = cvxpy.sum_squares(a @ variable - (a @ x + noise)) / (2 * m)
        cvxpy.Problem(cvxpy.Minimize(objective + lam * cvxpy.norm1(variable))).solve(
            solver="CLARABEL"
        )
        kappa = float(np.linalg.eigvalsh(a.T @ a / m)[0])
        bound = bounds.lasso_bound(lam, s, kappa)
        assert np.linalg.norm(variable.value - x) <= bound.l2
        assert np.abs(variable.value - x).sum() <= bound.l1


def test_weight_exceeds_the_noise_with_the_stated_probability():
    m, n, std, failure = 50, 40, 2.0, 0.2
    rng = np.random.default_rng(4)
    a = rng.normal(size=(m, n))
    a *= math.sqrt(m) / np.linalg.norm(a, axis=0)
    largest = np.abs(a.T @ (std * rng.normal(size=(m, 3000))) / m).max(axis=0)
    lam = bounds.lasso_lam(std, m, n, failure=failure)
    assert (2 * largest > lam).mean() <= failure
    assert (2 * largest > lam / 2).mean() > failure  # half of it would not do


@pytest.mark.parametrize("differenced", [True, False])
@pytest.mark.parametrize("activation", [0.0, 0.7, 5.0])
def test_readout_noise_agrees_with_simulation(activation, differenced):
    std, signal, size = 1e-4, -0.02, 60_000
    rng = np.random.default_rng(5)
    noise = std * rng.normal(size=(4, size))
    if not differenced:
        noise[[1, 3]] = 0
    ratio = (activation * signal + noise[0] - noise[1]) / (signal + noise[2] - noise[3])
    expected = bounds.readout_noise_std(std, activation, signal, differenced=differenced)
    # Relative error of a standard deviation 1 / sqrt(2 n), of the linearization (noise/signal)^2.
    tolerance = 4 / math.sqrt(2 * size) + 3 * 2 * (std / signal) ** 2
    assert ratio.std() == pytest.approx(expected, rel=tolerance)
    wrong = bounds.readout_noise_std(std, activation, signal, differenced=not differenced)
    assert ratio.std() != pytest.approx(wrong, rel=0.2)


def test_sparsest_consistent_vector_is_exact_without_noise(frame):
    """C0 and C1 multiply zeros: the bound promises exact recovery, a linear program delivers."""
    delta = bounds.restricted_isometry_constant(frame, 2)
    assert bounds.basis_pursuit_bound(delta, 1) == 0.0
    for column in range(0, 40, 7):
        solved = optimize.linprog(
            np.ones(80), A_eq=np.hstack([frame, -frame]), b_eq=frame[:, column], method="highs"
        )
        found = solved.x[:40] - solved.x[40:]
        assert np.abs(found - np.eye(40)[column]).max() < 1e-8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.basis_pursuit_bound(0.1, 0), "num_nonzero must be at least 1"),
        (lambda: bounds.basis_pursuit_bound(0.1, 1, noise_norm=-1.0), "noise_norm"),
        (lambda: bounds.restricted_isometry_constant(np.eye(3), 4), "between 1 and 3"),
        (lambda: bounds.restricted_isometry_constant(np.zeros(3), 1), "two-dimensional"),
        (lambda: bounds.restricted_isometry_constant(np.zeros((4, 90)), 6), "too many to list"),
        (lambda: bounds.lasso_bound(0.0, 1, 1.0), "lam must be positive"),
        (lambda: bounds.lasso_lam(1.0, 3, 3, failure=1.0), "failure"),
        (lambda: bounds.readout_noise_std(1.0, 1.0, 0.0), "an empty bin"),
        (lambda: bounds.readout_noise_std(1.0, math.nan, 1.0), "activation must be finite"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
