"""litdata: chunks of pre-cut windows, streamed.

Written by ``litdata.optimize`` in chunks of 64 MB, its default. On a local disk it maps the chunks in
place and has the kernel read ahead (its "POSIX-fast" path, automatic). Its shuffle permutes chunks,
and within a chunk aligned blocks of 256 windows and the windows of each: the default, and twenty
to fifty times as fast as ``item_shuffle_window=0``, which permutes a whole chunk. A window is a
flat array: that has no header to parse, and arrays are faster here than tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.loading.corpus import (
    BATCH_WINDOWS,
    N_CHANNELS,
    WINDOW_SAMPLES,
    WINDOWS_PER_RECORDING,
    Corpus,
)
from benchmarks.loading.reader import Batch, Reader, Request, forever, to_batch

CHUNK_BYTES = "64MB"
STORE = "store"


def prepare(corpus: Corpus, folder: Path) -> None:
    """Optimize, one recording after another."""
    import litdata

    # Where it builds chunks before it moves them: else a folder of the user's.
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(folder / "unfinished")
    litdata.optimize(
        partial(_samples, corpus),
        inputs=list(range(corpus.n_recordings)),
        output_dir=str(folder / STORE),
        chunk_bytes=CHUNK_BYTES,
        num_workers=1,
        keep_data_ordered=True,
        verbose=False,
    )


def _samples(corpus: Corpus, recording: int) -> Iterator[dict[str, Any]]:
    length = WINDOWS_PER_RECORDING * WINDOW_SAMPLES
    samples = corpus.samples()[recording * length : (recording + 1) * length]
    for row, window in enumerate(samples.reshape(WINDOWS_PER_RECORDING, WINDOW_SAMPLES, N_CHANNELS)):
        yield {
            "number": recording * WINDOWS_PER_RECORDING + row,
            "eeg": np.ascontiguousarray(window.T).ravel(),
        }


def collate(items: list[dict[str, Any]]) -> Batch:
    """Stack flat windows."""
    import torch

    windows = np.stack([item["eeg"] for item in items]).reshape(-1, N_CHANNELS, WINDOW_SAMPLES)
    return torch.tensor([item["number"] for item in items]), to_batch(windows)


def batches(request: Request) -> Iterator[Batch]:
    """Stream in litdata's own order."""
    import litdata

    dataset = litdata.StreamingDataset(str(request.folder / STORE), shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=BATCH_WINDOWS,
        num_workers=request.workers,
        collate_fn=collate,
        persistent_workers=request.workers > 0,
    )
    return forever(lambda _: loader)


READERS = (
    Reader(
        name="litdata",
        kind="own loader",
        settings=f"pre-cut windows in chunks of {CHUNK_BYTES}, `StreamingDataLoader`",
        distribution="litdata",
        libraries=("torch", "litdata"),
        form="litdata",
        prepare=prepare,
        batches=batches,
        shuffle="chunks, then blocks of 256 windows within a chunk, then within a block",
    ),
)
