import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cifarx_serve.system import cpus
from cifarx_serve.system.cpus import available_cpus, has_cpu_limit, set_cpu_limit
from tests.support.trained_model import Trained

CPUS = 64


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a machine with 64 CPUs and return the directory for its cgroup files, `cpu.max` (v2) or `cpu` (v1)."""
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
def test_a_cgroup_v2_quota(cgroups: Path, limit: str, expected: int) -> None:
    (cgroups / "cpu.max").write_text(limit)
    assert available_cpus() == expected


@pytest.mark.parametrize(("quota", "expected"), [("300000\n", 3), ("250000\n", 3), ("-1\n", CPUS), ("\n", CPUS)])
def test_a_cgroup_v1_quota(cgroups: Path, quota: str, expected: int) -> None:
    (cgroups / "cpu").mkdir()
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cpus() == expected


def test_a_system_without_affinity_masks(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert available_cpus() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1
    (cgroups / "cpu.max").write_text("400000 100000\n")
    assert available_cpus() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks on this system")
def test_the_affinity_mask_of_the_process(fresh_python: Callable[..., str]) -> None:
    code = (
        "import os; from cifarx_serve.system.cpus import available_cpus\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(available_cpus())"
    )
    assert fresh_python(code) == "1"


def test_on_this_machine() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)


def test_the_limit_is_an_upper_bound(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_limit", None)
    assert not has_cpu_limit()
    set_cpu_limit(3)
    assert has_cpu_limit()
    assert available_cpus() == 3
    (cgroups / "cpu.max").write_text("200000 100000\n")
    assert available_cpus() == 2


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="with one CPU a model starts no thread that could spin")
def test_with_a_limit_the_threads_of_an_idle_model_do_not_spin(
    fresh_python: Callable[..., str], trained: Trained
) -> None:
    """Compare the CPU time that the process spends between runs."""
    code = (
        "import os, sys, time, numpy as np\n"
        "os.sched_setaffinity(0, range(os.cpu_count()))\n"
        "from cifarx_serve.system.cpus import set_cpu_limit\n"
        "from cifarx_serve.backends.registry import open_backend\n"
        "if sys.argv[2] == 'limit': set_cpu_limit(2)\n"
        "model = open_backend(sys.argv[1], device='cpu')\n"
        "batch = np.zeros((8, 3, 32, 32), np.float32)\n"
        "spent = 0.0\n"
        "for _ in range(20):\n"
        "    model.run(batch)\n"
        "    before = time.process_time(); time.sleep(0.005); spent += time.process_time() - before\n"
        "print(spent)\n"
    )
    assert 3 * float(fresh_python(code, trained.onnx, "limit")) < float(fresh_python(code, trained.onnx, "no limit"))
