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
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.spec import InputSpec
from cifarx_train.callbacks.base import Callback, StepReport
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.loop import EpochResult, TrainingLoop, require_finite_loss
from cifarx_train.models.registry import get_architecture
from cifarx_train.optim.ema import ModelEma
from cifarx_train.optim.optimizers import lr_factor
from cifarx_train.recipes import Recipe, load_recipe

CPU = torch.device("cpu")
MUON = {"optimizer": "muon", "bias_lr": 0.05, "head_lr": 0.1, "momentum": 0.6, "nesterov": True}


def make_recipe(**values: Any) -> Recipe:
    return load_recipe("notes", overrides=values)


def random_split(count: int, side: int = 2) -> LabeledImages:
    """Random images, each with its index in the red channel of its first pixel."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return LabeledImages(images, rng.integers(0, 3, count))


def easy_split(count: int, side: int = 8) -> LabeledImages:
    """Three classes that differ in their brightest channel."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = rng.integers(0, 120, (count, side, side, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 80
    return LabeledImages(images, labels)


def make_loop(model: nn.Module, data: LabeledImages, recipe: Recipe, seed: int = 0) -> TrainingLoop:
    spec = InputSpec(height=data.images.shape[1], width=data.images.shape[2])
    return TrainingLoop(model, DeviceLoader(data, CPU), spec, recipe, device=CPU, seed=seed)


class RecordingModel(nn.Module):
    """A linear layer on tiny images that records the image indices of each batch and the training mode."""

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
    """Convolutions, a norm, a hidden linear layer, dropout and a head for 8x8 images."""
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


