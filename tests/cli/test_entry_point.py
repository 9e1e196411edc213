import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from tests.support.asgi_client import encode_image
from tests.support.color_model import SPEC, write_onnx


def _program(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program after a line of Python."""
    code = f"import sys; sys.argv = ['cifarx', *sys.argv[1:]]; {before}\nfrom cifarx.__main__ import program; program()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("imported", ["pass", "sys.modules['torch'] = sys"])
@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["inspect", "absent.onnx"], 2)])
def test_the_exit_keeps_the_status_and_all_output(imported: str, arguments: list[str], status: int) -> None:
    result = _program(f"{imported}; sys.stdout.write('x' * 100_000)", *arguments)
    assert result.returncode == status
    assert len(result.stdout) >= 100_000
    assert ("absent.onnx" in result.stderr) == (status == 2)


def test_exit_handlers_run() -> None:
    result = _program("import atexit; atexit.register(lambda: print('exit handler'))", "--version")
    assert result.stdout.endswith("exit handler\n")


def test_garbage_collection_is_enabled_while_a_command_runs() -> None:
    result = _program(
        "import atexit, gc; atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 1000))", "--version"
    )
    assert result.stdout.endswith("True True\n")


def test_without_pytorch_the_interpreter_is_not_finalized() -> None:
    """Finalization takes long with ONNX Runtime. It would call `__del__` of an object that is still alive."""
    end = "lambda self, write=os.write: write(2, b'finalized')"
    held = f"import os; kept = type('Held', (), {{'__del__': {end}}})()"
    assert "finalized" not in _program(held, "--version").stderr
    assert "finalized" in _program(f"{held}; sys.exit(0)").stderr


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Write a model whose class names are not ASCII, and an image with a name that is not UTF-8."""
    document = msgspec.structs.replace(SPEC, class_names=("röt", "grün", "blau")).to_json()
    write_onnx(tmp_path / "colors.onnx", document)
    image = encode_image(Image.new("RGB", (6, 4), "red"))
    for name in (b"red.png", b"r\xff.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(image)
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="the shell of another system")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("command", ["infer red.png --model colors.onnx", "inspect colors.onnx", "infer absent.png"])
def test_closed_standard_streams(command: str, closed: str, files: Path) -> None:
    """The exit status is the same, and whatever the streams that are open would get."""
    usual, ran = (
        subprocess.run(
            ["sh", "-c", f"exec '{sys.executable}' -m cifarx {command} {streams}"],
            cwd=files,
            capture_output=True,
            check=False,
        )
        for streams in ("", closed)
    )
    assert ran.returncode == usual.returncode
    assert ran.stdout == (b"" if closed.startswith(">") else usual.stdout)
    assert ran.stderr == (b"" if "2>&-" in closed else usual.stderr)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("output_format", ["--json", "--jsonl", "--csv", ""])
def test_names_that_the_encoding_lacks(output_format: str, encoding: str, files: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "cifarx", "infer", b"r\xff.png", "--model", "colors.onnx", *output_format.split()],
        cwd=files,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0
    assert ran.stderr.startswith(b"note: colors.onnx ")
    text = ran.stdout.decode(encoding)
    if output_format.startswith("--json"):
        document = json.loads(text)
        prediction = document[0] if isinstance(document, list) else document
        assert (prediction["image"], prediction["label"]) == ("r\ufffd.png", "röt")
    else:
        name, label = ("r\ufffd.png".encode(encoding, "backslashreplace"), "röt".encode(encoding, "backslashreplace"))
        assert name.decode(encoding) in text
        assert label.decode(encoding) in text
