"""tensorstore: Zarr v3, read by its own threads in C++.

Pre-cut windows: a chunk for each, those of a recording in one shard file, whose index its cache keeps;
the numbers of a batch go in as one index array, and one call fills the batch. That is half again as fast
as a read per window, in a ``ts.Batch`` or not. 32 reads at once saturate a disk of this kind. Windows
that overlap are cut from recordings in chunks of one stride, with a read for each in a ``ts.Batch``:
files that zarr-python wrote.

Some batches are asked for ahead, so that reading and converting go on side by side; PyTorch converts
with one thread, as tensorstore's own threads are at work. There are no worker processes: tensorstore
must not be forked, and its threads do what they would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from benchmarks.loading.corpus import N_CHANNELS, WINDOW_SAMPLES, WINDOWS_PER_RECORDING, Corpus
from benchmarks.loading.reader import Batch, Reader, Request, to_batch, to_batch_transposed
from benchmarks.loading.readers import read_zarr
from numpy.typing import NDArray

N_READS = 32
CACHE_BYTES = 16 << 20
"""Holds the indices of the shards: 16 bytes a window."""
BATCHES_AHEAD = 4

RAW = {"name": "bytes", "configuration": {"endian": "little"}}


def prepare_windows(corpus: Corpus, folder: Path) -> None:
    """Write (window, channel, time), a chunk for each window, a shard for each recording."""
    chunk = [1, N_CHANNELS, WINDOW_SAMPLES]
    shard = [WINDOWS_PER_RECORDING, N_CHANNELS, WINDOW_SAMPLES]
    sharding = {"chunk_shape": chunk, "codecs": [RAW], "index_codecs": [RAW, {"name": "crc32c"}]}
    metadata = {
        "shape": [corpus.n_windows, N_CHANNELS, WINDOW_SAMPLES],
        "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    array = _open(folder, metadata=metadata, create=True)
    start = 0
    for windows in corpus.windows():
        array[start : start + len(windows)].write(windows).result()
        start += len(windows)


def _open(folder: Path, **more: Any) -> Any:
    import tensorstore

    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder)},
        "context": {
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
            "file_io_concurrency": {"limit": N_READS},
        },
        # Files do not change: look once, not at every read.
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
        **more,
    }
    return tensorstore.open(spec).result()


T = TypeVar("T")


def _ahead(
    request: Request, ask: Callable[[NDArray[np.int64]], T], take: Callable[[T], Any]
) -> Iterator[Batch]:
    import torch

    torch.set_num_threads(1)
    asked: deque[tuple[NDArray[np.int64], T]] = deque()
    for numbers in request.numbers:
        asked.append((numbers, ask(numbers)))
        if len(asked) > BATCHES_AHEAD:
            first, future = asked.popleft()
            yield torch.from_numpy(first), take(future)
    for first, future in asked:
        yield torch.from_numpy(first), take(future)


def batches_windows(request: Request) -> Iterator[Batch]:
    """Ask for each batch by one index array."""
    array = _open(request.folder)
    return _ahead(request, lambda numbers: array[numbers].read(), lambda read: to_batch(read.result()))


def batches_recordings(request: Request) -> Iterator[Batch]:
    """Ask for each window, those of a batch together."""
    import tensorstore

    array = _open(request.folder / read_zarr.NAME)

    def ask(numbers: NDArray[np.int64]) -> list[Any]:
        with tensorstore.Batch() as batch:
            return [
                array[start : start + WINDOW_SAMPLES].read(batch=batch)
                for start in request.starts[numbers].tolist()
            ]

    return _ahead(
        request, ask, lambda reads: to_batch_transposed(np.stack([read.result() for read in reads]))
    )


READERS = (
    Reader(
        name="tensorstore",
        kind="own loader",
        settings=f"pre-cut windows, a shard per recording, `array[numbers]`, {BATCHES_AHEAD} batches ahead",
        distribution="tensorstore",
        libraries=("torch", "tensorstore"),
        form="tensorstore-windows",
        prepare=prepare_windows,
        batches=batches_windows,
        workers=(0,),
    ),
    Reader(
        name="tensorstore, views",
        kind="own loader",
        settings=f"recordings in chunks of half a window, `ts.Batch`, {BATCHES_AHEAD} batches ahead",
        distribution="tensorstore",
        libraries=("torch", "tensorstore"),
        form="zarr-recordings",
        prepare=read_zarr.prepare_recordings,
        batches=batches_recordings,
        workers=(0,),
        regimes=("overlap",),
    ),
)
