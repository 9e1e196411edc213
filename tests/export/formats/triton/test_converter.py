"""Triton model repositories: the configuration parses with Triton's message types and matches the ONNX file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from hypothesis import given
from hypothesis import strategies as st

from cifarx_export.formats.registry import ExportOptions
from cifarx_export.formats.triton.config import PREFERRED_BATCH_SIZES, labels, quote, triton_config
from cifarx_export.formats.triton.converter import TritonArtifact, convert_to_triton, triton_name
from cifarx_export.formats.triton.kserve import MAX_NAME_LENGTH, kserve_manifest, kubernetes_name
from cifarx_serve.backends.onnxruntime.backend import OnnxRuntimeBackend
from cifarx_serve.devices import Device
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from tests.support.conversion import conversion_source
from tests.support.parity_summary import SUMMARY

CPU = Device("cpu")
FILES = ["kserve.yaml", "lzh/1/model.onnx", "lzh/config.pbtxt", "lzh/labels.txt"]
NAMES = st.text(st.characters(codec="utf-8"), max_size=30)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def artifact(loaded: Checkpoint) -> TritonArtifact:
    return next(convert_to_triton(conversion_source(loaded)))


@pytest.fixture(scope="module")
def repository(artifact: TritonArtifact, loaded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "lzh_0.triton"
    artifact.save(path, loaded.spec)
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def images(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


# The fields of `config.pbtxt` that are used, with the names, types and numbers of Triton's `model_config.proto`.
# The parser raises an error for an unknown field, a wrong type and a duplicate field.
ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_FP16": 10, "TYPE_FP32": 11},
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3},
}
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Latest": {"num_versions": (1, "uint32")},
    "VersionPolicy": {"latest": (1, "Latest")},
    "Input": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (4, "repeated int64")},
    "Output": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (3, "repeated int64"),
        "label_filename": (4, "string"),
    },
    "DynamicBatching": {
        "preferred_batch_size": (1, "repeated int32"),
        "max_queue_delay_microseconds": (2, "uint64"),
    },
    "InstanceGroup": {"count": (2, "int32"), "kind": (4, "Kind")},
    "Entry": {"key": (1, "string"), "value": (2, "string")},
    "Accelerator": {"name": (1, "string"), "parameters": (2, "repeated Entry")},
    "Accelerators": {"gpu_execution_accelerator": (1, "repeated Accelerator")},
    "Optimization": {"execution_accelerators": (3, "Accelerators")},
    "Parameter": {"string_value": (1, "string")},
    "ParameterEntry": {"key": (1, "string"), "value": (2, "Parameter")},
    "ModelConfig": {
        "name": (1, "string"),
        "platform": (2, "string"),
        "version_policy": (3, "VersionPolicy"),
        "max_batch_size": (4, "int32"),
        "input": (5, "repeated Input"),
        "output": (6, "repeated Output"),
        "instance_group": (7, "repeated InstanceGroup"),
        "default_model_filename": (8, "string"),
        "dynamic_batching": (11, "DynamicBatching"),
        "optimization": (12, "Optimization"),
        "parameters": (14, "repeated ParameterEntry"),
        "backend": (17, "string"),
    },
}


def model_config_class() -> Any:
    """Return the message class of `ModelConfig`."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    field_type = descriptor_pb2.FieldDescriptorProto.Type
    for name, values in ENUMS.items():
        file.enum_type.add(name=name).value.extend(
            descriptor_pb2.EnumValueDescriptorProto(name=value, number=number) for value, number in values.items()
        )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, declared) in fields.items():
            repeated, kind = declared.startswith("repeated "), declared.removeprefix("repeated ")
            added = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if kind in MESSAGES or kind in ENUMS:
                added.type_name = f".inference.{kind}"
                added.type = field_type.Value("TYPE_MESSAGE" if kind in MESSAGES else "TYPE_ENUM")
            else:
                added.type = field_type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


ModelConfig = model_config_class()


def parse(text: str) -> Any:
    return text_format.Parse(text, ModelConfig())


def config_of(repository: Path) -> Any:
    return parse((repository / "lzh/config.pbtxt").read_text(encoding="utf-8"))


def test_the_parser_is_strict() -> None:
    for wrong in ("nam: 'x'", "max_batch_size: 'x'", "input { dims: [x] }", "name: 'a' name: 'b'", "input [ { ]"):
        with pytest.raises(text_format.ParseError):
            parse(wrong)


