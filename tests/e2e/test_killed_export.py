"""Exports that are killed or find the disk full: a file with its final name is complete, and the last one is kept.

The tests cover every format. PyTorch takes seconds to import, so the exports are forked from one process that has it
imported, once per format. They reuse its conversion and its reference outputs, so that the kills hit the writing, the
parity check, the checksum and the rename.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.network_table import write_pictures
from tests.support.installed_formats import FORMAT_PARAMETERS
from tests.support.trained_model import Trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="requires fork and POSIX resource limits"),
]

KILLS = 6

IMAGES = 90
"""The more time an export spends on its parity check, the fewer kills hit the rest."""

# Exports with one format in one process. It uses one CPU, so that no library starts threads, which a fork would lose.
_PROGRAM = """
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

name, kills = sys.argv[1], int(sys.argv[2])
checkpoint, other, images, scratch = map(Path, sys.argv[3:])
row = FORMATS[name]
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
    result = exports.export(source, [name], data=str(images), out=out)[0]
    assert result.report.summary.passed
    return result

def new_target(name):
    # The artifact of the checkpoint, in a folder with nothing else.
    folder = scratch / name
    folder.mkdir()
    shutil.copy(checkpoint, folder)
    return folder / row.file_name(checkpoint.stem, "fp32")

def content(path):
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None

def exported_weights(target):
    with backend_class(row.backend)(model_file(target), Device("cpu")) as backend:
        assert backend.spec.parity.passed
        return backend.spec.weights_sha256

def kill_exports(target):
    before = content(target)
    first = before is None
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
        visible = sorted(path.name for path in target.parent.iterdir() if not path.name.startswith("."))
        assert set(visible) <= allowed, visible
        now = content(target)
        if now == before:
            continue
        assert now is not None, "the last good artifact is gone"
        assert exported_weights(target) == hashes["checkpoint"]
        outcomes["renamed"] += 1
        before = now if not first else None
        if first:  # restore the initial state for the next kill
            (shutil.rmtree if target.is_dir() else os.unlink)(target)
            target.with_name(target.name + ".parity.json").unlink(missing_ok=True)
    return outcomes

def fill_disk(target):
    size = max(len(part) for part in (content(target).values() if target.is_dir() else [content(target)]))
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
    export(checkpoint, target.parent)
    return messages

hashes = {}
for label, source in (("other", other), ("checkpoint", checkpoint)):  # convert both before any fork or limit
    export(source, scratch / label)
    hashes[label] = list(conversions)[-1]
assert hashes["other"] != hashes["checkpoint"]
started = time.monotonic()
export(checkpoint, scratch / "timed")
duration = time.monotonic() - started

outcomes = {"first": kill_exports(new_target("first"))}
for key, run in (("later", kill_exports), ("full disk", fill_disk)):
    target = new_target(key)
    export(other, target.parent)
    outcomes[key] = run(target)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def checkpoints(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint, and one of the same name with other weights."""
    from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    loaded = load_checkpoint(trained.checkpoint)
    loaded.weights["model.8.bias"][3] += 0.5
    other = tmp_path_factory.mktemp("other") / trained.checkpoint.name
    save_checkpoint(other, loaded)
    return trained.checkpoint, other


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), IMAGES).folder


@pytest.fixture(scope="module", params=FORMAT_PARAMETERS)
def outcomes(
    request: pytest.FixtureRequest,
    checkpoints: tuple[Path, Path],
    images: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Run the program for a format and return the JSON document that it prints."""
    paths = [*checkpoints, images, tmp_path_factory.mktemp("killed")]
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, request.param, str(KILLS), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_killing_the_first_export_leaves_a_complete_artifact_or_none(outcomes: Any) -> None:
    assert outcomes["first"]["killed"] >= KILLS // 2, outcomes


def test_killing_a_later_export_keeps_the_last_artifact(outcomes: Any) -> None:
    assert outcomes["later"]["killed"] >= KILLS // 2, outcomes


def test_a_full_disk_is_an_error_and_keeps_the_last_artifact(outcomes: Any) -> None:
    messages = outcomes["full disk"]
    assert len(messages) == 5
    assert all("cannot write" in line and "free some space" in line for line in messages)
