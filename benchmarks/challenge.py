"""What helps in the EEG Foundation Challenge, and what does not: arms side by side on a generated corpus.

Sixty subjects in three releases, with both planted effects and every fault. Each arm is one of Engram's
two recipes with one thing changed, trained from two seeds on R1 and R2 and scored as the organisers do on
R5, whose people it has not seen. ``mean of seeds`` and ``shifted windows`` are made of the networks of
the recipe itself. An arm whose network trains fewer than 300 windows per second here, on all cores, is not
trained: its row says how many there were.

The effects are planted (``engram.testing.hbn``): one moves a component in time, the other the slope of the
background. What helps to find them need not help on recordings of children; what costs nothing and does no
harm here is worth a try there. Two seeds are few: a difference that is smaller than that between the seeds of
an arm says nothing.

The seeds are trained side by side, a core each. A training that is there already is not trained again: the
same command goes on where it was stopped.

Usage: python benchmarks/challenge.py [--folder FOLDER] [--json FILE] [--page FILE] [--quick]
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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

import engram
from engram.ledger import Ledger
from engram.store.reader import Store
from engram.tasks.eeg_challenge import CHALLENGES, VALID_RELEASE, score_challenge
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.training.models import build_model
from engram.training.networks import MeanOf, ShiftedMean
from engram.training.recipe import Recipe, read_recipe
from engram.training.train import open_training, train

RELEASES = ("R1", "R2", VALID_RELEASE)
SEEDS = (0, 1)
SLOWEST_PER_S = 300
N_TIMED = 4
"""Batches that decide whether a network is fast enough, after one that is not timed."""
SHIFTS_SAMPLES = (-4, -2, 0, 2, 4)
EPOCHS = {"challenge1": 8, "challenge2": 4}
"""Eight passes over 2,000 windows, four over 8,000."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A recipe with something changed."""

    says: str
    """What is changed, in words."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """The fields, by their dotted names."""


ARMS: Mapping[str, Mapping[str, Arm]] = {
    "challenge1": {
        "recipe": Arm("`TimeLocalizer`, windows scaled, shifts of up to 0.1 s"),
        "no shift": Arm("every window where it is", {"windows.events.shift_s": None}),
        "no scaling": Arm("microvolts", {"model.framing.scaling": "none"}),
        "channel scaling": Arm("constants of each channel", {"model.framing.scaling": "channel"}),
        "downsample": Arm("50 Hz after a filter", {"model.framing.downsample": 2}),
        "noise": Arm("Gaussian noise of 2 uV", {"training.noise": 2.0}),
        "channel dropout": Arm("a tenth of the channels", {"training.channel_dropout": 0.1}),
        "time mask": Arm("up to 0.3 s", {"training.time_mask_samples": 30}),
        "huber": Arm("linear beyond 0.3 s", {"training.loss": "huber", "training.huber_delta": 0.3}),
        "elastic net": Arm("l1 of 1e-5, l2 of 1e-4", {"training.l1": 1e-5, "training.l2": 1e-4}),
        "no dropout": Arm("`drop_prob` of 0", {"model.arguments.drop_prob": 0.0}),
        "MultiScaleNet": Arm("residual, several lengths of time", {"model.name": "MultiScaleNet"}),
        "PatchAttentionNet": Arm("a small transformer", {"model.name": "PatchAttentionNet"}),
        "SCCNet": Arm("of braindecode", {"model.name": "SCCNet"}),
        "EEGNeX": Arm("of braindecode, the starter kit's", {"model.name": "EEGNeX"}),
    },
    "challenge2": {
        "recipe": Arm("`BandPowerNet`, microvolts, Huber, a crop that is drawn"),
        "window scaling": Arm("each window to deviation one", {"model.framing.scaling": "window"}),
        "near-constant": Arm("at most 0.3 from the mean", {"model.framing.reach": 0.3}),
        "mse": Arm("squared errors", {"training.loss": "mse"}),
        "l1": Arm("absolute errors, the starter kit's", {"training.loss": "l1"}),
        "channel dropout": Arm("a tenth of the channels", {"training.channel_dropout": 0.1}),
        "elastic net": Arm("l1 of 1e-5, l2 of 1e-4", {"training.l1": 1e-5, "training.l2": 1e-4}),
        "MultiScaleNet": Arm("residual, several lengths of time", {"model.name": "MultiScaleNet"}),
        "PatchAttentionNet": Arm("a small transformer", {"model.name": "PatchAttentionNet"}),
        "SCCNet": Arm("of braindecode", {"model.name": "SCCNet"}),
        "EEGNeX": Arm("of braindecode, the starter kit's", {"model.name": "EEGNeX"}),
    },
}


def recipe_of(folder: Path, challenge: str, arm: str, seed: int, *, quick: bool) -> Recipe:
    """Change what the arm changes; the store lies beside the recipe."""
    epochs = 1 if quick else EPOCHS[challenge]
    changes = {"training.seed": seed, "training.epochs": epochs, **ARMS[challenge][arm].changes}
    return read_recipe(folder / f"{challenge}.toml", changes)


def place_of(folder: Path, challenge: str, arm: str, seed: int) -> Path:
    """Name the folder of a training."""
    return folder / f"{challenge} {arm} {seed}"


def train_beside(folder: Path, challenge: str, arm: str, *, quick: bool) -> None:
    """Train an arm from all seeds at once, each in a process of one thread."""
    command = [sys.executable, __file__, "--folder", str(folder), *(["--quick"] if quick else [])]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    commands = [[*command, "--child", challenge, arm, str(seed)] for seed in SEEDS]
    with ThreadPoolExecutor(len(commands)) as beside:
        list(beside.map(partial(subprocess.run, check=True, env=one_thread), commands))


def windows_per_s(recipe: Recipe) -> float:
    """Measure the recipe's network on some of its windows, forward and backward, a core for each seed."""
    with Store(recipe.store) as store:
        windows = store.windows(recipe.windows.value, recipe.target_value)
        network = build_model(
            recipe.model.name, windows, recipe.model.arguments, framing=recipe.model.framing
        )
        batch = windows.read(range(recipe.training.batch_size))
    y = torch.as_tensor(windows.index.targets(batch.numbers.numpy()))[:, None]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    network.train()
    begin = 0.0
    for step in range(N_TIMED + 1):
        if step == 1:
            begin = time.perf_counter()
        optimizer.zero_grad()
        (network(batch.X) - y).square().mean().backward()
        optimizer.step()
    on_one_core = N_TIMED * recipe.training.batch_size / (time.perf_counter() - begin)
    return on_one_core * min(len(SEEDS), os.cpu_count() or 1)


