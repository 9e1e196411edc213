import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceLoader, InputTransform

PLAIN = InputSpec(height=2, width=3)
CPU = torch.device("cpu")

sides = st.integers(1, 4)
means = st.floats(-1, 1, width=32)
deviations = st.floats(0.0625, 2, width=32)


def indexed_images(count: int) -> LabeledImages:
    """Return images whose pixels all have the value of their index, and labels of ten times the index."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (count, 2, 3, 3)).copy()
    return LabeledImages(images, np.arange(count, dtype=np.int64) * 10)


# --- batches


@given(order=st.permutations(range(13)), batch_size=st.integers(1, 15))
def test_images_and_labels_stay_together_in_any_order(order: list[int], batch_size: int) -> None:
    data = indexed_images(13)
    batches = list(DeviceLoader(data, CPU).batches(torch.tensor(order).split(batch_size)))
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1][1]) <= batch_size
    assert torch.cat([labels for _, labels in batches]).tolist() == [10 * number for number in order]
    assert np.array_equal(torch.cat([images for images, _ in batches]).numpy(), data.images[order])


def test_batches_contain_the_given_indices() -> None:
    order = [torch.tensor([3]), torch.tensor([1, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 4, 2])]
    batches = list(DeviceLoader(indexed_images(5), CPU).batches(order))
    assert [labels.tolist() for _, labels in batches] == [[30], [10, 10], [], [0, 40, 20]]
    assert all((images.dtype, labels.dtype) == (torch.uint8, torch.int64) for images, labels in batches)
    assert [tuple(images.shape) for images, _ in batches] == [(n, 2, 3, 3) for n in (1, 2, 0, 3)]


def test_a_batch_is_a_copy() -> None:
    data, order = DeviceLoader(indexed_images(5), CPU), [torch.arange(5)]
    next(iter(data.batches(order)))[0].zero_()
    assert next(iter(data.batches(order)))[0].sum() > 0


def test_length_is_the_number_of_images() -> None:
    assert len(DeviceLoader(indexed_images(7), CPU)) == 7


def test_memory_mapped_images_cause_no_warning(tmp_path: Path) -> None:
    data = indexed_images(9)
    np.save(tmp_path / "images.npy", data.images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = DeviceLoader(LabeledImages(mapped, data.labels), CPU)
        images, _ = next(iter(loader.batches([torch.tensor([8, 2])])))
    assert np.array_equal(images.numpy(), data.images[[8, 2]])


# --- input transform


def test_every_level_is_divided_by_255() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    expected = (np.arange(256, dtype=np.float32) / np.float32(255)).reshape(16, 16)
    assert all(np.array_equal(channel, expected) for channel in InputTransform(PLAIN, CPU)(levels)[0].numpy())


@given(
    pixels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), sides, sides, st.just(3))),
    low=st.sampled_from([0.0, -1.0, 0.5]),
    high=st.sampled_from([1.0, 255.0]),
    mean=st.tuples(means, means, means),
    std=st.tuples(deviations, deviations, deviations),
    channels_last=st.booleans(),
)
def test_training_and_serving_have_bit_identical_inputs(
    pixels: NDArray[np.uint8],
    low: float,
    high: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    channels_last: bool,
) -> None:
    spec = InputSpec(height=pixels.shape[1], width=pixels.shape[2], value_range=(low, high), mean=mean, std=std)
    inputs = InputTransform(spec, CPU, channels_last=channels_last)(torch.from_numpy(pixels)).numpy()
    assert inputs.dtype == np.float32
    assert inputs.tobytes() == normalize(pixels, spec).tobytes()


@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        InputSpec(height=2, width=3, std=(1.0, 0.5, 1.0)),
        InputSpec(height=2, width=3, mean=(0.0, 0.0, 0.1)),
        InputSpec(height=2, width=3, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        InputSpec(height=2, width=3, value_range=(0.0, 255.0)),
        InputSpec(height=2, width=3, color="BGR", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        InputSpec(height=2, width=3, layout="NHWC", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        InputSpec(height=2, width=3, color="BGR", layout="NHWC", value_range=(-1.0, 1.0), mean=(0.1, 0.0, 0.2)),
        InputSpec(height=2, width=3, channels=1, color="L", mean=(0.1307,), std=(0.3081,)),
        InputSpec(height=2, width=3, channels=1, color="L", layout="NHWC", mean=(0.1307,), std=(0.3081,)),
    ],
    ids=lambda spec: f"{spec.color} {spec.layout} {spec.mean} {spec.std} {spec.value_range}",
)
def test_all_levels_have_bit_identical_inputs(spec: InputSpec) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, spec.channels), dtype=np.uint8)
    pixels[0, :8, :, :] = np.arange(256, dtype=np.uint8).reshape(8, 32, 1)
    for channels_last in (False, True):
        inputs = InputTransform(spec, CPU, channels_last=channels_last)(torch.from_numpy(pixels)).numpy()
        assert inputs.shape == (50, *msgspec.structs.replace(spec, height=32, width=32).shape)
        assert inputs.tobytes() == normalize(pixels, spec).tobytes()


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format(channels_last: bool) -> None:
    images = torch.zeros(4, 6, 5, 3, dtype=torch.uint8)
    inputs = InputTransform(PLAIN, CPU, channels_last=channels_last)(images)
    assert inputs.shape == (4, 3, 6, 5)
    assert inputs.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert inputs.is_contiguous() != channels_last


def test_the_images_are_not_changed() -> None:
    images = torch.from_numpy(indexed_images(5).images)
    before = images.clone()
    InputTransform(InputSpec(height=2, width=3, mean=(0.1, 0.2, 0.3)), CPU)(images)
    assert torch.equal(images, before)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(height=32, width=32, mean=(0.49, 0.48, 0.44), std=(0.2, 0.2, 0.25)),
        InputSpec(height=32, width=32, color="BGR", layout="NHWC", mean=(0.49, 0.48, 0.44), std=(0.2, 0.2, 0.25)),
        InputSpec(height=32, width=32, channels=1, color="L", value_range=(-1.0, 1.0), mean=(0.13,), std=(0.31,)),
    ],
    ids=["RGB", "BGR, NHWC", "grayscale"],
)
def test_a_gpu_has_bit_identical_inputs(spec: InputSpec, channels_last: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, spec.channels), dtype=np.uint8)
    device = torch.device("cuda")
    loader = DeviceLoader(LabeledImages(pixels, np.zeros(50, np.int64)), device)
    images, _ = next(iter(loader.batches([torch.arange(50)])))
    inputs = InputTransform(spec, device, channels_last=channels_last)(images)
    assert inputs.cpu().numpy().tobytes() == normalize(pixels, spec).tobytes()
