import json
from typing import Any

import pytest

from cifarx.output import console


def test_results_go_to_standard_output_and_notes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("loading")
    console.result("lzh_0.pth")
    assert capsys.readouterr() == ("lzh_0.pth\n", "loading\n")


@pytest.mark.parametrize(("rank", "is_main"), [(None, True), ("0", True), ("1", False), ("11", False)])
def test_only_the_main_process_prints(
    rank: str | None, is_main: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    console.note("a note")
    console.result("a result")
    console.json_result({"a": 1})
    out, err = capsys.readouterr()
    assert (bool(out), bool(err)) == (is_main, is_main)
    assert console.is_main_process() == is_main


def test_any_process_prints_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    console.print_error("no room")
    assert capsys.readouterr() == ("", "error: no room\n")


@pytest.mark.parametrize(
    ("value", "document"),
    [
        ({"accuracy": 0.5, "epochs": 2}, {"accuracy": 0.5, "epochs": 2}),
        ({"loss": float("nan"), "best": float("inf")}, {"loss": None, "best": None}),
        ({"names": ["a", "ü"], "none": None}, {"names": ["a", "ü"], "none": None}),
    ],
)
def test_json_is_a_single_document(value: Any, document: Any, capsys: pytest.CaptureFixture[str]) -> None:
    console.json_result(value)
    assert json.loads(capsys.readouterr().out) == document


def test_a_table_in_a_pipe_is_not_truncated(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a_rather_long_name_of_a_file/" * 3 + "lzh.onnx"
    console.table("title", ["file", "by", "images/s"], [[long, "cpu", "1,234"]])
    out = capsys.readouterr().out
    assert long in out
    assert "1,234" in out
    assert "\x1b" not in out
