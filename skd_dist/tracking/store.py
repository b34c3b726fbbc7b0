"""Which MLflow store a run writes to: pure decisions, nothing is opened or created.

By default all runs whose directories lie beside each other share one SQLite store in their parent folder, so that they
compare in one UI: `PARENT/mlflow.db` and the plain folder `PARENT/mlflow-artifacts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from skd_dist.errors import UserError
from skd_dist.tracking.local_disk import is_on_network, local_folder_for

_SQLITE = "sqlite:///"
_SERVER_SCHEMES = frozenset({"http", "https", "databricks"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingStore:
    """Where runs go."""

    uri: str
    artifact_root: Path | None
    """Folder for the artifacts of experiments made here; None where a server decides."""
    notice: str | None = None
    """What the user should know about this choice."""
    fallback: "TrackingStore | None" = None
    """The local store to use when this one cannot be reached."""

    @property
    def sqlite_path(self) -> Path | None:
        """File of the database, or None for other stores."""
        return Path(self.uri.removeprefix(_SQLITE).partition("?")[0]) if self.uri.startswith(_SQLITE) else None

    @property
    def public_uri(self) -> str:
        """The URI without user and password, for messages and files."""
        return self.without_credentials(self.uri)

    def without_fallback(self) -> "TrackingStore":
        """The same store, and none other in its place."""
        return replace(self, fallback=None)

    def without_credentials(self, text: str) -> str:
        """A text with this store's user and password, if it has any, replaced by `***`."""
        credentials, at, _ = urlsplit(self.uri).netloc.rpartition("@")
        return text.replace(f"{credentials}@", "***@") if at else text

    @property
    def how_to_open(self) -> str:
        """What a person types or visits to see the runs."""
        if urlsplit(self.uri).scheme in _SERVER_SCHEMES:
            return self.public_uri
        return f"mlflow ui --backend-store-uri '{self.public_uri}'"


def resolve_tracking_uri(flag: str | None, *, environ: Mapping[str, str], run_dir: Path) -> TrackingStore:
    """Choose the store: the flag, else MLFLOW_TRACKING_URI, else one SQLite file beside the run directory.

    Args:
        flag: `--tracking-uri`.
        environ: the process environment.
        run_dir: directory of the run; need not exist.

    Raises:
        UserError: the URI names MLflow's plain-file store, which current MLflow refuses.
    """
    default = _default_store(run_dir.resolve().parent)
    uri = flag or environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return default
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        return _chosen_sqlite(uri, fallback=default)
    if scheme in ("", "file"):
        raise UserError(
            "tracking URI cannot be used",
            got=uri,
            expected="sqlite:///FILE.db or the URL of an MLflow server",
            do="MLflow no longer writes plain-file stores",
        )
    is_server = scheme in _SERVER_SCHEMES
    return TrackingStore(uri=uri, artifact_root=None if is_server else default.artifact_root, fallback=default)


def resolve_experiment(flag: str | None, *, environ: Mapping[str, str], default: str) -> str:
    """Choose the experiment's name: `--experiment`, else MLFLOW_EXPERIMENT_NAME, else the recipe's default."""
    return flag or environ.get("MLFLOW_EXPERIMENT_NAME") or default


def _default_store(parent: Path) -> TrackingStore:
    artifact_root = parent / "mlflow-artifacts"
    if not is_on_network(parent):
        return TrackingStore(uri=f"{_SQLITE}{parent / 'mlflow.db'}", artifact_root=artifact_root)
    database = local_folder_for(parent) / "mlflow.db"
    return TrackingStore(
        uri=f"{_SQLITE}{database}",
        artifact_root=artifact_root,
        notice=f"{parent} is on a network file system, where SQLite is not safe: runs are tracked on this node's local "
        f"disk in {database}; give --tracking-uri to choose",
    )


def _chosen_sqlite(uri: str, *, fallback: TrackingStore) -> TrackingStore:
    path, question_mark, options = uri.removeprefix(_SQLITE).partition("?")
    if not uri.startswith(_SQLITE) or path in ("", ":memory:"):
        raise UserError("tracking URI names no file", got=uri, expected="sqlite:///FILE.db")
    database = Path(path).resolve()
    notice = f"{database} is on a network file system, where SQLite is not safe" if is_on_network(database) else None
    return TrackingStore(
        uri=f"{_SQLITE}{database}{question_mark}{options}",
        artifact_root=database.parent / "mlflow-artifacts",
        notice=notice,
        fallback=None if f"{_SQLITE}{database}" == fallback.uri else fallback,
    )
