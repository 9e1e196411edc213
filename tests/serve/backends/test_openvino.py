import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifarx_serve.backends.base import TensorInfo
from cifarx_serve.backends.openvino import GRAPH_FILE, WEIGHTS_FILE, OpenVinoBackend
from cifarx_serve.backends.registry import open_backend
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, FallbackWarning, ModelFileError, UsageError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.system.cpus import available_cpus
from tests.support.color_model import SPEC, write_openvino

openvino = pytest.importorskip("openvino")

CPU = Device("cpu")
BATCH = np.stack([np.full((3, 4, 6), level, np.float32) for level in (0.5, 1)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_openvino(tmp_path_factory.mktemp("written") / "colors.openvino.zip")


@pytest.fixture(scope="module")
def members(written: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(written) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_logits(written: Path) -> None:
    batch = np.zeros((2, 3, 4, 6), np.float32)
    batch[0, 1] = 0.5
    batch[1, 2, 0, 0] = 1
    with OpenVinoBackend(written, CPU) as backend:
        logits = backend.run(batch)
        assert backend.provider == "OpenVINO CPU"
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.array([[0, 5, 0], [0, 0, 10 / 24]]), rtol=1e-6)


def test_results_are_not_overwritten_by_the_next_run(written: Path) -> None:
    with OpenVinoBackend(written, CPU) as backend:
        first = backend.run(BATCH)
        kept = first.copy()
        backend.run(BATCH * 2)
        np.testing.assert_array_equal(first, kept)


def test_several_threads_run_at_once(written: Path) -> None:
    batches = [np.full((5_000, 3, 4, 6), number, np.float32) for number in range(8)]  # large: the runs must overlap
    with OpenVinoBackend(written, CPU) as backend, ThreadPoolExecutor(4) as pool:
        expected = [backend.run(batch) for batch in batches]
        for _ in range(5):
            np.testing.assert_array_equal(list(pool.map(backend.run, batches)), expected)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="requires Linux")
@pytest.mark.skipif(available_cpus() < 2, reason="requires two CPUs")
def test_its_threads_may_run_on_every_cpu(written: Path) -> None:
    """Pinned threads of the workers of a server would share one CPU."""
    with OpenVinoBackend(written, CPU) as backend, backend.single_threaded() as other:
        other.run(BATCH)
        backend.run(BATCH)
        threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {frozenset(os.sched_getaffinity(0))}


def test_tensors_are_described(written: Path) -> None:
    with OpenVinoBackend(written, CPU) as backend:
        assert backend.tensor_infos() == (
            TensorInfo("input", "float32", ("batch", 3, "any", "any")),
            TensorInfo("logits", "float32", ("batch", 3)),
        )


def test_a_second_backend_for_one_thread_outlives_the_first(written: Path) -> None:
    with OpenVinoBackend(written, CPU) as backend:
        other, expected = backend.single_threaded(), backend.run(BATCH)
    with other:
        np.testing.assert_array_equal(other.run(BATCH), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_precision_is_that_of_the_file_and_not_a_default(precision: str, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, precision=precision)
    path = write_openvino(tmp_path / "a.openvino.zip", spec.to_json())
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and not has_bf16:
        with pytest.warns(FallbackWarning, match="this CPU has no instructions for bf16: OpenVINO computes in f32"):
            OpenVinoBackend(path, CPU).close()
        return
    exact = np.full((1, 3, 4, 6), 1 + 2**-12, np.float32)  # bf16 has 8 bits
    with OpenVinoBackend(path, CPU) as backend:
        rounded = not np.allclose(backend.run(exact), 10 * exact[0, 0, 0, 0], rtol=1e-5)
        assert backend.provider == ("OpenVINO CPU in bf16" if precision == "bf16" else "OpenVINO CPU")
    assert rounded == (precision == "bf16")


def test_the_spec_is_read_without_openvino(written: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cifarx_serve.backends.registry import read_spec; "
        f"print(read_spec(Path({str(written)!r})).model, 'openvino' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["colors", "False"]


def test_the_missing_library_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r'OpenVINO is not installed: pip install "cifarx\[openvino\]"'):
        OpenVinoBackend(written, CPU)


def test_a_device_of_another_library_is_refused(written: Path) -> None:
    problem = r"runs on the CPU, or on the GPU or NPU of Intel, but cuda was requested: use --device cpu"
    with pytest.raises(DeviceError, match=problem):
        OpenVinoBackend(written, Device("cuda", 0))


@pytest.mark.parametrize("name", ["gpu", "npu"])
def test_a_device_that_is_not_there(name: Literal["gpu", "npu"], written: Path) -> None:
    if any(device.startswith(name.upper()) for device in openvino.Core().available_devices):
        pytest.skip(f"this machine has one: {name}")
    with pytest.raises(DeviceError, match=rf"OpenVINO finds no {name.upper()} on this machine, but CPU: use --device"):
        OpenVinoBackend(written, Device(name))


def test_a_gpu_is_used_without_the_options_of_a_cpu(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is that of a library whose CPU takes its place."""
    compiled: list[tuple[str, set[str]]] = []
    core: Any = openvino.Core

    class CoreWithGpu(core):
        available_devices = ["CPU", "GPU.0", "GPU.1"]  # noqa: RUF012

        def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Any:
            compiled.append((device, set(options)))
            return super().compile_model(model, "CPU", options)

    monkeypatch.setattr(openvino, "Core", CoreWithGpu)
    with OpenVinoBackend(written, Device("gpu")) as backend:
        assert backend.single_threaded() is backend
        assert backend.run(BATCH).shape == (2, 3)
    assert compiled == [("GPU", {"INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT"})]


def test_an_image_of_another_size_is_one_line(written: Path) -> None:
    with (
        OpenVinoBackend(written, CPU) as backend,
        pytest.raises(ModelFileError, match=r"cannot run on float32 \(1, 2, 4, 6\) \(Can't set the input .*\): "),
    ):
        backend.run(np.zeros((1, 2, 4, 6), np.float32))


# --- damaged and hostile files


def replace(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        assert old in members[GRAPH_FILE]
        return {GRAPH_FILE: members[GRAPH_FILE].replace(old, new, 1)}

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(replace(b'type="MatMul"', b'type="Loop"'), "a layer 'Loop', which no export writes", id="loop"),
        pytest.param(
            replace(b'version="opset1"', b'version="extension"'), "which no export writes", id="operator of a library"
        ),
        pytest.param(
            replace(b'type="MatMul"', b'type="NoSuch"'), "not a model that OpenVINO runs", id="unknown operator"
        ),
        pytest.param(lambda _: {GRAPH_FILE: b"<net"}, "not a model that OpenVINO runs", id="no XML"),
        pytest.param(lambda _: {GRAPH_FILE: b""}, "not a model that OpenVINO runs", id="empty graph"),
        pytest.param(lambda _: {WEIGHTS_FILE: b""}, "not a model that OpenVINO runs", id="no weights"),
        pytest.param(
            lambda members: {WEIGHTS_FILE: members[WEIGHTS_FILE][:8]},
            "not a model that OpenVINO runs",
            id="few weights",
        ),
    ],
)
def test_what_no_export_writes_is_one_line(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], problem: str, members: dict[str, bytes], tmp_path: Path
) -> None:
    path = write_openvino(tmp_path / "a.openvino.zip", members=change(members))
    with pytest.raises(ModelFileError, match=problem) as raised:
        OpenVinoBackend(path, CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [GRAPH_FILE, WEIGHTS_FILE])
def test_a_missing_member_is_named(name: str, members: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.openvino.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for other in members.keys() - {name}:
            archive.writestr(other, members[other])
    with pytest.raises(ModelFileError, match=f"has no {name}"):
        OpenVinoBackend(path, CPU)


def test_a_small_file_that_declares_a_huge_tensor_is_refused(tmp_path: Path) -> None:
    from openvino import Model, Type, opset13

    images = opset13.parameter([-1, 3, 4, 6], Type.f32, name="input")
    large = opset13.broadcast(opset13.constant(np.float32(1)), opset13.constant([1 << 10, 1 << 10, 1 << 10]))
    total = opset13.add(opset13.reduce_sum(large, opset13.constant([0, 1, 2])), images)
    model = Model([opset13.reduce_sum(total, opset13.constant([2, 3]))], [images])
    openvino.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
    content = {GRAPH_FILE: (tmp_path / "m.xml").read_bytes(), WEIGHTS_FILE: (tmp_path / "m.bin").read_bytes()}
    path = write_openvino(tmp_path / "a.openvino.zip", members=content)
    with pytest.raises(ModelFileError, match=r"has a tensor .* of 1,073,741,824 values"):
        OpenVinoBackend(path, CPU)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(position: float, bit: int, written: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.openvino.zip"
    path.write_bytes(written.read_bytes())
    write_checksum(path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CifarxError):
        open_backend(path)


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [True, False])
def test_a_thousand_flipped_bytes_are_found_or_harmless(sealed: bool, written: Path, tmp_path: Path) -> None:
    """Without a checksum, those of the zip archive protect the graph and the weights, but not all of its directory."""
    path = tmp_path / "a.openvino.zip"
    path.write_bytes(written.read_bytes())
    if sealed:
        write_checksum(path)
    original, found = path.read_bytes(), 0
    with OpenVinoBackend(path, CPU) as backend:
        expected = backend.run(BATCH)
    for position in np.linspace(0, len(original) - 1, 1000).astype(int):
        content = bytearray(original)
        content[position] ^= 0xFF
        path.write_bytes(content)
        try:
            with open_backend(path) as backend:
                np.testing.assert_array_equal(backend.run(BATCH), expected)
        except CifarxError as error:
            assert "\n" not in str(error)
            found += 1
    assert found == 1000 if sealed else found > 900


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_any_byte_of_the_graph_leads_to_a_model_or_to_one_line(
    position: float, value: int, members: dict[str, bytes], tmp_path: Path
) -> None:
    graph = bytearray(members[GRAPH_FILE])
    graph[int(position * len(graph))] = value
    path = write_openvino(tmp_path / "a.openvino.zip", members={GRAPH_FILE: bytes(graph)})
    try:
        with OpenVinoBackend(path, CPU) as backend:
            backend.run(BATCH)
    except CifarxError as error:
        assert "\n" not in str(error)
