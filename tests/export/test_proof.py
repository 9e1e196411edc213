"""The proof: planted faults, each in a real file through the real runtime, each caught by the check one expects."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cifarx_export.exporting import CPU
from cifarx_export.formats import ExportOptions, export_format
from cifarx_export.gates import Gate, gate
from cifarx_export.proof import BATCH_SIZES, MIN_IMAGES, Proof, ProofData, Reference, ask_reference, prove
from cifarx_export.proof_data import proof_data
from cifarx_export.torchscript_format import convert_to_torchscript
from cifarx_serve.backends.onnxruntime_backend import SPEC_KEY
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import DataError
from cifarx_serve.preprocess import scale
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cifarx_train.pytorch_backend import PyTorchBackend

IMAGES = MIN_IMAGES + 3
"""More than go through the small batches, and no multiple of any batch size."""

FEW = BATCH_SIZES[-1] + 3

SPECS = {"class names", "preprocessing"}
RUNS = {"batch 1", "batch 3", "batch 64", "edge inputs"}
NUMBERS = {"finite", "tolerance", "agreement"}

Plant = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def data(checkpoint: Path) -> ProofData:
    whole = proof_data(load_checkpoint(checkpoint).spec, "builtin")
    assert whole.labels is not None
    return whole._replace(images=whole.images[:IMAGES], labels=whole.labels[:IMAGES])


@pytest.fixture(scope="module")
def decided(checkpoint: Path, data: ProofData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with every class's logits spread alike over the data.

    However little it has learned: each class is some images' answer, and few answers are close.
    """
    logits = torch.from_numpy(ask(checkpoint, data).logits)
    mean, spread = logits.mean(dim=0), logits.std(dim=0) / 2

    def spread_out(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight / spread[:, None], (bias - mean) / spread

    path = tmp_path_factory.mktemp("decided") / "lzh_0.pth"
    save_checkpoint(path, with_last_layer(load_checkpoint(checkpoint), spread_out))
    return path


@pytest.fixture(scope="module")
def reference(decided: Path, data: ProofData) -> Reference:
    asked = ask(decided, data)
    assert set(asked.logits.argmax(1)) == set(range(10))
    return asked


@pytest.fixture(scope="module")
def good_onnx(decided: Path) -> Path:
    return converted(decided, "onnx")


@pytest.fixture(scope="module")
def good_torchscript(decided: Path) -> Path:
    return converted(decided, "torchscript")


@pytest.fixture(scope="module")
def brief(reference: Reference) -> Reference:
    return briefly(reference)


def briefly(reference: Reference) -> Reference:
    """Of the first images alone: enough to catch a fault, and quick."""
    data = reference.data
    assert data.labels is not None
    return reference._replace(
        data=data._replace(images=data.images[:FEW], labels=data.labels[:FEW]), logits=reference.logits[:FEW]
    )


LastLayer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def with_last_layer(loaded: Checkpoint, change: LastLayer) -> Checkpoint:
    state = {key: value.clone() for key, value in loaded.model.items()}
    state["model.8.weight"], state["model.8.bias"] = change(state["model.8.weight"], state["model.8.bias"])
    return loaded._replace(model=state)


def checkpoint_with(source: Path, change: LastLayer) -> Path:
    """A copy of a checkpoint in the current folder, with another last layer."""
    save_checkpoint(Path("edited.pth"), with_last_layer(load_checkpoint(source), change))
    return Path("edited.pth")


def converted(checkpoint: Path, name: str) -> Path:
    """The artifact of a checkpoint, beside it and not yet proved."""
    kind, loaded = export_format(name), load_checkpoint(checkpoint)
    path = checkpoint.with_suffix(kind.suffix)
    kind.convert(loaded.build(), loaded.spec, ExportOptions()).save(path, loaded.spec)
    return path


def ask(checkpoint: Path, data: ProofData) -> Reference:
    with PyTorchBackend(checkpoint, CPU) as backend:
        return ask_reference(backend, data)


def proof_of(path: Path, reference: Reference, limits: Gate | None = None) -> Proof:
    with open_backend(path, device="cpu") as backend:
        return prove(reference, backend, limits or gate("fp32"))


def failed(proof: Proof) -> set[str]:
    return {check.name for check in proof.failures}


def found(proof: Proof, name: str) -> str:
    return next(check.found for check in proof.checks if check.name == name)


def edited(source: Path, plants: Iterable[Plant]) -> Path:
    """A copy of an ONNX file in the current folder, with faults."""
    model = onnx.load(source)
    for plant in plants:
        plant(model)
    onnx.save(model, "edited.onnx")
    return Path("edited.onnx")


# Faults: each of these edits a good ONNX model.


def spec_with(change: Callable[[ModelSpec], ModelSpec]) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == SPEC_KEY)
        entry.value = change(ModelSpec.from_json(entry.value, "test")).to_json()

    return plant


