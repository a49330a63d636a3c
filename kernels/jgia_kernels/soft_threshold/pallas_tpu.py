"""Soft-thresholding in Pallas for TPU."""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl

from jgia_kernels.soft_threshold.layout import fold
from jgia_kernels.soft_threshold.reference import shrink

KERNEL_NAME = "jgia_soft_threshold_tpu"
LANES = 128
BLOCK_ROWS = 512
BLOCK_COLS = 1024


def soft_threshold_tpu(x: jax.Array, lam: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Shrink ``x`` by ``lam`` block by block; blocks over the edge are cut by the grid.

    Args:
      x: float32, any shape with at least one entry.
      lam: float32, shape ``()`` or of ``x``'s rank and broadcastable to it.
      interpret: run on the CPU, for tests.

    Returns:
      An array like ``x``. It has no derivative rule of its own; the public function adds it.
    """
    folded = fold(x, lam, lanes=LANES)
    block = tuple(map(min, folded.x.shape, (BLOCK_ROWS, BLOCK_COLS)))
    lam_varies = tuple(size > 1 for size in folded.lam.shape)
    lam_block = tuple(b if v else 1 for b, v in zip(block, lam_varies, strict=True))

    def lam_index(i, j):
        return (i if lam_varies[0] else 0, j if lam_varies[1] else 0)

    def body(x_ref, lam_ref, y_ref):
        y_ref[...] = shrink(x_ref[...], lam_ref[...])

    tile = pl.BlockSpec(block, lambda i, j: (i, j))
    y = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(folded.x.shape, folded.x.dtype),
        grid=tuple(map(pl.cdiv, folded.x.shape, block)),
        in_specs=[tile, pl.BlockSpec(lam_block, lam_index)],
        out_specs=tile,
        interpret=interpret,
        name=KERNEL_NAME,
    )(folded.x, folded.lam)
    return folded.unfold(y)
