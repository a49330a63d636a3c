"""Every kernel of ``jgia_kernels``, with what the contract test needs to know about it.

A folder in ``kernels/jgia_kernels`` without a case here fails the contract test.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jgia_kernels.soft_threshold import soft_threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel.

    Attributes:
      folder: its folder in ``jgia_kernels``.
      function: the public function; takes the operands and ``implementation=``.
      operands: from a key to float32 operands, where the function is differentiable.
      oracle: the same function in NumPy, on float64.
      kernel_names: the name that each platform's lowered module must contain.
    """

    folder: str
    function: Callable[..., jax.Array]
    operands: Callable[[jax.Array], tuple[jax.Array, ...]]
    oracle: Callable[..., np.ndarray]
    kernel_names: Mapping[str, str]


def _soft_threshold_operands(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    key_x, key_lam = jax.random.split(key)
    x = jax.random.normal(key_x, (5, 37), jnp.float32)
    return x, jax.random.uniform(key_lam, (5, 1), jnp.float32, 0.1, 0.9)


def _soft_threshold_oracle(x: Any, lam: Any) -> np.ndarray:
    return np.sign(x) * np.maximum(np.abs(x) - lam, 0.0)


CASES = (
    KernelCase(
        folder="soft_threshold",
        function=soft_threshold,
        operands=_soft_threshold_operands,
        oracle=_soft_threshold_oracle,
        kernel_names={"cuda": "jgia_soft_threshold_gpu", "tpu": "jgia_soft_threshold_tpu"},
    ),
)
