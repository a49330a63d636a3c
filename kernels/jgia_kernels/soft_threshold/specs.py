"""Named shapes of soft-thresholding: what the tests check and the benchmark times."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shapes of one call.

    Attributes:
      name: short, unique.
      x: shape of the operand.
      lam: shape of the threshold.
    """

    name: str
    x: tuple[int, ...]
    lam: tuple[int, ...] = ()


TEST_SPECS = (
    Spec(name="scalar", x=()),
    Spec(name="one_tile", x=(1024,)),
    Spec(name="ragged_vector", x=(1337,)),
    Spec(name="shorter_than_a_lane", x=(13, 5)),
    Spec(name="lam_per_code", x=(13, 40), lam=(13, 1)),
    Spec(name="lam_per_long_row", x=(4, 1100), lam=(4, 1)),  # rows and tiles share a factor
    Spec(name="lam_per_image", x=(3, 19, 20, 3), lam=(3, 1, 1, 1)),
    Spec(name="lam_per_middle_axis", x=(2, 3, 1100), lam=(1, 3, 1)),
    Spec(name="lam_per_coefficient", x=(13, 40), lam=(1, 40)),
    Spec(name="lam_per_entry", x=(2, 700), lam=(2, 700)),
)
"""Small enough for interpret mode; every layout of the kernels and ragged edges of each."""

BENCHMARK_SPECS = (
    Spec(name="code_batch", x=(64, 4096), lam=(64, 1)),
    Spec(name="cifar_batch", x=(256, 32, 32, 3)),
    Spec(name="imagenet_batch", x=(64, 224, 224, 3), lam=(64, 1, 1, 1)),
    Spec(name="imagenet_ragged", x=(63, 223, 223, 3)),
    Spec(name="vector_32m", x=(1 << 25,)),
)
"""From launch-bound to bandwidth-bound; one whose size is no multiple of a tile."""

SMOKE_SPECS = (
    Spec(name="small_codes", x=(8, 2048), lam=(8, 1)),
    Spec(name="small_ragged", x=(1337,)),
)
"""Seconds on any machine, so that continuous integration can run the benchmark."""
