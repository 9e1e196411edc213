import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cifarx_serve.errors import CheckFailed
from cifarx_serve.images.preprocess import scale
from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import Callback, StepReport
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceImages
from cifarx_train.loop import EpochEnd, Loop, require_finite
from cifarx_train.models.registry import network
from cifarx_train.optim.ema import Ema
from cifarx_train.optim.schedule import lr_factor
from cifarx_train.recipes import Recipe, recipe

CPU = torch.device("cpu")
MUON = {"optimizer": "muon", "bias_lr": 0.05, "head_lr": 0.1, "momentum": 0.6, "nesterov": True}


def plan(**values: Any) -> Recipe:
    return recipe("notes", overrides=values)


def random_split(count: int, side: int = 2) -> LabeledImages:
    """Random images, each with its own number in its first pixel's red."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return LabeledImages(images, rng.integers(0, 3, count))


def easy_split(count: int, side: int = 8) -> LabeledImages:
    """Three classes told apart by their brightest channel."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = rng.integers(0, 120, (count, side, side, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 80
    return LabeledImages(images, labels)


def loop_on(model: nn.Module, data: LabeledImages, chosen: Recipe, seed: int = 0) -> Loop:
    spec = InputSpec(height=data.images.shape[1], width=data.images.shape[2])
    return Loop(model, DeviceImages(data, CPU), spec, chosen, device=CPU, seed=seed)


class Watched(nn.Module):
    """Linear on tiny images; remembers the numbers of the images of each batch, and the modes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)
        self.batches: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append((images[:, 0, 0, 0] * 255).round().int().tolist())
        self.modes.append(self.training)
        logits: torch.Tensor = self.linear(images.flatten(1))
        return logits


def small_net(dropout: float = 0.2) -> nn.Sequential:
    """Convolutions, norms, a hidden linear layer, dropout and a head, for images of 8x8."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(10, 3),
    )


class Notes(Callback):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.reports: list[StepReport] = []

    def on_step(self, step: int) -> None:
        self.steps.append(step)

    def on_log(self, report: StepReport) -> None:
        self.reports.append(report)


def tiny_loop(model: nn.Module, count: int, *, epochs: int, batch_size: int, lr: float = 0.01, seed: int = 0) -> Loop:
    return loop_on(model, random_split(count), plan(epochs=epochs, batch_size=batch_size, learning_rate=lr), seed)


def by_hand(data: LabeledImages, model: nn.Module, chosen: Recipe, seed: int) -> Iterator[tuple[float, float]]:
    """SGD without an optimizer object or any code of the loop: the loss of every step and its gradient's norm."""
    spec = InputSpec(height=data.images.shape[1], width=data.images.shape[2])
    inputs, labels = torch.from_numpy(scale(data.images, spec)), torch.from_numpy(data.labels)
    inputs = inputs.contiguous(memory_format=torch.channels_last)  # as the loop has them on a CPU
    orders = torch.Generator().manual_seed(seed)
    steps, step = chosen.epochs * math.ceil(len(labels) / chosen.batch_size), 0
    buffers = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for _ in range(chosen.epochs):
        for batch in torch.randperm(len(labels), generator=orders).split(chosen.batch_size):
            loss = functional.cross_entropy(model(inputs[batch]), labels[batch], label_smoothing=chosen.label_smoothing)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            if chosen.max_grad_norm is not None and norm > chosen.max_grad_norm:
                gradients = tuple(gradient * (chosen.max_grad_norm / norm) for gradient in gradients)
            rate = chosen.learning_rate * lr_factor(chosen, step, steps)
            with torch.no_grad():
                for parameter, gradient, buffer in zip(model.parameters(), gradients, buffers, strict=True):
                    decays = chosen.weight_decay and parameter.ndim > 1
                    decayed = gradient + chosen.weight_decay * parameter if decays else gradient
                    buffer.mul_(chosen.momentum).add_(decayed)
                    ahead = decayed + chosen.momentum * buffer if chosen.nesterov else buffer
                    parameter.add_(ahead, alpha=-rate)
            step += 1
            yield loss.item(), norm.item()


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    model = make()
    return model, copy.deepcopy(model)


# --- what a step does


def test_the_notes_recipe_equals_sgd_written_by_hand_bit_for_bit() -> None:
    torch.manual_seed(3)
    model, twin = twins(lambda: network("lzh").build(3))
    data, chosen = random_split(40, side=32), plan(epochs=2, batch_size=16, learning_rate=0.05)
    ends = list(loop_on(model, data, chosen, seed=11).epochs(Callback()))
    losses = [loss for loss, _ in by_hand(data, twin, chosen, seed=11)]
    assert [(end.epoch, end.step, end.whole) for end in ends] == [(0, 3, True), (1, 6, True)]
    assert [end.loss for end in ends] == [losses[2], losses[5]]
    for name, expected in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name


