"""The page in a real browser in front of the real gateway, whose answers are scripted: what a visitor can do, and what
they read when something is wrong."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver.common.keys import Keys

from benchmarks.ports import free_port
from deployments.messages import Rejected
from llava_core.errors import ImageError, OverloadedError
from llava_core.types import GenerationRequest, ImagePart, TextPart
from llava_core.views import DicomView
from tests.deployments.fakes import ScriptedEngine, answer
from tests.deployments.page.browsing import DESKTOP, PHONE, Browser, browsing, serving_page
from tests.deployments.pictures import plain
from tests.dicom_files import dicom, radiograph
from tests.sockets import serving_engine

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(answer("A red ", "circle.", stage_ms={"prefill": 20.0, "decode": 10.0}))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "log"


@pytest.fixture(scope="module")
def page(kept: Path) -> Iterator[tuple[str, int]]:
    """The page's address, and the port at which it asks a service. One page for all tests: it takes seconds to start,
    and keeps nothing of a visitor except what that visitor agrees to."""
    port = free_port()
    with serving_page(f"http://127.0.0.1:{port}", "--log", str(kept), "--log-days", "7") as url:
        yield url, port


@pytest.fixture
def url(page: tuple[str, int], engine: ScriptedEngine) -> Iterator[str]:
    """The address of the page, with this test's engine behind it."""
    url, port = page
    with serving_engine(engine, port=port):
        yield url


@pytest.fixture
def browser(window: Browser, url: str) -> Iterator[Browser]:
    """A browser with the page freshly opened."""
    window.set_window(DESKTOP)
    window.open(url)
    window.until_ready()
    yield window
    window.driver.get("about:blank")


def last(engine: ScriptedEngine) -> GenerationRequest:
    request = engine.requests[-1]
    assert isinstance(request, GenerationRequest)
    return request


def pictures(request: GenerationRequest) -> list[list[bytes]]:
    """Return the pictures of each message."""
    return [[part.data for part in message.parts if isinstance(part, ImagePart)] for message in request.messages]


def views(request: GenerationRequest) -> list[DicomView | None]:
    return [part.dicom for message in request.messages for part in message.parts if isinstance(part, ImagePart)]


def texts(request: GenerationRequest) -> list[str]:
    return [part.text for message in request.messages for part in message.parts if isinstance(part, TextPart)]


def test_questions_with_pictures_in_any_turn_are_answered_with_figures(
    browser: Browser, engine: ScriptedEngine, tmp_path: Path
) -> None:
    colours = ("red", "blue", "green")
    for colour in colours:
        (tmp_path / f"{colour}.png").write_bytes(plain(colour))
    browser.upload(tmp_path / "red.png", tmp_path / "blue.png")
    browser.type("Which colours?\n")
    browser.until_shown("2 tokens · 100 tokens/s")
    browser.until_shown("prefill 20 ms · decode 10 ms")
    browser.until_idle()
    browser.type("What now?\n")
    browser.until(lambda: len(engine.requests) == 2)
    browser.until_idle()
    browser.upload(tmp_path / "green.png")
    browser.type("And this?\n")
    browser.until(lambda: len(engine.requests) == 3)
    assert pictures(last(engine)) == [[plain("red"), plain("blue")], [], [], [], [plain("green")]]
    assert texts(last(engine)) == ["Which colours?", "A red circle.", "What now?", "A red circle.", "And this?"]


def test_a_pasted_picture_is_sent(browser: Browser, engine: ScriptedEngine) -> None:
    browser.driver.execute_script(
        """
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(arguments[0])], "image.png", {type: "image/png"}));
        const paste = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
        document.querySelector("#box textarea").dispatchEvent(paste);
        """,
        list(plain("pink")),
    )
    browser.one("#box .thumbnail-item")
    browser.type("What?\n")
    browser.until_shown("A red circle.")
    assert pictures(last(engine)) == [[plain("pink")]]


