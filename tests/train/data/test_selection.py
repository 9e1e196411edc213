import re
import warnings
from pathlib import Path

import msgspec
import pytest
from torchvision.datasets import CIFAR10

from cifarx_serve.errors import DataError, FallbackWarning
from cifarx_serve.spec import DataRecord, InputSpec
from cifarx_train.data.cifar10 import Cifar10Set
from cifarx_train.data.dataset import fingerprint
from cifarx_train.data.image_folder import ImageArchiveDataset, ImageFolderDataset
from cifarx_train.data.selection import select_data, select_data_like
from cifarx_train.data.synthetic.dataset import SyntheticDataset
from tests.support.drawn_images import draw_folder, pack

SPEC = InputSpec(height=32, width=32)
RECORD = DataRecord(
    name="colours",
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
    """CIFAR-10 at a port of this machine where nothing listens (TCP's discard service, long out of use)."""
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def colours(drawn_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images, named in the environment."""
    monkeypatch.setenv("CIFARX_DATA", str(drawn_once))
    return drawn_once


# --- what is named


def test_builtin_is_the_drawings() -> None:
    assert isinstance(select_data("builtin"), SyntheticDataset)


def test_a_folder_and_an_archive(drawn_once: Path, tmp_path: Path) -> None:
    folder = select_data(str(drawn_once))
    archive = select_data(str(pack(drawn_once, tmp_path / "colours.tar.gz")))
    assert isinstance(folder, ImageFolderDataset)
    assert isinstance(archive, ImageArchiveDataset)
    assert folder.class_names == archive.class_names == ("blue", "green", "red")


def test_a_path_may_be_relative(tmp_path: Path) -> None:
    draw_folder(tmp_path / "colours", train=1, test=1)
    assert len(select_data("colours").load("test", SPEC)) == 3


def test_cifar10s_own_files_by_their_folder_or_the_one_above(tmp_path: Path) -> None:
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for path in (batches, batches.parent):
        data = select_data(str(path))
        assert isinstance(data, Cifar10Set)
        assert data.root == tmp_path / "data"


def test_cifar10s_own_folder_may_be_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = tmp_path / "data" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    monkeypatch.chdir(batches)
    data = select_data(".")
    assert isinstance(data, Cifar10Set)
    assert data.root == batches.parent


def test_broken_images_are_refused_or_left_out_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw_folder(tmp_path / "colours", train=2, test=2)
    (folder / "test" / "red" / "0.png").write_bytes(b"")
    monkeypatch.setenv("CIFARX_DATA", str(folder))
    for data in (select_data("colours"), select_data("auto"), select_data_like(RECORD, "auto")):
        with pytest.raises(DataError, match="1 broken image in"):
            data.load("test", SPEC)
    for data in (
        select_data("colours", "skip"),
        select_data("auto", "skip"),
        select_data_like(RECORD, "auto", "skip"),
        select_data_like(None, "colours", broken="skip"),
    ):
        with pytest.warns(FallbackWarning, match=r"left out 1 broken image in .*test/red/0\.png"):
            assert len(data.load("test", SPEC)) == 5


def test_cifar10_that_is_there_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    data = select_data("cifar10")
    assert isinstance(data, Cifar10Set)
    # And what is there is not what was published: an error, no fall-back.
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        data.load("test", SPEC)


@pytest.mark.parametrize("name", ["nowhere", "cifar", "Builtin", "no/such/folder.tar.gz"])
def test_a_missing_path_is_an_error_that_tells_the_choices(name: str) -> None:
    with pytest.raises(
        DataError, match=rf"no such data set {re.escape(name)}: use auto, cifar10, builtin, or the path"
    ):
        select_data(name)


def test_a_folder_without_classes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 class folders"):
        select_data("empty").load("test", SPEC)


def test_a_file_that_is_no_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"photo\.png is not a folder or a \.tar\.gz of one"):
        select_data("photo.png")


def test_an_explicit_choice_never_falls_back(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"cannot be downloaded .*--data builtin"):
            select_data("cifar10")
    assert not (tmp_path / "cifar10").exists()


def test_an_explicit_choice_goes_before_the_environment(colours: Path) -> None:
    assert colours.exists()
    assert isinstance(select_data("builtin"), SyntheticDataset)
    with pytest.raises(DataError):
        select_data("cifar10")


# --- auto


def test_auto_takes_what_the_environment_names(colours: Path) -> None:
    data = select_data("auto")
    assert isinstance(data, ImageFolderDataset)
    assert data.path == colours


def test_auto_never_falls_back_from_what_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFARX_DATA", "nowhere")
    with pytest.raises(DataError, match="no such data set nowhere"):
        select_data("auto")


def test_auto_takes_cifar10_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    assert isinstance(select_data("auto"), Cifar10Set)


@pytest.mark.parametrize("environment", [None, ""])
def test_auto_falls_back_to_the_drawings_and_says_so_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str | None
) -> None:
    if environment is not None:
        monkeypatch.setenv("CIFARX_DATA", environment)
    with pytest.warns(FallbackWarning, match=r"BUILT-IN DRAWINGS, not photographs: CIFAR-10 .* cannot be downloaded"):
        data = select_data("auto")
    assert isinstance(data, SyntheticDataset)
    assert not (tmp_path / "cifar10").exists()


# --- data for a model


def test_a_model_of_the_drawings_is_judged_on_them_without_a_word() -> None:
    assert isinstance(select_data_like(BUILTIN, "auto"), SyntheticDataset)


def test_a_model_of_cifar10_is_judged_on_it(tmp_path: Path) -> None:
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    assert isinstance(select_data_like(CIFAR, "auto"), Cifar10Set)


def test_a_model_of_cifar10_falls_back_loudly() -> None:
    with pytest.warns(FallbackWarning, match=r"DRAWINGS.*cannot be downloaded"):
        assert isinstance(select_data_like(CIFAR, "auto"), SyntheticDataset)


def test_a_model_of_a_folder_falls_back_loudly_and_names_it() -> None:
    with pytest.warns(FallbackWarning, match=r"DRAWINGS.*trained on colours.*--data, CIFARX_DATA"):
        assert isinstance(select_data_like(RECORD, "auto"), SyntheticDataset)


def test_a_model_that_does_not_tell_gets_the_automatic_choice() -> None:
    with pytest.warns(FallbackWarning, match="cannot be downloaded"):
        assert isinstance(select_data_like(None, "auto"), SyntheticDataset)


@pytest.mark.parametrize("record", [None, RECORD, BUILTIN, CIFAR], ids=["none", "folder", "builtin", "cifar10"])
def test_what_is_named_goes_before_what_the_model_was_trained_on(
    record: DataRecord | None, drawn_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(select_data_like(record, str(drawn_once)), ImageFolderDataset)
    assert isinstance(select_data_like(record, "builtin"), SyntheticDataset)
    with pytest.raises(DataError, match="no such data set"):
        select_data_like(record, "nowhere")
    with pytest.raises(DataError, match="cannot be downloaded"):
        select_data_like(record, "cifar10")
    monkeypatch.setenv("CIFARX_DATA", str(drawn_once))
    assert isinstance(select_data_like(record, "auto"), ImageFolderDataset)


def test_the_data_of_a_model_is_the_data_that_was_recorded(colours: Path) -> None:
    data = select_data_like(RECORD, "auto")
    test = data.load("test", SPEC)
    assert fingerprint(test, data.class_names) == fingerprint(
        select_data(str(colours)).load("test", SPEC), data.class_names
    )
