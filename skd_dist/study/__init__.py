"""A study: a grid of runs in one launch, teachers first, each cell a run of its own, and a table of all at the end.

A recipe gives the grid's defaults; its flags change them. A study that was interrupted, or whose grid has grown, goes
on with --resume-or-start: finished cells are left alone, begun ones go on, the others start.
"""

from skd_dist.study.cells import cells_of
from skd_dist.study.config import Budget, StudyConfig, toy_study
from skd_dist.study.launch import run_study

__all__ = ["Budget", "StudyConfig", "cells_of", "run_study", "toy_study"]
