"""Groups of ranks that train parts of one run beside each other: what each trains, and where it keeps its files.

    RUN/                 peer 1: the run itself, and its result
    RUN/peers/peer2/     a run like any other, on the same samples for as many steps

A peer is a network of a cohort (`cohort`), or some blocks of the student (`block_groups`). Every peer prepares what the
whole run is, and then takes its part.
"""

import dataclasses
from pathlib import Path

from skd_dist.block_groups import take_blocks
from skd_dist.cohort import network_changes, take_network
from skd_dist.config import RunConfig
from skd_dist.prepare import Prepared

PEERS = "peers"
"""Folder of a run in which its other peers are runs of their own."""


def peer_directory(run_dir: Path, number: int) -> Path:
    """Where a peer keeps its files.

    Args:
        run_dir: of the whole.
        number: of the peer, from 1.
    """
    return run_dir if number == 1 else run_dir / PEERS / f"peer{number}"


def peer_config(config: RunConfig, number: int) -> RunConfig:
    """The configuration of one peer of a run; the first is the run itself.

    Args:
        number: from 1.
    """
    if number == 1:
        return config
    return dataclasses.replace(
        config,
        run_dir=peer_directory(config.run_dir, number),
        # That there is a run to go on with is the first peer's to say.
        resume_or_start=config.resume or config.resume_or_start,
        **({} if config.block_groups > 1 else network_changes(config, number)),
    )


def take_part(prepared: Prepared, number: int) -> Prepared:
    """What one peer trains of a run.

    Args:
        prepared: the run, as if all peers were one.
        number: of the peer, from 1.

    Raises:
        UserError: a peer's network does not fit the image size; the student's stages cannot be split.
    """
    own = peer_config(prepared.config, number)
    return take_blocks(prepared, own, number) if own.block_groups > 1 else take_network(prepared, own, number)
