"""Locate: planted faults are found at their own layer, and nowhere else."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cifarx_export.formats.onnx.converter import convert_to_onnx
from cifarx_export.layerwise.locate import LayerDifference, locate
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cifarx_train.models.registry import get_architecture
from tests.support.conversion import conversion_source

IMAGE = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)


def planted(source: Path, weight: str, change: Callable[[np.ndarray], np.ndarray], name: str = "bad.onnx") -> Path:
    model = onnx.load(source)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), weight))
    onnx.save(model, name)
    return Path(name)


def one_wrong(weights: np.ndarray) -> np.ndarray:
    weights.flat[weights.size // 2] += 0.2
    return weights


def transposed(weights: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weights.swapaxes(-1, -2))


def found(difference: LayerDifference | None) -> LayerDifference:
    assert difference is not None
    return difference


def test_equal_networks_do_not_differ_at_any_layer(good_onnx: Path, checkpoint: Path) -> None:
    assert locate(good_onnx, checkpoint, IMAGE) is None
    assert locate(good_onnx, good_onnx, IMAGE) is None
    assert locate(checkpoint, checkpoint, IMAGE) is None


@pytest.mark.parametrize("change", [one_wrong, transposed])
@pytest.mark.parametrize(("layer", "before"), [("model.0", 0), ("model.2", 1), ("model.4", 2)])
def test_a_wrong_weight_is_located_at_its_layer(
    change: Callable[[np.ndarray], np.ndarray], layer: str, before: int, good_onnx: Path, checkpoint: Path
) -> None:
    bad = planted(good_onnx, f"{layer}.weight", change)
    for reference in (checkpoint, good_onnx):
        difference = found(locate(bad, reference, IMAGE))
        assert (difference.layer, difference.before) == (layer, before)
        assert difference.before_error < 1e-5 < difference.error
        assert difference.error == pytest.approx(abs(difference.artifact - difference.reference))
        assert str(difference).startswith(f"first layer outside the tolerance: {layer} (Conv node 'node_conv2d")


def test_nan_is_outside_the_tolerance(good_onnx: Path, checkpoint: Path) -> None:
    bad = planted(good_onnx, "model.8.bias", lambda bias: np.full_like(bias, np.nan))
    assert found(locate(bad, checkpoint, IMAGE)).layer == "model.8"


def test_a_fault_between_two_layers_is_located_at_the_input_of_the_second(good_onnx: Path, checkpoint: Path) -> None:
    model = onnx.load(good_onnx)
    pool = [node for node in model.graph.node if node.op_type == "MaxPool"][1]
    pool.op_type = "AveragePool"
    for attribute in list(pool.attribute):
        if attribute.name in ("dilations", "storage_order"):
            pool.attribute.remove(attribute)
    onnx.save(model, "bad.onnx")
    difference = found(locate(Path("bad.onnx"), checkpoint, IMAGE))
    assert (difference.layer, difference.node) == ("input of model.4", f"AveragePool node '{pool.name}'")


def test_layers_with_other_names_are_matched_by_shape_and_order(good_onnx: Path, checkpoint: Path) -> None:
    model = onnx.load(planted(good_onnx, "model.4.weight", one_wrong))
    names = {tensor.name: f"w{number}" for number, tensor in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, "bad.onnx")
    assert found(locate(Path("bad.onnx"), checkpoint, IMAGE)).layer == "model.4"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_reduced_precision_is_located_by_the_largest_increase(
    precision: str, good_onnx: Path, checkpoint: Path
) -> None:
    bad = planted(good_onnx, "model.4.weight", transposed)
    model = onnx.load(bad)
    spec = msgspec.structs.replace(read_spec(bad), precision=precision)
    onnx.helper.set_model_props(model, {"cifarx.spec": spec.to_json()})
    for tensor in model.graph.initializer:  # round every weight
        values = numpy_helper.to_array(tensor)
        if values.ndim > 1:
            step = np.abs(values).max() / (127 if precision == "int8" else 2048)
            tensor.CopyFrom(numpy_helper.from_array((values / step).round().astype(np.float32) * step, tensor.name))
    onnx.save(model, "bad.onnx")
    difference = found(locate(Path("bad.onnx"), checkpoint, IMAGE))
    assert difference.layer == "model.4"
    assert difference.rule.startswith("largest increase of the relative error")


def residual(path: Path, statistics: float = 0.0) -> Checkpoint:
    """Save a ResNet-18 for small images; `statistics` changes the running variance of `layer2.0.bn2` by this share."""
    spec = ModelSpec(model="resnet18", stem="small", class_names=("a", "b", "c"), input=InputSpec(height=16, width=16))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = get_architecture("resnet18", stem="small").build(3, spec.input)
        module.train()(torch.rand(8, 3, 16, 16))
    state = module.state_dict()
    state["layer2.0.bn2.running_var"] *= 1 + statistics
    loaded = Checkpoint(spec, state, {})
    save_checkpoint(path, loaded)
    return loaded


@pytest.mark.slow
def test_a_folded_batch_norm_is_located_at_its_convolution(tmp_path: Path) -> None:
    residual(tmp_path / "good.pth")
    source = conversion_source(residual(tmp_path / "other.pth", 0.5))
    next(convert_to_onnx(source)).save(tmp_path / "bad.onnx", source.spec)
    image = IMAGE[:, :16, :16]
    assert locate(tmp_path / "bad.onnx", tmp_path / "other.pth", image) is None
    difference = found(locate(tmp_path / "bad.onnx", tmp_path / "good.pth", image))
    assert difference.layer == "layer2.0.conv2 + layer2.0.bn2"
    assert difference.before_error < 1e-4
    module = found(locate(tmp_path / "other.pth", tmp_path / "good.pth", image))
    assert (module.layer, module.node) == ("layer2.0.bn2", "BatchNorm2d")


def test_shared_weights_are_matched_by_call(tmp_path: Path) -> None:
    """Untrained BatchNorms are equal, and the exporter stores equal weights once, under one name."""
    spec = ModelSpec(model="fastnet", class_names=("a", "b", "c"), input=InputSpec(height=32, width=32))
    loaded = Checkpoint(spec, get_architecture("fastnet").build(3, spec.input).state_dict(), {})
    save_checkpoint(tmp_path / "fast.pth", loaded)
    source = conversion_source(loaded)
    next(convert_to_onnx(source)).save(tmp_path / "fast.onnx", source.spec)
    assert locate(tmp_path / "fast.onnx", tmp_path / "fast.pth", IMAGE) is None
    bad = planted(tmp_path / "fast.onnx", "groups.2.0.weight", one_wrong)
    assert found(locate(bad, tmp_path / "fast.pth", IMAGE)).layer == "groups.2.0"


def test_other_formats_are_rejected(good_torchscript: Path, checkpoint: Path) -> None:
    with pytest.raises(
        UsageError, match=r"the layers of .* cannot be read: leave --locate out, or give ONNX files or checkpoints"
    ):
        locate(good_torchscript, checkpoint, IMAGE)
    assert load_checkpoint(checkpoint).spec.model == "lzh"
