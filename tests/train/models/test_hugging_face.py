import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifarx_serve.errors import CifarxError, UsageError
from cifarx_serve.spec import InputSpec, ModelSource
from cifarx_train.models.hugging_face import (
    config_architecture,
    directory_architecture,
    is_model_directory,
    weights_file,
)
from tests.support.hugging_face import write_vit


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only directory with a small ViT."""
    torch.manual_seed(0)
    return write_vit(tmp_path_factory.mktemp("hf") / "small-vit")


def edit(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def error_of(folder: Path, **arguments: Any) -> str:
    with pytest.raises(CifarxError) as caught:
        directory_architecture(str(folder), arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module.eval()(images)
    return result


def test_a_directory_states_everything(vit: Path) -> None:
    import transformers

    found = directory_architecture(str(vit), {})
    assert found.name == "small-vit"
    assert (found.source.kind, found.source.name) == ("huggingface", "small-vit")
    assert found.class_names == ("cat", "dog", "fox")
    assert found.input == InputSpec(height=32, width=32, mean=(0.4,) * 3, std=(0.5,) * 3)
    assert found.states_input
    assert found.activation == "softmax"
    assert found.weights is not None
    assert found.weights.num_outputs == 3
    module = found.build(3)
    module.load_state_dict(found.weights.load())
    images = torch.rand(4, 3, 32, 32)
    published = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    assert torch.equal(logits(module, images), published(images).logits)


def test_the_source_needs_no_directory_to_be_built_again(vit: Path) -> None:
    found = directory_architecture(str(vit), {})
    source = found.source
    document = json.dumps(source.arguments)
    assert str(vit.parent) not in document
    assert '"cat"' not in document
    again = config_architecture(source, found.input)
    assert again.weights is None
    shapes = {name: tensor.shape for name, tensor in again.build(3).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in found.build(3).state_dict().items()}


def test_other_numbers_of_classes_and_sizes(vit: Path) -> None:
    found = directory_architecture(str(vit), {})
    assert logits(found.build(7), torch.rand(1, 3, 32, 32)).shape == (1, 7)
    tall = InputSpec(height=48, width=32)
    assert logits(found.build(3, tall), torch.rand(1, 3, 48, 32)).shape == (1, 3)
    gray = InputSpec(height=32, width=32, channels=1, color="L")
    assert logits(found.build(3, gray), torch.rand(1, 1, 32, 32)).shape == (1, 3)


def test_arguments_replace_those_of_the_configuration(vit: Path) -> None:
    assert len(directory_architecture(str(vit), {"num_hidden_layers": 2}).build(3).state_dict()) > len(
        directory_architecture(str(vit), {}).build(3).state_dict()
    )
    assert error_of(vit, wrong=3).endswith("config.json has no wrong: leave out that --model-arg")


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "single_label_classification"}, "softmax"),
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, None),
    ],
)
def test_the_activation_is_that_of_the_problem(tmp_path: Path, fields: dict[str, Any], activation: str | None) -> None:
    assert directory_architecture(str(write_vit(tmp_path / "vit", **fields)), {}).activation == activation


def test_placeholders_are_no_class_names(tmp_path: Path) -> None:
    labels = {label: f"LABEL_{label}" for label in range(3)}
    assert directory_architecture(str(write_vit(tmp_path / "vit", id2label=labels)), {}).class_names is None


def test_a_directory_without_a_processor_states_no_preprocessing(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    found = directory_architecture(str(folder), {})
    assert not found.states_input
    assert found.input == InputSpec(height=32, width=32)


def test_weights_of_torch_save(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    expected = directory_architecture(str(folder), {})
    assert expected.weights is not None
    weights = expected.weights.load()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert weights_file(folder) == folder / "pytorch_model.bin"
    found = directory_architecture(str(folder), {}).weights
    assert found is not None
    assert all(torch.equal(weights[name], tensor) for name, tensor in found.load().items())
    (folder / "pytorch_model.bin").unlink()
    assert directory_architecture(str(folder), {}).weights is None


def test_weights_with_the_names_of_the_library(vit: Path) -> None:
    from safetensors.torch import load_file

    found = directory_architecture(str(vit), {})
    assert found.weights is not None
    assert found.convert_weights is not None
    weights, saved = found.weights.load(), load_file(vit / "model.safetensors")
    assert saved.keys() != weights.keys(), "the names differ only in some networks: test another one"
    for names in (saved, weights):
        converted = found.convert_weights(names)
        assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())
    wrong = {"head.weight": torch.zeros(3)}
    assert found.convert_weights(wrong) is wrong


def test_no_code_of_a_directory_runs(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    (folder / "evil.py").write_text("open('ran', 'w').close()\nclass Model: pass\nclass Config: pass\n")
    edit(folder, "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"})
    edit(folder, "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Model"})
    found = directory_architecture(str(folder), {})
    assert logits(found.build(3), torch.rand(1, 3, 32, 32)).shape == (1, 3)
    edit(folder, "config.json", model_type="of_somebody")
    assert "config.json cannot be read (" in error_of(folder)
    assert not Path("ran").exists()


class _Hub(Exception):
    """Stands for a download."""


def _no_hub(*_: Any, **__: Any) -> None:
    raise _Hub


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": "flash_attention_2"},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:someone/network"},
        {"model_type": "clip", "attn_implementation": {"vision_config": "someone/kernel"}},
    ],
)
def test_the_configuration_in_a_checkpoint_downloads_nothing(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from timm.models import _factory
    from transformers import modeling_utils

    # As where the package `kernels` is installed, with which transformers runs code from the hub.
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", _no_hub)
    monkeypatch.setattr(_factory, "load_model_config_from_hf", _no_hub)
    source = ModelSource(kind="huggingface", name="small-vit", arguments={"config": {"model_type": "vit", **fields}})
    with pytest.raises(UsageError, match="small-vit asks") as caught:
        config_architecture(source, InputSpec(height=32, width=32)).build(3)
    assert caught.value.__cause__ is None


def test_the_configuration_of_a_directory_downloads_nothing(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    edit(folder, "config.json", attn_implementation="someone/kernel")
    assert "asks for the attention 'someone/kernel', which transformers may download" in error_of(folder)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('ran', 'w').close()",)


def test_no_code_of_the_weights_runs(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    (folder / "model.safetensors").unlink()
    torch.save({"x": _Evil()}, folder / "pytorch_model.bin")
    found = directory_architecture(str(folder), {})
    assert found.weights is not None
    with pytest.raises(CifarxError, match=r"the weights in .* cannot be read"):
        found.weights.load()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CifarxError, match=r"the weights in .* cannot be read"):
        found.weights.load()
    assert not Path("ran").exists()


def test_weights_of_another_network(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    edit(folder, "config.json", num_hidden_layers=2)
    found = directory_architecture(str(folder), {})
    assert found.weights is not None
    with pytest.raises(
        CifarxError, match=r"16 missing keys in the weights in .* \(vit.layers.1.attention.k_proj.bias, "
    ):
        found.weights.load()


def test_a_regression_is_no_classifier(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit", problem_type="regression")
    assert "vit predicts numbers, not classes" in error_of(folder)


def test_what_is_no_classifier(tmp_path: Path) -> None:
    assert error_of(tmp_path / "nothing") == (
        f"there is no config.json in {tmp_path / 'nothing'}: give a directory that save_pretrained wrote; cifarx "
        "downloads nothing"
    )
    assert error_of(Path("google/vit-base-patch16-224")).startswith(
        "there is no config.json in google/vit-base-patch16"
    )
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert error_of(folder) == "bert is a bert, which is no image classifier: give an image classifier"
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read (" in error_of(folder)
    assert is_model_directory(folder)


def test_a_source_that_this_version_does_not_know() -> None:
    source = ModelSource(kind="huggingface", name="x", arguments={"config": {"model_type": "of_the_future"}})
    with pytest.raises(UsageError, match=r"the configuration of x is not supported by transformers [\d.]+ \("):
        config_architecture(source, InputSpec(height=1, width=1))


def test_the_notes_of_the_library_are_not_shown(vit: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = directory_architecture(str(vit), {})
    assert found.weights is not None
    found.weights.load()
    assert capfd.readouterr() == ("", "")
