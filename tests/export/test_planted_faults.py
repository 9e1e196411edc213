"""Planted faults: each is in a real file, runs in the real runtime, and must fail the expected check."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from cifarx_export.parity.compare import EVAL_BATCH_SIZE, Reference, check_parity, run_reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.spec_checks import check_specs
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.devices import Device
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cifarx_train.models.registry import get_architecture
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.command_line import Cli
from tests.support.conversion import write_artifact
from tests.support.onnx_faults import (
    Edit,
    batch_mean_subtracted,
    channels_swapped,
    dropout,
    edited,
    entry_with,
    fields_with,
    first_for_all,
    frozen_batch,
    input_renamed,
    input_type,
    input_with,
    mean_baked,
    nan_for_black,
    node,
    output_renamed,
    output_sequence,
    output_through,
    output_type,
    permuted_classes,
    quantized,
    rounded_to_float16,
    rows_shifted,
    softmaxed,
    spec_with,
    tf32,
    weights_with,
    wrong_at_batch,
)

FEW = EVAL_BATCH_SIZE + 3
"""Enough images to catch a fault, and fast."""

RUNS = {"batch 1", "batch 3", "batch 64", "edge inputs"}
INTERFACE = {"interface"}
VALUES = {"tolerance", "agreement"}

Make = Callable[[Path], Path]


class Fault(NamedTuple):
    """Makes a faulty artifact from a checkpoint; `must_fail` are checks that fail, `may_fail` may, all others pass."""

    make: Make
    must_fail: set[str]
    may_fail: set[str] = frozenset()  # type: ignore[assignment]
    model: str = "lzh"


def onnx_with(*edits: Edit) -> Make:
    return lambda checkpoint: edited(checkpoint.with_suffix(".onnx"), edits)


def torchscript_of(change: Callable[[nn.Module], nn.Module]) -> Make:
    return lambda checkpoint: write_artifact(checkpoint, "torchscript", Path("edited.torchscript.pt"), change)


def onnx_of(change: Callable[[nn.Module], nn.Module]) -> Make:
    return lambda checkpoint: write_artifact(checkpoint, "onnx", Path("edited.onnx"), change)


# Faults of the network before conversion.


def in_training(module: nn.Module) -> nn.Module:
    return module.train()


def with_batch_statistics(module: nn.Module) -> nn.Module:
    """Normalize each batch by its own statistics, even in eval mode."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
    return module


def without_statistics(module: nn.Module) -> nn.Module:
    """Reset the running statistics, as at the start of training."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    return module


def with_dropout(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Dropout(0.1).train())


def of_another_seed(module: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.reset_parameters()
    return module


def kernels_transposed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.copy_(part.weight.transpose(2, 3).clone())
    return module


class Wrapped(nn.Module):
    """A network inside another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class FirstImageOnly(Wrapped):
    """Returns the logits of the first image for every image, as if traced with one image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(images[:1]).expand(images.shape[0], -1)
        return logits


class InHalf(Wrapped):
    """Computes in float16, with float32 input and output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner.half())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(images.half()).float()
        return logits


