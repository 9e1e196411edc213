"""The page of `cifarx export --format web` in headless Chromium, served by Python's own HTTP server.

Chromium's answers must be those of PyTorch, within the tolerances of every other format.
"""

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageCms
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from cifarx_export.formats.web.converter import convert_to_web
from cifarx_export.parity.tolerances import get_tolerance
from cifarx_serve.backends.web.directory import SPEC_FILE, write_checksums
from cifarx_serve.devices import Device
from cifarx_serve.images.preprocess import model_input, resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.scores import applicable_labels, class_scores
from cifarx_serve.spec import ModelSpec
from cifarx_train.checkpoints.checkpoint import load_checkpoint
from cifarx_train.pytorch_backend import PyTorchBackend
from tests.support.browser import Browser, Page, open_browser
from tests.support.conversion import conversion_source
from tests.support.trained_model import Trained
from tests.support.web import requires_web

pytestmark = [pytest.mark.slow, requires_web]

IMAGES = 200
TIMES = "\N{MULTIPLICATION SIGN}"

# Sends pictures to a worker like that of the page, and returns the outputs for each.
CLASSIFY = """
const [names, done] = arguments, answers = [];
const source = `import ${JSON.stringify(new URL("classifier.js", location.href).href)}`;
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
worker.onmessage = async ({ data }) => {
  if (data.failed) return done(data.failed);
  if (data.ready) {
    for (const [id, name] of names.entries()) worker.postMessage({ id, blob: await (await fetch(name)).blob() });
  } else if (data.id !== undefined) {
    answers.push(data.error ?? Array.from(data.outputs));
    if (answers.length === names.length) { worker.terminate(); done(answers); }
  }
};
"""

# Returns whether a request to another host is blocked, in the page and in a worker like that of the page.
REACH_OUT = """
const [url, done] = arguments;
const request = `fetch("${url}", { mode: "no-cors" }).then(() => "reached", () => "blocked")`;
const script = new Blob([`${request}.then(postMessage)`], { type: "text/javascript" });
const worker = new Worker(URL.createObjectURL(script), { type: "module" });
worker.onmessage = async ({ data }) => {
  done([data, await fetch(url, { mode: "no-cors" }).then(() => "reached", () => "blocked")]);
};
"""

# Returns the names of the caches, when the service worker is done with them.
CACHES = """
const [done] = arguments;
caches.keys().then(done);
"""

KEPT_SUMS = """
const [done] = arguments;
caches.match("SHA256SUMS").then((response) => response.text()).then(done);
"""

DISPATCH_FILE_EVENT = """
const [kind, text, name, done] = arguments;
fetch(text).then((response) => response.blob()).then((blob) => {
  const data = new DataTransfer();
  data.items.add(new File([blob], name, { type: blob.type }));
  const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
  document.getElementById("drop").dispatchEvent(event);
  done();
});
"""


class Site(NamedTuple):
    """A directory that is served: the page in `model.web`, and pictures in `pictures`."""

    root: Path
    url: str
    spec: ModelSpec
    checkpoint: Path

    def picture(self, name: str, image: Image.Image, **options: object) -> Path:
        path = self.root / "pictures" / name
        image.save(path, **options)  # type: ignore[arg-type]
        return path

    def expected(self, pictures: Sequence[Path]) -> np.ndarray:
        """Return PyTorch's logits for pictures that cifarx decodes and resizes."""
        with PyTorchBackend(self.checkpoint, Device("cpu")) as backend:
            pixels = np.stack([resize(read_image(path), self.spec.input) for path in pictures])
            return backend.run(model_input(pixels, backend.spec))


@contextmanager
def served(root: Path, port: int = 0) -> Iterator[int]:
    """Serve a directory with Python's own server, and return the port."""
    command = [sys.executable, "-u", "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(root)]
    with (root / "log").open("ab") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline().split(b" port ")[1].split()[0])
        finally:
            server.kill()


@pytest.fixture(scope="module")
def site(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    for name in ("model.web", "pictures"):
        (root / name).mkdir()
    loaded = load_checkpoint(trained.checkpoint)
    [artifact] = convert_to_web(conversion_source(loaded))
    artifact.save(root / "model.web", artifact.complete_spec(loaded.spec))
    with served(root) as port:
        yield Site(root, f"http://127.0.0.1:{port}/model.web", loaded.spec, trained.checkpoint)


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Browser]:
    with open_browser(tmp_path) as browser:
        yield browser


def ready(browse: Browser, site: Site, phone: bool = False) -> Page:
    page = browse(site.url, phone)
    page.wait_text("state", "ready")
    return page


