"""Chromium, and what the tests want to know of a page in it."""

import base64
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import axe_core_python
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from canary import RIGHT_TO_LEFT_OVERRIDE

AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()

WIDE = (1280, 800)
NARROW = (360, 740)
# A screenshot ends here.
MAX_HEIGHT = 3000

# What a keyboard must reach, in the order of the document.
REACHABLE = "a[href], button:enabled, input:enabled, select:enabled, textarea:enabled, summary, audio[controls]"

WATCH_FOCUS = """
// Not what a closed <details> hides.
const reachable = [...document.querySelectorAll(arguments[0])].filter((it) => it.checkVisibility());
window.focused = [];
document.addEventListener('focusin', (event) => {
  const style = getComputedStyle(event.target);
  const box = event.target.getBoundingClientRect();
  window.focused.push({
    index: reachable.indexOf(event.target),
    name: event.target.outerHTML.slice(0, 120),
    visible: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0 && box.width > 0 && box.height > 0,
  });
});
// A scroller takes the focus, too, and each part of a player.
const scrollers = [...document.querySelectorAll('*')].filter((it) => it.scrollWidth > it.clientWidth).length;
return [reachable.map((it) => it.outerHTML.slice(0, 120)), scrollers + 12 * document.querySelectorAll('audio').length];
"""

WIDER_THAN_THE_PAGE = """
const root = document.documentElement;
if (root.scrollWidth <= root.clientWidth) return [];
const isScrolled = (it) => it.parentElement?.closest('.scroll, pre') !== null;
const wide = [...document.querySelectorAll('body *')].filter(
  (it) => it.getBoundingClientRect().right > root.clientWidth + 1 && !isScrolled(it));
return [`${root.scrollWidth} px of ${root.clientWidth} px`, ...wide.slice(0, 5).map((it) => it.outerHTML.slice(0, 200))];
"""

# A mark that reverses text acts until the end of its paragraph, or of an element that isolates it.
REVERSED = r"""
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
for (let text = texts.nextNode(); text; text = texts.nextNode()) {
  const at = text.data.lastIndexOf(arguments[0]);
  if (at < 0) continue;
  const range = document.createRange();
  let around = text.parentElement;
  while (getComputedStyle(around).display === 'inline' && !getComputedStyle(around).unicodeBidi.includes('isolate')
         && !getComputedStyle(around).unicodeBidi.includes('plaintext')) around = around.parentElement;
  range.setStart(text, at);
  range.setEndAfter(around.lastChild);
  // A preformatted line is a paragraph of its own. Marks alone mislead nobody.
  let after = range.toString().split(arguments[1]).pop();
  if (getComputedStyle(text.parentElement).whiteSpace === 'pre') after = after.split('\n')[0];
  if (/[\p{L}\p{N}]/u.test(after)) found.push(`${around.outerHTML.slice(0, 60)}… goes on with ${after.slice(0, 80)}`);
}
return found;
"""

# A live page replaces its content. While it is looked at it must not: test_live.py tests that.
NO_LIVE_UPDATES = "window.EventSource = class extends EventTarget { close() {} };"

RUN_AXE = """
const done = arguments[1];
axe.run(document, {resultTypes: ['violations'], ...arguments[0]}).then((results) => done(
  results.violations.filter((it) => ['serious', 'critical'].includes(it.impact)).map((it) => ({
    rule: it.id, impact: it.impact, help: it.help, count: it.nodes.length,
    first: it.nodes[0].html.slice(0, 200), why: it.nodes[0].failureSummary,
  }))), (error) => done([{rule: 'axe itself failed', why: String(error)}]));
"""


@dataclass
class Visit:
    """What was found on one page."""

    url: str
    title: str = ""
    heading: str = ""
    # Errors of the console, violations of the content security policy among them.
    errors: list = field(default_factory=list)
    other_hosts: list = field(default_factory=list)
    too_wide: list = field(default_factory=list)
    axe: dict = field(default_factory=dict)
    reachable: list = field(default_factory=list)
    focused: list = field(default_factory=list)
    text: str = ""
    text_without_script: str = ""
    # Whether a text ran as markup.
    hostile: bool = False
    # What stands after a text that reverses it.
    reversed: list = field(default_factory=list)


