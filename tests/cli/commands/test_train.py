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
from cifarx_train.recipes import MODEL_RECIPES, RECIPES, Recipe, load_recipe
from tests.support.command_line import Cli
from tests.support.image_datasets import write_image_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three easy classes of one color each, with noise: 20 training and 10 test images per class. Read-only."""
    return write_image_folder(tmp_path_factory.mktemp("drawn") / "data", width=40, height=24)


@pytest.fixture
def command(folder: Path) -> tuple[object, ...]:
    """Return the arguments that train Lzh for two short epochs in the directory `run`."""
    return ("train", "--model", "lzh", "--data", folder, "--epochs", 2, "--batch-size", 16, "--out", "run")


def test_writes_one_checkpoint_per_epoch(cli: Cli, command: tuple[object, ...], tmp_path: Path) -> None:
    result = cli(*command, "--json")
    assert result.status == 0, result.err
    assert list(result.json)[:5] == ["checkpoints", "test_accuracy", "images_per_s", "epochs", "device"]
    assert result.json["checkpoints"] == ["run/lzh_0.pth", "run/lzh_1.pth"]
    assert result.json["tested_checkpoint"] == "run/lzh_1.pth"
    low, high = result.json["test_accuracy_interval"]
    assert 0 <= low <= result.json["test_accuracy"] <= high <= 1
    classes = {each["name"]: each for each in result.json["classes"]}
    assert list(classes) == ["blue", "green", "red"]
    recalls = [each["recall"] for each in classes.values()]
    assert result.json["test_accuracy"] == pytest.approx(sum(recalls) / 3)  # classes of the same size
    assert result.json["macro_average"]["recall"] == pytest.approx(sum(recalls) / 3)
    assert classes[result.json["worst_class"]]["f1"] == min(each["f1"] for each in classes.values())
    assert (result.json["val_accuracy"], result.json["calibration"]) == (None, None)
    assert all((tmp_path / name).is_file() for name in result.json["checkpoints"])
    assert result.json["epochs"] == 2
    assert 0 <= result.json["test_accuracy"] <= 1
    assert result.json["images_per_s"] > 0
    assert result.json["device"].partition(":")[0] in ("cpu", "cuda", "mps")
    assert list((tmp_path / "run" / "logs").glob("events.*"))
    assert cli("inspect", "run/lzh_1.pth", "--json").json["class_names"] == ["blue", "green", "red"]


def test_prints_the_data_and_the_test_accuracy(cli: Cli, folder: Path) -> None:
    result = cli("train", "--model", "lzh", "--data", folder, "--epochs", 1)
    assert "60 training and 30 test images" in result.err
    assert "cifarx export --ckpt lzh_0.pth" in result.err
    assert re.fullmatch(
        r"lzh_0\.pth: \d+\.\d\d% test accuracy \(95% confidence: \d+\.\d\d% to \d+\.\d\d%\) on data after 1 epoch on "
        r"\S+, peak memory [\d,]+ MiB\n",
        result.out,
    )
    assert re.search(r"^macro average( +\d+\.\d%){3} +30$", result.err, re.MULTILINE)


def test_learns(cli: Cli, folder: Path) -> None:
    command = ("train", "--model", "lzh", "--data", folder, "--epochs", 15, "--batch-size", 8, "--lr", 0.05, "--json")
    assert cli(*command).json["test_accuracy"] == 1.0


# --- the recipe


def recorded(cli: Cli, path: str) -> dict[str, Any]:
    values: dict[str, Any] = cli("inspect", path, "--json").json["training"]["recipe"]
    return values


def test_every_recipe_option_is_used_and_recorded(cli: Cli, folder: Path) -> None:
    options = ("--epochs", 1, "--batch-size", 20, "--lr", 0.02, "--precision", "bf16", "--max-minutes", 9)
    sets = ("--patience", 3, "--set", "momentum=0.9", "--set", "nesterov=true", "--set", "schedule=cosine")
    result = cli("train", "--model", "lzh", "--data", folder, *options, *sets)
    assert result.status == 0, result.err
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
        "channels_last": False,
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
def test_set_takes_any_field_of_the_recipe(cli: Cli, field: str, text: str, value: object) -> None:
    assert cli("train", "--dry-run", "--json", "--set", f"{field}={text}").json[field] == value


def test_an_option_takes_precedence_over_set(cli: Cli) -> None:
    assert cli("train", "--dry-run", "--json", "--set", "epochs=3", "--epochs", 4).json["epochs"] == 4


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_dry_run_prints_a_recipe_file_that_can_be_used(cli: Cli, name: str, tmp_path: Path) -> None:
    result = cli("train", "--recipe", name, "--dry-run", "--set", "ema_decay=0.99")
    assert (result.status, result.err) == (0, "")
    assert tomllib.loads(result.out)["ema_decay"] == 0.99
    (tmp_path / "mine.toml").write_text(result.out)
    assert load_recipe("mine.toml") == load_recipe(name, overrides={"ema_decay": 0.99})
    assert cli("train", "--recipe", "mine.toml", "--dry-run").out == result.out
    assert not list(tmp_path.glob("*.pth"))


def test_a_dry_run_uses_the_recipe_of_the_model(cli: Cli) -> None:
    own = MODEL_RECIPES["fast", "fastnet"]
    result = cli("train", "--recipe", "fast", "--model", "fastnet", "--dry-run", "--json")
    assert result.json == {field: getattr(own, field) for field in Recipe.__struct_fields__}


def test_a_dry_run_does_not_import_pytorch() -> None:
    code = (
        "import sys; from cifarx.app import app\n"
        "app(['train', '--recipe', 'fast', '--dry-run'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 'name = "fast"' in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "momentum"], "--set momentum is not FIELD=VALUE: write it like --set momentum=0.9"),
        (["--set", "momentum="], "--set momentum= is not FIELD=VALUE"),
        (["--set", "=0.9"], "--set =0.9 is not FIELD=VALUE"),
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
def test_invalid_settings_are_usage_errors(
    cli: Cli, arguments: list[str], words: str, dry: bool, tmp_path: Path
) -> None:
    dry_run = ["--dry-run"] if dry else []
    result = cli("train", "--model", "lzh", "--data", "nowhere", *arguments, *dry_run, "--out", "run")
    assert result.status == 2
    assert words in result.error
    assert result.out == ""
    assert not list(tmp_path.iterdir())


def test_a_missing_model_is_a_usage_error(cli: Cli) -> None:
    result = cli("train")
    assert result.status == 2
    assert result.error == "error: --model is missing: give a model, such as --model lzh"


# --- the model


def test_image_size_and_small_stem(cli: Cli, folder: Path) -> None:
    options = ("--image-size", 16, "--stem", "small", "--epochs", 1, "--batch-size", 60)
    result = cli("train", "--model", "resnet18", "--data", folder, *options, "--json")
    assert result.status == 0, result.err
    spec = cli("inspect", "resnet18_0.pth", "--json").json
    assert (spec["model"], spec["stem"]) == ("resnet18", "small")
    assert (spec["input"]["height"], spec["input"]["width"]) == (16, 16)
    assert "small stem" in cli("inspect", "resnet18_0.pth").out


# --- choosing, weighting and calibrating


def test_a_run_with_a_val_split_is_weighted_and_calibrated(cli: Cli, tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "drawn", train=12, val=34)
    line = ("train", "--model", "lzh", "--data", data, "--epochs", 2, "--batch-size", 16, "--calibrate")
    weights = tmp_path / "weights.csv"
    weights.write_text("blue,1\ngreen,2\nred,3\n")
    result = cli(*line, "--class-weights", weights, "--sampler", "balanced")
    assert result.status == 0, result.err
    assert "36 training, 102 val and 30 test images" in result.err
    assert "val loss" in result.err
    name = result.out.partition(":")[0]
    assert re.search(
        rf"^note: the val accuracy of {name} is \d+\.\d\d%, the best epoch of the run$", result.err, re.MULTILINE
    )
    assert f"next: cifarx export --ckpt {name} --format onnx --data {data}\n" in result.err
    spec = cli("inspect", name, "--json").json
    assert f"{spec['training']['test_accuracy']:.2%} test accuracy" in result.out
    assert f"calibrated on 102 val images: temperature {spec['temperature']:.4g}, " in result.err
    assert spec["training"]["recipe"]["class_weights"] == {"blue": 1, "green": 2, "red": 3}
    assert spec["training"]["recipe"]["sampler"] == "balanced"
    other = {"lzh_0.pth": "lzh_1.pth", "lzh_1.pth": "lzh_0.pth"}[name]
    assert "accuracy not tested (val accuracy " in cli("inspect", other).out


def test_class_weights_of_other_classes_stop_a_run_before_it_starts(
    cli: Cli, command: tuple[object, ...], tmp_path: Path
) -> None:
    (tmp_path / "weights.json").write_text('{"blue": 1, "grean": 2, "red": 3}')
    result = cli(*command, "--class-weights", "weights.json")
    assert result.status == 2
    assert "error: class weights: 'grean' is no class of the data: " in result.error
    assert not (tmp_path / "run").exists()


# --- stopping and resuming


def test_a_run_that_reaches_its_time_limit_is_saved_and_evaluated(
    cli: Cli, command: tuple[object, ...], tmp_path: Path
) -> None:
    result = cli(*command, "--max-minutes", 0.000001)
    assert result.status == 0, result.err
    assert "note: stopped early: time limit reached (1e-06 min)\n" in result.err
    assert result.out.startswith("run/lzh_interrupted.pth: ")
    assert [path.name for path in (tmp_path / "run").glob("*.pth")] == ["lzh_interrupted.pth"]
    training = cli("inspect", "run/lzh_interrupted.pth", "--json").json["training"]
    assert training["epochs"] == 0
    assert f"{training['test_accuracy']:.2%} test accuracy" in result.out
    again = cli(*command, "--max-minutes", 100, "--resume", "auto", "--json")
    assert again.json["checkpoints"] == ["run/lzh_0.pth", "run/lzh_1.pth"]
    assert again.json["epochs"] == 2


def test_patience_ends_a_run(cli: Cli, command: tuple[object, ...]) -> None:
    result = cli(*command, "--epochs", 9, "--lr", 1e-12, "--patience", 1)
    assert result.status == 0, result.err
    assert "note: stopped early: test accuracy has not improved since epoch 1 (patience 1)\n" in result.err
    assert result.out.startswith("run/lzh_1.pth: ")


def test_an_interrupted_run_is_not_evaluated(
    cli: Cli, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(Callback):
        def on_step_end(self, step: int) -> None:
            if step == 2:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("cifarx.output.training.training_progress", Stopping)
    result = cli(*command)
    assert result.status == 128 + signal.SIGTERM
    assert result.error == (
        "error: interrupted at step 2 of 8, checkpoint saved to run/lzh_interrupted.pth: "
        "add --resume auto to the same command to continue"
    )
    assert result.out == ""
    training = cli("inspect", "run/lzh_interrupted.pth", "--json").json["training"]
    assert training["test_accuracy"] is None
    assert training["test_loss"] is None
    assert "accuracy not tested after 0 epochs" in cli("inspect", "run/lzh_interrupted.pth").out


def test_keep_retains_the_newest_and_the_best_checkpoint(cli: Cli, command: tuple[object, ...], tmp_path: Path) -> None:
    result = cli(*command, "--keep", 1, "--json")
    assert result.json["checkpoints"] == ["run/lzh_1.pth"]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["lzh_1.pth", "lzh_best.pth"]


def test_names_a_better_checkpoint_than_the_last(
    cli: Cli, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cifarx_train.evaluation import Evaluator

    evaluate, accuracies = Evaluator.evaluate, iter((0.75, 0.25))
    monkeypatch.setattr(Evaluator, "evaluate", lambda *args: evaluate(*args)._replace(accuracy=next(accuracies)))
    result = cli(*command)
    assert result.out.startswith("run/lzh_1.pth: 25.00% test accuracy")
    assert "note: the best checkpoint is run/lzh_0.pth with 75.00%\n" in result.err


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run of two epochs. Read-only."""
    from cifarx_train.train import train

    out = tmp_path_factory.mktemp("finished") / "run"
    train("lzh", data=str(folder), out=out, epochs=2, batch_size=16)
    return out


