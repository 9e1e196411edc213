"""`.pth` files of the training notes: read whole, told apart, and never run."""

import functools
import io
import os
import pickle
import pickletools
import runpy
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from cifarx_serve.backends.registry import open_backend, read_spec
from cifarx_serve.errors import CifarxError, FallbackWarning, ModelFileError, UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cifarx_train.data.builtin import CLASS_NAMES
from cifarx_train.models.registry import model_names, network, register_model
from cifarx_train.old_files.recognition import recognise
from cifarx_train.old_files.safe_load import StandIn, load_safely

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])


def notes_class(module: str, name: str = "Lzh", attribute: str = "model", classes: int = 10) -> type[nn.Module]:
    """The network as the notes write it, in a module of that name; call it where `module` can be imported."""

    def init(self: Any) -> None:
        nn.Module.__init__(self)
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 5, 1, 2), nn.MaxPool2d(2)]
        setattr(self, attribute, nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, classes)))

    def forward(self: Any, images: torch.Tensor) -> Any:
        return getattr(self, attribute)(images)

    return type(name, (nn.Module,), {"__init__": init, "forward": forward, "__module__": module})


def whole(kind: type[nn.Module], path: Path, zipped: bool = True) -> nn.Module:
    """A new network of that class, saved with its class to be found only while saving."""
    torch.manual_seed(0)
    module, old = kind(), sys.modules.get(kind.__module__)
    sys.modules[kind.__module__] = types.ModuleType(kind.__module__)
    setattr(sys.modules[kind.__module__], kind.__name__, kind)
    try:
        save(module, path, zipped)
    finally:
        del sys.modules[kind.__module__]
        if old:
            sys.modules[kind.__module__] = old
    return module