@pytest.mark.parametrize(
    "values",
    [
        {"label_smoothing": 0.2},
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 1e6},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"schedule": "linear", "warm_up": 0.3},
        {"schedule": "cosine", "momentum": 0.5, "max_grad_norm": 0.1, "label_smoothing": 0.1},
    ],
)
def test_every_setting_does_what_it_says(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, twin = twins(Watched)
    data, chosen = random_split(30), plan(epochs=3, batch_size=8, learning_rate=0.2, **values)
    ends = list(loop_on(model, data, chosen, seed=5).epochs(Callback()))
    steps = list(by_hand(data, twin, chosen, seed=5))
    assert [end.loss for end in ends] == [pytest.approx(steps[4 * epoch + 3][0], rel=1e-4) for epoch in range(3)]
    for name, expected in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize(
    "optimizer", [{}, {"optimizer": "adamw"}, MUON], ids=lambda values: values.get("optimizer", "sgd")
)
def test_learns(optimizer: dict[str, Any], ema: float | None, channels_last: bool) -> None:
    rate = {"adamw": 0.01, "muon": 0.05}.get(str(optimizer.get("optimizer")), 0.1)
    chosen = plan(
        epochs=8,
        batch_size=10,
        learning_rate=rate,
        schedule="linear",
        ema=ema,
        channels_last=channels_last,
        **optimizer,
    )
    data = easy_split(60)
    loop = loop_on(small_net(), data, chosen)
    losses = [end.loss for end in loop.epochs(Callback())]
    assert losses[-1] < losses[0] / 2
    inputs = torch.from_numpy(scale(data.images, InputSpec(height=8, width=8)))
    assert (loop.eval_model.eval()(inputs).argmax(1).numpy() == data.labels).mean() > 0.95


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [{}, {"max_grad_norm": 0.5}, MUON], ids=["sgd", "clipped", "muon"])
def test_lower_precision_is_near_the_full_one(precision: str, optimizer: dict[str, Any]) -> None:
    data = easy_split(60)
    weights, losses = [], []
    for chosen_precision in ("fp32", precision):
        model = small_net(dropout=0.0)
        chosen = plan(epochs=2, batch_size=16, learning_rate=0.05, precision=chosen_precision, **optimizer)
        losses.append([end.loss for end in loop_on(model, data, chosen).epochs(Callback())])
        weights.append(torch.cat([value.flatten().float() for value in model.parameters()]))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]
    assert (weights[1] - weights[0]).norm() < 0.1 * weights[0].norm()


def test_channels_last_trains_the_same_network() -> None:
    losses = []
    for channels_last in (False, True):
        chosen = plan(epochs=3, batch_size=16, learning_rate=0.05, channels_last=channels_last)
        losses.append([end.loss for end in loop_on(small_net(), easy_split(60), chosen).epochs(Callback())])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_network_sees_augmented_images() -> None:
    seen = []

    class Seeing(Watched):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.detach().clone())
            return super().forward(images)

    data = random_split(40)
    torch.manual_seed(0)
    list(loop_on(Seeing(), data, plan(epochs=1, batch_size=40, flip=True, cutout=1)).epochs(Callback()))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).numpy()
    plain = torch.from_numpy(scale(data.images[order], InputSpec(height=2, width=2)))
    blanked = (seen[0] == 0).all(1).flatten(1).sum(1)
    assert (blanked >= 1).all()
    assert not torch.equal(seen[0], plain)


# --- the order


def test_every_image_is_seen_once_an_epoch_in_a_new_order() -> None:
    model = Watched()
    orders = []
    for _ in tiny_loop(model, 50, epochs=3, batch_size=16).epochs(Callback()):
        assert [len(batch) for batch in model.batches] == [16, 16, 16, 2]
        orders.append([number for batch in model.batches for number in batch])
        model.batches.clear()
    assert [sorted(order) for order in orders] == [list(range(50))] * 3
    assert len({tuple(order) for order in [*orders, range(50)]}) == 4


def test_the_seed_decides_the_order_and_the_global_random_state_does_not() -> None:
    def order(seed: int, state: int) -> list[list[int]]:
        model = Watched()
        torch.manual_seed(state)
        list(tiny_loop(model, 50, epochs=2, batch_size=50, seed=seed).epochs(Callback()))
        return model.batches

    assert order(1, 1) == order(1, 2)
    assert order(1, 1) != order(2, 1)


