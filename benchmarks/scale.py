"""The EEG challenge at its size: 719 subjects prepared, read and trained on under a limit of 4 GB.

719 subjects in four releases, in the proportions of R1 to R4, each with three runs of
contrastChangeDetection and 350 s of rest: a fourth of the hours of those releases, which have more tasks. One
release after another is generated as BDF, prepared into the store, and removed. Then, each in a process
of its own and a real cgroup:

- ``epoch``: one pass of the loader alone over every window of each challenge, in global shuffle;
- ``steps``: 200 training steps of the network of each challenge's recipe.

Beside it: what the same recordings take when they are loaded, as float64 (what MNE holds) and as windows
of float32.

Usage: python benchmarks/scale.py [--folder FOLDER] [--share X] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from engram.testing.cgroup import LimitedRun, cgroup_unavailable, limited
from engram.testing.hbn import HbnCorpus, write_hbn

LIMIT_BYTES = 4 * 10**9
MEMORY = "3 GB"
"""What is asked for: the rest of the limit is for page cache."""
LOADER_MEMORY = "500 MB"
SUBJECTS = {"R1": 123, "R2": 136, "R3": 167, "R4": 293}
"""As 136 to 150 to 184 to 324."""
REST_S = 350
BATCH_SIZE = 64
N_STEPS = 200
CHALLENGES = ("challenge1", "challenge2")


def prepare(folder: Path, share: float) -> dict[str, Any]:
    """Generate, prepare and remove one release after another."""
    told: dict[str, Any] = {"n_subjects": 0, "raw_bytes": 0, "generate_s": 0.0, "prepare_s": 0.0}
    told |= {"n_prepared": 0, "n_refused": 0, "peak_bytes": 0, "most_raw_bytes": 0, "recording_s": 0}
    for release, n_all in SUBJECTS.items():
        n_subjects = max(4, round(n_all * share))
        corpus = folder / "corpus"
        begin = time.monotonic()
        written = write_hbn(corpus, HbnCorpus(n_subjects, (release,), rest_s=REST_S), n_jobs=2)
        told["generate_s"] += time.monotonic() - begin
        command = [sys.executable, "-m", "engram", "prepare", str(corpus), str(folder / "store")]
        run = _limited([*command, "--memory", MEMORY, "--json"])
        said = json.loads(run.stdout)
        told["n_subjects"] += n_subjects
        told["recording_s"] += written.duration_s
        told["raw_bytes"] += written.n_bytes
        told["most_raw_bytes"] = max(told["most_raw_bytes"], written.n_bytes)
        told["prepare_s"] += run.duration_s
        told["n_prepared"] += said["n_prepared"]
        told["n_refused"] += len(said["refusals"])
        told["peak_bytes"] = max(told["peak_bytes"], run.peak_unreclaimable_bytes)
        shutil.rmtree(corpus)
        print(f"{release}: {n_subjects} subjects, {run.duration_s:.0f} s", flush=True)
    return told


def epoch(store: Path, name: str) -> dict[str, Any]:
    """Pass once over all windows of a challenge."""
    import engram
    from engram.tasks.eeg_challenge import CHALLENGES as VALUES

    with engram.open(store) as opened:
        begin = time.monotonic()
        windows = VALUES[name].of(opened)
        loader = windows.loader(BATCH_SIZE, mode="shuffled", memory=LOADER_MEMORY)
        n_windows = 0
        first_s = 0.0
        for batch in loader:
            first_s = first_s or time.monotonic() - begin
            n_windows += len(batch)
        return {
            "n_windows": n_windows,
            "refused": windows.counts(),
            "first_s": first_s,
            "epoch_s": time.monotonic() - begin,
            "loaded_bytes": len(windows) * windows.n_chans * windows.n_times * 4,
        }


def steps(store: Path, name: str) -> dict[str, Any]:
    """Train for some steps with the network of the challenge's recipe."""
    import numpy as np

    import engram
    from engram.tasks.eeg_challenge import CHALLENGES as VALUES
    from engram.training.models import build_model
    from engram.training.recipe import read_recipe

    with tempfile.TemporaryDirectory() as temporary, engram.open(store) as opened:
        path = Path(temporary, "recipe.toml")
        path.write_bytes(files("engram.tasks").joinpath(f"{name}.toml").read_bytes())
        changes = {"epochs": 1, "memory": MEMORY, "scheduler": "constant", "patience": None}
        recipe = read_recipe(path, {f"training.{field}": value for field, value in changes.items()})
        windows = VALUES[name].of(opened)
        some = np.zeros(len(windows), bool)
        some[np.random.default_rng(0).permutation(len(windows))[: N_STEPS * BATCH_SIZE]] = True
        windows = windows.take(some)
        network = build_model(
            recipe.model.name, windows, recipe.model.arguments, framing=recipe.model.framing
        )
        begin = time.monotonic()
        fitted = engram.fit(network, windows.split(engram.Split()), Path(temporary, "run"), recipe.training)
        return {
            "n_steps": -(-len(windows) // BATCH_SIZE),
            "windows_per_s": fitted.ledger.windows_per_s,
            "steps_s": time.monotonic() - begin,
        }


def _limited(command: list[str]) -> LimitedRun:
    run = limited(command, LIMIT_BYTES, timeout_s=7200)
    if run.returncode:
        raise RuntimeError(f"{command}: {'killed for its memory' if run.oom_killed else run.stderr}")
    return run


def measure(folder: Path, what: str, name: str) -> dict[str, Any]:
    """Run one of the two in a process of its own."""
    run = _limited([sys.executable, __file__, "--child", what, str(folder / "store"), name])
    told: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return told | {"peak_bytes": run.peak_unreclaimable_bytes}


def show(found: Mapping[str, Any]) -> str:
    """Write the figures in words."""
    prepared, n_values = found["prepare"], found["prepare"]["recording_s"] * 100 * 129
    lines: list[str] = []
    lines.append(
        f"{prepared['n_subjects']} subjects, {prepared['recording_s'] / 3600:.1f} hours, "
        f"{prepared['raw_bytes'] / 1e9:.1f} GB of BDF ({prepared['most_raw_bytes'] / 1e9:.1f} GB at once)"
    )
    lines.append(
        f"prepared {prepared['n_prepared']:,} recordings in {prepared['prepare_s'] / 60:.1f} min, "
        f"{prepared['n_refused']} refused, peak {prepared['peak_bytes'] / 1e6:,.0f} MB of "
        f"{LIMIT_BYTES / 1e6:,.0f} MB; store {found['store_bytes'] / 1e9:.1f} GB"
    )
    lines.append(f"loaded as MNE holds it: {n_values * 8 / 1e9:.0f} GB")
    for name in CHALLENGES:
        passed, trained = found["epoch"][name], found["steps"][name]
        lines.append(
            f"{name}: {passed['n_windows']:,} windows, {passed['loaded_bytes'] / 1e9:.1f} GB as float32"
        )
        lines.append(
            f"  first batch {passed['first_s']:.2f} s, epoch {passed['epoch_s']:.1f} s "
            f"({passed['n_windows'] / passed['epoch_s']:,.0f} windows/s), peak "
            f"{passed['peak_bytes'] / 1e6:,.0f} MB"
        )
        lines.append(
            f"  {trained['n_steps']} steps {trained['steps_s']:.0f} s ({trained['windows_per_s']:,.0f} "
            f"windows/s), peak {trained['peak_bytes'] / 1e6:,.0f} MB"
        )
    return "\n".join(lines)


def main() -> None:
    """Prepare, read, train, and say what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to work; kept")
    parser.add_argument("--share", type=float, default=1.0, help="of the subjects")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, store, name = options.child
        print(json.dumps((epoch if what == "epoch" else steps)(Path(store), name)))
        return
    if (reason := cgroup_unavailable()) is not None:
        sys.exit(f"No memory limit can be set here: {reason}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("engram", "mne", "torch"))
    print(f"{os.cpu_count()} cores, {platform.machine()}, {versions}\n")
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"prepare": prepare(folder, options.share)}
        store = folder / "store"
        found["store_bytes"] = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
        for what in ("epoch", "steps"):
            found[what] = {name: measure(folder, what, name) for name in CHALLENGES}
    print(f"\n{show(found)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
