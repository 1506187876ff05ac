"""One coordinator per study: a lease in the study database, with a fencing token and a heartbeat.

Whoever runs a study holds its lease: a row of the table ``lcsc_leases`` in the same database. Taking it raises the
token by one. Every transaction of the holder checks, just before it commits, that the token is still its own. So a
coordinator that was paused while another one took its study over cannot write another row.

A lease is given up at the end. One that was not given up can be taken when its holder is dead: its process is gone
(on the same machine), or its heartbeat is older than ``LEASE_SECONDS``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm

from lcsc_opt.base.errors import LeaseLostError, StudyHeldError

LEASE_SECONDS = 90.0  # longer than anybody but a search waits for a lock, so that waiting does not cost the lease
HEARTBEAT_SECONDS = 10.0


class _Base(orm.DeclarativeBase):
    pass


class _Row(_Base):
    """``holder`` is ``None`` when nobody holds the lease; times are seconds since 1970.

    ``place`` says which file the lease was taken in; in a copy of that file, nobody holds the lease.
    """

    __tablename__ = "lcsc_leases"

    study_id: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    token: orm.Mapped[int]
    holder: orm.Mapped[str | None] = orm.mapped_column(sa.String(255))
    machine: orm.Mapped[str | None] = orm.mapped_column(sa.String(255))
    process: orm.Mapped[int | None]
    process_started: orm.Mapped[str | None] = orm.mapped_column(sa.String(64))
    place: orm.Mapped[str] = orm.mapped_column(sa.Text)
    acquired_at: orm.Mapped[float] = orm.mapped_column(sa.Float(53))
    heartbeat_at: orm.Mapped[float] = orm.mapped_column(sa.Float(53))


@dataclasses.dataclass(frozen=True)
class Process:
    """A process. Its start time tells it from a later one with the same number."""

    host: str
    machine: str
    number: int
    started: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return cls(platform.node(), _machine(), os.getpid(), _started(os.getpid()))


def _machine() -> str:
    """The machine since it was booted; another container of the same machine may see other processes."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - it is no path
        return f"{platform.node()} {boot} {namespace}"
    return platform.node()


def _started(process: int) -> str:
    """When a process started, in the kernel's ticks; empty when it is gone or this system does not say."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[19]


def create_table(engine: sa.Engine) -> None:
    """Make the table of leases where it is not there yet."""
    _Base.metadata.create_all(engine)


def has_table(engine: sa.Engine) -> bool:
    """Whether the table of leases is there."""
    return sa.inspect(engine).has_table(_Row.__tablename__)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lease, as far as the database says; ``alive`` when nobody else can take it now."""

    host: str
    process: int | None
    acquired_at: float
    heartbeat_at: float
    alive: bool


def holder(engine: sa.Engine, study_id: int) -> Holder | None:
    """Who holds the lease of a study, alive or dead; ``None`` when nobody does. Reads only."""
    return holders(engine).get(study_id) if has_table(engine) else None


def holders(engine: sa.Engine) -> dict[int, Holder]:
    """Who holds the lease of each study that somebody holds, alive or dead. Reads only; the table must be there."""
    process = Process.current()
    with orm.Session(engine) as session:
        rows = session.scalars(sa.select(_Row).where(_Row.holder.is_not(None)))
        return {
            row.study_id: Holder(
                str(row.holder), row.process, row.acquired_at, row.heartbeat_at, _is_alive(row, process)
            )
            for row in rows
            if _is_of(row, engine)
        }


class Lease:
    """The right to write one study, for as long as the ``with`` block of :func:`hold` lasts."""

    def __init__(self, engine: sa.Engine, study: str, study_id: int, token: int) -> None:
        self._engine, self._study, self._study_id, self.token = engine, study, study_id, token
        self._chosen = sa.select(_Row.token).where(_Row.study_id == study_id).with_for_update()

    def check(self, session: orm.Session) -> None:
        """Within a transaction: hold the row until the transaction ends, and see that the token is ours.

        Raises:
            LeaseLostError: another process has taken the study over.
        """
        if session.execute(self._chosen).scalar_one_or_none() != self.token:
            raise LeaseLostError(
                f"{self._study}: another process has taken this study over; nothing more was written from here"
            )

    def beat(self) -> bool:
        """Say that the holder is alive. Returns whether the lease is still ours."""
        alive = sa.update(_Row).where(_Row.study_id == self._study_id, _Row.token == self.token)
        with orm.Session(self._engine) as session, session.begin():
            return self._changed(session.execute(alive.values(heartbeat_at=time.time())))

    def release(self) -> None:
        """Give the lease up, unless somebody else has it already."""
        mine = sa.update(_Row).where(_Row.study_id == self._study_id, _Row.token == self.token)
        with orm.Session(self._engine) as session, session.begin():
            session.execute(mine.values(holder=None))

    @staticmethod
    def _changed(result: Any) -> bool:
        return bool(result.rowcount == 1)


