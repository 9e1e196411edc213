import json
from pathlib import Path

import pytest

from tests.support.command_line import Cli
from tests.support.trained_model import Trained

ROW = {
    "file", "backend", "provider", "precision", "batch", "p50_us", "p90_us", "p99_us", "images_per_s", "agreement",
    "load_ms", "size_bytes",
}  # fmt: skip


@pytest.mark.slow
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
        assert row["percentiles_us"][0] <= row["batch"] / row["images_per_s"] * 1e6 <= row["percentiles_us"][100]
        assert row["accuracy"] == pytest.approx(rows[0]["accuracy"])
    assert ran.json["environment"]["threads"] >= 1
    assert json.loads((tmp_path / "bench.json").read_text()) == ran.json


def test_table_and_markdown(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    ran = cli("bench", trained.onnx, "--batch", "1", "--report", "bench.md")
    assert trained.onnx.name in ran.out
    assert "CPUExecutionProvider" in ran.out
    assert "drawings" in ran.out
    assert "SingleStream" in ran.out
    table = [line for line in (tmp_path / "bench.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,x"], "whole numbers"),
        (["--batch", "0"], "batch size 0"),
        (["--report", "x.docx"], ".json"),
        (["--pick", "p99<2"], "give p99 in"),
        (["--baseline", "old.json"], "no such baseline"),
        (["--max-regression", "little"], "give per cent"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_wrong_choices(cli: Cli, trained: Trained, tmp_path: Path, arguments: list[str], words: str) -> None:
    ran = cli("bench", trained.onnx, *arguments)
    assert ran.status == 2
    assert words in ran.error
    assert not list(tmp_path.iterdir())


def test_a_baseline_and_a_pick(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    """Against itself nothing is a thousand times slower; against one that took no time all is."""
    measured = cli("bench", trained.onnx, "--batch", "1", "--report", "old.json", "--report", "old.csv")
    assert measured.status == 0
    assert (tmp_path / "old.csv").exists()
    arguments = ("bench", trained.onnx, "--batch", "1", "--baseline", "old.json")
    ran = cli(*arguments, "--max-regression", "100000%", "--pick", "p99<10s, accuracy>0%")
    assert ran.status == 0, ran.err
    assert "against the baseline" in ran.out
    assert f"pick: {trained.onnx.name} by onnxruntime" in ran.out
    old = json.loads((tmp_path / "old.json").read_text())
    old["rows"][0]["p50_us"] = 0.001
    (tmp_path / "old.json").write_text(json.dumps(old))
    ran = cli(*arguments, "--json", "--pick", "p50<1s")
    assert ran.status == 1
    assert ran.json["changes"][0]["regressed"]
    assert set(ran.json["rows"][0]) >= ROW
    assert ran.json["picked"] == ran.json["rows"][0]


def test_nothing_to_pick_is_a_failed_check(cli: Cli, trained: Trained) -> None:
    ran = cli("bench", trained.onnx, "--batch", "1", "--pick", "p50<0.001us")
    assert ran.status == 1
    assert "no row keeps p50<0.001us" in ran.err
    assert trained.onnx.name in ran.out
