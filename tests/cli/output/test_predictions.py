"""Predictions of models with several labels per image; `test_infer.py` covers the others."""

import csv
import io
import json
from contextlib import closing

import pytest

from cifarx.output.predictions import OutputFormat, prediction_writer
from cifarx_serve.errors import ImageError
from cifarx_serve.predictor import Candidate, Prediction

SKY, TREE, CAR = Candidate("sky", 2, 0.98125), Candidate("tree", 0, 0.75), Candidate("car", 1, 0.125)
FACTS = {"model": "m.onnx", "backend": "onnxruntime", "provider": "CPUExecutionProvider"}
BROKEN = ImageError("x.png is not an image", "give another")


def predicted(top_k: int, *labels: Candidate) -> Prediction:
    return Prediction("sky", 2, SKY.score, (SKY, TREE, CAR)[:top_k], labels=labels)


def written(
    capsys: pytest.CaptureFixture[str], output_format: OutputFormat, top_k: int, *predictions: Prediction | ImageError
) -> str:
    with closing(prediction_writer(output_format, FACTS, top_k, multi_label=True)) as writer:
        for prediction in predictions:
            writer.write("a.png", prediction)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("top_k", "labels", "line"),
    [
        (1, (SKY,), "sky 0.9812"),
        (1, (SKY, TREE), "sky 0.9812, tree 0.7500"),
        (3, (SKY, TREE), "sky 0.9812, tree 0.7500 | car 0.1250"),
        (1, (), "no label | sky 0.9812"),
        (3, (CAR,), "car 0.1250 | sky 0.9812, tree 0.7500"),
    ],
)
def test_text_has_the_labels_that_apply_before_the_others(
    capsys: pytest.CaptureFixture[str], top_k: int, labels: tuple[Candidate, ...], line: str
) -> None:
    assert written(capsys, "text", top_k, predicted(top_k, *labels)) == f"a.png: {line}\n"


@pytest.mark.parametrize("output_format", ["json", "jsonl"])
def test_json_has_the_labels_that_apply(capsys: pytest.CaptureFixture[str], output_format: OutputFormat) -> None:
    parsed = json.loads(written(capsys, output_format, 1, predicted(1, SKY, TREE)))
    [entry] = parsed if output_format == "json" else [parsed]
    assert list(entry) == ["image", "label", "index", "score", "top", "labels", "model", "backend", "provider"]
    assert entry["labels"] == [
        {"label": "sky", "index": 2, "score": 0.98125},
        {"label": "tree", "index": 0, "score": 0.75},
    ]
    assert len(entry["top"]) == 1


def test_csv_has_a_column_with_the_labels_that_apply(capsys: pytest.CaptureFixture[str]) -> None:
    out = written(capsys, "csv", 2, predicted(2, SKY, TREE), predicted(2), BROKEN)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["labels"] for row in rows] == ["sky;tree", "", ""]
    assert [row["error"] for row in rows] == ["", "", str(BROKEN)]
    assert [(row["label"], row["label_2"]) for row in rows] == [("sky", "tree"), ("sky", "tree"), ("", "")]
