"""Writes into the history's database what a run of the tests can't wait for, from rows that the daemon wrote itself."""

import json
import re
import sqlite3
from datetime import datetime, timedelta, timezone
from pathlib import Path

from canary import HOSTILE

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z")


def copy(source: Path, target: Path):
    """Copies a database that its daemon may be writing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(source) as reader, sqlite3.connect(target) as writer:
        reader.backup(writer)
    reader.close()
    writer.close()


def has_incident(database: Path) -> bool:
    connection = sqlite3.connect(database, timeout=30)
    [count] = connection.execute("SELECT count(*) FROM incidents").fetchone()
    connection.close()
    return count > 0


def shifted(value, name: str, by: timedelta, names: dict):
    """A value of a row, with its times moved and its names replaced."""
    if isinstance(value, int) and name.endswith("_at"):
        return value + int(by.total_seconds() * 1000)
    if not isinstance(value, str):
        return value
    for old, new in names.items():
        value = value.replace(old, new)

    def move(match):
        moved = datetime.fromisoformat(match[0].replace("Z", "+00:00")) + by
        return moved.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    return TIME.sub(move, value)


def insert(connection, table: str, row: sqlite3.Row, by: timedelta, names: dict):
    columns = row.keys()
    values = [shifted(row[column], column, by, names) for column in columns]
    places = ", ".join("?" * len(columns))
    connection.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", values)


def fill(database: Path, probes: int, days: int, incidents: int):
    """Spreads copies of the batches over the days before them; every 30th has a failure. All incidents are over."""
    connection = sqlite3.connect(database)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    with connection:
        rows = connection.execute("SELECT * FROM batches WHERE purpose <> 'confirmation' ORDER BY id").fetchall()
        good = [row for row in rows if not row["failed"] and row["ok"]]
        bad = [row for row in rows if row["failed"]]
        assert good and bad, "the copied history must have a good and a failed batch"
        of_batch = {}
        for row in rows:
            query = "SELECT * FROM probes WHERE batch = ? ORDER BY place"
            of_batch[row["id"]] = connection.execute(query, [row["id"]]).fetchall()
        written = index = 0
        end = datetime.now(timezone.utc) - timedelta(minutes=2)
        count = probes // min(len(of_batch[row["id"]]) for row in good + bad)
        step = timedelta(days=days) / count
        while written < probes:
            template = bad[0] if index % 30 == 7 else good[0]
            begin = end - step * index
            by = begin - datetime.fromtimestamp(template["started_at"] / 1000, timezone.utc)
            batch = f"{begin:%Y%m%dT%H%M%S}-seed{index:05}"
            insert(connection, "batches", template, by, {template["id"]: batch, '"manual"': '"scheduled"'})
            for probe in of_batch[template["id"]]:
                room = f"{probe['room']}-{index:05}"
                insert(connection, "probes", probe, by, {probe["room"]: room, probe["batch"]: batch})
                written += 1
            index += 1
        for table, id in [("batches", "id"), ("probes", "batch")]:
            connection.execute(f"UPDATE {table} SET purpose = 'scheduled' WHERE {id} LIKE '%-seed%'")
        [incident] = connection.execute("SELECT * FROM incidents").fetchall()
        document = json.loads(incident["document"])
        began = datetime.fromisoformat(document["began_at"].replace("Z", "+00:00"))
        ended = began + timedelta(minutes=7)
        document |= {"state": "ended", "ended_by": "recovered", "duration_seconds": 420.0,
                     "ended_at": f"{ended:%Y-%m-%dT%H:%M:%SZ}"}
        connection.execute("UPDATE incidents SET ended_at = ?, document = ?",
                           [int(ended.timestamp() * 1000), json.dumps(document)])
        [incident] = connection.execute("SELECT * FROM incidents").fetchall()
        for index in range(1, incidents):
            by = -timedelta(days=days) * index / incidents
            begin = began + by
            insert(connection, "incidents", incident, by, {incident["id"]: f"{begin:%Y%m%dT%H%M%S}-seed{index}"})
        count_statistics(connection)
        # The files stay with the daemon that wrote them.
        connection.execute("UPDATE probes SET document = json_set(document, '$.recording', NULL)")
        # The target begins anew.
        connection.execute("DELETE FROM target_states")
        [found] = connection.execute("SELECT count(*) FROM probes").fetchone()
    connection.close()
    assert found >= probes


def count_statistics(connection):
    """The rooms and their delays by hour and day, which the daemon counts when it writes a batch."""
    sums = {}
    rows = connection.execute("SELECT target, started_at, outcome, document FROM probes WHERE purpose = 'scheduled'")
    for target, started_at, outcome, document in rows.fetchall():
        document = json.loads(document)
        for width in [3_600_000, 86_400_000]:
            key = (width, started_at // width * width, target)
            of_span = sums.setdefault(key, {"ok": 0, "failed": 0, "join": {}, "first_speech": {}, "reply": {}})
            of_span["ok" if outcome == "ok" else "failed"] += 1
            for kind in ["join", "first_speech", "reply"]:
                delay = document[f"{kind}_delay_seconds"]
                if delay is not None:
                    bucket = bucket_of(int(delay * 1000))
                    of_span[kind][bucket] = of_span[kind].get(bucket, 0) + 1
    connection.execute("DELETE FROM statistics")
    for key, of_span in sums.items():
        delays = [json.dumps(of_span[kind]) for kind in ["join", "first_speech", "reply"]]
        connection.execute("INSERT INTO statistics VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                           [*key, of_span["ok"], of_span["failed"], *delays])


def bucket_of(milliseconds: int) -> int:
    step = 1
    while milliseconds >= 128 * step and step < 512:
        step *= 2
    return milliseconds // step * step


# What identifies a document or a page, and what is one of few words in every version of the canary.
KEPT = {
    "room", "batch_id", "id", "target", "project", "outcome", "result", "purpose", "position", "state", "fault", "url",
    "at", "began_at", "ended_at", "opened_at", "started_at",
}


def hostile(value, key=""):
    """A document in which every text is hostile that is not part of a path."""
    if isinstance(value, dict):
        evidence = key == "evidence"
        return {(HOSTILE if evidence else name): hostile(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner, key) for inner in value]
    return HOSTILE if isinstance(value, str) and key not in KEPT else value


def make_hostile(database: Path, target: str, incidents: Path):
    """Makes every text in the documents of this database hostile, and adds the incidents of another database."""
    connection = sqlite3.connect(database, timeout=30)
    connection.row_factory = sqlite3.Row
    source = sqlite3.connect(incidents, timeout=30)
    source.row_factory = sqlite3.Row
    with connection:
        for row in source.execute("SELECT * FROM incidents").fetchall():
            insert(connection, "incidents", row, timedelta(), {f'"{row["target"]}"': f'"{target}"'})
        connection.execute("UPDATE incidents SET target = ?", [target])
        for table, id, column in [("batches", "id", "head"), ("probes", "room", "document"), ("incidents", "id", "document")]:
            for row in connection.execute(f"SELECT {id} AS id, {column} AS document FROM {table}").fetchall():
                document = json.dumps(hostile(json.loads(row["document"])))
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE {id} = ?", [document, row["id"]])
    connection.close()
    source.close()
