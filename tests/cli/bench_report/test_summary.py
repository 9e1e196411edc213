from cifarx.bench_report.summary import columns, environment_line, scenario_lines, scenario_results
from tests.support.benchmark_reports import report, row

SEVERAL = report(
    row(file="a.pth", batch=1, p90_us=700, images_per_s=1500),
    row(file="b.onnx", batch=1, p90_us=200, images_per_s=5500),
    row(file="a.pth", batch=8, images_per_s=9000),
    row(file="b.onnx", batch=8, images_per_s=5000),
)


def test_scenarios_are_those_of_mlperf() -> None:
    first, second = scenario_results(SEVERAL)
    assert first == ("a.pth", 700, 9000, 8)
    assert second == ("b.onnx", 200, 5500, 1)
    single, offline = scenario_lines(SEVERAL)
    assert single == "SingleStream: b.onnx, 200 µs at the 90th percentile"
    assert offline == "Offline: a.pth, 9,000 images/s at batch 8"


def test_there_is_no_single_stream_without_batch_1() -> None:
    without = report(row(batch=8))
    assert scenario_results(without)[0].single_stream_us is None
    assert [line.partition(":")[0] for line in scenario_lines(without)] == ["Offline"]


def test_columns_format_the_figures_of_a_row() -> None:
    only = row(p50_us=1234.4, accuracy=None)
    cells = {column.heading: column.text(only) for column in columns(report(only))}
    assert cells["p50 µs"] == "1,234"
    assert cells["accuracy"] == ""
    assert cells["peak MB"] == "85"
    assert cells["samples"] == "1,234"
    assert "device µs" not in cells


def test_the_environment_fits_on_one_line() -> None:
    line = environment_line(report(row(), gpus=("NVIDIA H200",)).environment)
    assert line == "A CPU at 3,000 MHz, 2 of 4 CPUs, NVIDIA H200; Python 3.11, numpy 2.4"
    assert "MHz" not in environment_line(report(row(), clock_mhz=None).environment)
