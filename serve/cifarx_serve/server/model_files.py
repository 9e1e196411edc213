"""The model files that a server is given: their names, their versions, and the folders that contain them.

A key of the files is the name of a model, or NAME@2 for version 2 of it.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.errors import UsageError
from cifarx_serve.server.settings import ModelControlMode
from cifarx_serve.system.terminal import printable, require_utf8

_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
"""A version is a positive number, and one with leading zeros would not be unique. Triton ignores such folders too."""

_TRITON_FILE: Final = "model"
"""The name, without its suffix, of a model file in a version folder."""


class ModelKey(NamedTuple):
    """The name of a model, and the number of its version; None if its file was given without one."""

    name: str
    number: int | None


def parse_key(key: str) -> ModelKey:
    """Split a key of the files."""
    name, _, number = key.rpartition("@")
    return ModelKey(name, int(number)) if name and _NUMBER.fullmatch(number) else ModelKey(key, None)


def latest_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return the key of the latest version by model name, in the order of the first version of each."""
    latest: dict[str, str] = {}
    for key in keys:
        name, number = parse_key(key)
        if name not in latest or (number or 0) > (parse_key(latest[name]).number or 0):
            latest[name] = key
    return latest


def files_by_name(arguments: Sequence[str]) -> dict[str, Path]:
    """Return the paths of model files by key, in order.

    An argument is the path of a file, NAME=FILE, or NAME@2=FILE for version 2 of a model. Without NAME, the name is the
    file name without its suffix, and with a replacement for characters that are not safe to print. Files that would
    have the same name keep the suffix, and those that still would are numbered. A folder with the folders 1, 2, … is a
    model with these versions, as in a model repository of Triton. A file without a version is version 1 of a model that
    has others.

    Raises:
        UsageError: there is no file, a file, a name or a version is given twice, or a version is not a number.
    """
    if not arguments:
        raise UsageError("no file to serve", "name at least one model file")
    given = [_parse_argument(argument) for argument in arguments]
    paths = [path for _, path in given]
    if repeated := [path for number, path in enumerate(paths) if path in paths[:number]]:
        raise UsageError(f"{repeated[0]} is named twice", "name each file once")
    derived = iter(_derived_names([path for name, path in given if name is None]))
    named = [(next(derived) if name is None else name, path) for name, path in given]
    entries = [entry for name, path in named for entry in _versions(name, path)]
    numbered = {parse_key(key).name for key, _ in entries if parse_key(key).number is not None}
    files: dict[str, Path] = {}
    for stated, path in entries:
        key = f"{stated}@1" if stated in numbered else stated
        if key in files:
            if parse_key(key).number is None:
                raise UsageError(f"two models have the name {key}", "name one of them, as in NAME=FILE")
            raise UsageError(f"two files are {key}: {files[key]} and {path}", "give each version its own number")
        files[key] = path
    return files


def _parse_argument(argument: str) -> tuple[str | None, Path]:
    """Return the key, if the argument states one, and the path of a model file."""
    key, equals, file = argument.partition("=")
    if equals and file and not os.path.lexists(argument):
        name, at, number = key.partition("@")
        if _MODEL_NAME.fullmatch(name):
            if at and not _NUMBER.fullmatch(number):
                problem = f"{number!r} in {argument!r} is not a version"
                raise UsageError(problem, f"number versions from 1, as in {name}@2={file}")
            return key, Path(file)
    return None, Path(argument)


def _derived_names(paths: list[Path]) -> list[str]:
    file_names = [printable(path.absolute().name) for path in paths]  # absolute, because the name of "." is empty
    stems = [name.rpartition(".")[0] or name for name in file_names]
    names = [
        stem if stems.count(stem) == 1 else name.replace(".", "-") for stem, name in zip(stems, file_names, strict=True)
    ]
    return [f"{name}-{number}" for number, name in enumerate(names)] if len(set(names)) != len(names) else names


def _versions(key: str, path: Path) -> list[tuple[str, Path]]:
    """Return the keys and the files of a path: several if it is a folder with version folders."""
    folders = _version_folders(path) or _versions_of_only_model(path)
    if not folders:
        return [(key, path)]
    if parse_key(key).number is not None:
        raise UsageError(f"{path} for {key} has the versions {', '.join(folders)}", f"name one file, or {path} alone")
    return [(f"{key}@{number}", _file_of_version(folder)) for number, folder in folders.items()]


