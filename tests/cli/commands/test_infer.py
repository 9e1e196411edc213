import csv
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifarx_train.data.synthetic.draw import CLASS_NAMES, draw
from tests.support.command_line import Cli
from tests.support.trained_model import Trained


@pytest.fixture
def drawings(tmp_path: Path) -> list[Path]:
    """The first five test drawings as PNG files."""
    images, _ = draw("test")
    paths = [tmp_path / f"{position}.png" for position in range(5)]
    for image, path in zip(images, paths, strict=False):
        Image.fromarray(image).save(path)
    return paths


def test_json_shape(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    ran = cli("infer", *drawings, "--model", trained.onnx, "--json", "--top-k", 3)
    assert ran.status == 0
    assert [entry["image"] for entry in ran.json] == list(map(str, drawings))
    for entry in ran.json:
        assert list(entry) == ["image", "label", "index", "score", "top", "model", "backend", "provider"]
        assert [list(candidate) for candidate in entry["top"]] == [["label", "index", "score"]] * 3
        assert entry["label"] == CLASS_NAMES[entry["index"]] == entry["top"][0]["label"]
        assert entry["backend"] == "onnxruntime"
        assert entry["model"] == str(trained.onnx)


def test_every_backend_gives_the_same_answer(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    answers = [
        [
            (entry["index"], round(entry["score"], 5))
            for entry in cli("infer", *drawings, "--model", model, "--json").json
        ]
        for model in (trained.onnx, trained.torchscript, trained.checkpoint)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_text_is_one_line_an_image(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    ran = cli("infer", *drawings, "--model", trained.onnx)
    lines = ran.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(map(str, drawings))
    assert all(line.split()[1] in CLASS_NAMES for line in lines)


def test_says_what_runs_and_what_it_was_trained_on(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    err = cli("infer", drawings[0], "--model", trained.onnx).err
    assert "CPUExecutionProvider" in err
    assert "built-in" in err or "builtin" in err


def test_without_a_model_takes_the_newest_that_the_backend_runs(
    cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path
) -> None:
    shutil.copy(trained.onnx, tmp_path / "old.onnx")
    shutil.copy(trained.onnx, tmp_path / "new.onnx")
    shutil.copy(trained.checkpoint, tmp_path / "newest.pth")
    newest = (tmp_path / "old.onnx").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "new.onnx", ns=(newest, newest))
    ran = cli("infer", drawings[0], "--backend", "onnxruntime", "--json")
    assert ran.json[0]["model"] == "new.onnx"
    assert "new.onnx" in ran.err
    assert cli("infer", drawings[0], "--backend", "pytorch", "--json").json[0]["model"] == "newest.pth"


def test_no_model_at_all(cli: Cli, drawings: list[Path]) -> None:
    ran = cli("infer", drawings[0], "--backend", "onnxruntime")
    assert ran.status == 2
    assert "--model" in ran.error
    assert ".onnx" in ran.error


def test_broken_images_do_not_stop_the_others(cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(drawings[0].read_bytes()[:200])
    ran = cli("infer", drawings[0], torn, "absent.png", drawings[1], "--model", trained.onnx, "--json")
    assert ran.status == 1
    assert [("label" in entry, "error" in entry) for entry in ran.json] == [
        (True, False),
        (False, True),
        (False, True),
        (True, False),
    ]
    assert list(ran.json[1]) == ["image", "error"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no picture", "not an image"), (b"", "not an image"), (None, "No such file")],
    ids=["text", "empty", "absent"],
)
def test_what_is_no_image(cli: Cli, trained: Trained, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    ran = cli("infer", path, "--model", trained.onnx)
    assert ran.status == 2
    assert words in ran.error
    assert ran.err.count("\n") == 1
    assert ran.out == ""


def test_truncated_photo(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:5000])
    ran = cli("infer", tmp_path / "torn.jpg", "--model", trained.onnx)
    assert ran.status == 2
    assert "truncated" in ran.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "onnxrt"], "did you mean 'onnxruntime'"),
        (["--device", "gpu"], "cuda:N"),
        (["--top-k", "11"], "10 classes"),
        (["--top-k", "0"], "10 classes"),
        (["--backend", "pytorch"], "does not open"),
    ],
)
def test_wrong_choices(cli: Cli, trained: Trained, drawings: list[Path], arguments: list[str], words: str) -> None:
    ran = cli("infer", drawings[0], "--model", trained.onnx, *arguments)
    assert ran.status == 2
    assert words in ran.error
    assert ran.out == ""


def test_cuda_that_is_not_there_is_an_error(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for model in (trained.onnx, trained.torchscript, trained.checkpoint):
        ran = cli("infer", drawings[0], "--model", model, "--device", "cuda")
        assert ran.status == 2
        assert "--device cpu" in ran.error
        assert ran.out == ""


def test_model_files_that_are_none(cli: Cli, drawings: list[Path], tmp_path: Path) -> None:
    for name in ("x.onnx", "x.torchscript.pt", "x.pth"):
        (tmp_path / name).write_bytes(b"this is no model")
        ran = cli("infer", drawings[0], "--model", tmp_path / name)
        assert ran.status == 2
        assert name in ran.error


def test_onnx_imports_no_pytorch(trained: Trained, drawings: list[Path]) -> None:
    code = (
        "import sys; from cifarx.main import main\n"
        f"sys.argv = ['cifarx', 'infer', {str(drawings[0])!r}, '--model', {str(trained.onnx)!r},"
        " '--backend', 'onnxruntime']\n"
        "try: main()\n"
        "except SystemExit as ended: status = ended.code\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'tensorboard', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else status)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(drawings[0]))


def test_dog(cli: Cli, trained: Trained, dog: Path) -> None:
    """A photograph of 1546x1213, whatever a model of drawings makes of it: the same by every backend."""
    answers = {
        cli("infer", dog, "--model", model, "--json").json[0]["index"]
        for model in (trained.onnx, trained.torchscript, trained.checkpoint)
    }
    assert len(answers) == 1


# Many images, and other layouts.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A hundred and fifty drawings, one that is broken in the middle, and a text."""
    place = tmp_path / "many"
    place.mkdir()
    images, _ = draw("test")
    for position in range(150):
        Image.fromarray(images[position]).save(place / f"{position:03}.png")
    (place / "077.png").write_bytes(b"no picture")
    (place / "readme.txt").touch()
    return place


def test_a_folder_is_answered_in_order(cli: Cli, trained: Trained, folder: Path) -> None:
    ran = cli("infer", folder, "--model", trained.onnx, "--jsonl", "--top-k", 2)
    assert ran.status == 1
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == [f"{position:03}.png" for position in range(150)]
    assert [position for position, row in enumerate(rows) if "error" in row] == [77]
    single = cli("infer", folder / "140.png", "--model", trained.onnx, "--json", "--top-k", 2).json[0]
    assert rows[140]["index"] == single["index"]
    assert rows[140]["score"] == pytest.approx(single["score"], abs=1e-5)
    document = cli("infer", folder, "--model", trained.onnx, "--json", "--top-k", 2)
    assert document.json == rows


def test_a_table_has_a_row_an_image(cli: Cli, trained: Trained, folder: Path) -> None:
    ran = cli("infer", str(folder / "07*.png"), "--model", trained.onnx, "--csv", "--top-k", 2)
    assert ran.status == 1
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    head = ["image", "label", "index", "score", "label_2", "index_2", "score_2", "error"]
    assert list(rows[0]) == head
    assert len(rows) == 10
    for row in rows:
        if row["image"].endswith("077.png"):
            assert "not an image" in row["error"]
            assert {row[name] for name in head[1:-1]} == {""}
        else:
            assert row["label"] == CLASS_NAMES[int(row["index"])]
            assert float(row["score"]) >= float(row["score_2"])
            assert not row["error"]


def test_standard_input_is_an_image(trained: Trained, drawings: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifarx", "infer", "-", str(drawings[1]), "--model", str(trained.onnx), "--json"]
    ran = subprocess.run(command, input=drawings[1].read_bytes(), capture_output=True, check=True, cwd=tmp_path)
    first, second = json.loads(ran.stdout)
    assert first["image"] == "-"
    assert {**first, "image": ""} == {**second, "image": ""}


def test_a_text_has_no_line_for_what_is_broken(cli: Cli, trained: Trained, folder: Path) -> None:
    ran = cli("infer", folder, "--model", trained.onnx)
    assert len(ran.out.splitlines()) == 149
    assert "077.png is not an image" in ran.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.png", "--csv", "--jsonl"], "--jsonl and --csv together"),
        (["*.gif"], "nothing fits"),
        ([".", "--csv"], "no images in"),
    ],
)
def test_what_cannot_be_meant(
    cli: Cli, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path / "none")
    ran = cli("infer", *arguments, "--model", trained.onnx)
    assert ran.status == 2
    assert words in ran.error
    assert ran.out == ""


# The contact sheet.


def shows(sheet: Path, image: Path) -> bool:
    """Whether a drawing stands on a sheet as it is, five times as large."""
    with Image.open(sheet) as page, Image.open(image) as picture:
        pixels, drawing = np.asarray(page.convert("RGB")), np.asarray(picture)
    places = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 0], (160, 160))[::2, ::2][:, :, ::5, ::5]
    return bool((places == drawing[:, :, 0]).all(axis=(2, 3)).any())


