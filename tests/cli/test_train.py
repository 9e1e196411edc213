from pathlib import Path

import numpy as np
import pytest
from command_line import Cli
from PIL import Image

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three easy classes: 20 training and 10 test images of one colour each, with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for name, colour in COLOURS.items():
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(0, 56, (24, 40, 3))
                Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(place / f"{number}.png")
    return tmp_path / "data"


def test_writes_one_checkpoint_an_epoch(cli: Cli, folder: Path, tmp_path: Path) -> None:
    ran = cli("train", "--model", "lzh", "--data", folder, "--epochs", 2, "--batch-size", 16, "--out", "run", "--json")
    assert ran.status == 0, ran.err
    assert list(ran.json) == ["checkpoints", "test_accuracy", "images_per_s", "epochs", "device"]
    assert ran.json["checkpoints"] == ["run/lzh_0.pth", "run/lzh_1.pth"]
    assert all((tmp_path / name).is_file() for name in ran.json["checkpoints"])
    assert ran.json["epochs"] == 2
    assert list((tmp_path / "run" / "logs").glob("events.*"))
    assert cli("inspect", "run/lzh_1.pth", "--json").json["class_names"] == ["blue", "green", "red"]


def test_tells_the_truth_about_the_data(cli: Cli, folder: Path) -> None:
    err = cli("train", "--model", "lzh", "--data", folder, "--epochs", 1).err
    assert "60 training and 30 test images" in err
    assert "cifarx export --ckpt lzh_0.pth" in err


def test_learns(cli: Cli, folder: Path) -> None:
    command = ("train", "--model", "lzh", "--data", folder, "--epochs", 15, "--batch-size", 8, "--lr", 0.05, "--json")
    assert cli(*command).json["test_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lhz"], "did you mean 'lzh'"),
        (["--model", "lzh", "--recipe", "note"], "did you mean 'notes'"),
        (["--model", "lzh", "--epochs", "0"], "epochs"),
        (["--model", "lzh", "--lr", "-1"], "learning_rate"),
        (["--model", "lzh", "--device", "cuda:x"], "unknown device"),
        (["--model", "lzh", "--data", "nowhere"], "no such data set"),
        (["--model", "lzh", "--data", "empty"], "class folders"),
        (["--model", "lzh", "--epochs", "many"], "many"),
    ],
)
def test_wrong_choices_leave_nothing(cli: Cli, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "empty").mkdir()
    ran = cli("train", *arguments, "--out", "run")
    assert ran.status == 2
    assert words in ran.error
    assert not list(tmp_path.rglob("*.pth"))
    assert not list(tmp_path.rglob("events.*"))


def test_cuda_that_is_not_there_is_an_error(cli: Cli) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ran = cli("train", "--model", "lzh", "--data", "builtin", "--device", "cuda")
    assert ran.status == 2
    assert "cuda" in ran.error


def test_output_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = cli("train", "--model", "lzh", "--data", "builtin", "--out", tmp_path / "file" / "run")
    assert ran.status == 2
    assert "cannot write" in ran.error


def test_cifar10_without_a_network(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/")
    ran = cli("train", "--model", "lzh", "--data", "cifar10")
    assert ran.status == 2
    assert "--data builtin" in ran.error
    assert "--data DIR" in ran.error
    assert not (tmp_path / "cifar10").exists()
