"""A spec from a file of its own, for a model of someone else's that carries none."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec

from cifarx_serve.backends.base import require_file
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.torch.torchscript import SPEC_FILE
from cifarx_serve.errors import ModelFileError, SpecError, UsageError
from cifarx_serve.spec import ModelSpec


def read_given_spec(path: Path) -> ModelSpec:
    """What the user says of a file; the records of where it came from are of the file that the document is from."""
    try:
        spec = ModelSpec.from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})", "give a spec as a JSON file") from error
    except SpecError as error:
        raise SpecError(error.problem, "write it as `cifarx inspect FILE --json` prints one") from error
    return msgspec.structs.replace(spec, checkpoint_sha256=None, weights_sha256=None, exporter=None, parity=None)


def with_spec(path: Path, spec: ModelSpec, folder: Path) -> Path:
    """The file itself where it carries a spec or is a checkpoint, else a copy of it in `folder` with this one inside.

    Only ONNX and TorchScript files can be given one; others are opened as they are.
    """
    require_file(path)
    if path.name.endswith(".onnx"):
        return _onnx_with_spec(path, spec, folder)
    if path.name.endswith(".torchscript.pt"):
        return _torchscript_with_spec(path, spec, folder)
    return path


def _onnx_with_spec(path: Path, spec: ModelSpec, folder: Path) -> Path:
    """Its one input and output become `input` and `logits`; weights in files beside it come inside."""
    import onnx

    try:
        model = onnx.load(path)
    except Exception as error:  # what its parsers raise has no common base
        raise ModelFileError(f"{path} is not an ONNX model ({error})", "check the file") from error
    if any(entry.key == SPEC_KEY for entry in model.metadata_props):
        return path
    model = _with_our_names(model, path)
    onnx.helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise ModelFileError(f"{path} is over 2 GB", "put the spec into the file that holds its weights apart")
    folder.mkdir()
    copy = folder / path.name
    copy.write_bytes(model.SerializeToString())
    return copy


def _with_our_names(model: Any, path: Path) -> Any:
    """Identities carry the names to and from the graph: renaming would have to reach into every subgraph."""
    import onnx

    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    ports = [port for port in graph.input if port.name not in stored]  # before IR 4 weights were inputs too
    for kind, found in (("inputs", ports), ("outputs", graph.output)):
        if len(found) != 1:
            names = ", ".join(port.name for port in found)
            raise ModelFileError(f"{path} has {len(found)} {kind} ({names})", "give a classifier with one of each")
    if (ports[0].name, graph.output[0].name) == ("input", "logits"):
        return model
    model = onnx.compose.add_prefix(model, f"{path.stem}/")  # so that ours are free
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    port, output = next(port for port in graph.input if port.name not in stored), graph.output[0]
    graph.node.insert(0, onnx.helper.make_node("Identity", ["input"], [port.name]))
    graph.node.append(onnx.helper.make_node("Identity", [output.name], ["logits"]))
    port.name, output.name = "input", "logits"
    return model


def _torchscript_with_spec(path: Path, spec: ModelSpec, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"{path} is not a TorchScript file ({error})", "check the file") from error
    if not names or any(name.endswith(f"/extra/{SPEC_FILE}") for name in names):
        return path
    folder.mkdir()
    copy = Path(shutil.copy(path, folder))
    with zipfile.ZipFile(copy, "a") as archive:
        archive.writestr(f"{names[0].partition('/')[0]}/extra/{SPEC_FILE}", spec.to_json())
    return copy
