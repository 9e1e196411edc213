import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from cifarx_serve.backends.registry import read_spec
from tests.support.command_line import Cli, CommandResult, run_program
from tests.support.trained_model import Trained

PROGRAM = Path(sys.executable).with_name("cifarx")
PATIENCE_S = 240


@pytest.fixture
def checkpoint(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained.checkpoint, tmp_path / "lzh_0.pth"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--require", "p99>2ms"], "reverse the >"),
        (["--require", "speed<2"], "use p50, p99, size"),
        (["--targets", "gpu"], "unknown target 'gpu'"),
        (["--minutes", "0"], "give a number above 0"),
        (["--prefer", "speed"], "--prefer"),
        (["--prune", "0"], "0 is no share of channels"),
        (["--prune", "30"], "give a number above 0 and at most 0.9"),
    ],
)
def test_invalid_options_are_usage_errors(cli: Cli, checkpoint: Path, arguments: list[str], words: str) -> None:
    result = cli("optimize", checkpoint, *arguments)
    assert result.status == 2
    assert words in result.error
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_missing_file_is_a_usage_error(cli: Cli) -> None:
    result = cli("optimize", "absent.pth")
    assert result.status == 2
    assert "absent.pth" in result.error


def test_an_onnx_file_cannot_be_pruned(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "net", [], [])), path)
    result = cli("optimize", path, "--prune", "0.3")
    assert result.status == 2
    assert result.error.endswith("is an ONNX file, whose channels cannot be pruned: give its checkpoint")


def test_pruning_without_its_library_names_the_extra(
    cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    result = cli("optimize", checkpoint, "--prune", "0.3")
    assert result.status == 2
    assert result.error == 'error: torch-pruning is not installed: pip install "cifarx[prune]"'


def _optimize(*arguments: object) -> CommandResult:
    return run_program(PROGRAM, "optimize", "lzh_0.pth", "--data", "builtin", "--targets", "edge", *arguments)


def _study() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path("lzh_0.optimize/study.json").read_text())
    return document


def _kill_after_the_first_candidate() -> None:
    process = subprocess.Popen(
        [PROGRAM, "optimize", "lzh_0.pth", "--data", "builtin", "--targets", "edge"], stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < end and process.poll() is None:
            if Path("lzh_0.optimize/study.json").is_file() and _study()["results"][0]["measurement"]:
                break
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("checkpoint")
def test_a_search_that_was_killed_goes_on_and_writes_a_proved_pick() -> None:
    _kill_after_the_first_candidate()
    before = _study()["results"][0]
    baseline = Path("lzh_0.optimize", before["file"])
    made = baseline.stat().st_mtime_ns

    result = _optimize("--require", "accuracy_drop<=0.5, agreement>=99%", "--json")
    assert result.status == 0, result.err
    assert "going on with" in result.err
    assert baseline.stat().st_mtime_ns == made
    report = result.json
    assert report["results"][0] == before
    assert report["baseline"] == "onnx fp32"
    assert report["pick"] in {"onnx fp32", "onnx int8", "onnx int8 tuned"}
    assert report["pick"] in report["front"]
    _check_pick(report)
    _check_later_runs(report)


def _check_pick(report: dict[str, Any]) -> None:
    picked = Path(report["file"])
    assert picked == Path("lzh_0.optimized.onnx")
    spec = read_spec(picked)
    assert spec.exporter is not None
    assert spec.exporter["optimized"] == report["reason"]
    assert spec.parity is not None
    assert spec.parity.passed
    assert Path("lzh_0.optimized.onnx.parity.json").is_file()
    assert "<svg" in Path(report["report"]).read_text()


def _check_later_runs(report: dict[str, Any]) -> None:
    picked = Path(report["file"])
    made = picked.stat().st_mtime_ns
    again = _optimize("--require", "accuracy_drop<=0.5, agreement>=99%")
    assert again.status == 0, again.err
    assert f"pick: {report['pick']}, {report['reason']}" in again.out
    assert picked.stat().st_mtime_ns == made

    impossible = _optimize("--require", "p99<1us")
    assert impossible.status == 1
    assert "no candidate meets p99<1us (the best is " in impossible.error
    assert "no pick: " in impossible.out
    assert picked.stat().st_mtime_ns == made


@pytest.mark.slow
@pytest.mark.usefixtures("checkpoint")
def test_the_search_ends_when_the_time_is_over() -> None:
    result = _optimize("--minutes", "0.001", "--json")
    assert result.status == 1
    assert result.json["stopped"] == "time"
    assert {entry["outcome"] for entry in result.json["results"]} <= {"not tried", "skipped"}
    assert "no candidate was measured" in result.error
