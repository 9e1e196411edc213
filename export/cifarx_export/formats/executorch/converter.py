"""Conversion to ExecuTorch: the network lowered to XNNPACK, in one file with its spec."""

from collections.abc import Iterator, Mapping
from functools import partial

from torch import nn

from cifarx_export.formats.conversion_errors import reporting_conversion_errors
from cifarx_export.formats.executorch.int8 import Candidate, XnnpackQuantizationSearch
from cifarx_export.formats.executorch.lowering import RefusedProgramError, export_module, lower
from cifarx_export.formats.int8.gain import check_gain
from cifarx_export.formats.int8.refused import skip_refused
from cifarx_export.formats.quiet import quiet
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.formats.sealed_artifact import SealedArtifact
from cifarx_export.formats.traced_module import module_to_trace
from cifarx_serve.errors import UsageError


def convert_to_executorch(source: ConversionSource) -> Iterator[SealedArtifact]:
    """Lower the network to XNNPACK. Yields one artifact, or for int8 one per candidate of `XnnpackQuantizationSearch`.

    Raises:
        UsageError: ExecuTorch is not installed, or it cannot run the network; or an option of int8 cannot be followed.
        DataError: int8 cannot be calibrated. See `XnnpackQuantizationSearch`.
    """
    facts = {"executorch": _library_version()}
    module, example = module_to_trace(source), source.example_input()
    with reporting_conversion_errors("ExecuTorch", module, example):
        if source.spec.precision == "int8":
            yield from _quantize(module, source, facts)
        else:
            yield SealedArtifact(lower(export_module(module, example)), facts)


def _quantize(module: nn.Module, source: ConversionSource, facts: Mapping[str, str]) -> Iterator[SealedArtifact]:
    """Yield the candidates that ExecuTorch runs.

    Raises:
        RefusedProgramError: it runs none.
    """
    fp32_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    attempts = (partial(_lower, candidate) for candidate in XnnpackQuantizationSearch(module, source).candidates())
    for candidate, program in skip_refused(attempts, RefusedProgramError, source.progress):
        gain = check_gain(candidate.int8_share, fp32_bytes, len(program))
        yield SealedArtifact(program, {**candidate.facts, **facts}, [gain])
        if not gain.passed:
            return  # later candidates have more layers in fp32


def _lower(candidate: Candidate) -> tuple[Candidate, bytes]:
    return candidate, lower(candidate.program)


def _library_version() -> str:
    try:
        with quiet():
            import executorch.exir  # noqa: F401
            from executorch import version
    except ModuleNotFoundError as error:
        raise UsageError("ExecuTorch is not installed", 'pip install "cifarx[executorch]"') from error
    return str(version.__version__)