def test_equal_seeds_give_equal_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = small_net()
        torch.manual_seed(seed)
        chosen = plan(epochs=2, batch_size=16, flip=True, crop=2, jitter=0.2)
        list(loop_on(model, easy_split(40), chosen, seed).epochs(Callback()))
        return torch.cat([value.flatten() for value in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_training_is_in_train_mode_also_after_an_evaluation() -> None:
    model = Watched().eval()
    for _ in tiny_loop(model, 20, epochs=3, batch_size=8).epochs(Callback()):
        model.eval()  # as an evaluation does between epochs
    assert model.modes == [True] * 9


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(50, 16, 12), (48, 16, 9), (50, 64, 3), (1, 1, 3)])
def test_steps_are_known_beforehand(count: int, batch_size: int, steps: int) -> None:
    loop = tiny_loop(Watched(), count, epochs=3, batch_size=batch_size)
    notes = Notes()
    assert (loop.steps, loop.epoch_steps) == (steps, steps // 3)
    assert list(loop.epochs(notes))[-1].step == steps
    assert notes.steps == list(range(1, steps + 1))
    assert (loop.epoch, loop.done, loop.step) == (3, 0, steps)


def test_a_batch_larger_than_all_images_is_all_images() -> None:
    model = Watched()
    list(tiny_loop(model, 7, epochs=1, batch_size=1000).epochs(Callback()))
    assert [sorted(batch) for batch in model.batches] == [list(range(7))]


# --- what is told


def test_every_hundredth_step_is_reported() -> None:
    torch.manual_seed(0)
    model, twin = twins(Watched)
    chosen = plan(epochs=5, batch_size=1, learning_rate=0.01, schedule="linear", max_grad_norm=0.5)
    notes = Notes()
    ends = list(loop_on(model, random_split(70), chosen).epochs(notes))
    steps = list(by_hand(random_split(70), twin, chosen, seed=0))
    assert [report.step for report in notes.reports] == [100, 200, 300]
    for report in notes.reports:
        loss, norm = steps[report.step - 1]
        assert report.loss == pytest.approx(loss, rel=1e-4)
        assert report.gradient_norm == pytest.approx(norm, rel=1e-4)  # before it was clipped
        assert report.learning_rate == pytest.approx(0.01 * (1 - (report.step - 1) / 350))
        assert 0 < report.images_per_s < math.inf
    assert any(report.gradient_norm > 0.5 for report in notes.reports)
    assert [end.step for end in ends] == [70, 140, 210, 280, 350]


def test_few_steps_are_not_reported() -> None:
    notes = Notes()
    list(tiny_loop(Watched(), 99, epochs=1, batch_size=1).epochs(notes))
    assert notes.reports == []


def test_the_speed_of_an_epoch_is_a_positive_number() -> None:
    loop = tiny_loop(Watched(), 50, epochs=2, batch_size=8)
    ends: list[EpochEnd] = list(loop.epochs(Callback()))
    assert all(0 < end.images_per_s < math.inf for end in ends)
    assert loop.seconds == pytest.approx(sum(50 / end.images_per_s for end in ends))


# --- what ends a run


@pytest.mark.parametrize("epochs", [1, 200])
def test_a_diverging_loss_fails_the_check(epochs: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Linear(9, 3))
    loop = tiny_loop(model, 40, epochs=epochs, batch_size=8, lr=1e30)
    with pytest.raises(CheckFailed, match=r"training diverged.*at step [1-9].*lower --lr.*nothing was saved") as caught:
        list(loop.epochs(Callback()))
    assert caught.value.exit_status == 1


def test_the_last_good_checkpoint_is_named() -> None:
    loop = tiny_loop(Watched(), 40, epochs=3, batch_size=8, lr=1e38)
    loop.good = "run/lzh_3.pth"
    with pytest.raises(CheckFailed, match=r"run/lzh_3\.pth is the last good checkpoint"):
        list(loop.epochs(Callback()))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_only_finite_losses_go_on(loss: float) -> None:
    assert require_finite(0.5, 3, "") == 0.5
    with pytest.raises(CheckFailed, match=f"the loss is {loss} at step 3"):
        require_finite(loss, 3, "")


def test_a_diverging_loss_is_not_reported_as_a_reading() -> None:
    notes = Notes()
    with pytest.raises(CheckFailed, match="at step 100:"):
        list(tiny_loop(Watched(), 100, epochs=1, batch_size=1, lr=1e38).epochs(notes))
    assert notes.reports == []


@pytest.mark.parametrize("last", [1, 3, 5])
def test_a_run_that_is_stopped_ends_after_that_step(last: int) -> None:
    model, notes = Watched(), Notes()
    loop = tiny_loop(model, 40, epochs=3, batch_size=8)
    ends = list(loop.epochs(notes, stop=lambda: loop.step == last))
    assert notes.steps == list(range(1, last + 1))
    assert [(end.epoch, end.step, end.whole) for end in ends] == [(0, last, last == 5)]
    assert (loop.epoch, loop.done) == ((1, 0) if last == 5 else (0, last))


# --- going on

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "max_grad_norm": 1.0, "label_smoothing": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "muon": MUON,
    "muon, average": {**MUON, "ema": 0.9, "channels_last": True},
    "average": {"momentum": 0.9, "ema": 0.95},
    "channels last": {"momentum": 0.9, "channels_last": True},
    "bf16": {"momentum": 0.9, "precision": "bf16"},
    "fp16": {"momentum": 0.9, "precision": "fp16"},
    "everything": {"momentum": 0.9, "ema": 0.9, "channels_last": True, "cutout": 3, "jitter": 0.3, "precision": "bf16"},
}


