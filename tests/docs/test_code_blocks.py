"""The code blocks of the README, the documentation and the examples: Python and commands run, data is parsed."""

import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from PIL import Image

from cifarx.app import COMMANDS, LazyGroup, app
from tests.support.command_line import CommandResult, run_program
from tests.support.documentation import ROOT, Page, cifarx_arguments, find_pages, simple_commands
from tests.support.server_process import run_server
from tests.support.trained_model import Trained

PAGES = find_pages("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "examples/**/*.md")

# The files that the pages use. Each model is a copy of the trained one.
MODELS = ("lzh_9", "lzh_1")
IMAGES = ("dog.png", "cat.jpg", "ship.png", "horse.jpg", "test/horse/0007.jpg")

# The command that writes the file that the Python blocks of a page use.
PREPARATION = {"docs/embedded-preprocessing.md": "cifarx export --ckpt lzh_9.pth --format onnx --embed-preprocessing"}

NOT_RUN = {
    "transposed.onnx": "a file with a planted error, for which the exit status is 1",
    "bgr.onnx": "a file of another program",
    "executorch": "it is not among the extras for development; tests/export/formats/executorch/ runs it",
    ".pte": "the files of that format",
    "litert": "its converter has an environment of its own; tests/export/formats/litert/ runs it",
    ".tflite": "the files of that format",
    "mobilenet.onnx": "the reader's file; tests/export/test_verify_runtimes.py runs such a file",
    "cifarx optimize": "it takes minutes; tests/cli/commands/test_optimize.py runs it",
    "resnet18_0.optimized": "the file of that command",
    "--baseline": "the result depends on the machine",
    "--pick": "the result depends on the machine",
    "fastnet_7.pth": "the checkpoint of eight epochs of another network",
    "photos/": "the images are the reader's; tests/e2e/test_own_network.py runs the first three commands",
    "cifar_net.onnx": "a file of the reader's network",
    "model.py:Net": "the reader's network",
    "--sign": "openssl creates the key; tests/e2e/test_signed_models.py runs these commands",
    "--require-signature": "the same",
    "onnx_reference": "the plug-in is installed by tests/examples/test_backend_plugin.py",
}
"""Reasons not to run the commands that contain a text. Their options are checked all the same."""

RAY_PAGES = ("docs/batch-inference.md",)
"""Pages whose Python runs on a cluster, in tests/serve/test_ray_data.py."""

# Where the pages find the server, over HTTP and over gRPC.
_SERVER = "127.0.0.1:8000"
_GRPC_SERVER = "127.0.0.1:8001"
_REPOSITORY = "/v2/repository/"

_SLOW_PYTHON = re.compile(r"\bcifarx\.(train|export|verify|benchmark)\b|\btorch\b")


def cifarx_commands(page: Page) -> list[list[str]]:
    """Return the arguments of every `cifarx` command in the blocks of a page."""
    commands = [command for line in page.shell_lines() for command in simple_commands(line)]
    return [arguments for command in commands if (arguments := cifarx_arguments(command))]


def runnable_lines(page: Page) -> list[str]:
    """Return the shell lines that run nothing but `cifarx`, and not a server."""
    lines = []
    for line in page.shell_lines():
        programs = [command[0] for command in simple_commands(line) if command[0] != "for"]
        if programs and set(programs) == {"cifarx"} and not re.search(r"\bcifarx (serve|demo)\b", line):
            lines += [] if any(text in line for text in NOT_RUN) else [line]
    return lines


def requests(page: Page) -> list[str]:
    """Return the shell lines that send requests to `cifarx serve`."""
    lines = [line for line in page.shell_lines() if _SERVER in line]
    return [line for line in lines if {command[0] for command in simple_commands(line)} == {"curl"}]


def is_fast(lines: list[str]) -> bool:
    """Return whether lines run only commands that take less than a second, which those that import PyTorch do not."""
    commands = {command[1] for line in lines for command in simple_commands(line) if command[0] == "cifarx"}
    return commands <= {"doctor", "infer", "inspect"} and not any("torch" in line for line in lines)


def marked(pages: list[Page], slow: set[str]) -> list[object]:
    """Return the pages as parameters of a test."""
    marks = {name: [pytest.mark.slow, pytest.mark.timeout(900)] for name in slow}
    return [pytest.param(page, id=page.name, marks=marks.get(page.name, [])) for page in pages]


PYTHON_PAGES = [page for page in PAGES if page.blocks_in("python") and page.name not in RAY_PAGES]
COMMAND_PAGES = [page for page in PAGES if runnable_lines(page)]
REQUEST_PAGES = [page for page in PAGES if requests(page)]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_python_page = pytest.mark.parametrize(
    "page",
    marked(
        PYTHON_PAGES,
        {page.name for page in PYTHON_PAGES if page.name in PREPARATION or _SLOW_PYTHON.search(page.python_script())},
    ),
)
each_command_page = pytest.mark.parametrize(
    "page", marked(COMMAND_PAGES, {page.name for page in COMMAND_PAGES if not is_fast(runnable_lines(page))})
)


@pytest.fixture
def folder(tmp_path: Path, trained: Trained) -> Path:
    """The current directory with the files that the pages use."""
    for stem in MODELS:
        shutil.copy(trained.checkpoint, f"{stem}.pth")
        shutil.copy(trained.onnx, f"{stem}.onnx")
        shutil.copy(trained.torchscript, f"{stem}.torchscript.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for name in IMAGES:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(name)
    return tmp_path


@pytest.fixture
def small_dataset(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set `CIFARX_DATA` to random images of the classes of CIFAR-10, so that training is fast."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for name in classes:
        for split, count in (("train", 20), ("test", 100)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png", compress_level=0)
    monkeypatch.setenv("CIFARX_DATA", str(folder))


def run(*command: object) -> CommandResult:
    """Run a program with the commands of this environment on the PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return run_program(*command, timeout_s=600, PATH=path)


@contextmanager
def served(directory: Path, text: str) -> Iterator[str]:
    """Serve the model if a text contains an address of the server, and return the text with the right ports."""
    if _SERVER not in text and _GRPC_SERVER not in text:
        yield text
        return
    options: list[object] = ["--workers", 1, "--grpc-port", 0]
    if _REPOSITORY in text:
        for version in ("1", "2"):
            folder = Path("models", "lzh", version)
            folder.mkdir(parents=True)
            shutil.copy("lzh_9.onnx", folder / "model.onnx")
        options += ["--model-repository", "models", "--model-control", "explicit"]
    with run_server(directory / "log", "lzh_9.onnx", *options) as server:
        yield text.replace(_SERVER, f"127.0.0.1:{server.port}").replace(_GRPC_SERVER, server.grpc_address)


def find_command(name: str) -> Any:
    """Return the parser of `cifarx NAME`."""
    assert name in COMMANDS
    assert isinstance(app, LazyGroup)
    return app.get_command(typer.Context(app, info_name="cifarx"), name)


def parse(name: str, *arguments: str) -> None:
    """Parse the arguments of `cifarx NAME`, and fail if they are not valid."""
    find_command(name).make_context(name, [argument for argument in arguments if argument != "--help"])


@each_python_page
def test_python_blocks_run(page: Page, folder: Path) -> None:
    """The blocks of a page run one after the other as one script, with warnings as errors."""
    if preparation := PREPARATION.get(page.name):
        assert run("bash", "-c", preparation).status == 0
    with served(folder, page.python_script()) as script:
        Path("blocks.py").write_text(script, encoding="utf-8")
        result = run(sys.executable, "-W", "error", "blocks.py")
    assert result.status == 0, f"{page.name}: {result.err}"


@each_command_page
@pytest.mark.usefixtures("folder", "small_dataset")
def test_commands_run(page: Page) -> None:
    for line in runnable_lines(page):
        result = run("bash", "-c", line)
        assert result.status == 0, f"{page.name}: {line}\n{result.err}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on the PATH")
@pytest.mark.parametrize("page", REQUEST_PAGES, ids=lambda page: page.name)
def test_requests_are_answered(page: Page, folder: Path) -> None:
    with served(folder, "\n".join(requests(page))) as script:
        for line in script.splitlines():
            result = run("bash", "-c", line.replace("curl ", "curl --fail-with-body ", 1))
            assert result.status == 0, f"{page.name}: {line}\n{result.out}{result.err}"


@each_page
def test_commands_can_be_parsed(page: Page) -> None:
    for arguments in cifarx_commands(page):
        if arguments not in (["--help"], ["--version"]):
            parse(*arguments)


def test_an_unknown_option_cannot_be_parsed() -> None:
    line = "for b in onnxruntime pytorch; do cifarx infer dog.png --backends $b; done  # with every backend"
    (command,) = (command for command in simple_commands(line) if command[0] == "cifarx")
    with pytest.raises(Exception, match="No such option: --backends"):
        parse(*command[1:])


@each_page
def test_options_in_the_text_exist(page: Page) -> None:
    """In the text, a command can leave arguments out, so only the names of its options are checked."""
    for code in page.inline_code():
        program, *words = code.split()
        if program != "cifarx" or words[:1] in ([], ["--help"], ["--version"]) or not words[0].isalpha():
            continue
        parameters = find_command(words[0]).params
        known = {"--help", *(option for each in parameters for option in (*each.opts, *each.secondary_opts))}
        assert [word for word in words if word.startswith("--") and word not in known] == [], code


@each_page
def test_files_targets_and_extras_exist(page: Page) -> None:
    """Check the arguments of `python`, `pytest`, `make` and `pip` in code blocks and in the text."""
    targets = re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in [*page.shell_lines(), *page.inline_code()]:
        if not line.startswith(("make ", "pip ", "pytest ", "python ")):
            continue
        for program, *words in simple_commands(line):
            match program:
                case "make":
                    unknown = [word for word in words if "=" not in word and word not in targets]
                case "pip":
                    named = [names for word in words for names in re.findall(r"\[(.*)\]", word)]
                    unknown = [name for names in named for name in names.split(",") if name not in extras]
                case _:
                    paths = [word for word in words if re.match("(benchmarks|examples|tests|docs)/", word)]
                    unknown = [path for path in paths if not (ROOT / path).exists()]
            assert unknown == [], line


@each_page
def test_data_can_be_parsed(page: Page) -> None:
    for block in page.blocks_in("json"):
        json.loads(block.text)
    for block in page.blocks_in("toml"):
        tomllib.loads(block.text)
    for block in page.blocks_in("yaml"):
        for document in re.split(r"^---$", block.text, flags=re.MULTILINE):
            msgspec.yaml.decode(document)


def test_every_reason_is_needed() -> None:
    lines = [line for page in PAGES for line in page.shell_lines()]
    assert [text for text in NOT_RUN if not any(text in line for line in lines)] == []
