import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifarx_serve.devices import Device
from cifarx_serve.errors import CheckFailed, CifarxError, DataError, DeviceMemoryError, FallbackWarning, OutputError
from cifarx_serve.predictor import Predictor
from cifarx_serve.spec import DataRecord, InputSpec, TrainingRecord
from cifarx_serve.system.versions import library_versions
from cifarx_train.callbacks.base import Callback, EpochReport, RunInfo
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.data.dataset import fingerprint
from cifarx_train.data.loaders import selection
from cifarx_train.data.loaders.device import DeviceLoader
from cifarx_train.data.selection import select_dataset
from cifarx_train.distributed import Distributed
from cifarx_train.evaluation import Evaluator
from cifarx_train.models.options import ModelOptions, SpecOverrides
from cifarx_train.models.registry import get_architecture
from cifarx_train.pytorch_backend import PyTorchBackend
from cifarx_train.recipes import RECIPES, load_recipe
from cifarx_train.train import train
from cifarx_train.trainer import TrainResult
from tests.support.image_datasets import pack_archive, write_image_folder
from tests.support.predictions import require_predictions
from tests.support.simulated_gpu.counters import changes, counters
from tests.support.simulated_gpu.process import SimulatedGpuProcess

INPUT = InputSpec(height=32, width=32)


class RecordingCallback(Callback):
    """Records the events it receives."""

    def __init__(self) -> None:
        self.runs: list[RunInfo] = []
        self.reports: list[EpochReport] = []
        self.seen: list[list[str]] = []
        self.ended = 0

    def on_train_start(self, run: RunInfo) -> None:
        self.runs.append(run)

    def on_epoch_end(self, report: EpochReport) -> None:
        self.reports.append(report)
        self.seen.append(sorted(path.name for path in report.checkpoint.parent.glob("*.pth")))

    def on_train_end(self) -> None:
        self.ended += 1


def run(data: Path, out: Path, **options: Any) -> TrainResult:
    chosen = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "device": "cpu", **options}
    return train(chosen.pop("model", "lzh"), data=str(data), out=out, **chosen)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).weights


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record_of(path: Path) -> TrainingRecord:
    record = load_checkpoint(path).spec.training
    assert record is not None
    return record


def evaluate_checkpoint(path: Path, data: Path) -> tuple[float, float]:
    """Return the loss and accuracy of a checkpoint on the test images of a dataset."""
    loaded, cpu = load_checkpoint(path), torch.device("cpu")
    spec, classes = loaded.spec.input, len(loaded.spec.class_names)
    test = DeviceLoader(select_dataset(str(data)).load("test", spec), cpu)
    evaluation = Evaluator(test, spec, classes, cpu, Distributed()).evaluate(loaded.build())
    return evaluation.loss, evaluation.accuracy


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Finished(NamedTuple):
    """A run of three epochs with seed 5 and its recorded events. Tests must not write to its directory."""

    folder: Path
    result: TrainResult
    callback: RecordingCallback


