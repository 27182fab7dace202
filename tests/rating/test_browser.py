"""A whole study in a real browser: with the mouse, with the keyboard alone, and on a phone.

All tests share one browser, because its start takes most of the time.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, serving
from made_study import COUNT_PROMPTS, make_study, rank
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.interaction import POINTER_TOUCH
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from ifvit.rating.answers import Store
from ifvit.rating.config import RateReportConfig
from ifvit.rating.results import read_results, report
from ifvit.rating.study import Study, Task

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ORDER = ("intermediate", "early", "late")
OTHER_ORDER = ("early", "intermediate", "late")
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
    "--disable-sync --disable-component-update --hide-scrollbars --window-size=1280,900 "
    # Without a screen Chromium reports no mouse; these flags report one.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,"
    "availablePointerTypes=4"
)
Answerer = Callable[["Page", Task, Study], None]


class Page:
    """The browser at one rater's pages; screenshots go to $IFVIT_TEST_SCREENSHOTS if it is set."""

    def __init__(self, driver: Chrome, home: str) -> None:
        self.driver = driver
        self.home = home

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def choice(self, place: str) -> WebElement:
        return self.find(f'.choice[data-place="{place}"]')

    def press(self, *keys: str) -> None:
        """Send keys to the element that has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def tap(self, element: WebElement) -> None:
        """Touch the middle of an element."""
        finger = PointerInput(POINTER_TOUCH, "finger")
        actions = ActionBuilder(self.driver, mouse=finger, duration=0)
        actions.pointer_action.move_to(element).pointer_down().pointer_up()
        actions.perform()

    def wait_for(self, path: str) -> None:
        """Wait until the browser has loaded this page."""
        WebDriverWait(self.driver, 20, poll_frequency=0.05).until(
            lambda driver: (
                driver.current_url == self.home + path
                and driver.execute_script("return document.readyState") == "complete"
            )
        )

    def screenshot(self, name: str) -> None:
        if folder := os.environ.get("IFVIT_TEST_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(f"{folder}/{name}.png")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("browsed"), num_preference=3, raters=3)


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in FLAGS.split():
        options.add_argument(flag)
    driver = Chrome(options, ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(study: Study) -> Iterator[LiveServer]:
    with serving(study) as server:
        yield server


def asked(task: Task) -> str:
    return str(next(p["count"] for p in COUNT_PROMPTS if p["prompt"] == task.item.prompt))


def answer_by_mouse(page: Page, task: Task, study: Study) -> None:
    if task.item.kind == "counting":
        page.find(f'.digit[data-number="{asked(task)}"]').click()
    else:
        # The page ranks the last image by itself.
        for place in rank(task, study, ORDER).split(",")[:-1]:
            page.choice(place).click()
        assert page.find("#hint").text.startswith("All are ranked.")
    page.find("#next").click()


def answer_by_keyboard(page: Page, task: Task, study: Study) -> None:
    if task.item.kind == "counting":
        page.press(asked(task), Keys.ENTER)
    else:
        first, second, _ = rank(task, study, ORDER).split(",")
        page.press("1", "r", str(int(first) + 1), str(int(second) + 1), Keys.ENTER)


def answer_by_touch(page: Page, task: Task, study: Study) -> None:
    if task.item.kind == "counting":
        page.tap(page.find("#unclear"))
        return
    for place in rank(task, study, OTHER_ORDER).split(",")[:-1]:
        page.tap(page.choice(place))
    page.tap(page.find("#next"))


def rate(page: Page, study: Study, rater: int, how: str, answer: Answerer) -> None:
    """Answer every question."""
    tasks = study.tasks(rater)
    for number, task in enumerate(tasks, 1):
        page.wait_for(f"/{number}")
        if number in (1, len(tasks)):
            page.screenshot(f"{how}_{task.item.kind}")
        answer(page, task, study)
    page.wait_for("")
    assert "All done" in page.find("h1").text
    page.screenshot(f"{how}_done")


def open_home(driver: Chrome, server: LiveServer, study: Study, rater: int) -> Page:
    store = Store(study.folder)
    page = Page(driver, f"{server.url}/r/{store.raters()[rater - 1].code}")
    store.close()
    driver.get(page.home)
    return page


def assert_quiet(driver: Chrome) -> None:
    """Check that no script failed and the security policy blocked nothing."""
    assert driver.get_log("browser") == []


def test_with_the_mouse(driver: Chrome, server: LiveServer, study: Study) -> None:
    page = open_home(driver, server, study, 1)
    page.screenshot("mouse_welcome")
    page.find("a.primary").click()
    page.wait_for("/1")
    task = study.tasks(1)[0]
    assert not page.find("#next").is_enabled()
    first, _, third = rank(task, study, ORDER).split(",")
    page.choice(third).click()
    page.choice(third).click()  # removes the rank again
    page.choice(first).click()
    page.screenshot("mouse_ranking")
    page.find("#clear").click()
    assert page.find("#ranking").get_attribute("value") == ""
    page.find("#skip").click()
    page.screenshot("mouse_skip")
    page.find("#cancel").click()
    rate(page, study, 1, "mouse", answer_by_mouse)
    assert_quiet(driver)


def test_with_the_keyboard_alone(driver: Chrome, server: LiveServer, study: Study) -> None:
    page = open_home(driver, server, study, 2)
    page.press(Keys.ENTER)
    page.wait_for("/1")
    page.press("s")
    page.press("1")
    page.wait_for("/2")
    page.press("b")
    page.wait_for("/1")
    assert "too close to call" in page.find(".notice:not([hidden])").text
    # Arrows and the space bar also rank; the ranking replaces the skip.
    places = rank(study.tasks(2)[0], study, ORDER).split(",")
    for place in places[:2]:
        while page.driver.switch_to.active_element.get_attribute("data-place") != place:
            page.press(Keys.ARROW_RIGHT)
        page.press(Keys.SPACE)
    assert page.find("#ranking").get_attribute("value") == ",".join(places)
    page.screenshot("keyboard_focus")
    driver.get(page.home)  # the answer was not sent
    page.wait_for("/2")
    page.press("b")
    rate(page, study, 2, "keyboard", answer_by_keyboard)
    assert_quiet(driver)


def test_on_a_phone(driver: Chrome, server: LiveServer, study: Study) -> None:
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    page = open_home(driver, server, study, 3)
    page.screenshot("phone_welcome")
    page.tap(page.find("a.primary"))
    page.wait_for("/1")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    for element in driver.find_elements(By.CSS_SELECTOR, ".actions > *, .choice"):
        assert min(element.size.values()) >= 44
        assert element.rect["x"] >= 0
        assert element.rect["x"] + element.rect["width"] <= 360
    page.tap(page.choice("1"))
    page.screenshot("phone_ranking")
    page.tap(page.find("#clear"))
    rate(page, study, 3, "phone", answer_by_touch)
    assert_quiet(driver)


def test_a_lost_connection_loses_no_answer(
    driver: Chrome, server: LiveServer, study: Study
) -> None:
    page = open_home(driver, server, study, 3)
    driver.get(f"{page.home}/1")
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.tap(page.find("#next"))
    WebDriverWait(driver, 20).until(lambda _: page.find("#unsaved").is_displayed())
    assert "Not saved" in page.find("#unsaved").text
    page.screenshot("phone_offline")
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {**offline, "offline": False, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    page.tap(page.find("#next"))
    page.wait_for("")
    driver.get_log("browser")  # discards the entry about the failed request


def test_admin_and_report_show_what_was_answered(
    driver: Chrome, server: LiveServer, study: Study
) -> None:
    for command in ("Emulation.clearDeviceMetricsOverride", "Emulation.setEmulatedMedia"):
        driver.execute_cdp_cmd(command, {})
    driver.set_window_size(1100, 2000)
    page = Page(driver, "")
    driver.get(server.admin_url)
    page.screenshot("admin")
    assert "intermediate" in page.find("#results").text
    assert_quiet(driver)
    report(RateReportConfig(study=str(study.folder)))
    driver.get(f"file://{study.folder}/report.html")
    page.screenshot("report")
    assert_quiet(driver)
    found = read_results(str(study.folder)).preference
    assert found is not None
    assert found.num_rankings == 9
    assert found.mean_rank["intermediate"].value == pytest.approx(4 / 3)
    assert found.replies.consistency == 1
    assert "In 3 repeated questions, 100 % of the pairs" in page.find("main").text
    numbers = json.loads((study.folder / "results.json").read_text())["counting"]
    assert numbers["groups"][0]["match_ratio"]["early"]["value"] == 1
    assert numbers["cannot_tell"]["early"]["value"] == pytest.approx(1 / 3)


def test_pages_name_no_other_host() -> None:
    folder = Path(__file__).parents[2] / "ifvit" / "rating"
    for path in [*(folder / "pages").iterdir(), *(folder / "static").iterdir()]:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