def test_a_dicom_file_is_sent_unchanged_with_the_chosen_window(
    browser: Browser, engine: ScriptedEngine, tmp_path: Path
) -> None:
    file = dicom(radiograph())
    for name in ("study.dcm", "IM-0001"):
        (tmp_path / name).write_bytes(file)
    browser.upload(tmp_path / "study.dcm", tmp_path / "IM-0001")
    browser.type("What is seen?\n")
    browser.until_shown("A red circle.")
    assert pictures(last(engine)) == [[file, file]]
    assert views(last(engine)) == [None, None]
    browser.until_idle()
    browser.one("#settings .toggle-button").click()
    browser.setting("DICOM window").send_keys("2048,1024")
    browser.press("Retry")
    browser.until(lambda: len(engine.requests) == 2)
    assert views(last(engine)) == [DicomView(window=(2048.0, 1024.0))] * 2


def test_an_example_is_asked_with_its_picture(browser: Browser, engine: ScriptedEngine) -> None:
    browser.one("#talk .example").click()
    browser.until_shown("A red circle.")
    assert texts(last(engine)) == ["Describe the picture."]
    assert pictures(last(engine)) == [[Path("deployments/scene.png").read_bytes()]]


def test_escape_stops_an_answer_and_keeps_its_beginning(browser: Browser, engine: ScriptedEngine) -> None:
    engine.items, engine.hangs = answer("Only ", "this")[:1], True
    browser.type("What?\n")
    browser.until_shown("Only")
    assert engine.num_open == 1
    browser.one("body").send_keys(Keys.ESCAPE)
    browser.until(lambda: engine.num_open == 0)
    browser.until_shown("stopped")
    browser.until_idle()
    engine.items, engine.hangs = answer("All", "."), False
    # The slash focuses the box, and is not typed there.
    browser.driver.execute_script("document.activeElement.blur()")
    browser.one("body").send_keys("/")
    browser.driver.switch_to.active_element.send_keys("Go on", Keys.ENTER)
    browser.until_shown("All.")
    assert texts(last(engine)) == ["What?", "Only ", "Go on"]


def visible_buttons(browser: Browser) -> list[str]:
    """Return the names of the conversation's buttons."""
    names: list[str] = browser.driver.execute_script(
        "return [...document.querySelectorAll('#talk button[aria-label]')]"
        ".filter(button => button.checkVisibility({visibilityProperty: true})).map(button => button.ariaLabel)"
    )
    return names


@pytest.fixture
def german(window: Browser, browser: Browser, url: str) -> Iterator[Browser]:
    """The page in a browser whose language Gradio translates the names of its buttons to."""
    window.set_language("de-DE")
    window.open(url)
    window.until_ready()
    yield browser
    window.set_language("en-US")


def test_no_button_sends_a_picture_to_somebody_else(german: Browser) -> None:
    german.one("#talk .example").click()
    german.until_shown("A red circle.")
    german.until_idle()
    mine, answers = ["Copy message", "Bearbeiten"], ["Copy message", "Wiederholen", "Gefällt mir nicht", "Gefällt mir"]
    german.until(lambda: visible_buttons(german) == ["Chat leeren", "Fullscreen", *mine, *answers, "Feedback"])
    german.all('#talk button[aria-label="Bearbeiten"]')[0].click()
    mine = ["Senden", "Abbrechen"]
    german.until(lambda: visible_buttons(german) == ["Chat leeren", "Fullscreen", *mine, *answers, "Feedback"])


def test_nothing_else_is_asked_while_an_answer_is_written(browser: Browser, engine: ScriptedEngine) -> None:
    engine.items, engine.hangs = answer("Only ", "this")[:1], True
    browser.type("What?\n")
    browser.until_shown("Only")
    browser.type("And now?\n")
    browser.until(lambda: visible_buttons(browser) == ["Clear"])
    browser.one("body").send_keys(Keys.ESCAPE)
    browser.until_idle()
    assert len(engine.requests) == 1
    engine.items, engine.hangs = answer("All", "."), False
    # What was typed is still there.
    browser.type("\n")
    browser.until_shown("All.")
    assert texts(last(engine)) == ["What?", "Only ", "And now?"]


@pytest.mark.parametrize("sends", ["submit.click()", "area.dispatchEvent(enter)"])
def test_no_question_overtakes_the_clearing_of_the_conversation(
    german: Browser, engine: ScriptedEngine, sends: str
) -> None:
    german.one("#talk .example").click()
    german.until_shown("A red circle.")
    german.until_idle()
    german.type("Fresh?")
    german.driver.execute_script(
        "const find = (selector) => document.querySelector(selector);"
        "const [submit, area] = [find('#box .submit-button'), find('#box textarea')];"
        "const enter = new KeyboardEvent('keypress', {key: 'Enter', bubbles: true, cancelable: true});"
        f"find('#talk button[aria-label=\"Chat leeren\"]').click(); {sends}"
    )
    german.until_idle()
    assert len(engine.requests) == 1
    german.type("\n")
    german.until_shown("A red circle.")
    assert texts(last(engine)) == ["Fresh?"]


def test_closing_the_browser_cancels_its_request(url: str, engine: ScriptedEngine) -> None:
    engine.items, engine.hangs = answer("Only ", "this")[:1], True
    with browsing() as browser:
        browser.open(url)
        browser.until_ready()
        browser.type("What?\n")
        browser.until_shown("Only")
        assert engine.num_open == 1
    # The browser has been closed.
    with browsing() as browser:
        browser.until(lambda: engine.num_open == 0)
    assert engine.num_left_early == 1


def test_regenerating_editing_and_clearing(browser: Browser, engine: ScriptedEngine) -> None:
    browser.one("#talk .example").click()
    browser.until_shown("A red circle.")
    browser.until_idle()
    engine.items = answer("A blue ", "square.")
    browser.press("Retry")
    browser.until_shown("A blue square.")
    browser.until_idle()
    assert texts(last(engine)) == ["Describe the picture."]
    browser.type("Second?\n")
    browser.until(lambda: len(browser.all("#talk .bot-row")) == 2)
    browser.until_idle()
    browser.all('#talk button[aria-label="Edit"]')[0].click()
    field = browser.one("#talk textarea")
    field.clear()
    field.send_keys("Edited?")
    browser.press("Submit")
    browser.until(lambda: len(engine.requests) == 4)
    browser.until(lambda: len(browser.all("#talk .bot-row")) == 1)
    browser.until_idle()
    # About the same picture, and without the later turns.
    assert texts(last(engine)) == ["Edited?"]
    assert last(engine).num_images == 1
    browser.type("Third?\n")
    browser.until(lambda: len(browser.all("#talk .bot-row")) == 2)
    browser.until_idle()
    browser.press("Edit")
    field = browser.one("#talk textarea")
    assert field.get_attribute("value") == "Third?"
    field.send_keys(" Now?")
    browser.press("Submit")
    browser.until(lambda: len(engine.requests) == 6)
    browser.until_idle()
    assert texts(last(engine)) == ["Edited?", "A blue square.", "Third? Now?"]
    browser.type("Fresh")
    browser.press("Clear")
    browser.one("#talk .example")
    browser.until_idle()
    # What was being typed is still there.
    browser.type("?\n")
    browser.until_shown("A blue square.")
    assert texts(last(engine)) == ["Fresh?"]


def test_the_chosen_settings_are_sent(browser: Browser, engine: ScriptedEngine) -> None:
    browser.one("#settings .toggle-button").click()
    for label, value in (("System prompt", "Be brief."), ("Seed", "7"), ("API key", "secret-key")):
        browser.setting(label).send_keys(value)
    number = browser.one('#settings input[aria-label^="number input for Temperature"]')
    number.clear()
    number.send_keys("0.5", Keys.TAB)
    template = browser.one('#settings input[aria-label="Template"]')
    template.click()
    template.send_keys(Keys.CONTROL, "a")
    template.send_keys("vicuna_v1", Keys.ENTER)
    browser.type("What?\n")
    browser.until_shown("A red circle.")
    request = last(engine)
    assert (request.system, request.template) == ("Be brief.", "vicuna_v1")
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.max_tokens) == (0.5, 7, 512)


