"""The server's view of several clients: sums, weights, and what it is told."""

import dataclasses

import jax
import numpy as np
import pytest

from jgia.attacks import ares
from jgia.config import AresOptions, AuditConfig, ClientConfig
from jgia.federated import (
    UpdateError,
    aggregate,
    client_update,
    load_update,
    save_update,
    simulate_clients,
)
from jgia.models import flatten_params, make_victim
from jgia.observation import Observation, ThreatModel, restrict

VICTIM = make_victim("cnn", input_shape=(8, 8, 3), num_classes=4, widths=(4, 4), fc_width=16)
SGD = ClientConfig(protocol="fedavg", learning_rate=0.1)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda leaf: leaf.astype("float64"), VICTIM.init(jax.random.key(0))
    )  # float64: rounding cannot hide a wrong weight


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return rng.uniform(size=(10, 8, 8, 3)), rng.integers(4, size=10)


def _leaves(observation: Observation) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten_params(observation.update).items()}


def _clients(params, batch, sizes, config=ClientConfig()) -> list[Observation]:
    images, labels = batch
    ends = np.cumsum(sizes)
    return [
        client_update(
            jax.random.key(k), VICTIM, params, images[e - n : e], labels[e - n : e], config
        )
        for k, (n, e) in enumerate(zip(sizes, ends, strict=True))
    ]


def _assert_close(a: Observation, b: Observation, scale: float = 1.0) -> None:
    first, second = _leaves(a), _leaves(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        size = np.abs(second[name]).max()
        np.testing.assert_allclose(value, scale * second[name], rtol=0, atol=1e-12 * size)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(5, 5), (1, 2, 7), (1,) * 10], ids=str)
@pytest.mark.parametrize("config", [ClientConfig(), SGD], ids=["fedsgd", "one-step"])
def test_weighted_mean_is_one_big_batch(params, batch, sizes, config):
    whole = client_update(jax.random.key(0), VICTIM, params, batch[0], batch[1], config)
    seen = aggregate(_clients(params, batch, sizes, config))
    _assert_close(seen, whole)
    assert seen.threat_model.num_clients == len(sizes)
    assert seen.threat_model.num_examples == 10
    assert seen.threat_model.local_learning_rate == whole.threat_model.local_learning_rate


def test_unequal_clients_are_not_averaged_uniformly(params, batch):
    clients = _clients(params, batch, (1, 9))
    whole = client_update(jax.random.key(0), VICTIM, params, batch[0], batch[1])
    uniform = aggregate(clients, weights=[0.5, 0.5])
    with pytest.raises(AssertionError):
        _assert_close(uniform, whole)
    _assert_close(aggregate(clients, num_examples=[1, 9]), whole)


def test_plain_sum_and_arbitrary_weights(params, batch):
    clients = _clients(params, batch, (5, 5))
    whole = client_update(jax.random.key(0), VICTIM, params, batch[0], batch[1])
    _assert_close(aggregate(clients, weights=[1.0, 1.0]), whole, scale=2.0)
    got = _leaves(aggregate(clients, weights=[2.0, -0.5]))
    for name, value in got.items():
        expected = 2.0 * _leaves(clients[0])[name] - 0.5 * _leaves(clients[1])[name]
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-15)


def test_several_local_steps_differ_from_one_big_batch(params, batch):
    config = dataclasses.replace(SGD, local_epochs=3, learning_rate=1.0)
    whole = client_update(jax.random.key(0), VICTIM, params, batch[0], batch[1], config)
    clients = _clients(params, batch, (5, 5), config)
    with pytest.raises(AssertionError):
        _assert_close(aggregate(clients), whole)
    seen = aggregate(clients)
    assert seen.threat_model.local_steps == 3
    assert seen.threat_model.protocol == "fedavg"


