import os
import stat
from pathlib import Path

import pytest

from cifarx_serve.files.cache_directory import cache_directory, create_cache_directory, require_own
from tests.support.file_owner import pretend_other_owner

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the system has no user IDs")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_directory_is_private(base: Path) -> None:
    assert cache_directory("decoded") == base / "cifarx" / "decoded"
    assert not base.exists()
    assert create_cache_directory("decoded") == base / "cifarx" / "decoded"
    for path in (base / "cifarx", base / "cifarx" / "decoded"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_an_older_directory_becomes_private(base: Path) -> None:
    (base / "cifarx" / "decoded").mkdir(parents=True)
    (base / "cifarx").chmod(0o777)
    create_cache_directory("decoded")
    assert stat.S_IMODE((base / "cifarx").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["cifarx", "cifarx/decoded"])
def test_a_directory_of_another_user_is_refused(base: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_cache_directory("decoded")
    pretend_other_owner(monkeypatch, base / name)
    with pytest.raises(PermissionError, match="it belongs to another user, who could change what is cached"):
        create_cache_directory("decoded")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    """It may point to a directory of this user, in which old files would then be removed."""
    (tmp_path / "precious").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "precious")
    require_own(link)
    os.lchown(link, 65534, 65534)
    with pytest.raises(PermissionError):
        require_own(link)
    os.lchown(link, 0, 0)
    os.chown(tmp_path / "precious", 65534, 65534)
    with pytest.raises(PermissionError):
        require_own(link)


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="Could not determine home directory"):
        cache_directory("decoded")
