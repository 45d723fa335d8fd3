"""The daemons in their states, and the one browser, for all tests."""

import os
from pathlib import Path

import pytest

import seed
from browser import Browser
from canary import HOSTILE, States, wait_for

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).resolve().parents[2] / "target"))
# The longest name of a target.
LONG_NAME = "a" * 30 + "-" + "b" * 31

# Rooms from this one on meet the fault: the batch at the start is good.
FIRST_BAD_ROOM = 3


@pytest.fixture(scope="session")
def states(tmp_path_factory):
    states = States(tmp_path_factory.mktemp("canary"))
    healthy = states.sandbox("healthy", "node=ND_a", "region=eu")

    def empty():
        return states.daemon("empty", healthy, schedule='cron = "0 0 1 1 *"')

    def manual():
        return states.daemon("manual", healthy, schedule='cron = "0 0 1 1 *"', rooms=1)

    def good(name="healthy"):
        daemon = states.daemon(name, healthy)
        daemon.wait_for_batches(1)
        return daemon

    def paused():
        daemon = good("paused")
        daemon.post("targets/support/pause")
        return daemon

    def suspect():
        # Both rooms open at once, so the good one is no proof that the failure is over.
        daemon = states.daemon("suspect", states.sandbox("suspect", "room2:leaves_early=500ms"))
        daemon.wait_for_batches(1)
        daemon.wait_for_state("suspect")
        return daemon

    def limited():
        daemon = states.daemon("limited", states.sandbox("limited", "create_room=429"))
        daemon.wait_for_batches(1)
        return daemon

    def running():
        # One of three rooms has failed, and the others are open for longer than the tests take.
        sandbox = states.sandbox("running", "room2:leaves_early=500ms")
        daemon = states.daemon("running", sandbox, rooms=3, hold="30m")
        wait_for(daemon.running_batch, "a running batch")
        batch = f"batches/{daemon.running_batch()}"
        wait_for(lambda: "agent_left_early" in daemon.page(batch), "a failed room of the running batch")
        wait_for(lambda: daemon.page(batch).count("in conversation") >= 2, "two calls")
        return daemon

    def failing():
        faults = [f"room{room}:leaves_early=500ms" for room in range(FIRST_BAD_ROOM, 100)]
        versions = [f"room{room}:version={1 if room < FIRST_BAD_ROOM else 2}.0" for room in range(1, 100)]
        daemon = states.daemon("failing", states.sandbox("failing", *faults, *versions), confirm_rooms=2)
        daemon.wait_for_batches(1)
        daemon.post("targets/support/batches")
        # Half a minute after the first failed room, two further ones confirm it.
        daemon.wait_for_state("failing")
        # Others copy it from the disk, where it comes a moment later.
        wait_for(lambda: seed.has_incident(daemon.database), "an incident on disk")
        return daemon

    def hostile():
        faults = [f"{fault}={HOSTILE}" for fault in ["version", "hears", "node", "region", "room2:inference_error"]]
        daemon = states.daemon("hostile", states.sandbox("hostile", *faults, agent_name=HOSTILE),
                               target=LONG_NAME, agent_name=HOSTILE)
        daemon.wait_for_batches(1)
        daemon.wait_for_outcomes("ok", "failed")
        # What the settings, the sandbox or LiveKit refuse.
        seed.make_hostile(daemon.database, LONG_NAME, states.get("failing").database)
        return daemon

    def history():
        failing = states.get("failing")
        folder = states.folder / "history"
        seed.copy(failing.database, folder / "state" / "history.sqlite3")
        seed.fill(folder / "state" / "history.sqlite3", probes=10_000, days=30, incidents=12)
        return good("history")

    for create in [empty, manual, good, paused, suspect, limited, running, failing, hostile, history]:
        states.begin("healthy" if create is good else create.__name__, create)
    yield states
    states.stop()


@pytest.fixture(scope="session")
def browser():
    browser = Browser(TARGET / "browser")
    yield browser
    browser.quit()


@pytest.fixture
def page(browser):
    """The browser as a person finds it: wide, light and with scripts."""
    browser.driver.get("about:blank")
    browser.errors()
    browser.script(True)
    browser.size((1280, 800))
    browser.scheme("light")
    yield browser
    browser.script(True)
