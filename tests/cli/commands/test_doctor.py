from pathlib import Path

import pytest

from tests.support.command_line import Cli


def test_reports_what_works_and_why_the_rest_does_not(cli: Cli) -> None:
    result = cli("doctor", "--json")
    assert result.status == 0
    findings = {finding["name"]: finding for finding in result.json}
    assert findings["onnxruntime cpu"]["works"]
    assert findings["torch cpu"]["works"]
    for name in ("onnxruntime cuda", "onnxruntime tensorrt", "torch cuda"):
        assert findings[name]["works"] or len(findings[name]["found"]) > 20


def test_prints_ticks(cli: Cli) -> None:
    out = cli("doctor").out
    assert "✓ onnxruntime cpu" in out
    assert "cifarx export" in out


def test_reports_a_missing_dataset(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIFARX_DATA", str(tmp_path / "nowhere"))
    findings = {finding["name"]: finding for finding in cli("doctor", "--json").json}
    assert not findings["CIFARX_DATA"]["works"]
