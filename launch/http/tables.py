"""Tables that the API adds to a queue's SQLite file: both change in one transaction, or neither does.

`asked` is what the client asked for, as JSON, with its model and seed; `details` is what became of it.
`image` is the digest of the image in the store. Nobody sees a deleted video, which goes when it counts
towards no quota any more. `film` is the film that a video was made for; `ended` and `problem` are those of
joining its shots. `idempotency` has the id of what a client's key made: of a video, or of a film.
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
    film TEXT,
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS videos_by_owner ON videos (owner, number);
CREATE INDEX IF NOT EXISTS videos_by_request ON videos (request);
CREATE TABLE IF NOT EXISTS films (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    created REAL NOT NULL,
    title TEXT NOT NULL,
    ended REAL,
    problem TEXT NOT NULL DEFAULT '',
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS films_by_owner ON films (owner, number);
CREATE TABLE IF NOT EXISTS shots (
    film TEXT NOT NULL,
    place INTEGER NOT NULL,
    video TEXT NOT NULL,
    title TEXT NOT NULL,
    fade INTEGER NOT NULL,
    PRIMARY KEY (film, place)
);
CREATE TABLE IF NOT EXISTS idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,
    video TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (owner, key)
);
"""
