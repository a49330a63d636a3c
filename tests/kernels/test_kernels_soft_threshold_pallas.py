"""Tiers 2 to 4: the Pallas kernels interpreted, lowered, and run where there is a device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.test_util import check_grads
from jgia_kernels._compat import gpu_interpret_params, gpu_kernel
from jgia_kernels.soft_threshold import soft_threshold
from jgia_kernels.soft_threshold.layout import fold
from jgia_kernels.soft_threshold.pallas_gpu import soft_threshold_gpu
from jgia_kernels.soft_threshold.pallas_tpu import soft_threshold_tpu
from jgia_kernels.soft_threshold.reference import shrink
from jgia_kernels.soft_threshold.rules import batched_as_one_call, differentiable
from jgia_kernels.soft_threshold.specs import BENCHMARK_SPECS, TEST_SPECS

_SPEC_IDS = [spec.name for spec in TEST_SPECS]
_SPECS = {spec.name: spec for spec in TEST_SPECS}
_DEVICES = {"cuda": "NVIDIA H200", "tpu": "TPU v5e"}
_CALLS = {"cuda": "mosaic_gpu_v2", "tpu": "tpu_custom_call"}
_NAMES = {"cuda": "jgia_soft_threshold_gpu", "tpu": "jgia_soft_threshold_tpu"}
_RACE = "RACE DETECTED"


@pytest.fixture(autouse=True)
def saw_race(capfd, caplog):
    """Fail on a data race, which JAX raises, logs or only prints, according to its version."""

    def saw() -> bool:
        found = _RACE in capfd.readouterr().out or _RACE in caplog.text
        caplog.clear()
        return found

    yield saw
    assert not saw()


def _interpreted(platform):
    """Return the bare kernel in interpret mode, with race detection on the GPU side."""
    if platform == "tpu":
        return jax.jit(functools.partial(soft_threshold_tpu, interpret=True))
    params = gpu_interpret_params(detect_races=True)
    return jax.jit(functools.partial(soft_threshold_gpu, interpret=params))


def _with_rules(platform):
    return differentiable(batched_as_one_call(_interpreted(platform)))


def _operands(spec, seed=0):
    key_x, key_lam = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(key_x, spec.x, jnp.float32)
    return x, jnp.abs(jax.random.normal(key_lam, spec.lam, jnp.float32))


_pallas = functools.partial(soft_threshold, implementation="pallas")


def _lowered(fn, *args, platform) -> str:
    structs = [jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args]
    return jax.jit(fn).trace(*structs).lower(lowering_platforms=(platform,)).as_text()


platforms = pytest.mark.parametrize("platform", ["cuda", "tpu"])


# Tier 2: interpret mode against the reference.


@platforms
@pytest.mark.parametrize("spec", TEST_SPECS, ids=_SPEC_IDS)
def test_interpreted_kernel_equals_reference(platform, spec):
    x, lam = _operands(spec)
    np.testing.assert_array_equal(_interpreted(platform)(x, lam), shrink(x, lam))


@platforms
def test_comparison_rejects_the_threshold_of_another_row(platform):
    x, lam = _operands(_SPECS["lam_per_long_row"])
    assert not np.array_equal(_interpreted(platform)(x, jnp.roll(lam, 1)), shrink(x, lam))


@platforms
def test_interpreted_kernel_propagates_nan(platform):
    x = jnp.array([np.nan, 2.0, 2.0, -np.inf, 0.5], jnp.float32)
    lam = jnp.array([1.0, np.nan, -1.0, 1.0, 1.0], jnp.float32)
    expected = np.array([np.nan, np.nan, np.nan, -np.inf, 0.0], np.float32)
    np.testing.assert_array_equal(_interpreted(platform)(x, lam), expected)


@pytest.mark.parametrize("block", [(8, 128), (16, 256)])
def test_tpu_grid_cuts_blocks_over_both_edges(monkeypatch, block):
    rows, cols = block
    monkeypatch.setattr("jgia_kernels.soft_threshold.pallas_tpu.BLOCK_ROWS", rows)
    monkeypatch.setattr("jgia_kernels.soft_threshold.pallas_tpu.BLOCK_COLS", cols)
    x = jax.random.normal(jax.random.key(0), (19, 384), jnp.float32)
    for shape in ((), (19, 1), (1, 384)):
        lam = jnp.linspace(0.1, 1.5, num=int(np.prod(shape)), dtype=jnp.float32).reshape(shape)
        np.testing.assert_array_equal(_interpreted("tpu")(x, lam), shrink(x, lam))


def test_race_detection_is_on(saw_race):
    def body(x_ref, y_ref):  # both threads of a block write the same entries
        y_ref[...] = x_ref[...]

    params = gpu_interpret_params(detect_races=True)
    if hasattr(params, "on_race"):  # an exception would leave the interpreter in an odd state
        params = dataclasses.replace(params, on_race="warn")
    x = jnp.zeros((128,), jnp.float32)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    racing = gpu_kernel(body, out=out, num_threads=2, thread_name="warpgroup", interpret=params)
    jax.block_until_ready(racing(x))
    assert saw_race()


_BATCHES = [((0, 0), ()), ((0, None), ()), ((None, 0), ()), ((0, 0), (3, 1)), ((0, None), (1, 7))]


def _assert_vmap_equals_loop(fn, axes, lam_shape):
    key_x, key_lam = jax.random.split(jax.random.key(1))
    x_shape = (3, 7) if axes[0] is None else (2, 3, 7)
    lam_shape = lam_shape if axes[1] is None else (2, *lam_shape)
    x = jax.random.normal(key_x, x_shape, jnp.float32)
    lam = jnp.abs(jax.random.normal(key_lam, lam_shape, jnp.float32))
    rows = [
        shrink(x if axes[0] is None else x[i], lam if axes[1] is None else lam[i]) for i in (0, 1)
    ]
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn, axes))(x, lam), np.stack(rows))


@pytest.mark.parametrize(("axes", "lam_shape"), _BATCHES)
def test_batching_rule_equals_loop(axes, lam_shape):
    _assert_vmap_equals_loop(batched_as_one_call(shrink), axes, lam_shape)


@platforms
def test_vmap_of_the_interpreted_kernel_equals_loop(platform):
    _assert_vmap_equals_loop(_with_rules(platform), (0, 0), (3, 1))


@platforms
def test_nested_vmap_is_one_kernel_call(platform):
    x, lam = jnp.ones((4, 5, 6), jnp.float32), jnp.full((4,), 0.5, jnp.float32)
    single = _lowered(_pallas, x[0, 0], lam[0], platform=platform)
    nested = _lowered(jax.vmap(jax.vmap(_pallas, (0, None))), x, lam, platform=platform)
    assert nested.count(f"@{_CALLS[platform]}") == single.count(f"@{_CALLS[platform]}") == 1


@platforms
def test_derivatives_of_the_interpreted_kernel(platform):
    x = jnp.array([[0.2, 0.8], [-0.3, -0.9], [0.1, 0.7]], jnp.float32)
    lam = jnp.full((3, 1), 0.5, jnp.float32)
    fn = jax.jit(_with_rules(platform))
    # Piecewise linear, so the step adds no truncation error, only eps_float32 / step.
    check_grads(fn, (x, lam), order=1, modes=("fwd", "rev"), eps=2e-2, rtol=1e-3, atol=1e-3)
    mine, theirs = (jax.jit(jax.jacfwd(f, (0, 1)))(x, lam) for f in (fn, soft_threshold))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    second = jax.hessian(lambda lam: (fn(x, lam) ** 2).sum())(lam)
    np.testing.assert_array_equal(second.reshape(3, 3), np.diag([2.0, 2.0, 2.0]))


# The layout that both kernels share.


@pytest.mark.parametrize("lanes", [4, 128])
@pytest.mark.parametrize("spec", TEST_SPECS, ids=_SPEC_IDS)
def test_fold_then_unfold_is_the_identity(spec, lanes):
    x, lam = _operands(spec)
    folded = fold(x, lam, lanes=lanes)
    rows, cols = folded.x.shape
    assert cols % lanes == 0
    assert folded.x.size < x.size + lanes * folded.rows
    assert folded.lam.shape in {(1, 1), (rows, 1), (rows, cols)}
    np.testing.assert_array_equal(folded.unfold(folded.x), x)
    spread = jnp.broadcast_to(folded.lam, folded.x.shape)
    np.testing.assert_array_equal(folded.unfold(spread), jnp.broadcast_to(lam, x.shape))


def test_fold_writes_no_large_threshold_for_long_rows():
    x, lam = _operands(_SPECS["lam_per_image"])
    assert fold(x, lam, lanes=1024).lam.shape == (3, 1)


# Tier 3: lowering for devices that are not here.


def _exported(fn, *args, platform) -> str:
    structs = [jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args]
    device = AbstractDevice(device_kind=_DEVICES[platform], num_cores=1, platform=platform)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(fn), platforms=[platform], disabled_checks=checks)
        return exported(*structs).mlir_module()


@platforms
@pytest.mark.parametrize("name", ["ragged_vector", "lam_per_long_row", "lam_per_entry"])
def test_export_contains_the_kernel(platform, name):
    module = _exported(_pallas, *_operands(_SPECS[name]), platform=platform)
    assert _CALLS[platform] in module
    assert _NAMES[platform] in module


@platforms
def test_gradient_contains_the_kernel(platform):
    gradient = jax.grad(lambda x, lam: _pallas(x, lam).sum())
    lowered = _lowered(gradient, *_operands(_SPECS["lam_per_code"]), platform=platform)
    assert _CALLS[platform] in lowered


@platforms
@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_other_implementations_contain_no_kernel(platform, implementation):
    fn = functools.partial(soft_threshold, implementation=implementation)
    assert "custom_call" not in _exported(fn, *_operands(_SPECS["lam_per_code"]), platform=platform)


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_other_platforms_take_the_reference(platform):
    x, lam = _operands(_SPECS["lam_per_code"])
    assert "custom_call" not in _lowered(_pallas, x, lam, platform=platform)


# Tier 4: numerics on a device.


def _require_hopper() -> None:
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU")
    major = str(getattr(device, "compute_capability", "")).split(".")[0]
    if not major.isdigit() or int(major) < 9:
        pytest.skip("Mosaic GPU needs CUDA compute capability 9.0 or later")


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*TEST_SPECS, *BENCHMARK_SPECS], ids=lambda spec: spec.name)
def test_kernel_on_a_device_equals_reference(spec):
    _require_hopper()
    x, lam = _operands(spec)
    np.testing.assert_array_equal(jax.jit(_pallas)(x, lam), jax.jit(shrink)(x, lam))


@pytest.mark.gpu
def test_special_values_and_derivatives_on_a_device():
    _require_hopper()
    x = jnp.array([np.nan, 2.0, 2.0, -np.inf, 0.5, 1.0], jnp.float32)
    lam = jnp.array([1.0, np.nan, -1.0, 1.0, 1.0, 1.0], jnp.float32)
    np.testing.assert_array_equal(_pallas(x, lam), soft_threshold(x, lam))
    mine, theirs = (
        jax.grad(lambda x, lam, fn=fn: fn(x, lam).sum(), (0, 1))(x, lam)
        for fn in (_pallas, soft_threshold)
    )
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
