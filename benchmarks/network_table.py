"""Write docs/networks.md: networks of many sources in every format, beside their author's own module and transform.

    python -m benchmarks.network_table --out docs/networks.md

Each network is saved as its author would save it and exported by the command line. The artifacts then classify image
files with `cifarx.load`, and the module classifies the same files with the author's transform, outside cifarx.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

import cifarx
from benchmarks.support.author_networks import CLASSES, ENTRIES, Author, Entry
from cifarx.output.console import note
from cifarx_export.formats.registry import get_format
from cifarx_export.parity.report import FAILED_SUFFIX
from cifarx_serve.errors import CifarxError, ImageError
from cifarx_serve.predictor import Prediction
from cifarx_serve.spec import InputSpec
from cifarx_serve.system.environment import current_environment
from cifarx_train.binomial import floor_percent, lower_bound
from cifarx_train.data.dataset import Split
from cifarx_train.data.selection import select_dataset

FORMATS: Final = ("onnx", "torchscript", "pt2")
"""The columns of the table, in fp32. An adopted file has only the column of its format."""

IMAGES: Final = 300
"""The number of test images, of the parity check too. More cost hours: each network is run about 15 times on each."""

_FITTED_IMAGES: Final = 400
_TIMEOUT: Final = 3600  # seconds for one command


class Pictures(NamedTuple):
    """The dataset folder, the test images in it and their files, and other images to fit networks to."""

    folder: Path
    fitted: list[Image.Image]
    fitted_labels: list[int]
    test: list[Image.Image]
    test_files: list[Path]


class Cell(NamedTuple):
    """The result of one format: the agreement with the author's module, or the reason for a refusal."""

    agreement: float | None
    reason: str = ""

    def __str__(self) -> str:
        return f"refused: {self.reason}" if self.agreement is None else f"{self.agreement:.2%}"


def write_pictures(folder: Path, images: int = IMAGES) -> Pictures:
    """Write the built-in drawings as PNG files of several sizes, wide and tall, in folders of classes.

    The networks are fitted to other images than those of the dataset, whose training split is only as large as it has
    to be: training images would join a small test split in the parity check.
    """
    fitted = _write_split(folder / "fit", "train", _FITTED_IMAGES)
    test = _write_split(folder / "data" / "test", "test", images)
    for class_folder in (folder / "data" / "test").iterdir():
        copied = folder / "data" / "train" / class_folder.name / "0.png"
        copied.parent.mkdir(parents=True)
        shutil.copy(min((folder / "fit" / class_folder.name).iterdir()), copied)
    names = sorted(path.name for path in (folder / "fit").iterdir())
    return Pictures(
        folder / "data",
        [Image.open(path).convert("RGB") for path in fitted],
        [names.index(path.parent.name) for path in fitted],
        [Image.open(path).convert("RGB") for path in test],
        test,
    )