def test_the_layout_is_that_of_triton(repository: Path) -> None:
    assert files(repository) == FILES
    (model,) = (path for path in repository.iterdir() if path.is_dir())  # Triton treats each folder as a model
    assert config_of(repository).name == model.name


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("embedded", [False, True])
def test_the_configuration_matches_the_model(
    loaded: Checkpoint, tmp_path: Path, precision: Any, embedded: bool
) -> None:
    source = conversion_source(loaded, precision, ExportOptions(embed_preprocessing=embedded or None))
    artifact = next(convert_to_triton(source))
    spec = artifact.complete_spec(source.spec)
    artifact.save(tmp_path, spec)
    config = config_of(tmp_path)
    with OnnxRuntimeBackend(tmp_path / "lzh/1/model.onnx", CPU) as backend:
        assert backend.spec == spec
        tensor_infos = backend.tensor_infos()
        logits = backend.run(np.zeros((2, 32, 32, 3), np.uint8) if embedded else np.zeros((2, 3, 32, 32), np.float32))
    assert logits.shape == (2, 10)
    types = {"TYPE_FP32": "float32", "TYPE_UINT8": "uint8"}
    for info, declared in zip(tensor_infos, [*config.input, *config.output], strict=True):
        assert declared.name == info.name
        data_types = declared.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        assert types[data_types[declared.data_type].name] == info.dtype
        assert info.shape[0] == "batch"
        assert list(declared.dims) == [axis if isinstance(axis, int) else -1 for axis in info.shape[1:]]


def test_the_rest_of_the_configuration(repository: Path, loaded: Checkpoint) -> None:
    config = config_of(repository)
    assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
    assert (repository / "lzh/1" / config.default_model_filename).is_file()
    assert (repository / "lzh" / config.output[0].label_filename).is_file()
    assert config.version_policy.latest.num_versions == 1
    assert [(group.kind, group.count) for group in config.instance_group] == [(ENUMS["Kind"]["KIND_AUTO"], 1)]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "cuda"
    assert {entry.key: entry.value for entry in accelerator.parameters}["use_tf32"] == "0"
    (parameter,) = config.parameters
    assert parameter.key == "cifarx.spec"
    assert ModelSpec.from_json(parameter.value.string_value, "test") == loaded.spec


@pytest.mark.parametrize("largest", [None, 3, 16, 64, 100])
def test_the_maximum_batch_size_is_the_largest_that_passed(loaded: Checkpoint, largest: int | None) -> None:
    spec = (
        loaded.spec
        if largest is None
        else msgspec.structs.replace(loaded.spec, parity=msgspec.structs.replace(SUMMARY, batch_sizes=(1, largest)))
    )
    config = parse(triton_config(spec, "lzh"))
    assert config.max_batch_size == (largest or 64)
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert preferred == sorted(set(preferred))
    assert preferred[-1] == config.max_batch_size
    assert set(preferred) <= {*PREFERRED_BATCH_SIZES, config.max_batch_size}
    assert config.dynamic_batching.max_queue_delay_microseconds > 0


def test_saving_again_replaces_every_file(
    artifact: TritonArtifact, loaded: Checkpoint, repository: Path, tmp_path: Path
) -> None:
    """An export saves twice: before the parity check, and with its summary."""
    artifact.save(tmp_path / "twice", msgspec.structs.replace(loaded.spec, class_names=("longer " * 100,) * 10))
    artifact.save(tmp_path / "twice", loaded.spec)
    assert content(tmp_path / "twice") == content(repository)
    checked = msgspec.structs.replace(loaded.spec, parity=msgspec.structs.replace(SUMMARY, batch_sizes=(1, 3, 64)))
    artifact.save(tmp_path / "twice", checked)
    assert files(tmp_path / "twice") == FILES
    assert OnnxRuntimeBackend.read_spec(tmp_path / "twice/lzh/1/model.onnx") == checked
    assert config_of(tmp_path / "twice").max_batch_size == 64


def test_logits_match_the_network(repository: Path, loaded: Checkpoint) -> None:
    import torch

    from cifarx_serve.images.preprocess import model_input

    batch = model_input(images(5), loaded.spec)
    with OnnxRuntimeBackend(repository / "lzh/1/model.onnx", CPU) as backend, torch.inference_mode():
        np.testing.assert_allclose(
            backend.run(batch), loaded.build()(torch.from_numpy(batch)).numpy(), rtol=1e-4, atol=1e-4
        )


@given(st.lists(NAMES, min_size=2, max_size=5))
def test_each_class_name_has_one_line(names: list[str]) -> None:
    text = labels(spec_of(names))
    assert text.endswith("\n")
    lines = text[:-1].split("\n")  # as std::getline splits it
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert line == name or name.splitlines() != [name]


