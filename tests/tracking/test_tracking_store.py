"""Which store is chosen, and that nothing is created by choosing."""

from pathlib import Path

import pytest

from skd_dist.errors import UserError
from skd_dist.tracking import TrackingStore, resolve_experiment, resolve_tracking_uri
from skd_dist.tracking import store as store_module


def test_default_is_one_sqlite_store_for_all_runs_beside_each_other(tmp_path: Path) -> None:
    first = resolve_tracking_uri(None, environ={}, run_dir=tmp_path / "runs/a")
    assert first.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert first.sqlite_path == tmp_path / "runs/mlflow.db"
    assert first.artifact_root == tmp_path / "runs/mlflow-artifacts"
    assert first.notice is None and first.fallback is None
    assert resolve_tracking_uri(None, environ={"MLFLOW_TRACKING_URI": ""}, run_dir=tmp_path / "runs/b") == first
    assert list(tmp_path.iterdir()) == []


def test_the_flag_beats_the_environment_beats_the_default(tmp_path: Path) -> None:
    environ = {"MLFLOW_TRACKING_URI": "http://env:5000"}
    from_flag = resolve_tracking_uri("http://flag:5000", environ=environ, run_dir=tmp_path / "a")
    from_environ = resolve_tracking_uri(None, environ=environ, run_dir=tmp_path / "a")
    assert (from_flag.uri, from_environ.uri) == ("http://flag:5000", "http://env:5000")
    assert from_flag.artifact_root is None and from_flag.sqlite_path is None
    assert from_flag.fallback == resolve_tracking_uri(None, environ={}, run_dir=tmp_path / "a")


def test_a_chosen_sqlite_file_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = resolve_tracking_uri("sqlite:///here/x.db?timeout=9", environ={}, run_dir=tmp_path / "runs/a")
    assert store.uri == f"sqlite:///{tmp_path}/here/x.db?timeout=9"
    assert store.sqlite_path == tmp_path / "here/x.db"
    assert store.artifact_root == tmp_path / "here/mlflow-artifacts"
    assert store.fallback is not None and store.fallback.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_the_default_file_chosen_by_hand_does_not_fall_back_to_itself(tmp_path: Path) -> None:
    store = resolve_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db", environ={}, run_dir=tmp_path / "a")
    assert store.fallback is None


def test_a_database_server_keeps_artifacts_beside_the_runs(tmp_path: Path) -> None:
    store = resolve_tracking_uri("postgresql://db/x", environ={}, run_dir=tmp_path / "a")
    assert store.artifact_root == tmp_path / "mlflow-artifacts"


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_plain_file_stores_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking URI cannot be used; got .*mlruns; expected sqlite:///FILE.db or"):
        resolve_tracking_uri(uri, environ={}, run_dir=tmp_path)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_sqlite_without_a_file_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracking URI names no file"):
        resolve_tracking_uri(uri, environ={}, run_dir=tmp_path)


def test_on_a_network_file_system_the_database_goes_to_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "is_on_network", lambda path: True)
    monkeypatch.setattr(store_module, "local_folder_for", lambda parent: Path("/local") / parent.name)
    default = resolve_tracking_uri(None, environ={}, run_dir=tmp_path / "runs/a")
    assert default.uri == "sqlite:////local/runs/mlflow.db"
    assert default.artifact_root == tmp_path / "runs/mlflow-artifacts"  # plain files are safe there
    assert default.notice is not None and "on a network file system" in default.notice
    chosen = resolve_tracking_uri(f"sqlite:///{tmp_path}/x.db", environ={}, run_dir=tmp_path / "runs/a")
    assert chosen.sqlite_path == tmp_path / "x.db"  # the user's word counts
    assert chosen.notice is not None and "not safe" in chosen.notice


def test_credentials_never_show() -> None:
    store = TrackingStore(uri="https://ann:s3cret@mlflow.example:8443/x", artifact_root=None)
    assert store.public_uri == store.how_to_open == "https://***@mlflow.example:8443/x"
    assert store.without_credentials("GET https://ann:s3cret@mlflow.example:8443/api") == (
        "GET https://***@mlflow.example:8443/api"
    )
    plain = TrackingStore(uri="sqlite:////runs/mlflow.db", artifact_root=None)
    assert plain.public_uri == plain.uri
    assert plain.how_to_open == "mlflow ui --backend-store-uri 'sqlite:////runs/mlflow.db'"


def test_experiment_is_the_flag_else_the_environment_else_the_default() -> None:
    environ = {"MLFLOW_EXPERIMENT_NAME": "env"}
    assert resolve_experiment("flag", environ=environ, default="recipe") == "flag"
    assert resolve_experiment(None, environ=environ, default="recipe") == "env"
    assert resolve_experiment(None, environ={}, default="recipe") == "recipe"
