"""AOTInductor packages: their logits, their content, and what compiling leaves behind. All tests share one."""

import getpass
import importlib
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from cifarx_export.formats.aot_inductor import converter
from cifarx_export.formats.aot_inductor.converter import AotInductorArtifact, convert_to_aot_inductor
from cifarx_serve.backends.torch.aot_inductor import TRUST_VARIABLE, AotInductorBackend, target_machine
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.devices import Device
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.conversion import conversion_source

CPU = Device("cpu")

pytestmark = pytest.mark.timeout(900)  # compiling takes minutes on a busy machine


def reason_to_skip() -> str | None:
    """Return the reason why this machine cannot compile packages."""
    if target_machine() is None:
        return "AOTInductor packages are for Linux on x86-64 with AVX2"
    try:
        converter._require_compiler()
    except UsageError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


class Compiled(NamedTuple):
    artifact: AotInductorArtifact
    spec: ModelSpec
    path: Path
    leftover: list[str]
    printed: str


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Write to a file what this process prints, and what the compilers that it starts print."""
    saved = {number: os.dup(number) for number in (1, 2)}
    with path.open("wb") as file:
        for number in saved:
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number, descriptor in saved.items():
                os.dup2(descriptor, number)
                os.close(descriptor)


@pytest.fixture(scope="module")
def compiled(loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Compile the network, which takes about a minute. Its output and leftover files are kept for the tests."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    importlib.import_module("torch._dynamo.package")  # creates an empty cache folder, even if nothing is compiled

    folder, temporary = tmp_path_factory.mktemp("aoti"), tmp_path_factory.mktemp("temporary")
    source = conversion_source(loaded)
    with pytest.MonkeyPatch.context() as patch, printing_to(folder / "printed"):
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.chdir(temporary)
        [artifact] = convert_to_aot_inductor(source)
    path = folder / "a-name-to-search-for.aoti.pt2"
    spec = artifact.complete_spec(source.spec)
    artifact.save(path, spec)
    return Compiled(artifact, spec, path, [file.name for file in temporary.iterdir()], (folder / "printed").read_text())


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_a_missing_compiler_is_reported_before_compiling(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "target_machine", lambda: "linux x86_64 avx2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UsageError, match=r"^AOTInductor needs a C\+\+ compiler, and no-such-compiler was not found: install"
    ) as raised:
        next(convert_to_aot_inductor(conversion_source(loaded)))
    assert "CXX" in raised.value.remedy
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"and g\+\+ was not found: install"):
        next(convert_to_aot_inductor(conversion_source(loaded)))


def test_an_unsupported_machine_is_reported(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "target_machine", lambda: None)
    message = r"^AOTInductor packages can only be compiled on Linux, for x86-64 with AVX2: use --format onnx, or"
    with pytest.raises(UsageError, match=message):
        next(convert_to_aot_inductor(conversion_source(loaded)))


@pytest.mark.slow
def test_logits_match_the_network_at_any_batch_size(compiled: Compiled, loaded: Checkpoint) -> None:
    module = loaded.build()
    with AotInductorBackend(compiled.path, CPU) as backend:
        assert (backend.provider, backend.spec) == ("cpu", compiled.spec)
        for size in (1, 2, 3, 64, 1000):
            batch = np.random.default_rng(size).random((size, 3, 32, 32), np.float32)
            with torch.inference_mode():
                expected = module(torch.from_numpy(batch)).numpy()
            logits = backend.run(batch)
            assert (logits.dtype, logits.shape) == (np.float32, (size, 10))
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
            strided = np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(backend.run(strided), logits)


@pytest.mark.slow
def test_an_open_package_leaves_nothing_in_the_temporary_folder(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process could not remove it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with AotInductorBackend(compiled.path, CPU) as backend:
        assert list(tmp_path.iterdir()) == []
        assert backend.run(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)


@pytest.mark.slow
def test_a_package_of_another_process_must_be_trusted(compiled: Compiled) -> None:
    code = (
        "import sys; from pathlib import Path; import numpy as np; from cifarx_serve.devices import Device\n"
        "from cifarx_serve.backends.torch.aot_inductor import AotInductorBackend\n"
        "with AotInductorBackend(Path(sys.argv[1]), Device('auto')) as backend:\n"
        "    print(backend.run(np.zeros((1, 3, 32, 32), np.float32)).shape)\n"
        "    assert 'torch._inductor' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != TRUST_VARIABLE}
    command = [sys.executable, "-c", code, str(compiled.path)]
    refused = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert refused.returncode != 0
    assert f"set {TRUST_VARIABLE}=1" in refused.stderr
    trusted = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**environment, TRUST_VARIABLE: "1"}
    )
    assert trusted.stdout == "(1, 10)\n"


@pytest.mark.slow
def test_the_spec_states_the_machine_and_the_version_of_torch(compiled: Compiled) -> None:
    assert AotInductorBackend.read_spec(compiled.path) == compiled.spec
    exporter = compiled.spec.exporter or {}
    assert exporter["cpu"] == "linux x86_64 avx2"
    assert exporter["torch"] == str(torch.__version__)


@pytest.mark.slow
def test_the_code_requires_no_more_than_the_spec_states(compiled: Compiled) -> None:
    (metadata,) = {value for name, value in entries(compiled.path).items() if name.endswith("_metadata.json")}
    assert msgspec.json.decode(metadata)["AOTI_CPU_ISA"] == "AVX2"


@pytest.mark.slow
def test_another_version_of_torch_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    other = msgspec.structs.replace(compiled.spec, exporter={**(compiled.spec.exporter or {}), "torch": "2.11.0"})
    compiled.artifact.save(tmp_path / "other.aoti.pt2", other)
    with pytest.raises(ModelFileError, match=r"torch 2\.11\.0"):
        AotInductorBackend(tmp_path / "other.aoti.pt2", CPU)


@pytest.mark.slow
def test_the_file_contains_nothing_about_this_machine(compiled: Compiled) -> None:
    content = compiled.path.read_bytes()
    folders = {
        Path.home(),
        Path(__file__).parents[4],
        Path(sys.prefix),
        Path(sysconfig.get_path("purelib")),
        Path(tempfile.gettempdir()),
        compiled.path.parent.parent,
    }
    for folder in folders - {Path("/")}:
        assert os.fsencode(folder) + b"/" not in content
    assert b"a-name-to-search-for" not in content
    assert b"site-packages" not in content
    text = b"\n".join(re.findall(rb"[\x20-\x7e]{6,}", content)).decode()
    for name in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)


@pytest.mark.slow
def test_the_archive_contains_a_library_and_no_source(compiled: Compiled) -> None:
    names = set(entries(compiled.path))
    assert not any(name.endswith((".cpp", ".h", ".o", ".pkl")) for name in names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    with zipfile.ZipFile(compiled.path) as archive:
        assert archive.testzip() is None


@pytest.mark.slow
def test_saving_with_another_spec_changes_only_the_spec(compiled: Compiled, tmp_path: Path) -> None:
    other = msgspec.structs.replace(compiled.spec, checkpoint_sha256="0" * 64)
    compiled.artifact.save(tmp_path / "other.aoti.pt2", other)
    first, second = entries(compiled.path), entries(tmp_path / "other.aoti.pt2")
    assert {name for name in first if first[name] != second[name]} == {f"extra/{SPEC_FILE}"}
    assert first.keys() == second.keys()
    compiled.artifact.save(tmp_path / "again.aoti.pt2", compiled.spec)
    assert (tmp_path / "again.aoti.pt2").read_bytes() == compiled.path.read_bytes()


@pytest.mark.slow
def test_compiling_prints_nothing_and_leaves_no_files(compiled: Compiled) -> None:
    assert compiled.printed == ""
    assert compiled.leftover == []
