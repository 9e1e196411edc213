"""A user's network, from `model.py` and a file of weights to a served ONNX file, as the documentation says."""

import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

import cifarx
from cifarx_train.models.user_code import load_user_object
from tests.support.command_line import run_program
from tests.support.documentation import ROOT, Page
from tests.support.hugging_face import write_vit
from tests.support.image_datasets import write_image_folder
from tests.support.predictions import require_predictions
from tests.support.server_process import PROGRAM, run_server
from tests.support.user_code import write_networks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRANSFORM = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
CLASSES = ("blue", "green", "red")


def fit(network: nn.Module, folder: Path) -> nn.Module:
    """Train as a user does, without cifarx, and return the network in eval mode."""
    images, labels = read_split(folder, "train")
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = list(ImageFolder(str(folder / split), TRANSFORM))
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def documented_commands() -> list[list[str]]:
    """Return the commands of the first block of the first page of the documentation."""
    block = Page(ROOT / "docs" / "index.md").blocks_in("console")[0]
    return [shlex.split(line.removeprefix("$ ")) for line in block.text.splitlines() if line.startswith("$ ")]


@pytest.fixture
def author(tmp_path: Path) -> nn.Module:
    """Write `model.py`, `cifar_net.pth`, `photos/` and `dog.jpg`, and return the user's network."""
    torch.manual_seed(0)
    write_networks(tmp_path)
    folder = write_image_folder(tmp_path / "photos", train=40, test=340)
    network = fit(load_user_object("model.py:Net")(3), folder)
    torch.save(network.state_dict(), "cifar_net.pth")
    Image.new("RGB", (32, 32), (20, 230, 20)).save("dog.jpg", quality=100, subsampling=0)
    return network


def test_three_commands(author: nn.Module, tmp_path: Path) -> None:
    export, infer, serve = documented_commands()
    assert [command[:2] for command in (export, infer, serve)] == [
        ["cifarx", "export"],
        ["cifarx", "infer"],
        ["cifarx", "serve"],
    ]
    exported = run_program(PROGRAM, *export[1:], timeout_s=900)
    assert exported.status == 0, exported.err
    assert "3 classes (blue, green, red): from --data photos/" in exported.err
    preprocessing = "preprocessing RGB 32x32, stretch, bilinear, mean 0.5, std 0.5"
    assert f"{preprocessing}: from --image-size, --mean, --std" in exported.err
    assert run_program(PROGRAM, *infer[1:]).out.startswith("dog.jpg: green ")

    images, labels = read_split(tmp_path / "photos", "test")
    with torch.no_grad():
        expected = author(images).argmax(1)
    assert (expected == labels).float().mean() > 0.9
    files = [path for path, _ in ImageFolder("photos/test").samples]
    with cifarx.load("cifar_net.onnx") as predictor:
        assert [prediction.index for prediction in require_predictions(predictor.predict(files))] == expected.tolist()
    with run_server(tmp_path / "log", *serve[2:], "--workers", 1) as server:
        answer = server.request("POST", "/v1/predict", Path("dog.jpg").read_bytes(), content_type="image/jpeg")
        assert answer.status == 200
        assert answer.json["predictions"][0]["label"] == "green"


def test_training_and_exporting_the_users_network(tmp_path: Path) -> None:
    write_networks(tmp_path)
    write_image_folder(tmp_path / "photos", train=40, test=340)
    trained = run_program(
        PROGRAM, "train", "--model", "model.py:small", "--model-arg", "width=8", "--data", "photos", "--epochs", 3,
        "--image-size", "24x40", "--color", "L", "--recipe", "fast", "--batch-size", 20, timeout_s=900,
    )  # fmt: skip
    assert trained.status == 2
    assert "model.py:small does not run with 1x24x40 images" in trained.error
    arguments = ["--model", "model.py:Mnist", "--data", "photos"]
    refused = run_program(PROGRAM, "train", *arguments, timeout_s=900)
    assert refused.error.startswith("error: model.py:Mnist has 10 outputs, not 3: ")
    command = ["train", "--model", "model.py:small", "--data", "photos", "--epochs", 2, "--image-size", "24x40"]
    done = run_program(PROGRAM, *command, timeout_s=900)
    assert done.status == 0, done.err
    assert "next: cifarx export --ckpt small_1.pth --model model.py:small --format onnx" in done.err
    unnamed = run_program(PROGRAM, "export", "--ckpt", "small_1.pth", "--format", "onnx", timeout_s=900)
    assert unnamed.error.endswith("a checkpoint never decides which code runs: state it with --model model.py:small")
    exported = run_program(
        PROGRAM, "export", "--ckpt", "small_1.pth", "--model", "model.py:small", "--format", "onnx", "--data", "photos",
        timeout_s=900,
    )  # fmt: skip
    assert exported.status == 0, exported.err
    spec = cifarx.read_spec("small_1.onnx")
    assert (spec.input.height, spec.input.width, spec.assumed) == (24, 40, ())


def test_a_directory_of_hugging_face_needs_no_option(tmp_path: Path) -> None:
    write_vit(tmp_path / "small-vit")
    exported = run_program(
        PROGRAM, "export", "--model", "hf/small-vit", "--format", "onnx", "--data", "builtin", timeout_s=900
    )
    assert exported.status == 0, exported.err
    spec = cifarx.read_spec("small-vit.onnx")
    assert (spec.class_names, spec.assumed) == (("cat", "dog", "fox"), ())


@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel], ids=["plain", "parallel"])
def test_a_module_in_memory(author: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
    module: Any = wrap(author)
    lines: list[str] = []
    results = cifarx.export(
        module.train(),
        "folder/net.onnx",
        class_names=CLASSES,
        preprocessing=cifarx.Preprocessing.from_transforms(TRANSFORM, image_size=32),
        data="photos",
        progress=lines.append,
    )
    (result,) = results
    assert result.report.summary.passed
    assert str(result.path) == "folder/net.onnx"
    assert result.report.summary.accuracy is not None
    assert module.training
    assert "3 classes (blue, green, red): from class_names" in lines
    page = results._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert "net.onnx" in page
    images, _ = read_split(Path("photos"), "test")
    with cifarx.load("folder/net.onnx") as predictor, torch.no_grad():
        found = predictor.run(images[:64].numpy())
        assert np.abs(found - author.eval()(images[:64]).numpy()).max() < 1e-4


def test_a_module_is_described_by_the_user(author: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(author.state_dict(), buffer)
    with pytest.raises(cifarx.CifarxError, match="Net has 3 outputs, not 2"):
        cifarx.export(author, "net.onnx", class_names=["a", "b"], data="photos")
    with pytest.raises(cifarx.CifarxError, match=r"net.mlmodel has no suffix of a format"):
        cifarx.export(author, "net.mlmodel", data="photos")
    with pytest.raises(cifarx.CifarxError, match="out=elsewhere were given together"):
        cifarx.export(author, "net.onnx", out="elsewhere", data="photos")
    assert not Path("net.onnx").exists()
