"""skd_dist: stagewise knowledge distillation of vision models on GPU clusters."""

__version__ = "0.1.0"
