"""The filters of the lists, with the keyboard alone and without scripts."""

from urllib.parse import parse_qs, urlsplit

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from canary import PATIENCE_SECONDS

ROWS = "return [...document.querySelectorAll('main tbody tr')].map((it) => it.innerText)"


def tab_to(page, selector: str):
    for _ in range(150):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        if page.run("return document.activeElement.matches(arguments[0])", selector):
            return
    raise AssertionError(f"the keyboard does not reach {selector}")


def enter(page):
    """Presses Enter, and waits for the page that it leads to."""
    before = page.driver.current_url
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    WebDriverWait(page.driver, PATIENCE_SECONDS, poll_frequency=0.1).until(
        lambda driver: driver.current_url != before and page.run("return document.readyState") == "complete"
    )


def test_form_filters_rooms_and_older_pages_keep_the_filter(states, page):
    daemon = states.get("history")
    page.script(False)
    driver = page.driver
    driver.get(f"{daemon.url}/probes")
    assert any("agent_left_early" not in row for row in page.run(ROWS))
    tab_to(page, "select[name=outcome]")
    ActionChains(driver).send_keys("failed").perform()
    tab_to(page, "form.filters button")
    enter(page)
    seen = set()
    for _ in range(2):
        assert parse_qs(urlsplit(driver.current_url).query)["outcome"] == ["failed"]
        assert page.run("return document.querySelector('select[name=outcome]').value") == "failed"
        rows = page.run(ROWS)
        assert rows and all("agent_left_early" in row for row in rows)
        rooms = {row.split()[0] for row in rows}
        assert not rooms & seen
        seen |= rooms
        tab_to(page, "main a[href*='before=']")
        enter(page)


def test_wrong_filter_is_explained_on_the_page(states, page):
    daemon = states.get("healthy")
    page.driver.get(f"{daemon.url}/probes?since=yesterday")
    assert "since" in page.run("return document.querySelector('h1').innerText")
    assert page.run("return document.querySelector('main a') !== null")
