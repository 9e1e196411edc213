from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx.bench_report.baseline import (
    Baseline,
    compare,
    comparison_remarks,
    parse_limit,
    print_comparison,
    read_baseline,
)
from cifarx.bench_report.writers import write_report
from cifarx_serve.benchmarking.benchmark import BenchmarkReport
from cifarx_serve.errors import ModelFileError, UsageError
from tests.support.benchmark_reports import report, row


def _baseline(earlier: BenchmarkReport) -> Baseline:
    """Return a report as it is read back from a file."""
    return msgspec.json.decode(msgspec.json.encode(earlier), type=Baseline)


def test_change_is_relative_to_the_earlier_median_latency() -> None:
    earlier = _baseline(report(row(batch=1, p50_us=100), row(batch=64, p50_us=1000)))
    compared = compare(report(row(batch=64, p50_us=1200), row(batch=1, p50_us=80)), earlier, 0.1)
    assert [(change.batch, change.before_us, change.now_us) for change in compared.changes] == [
        (64, 1000, 1200), (1, 100, 80),
    ]  # fmt: skip
    assert [change.change for change in compared.changes] == pytest.approx([0.2, -0.2])
    assert [change.regressed for change in compared.changes] == [True, False]
    assert not compared.passed


def test_reads_an_older_baseline_without_device_times(tmp_path: Path) -> None:
    older = msgspec.json.decode(msgspec.json.encode(report()))
    for one in older["rows"]:
        del one["device_us"]
    (tmp_path / "old.json").write_bytes(msgspec.json.encode(older))
    assert compare(report(row(device_us=50)), read_baseline(tmp_path / "old.json"), 0.1).passed


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0, 2))
def test_passes_up_to_the_limit(before: float, now: float, limit: float) -> None:
    compared = compare(report(row(p50_us=now)), _baseline(report(row(p50_us=before))), limit)
    assert compared.passed == (now / before - 1 <= limit)


def test_rows_match_by_file_backend_provider_precision_and_batch() -> None:
    earlier = _baseline(report(row(), row(batch=8), row(provider="CUDAExecutionProvider"), row(precision="fp16")))
    compared = compare(report(row(), row(batch=64)), earlier, 0)
    assert len(compared.changes) == 1
    assert len(compared.only_before) == 3
    assert compared.only_now == ("a.onnx on CPUExecutionProvider at batch 64",)
    assert any("batch 64" in line for line in comparison_remarks(compared))


def test_lists_only_some_of_many_rows_without_a_counterpart() -> None:
    earlier = _baseline(report(*(row(batch=batch) for batch in range(1, 11))))
    [line] = comparison_remarks(compare(report(), earlier, 0.1))
    assert "at batch 2, " in line
    assert line.endswith("at batch 4 and 6 more")


def test_reports_without_a_common_row_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="none of these rows"):
        compare(report(row(file="b.onnx")), _baseline(report()), 0.1)


@pytest.mark.parametrize("changed", [{"cpu": "Another"}, {"threads": 1}, {"gpus": ("H200",)}])
def test_another_machine_is_reported(changed: dict[str, object]) -> None:
    same = compare(report(), _baseline(report()), 0.1)
    assert same.same_machine
    assert not comparison_remarks(same)
    other = compare(report(), _baseline(report(row(), **changed)), 0.1)
    assert "another machine" in comparison_remarks(other)[0]


def test_the_table_shows_both_latencies_and_whether_they_pass(capsys: pytest.CaptureFixture[str]) -> None:
    earlier = _baseline(report(row(p50_us=1000), row(batch=8, p50_us=1000)))
    print_comparison(compare(report(row(p50_us=1234), row(batch=8, p50_us=900, stable=False)), earlier, 0.1), 0.1)
    slower, faster = [line for line in capsys.readouterr().out.splitlines() if "a.onnx" in line]
    assert all(part in slower for part in ("1,000", "1,234", "+23.4%", "✗"))
    assert all(part in faster for part in ("~900", "-10.0%", "✓"))


def test_reads_a_report_of_this_version(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "old.json")
    assert compare(report(), read_baseline(tmp_path / "old.json"), 0).passed


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"[]", b"{", b"\xff\xfe", b'{"rows": []}', b'{"environment": {}, "rows": [1]}', b"[" * 10**5),
        *(b'{"a":' * 10**5, b'{"environment": {}, "rows": ' + b"[" * 10**5),
    ],
)
def test_a_file_that_is_not_a_report_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "old.json").write_bytes(text)
    with pytest.raises(ModelFileError, match=r"old\.json is not a report"):
        read_baseline(tmp_path / "old.json")


def test_a_missing_baseline_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such baseline .*old\.json"):
        read_baseline(tmp_path / "old.json")


@pytest.mark.parametrize(("text", "limit"), [("10%", 0.1), ("10", 0.1), ("0", 0), (" 2.5 %", 0.025), ("250%", 2.5)])
def test_parses_percentages(text: str, limit: float) -> None:
    assert parse_limit(text) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "maximum regression '' is not a percentage: give one such as 10%"),
        ("ten", "maximum regression 'ten' is not a percentage: give one such as 10%"),
        ("10%%", "maximum regression '10%%' is not a percentage: give one such as 10%"),
        ("-1%", "maximum regression '-1%' is negative or not finite: give 0% or more"),
        ("nan", "maximum regression 'nan' is negative or not finite: give 0% or more"),
        ("inf%", "maximum regression 'inf%' is negative or not finite: give 0% or more"),
    ],
)
def test_invalid_percentages_are_usage_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_limit(text)
    assert str(raised.value) == message