def input_with(**changes: object) -> Plant:
    return spec_with(lambda spec: msgspec.structs.replace(spec, input=msgspec.structs.replace(spec.input, **changes)))


def permuted_classes(spec: ModelSpec) -> ModelSpec:
    names = spec.class_names
    return msgspec.structs.replace(spec, class_names=(names[1], names[0], *names[2:]))


def weights_with(name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        values = np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy()))
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return plant


def entry_with(place: tuple[int, ...], change: Callable[[float], float], name: str) -> Plant:
    def one(values: NDArray[np.float32]) -> NDArray[np.float32]:
        values[place] = change(float(values[place]))
        return values

    return weights_with(name, one)


def frozen_batch(size: int) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        for value in [*model.graph.input, *model.graph.output]:
            value.type.tensor_type.shape.dim[0].dim_value = size
        del model.graph.value_info[:]

    return plant


def output_through(
    nodes: Callable[[], list[onnx.NodeProto]], constants: dict[str, NDArray[np.generic]] | None = None
) -> Plant:
    """What was the output becomes `raw`, and `nodes` make `logits` of it; they may use `input` too."""

    def plant(model: onnx.ModelProto) -> None:
        graph = model.graph
        last = next(node for node in graph.node if "logits" in node.output)
        last.output[0] = "raw"
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())
        graph.node.extend(nodes())
        graph.output[0].type.tensor_type.ClearField("shape")

    return plant


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def output_type(kind: int) -> Plant:
    def plant(model: onnx.ModelProto) -> None:
        output_through(lambda: [node("Cast", "raw", "logits", to=kind)])(model)
        model.graph.output[0].type.tensor_type.elem_type = kind

    return plant


def output_renamed(model: onnx.ModelProto) -> None:
    output_through(lambda: [node("Identity", "raw", "scores")])(model)
    model.graph.output[0].name = "scores"


def output_sequence(model: onnx.ModelProto) -> None:
    output_through(lambda: [node("SequenceConstruct", "raw", "logits")])(model)
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, None))


def wrong_at_batch(size: int) -> Plant:
    """A hundredth too much, in batches of one size alone."""
    return output_through(
        lambda: [
            node("Shape", "input", "size", start=0, end=1),
            node("Equal", "size fault_size", "is_fault"),
            node("Cast", "is_fault", "fault", to=TensorProto.FLOAT),
            node("Mul", "fault fault_step", "step"),
            node("Add", "raw step", "logits"),
        ],
        {"fault_size": np.array([size], np.int64), "fault_step": np.array([0.01], np.float32)},
    )


def nan_for_black() -> Plant:
    """An image is weighed by its maximum over its maximum: 1, and 0 / 0 for a black one."""
    return output_through(
        lambda: [
            node("ReduceMax", "input not_batch", "maximum", keepdims=0),
            node("Div", "maximum maximum", "one"),
            node("Unsqueeze", "one last", "weight"),
            node("Mul", "raw weight", "logits"),
        ],
        {"not_batch": np.array([1, 2, 3], np.int64), "last": np.array([1], np.int64)},
    )


