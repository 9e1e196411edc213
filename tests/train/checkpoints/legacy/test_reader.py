"""`.pth` files of the training notes: read whole, and told apart."""

import functools
from collections import OrderedDict
from pathlib import Path

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
from cifarx_train.checkpoints.legacy.safe_unpickle import StandIn, load_safely
from cifarx_train.data.synthetic.draw import CLASS_NAMES
from cifarx_train.models.registry import model_names, network, register_model
from tests.support.legacy_files import both_formats, notes_class, read, same_answers, save, weights, whole

# --- whole networks


@both_formats
@pytest.mark.parametrize("module", ["model", "__main__"])
@pytest.mark.parametrize("attribute", ["model", "model1", "module", "net"])
def test_a_whole_lzh_of_the_notes(tmp_path: Path, module: str, attribute: str, zipped: bool) -> None:
    path = tmp_path / "lzh_method1.pth"
    saved = whole(notes_class(module, attribute=attribute), path, zipped)
    checkpoint = read(path)
    assert checkpoint.spec.model == "lzh"
    assert checkpoint.spec.class_names == CLASS_NAMES
    assert checkpoint.spec.input == InputSpec(height=32, width=32)
    assert checkpoint.spec.training is None
    assert checkpoint.training == {}
    assert list(checkpoint.model) == list(network("lzh").build(10).state_dict())
    assert same_answers(checkpoint, saved)


@both_formats
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v3_small"])
def test_a_whole_network_of_torchvision(tmp_path: Path, name: str, zipped: bool) -> None:
    saved = models.get_model(name, weights=None, num_classes=10)
    checkpoint = read(save(saved, tmp_path / "x.pth", zipped))
    assert checkpoint.spec.model == name
    assert same_answers(checkpoint, saved)


def test_what_shares_its_classes_is_told_apart(tmp_path: Path) -> None:
    saved = models.resnet34(num_classes=5)
    assert read(save(saved, tmp_path / "x.pth")).spec.model == "resnet34"


@pytest.mark.slow
def test_a_whole_vgg16_with_ten_classes(tmp_path: Path) -> None:
    saved = models.vgg16(num_classes=10, init_weights=False)
    checkpoint = read(save(saved, tmp_path / "vgg16_method1.pth"))
    assert (checkpoint.spec.model, checkpoint.spec.class_names) == ("vgg16", CLASS_NAMES)
    assert (checkpoint.spec.input.height, checkpoint.spec.input.width) == (32, 32)
    assert same_answers(checkpoint, saved)


def test_a_network_in_a_wrapper(tmp_path: Path) -> None:
    saved = models.resnet18(num_classes=3)
    checkpoint = read(save(nn.DataParallel(saved), tmp_path / "x.pth"))
    assert checkpoint.spec.model == "resnet18"
    assert same_answers(checkpoint, saved)


def test_attributes_and_hooks_of_a_whole_network_are_left_behind(tmp_path: Path) -> None:
    saved = models.squeezenet1_1(num_classes=3)
    expected = {key: tensor.clone() for key, tensor in saved.state_dict().items()}
    saved.forward = functools.partial(nn.Identity)  # would shadow the method
    saved.features._modules["left out"] = None
    saved.register_buffer("passing", torch.zeros(3), persistent=False)
    built = read(save(saved, tmp_path / "x.pth")).build()
    assert type(built) is models.SqueezeNet
    assert "forward" not in vars(built)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in built.state_dict().items())


def test_a_class_of_the_user_needs_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    saved = whole(notes_class("nets", "Foo"), path)
    with pytest.raises(ModelFileError, match=r"needs the class nets\.Foo, which .*state_dict\(\).*--model"):
        load_checkpoint(path)
    assert same_answers(read(path, "lzh"), saved)


