"""Formats a parity report on a terminal, in a pipe, and in ASCII."""

import io
import re
import sys

import msgspec
import numpy as np
import pytest

from cifarx.output.parity import parity_lines
from cifarx_export.parity.checks import Check
from cifarx_export.parity.error_analysis import analyze_errors
from cifarx_export.parity.report import ParityReport
from tests.support import parity_summary

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SUMMARY = msgspec.structs.replace(
    parity_summary.SUMMARY,
    images=10000,
    max_abs_error=3.34e-6,
    mean_abs_error=3.36e-7,
    p999_abs_error=1.91e-6,
    required_tolerance=1.73e-6,
    rtol=1e-4,
    agreement=0.9998,
    forgiven=2,
    reference_accuracy=0.7444,
    accuracy=0.7445,
    nonfinite=0,
    data="cifar10",
)


def report(**changes: object) -> ParityReport:
    """Return a report with one disagreement."""
    reference = np.eye(10, dtype=np.float32)
    artifact = reference.copy()
    artifact[3, 5] = 2
    whole = ParityReport(
        artifact="lzh_9.onnx",
        artifact_sha256="1" * 64,
        checkpoint="lzh_8.pth",
        checkpoint_sha256="2" * 64,
        format="onnx",
        precision="fp32",
        checks=(
            Check("class names", True, ", ".join(NAMES)),
            Check("preprocessing", True, "RGB 32x32, bilinear, range (0.0, 1.0), mean (0.4913, 0.4821, 0.4465)"),
            Check("tolerance", True, "max |Δ| 3.34e-06, 0 outside 0.0001 + 0.0001·|ref|"),
        ),
        summary=SUMMARY,
        error_analysis=analyze_errors(NAMES, np.arange(10), None, reference, artifact),
    )
    return msgspec.structs.replace(whole, **changes)


def failing() -> ParityReport:
    checks = (Check("finite", True, "0 NaN or Inf"), Check("tolerance", False, "max |Δ| 2, 9 outside"))
    return report(checks=checks, summary=msgspec.structs.replace(SUMMARY, passed=False))


def with_assumptions() -> ParityReport:
    checks = (
        Check("class names", True, "ASSUMED: class 0, class 1", assumed=True),
        Check("preprocessing", True, "RGB 32x32"),
        Check("output", True, "ASSUMED: 2 logits, softmax", assumed=True),
    )
    return report(checks=checks)


def test_warnings_and_splits_are_shown() -> None:
    summary = msgspec.structs.replace(
        SUMMARY, images=1000, test_images=412, training_images=588, warnings=("only 40 images", "drawings")
    )
    lines = parity_lines(report(summary=summary)).splitlines()
    assert lines[1:3] == ["WARNING: only 40 images", "WARNING: drawings"]
    assert any("412 test and 588 training images of cifar10, batch sizes" in line for line in lines)
    assert any(line.endswith("74.45%, reference 74.44%, of the 412 test images") for line in lines)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make standard output a color terminal with 80 columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Terminal())


def test_a_pipe_gets_one_line_per_check() -> None:
    lines = parity_lines(report()).splitlines()
    assert lines == [
        "✓ lzh_9.onnx: onnx fp32, parity check passed",
        "    reference     lzh_8.pth",
        "    data          10,000 images of cifar10, batch sizes 1, 3, 64, CPUExecutionProvider",
        "  ✓ class names   airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck",
        "  ✓ preprocessing RGB 32x32, bilinear, range (0.0, 1.0), mean (0.4913, 0.4821, 0.4465)",
        "  ✓ tolerance     max |Δ| 3.34e-06, 0 outside 0.0001 + 0.0001·|ref|",
        "    errors        max 3.34e-06, mean 3.36e-07, 99.9th percentile 1.91e-06",
        "    required      tolerance 1.73e-06",
        "    accuracy      74.45%, reference 74.44%",
        "    disagreements cat as dog (1)",
    ]


def test_only_failed_checks_have_a_cross() -> None:
    lines = parity_lines(failing()).splitlines()
    assert lines[0] == "✗ lzh_9.onnx: onnx fp32, parity check FAILED"
    assert [line.split()[1] for line in lines[1:] if "✗" in line] == ["tolerance"]
    assert "  ✓ finite        0 NaN or Inf" in lines


def test_what_is_assumed_has_a_question_mark_instead_of_a_tick() -> None:
    lines = parity_lines(with_assumptions()).splitlines()
    assert lines[0] == "✓ lzh_9.onnx: onnx fp32, parity check passed (ASSUMED: class names, output)"
    assert lines[3:6] == [
        "  ? class names   ASSUMED: class 0, class 1",
        "  ✓ preprocessing RGB 32x32",
        "  ? output        ASSUMED: 2 logits, softmax",
    ]


def test_a_terminal_gets_colors_and_no_longer_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    text = parity_lines(failing())
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", parity_lines(report()))
    assert max(map(len, plain.splitlines())) <= 80
    assert " ".join(plain.split()).count("automobile") == 1
    assert "\n                  truck" in plain  # aligned with the other names, not with the tick


def test_ascii_output_has_words_instead_of_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(io.StringIO):
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Plain())
    text = parity_lines(failing())
    assert text.startswith("FAIL lzh_9.onnx")
    assert "  FAIL tolerance" in text
    assert "    ok finite" in text
    assert "     ? class names" in parity_lines(with_assumptions())


def test_names_cannot_control_the_terminal() -> None:
    """Escape sequences and newlines are replaced, and the markup of Rich has no effect."""
    name = "cat\x1b[2J\n✓ [bold red]all good[/]"
    lines = parity_lines(report(artifact=name, checkpoint=name, checks=(Check("class names", True, name),)))
    assert "\x1b" not in lines
    assert lines.count("[bold red]all good[/]") == 3
    assert len(lines.splitlines()) == 8


def test_unknown_values_are_omitted() -> None:
    unknown = msgspec.structs.replace(
        SUMMARY, max_abs_error=None, mean_abs_error=None, p999_abs_error=None, required_tolerance=None, accuracy=None
    )
    text = parity_lines(report(summary=unknown, error_analysis=None))
    assert not any(word in text for word in ("errors", "required", "accuracy", "disagreements", "None"))
