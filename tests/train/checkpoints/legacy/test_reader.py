"""Legacy checkpoints: every kind of file loads, and its architecture is identified."""

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.errors import FallbackWarning, ModelFileError, UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from cifarx_train.checkpoints.legacy.architecture import identify_architecture
from cifarx_train.checkpoints.legacy.safe_unpickle import ObjectStub, safe_load
from cifarx_train.data.synthetic.dataset import CLASS_NAMES
from cifarx_train.models.options import ModelOptions
from cifarx_train.models.registry import get_architecture, list_models, register_model
from tests.support.legacy_checkpoints import (
    both_formats,
    load_legacy,
    lzh_class,
    new_weights,
    same_outputs,
    save,
    save_whole_model,
)

# --- whole models


@both_formats
@pytest.mark.parametrize("module", ["model", "__main__"])
@pytest.mark.parametrize("attribute", ["model", "model1", "module", "net"])
def test_whole_lzh_model_of_the_training_notes(tmp_path: Path, module: str, attribute: str, zipped: bool) -> None:
    path = tmp_path / "lzh_method1.pth"
    saved = save_whole_model(lzh_class(module, attribute=attribute), path, zipped)
    checkpoint = load_legacy(path)
    assert checkpoint.spec.model == "lzh"
    assert checkpoint.spec.class_names == CLASS_NAMES
    assert checkpoint.spec.input == InputSpec(height=32, width=32)
    assert checkpoint.spec.training is None
    assert checkpoint.training == {}
    assert list(checkpoint.weights) == list(get_architecture("lzh").build(10).state_dict())
    assert same_outputs(checkpoint, saved)


@both_formats
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v3_small"])
def test_whole_torchvision_model(tmp_path: Path, name: str, zipped: bool) -> None:
    saved = models.get_model(name, weights=None, num_classes=10)
    checkpoint = load_legacy(save(saved, tmp_path / "x.pth", zipped))
    assert checkpoint.spec.model == name
    assert same_outputs(checkpoint, saved)


def test_architectures_of_the_same_class_are_distinguished(tmp_path: Path) -> None:
    saved = models.resnet34(num_classes=5)
    assert load_legacy(save(saved, tmp_path / "x.pth")).spec.model == "resnet34"


@pytest.mark.slow
def test_whole_vgg16_model_with_ten_classes(tmp_path: Path) -> None:
    saved = models.vgg16(num_classes=10, init_weights=False)
    checkpoint = load_legacy(save(saved, tmp_path / "vgg16_method1.pth"))
    assert (checkpoint.spec.model, checkpoint.spec.class_names) == ("vgg16", CLASS_NAMES)
    assert (checkpoint.spec.input.height, checkpoint.spec.input.width) == (32, 32)
    assert same_outputs(checkpoint, saved)


def test_whole_model_in_data_parallel(tmp_path: Path) -> None:
    saved = models.resnet18(num_classes=3)
    checkpoint = load_legacy(save(nn.DataParallel(saved), tmp_path / "x.pth"))
    assert checkpoint.spec.model == "resnet18"
    assert same_outputs(checkpoint, saved)


def test_attributes_of_a_whole_model_are_ignored(tmp_path: Path) -> None:
    saved = models.squeezenet1_1(num_classes=3)
    expected = {key: tensor.clone() for key, tensor in saved.state_dict().items()}
    saved.forward = functools.partial(nn.Identity)  # would shadow the method
    saved.features._modules["removed"] = None
    saved.register_buffer("passing", torch.zeros(3), persistent=False)
    built = load_legacy(save(saved, tmp_path / "x.pth")).build()
    assert type(built) is models.SqueezeNet
    assert "forward" not in vars(built)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in built.state_dict().items())


def test_user_class_requires_the_model_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    saved = save_whole_model(lzh_class("nets", "Foo"), path)
    with pytest.raises(ModelFileError, match=r"needs the class nets\.Foo, which .*state_dict\(\).*--model"):
        load_checkpoint(path)
    assert same_outputs(load_legacy(path, "lzh"), saved)


