"""The synthetic HBN corpus: files as the field's tools read them, effects and faults as promised."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import edfio
import mne
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import welch

from engram.errors import InputError
from engram.testing.eeg_signal import CHANNELS, STEP_UV, digital_blocks, write_bdf
from engram.testing.hbn import (
    KNOWN_BAD,
    QUIRKS,
    HbnCorpus,
    HbnSummary,
    TrueSubject,
    _runs,
    _subjects,
    true_subjects,
    true_trials,
    write_hbn,
)

SMALL = HbnCorpus(n_subjects=2, n_trials=5, rest_s=70)
CLEAN = HbnCorpus(n_subjects=30, releases=("R1",), n_trials=8, n_runs=1, rest_s=10, quirks=frozenset())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HbnSummary]:
    """A corpus of four subjects with every quirk."""
    root = tmp_path_factory.mktemp("small")
    return root, write_hbn(root, SMALL)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a table of the corpus."""
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t"))


def microvolts(path: Path) -> NDArray[np.float64]:
    """Read a recording with MNE, (channel, time)."""
    return np.asarray(mne.io.read_raw_bdf(path, verbose="error").get_data() * 1e6)


def trials_of(events: list[dict[str, str]]) -> list[tuple[float, float | None]]:
    """Target and response time of every trial, by the challenge's rule."""
    bounds = [k for k, row in enumerate(events) if row["value"] in ("contrastTrial_start", "end_experiment")]
    found = []
    for first, last in pairwise(bounds):
        inside = events[first:last]
        target_s = next(float(r["onset"]) for r in inside if r["value"].endswith("_target"))
        presses = (float(r["onset"]) for r in inside if r["value"].endswith("_buttonPress"))
        response_s = next((time_s for time_s in presses if time_s >= target_s), None)
        found.append((target_s, None if response_s is None else response_s - target_s))
    return found


def nrmse(cause: Iterable[float], target: Iterable[float]) -> float:
    """Error of the best linear reader over the target's population deviation."""
    x, y = np.fromiter(cause, float), np.fromiter(target, float)
    slope, offset = np.polyfit(x, y, 1)
    return float(np.sqrt(np.mean((y - slope * x - offset) ** 2)) / y.std())


def digests(root: Path) -> dict[str, str]:
    """Hash every file below a folder."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def quirk_paths(small: tuple[Path, HbnSummary], name: str) -> list[Path]:
    """Name the files and folders that hold a quirk."""
    return [small[0] / quirk.path for quirk in small[1].quirks if quirk.name == name]


def test_recordings_open_in_mne_with_the_channels_and_rate_of_hbn(small: tuple[Path, HbnSummary]) -> None:
    """Every whole recording has E1..E128 and Cz at 100 Hz, in microvolts, of the header's length."""
    left_out = quirk_paths(small, "six_channels") + quirk_paths(small, "truncated")
    paths = [path for path in sorted(small[0].rglob("*.bdf")) if path not in left_out]
    assert len(paths) == SMALL.n_recordings - 2
    for path in paths:
        raw = mne.io.read_raw_bdf(path, verbose="error")
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert raw.ch_names == [*(f"E{k}" for k in range(1, 129)), "Cz"]
        assert raw.info["sfreq"] == 100.0 == sidecar["SamplingFrequency"]
        assert raw.n_times == 100 * sidecar["RecordingDuration"]
        channels = rows_of(Path(str(path).replace("_eeg.bdf", "_channels.tsv")))
        assert [(row["name"], row["type"], row["units"]) for row in channels] == [
            (name, "EEG", "uV") for name in raw.ch_names
        ]


def test_cz_is_flat_and_the_other_channels_are_eeg_sized(small: tuple[Path, HbnSummary]) -> None:
    """Cz is exactly zero; elsewhere the RMS is that of scalp EEG and nothing leaves a millivolt."""
    data = microvolts(next(iter(sorted(small[0].rglob("*RestingState_eeg.bdf")))))
    rms = np.sqrt(np.mean(data**2, axis=1))
    assert not data[-1].any()
    assert 8 < np.median(rms[:-1]) < 30
    assert rms[:-1].min() > 1
    assert np.abs(data).max() < 1000


