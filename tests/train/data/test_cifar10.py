import hashlib
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from cifarx_serve.errors import DataError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.spec import InputSpec
from cifarx_train.data.cifar10 import Cifar10Dataset, contains_cifar10, download_cifar10

SPEC = InputSpec(height=32, width=32)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


def batch(name: str, count: int) -> dict[str, Any]:
    """Return a batch in the published format: one row per image, with all red values first, then green, then blue."""
    rng = np.random.default_rng(FILES.index(name))
    return {
        "batch_label": name,
        "labels": rng.integers(0, 10, count).tolist(),
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"{number}.png" for number in range(count)],
    }


def write_batches(root: Path) -> Path:
    """Write small files in the published format: 8 images in each of five training batches, 6 for testing."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents = {name: batch(name, 6 if name == "test_batch" else 8) for name in FILES[:-1]}
    contents["batches.meta"] = {"label_names": list(CLASSES), "num_cases_per_batch": 8, "num_vis": 3072}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes torchvision accept the checksums of the files in a folder."""

    def accept_files(folder: Path) -> None:
        md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in FILES}
        monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in FILES[:5]])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})

    return accept_files


# --- reading


def test_the_published_format_is_read(tmp_path: Path, accept: Callable[[Path], None]) -> None:
    accept(write_batches(tmp_path))
    data = Cifar10Dataset(tmp_path)
    assert (data.class_names, data.kind, data.name) == (CLASSES, "cifar10", "CIFAR-10")
    for split, names, count in (("train", FILES[:5], 8), ("test", ["test_batch"], 6)):
        loaded = data.load("train" if split == "train" else "test", SPEC)
        batches = [batch(name, count) for name in names]
        assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int64)
        assert loaded.labels.tolist() == [label for content in batches for label in content["labels"]]
        rows = np.concatenate([content["data"] for content in batches])
        assert loaded.images.shape == (len(rows), 32, 32, 3)
        for channel in range(3):
            plane = rows[:, 1024 * channel : 1024 * (channel + 1)].reshape(-1, 32, 32)
            assert np.array_equal(loaded.images[..., channel], plane)


def test_another_size_is_resized_as_for_inference(tmp_path: Path, accept: Callable[[Path], None]) -> None:
    accept(write_batches(tmp_path))
    spec = InputSpec(height=48, width=40)
    small, large = Cifar10Dataset(tmp_path).load("test", SPEC), Cifar10Dataset(tmp_path).load("test", spec)
    assert large.images.shape == (6, 48, 40, 3)
    assert np.array_equal(large.labels, small.labels)
    for image, expected in zip(large.images, small.images, strict=True):
        assert np.array_equal(image, resize(Image.fromarray(expected), spec))


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(height=32, width=32, channels=1, color="L"),
        InputSpec(height=32, width=32, resize="shorter_side", resize_to=36),
    ],
    ids=["grayscale", "crop"],
)
def test_images_of_the_right_size_are_preprocessed_too(
    tmp_path: Path, accept: Callable[[Path], None], spec: InputSpec
) -> None:
    accept(write_batches(tmp_path))
    plain, changed = Cifar10Dataset(tmp_path).load("test", SPEC), Cifar10Dataset(tmp_path).load("test", spec)
    for image, expected in zip(changed.images, plain.images, strict=True):
        assert np.array_equal(image, resize(Image.fromarray(expected), spec))


