"""Data sets as people have them: each gives the right classes and counts, or one line that says what to do."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifarx_serve.errors import CifarxError, FallbackWarning
from cifarx_serve.spec import InputSpec
from cifarx_train.data.dataset import Split
from cifarx_train.data.image_dataset import ImageFileDataset
from cifarx_train.data.selection import DataSource, select_dataset

SPEC = InputSpec(height=8, width=8)
COLORS = {"ant": (200, 40, 40), "bee": (40, 200, 40), "cat": (40, 40, 200)}
TRAIN, TEST = 4, 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))


def draw(folder: Path, count: int, color: str = "ant", start: int = 0, suffix: str = "png") -> None:
    """Write images of 8x8 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        Image.new("RGB", (8, 8), COLORS[color]).save(folder / f"{number:03d}.{suffix}")


def tree(
    root: Path, places: Iterable[str] = ("train", "test"), *, train: int = TRAIN, test: int = TEST, suffix: str = "png"
) -> Path:
    """Write a split folder for each place, with three class folders."""
    for place, count in zip(places, (train, test), strict=True):
        for name in COLORS:
            draw(root / place / name, count, name, suffix=suffix)
    return root


def load(path: Path, *, split: float | None = None) -> tuple[dict[Split, list[int]], tuple[str, ...]]:
    """Load every split. Return the number of images of each class in each split, and what was left out.

    Every image has the color of its class, so the labels are those of the images.
    """
    data = select_dataset(DataSource(str(path), split))
    assert isinstance(data, ImageFileDataset)
    assert data.class_names == tuple(COLORS)
    counts: dict[Split, list[int]] = {}
    for name in data.splits:
        loaded = data.load(name, SPEC)
        expected = np.array(list(COLORS.values()))[loaded.labels]
        assert np.abs(loaded.images[:, 4, 4].astype(int) - expected).max() <= 3
        counts[name] = np.bincount(loaded.labels, minlength=3).tolist()
    return counts, data.left_out


def load_with_note(path: Path, *, split: float | None = None) -> tuple[dict[Split, list[int]], str]:
    """Load a dataset of which something is left out, which one warning says."""
    with pytest.warns(FallbackWarning) as caught:
        counts, left_out = load(path, split=split)
    assert [str(warning.message) for warning in caught] == list(left_out)
    return counts, "\n".join(left_out)


def plain(train: int = TRAIN, test: int = TEST) -> dict[Split, list[int]]:
    return {"train": [train] * 3, "test": [test] * 3}


