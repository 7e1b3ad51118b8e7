"""The report in a real browser: it opens, sorts, switches and tells, by pointer and by keys, and asks for nothing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from loraq.html_report import write_report
from loraq.html_report.embedding import FACTOR
from suites import NASTY, suite

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--window-size=1280,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    whole = suite(folder, cells=9)
    cells = whole.cells
    nasty = attrs.evolve(cells[1], label=NASTY)
    same = attrs.evolve(cells[5], error_after=cells[2].error_after)  # of the same size, too
    return write_report(attrs.evolve(whole, cells=(cells[0], nasty, *cells[2:5], same, *cells[6:])), folder)


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report, opened anew; in the end there must have been no message on the console, and no request."""
    resize(browser, 1280)
    emulate(browser)
    browser.get(report.as_uri())
    browser.execute_script("localStorage.clear(); delete document.documentElement.dataset.theme")
    yield browser
    assert browser.get_log("browser") == []
    names = browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    assert browser.execute_script("return window.hacked") is None


def resize(browser: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def emulate(browser: Any, scheme: str = "light", media: str = "") -> None:
    """A system with this colour scheme; nothing scrolls slowly, so that a press meets what it is meant for."""
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    told = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": told})


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def every(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements("css selector", selector))


def press(page: Any, node: Any, keys: str) -> None:
    page.execute_script("arguments[0].focus()", node)
    node.send_keys(keys)


def hover(page: Any, node: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", node)
    ActionChains(page).move_to_element(node).perform()


def eventually(question: Callable[[], Any]) -> Any:
    """The first true answer: sizes are known, and drawing happens, a frame later."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(None, 10, poll_frequency=0.05).until(lambda _: question())


def column(page: Any, title: str) -> tuple[Any, list[float | None]]:
    """The head of a figure's column, and its figures from top to bottom."""
    (head,) = [each for each in every(page, "thead th") if each.text.split("\n")[0].strip() == title]
    place = page.execute_script(
        """const second = document.querySelector('thead').rows[1].cells;
        return 1 + [...second].indexOf(arguments[0]);""",
        head,
    )
    found = page.execute_script(
        "return [...document.querySelectorAll('tbody.cells tr')].map((row) => row.cells[arguments[0]]?.dataset.value)",
        place,
    )
    return head, [float(value) if value else None for value in found]


def test_opens_with_everything_drawn(page: Any) -> None:
    assert eventually(lambda: len(every(page, ".panel svg")) == 2)
    assert len(every(page, "#m0-plot .panel")) == 2
    assert len(every(page, ".card img")) == 2 * 3
    label = every(page, "tbody.cells th a")[1]
    assert label.text == NASTY


def test_sorts_by_click_and_by_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    head, values = column(page, "after")
    head.find_element("css selector", "button").click()
    head, values = column(page, "after")
    numbers = [value for value in values if value is not None]
    assert head.get_attribute("aria-sort") == "ascending"
    assert numbers == sorted(numbers)
    assert values[-1] is None, "what failed is last"
    head, _ = column(page, "mean, dB")
    button = head.find_element("css selector", "button")
    for key, direction in ((Keys.ENTER, "descending"), (Keys.SPACE, "ascending")):  # the best first, then the other way
        press(page, button, key)
        head, values = column(page, "mean, dB")
        assert head.get_attribute("aria-sort") == direction
        numbers = [value for value in values if value is not None]
        assert numbers == sorted(numbers, reverse=direction == "descending")
        assert values[-1] is None
    sorted_heads = every(page, "thead th[aria-sort$='cending']")
    assert len(sorted_heads) == 1
    assert "ascending" in page.execute_script("return document.querySelector('[data-sorted]').textContent")


def test_the_theme_follows_the_system_and_the_button(page: Any) -> None:
    def ground() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    def ramp() -> str:  # drawn a frame later than the page is told of its theme
        script = """const found = () => arguments[0](document.querySelector('.ramp canvas').toDataURL());
        requestAnimationFrame(() => requestAnimationFrame(found));"""
        return str(page.execute_async_script(script))

    light, bright = ground(), ramp()
    emulate(page, "dark")
    dark = ground()
    assert light != dark
    assert eventually(lambda: ramp() != bright), "the colours turn with the theme"
    one(page, "#theme").click()
    assert ground() == light
    assert eventually(lambda: ramp() == bright)
    one(page, "#theme").click()
    assert ground() == dark
    emulate(page, "light")
    assert ground() == dark, "a choice holds"


@pytest.mark.parametrize("width", [1280, 400])
def test_names_in_the_plot_do_not_overlap_and_points_tell(page: Any, width: int) -> None:
    resize(page, width)
    assert eventually(lambda: every(page, ".panel svg .name"))
    boxes = page.execute_script(
        """const corners = (box) => [box.x, box.y + 2, box.x + box.width, box.y + box.height - 2];
        return [...document.querySelectorAll('.panel svg')].map((svg) =>
          [...svg.querySelectorAll('.name')].map((node) => corners(node.getBBox())));"""
    )
    assert all(len(panel) >= 4 for panel in boxes)
    for panel in boxes:
        for first, second in itertools.combinations(panel, 2):
            apart = first[0] >= second[2] or second[0] >= first[2] or first[1] >= second[3] or second[1] >= first[3]
            assert apart, (first, second)
    marks = page.execute_script(
        """const corner = (box) => [Math.round(box.x), Math.round(box.y)];
        return [...document.querySelectorAll('.panel svg')].map((svg) =>
          [...svg.querySelectorAll('.shape')].map((node) => corner(node.getBoundingClientRect())));"""
    )
    assert all(len(set(map(tuple, panel))) == 9 for panel in marks), "no point hides another"
    point = every(page, ".panel .point")[0]
    hover(page, point)
    told = eventually(lambda: one(page, "#tip").text)
    assert told.split("\n")[0] in point.get_attribute("aria-label")
    assert "bits a weight" in told
    lit = every(page, "tbody.cells tr.lit")
    assert [each.get_attribute("data-cell") for each in lit] == [point.get_attribute("data-cell")]


def test_the_arrow_keys_go_through_the_points(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    eventually(lambda: every(page, ".panel svg"))
    (start,) = every(page, ".panel:first-child .point[tabindex='0']")
    told = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT):
        press(page, start if not told else page.switch_to.active_element, key)
        told.append(one(page, "#tip").text.split("\n")[0])
    assert len(set(told)) == 4  # 1, 2, 1, 0 and round to the last
    assert told[0] == told[2]


def test_the_plots_axes_are_switched(page: Any) -> None:
    eventually(lambda: every(page, ".panel svg"))
    labels = "return [...document.querySelectorAll('.panel svg')].map((svg) => svg.getAttribute('aria-label'))"
    assert page.execute_script(labels) == ["weight error against bits a weight", "psnr, dB against bits a weight"]
    hidden = every(page, "[data-size] input")[1]
    page.execute_script("arguments[0].click()", hidden)
    select = every(page, ".panel select")[0]
    press(page, select, "psnr less")
    assert page.execute_script(labels) == [
        "psnr less the baseline's, dB against packed bytes",
        "psnr, dB against packed bytes",
    ]
    points = every(page, ".panel svg")[0].find_elements("css selector", ".whisker")
    assert len(points) == 8  # the baseline has no difference to itself


def test_the_strip_tells_by_pointer_and_by_keys(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    lanes = one(page, ".lanes")
    hover(page, one(page, ".lanes canvas"))
    assert eventually(lambda: one(page, "#tip").text).startswith("blocks.")
    press(page, lanes, Keys.ARROW_RIGHT)
    press(page, lanes, Keys.HOME + Keys.ARROW_UP * 9 + Keys.ARROW_RIGHT * 2 + Keys.ARROW_DOWN * 2)
    told = one(page, ".readout").text
    assert told.startswith("blocks.0.attn.to_k: method 2 · 64 × 128, rank 8 · error after 0.0500")
    assert "effective bits 4.88" in told
    worst = every(page, ".worst tbody tr")
    assert len(worst) == 8
    assert worst[0].find_elements("css selector", "td")[2].text == "0.0500"
    (bits,) = [each for each in every(page, "[data-strip] .options label") if each.text == "effective bits"]
    bits.click()
    assert one(page, ".ramp").text.startswith("4.88")


def test_pictures_are_chosen_and_swapped(page: Any) -> None:
    def sources() -> list[str]:
        return [str(each.get_attribute("src")) for each in every(page, ".card img")]

    found = page.execute_script("return JSON.parse(document.getElementById('data').textContent).models[0].pictures")
    shots = dict(zip(found["labels"], found["shots"], strict=True))
    original, second = found["originals"], "method 8"
    assert sources() == [
        each for at in (0, 1) for each in (original[at], shots["method 0"][at][0], shots[second][at][0])
    ]
    press(page, every(page, "[data-pictures] select")[1], "method 3")
    assert sources()[2] == shots["method 3"][0][0]
    button = every(page, "button.shot")[1]
    page.execute_script("arguments[0].focus()", button)
    assert sources()[2] == shots["method 3"][0][1], "focus shows the difference"
    assert f"difference × {FACTOR}" in button.text
    page.execute_script("arguments[0].blur()", button)
    assert sources()[2] == shots["method 3"][0][0]
    hover(page, every(page, "button.shot")[3])
    assert sources()[5] == shots["method 3"][1][1], "the pointer does, too"
    one(page, "body").send_keys("d")
    assert sources()[1] == shots["method 0"][0][1]
    assert one(page, "[data-pictures] button[aria-pressed]").get_attribute("aria-pressed") == "true"
    one(page, "body").send_keys("d")
    (sixteen,) = [each for each in every(page, "[data-pictures] .options label") if each.text == "16-bit"]
    sixteen.click()
    button = every(page, "button.shot")[1]
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    hover(page, one(page, "h1"))
    assert sources()[2] == original[0], "a press pins it"


def test_it_fits_a_narrow_window(page: Any) -> None:
    resize(page, 400)
    eventually(lambda: page.execute_script("return document.querySelector('.panel svg').viewBox.baseVal.width < 400"))
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400
    table = "const node = document.querySelector('.scroller'); return node.scrollWidth > node.clientWidth"
    assert page.execute_script(table), "the table scrolls within"


def test_recipes_open_and_copy_and_print_hides_the_controls(page: Any) -> None:
    link, copy = one(page, "tbody.cells th a"), one(page, "details.recipe .copy")
    assert not copy.is_displayed()
    link.click()
    eventually(copy.is_displayed)
    copy.click()
    eventually(lambda: copy.text in ("Copied", "Selected"))
    emulate(page, media="print")
    assert not one(page, ".top").is_displayed()
    assert not copy.is_displayed()
