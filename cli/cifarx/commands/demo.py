"""`cifarx demo`: the whole road on the built-in data, with the commands that it takes."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Final

import typer
from PIL import Image

from cifarx.output.console import note
from cifarx_serve.errors import CheckFailed

# 316 steps: enough for drawings.
_TRAINING: Final = "--data builtin --recipe fast --epochs 4"


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for what it writes.")] = Path("cifarx-demo"),
) -> None:
    """Train, export, verify, classify and benchmark on the built-in drawings: the whole road in a minute or two."""
    started = time.perf_counter()
    images = " ".join(map(shlex.quote, map(str, _draw_images(out))))
    last = f"{shlex.quote(str(out))}/lzh_3"
    for line in (
        f"train --model lzh {_TRAINING} --out {shlex.quote(str(out))}",
        f"export --ckpt {last}.pth --format onnx --format torchscript",
        f"verify {last}.onnx --ckpt {last}.pth",
        f"infer {images} --model {last}.onnx --backend onnxruntime --top-k 3",
        f"infer {images} --model {last}.torchscript.pt --backend torchscript",
        f"infer {images} --model {last}.pth --backend pytorch",
        f"inspect {last}.onnx",
        f"bench {last}.pth {last}.torchscript.pt {last}.onnx --report {shlex.quote(str(out))}/bench.md",
    ):
        _run(line)
    note(f"\nthe whole road in {time.perf_counter() - started:.0f} s; what it made is in {out}")


def _run(line: str) -> None:
    """Run a command in this process: PyTorch takes seconds to load, and once is enough."""
    from cifarx.app import app

    note(f"\n$ cifarx {line}")
    if status := app(shlex.split(line), standalone_mode=False):
        raise CheckFailed(f"the demo stopped at `cifarx {line}` with exit status {status}", "read what it said above")


def _draw_images(out: Path) -> list[Path]:
    """One test drawing of each of three classes, enlarged as a photo would be, as files."""
    from cifarx_serve.files.atomic import require_writable
    from cifarx_train.data.synthetic.draw import CLASS_NAMES, draw

    require_writable(out)
    images, labels = draw("test")
    paths = []
    for name in ("airplane", "dog", "ship"):
        position = int((labels == CLASS_NAMES.index(name)).argmax())
        path = out / f"{name}.png"
        Image.fromarray(images[position]).resize((256, 256), Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths
