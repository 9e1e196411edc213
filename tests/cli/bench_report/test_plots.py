"""Plots are reproducible and self-contained, mark unstable rows, and have no overlapping labels."""

import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageColor

from cifarx.bench_report.plots import PNG_WIDTH, Plot, file_series, legend_swatches, render_plots, write_png
from cifarx_serve.system.terminal import printable
from tests.support.benchmark_reports import report, row

HOSTILE = ("$\\frac{$.onnx", "_hidden.onnx", "<b>&]]>--.onnx", "模型.onnx", "two\nlines\x00\udcff.onnx", "%s {x} .onnx")

SEVERAL = report(
    *(
        row(file=file, batch=batch, p50_us=100 * batch, p90_us=120 * batch, p99_us=190 * batch)
        for batch in (1, 8, 64)
        for file in ("a.onnx", "b.pth")
    )
)


@pytest.fixture(scope="module")
def plots() -> tuple[Plot, ...]:
    return render_plots(SEVERAL)


def plot(plots: tuple[Plot, ...], title: str) -> Plot:
    return next(one for one in plots if one.title.startswith(title))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]


def hollow_markers(svg: str) -> int:
    """Count the markers with a white fill; a marker is a `use` element with its own colors."""
    return sum(
        element.tag.endswith("use") and "fill: #ffffff" in element.attrib.get("style", "")
        for element in ET.fromstring(svg).iter()
    )


def test_draws_four_plots_with_units_and_one_line_per_file(plots: tuple[Plot, ...]) -> None:
    words = {one.title: texts(one.svg) for one in plots}
    assert list(words) == [
        "Latency by batch size", "Throughput by batch size", "Distribution of latency", "Accuracy against latency",
    ]  # fmt: skip
    latency, throughput, distribution, accuracy = words.values()
    assert {"1", "8", "64", "100 µs", "10 ms", "batch size, images"} <= set(latency)
    assert {"1", "8", "64", "10,000", "images per second", "batch size, images"} <= set(throughput)
    assert {"batch 1", "batch 64", "50", "90", "99", "max", "percentile", "100 µs"} <= set(distribution)
    assert {"a.onnx", "b.pth", "accuracy", "75.00%", "p50 latency at batch 1"} <= set(accuracy)
    for one in plots:
        for series in file_series(SEVERAL):
            assert f"stroke: {series.color.lower()}" in one.svg, one.title


def test_each_svg_refers_only_to_its_own_ids(plots: tuple[Plot, ...]) -> None:
    ids: list[str] = []
    for svg in (*(one.svg for one in plots), *legend_swatches(SEVERAL)):
        found = list(ET.fromstring(svg).iter())
        own = [element.attrib["id"] for element in found if "id" in element.attrib]
        referred = [
            value.partition("#")[2].rstrip(")")
            for element in found
            for name, value in element.attrib.items()
            if name.endswith("href") or "url(" in value
        ]
        assert referred
        assert set(referred) <= set(own)
        assert not {element.tag.rpartition("}")[2] for element in found} & {"style", "metadata", "image", "script"}
        assert svg.count("http") == 1  # the namespace
        ids += own
    assert len(set(ids)) == len(ids)
    assert {"swatch-1", "swatch-2"} <= set(ids)


def test_plots_do_not_depend_on_the_settings_of_matplotlib(plots: tuple[Plot, ...], tmp_path: Path) -> None:
    write_png(SEVERAL, tmp_path / "one.png")
    with matplotlib.rc_context(
        {"svg.fonttype": "path", "font.size": 30, "xtick.direction": "in", "svg.hashsalt": None}
    ):
        before = dict(matplotlib.rcParams)
        assert render_plots(SEVERAL) == plots
        write_png(SEVERAL, tmp_path / "two.png")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_markers_of_unstable_rows_are_hollow(plots: tuple[Plot, ...]) -> None:
    def hollow(*stable: bool) -> dict[str, int]:
        rows = [row(batch=batch, stable=one) for batch, one in zip((1, 8), stable, strict=True)]
        return {one.title: hollow_markers(one.svg) for one in render_plots(report(*rows))}

    assert {hollow_markers(one.svg) for one in plots} == {0}
    # A batch size has one marker in each plot, but three in the distribution; accuracy is shown at batch 1 alone.
    assert list(hollow(False, True).values()) == [1, 1, 3, 1]
    assert list(hollow(True, False).values()) == [1, 1, 3, 0]