def test_safe_globals_of_the_process_are_not_used(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x.pth")
    with torch.serialization.safe_globals([nn.Linear, nn.Sequential]):
        before = set(torch.serialization.get_safe_globals())
        assert isinstance(safe_load(tmp_path / "x.pth"), ObjectStub)
        assert set(torch.serialization.get_safe_globals()) == before


# --- state dicts


@both_formats
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("name", ["lzh", "squeezenet1_0"])
def test_state_dict_with_wrapper_prefixes(tmp_path: Path, name: str, prefix: str, zipped: bool) -> None:
    own = new_weights(name)
    save(OrderedDict((prefix + key, tensor) for key, tensor in own.items()), tmp_path / "x.pth", zipped)
    checkpoint = load_legacy(tmp_path / "x.pth")
    assert checkpoint.spec.model == name
    assert checkpoint.weights.keys() == own.keys()
    assert all(torch.equal(checkpoint.weights[key], own[key]) for key in own)


@pytest.mark.parametrize("prefix", ["model1.", "module1.", "", "net.model."])
def test_lzh_with_another_attribute_name(tmp_path: Path, prefix: str) -> None:
    save({prefix + key.removeprefix("model."): value for key, value in new_weights().items()}, tmp_path / "x.pth")
    assert load_legacy(tmp_path / "x.pth").spec.model == "lzh"


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_state_dict_in_a_training_checkpoint(tmp_path: Path, key: str) -> None:
    module = get_architecture("lzh").build(10)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    extras = {"epoch": 3, "best": np.float64(0.7), "loss": torch.tensor(0.1), "optimizer": optimizer.state_dict()}
    save({**extras, key: module.state_dict()}, tmp_path / "x.pth")
    assert same_outputs(load_legacy(tmp_path / "x.pth"), module)


def test_nested_state_dict_and_whole_model_in_a_dict(tmp_path: Path) -> None:
    save({"model": {"arch": "lzh"}, "state_dict": {"model": new_weights()}}, tmp_path / "deep.pth")
    assert load_legacy(tmp_path / "deep.pth").spec.model == "lzh"
    save({"model": models.squeezenet1_1(num_classes=4), "epoch": 1}, tmp_path / "whole.pth")
    assert load_legacy(tmp_path / "whole.pth").spec.model == "squeezenet1_1"


def test_resnet_with_a_small_stem_is_identified(tmp_path: Path) -> None:
    saved = get_architecture("resnet18", stem="small").build(10)
    checkpoint = load_legacy(save(saved.state_dict(), tmp_path / "x.pth"))
    assert (checkpoint.spec.model, checkpoint.spec.stem) == ("resnet18", "small")
    assert same_outputs(checkpoint, saved)


def test_auxiliary_heads_are_ignored(tmp_path: Path) -> None:
    saved = models.googlenet(num_classes=10, aux_logits=True, init_weights=True)
    checkpoint = load_legacy(save(saved.state_dict(), tmp_path / "x.pth"))
    assert checkpoint.spec.model == "googlenet"
    assert not any(key.startswith("aux") for key in checkpoint.weights)


def test_missing_batchnorm_counters_are_added(tmp_path: Path) -> None:
    own = new_weights("resnet18", 4)
    save({key: value for key, value in own.items() if "num_batches" not in key}, tmp_path / "x.pth")
    checkpoint = load_legacy(tmp_path / "x.pth")
    assert list(checkpoint.weights) == list(own)
    checkpoint.build()


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    own = new_weights()
    save({key: tensor.half() for key, tensor in own.items()}, tmp_path / "x.pth")
    assert all(tensor.dtype == torch.float32 for tensor in load_legacy(tmp_path / "x.pth").weights.values())


@both_formats
@pytest.mark.parametrize("kind", ["whole", "state dict"])
def test_file_saved_on_a_gpu_loads_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, zipped: bool
) -> None:
    module = models.squeezenet1_1(num_classes=10)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save(module if kind == "whole" else module.state_dict(), tmp_path / "x.pth", zipped)
    assert b"cuda:0" in (tmp_path / "x.pth").read_bytes()
    checkpoint = load_legacy(tmp_path / "x.pth")
    assert {tensor.device.type for tensor in checkpoint.weights.values()} == {"cpu"}
    assert same_outputs(checkpoint, module)


@pytest.mark.slow
def test_every_architecture_is_identified() -> None:
    regnets = ("regnet_x_", "regnet_y_")  # torchvision computes their widths with tensors, so they cannot be on meta
    for name in list_models():
        if name.startswith(regnets) and not name.endswith("mf"):
            continue
        with torch.device("cpu" if name.startswith((*regnets, "fastnet")) else "meta"):
            own = get_architecture(name).build(7).state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
        match = identify_architecture(shapes, "x.pth")
        assert (match.model, match.stem, match.classes) == (name, "own", 7)
        assert match.keys == {key: key for key in own}


