"""Adoption of ONNX and TorchScript files that other programs wrote, of every kind, on real images."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import cifarx
from cifarx_export.adoption.adopt import adopt
from cifarx_export.adoption.onnx_graph import connect
from cifarx_export.checked_artifact import ExportResult
from cifarx_export.export import export
from cifarx_export.formats.registry import ExportOptions
from cifarx_export.verify import verify
from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.errors import CheckFailed, ModelFileError, UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.models.options import ModelOptions, SpecOverrides
from tests.support.foreign_models import (
    CLASSES,
    SIDE,
    Colors,
    FrozenBatch,
    write_color_folder,
    write_onnx,
    write_torchscript,
)
from tests.support.predictions import require_predictions

SIZE = {"input": {"height": SIDE, "width": SIDE}}


@pytest.fixture(scope="session")
def color_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_color_folder(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with four other classes."""
    return write_color_folder(tmp_path_factory.mktemp("data") / "others", 260, ("a", "b", "c", "d"))


def adopt_with(path: Path, data: Path, fields: dict[str, Any] | None = None, **options: Any) -> ExportResult:
    return adopt(path, overrides=SpecOverrides(fields or {}), data=str(data), **options)


def blue_picture() -> np.ndarray:
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[..., 2] = 200
    return picture


# Kinds of ONNX files.

KINDS: dict[str, dict[str, Any]] = {
    "other names": {},
    "the standard names": {"names": ("input", "logits")},
    "the standard names swapped": {"names": ("logits", "input")},
    "an unnamed batch axis": {"batch": None},
    "NHWC": {"layout": "NHWC"},
    "opset 9": {"opset": 9},
    "opset 21": {"opset": 21},
    "float16": {"data_type": TensorProto.FLOAT16, "names": ("input", "logits")},
    "float64": {"data_type": TensorProto.DOUBLE},
    "uint8 pixels": {"data_type": TensorProto.UINT8, "layout": "NHWC"},
    "weights in another file": {"external": True},
    "four axes": {"output_rank": 4},
    "a batch of one": {"batch": 1},
    "a batch of one in a reshape": {"batch": 1, "reshape": (1, 3)},
    "a batch of one in a reshape with an open axis": {"batch": 1, "reshape": (1, -1)},
    "a batch of four": {"batch": 4, "reshape": (4, 3)},
    "softmax": {"activation": "Softmax"},
    "images of any size": {"size": None},
    "any axis of any size": {"size": None, "channels": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_adopted_and_classifies_pictures(kind: str, color_folder: Path) -> None:
    path = write_onnx(Path("colors.onnx"), **KINDS[kind])
    result = adopt_with(path, color_folder, {"class_names": list(CLASSES), **SIZE})
    assert result.report.summary.passed, result.report.checks
    assert result.path == Path("colors.adopted.onnx")
    assert result.report.summary.accuracy == result.report.summary.reference_accuracy
    assert result.report.summary.accuracy is not None
    assert result.report.summary.accuracy > 0.9
    for extra in Path.cwd().glob("weights.bin"):
        extra.unlink()  # the adopted file contains them
    with cifarx.load(result.path, device="cpu") as predictor:
        assert predictor.predict(blue_picture()).label == "blue"
        assert [one.label for one in require_predictions(predictor.predict([blue_picture()] * 3))] == ["blue"] * 3


def test_the_adopted_file_is_self_contained_and_standard(color_folder: Path) -> None:
    path = write_onnx(Path("colors.onnx"), external=True)
    result = adopt_with(path, color_folder, {"class_names": list(CLASSES)})
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert [(tensor.name, tensor.shape) for tensor in session.get_inputs()] == [("input", ["batch", 3, 8, 8])]
    assert [(tensor.name, tensor.shape) for tensor in session.get_outputs()] == [("logits", ["batch", 3])]
    spec = read_spec(result.path)
    assert spec.source is not None
    assert (spec.source.kind, spec.source.name, spec.source.output) == ("onnx", "colors.onnx", None)
    assert spec.model == "colors"
    assert spec.parity is not None
    assert spec.parity.passed
    assert spec.minimum_onnxruntime


def test_the_adopted_file_works_in_the_other_commands(color_folder: Path) -> None:
    path = write_onnx(Path("colors.onnx"), layout="NHWC", activation="Softmax")
    result = adopt_with(path, color_folder, {"class_names": list(CLASSES), **SIZE})
    states = SpecOverrides({"class_names": list(CLASSES), **SIZE}, whole_input=True)
    report = verify(result.path, path, model=ModelOptions(overrides=states), data=str(color_folder))
    assert report.summary.passed, report.checks
    (int8,) = export(result.path, ["onnx"], ["int8"], data=str(color_folder))
    assert int8.path.name == "colors.adopted.int8.onnx"
    assert int8.report.checkpoint == "colors.adopted.onnx"
    for made in export(result.path, ["torchscript", "pt2"], data=str(color_folder)):
        assert made.report.summary.passed, made.report.checks
        with cifarx.load(made.path, device="cpu") as predictor:
            assert predictor.predict(blue_picture()).label == "blue"
    with pytest.raises(UsageError, match="is an ONNX file in fp32 already"):
        export(result.path, ["onnx"], data=str(color_folder))


# What the spec states, and what it assumes.


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("int8", ExportOptions(), "int8 needs opset 13, and the model has 9"),
        ("fp32", ExportOptions(embed_preprocessing=True), "--embed-preprocessing needs opset 18, and the model has 9"),
    ],
)
def test_the_opset_of_the_author_can_be_too_low(
    precision: str, options: ExportOptions, words: str, color_folder: Path
) -> None:
    adopt_with(write_onnx(Path("colors.onnx"), opset=9), color_folder, {"class_names": list(CLASSES)})
    with pytest.raises(UsageError, match=words):
        export(Path("colors.adopted.onnx"), ["onnx"], [precision], data=str(color_folder), options=options)


