"""Engram's own loader.

One store of small parts: 64 and more, as a corpus of many terabytes would have. The loader has
threads of its own, so there are no workers. ``memory`` is what its ring of batches may take, far
below the limit of the capped regime, which has to hold PyTorch too; the regimes in the page
cache get the same, so that the rows are of one setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.loading.corpus import (
    BATCH_WINDOWS,
    RATE_HZ,
    SIGNAL,
    WINDOW_BYTES,
    WINDOW_SAMPLES,
    WINDOWS_PER_RECORDING,
    Corpus,
)
from benchmarks.loading.reader import Batch, Reader, Request

MEMORY = "100 MB"
N_PARTS = 64


def prepare(corpus: Corpus, folder: Path) -> None:
    """Prepare all recordings with one call, into at least 64 parts."""
    import engram

    samples = corpus.samples()
    length = WINDOWS_PER_RECORDING * WINDOW_SAMPLES
    recordings = {
        f"{number:04}": engram.ArrayRecording(
            {SIGNAL: engram.ArraySignal(samples[number * length : (number + 1) * length], RATE_HZ)}
        )
        for number in range(corpus.n_recordings)
    }
    recordings_per_part = max(1, corpus.n_recordings // N_PARTS)
    part_bytes = recordings_per_part * WINDOWS_PER_RECORDING * WINDOW_BYTES
    source = engram.ArraySource(recordings)
    engram.prepare(source, folder / "store", precision="float16", part_bytes=part_bytes).store.close()


def batches(request: Request) -> Iterator[Batch]:
    """Iterate over the loader, epoch after epoch; it makes its own order."""
    import engram

    with engram.open(request.folder / "store") as store:
        spec = engram.FixedWindows(
            signal=SIGNAL,
            window_size_samples=WINDOW_SAMPLES,
            window_stride_samples=request.stride_samples,
        )
        loader = store.windows(spec).loader(BATCH_WINDOWS, mode="shuffled", memory=MEMORY)
        while True:
            for batch in loader:
                yield batch.numbers, batch.signals[SIGNAL]


READERS = (
    Reader(
        name="engram",
        kind="engram",
        settings=f'`loader(64, mode="shuffled", memory="{MEMORY}")` on a store of at least {N_PARTS} parts',
        distribution="engram",
        libraries=("engram", "engram.batches"),
        form="engram",
        prepare=prepare,
        batches=batches,
        workers=(0,),
        regimes=("warm", "capped", "overlap"),
    ),
)
