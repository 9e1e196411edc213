import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cifarx_train.models.layers import whitening
from cifarx_train.models.layers.whitening import Whitening


@pytest.fixture
def images() -> Tensor:
    """Smooth images with fine noise, like photographs, (300, 3, 32, 32). Channels differ in mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(300, 3, 8, 8, generator=generator)
    smooth = functional.interpolate(coarse, size=32, mode="bilinear") + coarse.mean(1, keepdim=True).repeat(1, 1, 4, 4)
    noise = 0.3 * torch.randn(300, 3, 32, 32, generator=generator)
    std, mean = torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.4, 0.5, 0.6])
    return (smooth + noise) * std[:, None, None] + mean[:, None, None]


def fitted(images: Tensor) -> Whitening:
    layer = Whitening()
    layer.fit(images)
    return layer


def covariance(outputs: Tensor) -> Tensor:
    return outputs.transpose(0, 1).flatten(1).double().cov()


def test_the_outputs_are_white_and_centered(images: Tensor) -> None:
    outputs = fitted(images)(images).detach()
    assert outputs.shape == (300, 24, 31, 31)
    assert not torch.allclose(covariance(images), torch.eye(3, dtype=torch.float64), atol=0.1)
    assert torch.allclose(covariance(outputs[:, :12]), torch.eye(12, dtype=torch.float64), atol=0.05)
    assert torch.allclose(outputs.mean((0, 2, 3)), torch.zeros(24), atol=1e-3)


def test_the_second_half_of_the_filters_is_the_negative_of_the_first(images: Tensor) -> None:
    outputs = fitted(images)(images)
    assert torch.allclose(outputs[:, 12:], -outputs[:, :12], atol=1e-5)


def test_before_fit_it_returns_the_values_of_the_patches(images: Tensor) -> None:
    outputs = Whitening()(images)
    assert torch.equal(outputs[:, 0], images[:, 0, :-1, :-1])
    assert torch.equal(outputs[:, 11], images[:, 2, 1:, 1:])


def test_the_filters_depend_only_on_the_images(images: Tensor) -> None:
    torch.manual_seed(1)
    first = fitted(images)
    torch.manual_seed(2)
    assert torch.equal(first.weight, fitted(images).weight)
    assert torch.equal(first.bias, fitted(images.contiguous(memory_format=torch.channels_last)).bias)


def test_the_sign_of_a_filter_does_not_depend_on_the_solver(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = torch.linalg.eigh

    def other_signs(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = solve(matrix)
        return values, -vectors

    expected = fitted(images)
    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    assert torch.equal(fitted(images).weight, expected.weight)


def test_autocast_does_not_reduce_the_precision_of_the_filters(images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layer = fitted(images)
    assert torch.equal(layer.weight, fitted(images).weight)


def test_the_chunk_size_does_not_change_the_statistics(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, covariance = whitening._patch_statistics(images)
    patches = functional.unfold(images, 2).transpose(0, 1).flatten(1).double()
    assert torch.allclose(mean, patches.mean(1), atol=1e-9)
    assert torch.allclose(covariance, patches.cov(correction=0), atol=1e-9)
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    for chunked, expected in zip(whitening._patch_statistics(images), (mean, covariance), strict=True):
        assert torch.allclose(chunked, expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["one color", "gray", "one image"])
def test_filters_of_images_with_little_variation_are_finite(images: Tensor, kind: str) -> None:
    few = {
        "one color": torch.full((4, 3, 32, 32), 0.5),
        "gray": images.mean(1, keepdim=True).expand(-1, 3, -1, -1),
        "one image": images[:1],
    }[kind]
    layer = fitted(few)
    assert layer.weight.isfinite().all()
    assert layer(few).abs().max() < 100


def test_directions_that_contain_only_rounding_noise_are_not_amplified(images: Tensor) -> None:
    """Gray images vary in 4 of 12 directions. The length of the other filters is determined by epsilon."""
    gray = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    lengths = fitted(gray).weight[:12].flatten(1).norm(dim=1)
    mean_variance = float(gray.var(correction=0))
    assert torch.allclose(lengths[4:], torch.full((8,), (mean_variance / 2000) ** -0.5), rtol=0.02)
    assert lengths[:4].max() < lengths[4] / 2


def test_only_the_bias_is_trained(images: Tensor) -> None:
    layer = fitted(images)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.bias.requires_grad
