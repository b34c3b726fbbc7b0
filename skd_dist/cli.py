"""From a recipe and the command line to an exit code.

A recipe calls `main` with its configuration and, if it is more than one run, with a function that expands the parsed
configuration into several; they run one after another in one launch. Everything that can be refused without another
rank is refused here, in one line, by rank 0, with exit code 2 on every rank.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from skd_dist.config import Config, RunConfig, parse_flags
from skd_dist.dry_run import describe_runs
from skd_dist.errors import EXIT_USER_ERROR, UserError
from skd_dist.job.consensus import print_error
from skd_dist.job.launcher_env import read_world
from skd_dist.roles import World
from skd_dist.runner import check_runs, run_all


def main(
    config: Config,
    *,
    description: str,
    toy: Callable[[Config], Config],
    expand: Callable[[Config], Sequence[RunConfig]] = lambda config: (config,),
    at_end: Callable[[Config], None] = lambda config: None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a recipe and exit.

    Args:
        config: the recipe's defaults; of a class of the recipe's own, where it has flags of its own.
        description: the recipe's docstring, shown by --help.
        toy: shrinks the defaults to seconds where --toy is given; flags still win over it.
        expand: the runs of this launch, from the parsed configuration; none, where all is done already.
        at_end: called by rank 0 with the parsed configuration once all runs have finished.
        argv: the command line without the program; default sys.argv.
    """
    arguments = _without_launcher_flags(sys.argv[1:] if argv is None else argv)
    rank = 0
    try:
        world = read_world(os.environ)
        rank = world.rank
        default = toy(config) if "--toy" in arguments else config
        parsed = _parse_once(arguments, default=default, description=description, world=world)
        runs = expand(parsed)
        check_runs(runs, world=world)
        if parsed.dry_run:
            if rank == 0:
                print(describe_runs(runs, world=world), flush=True)
            sys.exit(0)
    except UserError as error:
        if rank == 0:
            print_error(error.line)
        sys.exit(EXIT_USER_ERROR)
    exit_code = run_all(runs, world=world) if runs else 0
    if rank == 0 and exit_code == 0:
        try:
            at_end(parsed)
        except UserError as error:
            print_error(error.line)
            exit_code = EXIT_USER_ERROR
    if exit_code and world.world_size > 1:
        _leave_at_once(exit_code)
    sys.exit(exit_code)


def _leave_at_once(exit_code: int) -> NoReturn:
    """Exit without Python's long goodbye: the launcher ends what is left a second after the first rank has gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _without_launcher_flags(arguments: Sequence[str]) -> list[str]:
    """The `deepspeed` launcher appends --local_rank=N; LOCAL_RANK in the environment says the same."""
    return [argument for argument in arguments if not argument.startswith(("--local_rank=", "--local-rank="))]


def _parse_once(arguments: Sequence[str], *, default: Config, description: str, world: World) -> Config:
    """Parse on every rank, but let only rank 0 print help and complaints."""
    silent = io.StringIO()
    with contextlib.ExitStack() as stack:
        if world.rank != 0:
            stack.enter_context(contextlib.redirect_stdout(silent))
            stack.enter_context(contextlib.redirect_stderr(silent))
        return parse_flags(arguments, default=default, description=description)
