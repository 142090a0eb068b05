-- Schema 1. Times are unix milliseconds. Texts in JSON are opaque here.
-- Rows are independent of each other: what belongs together is changed together by the server.

CREATE TABLE app_registry (
    app_id           TEXT PRIMARY KEY NOT NULL,
    pools            TEXT NOT NULL,
    triggers         TEXT NOT NULL,
    watches          TEXT NOT NULL,
    meta             TEXT,
    protocol_version INTEGER NOT NULL CHECK (protocol_version BETWEEN 0 AND 4294967295),
    registered       INTEGER NOT NULL,
    last_seen        INTEGER NOT NULL
) STRICT;

CREATE TABLE pool_metadata (
    name       TEXT PRIMARY KEY NOT NULL,
    kind       TEXT NOT NULL,
    encrypted  INTEGER NOT NULL CHECK (encrypted IN (0, 1)),
    owner      TEXT,
    policy     TEXT,
    properties TEXT,
    descriptor BLOB,
    created    INTEGER NOT NULL,
    updated    INTEGER NOT NULL
) STRICT;

CREATE TABLE memory_blocks (
    pool        TEXT NOT NULL,
    block_id    TEXT NOT NULL,
    kind        TEXT NOT NULL CHECK (kind IN ('shared', 'persistent')),
    size        INTEGER NOT NULL CHECK (size >= 0),
    slots       INTEGER NOT NULL CHECK (slots BETWEEN 0 AND 4294967295),
    layout      TEXT,
    permissions TEXT NOT NULL,
    owner       TEXT NOT NULL,
    lifetime    TEXT NOT NULL,
    generation  INTEGER NOT NULL CHECK (generation >= 0),
    version     INTEGER NOT NULL CHECK (version >= 0),
    fence       INTEGER NOT NULL CHECK (fence >= 0),
    boot_id     TEXT,
    dev         INTEGER, -- the bits of an unsigned number
    ino         INTEGER, -- the bits of an unsigned number
    created     INTEGER NOT NULL,
    updated     INTEGER NOT NULL,
    PRIMARY KEY (pool, block_id)
) STRICT;

CREATE TABLE server_config (
    key     TEXT PRIMARY KEY NOT NULL,
    value   TEXT NOT NULL,
    updated INTEGER NOT NULL
) STRICT;

CREATE TABLE parked_calls (
    number          INTEGER PRIMARY KEY NOT NULL CHECK (number >= 0),
    pool            TEXT NOT NULL,
    process         TEXT NOT NULL,
    destination     TEXT,
    caller          TEXT NOT NULL,
    call_id         TEXT NOT NULL,
    envelope        TEXT NOT NULL,
    attachment      BLOB,
    idempotency_key TEXT,
    expires         INTEGER NOT NULL,
    attempt         INTEGER NOT NULL CHECK (attempt BETWEEN 0 AND 4294967295),
    parked          INTEGER NOT NULL
) STRICT;

CREATE TABLE parked_answers (
    number          INTEGER PRIMARY KEY NOT NULL CHECK (number >= 0),
    caller          TEXT NOT NULL,
    call_id         TEXT NOT NULL,
    pool            TEXT NOT NULL,
    idempotency_key TEXT,
    frame           BLOB NOT NULL,
    expires         INTEGER NOT NULL
) STRICT;

-- How the last run ended: 'boot_id', and 'run' = 'open' or 'clean'.
CREATE TABLE store_state (
    key   TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT;
