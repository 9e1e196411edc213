"""The HTML report is well-formed and self-contained, has every figure, and escapes every name."""

import re
from html.parser import HTMLParser

import msgspec
import pytest

from cifarx.bench_report.html import render_html_report
from tests.support.benchmark_reports import report, row

VOID = {"meta"}
HOSTILE = '<script>alert("x")</script>\'"&{{ 7 * 7 }}'

SEVERAL = report(
    *(
        row(
            file=file,
            batch=batch,
            p50_us=number * 1000 + batch,
            p90_us=number * 2000 + batch,
            p99_us=number * 3000 + batch,
            images_per_s=number * 10_000 + batch,
            samples=number * 4000 + batch,
            agreement=1 - number / 100,
            accuracy=0.9 - number / 100,
        )
        for batch in (1, 64)
        for number, file in enumerate(("a.pth", "b.onnx", "c.int8.onnx"), 1)
    )
)


class Page(HTMLParser):
    """Parses a page into elements with attributes, table cells and text; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data
            if "td" in self.open:
                self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, columns: int) -> list[list[str]]:
        """Return the rows with that many cells."""
        return [cells for cells in self.rows if len(cells) == columns]


def test_device_times_have_a_column_only_if_there_are_any() -> None:
    assert "Device" not in Page(render_html_report(report())).words
    page = Page(render_html_report(report(row(file="a.onnx"), row(file="b.onnx", device_us=41.6))))
    assert "Device µs" in page.words
    assert "between two events on the device" in page.words
    found = {cells[0]: cells for cells in page.rows if len(cells) > 15}
    assert "-" in found["a.onnx"]
    assert "41.6" in found["b.onnx"]


@pytest.fixture(scope="module")
def text() -> str:
    return render_html_report(SEVERAL)


def test_the_table_has_every_row_with_all_its_figures(text: str) -> None:
    table = Page(text).table(18)
    assert [(cells[0], cells[1]) for cells in table] == [(one.file, f"{one.batch}") for one in SEVERAL.rows]
    for cells, one in zip(table, SEVERAL.rows, strict=True):
        figures = (one.p50_us, one.p90_us, one.p99_us, one.images_per_s, one.samples)
        assert {f"{value:,.0f}" for value in figures} <= set(cells)
        assert {f"{one.agreement:.2%}", f"{one.accuracy:.2%}", "2.0%", "40", "0.4", "640", "85"} <= set(cells)
        assert cells[-3:] == ["fp32", "onnxruntime", "CPUExecutionProvider"]
    assert [cells[5] for cells in table] == ["1.00x", "0.50x", "0.33x", "1.00x", "0.52x", "0.35x"]


def test_the_overview_shows_the_scenarios_of_mlperf(text: str) -> None:
    page = Page(text)
    assert [cells[:5] for cells in page.table(7)] == [
        ["a.pth", "best2,001 µs", "10,064", "64", "89.00%"],
        ["b.onnx", "4,001 µs", "20,064", "64", "88.00%"],
        ["c.int8.onnx", "6,001 µs", "best30,064", "64", "87.00%"],
    ]
    assert "batch 1 was not measured" not in page.words


def test_the_memory_on_a_gpu_is_shown_if_it_is_known() -> None:
    page = Page(render_html_report(report(row(file="a.onnx"), row(file="b.onnx", gpu_bytes=345_000_000))))
    assert [cells[-4] for cells in page.table(19)] == ["-", "345"]


def test_omits_single_stream_without_batch_1_and_the_clock_if_unknown() -> None:
    page = Page(render_html_report(report(row(batch=8), clock_mhz=None)))
    assert page.table(7)[0][1:4] == ["-", "best9,500", "8"]
    assert "batch 1 was not measured" in page.words
    assert "MHz" not in page.words


def test_unstable_rows_are_marked_and_explained(text: str) -> None:
    page = Page(render_html_report(report(row(), row(file="b.onnx", stable=False, spread=0.23))))
    assert [cells[2] for cells in page.table(18)] == ["100", "~100"]
    assert [("~" in cells[1], "~" in cells[2]) for cells in page.table(7)] == [(False, False), (True, True)]
    assert "23.0%" in page.words
    assert "hollow: not stable" in page.words
    assert "Measure again" in page.words
    stable = Page(text).words
    assert "hollow" not in stable
    assert "Measure again" not in stable
    assert "~" not in stable


def test_a_single_file_without_accuracy() -> None:
    page = Page(render_html_report(report(row(accuracy=None, agreement=0.97))))
    assert "1 file on A CPU" in page.words
    assert page.table(7)[0][4] == "97.00%"
    assert page.table(18)[0][10] == "-"
    assert "Agreement against latency" in page.words
    assert "Accuracy against latency" not in page.words


def test_describes_the_machine() -> None:
    words = Page(render_html_report(report(row(), gpus=("GPU 1", "GPU 2")))).words
    for text in ("A CPU", "2 of 4 CPUs, at 3,000 MHz", "GPU 1, GPU 2", "Linux", "Python 3.11, numpy 2.4"):
        assert text in words, text


def test_the_page_is_self_contained(text: str) -> None:
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {
        "script", "link", "iframe", "object", "embed", "base", "form", "img", "image",
    }  # fmt: skip
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "src" for name in attributes), tag
        if reference := attributes.get("href") or attributes.get("xlink:href"):
            assert reference.removeprefix("#") in ids
    assert len(page.all("figure")) == 4
    assert set(re.findall(r"https?:[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"url\(.", text)) <= {"url(#"}
    for word in ("@import", "javascript:", "<?xml", "<!DOCTYPE svg"):
        assert word not in text
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in str(page.all("meta"))


@pytest.mark.parametrize("count", [1, 9])
def test_names_are_escaped(count: int) -> None:
    """Check every place that shows a name; with few files also the labels of the points of a plot."""
    named = {"backend": HOSTILE, "provider": HOSTILE, "precision": HOSTILE}
    rows = [row(file=f"<b>{number}" if count == 1 else f"{number} {HOSTILE}", **named) for number in range(count)]
    machine = {"cpu": HOSTILE, "gpus": (HOSTILE,), "system": HOSTILE, "python": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    hostile = msgspec.structs.replace(report(*rows, **machine), data=HOSTILE)
    text = render_html_report(hostile)
    page = Page(text)
    assert page.all("script") == []
    assert len(page.all("b")) == (1 if count == 1 else 10)  # the machine, and the numbers in the legend of many files
    assert "<script" not in text
    assert page.words.count(HOSTILE) >= 10
    assert "49" not in page.words.replace("{{ 7 * 7 }}", "")
    if count == 1:
        assert page.words.count("<b>0") == 4  # overview, legend, point of the plot, table


def test_unprintable_characters_in_names_are_replaced() -> None:
    text = render_html_report(report(row(file="a\udcff\x00\x1b\u202e.onnx", provider="\ud800")))
    assert text.encode("utf-8").count("a����.onnx".encode()) == 4
    assert "\x00" not in text


def test_the_page_is_reproducible(text: str) -> None:
    assert render_html_report(SEVERAL) == text
