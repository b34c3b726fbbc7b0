"""One job per run directory: a file that says who is at work, and is touched while they are.

    RUN/lock.json: host, pid, when that process began, and a token; its modification time is the heartbeat

A lock of this host is judged by its process, one of another host by its heartbeat: two clocks are never compared, it is
only watched whether the time of the file still moves. A job that is being stopped holds its lock until it is gone, so a
start that finds a living lock waits for a while before it is refused.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from skd_dist.errors import UserError

FILE = "lock.json"

_BEAT_S = 2.0
_SILENT_S = 10.0
"""A heartbeat that does not move for so long is none: several beats, and the caches of network file systems (guess)."""
_LOOK_S = 0.2


class RunLock:
    """The lock of one run directory, held. Made by `take_lock`."""

    def __init__(self, path: Path, token: str) -> None:
        self._path = path
        self._token = token
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the directory free. May be called again."""
        self._released.set()
        if _read(self._path).get("token") == self._token:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_S):
            try:
                os.utime(self._path)
            except OSError:  # removed by hand, or a file system that is away: nothing here depends on it
                continue


def take_lock(run_dir: Path, *, patience_s: float) -> RunLock:
    """Lock a run directory for this process.

    Args:
        run_dir: exists.
        patience_s: how long to wait for a living lock to go.

    Raises:
        UserError: another job is at work there.
        OSError: the directory cannot be written.
    """
    path, token = run_dir / FILE, secrets.token_hex(8)
    own = {"host": platform.node(), "pid": os.getpid(), "began": _began(os.getpid()), "token": token}
    started = time.monotonic()
    seen: tuple[int, float] | None = None
    while not _create(path, own):
        holder = _read(path)
        beat = _beat_of(path)
        if seen is None or beat != seen[0]:
            seen = (beat, time.monotonic())
        silent_s = time.monotonic() - seen[1]
        here = holder.get("host") == own["host"]
        if _is_dead(holder) or (not here and silent_s > _SILENT_S):
            _take_away(path, holder)
        elif time.monotonic() - started > (patience_s if here else max(patience_s, 2 * _SILENT_S)):
            raise UserError(
                f"another job is at work in {run_dir}",
                got=f"process {holder.get('pid')} on {holder.get('host')}",
                do="wait until it has ended, or give another --run-dir",
            )
        time.sleep(_LOOK_S)
    return RunLock(path, token)


def _create(path: Path, own: dict[str, Any]) -> bool:
    """Whether the file is ours now. It appears with its content: a link to a file that is complete."""
    temporary = path.with_name(f".{path.name}.{own['token']}")
    temporary.write_text(json.dumps(own))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links; there the file appears empty for a moment
        try:
            with path.open("x") as file:
                file.write(json.dumps(own))
        except FileExistsError:
            return False
    finally:
        temporary.unlink()
    return True


def _take_away(path: Path, holder: dict[str, Any]) -> None:
    """Remove a dead lock, unless somebody else has put a living one in its place meanwhile."""
    grave = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.rename(grave)
    except FileNotFoundError:
        return
    if _read(grave).get("token") != holder.get("token"):
        with contextlib.suppress(FileExistsError):
            os.link(grave, path)
    grave.unlink()


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != platform.node():
        return False
    pid = int(holder.get("pid", 0))
    # A pid is used again after a while: the same one that began at another time is another process.
    return not psutil.pid_exists(pid) or abs(_began(pid) - float(holder.get("began", 0))) > 1


def _began(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def _beat_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _read(path: Path) -> dict[str, Any]:
    """Its content; empty where it is gone or unreadable, which is nobody's living lock on this host."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
