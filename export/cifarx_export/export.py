"""Export a checkpoint: convert it, check parity, and give an artifact its name only if the parity check passed."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from cifarx_export.checked_artifact import ExportResult
from cifarx_export.exporter import open_exporter
from cifarx_export.formats.registry import NO_OPTIONS, ExportOptions
from cifarx_export.origin import origin_directory
from cifarx_export.parity.html import render_html_report, require_html_path, write_html_report
from cifarx_export.targets import find_targets
from cifarx_serve.errors import UsageError
from cifarx_serve.progress import Progress, silent
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.terminal import require_utf8
from cifarx_train.data.dataset import OnError
from cifarx_train.data.selection import DataSource
from cifarx_train.models.options import ModelOptions, SpecOverrides

if TYPE_CHECKING:
    from torch import nn


class ExportResults(list[ExportResult]):
    """The results of an export. In a notebook, they show themselves as the HTML parity report.

    Args:
        results: the results.
        images: the worst images of the parity checks, by their position.
    """

    def __init__(self, results: Iterable[ExportResult], images: Mapping[int, NDArray[np.uint8]]) -> None:
        super().__init__(results)
        self._images = images

    def _repr_html_(self) -> str:
        page = render_html_report([result.report for result in self], self._images)
        return f'<iframe srcdoc="{escape(page)}" style="border: 0; width: 100%; height: 40rem"></iframe>'


def export(
    checkpoint: "str | Path | nn.Module | None",
    formats: Sequence[str] | Path = ("onnx",),
    precisions: Sequence[str] | None = None,
    *,
    model: str | ModelOptions | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: InputSpec | None = None,
    data: str | DataSource = "auto",
    on_error: OnError = "raise",
    out: str | Path | None = None,
    options: ExportOptions = NO_OPTIONS,
    batch_size: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    html_report: str | Path | None = None,
    allow_chance_accuracy: bool = False,
    progress: Progress = silent,
) -> ExportResults:
    """Export a network to every combination of `formats` and `precisions`, and check the parity of each artifact.

    An artifact that fails its parity check is not written. Its report is, and an earlier artifact of the same name is
    kept.

    Args:
        checkpoint: a checkpoint; an ONNX file of `cifarx export` or `cifarx adopt` in fp32; a directory that Hugging
            Face's `save_pretrained` wrote; or a module in memory, which is not changed. None for a network that `model`
            names with its weights, such as `hf/DIRECTORY`.
        formats: names of formats, see `cifarx_export.formats.registry.FORMATS`; or the path of one artifact, whose
            suffix names the format, such as `net.onnx` or `net.int8.onnx`.
        precisions: fp32, bf16, fp16 or int8. The default is fp32, or the one in the path.
        model: the network, as `--model` names it, for a checkpoint that does not contain it; or `ModelOptions` with all
            that the user states.
        class_names: the classes in the order of their labels. The default is what the checkpoint states.
        preprocessing: how images become the input of the network, see `cifarx.Preprocessing`.
        data: images for the parity check: auto, cifar10, builtin, or the path of images; or a `DataSource` that says
            how they are split and labeled.
        on_error: "raise" a `DataError` for images that cannot be read, or "skip" them with a warning.
        out: directory for the artifacts. The default is that of the checkpoint, or the current one.
        options: options of the conversion.
        batch_size: another batch size to check, in addition to 1, 3 and 64.
        atol, rtol: tolerances to use instead of those of the precision.
        html_report: path of an HTML parity report to write, ending in `.html`.
        allow_chance_accuracy: also export a network that is no better than chance on labeled images, or better with
            another preprocessing than the one that is assumed.
        progress: called with a line of text at each step.

    Returns:
        One result per combination, in the order of `formats`. Each combination is exported once. In a notebook, the
        list shows the HTML parity report.

    Raises:
        UsageError: an unknown name, or an option that a format or precision does not support.
        ModelFileError: the checkpoint cannot be read.
        SpecError: what is stated about the network is not valid.
        CheckFailed: the network is no better than chance, and its preprocessing or classes were given or assumed; or
            another preprocessing than the assumed one is better; or it returns probabilities where logits are assumed.
        DataError: the images cannot be read, or are too few.
        OutputError: a file cannot be written.
    """
    source = Path(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    targets = find_targets(formats, precisions, options)
    if targets.path is not None and out is not None:
        raise UsageError(f"{targets.path} and out={out} were given together", "leave one of them out")
    require_html_path(html_report)
    require_utf8(*(path for path in (source, targets.path, out) if isinstance(path, str | Path)))  # named in reports
    stated = _model_options(model, class_names, preprocessing)
    directory = origin_directory(source, stated) if out is None else Path(out)
    exporter = open_exporter(
        source,
        stated,
        directory if targets.path is None else targets.path.parent,
        pairs=targets.pairs,
        data=data,
        on_error=on_error,
        options=options,
        batch_size=batch_size,
        atol=atol,
        rtol=rtol,
        allow_chance_accuracy=allow_chance_accuracy,
        progress=progress,
    )
    results = [exporter.run(name, precision, targets.path) for name, precision in targets.pairs]
    images = exporter.reference.data.images
    if html_report is not None:
        write_html_report(Path(html_report), [result.report for result in results], images)
    analyses = [result.report.error_analysis for result in results]
    worst = {row.image for analysis in analyses if analysis for row in analysis.worst}
    return ExportResults(results, {position: np.array(images[position]) for position in worst})


def _model_options(
    model: str | ModelOptions | None, class_names: Sequence[str] | None, preprocessing: InputSpec | None
) -> ModelOptions:
    """Return what the arguments of `export` state about the network."""
    options = model if isinstance(model, ModelOptions) else ModelOptions(model)
    fields, origins = dict(options.overrides.fields), dict(options.overrides.origins)
    if class_names is not None:
        fields["class_names"], origins["class_names"] = list(class_names), "class_names"
    if preprocessing is not None:
        fields["input"], origins["input"] = msgspec.to_builtins(preprocessing), "preprocessing"
    whole_input = options.overrides.whole_input or preprocessing is not None
    return options._replace(overrides=SpecOverrides(fields, whole_input, origins))