def test_a_sheet_shows_the_images(cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path) -> None:
    bare = cli("infer", *drawings[:4], "--model", trained.onnx, "--json", "--top-k", 2)
    ran = cli("infer", *drawings[:4], "--model", trained.onnx, "--json", "--top-k", 2, "--annotate", "new/out.png")
    assert ran.status == 0
    assert ran.out == bare.out
    assert ran.err == f"{bare.err}wrote new/out.png\n"
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "out.png"]
    assert [shows(tmp_path / "new" / "out.png", drawing) for drawing in drawings] == [True] * 4 + [False]


def test_a_sheet_of_a_folder(cli: Cli, trained: Trained, folder: Path) -> None:
    """One image is broken, and more are there than are drawn; the sheet is no image of its own folder."""
    for broken in ("001.png", "140.png"):
        (folder / broken).write_bytes(b"no picture")
    out = folder / "out.jpg"
    ran = cli("infer", folder, "--model", trained.onnx, "--jsonl", "--annotate", out)
    assert ran.status == 1
    assert len(ran.out.splitlines()) == 150
    assert ran.err.splitlines()[-1] == f"wrote {out}"
    with Image.open(out) as page:
        assert page.format == "JPEG"
        assert page.width > 8 * 160
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    again = cli("infer", folder, "--model", trained.onnx, "--annotate", out)
    assert again.status == 2
    assert "would overwrite one of the images" in again.error
    assert again.out == ""


