"""braindecode: windows cut lazily from recordings that MNE leaves on disk.

``preload=False``, and ``EEGWindowsDataset`` without ``mne.Epochs``, which is the faster of its two ways.
MNE reads no format of float16, so this is the one reader with float32 on disk: twice the bytes. The
recordings are FIF files, which MNE reads natively, in single precision, with buffers of the stride's length:
MNE reads whole buffers, and so none that is not asked for. Values pass through MNE as they are,
microvolts taken for volts, so that no scaling rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.loading.corpus import N_CHANNELS, RATE_HZ, WINDOW_SAMPLES, Corpus
from benchmarks.loading.reader import Batch, Reader, Request, load_with_torch

STRIDE_SAMPLES = WINDOW_SAMPLES // 2


def prepare(corpus: Corpus, folder: Path) -> None:
    """Write one FIF file per recording."""
    import mne

    info = mne.create_info(N_CHANNELS, RATE_HZ, "eeg")
    for number, recording in enumerate(corpus.recordings()):
        raw = mne.io.RawArray(recording.T.astype(np.float64), info, verbose="ERROR")
        raw.save(
            folder / f"{number:06}_raw.fif",
            fmt="single",
            buffer_size_sec=STRIDE_SAMPLES / RATE_HZ,
            verbose="ERROR",
        )


class Numbered:
    """A dataset whose items carry their numbers."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self._dataset[number][0]


def collate(items: list[tuple[int, Any]]) -> Batch:
    """Stack windows, which are float32 already."""
    from torch.utils.data import default_collate

    numbers, windows = default_collate(items)
    return numbers, windows


def batches(request: Request) -> Iterator[Batch]:
    """Cut windows of fixed length, and read them one by one."""
    import mne
    from braindecode.datasets import BaseConcatDataset, RawDataset
    from braindecode.preprocessing import create_fixed_length_windows

    recordings = [
        RawDataset(mne.io.read_raw_fif(path, preload=False, verbose="ERROR"), description={})
        for path in sorted(request.folder.iterdir())
    ]
    windows = create_fixed_length_windows(
        BaseConcatDataset(recordings),
        window_size_samples=WINDOW_SAMPLES,
        window_stride_samples=request.stride_samples,
        on_last_window="drop",
    )
    return load_with_torch(Numbered(windows), request, collate)


READERS = (
    Reader(
        name="braindecode, lazy",
        kind="one by one",
        settings="recordings as FIF files in float32, `preload=False`, `DataLoader`",
        distribution="braindecode",
        libraries=("torch", "mne", "braindecode.datasets", "braindecode.preprocessing"),
        form="fif",
        prepare=prepare,
        batches=batches,
        regimes=("warm", "capped", "overlap"),
    ),
)
