import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cifarx_train.models.layers import whitening
from cifarx_train.models.layers.whitening import Whitening


@pytest.fixture
def images() -> Tensor:
    """(300, 3, 32, 32), smooth as photographs are, with fine grain, each channel with another mean and spread."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(300, 3, 8, 8, generator=generator)
    smooth = functional.interpolate(coarse, size=32, mode="bilinear") + coarse.mean(1, keepdim=True).repeat(1, 1, 4, 4)
    grain = 0.3 * torch.randn(300, 3, 32, 32, generator=generator)
    spread, mean = torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.4, 0.5, 0.6])
    return (smooth + grain) * spread[:, None, None] + mean[:, None, None]


def fitted(images: Tensor) -> Whitening:
    layer = Whitening()
    layer.fit(images)
    return layer


def covariance(outputs: Tensor) -> Tensor:
    return outputs.transpose(0, 1).flatten(1).double().cov()


def test_the_outputs_are_white_and_centred(images: Tensor) -> None:
    outputs = fitted(images)(images).detach()
    assert outputs.shape == (300, 24, 31, 31)
    assert not torch.allclose(covariance(images), torch.eye(3, dtype=torch.float64), atol=0.1)
    assert torch.allclose(covariance(outputs[:, :12]), torch.eye(12, dtype=torch.float64), atol=0.05)
    assert torch.allclose(outputs.mean((0, 2, 3)), torch.zeros(24), atol=1e-3)


def test_each_filter_comes_with_its_negative(images: Tensor) -> None:
    outputs = fitted(images)(images)
    assert torch.allclose(outputs[:, 12:], -outputs[:, :12], atol=1e-5)


def test_before_it_is_fitted_it_gives_the_patches_own_values(images: Tensor) -> None:
    outputs = Whitening()(images)
    assert torch.equal(outputs[:, 0], images[:, 0, :-1, :-1])
    assert torch.equal(outputs[:, 11], images[:, 2, 1:, 1:])


def test_the_same_images_give_the_same_filters(images: Tensor) -> None:
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


def test_autocast_does_not_blur_the_filters(images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        within = fitted(images)
    assert torch.equal(within.weight, fitted(images).weight)


def test_the_patches_are_read_in_pieces(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, covariance = whitening._moments(images)
    patches = functional.unfold(images, 2).transpose(0, 1).flatten(1).double()
    assert torch.allclose(mean, patches.mean(1), atol=1e-9)
    assert torch.allclose(covariance, patches.cov(correction=0), atol=1e-9)
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    for found, expected in zip(whitening._moments(images), (mean, covariance), strict=True):
        assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["one colour", "grey", "one image"])
def test_images_that_vary_little_give_finite_filters(images: Tensor, kind: str) -> None:
    few = {
        "one colour": torch.full((4, 3, 32, 32), 0.5),
        "grey": images.mean(1, keepdim=True).expand(-1, 3, -1, -1),
        "one image": images[:1],
    }[kind]
    layer = fitted(few)
    assert layer.weight.isfinite().all()
    assert layer(few).abs().max() < 100


def test_directions_that_hold_only_rounding_are_not_blown_up(images: Tensor) -> None:
    """Grey images vary in 4 directions of 12; the other filters are as long as 1/2000 of the mean variance asks."""
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    lengths = fitted(grey).weight[:12].flatten(1).norm(dim=1)
    mean_variance = float(grey.var(correction=0))
    assert torch.allclose(lengths[4:], torch.full((8,), (mean_variance / 2000) ** -0.5), rtol=0.02)
    assert lengths[:4].max() < lengths[4] / 2


def test_only_the_bias_trains(images: Tensor) -> None:
    layer = fitted(images)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.bias.requires_grad