def test_resume_without_a_checkpoint_starts_a_new_run(cli: Cli, command: tuple[object, ...]) -> None:
    result = cli(*command, "--resume", "auto", "--json")
    assert result.status == 0, result.err
    assert "note: no checkpoint to resume from in run: starting a new run\n" in result.err
    assert result.json["epochs"] == 2


def test_resuming_a_finished_run_does_not_train(
    cli: Cli, command: tuple[object, ...], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "lzh_1.pth").read_bytes()
    result = cli(*command, "--resume", "auto", "--json")
    assert result.status == 0, result.err
    assert result.json["checkpoints"] == ["run/lzh_1.pth"]
    assert (result.json["epochs"], result.json["images_per_s"]) == (2, None)
    assert (tmp_path / "run" / "lzh_1.pth").read_bytes() == before
    assert cli(*command, "--resume", "auto").out.startswith("run/lzh_1.pth: ")


def test_resume_continues_after_the_checkpoint(
    cli: Cli, command: tuple[object, ...], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "lzh_1.pth").unlink()
    result = cli(*command, "--resume", "run/lzh_0.pth")
    assert result.status == 0, result.err
    assert "8 steps, resuming from run/lzh_0.pth at step 4\n" in result.err
    assert result.out.startswith("run/lzh_1.pth: ")


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
def test_resuming_a_different_run_is_an_error_that_names_both(
    cli: Cli, command: tuple[object, ...], finished: Path, tmp_path: Path, arguments: list[str], both: tuple[str, str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    if "--data" in arguments:
        write_image_folder(tmp_path / "other", train=3, test=2, seed=9)
    result = cli(*command, *arguments, "--resume", "run/lzh_0.pth")
    assert result.status == 2
    assert all(word in result.error for word in both), result.error
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pth")) == ["lzh_0.pth", "lzh_1.pth"]


# --- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lhz"], "did you mean 'lzh'"),
        (["--model", "lzh", "--device", "cuda:x"], "unknown device"),
        (["--model", "lzh", "--data", "nowhere"], "dataset nowhere does not exist"),
        (["--model", "lzh", "--data", "empty"], "class folders"),
        (["--model", "lzh", "--epochs", "many"], "many"),
        (["--model", "lzh", "--keep", "0"], "--keep 0 would keep no checkpoint"),
        (["--model", "lzh", "--image-size", "0"], "--image-size 0 is not a valid size"),
        (["--model", "lzh", "--stem", "small"], "lzh has no small stem"),
        (["--model", "lzh", "--stem", "large"], "large"),
        (["--model", "lzh", "--resume", "absent.pth"], "absent.pth"),
    ],
)
def test_invalid_options_write_nothing(cli: Cli, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "empty").mkdir()
    result = cli("train", *arguments, "--out", "run")
    assert result.status == 2
    assert words in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_divergence_is_a_failed_check_that_names_the_last_good_checkpoint(cli: Cli, folder: Path) -> None:
    command = ("train", "--model", "lzh", "--data", folder, "--epochs", 50, "--batch-size", 60)
    result = cli(*command, "--lr", 10)
    assert result.status == 1
    assert "training diverged" in result.error
    assert re.search(r"; lzh_\d+\.pth is the last good checkpoint", result.error)


def test_unavailable_cuda_is_an_error(cli: Cli) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is available")
    result = cli("train", "--model", "lzh", "--data", "builtin", "--device", "cuda")
    assert result.status == 2
    assert "cuda" in result.error


def test_an_unwritable_output_directory(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("train", "--model", "lzh", "--data", "builtin", "--out", tmp_path / "file" / "run")
    assert result.status == 2
    assert "cannot write" in result.error


def test_cifar10_without_a_network(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/")
    result = cli("train", "--model", "lzh", "--data", "cifar10")
    assert result.status == 2
    assert "--data builtin" in result.error
    assert "--data DIR" in result.error
    assert not (tmp_path / "cifar10").exists()
