from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, file_sha256, save_checkpoint
from cifarx_train.checkpoints.head import head_keys
from cifarx_train.checkpoints.pretrained import Pretrained, Transfer, load_pretrained, plan_transfer, weights_name
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.options import ModelOptions
from cifarx_train.models.preprocessing import Preprocessing
from cifarx_train.models.sources import find_architecture

CLASSES = ("cat", "dog", "fish")
LZH = find_architecture(ModelOptions("lzh"))


def plan(pretrained: Pretrained, architecture: Architecture, classes: tuple[str, ...] = CLASSES) -> Transfer:
    module = architecture.build(len(classes))
    head = head_keys(architecture, architecture.input)
    return plan_transfer(pretrained, module, head, classes, architecture.source.name)


def save_own(path: Path, names: tuple[str, ...], **fields: Any) -> dict[str, torch.Tensor]:
    """Write a checkpoint of cifarx with a new Lzh, and return its weights."""
    module = LZH.build(len(names))
    spec = ModelSpec(model="lzh", class_names=names, input=LZH.input, source=LZH.source)
    save_checkpoint(path, Checkpoint(msgspec.structs.replace(spec, **fields), module.state_dict(), {}))
    return module.state_dict()


def lzh_weights(classes: int = 10) -> dict[str, torch.Tensor]:
    return dict(LZH.build(classes).state_dict())


def transferred(transfer: Transfer, architecture: Architecture, classes: int = 3) -> dict[str, torch.Tensor]:
    """Return the state dict of a network after the transfer; what was not loaded is zero."""
    module = architecture.build(classes)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    transfer.load_into(module)
    return module.state_dict()


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (CLASSES, True),
        (("dog", "cat", "fish"), False),  # another order
        (("red", "green", "blue"), False),
        (tuple("abcde"), False),
    ],
)
def test_the_head_is_kept_only_for_the_same_classes(names: tuple[str, ...], kept: bool, tmp_path: Path) -> None:
    saved = save_own(tmp_path / "lzh_0.pth", names)
    pretrained = load_pretrained(str(tmp_path / "lzh_0.pth"), LZH)
    transfer = plan(pretrained, LZH)
    found = transferred(transfer, LZH)
    for key, value in found.items():
        if key.startswith("model.8."):
            assert torch.equal(value, saved[key] if kept else torch.zeros_like(value))
        else:
            assert torch.equal(value, saved[key])
    assert pretrained.record.name == "lzh_0.pth"
    assert pretrained.record.sha256 == file_sha256(tmp_path / "lzh_0.pth")
    assert transfer.lines[0].startswith(
        f"weights lzh_0.pth (sha256 {pretrained.record.sha256[:12]}): {len(names)} classes"
    )
    end = "kept, its classes are the same" if kept else "new, for 3 classes (cat, dog, fish)"
    assert transfer.lines[1] == f"head model.8.bias, model.8.weight: {end}"


def test_the_preprocessing_of_the_weights_is_known(tmp_path: Path) -> None:
    size = InputSpec(height=32, width=32, mean=(0.1, 0.2, 0.3), color="BGR")
    save_own(tmp_path / "own.pth", CLASSES, input=size)
    assert load_pretrained(str(tmp_path / "own.pth"), LZH).input == size
    torch.save(lzh_weights(), tmp_path / "other.pth")
    assert load_pretrained(str(tmp_path / "other.pth"), LZH).input is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}, "epoch": 3},
        lambda weights: {"model_ema": weights, "model": {key: value + 1 for key, value in weights.items()}},
        lambda weights: {"net": {f"_orig_mod.{key}": value.half().float() for key, value in weights.items()}},
    ],
)
def test_checkpoints_of_other_programs(wrap: Any, tmp_path: Path) -> None:
    weights = {key: value.half().float() for key, value in lzh_weights().items()}
    torch.save(wrap(weights), tmp_path / "other.pth")
    transfer = plan(load_pretrained(str(tmp_path / "other.pth"), LZH), LZH)
    assert transfer.lines[0].endswith(": 10 outputs")
    found = transferred(transfer, LZH)
    assert all(torch.equal(found[key], weights[key]) for key in weights if not key.startswith("model.8."))
    assert (found["model.8.weight"] == 0).all()


def test_class_names_in_a_file_decide_about_the_head(tmp_path: Path) -> None:
    torch.save({"state_dict": lzh_weights(3), "class_to_idx": {"dog": 1, "cat": 0, "fish": 2}}, tmp_path / "named.pth")
    assert "kept" in plan(load_pretrained(str(tmp_path / "named.pth"), LZH), LZH).lines[1]


def test_half_precision_and_a_chosen_set_of_weights(tmp_path: Path) -> None:
    sets = {name: {key: value.half() for key, value in lzh_weights().items()} for name in ("student", "teacher")}
    torch.save(sets, tmp_path / "two.pth")
    with pytest.raises(UsageError, match=r"several sets of weights .*--weights-key"):
        load_pretrained(str(tmp_path / "two.pth"), LZH)
    found = transferred(plan(load_pretrained(str(tmp_path / "two.pth"), LZH, "student"), LZH), LZH)
    assert torch.equal(found["model.0.weight"], sets["student"]["model.0.weight"].float())


