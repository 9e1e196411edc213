import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from cifarx_serve.preprocess import scale
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabelledImages
from cifarx_train.data.on_device import DeviceImages, to_input

PLAIN = InputSpec(height=2, width=3)
CPU = torch.device("cpu")

sides = st.integers(1, 4)
means = st.floats(-1, 1, width=32)
deviations = st.floats(0.0625, 2, width=32)


def numbered(count: int) -> LabelledImages:
    """Images that are their own numbers in every pixel, with labels that are ten times that."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (count, 2, 3, 3)).copy()
    return LabelledImages(images, np.arange(count, dtype=np.int64) * 10)


@given(count=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_stored_order_gives_every_image_once(count: int, batch_size: int) -> None:
    data = numbered(count)
    batches = list(DeviceImages(data, PLAIN, CPU).batches(batch_size))
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1][1]) <= batch_size
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(count) * 10)
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), torch.from_numpy(scale(data.images, PLAIN)))


@given(order=st.permutations(range(13)), batch_size=st.integers(1, 15))
def test_another_order_keeps_images_and_labels_together(order: list[int], batch_size: int) -> None:
    data = numbered(13)
    batches = list(DeviceImages(data, PLAIN, CPU).batches(batch_size, torch.tensor(order)))
    assert torch.cat([labels for _, labels in batches]).tolist() == [10 * number for number in order]
    expected = torch.from_numpy(scale(data.images[order], PLAIN))
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), expected)


def test_batches_are_what_a_network_takes() -> None:
    inputs, labels = next(DeviceImages(numbered(5), PLAIN, CPU).batches(4))
    assert (inputs.shape, inputs.dtype) == ((4, 3, 2, 3), torch.float32)
    assert (labels.shape, labels.dtype) == ((4,), torch.int64)


def test_a_batch_is_a_copy() -> None:
    data = DeviceImages(numbered(5), PLAIN, CPU)
    next(data.batches(5))[0].zero_()
    assert next(data.batches(5))[0].sum() > 0


def test_a_split_is_as_long_as_it_has_images() -> None:
    assert len(DeviceImages(numbered(7), PLAIN, CPU)) == 7


def test_every_level_is_its_255th_part() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = (np.arange(256, dtype=np.float32) / np.float32(255)).reshape(16, 16)
    assert all(np.array_equal(channel, expected) for channel in to_input(levels, PLAIN)[0].numpy())


@given(
    pixels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), sides, sides, st.just(3))),
    low=st.sampled_from([0.0, -1.0, 0.5]),
    high=st.sampled_from([1.0, 255.0]),
    mean=st.tuples(means, means, means),
    std=st.tuples(deviations, deviations, deviations),
)
def test_training_and_serving_give_the_network_the_same_bits(
    pixels: NDArray[np.uint8],
    low: float,
    high: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    spec = InputSpec(height=pixels.shape[1], width=pixels.shape[2], value_range=(low, high), mean=mean, std=std)
    there = to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), spec).numpy()
    assert there.dtype == np.float32
    assert there.tobytes() == scale(pixels, spec).tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
def test_a_gpu_gives_the_same_bits() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    spec = InputSpec(height=32, width=32, mean=(0.49, 0.48, 0.44), std=(0.2, 0.2, 0.25))
    inputs, _ = next(
        DeviceImages(LabelledImages(pixels, np.zeros(50, np.int64)), spec, torch.device("cuda")).batches(50)
    )
    assert inputs.cpu().numpy().tobytes() == scale(pixels, spec).tobytes()
