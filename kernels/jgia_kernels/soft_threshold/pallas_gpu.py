"""Soft-thresholding in Mosaic GPU, for CUDA devices of compute capability 9.0 and later."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jgia_kernels._compat import gpu_kernel
from jgia_kernels.soft_threshold.layout import fold
from jgia_kernels.soft_threshold.reference import shrink

KERNEL_NAME = "jgia_soft_threshold_gpu"
TILE = 1024
"""Entries per block: one warpgroup of 128 threads, eight float32 (32 bytes) for each."""


def soft_threshold_gpu(x: jax.Array, lam: jax.Array, *, interpret: Any = None) -> jax.Array:
    """Shrink ``x`` by ``lam`` with one block per tile, from global memory to registers and back.

    Args:
      x: float32, any shape with at least one entry.
      lam: float32, shape ``()`` or of ``x``'s rank and broadcastable to it.
      interpret: ``None`` for a device, or the result of ``gpu_interpret_params`` on a CPU.

    Returns:
      An array like ``x``. It has no derivative rule of its own; the public function adds it.
    """
    folded = fold(x, lam, lanes=TILE)
    num_rows, num_cols = folded.x.shape
    tiles_per_row = num_cols // TILE
    lam_rows, lam_cols = folded.lam.shape

    def body(x_ref, lam_ref, y_ref):
        tile = lax.axis_index("tile")
        row = tile // tiles_per_row
        cols = pl.ds((tile % tiles_per_row) * TILE, TILE)
        x_tile = x_ref[row, cols]
        if lam_cols == 1:
            lam_tile = jnp.full_like(x_tile, lam_ref[row if lam_rows > 1 else 0, 0])
        else:
            lam_tile = lam_ref[row, cols]
        y_ref[row, cols] = shrink(x_tile, lam_tile)

    kernel = gpu_kernel(
        body,
        out=jax.ShapeDtypeStruct(folded.x.shape, folded.x.dtype),
        grid=(num_rows * tiles_per_row,),
        grid_names=("tile",),
        interpret=interpret,
        kernel_name=KERNEL_NAME,
    )
    return folded.unfold(kernel(folded.x, folded.lam))
