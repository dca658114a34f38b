"""Real recordings of every format: stored bit for bit as MNE reads them, or refused for a stated reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram.errors import SourceError
from engram.preparation.ingest import prepare
from engram.recordings.mne_raw import open_raw

DATA = Path(__file__).parents[2].parent / "shared" / "data"
FILES = [
    "eeg_attention/eeglab_data.set",
    "eeg_formats/test.bdf",
    "eeg_formats/test.edf",
    "eeg_formats/testbva.vhdr",
    "eeg_formats/brainvision_responses/test.vhdr",
    "tiny_bids/sub-01/ses-eeg/eeg/sub-01_ses-eeg_task-rest_eeg.vhdr",
]
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the folder of real recordings is not beside this clone"
)


def test_every_recording_of_the_folder_is_listed_here() -> None:
    """A recording that is added to the folder is added to this test."""
    heads = {".set", ".bdf", ".edf", ".vhdr"}
    found = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.suffix in heads}

    assert found == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_float32_is_mne_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Every signal: EEG in microvolts, other types in MNE's own units."""
    with (
        open_raw(DATA / name) as raw,
        prepare(DATA / name, tmp_path / "store", precision="float32").store as store,
    ):
        (key,) = store.recordings["recording"].to_pylist()
        types = sorted(set(raw.get_channel_types()))
        assert sorted(store.signals["signal"].to_pylist()) == types
        for kind in types:
            expected = raw.get_data(picks=kind, units="uV" if kind == "eeg" else None).T.astype(np.float32)
            assert store.read(key, kind).tobytes() == expected.tobytes()


# A BioSemi recording without a high-pass: its offset of half a millivolt is not float16's.
REFUSED = {"eeg_formats/test.bdf": r"Channel A2 would keep 47.5 dB in float16, the rule is 60 dB \(mean -588"}


@pytest.mark.parametrize("name", FILES)
def test_by_default_it_is_within_half_a_float16_step_or_refused(name: str, tmp_path: Path) -> None:
    """A refusal names the channel, its figure, the rule and the remedy; and the remedy works."""
    if name in REFUSED:
        with pytest.raises(SourceError, match=REFUSED[name]):
            prepare(DATA / name, tmp_path / "store")
        return
    with open_raw(DATA / name) as raw, prepare(DATA / name, tmp_path / "store").store as store:
        (key,) = store.recordings["recording"].to_pylist()
        single = raw.get_data(picks="eeg", units="uV").T.astype(np.float32)
        half_step = np.spacing(np.abs(single).astype(np.float16)).astype(np.float64) / 2
        assert (np.abs(store.read(key, "eeg").astype(np.float64) - single) <= half_step).all()
