"""How MLflow is to behave inside this process: short waits, no chatter. Imports no mlflow; runs before it is imported.

A value that the user has set stays. Everything here touches only our own process and what it starts.
"""

import logging
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

_DEFAULTS = {
    # Seven retries of up to two minutes each are MLflow's defaults: 246 s per call on a dead server (measured).
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Usage reports would go out from a thread of every training job, also on closed networks.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# Schema messages of a first start, and the monitor's own complaints about an outage that the tracker reports once.
_LOG_LEVELS = {
    "mlflow.store.db.utils": logging.WARNING,
    "mlflow.system_metrics.system_metrics_monitor": logging.CRITICAL,
}


def settle_mlflow(environ: MutableMapping[str, str]) -> None:
    """Set the defaults in the environment and quieten the loggers. May be called again."""
    for name, value in _DEFAULTS.items():
        environ.setdefault(name, value)
    for logger, level in _LOG_LEVELS.items():
        logging.getLogger(logger).setLevel(level)
    logging.getLogger("urllib3.connectionpool").addFilter(_is_no_mlflow_retry)


@contextmanager
def known_warnings_ignored() -> Iterator[None]:
    """Hide what MLflow's own code causes in the libraries below it when a database store is first imported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
        yield


def _is_no_mlflow_retry(record: logging.LogRecord) -> bool:
    # urllib3 reports each retry to MLflow; the tracker says once what is wrong.
    return "/mlflow/" not in record.getMessage()
