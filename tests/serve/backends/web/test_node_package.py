import json
import os
from pathlib import Path

import pytest

from cifarx_serve.backends.web.node_package import PACKAGE, find_package
from cifarx_serve.errors import UsageError


@pytest.fixture(autouse=True)
def _no_node_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_PATH", raising=False)


def install(modules: Path, version: str = "1.30.0") -> Path:
    """Write a package with the files that are used, and return its folder."""
    folder = modules / PACKAGE
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": PACKAGE, "version": version}))
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (folder / "dist" / name).write_text(name)
    return folder


def test_the_package_of_the_closest_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "node_modules", "1.29.0")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert find_package().version == "1.29.0"
    nearer = install(tmp_path / "a" / "node_modules", "1.30.0")
    assert find_package() == (nearer, "1.30.0")
    assert find_package().script.read_text() == "ort.wasm.bundle.min.mjs"
    assert find_package().wasm.read_text() == "ort-wasm-simd-threaded.wasm"


def test_node_path_comes_after_the_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    global_folder = install(tmp_path / "global")
    empty = tmp_path / "empty"
    monkeypatch.setenv("NODE_PATH", os.pathsep.join(["", str(empty), str(tmp_path / "global")]))
    assert find_package().folder == global_folder
    own = install(tmp_path / "node_modules")
    assert find_package().folder == own


def test_a_missing_package_is_one_line_with_the_command_to_run() -> None:
    with pytest.raises(UsageError) as raised:
        find_package()
    assert str(raised.value) == (
        "onnxruntime-web is not installed in this directory or one above it: npm install onnxruntime-web"
    )


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"version": "one"}', "cannot be read"),
        ('{"version": 1}', "cannot be read"),
        ('{"version": "1.9.0"}', "is version 1.9.0, but 1.20 or newer is needed"),
    ],
)
def test_a_damaged_or_old_package_is_one_line(manifest: str, problem: str, tmp_path: Path) -> None:
    (install(tmp_path / "node_modules") / "package.json").write_text(manifest)
    with pytest.raises(UsageError, match=f"{problem}.*: npm install onnxruntime-web@latest$") as raised:
        find_package()
    assert "\n" not in str(raised.value)


def test_a_prerelease_is_accepted(tmp_path: Path) -> None:
    install(tmp_path / "node_modules", "1.31.0-dev.20260914-8d85527a0")
    assert find_package().version == "1.31.0-dev.20260914-8d85527a0"


def test_a_package_without_the_wasm_is_named(tmp_path: Path) -> None:
    (install(tmp_path / "node_modules") / "dist" / "ort-wasm-simd-threaded.wasm").unlink()
    with pytest.raises(UsageError, match=r"onnxruntime-web 1\.30\.0 has no ort-wasm-simd-threaded\.wasm: npm install"):
        find_package()
