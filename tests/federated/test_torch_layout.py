import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgia.federated import UpdateError, from_torch_layout, to_torch_layout
from jgia.models import CNN, Conv, Dense, Victim, flatten_params, make_victim, unflatten_params
from jgia.normalization import Normalization

# Uneven heights and widths, odd sizes under stride and pooling, more than one channel.
VICTIMS = {
    "cnn": make_victim("cnn", input_shape=(4, 5, 3), num_classes=3, widths=(2, 3), fc_width=4),
    "mlp": make_victim("mlp", input_shape=(2, 3, 2), num_classes=3, widths=(5, 4)),
    "lenet": make_victim("lenet", input_shape=(5, 7, 2), num_classes=2, widths=(2, 3, 2)),
    "convnet": make_victim("convnet", input_shape=(6, 9, 2), num_classes=2, widths=(8, 16)),
}


@pytest.fixture(params=VICTIMS.values(), ids=list(VICTIMS))
def victim(request):
    return request.param


def _with_kernels(victim):
    """The convolutions and fully connected layers; they say themselves what follows them."""
    return [layer for layer in victim.layers() if isinstance(layer, Conv | Dense)]


@functools.cache
def _params(victim):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) / 2, victim.param_shapes())


def _batch(victim, count=3):
    rng = np.random.default_rng(1)
    return rng.random((count, *victim.input_shape)), rng.integers(0, victim.num_classes, count)


def _conv_nchw(x, weight, bias, stride):
    """The convolution as PyTorch defines it, in NumPy: padding k // 2 on every side."""
    size = weight.shape[-1]
    pad = size // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]


def _norm_nchw(x, weight, bias, groups=8):
    grouped = x.reshape(len(x), groups, -1)
    mean = grouped.mean(axis=2, keepdims=True)
    variance = grouped.var(axis=2, keepdims=True)
    normal = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    return normal * weight[:, None, None] + bias[:, None, None]


def _pool_nchw(x):
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    x = x[:, :, :height, :width]
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


_ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "none": lambda x: x,
}


def _forward_nchw(victim, weights, images):
    """Logits of the equivalent PyTorch model, from PyTorch's names, axes and NCHW images."""
    x = images.transpose(0, 3, 1, 2)
    for layer in _with_kernels(victim):
        weight, bias = weights[f"{layer.name}.weight"], weights[f"{layer.name}.bias"]
        if isinstance(layer, Conv):
            x = _conv_nchw(x, weight, bias, layer.stride)
            if layer.normalized:
                norm = layer.name.replace("conv", "norm")
                x = _norm_nchw(x, weights[f"{norm}.weight"], weights[f"{norm}.bias"])
        else:
            x = x.reshape(len(x), -1) @ weight.T + bias
        x = _ACTIVATIONS[layer.activation](x)
        if isinstance(layer, Conv) and layer.pooled:
            x = _pool_nchw(x)
    return x


def test_the_pytorch_model_has_the_same_logits(victim):
    params, (images, _) = _params(victim), _batch(victim)
    weights = to_torch_layout(flatten_params(params), victim)
    logits = jax.jit(victim.apply)(params, jnp.asarray(images))
    np.testing.assert_allclose(_forward_nchw(victim, weights, images), logits, rtol=1e-9)
    # A plain transpose of the first dense layer, without CHW to HWC, is another function.
    first = next(layer for layer in victim.layers() if isinstance(layer, Dense))
    plain = weights | {f"{first.name}.weight": params[first.name]["kernel"].T}
    assert not np.allclose(_forward_nchw(victim, plain, images), logits, rtol=1e-3)


def test_round_trips_are_exact(victim):
    flat = flatten_params(_params(victim))
    torch_like = to_torch_layout(flat, victim)
    back = from_torch_layout(torch_like, victim)
    again = to_torch_layout(back, victim)
    assert set(back) == set(flat)
    for name, array in flat.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.c_contiguous
    for name, array in torch_like.items():
        np.testing.assert_array_equal(again[name], array)
        assert array.flags.c_contiguous


def test_names_and_shapes(victim):
    weights = to_torch_layout(flatten_params(_params(victim)), victim)
    inputs, seen = victim.input_shape[-1], set()
    for layer in _with_kernels(victim):
        shape = weights[f"{layer.name}.weight"].shape
        seen |= {f"{layer.name}.weight", f"{layer.name}.bias"}
        if isinstance(layer, Conv):
            assert shape == (layer.features, inputs, *layer.kernel_size)
            inputs = layer.features
            if layer.normalized:
                norm = layer.name.replace("conv", "norm")
                seen |= {f"{norm}.weight", f"{norm}.bias"}
        else:
            assert shape[0] == layer.features
    assert set(weights) == seen


