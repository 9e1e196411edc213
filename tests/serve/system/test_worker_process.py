import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cifarx_serve.system.worker_process import ChildEnded, ChildProgram

_ECHO = """
import sys
from cifarx_serve.system.worker_process import take_replies

replies = take_replies()
print("a library prints", flush=True)
for line in sys.stdin.buffer:
    if line == b"die\\n":
        sys.exit(7)
    replies.write(b"half a re" if line == b"half\\n" else line.upper())
    replies.flush()
    if line == b"half\\n":
        sys.exit(8)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChildProgram]:
    """A program that replies in capitals, in a module that this process alone knows where to find."""
    (tmp_path / "echo_program.py").write_text(_ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    program = ChildProgram("echo_program")
    yield program
    program.close()


def test_a_reply_a_request(child: ChildProgram) -> None:
    for word in (b"one", b"two"):
        child.send(word)
        assert child.read_line() == word.upper() + b"\n"
    child.send(b"three")
    assert child.read(3) == b"THR"
    assert child.read(3) == b"EE\n"


def test_closing_ends_it(child: ChildProgram) -> None:
    process = psutil.Process(child.pid)
    child.send(b"one")
    child.close()
    assert not process.is_running()
    child.close()


@pytest.mark.parametrize(("request_line", "status"), [(b"die", 7), (b"half", 8)])
def test_one_that_ended_is_told_with_its_status(child: ChildProgram, request_line: bytes, status: int) -> None:
    child.send(request_line)
    with pytest.raises(ChildEnded) as raised:
        child.read_line()
    assert raised.value.status == status
    child.send(b"are you there?")


def test_one_that_was_killed_in_the_middle_of_a_reply(child: ChildProgram) -> None:
    child.send(b"one")
    child.read(1)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildEnded) as raised:
        child.read(100)
    assert raised.value.status == -signal.SIGKILL


def test_ctrl_c_does_not_end_it(child: ChildProgram) -> None:
    child.send(b"one")
    child.read_line()
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.1)
    child.send(b"two")
    assert child.read_line() == b"TWO\n"


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "echo_program.py").write_text(_ECHO)
    (tmp_path / "signal.py").write_text("raise SystemExit(99)")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != tmp_path and entry])
    monkeypatch.chdir(tmp_path)
    program = ChildProgram("echo_program")
    program.send(b"one")
    assert program.read_line() == b"ONE\n"
    program.close()
