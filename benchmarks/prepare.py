"""How long prepare takes beside MNE doing the same work in memory, and what memory it takes.

Rounds are interleaved, each arm in a process of its own, and medians are compared, so that
a noisy machine blurs both alike. Arms:

- ``read``: MNE reads every recording into memory, whole.
- ``read+filter``: and high-passes it there.
- ``prepare``, ``prepare+filter``: Engram, one job, with and without the same high-pass;
  reading, filtering, narrowing, measuring the error, checksums, writing and fsync.

Usage: python benchmarks/prepare.py [--corpus FOLDER] [--subjects N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from engram.memory.usage import watch_peak
from engram.testing.hbn import HbnCorpus, write_hbn

L_FREQ = 0.5


def read(root: Path, *, filtered: bool) -> None:
    """MNE: read each recording whole, filter it in memory, let it go."""
    import mne

    from engram.errors import SourceError
    from engram.recordings.bids import BidsSource

    source = BidsSource(root)
    for entry in source.entries():
        try:
            source.open(entry).close()
        except SourceError:
            continue  # the truncated one, which prepare refuses too
        raw = mne.io.read_raw_bdf(entry.files[0].path, preload=True, verbose="ERROR")
        if filtered:
            raw.filter(L_FREQ, None, verbose="ERROR")


def prepare(root: Path, *, filtered: bool) -> None:
    """Engram: into a fresh store, with a fresh cache of file notes."""
    import engram
    from engram.preparation.steps import HighPass

    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        engram.prepare(root, f"{folder}/store", steps=[HighPass(L_FREQ)] if filtered else [])


ARMS = {
    "read": lambda root: read(root, filtered=False),
    "read+filter": lambda root: read(root, filtered=True),
    "prepare": lambda root: prepare(root, filtered=False),
    "prepare+filter": lambda root: prepare(root, filtered=True),
}


def run_arm(root: Path, arm: str) -> None:
    """Run one arm here, and print what it took as JSON."""
    with watch_peak() as watch:
        begin = time.perf_counter()
        ARMS[arm](root)
        duration_s = time.perf_counter() - begin
    print(json.dumps({"duration_s": duration_s, "peak_bytes": watch.peak_bytes}))


def main() -> None:
    """Interleave the arms over some rounds and print medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="a BIDS folder; else one is generated")
    parser.add_argument(
        "--subjects", type=int, default=8, help="subjects per release of the generated corpus"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options.corpus, options.arm)
        return
    folder = Path(tempfile.mkdtemp(prefix="engram-bench-"))
    try:
        root = options.corpus or folder / "corpus"
        if options.corpus is None:
            write_hbn(root, HbnCorpus(n_subjects=options.subjects), n_jobs=os.cpu_count() or 1)
        compare(root, options.rounds)
    finally:
        shutil.rmtree(folder)


def compare(root: Path, n_rounds: int) -> None:
    """Measure every arm once per round, after one unmeasured reading that fills the page cache."""
    measure(root, "read")
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(n_rounds):
        for arm in ARMS:
            found[arm].append(measure(root, arm))
    source_bytes = sum(path.stat().st_size for path in root.rglob("*.bdf"))
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{source_bytes / 1e9:.2f} GB of BDF, {n_rounds} rounds, {cores}")
    print(", ".join(f"{name} {version(name)}" for name in ("engram", "mne", "numpy", "scipy")))
    seconds = {arm: statistics.median(each["duration_s"] for each in rounds) for arm, rounds in found.items()}
    for arm, rounds in found.items():
        peak_mb = max(each["peak_bytes"] for each in rounds) / 1e6
        rate = source_bytes / seconds[arm] / 1e6
        print(f"{arm:15} {seconds[arm]:7.1f} s {rate:7.0f} MB/s {peak_mb:7.0f} MB peak")
    for ours, theirs, most in (("prepare", "read", 2.5), ("prepare+filter", "read+filter", 1.3)):
        print(f"{ours} / {theirs}: {seconds[ours] / seconds[theirs]:.2f} (promised: at most {most})")


def measure(root: Path, arm: str) -> dict[str, float]:
    """Run one arm in a fresh process."""
    command = [sys.executable, __file__, "--corpus", str(root), "--arm", arm]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(said.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
