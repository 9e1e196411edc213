"""The names and versions of model files, and the folders that contain them."""

import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_serve.server.model_files import absolute_path, files_by_name, latest_keys, parse_key, scan_repository


def model_names(*paths: str) -> list[str]:
    return list(files_by_name(paths))


def test_the_model_name_is_the_file_name_without_suffix() -> None:
    assert model_names("models/lzh_9.onnx") == ["lzh_9"]
    assert model_names("lzh_9.embedded.onnx", "lzh_9.torchscript.pt") == ["lzh_9.embedded", "lzh_9.torchscript"]


def test_files_keep_their_order(tmp_path: Path) -> None:
    files = files_by_name(["b.onnx", str(tmp_path / "a.onnx")])
    assert list(files.items()) == [("b", Path("b.onnx")), ("a", tmp_path / "a.onnx")]


def test_files_of_the_same_stem_keep_their_suffixes() -> None:
    assert model_names("lzh_9.onnx", "lzh_9.pt2", "other.onnx") == ["lzh_9-onnx", "lzh_9-pt2", "other"]


def test_files_of_the_same_name_are_numbered() -> None:
    assert model_names("old/lzh_9.onnx", "new/lzh_9.onnx") == ["lzh_9-onnx-0", "lzh_9-onnx-1"]


def test_the_current_directory_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    assert files_by_name(["."]) == {"repository": Path()}


def test_a_name_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files_by_name(["cats=a.onnx", "b.onnx", "v1.2=c/a.onnx"]) == {
        "cats": Path("a.onnx"),
        "b": Path("b.onnx"),
        "v1.2": Path("c/a.onnx"),
    }
    (tmp_path / "cats=a.onnx").touch()
    assert model_names("cats=a.onnx") == ["cats=a"], "a file of this name wins"
    assert model_names("a b=c.onnx", "./x=y.onnx", "x=") == ["a b=c", "x=y", "x="]
    with pytest.raises(UsageError, match="two models have the name a: name one of them, as in NAME=FILE"):
        model_names("a.onnx", "a=b.onnx")


def test_rejects_no_files() -> None:
    with pytest.raises(UsageError, match="no file to serve: name at least one model file"):
        files_by_name([])


def test_rejects_a_file_named_twice() -> None:
    with pytest.raises(UsageError, match=r"a\.onnx is named twice: name each file once"):
        model_names("a.onnx", "b.onnx", "./a.onnx")


parts = st.text(string.ascii_lowercase[:2] + ".-01", min_size=1, max_size=6).filter(
    lambda part: part not in (".", "..")
)


@given(st.lists(st.builds("{}/{}".format, parts, parts), min_size=1, max_size=6, unique_by=Path))
def test_model_names_are_unique(paths: list[str]) -> None:
    files = files_by_name(paths)
    assert list(files.values()) == [Path(path) for path in paths]
    assert all(name and "/" not in name for name in files)


def test_names_are_safe_to_print() -> None:
    assert list(files_by_name(["a\x1b[31m\nb.onnx", "\u202ec.onnx"])) == ["a�[31m�b", "�c"]


def test_a_path_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(UsageError, match="is not valid UTF-8: rename the file or its directory"):
        absolute_path(Path(os.fsdecode(b"/models/\xff/a.onnx")))


