"""A kill at any moment loses nothing that was finished, and the resumed store is the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engram.store.verify import verify
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.testing.stores import digest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from engram.preparation.ingest import prepare
from engram.preparation.steps import HighPass
root, store, n_jobs = sys.argv[1:]
prepare(root, store, steps=[HighPass(1.0)], n_jobs=int(n_jobs), part_bytes="5 MB").store.close()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose notes on files are its own."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 recordings, one of them truncated: seven groups of 5 MB."""
    root = tmp_path_factory.mktemp("corpus")
    write_hbn(root, HbnCorpus(n_subjects=3, n_trials=3, rest_s=60))
    return root


def start(corpus: Path, store: Path, n_jobs: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Begin a build in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(corpus), str(store), str(n_jobs)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def finish(corpus: Path, store: Path, n_jobs: int, environment: dict[str, str]) -> None:
    """Run a build to its end."""
    with start(corpus, store, n_jobs, environment) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said.decode()


@pytest.fixture(scope="module")
def whole(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> dict[str, str]:
    """The bytes of an unbroken build."""
    store = tmp_path_factory.mktemp("whole") / "store"
    finish(corpus, store, 1, environment)
    assert verify(store).is_sound
    return digest(store)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the builder; its workers see to their own end, and with it to that of the pipe."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_worker(process: subprocess.Popen[bytes], group: Path) -> str:
    """Kill the worker that holds a group's lock, and it alone; give what the builder says of it."""
    workers = psutil.Process(process.pid).children(recursive=True)
    lock = str(group.with_suffix(".lock"))
    holding = [w for w in workers if any(file.path == lock for file in w.open_files())]
    # The group may have been finished since it was seen: then any worker will do.
    (holding or [w for w in workers if "LokyProcess" in " ".join(w.cmdline())])[0].kill()
    return process.communicate()[1].decode()


@pytest.fixture(scope="module")
def duration_s(corpus: Path, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> float:
    """How long an unbroken build takes here, to spread the kills over it."""
    store = tmp_path_factory.mktemp("timed") / "store"
    begin = time.monotonic()
    finish(corpus, store, 1, environment)
    return time.monotonic() - begin


@pytest.mark.parametrize("number", range(20))
def test_a_kill_at_any_moment_is_resumed_to_the_same_bytes(
    corpus: Path,
    tmp_path: Path,
    environment: dict[str, str],
    whole: dict[str, str],
    duration_s: float,
    number: int,
) -> None:
    """Twenty SIGKILLs, spread evenly over the measured length of the build."""
    store = tmp_path / "store"
    process = start(corpus, store, 1, environment)
    try:
        process.wait(duration_s * (number + 0.5) / 20)
    except subprocess.TimeoutExpired:
        kill(process)
    else:
        process.communicate()  # this one was faster than the one that was timed
    finish(corpus, store, 1, environment)

    assert digest(store) == whole
    assert verify(store).is_sound


MOMENTS = {
    "block": "building/*.tmp/*/*/c/0/0",  # a shard that is growing
    "table of a group": "building/*.tmp/result/*.parquet",
    "table": "tables/0000/*.tmp",
    "manifest": "manifest.json.tmp",
}
"""What stands in the store's folder while a kind of file is written."""


def start_until(
    moment: str, corpus: Path, store: Path, n_jobs: int, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], Path]:
    """Begin builds until one is met while it writes this kind of file; give it, and the file."""
    for _ in range(10):
        shutil.rmtree(store, ignore_errors=True)
        process = start(corpus, store, n_jobs, environment)
        while process.poll() is None:
            if seen := next(store.glob(MOMENTS[moment]), None):
                return process, seen
        process.communicate()
    raise AssertionError(f"ten builds went by, and no {moment} was seen while it was written")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_kill_while_a_kind_of_file_is_written_is_resumed_to_the_same_bytes(
    corpus: Path, tmp_path: Path, environment: dict[str, str], whole: dict[str, str], moment: str, n_jobs: int
) -> None:
    """Inside a block, a table and the manifest; of one process, and of the parent with two jobs."""
    store = tmp_path / "store"
    process, _ = start_until(moment, corpus, store, n_jobs, environment)
    kill(process)
    finish(corpus, store, n_jobs, environment)

    assert digest(store) == whole
    assert verify(store).is_sound


@pytest.mark.parametrize("moment", ["block", "table of a group"])
def test_a_killed_worker_is_an_error_that_a_second_run_mends(
    corpus: Path, tmp_path: Path, environment: dict[str, str], whole: dict[str, str], moment: str
) -> None:
    """joblib tells of a worker that vanished; what was finished stays."""
    store = tmp_path / "store"
    process, seen = start_until(moment, corpus, store, 2, environment)
    said = kill_worker(process, store / seen.relative_to(store).parents[-3])

    assert process.returncode != 0
    assert "WorkerLost: A worker process was killed from outside" in said
    assert not (store / "manifest.json").exists()
    finish(corpus, store, 2, environment)
    assert digest(store) == whole
