"""What an external checkpoint says is used, what it does not say is assumed and marked, and nothing is ticked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_train.checkpoints.checkpoint import SPEC_KEY, load_checkpoint, save_checkpoint
from cifarx_train.models.options import ModelOptions, SpecOverrides
from cifarx_train.models.registry import get_architecture
from tests.support.external_checkpoints import load_external, load_with_notes, new_weights, same_outputs, save

NAMES = tuple(f"kind {letter}" for letter in "zyxwvutsrq")
LZH = ModelOptions("lzh")


# --- class names


def test_what_nobody_states_is_assumed(tmp_path: Path) -> None:
    spec = load_external(save(new_weights(), tmp_path / "x.pth"), "lzh").spec
    assert spec.assumed == ("class_names", "preprocessing", "output")
    assert spec.class_names == tuple(f"class {label}" for label in range(10))
    assert (
        load_external(save(new_weights("squeezenet1_1", 1000), tmp_path / "y.pth"), "squeezenet1_1").spec.class_names[
            -1
        ]
        == "class 999"
    )


def test_the_order_of_the_names_is_that_of_the_labels(tmp_path: Path) -> None:
    by_name = {name: label for label, name in enumerate(NAMES)}
    content = {"state_dict": new_weights(), "class_to_idx": dict(sorted(by_name.items())), "classes": sorted(NAMES)}
    checkpoint, notes = load_with_notes(save(content, tmp_path / "x.pth"), LZH)
    assert checkpoint.spec.class_names == NAMES
    assert checkpoint.spec.assumed == ("preprocessing", "output")
    assert notes == [
        "using the class names of its class_to_idx",
        "its classes differs from its class_to_idx: it is not used",
    ]


def test_names_for_another_number_of_classes_are_not_used(tmp_path: Path) -> None:
    content = {"state_dict": new_weights(), "hyper_parameters": {"classes": ["cat", "dog"]}}
    checkpoint, notes = load_with_notes(save(content, tmp_path / "x.pth"), LZH)
    assert notes == ["its hyper_parameters.classes names 2 classes, but the network has 10: they are not used"]
    assert "class_names" in checkpoint.spec.assumed
    assert checkpoint.spec.class_names[0] == "class 0"


def test_names_of_one_logit(tmp_path: Path) -> None:
    content = {"state_dict": new_weights("squeezenet1_1", 1), "classes": ["bad", "good"]}
    checkpoint, _ = load_with_notes(save(content, tmp_path / "x.pth"), ModelOptions("squeezenet1_1"))
    assert (checkpoint.spec.class_names, checkpoint.spec.output_size) == (("bad", "good"), 1)


def test_the_stated_names_come_first(tmp_path: Path) -> None:
    path = save({"state_dict": new_weights(), "classes": list(NAMES)}, tmp_path / "x.pth")
    mine = [f"mine {label}" for label in range(10)]
    checkpoint, notes = load_with_notes(path, ModelOptions("lzh", overrides=SpecOverrides({"class_names": mine})))
    assert (list(checkpoint.spec.class_names), notes) == (mine, [])
    assert checkpoint.spec.assumed == ("preprocessing", "output")
    with pytest.raises(UsageError, match="lzh has 10 outputs, not 3"):
        load_checkpoint(path, ModelOptions("lzh", overrides=SpecOverrides({"class_names": ["a", "b", "c"]})))


def test_stated_fields_are_not_assumed(tmp_path: Path) -> None:
    size = {"height": 32, "width": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    fields = {"class_names": list(NAMES), "input": size, "activation": "sigmoid"}
    options = ModelOptions("lzh", overrides=SpecOverrides(fields, whole_input=True))
    spec = load_checkpoint(save(new_weights(), tmp_path / "x.pth"), options).spec
    assert spec.assumed == ()
    assert (spec.input.mean, spec.multi_label) == ((0.5, 0.5, 0.5), True)


# --- formats


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.ckpt", "x.bin", "x.pth.tar", "x.safetensors", "weights"])
@pytest.mark.parametrize("form", ["zip", "before 1.6", "safetensors"])
def test_the_name_of_a_file_does_not_matter(tmp_path: Path, name: str, form: str) -> None:
    own = new_weights()
    if form == "safetensors":
        save_file(own, tmp_path / name)
    else:
        save(own, tmp_path / name, form == "zip")
    loaded = load_external(tmp_path / name, "lzh").weights
    assert all(torch.equal(loaded[key], own[key]) for key in own)


def test_the_metadata_of_a_safetensors_file(tmp_path: Path) -> None:
    save_file(new_weights(), tmp_path / "x", {"format": "pt", "classes": json.dumps(NAMES), "other": "[" * 10**4})
    checkpoint, notes = load_with_notes(tmp_path / "x", LZH)
    assert (checkpoint.spec.class_names, notes) == (NAMES, ["using the class names of its classes"])


def test_a_safetensors_file_with_a_spec(tmp_path: Path) -> None:
    module = get_architecture("lzh").build(10)
    spec = load_external(save(module.state_dict(), tmp_path / "y.pth"), "lzh").spec
    save_file(dict(module.state_dict()), tmp_path / "x", {SPEC_KEY: spec.to_json()})
    checkpoint = load_external(tmp_path / "x")
    assert checkpoint.spec == spec
    assert same_outputs(checkpoint, module)


def test_a_safetensors_file_without_a_network(tmp_path: Path) -> None:
    save_file(new_weights(), tmp_path / "x")
    with pytest.raises(UsageError, match="fit lzh, but do not say"):
        load_checkpoint(tmp_path / "x")


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    own = new_weights("squeezenet1_1")
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**{f"model.{key}": value for key, value in own.items()}, "loss.weight": torch.ones(10)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [torch.optim.Adam([nn.Parameter(torch.ones(1))]).state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-4, "classes": list(NAMES)},
    }
    checkpoint, notes = load_with_notes(save(content, tmp_path / "x.ckpt"), ModelOptions("squeezenet1_1"))
    assert checkpoint.spec.class_names == NAMES
    assert notes == [
        "left out 1 key that squeezenet1_1 does not use (loss.weight)",
        "using the class names of its hyper_parameters.classes",
    ]
    assert all(torch.equal(checkpoint.weights[key], own[key]) for key in own)


# --- use


def test_the_pytorch_backend_opens_any_checkpoint(tmp_path: Path) -> None:
    module = models.squeezenet1_1(num_classes=10)
    batch = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    for name in ("x.ckpt", "x"):
        path = save({"model": module, "classes": list(NAMES)}, tmp_path / name)
        with pytest.warns(match="using the class names"), open_backend(path, device="cpu") as backend, torch.no_grad():
            assert np.array_equal(backend.run(batch), module.eval()(torch.from_numpy(batch)).numpy())
        with pytest.warns(match="using the class names"):
            assert read_spec(path).class_names == NAMES


def test_notes_name_the_file_and_the_caller(tmp_path: Path) -> None:
    path = save({"model": models.squeezenet1_1(num_classes=10), "classes": list(NAMES)}, tmp_path / "x.pth")
    with pytest.warns(match=r"x\.pth: using the class names of its classes") as caught:
        load_checkpoint(path)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_checkpoint_of_cifarx_names_its_own_network(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, load_external(save(new_weights(), tmp_path / "old.pth"), "lzh"))
    assert load_checkpoint(path, LZH).spec == load_checkpoint(path).spec
    assert same_outputs(load_checkpoint(path), load_checkpoint(path, LZH).build())
    with pytest.raises(UsageError, match="checkpoint is one of lzh, not of resnet34: leave out --model"):
        load_checkpoint(path, ModelOptions("resnet34"))


def test_a_file_with_a_spec_and_no_weights(tmp_path: Path) -> None:
    content: Any = {"spec": load_external(save(new_weights(), tmp_path / "y.pth"), "lzh").spec.to_json()}
    with pytest.raises(ModelFileError, match="contains no weights"):
        load_checkpoint(save(content, tmp_path / "x.pth"))


@pytest.mark.slow
def test_export_and_verify_note_what_was_done_once(tmp_path: Path) -> None:
    from cifarx_export.export import export
    from cifarx_export.verify import verify

    path = save({"model": models.squeezenet1_1(num_classes=10).half()}, tmp_path / "mine.ckpt")
    with pytest.warns(match="converted weights from float16 to float32") as caught:
        (exported,) = export(path, ["torchscript"], data="builtin")
    assert len(caught) == 1
    assert exported.report.summary.passed
    with pytest.warns(match="converted weights from float16 to float32"):
        assert verify(exported.path, path, data="builtin").summary.passed
