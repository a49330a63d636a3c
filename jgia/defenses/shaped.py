r"""Noise in the directions in which an update reveals its input, and in no others.

Isotropic noise spends most of its energy where the update carries nothing: a gradient of p
entries varies with d pixels in d directions. Noise ``n = J xi`` with ``xi ~ N(0, Xi)`` in input
space lies in those alone, costs one forward-mode derivative, and to first order is the update of
a perturbed input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jgia import _checks
from jgia.defenses import _adaptive
from jgia.defenses._tree import leaf_keys, wide_dtype
from jgia.risk.shaping import Shape, covariance_factor, shaped_covariance

PyTree = Any


class ShapedNoise(NamedTuple):
    """Noise and the covariance that it declares, ``J F F^T J^T + floor_std^2 I``.

    Attributes:
      noise: to be added to ``fn(x)``, whose structure it has.
      factor: F, (d, k), the factor of the covariance in input space.
      floor_std: standard deviation of the isotropic part on every entry.
      energy: ``tr(K F F^T)`` of the Gram matrix that was given, the expected squared norm of the
        shaped part when that is the release's own.
    """

    noise: PyTree
    factor: Float[Array, "d k"]
    floor_std: Float[Array, ""]
    energy: Float[Array, ""]


class ShapedNoiseState(NamedTuple):
    """State of :func:`shaped_noise_transformation`.

    Attributes:
      key: for the next update.
      noise_std: root mean square over the entries of the standard deviation of what the last
        update received, 0 before any; as declared by the Gram matrix that was given.
      floor_std: its isotropic part.
      energy: as in :class:`ShapedNoise`.
    """

    key: PRNGKeyArray
    noise_std: Float[Array, ""]
    floor_std: Float[Array, ""]
    energy: Float[Array, ""]


def shaped_noise(
    key: PRNGKeyArray,
    fn: Callable[[Array], PyTree],
    x: Float[Array, "*shape"],
    covariance_factor: Float[Array, "d k"],
    *,
    gram: Float[Array, "d d"],
    floor: float = 1.0,
) -> ShapedNoise:
    r"""Noise ``J(x) F z + floor_std z'`` for the release ``fn(x)``, by one Jacobian-vector product.

    ``z ~ N(0, I_k)``, ``z' ~ N(0, I_p)`` and ``floor_std^2 = floor tr(K F F^T) / p``.

    Args:
      key: random key.
      fn: the release as a function of the input; a tree of floating-point arrays, p entries.
      x: input, of any shape with d entries.
      covariance_factor: F, with ``F F^T`` the covariance Xi in input space
        (:func:`jgia.risk.shaping.covariance_factor`), or any (d, k) factor.
      gram: ``K = J^T J``, own or of public examples; it sizes the floor.
      floor: energy of the isotropic part over that of the shaped part, >= 0.

    Returns:
      :class:`ShapedNoise`.

    Raises:
      ValueError: shapes do not fit, ``gram`` is not positive semidefinite, an entry is not
        finite, or ``floor`` is negative; nothing was computed.

    Guarantees:
      Given ``x``, the noise is Gaussian of mean 0 and covariance ``J F F^T J^T + floor_std^2 I``.
      The p by d Jacobian is never formed. jit, vmap and derivatives pass through ``fn`` twice.

    Edge cases:
      - **Singular noise is breakable**: with ``floor=0`` the noise leaves p - d coordinates of the
        release untouched, and through the curvature of ``fn`` those give x away. An attacker who
        knows the covariance came to 0.1-0.3% of the predicted error on a curved release of 24
        numbers about 4 (``floor=1e-6``), to 36-56% of it with ``floor=0.1``, and to 77-92% with the
        default, which doubles the energy. Only a test with such an attacker shows what is left.
      - **No differential privacy.** The covariance depends on the private input through J in any
        case, and through F when F was made from the private Gram matrix: it is itself
        information. Use a public Gram matrix for F, and :func:`input_noise` where nothing but
        the noisy input may enter.
      - The prediction is linearized, of a smooth ``fn`` and noise small against its curvature.

    >>> fn = lambda x: {"w": jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]) @ x}
    >>> gram = jnp.array([[5.0, 1.0], [1.0, 2.0]])
    >>> made = shaped_noise(jax.random.key(0), fn, jnp.zeros(2), 0.1 * jnp.eye(2), gram=gram)
    >>> made.noise["w"].shape, round(float(made.energy), 4), round(float(made.floor_std), 4)
    ((3,), 0.07, 0.1528)

    References:
      Derived here (:func:`jgia.risk.shaping.shaped_covariance`).
    """
    x = _adaptive.check_input(x)
    _checks.non_negative(floor=floor)
    _adaptive.check_factor(covariance_factor, x.size)
    _adaptive.check_gram(gram, x.size, "gram")
    return _drawn(key, fn, x, jnp.asarray(covariance_factor), jnp.asarray(gram), floor)


def shaped_noise_transformation(
    key: PRNGKeyArray,
    fn: Callable[[Array], PyTree],
    x: Float[Array, "*shape"],
    *,
    prior: Float[Array, ""] | Float[Array, "d d"] | float,
    target: Float[Array, ""] | float,
    gram: Float[Array, "d d"] | None = None,
    public_gram: Float[Array, "d d"] | None = None,
    shape: Shape = "water_filling",
    floor: float = 1.0,
    ridge: float = 1e-3,
    num_releases: int = 1,
) -> optax.GradientTransformation:
    r"""Shaped noise on an update, sized so that the best attack has a target error.

    Args:
      key: random key; kept in the state, which carries a new one after every update.
      fn: the update as a function of the private input.
      x: the private input; stays in the closure of the transformation.
      prior: variance or covariance S that the attacker knows of the input.
      target: error to leave, in (0, tr S), summed over coordinates.
      gram: ``K = J^T J`` at ``x``; or
      public_gram: that of public examples, averaged. Exactly one of the two.
      shape: of the covariance, :func:`jgia.risk.shaping.shaped_covariance`, without ``"protect"``.
      floor: as in :func:`shaped_noise`.
      ridge: lifts ``public_gram`` by this multiple of its mean eigenvalue, so that directions which
        the public examples do not show, but the private one may, get noise. Not used with
        ``gram``.
      num_releases: T >= 1 updates of the same input, each with its own noise, which an attacker may
        average: multiplies Xi by T.

    Returns:
      A gradient transformation whose state is :class:`ShapedNoiseState`.

    Raises:
      ValueError: as :func:`shaped_noise`; the target is out of range; neither or both Gram
        matrices are given; or an update does not have the structure of ``fn(x)``.

    Guarantees:
      With ``gram``, the linearized error is at least ``target`` (the floor adds to it). With
      ``public_gram`` too, whatever J is: for a positive definite Xi it depends on Xi and S alone
      where J has full rank, and directions that J does not see add to it. What the public matrix
      decides is the energy.

    Edge cases:
      As :func:`shaped_noise`. ``public_gram`` makes Xi and the floor public; ``J Xi J^T`` still
      depends on x.

    >>> fn = lambda x: {"w": jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]) @ x}
    >>> gram = jnp.array([[5.0, 1.0], [1.0, 2.0]])
    >>> noise = shaped_noise_transformation(
    ...     jax.random.key(0), fn, jnp.zeros(2), prior=0.1, target=0.1, gram=gram
    ... )
    >>> update = fn(jnp.zeros(2))
    >>> shared, state = noise.update(update, noise.init(update))
    >>> shared["w"].shape, float(state.noise_std) > float(state.floor_std) > 0
    ((3,), True)
    """
    x = _adaptive.check_input(x)
    _checks.non_negative(floor=floor, ridge=ridge)
    _checks.at_least(1, num_releases=num_releases)
    _checks.one_of(("water_filling", "uniform", "maxmin"), shape=shape)
    if (gram is None) == (public_gram is None):
        raise ValueError(
            f"pass gram or public_gram, got {'both' if gram is not None else 'neither'}; the name "
            "says whether the covariance is made from private data."
        )
    chosen = gram if gram is not None else public_gram
    _adaptive.check_gram(chosen, x.size, "gram" if public_gram is None else "public_gram")
    _adaptive.check_target(target, prior, x.size)
    chosen = jnp.asarray(chosen)
    covariance = shaped_covariance(
        chosen, prior, target, shape=shape, ridge=0.0 if public_gram is None else ridge
    )
    factor = covariance_factor(num_releases * covariance)
    _adaptive.check_factor(factor, x.size)

    def init(params: PyTree) -> ShapedNoiseState:
        zero = jnp.zeros((), wide_dtype(params))
        return ShapedNoiseState(jax.random.clone(key), zero, zero, zero)

    def update(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, ShapedNoiseState]:
        del params
        dtype = wide_dtype(updates)
        _check_structure(updates, jax.eval_shape(fn, x))
        next_key, draw = jax.random.split(state.key)
        made = _drawn(draw, fn, x, factor, chosen, floor)
        size = sum(leaf.size for leaf in jax.tree.leaves(updates))
        mean = made.energy / size + jnp.square(made.floor_std)
        return jax.tree.map(jnp.add, updates, made.noise), ShapedNoiseState(
            next_key,
            jnp.sqrt(mean).astype(dtype),
            made.floor_std.astype(dtype),
            made.energy.astype(dtype),
        )

    return optax.GradientTransformation(init, update)


def input_noise(
    key: PRNGKeyArray,
    fn: Callable[[Array], PyTree],
    x: Float[Array, "*shape"],
    covariance_factor: Float[Array, "d k"],
) -> PyTree:
    r"""The release of a noisy input: ``fn(x + F z)`` with ``z ~ N(0, I_k)``.

    Args:
      key: random key.
      fn: the release as a function of the input.
      x: input, of any shape with d entries.
      covariance_factor: F, (d, k), best independent of x.

    Returns:
      ``fn`` at the moved input.

    Raises:
      ValueError: shapes do not fit or an entry is not finite.

    Guarantees:
      Whatever ``fn`` is, the release is computed from ``x + F z`` alone. If F does not depend on x,
      no attack on it does better than the best attack on ``x + F z`` itself: for a Gaussian prior S
      an error of ``tr S - tr(S (S + F F^T)^{-1} S)``, without linearization and without a floor.

    Edge cases:
      A covariance that is singular protects nothing in its null space, also where the Jacobian at x
      is zero: use ``shape="uniform"`` or a ``ridge``. Pixels may leave [0, 1]; they are not
      clipped, which would do no harm to the guarantee. The update is biased by the curvature of
      ``fn``, in proportion to the variance. **Not differential privacy** as such: it would be, in
      the sense of the Gaussian mechanism on pixels, with the noise that takes. An F made from
      private data carries information of its own and voids the guarantee.

    >>> fn = lambda x: {"w": x**2}
    >>> input_noise(jax.random.key(0), fn, jnp.ones(2), jnp.zeros((2, 1)))["w"].tolist()
    [1.0, 1.0]

    References:
      The data-processing argument; Cover and Thomas, "Elements of Information Theory" (2006),
      section 2.8.
    """
    x = _adaptive.check_input(x)
    _adaptive.check_factor(covariance_factor, x.size)
    return fn(x + _moved(key, x, jnp.asarray(covariance_factor)))


def _moved(key: PRNGKeyArray, x: Array, factor: Array) -> Array:
    draw = jax.random.normal(key, (factor.shape[1],), factor.dtype)
    return (factor @ draw).astype(x.dtype).reshape(x.shape)


def _drawn(
    key: PRNGKeyArray,
    fn: Callable[[Array], PyTree],
    x: Array,
    factor: Array,
    gram: Array,
    floor: float,
) -> ShapedNoise:
    key_shape, key_floor = jax.random.split(key)
    shaped = jax.jvp(fn, (x,), (_moved(key_shape, x, factor),))[1]
    dtype = wide_dtype(shaped)
    size = sum(leaf.size for leaf in jax.tree.leaves(shaped))
    factor_wide, gram_wide = factor.astype(dtype), gram.astype(dtype)
    energy = jnp.maximum(jnp.sum(factor_wide * (gram_wide @ factor_wide)), 0)
    std = jnp.sqrt(floor * energy / size)

    def noisy(leaf: Array, leaf_key: PRNGKeyArray) -> Array:
        draw = jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
        return leaf + std.astype(leaf.dtype) * draw

    noise = jax.tree.map(noisy, shaped, leaf_keys(key_floor, shaped))
    return ShapedNoise(noise, factor, std, energy)


def _check_structure(updates: PyTree, expected: PyTree) -> None:
    def shapes(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.shape(leaf), tree)

    same = jax.tree.structure(updates) == jax.tree.structure(expected)
    if not same or shapes(updates) != shapes(expected):
        raise ValueError(
            "the update must have the structure and shapes of fn(x), got "
            f"{shapes(updates)} instead of {shapes(expected)}; pass the function that made it."
        )
