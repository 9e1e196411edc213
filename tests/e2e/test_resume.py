"""Runs that are killed, stopped, damaged or out of space, and go on to the same bits: real processes."""

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
from tests.support.command_line import Ran
from tests.support.drawn_images import draw_folder
from tests.support.same_runs import same

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a POSIX system's processes, signals and limits")

EPOCHS = 5
EPOCH_STEPS = 13
NAMES = [f"lzh_{epoch}.pth" for epoch in range(EPOCHS)]
INTERRUPTED = "lzh_interrupted.pth"

# Everything random that a recipe can have, and everything that has a state. The last batch of an epoch is short.
RECIPE = f"""
base = "fast"
epochs = {EPOCHS}
batch_size = 16
ema = 0.9
cutout = 8
jitter = 0.2
"""

# PyTorch takes seconds to load: one process loads it and trains nothing; its children are the program.
_PARENT = """
import json, os, resource, signal, sys
import PIL.PngImagePlugin, torch._dynamo, torchvision
import cifarx.commands.train, cifarx.output.training, cifarx_train.train
from cifarx.main import main

print("ready", flush=True)
while line := sys.stdin.readline():
    ask = json.loads(line)
    child = os.fork()
    if not child:
        status = 70
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(ask[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if ask["largest_file"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (ask["largest_file"], resource.RLIM_INFINITY))
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
            sys.argv = ["cifarx", *ask["arguments"]]
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
    """One `cifarx` process."""

    def __init__(self, parent: "subprocess.Popen[str]", folder: Path, arguments: list[str], largest_file: int) -> None:
        self._parent, self._out, self._err = parent, folder / "out.txt", folder / "err.txt"
        for stream in (self._out, self._err):
            stream.write_text("")
        ask = {"arguments": arguments, "out": str(self._out), "err": str(self._err), "largest_file": largest_file}
        assert parent.stdin is not None
        print(json.dumps(ask), file=parent.stdin, flush=True)
        self.pid = int(self._answer())

    def _answer(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline()

    def send(self, number: int) -> bool:
        """A signal, 0 for none; false where it has already ended."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def trains(self) -> bool:
        """Whether it has told what it trains."""
        return "train loss" in self._err.read_text()

    def wait_for(self, path: Path) -> None:
        """Until a file is there."""
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, path
            time.sleep(0.001)

    def end(self) -> Ran:
        status = int(self._answer())
        return Ran(status, self._out.read_text(), self._err.read_text())


class Program(NamedTuple):
    """`cifarx`, quick to start."""

    parent: "subprocess.Popen[str]"
    data: Path
    recipe: Path
    scratch: Path

    def start(self, out: Path, *more: str, largest_file: int = 0) -> Run:
        line = ["train", "--model", "lzh", "--data", str(self.data), "--recipe", str(self.recipe)]
        line += ["--device", "cpu", "--out", str(out), *more]
        return Run(self.parent, self.scratch, line, largest_file)

    def run(self, out: Path, *more: str, largest_file: int = 0) -> Ran:
        return self.start(out, *more, largest_file=largest_file).end()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("program")
    recipe = folder / "everything.toml"
    recipe.write_text(RECIPE)
    data = draw_folder(folder / "colours", train=67, test=5)
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
    """The run that nothing disturbed; its folder is not to be written to."""

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


def require_same_run(folder: Path, whole: Whole) -> None:
    """Every checkpoint is that of the whole run: weights, average, optimizer, random states, record. Not the time."""
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == NAMES
    for name, expected in whole.checkpoints.items():
        found = load_checkpoint(folder / name)
        assert found.spec == expected.spec, name
        assert same(found.model, expected.model), name
        assert same({**found.training, "seconds": 0}, {**expected.training, "seconds": 0}), name


def copy_of(whole: Whole, folder: Path, epochs: int) -> Path:
    """The folder of a run that was killed after so many epochs."""
    folder.mkdir(parents=True)
    for name in NAMES[:epochs]:
        shutil.copy2(whole.folder / name, folder / name)
    return folder


