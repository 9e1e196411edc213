"""Read a model spec from a JSON file, and embed it in a copy of a model file that carries no spec."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec

from cifarx_serve.backends.base import require_file
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.registry import backend_suffixes
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.errors import ModelFileError, SpecError, UsageError, error_message
from cifarx_serve.files.regular_file import read_text_file
from cifarx_serve.spec import ModelSpec


def read_external_spec(path: Path) -> ModelSpec:
    """Read a model spec from a JSON file.

    Checksums, exporter and parity summary are removed: they describe the file the spec was printed from.

    Raises:
        UsageError: the file cannot be read.
        SpecError: the file holds no valid spec.
    """
    try:
        spec = ModelSpec.from_json(read_text_file(path), str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error_message(error)})", "give a spec as a JSON file") from error
    except SpecError as error:
        raise SpecError(error.problem, "use the form that `cifarx inspect FILE --json` prints") from error
    return msgspec.structs.replace(spec, checkpoint_sha256=None, weights_sha256=None, exporter=None, parity=None)


def embed_spec(path: Path, spec: ModelSpec, folder: Path) -> Path:
    """Return a copy of a model file, in `folder`, that carries this spec.

    Only ONNX and TorchScript files without a spec are copied; for any other file `path` itself is returned.

    Raises:
        ModelFileError: the file is missing or damaged, or is not a classifier with one input and one output.
    """
    require_file(path)
    if path.name.endswith(backend_suffixes("onnxruntime")):
        return _embed_in_onnx(path, spec, folder)
    if path.name.endswith(backend_suffixes("torchscript")):
        return _embed_in_torchscript(path, spec, folder)
    return path


def _embed_in_onnx(path: Path, spec: ModelSpec, folder: Path) -> Path:
    """Rename the input and output to `input` and `logits` too; external weights become part of the copy."""
    import onnx

    try:
        model = onnx.load(path)
    except Exception as error:  # the errors of onnx's parsers have no common base class
        raise ModelFileError(f"{path} is not an ONNX model ({error})", "give an ONNX file") from error
    if any(entry.key == SPEC_KEY for entry in model.metadata_props):
        return path
    model = _with_standard_names(model, path)
    onnx.helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise ModelFileError(
            f"{path} is over 2 GB with its weights", f"add the spec to its metadata yourself, under the key {SPEC_KEY}"
        )
    folder.mkdir()
    copy = folder / path.name
    copy.write_bytes(model.SerializeToString())
    return copy


def _with_standard_names(model: Any, path: Path) -> Any:
    """Connect `input` and `logits` to the graph by Identity nodes: renaming would have to reach into every subgraph."""
    import onnx

    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [info for info in graph.input if info.name not in weights]  # before IR 4 weights were inputs too
    for kind, infos in (("inputs", inputs), ("outputs", graph.output)):
        if len(infos) != 1:
            names = ", ".join(info.name for info in infos)
            raise ModelFileError(
                f"{path} has {len(infos)} {kind} ({names})", "give a classifier with one input and one output"
            )
    if (inputs[0].name, graph.output[0].name) == ("input", "logits"):
        return model
    model = onnx.compose.add_prefix(model, f"{path.stem}/")  # inner tensors may be called `input` or `logits`
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    input_, output = next(info for info in graph.input if info.name not in weights), graph.output[0]
    graph.node.insert(0, onnx.helper.make_node("Identity", ["input"], [input_.name]))
    graph.node.append(onnx.helper.make_node("Identity", [output.name], ["logits"]))
    input_.name, output.name = "input", "logits"
    return model


def _embed_in_torchscript(path: Path, spec: ModelSpec, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"{path} is not a TorchScript file ({error})", "give a TorchScript file") from error
    if not names or any(name.endswith(f"/extra/{SPEC_FILE}") for name in names):
        return path
    folder.mkdir()
    copy = Path(shutil.copy(path, folder))
    with zipfile.ZipFile(copy, "a") as archive:
        archive.writestr(f"{names[0].partition('/')[0]}/extra/{SPEC_FILE}", spec.to_json())
    return copy
