from pathlib import Path

import msgspec
import pytest

from cifarx_export.optimization.candidates import Candidate
from cifarx_export.optimization.requirement import parse_requirement
from cifarx_export.optimization.results import CandidateResult, Measurement
from cifarx_export.optimization.search import Goal, OutOfTime, Search, TimeLimit
from cifarx_export.optimization.study import DOCUMENT, Study, StudyIdentity
from cifarx_serve.errors import CifarxError, ModelFileError, OutputError, UsageError
from cifarx_serve.progress import silent
from cifarx_train.checkpoints.checkpoint import file_sha256
from tests.support.optimization import left_out, measurement, proved

ONNX, OPENVINO, INT8 = Candidate("onnx", "fp32"), Candidate("openvino", "fp32"), Candidate("openvino", "int8")
IDENTITY = StudyIdentity(checkpoint="a", spec="b", data="c", cpu="a CPU", threads=2, version="1")


class Work:
    """Work that takes no time: every candidate is twice as fast as the one before, unless it is to raise an error."""

    def __init__(self, folder: Path, **errors: BaseException) -> None:
        self.folder = folder
        self.errors = errors
        self.done: list[str] = []

    def prove(self, candidate: Candidate) -> CandidateResult:
        self._do(f"prove {candidate.name}")
        file = self.folder / f"{candidate.name}.bin"
        file.write_text(candidate.name)
        return proved(candidate.name, file=file.name, sha256=file_sha256(file))

    def measure(self, result: CandidateResult, baseline: CandidateResult | None) -> Measurement:
        self._do(f"measure {result.name}")
        assert baseline is None or baseline.is_measured
        return measurement(2.0 ** len([step for step in self.done if step.startswith("measure")]) / 2)

    def _do(self, step: str) -> None:
        self.done.append(step)
        if error := self.errors.get(step.replace(" ", "_")):
            raise error


def _search(work: Work, limit: TimeLimit | None = None, lines: list[str] | None = None) -> Search:
    progress = silent if lines is None else lines.append
    study = Study(work.folder, IDENTITY, progress)
    goal = Goal(parse_requirement(""), "latency")
    search = Search(study, goal, work.prove, work.measure, limit or TimeLimit(60), progress)
    search.run([ONNX, OPENVINO, INT8])
    return search


def test_each_candidate_is_proved_and_measured_once(tmp_path: Path) -> None:
    work = Work(tmp_path)
    search = _search(work)
    assert [step for step in work.done if step.startswith("prove")] == [
        "prove onnx fp32", "prove openvino fp32", "prove openvino int8"
    ]  # fmt: skip
    assert all(result.is_measured for result in search.results)
    assert search.baseline == search.results[0]
    assert search.stopped is None
    again = Work(tmp_path)
    assert _search(again).results == search.results
    assert again.done == []


@pytest.mark.parametrize(
    "step", ["prove_onnx_fp32", "measure_onnx_fp32", "prove_openvino_int8", "measure_openvino_int8"]
)
def test_a_search_that_was_killed_goes_on_where_it_was(tmp_path: Path, step: str) -> None:
    class Killed(BaseException):
        pass

    first = Work(tmp_path, **{step: Killed()})
    with pytest.raises(Killed):
        _search(first)
    second, lines = Work(tmp_path), list[str]()
    search = _search(second, lines=lines)
    assert all(result.is_measured for result in search.results)
    completed = first.done[:-1]
    assert not set(completed) & set(second.done)
    assert {*completed, *second.done} == {
        f"{verb} {one.name}" for verb in ("prove", "measure") for one in (ONNX, OPENVINO, INT8)
    }
    assert bool(completed) == any("going on with" in line for line in lines)


