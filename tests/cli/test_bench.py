import json
from pathlib import Path

import pytest
from command_line import Cli
from trained_model import Trained

ROW = {
    "file", "backend", "provider", "precision", "batch", "p50_us", "p90_us", "p99_us", "images_per_s", "agreement",
    "load_ms", "size_bytes",
}  # fmt: skip


def test_rows_and_reports(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    files = (trained.checkpoint, trained.torchscript, trained.onnx)
    ran = cli("bench", *files, "--batch", "1,8", "--report", "bench.json", "--json")
    assert ran.status == 0, ran.err
    rows = ran.json["rows"]
    assert [(row["backend"], row["batch"]) for row in rows] == [
        (backend, batch) for batch in (1, 8) for backend in ("pytorch", "torchscript", "onnxruntime")
    ]
    for row in rows:
        assert set(row) >= ROW
        assert row["agreement"] == 1.0
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"]
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["p50_us"] * 1e6)
    assert ran.json["environment"]["threads"] >= 1
    assert json.loads((tmp_path / "bench.json").read_text()) == ran.json


def test_table_and_markdown(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    ran = cli("bench", trained.onnx, "--batch", "1", "--report", "bench.md")
    assert trained.onnx.name in ran.out
    assert "CPUExecutionProvider" in ran.out
    assert "drawings" in ran.out
    table = [line for line in (tmp_path / "bench.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,x"], "whole numbers"),
        (["--batch", "0"], "batch size 0"),
        (["--report", "x.docx"], ".json"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_wrong_choices(cli: Cli, trained: Trained, tmp_path: Path, arguments: list[str], words: str) -> None:
    ran = cli("bench", trained.onnx, *arguments)
    assert ran.status == 2
    assert words in ran.error
    assert not list(tmp_path.iterdir())
