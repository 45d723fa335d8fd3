"""Every page in every state of a daemon.

A page is opened once, by `visit`, and each test looks at one thing that was found there. For a new page, add its kind to `PATHS`
and to the states that have it.
"""

import re
from pathlib import Path

import pytest

from browser import without_times
from canary import HOSTILE, Daemon

DOCS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "docs").glob("*.md"))


def failed_probe(daemon: Daemon) -> str:
    return next(probe["room"] for probe in daemon.probes() if probe["outcome"] != "ok")


def good_probe(daemon: Daemon) -> str:
    return next(probe["room"] for probe in daemon.probes() if probe["outcome"] == "ok")


# The path of each kind of page.
PATHS = {
    "overview": lambda daemon: "",
    "target": lambda daemon: f"targets/{daemon.target}",
    "batch": lambda daemon: f"batches/{daemon.latest_batch()}",
    "running-batch": lambda daemon: f"batches/{daemon.running_batch()}",
    "good-probe": lambda daemon: f"probes/{good_probe(daemon)}",
    "failed-probe": lambda daemon: f"probes/{failed_probe(daemon)}",
    "incident": lambda daemon: f"incidents/{daemon.latest_incident()}",
    "incidents": lambda daemon: "incidents",
    "batches": lambda daemon: "batches",
    "probes": lambda daemon: "probes",
    "no-such-target": lambda daemon: "targets/no-such-target",
} | {f"docs-{name}": (lambda daemon, name=name: f"docs/{name}") for name in DOCS}

LISTS = ["incidents", "batches", "probes"]

# The pages of each state. States that take long to come stand last.
PAGES = {
    "empty": ["overview", "target", *LISTS, "no-such-target", *[f"docs-{name}" for name in DOCS]],
    "limited": ["overview", "target", "batch", "failed-probe"],
    "healthy": ["overview", "target", "batch", "good-probe"],
    "paused": ["overview", "target"],
    "suspect": ["overview", "target", "batch", "failed-probe"],
    "running": ["target", "running-batch"],
    "failing": ["overview", "target", "batch", "failed-probe", "incident"],
    "hostile": ["overview", "target", "batch", "good-probe", "failed-probe", "incident", *LISTS],
    "history": ["overview", "target", "batch", "good-probe", "failed-probe", "incident", *LISTS],
}

# What the first page and the page of the target say of each state, in the verdict.
VERDICTS = {
    "empty": "never ran",
    "limited": "no batch can start|unknown",
    "healthy": "healthy",
    "paused": "paused|unknown",
    "suspect": "suspect|a room failed",
    "running": "never ran|suspect",
    "failing": "FAILS",
    "hostile": "FAILS",
    "history": "healthy",
}

visits = {}


@pytest.fixture(params=[(state, kind) for state, kinds in PAGES.items() for kind in kinds],
                ids=lambda it: f"{it[0]}-{it[1]}", scope="module")
def place(request):
    return request.param


@pytest.fixture
def visit(place, states, browser):
    if place not in visits:
        state, kind = place
        daemon = states.get(state)
        name = kind if kind.startswith("docs-") else f"{state}-{kind}"
        visits[place] = browser.visit(f"{daemon.url}/{PATHS[kind](daemon)}", name, thorough=not kind.startswith("docs-"))
    return visits[place]


def test_console_has_no_error(visit, place):
    # The status of the page itself, which the browser reports as an error.
    expected = "404 (Not Found)" if place[1] == "no-such-target" else None
    errors = [it for it in visit.errors if not (expected and visit.url in it and expected in it)]
    assert not errors, "\n".join(dict.fromkeys(errors))


def test_no_request_goes_to_another_host(visit):
    assert visit.other_hosts == []


def test_title_begins_with_the_verdict(visit, place):
    assert visit.heading.strip() and visit.title.startswith(visit.heading)
    state, kind = place
    if kind in ("overview", "target"):
        assert re.search(VERDICTS[state], visit.heading)


def test_narrow_page_does_not_scroll_sideways(visit):
    assert not visit.too_wide, "\n".join(visit.too_wide)


def test_axe_finds_nothing_serious(visit):
    found = [f"{way}: {it['rule']} ({it.get('impact')}), {it.get('count')} times, first {it.get('first')}: {it.get('why')}"
             for way, violations in visit.axe.items() for it in violations]
    assert not found, "\n".join(found)


def test_keyboard_reaches_everything_in_order(visit):
    reached = [it["index"] for it in visit.focused if it["index"] >= 0]
    missed = [name for index, name in enumerate(visit.reachable) if index not in reached]
    assert missed == []
    assert reached == sorted(reached)


def test_focus_is_visible(visit):
    assert [it["name"] for it in visit.focused if not it["visible"]] == []


def test_page_without_script_has_the_same_text(visit):
    assert len(visit.text) > 40
    assert without_times(visit.text_without_script) == without_times(visit.text)


def test_foreign_text_is_only_shown(visit, place):
    assert not visit.hostile
    if place[0] == "hostile" and place[1] not in ("batches", "probes"):
        assert HOSTILE.split(" ")[0] in visit.text


def test_foreign_text_does_not_reverse_the_text_after_it(visit):
    assert not visit.reversed, "\n".join(visit.reversed)
