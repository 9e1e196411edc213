import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cifarx_export.exporter import Exporter, open_exporter
from cifarx_export.optimization.candidates import BASELINE, Candidate
from cifarx_export.optimization.results import CandidateResult
from cifarx_export.optimization.study import FINE_TUNED, Study, StudyIdentity
from cifarx_export.optimization.workbench import Workbench
from cifarx_serve.backends.registry import read_spec
from cifarx_serve.progress import silent
from cifarx_train.models.options import NO_OPTIONS
from tests.support.optimization import proved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TUNED = Candidate("onnx", "int8", fine_tuned=True)


@pytest.fixture
def open_workbench(tmp_path: Path) -> Callable[[Path], Workbench]:
    """Copy a network into the current folder, and return a workbench for it with an empty study."""

    def open_one(network: Path) -> Workbench:
        path = Path(shutil.copy(network, tmp_path / network.name))
        exporter: Exporter = open_exporter(path, NO_OPTIONS, tmp_path, data="builtin")
        directory = tmp_path / "study"
        directory.mkdir(exist_ok=True)
        identity = StudyIdentity(checkpoint="a", spec="b", data="c", cpu="a CPU", threads=2, version="1")
        study = Study(directory, identity, silent)
        study.record(proved("onnx fp32", file=None))  # a search has its baseline first
        return Workbench(exporter, study, path, 60.0, silent)

    return open_one


def test_fine_tuned_weights_are_made_once_and_proved_against_the_original(
    checkpoint: Path, open_workbench: Callable[[Path], Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifarx_train.quantization_aware.fine_tune_for_int8.__kwdefaults__", {
        "steps": 3, "seconds": 60.0, "progress": silent
    })  # fmt: skip
    found = open_workbench(checkpoint).prove(TUNED)
    assert found.fine_tuned
    assert found.agreement is not None
    assert found.agreement > 0.8  # of a network trained for one epoch; three steps of fine-tuning
    weights = Path("study", FINE_TUNED)
    made = weights.stat().st_mtime_ns
    if found.outcome == "proved":
        assert found.file == f"{checkpoint.stem}.tuned.int8.onnx"
        spec = read_spec(Path("study", found.file))
        assert spec.weights_sha256 is None
        assert "by distillation from the network, 3 steps" in (spec.exporter or {})["fine-tuned"]
    again = open_workbench(checkpoint).prove(TUNED)
    assert again.agreement == found.agreement
    assert weights.stat().st_mtime_ns == made


def test_a_pruned_network_is_its_own_reference_and_is_judged_against_the_original(
    checkpoint: Path, open_workbench: Callable[[Path], Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifarx_train.pruning.fine_tune_pruned.__kwdefaults__", {
        "steps": 5, "seconds": 60.0, "progress": silent
    })  # fmt: skip
    candidate = BASELINE._replace(pruned=0.5)
    workbench = open_workbench(checkpoint)
    found = workbench.prove(candidate)
    assert found.outcome == "proved", found.reason
    assert found.file == f"{checkpoint.stem}.pruned50.onnx"
    _check_pruned(found)
    made = Path("study", "pruned50.pth").stat().st_mtime_ns

    resumed = open_workbench(checkpoint)
    again = resumed.prove(candidate)
    assert Path("study", "pruned50.pth").stat().st_mtime_ns == made
    assert (again.agreement, again.weights_sha256) == (found.agreement, found.weights_sha256)
    picked = read_spec(resumed.write_pick(candidate, "the fastest")).exporter or {}
    assert (picked["optimized"], picked["pruned"]) == ("the fastest", found.facts["pruned"])


def _check_pruned(found: CandidateResult) -> None:
    spec = read_spec(Path("study", str(found.file)))
    assert spec.parity is not None
    assert spec.parity.agreement == 1
    assert "compared with the pruned network, not with the original one" in spec.parity.warnings
    assert spec.weights_sha256 is None
    assert spec.training is not None
    assert spec.training.test_accuracy is None
    assert found.agreement is not None
    assert found.agreement < 0.999  # of half the channels after five steps
    assert found.weights_removed is not None
    assert 0.6 < found.weights_removed < 0.8
    fact = (spec.exporter or {})["pruned"]
    assert fact.startswith("50% of the channels, ")
    assert f"{found.weights_removed:.1%} of the weights" in fact
    assert f"agreement {found.agreement:.2%} with it" in fact
    assert found.facts["pruned"] == fact
    assert found.versions["torch-pruning"]


def test_an_onnx_file_is_its_own_baseline(good_onnx: Path, open_workbench: Callable[[Path], Workbench]) -> None:
    workbench = open_workbench(good_onnx)
    assert not workbench.has_module
    found = workbench.prove(BASELINE)
    assert (found.outcome, found.agreement, found.accuracy_drop) == ("proved", 1.0, 0.0)
    assert Path("study", str(found.file)).read_bytes() == good_onnx.read_bytes()
    assert found.accuracy == workbench.reference_accuracy()
    assert workbench.write_pick(BASELINE, "the fastest") == Path.cwd() / good_onnx.name


def test_the_pick_is_written_once_with_its_reason(
    checkpoint: Path, open_workbench: Callable[[Path], Workbench]
) -> None:
    workbench = open_workbench(checkpoint)
    path = workbench.write_pick(BASELINE, "the fastest")
    assert path.name == f"{checkpoint.stem}.optimized.onnx"
    assert (read_spec(path).exporter or {})["optimized"] == "the fastest"
    made = path.stat().st_mtime_ns
    assert workbench.write_pick(BASELINE, "the fastest") == path
    assert path.stat().st_mtime_ns == made
    workbench.write_pick(BASELINE, "another reason")
    assert (read_spec(path).exporter or {})["optimized"] == "another reason"
