"""OpenVINO's own format, made from the ONNX model: one file with a dynamic batch size and the spec."""

import dataclasses
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from cifarx_export.formats.onnx.converter import OnnxArtifact, convert_to_onnx, require_opset, simulate
from cifarx_export.formats.onnx.int8.inference import open_session
from cifarx_export.formats.registry import MIN_BF16_OPSET, Artifact, ConversionSource
from cifarx_export.parity.checks import Check
from cifarx_serve.backends.openvino import GRAPH_FILE, SPEC_FILE, WEIGHTS_FILE, library_message
from cifarx_serve.errors import UsageError
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.spec import ModelSpec

_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""The date of every member, so that the bytes do not depend on the time: the earliest that a zip archive can hold."""


class OpenVinoArtifact(Artifact):
    """A model in OpenVINO's format.

    Args:
        members: the content of `GRAPH_FILE` and `WEIGHTS_FILE`.
        facts: facts about the conversion that the spec records.
        checks: what the conversion found about the model.
    """

    def __init__(self, members: Mapping[str, bytes], facts: Mapping[str, str], checks: Sequence[Check]) -> None:
        self._members = members
        self.facts = facts
        self.checks = checks

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write one archive. The same model, library versions and spec produce the same bytes."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in {**self._members, SPEC_FILE: spec.to_json().encode()}.items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)
        write_checksum(path)


def convert_to_openvino(source: ConversionSource) -> Iterator[OpenVinoArtifact]:
    """Convert the network to ONNX, and that to OpenVINO. Yields one artifact per candidate of `convert_to_onnx`.

    A file in bf16 has the same weights as one in fp32, in float32: OpenVINO rounds them when it opens the file. Where
    the CPU has no instructions for bf16 it computes in float32, so bf16 is also simulated.

    Raises:
        UsageError: OpenVINO is not installed or does not support an operator of the network, the opset has no bfloat16,
            or see `convert_to_onnx`.
    """
    if source.spec.precision != "bf16":
        return map(convert_artifact, convert_to_onnx(source))
    exact = dataclasses.replace(source, spec=msgspec.structs.replace(source.spec, precision="fp32"))
    return (convert_artifact(_with_simulation(artifact, source)) for artifact in convert_to_onnx(exact))


def _with_simulation(artifact: OnnxArtifact, source: ConversionSource) -> OnnxArtifact:
    model = artifact.model
    require_opset(model, "bf16", MIN_BF16_OPSET)
    return OnnxArtifact(model, artifact.facts, [*artifact.checks, *simulate(model, open_session(model), source)])


def convert_artifact(artifact: OnnxArtifact) -> OpenVinoArtifact:
    """Convert an ONNX model as it is.

    Raises:
        UsageError: OpenVINO is not installed or does not support an operator of the model.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise UsageError("OpenVINO is not installed", 'pip install "cifarx[openvino]"') from error
    try:
        model = openvino.Core().read_model(artifact.model.SerializeToString())
    except RuntimeError as error:
        raise UsageError(
            f"OpenVINO cannot read the ONNX model ({library_message(error)})", "use --format onnx"
        ) from error
    for number, operation in enumerate(model.get_ordered_ops()):
        if operation.get_type_name() not in ("Parameter", "Result"):  # their names are those of the tensors
            operation.set_friendly_name(f"{operation.get_type_name()}_{number}")  # by default they differ in each run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / GRAPH_FILE
        openvino.save_model(model, path, compress_to_fp16=False)  # the default would round the weights
        members = {name: (path.parent / name).read_bytes() for name in (GRAPH_FILE, WEIGHTS_FILE)}
    return OpenVinoArtifact(members, {**artifact.facts, "openvino": openvino.__version__}, artifact.checks)
