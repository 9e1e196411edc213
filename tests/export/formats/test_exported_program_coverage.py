"""Exported programs of the modules and functions that networks are made of run from a file."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cifarx_export.formats.exported_program import convert_to_exported_program
from cifarx_export.formats.registry import NO_OPTIONS, ConversionSource
from cifarx_serve.backends.torch.exported_program import ExportedProgramBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import UsageError
from cifarx_serve.progress import silent
from cifarx_serve.spec import InputSpec, ModelSpec

Function = Callable[[Tensor], Tensor]

SPEC = ModelSpec(model="layer", class_names=tuple("abcdefghij"), input=InputSpec(height=8, width=8))


class Layer(nn.Module):
    """A layer on images of four channels, whose first ten outputs per image are the logits."""

    def __init__(self, layer: nn.Module, view: Function | None = None) -> None:
        super().__init__()
        self.layer, self.view = layer, view

    def forward(self, images: Tensor) -> Tensor:
        images = torch.cat([images, images[:, :1]], dim=1)
        result = self.layer(images if self.view is None else self.view(images))
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first.float().flatten(1)[:, :10]


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


class Attention(nn.Module):
    """Self-attention, optionally with a causal mask."""

    def __init__(self, causal: bool = False, **options: bool) -> None:
        super().__init__()
        self.attention, self.causal = nn.MultiheadAttention(4, 2, batch_first=True, **options), causal

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1) if self.causal else None
        result: Tensor = self.attention(x, x, x, attn_mask=mask)[0]
        return result


class Decoder(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.decoder(x, x)
        return result


class Unpool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.unpool(*self.pool(x))
        return result


def sequence(x: Tensor) -> Tensor:
    """Return a sequence of pixels."""
    return x.flatten(2).transpose(1, 2)


def line(x: Tensor) -> Tensor:
    """Return an image with one spatial axis."""
    return x.flatten(2)


def volume(x: Tensor) -> Tensor:
    """Return an image with three spatial axes."""
    return x[:, :, None].expand(-1, -1, 2, -1, -1)


def copied(x: Tensor) -> Tensor:
    return x * 1


def means(x: Tensor) -> Tensor:
    return x.mean((2, 3))


ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
]  # fmt: skip
IN_PLACE = [
    nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU,
    nn.SiLU,
]  # fmt: skip
VIEWS: list[tuple[str, Function | None]] = [("1d", line), ("2d", None), ("3d", volume)]


def activations() -> Iterator[tuple[str, nn.Module]]:
    for activation in ACTIVATIONS:
        yield activation.__name__, Layer(activation())
    for activation in IN_PLACE:
        yield f"{activation.__name__} in place", Layer(activation(inplace=True), copied)
    yield "GELU tanh", Layer(nn.GELU(approximate="tanh"))
    yield "Threshold", Layer(nn.Threshold(0.1, 20.0))
    for gate in (nn.GLU(1), nn.Softmin(1), nn.Softmax(1), nn.Softmax2d(), nn.LogSoftmax(1)):
        yield type(gate).__name__, Layer(gate)


def layers_of_any_rank() -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that exist for one, two and three spatial axes."""
    for dims, view in VIEWS:
        made = {
            "Conv": getattr(nn, f"Conv{dims}")(4, 6, 3, padding=1, stride=2, groups=2),
            "ConvTranspose": getattr(nn, f"ConvTranspose{dims}")(4, 6, 2, stride=2),
            "BatchNorm": getattr(nn, f"BatchNorm{dims}")(4),
            "InstanceNorm": getattr(nn, f"InstanceNorm{dims}")(4, affine=True),
            "LPPool": getattr(nn, f"LPPool{dims}")(2, 2),
            "ConstantPad": getattr(nn, f"ConstantPad{dims}")(1, 2.0),
        }
        for pool in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
            made[pool] = getattr(nn, f"{pool}{dims}")(2)
        for pool in ("AdaptiveAvgPool", "AdaptiveMaxPool"):
            made[f"{pool} to 1, "] = getattr(nn, f"{pool}{dims}")(1)
        for pad in ("ReflectionPad", "ReplicationPad", "ZeroPad", "CircularPad"):
            made[pad] = getattr(nn, f"{pad}{dims}")(1)
        yield from ((f"{name}{dims}", Layer(layer, view)) for name, layer in made.items())


