"""The EEG Foundation Challenge: windows, targets and scores as the organisers' code gives them."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pytest
import torch
from braindecode.datasets import BaseConcatDataset, RawDataset
from braindecode.preprocessing import create_fixed_length_windows, create_windows_from_events
from numpy.typing import NDArray
from torch import Tensor, nn

import engram
from engram.errors import InputError
from engram.store.reader import Store
from engram.tasks.eeg_challenge import (
    CHALLENGE_1,
    CHALLENGE_2,
    CHALLENGES,
    KNOWN_BAD,
    TRAIN_RELEASES,
    VALID_RELEASE,
    overall,
    score_challenge,
    scored_offsets,
)
from engram.testing import hbn
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.training.recipe import read_recipe
from engram.windows.splits import Side

N_SUBJECTS = 4
RELEASES = ("R1", "R5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two releases with every fault that HBN-EEG has."""
    root = tmp_path_factory.mktemp("hbn")
    write_hbn(root / "corpus", HbnCorpus(N_SUBJECTS, RELEASES, n_trials=6, n_runs=2, rest_s=10))
    engram.prepare(root / "corpus", root / "store", memory="4 GB", precision={"eeg": "float32"}).store.close()
    return root


@pytest.fixture
def store(corpus: Path) -> Iterator[Store]:
    """Both releases, prepared."""
    with Store(corpus / "store") as opened:
        yield opened


class Probe(nn.Module):
    """A fixed function of a window, in float64 so that it is the same for microvolts and volts."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.bias = bias
        self.seen: list[float] = []
        self.of_channel = torch.from_numpy(rng.normal(0, 0.01, 129))
        self.of_time = torch.from_numpy(rng.normal(0, 0.1, 200))

    def forward(self, x: Tensor) -> Tensor:
        """(1, 129, 200) microvolt -> (1, 1)."""
        out: Tensor = self.bias + (x.double() * self.of_channel[:, None] * self.of_time).sum((1, 2))[:, None]
        self.seen += out[:, 0].tolist()
        return out

    def plain(self, volts: NDArray[np.float64]) -> float:
        """Give the same of (129, 200) volt, without PyTorch."""
        weights = np.outer(self.of_channel.numpy(), self.of_time.numpy())
        return self.bias + float((volts * 1e6 * weights).sum())


# What the rules say, with MNE and NumPy alone: one recording after another, one window after another.


def raws(root: Path) -> Iterator[tuple[Path, dict[str, str], list[dict[str, str]], mne.io.BaseRaw]]:
    """Give the file, the participant, the events and MNE's object of each run that counts."""
    folders = [root / "corpus" / f"{release}_L100_bdf" for release in RELEASES]
    people = {
        row["participant_id"]: row for folder in folders for row in rows_of(folder / "participants.tsv")
    }
    found = [
        path
        for folder in folders
        for path in folder.glob("sub-*/eeg/*_task-contrastChangeDetection_run-*_eeg.bdf")
    ]
    for path in sorted(found, key=lambda path: path.name):
        person = people[path.name.split("_")[0]]
        if person["participant_id"].removeprefix("sub-") in KNOWN_BAD or is_cut_short(path):
            continue
        raw = mne.io.read_raw_bdf(path, preload=True, verbose="ERROR")
        if len(raw.ch_names) == 129:
            events = rows_of(path.with_name(path.name.replace("_eeg.bdf", "_events.tsv")))
            yield path, person, events, raw


def recordings(root: Path) -> Iterator[tuple[dict[str, str], list[dict[str, str]], NDArray[np.float64]]]:
    """Give the participant, the events and the samples (129, time) in volt of each run that counts."""
    return ((person, events, raw.get_data()) for _, person, events, raw in raws(root))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a table."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def is_cut_short(path: Path) -> bool:
    """Compare a BDF's size with its header: bytes 184 (header), 236 (records), then samples per record."""
    with path.open("rb") as file:
        header = file.read(256)
        n_signals = int(header[252:256])
        rest = file.read(256 * n_signals)
    n_samples = sum(
        int(rest[216 * n_signals + 8 * i : 216 * n_signals + 8 * i + 8]) for i in range(n_signals)
    )
    return path.stat().st_size < int(header[184:192]) + int(header[236:244]) * n_samples * 3


def plain_challenge_1(root: Path, probe: Probe) -> tuple[list[float], list[float]]:
    """Give targets and predictions of challenge 1."""
    targets, predictions = [], []
    for _, events, volts in recordings(root):
        for shown, pressed in answered(events):
            first = round(shown * 100) + 50
            if first + 200 <= volts.shape[1]:
                targets.append(pressed - shown)
                predictions.append(probe.plain(volts[:, first : first + 200]))
    return targets, predictions


