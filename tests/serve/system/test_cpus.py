import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cifarx_serve.system import cpus
from cifarx_serve.system.cpus import available_cpus, share_cpus, shares_cpus
from tests.support.trained_model import Trained

CPUS = 64


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 CPUs whose control groups are in a folder: `cpu.max` (v2) or `cpu` (v1), both absent."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CPUS)), raising=False)
    monkeypatch.setattr(cpus, "_CGROUP_V2", tmp_path / "cpu.max")
    monkeypatch.setattr(cpus, "_CGROUP_V1", tmp_path / "cpu")
    return tmp_path


def test_without_a_limit(cgroups: Path) -> None:
    assert not list(cgroups.iterdir())
    assert available_cpus() == CPUS


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("1000 100000\n", 1),
        ("9900000 100000\n", CPUS),
        ("max 100000\n", CPUS),
        ("", CPUS),
        ("what is this", CPUS),
    ],
)
def test_quota_of_cgroup_v2(cgroups: Path, limit: str, expected: int) -> None:
    (cgroups / "cpu.max").write_text(limit)
    assert available_cpus() == expected


@pytest.mark.parametrize(("quota", "expected"), [("300000\n", 3), ("250000\n", 3), ("-1\n", CPUS), ("\n", CPUS)])
def test_quota_of_cgroup_v1(cgroups: Path, quota: str, expected: int) -> None:
    (cgroups / "cpu").mkdir()
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cpus() == expected


def test_where_the_system_knows_no_affinity(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert available_cpus() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1
    (cgroups / "cpu.max").write_text("400000 100000\n")
    assert available_cpus() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_affinity_of_the_process(fresh_python: Callable[..., str]) -> None:
    code = (
        "import os; from cifarx_serve.system.cpus import available_cpus\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(available_cpus())"
    )
    assert fresh_python(code) == "1"


def test_here() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def test_a_share_is_an_upper_limit(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_share", None)
    assert not shares_cpus()
    share_cpus(3)
    assert shares_cpus()
    assert available_cpus() == 3
    (cgroups / "cpu.max").write_text("200000 100000\n")
    assert available_cpus() == 2


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU: a model starts no thread that could spin")
def test_a_model_that_shares_its_cpus_starts_so_many_threads_and_they_do_not_spin(
    fresh_python: Callable[..., str], trained: Trained
) -> None:
    """By the time that the process's threads take while nothing is asked."""
    code = (
        "import os, sys, time, numpy as np\n"
        "os.sched_setaffinity(0, range(os.cpu_count()))\n"
        "from cifarx_serve.system.cpus import share_cpus\n"
        "from cifarx_serve.backends.registry import open_backend\n"
        "if sys.argv[2] == 'share': share_cpus(2)\n"
        "model = open_backend(sys.argv[1], device='cpu')\n"
        "batch = np.zeros((8, 3, 32, 32), np.float32)\n"
        "spent = 0.0\n"
        "for _ in range(20):\n"
        "    model.run(batch)\n"
        "    before = time.process_time(); time.sleep(0.005); spent += time.process_time() - before\n"
        "print(spent)\n"
    )
    assert 3 * float(fresh_python(code, trained.onnx, "share")) < float(fresh_python(code, trained.onnx, "alone"))
