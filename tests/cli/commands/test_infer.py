import csv
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from cifarx_serve.predictor import load
from cifarx_serve.spec import ModelSpec
from cifarx_train.data.synthetic.dataset import CLASS_NAMES, draw_split
from tests.support.command_line import Cli
from tests.support.spec_model import BGR, GRAYSCALE, RGB, make_spec, write_model
from tests.support.trained_model import Trained


@pytest.fixture
def drawings(tmp_path: Path) -> list[Path]:
    """Write the first five test drawings as PNG files."""
    images, _ = draw_split("test")
    paths = [tmp_path / f"{position}.png" for position in range(5)]
    for image, path in zip(images, paths, strict=False):
        Image.fromarray(image).save(path)
    return paths


def test_the_fields_of_the_json_document(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    result = cli("infer", *drawings, "--model", trained.onnx, "--json", "--top-k", 3)
    assert result.status == 0
    assert [entry["image"] for entry in result.json] == list(map(str, drawings))
    for entry in result.json:
        assert list(entry) == ["image", "label", "index", "score", "top", "model", "backend", "provider"]
        assert [list(candidate) for candidate in entry["top"]] == [["label", "index", "score"]] * 3
        assert entry["label"] == CLASS_NAMES[entry["index"]] == entry["top"][0]["label"]
        assert entry["backend"] == "onnxruntime"
        assert entry["model"] == str(trained.onnx)


def test_every_backend_has_the_same_predictions(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    predictions = [
        [
            (entry["index"], round(entry["score"], 5))
            for entry in cli("infer", *drawings, "--model", model, "--json").json
        ]
        for model in (trained.onnx, trained.torchscript, trained.checkpoint)
    ]
    assert predictions[0] == predictions[1] == predictions[2]


def test_text_has_one_line_per_image(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    result = cli("infer", *drawings, "--model", trained.onnx)
    lines = result.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(map(str, drawings))
    assert all(line.split()[1] in CLASS_NAMES for line in lines)


def test_describes_the_model_on_standard_error(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    err = cli("infer", drawings[0], "--model", trained.onnx).err
    accuracy = f"{cli('inspect', trained.onnx, '--json').json['training']['test_accuracy']:.2%}"
    assert err.startswith(f"note: {trained.onnx} (lzh, trained on ")
    assert "built-in" in err or "builtin" in err
    assert err.endswith(f", test accuracy {accuracy}) with onnxruntime on CPUExecutionProvider\n")


def test_by_default_uses_the_newest_file_that_the_backend_can_run(
    cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path
) -> None:
    shutil.copy(trained.onnx, tmp_path / "old.onnx")
    shutil.copy(trained.onnx, tmp_path / "new.onnx")
    shutil.copy(trained.checkpoint, tmp_path / "newest.pth")
    newest = (tmp_path / "old.onnx").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "new.onnx", ns=(newest, newest))
    result = cli("infer", drawings[0], "--backend", "onnxruntime", "--json")
    assert result.json[0]["model"] == "new.onnx"
    assert "new.onnx" in result.err
    assert cli("infer", drawings[0], "--backend", "pytorch", "--json").json[0]["model"] == "newest.pth"


def test_a_missing_model_is_a_usage_error(cli: Cli, drawings: list[Path]) -> None:
    result = cli("infer", drawings[0], "--backend", "onnxruntime")
    assert result.status == 2
    assert "--model" in result.error
    assert ".onnx" in result.error


def test_unreadable_images_do_not_stop_the_others(
    cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(drawings[0].read_bytes()[:200])
    result = cli("infer", drawings[0], torn, "absent.png", drawings[1], "--model", trained.onnx, "--json")
    assert result.status == 1
    assert [("label" in entry, "error" in entry) for entry in result.json] == [
        (True, False),
        (False, True),
        (False, True),
        (True, False),
    ]
    assert list(result.json[1]) == ["image", "error"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"some text", "not an image"), (b"", "not an image"), (None, "No such file")],
    ids=["text", "empty", "absent"],
)
def test_a_file_that_is_not_an_image(
    cli: Cli, trained: Trained, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    result = cli("infer", path, "--model", trained.onnx)
    assert result.status == 2
    assert words in result.error
    assert result.err.count("\n") == 1
    assert result.out == ""


def test_a_truncated_photo(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:5000])
    result = cli("infer", tmp_path / "torn.jpg", "--model", trained.onnx)
    assert result.status == 2
    assert "truncated" in result.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "onnxrt"], "did you mean 'onnxruntime'"),
        (["--device", "tpu"], "cuda:N"),
        (["--device", "gpu"], "use --device cuda"),
        (["--top-k", "11"], "10 classes"),
        (["--top-k", "0"], "10 classes"),
        (["--backend", "pytorch"], "does not open"),
    ],
)
def test_invalid_options_are_usage_errors(
    cli: Cli, trained: Trained, drawings: list[Path], arguments: list[str], words: str
) -> None:
    result = cli("infer", drawings[0], "--model", trained.onnx, *arguments)
    assert result.status == 2
    assert words in result.error
    assert result.out == ""


