"""Signals during training, which the process sends to itself at a chosen moment."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cifarx_serve.errors import FallbackWarning, Interrupted
from cifarx_train.callbacks.base import Callback, EpochReport
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.signals import catch_signals
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult
from tests.support.checkpoint_assertions import assert_same_run, deep_equal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

STEPS = 4  # per epoch of 60 images
EPOCHS = 3


@pytest.fixture(autouse=True)
def _python_handlers() -> Any:
    """Install Python's default handlers, because a background process ignores SIGINT."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# --- the context manager


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_recorded(number: int) -> None:
    with catch_signals() as received:
        assert received.number is None
        send(number)
        assert received.number == number


def test_sigterm_may_be_received_several_times() -> None:
    with catch_signals() as received:
        for _ in range(3):
            send(signal.SIGTERM)
        assert received.number == signal.SIGTERM


def test_a_second_ctrl_c_raises_keyboard_interrupt() -> None:
    with catch_signals() as received:
        send(signal.SIGINT)
        assert received.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_ctrl_c_after_sigterm_is_recorded() -> None:
    with catch_signals() as received:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert received.number == signal.SIGINT


def fail() -> None:
    raise RuntimeError


@pytest.mark.parametrize(
    "ending", [lambda: None, lambda: send(signal.SIGINT), fail], ids=["success", "signal", "exception"]
)
def test_the_previous_handlers_are_restored(ending: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with catch_signals():
            ending()
    except RuntimeError:
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_ignored_signals_stay_ignored() -> None:
    """Ctrl-C does not stop a run that a shell started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with catch_signals() as received:
        send(signal.SIGINT)
        assert received.number is None


def test_nothing_changes_outside_the_main_thread() -> None:
    seen: list[Any] = []

    def block() -> None:
        with catch_signals() as received:
            seen.extend((received.number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [None, signal.default_int_handler]


# --- a training run


class Sender(Callback):
    """Sends signals after a step or at the end of an epoch."""

    def __init__(self, *numbers: int, step: int = 0, epoch: int = -1) -> None:
        self._numbers, self._step, self._epoch = numbers, step, epoch

    def on_step_end(self, step: int) -> None:
        if step == self._step:
            self._send()

    def on_epoch_end(self, report: EpochReport) -> None:
        if report.epoch == self._epoch:
            self._send()

    def _send(self) -> None:
        for number in self._numbers:
            send(number)


def run(data: Path, out: Path, *callbacks: Callback, **more: Any) -> TrainResult:
    settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 16, "ema_decay": 0.9, "cutout": 8, "jitter": 0.2}
    return train(
        "lzh", data=str(data), recipe_name="fast", device="cpu", out=out, callbacks=callbacks, **{**settings, **more}
    )


@pytest.fixture(scope="module")
def whole(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run. Tests must not write to it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(color_folder, out)
    return out


@pytest.mark.parametrize(
    ("step", "number"),
    [(step, (signal.SIGINT, signal.SIGTERM)[step % 3 % 2]) for step in (1, 2, 3, 4, 5, 8, 11, 12)],
)
def test_a_run_interrupted_after_any_step_resumes_bit_for_bit(
    color_folder: Path, whole: Path, tmp_path: Path, step: int, number: int
) -> None:
    epoch, done = divmod(step, STEPS)
    expected = "lzh_interrupted.pth" if done else f"lzh_{epoch - 1}.pth"
    with pytest.raises(Interrupted) as caught:
        run(color_folder, tmp_path, Sender(number, step=step))
    assert caught.value.exit_status == 128 + number
    assert caught.value.problem == (
        f"interrupted at step {step} of {EPOCHS * STEPS}, checkpoint saved to {tmp_path / expected}"
    )
    assert caught.value.remedy == "add --resume auto to the same command to continue"
    saved = [f"lzh_{before}.pth" for before in range(epoch)] + ["lzh_interrupted.pth"] * bool(done)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == saved
    training = load_checkpoint(tmp_path / expected).training
    assert (training["step"], training["epoch"], training["done"]) == (step, epoch, done)
    assert run(color_folder, tmp_path, resume="auto").epochs == EPOCHS
    assert_same_run(tmp_path, whole)


def test_a_run_interrupted_at_every_step_resumes_bit_for_bit(color_folder: Path, whole: Path, tmp_path: Path) -> None:
    run_once = (Sender(signal.SIGTERM, step=step) for step in range(1, EPOCHS * STEPS + 1))
    for step, sender in enumerate(run_once, 1):
        with pytest.raises(Interrupted, match=f"at step {step} of"):
            run(color_folder, tmp_path, sender, resume="auto" if step > 1 else None)
    assert run(color_folder, tmp_path, resume="auto").epochs == EPOCHS
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_between_epochs_the_checkpoint_of_the_epoch_is_saved(
    color_folder: Path, whole: Path, tmp_path: Path, epoch: int
) -> None:
    with pytest.raises(
        Interrupted, match=rf"at step {STEPS * (epoch + 1)} of 12, checkpoint saved to .*lzh_{epoch}\.pth"
    ):
        run(color_folder, tmp_path, Sender(signal.SIGINT, epoch=epoch))
    assert not (tmp_path / "lzh_interrupted.pth").exists()
    assert run(color_folder, tmp_path, resume="auto").checkpoints[-1].name == f"lzh_{EPOCHS - 1}.pth"
    assert_same_run(tmp_path, whole)


def test_the_interrupted_checkpoint_is_removed_with_the_next_epoch(color_folder: Path, tmp_path: Path) -> None:
    interrupted = tmp_path / "lzh_interrupted.pth"
    with pytest.raises(Interrupted):
        run(color_folder, tmp_path, Sender(signal.SIGTERM, step=2))
    seen: list[bool] = []

    class ExistenceRecorder(Callback):
        def on_step_end(self, step: int) -> None:
            del step
            seen.append(interrupted.exists())

    run(color_folder, tmp_path, ExistenceRecorder(), resume="auto")
    assert seen == [True] * (STEPS - 2) + [False] * ((EPOCHS - 1) * STEPS)
    assert not interrupted.exists()


def test_the_interrupted_checkpoint_records_the_best_epoch(color_folder: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(color_folder, tmp_path, Sender(signal.SIGTERM, step=STEPS + 1), keep=1)
    done = run(color_folder, tmp_path, resume="auto", keep=1)
    last = load_checkpoint(whole / f"lzh_{EPOCHS - 1}.pth")
    assert deep_equal(load_checkpoint(tmp_path / f"lzh_{EPOCHS - 1}.pth").weights, last.weights)
    assert done.best is not None
    assert done.best[1] == last.training["best_accuracy"]
    assert done.best[0].exists()


def test_a_damaged_interrupted_checkpoint_is_skipped(color_folder: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(color_folder, tmp_path, Sender(signal.SIGTERM, step=STEPS + 2))
    os.truncate(tmp_path / "lzh_interrupted.pth", 1000)
    with pytest.warns(FallbackWarning, match=r"skipping a damaged checkpoint: .*lzh_interrupted\.pth"):
        run(color_folder, tmp_path, resume="auto")
    assert_same_run(tmp_path, whole)


def test_a_second_ctrl_c_exits_immediately_without_saving(color_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(color_folder, tmp_path, Sender(signal.SIGINT, signal.SIGINT, step=STEPS + 1))
    assert [path.name for path in tmp_path.glob("*.pth")] == ["lzh_0.pth"]


def test_the_handlers_are_restored_after_a_run(color_folder: Path, tmp_path: Path) -> None:
    run(color_folder, tmp_path, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_in_another_thread_trains_the_same_model(color_folder: Path, whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(color_folder, tmp_path))
    thread.start()
    thread.join()
    assert_same_run(tmp_path, whole)
