"""The state directory: who holds it, what is refused, and what a full disk does."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from chiron_engine.cluster.batch_errors import BatchStoreCorrupt, BatchStoreFull, BatchStoreLocked
from chiron_engine.cluster.batch_records import NewBatch
from chiron_engine.cluster.batch_store import DATABASE_NAME, BatchStore
from tests.cluster.batch_store_cases import NOW, new_line, new_lines

HOLDER = """
import sys, time
from pathlib import Path
from chiron_engine.cluster.batch_store import BatchStore
store = BatchStore(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_opener_is_refused_at_once_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        started = time.monotonic()
        with pytest.raises(BatchStoreLocked, match=f"in use by process {holder.pid};") as caught:
            BatchStore(tmp_path)
        assert time.monotonic() - started < 2
        assert caught.value.pid == holder.pid
        assert holder.poll() is None
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with BatchStore(tmp_path) as store:
        assert store.list() == ()


def test_the_first_opener_is_undisturbed(tmp_path: Path) -> None:
    with BatchStore(tmp_path) as store:
        for number in range(3):
            with pytest.raises(BatchStoreLocked, match=f"process {os.getpid()};"):
                BatchStore(tmp_path)
            store.submit(NewBatch(f"b{number}"), new_lines(2), NOW)
        assert len(store.list()) == 3
    BatchStore(tmp_path).close()


def test_only_the_thread_that_opened_it_may_use_it(tmp_path: Path) -> None:
    raised: list[BaseException] = []

    def use(store: BatchStore) -> None:
        try:
            store.list()
        except sqlite3.ProgrammingError as error:
            raised.append(error)

    with BatchStore(tmp_path) as store:
        thread = threading.Thread(target=use, args=(store,))
        thread.start()
        thread.join()
    assert len(raised) == 1


def stored(directory: Path) -> Path:
    """A database with content, all of it in the one file."""
    with BatchStore(directory) as store:
        store.submit(NewBatch("b"), [new_line(str(i), os.urandom(3000)) for i in range(50)], NOW)
    return directory / DATABASE_NAME


def refused(directory: Path, says: str) -> None:
    path = directory / DATABASE_NAME
    before = path.read_bytes()
    with pytest.raises(BatchStoreCorrupt, match=says):
        BatchStore(directory)
    assert path.read_bytes() == before
    with pytest.raises(BatchStoreCorrupt, match=says):  # the refusal has given the lock back
        BatchStore(directory)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(stored(tmp_path))
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA user_version = 7")
    db.close()
    refused(tmp_path, "has schema version 7, this program reads version 1")


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / DATABASE_NAME)
    db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()
    refused(tmp_path, "the database of another program")


@pytest.mark.parametrize("content", [b"x", b"no database " * 1000])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(content)
    refused(tmp_path, "no SQLite database")


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = stored(tmp_path)
    os.truncate(path, int(path.stat().st_size * keep))
    refused(tmp_path, "is damaged")


def test_a_file_with_a_torn_page_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path)
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * 8 * 4096)
    refused(tmp_path, "is damaged")


def test_a_log_without_its_database_is_refused(tmp_path: Path) -> None:
    """SQLite would drop the log, and what was committed to it."""
    (tmp_path / DATABASE_NAME).touch()
    (tmp_path / f"{DATABASE_NAME}-wal").write_bytes(b"committed")
    refused(tmp_path, "its log")
    assert (tmp_path / f"{DATABASE_NAME}-wal").read_bytes() == b"committed"


def test_a_full_database_refuses_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with BatchStore(tmp_path) as store:
        (line,) = [line.line_id for line in store.submit(NewBatch("first"), [new_line()], NOW).lines]
        store.claim([line], NOW)
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(BatchStoreFull, match="disk of the batch store is full"):
            store.submit(NewBatch("second"), [new_line(str(i), b"x" * 9000) for i in range(9)], NOW)
        with pytest.raises(BatchStoreFull), store.transaction():
            store.finish(line, 1, b"x" * 90_000, NOW)
        assert [batch.batch_id for batch in store.list()] == ["first"]
        store._db.execute("PRAGMA max_page_count = 100000")
        assert store.finish(line, 1, b"x" * 90_000, NOW)
        assert store.submit(NewBatch("second"), new_lines(9), NOW).is_new


FULL_DISK = """
import resource, sys
from pathlib import Path
from chiron_engine.cluster.batch_errors import BatchStoreFull
from chiron_engine.cluster.batch_records import NewBatch
from chiron_engine.cluster.batch_store import BatchStore
from tests.cluster.batch_store_cases import NOW, new_line, results_of

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

store = BatchStore(Path(sys.argv[1]))
limit(1 << 20)
acked = []
for number in range(10_000):
    try:
        store.submit(NewBatch(f"b{number}"), [new_line(request=bytes(5000))], NOW)
    except BatchStoreFull:
        break
    acked.append(f"b{number}")
refused = 0
for batch in store.list(10_000):
    try:
        store.cancel(batch.batch_id, NOW)
    except BatchStoreFull:
        refused += 1
assert refused, "a full disk took every write"
cancelled = [b.batch_id for b in store.list(10_000) if b.cancelled_at is not None]
assert len(cancelled) == len(acked) - refused
limit(resource.RLIM_INFINITY)
assert store.submit(NewBatch("after"), [new_line()], NOW).is_new
print(*acked, "after", flush=True)
"""


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    acked = run.stdout.split()
    assert len(acked) > 20
    with BatchStore(tmp_path) as store:
        assert sorted(batch.batch_id for batch in store.list(10_000)) == sorted(acked)
        assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
