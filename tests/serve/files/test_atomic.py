import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import OutputError, UsageError
from cifarx_serve.files.atomic import atomic_directory, atomic_path, require_writable

OLD, NEW = b"old content", b"new content, and longer"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_creates_the_file_and_its_parent_directories(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "today" / "lzh_0.pth"
    with atomic_path(target) as temporary:
        temporary.write_bytes(NEW)
        assert not target.exists()
    assert content(target.parent) == {"lzh_0.pth": NEW}


def test_replaces_the_old_file_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "lzh_0.pth"
    target.write_bytes(OLD)
    with atomic_path(target) as temporary:
        temporary.write_bytes(NEW)
        assert target.read_bytes() == OLD
    assert content(tmp_path) == {"lzh_0.pth": NEW}


def test_the_temporary_name_is_hidden_and_has_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "lzh_0.onnx") as temporary:
        temporary.write_bytes(NEW)
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".onnx"


def test_concurrent_writers_use_different_temporary_files(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_bytes(OLD)
        second.write_bytes(NEW)
    assert content(tmp_path) == {"report.json": OLD}


@given(
    raised=st.sampled_from(
        [KeyboardInterrupt(), SystemExit(1), ValueError("x"), MemoryError(), UsageError("x", "y"), RecursionError()]
    ),
    written=st.none() | st.binary(max_size=64),
    existing=st.none() | st.binary(max_size=64),
)
def test_any_exception_leaves_the_old_file_or_none(
    raised: BaseException, written: bytes | None, existing: bytes | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "lzh_0.pth"
        if existing is not None:
            target.write_bytes(existing)
        before = content(Path(name))
        with pytest.raises(type(raised)) as caught, atomic_path(target) as temporary:
            if written is not None:
                temporary.write_bytes(written)
            raise raised
        assert caught.value is raised
        assert content(Path(name)) == before


def test_a_system_error_names_the_target(tmp_path: Path) -> None:
    target = tmp_path / "lzh_0.pth"
    target.write_bytes(OLD)
    with pytest.raises(OutputError, match="No space left") as raised, atomic_path(target) as temporary:
        temporary.write_bytes(NEW)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    assert str(target) in raised.value.problem
    assert ".partial" not in str(raised.value)
    assert content(tmp_path) == {"lzh_0.pth": OLD}


def test_a_full_disk_during_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "lzh_0.pth"
    target.write_bytes(OLD)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"), atomic_path(target) as temporary:
        temporary.write_bytes(NEW)
    assert content(tmp_path) == {"lzh_0.pth": OLD}


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot flush a directory")
def test_the_file_is_flushed_before_the_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "lzh_0.pth"
    renamed: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: renamed.append(target.exists()))
    with atomic_path(target) as temporary:
        temporary.write_bytes(NEW)
    assert renamed == [False, True]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "lzh_0.pth"
    target.write_bytes(OLD)
    code = (
        "import os, signal, sys; from pathlib import Path; from cifarx_serve.files.atomic import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", code, target], check=False)
    assert ran.returncode == -signal.SIGKILL
    left = content(tmp_path)
    assert left.pop("lzh_0.pth") == OLD
    assert all(name.startswith(".") for name in left)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_permissions_are_those_of_a_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "lzh_0.pth") as temporary:
            temporary.write_bytes(NEW)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "lzh_0.pth").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["folder", "file/lzh_0.pth", "x" * 300])
def test_paths_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(OutputError) as raised, atomic_path(tmp_path / name) as temporary:
        temporary.write_bytes(NEW)
    assert str(tmp_path / name) in raised.value.problem
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_directory_at_the_target_is_reported_before_the_block_runs(tmp_path: Path) -> None:
    worked = False
    with pytest.raises(OutputError, match="Is a directory"), atomic_path(tmp_path):
        worked = True
    assert not worked


def test_require_writable_creates_an_empty_directory(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_require_writable_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError) as raised:
            require_writable(directory)
        assert str(directory) in raised.value.problem


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def fill(directory: Path, content: bytes, name: str = "model/1/model.onnx") -> None:
    (directory / name).parent.mkdir(parents=True)
    (directory / name).write_bytes(content)


def test_creates_the_directory_and_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "lzh_0.triton"
    with atomic_directory(target) as temporary:
        fill(temporary, NEW)
        assert not target.exists()
    assert tree(tmp_path) == {"runs/lzh_0.triton/model/1/model.onnx": NEW}
    assert list(target.parent.iterdir()) == [target]


def test_replaces_the_old_directory_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "lzh_0.triton"
    fill(target, OLD, "model/labels.txt")
    with atomic_directory(target) as temporary:
        fill(temporary, NEW)
        assert tree(target) == {"model/labels.txt": OLD}
        assert temporary.parent.name.startswith(".")
    assert tree(tmp_path) == {"lzh_0.triton/model/1/model.onnx": NEW}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), ValueError("x"), UsageError("x", "y"), SystemExit(1)])
@pytest.mark.parametrize("existing", [True, False])
def test_any_exception_leaves_the_old_directory_or_none(tmp_path: Path, raised: BaseException, existing: bool) -> None:
    target = tmp_path / "lzh_0.triton"
    if existing:
        fill(target, OLD)
    before = tree(tmp_path)
    with pytest.raises(type(raised)) as caught, atomic_directory(target) as temporary:
        fill(temporary, NEW)
        raise raised
    assert caught.value is raised
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == [target] * existing


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["first", "second", "after"])
def test_the_old_directory_is_restored_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, raised: BaseException, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail before the old directory is moved aside, between the two renames, and just after both."""
    target = tmp_path / "lzh_0.triton"
    fill(target, OLD)
    rename = Path.rename
    calls: list[Path] = []

    def failing(path: Path, to: Path) -> Path:
        calls.append(path)
        if moment == "after" and len(calls) == 2:
            rename(path, to)
        if (moment == "first" and len(calls) == 1) or (moment != "first" and len(calls) == 2):
            raise raised
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", failing)
    expected = OutputError if isinstance(raised, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_directory(target) as temporary:
        fill(temporary, NEW)
    monkeypatch.undo()
    assert tree(tmp_path) == {"lzh_0.triton/model/1/model.onnx": NEW if moment == "after" else OLD}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot flush a directory")
def test_the_directory_is_flushed_with_its_content_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "lzh_0.triton"
    flushed: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append((target.exists(), stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    )
    with atomic_directory(target) as temporary:
        fill(temporary, NEW)
    before = [is_directory for there, is_directory in flushed if not there]
    assert sorted(before) == [False, True, True, True]  # the file, its two directories, the directory itself
    assert [is_directory for there, is_directory in flushed if there] == [True]


def test_a_system_error_in_a_directory_names_the_target(tmp_path: Path) -> None:
    target = tmp_path / "lzh_0.triton"
    with pytest.raises(OutputError, match="No space left") as raised, atomic_directory(target) as temporary:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    assert str(target) in raised.value.problem
    assert ".partial" not in str(raised.value)


def test_a_file_at_the_target_is_reported_before_the_block_runs(tmp_path: Path) -> None:
    target = tmp_path / "lzh_0.triton"
    target.write_bytes(OLD)
    worked = False
    with pytest.raises(OutputError, match="Is a file"), atomic_directory(target):
        worked = True
    assert not worked
    assert content(tmp_path) == {"lzh_0.triton": OLD}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700)])
def test_the_permissions_are_those_of_a_new_directory(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "lzh_0.triton") as temporary:
            fill(temporary, NEW)
    finally:
        os.umask(before)
    assert (tmp_path / "lzh_0.triton").stat().st_mode & 0o777 == mode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "lzh_0.triton"
    fill(target, OLD)
    code = (
        "import os, signal, sys; from pathlib import Path; from cifarx_serve.files.atomic import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'half').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", code, target], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert tree(target) == {"model/1/model.onnx": OLD}
    assert all(path == target or path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("write", [atomic_path, atomic_directory])
def test_the_remedy_for_a_wrong_path_is_another_path(write: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*: choose another path$"), write(tmp_path / "file" / "x"):
        pass


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("absent/directory")
    with pytest.raises(OutputError) as raised:
        require_writable(tmp_path / "out")
    assert str(raised.value) == (
        f"cannot write {tmp_path / 'out'} (File exists: it is a link to absent/directory, which does not exist): "
        "choose another path"
    )
