"""ExecuTorch files run at any batch size, and damaged or hostile ones are one line."""

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cifarx_serve.backends.base import TensorInfo
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.backends.torch.executorch import ExecuTorchBackend
from cifarx_serve.backends.torch.executorch_program import read_program
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, UsageError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.files.trailing_document import append_document
from tests.support.color_model import SPEC

pytest.importorskip("executorch", reason='no ExecuTorch: pip install "cifarx[executorch]"')

CPU = Device("cpu")
ROOT = Path(__file__).parents[4]
MAX_BATCH = 5


class Colors(nn.Module):
    """The mean of each color, ten times."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data.copy_(10 * torch.eye(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(images.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def program() -> bytes:
    from cifarx_export.formats.executorch import lowering

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "MAX_BATCH_SIZE", MAX_BATCH)
        return lowering.lower(lowering.export_module(Colors().eval(), torch.rand(2, 3, 4, 6)))


def write(path: Path, program: bytes, document: str | None = SPEC.to_json()) -> Path:
    path.write_bytes(program)
    if document is not None:
        append_document(path, document.encode())
    return path


@pytest.fixture
def written(program: bytes, tmp_path: Path) -> Path:
    return write(tmp_path / "colors.pte", program)


@pytest.mark.parametrize("size", [1, 4, 5, 6, 13])
def test_logits_at_any_batch_size(written: Path, size: int) -> None:
    batch = np.random.default_rng(0).random((size, 3, 4, 6), np.float32)
    with ExecuTorchBackend(written, CPU) as backend:
        assert backend.provider == "ExecuTorch XNNPACK"
        assert backend.max_batch_size == MAX_BATCH
        logits = backend.run(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, 10 * batch.mean((2, 3)), rtol=1e-5)


def test_results_are_not_overwritten_by_the_next_run(written: Path) -> None:
    with ExecuTorchBackend(written, CPU) as backend:
        first = backend.run(np.ones((2, 3, 4, 6), np.float32))
        kept = first.copy()
        backend.run(np.zeros((2, 3, 4, 6), np.float32))
        np.testing.assert_array_equal(first, kept)


def test_two_files_can_be_open(written: Path) -> None:
    batch = np.ones((1, 3, 4, 6), np.float32)
    with ExecuTorchBackend(written, CPU) as first, ExecuTorchBackend(written, CPU) as second:
        np.testing.assert_array_equal(first.run(batch), second.run(batch))


def test_tensors_are_described(written: Path) -> None:
    with ExecuTorchBackend(written, CPU) as backend:
        assert backend.tensor_infos() == (
            TensorInfo("input", "float32", ("batch", 3, 4, 6)),
            TensorInfo("logits", "float32", ("batch", 3)),
        )


def test_the_spec_is_read_without_executorch_and_pytorch(written: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cifarx_serve.backends.registry import read_spec; "
        f"print(read_spec(Path({str(written)!r})).model, 'executorch' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["colors", "False", "False"]


def test_opening_a_file_writes_nothing_and_imports_no_exporter(written: Path) -> None:
    code = (
        "import sys; from cifarx_serve.backends.registry import open_backend; "
        f"open_backend({str(written)!r}).close(); print('executorch.exir' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_missing_library_is_named(written: Path) -> None:
    code = (
        "import sys; sys.modules['executorch'] = None; from cifarx_serve.errors import UsageError\n"
        "from cifarx_serve.backends.registry import open_backend\n"
        f"try: open_backend({str(written)!r})\nexcept UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'ExecuTorch is not installed: pip install "cifarx[executorch]"\n'


def test_another_device_than_the_cpu_is_refused(written: Path) -> None:
    with pytest.raises(DeviceError, match=r"runs on the CPU, but cuda was requested: use --device cpu"):
        ExecuTorchBackend(written, Device("cuda", 0))


@pytest.mark.parametrize("batch", [np.zeros((1, 2, 4, 6), np.float32), np.zeros((1, 3, 4, 6), np.uint8)])
def test_another_batch_is_one_line(written: Path, batch: np.ndarray) -> None:
    with (
        ExecuTorchBackend(written, CPU) as backend,
        pytest.raises(ModelFileError, match=r"takes float32 \(batch, 3, 4, 6\), not "),
    ):
        backend.run(batch)


# --- damaged and hostile files


def test_a_file_of_another_program_has_no_spec(program: bytes) -> None:
    with pytest.raises(ModelFileError, match="contains no model spec"):
        ExecuTorchBackend(write(Path("a.pte"), program, None), CPU)


def with_delegate(program: bytes) -> bytes:
    return program.replace(b"XnnpackBackend", b"OpenvinoBackend"[:14])


def with_method(program: bytes) -> bytes:
    return program.replace(b"forward\0", b"wayward\0")


def with_header_size(program: bytes) -> bytes:
    return program[:16] + struct.pack("<Q", 1 << 40) + program[24:]


def with_memory(program: bytes) -> bytes:
    """Claim a hundred times the memory of the first arena that is used."""
    memory = read_program(write(Path("intact.pte"), program)).memory
    return program.replace(struct.pack("<QQ", 0, memory), struct.pack("<QQ", 0, 1 << 40))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(with_delegate, "has the delegate 'OpenvinoBacken', which no export writes", id="delegate"),
        pytest.param(with_method, "has the method 'wayward' instead of forward", id="method"),
        pytest.param(with_memory, "has activations of 1,024.0 GiB, which no export writes", id="memory"),
        pytest.param(with_header_size, r"is not an ExecuTorch program \(it has no header\)", id="size"),
        pytest.param(lambda program: program[:8], "is not an ExecuTorch program", id="truncated"),
        pytest.param(lambda _: b"", "is not an ExecuTorch program", id="empty"),
    ],
)
def test_what_no_export_writes_is_one_line(
    change: Callable[[bytes], bytes], problem: str, program: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = change(program)
    assert changed != program
    with pytest.raises(ModelFileError, match=problem) as raised:
        ExecuTorchBackend(write(Path("a.pte"), changed), CPU)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_weights_that_are_missing_are_one_line(program: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(Path("a.pte"), program[:-40], None)
    append_document(path, b"")
    header = struct.unpack_from("<Q", program, 32)[0]
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 32, header + (1 << 20))
    path.write_bytes(content)
    append_document(path, SPEC.to_json().encode())
    with pytest.raises(ModelFileError, match=r"is not a program that ExecuTorch runs \(File size is too small"):
        ExecuTorchBackend(path, CPU)
    assert capfd.readouterr().err == ""


def test_a_jump_is_refused(program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without its own loop: the type of its first instruction stands for that of a jump."""
    monkeypatch.setattr("cifarx_serve.backends.torch.executorch_program._JUMP", 2)  # a call of a delegate
    with pytest.raises(ModelFileError, match="has a jump, which no export writes"):
        ExecuTorchBackend(write(Path("a.pte"), program), CPU)


