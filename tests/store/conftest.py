"""A store of every kind of signal, and the arrays that it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram.preparation.ingest import prepare
from engram.testing.kinds import Arrays, make_arrays, make_source


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the notes on files out of the user's cache folder."""
    pytest.MonkeyPatch().setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def arrays() -> Arrays:
    """Samples of every kind."""
    return make_arrays()


@pytest.fixture(scope="session")
def store_path(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that no test changes, in groups of about 10 MB."""
    path = tmp_path_factory.mktemp("stores") / "store"
    prepare(make_source(arrays), path, part_bytes="10 MB")
    return path