def other_layers() -> Iterator[tuple[str, nn.Module]]:
    for mode in ("zeros", "reflect", "replicate", "circular"):
        yield f"Conv2d {mode}", Layer(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode))
    yield "Conv2d same", Layer(nn.Conv2d(4, 6, 3, padding="same"))
    yield "Unfold", Layer(nn.Unfold(3))
    yield "Fold", Layer(nn.Fold((8, 8), 2, stride=2), lambda x: functional.unfold(x, 2, stride=2))
    yield "MaxUnpool2d", Layer(Unpool())
    for norm in (nn.BatchNorm2d(4, affine=False), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4), nn.LayerNorm(8)):
        yield f"{type(norm).__name__} {norm.extra_repr()}", Layer(norm)
    yield "LocalResponseNorm", Layer(nn.LocalResponseNorm(2))
    yield "RMSNorm", Layer(nn.RMSNorm(8))
    for shuffle in (nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2)):
        yield type(shuffle).__name__, Layer(shuffle)
    for dropout in (nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()):
        yield type(dropout).__name__, Layer(dropout)
    yield "Flatten and Unflatten", Layer(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 16, 8))))
    yield "Embedding", Layer(nn.Embedding(10, 6), lambda x: (x.mean((1, 2)) * 9).long())
    for name, parametrize in PARAMETRIZATIONS.items():
        yield name, Layer(parametrize(nn.Linear(8, 8)))


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


def upsampling() -> Iterator[tuple[str, nn.Module]]:
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area"):
        yield f"Upsample {mode}", Layer(nn.Upsample(scale_factor=1.5, mode=mode))
        yield f"Upsample {mode} to a size", Layer(nn.Upsample((5, 7), mode=mode))
    for mode in ("bilinear", "bicubic"):
        yield f"Upsample {mode} with aligned corners", Layer(nn.Upsample((5, 6), mode=mode, align_corners=True))
    yield "Upsample linear", Layer(nn.Upsample(scale_factor=2, mode="linear"), line)
    yield "Upsample trilinear", Layer(nn.Upsample(scale_factor=2, mode="trilinear"), volume)


def recurrent() -> Iterator[tuple[str, nn.Module]]:
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        yield kind.__name__, Layer(kind(4, 6, batch_first=True), sequence)
        stacked = kind(4, 6, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        yield f"{kind.__name__} in both directions", Layer(stacked, sequence)
    yield "RNN relu", Layer(nn.RNN(4, 6, nonlinearity="relu", batch_first=True), sequence)
    yield "LSTM with a projection", Layer(nn.LSTM(4, 6, proj_size=3, batch_first=True), sequence)
    for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        yield cell.__name__, Layer(cell(4, 10), means)


def attention() -> Iterator[tuple[str, nn.Module]]:
    yield "MultiheadAttention", Layer(Attention(), sequence)
    yield "MultiheadAttention, causal", Layer(Attention(causal=True), sequence)
    yield "MultiheadAttention with biases", Layer(Attention(add_bias_kv=True, add_zero_attn=True), sequence)
    encoder_layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    yield "TransformerEncoderLayer", Layer(encoder_layer, sequence)
    yield "TransformerEncoder", Layer(nn.TransformerEncoder(encoder_layer, 2), sequence)
    decoder_layer = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)
    yield "TransformerDecoder", Layer(Decoder(nn.TransformerDecoder(decoder_layer, 1)), sequence)
    yield "Transformer", Layer(Decoder(nn.Transformer(4, 2, 1, 1, 8, batch_first=True)), sequence)


