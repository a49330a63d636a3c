"""What changes only time and memory."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jgia import _checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceFlags:
    """What changes only time and memory. Answers agree to rounding."""

    microbatch: int | None = None
    """Candidates inverted, or restarts of a search advanced, at once; chosen from the image size
    and the device when left out."""

    driver: Literal["auto", "python", "scan"] = "auto"
    """Loop of a search: `python` calls a compiled step, `scan` compiles many; `auto` takes `python`
    on CPU, where XLA runs convolutions inside a loop slowly, and `scan` elsewhere."""

    dtype: Literal["float32", "float64"] = "float32"
    """Arithmetic of the inversion. `float64` needs JAX_ENABLE_X64=1."""

    def __post_init__(self) -> None:
        if self.microbatch is not None:
            _checks.at_least(1, microbatch=self.microbatch)
        _checks.one_of(("float32", "float64"), dtype=self.dtype)
        _checks.one_of(("auto", "python", "scan"), driver=self.driver)