def scored(challenge: str, network: nn.Module, store: Path) -> float:
    """Score a network on the release that was not trained on."""
    with Store(store) as opened:
        windows = CHALLENGES[challenge].of(opened, (VALID_RELEASE,))
        return score_challenge(CHALLENGES[challenge], network, windows).nrmse


def measure(folder: Path, challenge: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Train and score every arm of a challenge, and give a row for each."""
    store, networks = folder / "store", list[nn.Module]()
    for name, arm in ARMS[challenge].items():
        row: dict[str, Any] = {"challenge": challenge, "arm": name, "says": arm.says, "nrmse": []}
        row["windows_per_s"] = windows_per_s(recipe_of(folder, challenge, name, 0, quick=quick))
        # Those of the recipe itself are what all others are compared with.
        if name != "recipe" and row["windows_per_s"] < SLOWEST_PER_S:
            yield row
            continue
        row["chance"], row["ridge"], row["train_s"] = [], [], []
        train_beside(folder, challenge, name, quick=quick)
        for seed in SEEDS:
            place = place_of(folder, challenge, name, seed)
            ledger = Ledger.read(place)
            row["train_s"].append(ledger.duration_s)
            row["n_windows"] = next(side.n_windows for side in ledger.sides if side.side == "train")
            for score in ledger.scores:
                if (score.side, score.metric) == ("test", "nrmse"):
                    row["chance"].append(score.chance)
                    if score.model == "ridge":
                        row["ridge"].append(score.value)
            row["n_parameters"] = ledger.n_parameters
            with open_training(place) as training:
                row["nrmse"].append(scored(challenge, training.network, store))
                if name == "recipe":
                    networks.append(training.network)
        yield row
    yield {
        "challenge": challenge,
        "arm": "mean of seeds",
        "says": f"the mean of the recipe's {len(SEEDS)} networks",
        "nrmse": [scored(challenge, MeanOf(networks), store)],
    }
    per_sample = 1 / 100 if challenge == "challenge1" else 0.0
    yield {
        "challenge": challenge,
        "arm": "shifted windows",
        "says": f"the mean over windows moved by {', '.join(map(str, SHIFTS_SAMPLES))} samples",
        "nrmse": [
            scored(challenge, ShiftedMean(each, SHIFTS_SAMPLES, seconds_per_sample=per_sample), store)
            for each in networks
        ],
    }


def spelled(row: Mapping[str, Any], base: float) -> str:
    """Write a row of the table."""
    found = row["nrmse"]
    if not found:
        slow = f"not trained: {row['windows_per_s']:,.0f} windows/s"
        return f"| {row['arm']} | {row['says']} | {slow} | | |"
    mean = statistics.fmean(found)
    seeds = " ".join(f"{value:.3f}" for value in found)
    difference = "" if row["arm"] == "recipe" else f"{mean - base:+.3f}"
    return f"| {row['arm']} | {row['says']} | {mean:.3f} | {seeds} | {difference} |"


def _beside(base: Mapping[str, Any]) -> str:
    chance, ridge = (statistics.fmean(base[name]) for name in ("chance", "ridge"))
    return (
        f"{base['n_windows']:,} training windows, {base['n_parameters']:,} parameters. The mean of the "
        f"training targets: {chance:.3f}. Ridge: {ridge:.3f}."
    )


def page_of(rows: list[dict[str, Any]], machine: str) -> str:
    """Write the tables as Markdown."""
    said = (__doc__ or "").replace("``", "`").split("\n\n")
    lines = [
        "# What helps in the EEG challenge, and what does not",
        "",
        "<!-- written by make bench-challenge -->",
        "",
        *said[1].splitlines(),
        "",
        *said[2].splitlines(),
        "",
        f"nRMSE, lower is better. {machine}",
    ]
    for challenge in ARMS:
        mine = [row for row in rows if row["challenge"] == challenge]
        base = next(row for row in mine if row["arm"] == "recipe")
        mean = statistics.fmean(base["nrmse"])
        lines += [
            "",
            f"## Challenge {challenge[-1]}",
            "",
            _beside(base),
            "",
            "| arm | changed | nRMSE | of each seed | against the recipe |",
            "|---|---|---|---|---|",
            *(spelled(row, mean) for row in mine),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the corpus, train the arms, and print the tables as they grow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to work, and to go on")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--page", type=Path, help="Markdown file for the tables")
    parser.add_argument("--quick", action="store_true", help="few subjects, one epoch: to try the script")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        challenge, arm, seed = options.child
        recipe = recipe_of(options.folder, challenge, arm, int(seed), quick=options.quick)
        train(recipe, place_of(options.folder, challenge, arm, int(seed)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "store").exists():
            shutil.rmtree(folder / "corpus", ignore_errors=True)
            write_hbn(folder / "corpus", HbnCorpus(4 if options.quick else 20, RELEASES), n_jobs=2)
        engram.prepare(folder / "corpus", folder / "store", memory="1 GB").store.close()
        for challenge in ARMS:
            recipe_text = files("engram.tasks").joinpath(f"{challenge}.toml").read_bytes()
            (folder / f"{challenge}.toml").write_bytes(recipe_text)
        rows = []
        for challenge in ARMS:
            for row in measure(folder, challenge, quick=options.quick):
                rows.append(row)
                shown = ", ".join(f"{value:.3f}" for value in row["nrmse"]) or "too slow"
                speed = f", {row['windows_per_s']:,.0f} windows/s" if "windows_per_s" in row else ""
                print(f"{challenge} {row['arm']}: {shown}{speed}", flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("engram", "braindecode", "torch"))
    machine = (
        f"{os.cpu_count()} cores ({platform.machine()}), {versions}, {datetime.now(UTC):%Y-%m-%d}, "
        f"{sum(max(row.get('train_s', [0])) for row in rows) / 60:.0f} minutes of training."
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    page = page_of(rows, machine)
    if options.page:
        options.page.write_text(page)
    print(f"\n{page}")


if __name__ == "__main__":
    main()
