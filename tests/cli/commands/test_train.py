import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cifarx_train.callbacks.base import Callback
from cifarx_train.recipes import NETWORK_RECIPES, RECIPES, Recipe, recipe
from tests.support.command_line import Cli
from tests.support.drawn_images import draw_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three easy classes: 20 training and 10 test images of one colour each, with noise; not to be written to."""
    return draw_folder(tmp_path_factory.mktemp("drawn") / "data", width=40, height=24)


@pytest.fixture
def command(folder: Path) -> tuple[object, ...]:
    """Two short epochs of Lzh, into the folder `run`."""
    return ("train", "--model", "lzh", "--data", folder, "--epochs", 2, "--batch-size", 16, "--out", "run")


def test_writes_one_checkpoint_an_epoch(cli: Cli, command: tuple[object, ...], tmp_path: Path) -> None:
    ran = cli(*command, "--json")
    assert ran.status == 0, ran.err
    assert list(ran.json) == ["checkpoints", "test_accuracy", "images_per_s", "epochs", "device"]
    assert ran.json["checkpoints"] == ["run/lzh_0.pth", "run/lzh_1.pth"]
    assert all((tmp_path / name).is_file() for name in ran.json["checkpoints"])
    assert ran.json["epochs"] == 2
    assert 0 <= ran.json["test_accuracy"] <= 1
    assert ran.json["images_per_s"] > 0
    assert ran.json["device"].partition(":")[0] in ("cpu", "cuda", "mps")
    assert list((tmp_path / "run" / "logs").glob("events.*"))
    assert cli("inspect", "run/lzh_1.pth", "--json").json["class_names"] == ["blue", "green", "red"]


def test_tells_the_truth_about_the_data(cli: Cli, folder: Path) -> None:
    ran = cli("train", "--model", "lzh", "--data", folder, "--epochs", 1)
    assert "60 training and 30 test images" in ran.err
    assert "cifarx export --ckpt lzh_0.pth" in ran.err
    assert ran.out.startswith("lzh_0.pth: ")
    assert "test accuracy on data, 1 epochs on " in ran.out
    assert ran.out.rstrip().endswith("MiB at most")


def test_learns(cli: Cli, folder: Path) -> None:
    command = ("train", "--model", "lzh", "--data", folder, "--epochs", 15, "--batch-size", 8, "--lr", 0.05, "--json")
    assert cli(*command).json["test_accuracy"] == 1.0


# --- the recipe


def recorded(cli: Cli, path: str) -> dict[str, Any]:
    values: dict[str, Any] = cli("inspect", path, "--json").json["training"]["recipe"]
    return values


def test_every_option_of_the_recipe_is_used_and_recorded(cli: Cli, folder: Path) -> None:
    options = ("--epochs", 1, "--batch-size", 20, "--lr", 0.02, "--precision", "bf16", "--max-minutes", 9)
    sets = ("--patience", 3, "--set", "momentum=0.9", "--set", "nesterov=true", "--set", "schedule=cosine")
    ran = cli("train", "--model", "lzh", "--data", folder, *options, *sets)
    assert ran.status == 0, ran.err
    assert recorded(cli, "lzh_0.pth") == {
        **recorded_values("notes"),
        "epochs": 1,
        "batch_size": 20,
        "learning_rate": 0.02,
        "precision": "bf16",
        "max_minutes": 9.0,
        "patience": 3,
        "momentum": 0.9,
        "nesterov": True,
        "schedule": "cosine",
    }


def recorded_values(name: str) -> dict[str, Any]:
    chosen = RECIPES[name]
    return {field: getattr(chosen, field) for field in Recipe.__struct_fields__}


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", "3", 3),
        ("batch_size", "7", 7),
        ("learning_rate", "0.5", 0.5),
        ("precision", "bf16", "bf16"),
        ("compile", "true", True),
        ("max_minutes", "2", 2.0),
        ("patience", "4", 4),
        ("crop", "3", 3),
    ],
)
def test_set_takes_any_field_also_those_with_an_option_of_their_own(
    cli: Cli, field: str, text: str, value: object
) -> None:
    assert cli("train", "--dry-run", "--json", "--set", f"{field}={text}").json[field] == value


def test_an_option_comes_before_set(cli: Cli) -> None:
    assert cli("train", "--dry-run", "--json", "--set", "epochs=3", "--epochs", 4).json["epochs"] == 4


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_dry_run_prints_the_recipe_as_a_file_that_can_be_given(cli: Cli, name: str, tmp_path: Path) -> None:
    ran = cli("train", "--recipe", name, "--dry-run", "--set", "ema=0.99")
    assert (ran.status, ran.err) == (0, "")
    assert tomllib.loads(ran.out)["ema"] == 0.99
    (tmp_path / "mine.toml").write_text(ran.out)
    assert recipe("mine.toml") == recipe(name, overrides={"ema": 0.99})
    assert cli("train", "--recipe", "mine.toml", "--dry-run").out == ran.out
    assert not list(tmp_path.glob("*.pth"))


def test_a_dry_run_knows_the_network(cli: Cli) -> None:
    own = NETWORK_RECIPES["fast", "fastnet"]
    ran = cli("train", "--recipe", "fast", "--model", "fastnet", "--dry-run", "--json")
    assert ran.json == {field: getattr(own, field) for field in Recipe.__struct_fields__}


def test_a_dry_run_imports_no_pytorch() -> None:
    code = (
        "import sys; from cifarx.app import app\n"
        "app(['train', '--recipe', 'fast', '--dry-run'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert 'name = "fast"' in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "momentum"], "--set momentum sets nothing"),
        (["--set", "momentum="], "--set momentum= sets nothing"),
        (["--set", "=0.9"], "--set =0.9 sets nothing"),
        (["--set", "momentm=0.9"], "did you mean 'momentum'"),
        (["--set", "momentum=much"], "momentum"),
        (["--set", "momentum=1"], "momentum"),
        (["--set", "nesterov=true"], "nesterov needs a momentum"),
        (["--set", "optimizer=adam"], "adam"),
        (["--set", "optimizer=muon"], "muon needs bias_lr"),
        (["--recipe", "mine.toml"], "mine.toml cannot be read"),
        (["--recipe", "note"], "did you mean 'notes'"),
        (["--precision", "fp8"], "fp8"),
        (["--max-minutes", "0"], "max_minutes"),
        (["--patience", "0"], "patience"),
        (["--epochs", "0"], "epochs"),
        (["--lr", "-1"], "learning_rate"),
        (["--lr", "nan"], "learning_rate"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_settings_that_make_no_sense(cli: Cli, arguments: list[str], words: str, dry: bool, tmp_path: Path) -> None:
    dry_run = ["--dry-run"] if dry else []
    ran = cli("train", "--model", "lzh", "--data", "nowhere", *arguments, *dry_run, "--out", "run")
    assert ran.status == 2
    assert words in ran.error
    assert ran.out == ""
    assert not list(tmp_path.iterdir())


def test_without_a_network_there_is_nothing_to_train(cli: Cli) -> None:
    ran = cli("train")
    assert ran.status == 2
    assert "--model" in ran.error


# --- the network


def test_image_size_and_small_stem(cli: Cli, folder: Path) -> None:
    options = ("--image-size", 16, "--stem", "small", "--epochs", 1, "--batch-size", 60)
    ran = cli("train", "--model", "resnet18", "--data", folder, *options, "--json")
    assert ran.status == 0, ran.err
    spec = cli("inspect", "resnet18_0.pth", "--json").json
    assert (spec["model"], spec["stem"]) == ("resnet18", "small")
    assert (spec["input"]["height"], spec["input"]["width"]) == (16, 16)
    assert "small stem" in cli("inspect", "resnet18_0.pth").out


# --- stopped, and gone on with


def test_a_run_whose_time_is_over_is_saved_and_judged(cli: Cli, command: tuple[object, ...], tmp_path: Path) -> None:
    ran = cli(*command, "--max-minutes", 0.000001)
    assert ran.status == 0, ran.err
    assert "stopped early: the time is over" in ran.err
    assert ran.out.startswith("run/lzh_interrupted.pth: ")
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["lzh_interrupted.pth"]
    training = cli("inspect", "run/lzh_interrupted.pth", "--json").json["training"]
    assert training["epochs"] == 0
    assert f"{training['test_accuracy']:.2%} test accuracy" in ran.out
    again = cli(*command, "--max-minutes", 100, "--resume", "auto", "--json")
    assert again.json["checkpoints"] == ["run/lzh_0.pth", "run/lzh_1.pth"]
    assert again.json["epochs"] == 2


def test_patience_ends_a_run(cli: Cli, command: tuple[object, ...]) -> None:
    ran = cli(*command, "--epochs", 9, "--lr", 1e-12, "--patience", 1)
    assert ran.status == 0, ran.err
    assert "stopped early: no better accuracy" in ran.err
    assert ran.out.startswith("run/lzh_1.pth: ")


def test_an_interrupted_run_says_that_it_was_not_tested(
    cli: Cli, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(Callback):
        def on_step(self, step: int) -> None:
            if step == 2:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("cifarx.output.training.training_progress", Stopping)
    ran = cli(*command)
    assert ran.status == 128 + signal.SIGTERM
    assert "interrupted at step 2 of 8, saved in run/lzh_interrupted.pth" in ran.error
    assert "--resume auto" in ran.error
    assert ran.out == ""
    training = cli("inspect", "run/lzh_interrupted.pth", "--json").json["training"]
    assert training["test_accuracy"] is None
    assert training["test_loss"] is None
    assert "accuracy not tested after 0 epochs" in cli("inspect", "run/lzh_interrupted.pth").out


def test_keep_leaves_the_newest_and_the_best(cli: Cli, command: tuple[object, ...], tmp_path: Path) -> None:
    ran = cli(*command, "--keep", 1, "--json")
    assert ran.json["checkpoints"] == ["run/lzh_1.pth"]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["lzh_1.pth", "lzh_best.pth"]


def test_a_better_epoch_than_the_last_is_named(
    cli: Cli, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifarx_train.evaluation import Evaluator

    judge, accuracies = Evaluator.evaluate, iter((0.75, 0.25))
    monkeypatch.setattr(Evaluator, "evaluate", lambda *given: judge(*given)._replace(accuracy=next(accuracies)))
    ran = cli(*command)
    assert ran.out.startswith("run/lzh_1.pth: 25.00% test accuracy")
    assert "the best was run/lzh_0.pth with 75.00%" in ran.err


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two epochs; not to be written to."""
    from cifarx_train.train import train

    out = tmp_path_factory.mktemp("finished") / "run"
    train("lzh", data=str(folder), out=out, epochs=2, batch_size=16)
    return out


