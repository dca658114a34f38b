"""webdataset: tar files of pre-cut windows, read from front to back.

One tar file per recording, so that workers share them evenly and the order of files shuffles as much as
it can; beyond that a buffer of 1,000 windows, the size in its own examples. A window's key is its
number and its one file the raw bytes: a second file would be a second tar header to parse. Windows are
decoded and batched in the worker (``batched``, then ``WebLoader(batch_size=None)``), as its
documentation advises.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.loading.corpus import BATCH_WINDOWS, N_CHANNELS, WINDOW_SAMPLES, Corpus
from benchmarks.loading.reader import Batch, Item, Reader, Request, collate

BUFFER_WINDOWS = 1000


def prepare(corpus: Corpus, folder: Path) -> None:
    """Write a tar file for each recording."""
    from webdataset import TarWriter

    number = 0
    for recording, windows in enumerate(corpus.windows()):
        with TarWriter(str(folder / f"{recording:06}.tar")) as tar:
            for window in windows:
                tar.write({"__key__": f"{number:09}", "f16": window.tobytes()})
                number += 1


def decode(sample: dict[str, Any]) -> Item:
    """Turn raw bytes into a window."""
    window = np.frombuffer(sample["f16"], np.float16).reshape(N_CHANNELS, WINDOW_SAMPLES)
    return int(sample["__key__"]), window


def batches(request: Request) -> Iterator[Batch]:
    """Stream with a shuffle buffer."""
    import webdataset

    files = sorted(str(path) for path in request.folder.iterdir())
    dataset = (
        webdataset.WebDataset(files, shardshuffle=len(files))
        .shuffle(BUFFER_WINDOWS)
        .map(decode)
        .batched(BATCH_WINDOWS, collation_fn=collate, partial=False)
        .repeat()
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=request.workers))


READERS = (
    Reader(
        name="webdataset",
        kind="one by one",
        settings="pre-cut windows in a tar file per recording, `batched`, `WebLoader`",
        distribution="webdataset",
        libraries=("torch", "webdataset"),
        form="webdataset",
        prepare=prepare,
        batches=batches,
        shuffle=f"tar files, then a buffer of {BUFFER_WINDOWS:,} windows",
    ),
)
