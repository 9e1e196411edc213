import copy
import gc
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from cifarx_serve.errors import FallbackWarning
from cifarx_serve.spec import InputSpec
from cifarx_train import cuda_graph
from cifarx_train.callbacks.base import Callback
from cifarx_train.cuda_graph import GraphedStep, can_capture
from cifarx_train.data.dataset import LabeledImages
from cifarx_train.data.loaders.base import Loader
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.loaders.streaming import StreamingLoader
from cifarx_train.distributed import Distributed
from cifarx_train.loop import TrainingLoop
from cifarx_train.models.registry import get_architecture
from cifarx_train.recipes import Recipe, load_recipe
from cifarx_train.run_data import loss_weights
from tests.support.recorded_graphs import RecordedGraph, use_recorded_graphs
from tests.support.simulated_gpu.counters import changes, counters
from tests.support.simulated_gpu.process import SimulatedGpuProcess

CPU = torch.device("cpu")
BATCH = 8

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "notes": {},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "max_grad_norm": 1.0, "schedule": "cosine"},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.001, "schedule": "linear", "warmup_fraction": 0.2},
    "muon": {"optimizer": "muon", "bias_lr": 0.05, "head_lr": 0.1, "momentum": 0.6, "schedule": "linear"},
}
AUGMENTATION = {"flip": True, "crop": 2, "cutout": 3, "jitter": 0.2, "label_smoothing": 0.1}
PRECISIONS = ("fp32", "bf16", "fp16")
MATRIX = [
    pytest.param({**values, "precision": precision}, id=f"{name}-{precision}")
    for name, values in OPTIMIZERS.items()
    for precision in PRECISIONS
    if (name, precision) != ("muon", "fp16")  # cannot be captured
]
PHOTOS = {"random_resized_crop": 0.3, "auto_augment": "trivial", "random_erasing": 0.3, "mixup": 0.2, "cutmix": 1.0}
BALANCED = {"class_weights": {"a": 1, "b": 2, "c": 5}, "sampler": "balanced"}
FINE_TUNING = {**PHOTOS, **OPTIMIZERS["adamw"], "freeze": ["0.*"], "batch_size": BATCH // 2, "accumulate": 2}


def make_recipe(**values: Any) -> Recipe:
    return load_recipe("notes", overrides={"epochs": 3, "batch_size": BATCH, "learning_rate": 0.05, **values})


def random_split(count: int, side: int = 8) -> LabeledImages:
    rng = np.random.default_rng(0)
    return LabeledImages(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8), rng.integers(0, 3, count))


