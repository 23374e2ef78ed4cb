-- Facts about this state directory.
CREATE TABLE meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Rewritten after a COMMIT of unknown outcome, because the write replaces that COMMIT in the log (see
-- writer.rs).
INSERT INTO meta (key, value) VALUES ('settled', '0');

-- The VMs that exist.
CREATE TABLE vms (
    uid        TEXT    NOT NULL PRIMARY KEY,
    vm_id      TEXT    NOT NULL,
    generation INTEGER NOT NULL,
    format     INTEGER NOT NULL,
    record     TEXT    NOT NULL
) STRICT;

CREATE UNIQUE INDEX vms_name ON vms (vm_id);

-- The event log. AUTOINCREMENT, because a place in the log is never given twice, even after all events
-- have expired.
CREATE TABLE events (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ms INTEGER NOT NULL,
    vm_id   TEXT    NOT NULL,
    format  INTEGER NOT NULL,
    event   TEXT    NOT NULL
) STRICT;

CREATE INDEX events_vm ON events (vm_id, seq);
CREATE INDEX events_time ON events (time_ms);
