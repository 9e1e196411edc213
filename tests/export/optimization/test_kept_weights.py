from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from cifarx_export.optimization.kept_weights import load_weights, save_weights
from cifarx_serve.progress import silent

HISTORY = "pruned by 30%, 5 steps"


def _network(channels: int = 3) -> nn.Module:
    torch.manual_seed(channels)
    return nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels))


def _values(module: nn.Module) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in module.state_dict().items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pruned30.pth"
    save_weights(path, _network(), HISTORY)
    return path


def test_the_same_weights_and_their_history_are_loaded(file: Path) -> None:
    module = _network()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert load_weights(file, module, pytest.fail) == HISTORY
    assert _values(module) == _values(_network())


def test_without_a_file_nothing_is_said(tmp_path: Path) -> None:
    assert load_weights(tmp_path / "absent.pth", _network(), pytest.fail) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a readable checkpoint"),
        (b"PK\x03\x04", "is not a readable checkpoint"),
        ({"weights": _network(4).state_dict(), "history": HISTORY}, "has no weights of this network"),
        ({"weights": [1, 2], "history": HISTORY}, "has no weights of this network"),
        ({"weights": _network().state_dict()}, "has no weights of this network"),
        ([1, 2], "has no weights of this network"),
    ],
)
def test_a_file_of_something_else_is_reported_and_changes_nothing(file: Path, content: object, words: str) -> None:
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    lines: list[str] = []
    module = _network()
    assert load_weights(file, module, lines.append) is None
    assert [words in line and line.endswith(": fine-tuning again") for line in lines] == [True]
    assert _values(module) == _values(_network())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_no_error(file: Path, position: float, value: int, cut: bool) -> None:
    content = bytearray(file.read_bytes())
    index = int(position * len(content))
    content[index] = value
    damaged = file.with_name("damaged.pth")
    damaged.write_bytes(content[: index + 1] if cut else content)
    history = load_weights(damaged, _network(), silent)
    assert history is None or isinstance(history, str)
