"""CPU, memory, disk, network and GPU of one node, written to the parent run by MLflow's own monitor thread.

Keys are `system/node_R/...`. The tracker watches its own node; with a server behind it, one rank of every other node
may call this too. The interval is MLflow's (10 s, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL).
"""

from collections.abc import Callable

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


def start_system_metrics(tracking_uri: str, *, run_id: str, node_rank: int) -> Callable[[], None]:
    """Start watching this node; steps go on from those already in the run.

    Returns:
        Call it to stop; it waits for the thread and never raises.
    """
    monitor = SystemMetricsMonitor(run_id, node_id=f"node_{node_rank}", tracking_uri=tracking_uri, resume_logging=True)
    monitor.start()
    return monitor.finish
