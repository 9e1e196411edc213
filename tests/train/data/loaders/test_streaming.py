import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.loaders.selection import select_loader
from cifarx_train.data.loaders.streaming import StreamingLoader

CPU = torch.device("cpu")
COUNT = 400


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (COUNT, 5, 7, 3), np.uint8))
    return path


@pytest.fixture(scope="module")
def in_memory(file: Path) -> LabeledImages:
    return LabeledImages(np.load(file), np.arange(COUNT) % 10)


@pytest.fixture(scope="module")
def mapped(file: Path) -> LabeledImages:
    return LabeledImages(np.asarray(np.load(file, mmap_mode="r")), np.arange(COUNT) % 10, file)


@pytest.fixture(params=["in_memory", "mapped"], scope="module")
def data(request: pytest.FixtureRequest) -> LabeledImages:
    images: LabeledImages = request.getfixturevalue(request.param)
    return images


@pytest.fixture(scope="module")
def loader(data: LabeledImages) -> StreamingLoader:
    """One loader for many epochs, as in a training run."""
    return StreamingLoader(data, CPU)


def shuffled(batch_size: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed)).split(batch_size))


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@given(
    order=st.lists(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=9), max_size=12),
)
@settings(max_examples=60)
def test_batches_are_those_of_the_device_loader(
    loader: StreamingLoader, in_memory: LabeledImages, order: list[list[int]]
) -> None:
    indices = [torch.tensor(batch, dtype=torch.int64) for batch in order]
    expected = list(DeviceLoader(in_memory, CPU).batches(indices))
    batches = list(loader.batches(indices))
    assert len(batches) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(batches, expected, strict=True):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_length_is_the_number_of_images(loader: StreamingLoader) -> None:
    assert len(loader) == COUNT


def test_large_batches(loader: StreamingLoader, in_memory: LabeledImages) -> None:
    order = [torch.arange(COUNT).repeat(100)] * 5  # 4 MB of images and 320 kB of indices: more than a pipe holds
    for images, _ in loader.batches(order):
        assert torch.equal(images[-COUNT:], torch.from_numpy(in_memory.images))


def test_a_batch_is_a_copy(loader: StreamingLoader, in_memory: LabeledImages) -> None:
    before = in_memory.images.copy()
    for images, _ in loader.batches(shuffled(50)):
        images.zero_()
    assert np.array_equal(in_memory.images, before)


def test_two_concurrent_iterators(data: LabeledImages) -> None:
    loader = StreamingLoader(data, CPU)
    orders = [shuffled(40, seed=1), shuffled(40, seed=2)]
    pairs = zip(*(loader.batches(order) for order in orders), strict=True)
    for number, batches in enumerate(pairs):
        for (images, labels), order in zip(batches, orders, strict=True):
            assert torch.equal(images, torch.from_numpy(data.images[order[number].numpy()]))
            assert labels.tolist() == (order[number] % 10).tolist()


def test_workers_are_reused_and_end_with_the_loader(mapped: LabeledImages) -> None:
    others = set(workers())
    loader = StreamingLoader(mapped, CPU)
    assert set(workers()) == others  # not started before the first batch
    list(loader.batches(shuffled(64)))
    started = set(workers()) - others
    assert started
    list(loader.batches(shuffled(64)))
    assert set(workers()) - others == started
    del loader
    assert set(workers()) == others


def test_closing_an_iterator_ends_the_workers(mapped: LabeledImages) -> None:
    others = set(workers())
    loader = StreamingLoader(mapped, CPU)
    batches = loader.batches(shuffled(8))
    next(batches)
    assert set(workers()) > others
    batches.close()  # type: ignore[attr-defined]
    assert set(workers()) == others
    assert len(list(loader.batches(shuffled(64)))) == 7  # a new iterator starts new workers


def test_a_killed_worker_raises_an_error_and_is_restarted_in_the_next_epoch(mapped: LabeledImages) -> None:
    others = set(workers())
    loader = StreamingLoader(mapped, CPU)
    batches = loader.batches(shuffled(4))
    next(batches)
    for worker in set(workers()) - others:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a worker process that reads .*images\.npy exited with status -9"):
        list(batches)
    assert set(workers()) == others
    assert len(list(loader.batches(shuffled(64)))) == 7


def test_a_missing_file_is_an_error(tmp_path: Path, in_memory: LabeledImages) -> None:
    loader = StreamingLoader(LabeledImages(in_memory.images, in_memory.labels, tmp_path / "gone.npy"), CPU)
    with pytest.raises(DataError, match=r"process that reads .*gone\.npy exited .*restore the file if it is gone"):
        list(loader.batches(shuffled(64)))


def test_workers_end_if_the_training_process_is_killed(file: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"""
def main():
    import time
    import numpy as np, torch
    from pathlib import Path
    from cifarx_train.data.dataset import LabeledImages
    from cifarx_train.data.loaders.streaming import StreamingLoader

    file = Path({str(file)!r})
    loader = StreamingLoader(LabeledImages(np.load(file), np.arange({COUNT}), file), torch.device("cpu"))
    list(loader.batches([torch.arange(5)] * 20))
    print("ready", flush=True)
    time.sleep(100)

if __name__ == "__main__":
    main()
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(program)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        process.kill()
    assert psutil.wait_procs(started, timeout=20)[1] == []


# --- selection


def test_a_cpu_uses_the_device_loader(data: LabeledImages) -> None:
    assert isinstance(select_loader(data, CPU), DeviceLoader)


@pytest.mark.parametrize(("extra", "kind"), [(0, DeviceLoader), (-1, StreamingLoader)])
def test_images_over_half_of_the_free_memory_are_streamed_with_a_warning(
    in_memory: LabeledImages, monkeypatch: pytest.MonkeyPatch, extra: int, kind: type
) -> None:
    monkeypatch.setattr(
        "cifarx_train.data.loaders.selection.free_device_memory", lambda _: 2 * in_memory.images.nbytes + extra
    )
    if kind is DeviceLoader:
        loader = select_loader(in_memory, CPU)
    else:
        with pytest.warns(
            FallbackWarning,
            match=r"need 42,000 bytes, more than half of the 83,999 free bytes on cpu: they are",
        ):
            loader = select_loader(in_memory, CPU)
    assert isinstance(loader, kind)


@pytest.mark.gpu
def test_batches_on_a_gpu(data: LabeledImages) -> None:
    device = torch.device("cuda")
    order = shuffled(64)
    pairs = zip(StreamingLoader(data, device).batches(order), DeviceLoader(data, device).batches(order), strict=True)
    for (images, labels), (expected_images, expected_labels) in pairs:
        assert images.device.type == "cuda"
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
