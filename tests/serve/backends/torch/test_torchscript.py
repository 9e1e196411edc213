import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.backends.torch.torchscript import TorchScriptBackend
from cifarx_serve.devices import Device
from cifarx_serve.errors import CifarxError, DeviceError, ModelFileError, SpecError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.predictor import load
from cifarx_serve.spec import ModelSpec
from tests.support.color_model import SPEC, write_torchscript
from tests.support.trained_model import Trained

CPU = Device("cpu")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_torchscript(tmp_path_factory.mktemp("made") / "colors.torchscript.pt")


def test_logits(made_once: Path) -> None:
    batch = np.zeros((2, 3, 4, 6), np.float32)
    batch[0, 1] = 0.5
    batch[1, 2, 0, 0] = 1
    with TorchScriptBackend(made_once, CPU) as backend:
        logits = backend.run(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, np.array([[0, 5, 0], [0, 0, 10 / 24]]), rtol=1e-6)


def test_a_network_that_takes_nhwc_gets_nhwc(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, input=msgspec.structs.replace(SPEC.input, layout="NHWC"))
    path = write_torchscript(tmp_path / "a.torchscript.pt", spec.to_json(), channels_last=True)
    with load(path, device="cpu") as predictor:
        assert predictor.predict(Image.new("RGB", (6, 4), "lime"), logits=True).logits == pytest.approx((0, 10, 0))


def test_a_spec_that_the_network_does_not_fit_is_refused_when_it_runs(tmp_path: Path) -> None:
    """A TorchScript file does not describe its tensors."""
    layout = msgspec.structs.replace(SPEC, input=msgspec.structs.replace(SPEC.input, layout="NHWC"))
    classes = msgspec.structs.replace(SPEC, class_names=("a", "b"))
    for spec, problem in (
        (layout, r"the model returns logits of shape \(1, 4\) for a batch of 1, not \(1, 3\)"),
        (classes, r"the model returns logits of shape \(1, 3\) for a batch of 1, not \(1, 2\)"),
    ):
        path = write_torchscript(tmp_path / "a.torchscript.pt", spec.to_json())
        with load(path, device="cpu") as predictor, pytest.raises(ModelFileError, match=problem):
            predictor.predict(Image.new("RGB", (6, 4)))


def test_a_row_does_not_depend_on_its_batch_nor_on_the_backend(trained: Trained) -> None:
    with TorchScriptBackend(trained.torchscript, CPU) as backend, OnnxRuntimeBackend(trained.onnx, CPU) as other:
        images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
        inputs = normalize(images, backend.spec.input)
        together = backend.run(inputs)
        assert together.shape == (64, len(backend.spec.class_names))
        for start, stop in ((0, 1), (1, 4), (63, 64)):
            np.testing.assert_allclose(backend.run(inputs[start:stop]), together[start:stop], rtol=0, atol=1e-5)
        np.testing.assert_allclose(other.run(inputs), together, rtol=1e-4, atol=1e-4)


def test_the_spec_is_the_one_in_the_file(trained: Trained) -> None:
    with zipfile.ZipFile(trained.torchscript) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(SPEC_FILE)]
        expected = archive.read(name).decode()
    assert TorchScriptBackend.read_spec(trained.torchscript).to_json() == expected


def test_the_provider_is_the_device(made_once: Path) -> None:
    with TorchScriptBackend(made_once, CPU) as backend:
        assert backend.provider == "cpu"
        assert backend.spec == SPEC


def test_auto_selects_the_best_device(made_once: Path) -> None:
    with TorchScriptBackend(made_once, Device("auto")) as backend:
        assert backend.provider == ("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_cuda_without_a_gpu_is_an_error_with_the_reason(made_once: Path) -> None:
    error = refused(made_once, Device("cuda", 1))
    assert isinstance(error, DeviceError)
    assert error.problem.startswith("device cuda:1 was requested, but PyTorch cannot use it (")
    assert "--device cpu" in error.remedy


@pytest.mark.gpu
def test_a_gpu_index_that_does_not_exist(made_once: Path) -> None:
    error = refused(made_once, Device("cuda", 999))
    assert isinstance(error, DeviceError)
    assert str(torch.cuda.device_count()) in error.problem


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="an Apple GPU is available")
def test_mps_without_an_apple_gpu(made_once: Path) -> None:
    assert isinstance(refused(made_once, Device("mps")), DeviceError)