def test_what_the_process_allows_elsewhere_is_no_part_of_it(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x.pth")
    with torch.serialization.safe_globals([nn.Linear, nn.Sequential]):
        before = set(torch.serialization.get_safe_globals())
        assert isinstance(load_safely(tmp_path / "x.pth"), StandIn)
        assert set(torch.serialization.get_safe_globals()) == before


# --- state dicts


@both_formats
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("name", ["lzh", "squeezenet1_0"])
def test_a_state_dict_with_what_wrappers_put_before_it(tmp_path: Path, name: str, prefix: str, zipped: bool) -> None:
    own = weights(name)
    save(OrderedDict((prefix + key, tensor) for key, tensor in own.items()), tmp_path / "x.pth", zipped)
    checkpoint = read(tmp_path / "x.pth")
    assert checkpoint.spec.model == name
    assert checkpoint.model.keys() == own.keys()
    assert all(torch.equal(checkpoint.model[key], own[key]) for key in own)


@pytest.mark.parametrize("before", ["model1.", "module1.", "", "net.model."])
def test_other_names_for_the_one_sequential(tmp_path: Path, before: str) -> None:
    save({before + key.removeprefix("model."): value for key, value in weights().items()}, tmp_path / "x.pth")
    assert read(tmp_path / "x.pth").spec.model == "lzh"


@pytest.mark.parametrize("place", ["state_dict", "model_state_dict", "model", "net"])
def test_a_state_dict_beside_an_optimizer(tmp_path: Path, place: str) -> None:
    module = network("lzh").build(10)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    extras = {"epoch": 3, "best": np.float64(0.7), "loss": torch.tensor(0.1), "optimizer": optimizer.state_dict()}
    save({**extras, place: module.state_dict()}, tmp_path / "x.pth")
    assert same_answers(read(tmp_path / "x.pth"), module)


def test_a_state_dict_two_deep_and_a_whole_network_in_a_dict(tmp_path: Path) -> None:
    save({"model": {"arch": "lzh"}, "state_dict": {"model": weights()}}, tmp_path / "deep.pth")
    assert read(tmp_path / "deep.pth").spec.model == "lzh"
    save({"model": models.squeezenet1_1(num_classes=4), "epoch": 1}, tmp_path / "whole.pth")
    assert read(tmp_path / "whole.pth").spec.model == "squeezenet1_1"


def test_a_resnet_with_a_small_stem(tmp_path: Path) -> None:
    saved = network("resnet18", stem="small").build(10)
    checkpoint = read(save(saved.state_dict(), tmp_path / "x.pth"))
    assert (checkpoint.spec.model, checkpoint.spec.stem) == ("resnet18", "small")
    assert same_answers(checkpoint, saved)


def test_auxiliary_outputs_are_left_behind(tmp_path: Path) -> None:
    saved = models.googlenet(num_classes=10, aux_logits=True, init_weights=True)
    checkpoint = read(save(saved.state_dict(), tmp_path / "x.pth"))
    assert checkpoint.spec.model == "googlenet"
    assert not any(key.startswith("aux") for key in checkpoint.model)


def test_counters_that_old_files_lack_are_made(tmp_path: Path) -> None:
    own = weights("resnet18", 4)
    save({key: value for key, value in own.items() if "num_batches" not in key}, tmp_path / "x.pth")
    checkpoint = read(tmp_path / "x.pth")
    assert list(checkpoint.model) == list(own)
    checkpoint.build()


def test_halves_become_floats(tmp_path: Path) -> None:
    own = weights()
    save({key: tensor.half() for key, tensor in own.items()}, tmp_path / "x.pth")
    assert all(tensor.dtype == torch.float32 for tensor in read(tmp_path / "x.pth").model.values())


@both_formats
@pytest.mark.parametrize("kind", ["whole", "state dict"])
def test_a_file_saved_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, zipped: bool) -> None:
    module = models.squeezenet1_1(num_classes=10)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save(module if kind == "whole" else module.state_dict(), tmp_path / "x.pth", zipped)
    assert b"cuda:0" in (tmp_path / "x.pth").read_bytes()
    checkpoint = read(tmp_path / "x.pth")
    assert {tensor.device.type for tensor in checkpoint.model.values()} == {"cpu"}
    assert same_answers(checkpoint, module)


@pytest.mark.slow
def test_every_network_is_told_by_its_weights() -> None:
    heavy = ("regnet_x_", "regnet_y_")  # torchvision computes their widths with tensors, which need memory
    for name in model_names():
        if name.startswith(heavy) and not name.endswith("mf"):
            continue
        with torch.device("cpu" if name.startswith((*heavy, "fastnet")) else "meta"):
            own = network(name).build(7).state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
        match = identify_architecture(shapes, "x.pth")
        assert (match.model, match.stem, match.classes) == (name, "own", 7)
        assert match.keys == {key: key for key in own}


# --- weights that do not fit


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**weights("squeezenet1_1"), **given}.items() if value is not None}


FAULTS: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({"classifier__1__bias": None}, r"it lacks classifier\.1\.bias\)"),
    ({"features__0__bias": None, "features__0__weight": None}, r"it lacks features\.0\.weight \(and 1 more\)"),
    ({"head": torch.zeros(1)}, r"it has besides head\)"),
    ({"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}, r"it has besides a \(and 2 more\)"),
    ({"features__0__bias": torch.zeros(3)}, r"it has features\.0\.bias of shape \[3\] instead of \[64\]"),
    ({"classifier__1__bias": torch.zeros(11)}, r"classifier\.1\.bias of shape \[1[01]\] instead of \[1[01]\]"),
    ({"features__0__bias": None, "x": torch.zeros(1)}, r"it lacks features\.0\.bias; it has besides x\)"),
]


@pytest.mark.parametrize(("changes", "words"), FAULTS)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, torch.Tensor | None], words: str) -> None:
    save(changed(**changes), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=rf"no network that cifarx knows; squeezenet1_1 is nearest .*{words}"):
        load_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=rf"x\.pth are not those of squeezenet1_1 .*{words}"):
        load_checkpoint(tmp_path / "x.pth", "squeezenet1_1")


