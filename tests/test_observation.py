import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.models import flatten_params, make_victim
from jgia.observation import Observation, Reconstruction, Status, ThreatModel, Truth, restrict

VICTIM = make_victim("mlp", input_shape=(2, 2, 1), num_classes=3, widths=(5,))


def _arrays(dtype=np.float32):
    shapes = flatten_params(VICTIM.param_shapes())
    return {
        name: np.arange(np.prod(leaf.shape), dtype=dtype).reshape(leaf.shape)
        for name, leaf in shapes.items()
    }


def _params():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), VICTIM.param_shapes())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"server": "evil"}, "server must be one of 'malicious'"),
        ({"protocol": "fedprox"}, "protocol must be one of"),
        ({"local_steps": 2}, "use protocol='fedavg'"),
        ({"protocol": "fedavg", "local_steps": 0}, "local_steps must be at least 1"),
        ({"local_learning_rate": 0.0}, "local_learning_rate must be positive"),
        ({"local_learning_rate": float("nan")}, "local_learning_rate must be positive"),
        ({"num_examples": 0}, "num_examples must be at least 1"),
        ({"num_clients": 0}, "num_clients must be at least 1"),
        ({"visible_layers": ()}, "at least one"),
        ({"visible_layers": ("fc", "fc")}, "each layer once"),
    ],
)
def test_threat_model_rejects(fields, message):
    if "server" in fields or fields.get("protocol") == "fedprox":
        # The type checker of the tests refuses the word first; take it past the annotation.
        model = object.__new__(ThreatModel)
        for field in dataclasses.fields(ThreatModel):
            object.__setattr__(model, field.name, fields.get(field.name, field.default))
        with pytest.raises(ValueError, match=message):
            model.__post_init__()
        return
    with pytest.raises(ValueError, match=message):
        ThreatModel(**fields)


def test_threat_model_is_plain_hashable_data():
    model = ThreatModel(protocol="fedavg", local_steps=3, local_learning_rate=0.1, num_examples=4)
    assert hash(model) == hash(dataclasses.replace(model))
    assert model != dataclasses.replace(model, num_examples=5)
    assert ThreatModel(**json.loads(json.dumps(dataclasses.asdict(model)))) == model


def test_from_arrays_keeps_every_entry():
    arrays, params = _arrays(), _params()
    observation = Observation.from_arrays(arrays, victim=VICTIM, params=params)
    assert jax.tree.structure(observation.update) == jax.tree.structure(params)
    for name, value in flatten_params(observation.update).items():
        np.testing.assert_array_equal(value, arrays[name])
    assert observation.threat_model == ThreatModel()
    told = ThreatModel(num_examples=7)
    again = Observation.from_arrays(arrays, victim=VICTIM, params=params, threat_model=told)
    assert again.threat_model is told


def _without(arrays):
    del arrays["fc1/bias"]


def _with_extra(arrays):
    arrays["evil\n\x1b[2J/kernel"] = np.zeros(1, np.float32)


def _transposed(arrays):
    arrays["fc1/kernel"] = arrays["fc1/kernel"].T


def _reshaped(arrays):
    arrays["fc1/kernel"] = np.zeros((4, 6), np.float32)


def _not_a_number(arrays):
    arrays["head/bias"] = np.array([0, np.nan, np.inf], np.float32)


def _as(dtype):
    def change(arrays):
        arrays["head/bias"] = arrays["head/bias"].astype(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"missing fc1/bias.*Expected exactly fc1/bias, fc1/kernel, head/bias"),
        (_with_extra, r"not in the model: 'evil\\n\\x1b\[2J/kernel'"),
        (_transposed, r"fc1/kernel must have shape \(4, 5\), got \(5, 4\).*from_torch_layout"),
        (_reshaped, r"fc1/kernel must have shape \(4, 5\), got \(4, 6\)\.$"),
        (_not_a_number, r"head/bias has 2 NaN or infinite entries of 3"),
        (_as(np.float16), r"head/bias must be float32 or float64, got float16"),
        (_as(jnp.bfloat16), r"head/bias must be float32 or float64, got bfloat16"),
        (_as(np.int32), r"head/bias must be float32 or float64, got int32"),
        (_as(np.complex64), r"head/bias must be float32 or float64, got complex64"),
        (_as(object), r"head/bias must be float32 or float64, got object"),
    ],
)
def test_from_arrays_rejects_in_one_line(change, message):
    arrays = _arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message) as caught:
        Observation.from_arrays(arrays, victim=VICTIM, params=_params())
    assert "\n" not in str(caught.value)


def test_many_extra_names_give_a_short_message():
    arrays = _arrays() | {f"x{i}" * 100: np.zeros(1, np.float32) for i in range(1000)}
    with pytest.raises(ValueError, match="and 995 more") as caught:
        Observation.from_arrays(arrays, victim=VICTIM, params=_params())
    assert len(str(caught.value)) < 1000


