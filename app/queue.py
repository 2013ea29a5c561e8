"""The queue: every job that was asked for, on disk from the moment it was, until a person removes it.

In:  documents to make, messages from a worker, wishes of a person (cancel, move, edit, run again).
Out: `Row`s, in the order in which they will be made.
Knows nothing of Gradio, of torch, of how a clip is made, or of who asks: page, worker, command line and tests open the
same SQLite file at the same time, each call on a connection of its own, every change one transaction.

    waiting -> running -> done | failed | cancelled | interrupted (its worker died)
       |
       `-> cancelled                        failed, cancelled and interrupted rows can be run again
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from engine.job import GenerateJob, read_job, write_job
from engine.messages import Failed, Preview, Progress, Saved, StudioError, as_dict

State = Literal["waiting", "running", "done", "failed", "cancelled", "interrupted"]
BUSY_S = 15.0  # how long a call waits for another process's transaction; ours take milliseconds

# One script per schema version, run in order inside one transaction. A change of the tables is a new entry.
MIGRATIONS = (
    """
    CREATE TABLE rows (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        rank INTEGER NOT NULL,
        state TEXT NOT NULL,
        job TEXT NOT NULL,
        grouped TEXT NOT NULL,
        progress TEXT,
        preview TEXT,
        saved TEXT,
        error TEXT,
        created REAL NOT NULL,
        started REAL,
        finished REAL,
        worker TEXT NOT NULL DEFAULT '',
        cancel INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX rows_by_state ON rows (state, rank);
    CREATE TABLE settings (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
    INSERT INTO settings VALUES ('paused', 0), ('changes', 0);
    """,
    """
    ALTER TABLE rows ADD COLUMN until REAL;
    ALTER TABLE rows ADD COLUMN tries INTEGER NOT NULL DEFAULT 0
    """,
)


@dataclass(frozen=True)
class Row:
    """One job in the queue, as it stands.

    `position` is the place in the waiting line, 0 for the next one, -1 for a row that is not waiting.
    `job` is None when the stored document cannot be read by this studio; `error` then says why, and `document` still
    holds its text. `progress` is a `Progress`, `saved` a `Saved`, `error` a `Failed`, each as `messages.as_dict` wrote
    it. `created`, `started` and `finished` are seconds since the epoch. `until` is the likeness that every subject has
    to reach, None where nobody asks, and `tries` how many more seeds may be drawn for it. `cancel`: it is running, and
    somebody wants it to stop.
    """

    id: int
    position: int
    state: State
    job: GenerateJob | None
    document: str
    group: str
    progress: dict[str, Any] | None
    preview: Path | None
    saved: dict[str, Any] | None
    error: dict[str, Any] | None
    created: float
    started: float | None
    finished: float | None
    worker: str
    until: float | None = None
    tries: int = 0
    cancel: bool = False


class Queue:
    """The queue in one SQLite file. Cheap to construct, safe to share between threads and to open in many processes.

    Raises (from every method):
        StudioError: the file cannot be opened, read or written, with the reason (full disk, no permission, damage).
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudioError(
                f"The queue cannot be kept in {self.path.parent}.",
                f"That folder cannot be made ({error.strerror}).",
                "Choose another folder with --outputs.",
            ) from error
        self._prepare()

    # --- what a person does --------------------------------------------------------------------------------------

    def add(self, job: GenerateJob, *, group: str = "", until: float | None = None, tries: int = 0) -> int:
        """Put a job at the end of the line. Returns the row's id.

        Args:
            group: ties variants together.
            until: the likeness that the weakest subject has to reach; a clip below it is followed by the next seed.
            tries: how many further seeds may be drawn for that.
        """
        with self._change() as db:
            return _append(db, write_job(job, indent=None), group, until, tries)

    def rows(self, *, states: Iterable[State] | None = None, limit: int = 200) -> list[Row]:
        """What is running, then the waiting line in its order, then what has ended, latest first.

        Args:
            states: only these; None for all.
            limit: at most this many rows. Running and waiting come first, so a long history never hides them.
        """
        where, wanted = "", []
        if states is not None:
            wanted = sorted(set(states))
            where = f"WHERE state IN ({', '.join('?' * len(wanted))})"
        with self._open() as db:
            places = _places(db)
            found = db.execute(f"SELECT * FROM rows {where} {_ORDER} LIMIT ?", (*wanted, limit))
            return [_row(values, places) for values in found]

    def get(self, id: int) -> Row:
        """One row.

        Raises:
            StudioError: there is no such row.
        """
        with self._open() as db:
            return _row(_fetch(db, id), _places(db))

    def cancel(self, id: int) -> None:
        """A waiting row is cancelled at once; a running one at its worker's next word. Others stay as they are."""
        with self._change() as db:
            _fetch(db, id)
            _end(db, id, "cancelled", was=("waiting",))
            db.execute("UPDATE rows SET cancel = 1 WHERE id = ? AND state = 'running'", (id,))

    def run_again(self, id: int) -> int:
        """Send a row that failed, was cancelled or interrupted to the end of the line, and return its id.

        A row that is done keeps its clip: a copy of it is queued, and the copy's id returned.

        Raises:
            StudioError: the row is still waiting or running.
        """
        with self._change() as db:
            row = _fetch(db, id)
            if row["state"] in ("waiting", "running"):
                raise StudioError(
                    f"Job {id} cannot be run again yet.",
                    f"It is {row['state']}.",
                    "Let it end or cancel it first, or duplicate it.",
                )
            if row["state"] == "done":
                return _append(db, row["job"], row["grouped"], row["until"], row["tries"])
            db.execute(
                "UPDATE rows SET state = 'waiting', rank = ?, progress = NULL, preview = NULL, error = NULL, "
                "started = NULL, finished = NULL, worker = '', cancel = 0 WHERE id = ?",
                (_last_rank(db) + 1, id),
            )
            return id

    def duplicate(self, id: int) -> int:
        """Queue the same job once more, whatever became of the first. Returns the new row's id."""
        with self._change() as db:
            row = _fetch(db, id)
            return _append(db, row["job"], row["grouped"])

    def move(self, id: int, position: int) -> None:
        """Put a waiting row at this place of the line: 0 is next, anything past the end is last.

        Raises:
            StudioError: the row is not waiting.
        """
        with self._change() as db:
            _only_waiting(_fetch(db, id), "moved")
            line = db.execute("SELECT id, rank FROM rows WHERE state = 'waiting' ORDER BY rank").fetchall()
            order = [row["id"] for row in line if row["id"] != id]
            order.insert(max(0, position), id)
            ranks = [row["rank"] for row in line]
            db.executemany("UPDATE rows SET rank = ? WHERE id = ?", zip(ranks, order, strict=True))

    def edit(self, id: int, job: GenerateJob) -> None:
        """Replace the document of a waiting row; it keeps its place.

        Raises:
            StudioError: the row is not waiting any more.
        """
        with self._change() as db:
            _only_waiting(_fetch(db, id), "edited")
            db.execute("UPDATE rows SET job = ? WHERE id = ?", (write_job(job, indent=None), id))

    def remove(self, id: int) -> None:
        """Forget a row. Its clip, when it has one, stays in the outputs folder.

        Raises:
            StudioError: it is being made right now.
        """
        with self._change() as db:
            if _fetch(db, id)["state"] == "running":
                raise StudioError(f"Job {id} cannot be removed.", "It is being made right now.", "Cancel it first.")
            db.execute("DELETE FROM rows WHERE id = ?", (id,))

    def pause(self) -> None:
        """Let no further row start. The running one goes on to its end."""
        self._set_paused(True)

    def resume(self) -> None:
        """Let the next row start."""
        self._set_paused(False)

    @property
    def paused(self) -> bool:
        """Whether the line stands still."""
        return bool(self._setting("paused"))

    def changes(self) -> int:
        """A number that grows with every change, by whomever: a page asks this and repaints when it moved."""
        return self._setting("changes")

    # --- what a worker does --------------------------------------------------------------------------------------

    def take(self, worker: str) -> Row | None:
        """The next waiting row, now running under this worker's name; None when there is none or the line is paused.

        No two takers get the same row. A row whose document this studio cannot read is marked failed and passed over.
        """
        # Asked once a second by every idle worker: look first, so that waiting for work writes nothing.
        with self._open() as db:
            if not _may_start(db):
                return None
        with self._change() as db:
            if not _may_start(db):
                return None
            for row in db.execute("SELECT id, job FROM rows WHERE state = 'waiting' ORDER BY rank").fetchall():
                _, refusal = _read(row["job"])
                if refusal is not None:
                    _end(db, row["id"], "failed", error=refusal, was=("waiting",))
                    continue
                db.execute(
                    "UPDATE rows SET state = 'running', started = ?, worker = ?, cancel = 0 WHERE id = ?",
                    (time.time(), worker, row["id"]),
                )
                return _row(_fetch(db, row["id"]), {})
        return None

    def report(self, id: int, message: Progress | Preview) -> None:
        """Write down how far a running row is, or what it looks like so far."""
        if isinstance(message, Preview):
            column, value = "preview", str(message.picture)
        else:
            column, value = "progress", _json(message)
        with self._change() as db:
            db.execute(f"UPDATE rows SET {column} = ? WHERE id = ? AND state = 'running'", (value, id))

    def finish(self, id: int, saved: Saved) -> None:
        """The clip is on disk. Where its weakest subject falls short of what was asked for, the next seed is queued."""
        with self._change() as db:
            row = db.execute("SELECT * FROM rows WHERE id = ?", (id,)).fetchone()
            # Also from "interrupted": a worker that was given up too early has made its clip all the same.
            _end(db, id, "done", saved=_json(saved), was=("running", "interrupted"))
            if row is None or row["cancel"] or row["until"] is None or row["tries"] < 1:
                return
            job, _ = _read(row["job"])
            if job is not None and saved.weakest is not None and saved.weakest < row["until"]:
                following = job.model_copy(update={"seed": (job.seed + 1) % 2**63})
                _append(db, write_job(following, indent=None), row["grouped"], row["until"], row["tries"] - 1)

    def fail(self, id: int, failed: Failed) -> None:
        """The run stopped with an error for a person."""
        with self._change() as db:
            _end(db, id, "failed", error=_json(failed), was=("running",))

    def cancelled(self, id: int) -> None:
        """The run has stopped because it was asked to."""
        with self._change() as db:
            _end(db, id, "cancelled", was=("running",))

    def cancel_requested(self, id: int) -> bool:
        """Whether a person wants this running row to stop. A row that was removed counts as cancelled."""
        with self._open() as db:
            row = db.execute("SELECT cancel FROM rows WHERE id = ?", (id,)).fetchone()
        return row is None or bool(row["cancel"])

    def interrupt(self, worker: str | None = None, *, error: Failed | None = None) -> int:
        """Mark the running rows of a worker that died, or of all workers when none is named. Returns how many.

        `error` says what became of the worker. A row that was being cancelled when its worker died is cancelled:
        nobody waits for it.
        """
        which, names = "", ()
        if worker is not None:
            which, names = "AND worker = ?", (worker,)
        with self._change() as db:
            return db.execute(
                "UPDATE rows SET state = CASE WHEN cancel THEN 'cancelled' ELSE 'interrupted' END, finished = ?, "
                f"error = CASE WHEN cancel THEN NULL ELSE ? END WHERE state = 'running' {which}",
                (time.time(), error and _json(error), *names),
            ).rowcount

    # --- the file ------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Create the tables, or bring those of an older studio up to date."""
        with self._open() as db:
            # WAL: readers never wait for the writer. A folder without shared memory (some network drives) silently
            # keeps SQLite's older journal, which is slower and just as safe.
            db.execute("PRAGMA journal_mode = WAL")
            if _version(db) == len(MIGRATIONS):
                return
            db.execute("BEGIN IMMEDIATE")
            version = _version(db)  # again, now that no other process can be in the middle of the same work
            if version > len(MIGRATIONS):
                raise StudioError(
                    f"The queue in {self.path} was written by a newer studio.",
                    f"Its format is {version}; this studio reads up to {len(MIGRATIONS)}.",
                    "Update the studio, or point --outputs at another folder.",
                )
            for script in MIGRATIONS[version:]:
                for statement in script.split(";"):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            db.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one call, closed at its end: nothing to share between threads, nothing to leak."""
        try:
            db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        except sqlite3.Error as error:
            raise self._explained(error) from error
        try:
            db.row_factory = sqlite3.Row
            yield db
        except sqlite3.Error as error:
            raise self._explained(error) from error
        finally:
            db.close()  # rolls back whatever was not committed

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction that either happens and moves the counter, or does not happen."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            before = db.total_changes
            yield db
            if db.total_changes > before:
                db.execute("UPDATE settings SET value = value + 1 WHERE key = 'changes'")
            db.execute("COMMIT")

    def _setting(self, key: str) -> int:
        with self._open() as db:
            return db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()["value"]

    def _set_paused(self, paused: bool) -> None:
        with self._change() as db:
            db.execute("UPDATE settings SET value = ? WHERE key = 'paused'", (int(paused),))

    def _explained(self, error: sqlite3.Error) -> StudioError:
        text = str(error)
        for sign, why, next_step in _REASONS:
            if sign in text:
                return StudioError(f"The queue in {self.path} cannot be used.", why, next_step)
        return StudioError(
            f"The queue in {self.path} cannot be used.", f"SQLite says: {text}.", "Restart the studio and try again."
        )


_REASONS = (
    ("full", "The disk is full.", "Free some space, then try again."),
    ("disk I/O", "The disk refuses to read or write; most often it is full.", "Free some space, then try again."),
    ("readonly", "The file or its folder is read-only.", "Allow writing there, or choose another folder."),
    ("unable to open", "The file or its folder cannot be opened.", "Allow writing there, or choose another folder."),
    ("locked", "Another program keeps the file busy.", "Close whatever has it open, then try again."),
    ("not a database", "The file is not a queue.", "Move it out of the way; the studio starts a new one."),
    ("malformed", "The file is damaged.", "Move it out of the way; the studio starts a new one."),
)

# Running, then the line, then what has ended.
_ORDER = """
    ORDER BY CASE state WHEN 'running' THEN 0 WHEN 'waiting' THEN 1 ELSE 2 END,
        CASE WHEN state = 'waiting' THEN rank END, finished DESC, id DESC
"""


@lru_cache(maxsize=256)  # a page reads the same rows every second, and a document may carry 1 MB of pictures
def _read(document: str) -> tuple[GenerateJob | None, str | None]:
    """The stored job, or, when this studio cannot read it, the `Failed` that says why, as JSON."""
    try:
        return read_job(document), None
    except StudioError as error:
        return None, _json(Failed.of(error))


def _places(db: sqlite3.Connection) -> dict[int, int]:
    """Row id -> place in the waiting line, 0 for the next one."""
    line = db.execute("SELECT id FROM rows WHERE state = 'waiting' ORDER BY rank")
    return {row["id"]: place for place, row in enumerate(line)}


def _row(values: sqlite3.Row, places: dict[int, int]) -> Row:
    job, refusal = _read(values["job"])
    unreadable = refusal is not None and values["state"] == "waiting"  # what has ended keeps how it ended
    return Row(
        id=values["id"],
        position=-1 if unreadable else places.get(values["id"], -1),
        state="failed" if unreadable else values["state"],
        job=job,
        document=values["job"],
        group=values["grouped"],
        progress=_values(values["progress"]),
        preview=Path(values["preview"]) if values["preview"] else None,
        saved=_values(values["saved"]),
        error=_values(values["error"] or refusal),
        created=values["created"],
        started=values["started"],
        finished=values["finished"],
        worker=values["worker"],
        until=values["until"],
        tries=values["tries"],
        cancel=bool(values["cancel"]),
    )


def _fetch(db: sqlite3.Connection, id: int) -> sqlite3.Row:
    values = db.execute("SELECT * FROM rows WHERE id = ?", (id,)).fetchone()
    if values is None:
        raise StudioError(f"There is no job {id} in the queue.", "It was removed.", "Look at the queue as it is now.")
    return values


def _may_start(db: sqlite3.Connection) -> bool:
    """Whether a row waits and the line is not paused."""
    return db.execute(
        "SELECT EXISTS (SELECT 1 FROM rows WHERE state = 'waiting') AND value = 0 FROM settings WHERE key = 'paused'"
    ).fetchone()[0]


def _append(db: sqlite3.Connection, document: str, group: str, until: float | None = None, tries: int = 0) -> int:
    added = db.execute(
        "INSERT INTO rows (rank, state, job, grouped, created, until, tries) VALUES (?, 'waiting', ?, ?, ?, ?, ?)",
        (_last_rank(db) + 1, document, group, time.time(), until, tries),
    )
    assert added.lastrowid is not None
    return added.lastrowid


def _last_rank(db: sqlite3.Connection) -> int:
    return db.execute("SELECT COALESCE(MAX(rank), 0) AS last FROM rows").fetchone()["last"]


def _end(
    db: sqlite3.Connection,
    id: int,
    state: State,
    *,
    was: tuple[State, ...],
    saved: str | None = None,
    error: str | None = None,
) -> None:
    db.execute(
        "UPDATE rows SET state = ?, saved = ?, error = ?, progress = NULL, finished = ?, cancel = 0 "
        f"WHERE id = ? AND state IN ({', '.join('?' * len(was))})",
        (state, saved, error, time.time(), id, *was),
    )


def _only_waiting(row: sqlite3.Row, verb: str) -> None:
    if row["state"] != "waiting":
        raise StudioError(
            f"Job {row['id']} cannot be {verb} any more.", f"It is {row['state']}.", "Duplicate it and change the copy."
        )


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def _json(message: Progress | Saved | Failed) -> str:
    return json.dumps(as_dict(message), ensure_ascii=False)


def _values(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return json.loads(text)