def pack_tar(folder: Path, suffix: str) -> Path:
    archive = folder.with_name(f"{folder.name}{suffix}")
    mode = {".tar": "w", ".tgz": "w:gz", ".tar.gz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}.get(suffix)
    if mode:
        with tarfile.open(archive, mode) as file:  # type: ignore[call-overload]
            file.add(folder, folder.name)
        return archive
    zstd = pytest.importorskip("backports.zstd")
    with zstd.open(archive, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as file:
        file.add(folder, folder.name)
    return archive


def pack_zip(folder: Path, archive: Path, *, top: bool) -> Path:
    """Pack a folder; links are stored as links, as `zip -y` does."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder.parent if top else folder))
            if path.is_symlink():
                info = zipfile.ZipInfo(name)
                info.create_system, info.external_attr = 3, 0o120777 << 16
                file.writestr(info, os.readlink(path))  # noqa: PTH115
            elif path.is_file():
                file.write(path, name)
    return archive


# --- hidden folders and subfolders of classes


def test_checkpoints_of_notebooks_are_no_class(tmp_path: Path) -> None:
    root = tree(tmp_path / "a")
    for place in ("train", "test"):
        draw(root / place / ".ipynb_checkpoints", 2)
    draw(root / "train" / "bee" / ".ipynb_checkpoints", 1)
    draw(root / "__MACOSX" / "train" / "ant", 3)
    counts, left_out = load_with_note(root)
    assert counts == plain()
    assert left_out == "left out 8 files of a: 8 hidden (__MACOSX)"


def test_class_folders_are_read_recursively(tmp_path: Path) -> None:
    root = tree(tmp_path / "b")
    draw(root / "train" / "ant" / "phone", 5, start=100)
    (root / "train" / "bee").rename(root / "train" / "moved")
    (root / "train" / "bee").mkdir()
    (root / "train" / "moved").rename(root / "train" / "bee" / "2024")
    for path in (root, pack_tar(root, ".tar")):
        counts, left_out = load(path)
        assert counts == {"train": [TRAIN + 5, TRAIN, TRAIN], "test": [TEST] * 3}
        assert left_out == ()


# --- splits


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "places", [("train", "test"), ("Train", "Test"), ("training", "validation"), ("TRAIN", "testing"), ("train", "Val")]
)
def test_names_of_splits(tmp_path: Path, places: tuple[str, str], top: bool, kind: str) -> None:
    root = tree(tmp_path / "set" / ("archive" if top else ""), places)
    path = tmp_path / "set" if kind == "folder" else pack_zip(root, tmp_path / "set.zip", top=top)
    counts, left_out = load(path)
    assert counts == plain()
    assert left_out == ()


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"])
def test_archives(tmp_path: Path, suffix: str) -> None:
    counts, left_out = load(pack_tar(tree(tmp_path / "set"), suffix))
    assert counts == plain()
    assert left_out == ()


def test_three_splits_are_kept_apart(tmp_path: Path) -> None:
    root = tree(tmp_path / "d")
    for name in COLORS:
        draw(root / "validation" / name, 3, name)
    counts, left_out = load(root)
    assert counts == {"train": [TRAIN] * 3, "val": [3] * 3, "test": [TEST] * 3}
    assert left_out == ()


@pytest.mark.parametrize("unlabeled", ["test/unknown", "test"])
def test_a_test_folder_without_labels_beside_a_validation_folder(tmp_path: Path, unlabeled: str) -> None:
    root = tree(tmp_path / "e", ("train", "val"))
    draw(root / unlabeled, 5, "bee")
    counts, left_out = load_with_note(root)
    assert counts == plain()
    assert left_out.startswith("left out 5 files of e: 5 ")
    assert "test" in left_out


@pytest.mark.parametrize("top", ["", "flowers"])
def test_one_folder_of_classes_is_split_on_demand(tmp_path: Path, top: str) -> None:
    for name in COLORS:
        draw(tmp_path / "f" / top / name, 20, name)
    with pytest.raises(
        CifarxError, match=r"f has 3 classes with images \(ant, bee, cat\), but no test images .*--split 0\.2"
    ):
        load(tmp_path / "f")
    counts, left_out = load(tmp_path / "f", split=0.2)
    assert left_out == ()
    assert counts == plain(16, 4)


def test_only_training_images_are_split_on_demand(tmp_path: Path) -> None:
    root = tree(tmp_path / "g")
    shutil.rmtree(root / "test")
    draw(root / "test", 5)  # those of a competition, without labels
    with pytest.warns(FallbackWarning, match="left out 5 files of g"):
        counts, _ = load(root, split=0.5)
    assert [sum(both) for both in zip(*counts.values(), strict=True)] == [TRAIN] * 3


@pytest.mark.parametrize("split", [0.0, 1.0, -0.5, 20.0])
def test_a_part_that_is_none(tmp_path: Path, split: float) -> None:
    with pytest.raises(CifarxError, match=r"--split .* give a number between 0 and 1"):
        load(tree(tmp_path / "set"), split=split)


def test_a_dataset_with_splits_is_not_split_again(tmp_path: Path) -> None:
    with pytest.raises(CifarxError, match=r"--split 0\.2 does not apply to .*set, which has test images: leave it out"):
        load(tree(tmp_path / "set"), split=0.2)


def test_a_class_without_test_images(tmp_path: Path) -> None:
    root = tree(tmp_path / "i")
    shutil.rmtree(root / "test" / "cat")
    counts, left_out = load_with_note(root)
    assert counts == {"train": [TRAIN] * 3, "test": [TEST, TEST, 0]}
    assert left_out == "the test split has no images of 1 class: cat"


def test_a_class_without_training_images(tmp_path: Path) -> None:
    root = tree(tmp_path / "i")
    shutil.rmtree(root / "train" / "cat")
    with pytest.raises(
        CifarxError, match=r"1 class in the test split without training images \(cat\) \(found test/, train/\)"
    ):
        load(root)


def test_an_error_says_what_is_there(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", ("Val", "test"))
    for name in ("a.md", "b.md", "c.md"):
        (root / name).touch()
    (root / "train").mkdir()
    with pytest.raises(
        CifarxError, match=r"set has no training images \(found Val/, test/, 3 files; left out 3 \.md\): use"
    ):
        load(root)


def test_two_datasets_in_one_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        tree(tmp_path / "sets" / name)
    with pytest.raises(
        CifarxError, match=r"has 2 datasets \(first, second\) .*: give one of them: --data .*sets/first"
    ):
        load(tmp_path / "sets")


# --- files that are no images


def test_files_without_a_known_suffix_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path / "h")
    for number in range(3):
        shutil.copy(root / "train" / "ant" / "000.png", root / "train" / "ant" / f"scan{number}")
        (root / "train" / "ant" / f"{number}.raw").touch()
    (root / "README.md").touch()
    counts, left_out = load_with_note(root)
    assert counts == plain()
    assert left_out == "left out 7 files of h: 3 without a suffix, 3 .raw, 1 .md"


def test_class_folders_without_images_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path / "h" / "top")
    (root / "train" / "eel" / "raw").mkdir(parents=True)
    (root / "train" / "fly").mkdir()
    (root / "train" / "fly" / "0.raw").touch()
    (root / "train" / ".cache").mkdir()
    counts, left_out = load_with_note(tmp_path / "h")
    assert counts == plain()
    assert left_out.splitlines() == [
        "left out 1 file of h: 1 .raw",
        "left out 2 folders of h: 2 without images (top/train/eel)",
    ]


def test_files_of_phones(tmp_path: Path) -> None:
    root = tree(tmp_path / "h")
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), COLORS["ant"])).save(root / "train" / "ant" / "IMG_1.HEIC", quality=95)
    Image.new("RGB", (8, 8), COLORS["bee"]).save(root / "train" / "bee" / "x.avif", quality=95)
    counts, left_out = load(root)
    assert counts == {"train": [TRAIN + 1, TRAIN + 1, TRAIN], "test": [TEST] * 3}
    assert left_out == ()


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree(tmp_path / "set") / "a.md").touch()
    monkeypatch.chdir(tmp_path / "set")
    assert load_with_note(Path()) == (plain(), "left out 1 file of set: 1 .md")


def test_pixmaps(tmp_path: Path) -> None:
    assert load(tree(tmp_path / "ppm", suffix="ppm")) == (plain(), ())


# --- links


def link_files(root: Path, link: Callable[[Path, Path], object], source: Path) -> Path:
    for number in range(10, 15):
        link(source, root / "train" / "ant" / f"{number:03d}.png")
    return root


LINKED: dict[Split, list[int]] = {"train": [TRAIN + 5, TRAIN, TRAIN], "test": [TEST] * 3}


def test_hard_links(tmp_path: Path) -> None:
    root = link_files(tree(tmp_path / "link"), os.link, tmp_path / "link" / "train" / "ant" / "000.png")
    for path in (root, pack_tar(root, ".tar.gz")):
        assert load(path) == (LINKED, ())


def test_symbolic_links_inside_the_dataset(tmp_path: Path) -> None:
    root = tree(tmp_path / "sym")
    draw(root / "blobs", 1)
    link_files(root, lambda source, link: link.symlink_to(source), Path("../../blobs/000.png"))
    (root / "test" / "ant").rename(root / "ants")
    (root / "test" / "ant").symlink_to("../ants", target_is_directory=True)
    for path in (root, pack_tar(root, ".tar.gz"), pack_zip(root, tmp_path / "sym.zip", top=True)):
        counts, left_out = load_with_note(path)
        assert counts == LINKED
        assert "outside the folders of splits and classes" in left_out


def test_links_that_lead_out_of_the_dataset_are_left_out(tmp_path: Path) -> None:
    root = tree(tmp_path / "sym")
    draw(tmp_path / "blobs", 1)
    link_files(root, lambda source, link: link.symlink_to(source), Path("../../../blobs/000.png"))
    (root / "train" / "bee" / "absolute.png").symlink_to(tmp_path / "blobs" / "000.png")
    (root / "train" / "bee" / "folder").symlink_to(tmp_path / "blobs", target_is_directory=True)
    for path in (root, pack_tar(root, ".tar"), pack_zip(root, tmp_path / "sym.zip", top=False)):
        counts, left_out = load_with_note(path)
        assert counts == plain()
        assert (
            "7 behind links that lead out of it" if path == root else "7 behind links to files that are not in it"
        ) in left_out


def test_links_in_circles_and_broken_links(tmp_path: Path) -> None:
    root = tree(tmp_path / "sym")
    (root / "train" / "ant" / "all").symlink_to("..", target_is_directory=True)
    (root / "train" / "bee" / "gone.png").symlink_to("missing.png")
    for path in (root, pack_tar(root, ".tar")):
        counts, left_out = load_with_note(path)
        assert counts == plain()
        assert "1 behind links to a folder that contains them" in left_out
        assert ("1 behind broken links" if path == root else "1 behind links to files that are not in it") in left_out


def test_paths_that_lead_out_of_an_archive(tmp_path: Path) -> None:
    root = tree(tmp_path / "set")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(root, ".")
        archive.add(root / "train" / "ant" / "000.png", "../train/ant/outside.png")
        link = tarfile.TarInfo("train/ant/passwd.png")
        link.type, link.linkname = tarfile.LNKTYPE, "../../etc/passwd"
        archive.addfile(link)
    counts, left_out = load_with_note(tmp_path / "set.tar")
    assert counts == plain()
    assert "1 with paths that lead out of it" in left_out
    assert "1 behind links to files that are not in it" in left_out


@pytest.mark.parametrize("folder", ["main", "main/data"])
def test_the_cache_of_the_hub(tmp_path: Path, folder: str) -> None:
    """Hugging Face's hub stores files under their hashes, and links to them."""
    root = tree(tmp_path / "set" / "snapshots" / folder)
    (tmp_path / "set" / "blobs").mkdir()
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        path.rename(tmp_path / "set" / "blobs" / str(number))
        path.symlink_to(os.path.relpath(tmp_path / "set" / "blobs" / str(number), path.parent))
    assert load(root) == (plain(), ())


# --- damaged and encrypted archives


@pytest.mark.parametrize("suffix", [".zip", ".tar.zst", ".tar.xz", ".tar.bz2"])
def test_truncated_archives(tmp_path: Path, suffix: str) -> None:
    root = tree(tmp_path / "set")
    archive = pack_zip(root, tmp_path / "set.zip", top=True) if suffix == ".zip" else pack_tar(root, suffix)
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(CifarxError, match=r"set\.\S+ is (truncated or damaged|not a folder or a \.zip)"):
        load(archive)


def test_an_encrypted_archive(tmp_path: Path) -> None:
    archive = pack_zip(tree(tmp_path / "set"), tmp_path / "set.zip", top=True)
    content = bytearray(archive.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of encryption in both headers
        position = content.find(magic)
        while position >= 0:
            content[position + offset] |= 1
            position = content.find(magic, position + 4)
    archive.write_bytes(content)
    with pytest.raises(CifarxError, match=r"set\.zip cannot be read \(.*encrypted.*\): extract it"):
        load(archive)
