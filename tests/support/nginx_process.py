"""nginx as a process under test, on the loopback interface, with all its files in one directory."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NGINX = shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))

_TIMEOUT_S = 30.0
_KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextmanager
def run_nginx(directory: Path, port: int, http: str) -> Iterator[None]:
    """Run nginx with a configuration of its `http` block that listens on a port; skip the test if there is no nginx."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    directory.mkdir()
    paths = "\n".join(f"{kind}_temp_path {directory / kind};" for kind in _KINDS)
    configuration = directory / "nginx.conf"
    configuration.write_text(
        # Unprivileged processes of nginx could not enter the directories of the tests.
        f"{'user root;' if os.geteuid() == 0 else ''}\ndaemon off;\npid {directory / 'pid'};\nworker_processes 1;\n"
        f"events {{ worker_connections 256; }}\nhttp {{\naccess_log off;\n{paths}\n{http}\n}}\n"
    )
    log = directory / "error.log"
    process = subprocess.Popen([NGINX, "-p", directory, "-e", log, "-c", configuration], stdin=subprocess.DEVNULL)
    try:
        _wait_for(port, process, log)
        yield
    finally:
        process.terminate()
        process.wait(_TIMEOUT_S)


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    pytest.fail(f"nginx does not listen: {log.read_text()}")