def test_shows_agreement_if_there_is_no_accuracy() -> None:
    found = plot(render_plots(report(row(accuracy=None, agreement=0.9))), "Agreement against latency")
    assert {"agreement with the first file", "90.00%"} <= set(texts(found.svg))
    assert "accuracy" not in texts(found.svg)


@pytest.mark.parametrize(("scale", "spread"), [(1e-4, 1.0), (99.9, 1.01), (1e7, 1e5)])
def test_an_axis_has_at_least_two_marks_for_any_range_of_values(scale: float, spread: float) -> None:
    values = tuple(np.geomspace(scale, scale * spread, 101).tolist())
    one = row(
        percentiles_us=values, p50_us=values[50], p90_us=values[90], p99_us=values[99], images_per_s=1e6 / values[50]
    )
    for found in render_plots(report(one))[:3]:
        marks = [
            element.attrib["id"]
            for element in ET.fromstring(found.svg).iter()
            if "ytick" in element.attrib.get("id", "")
        ]
        assert 2 <= len(marks) <= 11, found.title


def test_labels_do_not_overlap_even_if_all_files_are_alike() -> None:
    alike = report(*(row(file=f"{number}.onnx") for number in range(12)))
    svg = plot(render_plots(alike), "Accuracy").svg
    labels = {f"{number}" for number in range(1, 13)}
    places = [
        (float(element.attrib["x"]), float(element.attrib["y"]))
        for element in ET.fromstring(svg).iter()
        if element.text in labels
    ]
    assert len(places) == 12
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(x - other_x) >= 5 or abs(y - other_y) >= 9


def test_styles_are_distinct_and_labels_are_numbers_if_names_are_too_long() -> None:
    many = file_series(report(*(row(file=f"{number}.onnx") for number in range(40))))
    assert len({(one.color, one.marker, one.dash) for one in many}) == 40
    assert [one.label for one in many[:2]] == ["1", "2"]
    assert [one.label for one in file_series(report(row(file="a.onnx"), row(file="b.onnx")))] == ["a.onnx", "b.onnx"]
    assert [one.label for one in file_series(report(row(file="a.onnx"), row(file="b" * 30)))] == ["1", "2"]


def test_a_file_measured_twice_has_two_series() -> None:
    twice = file_series(report(*(row(batch=batch, p50_us=p50) for batch in (8, 1) for p50 in (100, 105))))
    assert [[(one.batch, one.p50_us) for one in series.rows] for series in twice] == [
        [(1, 100), (8, 100)], [(1, 105), (8, 105)],
    ]  # fmt: skip


def test_the_png_shows_every_file_and_grows_with_their_number(tmp_path: Path) -> None:
    def picture(count: int) -> Image.Image:
        path = tmp_path / f"{count}.png"
        rows = [row(file=f"{'long' * 20}{number}.onnx", p50_us=100 + 50 * number) for number in range(count)]
        write_png(report(*rows), path)
        with Image.open(path) as image:
            assert image.format == "PNG"
            return image.convert("RGB")

    one, seven = picture(1), picture(7)
    assert one.width == seven.width == PNG_WIDTH
    assert seven.height == pytest.approx(one.height + 6 * 0.19 * 150, abs=2)  # lines of the legend
    shown = {color for _, color in seven.getcolors(seven.width * seven.height) or []}
    for series in file_series(report(*(row(file=f"{number}") for number in range(7)))):
        assert ImageColor.getrgb(series.color) in shown, series.color


def test_names_are_drawn_as_plain_text(tmp_path: Path) -> None:
    """No formulas, no markup, no characters that XML cannot hold, and no warning about missing glyphs."""
    hostile = report(*(row(file=name) for name in HOSTILE))
    shown = texts(plot(render_plots(hostile), "Accuracy").svg)
    for name in HOSTILE:
        assert printable(name) in shown
    assert "two�lines��.onnx" in shown
    write_png(hostile, tmp_path / "hostile.png")
    with Image.open(tmp_path / "hostile.png") as image:
        assert image.width == PNG_WIDTH
