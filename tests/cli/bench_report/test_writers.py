import csv
import json
import sys
from pathlib import Path

import msgspec
import pytest

from cifarx.bench_report.writers import markdown, print_report, require_report_path, write_report
from cifarx_serve.benchmarking.benchmark import BenchmarkReport
from cifarx_serve.errors import OutputError, UsageError
from tests.support.benchmark_reports import report, row

SEVERAL = report(
    row(file="a.pth", batch=1, p90_us=700, images_per_s=1500),
    row(file="b.onnx", batch=1, p90_us=200, images_per_s=5500),
    row(file="a.pth", batch=8, images_per_s=9000),
    row(file="b.onnx", batch=8, images_per_s=5000),
)


TIMED = report(row(file="a.onnx"), row(file="b.onnx", device_us=41.6))


def test_device_times_have_a_column_only_if_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for measured, timed in ((report(), False), (TIMED, True)):
        print_report(measured)
        write_report(measured, tmp_path / "x.csv")
        heading, *rows = (tmp_path / "x.csv").read_text().splitlines()
        table = markdown(measured)
        assert ("device_us" in heading) == timed
        assert len({line.count(",") for line in (heading, *rows)}) == 1
        assert ("| device µs |" in table) == timed
        assert ("the p50 includes the copies" in table) == timed
        assert ("the p50 includes the copies" in capsys.readouterr().out) == timed
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert "|  | 1,234 |" in table
    assert "| 42 | 1,234 |" in table


def test_the_memory_on_a_gpu_has_a_column_only_if_it_is_known(tmp_path: Path) -> None:
    known = report(row(file="a.onnx"), row(file="b.onnx", gpu_bytes=345_000_000))
    for measured, shown in ((report(), False), (known, True)):
        write_report(measured, tmp_path / "x.csv")
        table = markdown(measured)
        assert ("gpu_bytes" in (tmp_path / "x.csv").read_text()) == shown
        assert ("| GPU MB |" in table) == shown
        assert ("| 345 |" in table) == shown


def test_reads_an_older_report_without_the_figures_of_gpus() -> None:
    older = json.loads(msgspec.json.encode(SEVERAL))
    for one in older["rows"]:
        del one["device_us"], one["gpu_bytes"]
    assert msgspec.json.decode(json.dumps(older), type=BenchmarkReport) == SEVERAL


@pytest.mark.parametrize("multi_label", [False, True])
def test_every_report_says_what_agrees(multi_label: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = msgspec.structs.replace(report(), multi_label=multi_label)
    write_report(measured, tmp_path / "x.html")
    print_report(measured)
    texts = [markdown(measured), capsys.readouterr().out, (tmp_path / "x.html").read_text(encoding="utf-8")]
    assert ["agreement of all labels on 2,000 images of drawings" in text for text in texts] == [multi_label] * 3


def test_every_report_names_the_splits_and_the_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = msgspec.structs.replace(report(), images=1000, test_images=412, warnings=("only a test",))
    write_report(measured, tmp_path / "x.html")
    print_report(measured)
    for text in (markdown(measured), capsys.readouterr().out, (tmp_path / "x.html").read_text(encoding="utf-8")):
        assert "412 test and 588 training images of drawings, accuracy on the test images" in text
        assert "WARNING" in text
        assert ": only a test" in text


def test_reads_an_older_report_without_the_splits() -> None:
    older = json.loads(msgspec.json.encode(SEVERAL))
    del older["test_images"], older["warnings"]
    assert msgspec.json.decode(json.dumps(older), type=BenchmarkReport) == SEVERAL


def test_reads_an_older_report_without_the_kind_of_labels() -> None:
    older = json.loads(msgspec.json.encode(SEVERAL))
    del older["multi_label"]
    assert msgspec.json.decode(json.dumps(older), type=BenchmarkReport) == SEVERAL


def test_unstable_rows_are_marked_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(row(stable=False)))
    out = capsys.readouterr().out
    assert "~100" in out
    assert "10 %" in out
    print_report(report())
    out = capsys.readouterr().out
    assert "~" not in out
    assert "10 %" not in out


def test_json_is_the_whole_report(tmp_path: Path) -> None:
    write_report(SEVERAL, tmp_path / "x.json")
    assert msgspec.json.decode((tmp_path / "x.json").read_bytes(), type=BenchmarkReport) == SEVERAL


def test_csv_has_one_line_per_row(tmp_path: Path) -> None:
    write_report(report(row(file='odd,"name".onnx', accuracy=None)), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        [found] = csv.DictReader(file)
    assert found["file"] == 'odd,"name".onnx'
    assert float(found["p50_us"]) == 100
    assert found["accuracy"] == ""
    assert "percentiles_us" not in found


def test_markdown_escapes_file_names() -> None:
    lines = markdown(report(row(file="a|b.onnx"))).splitlines()
    table = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 3


@pytest.mark.parametrize("suffix", [".json", ".csv", ".md", ".html", ".png"])
def test_writes_every_format(tmp_path: Path, suffix: str) -> None:
    require_report_path(tmp_path / f"x{suffix}")
    write_report(SEVERAL, tmp_path / f"x{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]
    assert (tmp_path / f"x{suffix}").stat().st_size > 500


@pytest.mark.parametrize("name", ["x.docx", "x", "json"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"cannot write a report as .*: give a name that ends in \.json, \.csv, \.md, \.html, \.png"
    ):
        require_report_path(Path(name))


def test_json_has_numbers_not_strings(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["p50_us"] == 100


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_a_missing_plot_library_is_reported_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """None in `sys.modules` makes an import of that name fail."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError):
        require_report_path(tmp_path / f"x{suffix}")
    require_report_path(tmp_path / "x.json")


def test_an_unwritable_folder_is_reported_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        require_report_path(tmp_path / "file" / "x.json")
