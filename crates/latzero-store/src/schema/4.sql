-- Schema 4. Whose an AppID is, and what an encrypted pool's members proved before its current epoch.

CREATE TABLE app_bindings (
    app_id     TEXT PRIMARY KEY NOT NULL,
    uid        INTEGER,
    public_key BLOB,
    since      INTEGER NOT NULL
) STRICT;

CREATE TABLE pool_descriptors (
    pool       TEXT NOT NULL,
    epoch      INTEGER NOT NULL,
    descriptor BLOB NOT NULL,
    PRIMARY KEY (pool, epoch)
) STRICT;