def neighbours_seen() -> Plant:
    """Like a batch norm in training mode: an image's answer depends on the others of its batch."""
    return output_through(
        lambda: [node("ReduceMean", "raw first", "mean", keepdims=1), node("Sub", "raw mean", "logits")],
        {"first": np.array([0], np.int64)},
    )


class Fault(NamedTuple):
    """`caught_by` must fail, `spared` may fail or not, everything else must pass."""

    plants: list[Plant]
    caught_by: set[str]
    spared: set[str] = frozenset()  # type: ignore[assignment]


FAULTS = {
    "wrong mean": Fault([input_with(mean=(0.49, 0.48, 0.45))], {"preprocessing", "tolerance"}, {"agreement"}),
    "wrong std": Fault([input_with(std=(0.25, 0.25, 0.25))], {"preprocessing", "tolerance"}, {"agreement"}),
    "wrong range": Fault([input_with(value_range=(-1.0, 1.0))], {"preprocessing", "tolerance"}, {"agreement"}),
    "wrong filter": Fault([input_with(resize="nearest")], {"preprocessing"}),
    "wrong size": Fault([input_with(height=48, width=48)], {"preprocessing"}),
    "classes permuted": Fault([spec_with(permuted_classes)], {"class names"}),
    "channels swapped": Fault(
        [weights_with("model.0.weight", lambda values: values[:, ::-1])], {"tolerance"}, {"agreement"}
    ),
    "first weight off by a hundredth": Fault(
        [entry_with((0, 0, 2, 2), lambda value: value + 1e-2, "model.0.weight")], {"tolerance"}, {"agreement"}
    ),
    "last weight off by a hundredth": Fault(
        [entry_with((9, 63), lambda value: value + 1e-2, "model.8.weight")], {"tolerance"}, {"agreement"}
    ),
    "one bias off by three tolerances": Fault(
        [entry_with((4,), lambda value: value + 3e-4, "model.8.bias")], {"tolerance"}, {"agreement"}
    ),
    "NaN in a bias": Fault([entry_with((3,), lambda _: float("nan"), "model.8.bias")], {"finite", "agreement"}),
    "Inf in a bias": Fault([entry_with((3,), lambda _: float("inf"), "model.8.bias")], {"finite", "agreement"}),
    "-Inf in a bias": Fault([entry_with((3,), lambda _: float("-inf"), "model.8.bias")], {"finite", "agreement"}),
    "NaN for a black image": Fault([nan_for_black()], {"finite"}),
    "last layer transposed": Fault(
        [weights_with("model.8.weight", lambda values: values.T.reshape(values.shape))], {"tolerance", "agreement"}
    ),
    "classes in another order": Fault(
        [weights_with(f"model.8.{part}", lambda values: np.roll(values, 1, axis=0)) for part in ("weight", "bias")],
        {"tolerance", "agreement"},
    ),
    "neighbours seen": Fault([neighbours_seen()], {"tolerance", "agreement"}),
    "wrong at batch 1 alone": Fault([wrong_at_batch(1)], {"tolerance"}),
    "wrong at batch 3 alone": Fault([wrong_at_batch(3)], {"tolerance"}),
    "wrong at batch 64 alone": Fault([wrong_at_batch(64)], {"tolerance"}),
    "batch frozen at 1": Fault([frozen_batch(1)], RUNS - {"batch 1"}),
    "batch frozen at 2": Fault([frozen_batch(2)], RUNS),
    "batch frozen at 64": Fault([frozen_batch(64)], RUNS),
    "nine classes": Fault(
        [weights_with(f"model.8.{part}", lambda values: values[:9]) for part in ("weight", "bias")]
        + [output_through(lambda: [node("Identity", "raw", "logits")])],
        RUNS,
    ),
    "output transposed": Fault([output_through(lambda: [node("Transpose", "raw", "logits")])], RUNS),
    "output of one rank more": Fault(
        [output_through(lambda: [node("Unsqueeze", "raw last", "logits")], {"last": np.array([2], np.int64)})], RUNS
    ),
    "output in float16": Fault([output_type(TensorProto.FLOAT16)], RUNS - {"edge inputs"}),
    "output in float64": Fault([output_type(TensorProto.DOUBLE)], RUNS - {"edge inputs"}),
    "output under another name": Fault([output_renamed], RUNS),
    "output a sequence": Fault([output_sequence], RUNS),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, good_onnx: Path, brief: Reference) -> None:
    fault = FAULTS[name]
    proof = proof_of(edited(good_onnx, fault.plants), brief)
    assert not proof.passed
    assert not proof.summary.passed
    assert fault.caught_by <= failed(proof) <= fault.caught_by | fault.spared, proof.checks
    assert all(check.found for check in proof.checks)


