"""The weights in a file are found under any usual key, and the choice between several sets is the user's."""

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_train.checkpoints.external.torch_file import load_torch_file
from cifarx_train.checkpoints.external.weight_sets import WeightSet, find_weights
from tests.support.external_checkpoints import save


def small(value: float = 0) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(2, 3)
    nn.init.constant_(layer.weight, value)
    return nn.Sequential(layer)


def state(value: float = 0) -> dict[str, torch.Tensor]:
    return dict(small(value).state_dict())


def found(tmp_path: Path, content: Any, weights_key: str | None = None) -> tuple[WeightSet, list[str]]:
    path = save(content, tmp_path / "x.pth")
    chosen, others = find_weights(path, load_torch_file(path), weights_key)
    return chosen, [other.description for other in others]


def value_of(chosen: WeightSet) -> float:
    return float(chosen.tensors(Path("x.pth"))["0.weight"][0, 0])


KEYS = [
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "model_weights", "params"),
    *("module", "ema", "ema_state_dict", "state_dict_ema", "model_ema", "averaged", "swa_model"),
    *("something_else", "best weights"),
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("whole", [False, True])
def test_weights_under_any_usual_key(tmp_path: Path, key: str, whole: bool) -> None:
    optimizer = torch.optim.Adam(small().parameters())
    content = {
        "epoch": 3,
        "loss": torch.tensor(0.1),
        "optimizer": optimizer.state_dict(),
        "criterion": nn.CrossEntropyLoss(torch.ones(3)),
        "scaler": {"scale": torch.tensor(2.0)},
        "args": argparse.Namespace(lr=1),
        key: small(7) if whole else state(7),
    }
    chosen, others = found(tmp_path, content)
    assert (chosen.key, value_of(chosen)) == (key, 7)
    assert (chosen.module() is not None) is whole
    assert not others


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": {"model": state(7)}}, "state_dict.model"),
        ({"checkpoint": {"model": state(7)}, "n": 1}, "checkpoint.model"),
        ({"ema": {"module": state(7), "updates": 3}}, "ema.module"),
        ({"model": small(7), "ema": None}, "model"),
        ({"model": {"arch": "lzh"}, "state_dict": state(7)}, "state_dict"),
        (state(7), ""),
        (small(7), ""),
        (OrderedDict(state(7)), ""),
    ],
)
def test_nested_weights(tmp_path: Path, content: Any, key: str) -> None:
    chosen, _ = found(tmp_path, content)
    assert (chosen.key, value_of(chosen)) == (key, 7)


