"""What only building a stage shows: whether the student can be entered, fed or accompanied as the method wants it.

Looked at once, on one rank, before a run has a directory: what is refused later is refused with one that other flags
cannot continue, and in a study again at every launch.
"""

from skd_dist.methods.base import BaseMethod
from skd_dist.prepare import Prepared
from skd_dist.stage_runner import stage_module


def try_stages(prepared: Prepared) -> None:
    """Build one stage module for every way in which stages differ in what they bring; none where they bring nothing.

    Raises:
        UserError: a companion, or a place where the student is fed, that its network does not allow.
    """
    accompanied = getattr(type(prepared.method), "companion", None) is not BaseMethod.companion
    seen = set()
    for stage in prepared.plan.stages:
        brings = (stage.feeds, stage.student_features)
        if brings in seen or not (stage.feeds or accompanied):
            continue
        seen.add(brings)
        stage_module(prepared, stage, None)