def test_unavailable_cuda_is_an_error(cli: Cli, trained: Trained, drawings: list[Path]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is available")
    for model in (trained.onnx, trained.torchscript, trained.checkpoint):
        result = cli("infer", drawings[0], "--model", model, "--device", "cuda")
        assert result.status == 2
        assert "--device cpu" in result.error
        assert result.out == ""


def test_files_that_are_not_models(cli: Cli, drawings: list[Path], tmp_path: Path) -> None:
    for name in ("x.onnx", "x.torchscript.pt", "x.pth"):
        (tmp_path / name).write_bytes(b"not a model")
        result = cli("infer", drawings[0], "--model", tmp_path / name)
        assert result.status == 2
        assert name in result.error


def test_an_onnx_model_does_not_import_pytorch(trained: Trained, drawings: list[Path]) -> None:
    code = (
        "import sys; from cifarx.main import main\n"
        f"sys.argv = ['cifarx', 'infer', {str(drawings[0])!r}, '--model', {str(trained.onnx)!r},"
        " '--backend', 'onnxruntime']\n"
        "try: main()\n"
        "except SystemExit as exit: status = exit.code\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'tensorboard', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(drawings[0]))


def test_every_backend_agrees_on_a_photograph(cli: Cli, trained: Trained, dog: Path) -> None:
    """Every backend predicts the same class for a photograph of 1546x1213 pixels."""
    classes = {
        cli("infer", dog, "--model", model, "--json").json[0]["index"]
        for model in (trained.onnx, trained.torchscript, trained.checkpoint)
    }
    assert len(classes) == 1


# --- many images and other output formats


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write 150 drawings, one of them unreadable, and a text file."""
    path = tmp_path / "many"
    path.mkdir()
    images, _ = draw_split("test")
    for position in range(150):
        Image.fromarray(images[position]).save(path / f"{position:03}.png")
    (path / "077.png").write_bytes(b"not an image")
    (path / "readme.txt").touch()
    return path


def test_the_images_of_a_folder_keep_their_order(cli: Cli, trained: Trained, folder: Path) -> None:
    result = cli("infer", folder, "--model", trained.onnx, "--jsonl", "--top-k", 2)
    assert result.status == 1
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == [f"{position:03}.png" for position in range(150)]
    assert [position for position, row in enumerate(rows) if "error" in row] == [77]
    single = cli("infer", folder / "140.png", "--model", trained.onnx, "--json", "--top-k", 2).json[0]
    assert rows[140]["index"] == single["index"]
    assert rows[140]["score"] == pytest.approx(single["score"], abs=1e-5)
    document = cli("infer", folder, "--model", trained.onnx, "--json", "--top-k", 2)
    assert document.json == rows


def test_the_paths_in_a_list_are_classified_after_the_named_images(
    cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path
) -> None:
    """A list may name files whose names are not UTF-8 or have spaces, and what is no image."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 [1].png")
    shutil.copy(drawings[1], odd)
    listed = [odd, "https://example.org/dog.jpg", str(tmp_path), "-", *map(str, drawings)] * 40
    (tmp_path / "list.txt").write_bytes(b"\n".join(map(os.fsencode, listed)))
    result = cli("infer", drawings[0], "--from", tmp_path / "list.txt", "--model", trained.onnx, "--json")
    assert result.status == 1
    names = [str(drawings[0]), *("./-" if name == "-" else name for name in listed)]  # not standard input
    entries = result.json
    assert [entry["image"] for entry in entries] == [name.replace("\udce9", "\ufffd") for name in names]
    found = dict(zip(names, entries, strict=True))
    assert found[odd]["label"] == found[str(drawings[1])]["label"]
    assert "cifarx does not download: save it to a file first" in found["https://example.org/dog.jpg"]["error"]
    assert "is a folder: give an image file" in found[str(tmp_path)]["error"]


def test_a_list_from_standard_input(trained: Trained, drawings: list[Path]) -> None:
    command = [sys.executable, "-m", "cifarx", "infer", "--from", "-", "-0", "--jsonl", "--model", str(trained.onnx)]
    names = "\0".join(map(str, drawings))
    result = subprocess.run(command, input=names, capture_output=True, text=True, check=True)
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == list(map(str, drawings))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no image was given: name image files, or a list of them with --from FILE"),
        (["--from", "empty.txt"], "no paths in empty.txt: list one path per line"),
        (["--from", "absent.txt"], "cannot read the list absent.txt (No such file or directory)"),
        (["--from", "-", "-"], "standard input was named twice"),
        (["-0", "x.png"], "--null was given without --from"),
        (["--from", "listed.txt", "--annotate", "0.png"], "--annotate 0.png would overwrite one of the images"),
        (["https://example.org/a.png?size=1"], "a.png?size=1 is a URL, and cifarx does not download: save it"),
    ],
)
def test_lists_and_names_that_cannot_be_used(
    cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path, arguments: list[str], problem: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "listed.txt").write_text(f"{drawings[1]}\n{drawings[0]}\n")
    result = cli("infer", "--model", trained.onnx, *arguments)
    assert result.status == 2
    assert problem in result.error


