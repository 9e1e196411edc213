import pytest

from cifarx_export.formats.registry import FORMATS, Format
from cifarx_export.optimization.candidates import BASELINE, TARGETS, Candidate, list_candidates, parse_targets
from cifarx_serve.errors import UsageError


def test_the_baseline_is_first_and_slow_work_is_last() -> None:
    found = list_candidates(["cpu"])
    assert found[0] == BASELINE
    assert found[1] == Candidate("openvino", "bf16")
    late = [one.format for one in found if one.format in ("aotinductor", "pt2", "torchscript")]
    assert [one.format for one in found[-len(late) :]] == late
    assert len(set(found)) == len(found)


def test_every_precision_of_every_format_for_the_cpu_is_a_candidate() -> None:
    expected = {
        Candidate(name, precision)
        for name, row in FORMATS.items()
        for precision in row.precisions
        if row.directory_suffix is None
    }
    found = list_candidates(["cpu"])
    assert {one for one in found if not one.fine_tuned} == expected
    assert {one._replace(fine_tuned=False) for one in found if one.fine_tuned} == {
        one for one in expected if one.precision == "int8"
    }


def test_a_new_format_joins_by_itself() -> None:
    new = Format("onnxruntime", ("fp32", "int8"), ("cpu",), (), "nowhere:convert")
    found = list_candidates(["cpu"], {**FORMATS, "new": new})
    assert Candidate("new", "int8") in found
    on_gpus = {**FORMATS, "new": new._replace(devices=("cuda",))}
    assert Candidate("new", "fp32") not in list_candidates(["cpu"], on_gpus)


def test_int8_is_tried_before_fp32_of_other_runtimes_but_after_it_where_fp32_decides() -> None:
    found = list_candidates(["cpu"])
    assert found.index(Candidate("openvino", "int8")) < found.index(Candidate("openvino", "fp32"))
    assert found.index(Candidate("aotinductor", "fp32")) < found.index(Candidate("aotinductor", "int8"))
    tuned = [found.index(one) for one in found if one.fine_tuned and one.format != "aotinductor"]
    assert found.index(Candidate("openvino", "int8")) < min(tuned)
    assert max(tuned) < found.index(Candidate("openvino", "fp32"))


def test_targets_are_added_up() -> None:
    edge = list_candidates(["edge"])
    assert {one.format for one in edge} <= {"onnx", "litert", "executorch"}
    assert set(list_candidates(["edge", "cpu"])) >= set(edge)
    assert parse_targets("cpu, edge,cpu") == ("cpu", "edge")
    assert parse_targets(",".join(TARGETS)) == TARGETS


@pytest.mark.parametrize(("text", "words"), [("gpu", "unknown target 'gpu'"), ("", "names no target"), (",", "cpu")])
def test_unknown_targets_are_usage_errors(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_targets(text)


def test_a_candidate_has_a_name() -> None:
    assert Candidate("onnx", "int8").name == "onnx int8"
    assert Candidate("onnx", "int8", fine_tuned=True).name == "onnx int8 tuned"
    assert Candidate("onnx", "int8", pruned=0.3).name == "onnx int8 pruned 30%"
    assert Candidate("onnx", "fp32", pruned=0.29).name == "onnx fp32 pruned 29%"
    assert Candidate("onnx", "fp32", pruned=0.125).name == "onnx fp32 pruned 12.5%"


def test_nothing_is_pruned_unless_asked() -> None:
    assert not any(one.pruned for one in list_candidates(TARGETS))
