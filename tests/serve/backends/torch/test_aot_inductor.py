"""Test that unsafe packages are refused before they reach the library that would run their code."""

import io
import struct
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifarx_serve.backends.torch import aot_inductor
from cifarx_serve.backends.torch.aot_inductor import TRUST_VARIABLE, AotInductorBackend, target_machine, trust_package
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, OutputError, SpecError, UsageError
from cifarx_serve.spec import InputSpec, ModelSpec

CPU = Device("cpu")
CODE = "model/data/aotinductor/model/abc.wrapper.so"
SPEC = ModelSpec(
    model="lzh",
    class_names=("cat", "dog"),
    input=InputSpec(height=32, width=32),
    exporter={"cpu": "linux x86_64 avx2", "torch": "2.15.0"},
)


@pytest.fixture(autouse=True)
def _no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    monkeypatch.setattr(aot_inductor, "_trusted", set())


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if the library is called."""
    import torch

    def loader(*_: Any) -> None:
        pytest.fail("the package was passed to the library")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", loader)


def entries(spec: ModelSpec = SPEC) -> dict[str, bytes]:
    return {
        "model/archive_format": b"pt2",
        "model/archive_version": b"0",
        "model/byteorder": b"little",
        "model/.data/version": b"3\n",
        CODE: b"\x7fELF and nothing else",
        CODE.replace(".so", "_metadata.json"): b"{}",
        f"model/extra/{SPEC_FILE}": spec.to_json().encode(),
    }


def packed(content: dict[str, bytes], path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return packed(entries(), tmp_path / "lzh_9.aoti.pt2")


def test_reading_the_spec_needs_neither_trust_nor_pytorch(package: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from cifarx_serve.backends.torch.aot_inductor import AotInductorBackend\n"
        "print(AotInductorBackend.read_spec(Path(sys.argv[1])).to_json()); assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code, package], check=True, capture_output=True, text=True)
    assert ModelSpec.from_json(ran.stdout, "test") == SPEC


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("value", [None, "", "0", "true", "yes", "1 "])
def test_a_package_runs_only_if_the_user_trusts_it(
    package: Path, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(TRUST_VARIABLE, value)
    with pytest.raises(UsageError, match="machine code") as raised:
        AotInductorBackend(package, CPU)
    assert f"{TRUST_VARIABLE}=1" in raised.value.remedy


@pytest.mark.usefixtures("never_loads")
def test_the_content_is_trusted_and_not_the_path(package: Path) -> None:
    trust_package(package)
    packed(entries() | {CODE: b"\x7fELF of another package"}, package)
    with pytest.raises(UsageError, match="machine code"):
        AotInductorBackend(package, CPU)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.usefixtures("never_loads")
def test_the_only_device_is_the_cpu(package: Path, kind: Any) -> None:
    with pytest.raises(DeviceError, match=f"{kind} was requested"):
        AotInductorBackend(package, Device(kind))


@pytest.fixture
def this_machine() -> dict[str, str]:
    import torch

    if (machine := target_machine()) is None:
        pytest.skip("packages run only on Linux, on x86-64 with AVX2")
    return {"cpu": machine, "torch": str(torch.__version__)}


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"torch": "2.11.0"}, "torch 2.11.0"),
        ({"torch": None}, "torch None"),
        ({"cpu": "linux aarch64"}, "linux aarch64"),
        ({"cpu": None}, "compiled for None"),
    ],
)
def test_another_machine_or_torch_is_refused(
    tmp_path: Path, this_machine: dict[str, str], changed: dict[str, str | None], problem: str
) -> None:
    exporter = {key: value for key, value in {**this_machine, **changed}.items() if value is not None}
    package = packed(entries(msgspec.structs.replace(SPEC, exporter=exporter)), tmp_path / "x.aoti.pt2")
    trust_package(package)
    with pytest.raises(ModelFileError, match=problem) as raised:
        AotInductorBackend(package, CPU)
    assert "export it again" in raised.value.remedy


@pytest.mark.parametrize(
    ("system", "machine", "capability", "target"),
    [
        ("linux", "x86_64", "AVX2", "linux x86_64 avx2"),
        ("linux", "x86_64", "AVX512", "linux x86_64 avx2"),
        ("linux", "x86_64", "DEFAULT", None),
        ("linux", "aarch64", "DEFAULT", None),
        ("win32", "AMD64", "AVX2", None),
        ("darwin", "x86_64", "AVX2", None),
    ],
)
def test_the_machines_that_packages_run_on(
    system: str, machine: str, capability: str, target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platform

    import torch

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert target_machine() == target


def test_a_package_that_the_library_cannot_load(
    tmp_path: Path, this_machine: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = packed(entries(msgspec.structs.replace(SPEC, exporter=this_machine)), tmp_path / "x.aoti.pt2")
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    with pytest.raises(ModelFileError, match="not an AOTInductor package") as raised:
        AotInductorBackend(package, CPU)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().out == ""


def test_a_missing_temporary_directory_is_reported(
    tmp_path: Path, this_machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = packed(entries(msgspec.structs.replace(SPEC, exporter=this_machine)), tmp_path / "x.aoti.pt2")
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(OutputError, match=r"cannot unpack .*x\.aoti\.pt2 .*No such file") as raised:
        AotInductorBackend(package, CPU)
    assert "TMPDIR" in raised.value.remedy


UNEXPECTED = [
    "/etc/passwd",
    "../model/archive_format",
    "model/../../x.so",
    "model/data/aotinductor/model/../../../../x.wrapper.so",
    "model\\..\\x.wrapper.so",
    "model/data/aotinductor/other/abc.wrapper.so",
    "model/data/aotinductor/model/sub/abc.wrapper.so",
    "model/data/aotinductor/model/abc.wrapper.cpp",
    "model/data/weights/weight_0",
    "model/models/model.json",
    "model/extra/other.json",
    "model/data/aotinductor/model/",
    "other/archive_format",
    "archive_format",
]


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("name", UNEXPECTED)
@pytest.mark.parametrize("first", [True, False])
def test_an_unexpected_entry_is_refused(
    tmp_path: Path, name: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    content = {name: b"x", **entries()} if first else {**entries(), name: b"x"}
    package = packed(content, tmp_path / "x.aoti.pt2")
    for open_it in (AotInductorBackend.read_spec, lambda path: AotInductorBackend(path, CPU)):
        with pytest.raises(ModelFileError, match="an unexpected entry"):
            open_it(package)
    assert list(tmp_path.iterdir()) == [package]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_package_is_refused(tmp_path: Path, method: int) -> None:
    """Exported packages are not compressed, so the content is never larger than the file."""
    package = packed({**entries(), CODE: bytes(1 << 24)}, tmp_path / "x.aoti.pt2", method)
    assert package.stat().st_size < 1 << 18
    with pytest.raises(ModelFileError, match="compressed"):
        AotInductorBackend.read_spec(package)


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    """Many names for one large entry make a zip bomb without compression. The directory is written by hand."""
    package = packed({CODE: bytes(1 << 16)}, tmp_path / "x.aoti.pt2")
    content = package.read_bytes()
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry = content[start:end]
    directory = b"".join(entry.replace(b"abc.wrapper", b"ab%c.wrapper" % letter) for letter in b"defgh")
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 5, 5, len(directory), start, 0)
    package.write_bytes(content[:start] + directory + tail)
    with pytest.raises(ModelFileError, match="overlapping entries"):
        AotInductorBackend.read_spec(package)


def test_a_duplicate_entry_is_refused(tmp_path: Path) -> None:
    package = packed({CODE: b"x", CODE.replace("abc", "abd"): b"x"}, tmp_path / "x.aoti.pt2")
    package.write_bytes(package.read_bytes().replace(b"abd.wrapper", b"abc.wrapper"))
    with pytest.raises(ModelFileError, match="a duplicate entry"):
        AotInductorBackend.read_spec(package)


def test_a_package_without_a_spec_is_refused(tmp_path: Path) -> None:
    content = entries()
    del content[f"model/extra/{SPEC_FILE}"]
    with pytest.raises(ModelFileError, match="contains no model spec"):
        AotInductorBackend.read_spec(packed(content, tmp_path / "x.aoti.pt2"))


def test_a_huge_spec_is_refused_before_it_is_read(tmp_path: Path) -> None:
    content = entries() | {f"model/extra/{SPEC_FILE}": b" " * ((1 << 24) + 1)}
    with pytest.raises(ModelFileError, match="a spec of 16777217 bytes"):
        AotInductorBackend.read_spec(packed(content, tmp_path / "x.aoti.pt2"))


def test_a_malformed_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        AotInductorBackend.read_spec(packed(entries() | {f"model/extra/{SPEC_FILE}": b"{}"}, tmp_path / "x.aoti.pt2"))


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.aoti.pt2"):
        with pytest.raises(ModelFileError):
            AotInductorBackend(path, CPU)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.aoti.pt2"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        AotInductorBackend.read_spec(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_damaged_packages_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """After a flipped bit or a truncation, the spec is unchanged or one of our own exceptions is raised."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in entries().items():
            archive.writestr(zipfile.ZipInfo(name), value)
    content = bytearray(buffer.getvalue())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    path = tmp_path / "x.aoti.pt2"
    path.write_bytes(content)
    with suppress(ModelFileError, SpecError):
        assert AotInductorBackend.read_spec(path) == SPEC


def test_a_batch_of_any_strides_is_made_contiguous() -> None:
    """The compiled code assumes the strides of a contiguous batch."""
    import torch

    received: list[torch.Tensor] = []

    class Loader:
        def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            received.extend(inputs)
            return [torch.zeros(len(inputs[0]), 2)]

    backend = AotInductorBackend.__new__(AotInductorBackend)
    backend._init_module(Loader(), torch.device("cpu"))
    batch = np.zeros((4, 32, 32, 3), np.float32).transpose(0, 3, 1, 2)
    logits = backend.run(batch)
    assert (logits.shape, logits.dtype) == ((4, 2), np.float32)
    assert received[0].is_contiguous()