def test_a_sheet_where_nothing_could_be_answered(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    ran = cli("infer", "absent.png", "--model", trained.onnx, "--annotate", "out.webp")
    assert ran.status == 2
    assert "No such file" in ran.error
    with Image.open(tmp_path / "out.webp") as page:
        assert page.format == "WEBP"


@pytest.mark.parametrize("others", [0, 1])
def test_a_sheet_shows_standard_input(trained: Trained, drawings: list[Path], tmp_path: Path, others: int) -> None:
    command = [sys.executable, "-m", "cifarx", "infer", "-", *map(str, drawings[2 : 2 + others])]
    command += ["--model", str(trained.onnx), "--annotate", "out.png"]
    ran = subprocess.run(command, input=drawings[1].read_bytes(), capture_output=True, check=True, cwd=tmp_path)
    assert ran.stdout.startswith(b"-: ")
    assert shows(tmp_path / "out.png", drawings[1])
    assert shows(tmp_path / "out.png", drawings[2]) == bool(others)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_sheet_shows_what_comes_through_a_pipe(
    cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path
) -> None:
    """As from a shell's `<(command)`: a second reading would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit((tmp_path / "pipe").write_bytes, drawings[1].read_bytes())
        ran = cli("infer", "pipe", drawings[0], "--model", trained.onnx, "--annotate", "out.png")
        assert written.result(timeout=20)
    assert ran.status == 0
    assert shows(tmp_path / "out.png", drawings[1])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("out.gif", "give a name that ends in .png"),
        ("out", "give a name that ends in .png"),
        ("0.png/out.png", "cannot write 0.png"),
        ("folder.png", "cannot write folder.png"),
        ("0.png", "would overwrite one of the images"),
        ("./folder.png/../0.png", "would overwrite one of the images"),
    ],
)
def test_a_sheet_that_cannot_be_written(
    cli: Cli, drawings: list[Path], tmp_path: Path, target: str, words: str
) -> None:
    """Told before the model is looked for: there is none."""
    (tmp_path / "folder.png").mkdir()
    before = set(tmp_path.rglob("*")), drawings[0].read_bytes()
    ran = cli("infer", *drawings, "absent.png", "--annotate", target)
    assert ran.status == 2
    assert words in ran.error
    assert ran.out == ""
    assert (set(tmp_path.rglob("*")), drawings[0].read_bytes()) == before


def test_without_a_sheet_nothing_is_drawn(trained: Trained, drawings: list[Path]) -> None:
    code = (
        "import sys; from cifarx.main import main\n"
        f"sys.argv = ['cifarx', 'infer', {str(drawings[0])!r}, '--model', {str(trained.onnx)!r}]\n"
        "try: main()\n"
        "except SystemExit as ended: status = ended.code\n"
        "drawing = {'cifarx.output.contact_sheet', 'PIL.ImageDraw', 'PIL.ImageFont'} & set(sys.modules)\n"
        "sys.exit(str(drawing) if drawing else status)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