def test_from_arrays_checks_the_parameters_too():
    other = make_victim("mlp", input_shape=(2, 2, 1), num_classes=3, widths=(6,))
    with pytest.raises(ValueError, match=r"parameter fc1/\w+ must have shape"):
        Observation.from_arrays(_arrays(), victim=VICTIM, params=other.param_shapes())
    with pytest.raises(ValueError, match="the parameters do not fit the model"):
        Observation.from_arrays(_arrays(), victim=VICTIM, params={})


def test_observation_passes_through_jit_with_its_static_parts():
    observation = Observation.from_arrays(_arrays(), victim=VICTIM, params=_params())

    @jax.jit
    def double(seen):
        assert seen.victim == VICTIM  # static: plain data while tracing
        return dataclasses.replace(seen, update=jax.tree.map(lambda x: 2 * x, seen.update))

    result = double(observation)
    assert result.victim == VICTIM
    assert result.threat_model == observation.threat_model
    np.testing.assert_array_equal(
        result.update["fc1"]["kernel"], 2 * observation.update["fc1"]["kernel"]
    )
    leaves = jax.tree.leaves(observation)
    assert len(leaves) == 2 * len(jax.tree.leaves(observation.params))


def test_another_threat_model_is_another_static_argument():
    traced = []

    @jax.jit
    def look(seen):
        traced.append(seen.threat_model)
        return seen.update

    one = Observation.from_arrays(_arrays(), victim=VICTIM, params=_params())
    look(one)
    look(one)
    look(dataclasses.replace(one, threat_model=ThreatModel(num_examples=2)))
    assert traced == [ThreatModel(), ThreatModel(num_examples=2)]


def test_truth_is_a_pytree_and_nothing_is_mutable():
    truth = Truth(images=jnp.ones((2, 1, 1, 1)), labels=jnp.arange(2))
    assert len(jax.tree.leaves(truth)) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        truth.images = None  # pyright: ignore[reportAttributeAccessIssue]
    empty = Reconstruction(images=np.zeros((0,)), scores=np.zeros(0), statuses=(), selected_by="-")
    with pytest.raises(dataclasses.FrozenInstanceError):
        empty.scores = None  # pyright: ignore[reportAttributeAccessIssue]


def test_accepted_statuses():
    rejected = {Status.MIXTURE, Status.DUPLICATE, Status.NONFINITE}
    assert {status for status in Status if not status.accepted} == rejected
    assert json.loads(json.dumps([Status.EXACT])) == ["exact"]
    assert Status("mixture") is Status.MIXTURE


def _observed(threat_model=None):
    return Observation.from_arrays(
        _arrays(), victim=VICTIM, params=_params(), threat_model=threat_model
    )


def test_restriction_drops_layers_and_says_so():
    whole = _observed(ThreatModel(num_examples=3))
    names = sorted(whole.params)
    seen = restrict(whole, [names[1], names[1]])
    assert set(seen.update) == {names[1]}
    assert seen.threat_model.visible_layers == (names[1],)
    assert seen.threat_model.num_examples == 3
    assert seen.params is whole.params
    for name in seen.update:
        assert seen.update[name] is whole.update[name]
    assert restrict(seen, [names[1]]) == seen
    assert restrict(whole, names).threat_model.visible_layers is None


def test_a_layer_that_is_not_visible_is_named():
    names = sorted(_params())
    seen = restrict(_observed(), names[:1])
    assert seen.layer(names[0]) is seen.update[names[0]]
    with pytest.raises(ValueError, match=f"'{names[1]}' is not visible .* holds {names[0]};"):
        seen.layer(names[1])
    with pytest.raises(ValueError, match="is not visible"):
        restrict(seen, names)
    with pytest.raises(ValueError, match="got 'fc9'"):
        seen.layer("fc9")
    for layers in (["fc9"], []):
        with pytest.raises(ValueError, match="one or more of the layers"):
            restrict(_observed(), layers)


def test_from_arrays_takes_exactly_the_visible_layers():
    names = sorted(_params())
    threat = ThreatModel(visible_layers=(names[0],))
    part = {name: x for name, x in _arrays().items() if name.startswith(f"{names[0]}/")}
    seen = Observation.from_arrays(part, victim=VICTIM, params=_params(), threat_model=threat)
    assert set(seen.update) == {names[0]}
    with pytest.raises(ValueError, match="not in the model"):
        _observed(threat)
    with pytest.raises(ValueError, match="missing"):
        Observation.from_arrays(part, victim=VICTIM, params=_params())
    with pytest.raises(ValueError, match="got 'fc9'"):
        _observed(ThreatModel(visible_layers=("fc9",)))


def test_restricted_observations_are_pytrees():
    seen = restrict(_observed(), sorted(_params())[:1])
    doubled = jax.tree.map(lambda x: 2 * x, seen)
    assert doubled.threat_model == seen.threat_model
    assert set(doubled.update) == set(seen.update)