@pytest.mark.parametrize("kind", ["good_onnx", "good_torchscript"])
def test_a_good_artifact_passes_every_check(kind: str, brief: Reference, request: pytest.FixtureRequest) -> None:
    proof = proof_of(request.getfixturevalue(kind), brief)
    assert proof.passed
    assert proof.failures == []
    assert {check.name for check in proof.checks} == SPECS | RUNS | NUMBERS
    summary = proof.summary
    assert (summary.images, summary.batch_sizes) == (FEW, BATCH_SIZES)
    assert (summary.agreement, summary.forgiven, summary.nonfinite) == (1.0, 0, 0)
    assert summary.accuracy == summary.reference_accuracy
    assert (summary.atol, summary.rtol) == (1e-4, 1e-4)
    assert (summary.data, summary.data_fingerprint) == (brief.data.name, brief.data.fingerprint)


def test_resaving_a_good_artifact_is_no_fault(good_onnx: Path, brief: Reference) -> None:
    """Else the faults above might be caught for having been saved by another hand."""
    assert proof_of(edited(good_onnx, [output_through(lambda: [node("Identity", "raw", "logits")])]), brief).passed


def test_what_does_not_run_says_so(good_onnx: Path, brief: Reference) -> None:
    proof = proof_of(edited(good_onnx, [frozen_batch(2)]), brief)
    for name in RUNS:
        assert found(proof, name).startswith("does not run: ")
    summary = proof.summary
    assert (summary.max_abs_error, summary.required_tolerance, summary.accuracy) == (None, None, None)
    assert summary.agreement == 0.0
    assert proof.worst is None


def test_a_wrong_shape_is_told_beside_the_right_one(good_onnx: Path, brief: Reference) -> None:
    proof = proof_of(edited(good_onnx, FAULTS["nine classes"].plants), brief)
    assert found(proof, "batch 64") == f"float32 ({FEW}, 9) instead of float32 ({FEW}, 10)"


def test_a_proof_with_nan_is_still_a_json_document(good_onnx: Path, brief: Reference) -> None:
    proof = proof_of(edited(good_onnx, FAULTS["NaN in a bias"].plants), brief)
    assert proof.summary.nonfinite == 3 * FEW + 3  # every image at every batch size, and the edges
    assert proof.worst is not None

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    document = json.loads(msgspec.json.encode(proof), parse_constant=refuse)
    assert document["worst"]["artifact"][3] is None
    assert proof.summary.max_abs_error is not None  # of the other logits
    assert proof.summary.max_abs_error < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_reference_that_is_not_finite_proves_nothing(
    value: float, decided: Path, good_onnx: Path, data: ProofData
) -> None:
    broken = checkpoint_with(decided, lambda weight, bias: (weight, bias.index_fill(0, torch.tensor(3), value)))
    asked = briefly(ask(broken, data))
    same_fault = edited(good_onnx, [entry_with((3,), lambda _: value, "model.8.bias")])
    assert "finite" in failed(proof_of(same_fault, asked))
    assert "finite" in failed(proof_of(good_onnx, asked))


def test_a_fault_in_torchscript_is_caught(decided: Path, brief: Reference) -> None:
    loaded = load_checkpoint(decided)
    module = loaded.build()
    with torch.no_grad():
        module.get_parameter("model.0.weight")[0, 0, 2, 2] += 1e-2
    artifact = convert_to_torchscript(module, loaded.spec, ExportOptions())
    artifact.save(Path("edited.torchscript.pt"), permuted_classes(loaded.spec))
    proof = proof_of(Path("edited.torchscript.pt"), brief)
    assert {"class names", "tolerance"} <= failed(proof) <= {"class names", "tolerance", "agreement"}


