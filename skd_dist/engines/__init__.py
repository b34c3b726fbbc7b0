"""Engines: what makes many processes train one stage module. The only door to deepspeed and accelerate."""

from skd_dist.engines.base import EngineKind, EngineSpec, convert_snapshot, make_engine
from skd_dist.engines.deepspeed_config import load_deepspeed_config

__all__ = ["EngineKind", "EngineSpec", "convert_snapshot", "load_deepspeed_config", "make_engine"]
