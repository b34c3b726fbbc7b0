"""What all ranks prepare, and that all of them prepare the same: plans, samples, methods.

Rank 0 goes first, because it may have to write indexes; the others then find what it found, or the launch ends.
"""

import hashlib
from collections.abc import Sequence
from functools import partial

from skd_dist.config import RunConfig
from skd_dist.display import waiting_bar
from skd_dist.errors import UserError
from skd_dist.job.consensus import agreed, gather_text
from skd_dist.job.rendezvous import Job
from skd_dist.methods import method_identity
from skd_dist.peers import take_part
from skd_dist.prepare import Prepared, prepare_run
from skd_dist.splits import prepare_splits, splits_opener, unpack_embedded_data
from skd_dist.trial import try_runs, try_stages


def try_together(job: Job, configs: Sequence[RunConfig]) -> None:
    """Let all ranks end if one of the launch's runs cannot be run, rather than after the hours of those before it.

    A single run is tried as it is prepared.
    """
    with agreed(job, "trial"):
        if job.world.rank == 0 and len(configs) > 1:
            for config in configs:
                unpack_embedded_data(config)
            with waiting_bar("shards indexed") as on_progress:
                opener = splits_opener(on_progress=on_progress)
                try_runs(configs, num_students=job.roles.num_students, open_splits=opener)


def prepare_together(job: Job, config: RunConfig, key: str) -> Prepared:
    """Rank 0 first, because it may have to write the index; then everybody, who must find the same.

    Where peers have ranks of their own each then takes its part, and only its own ranks have the same plan.

    Args:
        config: of the whole run.
    """
    num_students = job.roles.num_students
    prepared: Prepared | None = None
    with agreed(job, f"{key}/data"):
        if job.world.rank == 0:
            unpack_embedded_data(config)
            with waiting_bar("shards indexed") as on_progress:
                open_splits = partial(prepare_splits, on_progress=on_progress)
                prepared = prepare_run(config, num_students=num_students, open_splits=open_splits)
            try_stages(prepared)
    with agreed(job, f"{key}/prepare"):
        prepared = prepared or prepare_run(config, num_students=num_students)
        part = take_part(prepared, job.peer) if job.roles.num_peers > 1 else prepared
    everybody = range(job.world.world_size)
    identity = " ".join(f"{name} {value}" for name, value in method_identity(prepared.method).items())
    _check_same(job, f"{key}/method", hashlib.sha256(identity.encode()).hexdigest(), what="method", ranks=everybody)
    _check_same(job, f"{key}/plan", prepared.plan.digest(), what="plan", ranks=everybody)
    _check_same(job, f"{key}/part", part.plan.digest(), what="part of the plan", ranks=job.run_ranks)
    _check_same(job, f"{key}/samples", prepared.splits.digest, what="choice of training samples", ranks=everybody)
    _check_same(job, f"{key}/rest", prepared.splits.rest_digest, what="view of the shards", ranks=everybody)
    _check_same(job, f"{key}/split", _split_digest(part), what="split of the student", ranks=everybody)
    return part


def _split_digest(part: Prepared) -> str:
    """Peers that take blocks of one student must leave none out; the split follows from counts of torch and timm."""
    split = part.peer.split if part.peer else None
    return hashlib.sha256(repr(split.trains if split else ()).encode()).hexdigest()


def _check_same(job: Job, point: str, digest: str, *, what: str, ranks: Sequence[int]) -> None:
    found = gather_text(job, point, digest)
    first = ranks[0]
    with agreed(job, f"{point}-same"):
        for rank in ranks:
            if found[rank] and found[first] and found[rank] != found[first]:
                raise UserError(
                    f"rank {rank} has another {what} than rank {first}",
                    got=found[rank][:12],
                    expected=found[first][:12],
                    do="make all nodes see the same files and versions",
                )
