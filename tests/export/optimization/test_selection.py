import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_export.optimization.candidates import Candidate
from cifarx_export.optimization.requirement import explain_no_pick, meets, parse_requirement
from cifarx_export.optimization.results import CandidateResult
from cifarx_export.optimization.selection import TIE, choose, choose_pruned, explain_pick, merit, pareto_front
from cifarx_serve.errors import UsageError
from tests.support.optimization import left_out, measurement, proved

BASE = proved("onnx fp32", 1.0)
SMALL = proved("openvino bf16", 1.8, agreement=0.998, accuracy_drop=0.001, size_bytes=900_000)
FAST = proved("openvino int8", 3.0, agreement=0.991, accuracy_drop=0.006, size_bytes=300_000)
SLOW = proved("torchscript fp32", 0.4)
FAILED = left_out("onnx int8", "failed", "agreement")
UNMEASURED = proved("pt2 fp32")
ALL = (BASE, SMALL, FAST, SLOW, FAILED, UNMEASURED)


def test_the_front_has_what_nothing_surpasses_in_speed_and_agreement() -> None:
    assert pareto_front(ALL, "latency") == [BASE, SMALL, FAST]
    assert pareto_front([FAILED, UNMEASURED], "latency") == []
    twins = [proved("onnx fp32", 1.0), proved("pt2 fp32", 1.0)]
    assert pareto_front(twins, "latency") == twins


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.9, 1)), min_size=1, max_size=12))
def test_whatever_is_not_on_the_front_is_surpassed_by_something_on_it(values: list[tuple[float, float]]) -> None:
    results = [proved("onnx fp32", speed, agreement=agreement) for speed, agreement in values]
    front = pareto_front(results, "latency")
    assert front
    for result in results:
        agreement = result.agreement or 0
        assert any(
            merit(one, "latency") >= merit(result, "latency") and (one.agreement or 0) >= agreement for one in front
        )


@pytest.mark.parametrize(
    ("require", "prefer", "expected"),
    [
        ("", "latency", FAST),
        ("accuracy_drop<=0.5", "latency", SMALL),
        ("accuracy_drop<=0.5, agreement>=100%", "latency", BASE),
        ("p99<600us", "latency", FAST),
        ("", "size", FAST),
        ("agreement>=99.5%", "size", SMALL),
        ("", "throughput", FAST),
        ("accuracy>=80%", "latency", None),
    ],
)
def test_the_pick_is_the_best_that_meets_the_requirement(
    require: str, prefer: str, expected: CandidateResult | None
) -> None:
    assert choose(ALL, parse_requirement(require), prefer) == expected  # type: ignore[arg-type]


def test_of_equally_fast_candidates_the_one_closest_to_the_network_is_the_pick() -> None:
    rival = proved("openvino fp32", 3.0 * (1 - TIE / 2))
    assert choose([*ALL, rival], (), "latency") == rival
    slower = proved("openvino fp32", 3.0 * (1 - 2 * TIE))
    assert choose([*ALL, slower], (), "latency") == FAST
    assert "within 3% of the fastest" in explain_pick(rival, [*ALL, rival], (), "latency", BASE.name)


def test_the_reason_names_speed_fidelity_and_requirement() -> None:
    requirement = parse_requirement("accuracy_drop<=1")
    assert explain_pick(FAST, ALL, requirement, "latency", BASE.name) == (
        "3.00 times as fast as onnx fp32 at batch 1 in 2 threads, 3.00 times in one; agreement 99.10%, accuracy -0.60 "
        "points; the fastest of 4 candidates that meet accuracy_drop<=1"
    )
    on_one_cpu = proved("onnx fp32", 1.0, measurement=measurement(1.0, one_thread=None))
    assert "at batch 1; agreement" in explain_pick(on_one_cpu, [on_one_cpu], (), "latency", "pt2 fp32")
    assert explain_pick(BASE, [BASE], (), "latency", BASE.name) == (
        "the baseline itself; agreement 100.00%, accuracy +0.00 points; the fastest of 1 candidate"
    )
    assert explain_pick(FAST, ALL, (), "size", BASE.name).startswith("0.30 MB; ")
    assert "times the throughput" in explain_pick(FAST, ALL, (), "throughput", BASE.name)


def test_says_how_near_the_nearest_candidate_is() -> None:
    assert explain_no_pick(ALL, parse_requirement("p99<0.1ms")) == (
        "no candidate meets p99<0.1ms (the best is 500 µs, openvino int8)"
    )
    assert explain_no_pick([FAILED], parse_requirement("p99<0.1ms")) == "no candidate was measured"


def test_a_candidate_that_was_not_measured_meets_nothing() -> None:
    assert not meets((), UNMEASURED)
    assert not meets((), FAILED)
    assert meets((), BASE)


def test_a_candidate_with_a_large_tail_does_not_meet_a_bound_on_it() -> None:
    slow_tail = proved("onnx fp32", 1.0, measurement=measurement(1.0))
    assert not meets(parse_requirement("p99<1.5ms"), slow_tail)
    assert meets(parse_requirement("p99<=1.5ms"), slow_tail)


@pytest.mark.parametrize("text", ["p99>2ms", "speed<3", "accuracy_drop<1ms"])
def test_invalid_requirements_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        parse_requirement(text)


def test_channels_are_pruned_in_the_format_that_is_the_best_so_far() -> None:
    def names(require: str, *results: CandidateResult) -> list[str]:
        return [one.name for one in choose_pruned(results, parse_requirement(require), "latency", 0.3)]

    openvino = ["openvino fp32 pruned 30%", "openvino bf16 pruned 30%", "openvino int8 pruned 30%"]
    assert names("", *ALL) == openvino
    assert names("agreement>=99.9%", *ALL) == ["onnx fp32 pruned 30%"]  # int8 failed with all channels
    assert names("p99<1us", *ALL) == openvino
    assert names("") == names("", FAILED, UNMEASURED) == []


def test_pruning_decides_only_with_its_speed() -> None:
    pruned = proved("openvino int8", 3.05, pruned=0.3, agreement=0.9)
    assert choose([*ALL, pruned], (), "latency") == FAST
    assert choose([*ALL, proved("openvino int8", 4.0, pruned=0.3, agreement=0.9)], (), "latency") != FAST


def test_a_pruned_candidate_is_another_one() -> None:
    assert proved("onnx fp32", pruned=0.3).candidate == Candidate("onnx", "fp32", pruned=0.3) != BASE.candidate
