"""The two places where the supported JAX versions differ, and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def gpu_kernel(body: Callable[..., None], *, out: Any, **options: Any) -> Callable[..., Any]:
    """Call ``plgpu.kernel`` with the output type under the keyword that this JAX knows.

    Args:
      body: kernel body over input and output references.
      out: ``jax.ShapeDtypeStruct`` (or a tree of them) of the result.
      **options: handed to ``plgpu.kernel`` unchanged.
    """
    known = inspect.signature(plgpu.kernel).parameters
    return plgpu.kernel(
        body, **{"out_type" if "out_type" in known else "out_shape": out}, **options
    )


def gpu_interpret_params(**options: Any) -> Any:
    """Options that run a Mosaic GPU kernel on the CPU, e.g. ``detect_races=True``.

    The class is public from JAX 0.12 on and private before. It is used by tests only.
    """
    public = getattr(plgpu, "InterpretGPUParams", None)
    if public is None:
        from jax._src.pallas.mosaic_gpu.interpret import params

        public = params.InterpretGPUParams
    return public(**options)