def test_a_list_that_is_named_as_an_image(cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{drawings[0]}\n")
    result = cli("infer", "--model", trained.onnx, "list.txt")
    assert result.status == 2
    assert "note: if list.txt is a list of paths, give it with --from" in result.err


def test_csv_has_one_row_per_image(cli: Cli, trained: Trained, folder: Path) -> None:
    result = cli("infer", str(folder / "07*.png"), "--model", trained.onnx, "--csv", "--top-k", 2)
    assert result.status == 1
    rows = list(csv.DictReader(io.StringIO(result.out)))
    header = ["image", "label", "index", "score", "label_2", "index_2", "score_2", "error"]
    assert list(rows[0]) == header
    assert len(rows) == 10
    for row in rows:
        if row["image"].endswith("077.png"):
            assert "not an image" in row["error"]
            assert {row[name] for name in header[1:-1]} == {""}
        else:
            assert row["label"] == CLASS_NAMES[int(row["index"])]
            assert float(row["score"]) >= float(row["score_2"])
            assert not row["error"]


def test_reads_an_image_from_standard_input(trained: Trained, drawings: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifarx", "infer", "-", str(drawings[1]), "--model", str(trained.onnx), "--json"]
    result = subprocess.run(command, input=drawings[1].read_bytes(), capture_output=True, check=True, cwd=tmp_path)
    first, second = json.loads(result.stdout)
    assert first["image"] == "-"
    assert {**first, "image": ""} == {**second, "image": ""}


def test_text_has_no_line_for_unreadable_images(cli: Cli, trained: Trained, folder: Path) -> None:
    result = cli("infer", folder, "--model", trained.onnx)
    assert len(result.out.splitlines()) == 149
    assert "077.png is not an image" in result.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.png", "--csv", "--jsonl"], "--jsonl and --csv were given together: choose one of them"),
        (["*.gif"], "no file matches"),
        ([".", "--csv"], "no images in"),
    ],
)
def test_invalid_formats_and_patterns_are_usage_errors(
    cli: Cli, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path / "none")
    result = cli("infer", *arguments, "--model", trained.onnx)
    assert result.status == 2
    assert words in result.error
    assert result.out == ""


# --- the contact sheet


def shows(sheet: Path, image: Path) -> bool:
    """Return whether a sheet shows a drawing, enlarged five times."""
    with Image.open(sheet) as page, Image.open(image) as opened:
        pixels, drawing = np.asarray(page.convert("RGB")), np.asarray(opened)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 0], (160, 160))[::2, ::2][:, :, ::5, ::5]
    return bool((windows == drawing[:, :, 0]).all(axis=(2, 3)).any())


def test_a_sheet_shows_the_images(cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path) -> None:
    bare = cli("infer", *drawings[:4], "--model", trained.onnx, "--json", "--top-k", 2)
    result = cli("infer", *drawings[:4], "--model", trained.onnx, "--json", "--top-k", 2, "--annotate", "new/out.png")
    assert result.status == 0
    assert result.out == bare.out
    assert result.err == f"{bare.err}wrote new/out.png\n"
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "out.png"]
    assert [shows(tmp_path / "new" / "out.png", drawing) for drawing in drawings] == [True] * 4 + [False]


def test_a_sheet_of_a_folder(cli: Cli, trained: Trained, folder: Path) -> None:
    """Some images are unreadable, and there are more than are drawn. The sheet does not overwrite an image."""
    for unreadable in ("001.png", "140.png"):
        (folder / unreadable).write_bytes(b"not an image")
    out = folder / "out.jpg"
    result = cli("infer", folder, "--model", trained.onnx, "--jsonl", "--annotate", out)
    assert result.status == 1
    assert len(result.out.splitlines()) == 150
    assert result.err.splitlines()[-1] == f"wrote {out}"
    with Image.open(out) as page:
        assert page.format == "JPEG"
        assert page.width > 8 * 160
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    again = cli("infer", folder, "--model", trained.onnx, "--annotate", out)
    assert again.status == 2
    assert "would overwrite one of the images" in again.error
    assert again.out == ""


