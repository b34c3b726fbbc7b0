"""A store that cannot be used: a warning, then the local store, then none. And how MLflow behaves in our process."""

import ast
import logging
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from skd_dist import tracking
from skd_dist.tracking import TrackingStore, open_writer
from skd_dist.tracking.mlflow_settings import settle_mlflow
from skd_dist.tracking.reachable import StoreUnreachableError, prepare_store
from skd_dist.tracking.replica import Writer


def _open(store: TrackingStore, notices: list[str]) -> Writer | None:
    return open_writer(store, experiment="e", run_name="r", run_key="k", notify=notices.append, watch_system=False)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Connections are taken and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def _assert_falls_back(uri: str, store: TrackingStore, reason: str) -> None:
    notices: list[str] = []
    writer = _open(TrackingStore(uri=uri, artifact_root=None, fallback=store), notices)
    assert writer is not None and writer.summary()["tracking_uri"] == store.uri
    assert len(notices) == 1
    assert reason in notices[0] and notices[0].endswith(f"this run is tracked in {store.uri}")
    assert "s3cret" not in notices[0]


def test_a_server_that_refuses(store: TrackingStore, closed_port: int, capfd: pytest.CaptureFixture[str]) -> None:
    _assert_falls_back(f"http://ann:s3cret@127.0.0.1:{closed_port}", store, "Connection refused")
    assert "Retrying" not in capfd.readouterr().err


def test_a_server_that_never_answers(store: TrackingStore, silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _assert_falls_back(f"http://127.0.0.1:{silent_port}", store, "timed out")


def test_a_database_server_that_refuses(store: TrackingStore, closed_port: int) -> None:
    _assert_falls_back(f"postgresql+psycopg2://ann:s3cret@127.0.0.1:{closed_port}/x", store, "Connection refused")


def test_a_database_without_its_driver(store: TrackingStore, silent_port: int) -> None:
    _assert_falls_back(f"mysql+nodriver://ann:s3cret@127.0.0.1:{silent_port}/x", store, "nodriver")


def test_an_unknown_scheme(store: TrackingStore) -> None:
    _assert_falls_back("htp://somewhere", store, "unsupported URI 'htp://somewhere'")


def test_without_a_fallback_the_run_is_not_tracked(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, and long enough to be looked at as one " * 10)
    notices: list[str] = []
    assert _open(TrackingStore(uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_root=tmp_path), notices) is None
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    then = "this run is in its journal only (tools/track.py sync)"
    assert notices == [f"tracking store {uri} cannot be used (file is not a database); {then}"]


def test_the_notice_of_a_store_is_shown(store: TrackingStore) -> None:
    notices: list[str] = []
    assert _open(replace(store, notice="on local disk"), notices) is not None
    assert notices == ["on local disk"]


def test_prepare_makes_the_folder_and_refuses_a_file_in_its_place(tmp_path: Path) -> None:
    prepare_store(TrackingStore(uri=f"sqlite:///{tmp_path}/a/b/mlflow.db", artifact_root=None))
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnreachableError, match="file"):
        prepare_store(TrackingStore(uri=f"sqlite:///{tmp_path}/file/mlflow.db", artifact_root=None))


def test_settings_keep_what_the_user_set() -> None:
    environ = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
    settle_mlflow(environ)
    settle_mlflow(environ)
    assert environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
    assert environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_only_retries_to_mlflow_are_silenced(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    settle_mlflow({})
    logger = logging.getLogger("urllib3.connectionpool")
    # Libraries that other tests import in this process quieten or disable it.
    monkeypatch.setattr(logger, "disabled", False)
    caplog.set_level(logging.WARNING, logger=logger.name)
    logger.warning("Retrying after connection broken: %s", "/api/2.0/mlflow/runs/create")
    logger.warning("Retrying after connection broken: %s", "/models/resnet18")
    assert [record.getMessage() for record in caplog.records] == ["Retrying after connection broken: /models/resnet18"]


def test_importing_the_folder_does_not_import_mlflow() -> None:
    imports = {}
    for path in Path(tracking.__file__).parent.glob("*.py"):
        statements = ast.parse(path.read_text()).body
        names = [node.module or "" for node in statements if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names]
        imports[path.stem] = names
    slow = {stem for stem, names in imports.items() if any(name.partition(".")[0] == "mlflow" for name in names)}
    assert slow == {"database_store", "mlflow_runs", "mlflow_writer", "reading", "system_metrics"}
    quick = set(imports) - slow
    assert len(quick) == 12
    offenders = {stem for stem in quick for name in imports[stem] if name.rpartition(".")[2] in slow}
    assert offenders == set()
