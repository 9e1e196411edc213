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
from cifarx_train.data.loaders.device import DeviceImages
from cifarx_train.data.loaders.placement import free_memory, place_images
from cifarx_train.data.loaders.streaming import StreamedImages

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
    found: LabeledImages = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def streamed(data: LabeledImages) -> StreamedImages:
    """One for many epochs, as in a run."""
    return StreamedImages(data, CPU)


def shuffled(batch_size: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed)).split(batch_size))


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


@given(
    order=st.lists(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=9), max_size=12),
)
@settings(max_examples=60)
def test_batches_are_those_of_images_on_the_device(
    streamed: StreamedImages, in_memory: LabeledImages, order: list[list[int]]
) -> None:
    wanted = [torch.tensor(batch, dtype=torch.int64) for batch in order]
    expected = list(DeviceImages(in_memory, CPU).batches(wanted))
    got = list(streamed.batches(wanted))
    assert len(got) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(got, expected, strict=True):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_a_split_is_as_long_as_it_has_images(streamed: StreamedImages) -> None:
    assert len(streamed) == COUNT


def test_large_batches(streamed: StreamedImages, in_memory: LabeledImages) -> None:
    order = [torch.arange(COUNT).repeat(100)] * 5  # 4 MB each, and 320 kB to ask for one: more than a pipe holds
    for images, _ in streamed.batches(order):
        assert torch.equal(images[-COUNT:], torch.from_numpy(in_memory.images))


def test_a_batch_is_a_copy(streamed: StreamedImages, in_memory: LabeledImages) -> None:
    before = in_memory.images.copy()
    for images, _ in streamed.batches(shuffled(50)):
        images.zero_()
    assert np.array_equal(in_memory.images, before)


def test_two_iterators_at_once_do_not_mix(data: LabeledImages) -> None:
    streamed = StreamedImages(data, CPU)
    orders = [shuffled(40, seed=1), shuffled(40, seed=2)]
    pairs = zip(*(streamed.batches(order) for order in orders), strict=True)
    for number, both in enumerate(pairs):
        for (images, labels), order in zip(both, orders, strict=True):
            assert torch.equal(images, torch.from_numpy(data.images[order[number].numpy()]))
            assert labels.tolist() == (order[number] % 10).tolist()


def test_workers_stay_for_the_next_epoch_and_end_with_the_object(mapped: LabeledImages) -> None:
    others = set(workers())
    streamed = StreamedImages(mapped, CPU)
    assert set(workers()) == others  # none before they are needed
    list(streamed.batches(shuffled(64)))
    started = set(workers()) - others
    assert started
    list(streamed.batches(shuffled(64)))
    assert set(workers()) - others == started
    del streamed
    assert set(workers()) == others


def test_closing_early_leaves_no_processes(mapped: LabeledImages) -> None:
    others = set(workers())
    streamed = StreamedImages(mapped, CPU)
    batches = streamed.batches(shuffled(8))
    next(batches)
    assert set(workers()) > others
    batches.close()  # type: ignore[attr-defined]
    assert set(workers()) == others
    assert len(list(streamed.batches(shuffled(64)))) == 7  # and it can be gone through again


def test_a_killed_worker_is_an_error_and_the_next_epoch_has_new_ones(mapped: LabeledImages) -> None:
    others = set(workers())
    streamed = StreamedImages(mapped, CPU)
    batches = streamed.batches(shuffled(4))
    next(batches)
    for worker in set(workers()) - others:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a process that reads .*images\.npy ended \(exit status -9\)"):
        list(batches)
    assert set(workers()) == others
    assert len(list(streamed.batches(shuffled(64)))) == 7


def test_a_file_that_is_gone_is_an_error(tmp_path: Path, in_memory: LabeledImages) -> None:
    streamed = StreamedImages(LabeledImages(in_memory.images, in_memory.labels, tmp_path / "gone.npy"), CPU)
    with pytest.raises(DataError, match=r"a process that reads .*gone\.npy ended .*with the file in its place"):
        list(streamed.batches(shuffled(64)))


def test_workers_end_with_a_process_that_is_killed(file: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"""
def main():
    import time
    import numpy as np, torch
    from pathlib import Path
    from cifarx_train.data.dataset import LabeledImages
    from cifarx_train.data.loaders.streaming import StreamedImages

    file = Path({str(file)!r})
    streamed = StreamedImages(LabeledImages(np.load(file), np.arange({COUNT}), file), torch.device("cpu"))
    list(streamed.batches([torch.arange(5)] * 20))
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


# --- placing


def test_on_a_cpu_images_stay_where_they_are(data: LabeledImages) -> None:
    assert free_memory(CPU) is None
    assert isinstance(place_images(data, CPU), DeviceImages)


@pytest.mark.parametrize(("spare", "kind"), [(0, DeviceImages), (-1, StreamedImages)])
def test_more_than_half_of_the_free_memory_is_streamed_and_said(
    in_memory: LabeledImages, monkeypatch: pytest.MonkeyPatch, spare: int, kind: type
) -> None:
    monkeypatch.setattr(
        "cifarx_train.data.loaders.placement.free_memory", lambda _: 2 * in_memory.images.nbytes + spare
    )
    if kind is DeviceImages:
        placed = place_images(in_memory, CPU)
    else:
        with pytest.warns(
            FallbackWarning, match=r"take 42,000 bytes, more than half of the 83,999 .*free on cpu.*streamed"
        ):
            placed = place_images(in_memory, CPU)
    assert isinstance(placed, kind)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_batches_are_the_same(data: LabeledImages) -> None:
    device = torch.device("cuda")
    assert (free_memory(device) or 0) > 0
    order = shuffled(64)
    pairs = zip(StreamedImages(data, device).batches(order), DeviceImages(data, device).batches(order), strict=True)
    for (images, labels), (expected_images, expected_labels) in pairs:
        assert images.device.type == "cuda"
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