class Browser:
    def __init__(self, screenshots: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = os.environ["CHROMIUM"]
        for argument in [
            "--headless=new",
            # Chromium's own sandbox doesn't work for root.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--force-device-scale-factor=1",
            # For a test that starts a player without a click.
            "--autoplay-policy=no-user-gesture-required",
            # As on a phone, where they cover the page and take no width from it.
            "--hide-scrollbars",
            # A request to another host fails, and leaves an error.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.add_experimental_option("perfLoggingPrefs", {"enableNetwork": True, "enablePage": False})
        self.driver = webdriver.Chrome(options=options, service=Service(os.environ["CHROMEDRIVER"]))
        self.driver.set_page_load_timeout(60)
        self.driver.set_script_timeout(60)
        self.screenshots = screenshots
        screenshots.mkdir(parents=True, exist_ok=True)
        for old in screenshots.glob("*.png"):
            old.unlink()

    def quit(self):
        self.driver.quit()

    def command(self, name: str, **parameters):
        return self.driver.execute_cdp_cmd(name, parameters)

    def size(self, size):
        self.command("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)

    def scheme(self, scheme: str):
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def script(self, enabled: bool):
        self.command("Emulation.setScriptExecutionDisabled", value=not enabled)

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self) -> str:
        """The text that a person sees."""
        return self.run("return document.body.innerText")

    def errors(self) -> list:
        """Errors of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list:
        """The URLs that were requested since the last call."""
        urls = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.append(message["params"]["request"]["url"])
        return urls

    def shoot(self, name: str):
        size = self.run("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], MAX_HEIGHT), "scale": 1}
        shot = self.command(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True, optimizeForSpeed=True
        )
        (self.screenshots / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def check_with_axe(self, **options) -> list:
        # Without a background of its own, axe takes the page for white in dark, too. This is the color that is drawn.
        self.run("document.documentElement.style.background = 'Canvas'")
        return self.driver.execute_async_script(RUN_AXE, options)

    def tab_through(self):
        """Moves the focus from link to link with the Tab key, and returns what can be reached and what was."""
        reachable, others = self.run(WATCH_FOCUS, REACHABLE)
        focused = []
        presses = 0
        while presses < len(reachable) + others + 1:
            step = min(len(reachable) - len(focused), 200) if len(focused) < len(reachable) else 1
            ActionChains(self.driver, duration=0).send_keys(Keys.TAB * step).perform()
            presses += step
            focused = self.run("return window.focused")
            if sum(it["index"] >= 0 for it in focused) >= len(reachable):
                break
        return reachable, focused

    def visit(self, url: str, name: str, thorough=True) -> Visit:
        """Opens a page, and looks at it in every way. A document, which has only text, needs not all of them."""
        visit = Visit(url)
        self.driver.get("about:blank")
        self.errors(), self.requests()
        added = self.command("Page.addScriptToEvaluateOnNewDocument", source=NO_LIVE_UPDATES)
        self.size(WIDE)
        self.scheme("light")
        self.driver.get(url)
        visit.title = self.driver.title
        visit.reversed = self.run(REVERSED, RIGHT_TO_LEFT_OVERRIDE, "W" * 300)
        visit.hostile = self.run("return 'hostile' in window || document.querySelector('main script, main img') !== null")
        visit.text = self.text()
        visit.heading = self.run("return document.querySelector('h1').textContent")
        self.run(AXE)
        visit.axe["wide, light"] = self.check_with_axe()
        self.shoot(f"{name}-wide-light")
        self.scheme("dark")
        if thorough:
            self.shoot(f"{name}-wide-dark")
        self.size(NARROW)
        visit.too_wide = self.run(WIDER_THAN_THE_PAGE)
        self.shoot(f"{name}-narrow-dark")
        if thorough:
            visit.axe["narrow, dark"] = self.check_with_axe()
            self.scheme("light")
            self.shoot(f"{name}-narrow-light")
        self.scheme("light")
        self.size(WIDE)
        visit.reachable, visit.focused = self.tab_through()
        # If they differ, the daemon may have changed its state in between.
        for _ in range(3):
            self.script(False)
            self.driver.get(url)
            visit.text_without_script = self.text()
            self.script(True)
            if without_times(visit.text) == without_times(visit.text_without_script):
                break
            self.driver.get(url)
            visit.text = self.text()
        self.command("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])
        visit.errors = self.errors()
        origin = urlsplit(url).netloc
        visit.other_hosts = [it for it in self.requests() if urlsplit(it).scheme in ("http", "https", "ws", "wss")
                             and urlsplit(it).netloc != origin]
        return visit


def without_times(text: str) -> str:
    return re.sub(r"\d+", "0", text).replace("0 min", "0 s").replace("0 h", "0 s")