@given(st.lists(NAMES, min_size=2, max_size=5), NAMES)
def test_any_spec_survives_the_configuration(names: list[str], model: str) -> None:
    spec = spec_of(names, model)
    text = triton_config(spec, triton_name(model) or "x")
    assert text.isascii()
    config = parse(text)
    assert ModelSpec.from_json(config.parameters[0].value.string_value, "test") == spec
    assert list(config.output[0].dims) == [len(names)]


def test_the_layout_and_the_color_determine_the_input() -> None:
    grayscale = msgspec.structs.replace(
        spec_of(["a", "b"]), input=InputSpec(height=28, width=20, channels=1, color="L", layout="NHWC")
    )
    assert list(parse(triton_config(grayscale, "x")).input[0].dims) == [28, 20, 1]
    embedded = msgspec.structs.replace(grayscale, embedded_preprocessing=True)
    assert list(parse(triton_config(embedded, "x")).input[0].dims) == [-1, -1, 1]


def test_the_output_is_named_as_in_the_spec() -> None:
    spec = msgspec.structs.replace(spec_of(["a", "b"]), output="probabilities")
    assert parse(triton_config(spec, "x")).output[0].name == "probabilities"


def test_one_logit_has_the_name_of_the_second_class() -> None:
    spec = msgspec.structs.replace(spec_of(["no", "yes"]), activation="sigmoid", outputs=1)
    assert list(parse(triton_config(spec, "x")).output[0].dims) == [1]
    assert labels(spec) == "yes\n"


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_can_be_quoted(text: str) -> None:
    assert parse(f"name: {quote(text)}").name == text


def spec_of(names: list[str], model: str = "lzh") -> ModelSpec:
    return ModelSpec(model=model, class_names=tuple(names), input=InputSpec(height=32, width=32))


@given(NAMES)
def test_any_model_name_becomes_a_safe_folder_name(model: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]*", triton_name(model))


def yaml_lines(text: str) -> Mapping[str, Any]:
    """Parse the subset of YAML that is used: mappings indented by two spaces, plain and double-quoted scalars."""
    document: dict[str, Any] = {}
    levels: list[dict[str, Any]] = [document]
    for line in text.splitlines():
        if line.lstrip(" ").startswith("#"):
            continue
        matched = re.fullmatch(r'((?:  )*)([A-Za-z]+):(?: ("[^"\\]*"|[A-Za-z0-9][A-Za-z0-9./-]*))?', line)
        assert matched, line
        depth, (key, value) = len(matched[1]) // 2, matched.group(2, 3)
        assert depth < len(levels), line
        del levels[depth + 1 :]
        assert key not in levels[depth], line
        levels[depth][key] = {} if value is None else value.strip('"')
        if value is None:
            levels.append(levels[depth][key])
    return document


def test_the_manifest_is_an_inference_service(repository: Path) -> None:
    text = (repository / "kserve.yaml").read_text(encoding="utf-8")
    assert text.startswith("# CHANGE storageUri BEFORE USE")
    document = yaml_lines(text)
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert document["metadata"] == {"name": "lzh"}
    model = document["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton", "version": "2"}
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert model["storageUri"] == "s3://CHANGE-ME/lzh.triton"
    assert model["resources"] == {kind: {"cpu": "1", "memory": "2Gi"} for kind in ("requests", "limits")}


@pytest.mark.parametrize(("size", "memory"), [(1, "2Gi"), (1 << 30, "5Gi"), (550_000_000, "3Gi")])
def test_the_memory_request_depends_on_the_model_size(size: int, memory: str) -> None:
    document = yaml_lines(kserve_manifest(spec_of(["a", "b"]), size))
    assert document["spec"]["predictor"]["model"]["resources"]["limits"]["memory"] == memory


@given(NAMES)
def test_any_model_gets_a_valid_kubernetes_name(model: str) -> None:
    name = kubernetes_name(model)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= MAX_NAME_LENGTH
    assert yaml_lines(kserve_manifest(spec_of(["a", "b"], model), 1))["metadata"]["name"] == name


@pytest.mark.parametrize(
    ("model", "name"),
    [("lzh", "lzh"), ("efficientnet_b0", "efficientnet-b0"), ("2Net", "net"), ("网", "model"), ("a" * 90, "a" * 40)],
)
def test_kubernetes_names(model: str, name: str) -> None:
    assert kubernetes_name(model) == name


def test_the_spec_is_completed_by_the_onnx_model(artifact: TritonArtifact, loaded: Checkpoint) -> None:
    exporter = artifact.complete_spec(conversion_source(loaded).spec).exporter or {}
    assert exporter["opset"] == "18"
