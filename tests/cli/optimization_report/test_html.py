import re
from typing import Any

import pytest

from cifarx.optimization_report.html import render_html_report
from tests.support.optimization import left_out, proved, report

BASE = proved("onnx fp32", 1.0)
FAST = proved("openvino int8", 2.5, agreement=0.9912)
SLOW = proved("torchscript fp32", 0.5)
FAILED = left_out("onnx int8", "failed", "agreement: 98.2% <minimum 99%>")
FRONT = ("onnx fp32", "openvino int8")


@pytest.mark.parametrize("prefer", ["latency", "throughput", "size"])
def test_the_page_has_the_front_the_figures_and_the_reasons(prefer: str) -> None:
    page = render_html_report(
        report(BASE, FAST, SLOW, FAILED, prefer=prefer, front=FRONT, pick="openvino int8", reason="2.50 times as fast")
    )
    assert "<h1>net.pth: openvino int8</h1>" in page
    assert page.count("<svg") == 1
    assert "Pick: openvino int8, 2.50 times as fast." in page
    assert ">torchscript fp32</td>" in page
    assert "agreement: 98.2% &lt;minimum 99%&gt;" in page
    assert not re.search(r"(src|href)=\"(?!#)", page)


def test_the_page_is_reproducible() -> None:
    found = report(BASE, FAST, front=FRONT, pick="openvino int8")
    assert render_html_report(found) == render_html_report(found)


@pytest.mark.parametrize("results", [(), (FAILED,), (BASE,)])
def test_a_search_without_a_pick_has_a_page_too(results: tuple[Any, ...]) -> None:
    page = render_html_report(report(*results, front=tuple(one.name for one in results if one.is_measured)))
    assert "<h1>net.pth: no pick</h1>" in page
    assert "No pick: no candidate meets p99&lt;1us." in page


def test_names_cannot_bring_markup_into_the_page() -> None:
    page = render_html_report(report(BASE, checkpoint="<script>x</script>.pth", front=("onnx fp32",)))
    assert "<script" not in page


def test_says_which_network_pruned_files_were_compared_with() -> None:
    words = "against the pruned network in PyTorch. Their agreement and the points lost are against net.pth."
    pruned = proved("onnx fp32", 1.4, pruned=0.3)
    assert words in render_html_report(report(BASE, pruned, front=("onnx fp32",)))
    assert words not in render_html_report(report(BASE, front=("onnx fp32",)))