def test_tensorrt_is_refused_with_a_hint_at_the_backend_that_supports_it(made_once: Path) -> None:
    error = refused(made_once, Device("tensorrt"))
    assert isinstance(error, DeviceError)
    assert "tensorrt:0" in error.problem
    assert "onnxruntime" in error.remedy


def test_the_cpu_has_no_device_time(made_once: Path) -> None:
    with TorchScriptBackend(made_once, Device("cpu")) as backend:
        assert backend.device_time(np.zeros((1, 3, 4, 6), np.float32)) is None


def test_reading_the_spec_does_not_import_pytorch(made_once: Path, fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from cifarx_serve.backends.registry import read_spec\n"
        "print(read_spec(sys.argv[1]).model, 'torch' in sys.modules)"
    )
    assert fresh_python(code, made_once) == "colors False"


def refused(path: Path, device: Device = CPU) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        TorchScriptBackend(path, device)
    assert "\n" not in str(raised.value)
    return raised.value


def unreadable(path: Path) -> CifarxError:
    with pytest.raises(CifarxError) as raised:
        TorchScriptBackend.read_spec(path)
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("content", [b"", b"this is not a model", b"\0" * 1000, b"PK\x03\x04" + b"x" * 100])
def test_files_that_are_not_torchscript(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.torchscript.pt"
    path.write_bytes(content)
    for error in (refused(path), unreadable(path)):
        assert isinstance(error, ModelFileError)
        assert error.problem.startswith(f"{path} is not a zip archive")


def test_a_truncated_file(tmp_path: Path, made_once: Path) -> None:
    path = tmp_path / "half.torchscript.pt"
    whole = made_once.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert isinstance(refused(path), ModelFileError)
    assert isinstance(unreadable(path), ModelFileError)


def test_another_zip_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.torchscript.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    assert isinstance(refused(path), ModelFileError)
    assert unreadable(path).problem == f"{path} contains no model spec"


def test_a_checkpoint_with_the_wrong_suffix(tmp_path: Path) -> None:
    """It is a zip archive of PyTorch, but not a script module."""
    path = tmp_path / "x.torchscript.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    assert isinstance(refused(path), ModelFileError)


class Writing(torch.nn.Module):
    """Writes a file. `torch.save` is an operator of TorchScript."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.save(images, "written")
        return images.mean((2, 3))


class Mapping(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) + torch.from_file("written", shared=True, size=3).fill_(1.0)


class WritingWhenLoaded(torch.nn.Module):
    """Writes a file while it is loaded, because `__setstate__` is called then."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.state, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.state = state[0]
        self.training = state[1]
        torch.save(state[0], "written")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("network", "word"), [(Writing, "save"), (Mapping, "from_file"), (WritingWhenLoaded, "__setstate__")]
)
def test_code_that_would_write_a_file(tmp_path: Path, network: type[torch.nn.Module], word: str) -> None:
    path = tmp_path / "x.torchscript.pt"
    torch.jit.save(torch.jit.script(network()), str(path), _extra_files={SPEC_FILE: SPEC.to_json()})
    Path("written").unlink(missing_ok=True)
    error = refused(path)
    assert isinstance(error, ModelFileError)
    assert "contains code that does more than compute tensors" in error.problem
    assert word in error.problem or "save" in error.problem
    assert not Path("written").exists()


@pytest.mark.parametrize("code", [b"ops.image.write_file(x)", b"ops .image.write_file(x)", b"y = ops", b"(ops).image"])
def test_operators_of_other_libraries(tmp_path: Path, made_once: Path, code: bytes) -> None:
    path = tmp_path / "x.torchscript.pt"
    with zipfile.ZipFile(made_once) as whole, zipfile.ZipFile(path, "w") as changed:
        for member in whole.infolist():
            content = whole.read(member)
            changed.writestr(member, content + b"\n" + code if member.filename.endswith(".py") else content)
    error = refused(path)
    assert isinstance(error, ModelFileError)
    assert "contains code that does more than compute tensors (ops" in error.problem


