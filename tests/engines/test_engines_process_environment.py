"""Environment variables come back as they were, also after an error."""

import os

import pytest

from skd_dist.engines.process_environment import environment


def test_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKD_TEST_SET", "before")
    monkeypatch.delenv("SKD_TEST_UNSET", raising=False)
    with pytest.raises(ZeroDivisionError, match="division"), environment(SKD_TEST_SET="in", SKD_TEST_UNSET="in"):
        assert os.environ["SKD_TEST_SET"] == os.environ["SKD_TEST_UNSET"] == "in"
        1 / 0  # noqa: B018
    assert os.environ["SKD_TEST_SET"] == "before" and "SKD_TEST_UNSET" not in os.environ