def test_a_sheet_without_any_readable_image(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    result = cli("infer", "absent.png", "--model", trained.onnx, "--annotate", "out.webp")
    assert result.status == 2
    assert "No such file" in result.error
    with Image.open(tmp_path / "out.webp") as page:
        assert page.format == "WEBP"


@pytest.mark.parametrize("others", [0, 1])
def test_a_sheet_shows_standard_input(trained: Trained, drawings: list[Path], tmp_path: Path, others: int) -> None:
    command = [sys.executable, "-m", "cifarx", "infer", "-", *map(str, drawings[2 : 2 + others])]
    command += ["--model", str(trained.onnx), "--annotate", "out.png"]
    result = subprocess.run(command, input=drawings[1].read_bytes(), capture_output=True, check=True, cwd=tmp_path)
    assert result.stdout.startswith(b"-: ")
    assert shows(tmp_path / "out.png", drawings[1])
    assert shows(tmp_path / "out.png", drawings[2]) == bool(others)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_sheet_shows_an_image_from_a_named_pipe(
    cli: Cli, trained: Trained, drawings: list[Path], tmp_path: Path
) -> None:
    """A pipe, such as the shell's `<(command)`, can be read only once."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit((tmp_path / "pipe").write_bytes, drawings[1].read_bytes())
        result = cli("infer", "pipe", drawings[0], "--model", trained.onnx, "--annotate", "out.png")
        assert written.result(timeout=20)
    assert result.status == 0
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
    """The error comes before the model is opened, which does not exist."""
    (tmp_path / "folder.png").mkdir()
    before = set(tmp_path.rglob("*")), drawings[0].read_bytes()
    result = cli("infer", *drawings, "absent.png", "--annotate", target)
    assert result.status == 2
    assert words in result.error
    assert result.out == ""
    assert (set(tmp_path.rglob("*")), drawings[0].read_bytes()) == before


def test_without_a_sheet_no_drawing_code_is_imported(trained: Trained, drawings: list[Path]) -> None:
    code = (
        "import sys; from cifarx.main import main\n"
        f"sys.argv = ['cifarx', 'infer', {str(drawings[0])!r}, '--model', {str(trained.onnx)!r}]\n"
        "try: main()\n"
        "except SystemExit as exit: status = exit.code\n"
        "drawing = {'cifarx.output.contact_sheet', 'PIL.ImageDraw', 'PIL.ImageFont'} & set(sys.modules)\n"
        "sys.exit(str(drawing) if drawing else status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(GRAYSCALE),
        make_spec(msgspec.structs.replace(BGR, layout="NHWC", resize="letterbox", fill=114)),
        make_spec(RGB, output="probabilities"),
        make_spec(class_names=("no", "yes"), activation="sigmoid", outputs=1),
    ],
    ids=["grayscale", "BGR, NHWC, letterbox", "probabilities", "one output"],
)
def test_models_of_every_kind(cli: Cli, tmp_path: Path, spec: ModelSpec) -> None:
    path = write_model(tmp_path / "means.onnx", spec)
    images = [tmp_path / f"{color}.png" for color in ("red", "lime", "blue")]
    for image in images:
        Image.new("RGB", (9, 5), image.stem).save(image)
    result = cli("infer", *images, "--model", path, "--json", "--top-k", 2)
    assert result.status == 0
    with load(path, device="cpu") as predictor:
        expected = [msgspec.to_builtins(prediction) for prediction in predictor.predict(images, top_k=2)]
    for entry, prediction in zip(result.json, expected, strict=True):
        assert {name: entry[name] for name in ("label", "index", "score")} == {
            name: prediction[name] for name in ("label", "index", "score")
        }
        assert "labels" not in entry


def test_several_labels_apply(cli: Cli, tmp_path: Path) -> None:
    path = write_model(tmp_path / "means.onnx", make_spec(activation="sigmoid"))
    Image.new("RGB", (9, 5), "red").save("red.png")
    result = cli("infer", "red.png", "--model", path, "--top-k", 3, "--annotate", "sheet.png")
    assert result.out == "red.png: red 1.0000, green 0.5000 | blue 0.0000\n"
    assert [entry["label"] for entry in cli("infer", "red.png", "--model", path, "--json").json[0]["labels"]] == [
        "red",
        "green",
    ]


def test_what_was_assumed_is_noted(cli: Cli, tmp_path: Path) -> None:
    path = write_model(tmp_path / "means.onnx", make_spec(assumed=("class_names", "preprocessing")))
    Image.new("RGB", (9, 5), "red").save("red.png")
    assert "note: ASSUMED class names, preprocessing: " in cli("infer", "red.png", "--model", path).err
    assert "ASSUMED" not in cli("infer", "red.png", "--model", write_model(path, make_spec())).err
