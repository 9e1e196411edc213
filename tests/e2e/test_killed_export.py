"""Exports that are killed, or find the disk full: what has its name is whole and proved, and the last one stands.

Every format of the table. PyTorch takes seconds to load: the exports are forked from one process that has it, and
start from its conversion and its reference, so that the kills fall on what is written, proved, sealed and named.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cifarx_export.formats.registry import FORMATS
from tests.support.trained_model import Trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a POSIX system's processes and limits"),
]

KILLS = 8

# What both programs begin with. One CPU, so that no library starts threads, which a fork would lose.
_BEGIN = """
import json, os, random, resource, shutil, signal, sys, time
from pathlib import Path
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
torch.set_num_threads(1)
from cifarx_export import export
from cifarx_export.formats.registry import FORMATS, Format
from cifarx_serve.backends.registry import backend_class
from cifarx_serve.devices import Device
from cifarx_serve.errors import OutputError

name, checkpoint, other, scratch = sys.argv[1], *map(Path, sys.argv[2:5])
kind = FORMATS[name]
target = checkpoint.with_name(kind.file_name(checkpoint.stem, "fp32"))
convert = Format.convert
conversions = {}

def remembered(self, source):
    key = source.spec.weights_sha256
    if key not in conversions:
        conversions[key] = convert(self, source)
    return conversions[key]

Format.convert = remembered
run_reference = export.run_reference
references = {}

def asked(backend, data, progress):
    key = str(backend._module.state_dict()["model.8.bias"].tolist())
    if key not in references:
        references[key] = run_reference(backend, data, progress)
    return references[key]

export.run_reference = asked

def export(source, out):
    return export.export(source, [name], data="builtin", out=out)[0]

def content(path):
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None

def named():
    return sorted(path.name for path in target.parent.iterdir() if not path.name.startswith("."))

def weights():
    with backend_class(kind.backend)(kind.model_file(target), Device("cpu")) as backend:
        assert backend.spec.parity.passed
        return backend.spec.weights_sha256
"""

_KILLED = (
    _BEGIN
    + """
kills, first = int(sys.argv[5]), sys.argv[6] == "first"
hashes = {}
for place, source in (("theirs", other), ("ours", checkpoint)):  # both converted, before any fork
    made = export(source, scratch / place)
    assert made.report.summary.passed
    hashes[place] = conversions and list(conversions)[-1]
started = time.monotonic()
export(checkpoint, scratch / "timed")
duration = time.monotonic() - started
before = content(target)
assert (before is None) == first
allowed = {checkpoint.name, target.name, target.name + ".parity.json"}
ends = {"killed": 0, "ended": 0, "named": 0}
for kill in range(kills):
    child = os.fork()
    if child == 0:
        try:
            export(checkpoint, target.parent)
        finally:
            os._exit(0)
    if kill % 2:  # within the writing: from when there is a temporary file
        while not list(target.parent.glob(".*.partial*")) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        time.sleep(random.uniform(0, duration / 2))
    else:
        time.sleep(random.uniform(0, duration * 1.1))
    try:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        ends["killed" if os.WIFSIGNALED(status) else "ended"] += 1
    except (ProcessLookupError, ChildProcessError):
        ends["ended"] += 1
    assert set(named()) <= allowed, named()
    now = content(target)
    if now == before:
        continue
    assert now is not None, "the last good artifact is gone"
    assert weights() == hashes["ours"]
    ends["named"] += 1
    before = now if not first else None
    if first:  # as before it, for the next
        (shutil.rmtree if target.is_dir() else os.unlink)(target)
        target.with_name(target.name + ".parity.json").unlink(missing_ok=True)
print(json.dumps({"duration": duration, **ends}))
"""
)

_FULL_DISK = (
    _BEGIN
    + """
size = max(len(part) for part in (content(target).values() if target.is_dir() else [content(target)]))
export(checkpoint, scratch)  # converted, before any limit: compilers have errors of their own
before = {path.name: content(path) for path in target.parent.iterdir()}
said = []
for limit in (0, 1, 1000, size // 2, size - 1000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export(checkpoint, target.parent)
    except OutputError as error:
        said.append(str(error))
    else:
        sys.exit(f"exported with room for {limit} of {size} bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = {path.name: content(path) for path in target.parent.iterdir()}
    assert after == before, sorted(after)
assert export(checkpoint, target.parent).report.summary.passed
print(json.dumps(said))
"""
)


@pytest.fixture
def folder(trained: Trained, tmp_path: Path) -> Path:
    """A folder with a checkpoint alone, and one of other weights beside it."""
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    place = tmp_path / "run"
    place.mkdir()
    shutil.copy(trained.checkpoint, place / "lzh_0.pth")
    loaded = load_checkpoint(trained.checkpoint)
    loaded.model["model.8.bias"][3] += 0.5
    (tmp_path / "other").mkdir()
    save_checkpoint(tmp_path / "other" / "lzh_0.pth", loaded)
    return place


def run(program: str, name: str, folder: Path, *more: str) -> Any:
    """The one JSON document that a program prints."""
    paths = [folder / "lzh_0.pth", folder.parent / "other" / "lzh_0.pth", folder.parent / "scratch"]
    ran = subprocess.run(
        [sys.executable, "-c", program, name, *map(str, paths), *more],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture
def with_last(folder: Path, request: pytest.FixtureRequest) -> Path:
    """The folder with a good artifact of the other weights."""
    from cifarx_export.export import export

    name: str = request.node.callspec.params["name"]
    made = export(folder.parent / "other" / "lzh_0.pth", [name], data="builtin", out=folder)[0]
    assert made.report.summary.passed
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_killed_before_the_first_there_is_none_or_a_whole_one(name: str, folder: Path) -> None:
    ends = run(_KILLED, name, folder, str(KILLS), "first")
    assert ends["killed"] >= KILLS // 2, ends


@pytest.mark.parametrize("name", FORMATS)
def test_killed_before_the_next_the_last_one_stands(name: str, with_last: Path) -> None:
    ends = run(_KILLED, name, with_last, str(KILLS), "next")
    assert ends["killed"] >= KILLS // 2, ends


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_an_error_and_leaves_the_last_one(name: str, with_last: Path) -> None:
    said = run(_FULL_DISK, name, with_last)
    assert len(said) == 5
    assert all("cannot write" in line and "free some space" in line for line in said)