def test_what_nobody_states_is_assumed(other_folder: Path) -> None:
    spec = read_spec(adopt_with(write_onnx(Path("colors.onnx")), other_folder).path)
    assert spec.assumed == ("class_names", "preprocessing", "output")
    assert spec.class_names == ("class 0", "class 1", "class 2")
    assert spec.input == InputSpec(height=SIDE, width=SIDE)


def test_the_data_states_the_class_names(color_folder: Path) -> None:
    folder_order = ("blue", "green", "red")  # sorted, which is not the order of the network
    with pytest.raises(CheckFailed, match="on 3 classes is chance: preprocessing or class order is likely wrong"):
        adopt_with(write_onnx(Path("colors.onnx")), color_folder)
    result = adopt_with(Path("colors.onnx"), color_folder, allow_chance_accuracy=True)
    assert read_spec(result.path).class_names == folder_order
    assert "class_names" not in read_spec(result.path).assumed


@pytest.mark.parametrize(
    "names",
    [
        {"names": "{0: 'red', 1: 'green', 2: 'blue'}"},
        {"classes": '["red", "green", "blue"]'},
        {"class_to_idx": '{"red": 0, "blue": 2, "green": 1}'},
        {"labels": "red, green, blue"},
        {"id2label": '{"0": "red", "1": "green", "2": "blue"}'},
    ],
)
def test_the_metadata_of_the_file_states_the_class_names(names: dict[str, str], color_folder: Path) -> None:
    spec = read_spec(adopt_with(write_onnx(Path("colors.onnx"), metadata=names), color_folder).path)
    assert spec.class_names == CLASSES
    assert "class_names" not in spec.assumed


@pytest.mark.parametrize("activation", ["Softmax", "Sigmoid"])
def test_an_activation_at_the_end_states_the_output(activation: str, other_folder: Path) -> None:
    spec = read_spec(adopt_with(write_onnx(Path("colors.onnx"), activation=activation), other_folder).path)
    assert (spec.output, spec.activation) == ("probabilities", activation.lower())
    assert "output" not in spec.assumed
    with open_backend("colors.adopted.onnx", device="cpu") as backend:
        assert backend.tensor_infos()[1].name == "probabilities"


def test_one_value_per_image_decides_between_two_classes(color_folder: Path) -> None:
    path = write_onnx(Path("colors.onnx"), outputs=1, output_rank=1, activation="Sigmoid")
    result = adopt_with(path, color_folder, {"class_names": ["not red", "red"]})
    spec = read_spec(result.path)
    assert (spec.outputs, spec.activation, spec.output_size) == (1, "sigmoid", 1)
    with cifarx.load(result.path, device="cpu") as predictor:
        assert predictor.predict(blue_picture()[..., ::-1].copy()).label == "red"


def test_stated_preprocessing_is_used_and_not_assumed(color_folder: Path) -> None:
    fields = {
        "class_names": ["blue", "green", "red"],
        "input": {"color": "BGR", "mean": [0.1], "std": [0.5], "value_range": (-1, 1)},
        "activation": "softmax",
    }
    result = adopt_with(write_onnx(Path("colors.onnx")), color_folder, fields)
    spec = read_spec(result.path)
    assert spec.assumed == ()
    assert (spec.input.color, spec.input.mean, spec.input.value_range) == ("BGR", (0.1,) * 3, (-1.0, 1.0))
    assert not any(check.assumed for check in result.report.checks)