def test_inputs_are_left_alone(victim):
    flat = flatten_params(_params(victim))
    copies = {name: array.copy() for name, array in flat.items()}
    for array in to_torch_layout(flat, victim).values():
        array += 1.0
    for name, array in flat.items():
        np.testing.assert_array_equal(array, copies[name])


@pytest.mark.parametrize(
    ("convert", "change", "message"),
    [
        (from_torch_layout, {"fc.weight": None}, "missing 'fc.weight'"),
        (from_torch_layout, {"x\n": np.zeros(1)}, r"not in the model: 'x\\n'"),
        (from_torch_layout, {"conv1.weight": np.zeros((3, 3, 3, 2))}, "in layout='flax'?"),
        (from_torch_layout, {"fc.weight": np.zeros((60, 4))}, "permuted"),
        (from_torch_layout, {"fc.weight": np.zeros((4, 61))}, r"\(4, 60\).*got \(4, 61\)\.$"),
        (to_torch_layout, {"fc/kernel": np.zeros((4, 60))}, "permuted"),
        (to_torch_layout, {"head/bias": None}, "missing 'head/bias'"),
    ],
)
def test_what_does_not_fit_is_refused(convert, change, message):
    victim = VICTIMS["cnn"]
    flat = flatten_params(_params(victim))
    if convert is from_torch_layout:
        flat = to_torch_layout(flat, victim)
    given = {name: value for name, value in (flat | change).items() if value is not None}
    with pytest.raises(UpdateError, match=message) as caught:
        convert(given, victim)
    assert "\n" not in str(caught.value)


def test_the_other_layout_is_recognized():
    victim = VICTIMS["mlp"]
    flat = flatten_params(_params(victim))
    with pytest.raises(UpdateError, match="--layout flax"):
        from_torch_layout(flat, victim)
    with pytest.raises(UpdateError, match="--layout torch"):
        to_torch_layout(to_torch_layout(flat, victim), victim)


def test_models_without_a_description_say_so():
    class Other(CNN):
        pass

    victim = Victim(Other((2,), 3, 2), (4, 4, 1), 2, Normalization.identity(1))
    with pytest.raises(ValueError, match="layers of Other are not described"):
        to_torch_layout({}, victim)


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_pytorch_itself(victim):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    params, (images, labels) = _params(victim), _batch(victim)
    weights = {
        name: torch.tensor(array, requires_grad=True)
        for name, array in to_torch_layout(flatten_params(params), victim).items()
    }
    modules = []
    for layer in _with_kernels(victim):
        if isinstance(layer, Conv):
            inputs = weights[f"{layer.name}.weight"].shape[1]
            modules.append((layer.name, torch.nn.Conv2d(
                inputs, layer.features, layer.kernel_size, layer.stride,
                padding=layer.kernel_size[0] // 2,
            )))  # fmt: skip
            if layer.normalized:
                norm = torch.nn.GroupNorm(8, layer.features)
                modules.append((layer.name.replace("conv", "norm"), norm))
        else:
            if not any(name == "flatten" for name, _ in modules):
                modules.append(("flatten", torch.nn.Flatten()))
            outputs, inputs = weights[f"{layer.name}.weight"].shape
            modules.append((layer.name, torch.nn.Linear(inputs, outputs)))
        if layer.activation != "none":
            kind = {"relu": torch.nn.ReLU, "sigmoid": torch.nn.Sigmoid}[layer.activation]
            modules.append((f"{layer.name}_activation", kind()))
        if isinstance(layer, Conv) and layer.pooled:
            modules.append((f"{layer.name}_pool", torch.nn.AvgPool2d(2)))
    model = torch.nn.Sequential()
    for name, module in modules:
        model.add_module(name, module)
    model.double()
    model.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    logits = model(torch.tensor(images.transpose(0, 3, 1, 2)))
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    theirs = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    got = unflatten_params(from_torch_layout(theirs, victim))
    ours = jax.jit(jax.grad(victim.loss))(params, jnp.asarray(images), jnp.asarray(labels))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-11)
