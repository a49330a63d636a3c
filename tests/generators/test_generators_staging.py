"""A generator can be entered at every block: both implementations."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.generators.biggan import BigGAN
from jgia.generators.protocol import GeneratorState, StagedGenerator


@pytest.fixture(scope="module", params=["stylegan2", "biggan"])
def case(request, tiny, filled, sides):
    """A generator, parameters, side inputs, what leaves each of its blocks, and the images."""
    labels = None
    if request.param == "stylegan2":
        generator, params = tiny(resolution=16)
    else:
        generator = BigGAN(
            multipliers=(2, 2, 1), base=8, attention=8, latent_dim=6, embedding_dim=4, num_classes=3
        )
        params = filled(jax.eval_shape(generator.init, jax.random.key(0)), scaled=True)
        labels = jnp.array([1, 2])
    side = sides(generator, params, 2, labels)
    return generator, params, side, *_whole(generator, params, side)


@functools.partial(jax.jit, static_argnums=0)
def _whole(generator, params, side):
    """What leaves blocks 0, 1, ..., each run from the very beginning; the images."""
    blocks = range(1, generator.num_blocks + 1)
    states = [generator.run(params, side, None, stop=stop) for stop in blocks]
    return states, generator.image(params, side, states[-1])


@functools.partial(jax.jit, static_argnums=0)
def _finished(generator, params, side, states):
    """Ends and images, from what entered blocks 1, 2, ..."""
    ends = [generator.run(params, side, state, start=k) for k, state in enumerate(states, 1)]
    return ends, [generator.image(params, side, end) for end in ends]


def _assert_close(tree, known):
    """To 1e-5 of the largest."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(known), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.abs(b).max()))


def test_both_satisfy_the_protocol(case):
    generator, *_, image = case
    assert isinstance(generator, StagedGenerator)
    assert hash(generator) == hash(type(generator)(**vars(generator)))
    assert image.shape == (2, generator.resolution, generator.resolution, generator.channels)
    assert float(np.std(image)) > 0.05


def test_entering_at_any_block_gives_the_same_image(case):
    generator, params, side, states, image = case
    ends, images = _finished(generator, params, side, states)
    assert len(images) == generator.num_blocks
    for end, other in zip(ends, images, strict=True):
        _assert_close(end, states[-1])
        _assert_close(other, image)
    # The check sees a wrong entrance: features of half the size.
    halves = [GeneratorState(s.features / 2, s.image) for s in states[:1]] + states[1:]
    with pytest.raises(AssertionError):
        _assert_close(_finished(generator, params, side, halves)[1][0], image)


def test_stopping_and_going_on_is_the_whole(case):
    generator, params, side, states, _ = case
    stops = range(2, generator.num_blocks + 1)

    @jax.jit
    def steps(states):
        return [
            generator.run(params, side, state, start=stop - 1, stop=stop)
            for state, stop in zip(states[:-1], stops, strict=True)
        ]

    _assert_close(steps(states), states[1:])


def test_nothing_below_the_entrance_is_computed(case):
    generator, params, side, states, _ = case
    k = generator.num_blocks - 1
    place = "synthesis" if "synthesis" in params else "blocks"

    def spoil(path, leaf):
        names = [entry.key for entry in path]
        below = names[0] in ("mapping", place) and not names[1].startswith(f"block{k}")
        return jnp.full_like(leaf, jnp.nan) if below else leaf

    spoiled = jax.tree_util.tree_map_with_path(spoil, params)
    end = jax.jit(lambda s: generator.run(spoiled, side, s, start=k))(states[k - 1])
    _assert_close(end, states[-1])
    first = jax.jit(lambda: generator.run(spoiled, side, None, stop=1))()
    assert bool(np.isnan(first.features).any())

    def equations(start):
        state = states[start - 1] if start else None
        return len(
            jax.make_jaxpr(lambda s: generator.run(params, side, s, start=start))(state).eqns
        )

    counts = [equations(start) for start in range(generator.num_blocks)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] / 2


def test_features_of_every_block_have_a_gradient(case):
    generator, params, side, states, _ = case

    @jax.jit
    @jax.grad
    def slopes(features):
        kept = [GeneratorState(h, s.image) for h, s in zip(features, states, strict=True)]
        images = inspect.unwrap(_finished)(generator, params, side, kept)[1]
        return jnp.stack([jnp.square(image).sum() for image in images]).sum()

    for slope in slopes([state.features for state in states])[:-1]:
        assert bool(np.isfinite(slope).all())
        assert float(np.abs(slope).max()) > 0


def test_entered_with_or_without_a_state(case):
    generator, params, side, states, _ = case
    with pytest.raises(ValueError, match="state=given"):
        generator.run(params, side, states[0])
    with pytest.raises(ValueError, match="state=None"):
        generator.run(params, side, None, start=1)
    with pytest.raises(ValueError, match=f"<= {generator.num_blocks} and stop >= 1"):
        generator.run(params, side, None, stop=generator.num_blocks + 1)
    with pytest.raises(ValueError, match="start=-1"):
        generator.run(params, side, states[0], start=-1)
    with pytest.raises(ValueError, match="stop=-1"):
        generator.run(params, side, None, stop=-1)
    with pytest.raises(ValueError, match="start=0, stop=0, state=None"):
        generator.run(params, side, None, stop=0)
    with pytest.raises(ValueError, match=f"start={generator.num_blocks + 1}"):
        generator.run(params, side, states[-1], start=generator.num_blocks + 1)
    assert generator.run(params, side, states[-1], start=generator.num_blocks) is states[-1]
    with pytest.raises(ValueError, match="start=2, stop=1"):
        generator.run(params, side, states[1], start=2, stop=1)
    assert generator.run(params, side, states[0], start=1, stop=1) is states[0]


def test_free_has_the_structure_of_side_inputs(case):
    generator, _, side, *_ = case
    for stage in range(generator.num_blocks):
        free = generator.free(side, stage)
        assert jax.tree.structure(free) == jax.tree.structure(side)
        assert all(isinstance(leaf, bool) for leaf in jax.tree.leaves(free))


# What StyleGAN2 alone has.


def test_an_image_that_was_dropped_is_missing_and_no_more(tiny, sides):
    generator, params = tiny(resolution=16)
    side = sides(generator, params)

    @jax.jit
    def images():
        state = generator.run(params, side, None, stop=2)
        begun = state.image, None, jnp.zeros_like(state.image)
        return [
            generator.run(params, side, GeneratorState(state.features, image), start=2).image
            for image in begun
        ]

    whole, dropped, zeros = images()
    np.testing.assert_allclose(dropped, zeros, rtol=0, atol=1e-6)
    assert float(np.abs(dropped - whole).max()) > 1e-3


@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_noise_maps_are_two_a_block_but_one_in_the_first(tiny, resolution):
    generator, _ = tiny(resolution=resolution)
    noise = jax.eval_shape(lambda: generator.draw_noise(jax.random.key(0), 3))
    assert len(noise) == 2 * generator.num_blocks - 1
    assert "4a" not in noise
    for name, leaf in noise.items():
        assert leaf.shape == (3, int(name[:-1]), int(name[:-1]), 1)


def test_later_stages_free_larger_noise_maps(tiny, sides):
    generator, params = tiny(resolution=32)
    side = sides(generator, params, 1)
    for stage, largest in ((0, 16), (1, 32), (3, 32)):
        free = generator.free(side, stage)
        assert free["styles"] is True
        assert {name for name, may in free["noise"].items() if may} == {
            name for name in side["noise"] if int(name[:-1]) <= largest
        }