def test_written_samples_read_back_exactly_in_mne_and_edfio(tmp_path: Path) -> None:
    """What was drawn is what both libraries read, to the 24-bit step."""
    corpus = replace(CLEAN, n_subjects=1)
    write_hbn(tmp_path, corpus)
    (subject,) = _subjects(corpus)
    for run in _runs(corpus, subject):
        path = next(tmp_path.rglob(f"{run.stem}_eeg.bdf"))
        drawn = np.hstack(list(digital_blocks(corpus.seed, subject.voice, run.script, 100))) * STEP_UV
        file = edfio.read_bdf(path)
        np.testing.assert_array_equal(np.stack([signal.data for signal in file.signals]), drawn)
        np.testing.assert_allclose(microvolts(path), drawn, rtol=0, atol=STEP_UV * 1e-6)
        assert np.array_equal(drawn.astype(np.float32), drawn)
        assert path.read_bytes()[168:184] == b"01.01.8500.00.00"  # no clock in the header


def test_write_bdf_refuses_blocks_of_another_length(tmp_path: Path) -> None:
    """A file never promises more or fewer records than it holds."""
    with pytest.raises(InputError, match="promises 3 s and got 2 s"):
        write_bdf(tmp_path / "a.bdf", ("E1",), 100, 3, iter([np.zeros((1, 200), np.int32)]))


def test_participants_columns_are_those_of_hbn_in_their_order(small: tuple[Path, HbnSummary]) -> None:
    """participants.tsv has exactly HBN-EEG's columns, and one row per folder."""
    columns = [
        *("participant_id", "release_number", "sex", "age", "ehq_total", "commercial_use", "full_pheno"),
        *("p_factor", "attention", "internalizing", "externalizing"),
        *("RestingState", "DespicableMe", "FunwithFractals", "ThePresent", "DiaryOfAWimpyKid"),
        *("contrastChangeDetection_1", "contrastChangeDetection_2", "contrastChangeDetection_3"),
        *("surroundSupp_1", "surroundSupp_2", "seqLearning6target", "seqLearning8target", "symbolSearch"),
    ]
    for release, root in zip(SMALL.releases, small[1].roots, strict=True):
        rows = rows_of(root / "participants.tsv")
        assert list(rows[0]) == columns
        assert {row["release_number"] for row in rows} == {release}
        assert [row["participant_id"] for row in rows] == sorted(path.name for path in root.glob("sub-*"))
        assert {row["DespicableMe"] for row in rows} == {"unavailable"}
        assert {row["contrastChangeDetection_3"] for row in rows} == {"available"}


def test_each_release_is_a_bids_root_named_as_the_challenge_names_it(small: tuple[Path, HbnSummary]) -> None:
    """Releases lie side by side, with the root files of BIDS and no subject in two."""
    assert [root.name for root in small[1].roots] == ["R1_L100_bdf", "R2_L100_bdf"]
    assert HbnCorpus(mini=True).folder("R5") == "R5_mini_L100_bdf"
    for root in small[1].roots:
        assert {path.name for path in root.iterdir() if path.is_file()} == {
            "participants.tsv",
            "dataset_description.json",
            "task-contrastChangeDetection_eeg.json",
            "task-contrastChangeDetection_events.json",
            "task-RestingState_eeg.json",
            "task-RestingState_events.json",
        }
    first, second = ({path.name for path in root.glob("sub-*")} for root in small[1].roots)
    assert not first & second