def test_weights_without_a_head_and_with_another_one(tmp_path: Path) -> None:
    weights = {key: value for key, value in lzh_weights().items() if not key.startswith("model.8.")}
    torch.save(weights, tmp_path / "backbone.pth")
    transfer = plan(load_pretrained(str(tmp_path / "backbone.pth"), LZH), LZH)
    assert transfer.lines[0].endswith(": no head")
    assert transfer.tensors.keys() == weights.keys()
    projection = {"model.8.0.weight": torch.zeros(64, 64), "model.8.2.weight": torch.zeros(16, 64)}
    torch.save(weights | projection, tmp_path / "projection.pth")
    transfer = plan(load_pretrained(str(tmp_path / "projection.pth"), LZH), LZH)
    assert transfer.tensors.keys() == weights.keys()
    assert transfer.lines[2] == "left out 2 keys that lzh does not use (model.8.0.weight, model.8.2.weight)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("model.2.bias"), "missing model.2.bias"),
        (
            lambda weights: weights.update({"model.2.bias": torch.zeros(5)}),
            r"model.2.bias has shape \[5\] instead of \[32\]",
        ),
        (
            lambda weights: weights.update({f"model.9.{number}": torch.zeros(1) for number in range(7)}),
            "unexpected model.9.0, model.9.1, model.9.2, model.9.3, model.9.4 and 2 more",
        ),
    ],
)
def test_weights_of_another_network_are_named(change: Any, words: str, tmp_path: Path) -> None:
    weights = lzh_weights()
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ModelFileError, match=rf"the weights w.pth do not match lzh \({words}\): name the network"):
        plan(load_pretrained(str(tmp_path / "w.pth"), LZH), LZH)


def test_files_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        load_pretrained(str(tmp_path / "absent.pth"), LZH)
    torch.save({"a": 1}, tmp_path / "empty.pth")
    with pytest.raises(ModelFileError, match="contains no weights"):
        load_pretrained(str(tmp_path / "empty.pth"), LZH)


# --- published weights


def test_weights_that_torchvision_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resnet = find_architecture(ModelOptions("resnet18"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = get_model("resnet18").state_dict()  # in their format, with random values
    torch.save(published, cache / "resnet18-f37072fd.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    pretrained = load_pretrained("default", resnet)
    assert pretrained.record.name == weights_name("default", resnet) == "torchvision ResNet18_Weights.IMAGENET1K_V1"
    assert pretrained.input == Preprocessing.imagenet()
    [names] = pretrained.stated_names
    assert (len(names), names[0]) == (1000, "tench")
    found = transferred(plan(pretrained, resnet), resnet)
    assert torch.equal(found["layer4.1.conv2.weight"], published["layer4.1.conv2.weight"])
    assert torch.equal(found["bn1.running_var"], published["bn1.running_var"])
    by_hand = load_pretrained(str(cache / "resnet18-f37072fd.pth"), resnet)  # recognized by its name
    assert (by_hand.input, by_hand.stated_names) == (pretrained.input, pretrained.stated_names)


def test_no_network_names_the_cache_and_the_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UsageError) as caught:
        load_pretrained("default", find_architecture(ModelOptions("resnet18")))
    assert f"cannot be downloaded to {tmp_path / 'hub' / 'checkpoints'} (" in str(caught.value)
    assert str(caught.value).endswith(
        "put https://download.pytorch.org/models/resnet18-f37072fd.pth there, or give a file with --weights FILE"
    )


def test_a_damaged_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "resnet18-f37072fd.pth").write_bytes(b"half of it")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ModelFileError, match=r"resnet18-f37072fd.pth cannot be read .*: delete it"):
        load_pretrained("default", find_architecture(ModelOptions("resnet18")))


@pytest.mark.parametrize("weights", ["default", "timm"])
def test_weights_that_timm_published(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    architecture = find_architecture(ModelOptions("timm/mobilenetv3_small_050.lamb_in1k"))
    published = timm.create_model("mobilenetv3_small_050").state_dict()
    repository = tmp_path / "models--timm--mobilenetv3_small_050.lamb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(published, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pretrained = load_pretrained(weights, architecture)
    assert pretrained.record.name == weights_name(weights, architecture) == "timm mobilenetv3_small_050.lamb_in1k"
    transfer = plan(pretrained, architecture)
    assert transfer.lines[1].startswith("head classifier.bias, classifier.weight: new")
    assert torch.equal(transfer.tensors["conv_stem.weight"], published["conv_stem.weight"])


def test_timm_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=rf"cannot be loaded from {tmp_path} or downloaded \(.*--weights FILE"):
        load_pretrained("default", find_architecture(ModelOptions("timm/resnet18.a1_in1k")))


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
        ("lzh", "default", "nobody publishes weights of lzh: give a file with --weights FILE"),
        (
            "resnet18",
            "timm",
            "--weights timm is for a network of timm, not resnet18: name it, as in --model timm/resnet18",
        ),
    ],
)
def test_networks_without_published_weights(model: str, weights: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_pretrained(weights, find_architecture(ModelOptions(model)))
    assert str(caught.value) == words


def test_a_small_stem_has_no_published_weights() -> None:
    with pytest.raises(UsageError, match="nobody publishes weights of resnet18 with a small stem"):
        load_pretrained("default", find_architecture(ModelOptions("resnet18"), "small"))
