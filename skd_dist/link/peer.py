"""The other end of a link, as both ends see it: by what name, whether it lives, and what its loss is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from skd_dist.errors import UserError
from skd_dist.job.heartbeat import PeerAges


@contextmanager
def talking_to(peer: str, *, left: str) -> Iterator[None]:
    """Name the peer in whatever goes wrong between the two.

    Args:
        peer: for example `student rank 3`.
        left: what a peer has done whose connection is closed.

    Raises:
        UserError: instead of what sockets, store and transports raise.
    """
    try:
        yield
    except dist.DistError as error:
        raise UserError("rank 0, which hosts the job's store, is gone", do="see its own output") from error
    except (EOFError, OSError) as error:
        raise UserError(f"{peer} {left}", do="see the output of that rank") from error
    except RuntimeError as error:  # how gloo and NCCL report a lost peer
        raise UserError(
            f"exchange with {peer} broke off", got=str(error).partition("\n")[0], do="see the output of that rank"
        ) from error


def check_alive(ages: PeerAges, rank: int, *, peer: str, timeout: timedelta) -> None:
    """Raise a UserError where a rank has given no sign of life for longer than the timeout."""
    silent_s = ages.age_s(rank)
    if silent_s > timeout.total_seconds():
        raise UserError(
            f"{peer} stopped answering",
            got=f"no sign of life for {silent_s:.0f} s",
            do="see the output of that rank",
        )
