"""The canary and its sandbox as processes, and one daemon for each state that the pages can show."""

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

BINARY = Path(os.environ["CANARY"]).resolve()

# For a state that must come. Far above what a loaded machine needs: it only ends a run that hangs.
PATIENCE_SECONDS = 150

RIGHT_TO_LEFT_OVERRIDE = "\u202e"
# Markup, both quotation marks, a mark that reverses the text after it, and 300 characters without a place to break.
HOSTILE = (
    "<script>window.hostile=1</script>\"'><img src=x onerror=window.hostile=1>"
    f"{RIGHT_TO_LEFT_OVERRIDE}reversed\u05d0\u05d1 " + "W" * 300
)


class Process:
    """A command of the canary, with its log in a file."""

    def __init__(self, folder: Path, *arguments: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{arguments[0]}.log"
        environment = {"PATH": os.environ["PATH"], "RUST_LOG": "info"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [BINARY, *arguments], cwd=folder, env=environment, stdout=log, stderr=log
            )

    def wait_for_line(self, part: str) -> str:
        def line():
            if self.process.poll() is not None:
                raise AssertionError(f"{self.process.args} ended:\n{self.log.read_text()}")
            lines = self.log.read_text().splitlines(keepends=True)
            return next((line for line in lines if part in line and line.endswith("\n")), None)

        return wait_for(line, f"{part!r} in {self.log}")

    def kill(self):
        """Nothing outlives it: its rooms are on this machine, and its folder is temporary."""
        self.process.kill()
        self.process.wait()


class Sandbox:
    """A LiveKit server with an agent."""

    def __init__(self, folder: Path, faults=(), agent_name="demo"):
        faults = [f"--fault={fault}" for fault in faults]
        self.process = Process(folder, "sandbox", "--port=0", f"--agent-name={agent_name}", *faults)
        values = {}
        for key in ["LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"]:
            values[key] = self.process.wait_for_line(f"{key}=").strip().split("=", 1)[1]
        self.url = values["LIVEKIT_URL"]
        self.api_key = values["LIVEKIT_API_KEY"]
        self.api_secret = values["LIVEKIT_API_SECRET"]


SETTINGS = """\
[http]
listen = "127.0.0.1:0"

[history]
dir = "state"

[lifetime]
startup_delay = "0s"
drain_grace = "0s"
shutdown_linger = "0s"

[projects.main]
url = {url}
api_key = {api_key}
api_secret = {api_secret}

[projects.main.backoff]
first = "1h"
longest = "1h"

[targets.{target}]
agent_name = {agent_name}
transcript = true
late_agent_window = "1s"
record.audio = "always"
schedule.{schedule}
batch.rooms = {rooms}
batch.ramp = "burst"
batch.hold = {hold}
confirm.rooms = {confirm_rooms}
caller.silence = "500ms"
"""


class Daemon:
    """`livekit-canary run` with one target, which runs a batch at its start unless the schedule is a cron expression."""

    def __init__(self, folder: Path, sandbox: Sandbox, target="support", agent_name="demo",
                 schedule='every = "2h"', rooms=2, confirm_rooms=0, hold="1s"):
        self.folder = folder
        self.target = target
        folder.mkdir(parents=True, exist_ok=True)
        settings = SETTINGS.format(
            url=text(sandbox.url), api_key=text(sandbox.api_key), api_secret=text(sandbox.api_secret),
            target=target, agent_name=text(agent_name), schedule=schedule, rooms=rooms,
            confirm_rooms=confirm_rooms, hold=text(hold),
        )
        (folder / "canary.toml").write_text(settings)
        self.start()

    def start(self):
        self.process = Process(self.folder, "run", "--config=canary.toml")
        line = json.loads(self.process.wait_for_line("is listening on"))
        self.url = line["page"].rstrip("/")

    @property
    def database(self) -> Path:
        return self.folder / "state" / "history.sqlite3"

    def get(self, path: str):
        """The JSON of a path of the API."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=30) as response:
            return json.load(response)

    def post(self, path: str):
        request = urllib.request.Request(f"{self.url}/api/v1/{path}", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"POST {path}: {error.code} {error.read().decode()}") from error

    def status(self):
        [target] = self.get("targets")["targets"]
        return target

    def wait_for_state(self, state: str):
        return wait_for(lambda: self.status()["state"] == state, f"{self.target} is {state}")

    def wait_for_batches(self, count: int):
        """Waits until the history has this many batches, and returns them, the latest first."""

        def ended():
            batches = self.get("batches")["batches"]
            return batches if len(batches) >= count else None

        return wait_for(ended, f"{count} batches")

    def wait_for_outcomes(self, *outcomes: str):
        """Runs batches until rooms have ended in each of these ways: on a loaded machine a good room may fail."""
        while not {probe["outcome"] for probe in self.probes()}.issuperset(outcomes):
            count = len(self.get("batches")["batches"])
            self.post(f"targets/{self.target}/batches")
            self.wait_for_batches(count + 1)

    def probes(self):
        """The probes of the last batches, the latest first."""
        batches = self.get("batches?limit=20")["batches"]
        return [probe for batch in batches for probe in self.get(f"batches/{batch['batch_id']}")["probes"]]

    def running_batch(self) -> str:
        return self.status()["running"]

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=30) as response:
            return response.read().decode()

    def latest_batch(self) -> str:
        return self.get("batches?limit=1")["batches"][0]["batch_id"]

    def latest_incident(self) -> str:
        return self.get("incidents?limit=1")["incidents"][0]["id"]


def text(value: str) -> str:
    """A TOML string."""
    return json.dumps(value)


def wait_for(condition, what: str):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {PATIENCE_SECONDS} s: {what}")


@dataclass
class States:
    """Starts what is asked for in the background, so that a state that takes long to come delays no other test."""

    folder: Path
    running: list = field(default_factory=list)
    futures: dict = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    closed: bool = False

    def keep(self, owner):
        """Has a process killed at the end."""
        with self.lock:
            if self.closed:
                owner.process.kill()
                raise AssertionError("the tests have ended")
            self.running.append(owner)
        return owner

    def sandbox(self, name: str, *faults: str, agent_name="demo") -> Sandbox:
        return self.keep(Sandbox(self.folder / f"{name}-sandbox", faults, agent_name))

    def daemon(self, name: str, sandbox: Sandbox, **settings) -> Daemon:
        return self.keep(Daemon(self.folder / name, sandbox, **settings))

    def begin(self, name: str, create):
        future = {"done": threading.Event()}

        def run():
            try:
                future["value"] = create()
            except BaseException as error:  # handed to the test that asks for it
                future["error"] = error
            future["done"].set()

        self.futures[name] = future
        threading.Thread(target=run, name=name, daemon=True).start()

    def get(self, name: str) -> Daemon:
        future = self.futures[name]
        future["done"].wait()
        if "error" in future:
            raise AssertionError(f"the daemon {name} could not be prepared") from future["error"]
        return future["value"]

    def stop(self):
        with self.lock:
            self.closed = True
            for owner in self.running:
                owner.process.kill()