def test_events_parse_into_the_planted_trials(small: tuple[Path, HbnSummary]) -> None:
    """The challenge's trial rule finds every target and response time, and none that was missed."""
    truth: dict[tuple[str, int], list[tuple[float, float | None]]] = {}
    for trial in true_trials(SMALL):
        response_s = trial.response_time_s if trial.responded else None
        truth.setdefault((trial.subject, trial.run), []).append((trial.stimulus_s, response_s))
    assert len(truth) == 9  # three subjects of three runs; the known-bad one has no trials
    for (subject, run), trials in truth.items():
        (path,) = small[0].rglob(f"sub-{subject}_task-contrastChangeDetection_run-{run}_events.tsv")
        events = rows_of(path)
        found = trials_of(events)
        assert list(events[0]) == ["onset", "duration", "value", "event_code", "feedback"]
        assert [time_s for time_s, _ in found] == [time_s for time_s, _ in trials]
        assert [rt is None for _, rt in found] == [rt is None for _, rt in trials]
        np.testing.assert_allclose(
            [rt for _, rt in found if rt is not None], [rt for _, rt in trials if rt is not None], atol=1e-9
        )
        onsets = [float(row["onset"]) for row in events]
        assert onsets == sorted(onsets)
        assert events[1]["value"] == f"contrastChangeB{run}_start"
        assert events[-1]["value"] == "end_experiment"


def test_feedback_belongs_to_presses_and_early_presses_are_no_responses() -> None:
    """A press before the target is shown as ``non_target``; a wrong press is on the other side."""
    corpus = replace(CLEAN, n_trials=40)
    events = [
        event
        for subject in _subjects(corpus)
        for run in _runs(corpus, subject)
        for event in run.events
        if run.task == "contrastChangeDetection"
    ]
    shown = {event.feedback for event in events if event.value.endswith("_buttonPress")}
    assert shown == {"smiley_face", "sad_face", "non_target"}
    assert {event.feedback for event in events if not event.value.endswith("_buttonPress")} == {"n/a"}
    side = ""
    for event in events:
        side = event.value[0] if event.value.endswith("_target") else side
        if event.feedback in ("smiley_face", "sad_face"):
            assert (event.value[0] == side) == (event.feedback == "smiley_face")


def test_resting_state_alternates_open_and_closed_eyes(small: tuple[Path, HbnSummary]) -> None:
    """RestingState has its own cues, twenty seconds open and forty closed, and no feedback."""
    path = next(iter(sorted(small[0].rglob("*RestingState_events.tsv"))))
    events = rows_of(path)
    values = [row["value"] for row in events]
    assert list(events[0]) == ["onset", "duration", "value", "event_code"]
    assert values[:4] == ["break cnt", "resting_start", "instructed_toOpenEyes", "instructed_toCloseEyes"]
    assert float(events[3]["onset"]) - float(events[2]["onset"]) == pytest.approx(20)


def test_alpha_is_posterior_and_grows_with_closed_eyes(small: tuple[Path, HbnSummary]) -> None:
    """The spectrum at the back peaks near 10 Hz, more so with the eyes closed; the front does not."""
    path = next(iter(sorted(small[0].rglob("*RestingState_eeg.bdf"))))
    data = microvolts(path)[[CHANNELS.index("E75"), CHANNELS.index("E11")]]
    freqs_hz, closed = welch(data[:, 2800:6500], 100, nperseg=400)
    _, opened = welch(data[:, 700:2500], 100, nperseg=400)
    band = (freqs_hz > 8) & (freqs_hz < 11.5)
    beside = ((freqs_hz > 5) & (freqs_hz < 7)) | ((freqs_hz > 13) & (freqs_hz < 16))
    back, front = closed[:, band].max(axis=1) / closed[:, beside].mean(axis=1)
    assert back > 5 * front
    assert closed[0, band].mean() > 2 * opened[0, band].mean()


def test_eyes_move_at_the_front(small: tuple[Path, HbnSummary]) -> None:
    """Blinks are large above the eyes and small at the back."""
    data = microvolts(next(iter(sorted(small[0].rglob("*run-3_eeg.bdf")))))
    heights = np.abs(data).max(axis=1)
    assert heights[CHANNELS.index("E25")] > 60
    assert heights[CHANNELS.index("E25")] > 1.5 * heights[CHANNELS.index("E70")]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_true_latency_predicts_response_time_with_nrmse_0_6(seed: int) -> None:
    """Least squares from the planted latency reach 0.6 +- 0.05, and nothing without an effect."""
    corpus = HbnCorpus(seed=seed)
    for effect_size, expected in ((1.0, 0.6), (0.0, 1.0), (1.25, 0.0)):
        trials = [t for t in true_trials(replace(corpus, effect_size=effect_size)) if t.responded]
        found = nrmse((t.latency_s for t in trials), (t.response_time_s for t in trials))
        assert found == pytest.approx(expected, abs=0.05)


