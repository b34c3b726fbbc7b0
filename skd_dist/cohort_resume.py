"""Where peers on ranks of their own go on: at the same step, the newest that all of them have.

    each peer: stages done -> the fewest of all -> sound resume points in the stage after them -> the newest in common

Peers save together, publish together and purge only what all have a newer one of. So whatever a job was killed in, what
they have in common is where all of them were. A peer that is ahead (it had published when another was killed) goes back
to that step, and comes to the same result again. Nothing in common where there was once a resume point means that
somebody removed files: then the run is refused instead of begun anew.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from skd_dist.checkpoint import cannot_go_on_without
from skd_dist.display import RunDisplay
from skd_dist.errors import UserError
from skd_dist.job.consensus import agreed, gather_text
from skd_dist.job.rendezvous import Job
from skd_dist.resume_point import sound_points


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far one peer is in the first stage that some peer has not done."""

    steps: tuple[int, ...]
    """Of its sound resume points, newest first."""
    has_saved: bool
    """Whether it once had a resume point there, as far as its journal says."""


def common_num_done(job: Job, num_done: int | None, key: str) -> int:
    """Stages that all peers have done; ranks that write no files give None."""
    texts = gather_text(job, f"{key}/peers-done", "" if num_done is None else str(num_done))
    return min(int(text) for text in texts if text)


def common_point(job: Job, root: Path, *, has_saved: bool, key: str) -> Path | None:
    """The resume point of this peer at which all go on, on the rank that writes its files; elsewhere None.

    Newer ones of this peer are removed: all will come by those steps again. Collective over all ranks of all peers.

    Args:
        root: of this peer's resume points of the stage.
        has_saved: as in `Standing`.

    Raises:
        JobEnded: they have none in common and had one.
    """
    points: dict[int, Path] = {}
    text = ""
    with agreed(job, f"{key}/peers-points"):
        if job.writes:
            points = {manifest["step"]: point for point, manifest in sound_points(root, notify=RunDisplay().notice)}
            text = json.dumps(asdict(Standing(steps=tuple(points), has_saved=has_saved)))
    texts = filter(None, gather_text(job, f"{key}/peers-standing", text))
    with agreed(job, f"{key}/peers-meet"):
        step = meeting_step([Standing(**json.loads(one)) for one in texts])
        for later in [point for at, point in points.items() if step is None or at > step]:
            with cannot_go_on_without(later):
                shutil.rmtree(later)
    return None if step is None or not job.writes else points[step]


def meeting_step(standings: Sequence[Standing]) -> int | None:
    """The newest step of which every peer has a resume point; None: all begin the stage.

    Args:
        standings: in the order of the peers.

    Raises:
        UserError: there is none, although there has been.
    """
    common = set.intersection(*(set(standing.steps) for standing in standings))
    if common:
        return max(common)
    if any(standing.has_saved for standing in standings):
        have = (
            f"peer {number}: {', '.join(map(str, standing.steps)) or 'none'}"
            for number, standing in enumerate(standings, start=1)
        )
        raise UserError(
            "the peers have no resume point in common",
            got="; ".join(have),
            do="put back what was removed from RUN or RUN/peers; to begin anew, give another --run-dir",
        )
    return None
