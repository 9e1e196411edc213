import re
import warnings
from pathlib import Path

import msgspec
import pytest
from torchvision.datasets import CIFAR10

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.spec import DataRecord, InputSpec
from cifarx_train.data.archives import ArchiveStore
from cifarx_train.data.cifar10 import Cifar10Dataset
from cifarx_train.data.dataset import fingerprint
from cifarx_train.data.folder import FolderStore
from cifarx_train.data.image_dataset import ImageFileDataset
from cifarx_train.data.selection import select_dataset, select_dataset_for_model
from cifarx_train.data.synthetic.dataset import SyntheticDataset
from tests.support.image_datasets import pack_archive, write_image_folder

SPEC = InputSpec(height=32, width=32)
RECORD = DataRecord(
    name="colors",
    kind="folder",
    train_images=60,
    test_images=30,
    train_fingerprint="0" * 64,
    test_fingerprint="1" * 64,
)
BUILTIN = msgspec.structs.replace(RECORD, name="builtin drawings", kind="builtin")
CIFAR = msgspec.structs.replace(RECORD, name="CIFAR-10", kind="cifar10")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace CIFAR-10's server by a local port on which nothing listens (the obsolete discard service)."""
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def data_in_environment(color_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images whose path is in `$CIFARX_DATA`."""
    monkeypatch.setenv("CIFARX_DATA", str(color_folder))
    return color_folder


# --- explicit choices


def test_builtin_is_the_synthetic_dataset() -> None:
    assert isinstance(select_dataset("builtin"), SyntheticDataset)


def test_a_folder_or_an_archive(color_folder: Path, tmp_path: Path) -> None:
    folder = select_dataset(str(color_folder))
    archive = select_dataset(str(pack_archive(color_folder, tmp_path / "colors.tar.gz")))
    assert isinstance(folder, ImageFileDataset)
    assert isinstance(archive, ImageFileDataset)
    assert (type(folder.store), type(archive.store)) == (FolderStore, ArchiveStore)
    assert folder.class_names == archive.class_names == ("blue", "green", "red")


def test_a_relative_path(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "colors", train=1, test=1)
    assert len(select_dataset("colors").load("test", SPEC)) == 3


def test_original_cifar10_files_in_the_folder_or_its_parent(tmp_path: Path) -> None:
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for path in (batches, batches.parent):
        data = select_dataset(str(path))
        assert isinstance(data, Cifar10Dataset)
        assert data.root == tmp_path / "data"


def test_original_cifar10_files_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    monkeypatch.chdir(batches)
    data = select_dataset(".")
    assert isinstance(data, Cifar10Dataset)
    assert data.root == batches.parent


def test_on_error_raises_for_or_skips_broken_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_image_folder(tmp_path / "colors", train=2, test=2)
    (folder / "test" / "red" / "0.png").write_bytes(b"")
    monkeypatch.setenv("CIFARX_DATA", str(folder))
    for data in (select_dataset("colors"), select_dataset("auto"), select_dataset_for_model(RECORD, "auto")):
        with pytest.raises(DataError, match="1 broken image in"):
            data.load("test", SPEC)
    for data in (
        select_dataset("colors", "skip"),
        select_dataset("auto", "skip"),
        select_dataset_for_model(RECORD, "auto", "skip"),
        select_dataset_for_model(None, "colors", on_error="skip"),
    ):
        with pytest.warns(FallbackWarning, match=r"skipped 1 broken image in .*test/red/0\.png"):
            assert len(data.load("test", SPEC)) == 5


def test_existing_cifar10_is_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    data = select_dataset("cifar10")
    assert isinstance(data, Cifar10Dataset)
    # The folder does not contain the published files. This is an error, because an explicit choice never falls back.
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        data.load("test", SPEC)


@pytest.mark.parametrize("name", ["nowhere", "cifar", "Builtin", "no/such/folder.tar.gz"])
def test_a_missing_path_is_an_error_that_lists_the_choices(name: str) -> None:
    with pytest.raises(
        DataError, match=rf"dataset {re.escape(name)} does not exist: use auto, cifar10, builtin, or the path"
    ):
        select_dataset(name)


def test_a_folder_without_classes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 class folders"):
        select_dataset("empty").load("test", SPEC)


def test_a_file_that_is_not_an_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"photo\.png is not a folder or a \.zip or \.tar\.gz of one"):
        select_dataset("photo.png")


def test_an_explicit_choice_never_falls_back(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"cannot be downloaded .*--data builtin"):
            select_dataset("cifar10")
    assert not (tmp_path / "cifar10").exists()


def test_an_explicit_choice_overrides_the_environment(data_in_environment: Path) -> None:
    assert data_in_environment.exists()
    assert isinstance(select_dataset("builtin"), SyntheticDataset)
    with pytest.raises(DataError):
        select_dataset("cifar10")


# --- auto


def test_auto_selects_the_path_in_the_environment(data_in_environment: Path) -> None:
    data = select_dataset("auto")
    assert isinstance(data, ImageFileDataset)
    assert data.path == data_in_environment


def test_auto_does_not_fall_back_if_the_environment_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFARX_DATA", "nowhere")
    with pytest.raises(DataError, match="dataset nowhere does not exist"):
        select_dataset("auto")


def test_auto_selects_existing_cifar10(tmp_path: Path) -> None:
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    assert isinstance(select_dataset("auto"), Cifar10Dataset)


@pytest.mark.parametrize("environment", [None, ""])
def test_auto_falls_back_to_the_drawings_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str | None
) -> None:
    if environment is not None:
        monkeypatch.setenv("CIFARX_DATA", environment)
    with pytest.warns(FallbackWarning, match=r"BUILT-IN DRAWINGS, not photographs: CIFAR-10 .* cannot be downloaded"):
        data = select_dataset("auto")
    assert isinstance(data, SyntheticDataset)
    assert not (tmp_path / "cifar10").exists()


# --- dataset for a model


def test_a_model_of_the_drawings_uses_them_without_a_warning() -> None:
    assert isinstance(select_dataset_for_model(BUILTIN, "auto"), SyntheticDataset)


def test_a_model_of_cifar10_uses_it(tmp_path: Path) -> None:
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    assert isinstance(select_dataset_for_model(CIFAR, "auto"), Cifar10Dataset)


def test_a_model_of_cifar10_falls_back_with_a_warning() -> None:
    with pytest.warns(FallbackWarning, match=r"DRAWINGS.*cannot be downloaded"):
        assert isinstance(select_dataset_for_model(CIFAR, "auto"), SyntheticDataset)


def test_the_drawings_never_stand_in_for_a_folder() -> None:
    with pytest.raises(DataError, match="trained on colors, whose path is not known: give it with --data PATH"):
        select_dataset_for_model(RECORD, "auto")


def test_the_drawings_never_stand_in_for_unknown_images() -> None:
    with pytest.raises(DataError, match=r"not known which images .*: give images like them with --data PATH, or set"):
        select_dataset_for_model(None, "auto")


def test_a_model_without_a_record_uses_cifar10_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    assert isinstance(select_dataset_for_model(None, "auto"), Cifar10Dataset)


@pytest.mark.parametrize("record", [None, RECORD, BUILTIN, CIFAR], ids=["none", "folder", "builtin", "cifar10"])
def test_an_explicit_choice_overrides_the_record_of_the_model(
    record: DataRecord | None, color_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(select_dataset_for_model(record, str(color_folder)), ImageFileDataset)
    assert isinstance(select_dataset_for_model(record, "builtin"), SyntheticDataset)
    with pytest.raises(DataError, match="dataset nowhere does not exist"):
        select_dataset_for_model(record, "nowhere")
    with pytest.raises(DataError, match="cannot be downloaded"):
        select_dataset_for_model(record, "cifar10")
    monkeypatch.setenv("CIFARX_DATA", str(color_folder))
    assert isinstance(select_dataset_for_model(record, "auto"), ImageFileDataset)


def test_a_model_of_a_folder_uses_the_path_in_the_environment(data_in_environment: Path) -> None:
    data = select_dataset_for_model(RECORD, "auto")
    test = data.load("test", SPEC)
    assert fingerprint(test, data.class_names) == fingerprint(
        select_dataset(str(data_in_environment)).load("test", SPEC), data.class_names
    )
