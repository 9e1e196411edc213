from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, ModelFileError, UsageError
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, save_checkpoint
from cifarx_train.models.registry import get_architecture
from cifarx_train.pytorch_backend import PyTorchBackend

SPEC = ModelSpec(model="lzh", class_names=("cat", "dog", "frog"), input=InputSpec(height=32, width=32))
CPU = Device("cpu")


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(SPEC, get_architecture("lzh").build(3).state_dict(), {})


@pytest.fixture
def path(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "lzh_0.pth", checkpoint)
    return tmp_path / "lzh_0.pth"


def random_batch(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).random((count, 3, 32, 32), np.float32)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_returns_the_logits_of_the_model(path: Path, checkpoint: Checkpoint, count: int) -> None:
    batch = random_batch(count)
    with PyTorchBackend(path, CPU) as backend, torch.no_grad():
        logits = backend.run(batch)
        expected = checkpoint.build()(torch.from_numpy(batch))
    assert (logits.shape, logits.dtype) == ((count, 3), np.float32)
    assert np.array_equal(logits, expected.numpy())


def test_the_batch_is_unchanged(path: Path) -> None:
    batch = random_batch(2)
    with PyTorchBackend(path, CPU) as backend:
        first = backend.run(batch)
        second = backend.run(batch)
    assert np.array_equal(batch, random_batch(2))
    assert np.array_equal(first, second)


def test_has_the_spec_and_the_provider(path: Path) -> None:
    with PyTorchBackend(path, CPU) as backend:
        assert backend.spec == SPEC
        assert backend.provider == "cpu"
    assert PyTorchBackend.read_spec(path) == SPEC


def test_opens_checkpoints_by_default(path: Path) -> None:
    assert read_spec(path) == SPEC
    with open_backend(path, device="cpu") as backend:
        assert backend.name == "pytorch"
    with open_backend(path, "pytorch", "auto") as backend:
        assert backend.run(random_batch(1)).shape == (1, 3)


def test_closing_twice_does_nothing(path: Path) -> None:
    backend = PyTorchBackend(path, CPU)
    backend.close()
    backend.close()


def test_opens_the_checkpoint_of_a_training_run(trained_checkpoint: Path) -> None:
    with PyTorchBackend(trained_checkpoint, CPU) as backend:
        assert backend.spec.training is not None
        assert backend.run(random_batch(2)).shape == (2, 3)


def test_an_unavailable_gpu_is_an_error(path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(DeviceError, match=r"cuda:0 was requested, .*--device cpu"):
        PyTorchBackend(path, Device("cuda"))


def test_a_file_of_another_format_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "lzh_0.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pytorch does not open .*\.pth"):
        open_backend(tmp_path / "lzh_0.onnx", "pytorch")


def test_weights_of_another_model_are_rejected(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.pth", checkpoint._replace(weights={"weight": torch.zeros(2)}))
    with pytest.raises(ModelFileError, match="the weights do not match the model lzh"):
        PyTorchBackend(tmp_path / "x.pth", CPU)


@pytest.mark.parametrize("read", [PyTorchBackend.read_spec, lambda path: PyTorchBackend(path, CPU)])
def test_a_missing_checkpoint_is_an_error(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(ModelFileError, match="no such file"):
        read(tmp_path / "lzh_9.pth")
