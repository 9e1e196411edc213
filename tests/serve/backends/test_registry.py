import os
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.backends.registry import (
    GROUP,
    backend_class,
    backend_for,
    backend_names,
    find_model,
    model_file,
    open_backend,
    read_spec,
)
from cifarx_serve.backends.torch.torchscript import TorchScriptBackend
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.files.checksum import write_checksum
from tests.support.color_model import SPEC, write_onnx, write_torchscript

# A backend of another package. It always predicts the class in the first byte of its file.
TINY_BACKEND = """
import numpy as np
from cifarx_serve.backends.base import Backend
from cifarx_serve.spec import InputSpec, ModelSpec

class TinyBackend(Backend):
    name = "tiny"
    suffixes = (".tiny", ".fast.onnx")
    def __init__(self, path, device):
        self.spec, self.provider = self.read_spec(path), f"tiny on {device}"
        self.label = path.read_bytes()[0]
    @classmethod
    def read_spec(cls, path):
        return ModelSpec(model="tiny", class_names=("cat", "dog"), input=InputSpec(height=1, width=1))
    def run(self, batch):
        return np.eye(2, dtype=np.float32)[[self.label] * len(batch)]
    def close(self):
        pass

class NoBackend:
    name = "none"
    suffixes = ()
"""


@pytest.fixture
def third_party(tmp_path: Path, fresh_python: Callable[..., str]) -> Callable[[str, str], str]:
    """Run code with a package of these entry points installed: `third_party(entries, code)` returns its output."""
    (tmp_path / "tiny_package.py").write_text(TINY_BACKEND)
    metadata = tmp_path / "tiny_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n")

    def run(entries: str, code: str) -> str:
        (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
        return fresh_python(
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from cifarx_serve.backends import registry\n"
            "from cifarx_serve.errors import UsageError\n" + code,
            tmp_path,
        )

    return run


def test_the_backends_of_the_runtime() -> None:
    assert {"onnxruntime", "torchscript"} <= set(backend_names())
    assert backend_names() == sorted(backend_names())
    assert backend_class("onnxruntime") is OnnxRuntimeBackend
    assert backend_class("torchscript") is TorchScriptBackend


def test_the_entry_points_are_the_same_backends() -> None:
    provided = {entry.name: entry for entry in entry_points(group=GROUP)}
    assert {"onnxruntime", "torchscript", "pytorch"} <= set(provided)
    for name, entry in provided.items():
        assert backend_class(name) is entry.load()
        assert backend_class(name).name == name


@pytest.mark.parametrize(("name", "near"), [("onnxrt", "onnxruntime"), ("TorchScript", "torchscript")])
def test_an_unknown_backend(name: str, near: str) -> None:
    with pytest.raises(UsageError) as raised:
        backend_class(name)
    assert raised.value.problem == f"unknown backend {name!r}"
    assert f"did you mean {near!r}?" in raised.value.remedy
    assert all(known in raised.value.remedy for known in backend_names())


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("lzh_9.onnx", "onnxruntime"),
        ("lzh_9.int8.onnx", "onnxruntime"),
        ("runs/lzh_9.torchscript.pt", "torchscript"),
        ("lzh_9.pth", "pytorch"),
    ],
)
def test_the_suffix_selects_the_backend(file: str, name: str) -> None:
    assert backend_for(Path(file)) is backend_class(name)


def test_the_suffixes_of_registered_backends_need_no_import(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from cifarx_serve.backends.registry import backend_suffixes, registered_backends\n"
        "for backend in registered_backends():\n"
        "    assert backend_suffixes(backend.name) == backend.suffixes\n"
        "    assert backend.target.partition(':')[0] not in sys.modules"
    )
    assert fresh_python(code) == ""


def test_the_suffixes_of_an_entry_point_may_be_registered_by_its_package(fresh_python: Callable[..., str]) -> None:
    code = (
        "from pathlib import Path; from cifarx_serve.backends.registry import backend_for, backend_suffixes\n"
        "print(backend_for(Path('lzh_9.pth')).name, *backend_suffixes('pytorch'))"
    )
    assert fresh_python(code) == "pytorch .pth"


@pytest.mark.parametrize("file", ["lzh_9.pt", "lzh_9", "onnx", "lzh_9.onnx.parity.json", "lzh_9.ONNX.txt"])
def test_an_unknown_suffix(file: str) -> None:
    with pytest.raises(UsageError) as raised:
        backend_for(Path(file))
    assert raised.value.problem == f"no backend opens {file}"
    assert all(suffix in raised.value.remedy for suffix in (".onnx", ".torchscript.pt", ".pth"))


