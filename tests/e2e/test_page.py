"""The pages of `cifarx serve` in a real browser, against a real server."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import ModelRepository
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.support.color_model import write_onnx
from tests.support.running_server import PROGRAM, Running, serving

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE_S = 30
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,1000"),
)
PHONE = {
    "deviceMetrics": {"width": 360, "height": 780, "pixelRatio": 2, "touch": True},
    "userAgent": "Mozilla/5.0 (Linux; Android 14) Mobile",
}
GREENISH, REDDISH = (100, 120, 90), (130, 100, 90)

# What a browser hands over when a file is dropped or pasted.
HAND_OVER = """
const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], arguments[2], {type: "image/png"}));
const event = arguments[0] === "drop" ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
  : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
document.getElementById("drop").dispatchEvent(event);
"""


class Page:
    """A page of the server, in a browser of its own."""

    def __init__(self, driver: Chrome, server: Running) -> None:
        self.driver = driver
        self.server = server

    def open(self, path: str = "/") -> None:
        self.driver.get(f"http://127.0.0.1:{self.server.port}{path}")

    def text(self, name: str) -> str:
        return str(self.driver.find_element(By.ID, name).text)

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def wait(self, holds: Callable[[], object], problem: str) -> None:
        WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05).until(lambda _: holds(), problem)

    def wait_text(self, name: str, expected: str) -> None:
        WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05).until(
            lambda _: self.text(name) == expected, f"#{name} is not {expected!r}"
        )

    def choose(self, *files: Path) -> None:
        self.driver.find_element(By.ID, "files").send_keys("\n".join(map(str, files)))

    def press(self, *keys: str) -> None:
        """To whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, name: str) -> None:
        """By Tab alone, as who has no mouse."""
        for _ in range(20):
            self.press(Keys.TAB)
            if self.driver.switch_to.active_element.get_attribute("id") == name:
                return
        pytest.fail(f"Tab does not come to #{name}")

    def scrolls_sideways(self) -> bool:
        return bool(self.driver.execute_script("return document.documentElement.scrollWidth > innerWidth"))

    def console_errors(self) -> list[str]:
        """But for answers with an error's status, which every browser tells there."""
        told = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in told if "Failed to load resource" not in message]


Browse: TypeAlias = Callable[..., Page]


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Browse]:
    """`browse(server, phone=True)`: the server's first page; at the end no script has failed on it."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on the PATH")
    pages: list[Page] = []

    def start(server: Running, phone: bool = False) -> Page:
        options = ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={tmp_path / f'profile-{len(pages)}'}"):
            options.add_argument(flag)
        if phone:
            options.add_experimental_option("mobileEmulation", PHONE)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        pages.append(Page(Chrome(options, ModelRepository(str(DRIVER))), server))
        pages[-1].open()
        return pages[-1]

    try:
        yield start
        for page in pages:
            assert page.console_errors() == []
    finally:
        for page in pages:
            page.driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, of which the second takes red for green, and some images."""
    folder = tmp_path_factory.mktemp("page")
    write_onnx(folder / "colours.onnx")
    write_onnx(folder / "swapped.onnx", order=(1, 0, 2))
    Image.new("RGB", (32, 24), GREENISH).save(folder / "greenish.png")
    Image.new("RGB", (640, 480), REDDISH).save(folder / f"reddish{'-with-a-long-name' * 8}.jpg")
    (folder / "broken.png").write_bytes(b"no image at all")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(folder / "log", folder / "colours.onnx", folder / "swapped.onnx", "--workers", 1) as running:
        yield running


