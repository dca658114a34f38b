"""The budget of prepare, under a real limit, with two meters."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from engram.testing.cgroup import LimitedRun, cgroup_unavailable, limited
from engram.testing.hbn import HbnCorpus, write_hbn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cgroup_unavailable() is not None, reason=f"no memory limit: {cgroup_unavailable()}"),
]

MB = 1_000_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 recordings, one of them half an hour at 500 Hz: 0.93 GB as MNE holds it."""
    root = tmp_path_factory.mktemp("corpus")
    write_hbn(root, HbnCorpus(n_subjects=2, rest_s=60, n_trials=6, long_recording=(1800, 500)), n_jobs=2)
    return root


def prepare(corpus: Path, store: Path, *, n_jobs: int, memory: str, limit_bytes: int) -> LimitedRun:
    """Run the command line under a real limit, as a user would."""
    command = [sys.executable, "-m", "engram", "prepare", str(corpus), str(store), "--json"]
    options = ["--high-pass", "0.5", "--jobs", str(n_jobs), "--memory", memory]
    environment = {**os.environ, "XDG_CACHE_HOME": str(store.parent / "cache")}
    return limited([*command, *options], limit_bytes, env=environment)


@pytest.mark.parametrize(("n_jobs", "budget_mb"), [(1, 400), (2, 1000)])
def test_a_recording_far_larger_than_the_budget_is_prepared_within_it(
    corpus: Path, tmp_path: Path, n_jobs: int, budget_mb: int
) -> None:
    """Both meters, the kernel's and our own, stay below the budget, and agree on what they saw."""
    store, limit_bytes = tmp_path / "store", (budget_mb + 100) * MB
    run = prepare(corpus, store, n_jobs=n_jobs, memory=f"{budget_mb} MB", limit_bytes=limit_bytes)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)

    assert told["n_prepared"] == 15
    assert run.peak_unreclaimable_bytes <= budget_mb * MB
    assert told["peak_bytes"] <= budget_mb * MB
    # Ours counts every process's own pages, the kernel's those of the group: no more apart than
    # what the loader shares, and what falls between two samples.
    assert told["peak_bytes"] == pytest.approx(run.peak_unreclaimable_bytes, rel=0.35)


def test_a_budget_that_is_too_small_is_told_before_the_kernel_tells(corpus: Path, tmp_path: Path) -> None:
    """An error with figures and exit code 3, and no process killed."""
    run = prepare(corpus, tmp_path / "store", n_jobs=1, memory="150 MB", limit_bytes=200 * MB)

    assert run.returncode == 3
    assert not run.oom_killed
    assert "does not fit beside 'this process'" in run.stderr
    assert "Raise the memory budget to at least" in run.stderr
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_without_a_budget_the_limit_that_binds_is_kept(corpus: Path, tmp_path: Path) -> None:
    """80 % of what the cgroup leaves is the default."""
    command = [sys.executable, "-m", "engram", "prepare", str(corpus), str(tmp_path / "store"), "--json"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = limited(command, 600 * MB, env=environment)
    assert run.returncode == 0, run.stderr

    assert json.loads(run.stdout)["allowed_bytes"] <= 600 * MB
    assert run.peak_unreclaimable_bytes <= 480 * MB