def test_the_recipe_has_all_that_a_resume_could_forget(whole: Whole) -> None:
    record = whole.checkpoints[NAMES[-1]].spec.training
    assert record is not None
    recipe = record.recipe
    assert all(recipe[field] for field in ("momentum", "ema", "warm_up", "flip", "crop", "cutout", "jitter"))
    assert recipe["schedule"] != "constant"
    training = whole.checkpoints[NAMES[-1]].training
    assert training["step"] == EPOCHS * EPOCH_STEPS
    assert training["weights"]
    assert not same(training["weights"], whole.checkpoints[NAMES[-1]].model)
    assert any("momentum_buffer" in str(part) for part in training["optimizer"].values())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(program: Program, whole: Whole, tmp_path: Path) -> None:
    ran = program.run(tmp_path / "run")
    assert ran.status == 0, ran.err
    require_same_run(tmp_path / "run", whole)


# --- killed


def kill_until_done(program: Program, whole: Whole, folder: Path, kills: int, dice: random.Random) -> tuple[int, int]:
    """Kill a run so often, resuming it each time; whenever it ends, compare it and begin anew.

    Gives the kills that it did not survive, and those among them that left a checkpoint half written.
    """
    killed = within_write = number = 0
    while killed < kills:
        out = folder / f"run{number}"
        run = program.start(out, "--resume", "auto")
        if killed % 2:
            wait_for_write(run, out, skip=dice.randrange(2))
        else:
            time.sleep(dice.uniform(0, 0.7 * whole.seconds))
        run.send(signal.SIGKILL)
        ran = run.end()
        if ran.status == 0:
            require_same_run(out, whole)
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
    require_same_run(out, whole)
    return killed, within_write


def wait_for_write(run: Run, out: Path, skip: int) -> None:
    """Until the run begins to write its next checkpoint but `skip`, or has ended."""
    before: set[str] = {path.name for path in out.glob(".*.partial.pth")}
    while run.send(0):
        if new := {path.name for path in out.glob(".*.partial.pth")} - before:
            if not skip:
                return
            before |= new
            skip -= 1
        time.sleep(0.0002)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(program: Program, whole: Whole, tmp_path: Path) -> None:
    kill_until_done(program, whole, tmp_path, 4, random.Random(0))


@pytest.mark.slow
def test_a_run_killed_at_many_moments_goes_on_to_the_same_bits(program: Program, whole: Whole, tmp_path: Path) -> None:
    killed, within_write = kill_until_done(program, whole, tmp_path, 30, random.Random(1))
    assert killed == 30
    assert within_write >= 3


PROGRAM = Path(sys.executable).with_name("cifarx")


