"""Pipes and devices in place of files: one line of error, without waiting."""

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.support.color_model import write_onnx
from tests.support.command_line import Cli

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes need POSIX")

COMMANDS = [
    "inspect {}.onnx",
    "inspect {}.pth",
    "infer x.png --model {}.onnx",
    "infer x.png --model {}.torchscript.pt",
    "infer {}.png --model colors.onnx",
    "serve {}.onnx",
    "serve colors.onnx --api-key-file {}.txt",
    "serve colors.onnx --certfile {}.txt --keyfile {}.txt",
    "train --model lzh --dry-run --recipe {}.toml",
    "bench colors.onnx --baseline {}.json",
]
SLOW_COMMANDS = [
    "train --model lzh --data {}.tar",
    "train --model {}.py:Net --data builtin",
    "train --model lzh --resume {}.pth",
    "export --ckpt {}.pth --format onnx",
    "verify {}.onnx --ckpt {}.pth",
    "verify colors.onnx colors.onnx --spec {}.json",
    "inspect {}.pth --spec {}.json",
]
MAX_S = 20.0
"""More than the imports of a command take on a shared machine, and less than forever."""


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_regular_file(command: str, target: str, cli: Cli, tmp_path: Path) -> None:
    refuse(command, target, cli, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("command", SLOW_COMMANDS)
def test_what_is_no_regular_file_with_pytorch(command: str, target: str, cli: Cli, tmp_path: Path) -> None:
    import torch  # noqa: F401  before the time is measured

    refuse(command, target, cli, tmp_path)


def refuse(command: str, target: str, cli: Cli, tmp_path: Path) -> None:
    write_onnx(tmp_path / "colors.onnx")
    Image.new("RGB", (6, 4)).save(tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe")
    arguments = command.format("odd", "odd").split()
    for name in {argument.partition(":")[0] for argument in arguments}:
        if name.startswith("odd."):
            (tmp_path / name).symlink_to(target)
    started = time.monotonic()
    ran = cli(*arguments)
    assert time.monotonic() - started < MAX_S
    assert ran.status == 2
    assert ran.out == ""
    *_, error = ran.err.splitlines()
    assert error.startswith("error: ")
    assert "regular file" in error or "no such baseline" in error or "is no file" in error, error


def test_a_folder_with_pipes_is_classified(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (6, 4), "red").save(folder / "a.png")
    os.mkfifo(folder / "b.png")
    (folder / "c.png").symlink_to("/dev/zero")
    ran = cli("infer", folder, "--model", write_onnx(tmp_path / "colors.onnx"))
    assert ran.status == 1
    assert ran.out == "pictures/a.png: red 0.9999\n".replace("pictures", str(folder))
    assert f"cannot open image {folder}/b.png (not a regular file, and nothing writes to the pipe)" in ran.err
    assert f"cannot open image {folder}/c.png (not a regular file)" in ran.err


def test_a_folder_with_a_pipe_is_searched_for_a_model(cli: Cli, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "x.png")
    write_onnx(tmp_path / "colors.onnx")
    for name in ("newer.onnx", "newer.bin", "newer"):
        os.mkfifo(tmp_path / name)
    assert cli("infer", "x.png").out == "x.png: red 0.9999\n"
