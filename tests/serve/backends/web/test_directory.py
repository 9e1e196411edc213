import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cifarx_serve.backends.registry import model_file, read_spec
from cifarx_serve.backends.web.directory import (
    CHECKSUMS_FILE,
    FILES,
    MODEL_FILE,
    OFFLINE_FILE,
    SPEC_FILE,
    require_intact_directory,
)
from cifarx_serve.errors import ModelFileError
from tests.support.color_model import SPEC
from tests.support.web import write_web_directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_web_directory(tmp_path_factory.mktemp("web") / "colors.web")


def test_every_file_has_a_checksum_that_sha256sum_checks(written: Path) -> None:
    assert set(require_intact_directory(written)) == set(FILES)
    program = shutil.which("sha256sum")
    if program is not None:
        subprocess.run([program, "--check", "--strict", CHECKSUMS_FILE], cwd=written, check=True, capture_output=True)


def test_the_model_of_a_directory_is_found_and_read_without_node(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert model_file(written) == written / MODEL_FILE
    assert read_spec(written) == SPEC


def test_other_files_in_the_directory_are_ignored(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy.web")
    (copy / "CNAME").write_text("example.org")
    require_intact_directory(copy)


def test_a_directory_of_an_older_version_has_no_service_worker(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy.web")
    (copy / OFFLINE_FILE).unlink()
    path = copy / CHECKSUMS_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if OFFLINE_FILE not in line))
    assert require_intact_directory(copy).keys() == set(FILES) - {OFFLINE_FILE}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy.web")
    (copy / name).unlink()
    with pytest.raises(ModelFileError, match=rf"cannot read .*{name} \(No such file.*: copy the whole directory"):
        require_intact_directory(copy)


def test_missing_checksums_are_named(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy.web")
    (copy / CHECKSUMS_FILE).unlink()
    with pytest.raises(ModelFileError, match=r"cannot read .*SHA256SUMS"):
        require_intact_directory(copy)


DAMAGE: tuple[Callable[[str], str], ...] = (
    lambda _: "",
    lambda text: text + text,
    lambda text: text.replace(SPEC_FILE, "../" + SPEC_FILE),
    lambda text: text.replace(SPEC_FILE, "/etc/passwd"),
    lambda text: text.replace(SPEC_FILE, MODEL_FILE),
    lambda text: text[:-20],
    lambda text: text + "\n",
    str.upper,
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text + "ä",
)


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_list_of_checksums_is_refused(change: Callable[[str], str], written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy.web")
    path = copy / CHECKSUMS_FILE
    path.write_text(change(path.read_text()), encoding="utf-8", newline="")
    with pytest.raises(ModelFileError, match="SHA256SUMS"):
        require_intact_directory(copy)


@pytest.mark.slow
def test_each_of_1000_flipped_bits_is_found(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy.web")
    random = np.random.default_rng(0)
    files = [copy / name for name in (*FILES, CHECKSUMS_FILE)]
    for number in range(1000):
        path = files[number % len(files)]
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(ModelFileError) as raised:
            require_intact_directory(copy)
        assert "\n" not in str(raised.value)
        path.write_bytes(content)
    require_intact_directory(copy)
