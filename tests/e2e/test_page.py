"""The pages of `cifarx serve`, in headless Chromium with a running server."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from tests.support.browser import Browser, open_browser
from tests.support.color_model import write_onnx
from tests.support.server_process import PROGRAM, ServerProcess, run_server
from tests.support.spec_model import GRAYSCALE, RGB, make_spec, write_model

pytestmark = pytest.mark.slow

GREENISH, REDDISH = (100, 120, 90), (130, 100, 90)

# Dispatches the event of a browser when a file is dropped or pasted.
DISPATCH_FILE_EVENT = """
const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], arguments[2], {type: "image/png"}));
const event = arguments[0] === "drop" ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
  : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
document.getElementById("drop").dispatchEvent(event);
"""


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Browser]:
    """Open the first page of a server: `browse(server, phone=True)`."""
    with open_browser(tmp_path) as browser:
        yield browser


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two models, of which the second confuses red with green, and some images."""
    directory = tmp_path_factory.mktemp("page")
    write_onnx(directory / "colors.onnx")
    write_onnx(directory / "swapped.onnx", order=(1, 0, 2))
    Image.new("RGB", (32, 24), GREENISH).save(directory / "greenish.png")
    Image.new("RGB", (640, 480), REDDISH).save(directory / f"reddish{'-with-a-long-name' * 8}.jpg")
    (directory / "broken.png").write_bytes(b"no image at all")
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[ServerProcess]:
    with run_server(
        directory / "log", directory / "colors.onnx", directory / "swapped.onnx", "--workers", 1
    ) as running:
        yield running