def save(content: Any, path: Path, zipped: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the older format misses the source of a class made by a test
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def read(path: Path, model: str | None = None) -> Checkpoint:
    with pytest.warns(FallbackWarning, match="the file says nothing of its classes"):
        return load_checkpoint(path, model)


def same_answers(checkpoint: Checkpoint, module: nn.Module) -> bool:
    size = checkpoint.spec.input
    images = torch.rand(2, 3, size.height, size.width)
    with torch.no_grad():
        return torch.equal(checkpoint.build()(images), module.eval()(images))


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


def weights(name: str = "lzh", classes: int = 10) -> dict[str, torch.Tensor]:
    return dict(network(name).build(classes).state_dict())


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
        match = recognise(shapes, "x.pth")
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
    from cifarx_export.exporting import export
    from cifarx_export.verification import verify

    path = tmp_path / "mine.pth"
    whole(notes_class("nets", "Foo"), path)
    with pytest.warns(FallbackWarning) as caught:
        (made,) = export(path, ["torchscript"], model="lzh", data="builtin")
    assert len(caught) == 1
    assert made.report.summary.passed
    with pytest.warns(FallbackWarning):
        assert verify(made.path, path, model="lzh", data="builtin").summary.passed


# --- hostile files: each would run, allocate or loop, and none is let


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def built(state: dict[str, Any]) -> nn.Module:
    """A module that is saved with this for its state."""
    module = nn.Identity()
    vars(module).clear()
    vars(module).update(state)
    return module


def with_pickle(path: Path, *pickles: bytes) -> Path:
    """A PyTorch archive around these bytes; more than one go under the same name."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        for name, value in content.items():
            for data in pickles if name.endswith("data.pkl") else (value,):
                archive.writestr(name, data)
    return path


def asked_for(path: Path) -> set[str]:
    """What the file's pickles import, by Python's own disassembler, which runs nothing."""
    with path.open("rb") as file:
        streams: list[Any] = [file]
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
                streams = [io.BytesIO(archive.read(entry)) for entry in entries]
        file.seek(0)
        return {name for stream in streams for name in _imports(stream, 1 if stream is not file else 5)}


def _imports(stream: Any, pickles: int) -> Iterator[str]:
    for _ in range(pickles):
        texts: list[str] = []
        for code, argument, _position in pickletools.genops(stream):
            if code.name in ("GLOBAL", "INST"):
                names = {"__builtin__": "builtins", "posix": "os", "nt": "os", "commands": "subprocess"}  # Python 2's
                module, name = argument.split(" ")
                yield f"{names.get(module, module)}.{name}"
            elif code.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:]).replace("posix.", "os.")
            elif isinstance(argument, str):
                texts.append(argument)


def command(marker: Path) -> str:
    return f"echo > {marker}"


def python(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')"


CALLS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda marker: Call(os.system, command(marker)),
    "subprocess.Popen": lambda marker: Call(subprocess.Popen, ["/bin/sh", "-c", command(marker)]),
    "builtins.eval": lambda marker: Call(eval, python(marker)),
    "builtins.exec": lambda marker: Call(exec, python(marker)),
    "builtins.__import__": lambda _: Call(__import__, "antigravity"),
    "builtins.getattr": lambda _: Call(getattr, Call(__import__, "os"), "system"),
    "io.open": lambda marker: Call(open, str(marker), "w"),
    "torch.serialization.load": lambda marker: Call(torch.load, str(marker)),
    "torch.hub.load": lambda marker: Call(torch.hub.load, str(marker), "model"),
    "runpy.run_path": lambda marker: Call(runpy.run_path, str(marker)),
    "shutil.rmtree": lambda marker: Call(shutil.rmtree, str(marker)),
    "pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(Call(os.system, command(marker)))),
    "torch.nn.modules.linear.Linear": lambda _: Call(nn.Linear, 10**9, 10**9),
}


def places(payload: Any) -> dict[str, Any]:
    hidden = OrderedDict(weights())
    hidden["model.8.bias"] = payload
    deep: Any = payload
    for _ in range(50):
        deep = [{"deeper": deep}]
    module = nn.Sequential(nn.Linear(2, 2))
    module.hidden = payload
    return {
        "whole": payload,
        "weight": hidden,
        "deep": {"state_dict": weights(), "args": deep},
        "attribute": module,
        "hook": built({"_parameters": {}, "_modules": {}, "_forward_hooks": OrderedDict({0: payload})}),
        "partial": {"state_dict": weights(), "call": functools.partial(OrderedDict, payload)},
    }


@both_formats
@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, "whole") for name in CALLS)]
    + [("os.system", place) for place in ("weight", "deep", "attribute", "hook", "partial")],
)
def test_a_call_in_a_file_is_named_and_never_made(tmp_path: Path, name: str, place: str, zipped: bool) -> None:
    marker = tmp_path / "marker"
    path = save(places(CALLS[name](marker))[place], tmp_path / "x.pth", zipped)
    assert name in asked_for(path)
    for model in (None, "lzh"):
        with pytest.raises(ModelFileError, match=r"x\.pth would run code \(.*\): it is not loaded") as caught:
            load_checkpoint(path, model)
        assert name in str(caught.value)
    assert not marker.exists()


def refused(path: Path, words: str = r"\.pth") -> None:
    for model in (None, "lzh"):
        with pytest.raises(CifarxError, match=words):
            load_checkpoint(path, model)


def test_a_hook_that_is_a_builtin(tmp_path: Path) -> None:
    """Nothing is called while loading: the payload waits for the network to be asked."""
    module = models.squeezenet1_1(num_classes=10)
    module._forward_hooks[0] = eval
    path = save(module, tmp_path / "x.pth")
    assert "builtins.eval" in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    refused(path, r"would run code \(builtins\.eval\)")


SYSTEM = {
    "GLOBAL": b"cposix\nsystem\n(X%bt\x85R.",
    "GLOBAL of Python 2": b"cnt\nsystem\n(X%bt\x85R.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93(X%bt\x85R.",
    "STACK_GLOBAL out of the memo": b"\x8c\x05posix\x94\x8c\x06system\x9400h\x00h\x01\x93(X%bt\x85R.",
    "INST": b"(X%biposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nX%bo.",
    "NEWOBJ": b"cposix\nsystem\nX%b\x85\x81.",
    "BUILD": b"cposix\nsystem\nX%b\x85b.",
    "DUP": b"cposix\nsystem\n20X%b\x85R.",
}


@pytest.mark.parametrize("protocol", [b"", b"\x80\x02", b"\x80\x04"])
@pytest.mark.parametrize("way", SYSTEM)
def test_pickles_put_together_by_hand(tmp_path: Path, way: str, protocol: bytes) -> None:
    marker = tmp_path / "marker"
    text = command(marker).encode()
    path = with_pickle(tmp_path / "x.pth", protocol + SYSTEM[way] % (len(text).to_bytes(4, "little") + text))
    assert any(name.endswith(".system") for name in asked_for(path)) or "memo" in way
    refused(path, r"would run code \(os\.system\): it is not loaded")
    assert not marker.exists()


def test_a_name_put_together_while_loading(tmp_path: Path) -> None:
    name = b"cbuiltins\nstr.join\nX\x00\x00\x00\x00(X\x03\x00\x00\x00sysX\x03\x00\x00\x00teml\x86R"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x04\x8c\x02os" + name + b"\x93X\x02\x00\x00\x00ls\x85R.")
    with zipfile.ZipFile(path) as archive:
        codes = [code.name for code, _, _ in pickletools.genops(archive.read("x/data.pkl"))]
    assert "STACK_GLOBAL" in codes
    refused(path, r"would run code \(a name put together while loading, builtins\.str\.join\)")


def test_two_pickles_under_one_name(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bad = pickle.dumps(Call(os.system, command(marker)), 2)
    for number, pickles in enumerate([(bad, pickle.dumps({}, 2)), (pickle.dumps({}, 2), bad)]):
        path = with_pickle(tmp_path / f"{number}.pth", *pickles)
        assert "os.system" in asked_for(path)
        refused(path)
    assert not marker.exists()


def test_a_second_state_that_would_be_taken_for_a_method(tmp_path: Path) -> None:
    """The first BUILD gives the object a `__setstate__` of the file's; the second would call it."""
    set_state = b"}X\x0c\x00\x00\x00__setstate__c__builtin__\nset\nsb"
    made = b"ctorch.nn.modules.linear\nIdentity\n)\x81"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02" + made + set_state + b"]K\x01ab.")
    assert asked_for(path) == {"torch.nn.modules.linear.Identity", "builtins.set"}
    loaded = load_safely(path)
    assert isinstance(loaded, StandIn)
    assert loaded.state == [1]
    refused(path, "holds no network's weights")


