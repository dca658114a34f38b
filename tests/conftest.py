"""What every test runs under: the same examples everywhere, nothing left open, no GPU without a device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# Fixed examples, so that a clone passes or fails the same everywhere; no deadline, since it
# would make a busy machine a failure.
settings.register_profile("engram", deadline=None, derandomize=True, database=None)
settings.load_profile("engram")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` where there is no CUDA device."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache folder out of the tests, and what the tests leave out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _nothing_left_open(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves files of its own, shared memory or threads of Engram behind."""
    before = _left(tmp_path_factory.getbasetemp())
    yield
    left = _left(tmp_path_factory.getbasetemp()) - before
    if left:
        # A cycle that the collector frees is no leak; collecting is slow, so only now.
        gc.collect()
        left = _left(tmp_path_factory.getbasetemp()) - before
    assert not left, f"left behind: {sorted(left)}"


def _left(folder: Path) -> set[str]:
    """Name what is open now: files under the folder, shared memory, threads named by Engram."""
    files = (opened.path for opened in psutil.Process().open_files())
    threads = (thread.name for thread in threading.enumerate())
    return {
        *(path for path in files if path.startswith((f"{folder}/", "/dev/shm/"))),
        *(f"thread {name}" for name in threads if name.startswith("engram")),
    }