def answered(events: list[dict[str, str]]) -> Iterator[tuple[float, float]]:
    """Give the stimulus and the response of each trial that has both, in seconds.

    The trial table of ``eegdash.hbn.windows``.
    """
    onsets = [(float(row["onset"]), row["value"]) for row in events]
    onsets.sort(key=lambda row: row[0])
    starts = [onset for onset, value in onsets if value == "contrastTrial_start"]
    for start, stop in pairwise(starts):
        shown = [t for t, value in onsets if value.endswith("_target") and start <= t < stop]
        if not shown:
            continue
        pressed = [t for t, value in onsets if value.endswith("_buttonPress") and shown[0] <= t < stop]
        if pressed:
            yield shown[0], pressed[0]


def plain_challenge_2(root: Path, probe: Probe) -> tuple[list[float], list[float]]:
    """Give targets and predictions of challenge 2."""
    targets, predictions = [], []
    for person, _, volts in recordings(root):
        if person["externalizing"] == "n/a" or volts.shape[1] < 400:
            continue
        generator = random.Random(42)
        for first in range(0, volts.shape[1] - 400 + 1, 200):
            crop = first + generator.randint(0, 200)
            targets.append(float(person["externalizing"]))
            predictions.append(probe.plain(volts[:, crop : crop + 200]))
    return targets, predictions


def plain_nrmse(targets: list[float], predictions: list[float]) -> float:
    """Root mean squared error over the population deviation."""
    y, predicted = np.array(targets), np.array(predictions)
    return float(np.sqrt(((y - predicted) ** 2).mean()) / y.std())


PLAIN: dict[str, Any] = {"challenge1": plain_challenge_1, "challenge2": plain_challenge_2}


@pytest.mark.parametrize("name", CHALLENGES)
def test_scores_are_those_of_the_rules(corpus: Path, store: Store, name: str) -> None:
    """To the sixth decimal, window by window, beside an implementation with MNE and NumPy alone."""
    challenge, probe = CHALLENGES[name], Probe(1.2 if name == "challenge1" else 0.1)
    windows = challenge.of(store)
    scored = score_challenge(challenge, probe, windows)
    targets, predictions = PLAIN[name](corpus, probe)
    assert len(targets) == len(windows) > 30
    # In order: recordings by their names, and windows of one in time, as the scorer meets them.
    np.testing.assert_allclose(scored.targets, targets, atol=2e-6)
    np.testing.assert_allclose(scored.predictions, predictions, atol=2e-6)
    assert len(probe.seen) == len(windows)
    np.testing.assert_allclose(probe.seen, scored.predictions, atol=2e-6)
    assert scored.nrmse == pytest.approx(plain_nrmse(targets, predictions), abs=1e-6)
    assert 0.2 < scored.nrmse < 20