def test_response_times_are_spread_as_the_planted_correlation_assumes() -> None:
    """Mean and deviation of the population are those that standardise the cause."""
    times_s = np.array([t.response_time_s for t in true_trials(HbnCorpus(n_subjects=60, quirks=frozenset()))])
    assert times_s.mean() == pytest.approx(1.273, abs=0.02)
    assert times_s.std() == pytest.approx(0.322, abs=0.01)
    assert times_s.min() >= 0.6
    assert times_s.max() <= 2.4
    assert np.mean(((times_s - times_s.mean()) / times_s.std()) ** 3) > 0.2


def test_component_peaks_at_the_planted_latency_in_the_written_data(tmp_path: Path) -> None:
    """Averaged around the true latency, the back of the head shows the component at its height."""
    corpus = replace(CLEAN, n_subjects=8, n_trials=24)
    write_hbn(tmp_path, corpus)
    parietal = {
        path.name.split("_")[0]: microvolts(path)[CHANNELS.index("E62")]
        for path in tmp_path.rglob("*run-1_eeg.bdf")
    }
    centres = [
        (parietal[f"sub-{t.subject}"], round(100 * (t.stimulus_s + t.latency_s))) for t in true_trials(corpus)
    ]
    average = np.mean([x[k - 60 : k + 60] for x, k in centres if k + 60 <= len(x)], axis=0)
    assert abs(int(average.argmax()) - 60) <= 4
    assert average.max() == pytest.approx(corpus.component_uv, rel=0.35)


def measured_slopes(root: Path, subjects: tuple[TrueSubject, ...]) -> list[float]:
    """Exponent of the median spectrum beside alpha, per subject."""
    slopes = []
    for subject in subjects:
        (path,) = root.rglob(f"sub-{subject.subject}_task-contrastChangeDetection_run-1_eeg.bdf")
        freqs_hz, power = welch(microvolts(path)[:128:8], 100, nperseg=400)
        used = ((freqs_hz > 3) & (freqs_hz < 7)) | ((freqs_hz > 13) & (freqs_hz < 30))
        slopes.append(-np.polyfit(np.log(freqs_hz[used]), np.log(np.median(power, axis=0)[used]), 1)[0])
    return slopes


def test_externalizing_shows_in_the_written_spectral_slope_unless_the_effect_is_zero(tmp_path: Path) -> None:
    """Slopes measured from the files follow the scores in participants.tsv, and only if planted."""
    for effect_size, low, high in ((1.0, 0.6, 0.95), (0.0, -0.35, 0.35)):
        corpus = replace(CLEAN, effect_size=effect_size)
        root = tmp_path / str(effect_size)
        (release,) = write_hbn(root, corpus).roots
        scores = {
            row["participant_id"][4:]: float(row["externalizing"])
            for row in rows_of(release / "participants.tsv")
        }
        subjects = true_subjects(corpus)
        slopes = measured_slopes(release, subjects)
        assert [scores[s.subject] for s in subjects] == [s.externalizing for s in subjects]
        assert np.corrcoef(slopes, [s.exponent for s in subjects])[0, 1] > 0.9
        assert low < np.corrcoef(slopes, [s.externalizing for s in subjects])[0, 1] < high


def test_true_exponent_predicts_externalizing_as_well_as_latency_does_response_time() -> None:
    """The second effect has the same size as the first."""
    for effect_size, expected in ((1.0, 0.6), (0.0, 1.0)):
        subjects = true_subjects(HbnCorpus(n_subjects=600, releases=("R3",), effect_size=effect_size))
        found = nrmse((s.exponent for s in subjects), (s.externalizing for s in subjects))
        assert found == pytest.approx(expected, abs=0.05)