def test_another_network_than_named(tmp_path: Path) -> None:
    save(weights(), tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=r"not those of resnet18 \(it lacks conv1\.weight \(and \d+ more\)"):
        load_checkpoint(tmp_path / "x.pth", "resnet18")
    with pytest.raises(UsageError, match="unknown model 'lhz': did you mean 'lzh'"):
        load_checkpoint(tmp_path / "x.pth", "lhz")


def test_a_checkpoint_of_ours_says_its_network_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    save_checkpoint(path, read(save(weights(), tmp_path / "old.pth")))
    assert load_checkpoint(path, "lzh").spec == load_checkpoint(path).spec
    with pytest.raises(UsageError, match=r"x\.pth is a checkpoint of lzh, not of resnet34: leave --model out"):
        load_checkpoint(path, "resnet34")


def test_twins_must_be_told_apart_by_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarx_train.models import registry

    monkeypatch.setattr(registry, "_networks", dict(registry._networks))
    register_model("lzhtwin", InputSpec(height=32, width=32))(lambda classes: network("lzh").build(classes))
    save(weights(), tmp_path / "x.pth")
    with pytest.raises(UsageError, match="may be of any of lzh, lzhtwin: name one with --model"):
        load_checkpoint(tmp_path / "x.pth")
    assert read(tmp_path / "x.pth", "lzhtwin").spec.model == "lzhtwin"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (nn.Linear(3, 2).state_dict(), "of no network that cifarx knows"),
        (nn.Sequential(nn.Linear(3, 2)), "of no network that cifarx knows"),
        (nn.Sequential(), "holds no network's weights"),
        ({"state_dict": {}, "model": {}}, "holds no network's weights"),
        ({"epoch": 3}, "holds no network's weights"),
        ({**weights(), "note": "mine"}, "'note' in .* is no tensor"),
        ({**weights(), 3: torch.zeros(1)}, "without a proper name"),
        ({**weights(), "a\x1b[31m\n": torch.zeros(1)}, "without a proper name"),
        ({**weights(), "z": torch.zeros(1, dtype=torch.complex64)}, "'z' in .* is no tensor of weights"),
        ({**weights(), "z": torch.zeros(2, 2).to_sparse()}, "'z' in .* is no tensor of weights"),
        ({**weights(), "z": torch.zeros(1).expand(10**12)}, "'z' in .* is no tensor of weights"),
        (weights("squeezenet1_1", 1), "tells 1 class apart"),
    ],
)
def test_what_holds_no_weights_of_a_network(tmp_path: Path, content: object, words: str) -> None:
    save(content, tmp_path / "x.pth")
    with pytest.raises(ModelFileError, match=words):
        load_checkpoint(tmp_path / "x.pth")


# --- what the file does not say


@pytest.mark.parametrize(
    ("classes", "first", "last", "told"),
    [
        (10, "airplane", "truck", "CIFAR-10's classes"),
        (1000, "tench", "toilet tissue", "ImageNet's classes"),
        (3, "class 0", "class 2", 'classes "class 0" to "class 2"'),
    ],
)
def test_class_names_are_assumed_and_said_to_be(tmp_path: Path, classes: int, first: str, last: str, told: str) -> None:
    path = save(weights("squeezenet1_1", classes), tmp_path / "x.pth")
    words = rf"x\.pth is taken for squeezenet1_1 with {told} on 32x32 images in the range 0 to 1"
    with pytest.warns(FallbackWarning, match=words) as caught:
        names = load_checkpoint(path).spec.class_names
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (len(names), names[0], names[-1]) == (classes, first, last)


@pytest.mark.filterwarnings("ignore::cifarx_serve.errors.FallbackWarning")
def test_the_backend_opens_it(tmp_path: Path) -> None:
    module = network("lzh").build(10)
    path = save(module, tmp_path / "x.pth")
    batch = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    with open_backend(path, device="cpu") as backend, torch.no_grad():
        assert np.array_equal(backend.run(batch), module.eval()(torch.from_numpy(batch)).numpy())
    assert read_spec(path).class_names == CLASS_NAMES


@pytest.mark.slow
def test_export_and_verify_take_it_and_say_so_once(tmp_path: Path) -> None:
    from cifarx_export.export import export
    from cifarx_export.verify import verify

    path = tmp_path / "mine.pth"
    whole(notes_class("nets", "Foo"), path)
    with pytest.warns(FallbackWarning) as caught:
        (made,) = export(path, ["torchscript"], model="lzh", data="builtin")
    assert len(caught) == 1
    assert made.report.summary.passed
    with pytest.warns(FallbackWarning):
        assert verify(made.path, path, model="lzh", data="builtin").summary.passed