def test_resized_images_are_cached_and_the_files_are_still_checked(
    tmp_path: Path, accept: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cifarx_train.data.decoded_cache._MIN_IMAGES", 1)
    accept(write_batches(tmp_path))
    spec = InputSpec(height=48, width=40)
    first = Cifar10Dataset(tmp_path).load("train", spec)
    monkeypatch.delattr("cifarx_train.data.cifar10.resize")  # not called again
    second = Cifar10Dataset(tmp_path).load("train", spec)
    assert first.file == second.file is not None
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.labels, second.labels)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").unlink()
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        Cifar10Dataset(tmp_path).load("train", spec)


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"echo > {self.marker}",)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_another_checksum_is_not_unpickled(
    tmp_path: Path, accept: Callable[[Path], None], name: str
) -> None:
    folder = write_batches(tmp_path)
    accept(folder)
    marker = tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Payload(marker), protocol=2))
    data = Cifar10Dataset(tmp_path)
    for read in (lambda: data.load("train", SPEC), lambda: data.load("test", SPEC), lambda: data.class_names):
        with pytest.raises(
            DataError, match=r"cifar-10-batches-py is not CIFAR-10 as published .*--data cifar10"
        ) as caught:
            read()
        assert caught.value.exit_status == 2
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert b"system" in (folder / name).read_bytes()  # the payload works


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error(tmp_path: Path, accept: Callable[[Path], None], name: str) -> None:
    folder = write_batches(tmp_path)
    accept(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        Cifar10Dataset(tmp_path).load("test", SPEC)


def test_unpublished_files_are_an_error(tmp_path: Path) -> None:
    write_batches(tmp_path)
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        Cifar10Dataset(tmp_path).load("train", SPEC)


def test_contains_cifar10(tmp_path: Path) -> None:
    assert not contains_cifar10(tmp_path)
    write_batches(tmp_path)
    assert contains_cifar10(tmp_path)


# --- downloading


class Site:
    """A local web server that takes the place of CIFAR-10's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content: bytes | None = None
        self.requests: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append(self.command)
                if site.content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(site.content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(site.content)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{self._server.server_port}/{CIFAR10.filename}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Site(monkeypatch)
    yield server
    server.close()


def published_archive(tmp_path: Path, accept: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return an archive of small batches that torchvision now accepts as the published one."""
    folder = write_batches(tmp_path / "source")
    accept(folder)
    archive = Path(shutil.make_archive(str(tmp_path / "source" / "archive"), "gztar", folder.parent, folder.name))
    content = archive.read_bytes()
    shutil.rmtree(tmp_path / "source")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    return content


def download_error() -> DataError:
    with pytest.raises(DataError) as caught:
        download_cifar10()
    assert caught.value.exit_status == 2
    assert caught.value.problem.startswith("CIFAR-10 is not in ./cifar10 and cannot be downloaded (")
    assert "--data builtin" in caught.value.remedy
    assert "--data DIR" in caught.value.remedy
    return caught.value


def test_without_a_network_the_error_suggests_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # reserves the port, but refuses connections
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{closed.getsockname()[1]}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "refused" in download_error().problem
    assert list(tmp_path.iterdir()) == []


def test_missing_files_are_downloaded_once(
    tmp_path: Path, site: Site, accept: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.content = published_archive(tmp_path, accept, monkeypatch)
    assert len(download_cifar10().load("train", SPEC)) == 40
    assert "GET" in site.requests
    site.requests.clear()
    assert len(download_cifar10().load("test", SPEC)) == 6
    assert site.requests == []
    assert (tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch").is_file()


def test_a_missing_page_leaves_no_files(tmp_path: Path, site: Site) -> None:
    assert "404" in download_error().problem or "Not Found" in download_error().problem
    assert site.requests
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_truncated_download_leaves_no_files(
    tmp_path: Path, site: Site, accept: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    content = published_archive(tmp_path, accept, monkeypatch)
    site.content = content[: int(fraction * len(content))]
    download_error()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_does_not_remove_an_existing_folder(tmp_path: Path, site: Site) -> None:
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "mine.txt").write_text("mine")
    site.content = b"not the archive"
    download_error()
    assert (tmp_path / "cifar10" / "mine.txt").read_text() == "mine"


def test_a_server_that_does_not_use_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 this is mail\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/")
        download_error()
        thread.join()
    assert list(tmp_path.iterdir()) == []
