import os
import warnings
from pathlib import Path

import pytest
import torch

from cifarx_serve.errors import FallbackWarning, OutputError
from cifarx_serve.spec import InputSpec, ModelSpec
from cifarx_train.checkpoints.checkpoint import Checkpoint, load_checkpoint
from cifarx_train.checkpoints.directory import CheckpointDirectory

SPEC = ModelSpec(model="net", class_names=("cat", "dog"), input=InputSpec(height=4, width=4))


def checkpoint(number: int) -> Checkpoint:
    """A checkpoint that can be distinguished from others by its number."""
    return Checkpoint(SPEC, {"weight": torch.full((50,), float(number))}, {"number": number})


def number_in(path: Path) -> int:
    return int(load_checkpoint(path).training["number"])


def save(folder: CheckpointDirectory, epoch: int, *, is_best: bool = False, at: int | None = None) -> Path:
    """Save a checkpoint and set its modification time to `at` seconds, by default the number of the epoch."""
    path = folder.save(epoch, checkpoint(epoch), is_best=is_best)
    os.utime(path, (1_000_000 + (epoch if at is None else at),) * 2)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def latest(folder: CheckpointDirectory) -> tuple[str, int]:
    found = folder.latest()
    assert found is not None
    return found[0].name, int(found[1].training["number"])


