"""A measured recording, by way of BIDS, from the file to a scored model; windows are braindecode's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pyarrow.parquet as pq
import pytest

from engram.ledger import PREDICTIONS
from engram.preparation.ingest import prepare
from engram.report.page import write_report
from engram.store.reader import Store
from engram.training.recipe import read_recipe
from engram.training.train import evaluate, train
from engram.windows import EventWindows
from engram.windows.targets import EventColumn, TimeTo

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "eeg_attention"
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the folder of real recordings is not beside this clone"
)

N_SQUARES, N_ANSWERED = 80, 74
START, STOP = -32, 128
"""Samples about an event at 128 Hz: a quarter of a second before it to one second after it."""


@pytest.fixture(scope="module")
def mne_bids() -> Any:
    """What writes and reads the dataset, for whoever does not use Engram."""
    return pytest.importorskip("mne_bids")


@pytest.fixture(scope="module", params=["BrainVision", "EEGLAB"])
def bids(request: pytest.FixtureRequest, mne_bids: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One subject with 32 channels, 80 squares and 74 presses of a button, as MNE-BIDS writes it."""
    raw = mne.io.read_raw_eeglab(DATA / "eeglab_data.set", verbose="ERROR")
    raw.set_channel_types({"EOG1": "eog", "EOG2": "eog"}, verbose="ERROR")
    raw.info["line_freq"] = 60
    root = tmp_path_factory.mktemp("bids")
    path = mne_bids.BIDSPath(root=root, subject="01", task="attention", datatype="eeg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the conversion is what we want
        mne_bids.write_raw_bids(raw, path, format=request.param, verbose="ERROR")
    return path


@pytest.fixture(scope="module")
def raw(bids: Any, mne_bids: Any) -> Any:
    """The recording as MNE-BIDS reads it, in microvolts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of electrodes without a place
        raw = mne_bids.read_raw_bids(bids, verbose="ERROR")
    return raw.load_data().pick("eeg").apply_function(lambda volts: volts * 1e6)


@pytest.fixture(scope="module", params=["float32", "default"])
def prepared(request: pytest.FixtureRequest, bids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset prepared: as it was read, and in what is chosen where nothing is said."""
    path = tmp_path_factory.mktemp("prepared") / "store"
    prepare(bids.root, path, precision=request.param).store.close()
    return path


@pytest.fixture
def store(prepared: Path) -> Iterator[Store]:
    """The dataset, closed again after the test."""
    with Store(prepared) as store:
        yield store


def of_braindecode(raw: Any, mapping: dict[str, int]) -> Any:
    """Cut windows at events as a user of braindecode does."""
    datasets = pytest.importorskip("braindecode.datasets")
    cut = pytest.importorskip("braindecode.preprocessing").create_windows_from_events
    whole = datasets.BaseConcatDataset([datasets.RawDataset(raw)])
    return cut(
        whole,
        trial_start_offset_samples=START,
        trial_stop_offset_samples=STOP,  # the events have no duration
        mapping=mapping,
        on_overlapping_events="ignore",
    )


def response_times(raw: Any) -> list[float]:
    """Give the time from each square to the press that follows it, NaN where none does."""
    events = list(zip(raw.annotations.onset, raw.annotations.description, strict=True))
    return [
        after[0] - before[0] if after[1] == "rt" else np.nan
        for before, after in pairwise([*events, (0.0, "end")])
        if before[1] == "square"
    ]


def test_windows_targets_and_samples_are_those_of_braindecode(raw: Any, store: Store) -> None:
    """Starts and stops exactly; float32 bit for bit, the default to half a step of float16.

    MNE rounds half a sample to even, Engram up. MNE-BIDS writes onsets that are whole samples, so
    that the two agree here on each of them.
    """
    names = ("square", "rt")
    theirs = of_braindecode(raw, {name: number for number, name in enumerate(names)})
    ours = store.windows(
        EventWindows(
            signal="eeg", anchor=names, trial_start_offset_samples=START, trial_duration_samples=STOP - START
        ),
        EventColumn("description", "classification", names),
    )
    assert len(ours) == len(theirs) == N_SQUARES + N_ANSWERED
    assert ours.refusals == ()
    assert (ours.n_chans, ours.n_times, ours.sfreq) == (30, 160, 128.0)
    assert list(ours.ch_names) == raw.ch_names
    dataset = ours.dataset()
    for number, (their_samples, their_y, their_place) in enumerate(theirs):
        samples, y, place = dataset[number]
        assert place == their_place
        assert y == their_y
        _assert_samples(samples, their_samples, store)


def _assert_samples(ours: Any, theirs: Any, store: Store) -> None:
    if store.extent("sub-01_task-attention", "eeg").precision == "float32":
        np.testing.assert_array_equal(ours, theirs)
    else:
        half_step = np.spacing(np.abs(theirs).astype(np.float16)).astype(np.float64) / 2
        assert (np.abs(ours.astype(np.float64) - theirs) <= half_step).all()


def test_response_times_are_those_between_the_events(raw: Any, store: Store) -> None:
    """Squares that nobody answered are refused and counted; the others start where braindecode's do."""
    ours = store.windows(
        EventWindows(
            signal="eeg",
            anchor=("square",),
            trial_start_offset_samples=START,
            trial_duration_samples=STOP - START,
        ),
        TimeTo(("rt",)),
    )
    times_s = np.array(response_times(raw))
    answered = np.flatnonzero(~np.isnan(times_s))
    assert len(ours) == len(answered) == N_ANSWERED
    assert ours.counts() == {"no target": N_SQUARES - N_ANSWERED}
    table = ours.table().to_pydict()
    # MNE keeps both onsets to a microsecond.
    np.testing.assert_allclose(table["target"], times_s[answered], rtol=0, atol=1.1e-6)
    theirs = of_braindecode(raw, {"square": 0})
    places = [theirs[int(number)][2] for number in answered]
    assert table["i_start_in_trial"] == [start for _, start, _ in places]
    assert table["i_stop_in_trial"] == [stop for _, _, stop in places]


RECIPE = """
name = "response time"
store = "store"

[windows.events]
signal = "eeg"
anchor = ["square"]
trial_duration_s = 1.0

[target.time_to]
events = ["rt"]

[split]
test = { by = "block", fraction = 0.2 }
valid = { by = "block", fraction = 0.25 }
within_subject = true
gap_s = 3.0

[model]
name = "ShallowFBCSPNet"
arguments = { n_filters_time = 4, n_filters_spat = 4, pool_time_length = 32, pool_time_stride = 16 }

[training]
epochs = 3
batch_size = 8
accelerator = "cpu"
"""


def test_from_the_recording_to_a_score_within_one_subject(bids: Any, tmp_path: Path) -> None:
    """Trial blocks of one person with a gap: trained, scored, and told as within-subject."""
    prepare(bids.root, tmp_path / "store").store.close()
    (tmp_path / "recipe.toml").write_text(RECIPE)
    training = tmp_path / "training"

    ledger = train(read_recipe(tmp_path / "recipe.toml"), training).ledger
    evaluation = evaluate(training)

    assert ledger.within_subject
    assert evaluation.within_subject
    assert ledger.data["refused"] == {"no target": N_SQUARES - N_ANSWERED}
    n_windows = {side.side: side.n_windows for side in ledger.sides}
    n_unused = sum(ledger.data["unused"].values())
    assert n_unused > 0
    assert sum(n_windows.values()) + n_unused == N_ANSWERED
    _assert_apart(training)
    tested = [score for score in ledger.scores if score.side == "test"]
    assert {score.model for score in tested} == {"network", "ridge"}
    network = {score.metric: score.value for score in tested if score.model == "network"}
    again = {score.metric: score.value for score in evaluation.scores}
    assert again == pytest.approx(network, rel=1e-5)
    page = write_report([training], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "within" in page.lower()


def _assert_apart(training: Path) -> None:
    """Windows of two sides are at least the gap apart, of this one recording."""
    rows = pq.read_table(training / PREDICTIONS).to_pylist()
    times = sorted((row["anchor_s"], row["side"]) for row in rows)
    for (one_s, one), (two_s, two) in pairwise(times):
        assert one == two or two_s - (one_s + 1.0) >= 3.0
