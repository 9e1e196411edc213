"""Exports that are killed or find the disk full: a file with its final name is complete, and the last one is kept.

The tests cover every format. PyTorch takes seconds to import, so the exports are forked from one process that has it
imported. They reuse its conversion and its reference outputs, so that the kills hit the writing, the parity check, the
checksum and the rename.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.installed_formats import FORMAT_PARAMETERS
from tests.support.trained_model import Trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="requires fork and POSIX resource limits"),
]

KILLS = 6

# The start of both programs. They use one CPU, so that no library starts threads, which a fork would lose.
_SETUP = """
import json, os, random, resource, shutil, signal, sys, time
from pathlib import Path
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
torch.set_num_threads(1)
from cifarx_export import export as exports, exporter
from cifarx_export.formats.registry import FORMATS, Format
from cifarx_serve.backends.registry import backend_class, model_file
from cifarx_serve.devices import Device
from cifarx_serve.errors import OutputError

name, checkpoint, other, scratch = sys.argv[1], *map(Path, sys.argv[2:5])
row = FORMATS[name]
target = checkpoint.with_name(row.file_name(checkpoint.stem, "fp32"))
convert = Format.convert
conversions = {}

def convert_once(self, source):
    key = source.spec.weights_sha256
    if key not in conversions:
        conversions[key] = list(convert(self, source))
    return conversions[key]

Format.convert = convert_once
run_reference = exporter.run_reference
references = {}

def run_reference_once(backend, data, progress):
    key = str(backend._module.state_dict()["model.8.bias"].tolist())
    if key not in references:
        references[key] = run_reference(backend, data, progress)
    return references[key]

exporter.run_reference = run_reference_once

def export(source, out):
    return exports.export(source, [name], data="builtin", out=out)[0]

def content(path):
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None

def visible_files():
    return sorted(path.name for path in target.parent.iterdir() if not path.name.startswith("."))

def exported_weights():
    with backend_class(row.backend)(model_file(target), Device("cpu")) as backend:
        assert backend.spec.parity.passed
        return backend.spec.weights_sha256
"""

_KILLED = (
    _SETUP
    + """
kills, first = int(sys.argv[5]), sys.argv[6] == "first"
hashes = {}
for label, source in (("other", other), ("checkpoint", checkpoint)):  # convert both before any fork
    result = export(source, scratch / label)
    assert result.report.summary.passed
    hashes[label] = conversions and list(conversions)[-1]
started = time.monotonic()
export(checkpoint, scratch / "timed")
duration = time.monotonic() - started
before = content(target)
assert (before is None) == first
allowed = {checkpoint.name, target.name, target.name + ".parity.json"}
outcomes = {"killed": 0, "finished": 0, "renamed": 0}
for kill in range(kills):
    child = os.fork()
    if child == 0:
        try:
            export(checkpoint, target.parent)
        finally:
            os._exit(0)
    if kill % 2:  # while writing: after the temporary file appears
        while not list(target.parent.glob(".*.partial*")) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        time.sleep(random.uniform(0, duration / 2))
    else:
        time.sleep(random.uniform(0, duration * 1.1))
    try:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        outcomes["killed" if os.WIFSIGNALED(status) else "finished"] += 1
    except (ProcessLookupError, ChildProcessError):
        outcomes["finished"] += 1
    assert set(visible_files()) <= allowed, visible_files()
    now = content(target)
    if now == before:
        continue
    assert now is not None, "the last good artifact is gone"
    assert exported_weights() == hashes["checkpoint"]
    outcomes["renamed"] += 1
    before = now if not first else None
    if first:  # restore the initial state for the next kill
        (shutil.rmtree if target.is_dir() else os.unlink)(target)
        target.with_name(target.name + ".parity.json").unlink(missing_ok=True)
print(json.dumps({"duration": duration, **outcomes}))
"""
)

_FULL_DISK = (
    _SETUP
    + """
size = max(len(part) for part in (content(target).values() if target.is_dir() else [content(target)]))
export(checkpoint, scratch)  # convert before setting limits, because compilers raise errors of their own
before = {path.name: content(path) for path in target.parent.iterdir()}
messages = []
for limit in (0, 1, 1000, size // 2, size - 1000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export(checkpoint, target.parent)
    except OutputError as error:
        messages.append(str(error))
    else:
        sys.exit(f"exported with space for {limit} of {size} bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = {path.name: content(path) for path in target.parent.iterdir()}
    assert after == before, sorted(after)
assert export(checkpoint, target.parent).report.summary.passed
print(json.dumps(messages))
"""
)


@pytest.fixture
def folder(trained: Trained, tmp_path: Path) -> Path:
    """Return a folder with only a checkpoint. The folder `other` next to it has a checkpoint with other weights."""
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained.checkpoint, folder / "lzh_0.pth")
    loaded = load_checkpoint(trained.checkpoint)
    loaded.weights["model.8.bias"][3] += 0.5
    (tmp_path / "other").mkdir()
    save_checkpoint(tmp_path / "other" / "lzh_0.pth", loaded)
    return folder


def run(program: str, name: str, folder: Path, *more: str) -> Any:
    """Run a program and return the JSON document that it prints."""
    paths = [folder / "lzh_0.pth", folder.parent / "other" / "lzh_0.pth", folder.parent / "scratch"]
    result = subprocess.run(
        [sys.executable, "-c", program, name, *map(str, paths), *more],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def folder_with_artifact(folder: Path, request: pytest.FixtureRequest) -> Path:
    """Return the folder with a good artifact of the other weights."""
    from cifarx_export.export import export

    name: str = request.node.callspec.params["name"]
    result = export(folder.parent / "other" / "lzh_0.pth", [name], data="builtin", out=folder)[0]
    assert result.report.summary.passed
    return folder


@pytest.mark.parametrize("name", FORMAT_PARAMETERS)
def test_killing_the_first_export_leaves_a_complete_artifact_or_none(name: str, folder: Path) -> None:
    outcomes = run(_KILLED, name, folder, str(KILLS), "first")
    assert outcomes["killed"] >= KILLS // 2, outcomes


@pytest.mark.parametrize("name", FORMAT_PARAMETERS)
def test_killing_a_later_export_keeps_the_last_artifact(name: str, folder_with_artifact: Path) -> None:
    outcomes = run(_KILLED, name, folder_with_artifact, str(KILLS), "next")
    assert outcomes["killed"] >= KILLS // 2, outcomes


@pytest.mark.parametrize("name", FORMAT_PARAMETERS)
def test_a_full_disk_is_an_error_and_keeps_the_last_artifact(name: str, folder_with_artifact: Path) -> None:
    messages = run(_FULL_DISK, name, folder_with_artifact)
    assert len(messages) == 5
    assert all("cannot write" in line and "free some space" in line for line in messages)