def test_torchscript_that_gives_a_tuple_does_not_run(decided: Path, brief: Reference) -> None:
    class Pair(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.inner(images), images

    loaded = load_checkpoint(decided)
    artifact = convert_to_torchscript(Pair(loaded.build()), loaded.spec, ExportOptions())
    artifact.save(Path("edited.torchscript.pt"), loaded.spec)
    assert failed(proof_of(Path("edited.torchscript.pt"), brief)) == RUNS


def answers(path: Path, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits by ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": part})[0] for part in np.array_split(images, 16)]).astype(float)


def test_the_figures_are_those_of_a_plain_recomputation(good_onnx: Path, reference: Reference) -> None:
    path = edited(good_onnx, [entry_with((4,), lambda value: value + 0.25, "model.8.bias")])
    summary = proof_of(path, reference).summary
    data = reference.data
    theirs, ours = answers(path, scale(data.images, reference.spec.input)), reference.logits.astype(np.float64)
    assert summary.max_abs_error == pytest.approx(0.25, abs=1e-4)
    assert summary.p999_abs_error == pytest.approx(0.25, abs=1e-4)
    assert summary.mean_abs_error == pytest.approx(0.25 / 10, abs=1e-4)
    # Where class 4 comes nearest to 0, among a thousand images and three edge inputs.
    assert summary.required_tolerance == pytest.approx((0.25 / (1 + np.abs(ours[:, 4]))).max(), rel=0.02)
    assert summary.agreement == pytest.approx((theirs.argmax(1) == ours.argmax(1)).mean())
    assert summary.accuracy == (theirs.argmax(1) == data.labels).mean()
    assert summary.reference_accuracy == (ours.argmax(1) == data.labels).mean()
    assert summary.accuracy != summary.reference_accuracy
    assert summary.provider == "CPUExecutionProvider"


def test_the_worst_image_is_the_one_with_the_largest_error(good_onnx: Path, brief: Reference) -> None:
    path = edited(good_onnx, FAULTS["last weight off by a hundredth"].plants)
    worst = proof_of(path, brief).worst
    theirs = answers(path, scale(brief.data.images, brief.spec.input))
    error = np.abs(theirs - brief.logits).max(axis=1)
    assert worst is not None
    assert error[worst.image] == pytest.approx(error.max(), abs=1e-4)
    assert worst.reference == tuple(map(float, brief.logits[worst.image]))
    np.testing.assert_allclose(worst.artifact, theirs[worst.image], atol=1e-4)


@pytest.mark.parametrize("size", BATCH_SIZES)
def test_the_worst_image_is_found_at_any_batch_size(size: int, good_onnx: Path, brief: Reference) -> None:
    worst = proof_of(edited(good_onnx, [wrong_at_batch(size)]), brief).worst
    assert worst is not None
    np.testing.assert_allclose(np.subtract(worst.artifact, worst.reference), 0.01, atol=1e-4)


# Forgiveness: class 1 of the reference is class 0 less a margin, so that whatever is answered with 0 is nearly a 1.

HUNDREDTH = Gate(1e-2, 0.0, 1.0)
"""Far above what rounding does to these logits."""


class Tied(NamedTuple):
    """A reference, an artifact that adds `steps` to its logits, and which answers that flips."""

    reference: Reference
    artifact: Path
    flipped: NDArray[np.bool_]
    forgiven: NDArray[np.bool_]


def tied(decided: Path, good_onnx: Path, data: ProofData, margin: float, steps: dict[int, float]) -> Tied:
    def tie(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight[1], bias[1] = weight[0], bias[0] - margin
        return weight, bias

    path = checkpoint_with(decided, tie)
    layer = load_checkpoint(path).model
    added = np.array([steps.get(index, 0.0) for index in range(10)], np.float32)
    artifact = edited(
        good_onnx,
        [
            weights_with("model.8.weight", lambda _: layer["model.8.weight"].numpy()),
            weights_with("model.8.bias", lambda _: layer["model.8.bias"].numpy() + added),
        ],
    )
    asked = ask(path, data)
    answers = (asked.logits + added).argmax(1)
    lost = asked.logits.max(axis=1) - asked.logits[np.arange(len(answers)), answers]
    return Tied(asked, artifact, lost > 0, (lost > 0) & (lost <= HUNDREDTH.atol))


def test_a_flip_inside_the_references_own_margin_is_forgiven_counted_and_shown(
    decided: Path, good_onnx: Path, data: ProofData
) -> None:
    case = tied(decided, good_onnx, data, margin=2e-3, steps={0: -4e-3, 1: 4e-3})
    count = int(case.flipped.sum())
    assert count == case.forgiven.sum() > 0
    proof = proof_of(case.artifact, case.reference, HUNDREDTH)
    assert proof.passed
    assert proof.summary.forgiven == count
    assert proof.summary.agreement == pytest.approx(1 - count / IMAGES)
    assert f"{1 - count / IMAGES:.4%} of {IMAGES} images, {count} forgiven" in found(proof, "agreement")


def test_a_flip_outside_the_references_own_margin_fails_though_every_logit_is_inside(
    decided: Path, good_onnx: Path, data: ProofData
) -> None:
    case = tied(decided, good_onnx, data, margin=1.5e-2, steps={0: -9e-3, 1: 9e-3})
    assert case.flipped.sum() > case.forgiven.sum()
    proof = proof_of(case.artifact, case.reference, HUNDREDTH)
    assert failed(proof) == {"agreement"}
    assert proof.summary.forgiven == case.forgiven.sum()
    assert proof.summary.agreement == pytest.approx(1 - case.flipped.mean())


def test_forgiving_some_does_not_excuse_the_others(decided: Path, good_onnx: Path, data: ProofData) -> None:
    case = tied(decided, good_onnx, data, margin=2e-3, steps={0: -4e-3, 1: 4e-3, 5: 0.5})
    assert case.flipped.sum() > case.forgiven.sum() > 0
    proof = proof_of(case.artifact, case.reference, HUNDREDTH)
    assert failed(proof) == {"tolerance", "agreement"}
    assert proof.summary.forgiven == case.forgiven.sum()
    assert proof.summary.agreement == pytest.approx(1 - case.flipped.mean())


def test_a_tighter_tolerance_fails_and_is_shown(good_onnx: Path, brief: Reference) -> None:
    proof = proof_of(good_onnx, brief, gate("fp32", atol=0.0, rtol=0.0))
    assert failed(proof) == {"tolerance"}
    assert (proof.summary.atol, proof.summary.rtol, proof.summary.agreement) == (0.0, 0.0, 1.0)
    assert "outside 0 + 0·|ref|" in found(proof, "tolerance")


def test_the_required_tolerance_is_the_one_that_would_pass(good_onnx: Path, brief: Reference) -> None:
    needed = proof_of(good_onnx, brief).summary.required_tolerance
    assert needed is not None
    assert proof_of(good_onnx, brief, gate("fp32", needed * 1.0001, needed * 1.0001)).passed
    assert not proof_of(good_onnx, brief, gate("fp32", needed * 0.9999, needed * 0.9999)).passed


def test_without_labels_there_is_no_accuracy(good_onnx: Path, brief: Reference) -> None:
    unlabelled = brief._replace(data=brief.data._replace(labels=None))
    proof = proof_of(good_onnx, unlabelled)
    assert proof.passed
    assert (proof.summary.accuracy, proof.summary.reference_accuracy) == (None, None)


def test_a_proof_wants_a_thousand_images(decided: Path, data: ProofData) -> None:
    with pytest.raises(DataError, match=f"{data.name} has 999 test images.*at least 1000"):
        ask(decided, data._replace(images=data.images[:999]))
    assert len(ask(decided, data._replace(images=data.images[:1000])).logits) == 1000
