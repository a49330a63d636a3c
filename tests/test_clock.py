"""Time of stages, with compilation told apart."""

import time

import jax
import jax.numpy as jnp
import pytest

from jgia._clock import StageClock


def test_stages_add_up():
    clock = StageClock()
    for _ in range(2):
        with clock.stage("a"):
            time.sleep(0.02)
    with clock.stage("b"):
        pass
    assert 0.04 <= clock.stages["a"] < 2
    assert 0 <= clock.stages["b"] < 0.5
    assert clock.compile_s == 0


def test_compilation_is_counted_apart():
    clock = StageClock()

    @jax.jit
    def slow_to_compile(x):
        for i in range(40):
            x = jnp.sin(x) * jnp.cumsum(x)[None, -1] + i
        return x

    start = time.perf_counter()
    with clock.stage("first"):
        slow_to_compile(jnp.ones(8)).block_until_ready()
    elapsed = time.perf_counter() - start
    compiled = clock.compile_s
    assert compiled > 0
    assert clock.stages["first"] >= 0
    assert compiled + clock.stages["first"] <= elapsed + 1e-3
    with clock.stage("second"):
        slow_to_compile(jnp.ones(8)).block_until_ready()
    assert clock.compile_s - compiled < 0.2 * compiled


def test_a_stage_that_fails_is_counted_and_stops_listening():
    clock = StageClock()
    with pytest.raises(RuntimeError, match="stop"), clock.stage("broken"):
        raise RuntimeError("stop")
    assert "broken" in clock.stages
    before = clock.compile_s
    jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(3)).block_until_ready()
    assert clock.compile_s == before