class Leaking(Wrapped):
    """Adds a part of the previous call's logits to this call's."""

    last: torch.Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("last", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(images)
        leaked = logits + 0.01 * self.last
        self.last.copy_(logits[0, :1])
        return leaked


class PairOut(Wrapped):
    """Returns two tensors."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(images), images


class InTf32(Wrapped):
    """Rounds weights and activations to TF32, as tensor cores do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        with torch.no_grad():
            for part in inner.modules():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    part.weight.copy_(_tf32(part.weight))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for part in self.inner.model:  # type: ignore[union-attr]
            images = part(_tf32(images) if isinstance(part, nn.Conv2d | nn.Linear) else images)
        return images


def _tf32(values: torch.Tensor) -> torch.Tensor:
    """Round float32 to 11 of its 24 significant bits (Dekker's split, doi:10.1007/BF01397083)."""
    shifted = values * (2**13 + 1)
    return shifted - (shifted - values)


def rolled(values: np.ndarray) -> np.ndarray:
    return np.roll(values, 1, axis=0)


LAST = ("model.8.weight", "model.8.bias")

FAULTS = {
    # What the spec in the file states.
    "mean of the spec": Fault(onnx_with(input_with(mean=(0.49, 0.48, 0.45))), {"preprocessing", "tolerance"}, VALUES),
    "std of the spec": Fault(onnx_with(input_with(std=(0.25, 0.25, 0.25))), {"preprocessing", "tolerance"}, VALUES),
    "range of the spec": Fault(onnx_with(input_with(value_range=(-1.0, 1.0))), {"preprocessing", "tolerance"}, VALUES),
    "resize filter of the spec": Fault(onnx_with(input_with(interpolation="nearest")), {"preprocessing"}),
    "image size of the spec": Fault(onnx_with(input_with(height=48, width=48)), {"preprocessing"} | INTERFACE),
    "BGR instead of RGB": Fault(onnx_with(input_with(color="BGR")), {"preprocessing", "tolerance"}, VALUES),
    "crop instead of stretch": Fault(onnx_with(input_with(resize="shorter_side", resize_to=36)), {"preprocessing"}),
    "letterbox instead of stretch": Fault(onnx_with(input_with(resize="letterbox")), {"preprocessing"}),
    "size before the crop": Fault(onnx_with(input_with(resize_to=(36, 36))), {"preprocessing"}),
    "no antialias": Fault(onnx_with(input_with(antialias=False)), {"preprocessing"}),
    "layout of the spec": Fault(onnx_with(input_with(layout="NHWC")), INTERFACE | RUNS),
    "sigmoid instead of softmax": Fault(onnx_with(fields_with(activation="sigmoid")), {"output"}),
    "logits stated as probabilities": Fault(onnx_with(fields_with(output="probabilities")), {"output"}, RUNS),
    "class names permuted": Fault(onnx_with(spec_with(permuted_classes)), {"class names"}),
    "stated to take pixels": Fault(onnx_with(fields_with(embedded_preprocessing=True)), INTERFACE | RUNS | {"resize"}),
    # Input images.
    "mean in the graph": Fault(onnx_with(mean_baked(0.05)), {"tolerance"}, VALUES),
    "channels swapped in the graph": Fault(onnx_with(channels_swapped()), {"tolerance"}, VALUES),
    "channels swapped in the weights": Fault(
        onnx_with(weights_with("model.0.weight", lambda values: values[:, ::-1])), {"tolerance"}, VALUES
    ),
    # Weights.
    "stale weights in ONNX": Fault(onnx_of(of_another_seed), VALUES),
    "stale weights in TorchScript": Fault(torchscript_of(of_another_seed), VALUES),
    "first weight off by a hundredth": Fault(
        onnx_with(entry_with((0, 0, 2, 2), lambda value: value + 1e-2, "model.0.weight")), {"tolerance"}, VALUES
    ),
    "last weight off by a hundredth": Fault(
        onnx_with(entry_with((9, 63), lambda value: value + 1e-2, "model.8.weight")), {"tolerance"}, VALUES
    ),
    "one bias off by three tolerances": Fault(
        onnx_with(entry_with((4,), lambda value: value + 3e-4, "model.8.bias")), {"tolerance"}, VALUES
    ),
    "NaN in one class": Fault(
        onnx_with(entry_with((3,), lambda _: float("nan"), "model.8.bias")), {"finite", "agreement"}
    ),
    "Inf in one class": Fault(
        onnx_with(entry_with((3,), lambda _: float("inf"), "model.8.bias")), {"finite", "agreement"}
    ),
    "-Inf in one class": Fault(
        onnx_with(entry_with((3,), lambda _: float("-inf"), "model.8.bias")), {"finite", "agreement"}
    ),
    "NaN for a black image": Fault(onnx_with(nan_for_black()), {"finite"}),
    "last layer transposed": Fault(
        onnx_with(weights_with("model.8.weight", lambda values: values.T.reshape(values.shape))), VALUES
    ),
    "kernels transposed": Fault(torchscript_of(kernels_transposed), {"tolerance"}, VALUES),
    "rows of the last layer in another order": Fault(onnx_with(*(weights_with(name, rolled) for name in LAST)), VALUES),
    # Training mode.
    # PyTorch's ONNX exporter folds a BatchNorm in training mode as if it were in eval mode.
    "batch norm in training": Fault(torchscript_of(in_training), VALUES, model="resnet18"),
    "batch norm of the batch, ONNX": Fault(onnx_of(with_batch_statistics), VALUES, model="resnet18"),
    "batch norm of the batch, TorchScript": Fault(torchscript_of(with_batch_statistics), VALUES, model="resnet18"),
    "batch norm without statistics": Fault(torchscript_of(without_statistics), VALUES, model="resnet18"),
    "dropout left on, ONNX": Fault(onnx_with(dropout()), VALUES),
    "dropout left on, TorchScript": Fault(torchscript_of(with_dropout), VALUES),
    # Precision.
    "weights in TF32": Fault(onnx_with(weights_with("", tf32)), {"tolerance"}, VALUES),
    "weights and activations in TF32": Fault(torchscript_of(InTf32), {"tolerance"}, VALUES),
    "logits in float16": Fault(onnx_with(rounded_to_float16()), {"tolerance"}, VALUES),
    "float16 inside": Fault(torchscript_of(InHalf), {"tolerance"}, VALUES),
    "int8 that clips": Fault(onnx_with(quantized(1e-3), fields_with(precision="int8")), {"agreement"}, {"accuracy"}),
    "int8 of one level": Fault(onnx_with(quantized(100), fields_with(precision="int8")), {"agreement", "accuracy"}),
    "float16 of one level": Fault(onnx_with(quantized(100), fields_with(precision="fp16")), {"agreement"}),
    # Dependence on the batch, or on the previous call.
    "mean of the batch subtracted": Fault(onnx_with(batch_mean_subtracted()), VALUES),
    "wrong at batch 1 alone": Fault(onnx_with(wrong_at_batch(1)), {"tolerance"}, VALUES),
    "wrong at batch 3 alone": Fault(onnx_with(wrong_at_batch(3)), {"tolerance"}, VALUES),
    "wrong at batch 64 alone": Fault(onnx_with(wrong_at_batch(64)), {"tolerance"}, VALUES),
    "batch frozen at 1": Fault(onnx_with(frozen_batch(1)), (RUNS - {"batch 1"}) | INTERFACE),
    "batch frozen at 2": Fault(onnx_with(frozen_batch(2)), RUNS | INTERFACE),
    "batch frozen at 64": Fault(onnx_with(frozen_batch(64)), RUNS | INTERFACE),
    "batch of one broadcast, ONNX": Fault(onnx_with(first_for_all()), VALUES),
    "batch of one broadcast, TorchScript": Fault(torchscript_of(FirstImageOnly), VALUES),
    "logits shifted by one image": Fault(onnx_with(rows_shifted()), VALUES),
    "state between calls": Fault(torchscript_of(Leaking), {"tolerance"}, VALUES),
    # Output and input.
    "softmax": Fault(onnx_with(softmaxed()), {"tolerance"}),
    "nine classes": Fault(
        onnx_with(
            *(weights_with(name, lambda values: values[:9]) for name in LAST),
            output_through(lambda: [node("Identity", "raw", "logits")], shape=("batch", 9)),
        ),
        RUNS | INTERFACE,
    ),
    "output transposed": Fault(
        onnx_with(output_through(lambda: [node("Transpose", "raw", "logits")], shape=(10, "batch"))), RUNS | INTERFACE
    ),
    "output of one rank more": Fault(
        onnx_with(
            output_through(
                lambda: [node("Unsqueeze", "raw last", "logits")], {"last": np.array([2], np.int64)}, ("batch", 10, 1)
            )
        ),
        RUNS | INTERFACE,
    ),
    "output in float16": Fault(onnx_with(output_type(TensorProto.FLOAT16)), RUNS | INTERFACE),
    "output in float64": Fault(onnx_with(output_type(TensorProto.DOUBLE)), RUNS | INTERFACE),
    "output under another name": Fault(onnx_with(output_renamed), RUNS),
    "output a sequence": Fault(onnx_with(output_sequence), RUNS | INTERFACE),
    "output a pair": Fault(torchscript_of(PairOut), RUNS),
    "input under another name": Fault(onnx_with(input_renamed), RUNS),
    "input in float16": Fault(onnx_with(input_type(TensorProto.FLOAT16)), RUNS | INTERFACE),
    "input in float64": Fault(onnx_with(input_type(TensorProto.DOUBLE)), RUNS | INTERFACE),
}


@pytest.fixture(scope="module")
def normalized(confident_checkpoint: Path, parity_images: ParityData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet whose BatchNorms have seen images, with the classes of `confident_checkpoint`."""
    spec = msgspec.structs.replace(
        load_checkpoint(confident_checkpoint).spec, model="resnet18", source=None, training=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = get_architecture("resnet18").build(len(spec.class_names), spec.input)
    images = torch.from_numpy(parity_images.images[:128]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None  # cumulative average
        module(images)
        # Spread the logits so that every class is predicted for some images.
        logits = module.eval()(images)
        fc = module.get_submodule("fc")
        assert isinstance(fc, nn.Linear)
        fc.weight.div_(logits.std(dim=0)[:, None])
        fc.bias.copy_((fc.bias - logits.mean(dim=0)) / logits.std(dim=0))
    path = tmp_path_factory.mktemp("normalized") / "resnet18_0.pth"
    save_checkpoint(path, Checkpoint(spec, module.state_dict(), {}))
    return path


@pytest.fixture(scope="module")
def checkpoints(confident_checkpoint: Path, normalized: Path) -> dict[str, Path]:
    return {"lzh": confident_checkpoint, "resnet18": normalized}


@pytest.fixture(scope="module")
def references(checkpoints: dict[str, Path], parity_images: ParityData) -> dict[str, Reference]:
    """References on the first images only."""
    assert parity_images.labels is not None
    few = parity_images._replace(images=parity_images.images[:FEW], labels=parity_images.labels[:FEW])
    return {name: with_predictions_as_labels(reference_of(path, few)) for name, path in checkpoints.items()}


def reference_of(checkpoint: Path, data: ParityData) -> Reference:
    with PyTorchBackend(checkpoint, Device("cpu")) as backend:
        return run_reference(backend, data)


def with_predictions_as_labels(reference: Reference) -> Reference:
    """Make every flip cost accuracy."""
    return reference._replace(data=reference.data._replace(labels=reference.logits.argmax(1)))


def failed_checks(path: Path, reference: Reference) -> tuple[set[str], str]:
    """Return the names of the checks that fail, and all checks as text."""
    with open_backend(path, device="cpu") as backend:
        result = check_parity(reference, backend, get_tolerance(backend.spec.precision))
    names = {check.name for check in result.checks if not check.passed}
    assert result.passed == result.summary.passed == (not names)
    assert all(check.found for check in result.checks)
    return names, str(result.checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, checkpoints: dict[str, Path], references: dict[str, Reference]) -> None:
    fault = FAULTS[name]
    failed, text = failed_checks(fault.make(checkpoints[fault.model]), references[fault.model])
    assert fault.must_fail <= failed <= fault.must_fail | fault.may_fail, text


SHOWN = (
    "mean of the spec",
    "resize filter of the spec",
    "class names permuted",
    "channels swapped in the graph",
    "stale weights in ONNX",
    "NaN in one class",
    "kernels transposed",
    "dropout left on, TorchScript",
    "weights in TF32",
    "int8 of one level",
    "batch frozen at 2",
    "logits shifted by one image",
    "output in float16",
)
"""One fault of each kind, because the command line takes long."""


@pytest.mark.usefixtures("remembered_outputs")
@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_the_command_line_exits_with_1_and_names_the_failed_checks(
    name: str, checkpoints: dict[str, Path], cli: Cli
) -> None:
    fault = FAULTS[name]
    path, checkpoint = fault.make(checkpoints[fault.model]), checkpoints[fault.model]
    ran = cli("verify", path, "--ckpt", checkpoint, "--data", "builtin", "--allow-chance-accuracy")
    assert ran.status == 1
    assert "parity check FAILED" in ran.out
    crossed = {line.split("✗ ")[1][:14].strip() for line in ran.out.splitlines()[1:] if "✗ " in line}
    assert fault.must_fail - {"accuracy"} <= crossed, ran.out
    named = ran.error.rpartition("(failed checks: ")[2].partition(")")[0].split(", ")
    assert set(named) == crossed


# Files made in the same way without a fault: the faults above are not caught for the way they are made.

GOOD = {
    "edited": Fault(onnx_with(output_through(lambda: [node("Identity", "raw", "logits")])), set()),
    "edited before the input": Fault(onnx_with(mean_baked(0.0)), set()),
    "quantized with the right scale, as int8": Fault(
        onnx_with(quantized(1 / 255), fields_with(precision="int8")), set()
    ),
    "converted, ONNX": Fault(onnx_of(lambda module: module), set()),
    "converted, TorchScript": Fault(torchscript_of(lambda module: module), set()),
    "a ResNet, ONNX": Fault(onnx_of(lambda module: module), set(), model="resnet18"),
    "a ResNet, TorchScript": Fault(torchscript_of(lambda module: module), set(), model="resnet18"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "a ResNet, ONNX")) for name in GOOD]
)
def test_a_good_file_passes_every_check(
    name: str, checkpoints: dict[str, Path], references: dict[str, Reference]
) -> None:
    good = GOOD[name]
    failed, text = failed_checks(good.make(checkpoints[good.model]), references[good.model])
    assert not failed, text


def test_a_drop_in_accuracy_fails_even_if_the_agreement_passes(
    confident_checkpoint: Path, parity_images: ParityData
) -> None:
    """Eight flips in a thousand, all of correct predictions: the agreement passes, the accuracy drops by 0.8 points."""
    reference = reference_of(confident_checkpoint, parity_images)
    count = len(parity_images.images)
    logits = reference.logits.astype(np.float64)
    # The increase of class 4's logit at which each image flips; images of class 4 never do.
    needed = np.sort((logits.max(axis=1) - logits[:, 4])[logits.argmax(1) != 4])
    step = float(needed[7] + needed[8]) / 2
    path = onnx_with(entry_with((4,), lambda value: value + step, "model.8.bias"), fields_with(precision="int8"))(
        confident_checkpoint
    )
    right = reference._replace(data=parity_images._replace(labels=logits.argmax(1)))
    failed, text = failed_checks(path, right)
    assert failed == {"accuracy"}, text
    assert 0.005 < 8 / count < 0.01
    # Where the reference was wrong, no accuracy is lost.
    wrong = reference._replace(data=parity_images._replace(labels=(logits.argmax(1) + 1) % 10))
    assert failed_checks(path, wrong)[0] == set()


CHANGES: dict[str, dict[str, object]] = {
    "height": {"height": 48},
    "width": {"width": 48},
    "channels": {"channels": 1, "color": "L", "mean": (), "std": ()},
    "color": {"color": "BGR"},
    "value_range": {"value_range": (0.0, 2.0)},
    "mean": {"mean": (0.1, 0.0, 0.0)},
    "std": {"std": (1.0, 2.0, 1.0)},
    "resize": {"resize": "letterbox"},
    "resize_to": {"resize_to": (40, 40)},
    "crop_offset": {"crop_offset": "floor"},
    "interpolation": {"interpolation": "bicubic"},
    "antialias": {"antialias": False},
    "fill": {"fill": 114},
}
"""A change of each field of the input spec, with the fields that have to change with it."""


def test_every_field_of_the_input_spec_is_compared(references: dict[str, Reference]) -> None:
    """A difference in any field is a fault, including fields that are added to the spec later."""
    spec: ModelSpec = references["lzh"].spec
    # dtype has only one allowed value, and the layout is that of the file.
    assert set(CHANGES) | {"dtype", "layout"} == set(InputSpec.__struct_fields__)
    for field, change in CHANGES.items():
        document = msgspec.to_builtins(spec.input) | change
        other = msgspec.structs.replace(spec, input=msgspec.convert(document, InputSpec))
        failed = [check for check in check_specs(spec, other) if not check.passed]
        assert [check.name for check in failed] == ["preprocessing"]
        assert f"{field} {getattr(other.input, field)} instead of " in failed[0].found