def test_a_flipped_byte_is_found(written: Path) -> None:
    write_checksum(written)
    content = written.read_bytes()
    generator = random.Random(0)
    for _ in range(1000):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= generator.randrange(1, 256)
        written.write_bytes(changed)
        with pytest.raises((ModelFileError, UsageError)):
            open_backend(written, device="cpu")


CHILD = """
import random, sys
from pathlib import Path
import numpy as np
from cifarx_serve.backends.torch.executorch import ExecuTorchBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError
path, seed, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
content, generator = path.read_bytes(), random.Random(seed)
changed = path.with_name(f"changed{seed}.pte")
for _ in range(50):
    flipped = bytearray(content)
    flipped[generator.randrange(size)] ^= generator.randrange(1, 256)
    changed.write_bytes(flipped)
    try:
        with ExecuTorchBackend(changed, Device("cpu")) as backend:
            backend.run(np.ones((2, *backend.tensor_infos()[0].shape[1:]), np.float32))
    except CifarxError as error:
        assert "\\n" not in str(error)
print("survived")
"""


@pytest.mark.slow
def test_most_flips_that_no_checksum_finds_leave_the_process_alive(written: Path, program: bytes) -> None:
    """Without its checksum, a file is as if it had been changed on purpose. The runtime cannot survive every change."""
    done = [
        subprocess.run(
            [sys.executable, "-c", CHILD, str(written), str(seed), str(len(program))],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        for seed in range(4)
    ]
    assert not [process for process in done if process.returncode > 0], [process.stderr[-500:] for process in done]
