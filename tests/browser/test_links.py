"""All links of all pages, behind the prefix of a reverse proxy."""

import urllib.error
import urllib.request
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin, urlsplit

import pytest

from proxy import PrefixProxy
from test_pages import PAGES, PATHS

STATES = [state for state in PAGES if state != "hostile"]


class Links(HTMLParser):
    """What a page refers to, and the ids that others can refer to."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids, self.forms = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.add(attributes["id"])
        for name in ("href", "src", "data-live"):
            if name in attributes and tag != "html":
                self.links.append(attributes[name])
        if tag == "form" and attributes.get("method") == "post":
            self.forms.append(attributes["action"])


def get(url: str):
    """The status of a response, its content type, and its body unless it never ends."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            kind = response.headers["Content-Type"]
            return response.status, kind, b"" if kind.startswith("text/event-stream") else response.read()
    except urllib.error.HTTPError as error:
        return error.code, "", error.read()


# The documents and the files are those of the binary, and the same in every state.
same_everywhere = {}


@pytest.mark.parametrize("state", STATES)
def test_every_link_leads_somewhere_behind_a_prefix(states, state):
    daemon = states.get(state)
    with PrefixProxy(daemon.url, "/canary") as proxy:
        responses = {}

        def fetch(url):
            path = url.removeprefix(proxy.url)
            cache = same_everywhere if path.startswith(("/docs/", "/assets/")) else responses
            if path not in cache:
                cache[path] = get(url)
            return cache[path]

        wrong = []
        for kind in PAGES[state]:
            page = f"{proxy.url}/{PATHS[kind](daemon)}"
            _, _, body = fetch(page)
            links = Links(body.decode())
            assert any("style.css" in link for link in links.links)
            for action in links.forms:
                assert urljoin(page, action) == f"{proxy.url}/api/v1/targets/{daemon.target}/batches"
            for link in links.links:
                url, fragment = urldefrag(urljoin(page, link))
                if urlsplit(url).netloc != urlsplit(proxy.url).netloc:
                    continue
                status, content_type, body = fetch(url)
                if status != 200:
                    wrong.append(f"{kind}: {link} leads to {status}")
                elif fragment and content_type.startswith("text/html") and fragment not in Links(body.decode()).ids:
                    wrong.append(f"{kind}: {link} has no target in the page")
        assert wrong == []
