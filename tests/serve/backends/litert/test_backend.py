import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifarx_serve.backends.base import TensorInfo
from cifarx_serve.backends.litert.backend import LiteRtBackend
from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, ModelFileError, SpecError, UsageError
from cifarx_serve.files.checksum import write_checksum
from tests.support.litert_model import IF, MEAN, Fields, requires_litert, spec_document, write_litert

CPU = Device("cpu")
BATCH = np.stack([np.full((4, 6, 3), level, np.float32) for level in (0.5, 1)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_litert(tmp_path_factory.mktemp("written") / "colors.tflite")
    write_checksum(path)
    return path


@requires_litert
def test_logits_of_any_number_of_images(written: Path) -> None:
    batch = np.zeros((5, 4, 6, 3), np.float32)
    batch[0, ..., 1] = 0.5
    batch[1, 0, 0, 2] = 1
    batch[4] = 1
    with LiteRtBackend(written, CPU) as backend:
        logits = backend.run(batch)
        assert backend.provider == "LiteRT CPU"
        np.testing.assert_array_equal(backend.run(batch[:1]), logits[:1])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[:2], np.array([[0, 5, 0], [0, 0, 10 / 24]]), rtol=1e-6)
    np.testing.assert_allclose(logits[2:], [[0, 0, 0], [0, 0, 0], [10, 10, 10]], rtol=1e-6)


@requires_litert
def test_results_are_not_overwritten_by_the_next_run(written: Path) -> None:
    with LiteRtBackend(written, CPU) as backend:
        first = backend.run(BATCH)
        kept = first.copy()
        backend.run(BATCH * 2)
        np.testing.assert_array_equal(first, kept)


@requires_litert
def test_tensors_are_described(written: Path) -> None:
    with LiteRtBackend(written, CPU) as backend:
        assert backend.tensor_infos() == (
            TensorInfo("input", "float32", ("batch", 4, 6, 3)),
            TensorInfo("logits", "float32", ("batch", 3)),
        )


@requires_litert
def test_a_second_backend_for_one_thread_outlives_the_first(written: Path) -> None:
    with LiteRtBackend(written, CPU) as backend:
        other, expected = backend.single_threaded(), backend.run(BATCH)
    with other:
        np.testing.assert_array_equal(other.run(BATCH), expected)


@requires_litert
def test_runs_at_once_do_not_mix_their_images(written: Path) -> None:
    batches = [np.full((3, 4, 6, 3), level, np.float32) for level in range(16)]
    ready = threading.Barrier(4)
    with LiteRtBackend(written, CPU) as backend, ThreadPoolExecutor(4, initializer=ready.wait) as pool:
        for batch, logits in zip(batches * 8, pool.map(backend.run, batches * 8), strict=True):
            np.testing.assert_array_equal(logits, np.full((3, 3), 10 * batch[0, 0, 0, 0]))


@requires_litert
def test_notes_of_the_library_are_left_out(written: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LiteRtBackend(written, CPU) as backend:
        backend.run(BATCH)
    assert capfd.readouterr() == ("", "")


def test_the_spec_is_read_without_litert(written: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cifarx_serve.backends.registry import read_spec; "
        f"print(read_spec(Path({str(written)!r})).input.layout, 'ai_edge_litert' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["NHWC", "False"]


def test_the_missing_library_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(UsageError, match=r'LiteRT is not installed: pip install "cifarx\[litert\]"'):
        LiteRtBackend(written, CPU)


def test_another_device_than_the_cpu_is_refused(written: Path) -> None:
    with pytest.raises(DeviceError, match=r"runs on the CPU, but cuda was requested: use --device cpu"):
        LiteRtBackend(written, Device("cuda", 0))


@requires_litert
@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (1, 4, 6), (2, 5, 6, 3)])
def test_an_image_of_another_size_is_one_line(shape: tuple[int, ...], written: Path) -> None:
    with LiteRtBackend(written, CPU) as backend:
        with pytest.raises(ModelFileError, match=r"cannot run on float32 .*: export it again") as raised:
            backend.run(np.zeros(shape, np.float32))
        assert "\n" not in str(raised.value)
        assert len(backend.run(BATCH)) == 2


# --- damaged and hostile files


def test_a_file_of_another_program_has_no_spec(tmp_path: Path) -> None:
    path = write_litert(tmp_path / "a.tflite", "")
    with pytest.raises(ModelFileError, match="contains no model spec"):
        read_spec(path)


def test_a_malformed_spec_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="malformed model spec"):
        read_spec(write_litert(tmp_path / "a.tflite", spec_document().replace("NHWC", "HWNC")))


def test_what_no_export_writes_is_refused_before_litert_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    path = write_litert(tmp_path / "a.tflite", fields=Fields(codes=[MEAN, IF]))
    with pytest.raises(ModelFileError, match=r"is not a model that LiteRT runs \(it has the operator 118,") as raised:
        LiteRtBackend(path, CPU)
    assert "\n" not in str(raised.value)


@requires_litert
def test_operators_that_do_not_fit_together_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The last axis of the mean is one that the image does not have."""
    buffers = [b"", np.array([1, 9], "<i4").tobytes(), np.array([10], "<f4").tobytes()]
    path = write_litert(tmp_path / "a.tflite", fields=Fields(buffers=buffers))
    with pytest.raises(ModelFileError, match="is not a model that LiteRT runs") as raised:
        LiteRtBackend(path, CPU)
    assert "\n" not in str(raised.value)
    assert "INFO" not in capfd.readouterr().err


def test_a_short_file_is_one_line(tmp_path: Path) -> None:
    for content in (b"", b"TFL3", b"\x1c\0\0\0TFL3", b"\xff" * 40):
        (tmp_path / "a.tflite").write_bytes(content)
        with pytest.raises(CifarxError) as raised:
            open_backend(tmp_path / "a.tflite")
        assert "\n" not in str(raised.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(position: float, bit: int, written: Path, tmp_path: Path) -> None:
    content = bytearray(written.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    (tmp_path / "a.tflite").write_bytes(content)
    with pytest.raises(CifarxError):
        open_backend(tmp_path / "a.tflite")


_OPEN = """
import sys
from pathlib import Path
import numpy as np
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.errors import CifarxError
for line in sys.stdin:
    path = Path(line.strip())
    try:
        with open_backend(path) as backend:
            backend.run(np.ones((1, 4, 6, 3), np.float32))
        print("runs", flush=True)
    except CifarxError as error:
        print("one line" if "\\n" not in str(error) else "lines", flush=True)
"""


@requires_litert
@pytest.mark.slow
def test_a_thousand_flipped_bytes_with_a_new_checksum_never_end_the_process(written: Path, tmp_path: Path) -> None:
    """The checksum does not help against who changes a file on purpose. What the graph still describes may run."""
    generator, original = random.Random(0), written.read_bytes()
    paths = []
    for number in range(1000):
        content = bytearray(original)
        content[generator.randrange(len(content))] ^= generator.randrange(1, 256)
        path = tmp_path / f"{number}.tflite"
        path.write_bytes(content)
        write_checksum(path)
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", _OPEN], input="\n".join(paths), capture_output=True, text=True, check=True
    )
    outcomes = Counter(done.stdout.splitlines())
    assert outcomes["one line"] > 300
    assert outcomes["one line"] + outcomes["runs"] == 1000