def test_one_of_several_outputs_is_chosen(color_folder: Path, other_folder: Path) -> None:
    two = write_onnx(Path("two.onnx"), extra="embedding")
    with pytest.raises(UsageError, match=r"two\.onnx has 2 outputs \(scores .*, embedding .*\), of which 2 could be"):
        adopt_with(two, color_folder)
    spec = read_spec(adopt_with(two, other_folder, {"source": {"output": "scores"}}).path)
    assert spec.source is not None
    assert spec.source.output == "scores"
    with pytest.raises(UsageError, match=r"two\.onnx has no output 'logits': choose from scores, embedding"):
        adopt_with(two, color_folder, {"source": {"output": "logits"}})
    by_shape = write_onnx(Path("shape.onnx"), outputs=1, extra="embedding", activation="Sigmoid")
    with pytest.raises(UsageError, match="of which 2 could be the classes"):
        adopt_with(by_shape, color_folder)
    named = adopt_with(by_shape, other_folder, {"class_names": ["r", "g", "b"]})
    assert read_spec(named.path).output_size == 3


# TorchScript.


@pytest.mark.parametrize(("returns", "output"), [("logits", None), ("probabilities", None), ("dict", "logits")])
def test_torchscript_files_are_adopted(returns: str, output: str | None, color_folder: Path) -> None:
    path = write_torchscript(Path("colors.pt"), Colors(returns))
    result = adopt_with(path, color_folder, {"class_names": list(CLASSES), **SIZE})
    assert result.report.summary.passed, result.report.checks
    assert result.path == Path("colors.adopted.torchscript.pt")
    spec = read_spec(result.path)
    assert spec.source is not None
    assert (spec.source.kind, spec.source.output) == ("torchscript", output)
    assert spec.output == ("probabilities" if returns == "probabilities" else "logits")
    with cifarx.load(result.path, device="cpu") as predictor:
        assert predictor.predict(blue_picture()).label == "blue"