@contextlib.contextmanager
def hold(
    engine: sa.Engine,
    study: str,
    study_id: int,
    *,
    take_over: bool = False,
    process: Process | None = None,
    since: float | None = None,
) -> Iterator[Lease]:
    """Take the lease of a study, keep it alive by heartbeats, and give it up at the end.

    Args:
        engine: of the study database.
        study: its name, for messages.
        study_id: the database's key of it.
        take_over: take it even from a holder that seems to be alive.
        process: who takes it; by default this process.
        since: when, by default now. It identifies an earlier attempt whose commit was not acknowledged.

    Raises:
        StudyHeldError: at once; the message says who holds it, on which host, and since when.
    """
    moment = time.time() if since is None else since
    lease = _acquire(engine, study, study_id, process or Process.current(), take_over=take_over, since=moment)
    with _heartbeat(lease.beat):
        try:
            yield lease
        except (KeyboardInterrupt, SystemExit) as error:
            _forget_locals(error)  # among them an interrupted statement, which keeps SQLite's lock while it is there
            raise
        finally:
            _release(lease)


def _forget_locals(error: BaseException | None) -> None:
    """Forget the local variables in the tracebacks of an exception and of its causes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _release(lease: Lease) -> None:
    """Release the lease, with a second attempt, since a connection may just have been lost.

    Where both fail, others can take the lease once this process has ended.
    """
    for _ in range(2):
        with contextlib.suppress(sa.exc.SQLAlchemyError):
            lease.release()
            return


def _acquire(engine: sa.Engine, study: str, study_id: int, process: Process, *, take_over: bool, since: float) -> Lease:
    try:
        with orm.Session(engine) as session, session.begin():
            row = session.get(_Row, study_id, with_for_update=True)
            if row is None:
                row = _Row(study_id=study_id, token=0)
                session.add(row)
            elif _took(row, process, since):
                return Lease(engine, study, study_id, row.token)
            elif row.holder is not None and not take_over and _is_of(row, engine) and _is_alive(row, process):
                raise StudyHeldError(_who_holds(row, study))
            _take(row, process, since, _place(engine))
            return Lease(engine, study, study_id, row.token)
    except sa.exc.IntegrityError:  # somebody made the row at the same moment: look at it again
        return _acquire(engine, study, study_id, process, take_over=take_over, since=since)


def _took(row: _Row, process: Process, since: float) -> bool:
    """Whether this very attempt took the lease before, and lost the connection over it."""
    who = (row.holder, row.machine, row.process, row.process_started, row.acquired_at)
    return who == (process.host, process.machine, process.number, process.started, since)


def _place(engine: sa.Engine) -> str:
    """The inode and the path of an SQLite file; empty for a server, of which there are no copies."""
    name = engine.url.database
    if engine.dialect.name != "sqlite" or name in (None, "", ":memory:"):
        return ""
    path = Path(str(name)).resolve()
    return f"{path.stat().st_ino} {path}" if path.exists() else ""


def _is_of(row: _Row, engine: sa.Engine) -> bool:
    """Whether a lease was taken in this file, also before it was moved, and not in a file that it was copied from."""
    taken, here = (place.partition(" ") for place in (row.place, _place(engine)))
    return taken[0] == here[0] or taken[2] == here[2]


def _take(row: _Row, process: Process, since: float, place: str) -> None:
    row.token += 1
    row.holder, row.machine = process.host, process.machine
    row.process, row.process_started = process.number, process.started
    row.acquired_at, row.heartbeat_at, row.place = since, time.time(), place


def _is_alive(row: _Row, asking: Process) -> bool:
    if time.time() - row.heartbeat_at > LEASE_SECONDS:
        return False
    if row.machine != asking.machine or not row.process_started or row.process is None:
        return True
    return _started(row.process) == row.process_started


def _who_holds(row: _Row, study: str) -> str:
    since = datetime.datetime.fromtimestamp(row.acquired_at).astimezone().isoformat(sep=" ", timespec="seconds")
    heard = time.time() - row.heartbeat_at
    return (
        f"{study}: is being run on {row.holder} by process {row.process} since {since}, last heard of {heard:.0f} s "
        "ago; wait for it, or, if it is dead, use --take-over"
    )


@contextlib.contextmanager
def _heartbeat(beat: Callable[[], bool]) -> Iterator[None]:
    """Beat from a thread of its own until the block ends or the lease is lost."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(sa.exc.SQLAlchemyError):  # a database that is away for a moment
                if not beat():
                    return

    thread = threading.Thread(target=run, name="lease heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
