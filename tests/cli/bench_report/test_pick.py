import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx.bench_report.pick import nothing_line, parse_bounds, pick, picked_line
from cifarx_serve.errors import UsageError
from tests.support.benchmark_rows import row

ROWS = (
    row(file="slow.pth", images_per_s=500, p99_us=5000, accuracy=0.80),
    row(file="fast.int8.onnx", images_per_s=9000, p99_us=900, accuracy=0.60),
    row(file="fast.onnx", images_per_s=5000, p99_us=1500, accuracy=0.80),
    row(file="fast.onnx", images_per_s=20000, p99_us=12_000, accuracy=0.80, batch=64, stable=False),
)


@pytest.mark.parametrize(
    ("text", "file", "batch"),
    [
        ("p99<2ms", "fast.int8.onnx", 1),
        ("p99<2ms, accuracy>=70%", "fast.onnx", 1),
        ("P99 < 2000 us", "fast.int8.onnx", 1),
        ("p99<=12000µs", "fast.onnx", 64),
        ("p99<1s,accuracy>0.6", "fast.onnx", 64),
        ("size<1MB", "fast.onnx", 64),
        ("memory<.1GB", "fast.onnx", 64),
        ("agreement>=100%", "fast.onnx", 64),
    ],
)
def test_the_most_throughput_inside_the_bounds(text: str, file: str, batch: int) -> None:
    found = pick(ROWS, parse_bounds(text))
    assert found is not None
    assert (found.file, found.batch) == (file, batch)


def test_a_strict_bound_is_not_kept_by_its_own_value() -> None:
    assert pick(ROWS[1:2], parse_bounds("p99<=900us")) is not None
    assert pick(ROWS[1:2], parse_bounds("p99<900us")) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("p99<1us", "no row keeps p99<1us (the best is 900 µs, fast.int8.onnx at batch 1)"),
        ("accuracy>90%", "the best is 80.00%, slow.pth at batch 1"),
        ("size<1kb", "the best is 0.6 MB"),
        ("p99<1ms, accuracy>=80%", "no row keeps p99<1ms and accuracy>=80% together"),
    ],
)
def test_why_nothing_was_picked(text: str, words: str) -> None:
    bounds = parse_bounds(text)
    assert pick(ROWS, bounds) is None
    assert words in nothing_line(ROWS, bounds)


def test_an_accuracy_that_was_not_measured_keeps_no_bound() -> None:
    unlabelled = [row(accuracy=None)]
    bounds = parse_bounds("accuracy>0%")
    assert pick(unlabelled, bounds) is None
    assert "no labels" in nothing_line(unlabelled, bounds)


def test_what_was_picked_in_words() -> None:
    line = picked_line(ROWS[3])
    assert all(part in line for part in ("fast.onnx", "onnxruntime", "CPUExecutionProvider", "batch 64", "20,000"))
    assert "not stable" in line
    assert "not stable" not in picked_line(ROWS[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "give p50, p90, p99"),
        ("p99", "give p50"),
        ("p98<2ms", "give p50"),
        ("p99<2", "give p99 in us or µs or ms or s"),
        ("p99<2 mb", "give p99 in"),
        ("p99>2ms", "keeps what is above"),
        ("accuracy<50%", "keeps what is below"),
        ("accuracy>57", "give a share, or 57%"),
        ("accuracy>101%", "more than all"),
        ("p99<-2ms", "give p50"),
        ("p99<2ms,", "bound ''"),
        ("p99<1e3us", "give p50"),
        ("p99<nanms", "give p50"),
        ("__import__('os')<2ms", "give p50"),
    ],
)
def test_bounds_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_bounds(text)
    assert words in str(raised.value)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        bounds = parse_bounds(text)
    except UsageError:
        return
    assert all(bound.limit >= 0 for bound in bounds)


@given(st.integers(1, 10**6), st.sampled_from([("us", 1), ("µs", 1), ("ms", 1000), ("s", 10**6)]))
def test_limits_are_in_microseconds(number: int, unit: tuple[str, int]) -> None:
    [bound] = parse_bounds(f"p50 <= {number}{unit[0]}")
    assert bound.limit == number * unit[1]
    assert bound.holds(row(p50_us=number * unit[1]))
    assert not bound.holds(row(p50_us=number * unit[1] * 1.001))
