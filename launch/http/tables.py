"""Tables that the API adds to a queue's SQLite file: both change in one transaction, or neither does.

`asked` is what the client asked for, as JSON, with its model and seed; `details` is what became of it.
`image` is the digest of the image in the store. A deleted video still counts for its owner's quota,
and nobody sees it.
"""

TABLES = """
CREATE TABLE IF NOT EXISTS videos (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    request INTEGER NOT NULL REFERENCES requests (id),
    owner TEXT NOT NULL,
    created REAL NOT NULL,
    asked TEXT NOT NULL,
    details TEXT NOT NULL,
    size TEXT NOT NULL,
    image TEXT,
    remixed TEXT,
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS videos_by_owner ON videos (owner, number);
CREATE INDEX IF NOT EXISTS videos_by_request ON videos (request);
CREATE TABLE IF NOT EXISTS idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,
    video TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (owner, key)
);
"""
