"""The recording of a call on the page of its probe."""

from selenium.webdriver.support.wait import WebDriverWait

from canary import PATIENCE_SECONDS
from test_pages import PATHS

PLAY = """
for (const audio of document.querySelectorAll('audio')) {
  audio.muted = true;
  audio.play();
}
"""
STATE = """
return [...document.querySelectorAll('audio')].map((it) => ({
  played: it.currentTime > 0.2, duration: it.duration, error: it.error?.message ?? null}));
"""


def test_both_sides_of_a_recorded_call_can_be_played(states, page):
    daemon = states.get("healthy")
    page.driver.get(f"{daemon.url}/{PATHS['good-probe'](daemon)}")
    page.run(PLAY)
    WebDriverWait(page.driver, PATIENCE_SECONDS).until(
        lambda driver: all(it["played"] or it["error"] for it in page.run(STATE)))
    sides = page.run(STATE)
    assert len(sides) == 2
    for side in sides:
        assert side["error"] is None
        # The agent greets, the caller speaks, the agent replies.
        assert side["duration"] > 3