@pytest.fixture(scope="module")
def finished(color_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, callback = tmp_path_factory.mktemp("finished") / "run", RecordingCallback()
    return Finished(folder, run(color_folder, folder, epochs=3, seed=5, callbacks=[callback]), callback)


# --- the files of a run


def test_writes_one_checkpoint_per_epoch(finished: Finished) -> None:
    folder, done, callback = finished
    assert done.checkpoints == [folder / f"lzh_{epoch}.pth" for epoch in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "lzh_0.pth", "lzh_1.pth", "lzh_2.pth"]
    # The checkpoint of an epoch exists when callbacks receive the epoch.
    assert callback.seen == [["lzh_0.pth"], ["lzh_0.pth", "lzh_1.pth"], ["lzh_0.pth", "lzh_1.pth", "lzh_2.pth"]]


def test_writes_to_the_current_directory_by_default(color_folder: Path, tmp_path: Path) -> None:
    done = train("lzh", data=str(color_folder), epochs=1, device="cpu")
    assert done.checkpoints == [Path("lzh_0.pth")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "lzh_0.pth"]


def test_the_log_directory_can_be_set(color_folder: Path, tmp_path: Path) -> None:
    run(color_folder, tmp_path / "run", epochs=1, logdir=tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lzh_0.pth"]
    assert set(read_scalars(tmp_path / "elsewhere")) >= {"test_loss", "accuracy"}


def test_every_checkpoint_describes_its_training(color_folder: Path, finished: Finished) -> None:
    done = finished.result
    data = select_dataset(str(color_folder))
    splits = {split: data.load(split, INPUT) for split in ("train", "test")}
    for epoch, path in enumerate(done.checkpoints):
        spec, training = load_checkpoint(path).spec, record_of(path)
        assert (spec.model, spec.class_names, spec.input) == ("lzh", ("blue", "green", "red"), INPUT)
        assert (spec.precision, spec.checkpoint_sha256, spec.parity) == ("fp32", None, None)
        assert training.data == DataRecord(
            name="colors",
            kind="folder",
            train_images=60,
            test_images=30,
            train_fingerprint=fingerprint(splits["train"], data.class_names),
            test_fingerprint=fingerprint(splits["test"], data.class_names),
        )
        values = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, "channels_last": False}
        assert training.recipe == msgspec.to_builtins(load_recipe("notes", overrides=values))
        assert (training.epochs, training.seed, training.device) == (epoch + 1, 5, "cpu")
        assert training.versions == library_versions()
        assert training.versions["torch"] == torch.__version__.partition("+")[0]
        assert (training.test_loss, training.test_accuracy) == evaluate_checkpoint(path, color_folder)
    assert done.test_accuracy == record_of(done.checkpoints[-1]).test_accuracy
    assert (done.epochs, done.device, done.data) == (3, "cpu", "colors")
    assert done.stop_reason is None
    assert done.peak_memory_bytes > 2**20


def test_the_best_checkpoint_is_the_first_with_the_best_accuracy(finished: Finished) -> None:
    accuracies = [record_of(path).test_accuracy or 0.0 for path in finished.result.checkpoints]
    assert finished.result.best == (
        finished.result.checkpoints[accuracies.index(max(accuracies))],
        max(accuracies),
    )


def test_a_checkpoint_contains_the_training_state(finished: Finished) -> None:
    training = load_checkpoint(finished.result.checkpoints[1]).training
    assert (training["epoch"], training["done"], training["step"]) == (2, 0, 8)
    assert training["seconds"] > 0
    # The shuffling generator is in the state before the third epoch, the global one in that after initialization.
    order = torch.Generator().manual_seed(5)
    torch.randperm(60, generator=order)
    torch.randperm(60, generator=order)
    assert torch.equal(training["shuffle"], order.get_state())
    torch.manual_seed(5)
    get_architecture("lzh").build(3)
    assert torch.equal(training["random"]["cpu"][0], torch.get_rng_state())


def test_callbacks_receive_the_run_and_its_epochs(finished: Finished) -> None:
    _, done, callback = finished
    [run_info] = callback.runs
    assert (run_info.model, run_info.device, run_info.world_size) == ("lzh", "cpu", 1)
    assert (run_info.data, run_info.num_train_images) == ("colors", 60)
    assert (run_info.total_steps, run_info.first_step, run_info.resumed_from) == (12, 0, None)
    assert (run_info.seed, run_info.recipe.epochs, run_info.input) == (5, 3, INPUT)
    assert run_info.class_names == ("blue", "green", "red")
    assert sum(parameter.numel() for parameter in run_info.module.parameters()) == 145_578 - 7 * 65
    assert run_info.test_set.images.shape == (30, 32, 32, 3)
    assert [(report.epoch, report.epochs, report.step) for report in callback.reports] == [
        (0, 3, 4),
        (1, 3, 8),
        (2, 3, 12),
    ]
    assert [report.checkpoint for report in callback.reports] == done.checkpoints
    for report in callback.reports:
        training = record_of(report.checkpoint)
        evaluation = report.evaluation
        assert (evaluation.loss, evaluation.accuracy) == (training.test_loss, training.test_accuracy)
        assert evaluation.confusion_matrix.sum() == 30
        assert np.array_equal(evaluation.confusion_matrix.sum(1), [10, 10, 10])
        assert len(evaluation.mistakes) == min(25, 30 - evaluation.confusion_matrix.trace())
        assert report.checkpoint_s > 0
    assert done.images_per_s == pytest.approx(sum(report.images_per_s for report in callback.reports) / 3)
    assert callback.ended == 1


def test_learns_an_easy_dataset(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, epochs=8, batch_size=8)
    assert done.test_accuracy == 1.0
    losses = [value for _, value in read_scalars(tmp_path / "logs")["test_loss"]]
    assert losses[-1] < losses[0] / 2


def test_an_archive_trains_like_its_directory(color_folder: Path, tmp_path: Path, finished: Finished) -> None:
    archive = run(pack_archive(color_folder, tmp_path / "colors.tar.gz"), tmp_path / "run", epochs=1, seed=5)
    assert equal(weights(archive.checkpoints[0]), weights(finished.result.checkpoints[0]))


# --- the recipe, the model and its input


def test_overrides_are_recorded(color_folder: Path, tmp_path: Path) -> None:
    settings = {
        "momentum": "0.9",
        "nesterov": "true",
        "weight_decay": 0.01,
        "ema_decay": 0.9,
        "crop": 2,
        "max_grad_norm": 1,
    }
    done = run(color_folder, tmp_path, epochs=1, **settings)
    expected = load_recipe("notes", overrides={"epochs": 1, "batch_size": 16, "learning_rate": 0.05, **settings})
    assert record_of(done.checkpoints[0]).recipe == msgspec.to_builtins(expected.complete(channels_last=False))


def test_a_recipe_from_a_file_is_used_and_recorded(color_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "fast"\nepochs = 1\nbatch_size = 20\nschedule = "cosine"\n')
    done = train("lzh", data=str(color_folder), out=tmp_path, device="cpu", recipe_name=str(tmp_path / "mine.toml"))
    changes = {"name": "mine", "epochs": 1, "batch_size": 20, "schedule": "cosine", "channels_last": False}
    assert record_of(done.checkpoints[0]).recipe == {**msgspec.to_builtins(RECIPES["fast"]), **changes}


def test_normalization_is_recorded_in_the_spec(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, epochs=1, normalize=True)
    images = select_dataset(str(color_folder)).load("train", INPUT).images.astype(np.float64) / 255
    spec = load_checkpoint(done.checkpoints[0]).spec.input
    assert spec.mean == pytest.approx(images.mean((0, 1, 2)), abs=1e-4)
    assert spec.std == pytest.approx(images.std((0, 1, 2)), abs=1e-4)
    training = record_of(done.checkpoints[0])
    assert (training.test_loss, training.test_accuracy) == evaluate_checkpoint(done.checkpoints[0], color_folder)
    again = run(color_folder, tmp_path, epochs=2, normalize=True, resume="auto")
    assert load_checkpoint(again.checkpoints[-1]).spec.input == spec


def test_the_weight_average_is_evaluated_and_saved(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, ema_decay=0.9)
    for path in done.checkpoints:
        training = record_of(path)
        assert (training.test_loss, training.test_accuracy) == evaluate_checkpoint(path, color_folder)
        loaded = load_checkpoint(path)
        assert not equal(loaded.weights, loaded.training["weights"])


def test_another_image_size(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, model="fastnet", epochs=1, image_size=16)
    loaded = load_checkpoint(done.checkpoints[0])
    assert (loaded.spec.input.height, loaded.spec.input.width) == (16, 16)
    assert loaded.build()(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert evaluate_checkpoint(done.checkpoints[0], color_folder)[1] == done.test_accuracy


def test_the_small_stem(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, model="resnet18", epochs=1, batch_size=60, stem="small", image_size=16)
    loaded = load_checkpoint(done.checkpoints[0])
    assert (loaded.spec.model, loaded.spec.stem) == ("resnet18", "small")
    assert loaded.weights["conv1.weight"].shape[2:] == (3, 3)
    assert loaded.build()(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_data_dependent_initialization(color_folder: Path, tmp_path: Path) -> None:
    done = run(color_folder, tmp_path, model="fastnet", recipe_name="fast", epochs=1, image_size=16, learning_rate=1e-3)
    filters = load_checkpoint(done.checkpoints[0]).weights["whitening.weight"]
    assert not torch.equal(filters, get_architecture("fastnet").build(3).state_dict()["whitening.weight"])
    assert record_of(done.checkpoints[0]).recipe["optimizer"] == "muon"


def test_muon_rejects_or_trains_a_model_without_a_linear_layer(color_folder: Path, tmp_path: Path) -> None:
    muon = {"optimizer": "muon", "bias_lr": 1e-4, "head_lr": 1e-4, "learning_rate": 1e-4, "momentum": 0.6}
    try:
        done = run(color_folder, tmp_path, model="squeezenet1_1", epochs=1, batch_size=60, image_size=64, **muon)
    except CifarxError as error:
        assert error.exit_status == 2
        assert not list(tmp_path.glob("*.pth"))
    else:
        assert all(tensor.isfinite().all() for tensor in weights(done.checkpoints[0]).values())


# --- the seed


def test_the_same_seed_gives_the_same_weights(color_folder: Path, tmp_path: Path, finished: Finished) -> None:
    torch.manual_seed(99)
    torch.rand(7)
    again = run(color_folder, tmp_path, epochs=3, seed=5)
    for one, other in zip(again.checkpoints, finished.result.checkpoints, strict=True):
        assert equal(weights(one), weights(other))


def test_another_seed_gives_other_weights(color_folder: Path, tmp_path: Path, finished: Finished) -> None:
    other = run(color_folder, tmp_path, epochs=1, seed=6)
    assert not equal(weights(other.checkpoints[0]), weights(finished.result.checkpoints[0]))


# --- TensorBoard


def test_tensorboard_has_the_test_scalars_by_epoch(finished: Finished) -> None:
    seen = read_scalars(finished.folder / "logs")
    records = [record_of(path) for path in finished.result.checkpoints]
    expected = {
        "accuracy": [(epoch, pytest.approx(record.test_accuracy)) for epoch, record in enumerate(records)],
        "test_loss": [(epoch, pytest.approx(record.test_loss)) for epoch, record in enumerate(records)],
    }
    assert {tag: seen[tag] for tag in expected} == expected


def test_tensorboard_has_the_train_loss_by_step(color_folder: Path, tmp_path: Path) -> None:
    run(color_folder, tmp_path, batch_size=1, epochs=2, learning_rate=0.001)
    [(step, loss)] = read_scalars(tmp_path / "logs")["train_loss"]
    assert step == 100
    assert 0 < loss < 10


def test_a_second_run_in_the_same_directory_hides_the_first(
    color_folder: Path, tmp_path: Path, finished: Finished
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    done = run(color_folder, tmp_path / "run", epochs=2, seed=6)
    assert read_scalars(tmp_path / "run" / "logs")["test_loss"] == [
        (epoch, pytest.approx(record_of(path).test_loss)) for epoch, path in enumerate(done.checkpoints)
    ]


# --- errors


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "lhz"}, "did you mean 'lzh'"),
        ({"recipe_name": "note"}, "did you mean 'notes'"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"momentm": 0.9}, "did you mean 'momentum'"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"keep": 0}, "--keep 0 would keep no checkpoint"),
        ({"image_size": 0}, "--image-size 0 is not a valid size"),
        ({"image_size": 64}, "lzh takes 32x32 images, not 64x64: leave out --image-size"),
        ({"model": "alexnet", "image_size": 32}, "alexnet takes 224x224 images, not 32x32: use --image-size 64"),
        ({"stem": "small"}, "lzh has no small stem"),
        ({"resume": "absent.pth"}, "absent.pth"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"data": "nowhere"}, "dataset nowhere does not exist"),
        ({"data": "."}, "0 class folders"),
        ({"freeze": ["layer9.*"]}, "--freeze layer9.* matches no parameter"),
    ],
)
def test_invalid_input_leaves_no_files(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"model": "lzh", "data": "builtin", "out": Path("new/run"), "logdir": Path("other/logs"), **options}
    with pytest.raises(CifarxError, match=re.escape(words)) as caught:
        train(given.pop("model"), **given)
    assert caught.value.exit_status == 2
    assert list_files(tmp_path) == []