@pytest.mark.slow
def test_the_program_itself_killed_and_resumed(program: Program, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = [PROGRAM, "train", "--model", "lzh", "--data", program.data, "--recipe", program.recipe]
    line += ["--device", "cpu", "--out", out, "--resume", "auto"]
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
    require_same_run(out, whole)


# --- told to stop


def stop_until_done(program: Program, whole: Whole, out: Path, stops: int, dice: random.Random) -> int:
    """Stop a run so often by a signal, resuming it each time, and let it end. Gives the stops within epochs."""
    within = 0
    for count in range(stops):
        run = program.start(out, "--resume", "auto")
        while not run.trains():
            time.sleep(0.001)
        time.sleep(dice.uniform(0.02, 0.6 * whole.seconds / stops))
        number = (signal.SIGINT, signal.SIGTERM)[count % 2]
        run.send(number)
        ran = run.end()
        assert ran.status == 128 + number, ran.err
        assert ran.out == ""
        assert "--resume auto" in ran.error
        saved = Path(ran.error.partition("saved in ")[2].partition(": ")[0])
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
    require_same_run(out, whole)
    return within


def test_a_run_told_to_stop_saves_its_state_and_goes_on_to_the_same_bits(
    program: Program, whole: Whole, tmp_path: Path
) -> None:
    assert stop_until_done(program, whole, tmp_path / "run", 4, random.Random(2))


@pytest.mark.slow
def test_a_run_told_to_stop_many_times_goes_on_to_the_same_bits(program: Program, whole: Whole, tmp_path: Path) -> None:
    assert stop_until_done(program, whole, tmp_path / "run", 12, random.Random(3)) >= 3


@pytest.mark.slow
def test_a_killed_run_goes_on_from_where_it_was_told_to_stop_before(
    program: Program, whole: Whole, tmp_path: Path
) -> None:
    """The state within an epoch outlives a kill before the next epoch's file, and none after it."""
    out = tmp_path / "run"
    while not (out / INTERRUPTED).exists():  # the signal may come at an epoch's end
        shutil.rmtree(out, ignore_errors=True)
        run = program.start(out)
        while not run.trains():
            time.sleep(0.001)
        time.sleep(0.05)
        run.send(signal.SIGTERM)
        assert run.end().status == 128 + signal.SIGTERM
    step = load_checkpoint(out / INTERRUPTED).training["step"]
    run = program.start(out, "--resume", "auto")
    while not run.trains():
        time.sleep(0.001)
    run.send(signal.SIGKILL)
    ran = run.end()
    assert ran.status == -signal.SIGKILL
    assert f"{step} of them done" in ran.err
    assert (out / INTERRUPTED).exists()
    run = program.start(out, "--resume", "auto")
    run.wait_for(out / NAMES[3])
    run.send(signal.SIGKILL)
    run.end()
    assert not (out / INTERRUPTED).exists()
    assert program.run(out, "--resume", "auto").status == 0
    require_same_run(out, whole)


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_ctrl_c_ends_at_once(program: Program, tmp_path: Path, times: int) -> None:
    """Steps that take long: the first waits for the step that is being done, the second does not."""
    line = ["train", "--model", "resnet18", "--data", str(program.data), "--batch-size", "64", "--image-size", "64"]
    run = Run(program.parent, tmp_path, [*line, "--device", "cpu", "--out", str(tmp_path / "run")], 0)
    while not run.trains():
        time.sleep(0.001)
    for _ in range(times):
        time.sleep(0.1)
        run.send(signal.SIGINT)
    ran = run.end()
    assert ran.status == 130
    saved = tmp_path / "run" / "resnet18_interrupted.pth"
    if times == 1:
        assert ran.error.startswith("error: interrupted at step 1 of 40, saved in ")
        assert saved.exists()
    else:
        assert ran.error == "error: interrupted: what was finished is kept"
        assert not saved.exists()


# --- damaged


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
def test_a_damaged_checkpoint_is_passed_over_and_told_of(
    program: Program, whole: Whole, tmp_path: Path, damage: Any
) -> None:
    out = copy_of(whole, tmp_path / "run", EPOCHS)
    damage(out / NAMES[-1])
    with pytest.raises(CifarxError):
        load_checkpoint(out / NAMES[-1])
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    told = [line for line in ran.err.splitlines() if line.startswith("note: passing over")]
    assert len(told) == 1
    assert NAMES[-1] in told[0]
    assert f"{(EPOCHS - 1) * EPOCH_STEPS} of them done" in ran.err
    require_same_run(out, whole)


@pytest.mark.slow
def test_with_every_checkpoint_damaged_the_run_begins_anew(program: Program, whole: Whole, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path / "run", 2)
    truncate(out / NAMES[0])
    empty(out / NAMES[1])
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    assert ran.err.count("note: passing over") == 2
    assert "a new run" in ran.err
    require_same_run(out, whole)


# --- a disk that fills up


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_spoils_nothing(
    program: Program, whole: Whole, tmp_path: Path
) -> None:
    out = copy_of(whole, tmp_path / "run", 2)
    before = {name: (out / name).read_bytes() for name in NAMES[:2]}
    ran = program.run(out, "--resume", "auto", largest_file=1_000_000)
    assert ran.status == 2
    assert ran.out == ""
    assert ran.error.startswith(f"error: cannot write {out / NAMES[2]} (")
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before
    assert sorted(path.name for path in out.iterdir()) == ["logs", *NAMES[:2]]
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    require_same_run(out, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two checkpoints and a bit."""
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
def test_a_run_on_a_full_disk_ends_and_goes_on_when_there_is_room(
    program: Program, whole: Whole, small_disk: Path
) -> None:
    out = small_disk / "run"
    ran = program.run(out)
    assert ran.status == 2
    assert ran.error.startswith(f"error: cannot write {out / NAMES[2]} (No space left on device)")
    assert sorted(path.name for path in out.iterdir()) == ["logs", *NAMES[:2]]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    ran = program.run(out, "--resume", "auto")
    assert ran.status == 0, ran.err
    require_same_run(out, whole)
