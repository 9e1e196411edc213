"""Runs that are killed, stopped, damaged or out of disk space and resume bit for bit, in real processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cifarx_serve.errors import CifarxError
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.checkpoint_assertions import deep_equal
from tests.support.command_line import CommandResult
from tests.support.image_datasets import write_image_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, signals and resource limits")

EPOCHS = 5
EPOCH_STEPS = 13
NAMES = [f"lzh_{epoch}.pth" for epoch in range(EPOCHS)]
INTERRUPTED = "lzh_interrupted.pth"

# Uses every random and every stateful option of a recipe. The last batch of an epoch is smaller than the others.
RECIPE = f"""
base = "fast"
epochs = {EPOCHS}
batch_size = 16
ema_decay = 0.9
cutout = 8
jitter = 0.2
"""

# Importing PyTorch takes seconds. One parent process imports it, and the runs are forked from it.
_PARENT = """
import json, os, resource, signal, sys
import PIL.PngImagePlugin, torch._dynamo, torchvision
import cifarx.commands.train, cifarx.output.training, cifarx_train.train
from cifarx.main import main

print("ready", flush=True)
while line := sys.stdin.readline():
    request = json.loads(line)
    child = os.fork()
    if not child:
        status = 70
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if request["max_file_size"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_size"], resource.RLIM_INFINITY))
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background processes
            sys.argv = ["cifarx", *request["arguments"]]
            main()
        except SystemExit as end:
            status = end.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Run:
    """A `cifarx` process."""

    def __init__(self, parent: "subprocess.Popen[str]", folder: Path, arguments: list[str], max_file_size: int) -> None:
        self._parent, self._out, self._err = parent, folder / "out.txt", folder / "err.txt"
        for stream in (self._out, self._err):
            stream.write_text("")
        request = {"arguments": arguments, "out": str(self._out), "err": str(self._err), "max_file_size": max_file_size}
        assert parent.stdin is not None
        print(json.dumps(request), file=parent.stdin, flush=True)
        self.pid = int(self._read_line())

    def _read_line(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline()

    def send(self, number: int) -> bool:
        """Send a signal, or none for 0. Return False if the process has exited."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def is_training(self) -> bool:
        """Return whether the process has printed the description of its run."""
        return "train loss" in self._err.read_text()

    def wait_for(self, path: Path) -> None:
        """Wait until a file exists."""
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, path
            time.sleep(0.001)

    def wait(self) -> CommandResult:
        status = int(self._read_line())
        return CommandResult(status, self._out.read_text(), self._err.read_text())


class Program(NamedTuple):
    """Starts `cifarx` processes quickly."""

    parent: "subprocess.Popen[str]"
    data: Path
    recipe: Path
    scratch: Path

    def start(self, out: Path, *more: str, max_file_size: int = 0) -> Run:
        line = ["train", "--model", "lzh", "--data", str(self.data), "--recipe", str(self.recipe)]
        line += ["--device", "cpu", "--out", str(out), *more]
        return Run(self.parent, self.scratch, line, max_file_size)

    def run(self, out: Path, *more: str, max_file_size: int = 0) -> CommandResult:
        return self.start(out, *more, max_file_size=max_file_size).wait()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("program")
    recipe = folder / "everything.toml"
    recipe.write_text(RECIPE)
    data = write_image_folder(folder / "colors", train=67, test=5)
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        yield Program(parent, data, recipe, folder)


class Whole(NamedTuple):
    """An uninterrupted run. Tests must not write to its directory."""

    folder: Path
    checkpoints: dict[str, Checkpoint]
    seconds: float


@pytest.fixture(scope="module")
def whole(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "run"
    started = time.monotonic()
    ran = program.run(folder)
    assert ran.status == 0, ran.err
    seconds = time.monotonic() - started
    return Whole(folder, {name: load_checkpoint(folder / name) for name in NAMES}, seconds)


def assert_same_run(folder: Path, whole: Whole) -> None:
    """Assert that every checkpoint equals that of the uninterrupted run, except for the training time."""
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == NAMES
    for name, expected in whole.checkpoints.items():
        found = load_checkpoint(folder / name)
        assert found.spec == expected.spec, name
        assert deep_equal(found.weights, expected.weights), name
        assert deep_equal({**found.training, "seconds": 0}, {**expected.training, "seconds": 0}), name


def copy_checkpoints(whole: Whole, folder: Path, epochs: int) -> Path:
    """Create the directory of a run that was killed after `epochs` epochs."""
    folder.mkdir(parents=True)
    for name in NAMES[:epochs]:
        shutil.copy2(whole.folder / name, folder / name)
    return folder


def test_the_recipe_uses_every_kind_of_state(whole: Whole) -> None:
    record = whole.checkpoints[NAMES[-1]].spec.training
    assert record is not None
    recipe = record.recipe
    assert all(
        recipe[field] for field in ("momentum", "ema_decay", "warmup_fraction", "flip", "crop", "cutout", "jitter")
    )
    assert recipe["schedule"] != "constant"
    training = whole.checkpoints[NAMES[-1]].training
    assert training["step"] == EPOCHS * EPOCH_STEPS
    assert training["weights"]
    assert not deep_equal(training["weights"], whole.checkpoints[NAMES[-1]].weights)
    assert any("momentum_buffer" in str(part) for part in training["optimizer"].values())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(program: Program, whole: Whole, tmp_path: Path) -> None:
    ran = program.run(tmp_path / "run")
    assert ran.status == 0, ran.err
    assert_same_run(tmp_path / "run", whole)


# --- killed processes


def kill_until_done(program: Program, whole: Whole, folder: Path, kills: int, rng: random.Random) -> tuple[int, int]:
    """Kill and resume a run `kills` times. Compare every run that finishes, then start a new one.

    Returns the number of killed processes, and how many of them left a partially written checkpoint.
    """
    killed = within_write = number = 0
    while killed < kills:
        out = folder / f"run{number}"
        run = program.start(out, "--resume", "auto")
        if killed % 2:
            wait_for_write(run, out, skip=rng.randrange(2))
        else:
            time.sleep(rng.uniform(0, 0.7 * whole.seconds))
        run.send(signal.SIGKILL)
        ran = run.wait()
        if ran.status == 0:
            assert_same_run(out, whole)
            number += 1
            continue
        assert ran.status == -signal.SIGKILL, ran.err
        killed += 1
        within_write += any(out.glob(".*.partial.pth"))
        for path in out.glob("*.pth"):
            if not path.name.startswith("."):
                load_checkpoint(path)
    out = folder / f"run{number}"
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    assert_same_run(out, whole)
    return killed, within_write


def wait_for_write(run: Run, out: Path, skip: int) -> None:
    """Wait until the run starts writing a checkpoint, after skipping `skip` of them, or exits."""
    before: set[str] = {path.name for path in out.glob(".*.partial.pth")}
    while run.send(0):
        if new := {path.name for path in out.glob(".*.partial.pth")} - before:
            if not skip:
                return
            before |= new
            skip -= 1
        time.sleep(0.0002)


def test_a_run_killed_at_any_time_resumes_bit_for_bit(program: Program, whole: Whole, tmp_path: Path) -> None:
    kill_until_done(program, whole, tmp_path, 4, random.Random(0))


@pytest.mark.slow
def test_a_run_killed_many_times_resumes_bit_for_bit(program: Program, whole: Whole, tmp_path: Path) -> None:
    killed, within_write = kill_until_done(program, whole, tmp_path, 30, random.Random(1))
    assert killed == 30
    assert within_write >= 3


PROGRAM = Path(sys.executable).with_name("cifarx")


@pytest.mark.slow
def test_the_installed_program_killed_and_resumed(program: Program, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = [str(PROGRAM), "train", "--model", "lzh", "--data", str(program.data), "--recipe", str(program.recipe)]
    line += ["--device", "cpu", "--out", str(out), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in (NAMES[0], NAMES[2]):
        with subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment) as process:
            while not (out / name).exists():
                assert process.poll() is None
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    ran = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert_same_run(out, whole)


# --- signals


def stop_until_done(program: Program, whole: Whole, out: Path, stops: int, rng: random.Random) -> int:
    """Stop a run with a signal `stops` times, then let it finish. Return the number of stops within an epoch."""
    within = 0
    for count in range(stops):
        run = program.start(out, "--resume", "auto")
        while not run.is_training():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.02, 0.6 * whole.seconds / stops))
        number = (signal.SIGINT, signal.SIGTERM)[count % 2]
        run.send(number)
        ran = run.wait()
        assert ran.status == 128 + number, ran.err
        assert ran.out == ""
        assert ran.error.endswith(": add --resume auto to the same command to continue")
        saved = Path(ran.error.partition("checkpoint saved to ")[2].partition(": ")[0])
        assert ran.error.startswith("error: interrupted at step ")
        checkpoint = load_checkpoint(saved)
        assert checkpoint.training["step"] == int(ran.error.split()[4].replace(",", ""))
        if saved.name == INTERRUPTED:
            within += 1
            assert checkpoint.training["done"] > 0
        else:
            assert saved.name in NAMES
            assert not (out / INTERRUPTED).exists()
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    assert_same_run(out, whole)
    return within


def test_a_stopped_run_saves_its_state_and_resumes_bit_for_bit(program: Program, whole: Whole, tmp_path: Path) -> None:
    assert stop_until_done(program, whole, tmp_path / "run", 4, random.Random(2))


@pytest.mark.slow
def test_a_run_stopped_many_times_resumes_bit_for_bit(program: Program, whole: Whole, tmp_path: Path) -> None:
    assert stop_until_done(program, whole, tmp_path / "run", 12, random.Random(3)) >= 3


@pytest.mark.slow
def test_a_killed_run_resumes_from_the_interrupted_checkpoint(program: Program, whole: Whole, tmp_path: Path) -> None:
    """The interrupted checkpoint exists until the checkpoint of the epoch is written."""
    out = tmp_path / "run"
    while not (out / INTERRUPTED).exists():  # the signal may arrive at the end of an epoch
        shutil.rmtree(out, ignore_errors=True)
        run = program.start(out)
        while not run.is_training():
            time.sleep(0.001)
        time.sleep(0.05)
        run.send(signal.SIGTERM)
        assert run.wait().status == 128 + signal.SIGTERM
    step = load_checkpoint(out / INTERRUPTED).training["step"]
    run = program.start(out, "--resume", "auto")
    while not run.is_training():
        time.sleep(0.001)
    run.send(signal.SIGKILL)
    ran = run.wait()
    assert ran.status == -signal.SIGKILL
    total = EPOCHS * EPOCH_STEPS
    assert f"{total} steps, resuming from {out / INTERRUPTED} at step {step}\n" in ran.err
    assert (out / INTERRUPTED).exists()
    run = program.start(out, "--resume", "auto")
    run.wait_for(out / NAMES[3])
    run.send(signal.SIGKILL)
    run.wait()
    assert not (out / INTERRUPTED).exists()
    assert program.run(out, "--resume", "auto").status == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_ctrl_c_exits_immediately(program: Program, tmp_path: Path, times: int) -> None:
    """With slow steps, the first Ctrl-C waits for the current step and the second does not."""
    line = ["train", "--model", "resnet18", "--data", str(program.data), "--batch-size", "64", "--image-size", "64"]
    run = Run(program.parent, tmp_path, [*line, "--device", "cpu", "--out", str(tmp_path / "run")], 0)
    while not run.is_training():
        time.sleep(0.001)
    for _ in range(times):
        time.sleep(0.1)
        run.send(signal.SIGINT)
    ran = run.wait()
    assert ran.status == 130
    saved = tmp_path / "run" / "resnet18_interrupted.pth"
    if times == 1:
        assert ran.error.startswith("error: interrupted at step 1 of 40, checkpoint saved to ")
        assert saved.exists()
    else:
        assert ran.error == "error: interrupted: finished work is kept"
        assert not saved.exists()


# --- damaged checkpoints


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, lose_one_byte, empty, flip_one_byte])
def test_a_damaged_checkpoint_is_skipped_with_a_note(
    program: Program, whole: Whole, tmp_path: Path, damage: Any
) -> None:
    out = copy_checkpoints(whole, tmp_path / "run", EPOCHS)
    damage(out / NAMES[-1])
    with pytest.raises(CifarxError):
        load_checkpoint(out / NAMES[-1])
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    notes = [line for line in ran.err.splitlines() if line.startswith("note: skipping a damaged checkpoint: ")]
    assert len(notes) == 1
    assert NAMES[-1] in notes[0]
    assert f"resuming from {out / NAMES[-2]} at step {(EPOCHS - 1) * EPOCH_STEPS}\n" in ran.err
    assert_same_run(out, whole)


@pytest.mark.slow
def test_with_only_damaged_checkpoints_a_new_run_starts(program: Program, whole: Whole, tmp_path: Path) -> None:
    out = copy_checkpoints(whole, tmp_path / "run", 2)
    truncate(out / NAMES[0])
    empty(out / NAMES[1])
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    assert ran.err.count("note: skipping a damaged checkpoint: ") == 2
    assert f"note: no checkpoint to resume from in {out}: starting a new run\n" in ran.err
    assert_same_run(out, whole)


# --- full disks


def test_an_unwritable_checkpoint_stops_the_run_and_keeps_earlier_ones(
    program: Program, whole: Whole, tmp_path: Path
) -> None:
    out = copy_checkpoints(whole, tmp_path / "run", 2)
    before = {name: (out / name).read_bytes() for name in NAMES[:2]}
    ran = program.run(out, "--resume", "auto", max_file_size=1_000_000)
    assert ran.status == 2
    assert ran.out == ""
    assert ran.error.startswith(f"error: cannot write {out / NAMES[2]} (")
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before
    assert sorted(path.name for path in out.iterdir()) == ["logs", *NAMES[:2]]
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    assert_same_run(out, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with space for two checkpoints and a little more."""
    place = tmp_path / "disk"
    place.mkdir()
    if not shutil.which("mount"):
        pytest.skip("no mount on this machine")
    size = "size=4500k"
    ran = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", place], capture_output=True, check=False)
    if ran.returncode:
        pytest.skip(f"no file system can be mounted here ({ran.stderr.decode().strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_run_on_a_full_disk_resumes_when_there_is_space(program: Program, whole: Whole, small_disk: Path) -> None:
    out = small_disk / "run"
    ran = program.run(out)
    assert ran.status == 2
    assert ran.error.startswith(f"error: cannot write {out / NAMES[2]} (No space left on device)")
    assert sorted(path.name for path in out.iterdir()) == ["logs", *NAMES[:2]]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    assert_same_run(out, whole)