FUNCTIONS: dict[str, Function] = {
    "powers": lambda x: x.pow(3) + x**0.5 + 2**x + x.square() + (x + 1).rsqrt() + (x + 1).reciprocal(),
    "exponentials": lambda x: x.exp() + x.expm1() + x.log1p() + (x + 1).log() + (x + 1).log2(),
    "trigonometry": lambda x: x.sin() + x.cos() + x.tan() + x.atan() + torch.atan2(x, x + 1) + x.sinh() + x.cosh(),
    "rounding": lambda x: x.floor() + x.ceil() + (9 * x).round() + x.trunc() + x.frac() + x.sign(),
    "bounds": lambda x: x.clamp(0.1, 0.5) + x.clamp_min(0.2) + x.clamp_max(0.4) + x.maximum(x / 2) + x.minimum(x * 2),
    "extremes": lambda x: x.max(1)[0] + x.min(1).values + x.amax(1) + x.amin(1) + x.argmax(1),
    "statistics": lambda x: x.var((2, 3)) + x.std((2, 3)) + sum(torch.var_mean(x, (2, 3))) + x.logsumexp((2, 3)),
    "sums": lambda x: x.sum((2, 3)) + x.mean((2, 3)) + x.flatten(2).cumsum(2)[:, :, -1] + x.flatten(2).prod(2),
    "norms": lambda x: x.norm(dim=1) + x.norm(p=1, dim=1) + functional.normalize(x, dim=1).sum(1),
    "order": lambda x: x.flatten(2).topk(3, 2)[0] + x.flatten(2).sort(2)[0][:, :, :3],
    "quantiles": lambda x: x.flatten(2).quantile(0.9, dim=2) + x.flatten(2).median(2)[0],
    "conditions": lambda x: torch.where(x > 0.5, x, -x) + torch.where(x > 0.5, x, 0.0) + x.masked_fill(x > 0.5, 0.0),
    "comparisons": lambda x: ((x > 0.5) & (x < 0.9) | (x >= 0.1) & (x <= 0.2) ^ (x != 0.3)).float() + (~(x > 0.5)),
    "products": lambda x: x @ x.mT + torch.bmm(x[:, 0], x[:, 1])[:, None] + torch.einsum("nchw,ncvw->nchv", x, x),
    "parts": lambda x: sum(x.chunk(2, 1)) + x.split([2, 2], 1)[0] + x.narrow(1, 1, 2) + x[:, ::2] + x[:, [0, 2]],
    "selection": lambda x: x.index_select(1, torch.tensor([0, 2])) + x.gather(1, x.argsort(1))[:, :2] + x[:, 1:2],
    "movement": lambda x: x.roll(1, 2) + x.flip(2) + torch.rot90(x, 1, (2, 3)) + x.permute(0, 1, 3, 2).swapaxes(2, 3),
    "repetition": lambda x: x.repeat(1, 2, 1, 1) + x.tile((1, 2, 1, 1)) + x.repeat_interleave(2, 1),
    "windows": lambda x: x.unfold(2, 2, 2).mean(4) + x.tril()[:, :, ::2] + x.triu()[:, :, 1::2],
    "constants": lambda x: x + torch.arange(8) + torch.linspace(0, 1, 8) + torch.eye(8) + torch.full((8,), 2.0),
    "constants of the batch": lambda x: x + torch.ones(x.shape[0], 1, 1, 1) + x.new_zeros(x.shape[0], 1, 1, 1),
    "constants like it": lambda x: x + torch.ones_like(x) + torch.full_like(x, 2.0) + torch.tensor([1.0, 2, 3, 4] * 2),
    "one hot": lambda x: functional.one_hot(x.argmax(1), 4).float() + torch.zeros_like(x)[:, :1, :, :1],
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x, torch.ones(8, 8, dtype=torch.bool)),
    "grid": lambda x: functional.grid_sample(x, identity_grid(x), align_corners=False),
    "antialiasing": lambda x: antialiased(x, "bilinear") + antialiased(x, "bicubic"),
    "spectrum": lambda x: torch.fft.rfft2(x).abs() + torch.fft.fftshift(torch.fft.fft2(x)).real[..., :5],
    "inverse transform": lambda x: torch.fft.irfft2(torch.fft.rfft2(x)) + torch.view_as_real(torch.fft.fft(x))[..., 0],
    "types": lambda x: x.half().float() + x.double().to(torch.float32) + x.type_as(x) + (x * 9).long() // 2,
    "remainders": lambda x: torch.fmod(x, 0.3) + x % 0.3 + torch.lerp(x, x + 1, 0.5) + torch.addcmul(x, x, x),
    "distances": lambda x: functional.cosine_similarity(x, x.flip(1)) + functional.pairwise_distance(x, x + 1).mean(),
    "autocast": lambda x: doubled_within(x, torch.autocast("cpu", enabled=False)),
    "autocast to bfloat16": lambda x: doubled_within(x, torch.autocast("cpu", torch.bfloat16)),
    "gradients": lambda x: doubled_within(x, torch.enable_grad()).detach(),
    "no gradients": lambda x: doubled_within(x, torch.no_grad()),
    "in place": lambda x: x.clone().add_(1).mul_(2).sub_(0.5).div_(2).clamp_(0, 1),
    "sizes": lambda x: x * x.shape[0] / (x.shape[0] + 1) + x.shape[0] // 2 + x.shape[0] % 3,
    "reshaped batch": lambda x: x.reshape(-1, 64).reshape(-1, 4, 64) + x.view(x.shape[0] * 4, 64).view(-1, 4, 64),
    "normalization": lambda x: functional.instance_norm(x) + functional.layer_norm(x, (8,)),
    "linear algebra": lambda x: torch.linalg.inv(x + 9 * torch.eye(8)) + torch.matrix_exp(0.1 * x),
}


