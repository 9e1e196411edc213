"""Recipes with the field names of earlier versions: in checkpoints, in TOML files and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.recipes import RENAMED_FIELDS
from tests.support.checkpoint_assertions import assert_same_checkpoint
from tests.support.command_line import Cli
from tests.support.image_datasets import write_image_folder
from tests.support.trained_model import Trained

OLD_NAMES = {new: old for old, new in RENAMED_FIELDS.items()}
NOTES = ["note: recipe field 'clip_norm' is now 'max_grad_norm'", "note: recipe field 'ema' is now 'ema_decay'"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset. Tests must not write to it."""
    return write_image_folder(tmp_path_factory.mktemp("old_recipe_fields") / "colors")


def rewrite_with_old_names(path: Path) -> dict[str, Any]:
    """Rename the recipe fields in a checkpoint as an earlier version wrote them, and return the old recipe."""
    content = torch.load(path, weights_only=True)
    spec = json.loads(content["spec"])
    recipe: dict[str, Any] = {OLD_NAMES.get(field, field): value for field, value in spec["training"]["recipe"].items()}
    spec["training"]["recipe"] = recipe
    torch.save({**content, "spec": json.dumps(spec)}, path)
    return recipe


def recorded_recipe(path: Path) -> dict[str, Any]:
    """Return the recipe as it is written in a checkpoint."""
    recipe: dict[str, Any] = json.loads(torch.load(path, weights_only=True)["spec"])["training"]["recipe"]
    return recipe


def test_an_old_checkpoint_loads_and_resumes(cli: Cli, data: Path, tmp_path: Path) -> None:
    command = ("train", "--model", "lzh", "--data", data, "--recipe", "fast", "--set", "ema_decay=0.9", "--epochs", 2)
    assert cli(*command, "--batch-size", 16, "--out", "whole").status == 0
    old = tmp_path / "old" / "lzh_0.pth"
    old.parent.mkdir()
    old.write_bytes((tmp_path / "whole" / "lzh_0.pth").read_bytes())
    recipe = rewrite_with_old_names(old)
    assert set(RENAMED_FIELDS) <= set(recipe)
    assert (recipe["ema"], recipe["warm_up"], recipe["clip_norm"], recipe["normalise"]) == (0.9, 0.2, 1.0, True)

    assert load_checkpoint(old).spec == load_checkpoint(tmp_path / "whole" / "lzh_0.pth").spec
    resumed = cli("train", "--model", "lzh", "--data", data, "--out", "old", "--resume", "auto")
    assert resumed.status == 0, resumed.err
    assert "is now" not in resumed.err
    new = tmp_path / "old" / "lzh_1.pth"
    assert_same_checkpoint(load_checkpoint(new), load_checkpoint(tmp_path / "whole" / "lzh_1.pth"))
    assert not set(RENAMED_FIELDS) & set(recorded_recipe(new))


@pytest.mark.slow
def test_an_old_checkpoint_exports(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    old = tmp_path / "lzh_0.pth"
    old.write_bytes(trained.checkpoint.read_bytes())
    rewrite_with_old_names(old)
    assert "ema" in recorded_recipe(old)
    exported = cli("export", "--ckpt", old, "--format", "onnx", "--data", "builtin")
    assert exported.status == 0, exported.err
    recipe = cli("inspect", "lzh_0.onnx", "--json").json["training"]["recipe"]
    assert recipe == cli("inspect", trained.onnx, "--json").json["training"]["recipe"]
    assert not set(RENAMED_FIELDS) & set(recipe)


def test_an_old_checkpoint_resumes_with_old_names_on_the_command_line(cli: Cli, data: Path, tmp_path: Path) -> None:
    options = ("train", "--model", "lzh", "--data", data, "--out", "run", "--batch-size", 16)
    assert cli(*options, "--epochs", 1, "--set", "ema_decay=0.9").status == 0
    rewrite_with_old_names(tmp_path / "run" / "lzh_0.pth")
    resumed = cli(*options, "--epochs", 2, "--set", "ema=0.9", "--resume", "auto")
    assert resumed.status == 0, resumed.err
    assert NOTES[1] in resumed.err.splitlines()
    other = cli(*options, "--epochs", 2, "--set", "ema=0.8", "--resume", "run/lzh_0.pth")
    assert "run/lzh_0.pth was trained with ema_decay 0.9, not 0.8: " in other.error


def test_set_accepts_old_names_with_a_note(cli: Cli) -> None:
    result = cli("train", "--dry-run", "--json", "--set", "ema=0.9", "--set", "clip_norm=2")
    assert result.status == 0
    assert sorted(result.err.splitlines()) == NOTES
    assert (result.json["ema_decay"], result.json["max_grad_norm"]) == (0.9, 2.0)


def test_a_toml_file_accepts_old_names_with_a_note(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "fast"\nema = 0.9\nclip_norm = 2.0\n')
    result = cli("train", "--dry-run", "--json", "--recipe", "mine.toml")
    assert result.status == 0
    assert sorted(result.err.splitlines()) == NOTES
    assert (result.json["ema_decay"], result.json["max_grad_norm"]) == (0.9, 2.0)


def test_a_field_given_by_both_names_is_an_error(cli: Cli) -> None:
    result = cli("train", "--dry-run", "--set", "ema=0.9", "--set", "ema_decay=0.8")
    assert result.status == 2
    assert result.error == ("error: recipe field 'ema_decay' is given twice, once by its old name 'ema': remove 'ema'")


def test_baseline_is_another_name_of_the_notes_recipe(cli: Cli, data: Path, tmp_path: Path) -> None:
    options = ("train", "--model", "lzh", "--data", data, "--batch-size", 16)
    assert cli(*options, "--epochs", 2, "--out", "notes").status == 0
    assert cli(*options, "--epochs", 1, "--recipe", "baseline", "--out", "baseline").status == 0
    assert recorded_recipe(tmp_path / "baseline" / "lzh_0.pth")["name"] == "notes"
    for name in ("notes", "baseline"):
        resumed = cli(*options, "--epochs", 2, "--recipe", name, "--out", "baseline", "--resume", "baseline/lzh_0.pth")
        assert resumed.status == 0, resumed.err
        expected, found = (load_checkpoint(tmp_path / run / "lzh_1.pth") for run in ("notes", "baseline"))
        assert_same_checkpoint(found, expected)
    assert cli("train", "--recipe", "baseline", "--dry-run", "--json").json["name"] == "notes"
