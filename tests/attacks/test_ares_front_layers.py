import numpy as np
import pytest

from jgia.attacks.ares.front import capacity, front_layers, num_equations
from jgia.attacks.ares.measurement import measurement
from jgia.attacks.ares.passing import pass_through_params
from jgia.models import CNN, Victim, make_victim
from jgia.normalization import Normalization

NORM = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def _victim(name, *, size=(8, 8), widths=(6, 6), **options):
    return make_victim(
        name,
        input_shape=(*size, 3),
        num_classes=3,
        normalization=NORM,
        widths=widths,
        fc_width=4,
        **options,
    )


@pytest.mark.parametrize(
    ("victim", "expected"),
    [
        (_victim("cnn", widths=(6, 4)), 4),
        (_victim("cnn", widths=(12, 12), strides=(2, 1)), 12),
        (_victim("cnn", widths=(12, 12), strides=(1, 2)), 3),
        (_victim("cnn", widths=(12, 12), strides=(2, 2)), 3),
        (_victim("cnn", widths=(12, 3), strides=(1, 2)), 0),
        (_victim("cnn", kernel_size=1, widths=(12, 12), strides=(1, 2)), 0),
        (_victim("resnet", widths=(16, 32, 64), norm="none"), 4),
        (_victim("resnet", widths=(16, 32, 64), strides=(1, 1, 1)), 16),
        (_victim("cnn", widths=(12, 12), pool="average"), 3),
        (_victim("cnn", widths=(20, 80), pool="average"), 20),
    ],
)
def test_capacity(victim, expected):
    front = front_layers(victim)
    assert capacity(front) == expected
    height, width, _ = victim.input_shape
    stride = front.first.stride
    if expected and not front.averages:
        # Lossless: as many equations as the features have pixels, and no more with another one.
        pixels = (height // stride) * (width // stride)
        assert num_equations(front, expected) == expected * pixels
        if expected < front.first.features:
            more = num_equations(front, expected + 1)
            assert more < (expected + 1) * pixels


@pytest.mark.parametrize(
    ("victim", "reason"),
    [
        (_victim("resnet", batch_norm="train"), "norm1 is a batch normalization in training mode"),
        (_victim("resnet", batch_norm="train"), "couple the examples"),
        (_victim("resnet", norm="group"), "statistics of the example itself"),
        (_victim("convnet", widths=(8,)), "norm1 is a group normalization"),
        (_victim("resnet", head="pool"), "global average pooling"),
        (_victim("cnn", pool="max"), "pools by maxima"),
        (_victim("lenet"), "conv1 ends in sigmoid"),
        (_victim("mlp"), "does not begin with a convolution"),
        (Victim(CNN((2,), 1, 2), (4, 4, 3), 2, NORM), "fc has 1 neuron"),
    ],
)
def test_refusals_say_why(victim, reason):
    with pytest.raises(ValueError, match=reason):
        front_layers(victim)


@pytest.mark.parametrize(
    ("kernel", "bias", "message"),
    [
        ((5, 5, 3, 4), None, r"takes filters of shape \(3, 3, 3\)"),
        ((3, 3, 3, 7), None, "has 6 of them"),
        ((3, 3, 4), None, r"got a kernel of shape \(3, 3, 4\)"),
        ((3, 3, 3, 4), (3,), "4 filters need as many biases"),
    ],
)
def test_filters_must_fit(kernel, bias, message):
    victim = _victim("cnn")
    front = front_layers(victim)
    arguments = (np.zeros(kernel), None if bias is None else np.zeros(bias))
    with pytest.raises(ValueError, match=message):
        measurement(front, *arguments)
    with pytest.raises(ValueError, match=message):
        pass_through_params(victim, front, *arguments)
    with pytest.raises(ValueError, match="cannot use 7"):
        num_equations(front, 7)
