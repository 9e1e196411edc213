"""Copies of model files of other programs, with the spec that the user states: for commands that only read them."""

import zipfile
from pathlib import Path

from cifarx_export.adoption.adopt import open_foreign_file
from cifarx_export.formats.registry import get_format
from cifarx_serve.backends.onnxruntime.backend import SPEC_KEY
from cifarx_serve.backends.torch.base import SPEC_FILE
from cifarx_serve.files.file_format import FileFormat, detect_format
from cifarx_train.models.options import SpecOverrides


def is_foreign(path: Path) -> bool:
    """Return whether a file is an ONNX or TorchScript file without a spec."""
    kind = detect_format(path)
    if kind is FileFormat.ONNX:
        import onnx

        try:
            model = onnx.load(path, load_external_data=False)
        except Exception:  # the errors of onnx's parsers have no common base class; opening the file reports it
            return False
        return all(entry.key != SPEC_KEY for entry in model.metadata_props)
    if kind is FileFormat.TORCHSCRIPT:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith(f"/extra/{SPEC_FILE}") for name in archive.namelist())
    return False


def write_described_copy(path: Path, overrides: SpecOverrides, folder: Path) -> Path:
    """Write a copy of a foreign file with its spec, and return its path. The batch size stays what it is.

    Args:
        path: a file for which `is_foreign` is true.
        overrides: fields of the spec that the user states.
        folder: an empty folder for the copy.

    Raises:
        UsageError, ModelFileError, SpecError: as for `cifarx_export.adoption.adopt.adopt`.
    """
    foreign = open_foreign_file(path, folder)
    spec = foreign.describe(overrides)
    artifact = foreign.connected(spec)
    copy = folder / f"described{get_format(foreign.kind).suffix}"
    artifact.save(copy, artifact.complete_spec(spec))
    return copy
