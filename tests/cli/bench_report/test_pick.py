import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx.bench_report.pick import describe_pick, explain_no_pick, parse_bounds, pick
from cifarx_serve.errors import UsageError
from tests.support.benchmark_reports import row

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
def test_picks_the_highest_throughput_within_the_bounds(text: str, file: str, batch: int) -> None:
    found = pick(ROWS, parse_bounds(text))
    assert found is not None
    assert (found.file, found.batch) == (file, batch)


def test_a_strict_bound_excludes_its_own_value() -> None:
    assert pick(ROWS[1:2], parse_bounds("p99<=900us")) is not None
    assert pick(ROWS[1:2], parse_bounds("p99<900us")) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("p99<1us", "no row meets p99<1us (the best is 900 µs, fast.int8.onnx at batch 1)"),
        ("accuracy>90%", "the best is 80.00%, slow.pth at batch 1"),
        ("size<1kb", "the best is 0.6 MB"),
        ("p99<1ms, accuracy>=80%", "no row meets p99<1ms and accuracy>=80% together"),
    ],
)
def test_explains_why_no_row_was_picked(text: str, words: str) -> None:
    bounds = parse_bounds(text)
    assert pick(ROWS, bounds) is None
    assert words in explain_no_pick(ROWS, bounds)


def test_a_row_without_accuracy_meets_no_bound_on_it() -> None:
    unlabeled = [row(accuracy=None)]
    bounds = parse_bounds("accuracy>0%")
    assert pick(unlabeled, bounds) is None
    assert "no labels" in explain_no_pick(unlabeled, bounds)


def test_describes_the_picked_row() -> None:
    line = describe_pick(ROWS[3])
    assert all(part in line for part in ("fast.onnx", "onnxruntime", "CPUExecutionProvider", "batch 64", "20,000"))
    assert "not stable" in line
    assert "not stable" not in describe_pick(ROWS[0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "use p50, p90, p99"),
        ("p99", "use p50"),
        ("p98<2ms", "use p50"),
        ("p99<2", "give p99 in us or µs or ms or s"),
        ("p99<2 mb", "give p99 in"),
        ("p99>2ms", "asks for higher values, which are worse: reverse the >"),
        ("accuracy<50%", "asks for lower values, which are worse: reverse the <"),
        ("accuracy>57", "give a fraction up to 1, or 57%"),
        ("accuracy>101%", "more than 100 %"),
        ("p99<-2ms", "use p50"),
        ("p99<2ms,", "bound ''"),
        ("p99<1e3us", "use p50"),
        ("p99<nanms", "use p50"),
        ("__import__('os')<2ms", "use p50"),
    ],
)
def test_invalid_bounds_are_usage_errors(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_bounds(text)
    assert words in str(raised.value)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_a_usage_error(text: str) -> None:
    try:
        bounds = parse_bounds(text)
    except UsageError:
        return
    assert all(bound.limit >= 0 for bound in bounds)


@given(st.integers(1, 10**6), st.sampled_from([("us", 1), ("µs", 1), ("ms", 1000), ("s", 10**6)]))
def test_time_limits_are_in_microseconds(number: int, unit: tuple[str, int]) -> None:
    [bound] = parse_bounds(f"p50 <= {number}{unit[0]}")
    assert bound.limit == number * unit[1]
    assert bound.holds(row(p50_us=number * unit[1]))
    assert not bound.holds(row(p50_us=number * unit[1] * 1.001))
