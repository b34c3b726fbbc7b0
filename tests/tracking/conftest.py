"""One empty MLflow database per session, copied for each test: creating the tables takes seconds."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from skd_dist.tracking import TrackingStore, open_writer


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """No MLFLOW variable of the machine reaches a test, and none that a test sets remains."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("MLFLOW")]:
            del os.environ[name]
        yield


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    store = TrackingStore(uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=folder / "mlflow-artifacts")
    notices: list[str] = []
    printed = io.StringIO()
    with mock.patch.dict(os.environ), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        writer = open_writer(
            store, experiment="template", run_name="t", run_key="t", notify=notices.append, watch_system=False
        )
    assert writer is not None, notices
    assert printed.getvalue() == "", "MLflow's first start is silent"
    return folder / "mlflow.db"


@pytest.fixture
def store(template_database: Path, tmp_path: Path) -> TrackingStore:
    shutil.copy(template_database, tmp_path / "mlflow.db")
    return TrackingStore(uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_root=tmp_path / "mlflow-artifacts")
