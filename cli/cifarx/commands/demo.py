"""The `cifarx demo` command: every step on the built-in data, with the commands shown."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Final

import typer
from PIL import Image

from cifarx.output.console import note
from cifarx_export.formats.registry import get_format
from cifarx_serve.errors import CheckFailed

# 316 steps, which are enough for the built-in drawings.
_TRAINING: Final = "--data builtin --recipe fast --epochs 4"


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the files of the demo.")] = Path(
        "cifarx-demo"
    ),
) -> None:
    """Run every step on the built-in data.

    Train, export, verify, classify and benchmark on drawings. This takes a minute or two.
    """
    started = time.perf_counter()
    images = " ".join(map(shlex.quote, map(str, _draw_images(out))))
    stem = f"{shlex.quote(str(out))}/lzh_3"
    onnx, torchscript = (get_format(name).file_name(stem, "fp32") for name in ("onnx", "torchscript"))
    for line in (
        f"train --model lzh {_TRAINING} --out {shlex.quote(str(out))}",
        f"export --ckpt {stem}.pth --format onnx --format torchscript",
        f"verify {onnx} --ckpt {stem}.pth",
        f"infer {images} --model {onnx} --backend onnxruntime --top-k 3",
        f"infer {images} --model {torchscript} --backend torchscript",
        f"infer {images} --model {stem}.pth --backend pytorch",
        f"inspect {onnx}",
        f"bench {stem}.pth {torchscript} {onnx} --report {shlex.quote(str(out))}/bench.md",
    ):
        _run(line)
    note("")
    note(f"finished in {time.perf_counter() - started:.0f} s; the files are in {out}")


def _run(line: str) -> None:
    """Run a command in this process, so that PyTorch is loaded only once."""
    from cifarx.app import app

    note("")
    note(f"$ cifarx {line}")
    if status := app(shlex.split(line), standalone_mode=False):
        raise CheckFailed(f"the demo stopped at `cifarx {line}` with exit status {status}", "see the output above")


def _draw_images(out: Path) -> list[Path]:
    """Write a test drawing of each of three classes as an image file, enlarged to the size of a small photo."""
    from cifarx_serve.files.atomic import require_writable
    from cifarx_train.data.synthetic.dataset import CLASS_NAMES, draw_split

    require_writable(out)
    images, labels = draw_split("test")
    paths = []
    for name in ("airplane", "dog", "ship"):
        position = int((labels == CLASS_NAMES.index(name)).argmax())
        path = out / f"{name}.png"
        Image.fromarray(images[position]).resize((256, 256), Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths
