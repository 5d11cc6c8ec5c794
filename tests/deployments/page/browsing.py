"""A page in a real browser: Debian's Chromium, headless, and the page as a separate program."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.ports import free_port
from tests.deployments.service import interrupt, llava, read_until, started, until

# Longer than anything takes, even if the host pauses this machine for half a minute.
WAIT_S = 90.0
DESKTOP, PHONE = (1280, 860), (390, 844)


@contextlib.contextmanager
def serving_page(service: str, *options: str) -> Iterator[str]:
    """Yield the address of a page that `llava page` serves; the end of the block stops it like Ctrl-C."""
    port = free_port()
    with started(llava("page", "--url", service, "--port", str(port), *options)) as (process, _):
        read_until(process, f"http://127.0.0.1:{port}/")
        url = f"http://127.0.0.1:{port}"
        until(lambda: _answers(url))
        yield url
        interrupt(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == httpx.codes.OK
    except httpx.ConnectError:
        return False


@dataclass
class Browser:
    """One window, and a visitor's actions in it. Waits for conditions, never for a fixed time."""

    driver: webdriver.Chrome

    def open(self, url: str) -> None:
        # A page that is left aborts its requests, and may report that as errors.
        self.driver.get("about:blank")
        self.requested_urls()
        self.console_errors()
        self.driver.get(url)
        self.until(lambda: self.all("#box textarea"))

    def set_window(self, size: tuple[int, int], *, dark: bool = False) -> None:
        """Set the window's size, a phone's below 600 pixels; takes effect for the next page opened."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=size[0] < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def set_language(self, language: str) -> None:
        """Takes effect for the next page opened."""
        agent = self.driver.execute_script("return navigator.userAgent")
        self.command("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        self.until(lambda: self.all(selector))
        return self.all(selector)[0]

    def until(self, condition: Callable[[], object]) -> None:
        waiting = WebDriverWait(
            self.driver, WAIT_S, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        try:
            waiting.until(lambda _: condition())
        except TimeoutException as error:
            buttons = "[...document.querySelectorAll('#box button')].map((each) => each.className)"
            state = self.driver.execute_script(f"return [document.body.className, {buttons}, document.body.innerText]")
            raise AssertionError(f"not met in {WAIT_S:g} s: body, buttons of the box, text: {state}") from error

    def until_ready(self) -> None:
        self.one(".status.ready")

    def text(self, selector: str) -> str:
        """Return the text of all matching elements; empty if they have just changed."""
        try:
            return "\n".join(element.text for element in self.all(selector))
        except StaleElementReferenceException:
            return ""

    def until_shown(self, text: str, selector: str = "#talk .bot") -> None:
        self.until(lambda: text in self.text(selector))

    def until_idle(self) -> None:
        """Wait until the box takes questions."""
        self.until(lambda: self.all("body:not(.clearing) #box .submit-button"))

    def type(self, text: str) -> None:
        """Type into the box with keyboard events; a line feed is the key that sends."""
        self.one("#box textarea").send_keys(text.replace("\n", Keys.ENTER))

    def upload(self, *paths: Any) -> None:
        field = self.one("#box input[type=file]")
        # Otherwise the driver would also choose the files of last time.
        self.driver.execute_script("arguments[0].value = ''", field)
        field.send_keys("\n".join(map(str, paths)))
        self.until(lambda: len(self.all("#box .thumbnail-item")) == len(paths))

    def press(self, label: str) -> None:
        """Press the last button of this name in the conversation."""
        self.one(f'#talk button[aria-label="{label}"]')
        self.all(f'#talk button[aria-label="{label}"]')[-1].click()

    def setting(self, label: str) -> WebElement:
        """Return a field of the settings by its label."""
        found: list[WebElement] = []

        def find() -> list[WebElement]:
            fields = self.all("#settings label:has(textarea), #settings label:has(input)")
            found[:] = [field for field in fields if field.text.startswith(label)]
            return found

        self.until(find)
        return found[0].find_element(By.CSS_SELECTOR, "textarea, input")

    def requested_urls(self) -> list[str]:
        """Return the addresses that the browser has requested since the last call."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))  # type: ignore[no-untyped-call]
        sent = (message for message in messages if message["method"] == "Network.requestWillBeSent")
        return [str(message["params"]["request"]["url"]) for message in sent]

    def console_errors(self) -> list[str]:
        """Return the browser's error messages since the last call."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """Yield a new browser. Skips the test where none is installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # For root, in a container with little shared memory, without requests of the browser's own.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    for argument in ("disable-background-networking", "disable-component-update", "no-first-run"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser = Browser(window)
        browser.set_window(DESKTOP)
        yield browser
    finally:
        window.quit()