def test_a_broken_image_leaves_existing_files_unchanged(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "data", train=2, test=2)
    (data / "test" / "red" / "0.png").write_bytes(b"not an image")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lzh_0.pth").write_text("of an earlier run")
    before = list_files(tmp_path)
    with pytest.raises(DataError, match=r"broken image.*test/red/0\.png"):
        run(data, tmp_path / "run")
    assert list_files(tmp_path) == before


@pytest.mark.parametrize("option", ["out", "logdir"])
def test_an_unwritable_directory_fails_before_data_is_read(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places: dict[str, Any] = {"out": tmp_path / "run", "logdir": tmp_path / "logs"}
    places[option] = tmp_path / "file" / "run"
    # This dataset does not exist, which would be an error too.
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        train("lzh", data="nowhere", device="cpu", **places)
    assert list_files(tmp_path) == ["file"]


def test_an_unwritable_checkpoint_stops_the_run(color_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lzh_1.pth").mkdir()
    callback = RecordingCallback()
    with pytest.raises(OutputError, match=r"cannot write .*lzh_1\.pth"):
        run(color_folder, tmp_path, epochs=3, callbacks=[callback])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "lzh_0.pth", "lzh_1.pth"]
    assert (
        evaluate_checkpoint(tmp_path / "lzh_0.pth", color_folder)[1] == record_of(tmp_path / "lzh_0.pth").test_accuracy
    )
    assert callback.ended == 1


def test_divergence_raises_check_failed_and_keeps_good_checkpoints(color_folder: Path, tmp_path: Path) -> None:
    # One step per epoch, each larger than the previous one by orders of magnitude.
    callback = RecordingCallback()
    with pytest.raises(CheckFailed, match=r"training diverged: .*lower --lr") as caught:
        run(color_folder, tmp_path, epochs=50, batch_size=60, learning_rate=10.0, callbacks=[callback])
    assert caught.value.exit_status == 1
    kept = sorted(tmp_path.glob("*.pth"))
    assert kept
    assert [report.checkpoint for report in callback.reports] == kept
    assert callback.ended == 1
    for path in kept:
        assert all(tensor.isfinite().all() for tensor in weights(path).values())
        assert evaluate_checkpoint(path, color_folder) == (record_of(path).test_loss, record_of(path).test_accuracy)


def test_invalid_weights_after_the_last_step_are_not_saved(color_folder: Path, tmp_path: Path) -> None:
    # The loss of the only step is that of the untrained model, which is finite.
    with pytest.raises(CheckFailed, match="training diverged"):
        run(color_folder, tmp_path, epochs=1, batch_size=60, learning_rate=1e38)
    assert not list(tmp_path.glob("*.pth"))


def test_unavailable_cuda_is_an_error(color_folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(CifarxError, match="cuda:0 was requested"):
        run(color_folder, tmp_path / "run", device="cuda")
    assert list_files(tmp_path) == []


# --- a simulated GPU

SPLIT = {"epochs": 1, "batch_size": 16, "learning_rate": 0.05}
"""60 images: three full batches that warm up, and an odd one. Two epochs replay a captured step."""

RECIPES_BY_OPTIMIZER: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "max_grad_norm": 1.0, "ema_decay": 0.9, "precision": "bf16", "channels_last": True},
    "adamw": {"optimizer": "adamw", "precision": "bf16", "channels_last": True},
    "muon": {"optimizer": "muon", "bias_lr": 0.05, "head_lr": 0.1, "momentum": 0.6, "channels_last": True},
}


