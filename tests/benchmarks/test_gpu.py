import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer

from benchmarks import gpu
from benchmarks.gpu import Part, PartResult, format_report, gpu_parts, report_name, run_parts
from tests.support.command_line import Cli

PROJECT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


PRINTS = Part("prints", 60, python("import os; print(os.getcwd()); print(os.environ['GREETING'])"))
FAILS = Part("fails", 60, python("print('before'); raise SystemExit(3)"))
CRASHES = Part("crashes", 60, python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
MISSING = Part("missing", 60, ["/no/such/program"])
HANGS = Part(
    "hangs",
    1,
    python(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    ),
)


def run(*parts: Part, directory: Path, total_s: float = 60.0) -> list[PartResult]:
    return list(run_parts(parts, directory, {**os.environ, "GREETING": "hello"}, total_s))


def test_a_failure_or_a_limit_does_not_stop_the_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_GRACE_S", 0.2)
    results = run(FAILS, MISSING, CRASHES, HANGS, PRINTS, directory=tmp_path)
    assert [result.status for result in results] == [
        "exit status 3",
        "exit status 127",
        "exit status -9",
        "ended after 1 s",
        "passed",
    ]
    assert results[0].output == "before"
    assert "/no/such/program" in results[1].output
    assert 1 <= results[3].seconds < 30
    assert results[4].output == f"{tmp_path}\nhello"


def test_the_limit_ends_all_processes_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_GRACE_S", 0.2)
    (result,) = run(HANGS, directory=tmp_path)
    child = int(result.output)
    end = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the process that the part started is still running"
        time.sleep(0.05)


def test_an_interrupted_part_may_print_its_results(tmp_path: Path) -> None:
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('results so far')"
    )
    (result,) = run(Part("slow", 1, python(code)), directory=tmp_path)
    assert (result.status, result.output) == ("ended after 1 s", "results so far")


def test_the_total_limit_shortens_and_skips_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_GRACE_S", 0.2)
    results = run(HANGS._replace(limit_s=500), PRINTS, directory=tmp_path, total_s=1.0)
    assert [result.status for result in results] == ["ended after 1 s", "not started"]
    assert results[1].output == "the 1 s of all parts were over"


def test_the_report_has_every_part_with_its_output(tmp_path: Path) -> None:
    report = format_report("NVIDIA H200", "AMD EPYC, NVIDIA H200; torch 2.15.0", run(FAILS, PRINTS, directory=tmp_path))
    assert report.startswith("# NVIDIA H200\n\nMeasured by `make gpu` on 20")
    assert "AMD EPYC, NVIDIA H200; torch 2.15.0" in report
    assert "| fails | exit status 3 | 0 |" in report
    assert "| prints | passed | 0 |" in report
    assert f"## prints\n\n```text\n$ python -c {PRINTS.command[2]}\n{tmp_path}\nhello\n```\n" in report
    assert sys.executable not in report


def test_only_the_last_lines_of_a_long_output_are_kept(tmp_path: Path) -> None:
    (result,) = run(Part("long", 60, python("for n in range(1000): print(n)")), directory=tmp_path)
    assert result.output.splitlines() == [str(number) for number in range(920, 1000)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "gpu-nvidia-h200.md"),
        ("NVIDIA GeForce RTX 4090 (Laptop)", "gpu-nvidia-geforce-rtx-4090-laptop.md"),
    ],
)
def test_the_report_is_named_after_the_gpu(name: str, expected: str) -> None:
    assert report_name(name) == expected


def test_without_a_gpu_it_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_find_gpu", lambda: ("", "Found no NVIDIA driver on your system"))
    with pytest.raises(typer.Exit) as ended:
        gpu.main(tmp_path)
    assert ended.value.exit_code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: nothing here can be measured without a GPU (Found no NVIDIA driver on your system): "
        "run it on a machine with an NVIDIA GPU\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("parts", "status"), [([PRINTS], 0), ([PRINTS, FAILS], 1)])
def test_the_report_is_written_and_the_exit_status_tells_whether_all_parts_passed(
    parts: list[Part], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_find_gpu", lambda: ("NVIDIA H200", None))
    monkeypatch.setattr(gpu, "gpu_parts", lambda *_, **__: parts)
    monkeypatch.setenv("GREETING", "hello")
    with pytest.raises(typer.Exit) as ended:
        gpu.main(tmp_path / "results")
    assert ended.value.exit_code == status
    report = (tmp_path / "results" / "gpu-nvidia-h200.md").read_text(encoding="utf-8")
    assert all(f"| {part.name} |" in report for part in parts)


@pytest.mark.parametrize("with_onnx", [False, True])
def test_the_commands_of_all_parts_exist(with_onnx: bool, cli: Cli) -> None:
    parts = gpu_parts(PROJECT, with_onnx=with_onnx)
    commands = [part.command[3:] for part in parts if part.command[1:3] == ["-m", "cifarx"]]
    assert {command[0] for command in commands} == {"doctor", "train", "export", "bench"}
    for command in commands:
        assert cli(*command, "--help").status == 0, command  # unknown options are refused before the help is shown
    files = [word for part in parts for word in part.command if word.startswith(str(PROJECT))]
    assert files
    assert all(Path(file).exists() for file in files)
    assert any(word.endswith(".onnx") for command in commands for word in command) == with_onnx


def test_every_part_is_started_within_the_total_limit_if_the_others_take_half_of_theirs() -> None:
    limits = [part.limit_s for part in gpu_parts(PROJECT, with_onnx=True)]
    assert gpu.TOTAL_S < 600
    assert sum(limits) / 2 < gpu.TOTAL_S