def test_the_same_bytes_for_any_number_of_jobs_and_calls(
    small: tuple[Path, HbnSummary], tmp_path: Path
) -> None:
    """A corpus is a function of its settings."""
    summary = write_hbn(tmp_path, SMALL, n_jobs=2)
    assert digests(tmp_path) == digests(small[0])
    assert replace(summary, roots=()) == replace(small[1], roots=())
    assert summary.n_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.bdf"))


def test_a_recording_does_not_depend_on_who_else_is_recorded(tmp_path: Path) -> None:
    """More subjects, another release or fewer runs leave the others' recordings as they are."""
    few = replace(CLEAN, n_subjects=1)
    write_hbn(tmp_path / "few", few)
    write_hbn(tmp_path / "many", replace(few, n_subjects=2, releases=("R4", "R1"), n_runs=2))
    in_few = {name: digest for name, digest in digests(tmp_path / "few").items() if "/sub-" in name}
    in_many = digests(tmp_path / "many")
    assert in_few.items() <= in_many.items()


def test_another_seed_gives_other_subjects_and_samples() -> None:
    """Nothing is shared between seeds."""
    one, other = true_subjects(CLEAN), true_subjects(replace(CLEAN, seed=1))
    assert not {s.subject for s in one} & {s.subject for s in other}


def test_one_run_has_six_channels(small: tuple[Path, HbnSummary]) -> None:
    """The six-channel run is valid BDF of six channels, and channels.tsv says so."""
    (path,) = quirk_paths(small, "six_channels")
    assert mne.io.read_raw_bdf(path, verbose="error").ch_names == ["E1", "E2", "E3", "E4", "E5", "E6"]
    assert len(rows_of(Path(str(path).replace("_eeg.bdf", "_channels.tsv")))) == 6