def classify(page: Page, pictures: Sequence[Path]) -> np.ndarray:
    page.driver.set_script_timeout(200)
    answers = page.driver.execute_async_script(CLASSIFY, [f"../pictures/{path.name}" for path in pictures])
    assert isinstance(answers, list), answers
    assert all(isinstance(answer, list) for answer in answers), answers
    return np.array(answers, np.float32)


def wait_until_kept(page: Page) -> None:
    """Wait until the service worker has kept the files of the page, which the page states."""
    page.wait(lambda: "opens without its host" in page.texts("#facts dd"), "the files are not kept")


def wait_for_answer(page: Page) -> None:
    answer = page.driver.find_element(By.ID, "answer")
    page.wait(lambda: answer.get_attribute("aria-busy") == "false" and page.text("best"), "there is no answer")


def real_images(archive: Path, count: int) -> list[Image.Image]:
    """Return test images of CIFAR-10, spread over the classes."""
    found = []
    with tarfile.open(archive) as members:
        for member in members:
            if member.isfile() and "test" in member.name and member.name.endswith((".jpg", ".png")):
                file = members.extractfile(member)
                assert file is not None
                found.append(file.read())
    return [Image.open(io.BytesIO(found[position])) for position in np.linspace(0, len(found) - 1, count).astype(int)]


