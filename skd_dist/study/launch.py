"""A study as a recipe: flags, runs, and at the end table and plot of all finished cells."""

from collections.abc import Sequence

from skd_dist.checkpoint import cannot_go_on_without
from skd_dist.cli import main
from skd_dist.comparison import read_directories, report
from skd_dist.comparison.plot import write_plot
from skd_dist.config import RunConfig
from skd_dist.data.atomic import atomic_file
from skd_dist.study.cells import cells_of
from skd_dist.study.config import StudyConfig, toy_study
from skd_dist.study.resume import what_is_left

TABLE, PLOT = "study.md", "study.png"


def run_study(config: StudyConfig, *, description: str, argv: Sequence[str] | None = None) -> None:
    """Run a study and exit; the table is printed and written to RUN/study.md, the plot to RUN/study.png.

    Args:
        config: the recipe's defaults.
        description: the recipe's docstring, shown by --help.
        argv: the command line without the program; default sys.argv.
    """
    main(config, description=description, toy=toy_study, expand=runs_of, at_end=write_table, argv=argv)


def runs_of(study: StudyConfig) -> Sequence[RunConfig]:
    """The runs of this launch."""
    return what_is_left(cells_of(study))


def write_table(study: StudyConfig) -> None:
    """Compare all runs in the study's directory, also those of earlier launches, and draw accuracy against fraction.

    Raises:
        UserError: they cannot be compared, or the disk does not take what is written.
    """
    found = report(read_directories([study.run_dir]), baseline=study.baseline)
    print(f"\n{found.text}", flush=True)
    with cannot_go_on_without(study.run_dir / TABLE), atomic_file(study.run_dir / TABLE) as temporary:
        temporary.write_text(found.text)
    with cannot_go_on_without(study.run_dir / PLOT):
        write_plot(found.rows, study.run_dir / PLOT, measure=found.measure)
