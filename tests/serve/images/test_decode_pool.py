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
from cifarx_serve.images.decode_pool import START, DecodingProcesses
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.spec import InputSpec

SPEC = InputSpec(height=5, width=7, resize="bicubic")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pictures of several sizes; one is damaged, one is absent, one has a name that is no text."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    found = []
    for number in range(6):
        found.append(str(folder / f"{number}.png"))
        Image.fromarray(random.integers(0, 256, (3 + number, 9, 3), np.uint8)).save(found[-1])
    (folder / "damaged.png").write_bytes(Path(found[0]).read_bytes()[:60])
    odd = os.fsdecode(os.fsencode(str(folder)) + b"/\xff.png")
    Path(odd).write_bytes(Path(found[1]).read_bytes())
    return [*found[:3], str(folder / "damaged.png"), *found[3:], str(folder / "absent.png"), odd]


@pytest.fixture
def started(files: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[DecodingProcesses]:
    """Two processes, both ready."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with closing(DecodingProcesses(SPEC, 2)) as processes:
        assert processes.decode(files[:1] * (START + 1)) is None
        _wait_for(lambda: processes._free.qsize() == 2)
        yield processes


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "decode_worker" in " ".join(child.cmdline())]


def test_it_is_what_this_process_would_have_read(started: DecodingProcesses, files: list[str]) -> None:
    found = started.decode(files)
    assert found is not None
    for file, image in zip(files, found, strict=True):
        try:
            expected = resize(read_image(file), SPEC)
        except ImageError as error:
            assert isinstance(image, ImageError)
            assert (image.problem, image.remedy) == (error.problem, error.remedy)
        else:
            assert np.array_equal(image, expected)
    assert sum(isinstance(image, ImageError) for image in found) == 2


def test_each_has_one_thread(started: DecodingProcesses) -> None:
    """Of numpy's own, which are for matrices, there would be one a CPU."""
    assert started._free.qsize() == 2
    assert [child.num_threads() for child in _children()] == [1, 1]


def test_all_may_be_broken(started: DecodingProcesses, files: list[str]) -> None:
    found = started.decode([files[-2]] * 3)
    assert found is not None
    assert [type(image) for image in found] == [ImageError] * 3


def test_paths_and_strings_are_decoded_and_nothing_else(started: DecodingProcesses, files: list[str]) -> None:
    assert started.decode([Path(files[0]), files[1]]) is not None
    assert started.decode([files[0], Path(files[0]).read_bytes()]) is None
    assert started.decode([Image.new("RGB", (3, 3))]) is None


def test_few_files_start_no_process(files: list[str]) -> None:
    before = _children()
    with closing(DecodingProcesses(SPEC, 2)) as processes:
        assert processes.decode(files[:1] * START) is None
        assert _children() == before


def test_one_cpu_starts_no_process(files: list[str]) -> None:
    before = _children()
    with closing(DecodingProcesses(SPEC, 1)) as processes:
        assert processes.decode(files[:1] * (START + 1)) is None
        assert processes.decode(files) is None
        assert _children() == before


def test_where_no_process_can_be_started_the_caller_does_it(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/absent/python")
    with closing(DecodingProcesses(SPEC, 2)) as processes:
        assert processes.decode(files[:1] * (START + 1)) is None
        assert processes.decode(files) is None


def test_they_end_with_their_context(files: list[str]) -> None:
    before = _children()
    with closing(DecodingProcesses(SPEC, 2)) as processes:
        processes.decode(files[:1] * (START + 1))
    assert _children() == before


def test_one_that_is_killed_costs_no_answer(started: DecodingProcesses, files: list[str]) -> None:
    """The caller reads those files itself, and the others go on."""
    for child in _children()[:1]:
        os.kill(child.pid, signal.SIGKILL)
        psutil.wait_procs([child])
    found = [started.decode(files) for _ in range(4)]
    assert sum(images is None for images in found) == 1
    assert len(_children()) == 1


def test_the_end_of_its_parent_ends_the_program() -> None:
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