def test_the_truncated_file_promises_more_than_it_holds(small: tuple[Path, HbnSummary]) -> None:
    """The header's record count does not fit the bytes, which end inside a record."""
    (path,) = quirk_paths(small, "truncated")
    header_bytes, record_bytes = 256 * 130, 129 * 100 * 3
    promised = int(path.read_bytes()[236:244])
    held = (path.stat().st_size - header_bytes) / record_bytes
    assert 0 < held < promised
    assert held != int(held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # edfio and MNE each warn in their own words
        assert mne.io.read_raw_bdf(path, verbose="error").n_times < 100 * promised


def test_every_run_misses_a_response(small: tuple[Path, HbnSummary]) -> None:
    """With missing responses on, each run with trials has at least one and the summary counts them."""
    paths = quirk_paths(small, "missing_responses")
    assert len(paths) == 9
    for path in paths:
        trials = trials_of(rows_of(Path(str(path).replace("_eeg.bdf", "_events.tsv"))))
        assert any(response_s is None for _, response_s in trials)
        assert any(response_s is not None for _, response_s in trials)


def test_targets_are_missing_for_whole_subjects(small: tuple[Path, HbnSummary]) -> None:
    """A subject without scores has ``n/a`` in all four of them; the others have numbers."""
    without = {path.name for path in quirk_paths(small, "nan_targets")}
    assert without
    for row in (row for root in small[1].roots for row in rows_of(root / "participants.tsv")):
        scores = [row[name] for name in ("p_factor", "attention", "internalizing", "externalizing")]
        if row["participant_id"] in without:
            assert scores == ["n/a"] * 4
        else:
            assert all(-6 < float(score) < 6 for score in scores)


def test_a_trial_lies_at_the_recordings_end(small: tuple[Path, HbnSummary]) -> None:
    """Where planted, the challenge's window to +2.5 s passes the end; elsewhere it never does."""
    planted = set(quirk_paths(small, "trial_at_end"))
    assert planted
    for path in small[0].rglob("*contrastChangeDetection*_eeg.bdf"):
        trials = trials_of(rows_of(Path(str(path).replace("_eeg.bdf", "_events.tsv"))))
        duration_s = json.loads(path.with_suffix(".json").read_text())["RecordingDuration"]
        assert not trials or (trials[-1][0] + 2.5 > duration_s) == (path in planted)


def test_one_subject_is_known_to_be_bad(small: tuple[Path, HbnSummary]) -> None:
    """It carries an id from the organisers' list, and is too short for the challenge's four seconds."""
    (folder,) = quirk_paths(small, "known_bad")
    assert folder.name.removeprefix("sub-") in KNOWN_BAD
    for path in folder.rglob("*.bdf"):
        assert mne.io.read_raw_bdf(path, verbose="error").n_times < 400


def test_without_quirks_there_is_no_fault() -> None:
    """Quirks are switched one by one; switched off, every trial is answered and no one is bad."""
    corpus = HbnCorpus(n_subjects=8, quirks=frozenset())
    assert all(trial.responded for trial in true_trials(corpus))
    assert not {subject.subject for subject in true_subjects(corpus)} & set(KNOWN_BAD)
    assert not any(run.quirks for subject in _subjects(corpus) for run in _runs(corpus, subject))


@pytest.mark.parametrize("quirk", sorted(QUIRKS))
def test_a_single_quirk_comes_alone(quirk: str, tmp_path: Path) -> None:
    """Each quirk can be planted without the others."""
    corpus = HbnCorpus(
        n_subjects=4, releases=("R1",), n_trials=2, n_runs=1, rest_s=10, quirks=frozenset({quirk})
    )
    assert {found.name for found in write_hbn(tmp_path, corpus).quirks} == {quirk}


def test_the_long_recording_is_one_of_the_corpus(tmp_path: Path) -> None:
    """One RestingState can be longer and faster, its halves joined without a seam."""
    corpus = replace(CLEAN, n_subjects=2, n_trials=2, long_recording=(95, 250))
    write_hbn(tmp_path, corpus)
    raws = [mne.io.read_raw_bdf(path, verbose="error") for path in tmp_path.rglob("*RestingState_eeg.bdf")]
    (raw,) = (raw for raw in raws if raw.info["sfreq"] == 250)
    assert raw.n_times == 95 * 250
    data = raw.get_data("E100")[0]
    jumps = np.abs(np.diff(data))
    assert jumps[[30 * 250 - 1, 60 * 250 - 1, 90 * 250 - 1]].max() <= jumps.max()
    thirds = data[: 90 * 250].reshape(3, -1).std(axis=1)
    assert thirds.max() < 2 * thirds.min()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_subjects": 0}, "n_subjects=0"),
        ({"n_subjects": 1000}, "1 to 999 subjects"),
        ({"releases": ()}, "releases=()"),
        ({"releases": ("R1", "R1")}, "each release once"),
        ({"releases": ("first",)}, "named 'R1'"),
        ({"seed": -1}, "seed=-1"),
        ({"n_trials": 1}, "2 to 500 trials"),
        ({"n_runs": 4}, "1 to 3 runs"),
        ({"rest_s": 5}, "at least 10 s"),
        ({"long_recording": (5, 500)}, "at least 10 s"),
        ({"long_recording": (100, 50)}, "at least 100 Hz"),
        ({"effect_size": 1.3}, "0 to 1.25"),
        ({"component_uv": float("nan")}, "0 to 1000"),
        ({"quirks": frozenset({"noisy"})}, "noisy"),
        ({"n_subjects": 1}, "Use n_subjects=2"),
        ({"n_subjects": 1, "quirks": frozenset({"trial_at_end"})}, "which need 4"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    """Every setting is checked once, and the error names the value and a remedy."""
    with pytest.raises(InputError) as error:
        HbnCorpus(**settings)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize("place", [".", "in", "in/it"])
def test_a_file_in_the_way_is_an_error(tmp_path: Path, place: str) -> None:
    """A corpus is written into folders."""
    file = tmp_path / "notes.txt"
    file.touch()
    with pytest.raises(InputError, match=r"notes\.txt is a file, not a folder"):
        write_hbn(file / place, CLEAN)


def test_an_existing_release_is_not_written_over(tmp_path: Path) -> None:
    """A folder that exists is left alone."""
    (tmp_path / "R1_L100_bdf").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_hbn(tmp_path, CLEAN)
