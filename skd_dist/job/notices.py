"""News that any rank may have, for those that write the files of a run: a few in a run, posted on the job's store."""

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch.distributed as dist

Kind = Literal["teacher_lost", "teacher_back"]

_COUNT = "notices"


def post_notice(store: dist.Store, kind: Kind, data: Mapping[str, Any]) -> None:
    """Put up one piece of news for whoever reads. From any rank and thread."""
    number = store.add(_COUNT, 1)
    store.set(f"{_COUNT}/{number}", json.dumps([kind, dict(data)]))


class NoticeReader:
    """The end of a rank that writes. What nobody listens to stays until somebody does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_read = 0
        self.listener: Callable[[Kind, Mapping[str, Any]], None] | None = None
        """Told (kind, data) of every notice, once."""

    def read(self, store: dist.Store) -> None:
        """Tell the listener what is new. From any thread.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        with self._lock:
            if self.listener is None:
                return
            for number in range(self._num_read + 1, store.add(_COUNT, 0) + 1):
                kind, data = json.loads(store.get(f"{_COUNT}/{number}"))
                self._num_read = number
                self.listener(cast(Kind, kind), data)