class Averager:
    """An object that is not a module and contains one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.decay = 0.99


def test_a_module_in_an_object_of_another_class(tmp_path: Path) -> None:
    chosen, others = found(tmp_path, {"model": small(1), "ema": Averager(small(7))})
    assert (chosen.key, chosen.averaged, value_of(chosen)) == ("ema.module", True, 7)
    assert others == ["model"]


# --- several sets


@pytest.mark.parametrize("key", ["ema", "state_dict_ema", "model_ema", "ema_model", "averaged", "swa_state_dict"])
def test_averaged_weights_are_preferred_and_the_key_chooses(tmp_path: Path, key: str) -> None:
    content = {"state_dict": state(1), key: state(7)}
    chosen, others = found(tmp_path, content)
    assert (chosen.description, value_of(chosen), others) == (f"{key} (EMA)", 7, ["state_dict"])
    chosen, others = found(tmp_path, content, "state_dict")
    assert (chosen.key, value_of(chosen), others) == ("state_dict", 1, [f"{key} (EMA)"])
    assert value_of(found(tmp_path, content, key)[0]) == 7


def test_an_averaged_model_needs_no_name(tmp_path: Path) -> None:
    averaged = AveragedModel(small(7))
    chosen, others = found(tmp_path, {"model": small(1), "network": averaged})
    assert (chosen.key, chosen.averaged, value_of(chosen), others) == ("network", True, 7, ["model"])


@pytest.mark.parametrize("key", ["emanuel", "schema_model", "swapped"])
def test_other_words_are_not_averages(tmp_path: Path, key: str) -> None:
    chosen, _ = found(tmp_path, {key: state(7)})
    assert not chosen.averaged


def test_a_part_of_a_key_chooses_what_is_under_it(tmp_path: Path) -> None:
    content = {"ema": {"module": state(7)}, "state_dict": state(1)}
    assert value_of(found(tmp_path, content, "ema")[0]) == 7
    assert value_of(found(tmp_path, content, "ema.module")[0]) == 7


def test_a_wrong_key_is_an_error_with_all_keys(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights 'best': choose from net, model_ema \(EMA\)"):
        found(tmp_path, {"net": state(1), "model_ema": state(7)}, "best")


@pytest.mark.parametrize("keys", [("net", "network"), ("ema", "swa_model"), ("student", "teacher")])
def test_several_sets_that_differ_are_not_guessed(tmp_path: Path, keys: tuple[str, str]) -> None:
    content = {keys[0]: state(1), keys[1]: state(7)}
    with pytest.raises(
        UsageError, match=rf"several sets of weights \({keys[0]}.*, {keys[1]}.*\): choose .*--weights-key"
    ):
        found(tmp_path, content)
    assert value_of(found(tmp_path, content, keys[1])[0]) == 7


def test_a_whole_model_is_preferred_to_its_own_state_dict(tmp_path: Path) -> None:
    chosen, others = found(tmp_path, {"state_dict": state(7), "model": small(7)})
    assert (chosen.key, others) == ("model", ["state_dict"])
    with pytest.raises(UsageError, match="several sets"):
        found(tmp_path, {"state_dict": state(1), "model": small(7)})


# --- what is not weights


@pytest.mark.parametrize(
    "content",
    [{"epoch": 3}, {"state_dict": {}, "model": {}}, nn.ReLU(), [state()], {"optimizer": {"x": torch.ones(1)}}, None],
)
def test_no_weights(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ModelFileError, match=r"x\.pth .*contains no weights of a network"):
        chosen, _ = found(tmp_path, content)
        assert not chosen.tensors(Path("x.pth"))
        raise ModelFileError("x.pth contains no weights of a network", "")


def test_values_that_are_not_tensors_are_left_out(tmp_path: Path) -> None:
    chosen, _ = found(tmp_path, {**state(), "note": "mine", "lr": 0.1})
    assert set(chosen.tensors(Path("x.pth"))) == set(state())
    assert chosen.other_values() == ["note", "lr"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1, dtype=torch.complex64), "'z' in .* is not a dense tensor of real numbers"),
        (torch.zeros(2, 2).to_sparse(), "'z' in .* is not a dense tensor of real numbers"),
        (torch.zeros(1).expand(10**12), "'z' in .* is not a dense tensor of real numbers"),
    ],
)
def test_special_tensors_are_refused(tmp_path: Path, value: torch.Tensor, message: str) -> None:
    chosen, _ = found(tmp_path, {**state(), "z": value})
    with pytest.raises(ModelFileError, match=message):
        chosen.tensors(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore")  # PyTorch deprecates its quantization
def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})
    chosen, _ = found(tmp_path, quantized.state_dict())
    with pytest.raises(ModelFileError, match=r"_packed_params' in .* is quantized: use the checkpoint from before"):
        chosen.tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("name", [3, ("a", 1), "x" * 10**4, "a\n", "a\x1b[31m"])
def test_invalid_names_are_refused(tmp_path: Path, name: Any) -> None:
    chosen, _ = found(tmp_path, {**state(), name: torch.ones(1)})
    with pytest.raises(ModelFileError, match="a weight with an invalid name"):
        chosen.tensors(tmp_path / "x.pth")


def test_dicts_that_share_their_items_do_not_take_forever() -> None:
    """Four levels of a thousand keys with the same value are a file of some kilobytes, and 10**12 paths."""
    content: dict[str, Any] = {}
    for _ in range(4):
        content = {f"ema_{number}": content or {"x": 1} for number in range(1000)}
    with pytest.raises(ModelFileError, match=r"x\.pth contains more than 1,000,000 keys in nested dicts"):
        find_weights(Path("x.pth"), content, None)