def run_on_gpu(
    data: Path, out: Path, *, stream: bool = False, **options: Any
) -> tuple[list[dict[str, int]], list[str]]:
    """Train, and return what happened on each of two GPUs, and the warnings. Runs in the process with the GPUs."""
    before = [counters(device) for device in range(2)]
    fraction = 0.0 if stream else 0.5
    with warnings.catch_warnings(record=True) as caught, patch.object(selection, "_MAX_FRACTION", fraction):
        warnings.simplefilter("always", FallbackWarning)
        run(data, out, **{"device": "cuda", **options})
    return [changes(before[device], device) for device in range(2)], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("stream", [False, True])
def test_another_gpu_leaves_the_first_one_alone(
    stream: bool, color_folder: Path, tmp_path: Path, gpu_process: SimulatedGpuProcess
) -> None:
    (first, second), notes = gpu_process.call(run_on_gpu, color_folder, tmp_path, device="cuda:1", stream=stream)
    assert first == {}
    assert second["graph_launches"] == 3
    assert second["captures"] == 1
    assert second.get("invalidated_captures", 0) == 0
    assert ["they are streamed" in note for note in notes] == [True, True] * stream


def test_the_device_decides_about_precision_and_memory_format(
    color_folder: Path, tmp_path: Path, gpu_process: SimulatedGpuProcess
) -> None:
    decided = {}
    for device, precision in (("cpu", "auto"), ("cuda", "auto"), ("cuda", "fp32")):
        out = tmp_path / f"{device}-{precision}"
        gpu_process.call(run_on_gpu, color_folder, out, epochs=1, device=device, precision=precision)
        recipe = record_of(out / "lzh_0.pth").recipe
        decided[device, precision] = recipe["precision"], recipe["channels_last"]
    assert decided == {
        ("cpu", "auto"): ("fp32", False),
        ("cuda", "auto"): ("bf16", True),
        ("cuda", "fp32"): ("fp32", False),
    }


