from pathlib import Path

import pytest

from cifarx_export.formats.registry import FORMATS, NO_OPTIONS, ExportOptions
from cifarx_export.targets import Targets, find_targets
from cifarx_serve.errors import UsageError


def test_names_of_formats() -> None:
    assert find_targets(["onnx", "pt2", "onnx"], None, NO_OPTIONS) == Targets([("onnx", "fp32"), ("pt2", "fp32")], None)
    assert find_targets(("onnx",), ["fp16", "int8"], NO_OPTIONS).precisions == ["fp16", "int8"]
    assert find_targets("onnx", None, NO_OPTIONS) == Targets([("onnx", "fp32")], None)


@pytest.mark.parametrize(
    ("path", "name", "precision"),
    [
        ("net.onnx", "onnx", "fp32"),
        ("a/b.c/net.int8.onnx", "onnx", "int8"),
        ("net.fp16.torchscript.pt", "torchscript", "fp16"),
        ("net.pt2", "pt2", "fp32"),
        ("net.aoti.pt2", "aotinductor", "fp32"),
        ("net.bf16.openvino.zip", "openvino", "bf16"),
        ("net.int8.pte", "executorch", "int8"),
        ("net.int8.tflite", "litert", "int8"),
        ("net.triton", "triton", "fp32"),
        ("net.v1.onnx", "onnx", "fp32"),
    ],
)
def test_the_path_of_one_artifact_names_format_and_precision(path: str, name: str, precision: str) -> None:
    for given in (path, Path(path)):
        assert find_targets(given, None, NO_OPTIONS) == Targets([(name, precision)], Path(path))  # type: ignore[list-item]


def test_a_stated_precision_counts() -> None:
    assert find_targets("net.onnx", ["fp16"], NO_OPTIONS) == Targets([("onnx", "fp16")], Path("net.onnx"))
    with pytest.raises(UsageError, match=r"several precisions cannot be written to net.onnx"):
        find_targets("net.onnx", ["fp16", "fp32"], NO_OPTIONS)


def test_unsupported_targets() -> None:
    suffixes = ", ".join(dict.fromkeys(row.suffix for row in FORMATS.values()))
    with pytest.raises(UsageError) as caught:
        find_targets("net.mlmodel", None, NO_OPTIONS)
    assert str(caught.value) == f"the name of net.mlmodel has no suffix of a format: end it with one of {suffixes}"
    with pytest.raises(UsageError, match="format pt2 does not support int8"):
        find_targets("net.int8.pt2", None, NO_OPTIONS)
    with pytest.raises(UsageError, match="format pt2 does not support --opset"):
        find_targets("net.pt2", None, ExportOptions(opset=18))
    with pytest.raises(UsageError, match="unknown format 'onxx'"):
        find_targets(["onxx"], None, NO_OPTIONS)