@pytest.mark.parametrize("stop_at", [2, 5, 8])  # within the first epoch, between two, within the second
@pytest.mark.parametrize("settings", list(SETTINGS))
def test_a_run_goes_on_bit_for_bit(settings: str, stop_at: int) -> None:
    chosen = plan(
        epochs=3,
        batch_size=8,
        learning_rate=0.02,
        schedule="cosine",
        warm_up=0.2,
        flip=True,
        crop=2,
        **SETTINGS[settings],
    )

    def fresh(seed: int) -> Loop:
        model = small_net()
        torch.manual_seed(seed)
        return loop_on(model, easy_split(37), chosen, seed=7)

    whole = fresh(1)
    losses = [end.loss for end in whole.epochs(Callback())]
    first = fresh(1)
    for end in first.epochs(Callback(), stop=lambda: first.step == stop_at):
        if end.step == stop_at:
            break
    weights, state = copy.deepcopy((first.eval_model.state_dict(), first.state()))
    second = fresh(2)
    with torch.no_grad():
        for parameter in second.module.parameters():
            parameter.add_(1.0)  # the first weights must not matter
    second.restore(weights, state)
    assert second.step == stop_at
    assert [end.loss for end in second.epochs(Callback())] == losses[stop_at // 5 :]
    assert second.step == whole.step == 15
    for one, other in ((second.module, whole.module), (second.eval_model, whole.eval_model)):
        for name, expected in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], expected), name


def test_the_judged_weights_are_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    update = Ema.update
    monkeypatch.setattr(Ema, "update", lambda self, step: (updates.append(step), update(self, step))[1])
    loop = loop_on(small_net(), easy_split(20), plan(epochs=2, batch_size=8, ema=0.9))
    list(loop.epochs(Callback()))
    assert updates == [1, 2, 3, 4, 5, 6]
    assert loop.eval_model is not loop.module
    assert not torch.equal(loop.eval_model.state_dict()["0.weight"], loop.module.state_dict()["0.weight"])
    plain = loop_on(small_net(), easy_split(20), plan(epochs=1))
    assert plain.eval_model is plain.module


def test_the_state_of_another_recipe_is_refused() -> None:
    first = loop_on(small_net(), easy_split(20), plan(epochs=1, batch_size=8))
    list(first.epochs(Callback()))
    weights, state = copy.deepcopy((first.eval_model.state_dict(), first.state()))
    other = loop_on(small_net(), easy_split(20), plan(epochs=1, batch_size=8, **MUON))
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        other.restore(weights, state)
    another = loop_on(Watched(), random_split(20), plan(epochs=1, batch_size=8))
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        another.restore(weights, state)


def test_the_state_can_be_saved_without_code(tmp_path: Any) -> None:
    loop = loop_on(small_net(), easy_split(20), plan(epochs=1, batch_size=8, ema=0.9, precision="fp16", **MUON))
    list(loop.epochs(Callback()))
    torch.save(loop.state(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_a_compiled_network_trains_as_the_plain_one() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    losses, names = [], []
    for compiled in (False, True):
        model = copy.deepcopy(first)
        loop = loop_on(model, easy_split(40), plan(epochs=2, batch_size=20, learning_rate=0.05, compile=compiled))
        losses.append([end.loss for end in loop.epochs(Callback())])
        names.append(list(loop.eval_model.state_dict()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert names[0] == names[1]  # a checkpoint of the one is a checkpoint of the other