def test_votes_and_conversations_are_kept_only_with_consent(browser: Browser, kept: Path) -> None:
    def lines() -> list[dict[str, object]]:
        return [json.loads(line) for path in kept.glob("*.json") for line in path.read_text().splitlines()]

    browser.type("Unkept?\n")
    browser.until_shown("A red circle.")
    browser.until_idle()
    browser.press("Like")
    browser.until_shown("Tick the box", ".toast-body")
    assert lines() == []
    assert "for 7 days" in browser.one("#consent details p").get_attribute("textContent")
    browser.one("#agreed input").click()
    browser.type("Kept?\n")
    browser.until(lambda: len(lines()) == 1)
    browser.until_idle()
    browser.press("Dislike")
    browser.until(lambda: len(lines()) == 2)
    browser.press("Feedback")
    browser.all("#talk .extra-feedback-option")[-1].click()
    browser.until(lambda: len(lines()) == 3)
    assert [line["type"] for line in lines()] == ["chat", "downvote", "flag"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OverloadedError("the engine is full", limit="engine", retry_after_s=4), "Try again in 4 seconds."),
        (Rejected(ImageError("the picture is larger than 20971520 bytes")), "Try another file"),
    ],
)
def test_errors_say_what_to_do(browser: Browser, engine: ScriptedEngine, error: object, expected: str) -> None:
    good, engine.items = engine.items, [error]  # type: ignore[list-item]
    browser.type("What?\n")
    browser.until_shown(expected)
    browser.until_idle()
    engine.items = good
    browser.press("Retry")
    browser.until_shown("A red circle.")


def test_a_page_opened_before_the_service_connects_by_itself(window: Browser, engine: ScriptedEngine) -> None:
    with serving_engine(engine) as service:
        port = urlsplit(service).port or 0
    with serving_page(service) as page:
        window.open(page)
        window.until_shown("may still be starting", ".status")
        window.type("Too early?\n")
        window.until_shown("may still be starting")
        with serving_engine(engine, port=port):
            window.until_ready()
            window.until_idle()
            window.press("Retry")
            window.until_shown("A red circle.")
        window.driver.get("about:blank")


def test_two_visitors_do_not_see_each_other(browser: Browser, url: str, engine: ScriptedEngine) -> None:
    browser.type("Mine?\n")
    browser.until_shown("A red circle.")
    with browsing() as other:
        other.open(url)
        other.until_ready()
        assert "Mine?" not in other.text("body")
        other.type("Theirs?\n")
        other.until_shown("A red circle.")
        assert texts(last(engine)) == ["Theirs?"]
    browser.until_idle()
    browser.type("Mine again?\n")
    browser.until(lambda: len(engine.requests) == 3)
    assert texts(last(engine)) == ["Mine?", "A red circle.", "Mine again?"]


def test_no_answer_makes_the_browser_contact_another_host(browser: Browser, url: str, engine: ScriptedEngine) -> None:
    engine.items = answer("![seen](http://192.0.2.1/leak.png) ", '<img src="http://192.0.2.1/x.png"> done')
    browser.type("What?\n")
    browser.until_shown("done")
    browser.until_idle()
    asked = {urlsplit(address).netloc for address in browser.requested_urls() if address.startswith("http")}
    assert asked - {urlsplit(url).netloc} <= {"192.0.2.1"}
    # Refused by the page's policy before anything was sent.
    assert any("Content Security Policy" in error for error in browser.console_errors()) or asked == {
        urlsplit(url).netloc
    }


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_page_fits_its_window_in_light_and_dark_mode(
    window: Browser, url: str, size: tuple[int, int], *, dark: bool
) -> None:
    window.set_window(size, dark=dark)
    window.open(url)
    window.until_ready()
    window.one("#talk .example").click()
    window.until_shown("A red circle.")
    window.until_idle()
    width, height = window.driver.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    )
    assert (width, height) <= size
    box = window.one("#box").rect
    assert box["y"] + box["height"] < size[1]
    [red, green, blue] = map(
        int, re.findall(r"\d+", window.one("gradio-app").value_of_css_property("background-color"))[:3]
    )
    assert (red + green + blue < 200) == dark
    assert window.console_errors() == []
    window.driver.get("about:blank")