def test_chromium_answers_as_pytorch(browse: Browser, site: Site, cifar10_jpeg: Path) -> None:
    images = real_images(cifar10_jpeg, IMAGES)
    pictures = [site.picture(f"{number}.png", image.convert("RGB")) for number, image in enumerate(images)]
    found, expected = classify(ready(browse, site), pictures), site.expected(pictures)
    tolerance = get_tolerance("fp32")
    assert (tolerance.rtol, tolerance.atol) == (1e-4, 1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_pictures_of_any_kind_are_decoded_as_elsewhere(browse: Browser, site: Site, dog: Path) -> None:
    """Large enough for several strips, turned by EXIF, with a color profile, transparent, with a palette, and gray."""
    photograph = read_image(dog)
    turned = Image.Exif()
    turned[0x0112] = 6
    layer = photograph.resize((300, 200)).convert("RGBA")
    layer.putalpha(Image.linear_gradient("L").resize((300, 200)))
    holes = photograph.resize((64, 48)).convert("RGBA")
    holes.putalpha(holes.getchannel("R").point(lambda level: 255 * (level > 90)))
    profile = swapped_profile()
    pictures = [
        site.picture("large.png", photograph.resize((4100, 3100))),
        site.picture("small.png", photograph.resize((640, 480))),
        site.picture("turned.png", photograph.resize((640, 480)), exif=turned),
        site.picture("profile.png", photograph.resize((640, 480)), icc_profile=profile),
        site.picture("holes.png", holes),
        site.picture("palette.png", photograph.resize((320, 240)).quantize(64)),
        site.picture("gray.png", photograph.resize((320, 240)).convert("L")),
        site.picture("one.png", Image.new("RGB", (1, 1), (200, 30, 90))),
        site.picture("thin.png", photograph.resize((3, 500))),
    ]
    page = ready(browse, site)
    np.testing.assert_allclose(classify(page, pictures), site.expected(pictures), rtol=1e-4, atol=1e-4)
    # Partly transparent pixels are blended by Chromium and by Pillow with different rounding.
    blended = [site.picture("blended.png", layer)]
    np.testing.assert_allclose(classify(page, blended), site.expected(blended), atol=0.02)


def swapped_profile() -> bytes:
    """Return a color profile with other primaries than sRGB: reading it would change every color."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entry = profile.index(b"rXYZ", 128)  # of the table of tags: signature, offset, size
    start = int.from_bytes(profile[entry + 4 : entry + 8], "big") + 8
    x, y, z = (profile[start + offset : start + offset + 4] for offset in (0, 4, 8))
    profile[start : start + 12] = y + x + z
    return bytes(profile)


def test_a_photograph_is_classified_as_by_infer(browse: Browser, site: Site, dog: Path) -> None:
    page = ready(browse, site)
    page.choose(dog)
    wait_for_answer(page)
    scores = class_scores(site.expected([dog]), site.spec)[0]
    order = np.argsort(-scores)[:5]
    rows = list(zip(page.texts("#bars .label"), page.texts("#bars .percent"), strict=True))
    assert page.text("best") == rows[0][0]
    assert [label for label, _ in rows] == [site.spec.class_names[position] for position in order]
    found = [float(percent.strip("<>%")) for _, percent in rows]
    np.testing.assert_allclose(
        found, 100 * scores[order], atol=0.6
    )  # the percentages are rounded, and JPEG decoders may differ by a level
    assert page.text("picture") == f"dog.jpg, 1546{TIMES}1213"
    assert page.driver.find_element(By.ID, "preview").get_attribute("alt") == "Preview of dog.jpg"
    Select(page.driver.find_element(By.ID, "top-k")).select_by_visible_text("10")
    assert len(page.texts("#bars .label")) == 10
    assert len(page.texts("#times li")) == 2
    assert page.text("drawings").startswith("Trained on drawings")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_can_be_dropped_and_pasted(kind: str, browse: Browser, site: Site) -> None:
    picture = site.picture("green.png", Image.new("RGB", (20, 20), (40, 160, 60)))
    page = ready(browse, site)
    page.driver.execute_async_script(DISPATCH_FILE_EVENT, kind, f"../pictures/{picture.name}", "<b>name</b>.png")
    wait_for_answer(page)
    assert page.text("picture") == f"<b>name</b>.png, 20{TIMES}20"


def test_the_camera_takes_a_picture(browse: Browser, site: Site) -> None:
    page = ready(browse, site)
    page.driver.find_element(By.ID, "camera").click()
    video = page.driver.find_element(By.ID, "video")
    page.wait(lambda: int(str(video.get_property("videoWidth"))) > 0, "the camera shows nothing")
    assert page.driver.switch_to.active_element.get_attribute("id") == "take"
    page.press(Keys.ENTER)
    wait_for_answer(page)
    page.wait(lambda: page.text("picture").startswith("Picture of the camera, "), "there is no picture")
    assert not video.is_displayed()
    page.driver.find_element(By.ID, "camera").click()
    page.driver.find_element(By.ID, "close").click()
    assert page.driver.find_element(By.ID, "drop").is_displayed()


def test_what_is_no_picture_is_said_and_the_page_goes_on(browse: Browser, site: Site, tmp_path: Path) -> None:
    page = ready(browse, site)
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    page.choose(tmp_path / "broken.png")
    page.wait(lambda: page.text("error-text"), "no error is shown")
    assert page.text("error-text").startswith("broken.png cannot be classified: ")
    page.choose(site.picture("good.png", Image.new("RGB", (9, 9))))
    wait_for_answer(page)
    assert page.text("error-text") == ""


def test_the_page_is_used_with_the_keyboard(browse: Browser, site: Site) -> None:
    page = ready(browse, site)
    for name in ("top-k", "files", "camera"):
        page.tab_to(name)


def test_on_a_phone_nothing_scrolls_sideways(browse: Browser, site: Site) -> None:
    page = ready(browse, site, phone=True)
    assert not page.scrolls_horizontally()
    page.choose(site.picture(f"{'long-name' * 20}.png", Image.new("RGB", (640, 480))))
    wait_for_answer(page)
    assert not page.scrolls_horizontally()
    for name in ("camera", "top-k"):
        assert page.driver.find_element(By.ID, name).size["height"] >= 44


def test_the_page_reaches_no_other_host(browse: Browser, site: Site) -> None:
    page = ready(browse, site)
    wait_until_kept(page)
    other = site.url.replace("127.0.0.1", "localhost")
    assert page.driver.execute_async_script(REACH_OUT, other) == ["blocked", "blocked"]
    blocked = [entry["message"] for entry in page.driver.get_log("browser")]
    assert all("Content Security Policy" in message for message in blocked)
    requested = {line.split()[6] for line in (site.root / "log").read_text().splitlines() if '"GET' in line}
    assert {path for path in requested if not path.startswith("/pictures/")} == {
        f"/model.web/{name}"
        for name in (
            *("", "index.html", "style.css", "page.js", "classifier.js", "offline.js"),
            *("model.web.onnx", "cifarx_spec.json", "SHA256SUMS"),
            *("runtime/ort.js", "runtime/ort.wasm", "runtime/LICENSE.txt"),
        )
    }


def test_a_missing_file_is_named(browse: Browser, site: Site) -> None:
    wasm = site.root / "model.web" / "runtime" / "ort.wasm"
    hidden = wasm.rename(wasm.with_suffix(".hidden"))
    try:
        page = browse(site.url)
        page.wait_text("state", "failed")
        assert "The model cannot be loaded (runtime/ort.wasm: 404 File not found)" in page.text("error-text")
    finally:
        hidden.rename(wasm)


def test_other_outputs_than_a_softmax_are_shown_as_by_infer(browse: Browser, site: Site) -> None:
    """The scores of the page are those of `cifarx_serve.scores`, for each kind of output."""
    page = ready(browse, site)
    changes: list[dict[str, object]] = [
        {"temperature": 2.5},
        {"activation": "sigmoid", "thresholds": (0.5, 0.2, 0.9)},
        {"activation": "sigmoid", "outputs": 1, "class_names": ("no", "yes"), "thresholds": (0.7,)},
        {"output": "probabilities"},
    ]
    for change in changes:
        spec = msgspec.structs.replace(site.spec, **({"class_names": ("a", "b", "c")} | change))
        outputs = np.array([[0.1, 0.7, 0.2]] if spec.output == "probabilities" else [[-1.5, 0.8, 2.1]], np.float32)
        outputs = outputs[:, 1 : 1 + spec.output_size] if spec.outputs == 1 else outputs
        rows = page.driver.execute_script(
            "spec = JSON.parse(arguments[0]); return predictions(Float32Array.from(arguments[1]));",
            spec.to_json(),
            outputs[0].tolist(),
        )
        scores = class_scores(outputs, spec)[0]
        assert [row["score"] for row in rows] == pytest.approx(sorted(scores, reverse=True))
        applies = {spec.class_names[position] for position in np.flatnonzero(applicable_labels(outputs, spec)[0])}
        assert {row["label"] for row in rows if row["applies"]} == applies


# Without its host.


@pytest.fixture
def copied(site: Site, tmp_path: Path) -> Path:
    """A directory to serve with a copy of the page in `model.web`."""
    root = tmp_path / "copied"
    shutil.copytree(site.root / "model.web", root / "model.web")
    return root


def open_copy(browse: Browser, port: int) -> Page:
    page = browse(f"http://127.0.0.1:{port}/model.web")
    page.wait_text("state", "ready")
    wait_until_kept(page)
    return page


def rename_network(directory: Path, name: str) -> None:
    """Change what the page shows, and its checksums."""
    spec = (directory / SPEC_FILE).read_text(encoding="utf-8")
    (directory / SPEC_FILE).write_text(spec.replace('"model":"lzh"', f'"model":"{name}"'), encoding="utf-8")
    assert name in (directory / SPEC_FILE).read_text(encoding="utf-8")
    write_checksums(directory)


def title(page: Page) -> str:
    page.wait_text("state", "ready")
    return str(page.driver.title).partition(":")[0]


def test_the_page_opens_and_answers_without_its_host(browse: Browser, site: Site, copied: Path) -> None:
    picture = site.picture("blue.png", Image.new("RGB", (40, 30), "blue"))
    with served(copied) as port:
        page = open_copy(browse, port)
    page.driver.refresh()
    page.wait_text("state", "ready")
    page.choose(picture)
    wait_for_answer(page)
    assert page.text("best") == site.spec.class_names[int(site.expected([picture]).argmax())]
    page.open("/index.html?again")
    assert title(page) == "lzh"


def test_a_new_model_is_shown_at_the_next_visit_and_kept(browse: Browser, copied: Path) -> None:
    with served(copied) as port:
        page = open_copy(browse, port)
        rename_network(copied / "model.web", "newer")
        page.driver.refresh()
        assert title(page) == "newer"
        page.wait(lambda: len(page.driver.execute_async_script(CACHES)) == 1, "the old files are still kept")
        page.driver.refresh()
        assert title(page) == "newer"
    page.driver.refresh()
    assert title(page) == "newer"


def test_files_that_do_not_match_their_checksums_are_not_kept(browse: Browser, copied: Path) -> None:
    with served(copied) as port:
        page = open_copy(browse, port)
        model = copied / "model.web"
        sums = (model / "SHA256SUMS").read_text()
        rename_network(model, "newer")
        page_script = (model / "page.js").read_text()
        (model / "page.js").write_text(page_script + "\n// changed without its checksum\n")
        page.driver.refresh()
        assert title(page) == "newer"
        page.wait(lambda: len(page.driver.execute_async_script(CACHES)) == 1, "what does not match is still kept")
    page.driver.refresh()
    assert title(page) == "lzh", "the files of the first visit are whole"
    assert page.driver.execute_async_script(KEPT_SUMS) == sums


def test_a_host_with_an_error_is_no_host(browse: Browser, copied: Path) -> None:
    with served(copied) as port:
        page = open_copy(browse, port)
        (copied / "model.web").rename(copied / "moved")
        page.driver.refresh()
        assert title(page) == "lzh"
