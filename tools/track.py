"""Bring runs into MLflow from their journals.

    python tools/track.py sync RUN [RUN ...] [--tracking-uri URI] [--experiment NAME]

`sync`: writes everything that the journal of each run records to a store: what an outage kept from it, or a copy of the
run in another store. May be repeated, and interrupted: what is there already is not written twice.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from skd_dist.errors import EXIT_USER_ERROR, UserError
from skd_dist.tracking import JOURNAL_FILE, open_writer, read_events, resolve_experiment, resolve_tracking_uri

BATCH = 200


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Write the journals of runs to an MLflow store."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    tracking_uri: str | None = None
    """MLflow store; default MLFLOW_TRACKING_URI, else mlflow.db beside the run directory."""
    experiment: str | None = None
    """MLflow experiment; default the one that the run named."""


def sync_run(run_dir: Path, *, tracking_uri: str | None, experiment: str | None) -> str:
    """Replay one journal; what was done, in one line.

    Raises:
        UserError: no journal, a damaged one, or a store that does not take it.
    """
    path = run_dir / JOURNAL_FILE
    if not path.exists():
        raise UserError("no run", got=f"{run_dir} without {JOURNAL_FILE}", do="give a run directory")
    events = [event for event, _ in read_events(path)]
    started = next((event.data for event in events if event.kind == "run_started"), None)
    if started is None:
        raise UserError(f"{path} records no start of a run", got=f"{len(events)} events")
    store = resolve_tracking_uri(tracking_uri, environ=os.environ, run_dir=run_dir)
    notices: list[str] = []
    writer = open_writer(
        # Asked for one store, the events go there or nowhere.
        store.without_fallback(),
        experiment=resolve_experiment(experiment, environ=os.environ, default=started["experiment"]),
        run_name=started["run_name"],
        run_key=started["run_key"],
        notify=notices.append,
        watch_system=False,
    )
    if writer is None:
        raise UserError(" ".join(notices))
    for first in range(0, len(events), BATCH):
        try:
            writer.apply(events[first : first + BATCH])
        except Exception as error:
            if not writer.is_outage(error):
                raise
            raise UserError(
                f"{store.public_uri} took {first} of {len(events)} events", got=writer.reason(error), do="sync again"
            ) from error
    return f"{run_dir}: {len(events)} events in {store.public_uri}, run {writer.summary()['parent_run_id']}"


def main(arguments: list[str]) -> int:
    """Run the tool; the exit code."""
    wanted = tyro.extras.subcommand_cli_from_dict({"sync": _parsed}, args=arguments)
    try:
        for run_dir in wanted.runs:
            print(sync_run(run_dir, tracking_uri=wanted.tracking_uri, experiment=wanted.experiment))
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parsed(sync: tyro.conf.OmitArgPrefixes[Sync]) -> Sync:
    return sync


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
