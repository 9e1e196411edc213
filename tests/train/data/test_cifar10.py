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
from cifarx_train.data.cifar10 import Cifar10Set, download, has_batches

SPEC = InputSpec(height=32, width=32)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


def batch(name: str, count: int) -> dict[str, Any]:
    """A batch as published: a row an image, first all its red, then green, then blue."""
    rng = np.random.default_rng(FILES.index(name))
    return {
        "batch_label": name,
        "labels": rng.integers(0, 10, count).tolist(),
        "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"{number}.png" for number in range(count)],
    }


def write_batches(root: Path) -> Path:
    """Small files in the published format: 8 images in each of five training batches, 6 for testing."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents = {name: batch(name, 6 if name == "test_batch" else 8) for name in FILES[:-1]}
    contents["batches.meta"] = {"label_names": list(CLASSES), "num_cases_per_batch": 8, "num_vis": 3072}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.fixture
def vouch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes torchvision take the files in a folder for those that were published, by their checksums."""

    def vouch_for(folder: Path) -> None:
        md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in FILES}
        monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in FILES[:5]])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})

    return vouch_for


# --- reading


def test_reads_the_published_format(tmp_path: Path, vouch: Callable[[Path], None]) -> None:
    vouch(write_batches(tmp_path))
    data = Cifar10Set(tmp_path)
    assert (data.class_names, data.kind, data.name) == (CLASSES, "cifar10", "CIFAR-10")
    for split, names, count in (("train", FILES[:5], 8), ("test", ["test_batch"], 6)):
        read = data.load("train" if split == "train" else "test", SPEC)
        batches = [batch(name, count) for name in names]
        assert (read.images.dtype, read.labels.dtype) == (np.uint8, np.int64)
        assert read.labels.tolist() == [label for content in batches for label in content["labels"]]
        rows = np.concatenate([content["data"] for content in batches])
        assert read.images.shape == (len(rows), 32, 32, 3)
        for channel in range(3):
            plane = rows[:, 1024 * channel : 1024 * (channel + 1)].reshape(-1, 32, 32)
            assert np.array_equal(read.images[..., channel], plane)


def test_another_size_is_resized_as_everywhere(tmp_path: Path, vouch: Callable[[Path], None]) -> None:
    vouch(write_batches(tmp_path))
    spec = InputSpec(height=48, width=40)
    small, large = Cifar10Set(tmp_path).load("test", SPEC), Cifar10Set(tmp_path).load("test", spec)
    assert large.images.shape == (6, 48, 40, 3)
    assert np.array_equal(large.labels, small.labels)
    for image, expected in zip(large.images, small.images, strict=True):
        assert np.array_equal(image, resize(Image.fromarray(expected), spec))


def test_resized_images_are_kept_and_still_only_those_that_were_published(
    tmp_path: Path, vouch: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("cifarx_train.data.decoded_cache._FEWEST_IMAGES", 1)
    vouch(write_batches(tmp_path))
    spec = InputSpec(height=48, width=40)
    first = Cifar10Set(tmp_path).load("train", spec)
    monkeypatch.delattr("cifarx_train.data.cifar10.resize")  # not needed again
    second = Cifar10Set(tmp_path).load("train", spec)
    assert first.file == second.file is not None
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.labels, second.labels)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").unlink()
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        Cifar10Set(tmp_path).load("train", spec)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"echo > {self.marker}",)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_other_bytes_is_never_unpickled(tmp_path: Path, vouch: Callable[[Path], None], name: str) -> None:
    folder = write_batches(tmp_path)
    vouch(folder)
    marker = tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Payload(marker), protocol=2))
    data = Cifar10Set(tmp_path)
    for read in (lambda: data.load("train", SPEC), lambda: data.load("test", SPEC), lambda: data.class_names):
        with pytest.raises(
            DataError, match=r"cifar-10-batches-py is not CIFAR-10 as published .*--data cifar10"
        ) as caught:
            read()
        assert caught.value.exit_status == 2
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert b"system" in (folder / name).read_bytes()  # the payload is a real one


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(tmp_path: Path, vouch: Callable[[Path], None], name: str) -> None:
    folder = write_batches(tmp_path)
    vouch(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        Cifar10Set(tmp_path).load("test", SPEC)


def test_what_was_not_published_is_refused(tmp_path: Path) -> None:
    write_batches(tmp_path)
    with pytest.raises(DataError, match="is not CIFAR-10 as published"):
        Cifar10Set(tmp_path).load("train", SPEC)


def test_a_folder_has_batches_or_not(tmp_path: Path) -> None:
    assert not has_batches(tmp_path)
    write_batches(tmp_path)
    assert has_batches(tmp_path)


# --- downloading


class Site:
    """A web server on this machine that stands for CIFAR-10's own."""

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


def published(tmp_path: Path, vouch: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The archive of small batches that torchvision now takes for the published one."""
    folder = write_batches(tmp_path / "source")
    vouch(folder)
    archive = Path(shutil.make_archive(str(tmp_path / "source" / "archive"), "gztar", folder.parent, folder.name))
    content = archive.read_bytes()
    shutil.rmtree(tmp_path / "source")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    return content


def refused() -> DataError:
    with pytest.raises(DataError) as caught:
        download()
    assert caught.value.exit_status == 2
    assert caught.value.problem.startswith("CIFAR-10 is not in ./cifar10 and cannot be downloaded (")
    assert "--data builtin" in caught.value.remedy
    assert "--data DIR" in caught.value.remedy
    return caught.value


def test_without_a_network_it_says_what_to_use_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses at once, and nobody else can have it
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{closed.getsockname()[1]}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "refused" in refused().problem
    assert list(tmp_path.iterdir()) == []


def test_fetches_what_is_not_there_once(
    tmp_path: Path, site: Site, vouch: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.content = published(tmp_path, vouch, monkeypatch)
    assert len(download().load("train", SPEC)) == 40
    assert "GET" in site.requests
    site.requests.clear()
    assert len(download().load("test", SPEC)) == 6
    assert site.requests == []
    assert (tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch").is_file()


def test_a_page_that_is_gone_leaves_nothing(tmp_path: Path, site: Site) -> None:
    assert "404" in refused().problem or "Not Found" in refused().problem
    assert site.requests
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_a_download_that_is_not_what_was_published_leaves_nothing(
    tmp_path: Path, site: Site, vouch: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, part: float
) -> None:
    content = published(tmp_path, vouch, monkeypatch)
    site.content = content[: int(part * len(content))]
    refused()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_leaves_a_folder_that_was_there(tmp_path: Path, site: Site) -> None:
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "mine.txt").write_text("mine")
    site.content = b"not the archive"
    refused()
    assert (tmp_path / "cifar10" / "mine.txt").read_text() == "mine"


def test_a_server_that_does_not_speak_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        refused()
        thread.join()
    assert list(tmp_path.iterdir()) == []
