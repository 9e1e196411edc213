from pathlib import Path

import pytest

from tests.support.command_line import Cli


def test_finds_what_works_and_says_why_the_rest_does_not(cli: Cli) -> None:
    ran = cli("doctor", "--json")
    assert ran.status == 0
    found = {finding["name"]: finding for finding in ran.json}
    assert found["onnxruntime cpu"]["works"]
    assert found["torch cpu"]["works"]
    for name in ("onnxruntime cuda", "onnxruntime tensorrt", "torch cuda"):
        assert found[name]["works"] or len(found[name]["found"]) > 20


def test_reads_as_ticks(cli: Cli) -> None:
    out = cli("doctor").out
    assert "✓ onnxruntime cpu" in out
    assert "cifarx export" in out


def test_data_set_that_is_not_there(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIFARX_DATA", str(tmp_path / "nowhere"))
    found = {finding["name"]: finding for finding in cli("doctor", "--json").json}
    assert not found["CIFARX_DATA"]["works"]