class RecordingCallback(Callback):
    """Records the events it receives."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.reports: list[StepReport] = []

    def on_step_end(self, step: int) -> None:
        self.steps.append(step)

    def on_log(self, report: StepReport) -> None:
        self.reports.append(report)


def tiny_loop(
    model: nn.Module, count: int, *, epochs: int, batch_size: int, lr: float = 0.01, seed: int = 0
) -> TrainingLoop:
    return make_loop(
        model, random_split(count), make_recipe(epochs=epochs, batch_size=batch_size, learning_rate=lr), seed
    )


def reference_sgd(data: LabeledImages, model: nn.Module, recipe: Recipe, seed: int) -> Iterator[tuple[float, float]]:
    """Train with SGD without an optimizer or any code of the loop. Yield the loss and gradient norm of every step."""
    spec = InputSpec(height=data.images.shape[1], width=data.images.shape[2])
    inputs, labels = torch.from_numpy(normalize(data.images, spec)), torch.from_numpy(data.labels)
    inputs = inputs.contiguous(memory_format=torch.channels_last)  # as in the loop on a CPU
    orders = torch.Generator().manual_seed(seed)
    steps, step = recipe.epochs * math.ceil(len(labels) / recipe.batch_size), 0
    buffers = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(labels), generator=orders).split(recipe.batch_size):
            loss = functional.cross_entropy(model(inputs[batch]), labels[batch], label_smoothing=recipe.label_smoothing)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            if recipe.max_grad_norm is not None and norm > recipe.max_grad_norm:
                gradients = tuple(gradient * (recipe.max_grad_norm / norm) for gradient in gradients)
            rate = recipe.learning_rate * lr_factor(recipe, step, steps)
            with torch.no_grad():
                for parameter, gradient, buffer in zip(model.parameters(), gradients, buffers, strict=True):
                    decays = recipe.weight_decay and parameter.ndim > 1
                    decayed = gradient + recipe.weight_decay * parameter if decays else gradient
                    buffer.mul_(recipe.momentum).add_(decayed)
                    ahead = decayed + recipe.momentum * buffer if recipe.nesterov else buffer
                    parameter.add_(ahead, alpha=-rate)
            step += 1
            yield loss.item(), norm.item()


def two_copies(create: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    model = create()
    return model, copy.deepcopy(model)


# --- a training step


def test_the_notes_recipe_matches_reference_sgd_bit_for_bit() -> None:
    torch.manual_seed(3)
    model, reference = two_copies(lambda: get_architecture("lzh").build(3))
    data, recipe = random_split(40, side=32), make_recipe(epochs=2, batch_size=16, learning_rate=0.05)
    results = list(make_loop(model, data, recipe, seed=11).train_epochs(Callback()))
    losses = [loss for loss, _ in reference_sgd(data, reference, recipe, seed=11)]
    assert [(result.epoch, result.step, result.complete) for result in results] == [(0, 3, True), (1, 6, True)]
    assert [result.loss for result in results] == [losses[2], losses[5]]
    for name, expected in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name


@pytest.mark.parametrize(
    "values",
    [
        {"label_smoothing": 0.2},
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 1e6},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"schedule": "linear", "warmup_fraction": 0.3},
        {"schedule": "cosine", "momentum": 0.5, "max_grad_norm": 0.1, "label_smoothing": 0.1},
    ],
)
def test_every_sgd_setting_matches_reference_sgd(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, reference = two_copies(RecordingModel)
    data, recipe = random_split(30), make_recipe(epochs=3, batch_size=8, learning_rate=0.2, **values)
    results = list(make_loop(model, data, recipe, seed=5).train_epochs(Callback()))
    steps = list(reference_sgd(data, reference, recipe, seed=5))
    assert [result.loss for result in results] == [
        pytest.approx(steps[4 * epoch + 3][0], rel=1e-4) for epoch in range(3)
    ]
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize(
    "optimizer", [{}, {"optimizer": "adamw"}, MUON], ids=lambda values: values.get("optimizer", "sgd")
)
def test_learns(optimizer: dict[str, Any], ema_decay: float | None, channels_last: bool) -> None:
    rate = {"adamw": 0.01, "muon": 0.05}.get(str(optimizer.get("optimizer")), 0.1)
    recipe = make_recipe(
        epochs=8,
        batch_size=10,
        learning_rate=rate,
        schedule="linear",
        ema_decay=ema_decay,
        channels_last=channels_last,
        **optimizer,
    )
    data = easy_split(60)
    loop = make_loop(small_net(), data, recipe)
    losses = [result.loss for result in loop.train_epochs(Callback())]
    assert losses[-1] < losses[0] / 2
    inputs = torch.from_numpy(normalize(data.images, InputSpec(height=8, width=8)))
    assert (loop.eval_model.eval()(inputs).argmax(1).numpy() == data.labels).mean() > 0.95


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [{}, {"max_grad_norm": 0.5}, MUON], ids=["sgd", "clipped", "muon"])
def test_lower_precision_is_close_to_full_precision(precision: str, optimizer: dict[str, Any]) -> None:
    data = easy_split(60)
    weights, losses = [], []
    for dtype in ("fp32", precision):
        model = small_net(dropout=0.0)
        recipe = make_recipe(epochs=2, batch_size=16, learning_rate=0.05, precision=dtype, **optimizer)
        losses.append([result.loss for result in make_loop(model, data, recipe).train_epochs(Callback())])
        weights.append(torch.cat([value.flatten().float() for value in model.parameters()]))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]
    assert (weights[1] - weights[0]).norm() < 0.1 * weights[0].norm()


def test_channels_last_trains_the_same_model() -> None:
    losses = []
    for channels_last in (False, True):
        recipe = make_recipe(epochs=3, batch_size=16, learning_rate=0.05, channels_last=channels_last)
        losses.append(
            [result.loss for result in make_loop(small_net(), easy_split(60), recipe).train_epochs(Callback())]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_training_images_are_augmented() -> None:
    seen = []

    class ImageRecorder(RecordingModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.detach().clone())
            return super().forward(images)

    data = random_split(40)
    torch.manual_seed(0)
    loop = make_loop(ImageRecorder(), data, make_recipe(epochs=1, batch_size=40, flip=True, cutout=1))
    list(loop.train_epochs(Callback()))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).numpy()
    plain = torch.from_numpy(normalize(data.images[order], InputSpec(height=2, width=2)))
    blanked = (seen[0] == 0).all(1).flatten(1).sum(1)
    assert (blanked >= 1).all()
    assert not torch.equal(seen[0], plain)


# --- accumulation, frozen layers and the backbone


class PlainNet(nn.Module):
    """A convolution and a linear layer, without statistics of batches, that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 36, 3)
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        logits: torch.Tensor = self.head(self.body(images).relu().flatten(1))
        return logits


