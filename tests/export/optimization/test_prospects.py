import pytest

from cifarx_export.optimization.candidates import BASELINE, Candidate
from cifarx_export.optimization.prospects import why_hopeless
from cifarx_export.optimization.requirement import parse_requirement
from cifarx_export.optimization.results import CandidateResult
from tests.support.optimization import left_out, proved

BASE = proved("onnx fp32", 1.0, size_bytes=8_100_000)


def _reason(
    name: str, *results: CandidateResult, require: str = "", prefer: str = "latency", weights: int = 8_000_000
) -> str | None:
    format_, precision, *tuned = name.split()
    candidate = Candidate(format_, precision, bool(tuned))  # type: ignore[arg-type]
    return why_hopeless(candidate, results, parse_requirement(require), prefer, weights)  # type: ignore[arg-type]


def test_nothing_is_known_at_the_start() -> None:
    for name in ("onnx fp32", "openvino fp32", "onnx int8", "openvino bf16"):
        assert _reason(name, BASE) is None


def test_a_format_that_was_refused_in_fp32_is_not_tried_in_other_precisions() -> None:
    refused = left_out("openvino fp32", "refused", "an operator is not supported")
    assert _reason("openvino int8", BASE, refused) == "as openvino fp32"
    assert _reason("onnx int8", BASE, refused) is None
    failed = left_out("openvino fp32", "failed", "tolerance")
    assert _reason("openvino int8", BASE, failed) is None


def test_a_missing_package_concerns_all_precisions_and_another_reason_only_its_own() -> None:
    missing = left_out("openvino bf16", "refused", 'OpenVINO is not installed: pip install "cifarx[openvino]"')
    assert _reason("openvino fp32", BASE, missing) == "as openvino bf16"
    unsupported = left_out("openvino int8", "refused", "there are no images to calibrate on")
    assert _reason("openvino fp32", BASE, unsupported) is None


def test_a_format_whose_fp32_lost_by_far_is_not_tried_in_other_precisions() -> None:
    slow, fast = proved("torchscript fp32", 0.4), proved("openvino int8", 3.0)
    assert _reason("torchscript bf16", BASE, slow) is None
    assert "gains a factor of 2.5 at most" in str(_reason("torchscript bf16", BASE, slow, fast))
    assert _reason("torchscript int8", BASE, proved("torchscript fp32", 0.7), fast) is None
    assert _reason("torchscript bf16", BASE, slow, fast, prefer="size", weights=0) is None


def test_a_fast_candidate_that_misses_the_requirement_rules_nothing_out() -> None:
    slow, fast = proved("torchscript fp32", 0.4), proved("openvino int8", 3.0, accuracy_drop=0.02)
    assert _reason("torchscript bf16", BASE, slow, fast, require="accuracy_drop<=0.5") is None


@pytest.mark.parametrize(("name", "hopeless"), [("openvino fp32", True), ("openvino bf16", True), ("onnx int8", False)])
def test_the_weights_bound_the_size_of_the_file(name: str, hopeless: bool) -> None:
    reason = _reason(name, BASE, require="size<3MB")
    assert (reason is not None) == hopeless
    assert reason is None or "and size<3MB is required" in reason


def test_a_file_larger_than_the_smallest_so_far_is_not_made_if_the_size_matters() -> None:
    small = proved("onnx int8", 1.0, size_bytes=2_100_000)
    assert "more than the smallest" in str(_reason("pt2 fp32", BASE, small, prefer="size"))
    assert _reason("openvino int8", BASE, small, prefer="size") is None
    assert _reason("pt2 fp32", BASE, small, prefer="size", weights=0) is None


def test_fp16_is_made_only_where_the_size_matters() -> None:
    assert "not faster" in str(_reason("onnx fp16", BASE))
    assert _reason("onnx fp16", BASE, prefer="size") is None
    assert _reason("onnx fp16", BASE, require="size<9MB") is None


def test_the_baseline_is_always_made() -> None:
    assert why_hopeless(BASELINE, (), parse_requirement("size<1kb"), "size", 8_000_000) is None


def test_weights_are_fine_tuned_only_where_int8_lost_too_much() -> None:
    good, lossy = proved("onnx int8", 2.0), proved("onnx int8", 2.0, accuracy_drop=0.01)
    failed = left_out("onnx int8", "failed", "agreement: 98.2%")
    refused = left_out("onnx int8", "refused", "there are no images to calibrate on")
    assert _reason("onnx int8 tuned", BASE, failed) is None
    assert _reason("onnx int8 tuned", BASE, good) == "onnx int8 keeps its answers without it"
    assert "keeps its answers" in str(_reason("onnx int8 tuned", BASE, lossy))
    assert _reason("onnx int8 tuned", BASE, lossy, require="accuracy_drop<=0.5") is None
    assert "keeps its answers" in str(_reason("onnx int8 tuned", BASE, lossy, require="p99<1us"))
    assert _reason("onnx int8 tuned", BASE, refused) == "as without fine-tuning"
    assert _reason("onnx int8 tuned", BASE) == "as without fine-tuning"


PRUNED = proved("onnx fp32", 1.5, pruned=0.3, accuracy_drop=0.03, agreement=0.9)
PRUNED_INT8 = Candidate("onnx", "int8", pruned=0.3)


def test_what_pruning_lost_in_fp32_no_lower_precision_of_it_regains() -> None:
    def reason(require: str, *results: CandidateResult) -> str | None:
        return why_hopeless(PRUNED_INT8, results, parse_requirement(require), "latency", 8_000_000)

    assert reason("accuracy_drop<=2", BASE, PRUNED) == "onnx fp32 pruned 30% misses accuracy_drop<=2"
    assert reason("accuracy_drop<=4, agreement>=85%", BASE, PRUNED) is None
    assert reason("p99<1us", BASE, PRUNED) is None
    other_share = proved("onnx fp32", 1.5, pruned=0.5, accuracy_drop=0.03)
    assert reason("accuracy_drop<=2", BASE, other_share) is None


def test_a_network_that_cannot_be_pruned_is_refused_once_and_with_all_channels_not_at_all() -> None:
    refused = CandidateResult(format="onnx", precision="fp32", pruned=0.3, outcome="refused", reason="cannot be pruned")
    assert why_hopeless(PRUNED_INT8, [BASE, refused], (), "latency", 0) == "as onnx fp32 pruned 30%"
    assert why_hopeless(Candidate("onnx", "int8"), [BASE, refused], (), "latency", 0) is None


def test_the_size_of_a_pruned_file_is_not_known_before() -> None:
    bound = parse_requirement("size<3MB")
    assert why_hopeless(Candidate("openvino", "fp32", pruned=0.5), [BASE], bound, "latency", 8_000_000) is None