def write_files(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


@pytest.mark.parametrize(
    ("key", "parsed"),
    [
        ("lzh", ("lzh", None)),
        ("lzh@2", ("lzh", 2)),
        ("lzh@02", ("lzh@02", None)),
        ("lzh@0", ("lzh@0", None)),
        ("@2", ("@2", None)),
        ("a@b@3", ("a@b", 3)),
        ("lzh@1234567890", ("lzh@1234567890", None)),
    ],
)
def test_the_key_of_a_version(key: str, parsed: tuple[str, int | None]) -> None:
    assert parse_key(key) == parsed


def test_the_latest_version_is_the_one_with_the_highest_number() -> None:
    assert latest_keys(["b@9", "a", "b@10", "b@2"]) == {"b": "b@10", "a": "a"}


def test_versions_are_given_with_the_name() -> None:
    assert list(files_by_name(["lzh@2=b.onnx", "cats=c.onnx", "lzh=a.onnx"])) == ["lzh@2", "cats", "lzh@1"]
    assert list(files_by_name(["lzh@2.onnx", "lzh.onnx"])) == ["lzh@2", "lzh@1"]


def test_a_folder_with_version_folders_is_a_model_with_versions(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "lzh", "1/model.onnx", "10/lzh_9.onnx", "2/model.pt2", "2/lzh.onnx", "config.pbtxt")
    files = files_by_name([str(folder)])
    assert list(files) == ["lzh@1", "lzh@2", "lzh@10"]
    assert [path.name for path in files.values()] == ["model.onnx", "model.pt2", "lzh_9.onnx"]
    assert list(files_by_name([f"cats={folder}"])) == ["cats@1", "cats@2", "cats@10"]


def test_a_repository_with_one_model_is_that_model(tmp_path: Path) -> None:
    repository = write_files(tmp_path / "lzh_9.triton", "lzh/1/model.onnx", "kserve.yaml")
    assert files_by_name([str(repository)]) == {"lzh_9": repository}, "as `cifarx export --format triton` writes it"
    write_files(repository, "lzh/2/model.onnx")
    assert files_by_name([str(repository)]) == {
        "lzh_9@1": repository / "lzh/1/model.onnx",
        "lzh_9@2": repository / "lzh/2/model.onnx",
    }
    write_files(repository, "cats/1/model.onnx")
    with pytest.raises(UsageError, match="with several models: cats, lzh: serve them with --model-repository"):
        files_by_name([str(repository)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["lzh@two=a.onnx"],
            "'two' in 'lzh@two=a.onnx' is not a version: number versions from 1, as in lzh@2=a",
        ),
        (["lzh@=a.onnx"], "'' in 'lzh@=a.onnx' is not a version"),
        (["lzh@0=a.onnx"], "'0' in 'lzh@0=a.onnx' is not a version"),
        (["lzh@-1=a.onnx"], "'-1' in 'lzh@-1=a.onnx' is not a version"),
        (["lzh@1.5=a.onnx"], "'1.5' in"),
        (["lzh@2=a.onnx", "lzh@2=b.onnx"], "two files are lzh@2: a.onnx and b.onnx: give each version its own number"),
        (["lzh=a.onnx", "lzh@1=b.onnx"], "two files are lzh@1: a.onnx and b.onnx"),
        (["lzh@3=model"], "model for lzh@3 has the versions 1, 2: name one file, or model alone"),
        (["empty"], r"empty/2 has no model file: put one into it, such as model\.onnx"),
        (["several"], r"several/1 has a\.onnx and b\.onnx: put one into it"),
    ],
)
def test_wrong_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    write_files(tmp_path, "model/1/model.onnx", "model/2/model.onnx", "empty/2/readme", "several/1/a.onnx")
    write_files(tmp_path, "several/1/b.onnx")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        files_by_name(arguments)


def test_a_repository_has_files_and_folders_with_versions(tmp_path: Path) -> None:
    write_files(tmp_path, "lzh/1/model.onnx", "lzh/2/model.onnx", "lzh/config.pbtxt", "cats.onnx", "kserve.yaml")
    write_files(tmp_path, "notes/readme.txt", "new/1/unfinished", ".hidden.onnx", "new/01/model.onnx")
    files = scan_repository(tmp_path)
    assert files == {
        "cats": tmp_path / "cats.onnx",
        "lzh@1": tmp_path / "lzh/1/model.onnx",
        "lzh@2": tmp_path / "lzh/2/model.onnx",
    }


def test_two_models_of_a_repository_must_differ_in_name(tmp_path: Path) -> None:
    write_files(tmp_path, "lzh/1/model.onnx", "lzh.onnx")
    with pytest.raises(UsageError, match=r"lzh\.onnx and .*lzh have the same name: rename one of them"):
        scan_repository(tmp_path)


def test_a_repository_that_is_missing_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the model repository .* cannot be read \(No such file or directory\)"):
        scan_repository(tmp_path / "absent")
