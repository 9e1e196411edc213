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
    """One that can be told from the others."""
    return Checkpoint(SPEC, {"weight": torch.full((50,), float(number))}, {"number": number})


def number_in(path: Path) -> int:
    return int(load_checkpoint(path).training["number"])


def saved(folder: CheckpointDirectory, epoch: int, *, is_best: bool = False, at: int | None = None) -> Path:
    """Save an epoch, as if so many seconds after the first."""
    path = folder.save(epoch, checkpoint(epoch), is_best=is_best)
    os.utime(path, (1_000_000 + (epoch if at is None else at),) * 2)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found(folder: CheckpointDirectory) -> tuple[str, int]:
    newest = folder.newest()
    assert newest is not None
    return newest[0].name, int(newest[1].training["number"])


def test_files_are_named_by_model_and_epoch(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    assert [saved(folder, epoch, is_best=True) for epoch in (0, 1, 10)] == [
        tmp_path / name for name in ("net_0.pth", "net_1.pth", "net_10.pth")
    ]
    assert names(tmp_path) == ["net_0.pth", "net_1.pth", "net_10.pth"]
    assert [number_in(folder.path(epoch)) for epoch in (0, 1, 10)] == [0, 1, 10]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, {0}, ["net_4.pth", "net_best.pth"]),
        (2, {0, 2}, ["net_3.pth", "net_4.pth", "net_best.pth"]),
        (3, {0, 4}, ["net_2.pth", "net_3.pth", "net_4.pth", "net_best.pth"]),
        (9, {0}, ["net_0.pth", "net_1.pth", "net_2.pth", "net_3.pth", "net_4.pth", "net_best.pth"]),
    ],
)
def test_the_newest_and_the_best_are_kept(keep: int, best: set[int], left: list[str], tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", keep)
    for epoch in range(5):
        saved(folder, epoch, is_best=epoch in best)
    assert names(tmp_path) == left
    assert number_in(folder.best) == max(best)
    assert number_in(folder.path(4)) == 4


def test_epochs_are_counted_as_numbers(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", 2)
    for epoch in (8, 9, 10):
        saved(folder, epoch)
    assert names(tmp_path) == ["net_10.pth", "net_9.pth"]


def test_the_best_is_kept_also_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    folder = CheckpointDirectory(tmp_path, "net", 1)
    for epoch in range(3):
        saved(folder, epoch, is_best=epoch < 2)
    assert names(tmp_path) == ["net_2.pth", "net_best.pth"]
    assert number_in(folder.best) == 1


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    others = ["other_0.pth", "net_best_0.pth", "net_00.pth", "net_x.pth", "net_-1.pth", "net_0.pth.bak", "anet_0.pth"]
    for name in others:
        (tmp_path / name).write_text("another's")
    folder = CheckpointDirectory(tmp_path, "net", 1)
    for epoch in range(3):
        saved(folder, epoch)
    assert names(tmp_path) == sorted([*others, "net_2.pth"])
    assert found(folder) == ("net_2.pth", 2)


def test_names_that_are_patterns_are_names(tmp_path: Path) -> None:
    dotted = CheckpointDirectory(tmp_path, "n.t", 1)
    saved(CheckpointDirectory(tmp_path, "net"), 0)
    saved(dotted, 1)
    assert names(tmp_path) == ["n.t_1.pth", "net_0.pth"]


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    """The folder may hold the later epochs of an older run."""
    saved(CheckpointDirectory(tmp_path, "net"), 9)
    folder = CheckpointDirectory(tmp_path, "net", 1)
    path = saved(folder, 0, at=99)
    assert path.exists()
    assert number_in(path) == 0


# --- stopped within an epoch


def test_the_interrupted_one_goes_with_the_next_epoch(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    saved(folder, 0)
    assert folder.save_interrupted(checkpoint(77)) == tmp_path / "net_interrupted.pth"
    assert names(tmp_path) == ["net_0.pth", "net_interrupted.pth"]
    assert found(folder) == ("net_interrupted.pth", 77)
    saved(folder, 1)
    assert names(tmp_path) == ["net_0.pth", "net_1.pth"]


def test_nothing_is_removed_where_the_next_cannot_be_written(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", 1)
    saved(folder, 0, is_best=True)
    folder.save_interrupted(checkpoint(77))
    folder.path(1).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        folder.save(1, checkpoint(1), is_best=True)
    assert names(tmp_path) == ["net_0.pth", "net_1.pth", "net_best.pth", "net_interrupted.pth"]
    assert number_in(folder.best) == 0


# --- where a run goes on


def test_an_empty_or_absent_folder_has_none(tmp_path: Path) -> None:
    assert CheckpointDirectory(tmp_path, "net").newest() is None
    assert CheckpointDirectory(tmp_path / "absent", "net").newest() is None
    saved(CheckpointDirectory(tmp_path, "other"), 0)
    assert CheckpointDirectory(tmp_path, "net").newest() is None


@pytest.mark.parametrize(("order", "newest"), [([0, 1, 2], 2), ([2, 1, 0], 0), ([9, 10, 3], 3)])
def test_time_decides_which_is_the_newest(order: list[int], newest: int, tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    for at, epoch in enumerate(order):
        saved(folder, epoch, at=at)
    assert found(folder) == (f"net_{newest}.pth", newest)


def test_an_old_interrupted_one_is_not_the_newest(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    saved(folder, 0)
    path = folder.save_interrupted(checkpoint(77))
    os.utime(path, (5, 5))
    assert found(folder) == ("net_0.pth", 0)


def test_the_best_file_alone_is_found(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net", 1)
    path = saved(folder, 3, is_best=True)
    path.unlink()
    assert found(folder) == ("net_best.pth", 3)


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
def test_a_damaged_one_is_told_and_passed_over(how: str, tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    for epoch in (1, 2, 3):
        saved(folder, epoch)
    damage(folder.path(3), how)
    with pytest.warns(FallbackWarning, match=r"passing over a damaged checkpoint: .*net_3\.pth"):
        assert found(folder) == ("net_2.pth", 2)
    assert folder.path(3).exists()


def test_all_damaged_is_none(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    for epoch in (1, 2):
        damage(saved(folder, epoch), "truncated")
    with pytest.warns(FallbackWarning) as told:
        assert folder.newest() is None
    assert len(told) == 2


def test_good_ones_are_not_warned_of(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    saved(folder, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(folder) == ("net_0.pth", 0)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = CheckpointDirectory(tmp_path, "net")
    saved(folder, 0)
    (tmp_path / ".abc123.partial.pth").write_bytes(b"half a checkpoint")
    (tmp_path / ".abc123.partial.onnx").write_bytes(b"of another writer")
    assert found(folder) == ("net_0.pth", 0)
    assert names(tmp_path) == [".abc123.partial.onnx", "net_0.pth"]