def test_methods_in_the_attributes_of_a_dict(tmp_path: Path) -> None:
    """An OrderedDict whose `items` is the file's: it must not be asked for its items that way."""
    od = b"ccollections\nOrderedDict\n)R}(X\x05\x00\x00\x00itemscbuiltins\nset\nX\x03\x00\x00\x00getcbuiltins\nset\nub"
    path = with_pickle(tmp_path / "x.pth", b"\x80\x02" + od + b".")
    assert vars(load_safely(path)) == {"items": set, "get": set}
    refused(path, "holds no network's weights")


def test_modules_that_hold_one_another(tmp_path: Path) -> None:
    root = built({"_parameters": {"weight": torch.zeros(1)}})
    vars(root)["_modules"] = {"again": root, "and": root}
    path = save(root, tmp_path / "x.pth")
    assert asked_for(path) >= {"torch.nn.modules.linear.Identity"}
    refused(path, "hold one another without end")


@pytest.mark.parametrize("name", [["deep"], ("a", 1), "x" * 10**6, "a\n"])
def test_parameters_with_odd_names(tmp_path: Path, name: Any) -> None:
    name = tuple(name) if isinstance(name, list) else name
    save(built({"_parameters": {name: torch.zeros(1)}, "_modules": {}}), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "without a proper name")


def test_a_torchscript_archive_is_not_taken_for_one(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls it deprecated
        torch.jit.save(torch.jit.trace(Twice(), torch.zeros(1)), tmp_path / "x.pth")
    assert any(name.startswith("__torch__") for name in asked_for(tmp_path / "x.pth"))
    refused(tmp_path / "x.pth", r"not a checkpoint that can be read \(a TorchScript archive\)")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GiB
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a text of 2 GiB
        b"\x80\x02" + b"(" * 10**5 + b".",
        b"\x80\x02" + b"]" + b"\x85" * 10**5 + b".",
        b"\x80\x02" + b"K\x01r\xff\xff\xff\x7f" + b"j\xfe\xff\xff\x7f.",
        b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02R.",
        b"\x80\x02N" * 1000,
        b"",
    ],
    ids=["long", "text", "marks", "nest", "memo", "tensor", "empty stack", "no end", "nothing"],
)
def test_pickles_that_would_exhaust_the_machine(tmp_path: Path, data: bytes) -> None:
    refused(with_pickle(tmp_path / "x.pth", data))


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_of_the_older_format(tmp_path: Path, part: float) -> None:
    path = save(models.squeezenet1_1(num_classes=10), tmp_path / "x.pth", zipped=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(path, "not a checkpoint that can be read")