@pytest.mark.filterwarnings("ignore")
def test_a_class_in_a_module_named_ops(tmp_path: Path) -> None:
    from torchvision.ops.misc import Conv2dNormActivation

    path = tmp_path / "x.torchscript.pt"
    network = torch.nn.Sequential(Conv2dNormActivation(3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    traced = torch.jit.trace(network, torch.zeros(2, *SPEC.input.shape))
    torch.jit.save(traced, str(path), _extra_files={SPEC_FILE: SPEC.to_json()})
    with TorchScriptBackend(path, Device("cpu")) as backend:
        assert backend.run(np.zeros((1, *SPEC.input.shape), np.float32)).shape == (1, 3)


def test_a_pickle_that_would_run_a_command(tmp_path: Path, made_once: Path) -> None:
    """PyTorch reads these pickles in C++, which creates no Python objects."""
    path = tmp_path / "x.torchscript.pt"
    pickle = b"\x80\x02cposix\nsystem\nX\x0d\x00\x00\x00touch written\x85R."
    with zipfile.ZipFile(made_once) as whole, zipfile.ZipFile(path, "w") as changed:
        for member in whole.infolist():
            changed.writestr(member, pickle if member.filename.endswith("/data.pkl") else whole.read(member))
    assert isinstance(refused(path), ModelFileError)
    assert not Path("written").exists()


def test_a_file_with_a_checksum_runs(tmp_path: Path, made_once: Path) -> None:
    path = tmp_path / "checksum.torchscript.pt"
    path.write_bytes(made_once.read_bytes())
    write_checksum(path)
    with TorchScriptBackend(path, CPU) as backend:
        assert backend.spec == SPEC
        assert backend.run(np.ones((1, 3, 4, 6), np.float32)).tolist() == [[10, 10, 10]]


def test_a_model_of_another_exporter(tmp_path: Path) -> None:
    path = write_torchscript(tmp_path / "theirs.torchscript.pt", document=None)
    for error in (refused(path), unreadable(path)):
        assert isinstance(error, ModelFileError)
        assert error.problem == f"{path} contains no model spec"


@pytest.mark.parametrize("document", ["{}", SPEC.to_json()[:-5], SPEC.to_json().replace(":2,", ":3,", 1)])
def test_a_spec_that_cannot_be_read(tmp_path: Path, document: str) -> None:
    path = write_torchscript(tmp_path / "x.torchscript.pt", document)
    for error in (refused(path), unreadable(path)):
        assert isinstance(error, SpecError)
        assert error.problem.startswith(str(path))


damages = st.lists(st.tuples(st.integers(-6000, -1), st.integers(0, 255)), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages, cut=st.none() | st.integers(0, 6000))
def test_the_spec_of_a_damaged_file_is_read_or_raises_our_own_exceptions(
    made_once: Path, tmp_path: Path, damage: list[tuple[int, int]], cut: int | None
) -> None:
    damaged = bytearray(made_once.read_bytes())
    for place, byte in damage:
        damaged[place % len(damaged)] = byte
    path = tmp_path / "damaged.torchscript.pt"
    path.write_bytes(damaged[:cut])
    try:
        assert isinstance(TorchScriptBackend.read_spec(path), ModelSpec)
    except (ModelFileError, SpecError) as error:
        assert "\n" not in str(error)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages)
def test_a_damaged_file_opens_or_raises_our_own_exceptions(
    made_once: Path, tmp_path: Path, damage: list[tuple[int, int]]
) -> None:
    damaged = bytearray(made_once.read_bytes())
    for place, byte in damage:
        damaged[place % len(damaged)] = byte
    path = tmp_path / "damaged.torchscript.pt"
    path.write_bytes(damaged)
    try:
        TorchScriptBackend(path, CPU).close()
    except (ModelFileError, SpecError) as error:
        assert "\n" not in str(error)


def test_closing_twice(made_once: Path) -> None:
    backend = TorchScriptBackend(made_once, CPU)
    backend.close()
    backend.close()
