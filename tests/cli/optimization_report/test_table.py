import msgspec
import pytest

from cifarx.optimization_report.columns import columns, reason_lines, summary_lines, verdict
from cifarx.optimization_report.table import print_report
from tests.support.optimization import left_out, proved, report

BASE = proved("onnx fp32", 1.0)
FAST = proved("openvino int8", 2.5, agreement=0.9912, accuracy_drop=0.0021, accuracy=0.7479)
FAILED = left_out("onnx int8", "failed", "agreement: 98.2% of 1,000 images (minimum 99%)")
LATE = left_out("aotinductor fp32", "not tried", "the time was over")
FOUND = report(
    BASE, FAST, FAILED, front=("onnx fp32", "openvino int8"), pick="openvino int8", reason="2.50 times as fast"
)


def test_the_table_marks_the_pick_and_the_front_and_gives_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(FOUND)
    out = capsys.readouterr().out
    lines = {line.strip().split("  ")[0]: line for line in out.splitlines() if line.strip()}
    assert "net.pth: best latency, accuracy_drop<=0.5" in out
    assert "pick" in lines["openvino int8"]
    assert all(text in lines["openvino int8"] for text in ("2.50x", "400", "99.12%", "0.21"))
    assert "front" in lines["onnx fp32"]
    assert lines["onnx int8"].split() == ["onnx", "int8", "failed"]
    assert "onnx int8 failed: agreement: 98.2% of 1,000 images" in out
    assert "pick: openvino int8, 2.50 times as fast" in out


def test_says_how_near_the_nearest_is_and_what_was_not_tried() -> None:
    ended = report(BASE, LATE, stopped="time")
    assert summary_lines(ended) == [
        "no pick: no candidate meets p99<1us",
        "the time was over, not tried: aotinductor fp32; run the command again to go on",
    ]
    assert summary_lines(report(BASE, stopped="interrupt"))[1].startswith("interrupted, not tried: nothing")


def test_columns_without_values_are_left_out() -> None:
    headings = [column.heading for column in columns([proved("onnx fp32", 1.0, accuracy=None, accuracy_drop=None)])]
    assert "points lost" not in headings
    assert "agreement" in headings


def test_a_proved_candidate_that_was_not_measured_says_why() -> None:
    unmeasured = proved("pt2 fp32", reason="not measured: the time was over")
    assert verdict(FOUND, unmeasured) == "proved"
    assert reason_lines(report(BASE, unmeasured, LATE)) == ["pt2 fp32 proved: not measured: the time was over"]


def test_says_what_pruning_cost_against_the_original_network() -> None:
    facts = {"pruned": "30% of the channels; agreement 90.00% with it"}
    removed = {"weights_removed": 0.523, "multiplications_removed": 0.485}
    pruned = proved("onnx fp32", 1.4, pruned=0.3, agreement=0.9, accuracy_drop=0.02, facts=facts, **removed)
    ended = report(BASE, pruned, msgspec.structs.replace(pruned, precision="int8"))
    assert summary_lines(ended)[1:] == ["pruned: 30% of the channels; agreement 90.00% with it"]
    cells = {column.heading: column.text(pruned) for column in columns([BASE, pruned])}
    assert (cells["weights removed"], cells["multiplications removed"]) == ("52.30%", "48.50%")
    assert (cells["agreement"], cells["points lost"]) == ("90.00%", "2.00")
    assert "weights removed" not in [column.heading for column in columns([BASE])]