@pytest.mark.parametrize(("stopped", "words"), [("interrupt", "interrupted"), ("time", "the time was over")])
@pytest.mark.parametrize("step", ["prove openvino fp32", "measure openvino fp32"])
def test_the_search_ends_with_what_it_has(tmp_path: Path, stopped: str, words: str, step: str) -> None:
    limit = TimeLimit(60)

    class Ending(Work):
        def _do(self, name: str) -> None:
            super()._do(name)
            if name == step and stopped == "interrupt":
                raise KeyboardInterrupt
            if name == step:
                limit._end = 0
                limit.check()

    search = _search(Ending(tmp_path), limit)
    assert search.stopped == stopped
    onnx, openvino, int8 = search.results
    assert onnx.is_measured
    assert openvino.outcome == ("not tried" if step.startswith("prove") else "proved")
    assert (int8.outcome, words in int8.reason, words in openvino.reason) == ("not tried", True, True)
    assert all(result.is_measured for result in _search(Work(tmp_path)).results)


def test_results_of_the_study_need_no_time(tmp_path: Path) -> None:
    complete = _search(Work(tmp_path)).results
    assert _search(Work(tmp_path), TimeLimit(0)).results == complete


def test_an_error_keeps_only_its_candidate_out(tmp_path: Path) -> None:
    work = Work(
        tmp_path,
        prove_openvino_fp32=UsageError("OpenVINO is not installed", 'pip install "cifarx[openvino]"'),
    )
    search = _search(work)
    assert [result.outcome for result in search.results] == ["proved", "refused", "skipped"]
    assert "pip install" in search.results[1].reason
    assert search.results[2].reason == "as openvino fp32"
    installed = _search(Work(tmp_path))
    assert all(result.is_measured for result in installed.results)


@pytest.mark.parametrize("error", [RuntimeError("a bug of a library"), ModelFileError("it does not run", "export it")])
def test_any_error_of_a_runtime_is_the_reason(tmp_path: Path, error: Exception) -> None:
    search = _search(Work(tmp_path, prove_openvino_int8=error))
    assert search.results[2].outcome == "refused"
    assert str(error).partition(":")[0] in search.results[2].reason


def test_a_candidate_that_cannot_be_measured_is_measured_in_the_next_run(tmp_path: Path) -> None:
    search = _search(Work(tmp_path, measure_openvino_int8=ModelFileError("the process ended", "check the memory")))
    assert (search.results[2].outcome, search.results[2].is_measured) == ("proved", False)
    assert "the process ended" in search.results[2].reason
    again = Work(tmp_path)
    assert _search(again).results[2].is_measured
    assert again.done == ["measure openvino int8"]


@pytest.mark.parametrize("step", ["prove_openvino_fp32", "measure_openvino_fp32"])
def test_a_full_disk_ends_the_search(tmp_path: Path, step: str) -> None:
    error: CifarxError = OutputError("cannot write", "free some space")
    with pytest.raises(OutputError):
        _search(Work(tmp_path, **{step: error}))


def test_a_failed_candidate_is_not_tried_again(tmp_path: Path) -> None:
    work = Work(tmp_path)
    failed = left_out("openvino int8", "failed", "agreement: 98.20%")
    prove = work.prove
    work.prove = lambda candidate: failed if candidate == INT8 else prove(candidate)  # type: ignore[method-assign]
    assert _search(work).results[2] == failed
    again = Work(tmp_path)
    assert _search(again).results[2] == failed
    assert again.done == []


def test_work_ends_at_its_next_line_of_progress_when_the_time_is_over() -> None:
    lines: list[str] = []
    over = TimeLimit(0)
    over.checking(lines.append)("before the search")
    with pytest.raises(OutOfTime), over.enforced():
        over.checking(lines.append)("in the search")
    over.checking(lines.append)("after the search")
    in_time = TimeLimit(60)
    with in_time.enforced():
        in_time.checking(lines.append)("in time")
    assert lines == ["before the search", "after the search", "in time"]


def test_the_document_is_complete_after_every_step(tmp_path: Path) -> None:
    _search(Work(tmp_path))
    document = msgspec.json.decode((tmp_path / DOCUMENT).read_bytes())
    assert [entry["format"] for entry in document["results"]] == ["onnx", "openvino", "openvino"]
    assert [path.name for path in tmp_path.glob(".*")] == []