def test_resume_with_nothing_there_is_a_new_run(cli: Cli, command: tuple[object, ...]) -> None:
    ran = cli(*command, "--resume", "auto", "--json")
    assert ran.status == 0, ran.err
    assert "note: nothing to resume in run: a new run" in ran.err
    assert ran.json["epochs"] == 2


def test_resume_of_a_finished_run_trains_nothing(
    cli: Cli, command: tuple[object, ...], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "lzh_1.pth").read_bytes()
    ran = cli(*command, "--resume", "auto", "--json")
    assert ran.status == 0, ran.err
    assert list(ran.json) == ["checkpoints", "test_accuracy", "images_per_s", "epochs", "device"]
    assert ran.json["checkpoints"] == ["run/lzh_1.pth"]
    assert (ran.json["epochs"], ran.json["images_per_s"]) == (2, None)
    assert (tmp_path / "run" / "lzh_1.pth").read_bytes() == before
    assert cli(*command, "--resume", "auto").out.startswith("run/lzh_1.pth: ")


def test_resume_goes_on_where_it_was(cli: Cli, command: tuple[object, ...], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "lzh_1.pth").unlink()
    ran = cli(*command, "--resume", "run/lzh_0.pth")
    assert ran.status == 0, ran.err
    assert "8 steps, 4 of them done" in ran.err
    assert ran.out.startswith("run/lzh_1.pth: ")


