import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 130 training images each: enough steps for one reading of the loss at batch 2."""
    for split, count in (("train", 130), ("test", 5)):
        for name in ("black", "white"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), name).save(place / f"{number}.png")
    return tmp_path / "data"


def train(folder: Path, **streams: object) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name("cifarx")
    command = [program, "train", "--model", "lzh", "--data", folder, "--epochs", "1", "--batch-size", "2"]
    return subprocess.Popen([*map(str, command)], **streams)  # type: ignore[call-overload, no-any-return]


def test_a_pipe_gets_plain_lines(folder: Path) -> None:
    process = train(folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    lines = err.decode().splitlines()
    assert any("260 training and 10 test images, 130 steps" in line for line in lines)
    epoch = next(line for line in lines if line.strip().startswith("1/1"))
    assert epoch.endswith("lzh_0.pth")
    assert "nan" not in epoch  # the loss was read at step 100
    assert b"\x1b" not in err + out


def test_a_terminal_gets_a_bar(folder: Path) -> None:
    master, slave = pty.openpty()
    process = train(folder, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other end has closed
        pass
    os.close(master)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert b"/130" in shown
    assert b"\x1b[" in shown
    assert b"lzh_0.pth" in out