@pytest.mark.parametrize(
    "values",
    [
        {"momentum": 0.9, "label_smoothing": 0.1, "flip": True},
        {"optimizer": "adamw", "max_grad_norm": 0.1, "cutmix": 1.0, "learning_rate": 0.01},
    ],
)
def test_accumulation_trains_like_a_larger_batch(values: dict[str, Any]) -> None:
    results, weights, sizes = [], [], []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        model = PlainNet()
        recipe = make_recipe(
            **{"epochs": 2, "learning_rate": 0.1, **values}, batch_size=batch_size, accumulate=accumulate
        )
        torch.manual_seed(1)
        loop = make_loop(model, easy_split(42), recipe)
        results.append(
            [(result.step, pytest.approx(result.loss, rel=1e-4)) for result in loop.train_epochs(Callback())]
        )
        weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
        sizes.append(model.sizes[: len(model.sizes) // 2])
    assert sizes == [[16, 16, 10], [4, 4, 4, 4, 4, 4, 4, 4, 3, 3, 4]]
    assert results[0] == results[1]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [9, 10, 13])
def test_no_pass_has_a_single_image(count: int) -> None:
    model = PlainNet()
    recipe = make_recipe(epochs=1, batch_size=2, accumulate=4)
    list(make_loop(model, easy_split(count), recipe).train_epochs(Callback()))
    assert sum(model.sizes) == count
    assert min(model.sizes) >= 2


def test_frozen_layers_keep_their_weights_and_statistics() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    recipe = make_recipe(epochs=2, batch_size=8, learning_rate=0.1, momentum=0.9, weight_decay=0.1, freeze="0.*,1.*")
    list(make_loop(model, easy_split(30), recipe).train_epochs(Callback()))
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"4", "7", "10"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_backbone_has_its_own_rate(optimizer: str) -> None:
    model = PlainNet()
    before = copy.deepcopy(model.state_dict())
    recipe = make_recipe(epochs=1, batch_size=30, learning_rate=0.1, backbone_lr=1e-30, optimizer=optimizer)
    head = frozenset({"head.weight", "head.bias"})
    spec, data = InputSpec(height=8, width=8), easy_split(30)
    list(TrainingLoop(model, DeviceLoader(data, CPU), spec, recipe, device=CPU, head=head).train_epochs(Callback()))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == head


# --- the order of the images


def test_every_epoch_contains_every_image_once_in_a_new_order() -> None:
    model = RecordingModel()
    orders = []
    for _ in tiny_loop(model, 50, epochs=3, batch_size=16).train_epochs(Callback()):
        assert [len(batch) for batch in model.batches] == [16, 16, 16, 2]
        orders.append([number for batch in model.batches for number in batch])
        model.batches.clear()
    assert [sorted(order) for order in orders] == [list(range(50))] * 3
    assert len({tuple(order) for order in [*orders, range(50)]}) == 4


def test_a_balanced_sampler_shows_every_class_equally_often() -> None:
    data = random_split(60)
    labels = np.repeat([0, 1, 2], [48, 9, 3])
    model = RecordingModel()
    recipe = make_recipe(epochs=2, batch_size=7, sampler="balanced")
    for _ in make_loop(model, LabeledImages(data.images, labels), recipe).train_epochs(Callback()):
        pass
    epochs = np.array([index for batch in model.batches for index in batch]).reshape(2, 60)
    assert [np.bincount(labels[epoch]).tolist() for epoch in epochs] == [[20, 20, 20]] * 2
    assert sorted(epochs[0]) != sorted(epochs[1])  # other images of the frequent class


def test_the_order_depends_on_the_seed_and_not_on_the_global_random_state() -> None:
    def order(seed: int, state: int) -> list[list[int]]:
        model = RecordingModel()
        torch.manual_seed(state)
        list(tiny_loop(model, 50, epochs=2, batch_size=50, seed=seed).train_epochs(Callback()))
        return model.batches

    assert order(1, 1) == order(1, 2)
    assert order(1, 1) != order(2, 1)


def test_equal_seeds_give_equal_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = small_net()
        torch.manual_seed(seed)
        recipe = make_recipe(epochs=2, batch_size=16, flip=True, crop=2, jitter=0.2)
        list(make_loop(model, easy_split(40), recipe, seed).train_epochs(Callback()))
        return torch.cat([value.flatten() for value in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_training_is_in_train_mode_after_an_evaluation() -> None:
    model = RecordingModel().eval()
    for _ in tiny_loop(model, 20, epochs=3, batch_size=8).train_epochs(Callback()):
        model.eval()  # as an evaluation does between epochs
    assert model.modes == [True] * 9


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(50, 16, 12), (48, 16, 9), (50, 64, 3), (1, 1, 3)])
def test_the_number_of_steps_is_known_in_advance(count: int, batch_size: int, steps: int) -> None:
    loop = tiny_loop(RecordingModel(), count, epochs=3, batch_size=batch_size)
    callback = RecordingCallback()
    assert (loop.total_steps, loop.steps_per_epoch) == (steps, steps // 3)
    assert list(loop.train_epochs(callback))[-1].step == steps
    assert callback.steps == list(range(1, steps + 1))
    assert (loop.epoch, loop.epoch_step, loop.step) == (3, 0, steps)


def test_a_batch_size_above_the_number_of_images_gives_one_batch() -> None:
    model = RecordingModel()
    list(tiny_loop(model, 7, epochs=1, batch_size=1000).train_epochs(Callback()))
    assert [sorted(batch) for batch in model.batches] == [list(range(7))]


# --- reports


def test_every_hundredth_step_is_reported() -> None:
    torch.manual_seed(0)
    model, reference = two_copies(RecordingModel)
    recipe = make_recipe(epochs=5, batch_size=1, learning_rate=0.01, schedule="linear", max_grad_norm=0.5)
    callback = RecordingCallback()
    results = list(make_loop(model, random_split(70), recipe).train_epochs(callback))
    steps = list(reference_sgd(random_split(70), reference, recipe, seed=0))
    assert [report.step for report in callback.reports] == [100, 200, 300]
    for report in callback.reports:
        loss, norm = steps[report.step - 1]
        assert report.loss == pytest.approx(loss, rel=1e-4)
        assert report.grad_norm == pytest.approx(norm, rel=1e-4)  # before clipping
        assert report.learning_rate == pytest.approx(0.01 * (1 - (report.step - 1) / 350))
        assert 0 < report.images_per_s < math.inf
    assert any(report.grad_norm > 0.5 for report in callback.reports)
    assert [result.step for result in results] == [70, 140, 210, 280, 350]


def test_fewer_steps_than_the_interval_are_not_reported() -> None:
    callback = RecordingCallback()
    list(tiny_loop(RecordingModel(), 99, epochs=1, batch_size=1).train_epochs(callback))
    assert callback.reports == []


def test_the_throughput_of_an_epoch_is_positive() -> None:
    loop = tiny_loop(RecordingModel(), 50, epochs=2, batch_size=8)
    results: list[EpochResult] = list(loop.train_epochs(Callback()))
    assert all(0 < result.images_per_s < math.inf for result in results)
    assert loop.elapsed_s == pytest.approx(sum(50 / result.images_per_s for result in results))


# --- stopping


@pytest.mark.parametrize("epochs", [1, 200])
def test_a_diverging_loss_raises_check_failed(epochs: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Linear(9, 3))
    loop = tiny_loop(model, 40, epochs=epochs, batch_size=8, lr=1e30)
    with pytest.raises(
        CheckFailed, match=r"training diverged.*at step [1-9].*lower --lr.*no checkpoint was saved"
    ) as caught:
        list(loop.train_epochs(Callback()))
    assert caught.value.exit_status == 1


def test_the_error_names_the_last_good_checkpoint() -> None:
    loop = tiny_loop(RecordingModel(), 40, epochs=3, batch_size=8, lr=1e38)
    loop.last_checkpoint = "run/lzh_3.pth"
    with pytest.raises(CheckFailed, match=r"run/lzh_3\.pth is the last good checkpoint"):
        list(loop.train_epochs(Callback()))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_only_a_finite_loss_is_accepted(loss: float) -> None:
    assert require_finite_loss(0.5, 3, "") == 0.5
    with pytest.raises(CheckFailed, match=f"the loss is {loss} at step 3"):
        require_finite_loss(loss, 3, "")


def test_a_diverging_loss_is_not_reported() -> None:
    callback = RecordingCallback()
    with pytest.raises(CheckFailed, match="at step 100:"):
        list(tiny_loop(RecordingModel(), 100, epochs=1, batch_size=1, lr=1e38).train_epochs(callback))
    assert callback.reports == []


@pytest.mark.parametrize("last", [1, 3, 5])
def test_training_stops_after_the_step_that_requests_it(last: int) -> None:
    model, callback = RecordingModel(), RecordingCallback()
    loop = tiny_loop(model, 40, epochs=3, batch_size=8)
    results = list(loop.train_epochs(callback, should_stop=lambda: loop.step == last))
    assert callback.steps == list(range(1, last + 1))
    assert [(result.epoch, result.step, result.complete) for result in results] == [(0, last, last == 5)]
    assert (loop.epoch, loop.epoch_step) == ((1, 0) if last == 5 else (0, last))


# --- resuming

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "max_grad_norm": 1.0, "label_smoothing": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "muon": MUON,
    "muon, average": {**MUON, "ema_decay": 0.9, "channels_last": True},
    "average": {"momentum": 0.9, "ema_decay": 0.95},
    "channels last": {"momentum": 0.9, "channels_last": True},
    "bf16": {"momentum": 0.9, "precision": "bf16"},
    "fp16": {"momentum": 0.9, "precision": "fp16"},
    "everything": {
        "momentum": 0.9,
        "ema_decay": 0.9,
        "channels_last": True,
        "cutout": 3,
        "jitter": 0.3,
        "precision": "bf16",
    },
    "photos": {
        "random_resized_crop": 0.3,
        "auto_augment": "trivial",
        "random_erasing": 0.5,
        "mixup": 0.2,
        "cutmix": 1.0,
        "freeze": ["0.*", "1.*"],
    },
    "balanced": {"sampler": "balanced"},
}


@pytest.mark.parametrize("stop_at", [2, 5, 8])  # in the first epoch, at its end, and in the second
@pytest.mark.parametrize("settings", list(SETTINGS))
def test_a_run_resumes_bit_for_bit(settings: str, stop_at: int) -> None:
    recipe = make_recipe(
        epochs=3,
        batch_size=8,
        learning_rate=0.02,
        schedule="cosine",
        warmup_fraction=0.2,
        flip=True,
        crop=2,
        **SETTINGS[settings],
    )

    def fresh(seed: int) -> TrainingLoop:
        model = small_net()
        torch.manual_seed(seed)
        return make_loop(model, easy_split(37), recipe, seed=7)

    whole = fresh(1)
    losses = [result.loss for result in whole.train_epochs(Callback())]
    first = fresh(1)
    for result in first.train_epochs(Callback(), should_stop=lambda: first.step == stop_at):
        if result.step == stop_at:
            break
    weights, state = copy.deepcopy((first.eval_model.state_dict(), first.state_dict()))
    second = fresh(2)
    with torch.no_grad():
        for parameter in second.module.parameters():
            parameter.add_(1.0)  # the initial weights must not affect the result
    second.load_state_dict(state, weights)
    assert second.step == stop_at
    assert [result.loss for result in second.train_epochs(Callback())] == losses[stop_at // 5 :]
    assert second.step == whole.step == 15
    for one, other in ((second.module, whole.module), (second.eval_model, whole.eval_model)):
        for name, expected in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], expected), name


def test_the_weight_average_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    original_update = ModelEma.update

    def update(ema: ModelEma, step: int) -> None:
        updates.append(step)
        original_update(ema, step)

    monkeypatch.setattr(ModelEma, "update", update)
    loop = make_loop(small_net(), easy_split(20), make_recipe(epochs=2, batch_size=8, ema_decay=0.9))
    list(loop.train_epochs(Callback()))
    assert updates == [1, 2, 3, 4, 5, 6]
    assert loop.eval_model is not loop.module
    assert not torch.equal(loop.eval_model.state_dict()["0.weight"], loop.module.state_dict()["0.weight"])
    plain = make_loop(small_net(), easy_split(20), make_recipe(epochs=1))
    assert plain.eval_model is plain.module


def test_the_state_of_another_recipe_is_rejected() -> None:
    first = make_loop(small_net(), easy_split(20), make_recipe(epochs=1, batch_size=8))
    list(first.train_epochs(Callback()))
    weights, state = copy.deepcopy((first.eval_model.state_dict(), first.state_dict()))
    other = make_loop(small_net(), easy_split(20), make_recipe(epochs=1, batch_size=8, **MUON))
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        other.load_state_dict(state, weights)
    another = make_loop(RecordingModel(), random_split(20), make_recipe(epochs=1, batch_size=8))
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        another.load_state_dict(state, weights)


def test_the_state_can_be_loaded_with_weights_only(tmp_path: Any) -> None:
    loop = make_loop(
        small_net(), easy_split(20), make_recipe(epochs=1, batch_size=8, ema_decay=0.9, precision="fp16", **MUON)
    )
    list(loop.train_epochs(Callback()))
    torch.save(loop.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by imports of the compiler
def test_a_compiled_model_trains_like_an_eager_one() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    losses, names = [], []
    for compiled in (False, True):
        model = copy.deepcopy(first)
        loop = make_loop(
            model, easy_split(40), make_recipe(epochs=2, batch_size=20, learning_rate=0.05, compile=compiled)
        )
        losses.append([result.loss for result in loop.train_epochs(Callback())])
        names.append(list(loop.eval_model.state_dict()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert names[0] == names[1]  # checkpoints are interchangeable
