"""What chaos.py demands of a run that was disturbed: what the undisturbed one computed, bit for bit, once each."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaos_launch import ROOT, FailedError, is_finished, journal_of, reached, resume_points

from skd_dist.tracking import JOURNAL_FILE, open_writer, resolve_tracking_uri
from skd_dist.tracking.entries import clean_key, finite_or_nan
from skd_dist.tracking.journal import number
from skd_dist.tracking.replica import FILE as REPLICA_FILE
from skd_dist.tracking.replica import recall


def results_of(run_dir: Path) -> dict[str, Any]:
    """What must be equal: weights, and every value of the journal that does not measure time.

    Raises:
        FailedError: the run contradicts itself.
    """
    summary = json.loads((run_dir / "summary.json").read_text())
    values: dict[tuple[str | None, int, str], Any] = {}
    for event in journal_of(run_dir):
        if event.kind == "differs":
            raise FailedError(f"{run_dir}: a resumed step differs: {dict(event.data)}")
        if event.kind == "metrics":
            for name, value in event.data["values"].items():
                key = (event.data["stage"], event.data["step"], name)
                if key in values:
                    raise FailedError(f"{run_dir}: {key} is in the journal twice")
                values[key] = value
    return {
        "weights_digest": summary["weights_digest"],
        "val": summary["val"],
        "values": {key: value for key, value in values.items() if not key[2].startswith("perf/")},
    }


def compare(run_dir: Path, reference: Mapping[str, Any]) -> None:
    """Raises FailedError where a run differs from the undisturbed one."""
    found = results_of(run_dir)
    for name, expected in reference.items():
        if found[name] != expected:
            differing = (
                [key for key in {**expected, **found[name]} if found[name].get(key) != expected.get(key)][:5]
                if isinstance(expected, dict)
                else [found[name], expected]
            )
            raise FailedError(f"{run_dir}: {name} differs from the undisturbed run: {differing}")


def check_store(run_dir: Path, *, uri: str | None = None) -> None:
    """Hold a store against the journal: every metric once, none other.

    Args:
        uri: default the store beside the run.

    Raises:
        FailedError: they differ.
    """
    from skd_dist.tracking.reading import read_metrics  # mlflow takes seconds

    uri = uri or resolve_tracking_uri(None, environ={}, run_dir=run_dir).uri
    replica = recall(run_dir / REPLICA_FILE)
    if replica.get("tracking_uri") != uri or replica["offset_bytes"] < (run_dir / JOURNAL_FILE).stat().st_size:
        # Another store was meant, it was out of order, or the run was killed between its summary and its last words to
        # it: a finished run is not resumed, but brought.
        sync = [sys.executable, str(ROOT / "tools/track.py"), "sync", str(run_dir), "--tracking-uri", uri]
        subprocess.run(sync, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stored = read_metrics(uri, **_runs_in(uri, run_dir))
    doubles = [place for place, values in stored.items() if len(values) != 1]
    written = {
        (event.data["stage"], event.data["step"], clean_key(name)): finite_or_nan(number(value))
        for event in journal_of(run_dir)
        if event.kind == "metrics"
        for name, value in event.data["values"].items()
    }
    if doubles or stored.keys() != written.keys():
        missing = sorted(map(str, stored.keys() ^ written.keys()))[:5]
        raise FailedError(f"{run_dir}: {uri} and the journal differ; twice: {doubles[:5]}; in one only: {missing}")
    differing = [place for place, (value,) in stored.items() if value != written[place] and not math.isnan(value)]
    if differing:
        raise FailedError(f"{run_dir}: {uri} has other values than the journal at {differing[:5]}")


def _runs_in(uri: str, run_dir: Path) -> dict[str, Any]:
    """Parent and children of a run in a store, found by the run's key."""
    started = next(event.data for event in journal_of(run_dir) if event.kind == "run_started")
    notices: list[str] = []
    writer = open_writer(
        resolve_tracking_uri(uri, environ=os.environ, run_dir=run_dir).without_fallback(),
        experiment=started["experiment"],
        run_name=started["run_name"],
        run_key=started["run_key"],
        notify=notices.append,
        watch_system=False,
    )
    if writer is None:
        raise FailedError(f"{run_dir}: {notices}")
    found = writer.summary()
    return {name: found[name] for name in ("parent_run_id", "child_run_ids")}


def lost_work(run_dir: Path) -> int:
    """Steps that the last launch reported and the next has to compute again."""
    saved = [int(path.name) for path in resume_points(run_dir)]
    return 0 if is_finished(run_dir) else max(reached(run_dir)[1] - max(saved, default=0), 0)
