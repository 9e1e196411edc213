"""A model repository for NVIDIA Triton that contains an ONNX model.

    lzh_9.triton/
        kserve.yaml         Triton ignores files at this level; each folder is a model
        lzh/
            config.pbtxt
            labels.txt
            1/model.onnx    version 1

Start the server with `tritonserver --model-repository=lzh_9.triton`. "Model Repository" in the user guide of
triton-inference-server/server describes the layout.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cifarx_export.formats.onnx.converter import OnnxArtifact, convert_to_onnx
from cifarx_export.formats.registry import Artifact, ConversionSource
from cifarx_export.formats.triton.config import LABELS_FILE, labels, triton_config
from cifarx_export.formats.triton.kserve import kserve_manifest
from cifarx_serve.spec import ModelSpec

MODEL_PATH: Final = "1/model.onnx"
"""Path of the model in its folder."""


class TritonArtifact(Artifact):
    """An ONNX model with the files that Triton and KServe need."""

    def __init__(self, model: OnnxArtifact) -> None:
        self._model = model
        self.checks = model.checks

    def complete_spec(self, spec: ModelSpec) -> ModelSpec:
        """Add what the ONNX model adds."""
        return self._model.complete_spec(spec)

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write all files into the folder `path`. Files from an earlier call are overwritten."""
        name = triton_name(spec.model)
        model = path / name / MODEL_PATH
        model.parent.mkdir(parents=True, exist_ok=True)
        self._model.save(model, spec)
        texts = {
            path / name / "config.pbtxt": triton_config(spec, name),
            path / name / LABELS_FILE: labels(spec),
            path / "kserve.yaml": kserve_manifest(spec, model.stat().st_size),
        }
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8", newline="\n")


def convert_to_triton(source: ConversionSource) -> Iterator[TritonArtifact]:
    """Convert the network to ONNX, in any precision. Yields one artifact per candidate of `convert_to_onnx`."""
    return map(TritonArtifact, convert_to_onnx(source))


def triton_name(model: str) -> str:
    """Return the name of a model as a folder name, which is also its name in requests to Triton."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", model)