def infer(folder: Path, image: Path, model: str = "colours.onnx") -> Any:
    """What `cifarx infer` says of it."""
    command = [PROGRAM, "infer", image, "--model", folder / model, "--top-k", "3", "--json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)[0]


def long_name(folder: Path) -> Path:
    (found,) = folder.glob("reddish*")
    return found


def test_chosen_image_is_answered_as_infer_answers(browse: Browse, server: Running, folder: Path) -> None:
    page = browse(server)
    page.wait_text("state", "ready")
    page.choose(folder / "greenish.png")
    expected = infer(folder, folder / "greenish.png")
    assert expected["label"] == "green"
    page.wait_text("best", expected["label"])
    assert page.texts("#bars .label") == [row["label"] for row in expected["top"]]
    assert page.texts("#bars .percent") == [f"{100 * row['score']:.1f}%" for row in expected["top"]]
    assert "compute" in page.text("times")
    assert "greenish.png, 32 \N{MULTIPLICATION SIGN} 24" in page.text("picture")
    assert page.driver.find_element(By.ID, "preview").is_displayed()
    spoken = page.driver.find_element(By.ID, "spoken").get_attribute("textContent")
    assert spoken.startswith("green, ")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_image_comes_by_drop_and_paste(browse: Browse, server: Running, folder: Path, way: str) -> None:
    page = browse(server)
    data = base64.b64encode((folder / "greenish.png").read_bytes()).decode()
    page.driver.execute_script(HAND_OVER, way, data, "handed.png")
    page.wait_text("best", "green")
    assert "handed.png" in page.text("picture")


def test_several_images_have_an_answer_or_the_server_s_words_each(
    browse: Browse, server: Running, folder: Path
) -> None:
    page = browse(server)
    files = [folder / "greenish.png", folder / "broken.png", long_name(folder)]
    page.choose(*files)
    page.wait(lambda: "at a time" in page.text("progress"), "the images are not answered")
    assert page.text("progress").startswith("2 of 3 images classified, 1 refused")
    assert page.texts("#results .file") == [file.name for file in files]
    assert page.texts("#results li li:first-child .label") == ["green", infer(folder, files[2])["label"]]
    assert page.texts("#results .problem") == [refusal(server, files[1])]


def test_broken_file_shows_the_server_s_words_until_a_sound_one_comes(
    browse: Browse, server: Running, folder: Path
) -> None:
    page = browse(server)
    page.choose(folder / "broken.png")
    page.wait_text("error-text", refusal(server, folder / "broken.png"))
    assert not page.driver.find_element(By.ID, "best").is_displayed()
    assert "which this browser cannot show" in page.text("picture")
    page.choose(folder / "greenish.png")
    page.wait_text("best", "green")
    assert not page.driver.find_element(By.ID, "error").is_displayed()


def refusal(server: Running, file: Path) -> str:
    reply = server.ask("POST", "/v1/predict", file.read_bytes(), content_type="image/png")
    assert reply.status == 400
    return str(reply.json["error"])


def test_everything_is_done_by_keyboard(browse: Browse, server: Running, folder: Path) -> None:
    page = browse(server)
    page.wait_text("state", "ready")
    page.driver.execute_cdp_cmd("Page.setInterceptFileChooserDialog", {"enabled": True})
    page.driver.execute_script(
        "window.opened = 0; document.getElementById('files').addEventListener('click', () => { window.opened += 1; });"
    )
    page.tab_to("files")
    ring = "return getComputedStyle(document.getElementById('drop')).outlineStyle"
    assert page.driver.execute_script(ring) == "solid"
    page.press(Keys.SPACE)
    page.press(Keys.ENTER)
    assert page.driver.execute_script("return window.opened") == 2
    page.choose(folder / "greenish.png")  # what a dialog of the system does
    page.wait_text("best", "green")

    page.open()
    page.wait(lambda: page.texts("#model option"), "no models")
    page.choose(folder / "greenish.png")
    page.wait_text("best", "green")
    page.tab_to("model")
    page.press(Keys.ARROW_DOWN)
    page.wait_text("best", "red")
    page.tab_to("top-k")
    page.press(Keys.ARROW_UP)
    page.wait(lambda: len(page.texts("#bars li")) == 2, "two classes were asked for")


def test_phone_has_no_sideways_scrolling(browse: Browse, server: Running, folder: Path) -> None:
    page = browse(server, phone=True)
    assert page.driver.execute_script("return innerWidth") == 360
    page.wait_text("state", "ready")
    assert not page.scrolls_sideways()
    page.choose(long_name(folder))
    page.wait_text("best", "red")
    assert not page.scrolls_sideways()
    page.choose(folder / "greenish.png", long_name(folder), folder / "broken.png")
    page.wait(lambda: "at a time" in page.text("progress"), "the images are not answered")
    assert not page.scrolls_sideways()
    page.open("/docs")
    page.wait(lambda: "/v1/predict" in page.text("openapi"), "no reference")
    assert not page.scrolls_sideways()


def test_latency_is_drawn_once_there_are_requests(browse: Browse, server: Running, folder: Path) -> None:
    page = browse(server)
    page.wait(lambda: "no requests seen" in page.text("plot"), "it does not measure")
    assert page.text("p50-now") == "-"

    def drawn() -> list[str]:
        page.choose(folder / "greenish.png")
        return page.driver.find_elements(By.CSS_SELECTOR, "#plot .p50-dot")

    page.wait(drawn, "no latency in the plot")
    assert page.text("p50-now").endswith(("µs", "ms", " s"))
    assert float(page.text("rate-now")) > 0
    assert page.text("plot-problem") == ""


def test_chosen_model_answers_and_is_described(browse: Browse, server: Running, folder: Path) -> None:
    page = browse(server)
    page.wait(lambda: page.texts("#model option") == ["colours", "swapped"], "no choice of models")
    page.choose(folder / "greenish.png")
    page.wait_text("best", "green")
    Select(page.driver.find_element(By.ID, "model")).select_by_value("swapped")
    page.wait_text("best", infer(folder, folder / "greenish.png", "swapped.onnx")["label"])
    assert page.text("best") == "red"
    assert "swapped.onnx" in page.text("spec")
    assert "carries no proof" in page.text("proof-what")
    assert not page.driver.find_element(By.ID, "verdict").is_displayed()


def test_api_key_is_asked_for_once(browse: Browse, folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("open-sesame\n")
    arguments = (folder / "colours.onnx", "--workers", 1, "--api-key-file", keys)
    with serving(tmp_path / "log", *arguments) as locked:
        page = browse(locked)
        form = page.driver.find_element(By.ID, "key-form")
        page.wait(form.is_displayed, "no key is asked for")
        assert page.driver.switch_to.active_element.get_attribute("id") == "key"
        page.press("wrong", Keys.ENTER)
        page.wait(lambda: page.text("key-problem").startswith("no API key, or a wrong one"), "a wrong key is taken")
        page.driver.find_element(By.ID, "key").clear()
        page.driver.find_element(By.ID, "key").send_keys("open-sesame", Keys.ENTER)
        page.wait(lambda: not form.is_displayed(), "the right key is not taken")
        page.choose(folder / "greenish.png")
        page.wait_text("best", "green")
        page.driver.refresh()
        page.wait(lambda: "colours.onnx" in page.text("spec"), "the key is forgotten")
        assert not page.driver.find_element(By.ID, "key-form").is_displayed()


def test_documentation_has_this_server_s_own_values(browse: Browse, server: Running) -> None:
    page = browse(server)
    page.open("/docs")
    origin = f"http://127.0.0.1:{server.port}"
    page.wait(lambda: "/v2/models/{model}/infer" in page.text("openapi"), "no reference")
    example = f"{origin}/v1/predict?model=colours"
    page.wait(lambda: any(example in code for code in page.texts("pre")), "no model in the examples")
    spec = page.text("schema-ModelSpec")
    assert "whether the file itself does what input says" in spec
    assert "Attributes" not in spec
