import csv
import json
import sys
from pathlib import Path

import msgspec
import pytest

from cifarx.bench_report.writers import (
    HEADINGS,
    cells,
    environment_line,
    markdown,
    print_report,
    require_report,
    scenario_lines,
    scenarios,
    write_report,
)
from cifarx_serve.benchmarking.benchmark import BenchmarkReport
from cifarx_serve.errors import OutputError, UsageError
from tests.support.benchmark_rows import report, row

SEVERAL = report(
    row(file="a.pth", batch=1, p90_us=700, images_per_s=1500),
    row(file="b.onnx", batch=1, p90_us=200, images_per_s=5500),
    row(file="a.pth", batch=8, images_per_s=9000),
    row(file="b.onnx", batch=8, images_per_s=5000),
)


def test_scenarios_are_mlperfs() -> None:
    first, second = scenarios(SEVERAL)
    assert (first.file, first.single_stream_us, first.offline, first.batch) == ("a.pth", 700, 9000, 8)
    assert (second.file, second.single_stream_us, second.offline, second.batch) == ("b.onnx", 200, 5500, 1)
    single, offline = scenario_lines(SEVERAL)
    assert single == "SingleStream: b.onnx, 200 µs at the 90th percentile"
    assert offline == "Offline: a.pth, 9,000 images/s at batch 8"


def test_there_is_no_single_stream_without_batch_1() -> None:
    only = report(row(batch=8))
    assert scenarios(only)[0].single_stream_us is None
    assert [line.partition(":")[0] for line in scenario_lines(only)] == ["Offline"]


def test_a_cell_a_heading() -> None:
    found = dict(zip(HEADINGS, cells(row(p50_us=1234.4, accuracy=None)), strict=True))
    assert found["p50 µs"] == "1,234"
    assert found["accuracy"] == ""
    assert found["peak MB"] == "85"
    assert found["samples"] == "1,234"


TIMED = report(row(file="a.onnx"), row(file="b.onnx", device_us=41.6))


def test_device_times_are_a_column_only_where_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shown, told in ((report(), False), (TIMED, True)):
        print_report(shown)
        write_report(shown, tmp_path / "x.csv")
        heading, *rows = (tmp_path / "x.csv").read_text().splitlines()
        table = markdown(shown)
        assert ("device_us" in heading) == told
        assert len({line.count(",") for line in (heading, *rows)}) == 1
        assert ("| device µs |" in table) == told
        assert ("the p50 has the copies" in table) == told
        assert ("the p50 has the copies" in capsys.readouterr().out) == told
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert "|  | 1,234 |" in table
    assert "| 42 | 1,234 |" in table


def test_json_without_device_times_is_read() -> None:
    """As every report was before they were measured."""
    older = json.loads(msgspec.json.encode(SEVERAL))
    for one in older["rows"]:
        del one["device_us"]
    assert msgspec.json.decode(json.dumps(older), type=BenchmarkReport) == SEVERAL


def test_a_row_that_was_not_stable_is_marked_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(row(stable=False)))
    out = capsys.readouterr().out
    assert "~100" in out
    assert "10 %" in out
    print_report(report())
    out = capsys.readouterr().out
    assert "~" not in out
    assert "10 %" not in out


def test_the_environment_on_a_line() -> None:
    line = environment_line(report(row(), gpus=("NVIDIA H200",)).environment)
    assert line == "A CPU at 3,000 MHz, 2 of 4 CPUs, NVIDIA H200; Python 3.11, numpy 2.4"
    assert "MHz" not in environment_line(report(row(), clock_mhz=None).environment)


def test_json_is_the_whole_report(tmp_path: Path) -> None:
    write_report(SEVERAL, tmp_path / "x.json")
    assert msgspec.json.decode((tmp_path / "x.json").read_bytes(), type=BenchmarkReport) == SEVERAL


def test_csv_is_a_row_a_row(tmp_path: Path) -> None:
    write_report(report(row(file='odd,"name".onnx', accuracy=None)), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        [found] = csv.DictReader(file)
    assert found["file"] == 'odd,"name".onnx'
    assert float(found["p50_us"]) == 100
    assert found["accuracy"] == ""
    assert "percentiles_us" not in found


def test_markdown_has_a_cell_a_column_whatever_a_file_is_called() -> None:
    lines = markdown(report(row(file="a|b.onnx"))).splitlines()
    table = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 3


@pytest.mark.parametrize("suffix", [".json", ".csv", ".md", ".html", ".png"])
def test_every_kind_is_written_whole(tmp_path: Path, suffix: str) -> None:
    require_report(tmp_path / f"x{suffix}")
    write_report(SEVERAL, tmp_path / f"x{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]
    assert (tmp_path / f"x{suffix}").stat().st_size > 500


@pytest.mark.parametrize("name", ["x.docx", "x", "json"])
def test_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"\.json, \.csv"):
        require_report(Path(name))


def test_json_numbers_are_numbers(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["p50_us"] == 100


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_what_draws_it_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """None in the place of a module is how Python marks one that is not there."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError):
        require_report(tmp_path / f"x{suffix}")
    require_report(tmp_path / "x.json")


def test_a_folder_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        require_report(tmp_path / "file" / "x.json")