def _version_folders(path: Path) -> dict[str, Path]:
    """Return the version folders in a folder by number, in ascending order; none for anything else."""
    try:
        folders = {entry.name: entry for entry in path.iterdir() if _NUMBER.fullmatch(entry.name) and entry.is_dir()}
    except OSError:
        return {}
    return dict(sorted(folders.items(), key=lambda item: int(item[0])))


def _versions_of_only_model(path: Path) -> dict[str, Path]:
    """Return the version folders of the model in a repository with one model, if it has several versions.

    Raises:
        UsageError: there are several models.
    """
    try:
        models = {entry.name: versions for entry in sorted(path.iterdir()) if (versions := _version_folders(entry))}
    except OSError:
        return {}
    if len(models) > 1:
        problem = f"{path} is a model repository with several models: {', '.join(models)}"
        raise UsageError(
            problem, f"serve them with --model-repository {path}, or name one, as in {path / next(iter(models))}"
        )
    only = next(iter(models.values()), {})
    return only if len(only) > 1 else {}


def _file_of_version(folder: Path) -> Path:
    """Return the model file of a version folder: that named `model`, or the only one.

    Raises:
        UsageError: there is none, or several.
    """
    files = _model_files(folder)
    named = [file for file in files if file.name.partition(".")[0] == _TRITON_FILE]
    candidates = named or files
    if len(candidates) != 1:
        found = f"has {' and '.join(file.name for file in candidates[:3])}" if candidates else "has no model file"
        raise UsageError(f"{folder} {found}", "put one into it, such as model.onnx")
    return candidates[0]


def _model_files(folder: Path) -> list[Path]:
    """Return the entries of a folder that a registered backend opens, by their suffixes, sorted."""
    suffixes = tuple(suffix for backend in registered_backends() for suffix in backend.suffixes or ())
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.endswith(suffixes))


def scan_repository(directory: Path) -> dict[str, Path]:
    """Return the model files of a repository by key: the files in it, and the folders with version folders.

    A version folder without a model file is left out: it may still be written.

    Raises:
        UsageError: the directory cannot be read, or two of its models have the same name.
    """
    try:
        folders = {path.name: _version_folders(path) for path in sorted(directory.iterdir())}
        files = _model_files(directory)
    except OSError as error:
        raise UsageError(
            f"the model repository {directory} cannot be read ({error.strerror})", "name a directory with models"
        ) from error
    found = dict(zip(_derived_names(files), files, strict=True))
    for name, versions in folders.items():
        if not versions or not _MODEL_NAME.fullmatch(name):
            continue
        if name in found:
            raise UsageError(f"{found[name]} and {directory / name} have the same name", "rename one of them")
        found |= {f"{name}@{number}": file for number, folder in versions.items() if (file := _only_file(folder))}
    return dict(sorted(found.items(), key=lambda item: parse_key(item[0])[:1]))


def initial_files(arguments: Sequence[str], directory: Path | None, mode: ModelControlMode) -> dict[str, Path]:
    """Return the model files that a server starts with, by key: those of its arguments, then those of a repository.

    Args:
        arguments: the arguments, as for `files_by_name`.
        directory: the model repository, if there is one.
        mode: how the models of the repository are loaded; with "explicit" none of them is loaded at the start.

    Raises:
        UsageError: as for `files_by_name` and `scan_repository`, or there is no model.
    """
    if directory is None:
        if mode != "none":
            raise UsageError(f"--model-control {mode} without --model-repository", "name the directory of the models")
        return files_by_name(arguments)
    given, found = files_by_name(arguments) if arguments else {}, scan_repository(directory)
    if both := {parse_key(key).name for key in given} & {parse_key(key).name for key in found}:
        raise UsageError(f"the model repository {directory} has {min(both)} too", "serve it under another name")
    if mode == "explicit":
        return given
    if mode == "none" and not given | found:
        raise UsageError(f"the model repository {directory} has no model", "put one into it, such as NAME/1/model.onnx")
    return given | found


def _only_file(folder: Path) -> Path | None:
    try:
        return _file_of_version(folder)
    except UsageError:
        return None


def absolute_paths(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the files with absolute paths, as the settings have them. Raises UsageError as `absolute_path` does."""
    return {key: absolute_path(path) for key, path in files.items()}


def absolute_path(path: Path) -> str:
    """Return the absolute path of a file of the settings.

    Raises:
        UsageError: the path is not valid UTF-8. The settings are sent to the workers as JSON.
    """
    require_utf8(path.absolute())
    return str(path.absolute())