def test_inputs_survive_and_a_single_client_is_untouched(params, batch):
    clients = _clients(params, batch, (4, 6))
    before = [_leaves(client) for client in clients]
    aggregate(clients)
    for client, leaves in zip(clients, before, strict=True):
        for name, value in _leaves(client).items():
            np.testing.assert_array_equal(value, leaves[name])
    assert aggregate(clients[:1]) is clients[0]


def test_knowledge_is_combined():
    params = VICTIM.init(jax.random.key(0))

    def client(**fields):
        return Observation(
            update=params, params=params, victim=VICTIM, threat_model=ThreatModel(**fields)
        )

    seen = aggregate(
        [
            client(num_examples=3, noise_std=0.4, labels=(1, 2, 0)),
            client(num_examples=None, noise_std=0.3, num_clients=2),
        ],
        weights=[1.0, 1.0],
    ).threat_model
    assert seen.noise_std == pytest.approx(0.5)
    assert seen.num_clients == 3
    assert seen.num_examples is None
    assert not seen.labels_known
    rates = [client(protocol="fedavg", num_examples=1, local_learning_rate=r) for r in (0.1, 0.2)]
    assert aggregate(rates).threat_model.local_learning_rate is None


def test_noise_of_the_sum_is_as_declared():
    params = VICTIM.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    clients = [
        Observation(
            update=jax.tree.map(lambda x, s=std: rng.normal(0, s, x.shape), params),
            params=params,
            victim=VICTIM,
            threat_model=ThreatModel(num_examples=n, noise_std=std),
        )
        for n, std in [(2, 0.1), (6, 0.3), (2, 0.5)]
    ]
    seen = aggregate(clients)
    sample = np.concatenate([x.ravel() for x in _leaves(seen).values()])
    relative = 4 / np.sqrt(2 * sample.size)
    assert sample.std() == pytest.approx(seen.threat_model.noise_std, rel=relative)
    assert sample.std() != pytest.approx(0.3, rel=2 * relative)


def test_restricted_clients_aggregate_to_a_restricted_view(params, batch):
    clients = [restrict(client, ["fc", "head"]) for client in _clients(params, batch, (5, 5))]
    seen = aggregate(clients)
    assert set(seen.update) == {"fc", "head"}
    assert seen.threat_model.visible_layers == ("fc", "head")


@pytest.mark.parametrize("num_clients", [2, 3, 10])
def test_simulation_is_the_aggregate_of_its_parts(params, batch, num_clients):
    seen = simulate_clients(
        jax.random.key(0), VICTIM, params, batch[0], batch[1], num_clients=num_clients
    )
    _assert_close(seen, client_update(jax.random.key(0), VICTIM, params, batch[0], batch[1]))
    assert seen.threat_model == dataclasses.replace(
        ThreatModel(), num_clients=num_clients, num_examples=10
    )


def test_simulated_clients_train_on_their_own_images_only(params, batch):
    config = ClientConfig(protocol="fedavg", local_epochs=2, local_batch_size=2, num_clients=2)
    seen = simulate_clients(jax.random.key(4), VICTIM, params, batch[0], batch[1], config)
    first, second = jax.random.split(jax.random.key(4), 2)
    images, labels = batch
    parts = [
        client_update(first, VICTIM, params, images[:5], labels[:5], config),
        client_update(second, VICTIM, params, images[5:], labels[5:], config),
    ]
    _assert_close(seen, aggregate(parts))
    assert seen.threat_model.local_steps == 6


def test_one_simulated_client_is_the_client_itself(params, batch):
    config = dataclasses.replace(SGD, local_batch_size=3)
    seen = simulate_clients(jax.random.key(5), VICTIM, params, batch[0], batch[1], config)
    alone = client_update(jax.random.key(5), VICTIM, params, batch[0], batch[1], config)
    for name, value in _leaves(seen).items():
        np.testing.assert_array_equal(value, _leaves(alone)[name])
    assert seen.threat_model == alone.threat_model


