"""A directory that any static host serves: a page that runs the model in the browser with ONNX Runtime Web.

lzh_9.web/
    index.html              the page, with style.css, page.js, classifier.js and offline.js
    model.web.onnx          the model with its preprocessing and its spec
    cifarx_spec.json        the spec once more, for the page
    runtime/                ONNX Runtime Web, from the npm package `onnxruntime-web`
    SHA256SUMS              the checksums of these files
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from cifarx_export.formats.onnx.converter import OnnxArtifact, convert_to_onnx, require_opset
from cifarx_export.formats.onnx.preprocessing import embed_preprocessing
from cifarx_export.formats.registry import MIN_EMBEDDING_OPSET, Artifact, ConversionSource
from cifarx_serve.backends.web.directory import (
    LICENSE_FILE,
    MODEL_FILE,
    PAGE_FILES,
    SCRIPT_FILE,
    SPEC_FILE,
    WASM_FILE,
    write_checksums,
)
from cifarx_serve.backends.web.node_package import PACKAGE, NodePackage, find_package
from cifarx_serve.files.checksum import write_checksum
from cifarx_serve.spec import ModelSpec

_PAGE: Final = Path(__file__).with_name("page")


class WebArtifact(Artifact):
    """An ONNX model with embedded preprocessing, the runtime and the page.

    Args:
        model: the model.
        package: the installed ONNX Runtime Web.
    """

    def __init__(self, model: OnnxArtifact, package: NodePackage) -> None:
        self._model = model
        self._package = package
        self.checks = model.checks

    def complete_spec(self, spec: ModelSpec) -> ModelSpec:
        """Add what the ONNX model adds, and the version of the runtime. The preprocessing is always embedded."""
        complete = self._model.complete_spec(spec)
        facts = {**(complete.exporter or {}), PACKAGE: self._package.version}
        return msgspec.structs.replace(complete, exporter=facts, embedded_preprocessing=True)

    def save(self, path: Path, spec: ModelSpec) -> None:
        """Write all files into the directory `path`. The same model, versions and spec produce the same bytes."""
        (path / SCRIPT_FILE).parent.mkdir(parents=True, exist_ok=True)
        self._model.save(path / MODEL_FILE, spec)
        write_checksum(path / MODEL_FILE)
        (path / SPEC_FILE).write_text(spec.to_json(), encoding="utf-8", newline="\n")
        sources = {name: _PAGE / name for name in PAGE_FILES} | {
            SCRIPT_FILE: self._package.script,
            WASM_FILE: self._package.wasm,
            LICENSE_FILE: _PAGE / "LICENSE-onnxruntime.txt",
        }
        for name, source in sources.items():
            shutil.copyfile(source, path / name)
        write_checksums(path)


def convert_to_web(source: ConversionSource) -> Iterator[WebArtifact]:
    """Convert the network to ONNX, in any precision. Yields one artifact per candidate of `convert_to_onnx`.

    Raises:
        UsageError: ONNX Runtime Web is not installed, the opset of an ONNX file is too old, or see `convert_to_onnx`.
    """
    package = find_package()
    for artifact in convert_to_onnx(source):
        require_opset(artifact.model, "--format web", MIN_EMBEDDING_OPSET)
        embedded = embed_preprocessing(artifact.model, source.spec.input)
        yield WebArtifact(OnnxArtifact(embedded, artifact.facts, artifact.checks), package)