class LastAxisColors(Colors):
    """Takes images as NHWC. Its first weights are those of a convolution of each channel, which runs later."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.all = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.ones_(self.each.weight)
        nn.init.eye_(self.all.weight[..., 0, 0])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(self.each(self.all(images.permute(0, 3, 1, 2))))  # type: ignore[no-any-return]


def test_the_user_knows_better_than_the_first_weights(color_folder: Path) -> None:
    path = write_torchscript(Path("colors.pt"), LastAxisColors(), shape=(SIDE, SIDE, 3))
    size = {**SIZE["input"], "layout": "NHWC", "color": "RGB"}
    result = adopt_with(path, color_folder, {"class_names": list(CLASSES), "input": size})
    assert read_spec(result.path).input.shape == (SIDE, SIDE, 3)
    assert result.report.summary.accuracy == 1


def test_one_output_of_a_tuple_is_chosen(color_folder: Path) -> None:
    path = write_torchscript(Path("two.pt"), Colors("tuple"))
    fields = {"class_names": list(CLASSES), **SIZE}
    with pytest.raises(UsageError, match=r"two\.pt returns a tuple"):
        adopt_with(path, color_folder, fields)
    result = adopt_with(path, color_folder, {**fields, "source": {"output": 1}})
    assert read_spec(result.path).output == "probabilities"


def test_the_size_of_the_images_has_to_be_stated(color_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"colors\.pt does not say the size of its images: state it with --image-size"):
        adopt_with(write_torchscript(Path("colors.pt")), color_folder)
    for channels in (3, None):
        path = write_onnx(Path("any.onnx"), size=None, channels=channels)
        with pytest.raises(UsageError, match="does not say the size of its images: state it with --image-size"):
            adopt_with(path, color_folder)


# What cannot be adopted.


def test_a_fixed_batch_size_that_cannot_be_freed_is_refused(other_folder: Path) -> None:
    path = write_onnx(Path("fixed.onnx"), batch=1, reshape=(1, 3))
    model = onnx.load(path)
    tile = helper.make_tensor("tile", TensorProto.FLOAT, [1, 3], [0.0] * 3)
    model.graph.initializer.append(tile)
    last = next(node for node in model.graph.node if "scores" in node.output)
    last.output[0] = "raw"
    # The minimum over the whole batch: right for one image only.
    model.graph.node.append(helper.make_node("ReduceMin", ["raw"], ["least"], axes=[0], keepdims=1))
    model.graph.node.append(helper.make_node("Add", ["least", "tile"], ["scores"]))
    onnx.save(model, path)
    with pytest.raises(
        ModelFileError, match=r"fixed\.onnx takes only batches of 1, and cannot take others \(.*\)"
    ) as error:
        adopt_with(path, other_folder)
    assert "dynamic_shapes" in error.value.remedy
    assert not list(Path.cwd().glob("*adopted*"))
    frozen = write_torchscript(Path("frozen.pt"), FrozenBatch(), batch_size=1)
    with pytest.raises(ModelFileError, match=r"frozen\.pt runs on one image, but not on a batch of two"):
        adopt_with(frozen, other_folder, SIZE)


def test_probabilities_have_to_be_stated(other_folder: Path) -> None:
    """The softmax is not the last operator, so that the file does not state it."""
    path = write_onnx(Path("colors.onnx"), activation="Softmax")
    model = onnx.load(path)
    last = next(node for node in model.graph.node if "scores" in node.output)
    last.output[0] = "raw"
    model.graph.node.append(helper.make_node("Relu", ["raw"], ["scores"]))
    onnx.save(model, path)
    with pytest.raises(CheckFailed, match="are between 0 and 1 and sum to 1, as probabilities do: state output = "):
        adopt_with(path, other_folder)
    assert read_spec(adopt_with(path, other_folder, {"output": "probabilities"}).path).output == "probabilities"
    with pytest.raises(CheckFailed, match=r"are from .* to .* and do not sum to 1"):
        adopt_with(write_onnx(Path("logits.onnx")), other_folder, {"output": "probabilities"})


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({}, {"input": {"height": 16}}, "takes images with height 8, not 16"),
        ({}, {"input": {"color": "L"}}, "takes images with channels 3, not 1"),
        ({}, {"class_names": ["a", "b"]}, "returns 3 values per image, which do not fit 2 class names"),
        ({"data_type": TensorProto.UINT8}, {"input": {"mean": [0.5]}}, "takes pixels from 0 to 255, which it scales"),
        ({"data_type": TensorProto.UINT8}, {"input": {"value_range": [0, 1]}}, "takes pixels from 0 to 255"),
        ({"channels": 4}, {}, r"is \(\?, 4, 8, 8\): give a classifier of images with 1 or 3 channels"),
    ],
)
def test_contradictions_are_named(
    options: dict[str, Any], fields: dict[str, Any], message: str, color_folder: Path
) -> None:
    with pytest.raises((UsageError, ModelFileError), match=message):
        adopt_with(write_onnx(Path("colors.onnx"), **options), color_folder, fields)


def test_other_files_are_refused_with_what_to_do(color_folder: Path) -> None:
    Path("text.onnx").write_text("text")
    write_onnx(Path("apart.onnx"), external=True)
    Path("weights.bin").unlink()
    import torch

    torch.save({"a": torch.zeros(1)}, "weights.pth")
    cases = {
        "text.onnx": "is neither an ONNX file nor a TorchScript file",
        "apart.onnx": r"the weights of apart\.onnx cannot be read",
        "weights.pth": "is a checkpoint: export it with `cifarx export --ckpt",
        "absent.onnx": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises((UsageError, ModelFileError), match=message):
            adopt_with(Path(name), color_folder)
    path = write_onnx(Path("colors.onnx"))
    with pytest.raises(UsageError, match=r"is the file to adopt: give another --out"):
        adopt_with(path, color_folder, out=path)
    with pytest.raises(UsageError, match=r"cannot write a onnx file as colors\.pt: give a name that ends in \.onnx"):
        adopt_with(path, color_folder, out="colors.pt")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "link.bin"])
def test_weights_outside_of_the_folder_are_not_read(location: str, color_folder: Path) -> None:
    folder = Path("model")
    folder.mkdir()
    path = write_onnx(folder / "colors.onnx", external=True)
    (folder / "weights.bin").rename("weights.bin")
    (folder / "link.bin").symlink_to(Path("weights.bin").absolute())
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=r"the weights of .* cannot be read"):
        adopt_with(path, color_folder)


def test_more_than_two_gigabytes_are_refused_at_once(color_folder: Path) -> None:
    path = write_onnx(Path("large.onnx"), external=True)
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "length").value = str(3 << 30)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=r"is 3\.0 GB with its weights, but one ONNX file holds at most 2 GB"):
        adopt_with(path, color_folder)


def test_the_adopted_file_is_not_written_if_it_answers_otherwise(
    other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: onnx.ModelProto, interface: Any) -> onnx.ModelProto:
        connected = connect(model, interface)
        for tensor in connected.graph.initializer:
            if tensor.name == "weights":
                values = onnx.numpy_helper.to_array(tensor) + np.float32(0.01)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, "weights"))
        return connected

    monkeypatch.setattr("cifarx_export.adoption.onnx_file.connect", broken)
    result = adopt_with(write_onnx(Path("colors.onnx")), other_folder)
    assert not result.report.summary.passed
    assert not result.path.exists()
    assert {check.name for check in result.report.checks if not check.passed} == {"tolerance"}
    assert msgspec.json.decode(result.report_path.read_bytes())["summary"]["passed"] is False
