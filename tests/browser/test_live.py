"""Pages that follow what changes, and the button "Run a batch now" with the keyboard alone."""

import re

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from canary import PATIENCE_SECONDS
from proxy import PrefixProxy

BUTTON = "Run a batch now"


def wait(driver):
    return WebDriverWait(driver, PATIENCE_SECONDS, poll_frequency=0.1)


def tab_to_button(page):
    for _ in range(50):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        if page.run("return document.activeElement.localName") == "button":
            break
    assert page.driver.switch_to.active_element.text == BUTTON


@pytest.mark.parametrize("way", ["with script", "without script, behind a prefix"])
def test_button_leads_to_the_running_batch_and_to_its_end(states, page, way):
    daemon = states.get("manual")
    driver = page.driver
    with PrefixProxy(daemon.url, "/canary") as proxy:
        root = daemon.url if way == "with script" else proxy.url
        page.script(way == "with script")
        driver.get(f"{root}/targets/support")
        tab_to_button(page)
        before = daemon.status()["last_batch"]
        ActionChains(driver).send_keys(Keys.ENTER).perform()

        wait(driver).until(lambda driver: "/batches/" in driver.current_url)
        batch = driver.current_url
        assert re.fullmatch(re.escape(root) + r"/batches/[\w-]+", batch)
        assert driver.title.startswith("support: batch is running")
        wait(driver).until(lambda driver: driver.title == "support: batch ok, 1 ok, 0 failed")
        assert driver.current_url == batch
        assert page.errors() == []
        assert page.run("return document.querySelectorAll('tbody a[href^=\"../probes/\"]').length") == 1
        ended = daemon.status()["last_batch"]
        assert ended != before and batch.endswith(ended["batch_id"])
        page.script(True)
        driver.get("about:blank")


def test_running_batch_shows_its_room_before_it_ends(states, page):
    daemon = states.get("manual")
    batch = daemon.post("targets/support/batches")["batch_id"]
    page.driver.get(f"{daemon.url}/batches/{batch}")
    # Each title and the rows of the table as the script puts them in, from the first load to the last.
    page.run("""
      window.seen = [];
      const look = () => window.seen.push([document.title, document.querySelectorAll("tbody tr").length]);
      new MutationObserver(look).observe(document.body, {childList: true, subtree: true});
      look();
    """)
    wait(page.driver).until(lambda driver: driver.title == "support: batch ok, 1 ok, 0 failed")
    seen = page.run("return window.seen")
    assert ["support: batch is running, 0 ok, 0 failed", 1] in seen, seen
    assert page.errors() == []


def test_live_page_shows_a_change_and_keeps_the_focus(states, page):
    daemon = states.get("manual")
    page.driver.get(f"{daemon.url}/targets/support")
    tab_to_button(page)
    for change, is_paused in [("pause", True), ("resume", False)]:
        daemon.post(f"targets/support/{change}")
        shows_pause = "return document.querySelector('main').innerText.includes(', paused')"
        wait(page.driver).until(lambda driver: page.run(shows_pause) == is_paused)
        assert page.driver.switch_to.active_element.text == BUTTON
