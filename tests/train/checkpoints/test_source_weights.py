from pathlib import Path

import pytest
import torch
from torch import nn

from cifarx_serve.errors import UsageError
from cifarx_serve.spec import InputSpec
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.checkpoints.source_weights import load_model, load_module, load_source_weights, model_directory
from cifarx_train.models.options import ModelOptions, SpecOverrides
from tests.support.hugging_face import write_vit
from tests.support.user_code import write_networks


def network() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(3, 4))


def test_a_directory_of_hugging_face_needs_nothing_else() -> None:
    folder = write_vit(Path("vit"))
    for loaded in (load_model(folder), load_source_weights(ModelOptions("hf/vit"))):
        assert loaded.spec.class_names == ("cat", "dog", "fox")
        assert loaded.spec.assumed == ()
        assert loaded.spec.input.mean == (0.4,) * 3
        assert loaded.build()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_directory_has_its_own_network() -> None:
    folder = write_vit(Path("vit"))
    assert load_model(folder, ModelOptions("hf/vit")).spec.model == "vit"
    with pytest.raises(UsageError, match="vit is a directory with its own network, not lzh: leave out --model"):
        load_model(folder, ModelOptions("lzh"))
    with pytest.raises(UsageError, match="vit has 3 outputs, not 2"):
        load_model(folder, ModelOptions(overrides=SpecOverrides({"class_names": ["a", "b"]})))


def test_a_file_is_loaded_as_a_checkpoint(trained_checkpoint: Path) -> None:
    assert load_model(trained_checkpoint).spec == load_checkpoint(trained_checkpoint).spec


def test_weights_in_the_file_of_a_directory() -> None:
    folder = write_vit(Path("vit"))
    expected = load_model(folder)
    loaded = load_model(folder / "model.safetensors", ModelOptions("hf/vit"))
    assert loaded.spec == expected.spec
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in expected.weights.items())


def test_a_module_object_in_the_users_code_brings_its_weights() -> None:
    write_networks(Path())
    loaded = load_source_weights(ModelOptions("model.py:net"))
    assert loaded.spec.output_size == 3
    assert "preprocessing" in loaded.spec.assumed
    assert loaded.build()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("model", ["lzh", "model.py:Net", "timm/resnet18"])
def test_other_sources_have_no_weights(model: str) -> None:
    write_networks(Path())
    with pytest.raises(UsageError, match=f"--model {model} has no weights: give the file with the weights with --ckpt"):
        load_source_weights(ModelOptions(model))


def test_a_module_in_memory_is_not_changed() -> None:
    module = network().train()
    module[2].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loaded = load_module(module, SpecOverrides({"class_names": list("abcd")}))
    built = loaded.build()
    with torch.no_grad():
        built.get_parameter("3.weight").zero_()
    assert not built.training
    assert [part.training for part in module.modules()] == [True, True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert loaded.spec.class_names == tuple("abcd")
    assert loaded.spec.assumed == ("preprocessing", "output")


def test_a_module_that_returns_several_tensors() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.body(images)
            return logits[:, :2], logits

    with pytest.raises(UsageError, match="the number of outputs of Pair is not known: state the class names"):
        load_module(Pair(), SpecOverrides())
    loaded = load_module(Pair(), SpecOverrides({"class_names": list("abcd")}))
    assert loaded.build()(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_the_preprocessing_of_a_module() -> None:
    size = InputSpec(height=16, width=24, channels=1, color="L", mean=(0.1,), std=(0.3,))
    stated = SpecOverrides({"input": {"height": 16, "width": 24, "color": "L", "mean": [0.1], "std": [0.3]}}, True)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(16 * 24, 2))
    loaded = load_module(flat, stated)
    assert loaded.spec.input == size
    assert loaded.spec.assumed == ("class_names", "output")


def test_the_directory_of_a_model() -> None:
    assert model_directory(ModelOptions("hf/a/b")) == Path("a/b")
    assert model_directory(ModelOptions("lzh")) is None
    assert model_directory(ModelOptions()) is None
