import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jgia.metrics import match

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")

METRICS = ["mse", "psnr"]
unit = st.floats(0, 1, width=32)
stacks = st.integers(0, 4).flatmap(
    lambda count: hnp.arrays(np.float64, (count, 2, 1, 1), elements=unit)
)
some = st.integers(1, 4).flatmap(
    lambda count: hnp.arrays(np.float64, (count, 2, 1, 1), elements=unit)
)


def costs(reconstructions, truths, metric):
    errors = np.mean((reconstructions[:, None] - truths[None]) ** 2, axis=(2, 3, 4))
    return errors if metric == "mse" else 10 * np.log10(np.maximum(errors, 1e-20))


def least_total(table):
    """By trying every assignment of min(J, N) pairs."""
    if table.shape[0] > table.shape[1]:
        table = table.T
    rows = range(table.shape[0])
    return min(
        sum(table[j, n] for j, n in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(table.shape[1]), table.shape[0])
    )


def flat(*levels):
    return np.array(levels, np.float64).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 1))


@pytest.mark.parametrize("metric", METRICS)
@given(reconstructions=stacks, truths=some)
def test_optimal_against_every_assignment(metric, reconstructions, truths):
    indices, cost = match(reconstructions, truths, metric=metric)
    table = costs(reconstructions, truths, metric)
    pairs = [(j, n) for n, j in enumerate(indices) if j >= 0]
    assert len(pairs) == min(len(reconstructions), len(truths))
    assert len({j for j, _ in pairs}) == len(pairs)
    total = sum(table[j, n] for j, n in pairs)
    np.testing.assert_allclose(total, least_total(table), rtol=1e-9, atol=1e-7)
    np.testing.assert_array_equal(np.isnan(cost), indices < 0)
    errors = costs(reconstructions, truths, "mse")
    np.testing.assert_allclose(
        [cost[n] for _, n in pairs], [errors[j, n] for j, n in pairs], rtol=1e-9, atol=1e-300
    )


def test_the_brute_force_rejects_a_greedy_assignment():
    """Greedy takes the closest pair first and pays for it: the oracle above can fail."""
    truths, reconstructions = flat(0.0, 0.4), flat(0.5, 0.9)
    table = costs(reconstructions, truths, "mse")
    greedy = table[0, 1] + table[1, 0]
    assert least_total(table) < greedy
    assert match(reconstructions, truths).truth_to_reconstruction.tolist() == [0, 1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_reconstructions", [2, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_equivariant_to_the_order_of_both(metric, num_reconstructions, seed):
    rng = np.random.default_rng(seed)
    truths = rng.random((5, 3, 3, 1))
    reconstructions = rng.random((num_reconstructions, 3, 3, 1))
    p, q = rng.permutation(5), rng.permutation(num_reconstructions)
    indices, cost = match(reconstructions, truths, metric=metric)
    moved, moved_cost = match(reconstructions[q], truths[p], metric=metric)
    np.testing.assert_array_equal(np.where(moved >= 0, q[moved], -1), indices[p])
    np.testing.assert_allclose(moved_cost, cost[p], rtol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_shuffled_copy_of_the_truth_is_undone(metric):
    rng = np.random.default_rng(0)
    truths, order = rng.random((12, 4, 4, 3)), rng.permutation(12)
    indices, cost = match(truths[order].astype(np.float32), truths.astype(np.float32))
    np.testing.assert_array_equal(order[indices], np.arange(12))
    assert np.all(cost == 0)


@pytest.mark.parametrize("metric", METRICS)
def test_no_reconstruction_leaves_all_unmatched(metric):
    indices, cost = match(np.zeros((0, 2, 2, 1)), flat(0.1, 0.2), metric=metric)
    assert indices.tolist() == [-1, -1]
    assert np.isnan(cost).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_reconstruction_is_never_chosen(metric, bad):
    reconstructions = flat(0.0, 0.9, 0.1)
    reconstructions[0, 0, 0, 0] = bad
    assert match(reconstructions, flat(0.0, 0.1), metric=metric)[0].tolist() in ([1, 2], [2, 1])
    indices, _ = match(reconstructions[[0, 1]], flat(0.0, 0.8), metric=metric)
    assert indices.tolist() == [-1, 1]  # the finite one goes where it fits, not the broken one
    assert match(reconstructions[:1], flat(0.0), metric=metric)[0].tolist() == [-1]


def test_a_sum_of_errors_can_trade_an_exact_hit_away_and_a_sum_of_decibels_does_not():
    truths, reconstructions = flat(0.4, 0.9), flat(0.4, 0.1)
    assert match(reconstructions, truths, metric="mse").truth_to_reconstruction.tolist() == [1, 0]
    assert match(reconstructions, truths, metric="psnr").truth_to_reconstruction.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_in_decibels_every_exact_hit_is_kept(seed):
    rng = np.random.default_rng(seed)
    truths = rng.random((6, 2, 2, 1))
    reconstructions = rng.random((7, 2, 2, 1))
    hits = rng.choice(6, size=3, replace=False)
    reconstructions[:3] = truths[hits]
    indices, cost = match(reconstructions, truths, metric="psnr")
    np.testing.assert_array_equal(indices[hits], [0, 1, 2])
    assert np.all(cost[hits] == 0)


def test_huge_reconstructions_do_not_break_the_solver():
    reconstructions = flat(1e200, 0.1, -1e180)
    assert match(reconstructions, flat(0.1)).truth_to_reconstruction.tolist() == [1]
    assert match(reconstructions[[0, 2]], flat(0.1, 0.2)).truth_to_reconstruction.min() >= 0


@pytest.mark.usefixtures("as_users_run")
def test_refusals():
    with pytest.raises(ValueError, match="at least one image"):
        match(flat(0.1), flat())
    with pytest.raises(ValueError, match="truths must be finite"):
        match(flat(0.1), flat(np.nan))
    with pytest.raises(ValueError, match="one shape"):
        match(np.zeros((1, 3, 3, 1)), flat(0.1))
    with pytest.raises(ValueError, match="metric must be one of 'mse', 'psnr'"):
        match(flat(0.1), flat(0.1), metric="ssim")  # pyright: ignore[reportArgumentType]
