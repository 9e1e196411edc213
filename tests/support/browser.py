"""Headless Chromium with the pages of a server."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.server_process import ServerProcess

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE_S = 30
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,1000"),
    # A camera that shows a moving circle, which every page may use.
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)
PHONE = {
    "deviceMetrics": {"width": 360, "height": 780, "pixelRatio": 2, "touch": True},
    "userAgent": "Mozilla/5.0 (Linux; Android 14) Mobile",
}


class Page:
    """A page of a server in its own browser; `url` is the address under which the server is reached."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, path: str = "/") -> None:
        self.driver.get(f"{self.url}{path}")

    def text(self, name: str) -> str:
        return str(self.driver.find_element(By.ID, name).text)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def wait(self, condition: Callable[[], object], problem: str) -> None:
        # The page may replace an element between finding it and reading it.
        ignored = [StaleElementReferenceException]
        waiting = WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05, ignored_exceptions=ignored)
        waiting.until(lambda _: condition(), problem)

    def wait_text(self, name: str, expected: str) -> None:
        self.wait(lambda: self.text(name) == expected, f"#{name} is not {expected!r}")

    def choose(self, *files: Path) -> None:
        self.driver.find_element(By.ID, "files").send_keys("\n".join(map(str, files)))

    def press(self, *keys: str) -> None:
        """Send keys to the element that has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, name: str) -> None:
        """Move the focus to an element with the Tab key."""
        for _ in range(20):
            self.press(Keys.TAB)
            if self.driver.switch_to.active_element.get_attribute("id") == name:
                return
        pytest.fail(f"the Tab key does not reach #{name}")

    def scrolls_horizontally(self) -> bool:
        return bool(self.driver.execute_script("return document.documentElement.scrollWidth > innerWidth"))

    def console_errors(self) -> list[str]:
        """Return the errors in the console, except for responses with an error status, which browsers log too."""
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in errors if "Failed to load resource" not in message]


class Browser:
    """Opens the first page of servers, each in a browser with a profile below the directory."""

    def __init__(self, directory: Path) -> None:
        self.pages: list[Page] = []
        self._directory = directory

    def __call__(self, server: ServerProcess | str, phone: bool = False) -> Page:
        """Open the first page of a server, of which a URL may be given."""
        url = server if isinstance(server, str) else f"http://127.0.0.1:{server.port}"
        options = ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={self._directory / f'profile-{len(self.pages)}'}"):
            options.add_argument(flag)
        if phone:
            options.add_experimental_option("mobileEmulation", PHONE)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.accept_insecure_certs = True
        self.pages.append(Page(Chrome(options, Service(str(DRIVER))), url))
        self.pages[-1].open()
        return self.pages[-1]


@contextmanager
def open_browser(directory: Path) -> Iterator[Browser]:
    """Return a browser, or skip the test if there is none. At the end no script may have failed on its pages."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on the PATH")
    browser = Browser(directory)
    try:
        yield browser
        for page in browser.pages:
            assert page.console_errors() == []
    finally:
        for page in browser.pages:
            page.driver.quit()
