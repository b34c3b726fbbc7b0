"""Can a store be reached, asked cheaply and before MLflow asks.

MLflow retries a database that does not answer for about 100 seconds with growing pauses and offers no setting for it.
Servers over HTTP need no such question: their time limits are ours to set (`mlflow_settings`).
"""

import contextlib
import fcntl
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from skd_dist.tracking.store import TrackingStore

_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_CONNECT_TIMEOUT_S = 5.0
_SQLITE_LOCK_TIMEOUT_S = 20.0  # as MLflow's own: another run may be creating the tables


class StoreUnreachableError(Exception):
    """A store does not answer, and why in one line."""


def prepare_store(store: TrackingStore) -> None:
    """Create the folder of a SQLite store; make sure that a database answers.

    Raises:
        StoreUnreachableError: the file cannot be written or is no database, or nobody listens on the database's port.
    """
    scheme = urlsplit(store.uri).scheme.partition("+")[0]
    try:
        if store.sqlite_path is not None:
            _prepare_sqlite(store.sqlite_path)
        elif scheme in _DEFAULT_PORTS:
            address = urlsplit(store.uri)
            host, port = address.hostname or "localhost", address.port or _DEFAULT_PORTS[scheme]
            socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, sqlite3.Error) as error:
        raise StoreUnreachableError(str(error)) from error


@contextlib.contextmanager
def opening_alone(store: TrackingStore) -> Iterator[None]:
    """Let the processes of this node that open a SQLite store do so one after another.

    Two that make its tables at once get in each other's way ("duplicate column name"), whatever MLflow's own lock does.
    """
    if store.sqlite_path is None:
        yield
        return
    # Beside the database: to open and close the database itself would drop SQLite's locks of this process.
    with store.sqlite_path.with_name(f".{store.sqlite_path.name}.opening").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare_sqlite(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")
    connection = sqlite3.connect(path, timeout=_SQLITE_LOCK_TIMEOUT_S)
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    finally:
        connection.close()
