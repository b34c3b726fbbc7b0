"""MLflow's own tables, imported and wired up ahead of their first use, which may be in another thread."""

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - defines the tables
from sqlalchemy.orm import configure_mappers

configure_mappers()