def doubled_within(x: Tensor, context: AbstractContextManager[object]) -> Tensor:
    with context:
        return x.float() @ (2 * torch.eye(8))


def identity_grid(x: Tensor) -> Tensor:
    return functional.affine_grid(torch.eye(2, 3).expand(x.shape[0], 2, 3), list(x.shape), align_corners=False)


def antialiased(x: Tensor, mode: str) -> Tensor:
    return functional.interpolate(x, (5, 5), mode=mode, antialias=True)


def cases() -> Iterator[tuple[str, nn.Module]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in (activations, layers_of_any_rank, other_layers, recurrent, attention, upsampling):
            yield from kind()
    for name, function in FUNCTIONS.items():
        yield name, Layer(Apply(function))


FAST = {
    "LSTM",
    "GRU",
    "MultiheadAttention",
    "TransformerEncoder",
    "Upsample bicubic",
    "PixelShuffle",
    "spectrum",
    "sizes",
}


@pytest.mark.parametrize(
    "module",
    [pytest.param(module, id=name, marks=() if name in FAST else pytest.mark.slow) for name, module in cases()],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_program_runs_from_a_file(module: nn.Module, tmp_path: Path) -> None:
    module.eval()
    source = ConversionSource(lambda: module, SPEC, NO_OPTIONS, lambda count: pytest.fail(str(count)), silent)
    convert_to_exported_program(source)[0].save(tmp_path / "x.pt2", SPEC)
    with ExportedProgramBackend(tmp_path / "x.pt2", Device("cpu")) as backend:
        for size in (1, 3):
            batch = np.random.default_rng(size).random((size, 3, 8, 8), np.float32)
            with torch.no_grad():
                expected = module(torch.from_numpy(batch)).numpy()
            np.testing.assert_allclose(backend.run(batch), expected, rtol=1e-4, atol=1e-5)


def strided(images: Tensor) -> Tensor:
    return images.as_strided((images.shape[0], 10), (192, 1))


def conditional(images: Tensor) -> Tensor:
    result: Tensor = torch.cond(images.mean() > 0.5, lambda x: x * 2, lambda x: x + 1, (images,))
    return result.flatten(1)[:, :10]


@pytest.mark.parametrize(("function", "operator"), [(strided, "as_strided.default"), (conditional, "cond")])
def test_an_operator_that_is_not_allowed_is_named(function: Function, operator: str) -> None:
    source = ConversionSource(Apply(function).eval, SPEC, NO_OPTIONS, lambda count: pytest.fail(str(count)), silent)
    message = rf"_coverage.py line \d+ uses {operator}, which cifarx does not run from a .pt2 file: use another"
    with pytest.raises(UsageError, match=message):
        convert_to_exported_program(source)