def _write_split(folder: Path, split: Split, count: int) -> list[Path]:
    dataset = select_dataset("builtin")
    loaded = dataset.load(split, InputSpec(height=80, width=80))
    paths = []
    for position in range(count):
        path = folder / dataset.class_names[loaded.labels[position]] / f"{position:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = ((80, 80), (96, 80), (80, 100))[position % 3]
        Image.fromarray(loaded.images[position]).resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def check(entry: Entry, pictures: Pictures, formats: Sequence[str] = FORMATS) -> dict[str, Cell]:
    """Export a network to each format and return its agreement with the author's module."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        author = entry.make(folder, pictures.fitted, pictures.fitted_labels)
        expected = _author_classes(author, pictures.test)
        if author.artifact:
            formats = ["onnx" if author.command[0].endswith(".onnx") else "torchscript"]
        before = set(folder.iterdir())
        reasons = _export(author, formats, folder, pictures)
        made = set(folder.iterdir()) - before
        return {
            format_: Cell(None, reasons[format_])
            if format_ in reasons
            else _cell(_artifact(format_, made), folder, pictures, expected)
            for format_ in formats
        }


def _export(author: Author, formats: Sequence[str], folder: Path, pictures: Pictures) -> dict[str, str]:
    """Write the artifacts, with one command if no format is refused, and return the reasons of refusals by format."""
    if author.artifact:
        command = ["adopt", *author.command, "--out", f"adopted{get_format(formats[0]).suffix}"]
    else:
        command = ["export", *author.command, *(text for format_ in formats for text in ("--format", format_))]
    before = set(folder.iterdir())
    done = _run([*command, "--data", str(pictures.folder), "--allow-chance-accuracy"], folder)
    made = set(folder.iterdir()) - before
    failed = {format_: _failed_checks(format_, made) for format_ in formats if _failed_checks(format_, made)}
    if done.returncode in (0, 1) and all(format_ in failed or _has(format_, made) for format_ in formats):
        return failed
    if len(formats) == 1:
        return {formats[0]: _reason(done.stderr, folder)}
    for path in made:
        path.unlink()
    alone = (_export(author, [format_], folder, pictures) for format_ in formats)
    return {format_: reason for refused in alone for format_, reason in refused.items()}


def _artifact(format_: str, made: set[Path]) -> Path:
    (artifact,) = [path for path in made if path.name.endswith(get_format(format_).suffix)]
    return artifact


def _has(format_: str, made: set[Path]) -> bool:
    return any(path.name.endswith(get_format(format_).suffix) for path in made)


def _failed_checks(format_: str, made: set[Path]) -> str:
    """Return the checks that failed, or nothing."""
    suffix = get_format(format_).suffix + FAILED_SUFFIX
    reports = [msgspec.json.decode(path.read_bytes()) for path in made if path.name.endswith(suffix)]
    return ", ".join(
        f"{row['name']} {row['found']}" for report in reports for row in report["checks"] if not row["passed"]
    )


def _author_classes(author: Author, images: Sequence[Image.Image]) -> NDArray[np.int64]:
    """Classify the images one batch at a time with the module and transform of the author."""
    found = []
    with torch.no_grad():
        for start in range(0, len(images), 50):
            batch = torch.stack([author.transform(image) for image in images[start : start + 50]])
            found.append(author.scores(author.module(batch)).argmax(1).numpy())
    classes: NDArray[np.int64] = np.concatenate(found)
    if len(np.unique(classes)) < CLASSES // 2:
        raise RuntimeError("the network of the author predicts too few classes to compare anything")
    return classes


def _cell(artifact: Path, folder: Path, pictures: Pictures, expected: NDArray[np.int64]) -> Cell:
    try:
        with cifarx.load(artifact, device="cpu") as predictor:
            found = [_index(prediction) for prediction in predictor.predict_stream(pictures.test_files)]
    except CifarxError as error:
        return Cell(None, str(error).replace(f"{folder}/", ""))
    return Cell(float((np.asarray(found) == expected).mean()))


def _index(prediction: Prediction | ImageError) -> int:
    if isinstance(prediction, ImageError):
        raise prediction
    return prediction.index


def _run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cifarx", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)


def _reason(stderr: str, folder: Path) -> str:
    """Return the error message of a command, without the path of the temporary folder."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    line = errors[-1].removeprefix("error: ") if errors else stderr.strip().splitlines()[-1]
    return line.replace(f"{folder}/", "")


def _title(entry: Entry) -> str:
    return f"{entry.source} | {entry.name}"


def _line(entry: Entry, cells: dict[str, Cell]) -> str:
    texts = [str(cells[column]).replace("|", "\\|") if column in cells else "" for column in FORMATS]
    return f"| {' | '.join([_title(entry), *texts])} |"


def _introduction() -> list[str]:
    here = current_environment()
    versions = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    return [
        "# Networks",
        "Networks from many sources, saved as their authors save them, exported by the command line and run by\n"
        "`cifarx.load`. Every percentage is of an artifact that passed the parity check. It is the argmax agreement\n"
        f"on {IMAGES:,} image files with the author's own module and the author's own transform, outside cifarx:\n"
        f"100.00% is at least {floor_percent(lower_bound(IMAGES, IMAGES))} with 95% confidence.\n"
        "`refused` says which check failed: such an artifact is not written. The weights are from a few epochs on\n"
        "drawings. Hugging Face's processors resize with torchvision, whose pixels differ from Pillow's by up to two\n"
        "levels of 255, so that a tie can be broken the other way.",
        "Written by `python -m benchmarks.network_table --out docs/networks.md`.\n\n"
        f"{here.cpu}, {here.cpus} CPUs; {versions}.",
    ]


def _page(rows: Mapping[str, str]) -> str:
    headings = ["source", "network", *FORMATS]
    ordered = [rows[_title(entry)] for entry in ENTRIES if _title(entry) in rows]
    table = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings), *ordered]
    return "\n\n".join([*_introduction(), "\n".join(table)]) + "\n"


def _read_rows(path: Path) -> dict[str, str]:
    """Return the rows of a page that was written before, by their titles."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    titles = [_title(entry) for entry in ENTRIES]
    return {title: line for line in lines for title in titles if line.startswith(f"| {title} |")}


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file. Its other rows are kept.")],
    only: Annotated[str, typer.Option(help="Measure only the networks whose source or name contains this.")] = "",
    missing: Annotated[bool, typer.Option("--missing", help="Measure only the networks without a row.")] = False,
) -> None:
    """Write the table. Every row is written as soon as it is measured."""
    rows = _read_rows(out)
    chosen = [entry for entry in ENTRIES if only in _title(entry) and not (missing and _title(entry) in rows)]
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder))
        for position, entry in enumerate(chosen, start=1):
            started = time.monotonic()
            rows[_title(entry)] = _line(entry, check(entry, pictures))
            note(f"{position} of {len(chosen)} in {time.monotonic() - started:.0f} s: {rows[_title(entry)]}")
            out.write_text(_page(rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
