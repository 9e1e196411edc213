import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cifarx_serve.system.worker_process import WorkerExited, WorkerProcess, start_module

_ECHO = """
import sys
from cifarx_serve.system.worker_process import init_worker

replies = init_worker()
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
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """Start a worker that replies in upper case. Its module is only on the import path of this process."""
    (tmp_path / "echo_program.py").write_text(_ECHO)
    monkeypatch.syspath_prepend(tmp_path)
    program = start_module("echo_program")
    yield program
    program.close()


def test_each_request_gets_a_reply(worker: WorkerProcess) -> None:
    for word in (b"one", b"two"):
        worker.send(word)
        assert worker.readline() == word.upper() + b"\n"
    worker.send(b"three")
    assert worker.read(3) == b"THR"
    assert worker.read(3) == b"EE\n"


def test_closing_ends_the_worker(worker: WorkerProcess) -> None:
    process = psutil.Process(worker.pid)
    worker.send(b"one")
    worker.close()
    assert not process.is_running()
    worker.close()


@pytest.mark.parametrize(("request_line", "status"), [(b"die", 7), (b"half", 8)])
def test_the_exit_status_of_a_worker_is_reported(worker: WorkerProcess, request_line: bytes, status: int) -> None:
    worker.send(request_line)
    with pytest.raises(WorkerExited) as raised:
        worker.readline()
    assert raised.value.status == status
    worker.send(b"are you there?")


def test_a_worker_that_is_killed_during_a_reply(worker: WorkerProcess) -> None:
    worker.send(b"one")
    worker.read(1)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerExited) as raised:
        worker.read(100)
    assert raised.value.status == -signal.SIGKILL


def test_ctrl_c_does_not_end_the_worker(worker: WorkerProcess) -> None:
    worker.send(b"one")
    worker.readline()
    os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.1)
    worker.send(b"two")
    assert worker.readline() == b"TWO\n"


def test_modules_in_the_working_directory_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "echo_program.py").write_text(_ECHO)
    (tmp_path / "signal.py").write_text("raise SystemExit(99)")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != tmp_path and entry])
    monkeypatch.chdir(tmp_path)
    program = start_module("echo_program")
    program.send(b"one")
    assert program.readline() == b"ONE\n"
    program.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_ctrl_c_does_not_reach_a_worker_that_is_still_starting(worker: WorkerProcess) -> None:
    """A terminal sends SIGINT to its process group. The worker would print a traceback until it ignores the signal."""
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)


def test_a_request_is_a_line_and_the_content_that_follows_it(worker: WorkerProcess) -> None:
    worker.send(b"line", b"content\n")
    assert [worker.readline(), worker.readline()] == [b"LINE\n", b"CONTENT\n"]


def test_stop_ends_a_worker_that_another_thread_waits_for(worker: WorkerProcess) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker.readline)
        worker.stop()
        with pytest.raises(WorkerExited):
            waiting.result()
