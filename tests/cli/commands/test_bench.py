import json
from pathlib import Path

import pytest

from tests.support.command_line import Cli
from tests.support.hugging_face import write_vit
from tests.support.trained_model import Trained

ROW = {
    "file", "backend", "provider", "precision", "batch", "p50_us", "p90_us", "p99_us", "images_per_s", "agreement",
    "load_ms", "size_bytes",
}  # fmt: skip


@pytest.mark.slow
def test_prints_json_and_writes_the_same_report(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    files = (trained.checkpoint, trained.torchscript, trained.onnx)
    result = cli("bench", *files, "--batch", "1,8", "--report", "bench.json", "--json")
    assert result.status == 0, result.err
    rows = result.json["rows"]
    assert [(row["backend"], row["batch"]) for row in rows] == [
        (backend, batch) for batch in (1, 8) for backend in ("pytorch", "torchscript", "onnxruntime")
    ]
    for row in rows:
        assert set(row) >= ROW
        assert row["agreement"] == 1.0
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"]
        assert row["percentiles_us"][0] <= row["batch"] / row["images_per_s"] * 1e6 <= row["percentiles_us"][100]
        assert row["accuracy"] == pytest.approx(rows[0]["accuracy"])
    assert result.json["environment"]["threads"] >= 1
    assert json.loads((tmp_path / "bench.json").read_text()) == result.json


@pytest.mark.slow
def test_directories_of_hugging_face(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folders = [write_vit(tmp_path / name) for name in ("a", "b")]
    result = cli("bench", *folders, "--batch", "1", "--data", "builtin", "--json")
    assert result.status == 0, result.err
    rows = result.json["rows"]
    assert [(row["file"], row["backend"]) for row in rows] == [("a", "pytorch"), ("b", "pytorch")]
    assert rows[0]["agreement"] == 1
    assert rows[0]["size_bytes"] == sum(file.stat().st_size for file in folders[0].iterdir())


def test_prints_a_table_and_writes_markdown(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    result = cli("bench", trained.onnx, "--batch", "1", "--report", "bench.md")
    assert trained.onnx.name in result.out
    assert "CPUExecutionProvider" in result.out
    assert "drawings" in result.out
    assert "SingleStream" in result.out
    table = [line for line in (tmp_path / "bench.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "1,x"], "cannot parse batch sizes '1,x': give integers separated by commas, such as 1,8,64"),
        (["--batch", "0"], "batch size 0 is out of range"),
        (["--report", "x.docx"], ".json"),
        (["--pick", "p99<2"], "give p99 in"),
        (["--baseline", "old.json"], "no such baseline"),
        (["--max-regression", "little"], "maximum regression 'little' is not a percentage: give one such as 10%"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_invalid_options_are_usage_errors(
    cli: Cli, trained: Trained, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = cli("bench", trained.onnx, *arguments)
    assert result.status == 2
    assert words in result.error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compares_with_a_baseline_and_picks_a_row(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    """No row is a thousand times slower than itself, and every row is slower than a baseline of almost zero."""
    measured = cli("bench", trained.onnx, "--batch", "1", "--report", "old.json", "--report", "old.csv")
    assert measured.status == 0
    assert (tmp_path / "old.csv").exists()
    arguments = ("bench", trained.onnx, "--batch", "1", "--baseline", "old.json")
    result = cli(*arguments, "--max-regression", "100000%", "--pick", "p99<10s, accuracy>0%")
    assert result.status == 0, result.err
    assert "against the baseline" in result.out
    assert f"pick: {trained.onnx.name} by onnxruntime" in result.out
    old = json.loads((tmp_path / "old.json").read_text())
    old["rows"][0]["p50_us"] = 0.001
    (tmp_path / "old.json").write_text(json.dumps(old))
    result = cli(*arguments, "--json", "--pick", "p50<1s")
    assert result.status == 1
    assert result.json["changes"][0]["regressed"]
    assert set(result.json["rows"][0]) >= ROW
    assert result.json["picked"] == result.json["rows"][0]


def test_the_status_is_1_if_no_row_can_be_picked(cli: Cli, trained: Trained) -> None:
    result = cli("bench", trained.onnx, "--batch", "1", "--pick", "p50<0.001us")
    assert result.status == 1
    assert "no row meets p50<0.001us" in result.err
    assert trained.onnx.name in result.out
