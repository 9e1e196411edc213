"""A model repository for NVIDIA Triton around an ONNX model: `tritonserver --model-repository=lzh_9.triton`.

    lzh_9.triton/
        kserve.yaml         files at the top are no concern of Triton's; folders are its models
        lzh/
            config.pbtxt
            labels.txt
            1/model.onnx    version 1

The layout is Triton's: "Model Repository" in the user guide of triton-inference-server/server.
"""

import re
from pathlib import Path
from typing import Final

from cifarx_export.formats.onnx.converter import OnnxArtifact, convert_to_onnx
from cifarx_export.formats.registry import Source
from cifarx_export.formats.triton.config import LABELS_FILE, labels, triton_config
from cifarx_export.formats.triton.kserve import kserve_manifest
from cifarx_serve.spec import ModelSpec

MODEL: Final = "1/model.onnx"
"""Where the model is in the folder that has its name."""


class TritonArtifact:
    """An ONNX model, and the files around it."""

    def __init__(self, model: OnnxArtifact) -> None:
        self._model = model

    def describe(self, spec: ModelSpec) -> ModelSpec:
        return self._model.describe(spec)

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Fill the folder `path`; what an earlier call wrote there is written over."""
        name = repository_name(spec.model)
        model = path / name / MODEL
        model.parent.mkdir(parents=True, exist_ok=True)
        self._model.save(model, spec)
        texts = {
            path / name / "config.pbtxt": triton_config(spec, name),
            path / name / LABELS_FILE: labels(spec),
            path / "kserve.yaml": kserve_manifest(spec, model.stat().st_size),
        }
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8", newline="\n")


def convert_to_triton(source: Source) -> TritonArtifact:
    """The ONNX model of the same source, in any of its precisions."""
    return TritonArtifact(convert_to_onnx(source))


def repository_name(model: str) -> str:
    """A model's name as that of a folder, which is what clients ask Triton for."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", model)