def small_net() -> nn.Module:
    """Convolutions, a norm, a hidden linear layer, dropout and a head for 8x8 images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(128, 10),
        nn.Dropout(0.2),
        nn.Linear(10, 3),
    )


class AskingNet(nn.Module):
    """Draws random numbers, and then waits for a value on the device."""

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(3 * side * side, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inputs = self.dropout(images.flatten(1))
        logits: torch.Tensor = self.linear(inputs) * (1.0 if inputs.mean().item() < 1e9 else 2.0)
        return logits


def run(
    module: nn.Module,
    recipe: Recipe,
    *,
    count: int = 37,
    loader: Callable[[LabeledImages, torch.device], Loader] = DeviceLoader,
    stop_at: int | None = None,
    resume_from: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> tuple[TrainingLoop, list[float]]:
    """Train on 8x8 images on the CPU, and return the loop and the losses of the epochs."""
    spec = InputSpec(height=8, width=8)
    images = loader(random_split(count), CPU)
    weights = loss_weights(recipe, ("a", "b", "c"), images)
    loop = TrainingLoop(module, images, spec, recipe, device=CPU, seed=3, class_weights=weights)
    torch.manual_seed(1)
    if resume_from:
        loop.load_state_dict(*resume_from)
    epochs = loop.train_epochs(Callback(), lambda: loop.step == stop_at)
    return loop, [result.loss for result in epochs]


def require_same_weights(one: TrainingLoop, other: TrainingLoop) -> None:
    for first, second in ((one.module, other.module), (one.eval_model, other.eval_model)):
        for name, expected in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], expected), name
    assert one.state_dict()["scaler"] == other.state_dict()["scaler"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Capture every training step on the CPU, and return the list of the graphs."""
    monkeypatch.setattr("cifarx_train.loop.can_capture", lambda *_: True)
    return use_recorded_graphs(monkeypatch)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call no step is captured. The optimizers stay those of a captured step."""
    return lambda: monkeypatch.setattr("cifarx_train.loop.GraphedStep", lambda step, *_: step)


# --- a captured step on the CPU


@pytest.mark.parametrize(
    "values", [*MATRIX, pytest.param(FINE_TUNING, id="fine-tuning"), pytest.param(BALANCED, id="balanced")]
)
def test_a_captured_step_equals_an_eager_one_bit_for_bit(
    values: dict[str, Any], graphs: list[RecordedGraph], eager: Callable[[], None]
) -> None:
    recipe = make_recipe(**AUGMENTATION, **values)
    captured, losses = run(small_net(), recipe)
    assert [graph.replays for graph in graphs] == [3 * 4 - 3]  # all full batches after the warm-up
    eager()
    whole, expected = run(small_net(), recipe)
    assert len(graphs) == 1
    assert losses == expected
    require_same_weights(whole, captured)


@pytest.mark.parametrize(
    ("name", "values"),
    [("lzh", {"ema_decay": 0.9, "momentum": 0.9}), ("fastnet", {**OPTIMIZERS["muon"], "precision": "bf16"})],
)
def test_the_built_in_networks_train_the_same(
    name: str, values: dict[str, Any], graphs: list[RecordedGraph], eager: Callable[[], None]
) -> None:
    def train() -> tuple[TrainingLoop, list[float]]:
        torch.manual_seed(0)
        data, architecture = random_split(20, side=32), get_architecture(name)
        recipe = make_recipe(**{"epochs": 3, "batch_size": 4, **AUGMENTATION, **values})
        loop = TrainingLoop(architecture.build(3), DeviceLoader(data, CPU), architecture.input, recipe, device=CPU)
        return loop, [result.loss for result in loop.train_epochs(Callback())]

    captured, losses = train()
    assert graphs[0].replays == 12
    eager()
    whole, expected = train()
    assert losses == expected
    require_same_weights(whole, captured)


def test_streamed_images_train_the_same(graphs: list[RecordedGraph], eager: Callable[[], None]) -> None:
    recipe = make_recipe(momentum=0.9, **AUGMENTATION)
    captured, losses = run(small_net(), recipe, loader=StreamingLoader)
    assert graphs[0].replays == 9
    eager()
    whole, expected = run(small_net(), recipe)
    assert losses == expected
    require_same_weights(whole, captured)


@pytest.mark.parametrize("stop_at", [2, 4, 5, 9])  # within the warm-up, before an odd batch, after it, while replaying
@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_a_captured_run_resumes_bit_for_bit(kind: str, stop_at: int, graphs: list[RecordedGraph]) -> None:
    recipe = make_recipe(**AUGMENTATION, **OPTIMIZERS[kind], ema_decay=0.9)
    whole, losses = run(small_net(), recipe)
    half, _ = run(small_net(), recipe, stop_at=stop_at)
    state = copy.deepcopy((half.state_dict(), half.eval_model.state_dict()))
    rest, rest_losses = run(small_net(), recipe, resume_from=state)
    assert (half.step, rest.step) == (stop_at, 15)
    assert rest_losses == losses[stop_at // 5 :]
    require_same_weights(whole, rest)
    full_batches_left = 12 - (stop_at - stop_at // 5)
    assert (graphs[0].replays, graphs[-1].replays) == (9, full_batches_left - 3)


def test_only_full_batches_are_captured(graphs: list[RecordedGraph]) -> None:
    sizes: list[int] = []

    def step(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.sum(0)

    graphed = GraphedStep(step, CPU, BATCH)
    counts = [3, 8, 5, 8, 8, 3, 8, 8, 12, 8]
    results = [graphed(torch.full((count,), float(count))).item() for count in counts]
    assert results == [float(count * count) for count in counts]
    assert sizes == [3, 8, 5, 8, 8, 3, 8, 12]  # 8 for the last time during the capture
    assert [graph.replays for graph in graphs] == [3]
    assert graphed.captured


@pytest.mark.parametrize(("count", "full", "replays"), [(6, 6, 3), (9, 9, 3), (16, 8, 9)])
def test_a_full_batch_is_the_first_batch_of_an_epoch(
    count: int, full: int, replays: int, graphs: list[RecordedGraph]
) -> None:
    loop, _ = run(small_net(), make_recipe(epochs=6), count=count)
    assert loop.total_steps * full == 6 * count
    assert [graph.replays for graph in graphs] == [replays]


def test_a_network_that_waits_for_the_device_trains_without_a_graph(
    graphs: list[RecordedGraph], eager: Callable[[], None]
) -> None:
    recipe = make_recipe(momentum=0.9, **AUGMENTATION)
    with pytest.warns(
        FallbackWarning, match=r"^training without a CUDA graph, which is slower: .*_local_scalar_dense$"
    ):
        captured, losses = run(AskingNet(), recipe)
    assert [graph.replays for graph in graphs] == [0]
    eager()
    whole, expected = run(AskingNet(), recipe)
    assert losses == expected  # the failed capture has drawn random numbers, and must not change those that follow
    require_same_weights(whole, captured)


def test_any_error_during_the_capture_is_a_reason(graphs: list[RecordedGraph]) -> None:
    calls = iter(range(100))

    def step(batch: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:
            raise ValueError("not while capturing")
        return batch.sum()

    graphed = GraphedStep(step, CPU, BATCH)
    with pytest.warns(FallbackWarning, match="slower: not while capturing$"):
        results = [graphed(torch.ones(BATCH)).item() for _ in range(6)]
    assert results == [8.0] * 6
    assert not graphed.captured
    assert [graph.replays for graph in graphs] == [0]


@pytest.mark.parametrize(
    ("device", "values", "world_size", "expected"),
    [
        ("cuda", {}, 1, True),
        ("cuda:1", {"precision": "bf16", **OPTIMIZERS["muon"]}, 1, True),
        ("cuda", {"precision": "fp16", "optimizer": "adamw"}, 1, True),
        ("cuda", {"precision": "fp16", **OPTIMIZERS["muon"]}, 1, False),
        ("cuda", {}, 2, False),
        ("cpu", {}, 1, False),
        ("mps", {}, 1, False),
    ],
)
def test_what_can_be_captured(device: str, values: dict[str, Any], world_size: int, expected: bool) -> None:
    assert can_capture(torch.device(device), make_recipe(**values), Distributed(world_size=world_size)) == expected


# --- PyTorch's own CUDA graphs, on a simulated GPU

FIRST, LAST = 20, 60
"""Steps between which a run on the simulated GPU is observed. Nothing is logged between them."""


class Observer(Callback):
    """Counts what happens on the GPU between two steps."""

    def on_step_end(self, step: int) -> None:
        if step == FIRST:
            self.before = counters()
        if step == LAST:
            self.per_step = {name: count / (LAST - FIRST) for name, count in changes(self.before).items()}


def gpu_loop(
    module: nn.Module, recipe: Recipe, *, side: int, count: int = 80 * BATCH + 3, stream: bool = False
) -> TrainingLoop:
    device = torch.device("cuda", 0)
    data = random_split(count, side)
    loader = StreamingLoader(data, device) if stream else DeviceLoader(data, device)
    spec = InputSpec(height=side, width=side)
    return TrainingLoop(module.to(device), loader, spec, recipe, device=device)


def observe(model: str, values: dict[str, Any], stream: bool = False) -> tuple[dict[str, float], list[str]]:
    """Return what happens per step of a run on the GPU, and the warnings. Runs in the process with the GPU."""
    architecture = get_architecture(model)
    recipe = make_recipe(**{"epochs": 1, **values})
    loop = gpu_loop(architecture.build(3), recipe, side=architecture.input.height, stream=stream)
    observer = Observer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(loop.train_epochs(observer))
    return observer.per_step, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("values", MATRIX)
def test_a_replayed_step_is_one_copy_and_one_launch(values: dict[str, Any], gpu_process: SimulatedGpuProcess) -> None:
    schedule = "schedule" in values  # one kernel sets the learning rates
    assert gpu_process.call(observe, "lzh", values) == (
        {"graph_launches": 1, "copies_on_device": 1, **({"kernels": 1} if schedule else {})},
        [],
    )


def test_random_numbers_cost_two_kernels(gpu_process: SimulatedGpuProcess) -> None:
    per_step, notes = gpu_process.call(observe, "fastnet", {**OPTIMIZERS["muon"], "precision": "bf16", **AUGMENTATION})
    assert per_step == {"graph_launches": 1, "copies_on_device": 1, "kernels": 3}  # the seed, the offset and the rates
    assert notes == []


def test_streaming_copies_only_from_pinned_memory(gpu_process: SimulatedGpuProcess) -> None:
    per_step, notes = gpu_process.call(observe, "lzh", {}, stream=True)
    assert per_step.pop("queries", 0) <= 2  # of the pinned memory that is free again
    assert per_step == {"graph_launches": 1, "copies_on_device": 1, "copies_to_device": 1}
    assert notes == []


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_networks_of_torchvision_are_captured(model: str, gpu_process: SimulatedGpuProcess) -> None:
    values = {"precision": "bf16", "momentum": 0.9, "channels_last": True, "batch_size": BATCH}
    per_step, notes = gpu_process.call(observe, model, values)
    assert per_step["graph_launches"] == 1
    assert per_step["copies_on_device"] == 1
    assert per_step.keys() <= {"graph_launches", "copies_on_device", "kernels"}
    assert notes == []


def fail_and_continue(attempt: bool) -> tuple[list[str], list[int], int, bool]:
    """Train a network that cannot be captured, with or without an attempt. Runs in the process with the GPU.

    Returns:
        The warnings, the state of the random generator, the memory that is kept for captures, and whether the default
        stream is current.
    """
    gc.collect()  # the graphs of earlier runs
    loop = gpu_loop(AskingNet(), make_recipe(epochs=1, **AUGMENTATION), side=8)
    if not attempt:
        loop._train_step = loop._eager_step
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        list(loop.train_epochs(Callback()))
    notes = [str(warning.message) for warning in caught]
    torch.cuda.empty_cache()
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0)]
    on_default_stream = torch.cuda.current_stream() == torch.cuda.default_stream()
    return notes, torch.cuda.get_rng_state().tolist(), sum(map(itemgetter("total_size"), segments)), on_default_stream


def activation_net() -> nn.Module:
    """A network whose activations need far more memory than its weights."""
    convs = [layer for inputs in (3, 64, 64) for layer in (nn.Conv2d(inputs, 64, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))


def train_in_limited_memory() -> tuple[int, list[str]]:
    """Train in the memory that full batches need with a graph, where the last batch of every epoch is not full.

    Runs in the process with the GPU.

    Returns:
        The number of captures and the warnings.
    """

    def train(count: int, limit: int | None = None) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        first = torch.cuda.memory_reserved()
        total = torch.cuda.mem_get_info()[1]
        available = first + limit if limit else total
        torch.cuda.set_per_process_memory_fraction(available / total)
        try:
            with patch.object(cuda_graph, "free_device_memory", lambda _: available - torch.cuda.memory_reserved()):
                loop = gpu_loop(activation_net(), make_recipe(batch_size=256), side=16, count=count)
                list(loop.train_epochs(Callback()))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return torch.cuda.max_memory_reserved() - first

    peak = train(4 * 256)
    before = counters()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(4 * 256 + 192, limit=peak + (8 << 20))
    return changes(before)["captures"], [str(warning.message) for warning in caught]


def test_a_graph_is_released_for_batches_that_need_its_memory(gpu_process: SimulatedGpuProcess) -> None:
    assert gpu_process.call(train_in_limited_memory) == (3, [])  # one per epoch


def test_a_failed_capture_leaves_the_gpu_as_it_was(gpu_process: SimulatedGpuProcess) -> None:
    _, expected_state, _, _ = gpu_process.call(fail_and_continue, attempt=False)
    notes, state, memory, on_default_stream = gpu_process.call(fail_and_continue, attempt=True)
    reason = "CUDA error: operation not permitted when stream is capturing"
    assert notes == [f"training without a CUDA graph, which is slower: {reason}"]
    assert state == expected_state
    assert memory == 0
    assert on_default_stream


# --- a GPU

GPU_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "notes": ("lzh", {}),
    "everything": ("lzh", {**OPTIMIZERS["sgd"], **AUGMENTATION, "ema_decay": 0.99}),
    "adamw, bf16": ("lzh", {**OPTIMIZERS["adamw"], "precision": "bf16", "channels_last": True}),
    "adamw, fp16": ("lzh", {**OPTIMIZERS["adamw"], "precision": "fp16", "channels_last": True}),
    "muon, bf16": ("fastnet", {**OPTIMIZERS["muon"], **AUGMENTATION, "precision": "bf16", "channels_last": True}),
    "resnet, bf16": ("resnet18", {"momentum": 0.9, "precision": "bf16", "channels_last": True}),
    "photos": ("lzh", {**PHOTOS, **OPTIMIZERS["adamw"], "freeze": ["model.0.*"], "batch_size": 32, "accumulate": 2}),
}


def train_on_gpu(model: str, values: dict[str, Any], graphed: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train two epochs with odd last batches, and return the losses of the epochs and the weights."""
    architecture = get_architecture(model, stem="small" if model.startswith("resnet") else "own")
    torch.manual_seed(0)
    module = architecture.build(3)
    recipe = make_recipe(**{"epochs": 2, "batch_size": 64, **values})
    loop = gpu_loop(module, recipe, side=32)
    if not graphed:
        loop._train_step = loop._eager_step
    torch.manual_seed(1)
    losses = [result.loss for result in loop.train_epochs(Callback())]
    assert not graphed or loop._train_step.captured  # type: ignore[attr-defined]
    return losses, {name: value.float().cpu() for name, value in loop.eval_model.state_dict().items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(GPU_CASES))
def test_on_a_gpu_a_captured_step_trains_like_an_eager_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, values = GPU_CASES[case]
    losses, weights = train_on_gpu(model, values, graphed=True)
    expected_losses, expected = train_on_gpu(model, values, graphed=False)
    again_losses, again = train_on_gpu(model, values, graphed=False)
    # Two eager runs may differ as well, because some kernels add in any order.
    spread = max(abs(one - other) for one, other in zip(expected_losses, again_losses, strict=True))
    assert losses == pytest.approx(expected_losses, abs=10 * spread + 1e-6)
    assert largest_difference(weights, expected) <= 10 * largest_difference(again, expected) + 1e-6


@pytest.mark.gpu
def test_on_a_gpu_a_failed_capture_leaves_no_trace() -> None:
    _, expected_state, _, _ = fail_and_continue(attempt=False)
    notes, state, memory, on_default_stream = fail_and_continue(attempt=True)
    assert len(notes) == 1
    assert "not permitted when stream is capturing" in notes[0]
    assert (state, memory, on_default_stream) == (expected_state, 0, True)
