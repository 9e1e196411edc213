"""Verify an ONNX file in other runtimes: right and wrong files, and a runtime that is silently wrong itself."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cifarx_export.parity.report import ParityReport
from cifarx_export.verify import verify
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.errors import UsageError
from tests.support.color_model import SPEC, write_onnx

RUNTIMES = {"opencv": "cv2", "openvino": "openvino", "tract": "tract"}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(RUNTIMES[name])
    return name


def verify_in(runtime: str, artifact: Path, reference: Path) -> ParityReport:
    return verify(artifact, reference, runtime=runtime, data="builtin", allow_chance_accuracy=True)


def failed(report: ParityReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def write_squeeze_excitation(path: Path) -> Path:
    """Write a network whose channels are scaled by a gate that is computed from their means, as in MobileNetV3."""
    random = np.random.default_rng(0)
    weights = {
        "reduce.weight": random.normal(size=(2, 3, 1, 1)),
        "expand.weight": random.normal(size=(3, 2, 1, 1)),
        "head.weight": 10 * np.eye(3),
    }
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["input"], ["means"], axes=[2, 3], keepdims=1),
            helper.make_node("Conv", ["means", "reduce.weight"], ["reduced"]),
            helper.make_node("Relu", ["reduced"], ["active"]),
            helper.make_node("Conv", ["active", "expand.weight"], ["expanded"]),
            helper.make_node("HardSigmoid", ["expanded"], ["gate"], alpha=1 / 6, beta=0.5),
            helper.make_node("Mul", ["input", "gate"], ["scaled"]),
            helper.make_node("GlobalAveragePool", ["scaled"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
            helper.make_node("MatMul", ["features", "head.weight"], ["logits"]),
        ],
        "squeeze_excitation",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 4, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = SPEC_KEY, SPEC.to_json()
    onnx.save(model, path)
    return path


def test_a_file_that_a_runtime_computes_right(runtime: str) -> None:
    path = write_onnx(Path("colors.onnx"))
    report = verify_in(runtime, path, path)
    assert failed(report) == set()
    assert (report.format, report.precision) == ("onnx", "fp32")
    assert report.summary.provider.lower().startswith(runtime)
    assert report.summary.batch_sizes == (1, 3, 64)


def test_a_wrong_file_fails_in_every_runtime(runtime: str) -> None:
    swapped, path = write_onnx(Path("swapped.onnx"), order=(2, 1, 0)), write_onnx(Path("colors.onnx"))
    assert failed(verify_in(runtime, swapped, path)) == {"tolerance", "agreement"}


@pytest.mark.parametrize(("name", "wrong"), [("opencv", True), ("openvino", False), ("tract", False)])
def test_a_runtime_that_is_silently_wrong_fails(name: str, wrong: bool) -> None:
    """OpenCV 5.0.0 takes the gate of MobileNetV3, x · hard_sigmoid(y), for hard_swish(y), without an error."""
    module = pytest.importorskip(RUNTIMES[name])
    if name == "opencv" and module.__version__ != "5.0.0":
        pytest.skip("the defect is that of OpenCV 5.0.0")
    path = write_squeeze_excitation(Path("gated.onnx"))
    report = verify_in(name, path, path)
    assert ("tolerance" in failed(report)) == wrong
    assert report.summary.passed != wrong


def test_what_does_not_fit_together() -> None:
    path = write_onnx(Path("colors.onnx"))
    with pytest.raises(UsageError, match="unknown runtime 'tensorflow'"):
        verify_in("tensorflow", path, path)
    with pytest.raises(UsageError, match="--locate cannot read the layers of runtime opencv"):
        verify(path, path, runtime="opencv", locate=True)
