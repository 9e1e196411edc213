"""What `cifarx infer` found, written an image at a time: text, JSON, JSON lines or CSV."""

import sys
from abc import ABC, abstractmethod
from typing import Any, Final, Literal, TypeAlias

import msgspec

from cifarx.output.console import result
from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Prediction

Layout: TypeAlias = Literal["text", "json", "jsonl", "csv"]


class AnswerWriter(ABC):
    """Writes answers to standard output as they come.

    Args:
        facts: what is the same for all: the model's file, its backend, its provider.
        top_k: how many classes an answer has.
    """

    def __init__(self, facts: dict[str, str], top_k: int) -> None:
        self._facts = facts
        self._top_k = top_k

    @abstractmethod
    def write(self, image: str, answer: Prediction | ImageError) -> None:
        """Write one."""

    def close(self) -> None:
        """Write what comes after the last; also after an error, so that what is there can be read."""
        return

    def _document(self, image: str, answer: Prediction | ImageError) -> dict[str, Any]:
        if isinstance(answer, ImageError):
            return {"image": image, "error": str(answer)}
        answered = {"label": answer.label, "index": answer.index, "score": answer.score, "top": answer.top}
        return {"image": image, **answered, **self._facts}


class _Text(AnswerWriter):
    def write(self, image: str, answer: Prediction | ImageError) -> None:
        if not isinstance(answer, ImageError):  # whose line is on standard error
            result(f"{image}: " + ", ".join(f"{found.label} {found.score:.4f}" for found in answer.top))


class _Json(AnswerWriter):
    """One document, a list, laid out as every other document of the command line."""

    def __init__(self, facts: dict[str, str], top_k: int) -> None:
        super().__init__(facts, top_k)
        self._before = "["

    def write(self, image: str, answer: Prediction | ImageError) -> None:
        document = msgspec.json.format(msgspec.json.encode(self._document(image, answer)), indent=2).decode()
        indented = document.replace("\n", "\n  ")
        sys.stdout.write(f"{self._before}\n  {indented}")
        self._before = ","

    def close(self) -> None:
        result("[]" if self._before == "[" else "\n]")


class _JsonLines(AnswerWriter):
    def write(self, image: str, answer: Prediction | ImageError) -> None:
        result(msgspec.json.encode(self._document(image, answer)).decode())


class _Csv(AnswerWriter):
    def __init__(self, facts: dict[str, str], top_k: int) -> None:
        super().__init__(facts, top_k)
        import csv  # not for the others: start-up is measured

        self._rows = csv.writer(sys.stdout, lineterminator="\n")
        further = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "index", "score")]
        self._rows.writerow(["image", "label", "index", "score", *further, "error"])

    def write(self, image: str, answer: Prediction | ImageError) -> None:
        if isinstance(answer, ImageError):
            self._rows.writerow([image, *[""] * (3 * self._top_k), str(answer)])
            return
        cells = [cell for found in answer.top for cell in (found.label, found.index, f"{found.score:.6g}")]
        self._rows.writerow([image, *cells, ""])


_WRITERS: Final[dict[Layout, type[AnswerWriter]]] = {"text": _Text, "json": _Json, "jsonl": _JsonLines, "csv": _Csv}


def answer_writer(layout: Layout, facts: dict[str, str], top_k: int) -> AnswerWriter:
    """The writer of a layout."""
    return _WRITERS[layout](facts, top_k)
