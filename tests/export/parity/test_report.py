"""The proof as a document, and as the row that the command line prints."""

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cifarx_export.parity.compare import Check
from cifarx_export.parity.error_analysis import ErrorAnalysis, analyze_errors
from cifarx_export.parity.report import ParityReport, ParityRow
from cifarx_serve.errors import OutputError
from cifarx_serve.spec import ParitySummary
from cifarx_serve.system.environment import environment
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
]
"""As documented, in this order."""


def report(summary: ParitySummary = SUMMARY, evidence: ErrorAnalysis | None = None) -> ParityReport:
    return ParityReport(
        artifact="lzh_9.onnx",
        artifact_sha256="1" * 64,
        checkpoint="lzh_9.pth",
        checkpoint_sha256="2" * 64,
        format="onnx",
        precision="fp32",
        checks=(Check("tolerance", True, "max |Δ| 2e-06"),),
        summary=summary,
        evidence=evidence,
    )


def evidence(images: int = 1, value: float = 1.5) -> ErrorAnalysis:
    """Of two classes, where the artifact's first logit is `value` in place of 1."""
    reference, artifact = np.array([[[1, 2]], [[value, 2]]], np.float32).repeat(images, axis=1)
    return analyze_errors(("cat", "dog"), np.arange(images), None, reference, artifact)


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is not JSON")


def test_a_row_has_the_documented_keys_in_their_order() -> None:
    assert list(json.loads(msgspec.json.encode(report().row()))) == KEYS


def test_a_row_says_what_the_proof_found() -> None:
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
    )


def test_what_is_not_known_is_null() -> None:
    row = report(msgspec.structs.replace(SUMMARY, accuracy=None, reference_accuracy=None, max_abs_error=None)).row()
    document = json.loads(msgspec.json.encode(row))
    assert (document["accuracy"], document["reference_accuracy"], document["max_abs_error"]) == (None, None, None)


def test_the_document_is_read_back_as_it_was_written() -> None:
    whole = report(evidence=evidence())
    whole.write(Path("a.parity.json"))
    content = Path("a.parity.json").read_bytes()
    assert msgspec.json.decode(content, type=ParityReport) == whole
    assert content.endswith(b"}\n")
    assert content.count(b"\n") > len(KEYS)  # to be read by people


def test_the_document_carries_version_tolerances_data_and_environment() -> None:
    report().write(Path("a.parity.json"))
    document = json.loads(Path("a.parity.json").read_text())
    assert document["schema_version"] == 1
    assert (document["summary"]["atol"], document["summary"]["rtol"]) == (1e-4, 2e-4)
    assert (document["summary"]["data"], document["summary"]["data_fingerprint"]) == ("pictures", "0" * 64)
    assert document["environment"] == json.loads(msgspec.json.encode(environment()))
    assert document["environment"]["versions"]["torch"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_still_json(value: float) -> None:
    whole = report(evidence=evidence(value=value))
    whole.write(Path("a.parity.json"))
    document = json.loads(Path("a.parity.json").read_text(), parse_constant=refuse)
    assert document["evidence"]["worst"][0]["artifact"] == [None, 2.0]
    assert msgspec.convert(document, ParityReport) == whole


def test_writing_replaces_the_document_and_leaves_nothing_beside_it() -> None:
    report(evidence=evidence(images=9)).write(Path("a.parity.json"))
    report().write(Path("a.parity.json"))
    assert msgspec.json.decode(Path("a.parity.json").read_bytes(), type=ParityReport) == report()
    assert [path.name for path in Path.cwd().iterdir()] == ["a.parity.json"]


def test_a_place_that_cannot_be_written_is_an_output_error() -> None:
    Path("file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        report().write(Path("file/a.parity.json"))
    assert Path("file").read_text() == "mine"