# --- weights that do not match


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the weights of SqueezeNet with some replaced, added or, if None, removed."""
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**new_weights("squeezenet1_1"), **given}.items() if value is not None}


MISMATCHES: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({"classifier__1__bias": None}, r"missing classifier\.1\.bias\)"),
    ({"features__0__bias": None, "features__0__weight": None}, r"missing features\.0\.weight \(and 1 more\)"),
    ({"head": torch.zeros(1)}, r"unexpected head\)"),
    ({"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}, r"unexpected a \(and 2 more\)"),
    ({"features__0__bias": torch.zeros(3)}, r"features\.0\.bias has shape \[3\] instead of \[64\]"),
    ({"classifier__1__bias": torch.zeros(11)}, r"classifier\.1\.bias has shape \[1[01]\] instead of \[1[01]\]"),
    ({"features__0__bias": None, "x": torch.zeros(1)}, r"missing features\.0\.bias; unexpected x\)"),
]


@pytest.mark.parametrize(("changes", "message"), MISMATCHES)
def test_mismatches_are_described(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    save(changed(**changes), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=rf"known architecture; the closest is squeezenet1_1 \(.*{message}"):
        load_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=rf"x\.pth do not match squeezenet1_1 \(.*{message}"):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("squeezenet1_1"))


def test_wrong_model_name_is_an_error(tmp_path: Path) -> None:
    save(new_weights(), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"do not match resnet18 \(missing conv1\.weight \(and \d+ more\)"):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("resnet18"))
    with pytest.raises(UsageError, match="unknown model 'lhz': did you mean 'lzh'"):
        load_checkpoint(tmp_path / "x.pth", ModelOptions("lhz"))


def test_cifarx_checkpoint_names_its_own_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, load_legacy(save(new_weights(), tmp_path / "old.pth")))
    assert load_checkpoint(path, ModelOptions("lzh")).spec == load_checkpoint(path).spec
    with pytest.raises(UsageError, match=r"x\.pth is a checkpoint of lzh, not of resnet34: leave out --model"):
        load_checkpoint(path, ModelOptions("resnet34"))


def test_several_matching_architectures_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarx_train.models import registry

    monkeypatch.setattr(registry, "_architectures", dict(registry._architectures))
    register_model("lzhtwin", InputSpec(height=32, width=32))(lambda classes: get_architecture("lzh").build(classes))
    save(new_weights(), tmp_path / "x.pth")
    with pytest.raises(
        UsageError, match=r"match several architectures \(lzh, lzhtwin\): select the architecture with --model"
    ):
        load_checkpoint(tmp_path / "x.pth")
    assert load_legacy(tmp_path / "x.pth", "lzhtwin").spec.model == "lzhtwin"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(3, 2).state_dict(), "do not match any known architecture: see"),
        (nn.Sequential(nn.Linear(3, 2)), "do not match any known architecture: see"),
        (nn.Sequential(), "contains no weights of a network"),
        ({"state_dict": {}, "model": {}}, "contains no weights of a network"),
        ({"epoch": 3}, "contains no weights of a network"),
        ({**new_weights(), "note": "mine"}, "'note' in .* is not a tensor"),
        (dict[Any, Any](new_weights()) | {3: torch.zeros(1)}, "a weight with an invalid name"),
        ({**new_weights(), "a\x1b[31m\n": torch.zeros(1)}, "a weight with an invalid name"),
        (
            {**new_weights(), "z": torch.zeros(1, dtype=torch.complex64)},
            "'z' in .* is not a dense tensor of real",
        ),
        ({**new_weights(), "z": torch.zeros(2, 2).to_sparse()}, "'z' in .* is not a dense tensor of real"),
        ({**new_weights(), "z": torch.zeros(1).expand(10**12)}, "'z' in .* is not a dense tensor of real"),
        (new_weights("squeezenet1_1", 1), "has only 1 class: use a classifier with at least 2 classes"),
    ],
)
def test_content_without_weights_of_a_network_is_an_error(tmp_path: Path, content: object, message: str) -> None:
    save(content, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=message):
        load_checkpoint(tmp_path / "x.pth")


# --- assumptions about what the file does not describe


@pytest.mark.parametrize(
    ("classes", "first", "last", "description"),
    [
        (10, "airplane", "truck", "CIFAR-10's classes"),
        (1000, "tench", "toilet tissue", "ImageNet's classes"),
        (3, "class 0", "class 2", 'classes "class 0" to "class 2"'),
    ],
)
def test_assumed_class_names_are_reported(
    tmp_path: Path, classes: int, first: str, last: str, description: str
) -> None:
    path = save(new_weights("squeezenet1_1", classes), tmp_path / "x.pth")
    message = rf"x\.pth is loaded as squeezenet1_1 with {description} and 32x32 images in the range 0 to 1: "
    with pytest.warns(FallbackWarning, match=message) as caught:
        names = load_checkpoint(path).spec.class_names
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (len(names), names[0], names[-1]) == (classes, first, last)


@pytest.mark.filterwarnings("ignore::cifarx_serve.errors.FallbackWarning")
def test_the_pytorch_backend_opens_a_legacy_checkpoint(tmp_path: Path) -> None:
    module = get_architecture("lzh").build(10)
    path = save(module, tmp_path / "x.pth")
    batch = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    with open_backend(path, device="cpu") as backend, torch.no_grad():
        assert np.array_equal(backend.run(batch), module.eval()(torch.from_numpy(batch)).numpy())
    assert read_spec(path).class_names == CLASS_NAMES


@pytest.mark.slow
def test_export_and_verify_warn_about_a_legacy_checkpoint_once(tmp_path: Path) -> None:
    from cifarx_export.export import export
    from cifarx_export.verify import verify

    path = tmp_path / "mine.pth"
    save_whole_model(lzh_class("nets", "Foo"), path)
    with pytest.warns(FallbackWarning) as caught:
        (exported,) = export(path, ["torchscript"], model="lzh", data="builtin")
    assert len(caught) == 1
    assert exported.report.summary.passed
    with pytest.warns(FallbackWarning):
        assert verify(exported.path, path, model="lzh", data="builtin").summary.passed