def infer(directory: Path, image: Path, model: str = "colors.onnx") -> Any:
    """Return the prediction of `cifarx infer`."""
    command: list[str | Path] = [PROGRAM, "infer", image, "--model", directory / model, "--top-k", "3", "--json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)[0]


def image_with_long_name(directory: Path) -> Path:
    (path,) = directory.glob("reddish*")
    return path


def test_the_prediction_is_that_of_infer(browse: Browser, server: ServerProcess, directory: Path) -> None:
    page = browse(server)
    page.wait_text("state", "ready")
    page.choose(directory / "greenish.png")
    expected = infer(directory, directory / "greenish.png")
    assert expected["label"] == "green"
    page.wait_text("best", expected["label"])
    assert page.texts("#bars .label") == [row["label"] for row in expected["top"]]
    assert page.texts("#bars .percent") == [f"{100 * row['score']:.1f}%" for row in expected["top"]]
    assert "compute" in page.text("times")
    assert "greenish.png, 32 \N{MULTIPLICATION SIGN} 24" in page.text("picture")
    assert page.driver.find_element(By.ID, "preview").is_displayed()
    spoken = page.driver.find_element(By.ID, "spoken").get_attribute("textContent")
    assert str(spoken).startswith("green, ")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_images_can_be_dropped_and_pasted(browse: Browser, server: ServerProcess, directory: Path, event: str) -> None:
    page = browse(server)
    data = base64.b64encode((directory / "greenish.png").read_bytes()).decode()
    page.driver.execute_script(DISPATCH_FILE_EVENT, event, data, "transferred.png")
    page.wait_text("best", "green")
    assert "transferred.png" in page.text("picture")


def test_each_of_several_images_has_a_prediction_or_an_error(
    browse: Browser, server: ServerProcess, directory: Path
) -> None:
    page = browse(server)
    files = [directory / "greenish.png", directory / "broken.png", image_with_long_name(directory)]
    page.choose(*files)
    page.wait(lambda: "at a time" in page.text("progress"), "the images are not classified")
    assert page.text("progress").startswith("2 of 3 images classified, 1 failed")
    assert page.texts("#results .file") == [file.name for file in files]
    assert page.texts("#results li li:first-child .label") == ["green", infer(directory, files[2])["label"]]
    assert page.texts("#results .problem") == [error_message(server, files[1])]


def test_the_error_of_an_invalid_file_is_shown_until_the_next_prediction(
    browse: Browser, server: ServerProcess, directory: Path
) -> None:
    page = browse(server)
    page.choose(directory / "broken.png")
    page.wait_text("error-text", error_message(server, directory / "broken.png"))
    assert not page.driver.find_element(By.ID, "best").is_displayed()
    assert "which this browser cannot show" in page.text("picture")
    page.choose(directory / "greenish.png")
    page.wait_text("best", "green")
    assert not page.driver.find_element(By.ID, "error").is_displayed()


def error_message(server: ServerProcess, file: Path) -> str:
    reply = server.request("POST", "/v1/predict", file.read_bytes(), content_type="image/png")
    assert reply.status == 400
    return str(reply.json["error"])


def test_the_page_can_be_used_with_the_keyboard(browse: Browser, server: ServerProcess, directory: Path) -> None:
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
    page.choose(directory / "greenish.png")  # as the file dialog does
    page.wait_text("best", "green")

    page.open()
    page.wait(lambda: page.texts("#model option"), "the models are not listed")
    page.choose(directory / "greenish.png")
    page.wait_text("best", "green")
    page.tab_to("model")
    page.press(Keys.ARROW_DOWN)
    page.wait_text("best", "red")
    page.tab_to("top-k")
    page.press(Keys.ARROW_UP)
    page.wait(lambda: len(page.texts("#bars li")) == 2, "top-k is not 2")


def test_a_phone_does_not_scroll_horizontally(browse: Browser, server: ServerProcess, directory: Path) -> None:
    page = browse(server, phone=True)
    assert page.driver.execute_script("return innerWidth") == 360
    page.wait_text("state", "ready")
    assert not page.scrolls_horizontally()
    page.choose(image_with_long_name(directory))
    page.wait_text("best", "red")
    assert not page.scrolls_horizontally()
    page.choose(directory / "greenish.png", image_with_long_name(directory), directory / "broken.png")
    page.wait(lambda: "at a time" in page.text("progress"), "the images are not classified")
    assert not page.scrolls_horizontally()
    page.open("/docs")
    page.wait(lambda: "/v1/predict" in page.text("openapi"), "the reference is not shown")
    assert not page.scrolls_horizontally()


def test_latency_is_plotted_after_requests(browse: Browser, server: ServerProcess, directory: Path) -> None:
    page = browse(server)
    page.wait(lambda: "no requests yet" in page.text("plot"), "it does not poll")
    assert page.text("p50-now") == "-"

    def plotted() -> object:
        page.choose(directory / "greenish.png")
        return page.driver.find_elements(By.CSS_SELECTOR, "#plot .p50-dot")

    page.wait(plotted, "no latency is plotted")
    assert page.text("p50-now").endswith(("µs", "ms", " s"))
    assert float(page.text("rate-now")) > 0
    assert page.text("plot-problem") == ""


def test_the_selected_model_is_used_and_described(browse: Browser, server: ServerProcess, directory: Path) -> None:
    page = browse(server)
    page.wait(lambda: page.texts("#model option") == ["colors", "swapped"], "the models are not listed")
    page.choose(directory / "greenish.png")
    page.wait_text("best", "green")
    Select(page.driver.find_element(By.ID, "model")).select_by_value("swapped")
    page.wait_text("best", infer(directory, directory / "greenish.png", "swapped.onnx")["label"])
    assert page.text("best") == "red"
    assert "swapped.onnx" in page.text("spec")
    assert page.text("parity-description").startswith("The file has no parity report")
    assert not page.driver.find_element(By.ID, "verdict").is_displayed()


def test_versions_of_a_model_are_listed_and_used(browse: Browser, directory: Path, tmp_path: Path) -> None:
    files = (f"colors@1={directory / 'colors.onnx'}", f"colors@2={directory / 'swapped.onnx'}")
    with run_server(tmp_path / "log", *files, "--workers", 1) as server:
        page = browse(server)
        page.wait(lambda: page.texts("#model option") == ["colors@1", "colors@2"], "the versions are not listed")
        page.choose(directory / "greenish.png")
        page.wait_text("best", "green")
        Select(page.driver.find_element(By.ID, "model")).select_by_value("colors@2")
        page.wait_text("best", "red")


def test_the_api_key_is_requested_once(browse: Browser, directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("open-sesame\n")
    arguments = (directory / "colors.onnx", "--workers", 1, "--api-key-file", keys)
    with run_server(tmp_path / "log", *arguments) as protected:
        page = browse(protected)
        form = page.driver.find_element(By.ID, "key-form")
        page.wait(form.is_displayed, "no key is requested")
        assert page.driver.switch_to.active_element.get_attribute("id") == "key"
        page.press("wrong", Keys.ENTER)
        page.wait(lambda: page.text("key-problem").startswith("missing or invalid API key"), "a wrong key is accepted")
        page.driver.find_element(By.ID, "key").clear()
        page.driver.find_element(By.ID, "key").send_keys("open-sesame", Keys.ENTER)
        page.wait(lambda: not form.is_displayed(), "the right key is not accepted")
        page.choose(directory / "greenish.png")
        page.wait_text("best", "green")
        page.driver.refresh()
        page.wait(lambda: "colors.onnx" in page.text("spec"), "the key is forgotten")
        assert not page.driver.find_element(By.ID, "key-form").is_displayed()


def test_the_documentation_has_the_values_of_the_server(browse: Browser, server: ServerProcess) -> None:
    page = browse(server)
    page.open("/docs")
    origin = f"http://127.0.0.1:{server.port}"
    page.wait(lambda: "/v2/models/{model}/infer" in page.text("openapi"), "the reference is not shown")
    example = f"{origin}/v1/predict?model=colors"
    page.wait(lambda: any(example in code for code in page.texts("pre")), "no model in the examples")
    spec = page.text("schema-ModelSpec")
    assert "whether the file itself does the preprocessing that input describes" in spec
    assert "Attributes" not in spec


def test_several_labels_and_what_was_assumed_are_shown(browse: Browser, directory: Path, tmp_path: Path) -> None:
    letterbox = msgspec.structs.replace(RGB, resize="letterbox", fill=114)
    spec = make_spec(letterbox, activation="sigmoid", thresholds=(0.6, 0.9, 0.1), assumed=("class_names", "output"))
    with run_server(tmp_path / "log", write_model(tmp_path / "labels.onnx", spec), "--workers", 1) as running:
        page = browse(running)
        page.wait(lambda: "labels.onnx" in page.text("spec"), "the model is not described")
        assert page.text("assumed").startswith("ASSUMED: class names, output.")
        assert "several labels per image, each from a score of 10.0% to 90.0%" in page.text("spec")
        assert "fits them into 6 \N{MULTIPLICATION SIGN} 4 (bilinear) and pads the rest" in page.text("spec")
        assert page.texts("#spec .badge") == ["ASSUMED", "ASSUMED"]
        Select(page.driver.find_element(By.ID, "top-k")).select_by_value("1")
        page.choose(directory / "greenish.png")
        prediction = infer(directory, directory / "greenish.png", str(tmp_path / "labels.onnx"))
        labels = [candidate["label"] for candidate in prediction["labels"]]
        assert labels == ["blue"]  # not the best one, which does not reach its threshold
        page.wait_text("best", "blue")
        assert page.texts("#bars .label") == [prediction["label"], "blue"]
        assert page.texts("#bars .applies .label") == ["blue"]
        Image.new("RGB", (6, 4), (61, 54, 0)).save(tmp_path / "none.png")
        page.choose(tmp_path / "none.png")
        page.wait_text("best", "No label applies")
        page.choose(tmp_path / "none.png", directory / "greenish.png")
        page.wait(lambda: "at a time" in page.text("progress"), "the images are not classified")
        assert page.texts("#results .quiet") == ["No label applies"]
        assert page.texts("#results .applies .label") == ["blue"]
        page.open("/docs")
        page.wait(lambda: "labels" in page.text("guide"), "no model in the guide")
        page.wait(lambda: page.driver.find_element(By.ID, "crops").is_displayed(), "the crop is not mentioned")


def test_a_grayscale_network_in_nhwc_is_described(browse: Browser, tmp_path: Path) -> None:
    spec = make_spec(
        msgspec.structs.replace(GRAYSCALE, layout="NHWC", resize_to=(8, 10)),
        class_names=("no", "yes"),
        output="probabilities",
        activation="sigmoid",
        outputs=1,
    )
    with run_server(tmp_path / "log", write_model(tmp_path / "gray.onnx", spec), "--workers", 1) as running:
        page = browse(running)
        page.wait(lambda: "gray.onnx" in page.text("spec"), "the model is not described")
        assert not page.driver.find_element(By.ID, "assumed").is_displayed()
        assert "grayscale; the server takes images of any size and resizes them to 10" in page.text("spec")
        assert "yes from a score of 50.0%, otherwise no" in page.text("spec")
        Image.new("RGB", (9, 5), "white").save(tmp_path / "white.png")
        page.choose(tmp_path / "white.png")
        page.wait_text("best", "yes")
        page.open("/docs")
        page.wait(lambda: any('"shape": [1, 4, 6, 1]' in code for code in page.texts("pre")), "no shape in the guide")
        [example] = [code for code in page.texts("pre") if "InferInput" in code]
        for words in ('.convert("L")', "[..., None]", 'InferRequestedOutput("probabilities"'):
            assert words in example
        assert "transpose" not in example