def test_files_are_named_by_model_and_epoch(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    assert [save(folder, epoch, is_best=True) for epoch in (0, 1, 10)] == [
        tmp_path / name for name in ("net_0.pth", "net_1.pth", "net_10.pth")
    ]
    assert names(tmp_path) == ["net_0.pth", "net_1.pth", "net_10.pth"]
    assert [number_in(folder.epoch_path(epoch)) for epoch in (0, 1, 10)] == [0, 1, 10]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, {0}, ["net_4.pth", "net_best.pth"]),
        (2, {0, 2}, ["net_3.pth", "net_4.pth", "net_best.pth"]),
        (3, {0, 4}, ["net_2.pth", "net_3.pth", "net_4.pth", "net_best.pth"]),
        (9, {0}, ["net_0.pth", "net_1.pth", "net_2.pth", "net_3.pth", "net_4.pth", "net_best.pth"]),
    ],
)
def test_the_latest_and_the_best_are_kept(keep: int, best: set[int], left: list[str], tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", keep)
    for epoch in range(5):
        save(folder, epoch, is_best=epoch in best)
    assert names(tmp_path) == left
    assert number_in(folder.best_path) == max(best)
    assert number_in(folder.epoch_path(4)) == 4


def test_epochs_are_compared_as_numbers(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", 2)
    for epoch in (8, 9, 10):
        save(folder, epoch)
    assert names(tmp_path) == ["net_10.pth", "net_9.pth"]


def test_the_best_is_copied_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    folder = CheckpointDirectory(tmp_path, "net", 1)
    for epoch in range(3):
        save(folder, epoch, is_best=epoch < 2)
    assert names(tmp_path) == ["net_2.pth", "net_best.pth"]
    assert number_in(folder.best_path) == 1


@pytest.mark.parametrize("links", [True, False])
def test_an_update_is_not_the_latest_and_also_changes_the_best(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    folder = CheckpointDirectory(tmp_path, "net", 2)
    for epoch in range(3):
        save(folder, epoch, is_best=epoch == 1)
    folder.update(folder.epoch_path(1), checkpoint(7))
    assert number_in(folder.epoch_path(1)) == number_in(folder.best_path) == 7
    assert latest(folder) == ("net_2.pth", 2)
    folder.update(folder.epoch_path(2), checkpoint(8))
    assert (number_in(folder.epoch_path(2)), number_in(folder.best_path)) == (8, 7)
    folder.update(folder.best_path, checkpoint(9))
    assert number_in(folder.best_path) == 9


def test_other_files_are_left_unchanged(tmp_path: Path) -> None:
    others = ["other_0.pth", "net_best_0.pth", "net_00.pth", "net_x.pth", "net_-1.pth", "net_0.pth.bak", "anet_0.pth"]
    for name in others:
        (tmp_path / name).write_text("another's")
    folder = CheckpointDirectory(tmp_path, "net", 1)
    for epoch in range(3):
        save(folder, epoch)
    assert names(tmp_path) == sorted([*others, "net_2.pth"])
    assert latest(folder) == ("net_2.pth", 2)


def test_model_names_are_not_patterns(tmp_path: Path) -> None:
    dotted = CheckpointDirectory(tmp_path, "n.t", 1)
    save(CheckpointDirectory(tmp_path, "net"), 0)
    save(dotted, 1)
    assert names(tmp_path) == ["n.t_1.pth", "net_0.pth"]


def test_a_new_checkpoint_is_never_removed(tmp_path: Path) -> None:
    """The directory may contain later epochs of an older run."""
    save(CheckpointDirectory(tmp_path, "net"), 9)
    folder = CheckpointDirectory(tmp_path, "net", 1)
    path = save(folder, 0, at=99)
    assert path.exists()
    assert number_in(path) == 0


# --- runs stopped within an epoch


def test_the_interrupted_checkpoint_is_removed_with_the_next_epoch(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    save(folder, 0)
    assert folder.save_interrupted(checkpoint(77)) == tmp_path / "net_interrupted.pth"
    assert names(tmp_path) == ["net_0.pth", "net_interrupted.pth"]
    assert latest(folder) == ("net_interrupted.pth", 77)
    save(folder, 1)
    assert names(tmp_path) == ["net_0.pth", "net_1.pth"]


def test_nothing_is_removed_if_the_next_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", 1)
    save(folder, 0, is_best=True)
    folder.save_interrupted(checkpoint(77))
    folder.epoch_path(1).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        folder.save(1, checkpoint(1), is_best=True)
    assert names(tmp_path) == ["net_0.pth", "net_1.pth", "net_best.pth", "net_interrupted.pth"]
    assert number_in(folder.best_path) == 0


# --- the latest checkpoint


def test_an_empty_or_missing_directory_has_no_latest_checkpoint(tmp_path: Path) -> None:
    assert CheckpointDirectory(tmp_path, "net").latest() is None
    assert CheckpointDirectory(tmp_path / "absent", "net").latest() is None
    save(CheckpointDirectory(tmp_path, "other"), 0)
    assert CheckpointDirectory(tmp_path, "net").latest() is None


@pytest.mark.parametrize(("order", "expected"), [([0, 1, 2], 2), ([2, 1, 0], 0), ([9, 10, 3], 3)])
def test_the_latest_is_determined_by_time(order: list[int], expected: int, tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    for at, epoch in enumerate(order):
        save(folder, epoch, at=at)
    assert latest(folder) == (f"net_{expected}.pth", expected)


def test_an_old_interrupted_checkpoint_is_not_the_latest(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    save(folder, 0)
    path = folder.save_interrupted(checkpoint(77))
    os.utime(path, (5, 5))
    assert latest(folder) == ("net_0.pth", 0)


def test_the_best_checkpoint_alone_is_found(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", 1)
    path = save(folder, 3, is_best=True)
    path.unlink()
    assert latest(folder) == ("net_best.pth", 3)


def damage(path: Path, how: str) -> None:
    content, times = path.read_bytes(), path.stat()
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "emptied":
        content = b""
    else:
        place = content.index(torch.full((50,), float(number_in(path))).numpy().tobytes()) + 3
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("how", ["truncated", "emptied", "a flipped bit"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(how: str, tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    for epoch in (1, 2, 3):
        save(folder, epoch)
    damage(folder.epoch_path(3), how)
    with pytest.warns(FallbackWarning, match=r"skipping a damaged checkpoint: .*net_3\.pth"):
        assert latest(folder) == ("net_2.pth", 2)
    assert folder.epoch_path(3).exists()


def test_only_damaged_checkpoints_return_none(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    for epoch in (1, 2):
        damage(save(folder, epoch), "truncated")
    with pytest.warns(FallbackWarning) as warned:
        assert folder.latest() is None
    assert len(warned) == 2


def test_readable_checkpoints_issue_no_warning(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    save(folder, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest(folder) == ("net_0.pth", 0)


def test_partial_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    save(folder, 0)
    (tmp_path / ".abc123.partial.pth").write_bytes(b"half a checkpoint")
    (tmp_path / ".abc123.partial.onnx").write_bytes(b"of another writer")
    assert latest(folder) == ("net_0.pth", 0)
    assert names(tmp_path) == [".abc123.partial.onnx", "net_0.pth"]
