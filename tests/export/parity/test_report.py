"""The parity report as a JSON document, and as the row that the command line prints."""

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cifarx_export.parity.checks import Check
from cifarx_export.parity.error_analysis import ErrorAnalysis, analyze_errors
from cifarx_export.parity.report import ParityReport, ParityRow
from cifarx_serve.errors import OutputError
from cifarx_serve.spec import ParitySummary
from cifarx_serve.system.environment import current_environment
from tests.support.parity_summary import SUMMARY

KEYS = [
    "artifact",
    "format",
    "precision",
    "passed",
    "images",
    "batch_sizes",
    "max_abs_error",
    "mean_abs_error",
    "p999_abs_error",
    "required_tolerance",
    "agreement",
    "forgiven",
    "reference_accuracy",
    "accuracy",
    "nonfinite",
    "provider",
    "agreement_bound",
    "test_images",
    "training_images",
    "warnings",
    "assumed",
]
"""The documented keys, in order."""


def report(summary: ParitySummary = SUMMARY, error_analysis: ErrorAnalysis | None = None) -> ParityReport:
    return ParityReport(
        artifact="lzh_9.onnx",
        artifact_sha256="1" * 64,
        checkpoint="lzh_9.pth",
        checkpoint_sha256="2" * 64,
        format="onnx",
        precision="fp32",
        checks=(Check("tolerance", True, "max |Δ| 2e-06"),),
        summary=summary,
        error_analysis=error_analysis,
    )


def analysis(images: int = 1, value: float = 1.5) -> ErrorAnalysis:
    """Return the analysis of two classes, where the artifact's first logit is `value` instead of 1."""
    reference, artifact = np.array([[[1, 2]], [[value, 2]]], np.float32).repeat(images, axis=1)
    return analyze_errors(("cat", "dog"), np.arange(images), None, reference, artifact)


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is not JSON")


def test_a_row_has_the_documented_keys_in_order() -> None:
    assert list(json.loads(msgspec.json.encode(report().row()))) == KEYS


def test_a_row_holds_the_metrics() -> None:
    assert report().row() == ParityRow(
        artifact="lzh_9.onnx",
        format="onnx",
        precision="fp32",
        passed=True,
        images=1003,
        batch_sizes=(1, 3, 64),
        max_abs_error=2e-6,
        mean_abs_error=1e-6,
        p999_abs_error=1.5e-6,
        required_tolerance=3e-7,
        agreement=0.75,
        forgiven=4,
        reference_accuracy=0.5,
        accuracy=0.25,
        nonfinite=6,
        provider="CPUExecutionProvider",
        agreement_bound=0.7,
        test_images=None,
        training_images=0,
        warnings=(),
        assumed=(),
    )


def test_unknown_metrics_are_null() -> None:
    row = report(msgspec.structs.replace(SUMMARY, accuracy=None, reference_accuracy=None, max_abs_error=None)).row()
    document = json.loads(msgspec.json.encode(row))
    assert (document["accuracy"], document["reference_accuracy"], document["max_abs_error"]) == (None, None, None)


def test_the_document_can_be_read_back() -> None:
    whole = report(error_analysis=analysis())
    whole.write(Path("a.parity.json"))
    content = Path("a.parity.json").read_bytes()
    assert msgspec.json.decode(content, type=ParityReport) == whole
    assert content.endswith(b"}\n")
    assert content.count(b"\n") > len(KEYS)  # indented, for people to read


def test_the_document_carries_version_tolerances_data_and_environment() -> None:
    report().write(Path("a.parity.json"))
    document = json.loads(Path("a.parity.json").read_text())
    assert document["schema_version"] == 1
    assert (document["summary"]["atol"], document["summary"]["rtol"]) == (1e-4, 2e-4)
    assert (document["summary"]["data"], document["summary"]["data_fingerprint"]) == ("pictures", "0" * 64)
    assert document["environment"] == json.loads(msgspec.json.encode(current_environment()))
    assert document["environment"]["versions"]["torch"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_valid_json(value: float) -> None:
    whole = report(error_analysis=analysis(value=value))
    whole.write(Path("a.parity.json"))
    document = json.loads(Path("a.parity.json").read_text(), parse_constant=refuse)
    assert document["evidence"]["worst"][0]["artifact"] == [None, 2.0]
    assert msgspec.convert(document, ParityReport) == whole


def test_writing_replaces_the_document_and_leaves_no_other_file() -> None:
    report(error_analysis=analysis(images=9)).write(Path("a.parity.json"))
    report().write(Path("a.parity.json"))
    assert msgspec.json.decode(Path("a.parity.json").read_bytes(), type=ParityReport) == report()
    assert [path.name for path in Path.cwd().iterdir()] == ["a.parity.json"]


def test_an_unwritable_path_is_an_output_error() -> None:
    Path("file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        report().write(Path("file/a.parity.json"))
    assert Path("file").read_text() == "mine"