@pytest.mark.parametrize("kind", list(RECIPES_BY_OPTIMIZER))
def test_a_run_moves_between_a_gpu_and_a_cpu(
    kind: str, color_folder: Path, tmp_path: Path, gpu_process: SimulatedGpuProcess
) -> None:
    options = {**SPLIT, **RECIPES_BY_OPTIMIZER[kind]}
    gpu_process.call(run_on_gpu, color_folder, tmp_path, **options)
    assert torch.load(tmp_path / "lzh_0.pth", weights_only=True)["training"]["step"] == 4  # needs no GPU
    options |= {"resume": "auto"}
    assert run(color_folder, tmp_path, **{**options, "epochs": 2}).epochs == 2
    (gpu, _), notes = gpu_process.call(run_on_gpu, color_folder, tmp_path, **{**options, "epochs": 4})
    assert gpu["graph_launches"] == 3  # of the six full batches, the first three warm up
    assert notes == []
    assert record_of(tmp_path / "lzh_3.pth").device == "cuda:0"


def fill_the_gpu(data: Path, out: Path) -> str:
    """Train with little memory, and return the error. Runs in the process with the GPUs."""
    torch.cuda.set_per_process_memory_fraction(0.0005)  # 40 MiB
    try:
        with pytest.raises(DeviceMemoryError) as caught:
            run(data, out, model="resnet18", batch_size=48, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return str(caught.value)


def test_out_of_memory_names_the_sizes_and_the_batch_size(
    color_folder: Path, tmp_path: Path, gpu_process: SimulatedGpuProcess
) -> None:
    message = gpu_process.call(fill_the_gpu, color_folder, tmp_path)
    assert re.fullmatch(
        r"cuda:0 is out of memory \([\d.]+ MiB requested, [\d.]+ GiB free\) with a batch of 48 images: "
        r"use a smaller --batch-size",
        message,
    )


class Float64Recorder(TorchDispatchMode):
    """Records the operators with a float64 result on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.found += [str(func) for tensor in tensors if tensor.dtype == torch.float64 and tensor.is_cuda]
        return output


def find_float64(data: Path, out: Path) -> list[str]:
    """Train, and return the operators with a float64 result. Runs in the process with the GPUs."""
    recorder = Float64Recorder()
    with recorder:
        run(data, out, recipe_name="fast", ema_decay=0.9, device="cuda")
    return recorder.found


def test_nothing_on_the_device_is_float64(color_folder: Path, tmp_path: Path, gpu_process: SimulatedGpuProcess) -> None:
    assert gpu_process.call(find_float64, color_folder, tmp_path) == []  # Apple's GPUs do not support it


_ANY_INPUT = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, channels, channels_first):
        super().__init__()
        self.channels_first = channels_first
        self.head = nn.Linear(16 * channels, num_classes)

    def forward(self, images):
        images = images if self.channels_first else images.permute(0, 3, 1, 2)
        return self.head(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))
"""


@pytest.mark.parametrize(("color", "layout"), [("L", "NCHW"), ("BGR", "NHWC")])
def test_a_network_of_any_color_and_layout_is_trained(tmp_path: Path, color: str, layout: str) -> None:
    """The accuracy of training is that of the predictor on the image files, with a crop and every augmentation."""
    (tmp_path / "net.py").write_text(_ANY_INPUT)
    data, size = write_image_folder(tmp_path / "data"), {"height": 24, "width": 32}
    overrides = SpecOverrides(
        {"input": {**size, "color": color, "layout": layout, "resize": "shorter_side", "resize_to": 26}}
    )
    arguments = {"channels": 1 if color == "L" else 3, "channels_first": layout == "NCHW"}
    options = ModelOptions(f"{tmp_path / 'net.py'}:Net", arguments, overrides=overrides)
    augmentation = {"normalize": True, "flip": True, "crop": 2, "jitter": 0.2, "cutout": 4}
    done = run(data, tmp_path / "out", model=options, epochs=4, **augmentation)
    with Predictor(PyTorchBackend(done.checkpoints[-1], Device("cpu"), options)) as predictor:
        spec = predictor.spec.input
        assert (spec.color, spec.layout, spec.resize_to, len(spec.mean)) == (color, layout, 26, spec.channels)
        files = sorted(data.glob("test/*/*.png"))
        predictions = require_predictions(predictor.predict(files))
        right = [found.label == file.parent.name for found, file in zip(predictions, files, strict=True)]
    assert done.test_accuracy == pytest.approx(np.mean(right))
    assert done.test_accuracy > 0.6
