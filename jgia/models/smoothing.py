"""Rectifiers and maxima of a model without their kinks, for searches that differentiate twice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import Array


def smooth_activations(width: float | Array) -> contextlib.AbstractContextManager[None]:
    r"""Inside it a flax model's ReLUs and maximum poolings are smooth functions.

    The gradient of a network with ReLU jumps where a neuron turns on: a search that follows
    derivatives does not see the jump. ``relu(u)`` becomes ``w log(1 + exp(u / w))`` and ``max(u)``
    becomes ``w log sum exp(u / w)``, with ``w`` the given width times the root mean square of the
    array. At width 0 both are computed exactly.

    Args:
      width: >= 0; may be traced, so that one compilation serves a whole continuation.

    Edge cases:
      Only what ``jax.nn.relu`` and ``max`` over axes compute inside the model's own ``__call__`` is
      seen; loops and other activations are left as they are.

    >>> with smooth_activations(0.1):
    ...     y = nn.Dense(2).apply({"params": params}, x)  # doctest: +SKIP
    """
    return nn.intercept_methods(functools.partial(_intercept, width))


def _intercept(
    width: float | Array,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    if context.module.path or context.method_name != "__call__" or kwargs:
        return method(*args, **kwargs)
    closed, shape = jax.make_jaxpr(method, return_shape=True)(*args)
    leaves = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), width)
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def _evaluate(jaxpr: Any, consts: Any, args: Any, width: float | Array) -> list[Any]:
    """The equations one by one, with the kinks replaced."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def read(variable: Any) -> Any:
        literal = isinstance(variable, jex.core.Literal)
        return variable.val if literal else values[variable]  # pyright: ignore[reportAttributeAccessIssue]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        name = equation.primitive.name
        if name in ("pjit", "jit"):
            inner = equation.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, width)
        else:
            parameters = equation.primitive.get_bind_params(equation.params)
            found = equation.primitive.bind(*inputs, **parameters)
            outputs = found if equation.primitive.multiple_results else [found]
            if name == "custom_jvp_call" and _is_relu(equation.params["call_jaxpr"]):
                outputs = [_relu(inputs[0], outputs[0], width)]
            elif name == "reduce_max":
                outputs = [_maximum(inputs[0], outputs[0], equation.params["axes"], width)]
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _is_relu(closed: Any) -> bool:
    equations = closed.jaxpr.eqns
    return len(equations) == 1 and equations[0].params.get("name") == "relu"


def _scale(u: Array, width: float | Array) -> Array:
    """The width in units of u, 1 where it is 0."""
    size = jnp.sqrt(jnp.mean(u**2) + jnp.finfo(u.dtype).tiny)
    scaled = jnp.asarray(width, u.dtype) * size
    return jnp.where(scaled > 0, scaled, 1)


def _relu(u: Array, exact: Array, width: float | Array) -> Array:
    w = _scale(u, width)
    return jnp.where(jnp.asarray(width) > 0, w * jax.nn.softplus(u / w), exact)


def _maximum(u: Array, exact: Array, axes: tuple[int, ...], width: float | Array) -> Array:
    w = _scale(u, width)
    return jnp.where(jnp.asarray(width) > 0, w * jax.nn.logsumexp(u / w, axis=axes), exact)