def test_the_suffix_of_a_third_party_backend_is_not_ours(third_party: Callable[[str, str], str]) -> None:
    write_onnx(Path("model.tiny"))
    code = "from pathlib import Path\nprint(registry.backend_for(Path('model.tiny')).name)\n"
    assert third_party("tiny = tiny_package:TinyBackend", code) == "tiny"


def test_a_third_party_backend_is_found_and_runs(third_party: Callable[[str, str], str]) -> None:
    Path("model.tiny").write_bytes(b"\x01")
    code = (
        "from cifarx_serve.predictor import load; from PIL import Image\n"
        "assert 'tiny' in registry.backend_names()\n"
        "with load('model.tiny', device='cpu') as predictor:\n"
        "    print(predictor.predict(Image.new('RGB', (9, 9))).label, predictor.backend, predictor.provider)"
    )
    assert third_party("tiny = tiny_package:TinyBackend", code) == "dog tiny tiny on cpu"


def test_the_longest_suffix_wins(third_party: Callable[[str, str], str]) -> None:
    code = (
        "from pathlib import Path\n"
        "registry.register_backend('tiny', 'tiny_package:TinyBackend')\n"
        "print(*(registry.backend_for(Path(name)).name for name in ('a.onnx', 'a.fast.onnx', 'a.tiny')))"
    )
    assert third_party("", code) == "onnxruntime tiny tiny"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("absent_package:Backend", "cannot be loaded"),
        ("tiny_package:Absent", "cannot be loaded"),
        ("tiny_package:NoBackend", "is not a Backend"),
        ("tiny_package:__name__", "is not a Backend"),
    ],
)
def test_a_third_party_backend_that_cannot_be_loaded_is_named(
    third_party: Callable[[str, str], str], target: str, words: str
) -> None:
    code = "try: registry.backend_class('tiny')\nexcept UsageError as error: print(error)"
    message = third_party(f"tiny = {target}", code)
    assert message.startswith(f"backend tiny ({target}) {words}")


def test_a_broken_third_party_backend_does_not_affect_our_own_files(third_party: Callable[[str, str], str]) -> None:
    code = "from pathlib import Path; print(registry.backend_for(Path('lzh_9.onnx')).name)"
    assert third_party("tiny = absent_package:Backend", code) == "onnxruntime"


def test_a_backend_that_is_registered_in_this_process_only(third_party: Callable[[str, str], str]) -> None:
    code = (
        "assert 'mine' not in registry.backend_names()\n"
        "registry.register_backend('mine', 'tiny_package:TinyBackend')\n"
        "print('mine' in registry.backend_names(), registry.backend_class('mine').name)"
    )
    assert third_party("", code) == "True tiny"


def test_open_by_suffix_and_by_name(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "a.onnx")
    for backend in (None, "onnxruntime"):
        for place in (path, str(path)):
            with open_backend(place, backend, "cpu") as opened:
                assert isinstance(opened, OnnxRuntimeBackend)
                assert opened.spec == SPEC
    assert read_spec(path) == read_spec(str(path)) == SPEC


@pytest.mark.parametrize("suffix", [".bin", ".pt", "", ".pth", ".pt2"])
def test_files_are_opened_by_their_content(tmp_path: Path, suffix: str) -> None:
    onnx = write_onnx(tmp_path / "a.onnx").rename(tmp_path / f"a{suffix}")
    script = write_torchscript(tmp_path / "b.torchscript.pt").rename(tmp_path / f"b{suffix}")
    assert backend_for(onnx) is OnnxRuntimeBackend
    assert backend_for(script) is TorchScriptBackend
    assert read_spec(onnx) == read_spec(script) == SPEC
    for path, backend in ((onnx, "onnxruntime"), (script, "torchscript")):
        with open_backend(path, device="cpu") as opened:
            assert opened.name == backend
        with open_backend(path, backend, "cpu") as opened:
            assert opened.spec == SPEC


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth.tar", ".safetensors", ".onnx"])
def test_checkpoints_are_recognized_by_their_content(tmp_path: Path, suffix: str) -> None:
    import safetensors.torch
    import torch

    path = tmp_path / f"x{suffix}"
    for write in (
        lambda: torch.save({}, path),
        lambda: torch.save({}, path, _use_new_zipfile_serialization=False),
        lambda: safetensors.torch.save_file({"a": torch.zeros(2)}, path),
    ):
        write()
        assert backend_for(path) is backend_class("pytorch")


def test_content_is_recognized_without_pytorch(tmp_path: Path, fresh_python: Callable[..., str]) -> None:
    path = write_torchscript(tmp_path / "a.torchscript.pt").rename(tmp_path / "a.bin")
    code = (
        "import sys; from pathlib import Path; from cifarx_serve.backends.registry import backend_for, read_spec\n"
        "print(backend_for(Path(sys.argv[1])).name, read_spec(sys.argv[1]).model, 'torch' in sys.modules)"
    )
    assert fresh_python(code, path) == "torchscript colors False"


