import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifarx_train.optim.muon import Muon, orthogonalize

seeds = st.integers(0, 2**31)
shapes = st.sampled_from([(4, 4), (4, 16), (16, 4), (24, 27), (27, 24), (64, 576), (256, 64), (5, 100), (100, 5)])


def random_matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def well_conditioned(seed: int, rows: int, columns: int, scale: float) -> torch.Tensor:
    """A random matrix with singular values between 0.5 and 1 times the scale."""
    u, _, v = torch.linalg.svd(random_matrix(seed, rows, columns), full_matrices=False)
    spread = torch.linspace(0.5, 1.0, min(rows, columns))
    matrix: torch.Tensor = scale * (u * spread) @ v
    return matrix


def one_step(weight: torch.Tensor, gradient: torch.Tensor, lr: float, **options: float) -> torch.Tensor:
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    Muon([parameter], lr=lr, momentum=options.get("momentum", 0.6), nesterov=bool(options.get("nesterov", 1))).step()
    return parameter.detach()


@given(seed=seeds, shape=shapes, exponent=st.integers(-4, 4))
def test_singular_values_are_near_one(seed: int, shape: tuple[int, int], exponent: int) -> None:
    matrix = well_conditioned(seed, *shape, scale=10.0**exponent)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() >= 0.5
    assert values.max() <= 1.3


@given(seed=seeds, shape=st.sampled_from([(16, 144), (144, 16), (64, 576), (5, 100), (100, 5)]))
def test_singular_values_of_a_random_matrix_are_near_one(seed: int, shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(random_matrix(seed, *shape)))
    assert values.min() >= 0.5
    assert values.max() <= 1.3


@given(seed=seeds, shape=shapes)
def test_the_result_is_close_to_the_nearest_orthogonal_matrix(seed: int, shape: tuple[int, int]) -> None:
    matrix = well_conditioned(seed, *shape, scale=1.0)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest = u @ v
    cosine = (orthogonalize(matrix) * nearest).sum() / (orthogonalize(matrix).norm() * nearest.norm())
    assert cosine > 0.97


@given(seed=seeds, shape=shapes)
def test_transposing_commutes_with_orthogonalization(seed: int, shape: tuple[int, int]) -> None:
    matrix = well_conditioned(seed, *shape, scale=1.0)
    assert torch.allclose(orthogonalize(matrix.T.contiguous()), orthogonalize(matrix).T, atol=0.15)


def test_shape_and_dtype_are_preserved() -> None:
    for dtype in (torch.float32, torch.float64):
        result = orthogonalize(random_matrix(0, 3, 7).to(dtype))
        assert (result.shape, result.dtype) == ((3, 7), dtype)


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize(
    "shape", [(8, 3, 3, 3), (8, 16, 1, 1), (8, 1, 5, 3), (8, 4, 2), (8, 20), (20, 8), (1, 6), (6, 1)]
)
def test_the_step_size_for_weights_of_any_shape(shape: tuple[int, ...]) -> None:
    weight, gradient = random_matrix(1, *shape), random_matrix(2, *shape)
    moved = one_step(weight, gradient, lr=0.1)
    assert moved.shape == weight.shape
    normalized = weight * (len(weight) ** 0.5 / weight.norm())
    rank = min(len(weight), weight[0].numel())
    assert 0.05 * rank**0.5 <= (moved - normalized).norm() <= 0.13 * rank**0.5
    assert ((moved - normalized) * gradient).sum() < 0  # downhill


@given(seed=seeds, exponent=st.integers(-5, 5), nesterov=st.booleans())
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(seed: int, exponent: int, nesterov: bool) -> None:
    weight, gradient = random_matrix(seed, 8, 12), random_matrix(seed + 1, 8, 12)
    plain = one_step(weight, gradient, lr=0.1, nesterov=nesterov)
    scaled = one_step(weight, gradient * 2.0**exponent, lr=0.1, nesterov=nesterov)
    assert torch.allclose(plain, scaled, atol=2e-3)


@given(seed=seeds, scale=st.floats(0.01, 100))
def test_the_norm_of_the_weight_is_constant(seed: int, scale: float) -> None:
    weight = scale * random_matrix(seed, 9, 4, 3, 3)
    moved = one_step(weight, random_matrix(seed + 1, 9, 4, 3, 3), lr=0.0)
    assert moved.norm() == pytest.approx(3.0, rel=1e-4)
    assert torch.allclose(moved / moved.norm(), weight / weight.norm(), atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_accumulates_gradients(nesterov: bool) -> None:
    first, second = random_matrix(3, 6, 10), random_matrix(4, 6, 10)
    parameter = nn.Parameter(random_matrix(5, 6, 10))
    optimizer = Muon([parameter], lr=0.1, momentum=0.5, nesterov=nesterov)
    parameter.grad = first.clone()
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = second.clone()
    optimizer.step()
    buffer = 0.5 * first + second
    direction = second + 0.5 * buffer if nesterov else buffer
    expected = before * (6**0.5 / before.norm()) - 0.1 * orthogonalize(direction)
    assert torch.allclose(parameter.detach(), expected, atol=1e-4)
    assert torch.equal(parameter.grad, second)


def test_a_weight_without_a_gradient_is_unchanged() -> None:
    parameter = nn.Parameter(random_matrix(0, 4, 4))
    before = parameter.detach().clone()
    Muon([parameter], lr=0.1, momentum=0.6, nesterov=True).step()
    assert torch.equal(parameter, before)


def test_a_zero_weight_stays_finite() -> None:
    assert one_step(torch.zeros(4, 6), random_matrix(0, 4, 6), lr=0.1).isfinite().all()


def test_both_memory_formats_take_the_same_step() -> None:
    weight, gradient = random_matrix(0, 8, 5, 3, 3), random_matrix(1, 8, 5, 3, 3)
    channels_last = one_step(weight.to(memory_format=torch.channels_last), gradient, lr=0.1)
    assert torch.allclose(channels_last, one_step(weight, gradient, lr=0.1), atol=1e-4)


def test_training_resumes_from_the_state_dict() -> None:
    def steps(parameter: nn.Parameter, optimizer: Muon, numbers: range) -> None:
        for number in numbers:
            parameter.grad = random_matrix(number, 6, 8)
            optimizer.step()

    whole = nn.Parameter(random_matrix(0, 6, 8))
    steps(whole, Muon([whole], lr=0.1, momentum=0.6, nesterov=True), range(1, 7))
    half = nn.Parameter(random_matrix(0, 6, 8))
    first = Muon([half], lr=0.1, momentum=0.6, nesterov=True)
    steps(half, first, range(1, 4))
    second = Muon([half], lr=0.1, momentum=0.6, nesterov=True)
    second.load_state_dict(first.state_dict())
    steps(half, second, range(4, 7))
    assert torch.equal(half, whole)
