"""Run the real program on malicious files: one line of error, exit status 2, little time and memory."""

import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from PIL import Image

from cifarx_serve.backends.torch.base import SPEC_FILE
from tests.support.color_model import SPEC, write_onnx, write_torchscript

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS works only on Linux"),
]

PROGRAM = Path(sys.executable).with_name("cifarx")
LIMIT = 6 << 30
"""The limit of the address space in bytes, a bit more than PyTorch's libraries need."""


def external(path: Path) -> None:
    model = onnx.load(write_onnx(path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../../etc/passwd")
    path.write_bytes(model.SerializeToString())


def huge_tensor(path: Path) -> None:
    model = onnx.load(write_onnx(path))
    model.graph.initializer[0].dims[0] = 1 << 40
    path.write_bytes(model.SerializeToString())


def nested(path: Path) -> None:
    graph = b""
    for _ in range(10_000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # a graph in an attribute in a node
            graph = tag + varint(len(graph)) + graph
    path.write_bytes(b"\x08\x0a\x3a" + varint(len(graph)) + graph)


def metadata(path: Path) -> None:
    path.write_bytes(write_onnx(path).read_bytes() + b"\x72\x06\x0a\x01k\x12\x01v" * 1_000_000)


def overrun(path: Path) -> None:
    path.write_bytes(b"\x08\x0a\x3a" + varint(1 << 62))


def future(path: Path) -> None:
    write_onnx(path, SPEC.to_json().replace('"minimum_onnxruntime":null', '"minimum_onnxruntime":"99.0"'))


def bomb(path: Path) -> None:
    with (
        zipfile.ZipFile(write_torchscript(path), "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data/bomb", "w", force_zip64=True) as member,
    ):
        for _ in range(1024):
            member.write(bytes(1 << 20))


def traversal(path: Path) -> None:
    with zipfile.ZipFile(write_torchscript(path), "a") as archive:
        archive.writestr("../../../../tmp/outside", b"")


class Writing(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.save(images, "written")
        return images.mean((2, 3))


def writing(path: Path) -> None:
    torch.jit.save(torch.jit.script(Writing()), str(path), _extra_files={SPEC_FILE: SPEC.to_json()})


def random_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4000)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "external.onnx": (external, "stores its weights in another file"),
    "huge.onnx": (huge_tensor, "has a tensor"),
    "nested.onnx": (nested, "messages deep"),
    "metadata.onnx": (metadata, "metadata"),
    "overrun.onnx": (overrun, "is not a valid ONNX model"),
    "future.onnx": (future, "requires ONNX Runtime >= 99.0"),
    "noise.onnx": (random_bytes, "is not a valid ONNX model"),
    "bomb.torchscript.pt": (bomb, "its compressed members unpack to"),
    "traversal.torchscript.pt": (traversal, "has an unsafe path"),
    "writing.torchscript.pt": (writing, "contains code that does more than compute tensors"),
    "noise.torchscript.pt": (random_bytes, "is not a zip archive"),
    "noise.pth": (random_bytes, "is not a readable checkpoint"),
}
SAFE_TO_INSPECT = {"future.onnx", "writing.torchscript.pt"}
"""Files that are harmless until they are opened, so `inspect` shows their spec."""


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_malicious_files_are_refused_with_one_line(name: str, tmp_path: Path) -> None:
    make, words = HOSTILE[name]
    make(tmp_path / name)
    (tmp_path / "written").unlink(missing_ok=True)
    Image.new("RGB", (6, 4)).save(tmp_path / "x.png")
    for line in (f"infer x.png --model {name}", f"inspect {name}", f"verify {name} --ckpt absent.pth"):
        ran, seconds = run(line, tmp_path)
        if line.startswith("inspect") and name in SAFE_TO_INSPECT:
            assert ran.returncode == 0
            continue
        assert ran.returncode == 2, ran.stderr
        assert ran.stdout == ""
        errors = ran.stderr.strip().splitlines()
        assert len(errors) == 1, ran.stderr
        assert errors[0].startswith("error: ")
        assert words in errors[0] or "absent.pth" in errors[0]
        assert "internal error" not in errors[0]
        assert seconds < 60
    assert not (tmp_path / "written").exists()


def run(line: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))

    started = time.perf_counter()
    ran = subprocess.run(
        [PROGRAM, *line.split()], capture_output=True, text=True, check=False, cwd=folder, preexec_fn=limit
    )
    return ran, time.perf_counter() - started