def test_content_that_is_not_recognized(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"a picture")
    with pytest.raises(UsageError, match=r"no backend opens .*x\.bin \(its content is not recognized\)"):
        open_backend(tmp_path / "x.bin")


def test_a_model_repository_with_one_model_is_opened_as_this_model(tmp_path: Path) -> None:
    repository = tmp_path / "a.triton"
    (repository / "a" / "1").mkdir(parents=True)
    assert model_file(repository) == repository
    path = write_onnx(repository / "a" / "1" / "model.onnx")
    assert model_file(repository) == path
    assert model_file(path) == path
    with open_backend(repository, device="cpu") as opened:
        assert opened.spec == read_spec(repository) == SPEC


def test_a_model_repository_with_several_models_is_a_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "1").mkdir(parents=True)
        write_onnx(tmp_path / name / "1" / "model.onnx")
    with pytest.raises(ModelFileError, match="is a directory"):
        open_backend(tmp_path)


def test_a_backend_for_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        open_backend(write_onnx(tmp_path / "a.onnx"), "torchscript")
    assert "backend torchscript does not open" in raised.value.problem
    assert ".torchscript.pt" in raised.value.remedy


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript.pt", ".pth"])
def test_missing_files(suffix: str) -> None:
    path = Path(f"absent{suffix}")
    for attempt in (lambda: open_backend(path), lambda: read_spec(path)):
        with pytest.raises(ModelFileError, match=f"no such file absent{suffix}"):
            attempt()


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript.pt", ".pth"])
def test_directories_with_the_suffix_of_a_file(suffix: str) -> None:
    path = Path(f"folder{suffix}")
    path.mkdir()
    for attempt in (lambda: open_backend(path), lambda: read_spec(path)):
        with pytest.raises(ModelFileError, match="is a directory"):
            attempt()


def test_an_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        open_backend(write_onnx(tmp_path / "a.onnx"), device="tpu")


def made(name: str, age: int) -> Path:
    """Create an empty file that is `age` seconds old."""
    path = Path(name)
    path.touch()
    os.utime(path, ns=(10**18, 10**18 - age * 10**9))
    return path


def test_find_model_returns_the_newest() -> None:
    made("a.onnx", age=3)
    newest = made("b.int8.onnx", age=1)
    made("c.onnx", age=2)
    assert find_model(Path(), "onnxruntime") == newest


def test_find_model_ignores_files_that_the_backend_does_not_open() -> None:
    wanted = made("lzh_9.onnx", age=9)
    made(".partial.onnx", age=1)
    made("lzh_9.onnx.parity.json", age=1)
    made("lzh_9.torchscript.pt", age=2)
    made("lzh_9.pth", age=1)
    Path("folder.onnx").mkdir()
    Path("below").mkdir()
    made("below/deeper.onnx", age=1)
    assert find_model(Path(), "onnxruntime") == wanted
    assert find_model(Path(), "torchscript") == Path("lzh_9.torchscript.pt")


def test_find_model_returns_the_last_by_name_if_the_times_are_equal() -> None:
    for name in ("lzh_1.onnx", "lzh_3.onnx", "lzh_2.onnx"):
        made(name, age=1)
    assert find_model(Path(), "onnxruntime") == Path("lzh_3.onnx")


def test_find_model_without_a_model(tmp_path: Path) -> None:
    made("lzh_9.torchscript.pt", age=1)
    with pytest.raises(ModelFileError) as raised:
        find_model(Path(), "onnxruntime")
    assert "*.onnx" in raised.value.problem
    assert str(tmp_path) in raised.value.problem
    assert "--model" in raised.value.remedy


def test_find_model_with_an_unknown_backend() -> None:
    with pytest.raises(UsageError, match="unknown backend"):
        find_model(Path(), "onnxrt")


@pytest.mark.parametrize("name", ["a.onnx", "a.torchscript.pt"])
def test_a_file_that_does_not_match_its_checksum_is_not_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (write_onnx if name.endswith(".onnx") else write_torchscript)(path)
    write_checksum(path)
    open_backend(path, device="cpu").close()
    content = bytearray(path.read_bytes())
    place = content.index(b"GlobalAveragePool") if name.endswith(".onnx") else content.index(b"PK\1\2") + 12
    content[place] ^= 1
    path.write_bytes(content)
    for backend in (None, "onnxruntime" if name.endswith(".onnx") else "torchscript"):
        with pytest.raises(ModelFileError, match=f"the checksum of {path} does not match: get the file again"):
            open_backend(path, backend, "cpu")
