"""Writes the predictions of `cifarx infer` one by one, as text, JSON, JSON lines or CSV."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

from cifarx.output.console import json_output, result, styled_result
from cifarx.output.escaping import csv_cell
from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Candidate, Prediction

OutputFormat: TypeAlias = Literal["text", "json", "jsonl", "csv"]


class PredictionWriter(ABC):
    """Writes predictions to standard output as they arrive.

    Args:
        model_facts: the fields that all predictions share: the model file, its backend and its provider.
        top_k: the number of classes per prediction.
        multi_label: whether several labels can apply to an image.
    """

    def __init__(self, model_facts: dict[str, str], top_k: int, multi_label: bool) -> None:
        self._model_facts = model_facts
        self._top_k = top_k
        self._multi_label = multi_label

    @abstractmethod
    def write(self, image: str, prediction: Prediction | ImageError) -> None:
        """Write the prediction for an image, or the error if it could not be read."""

    def close(self) -> None:
        """Write the end of the output. This is also called after an error, so that the output is complete."""
        return

    def _to_dict(self, image: str, prediction: Prediction | ImageError) -> dict[str, Any]:
        if isinstance(prediction, ImageError):
            return {"image": image, "error": str(prediction)}
        return {
            "image": image,
            "label": prediction.label,
            "index": prediction.index,
            "score": prediction.score,
            "top": prediction.top,
            **({"labels": prediction.labels} if self._multi_label else {}),
            **self._model_facts,
        }


class _TextWriter(PredictionWriter):
    def write(self, image: str, prediction: Prediction | ImageError) -> None:
        if not isinstance(prediction, ImageError):  # errors are printed to standard error
            result(f"{image}: {_format_prediction(prediction)}")


def _format_prediction(prediction: Prediction) -> str:
    """Return the best classes; or the labels that apply and, after a bar, the others of the best ones."""
    labels = prediction.labels
    if labels is None:
        return _format_scores(prediction.top)
    others = tuple(candidate for candidate in prediction.top if candidate not in labels)
    applicable = _format_scores(labels) or "no label"
    return f"{applicable} | {_format_scores(others)}" if others else applicable


def _format_scores(candidates: Sequence[Candidate]) -> str:
    return ", ".join(f"{candidate.label} {candidate.score:.4f}" for candidate in candidates)


class _JsonWriter(PredictionWriter):
    """Writes one JSON list, formatted like every other document of the command line."""

    def __init__(self, model_facts: dict[str, str], top_k: int, multi_label: bool) -> None:
        super().__init__(model_facts, top_k, multi_label)
        self._separator = "["

    def write(self, image: str, prediction: Prediction | ImageError) -> None:
        indented = json_output(self._to_dict(image, prediction), indent=2).replace("\n", "\n  ")
        sys.stdout.write(f"{self._separator}\n  {indented}")
        self._separator = ","

    def close(self) -> None:
        styled_result("[]" if self._separator == "[" else "\n]")


class _JsonLinesWriter(PredictionWriter):
    def write(self, image: str, prediction: Prediction | ImageError) -> None:
        styled_result(json_output(self._to_dict(image, prediction)))


class _CsvWriter(PredictionWriter):
    """Writes one row per image. The column `labels` has the names of the labels that apply, separated by semicolons."""

    def __init__(self, model_facts: dict[str, str], top_k: int, multi_label: bool) -> None:
        super().__init__(model_facts, top_k, multi_label)
        import csv  # imported here to keep start-up fast for the other formats

        self._rows = csv.writer(sys.stdout, lineterminator="\n")
        others = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "index", "score")]
        labels = ["labels"] if multi_label else []
        self._rows.writerow(["image", "label", "index", "score", *others, *labels, "error"])

    def write(self, image: str, prediction: Prediction | ImageError) -> None:
        if isinstance(prediction, ImageError):
            empty = [""] * (3 * self._top_k + self._multi_label)
            self._rows.writerow([csv_cell(image), *empty, csv_cell(str(prediction))])
            return
        cells: list[str | int] = []
        for found in prediction.top:
            cells += [csv_cell(found.label), found.index, f"{found.score:.6g}"]
        if prediction.labels is not None:
            cells.append(csv_cell(";".join(candidate.label for candidate in prediction.labels)))
        self._rows.writerow([csv_cell(image), *cells, ""])


_WRITERS: Final[dict[OutputFormat, type[PredictionWriter]]] = {
    "text": _TextWriter,
    "json": _JsonWriter,
    "jsonl": _JsonLinesWriter,
    "csv": _CsvWriter,
}


def prediction_writer(
    output_format: OutputFormat, model_facts: dict[str, str], top_k: int, multi_label: bool
) -> PredictionWriter:
    """Return a writer for the format; see `PredictionWriter` for the other arguments."""
    return _WRITERS[output_format](model_facts, top_k, multi_label)
