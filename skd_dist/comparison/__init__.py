"""Finished runs side by side: which are the same but for the seed, what they reach, and how sure a difference is.

    run directories, journals or an MLflow store -> runs -> cells -> statistics -> Markdown table, plot

Only what the runs themselves recorded is used. Reading and counting are plain Python and NumPy.
"""

from skd_dist.comparison.exits import exits_table
from skd_dist.comparison.report import Report, report
from skd_dist.comparison.runs import Found, Measure, Record, choose_split, read_directories, read_store, to_runs
from skd_dist.comparison.statistics import Row, compare, t_interval
from skd_dist.comparison.table import markdown_table

__all__ = [
    "Found",
    "Measure",
    "Record",
    "Report",
    "Row",
    "choose_split",
    "compare",
    "exits_table",
    "markdown_table",
    "read_directories",
    "read_store",
    "report",
    "t_interval",
    "to_runs",
]
