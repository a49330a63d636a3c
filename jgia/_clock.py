"""Wall time of stages, with XLA's compilation told apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax.monitoring

# Tracing is left out: nested traces report overlapping times.
_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class StageClock:
    """Adds up seconds per named stage, and seconds of compilation inside any stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.compile_s = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; its compilation is counted in ``compile_s``, not in the stage."""
        start, compiled = time.perf_counter(), 0.0

        def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
            del kwargs
            nonlocal compiled
            if event in _COMPILE_EVENTS:
                compiled += duration_secs

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
            elapsed = time.perf_counter() - start
            compiled = min(compiled, elapsed)
            self.compile_s += compiled
            self.stages[name] = self.stages.get(name, 0.0) + elapsed - compiled