@pytest.mark.slow
def test_attack_reads_a_sum_like_one_batch():
    """Secure aggregation alone does not help: the sum is one batch to the imprint layer."""
    victim = make_victim("cnn", input_shape=(8, 8, 3), num_classes=4, widths=(8, 8), fc_width=64)
    rng = np.random.default_rng(2)
    brightness = rng.uniform(0.1, 1.0, size=(70, 1, 1, 1))
    pixels = (brightness * rng.uniform(size=(70, 8, 8, 3))).astype("float32")
    options = AresOptions(front_end_trials=1)
    params, plan = ares.craft(jax.random.key(0), victim, pixels[6:], options=options)
    alone, summed = (
        ares.leak(
            simulate_clients(
                jax.random.key(1), victim, params, pixels[:6], np.arange(6) % 4, num_clients=n
            ),
            plan,
        )
        for n in (1, 3)
    )
    assert len(alone) >= 4
    np.testing.assert_array_equal(summed.bins, alone.bins)
    np.testing.assert_allclose(summed.signals, alone.signals, rtol=1e-3)
    largest = np.abs(alone.activations).max(axis=(1, 2, 3), keepdims=True)
    error = np.abs(summed.activations - alone.activations) / largest
    assert error.max() < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: dataclasses.replace(o, params=jax.tree.map(lambda x: x + 1, o.params)), "param"),
        (
            lambda o: dataclasses.replace(
                o, threat_model=dataclasses.replace(o.threat_model, protocol="fedavg")
            ),
            "another protocol",
        ),
        (lambda o: restrict(o, ["fc"]), "another visible layers"),
        (
            lambda o: dataclasses.replace(o, victim=dataclasses.replace(VICTIM, name="other")),
            "another model",
        ),
    ],
)
def test_clients_of_different_rounds_are_refused(params, batch, change, message):
    first, second = _clients(params, batch, (5, 5))
    with pytest.raises(ValueError, match=message):
        aggregate([first, change(second)])


def test_bad_arguments_are_refused(params, batch):
    clients = _clients(params, batch, (5, 5))
    unknown = [
        dataclasses.replace(
            client, threat_model=dataclasses.replace(client.threat_model, num_examples=None)
        )
        for client in clients
    ]
    with pytest.raises(ValueError, match="got none"):
        aggregate([])
    with pytest.raises(ValueError, match="give num_examples="):
        aggregate(unknown)
    with pytest.raises(ValueError, match="one number per client, 2, got 1"):
        aggregate(clients, num_examples=[10])
    for weights in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="one finite number per client, 2"):
            aggregate(clients, weights=weights)
    with pytest.raises(ValueError, match="11 clients cannot share 10 images"):
        simulate_clients(jax.random.key(0), VICTIM, params, batch[0], batch[1], num_clients=11)
    with pytest.raises(ValueError, match="10 images, 9 labels"):
        simulate_clients(jax.random.key(0), VICTIM, params, batch[0], batch[1][:9], num_clients=2)
    with pytest.raises(ValueError, match="num_clients must be at least 1"):
        ClientConfig(num_clients=0)
    with pytest.raises(ValueError, match="num_clients=9 clients cannot share batch=8"):
        AuditConfig(batch=8, client=ClientConfig(num_clients=9))


def test_files_of_some_layers_are_read_when_declared(tmp_path, params, batch):
    seen = restrict(client_update(jax.random.key(0), VICTIM, params, batch[0], batch[1]), ["fc"])
    save_update(tmp_path / "part.npz", seen.update)
    read = load_update(tmp_path / "part.npz", VICTIM, params, threat_model=seen.threat_model)
    assert set(read.update) == {"fc"}
    np.testing.assert_array_equal(read.update["fc"]["bias"], seen.update["fc"]["bias"])
    with pytest.raises(UpdateError, match="missing conv1/bias"):
        load_update(tmp_path / "part.npz", VICTIM, params)
    with pytest.raises(ValueError, match="in layout='flax'"):
        load_update(
            tmp_path / "part.npz",
            VICTIM,
            params,
            threat_model=seen.threat_model,
            layout="torch",
        )