@pytest.mark.parametrize(
    ("arguments", "both"),
    [
        (["--seed", "7"], ("seed 0", "not 7")),
        (["--model", "fastnet"], ("lzh", "not fastnet")),
        (["--lr", "0.5"], ("0.01", "0.5")),
        (["--set", "momentum=0.5"], ("momentum 0.0", "0.5")),
        (["--image-size", "40"], ("32x32", "40x40")),
        (["--data", "other"], ("was trained with training data ", ", not ")),
    ],
)
def test_resume_of_another_run_is_an_error_that_names_both(
    cli: Cli, command: tuple[object, ...], finished: Path, tmp_path: Path, arguments: list[str], both: tuple[str, str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    if "--data" in arguments:
        draw_folder(tmp_path / "other", train=3, test=2, seed=9)
    ran = cli(*command, *arguments, "--resume", "run/lzh_0.pth")
    assert ran.status == 2
    assert all(word in ran.error for word in both), ran.error
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["lzh_0.pth", "lzh_1.pth"]


# --- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lhz"], "did you mean 'lzh'"),
        (["--model", "lzh", "--device", "cuda:x"], "unknown device"),
        (["--model", "lzh", "--data", "nowhere"], "no such data set"),
        (["--model", "lzh", "--data", "empty"], "class folders"),
        (["--model", "lzh", "--epochs", "many"], "many"),
        (["--model", "lzh", "--keep", "0"], "--keep 0 keeps nothing"),
        (["--model", "lzh", "--image-size", "0"], "--image-size 0 is no size"),
        (["--model", "lzh", "--stem", "small"], "lzh has no small stem"),
        (["--model", "lzh", "--stem", "large"], "large"),
        (["--model", "lzh", "--resume", "absent.pth"], "absent.pth"),
    ],
)
def test_wrong_choices_leave_nothing(cli: Cli, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "empty").mkdir()
    ran = cli("train", *arguments, "--out", "run")
    assert ran.status == 2
    assert words in ran.error
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_divergence_is_a_failed_check_that_names_the_last_good_checkpoint(cli: Cli, folder: Path) -> None:
    command = ("train", "--model", "lzh", "--data", folder, "--epochs", 50, "--batch-size", 60)
    ran = cli(*command, "--lr", 10)
    assert ran.status == 1
    assert "training diverged" in ran.error
    assert re.search(r"; lzh_\d+\.pth is the last good checkpoint", ran.error)


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
