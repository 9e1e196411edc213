"""Signals while a run trains, each sent at a chosen moment by the process to itself."""

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
from tests.support.same_runs import require_same_run, same

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

STEPS = 4  # an epoch of 60 images
EPOCHS = 3


@pytest.fixture(autouse=True)
def _python_handlers() -> Any:
    """Python's own handlers, also where the tests run in the background with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# --- the block


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_nothing_else(number: int) -> None:
    with catch_signals() as interruption:
        assert interruption.signal_number is None
        send(number)
        assert interruption.signal_number == number


def test_sigterm_may_come_often() -> None:
    with catch_signals() as interruption:
        for _ in range(3):
            send(signal.SIGTERM)
        assert interruption.signal_number == signal.SIGTERM


def test_a_second_ctrl_c_is_not_held_back() -> None:
    with catch_signals() as interruption:
        send(signal.SIGINT)
        assert interruption.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_one_ctrl_c_after_sigterm_is_noted() -> None:
    with catch_signals() as interruption:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert interruption.signal_number == signal.SIGINT


def fail() -> None:
    raise RuntimeError


@pytest.mark.parametrize("ending", [lambda: None, lambda: send(signal.SIGINT), fail], ids=["well", "told", "failed"])
def test_the_handlers_are_as_before_afterwards(ending: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with catch_signals():
            ending()
    except RuntimeError:
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_what_is_ignored_stays_ignored() -> None:
    """A run that a shell started in the background is not ended by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with catch_signals() as interruption:
        send(signal.SIGINT)
        assert interruption.signal_number is None


def test_outside_the_main_thread_nothing_is_changed() -> None:
    seen: list[Any] = []

    def block() -> None:
        with catch_signals() as interruption:
            seen.extend((interruption.signal_number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [None, signal.default_int_handler]


# --- a run


class Sender(Callback):
    """Sends signals after a step, or while an epoch is reported."""

    def __init__(self, *numbers: int, step: int = 0, epoch: int = -1) -> None:
        self._numbers, self._step, self._epoch = numbers, step, epoch

    def on_step(self, step: int) -> None:
        if step == self._step:
            self._send()

    def on_epoch(self, report: EpochReport) -> None:
        if report.epoch == self._epoch:
            self._send()

    def _send(self) -> None:
        for number in self._numbers:
            send(number)


def run(data: Path, out: Path, *callbacks: Callback, **more: Any) -> TrainResult:
    settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 16, "ema": 0.9, "cutout": 8, "jitter": 0.2}
    return train(
        "lzh", data=str(data), recipe_name="fast", device="cpu", out=out, callbacks=callbacks, **{**settings, **more}
    )


@pytest.fixture(scope="module")
def whole(drawn_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing disturbed; not to be written to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(drawn_once, out)
    return out


@pytest.mark.parametrize(
    ("step", "number"),
    [(step, (signal.SIGINT, signal.SIGTERM)[step % 3 % 2]) for step in (1, 2, 3, 4, 5, 8, 11, 12)],
)
def test_after_any_step_the_state_is_saved_and_goes_on_to_the_same_bits(
    drawn_once: Path, whole: Path, tmp_path: Path, step: int, number: int
) -> None:
    epoch, done = divmod(step, STEPS)
    expected = "lzh_interrupted.pth" if done else f"lzh_{epoch - 1}.pth"
    with pytest.raises(Interrupted) as caught:
        run(drawn_once, tmp_path, Sender(number, step=step))
    assert caught.value.exit_status == 128 + number
    assert caught.value.problem == f"interrupted at step {step} of {EPOCHS * STEPS}, saved in {tmp_path / expected}"
    assert "--resume auto" in caught.value.remedy
    saved = [f"lzh_{before}.pth" for before in range(epoch)] + ["lzh_interrupted.pth"] * bool(done)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == saved
    training = load_checkpoint(tmp_path / expected).training
    assert (training["step"], training["epoch"], training["done"]) == (step, epoch, done)
    assert run(drawn_once, tmp_path, resume="auto").epochs == EPOCHS
    require_same_run(tmp_path, whole)


def test_a_run_told_to_stop_at_every_step_goes_on_to_the_same_bits(
    drawn_once: Path, whole: Path, tmp_path: Path
) -> None:
    run_once = (Sender(signal.SIGTERM, step=step) for step in range(1, EPOCHS * STEPS + 1))
    for step, sender in enumerate(run_once, 1):
        with pytest.raises(Interrupted, match=f"at step {step} of"):
            run(drawn_once, tmp_path, sender, resume="auto" if step > 1 else None)
    assert run(drawn_once, tmp_path, resume="auto").epochs == EPOCHS
    require_same_run(tmp_path, whole)


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_between_epochs_the_epochs_file_is_what_is_saved(
    drawn_once: Path, whole: Path, tmp_path: Path, epoch: int
) -> None:
    with pytest.raises(Interrupted, match=rf"at step {STEPS * (epoch + 1)} of 12, saved in .*lzh_{epoch}\.pth"):
        run(drawn_once, tmp_path, Sender(signal.SIGINT, epoch=epoch))
    assert not (tmp_path / "lzh_interrupted.pth").exists()
    assert run(drawn_once, tmp_path, resume="auto").checkpoints[-1].name == f"lzh_{EPOCHS - 1}.pth"
    require_same_run(tmp_path, whole)


def test_the_state_within_an_epoch_vanishes_with_the_next_epochs_file(drawn_once: Path, tmp_path: Path) -> None:
    interrupted = tmp_path / "lzh_interrupted.pth"
    with pytest.raises(Interrupted):
        run(drawn_once, tmp_path, Sender(signal.SIGTERM, step=2))
    seen: list[bool] = []

    class Watch(Callback):
        def on_step(self, step: int) -> None:
            del step
            seen.append(interrupted.exists())

    run(drawn_once, tmp_path, Watch(), resume="auto")
    assert seen == [True] * (STEPS - 2) + [False] * ((EPOCHS - 1) * STEPS)
    assert not interrupted.exists()


def test_the_state_within_an_epoch_keeps_the_best_epoch(drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(drawn_once, tmp_path, Sender(signal.SIGTERM, step=STEPS + 1), keep=1)
    done = run(drawn_once, tmp_path, resume="auto", keep=1)
    last = load_checkpoint(whole / f"lzh_{EPOCHS - 1}.pth")
    assert same(load_checkpoint(tmp_path / f"lzh_{EPOCHS - 1}.pth").model, last.model)
    assert done.best[1] == last.training["best_accuracy"]
    assert done.best[0].exists()


def test_a_damaged_state_within_an_epoch_is_passed_over(drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(drawn_once, tmp_path, Sender(signal.SIGTERM, step=STEPS + 2))
    os.truncate(tmp_path / "lzh_interrupted.pth", 1000)
    with pytest.warns(FallbackWarning, match=r"passing over a damaged checkpoint: .*lzh_interrupted\.pth"):
        run(drawn_once, tmp_path, resume="auto")
    require_same_run(tmp_path, whole)


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(drawn_once: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(drawn_once, tmp_path, Sender(signal.SIGINT, signal.SIGINT, step=STEPS + 1))
    assert [path.name for path in tmp_path.glob("*.pth")] == ["lzh_0.pth"]


def test_after_a_run_signals_mean_what_they_did(drawn_once: Path, tmp_path: Path) -> None:
    run(drawn_once, tmp_path, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_in_another_thread_trains_as_ever(drawn_once: Path, whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(drawn_once, tmp_path))
    thread.start()
    thread.join()
    require_same_run(tmp_path, whole)
