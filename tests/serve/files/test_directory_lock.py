import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cifarx_serve.errors import FallbackWarning, OutputError
from cifarx_serve.files.directory_lock import FILE_NAME, lock_directory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")

HOLD = """
import sys
from pathlib import Path
from cifarx_serve.files.directory_lock import lock_directory
with lock_directory(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_run(directory: Path) -> "Iterator[subprocess.Popen[str]]":
    """Hold the lock in another process."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_the_owner_named(tmp_path: Path) -> None:
    with another_run(tmp_path) as owner:
        with pytest.raises(OutputError) as refused, lock_directory(tmp_path):
            pass
        assert str(refused.value) == (
            f"another run writes into {tmp_path} (process {owner.pid} on {socket.gethostname()}): "
            "wait until it has ended, or give another --out"
        )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_run_that_was_killed_is_taken_over(tmp_path: Path, number: int) -> None:
    with another_run(tmp_path) as owner:
        owner.send_signal(number)
        owner.wait()
        assert (tmp_path / FILE_NAME).exists()
        with lock_directory(tmp_path):
            assert (tmp_path / FILE_NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_directory(tmp_path):
        raise ZeroDivisionError
    with lock_directory(tmp_path):
        pass


def test_a_new_directory_is_removed_only_if_it_is_empty(tmp_path: Path) -> None:
    with lock_directory(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock_directory(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "lzh_0.pth").touch()
    assert (tmp_path / "a" / "b" / "lzh_0.pth").exists()


def test_two_runs_that_take_turns_never_hold_the_lock_at_once(tmp_path: Path) -> None:
    """Each removes the file that the other one may have opened already."""
    program = """
import sys
from pathlib import Path
from cifarx_serve.errors import OutputError
from cifarx_serve.files.directory_lock import lock_directory
held = 0
while held < 200:
    try:
        with lock_directory(Path(sys.argv[1])):
            (Path(sys.argv[1]) / "held").touch(exist_ok=False)
            (Path(sys.argv[1]) / "held").unlink()
            held += 1
    except OutputError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, tmp_path]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_lock_file_that_someone_else_has_put_there(tmp_path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / FILE_NAME)
    else:
        (tmp_path / FILE_NAME).symlink_to(tmp_path / "precious")
        (tmp_path / "precious").write_text("precious")
    with pytest.raises(OutputError, match="cannot write"), lock_directory(tmp_path):
        pass
    if kind == "link":
        assert (tmp_path / "precious").read_text() == "precious"


def test_a_directory_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"), lock_directory(tmp_path / "file" / "out"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(FallbackWarning, match="cannot lock .* \\(No locks available\\)"), lock_directory(tmp_path):
        pass
