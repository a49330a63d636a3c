"""A step of adversarial training that is divided among devices does what one device does."""

import os
import subprocess
import sys
import textwrap

import pytest

_TWO_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from jgia.config.prior import PriorOptions
    from jgia.generators.steps import make_networks, train_step

    assert jax.local_device_count() == 2
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sizes = dict(resolution=8, base=64, max_features=8, latent_dim=8, style_dim=8)
    options = PriorOptions(**sizes, mapping_layers=1, prior_batch=8)
    networks = make_networks(options, channels=3, num_classes=1, accelerated=False)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype("uint8")
    state = jax.device_get(jax.jit(networks.init)(jax.random.key(0)))
    found = []
    for where in (None, mesh):
        arrays = (state, images, np.zeros(12, np.int32))
        if where is not None:
            arrays = jax.device_put(arrays, NamedSharding(where, PartitionSpec()))
        arrays = jax.tree.map(jnp.asarray, arrays)
        new, info = train_step(
            networks, *arrays, jax.random.key(1), mesh=where, r1=True, path_length=False
        )
        found.append(jax.device_get((new.discriminator_optimizer[0].nu, info)))
    (one, info), (two, other) = found
    # Sizes of gradients: rounding goes with the terms of a sum, which cancel in some biases.
    one, two = (jax.tree.leaves(jax.tree.map(np.sqrt, nu)) for nu in (one, two))
    largest = max(leaf.max() for leaf in one)
    for a, b in zip(one, two):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    for name in ("discriminator_loss", "r1", "sign"):
        np.testing.assert_allclose(getattr(info, name), getattr(other, name), rtol=1e-5)
    # After a step of Adam of fixed length, whose sign is anybody's where a gradient is rounding.
    np.testing.assert_allclose(info.generator_loss, other.generator_loss, rtol=1e-3)
    print("equal")
"""


@pytest.mark.slow
def test_two_devices_do_what_one_does():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_TWO_DEVICES)],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.stdout.strip() == "equal", result.stderr[-2000:]
