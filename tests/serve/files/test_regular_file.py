import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cifarx_serve.files import regular_file
from cifarx_serve.files.regular_file import (
    open_file_or_pipe,
    open_regular_file,
    read_regular_file,
    require_regular_file,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


def endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


MAKERS = [pipe, linked_pipe, endless_device, unix_socket]


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_no_regular_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x"
    make(path)
    for function in (require_regular_file, open_regular_file, lambda path: read_regular_file(path, 10)):
        started = time.monotonic()
        with pytest.raises(OSError, match=r"not a regular file|No such device") as refused:
            function(path)
        assert time.monotonic() - started < 1.0
        assert refused.value.filename == str(path) or refused.value.filename == path


def test_a_directory_and_a_missing_file(tmp_path: Path) -> None:
    for function in (require_regular_file, open_regular_file, open_file_or_pipe):
        with pytest.raises(IsADirectoryError):
            function(tmp_path)
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "absent")


def test_the_size_of_a_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert read_regular_file(path, 10) == b"0123456789"
    with pytest.raises(OSError, match="it has more than 9 bytes"):
        read_regular_file(path, 9)
    with path.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(OSError, match="it has more than 1,000 bytes"):
        read_regular_file(path, 1000)


@pytest.mark.parametrize("make", [pipe, linked_pipe])
def test_a_pipe_that_nobody_writes_is_not_waited_for(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regular_file, "_PIPE_TIMEOUT_MS", 50)
    make(tmp_path / "x")
    with pytest.raises(OSError, match="not a regular file, and nothing writes to the pipe"):
        open_file_or_pipe(tmp_path / "x")


def test_a_pipe_with_a_writer_is_read_to_its_end(tmp_path: Path) -> None:
    pipe(tmp_path / "x")
    content = bytes(200_000)
    writer = threading.Thread(target=(tmp_path / "x").write_bytes, args=(content,))
    writer.start()
    with open_file_or_pipe(tmp_path / "x") as file:
        assert file.read() == content
    writer.join()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_the_pipe_of_a_shell_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_file, "_PIPE_TIMEOUT_MS", 50)
    reading, writing = os.pipe()

    def write() -> None:
        time.sleep(0.3)
        os.write(writing, b"late")
        os.close(writing)

    writer = threading.Thread(target=write)
    writer.start()
    with open_file_or_pipe(f"/dev/fd/{reading}") as file:
        assert file.read() == b"late"
    writer.join()
    os.close(reading)


def test_devices_are_no_pipes() -> None:
    with pytest.raises(OSError, match="not a regular file"):
        open_file_or_pipe("/dev/zero")
