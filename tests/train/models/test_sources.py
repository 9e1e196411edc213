from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from cifarx_serve.errors import FallbackWarning, UsageError
from cifarx_serve.spec import ModelSource, ModelSpec
from cifarx_train.models import sources
from cifarx_train.models.architecture import Architecture
from cifarx_train.models.options import ModelOptions, SpecOverrides
from cifarx_train.models.sources import find_architecture, is_registry_name, rebuild_architecture
from tests.support.hugging_face import write_vit
from tests.support.user_code import write_networks


def packaged(num_classes: int, width: int = 8) -> nn.Module:
    """A network of an installed package."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width), nn.Linear(width, num_classes))


@pytest.fixture
def _packaged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entry_points = {"packaged-net": f"{__name__}:packaged", "broken": "no_such_package:Net"}
    monkeypatch.setattr(sources, "_entry_points", lambda: entry_points)
    monkeypatch.setattr(sources, "import_module", lambda name: __import__(name) if name != __name__ else _this_module())
    yield


def _this_module() -> Any:
    import sys

    return sys.modules[__name__]


def spec_of(architecture: Architecture, outputs: int = 3) -> ModelSpec:
    """Return the spec that a checkpoint of the architecture contains, after it was written and read."""
    spec = ModelSpec(
        model=architecture.name,
        stem=architecture.stem,
        class_names=tuple(map(str, range(outputs))),
        input=architecture.input,
        source=architecture.source,
    )
    return ModelSpec.from_json(spec.to_json(), "x.pth")


@pytest.mark.parametrize("name", ["lzh", "resnet18"])
def test_names_of_the_registry(name: str) -> None:
    found = find_architecture(ModelOptions(name))
    assert found.name == found.source.name == name
    assert found.is_registered
    assert is_registry_name(name)
    assert rebuild_architecture(spec_of(found)).source == found.source


def test_arguments_of_torchvision() -> None:
    found = find_architecture(ModelOptions("googlenet", {"transform_input": True}))
    assert found.build(3).transform_input is True
    assert not found.is_registered
    assert rebuild_architecture(spec_of(found)).build(3).transform_input is True
    with pytest.raises(UsageError, match=r"torchvision's resnet18 does not take wrong=1 \(.*\): correct --model-arg"):
        find_architecture(ModelOptions("resnet18", {"wrong": 1})).build(3)
    with pytest.raises(UsageError, match="lzh takes no argument width: leave out --model-arg"):
        find_architecture(ModelOptions("lzh", {"width": 1}))


def test_a_small_stem() -> None:
    found = find_architecture(ModelOptions("resnet18"), "small")
    assert rebuild_architecture(spec_of(found)).stem == "small"
    write_networks(Path())
    with pytest.raises(UsageError, match=r"model.py:Net has no small stem"):
        find_architecture(ModelOptions("model.py:Net"), "small")


def test_unknown_names_point_to_own_networks() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'Net': .*, or name your own as FILE.py:CALLABLE"):
        find_architecture(ModelOptions("Net"))


def test_the_users_own_code() -> None:
    write_networks(Path())
    found = find_architecture(
        ModelOptions("model.py:Pair", {"width": 8}, overrides=SpecOverrides({"source": {"output": 0}}))
    )
    assert found.name == "pair"
    assert found.source == ModelSource(
        kind="python", name="model.py:Pair", arguments={"width": 8}, sha256=found.source.sha256, output=0
    )
    assert found.build(3)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert not is_registry_name("model.py:Pair")


def test_a_checkpoint_never_decides_which_code_runs() -> None:
    (Path() / "ran.py").write_text("open('ran', 'w').close()\nfrom torch import nn\nNet = nn.Identity\n")
    spec = spec_of(find_architecture(ModelOptions("lzh")))
    source = ModelSource(kind="python", name="ran.py:Net")
    with pytest.raises(UsageError, match=r"never decides which code runs: state it with --model ran.py:Net"):
        rebuild_architecture(msgspec.structs.replace(spec, source=source))
    with pytest.raises(UsageError, match="never decides which code runs"):
        rebuild_architecture(msgspec.structs.replace(spec, source=source), ModelOptions("lzh"))
    assert not Path("ran").exists()


def test_own_code_is_built_again_with_its_arguments() -> None:
    write_networks(Path())
    spec = spec_of(find_architecture(ModelOptions("model.py:Wide", {"width": 5})))
    found = rebuild_architecture(spec, ModelOptions("model.py:Wide"))
    assert found.build(3).state_dict()["head.weight"].shape == (3, 5)
    changed = rebuild_architecture(spec, ModelOptions("model.py:Wide", {"width": 6}))
    assert changed.build(3).state_dict()["head.weight"].shape == (3, 6)


def test_changed_code_is_noted() -> None:
    path = write_networks(Path())
    spec = spec_of(find_architecture(ModelOptions("model.py:Net")))
    path.write_text(path.read_text() + "\n# changed\n")
    with pytest.warns(FallbackWarning, match=r"the code of model.py:Net is not the one that the"):
        rebuild_architecture(spec, ModelOptions("model.py:Net"))


def test_networks_of_timm_and_hugging_face() -> None:
    folder = write_vit(Path("vit"))
    for model, name in (("timm/resnet18.tv_in1k", "resnet18.tv_in1k"), (f"hf/{folder}", "vit")):
        found = find_architecture(ModelOptions(model))
        assert found.source.name == name
        shapes = {key: tensor.shape for key, tensor in found.build(3).state_dict().items()}
        again = rebuild_architecture(spec_of(found))
        assert {key: tensor.shape for key, tensor in again.build(3).state_dict().items()} == shapes


@pytest.mark.usefixtures("_packaged")
def test_networks_of_installed_packages() -> None:
    found = find_architecture(ModelOptions("packaged-net", {"width": 4}))
    assert (found.name, found.source.kind) == ("packaged_net", "entry_point")
    assert found.build(5)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert rebuild_architecture(spec_of(found)).source == found.source
    with pytest.raises(UsageError, match=r"model broken \(no_such_package:Net\) cannot be loaded"):
        find_architecture(ModelOptions("broken"))


@pytest.mark.parametrize("model", ["lzh", "timm/resnet18"])
def test_a_model_that_is_not_that_of_the_checkpoint(model: str) -> None:
    spec = spec_of(find_architecture(ModelOptions(model)))
    with pytest.raises(UsageError, match=rf"the checkpoint is one of {model}, not of resnet50: leave out --model"):
        rebuild_architecture(spec, ModelOptions("resnet50"))


def test_what_cannot_be_built_again() -> None:
    spec = spec_of(find_architecture(ModelOptions("lzh")))
    source = ModelSource(kind="module", name="Net")
    with pytest.raises(UsageError, match=r"the network was given as a module \(Net\), which cannot be built again"):
        rebuild_architecture(msgspec.structs.replace(spec, source=source))


@pytest.mark.slow
def test_a_missing_extra_is_named(fresh_python: Any) -> None:
    code = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from cifarx_train.models.options import ModelOptions\n"
        "from cifarx_train.models.sources import find_architecture\n"
        "try: find_architecture(ModelOptions(sys.argv[2]))\n"
        "except Exception as error: print(error)\n"
    )
    write_vit(Path("vit"))
    assert fresh_python(code, "timm", "timm/resnet18") == 'timm is not installed: pip install "cifarx[timm]"'
    assert fresh_python(code, "transformers", "hf/vit") == 'transformers is not installed: pip install "cifarx[hf]"'