@pytest.mark.filterwarnings("ignore:`drop_last_window` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CHALLENGES)
def test_windows_are_those_of_braindecode(corpus: Path, store: Store, name: str) -> None:
    """The starter kit's two calls of braindecode on the same files: starts, targets and samples."""
    windows = CHALLENGES[name].of(store)
    places, targets = windows.table(), windows.index.targets(np.arange(len(windows)))
    assert targets is not None
    # The whole window of four seconds, of which a crop is taken.
    main = windows.index.locate(np.arange(len(windows))).starts["eeg"]
    recording = places["recording"].to_pylist()
    n_seen = 0
    for path, person, events, raw in raws(corpus):
        theirs = braindecode_windows(name, raw, person, events)
        mine = np.flatnonzero([one == path.name.removesuffix("_eeg.bdf") for one in recording])
        if theirs is None:
            assert not len(mine)
            continue
        metadata = theirs.get_metadata()
        assert main[mine].tolist() == metadata["i_start_in_trial"].tolist()
        np.testing.assert_allclose(targets[mine], metadata["target"].to_numpy(float), atol=1e-6)
        if name == "challenge1":
            samples = windows.read(mine).signals["eeg"].numpy()
            for place, X in enumerate(samples):  # noqa: N806 - braindecode's word
                np.testing.assert_allclose(X, theirs[place][0] * 1e6, rtol=1e-4, atol=1e-3)
        n_seen += len(mine)
    assert n_seen == len(windows) > 30


def braindecode_windows(
    name: str, raw: mne.io.BaseRaw, person: dict[str, str], events: list[dict[str, str]]
) -> Any:
    """Cut one recording as the starter kit does, or give None where it leaves it out."""
    score = float("nan") if person["externalizing"] == "n/a" else float(person["externalizing"])
    recording = RawDataset(raw, {"externalizing": score}, target_name="externalizing")
    if name == "challenge2":
        if math.isnan(score) or raw.n_times < 400:
            return None
        return create_fixed_length_windows(
            BaseConcatDataset([recording]),
            window_size_samples=400,
            window_stride_samples=200,
            drop_last_window=True,
        )
    # braindecode raises where a trial ends behind the recording.
    pairs = [pair for pair in answered(events) if round(pair[0] * 100) + 250 <= raw.n_times]
    raw.set_annotations(mne.Annotations([shown for shown, _ in pairs], 0.0, "stimulus_anchor"))
    found = create_windows_from_events(
        BaseConcatDataset([recording]),
        mapping={"stimulus_anchor": 0},
        trial_start_offset_samples=50,
        trial_stop_offset_samples=250,
        window_size_samples=200,
        window_stride_samples=100,
        preload=True,
    )
    for each in found.datasets:
        each.metadata["target"] = [pressed - shown for shown, pressed in pairs]
    return found


def test_what_is_left_out_is_counted(store: Store) -> None:
    """Bad subjects, six channels, no score, no press, and the last trial of every run."""
    first, second = (challenge.of(store).counts() for challenge in (CHALLENGE_1, CHALLENGE_2))
    assert first["excluded"] == second["excluded"] == 2  # two runs of one bad subject
    assert first["other channels"] == second["other channels"] == 1
    assert first["no trial"] == 12  # the last one of the runs that are left
    assert first["no target"] >= 6
    assert second["no target"] > 30


def test_the_overall_score_weighs_both(corpus: Path, store: Store) -> None:
    """0.3 and 0.7, rounded to five decimals; one alone has no overall score."""
    scores = [
        score_challenge(challenge, Probe(0.5), challenge.of(store)) for challenge in CHALLENGES.values()
    ]
    assert overall(scores) == round(0.3 * scores[0].nrmse + 0.7 * scores[1].nrmse, 5)
    with pytest.raises(InputError, match=r"there are challenge1\. Score both"):
        overall(scores[:1])


def test_a_constant_that_is_the_mean_scores_one(store: Store) -> None:
    """In either challenge; each subject is told by itself."""

    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor([[value]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.value.expand(len(x), 1)

    for challenge in CHALLENGES.values():
        windows = challenge.of(store)
        targets = windows.index.targets(np.arange(len(windows)))
        assert targets is not None
        scored = score_challenge(challenge, Constant(float(np.mean(targets))), windows)
        assert scored.nrmse == pytest.approx(1.0, abs=1e-6)
        assert sum(subject.n_windows for subject in scored.by_subject.values()) == len(windows)
        one = next(iter(scored.by_subject.values()))
        assert one.prediction == pytest.approx(float(np.mean(targets)), abs=1e-6)


def test_releases_are_chosen_by_name(store: Store) -> None:
    """No subject is in two; one that is not there is named beside those that are."""
    windows = {release: CHALLENGE_2.of(store, (release,)) for release in RELEASES}
    subjects = [set(each.index.subjects().values) for each in windows.values()]
    assert subjects[0]
    assert subjects[1]
    assert not subjects[0] & subjects[1]
    with pytest.raises(InputError, match=r"No recording has release R7\. There are: R1, R5"):
        CHALLENGE_1.of(store, ("R7",))
    assert VALID_RELEASE not in TRAIN_RELEASES


def test_crops_are_drawn_for_each_recording_anew(store: Store) -> None:
    """From 0 to 200 samples, the same sequence in each recording."""
    windows = CHALLENGE_2.of(store)
    offsets = scored_offsets(windows)
    codes = windows.index.locate(np.arange(len(windows))).recording
    generator = random.Random(42)
    sequence = [generator.randint(0, 200) for _ in range(200)]
    for code in np.unique(codes):
        mine = offsets[codes == code].tolist()
        assert mine == sequence[: len(mine)]
    # A window that is left out takes its number with it.
    some = np.arange(len(windows)) % 3 != 1
    np.testing.assert_array_equal(scored_offsets(windows.take(some)), offsets[some])


def test_an_output_of_another_form_is_refused(store: Store) -> None:
    """The scorer would take its first number, or fail."""
    windows = CHALLENGE_1.of(store, ("R1",))
    with pytest.raises(InputError, match="one finite number"):
        score_challenge(CHALLENGE_1, nn.Flatten(), windows)


@pytest.mark.parametrize("name", CHALLENGES)
def test_the_recipe_trains_what_is_scored(tmp_path: Path, name: str) -> None:
    """The recipe that is shipped has the challenge's windows and target; it may move them in training."""
    text = files("engram.tasks").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.toml")
    windows = recipe.windows.value
    assert replace(windows, shift_s=None) == CHALLENGES[name].windows
    assert recipe.target_value == CHALLENGES[name].target
    assert recipe.split.test == Side(by="release", values=(VALID_RELEASE,))


def test_the_generated_corpus_has_the_same_bad_subjects() -> None:
    """Written down twice, since what is tested does not import what tests it."""
    assert hbn.KNOWN_BAD == KNOWN_BAD
