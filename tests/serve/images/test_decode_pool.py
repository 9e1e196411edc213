import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.decode_pool import START_THRESHOLD, DecodePool
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec
from tests.support.child_processes import running_children

SPEC = InputSpec(height=5, width=7, interpolation="bicubic")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write images of several sizes; one is damaged, one is missing, and one has a name that is not UTF-8."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for number in range(6):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(random.integers(0, 256, (3 + number, 9, 3), np.uint8)).save(paths[-1])
    (folder / "damaged.png").write_bytes(Path(paths[0]).read_bytes()[:60])
    odd = os.fsdecode(os.fsencode(str(folder)) + b"/\xff.png")
    Path(odd).write_bytes(Path(paths[1]).read_bytes())
    return [*paths[:3], str(folder / "damaged.png"), *paths[3:], str(folder / "absent.png"), odd]


@pytest.fixture
def pool(files: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[DecodePool]:
    """Return a pool whose two workers are ready."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with closing(DecodePool(SPEC, 2)) as pool:
        assert pool.decode(files[:1] * (START_THRESHOLD + 1)) is None
        _wait_for(lambda: pool._idle.qsize() == 2)
        yield pool


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _children() -> list[psutil.Process]:
    return running_children("decode_worker")


def test_decodes_like_this_process(pool: DecodePool, files: list[str]) -> None:
    decoded = pool.decode(files)
    assert decoded is not None
    for file, image in zip(files, decoded, strict=True):
        try:
            expected = resize(read_image(file), SPEC)
        except ImageError as error:
            assert isinstance(image, ImageError)
            assert (image.problem, image.remedy) == (error.problem, error.remedy)
        else:
            assert not isinstance(image, ImageError)
            assert np.array_equal(image, expected)
    assert sum(isinstance(image, ImageError) for image in decoded) == 2


def test_each_worker_has_one_thread(pool: DecodePool) -> None:
    """By default, numpy would start one thread per CPU for its matrix operations."""
    assert pool._idle.qsize() == 2
    assert [child.num_threads() for child in _children()] == [1, 1]


def test_a_batch_of_only_unreadable_files(pool: DecodePool, files: list[str]) -> None:
    decoded = pool.decode([files[-2]] * 3)
    assert decoded is not None
    assert [type(image) for image in decoded] == [ImageError] * 3


def test_only_paths_and_strings_are_decoded(pool: DecodePool, files: list[str]) -> None:
    assert pool.decode([Path(files[0]), files[1]]) is not None
    assert pool.decode([files[0], Path(files[0]).read_bytes()]) is None
    assert pool.decode([Image.new("RGB", (3, 3))]) is None


def test_few_files_start_no_worker(files: list[str]) -> None:
    before = _children()
    with closing(DecodePool(SPEC, 2)) as pool:
        assert pool.decode(files[:1] * START_THRESHOLD) is None
        assert _children() == before


def test_one_cpu_starts_no_worker(files: list[str]) -> None:
    before = _children()
    with closing(DecodePool(SPEC, 1)) as pool:
        assert pool.decode(files[:1] * (START_THRESHOLD + 1)) is None
        assert pool.decode(files) is None
        assert _children() == before


def test_returns_none_if_no_process_can_be_started(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/absent/python")
    with closing(DecodePool(SPEC, 2)) as pool:
        assert pool.decode(files[:1] * (START_THRESHOLD + 1)) is None
        assert pool.decode(files) is None


def test_workers_exit_when_the_pool_is_closed(files: list[str]) -> None:
    before = _children()
    with closing(DecodePool(SPEC, 2)) as pool:
        pool.decode(files[:1] * (START_THRESHOLD + 1))
    assert _children() == before


def test_a_killed_worker_loses_no_files(pool: DecodePool, files: list[str]) -> None:
    """The caller decodes those files itself, and the other worker continues."""
    for child in _children()[:1]:
        os.kill(child.pid, signal.SIGKILL)
        psutil.wait_procs([child])
    decoded = [pool.decode(files) for _ in range(4)]
    assert sum(images is None for images in decoded) == 1
    assert len(_children()) == 1


def test_the_worker_exits_when_its_input_is_closed() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "cifarx_serve.images.decode_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(msgspec.json.encode(SPEC) + b"\n")
    program.stdin.flush()
    assert program.stdout.readline() == b"[]\n"
    program.stdin.close()
    assert program.wait(20) == 0
    program.stdout.close()
