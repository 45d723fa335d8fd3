-- A history as livekit-canary 0.1.0 wrote it (format 1). Never edit the statements: they stand for files in the field.
PRAGMA auto_vacuum = INCREMENTAL;

CREATE TABLE rooms (
    room TEXT PRIMARY KEY,
    project TEXT NOT NULL,
    target TEXT NOT NULL,
    boot TEXT NOT NULL,
    opened_at INTEGER NOT NULL,
    reserved INTEGER NOT NULL,
    settled INTEGER,
    gone_at INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX rooms_by_age ON rooms (opened_at);
CREATE INDEX rooms_left ON rooms (room) WHERE gone_at IS NULL;

CREATE TABLE batches (
    id TEXT PRIMARY KEY,
    target TEXT NOT NULL,
    project TEXT NOT NULL,
    started_at INTEGER NOT NULL,
    ended_at INTEGER NOT NULL,
    result TEXT NOT NULL,
    ok INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    aborted INTEGER NOT NULL,
    head TEXT NOT NULL
) STRICT;
CREATE INDEX batches_of_target ON batches (target, id);
CREATE INDEX batches_by_result ON batches (result, id);
CREATE INDEX batches_without_failure ON batches (started_at) WHERE failed = 0;
CREATE INDEX batches_with_failure ON batches (started_at) WHERE failed > 0;

CREATE TABLE probes (
    room TEXT PRIMARY KEY,
    batch TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    reason TEXT,
    started_at INTEGER NOT NULL,
    document TEXT NOT NULL
) STRICT;
CREATE INDEX probes_of_batch ON probes (batch, place);

CREATE TABLE agents_seen (
    target TEXT NOT NULL,
    agent_name TEXT NOT NULL,
    first_seen_at INTEGER NOT NULL,
    PRIMARY KEY (target, agent_name)
) STRICT, WITHOUT ROWID;

CREATE TABLE ledger (lost INTEGER NOT NULL) STRICT;

-- 2026-03-10 at 10:00, 11:00 and 11:30 UTC: a settled room that is gone, one that is neither, and one of another project.
INSERT INTO rooms VALUES
    ('canary-old-1', 'acme', 'support', '00000000000000b1', 1773136800000, 180, 120, 1773136900000),
    ('canary-old-2', 'acme', 'support', '00000000000000b1', 1773140400000, 180, NULL, NULL),
    ('canary-old-3', 'beta', 'sales', '00000000000000b1', 1773142200000, 60, 60, NULL);
INSERT INTO batches VALUES
    ('b-old', 'support', 'acme', 1773136800000, 1773136840000, 'degraded', 1, 1, 0, '{"batch_id":"b-old"}');
INSERT INTO probes VALUES
    ('canary-old-1', 'b-old', 0, 'ok', NULL, 1773136800000, '{"room":"canary-old-1","outcome":"ok"}'),
    ('canary-old-4', 'b-old', 1, 'failed', 'agent_silent', 1773136801000, '{"room":"canary-old-4","outcome":"failed"}');
INSERT INTO agents_seen VALUES ('support', 'my-agent', 1773136800000);
INSERT INTO ledger VALUES (0);
PRAGMA user_version = 1;
