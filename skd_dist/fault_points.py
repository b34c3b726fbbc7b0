"""Named places at which a test can have this process killed, to prove that nothing is lost there.

    SKD_FAULT=publish/manifest:2     SIGKILL at the second time this process reaches that place

Without the variable a place costs one look into the environment.
"""

import os
import signal
from collections import Counter

VARIABLE = "SKD_FAULT"

PUBLISH_PLACES = (
    "publish/engine-file",
    "publish/part",
    "publish/synced",
    "publish/before-manifest",
    "publish/manifest",
    "publish/renamed",
    "publish/latest",
    "publish/purge",
)
"""In `resume_point.py`, in the order in which a publish comes by."""

PLACES = (*PUBLISH_PLACES, "join/written", "join/read")
"""All there are; the others are in `block_join.py`."""

_reached: Counter[str] = Counter()


def reach(place: str) -> None:
    """Die here, if somebody asked for it."""
    assert place in PLACES, f"{place} is not in the list"
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    name, _, count = wanted.partition(":")
    _reached[place] += name == place
    if name == place and _reached[place] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)
