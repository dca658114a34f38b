"""Hugging Face datasets: an Arrow file of pre-cut windows, by number and as a stream.

By number: a whole batch of numbers at once, which ``__getitem__`` takes. In the arrow format, whose rows
are views of the mapped file: stacking them is the only copy. (The torch format is as fast, but workers
that use it grow by a batch with every batch.) There is no way to advise the kernel, so it reads ahead at
every page fault.

As a stream: ``to_iterable_dataset`` with a shuffle buffer, what the documentation advises for data larger
than memory; it reads in order.

The Arrow file is written in record batches of 50 windows, as tables, since its writer would else convert
every sample to a Python float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from benchmarks.loading.corpus import (
    BATCH_WINDOWS,
    N_CHANNELS,
    WINDOW_SAMPLES,
    WINDOWS_PER_RECORDING,
    Corpus,
)
from benchmarks.loading.reader import Batch, Reader, Request, forever, load_batches_with_torch, to_batch

if TYPE_CHECKING:
    from torch import Tensor

FILE = "windows.arrow"
ROWS = 50
BUFFER_WINDOWS = 500
N_VALUES = N_CHANNELS * WINDOW_SAMPLES


def prepare(corpus: Corpus, folder: Path) -> None:
    """Write one Arrow stream of numbers and windows."""
    import pyarrow as pa
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"number": Value("int64"), "eeg": List(Value("float16"), length=N_VALUES)})
    with ArrowWriter(path=str(folder / FILE), features=features) as writer:
        number = 0
        for windows in corpus.windows():
            for rows in np.split(windows, WINDOWS_PER_RECORDING // ROWS):
                eeg = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), N_VALUES)
                writer.write_table(pa.table({"number": np.arange(number, number + ROWS), "eeg": eeg}))
                number += ROWS
        writer.finalize()


@dataclass(slots=True)
class Windows:
    """Windows by their numbers, a batch at a time."""

    dataset: Any

    def __getitem__(self, numbers: list[int]) -> Batch:
        import torch

        return torch.tensor(numbers), stack(self.dataset[numbers]["eeg"].chunks)


def stack(chunks: list[Any]) -> Tensor:
    """Stack Arrow arrays, which are views of the mapped file."""
    windows = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    return to_batch(windows.reshape(-1, N_CHANNELS, WINDOW_SAMPLES))


def batches_by_number(request: Request) -> Iterator[Batch]:
    """Map-style."""
    from datasets import Dataset

    dataset = Dataset.from_file(str(request.folder / FILE)).with_format("arrow")
    return load_batches_with_torch(Windows(dataset), request)


def collate_tables(tables: list[Any]) -> Batch:
    """Stack tables of one row."""
    import torch

    numbers = torch.tensor([table["number"][0].as_py() for table in tables])
    return numbers, stack([chunk for table in tables for chunk in table["eeg"].chunks])


def batches_streamed(request: Request) -> Iterator[Batch]:
    """Stream, with as many shards as the corpus has recordings."""
    from datasets import Dataset
    from torch.utils.data import DataLoader

    rows = Dataset.from_file(str(request.folder / FILE))
    stream = rows.to_iterable_dataset(num_shards=len(rows) // WINDOWS_PER_RECORDING).with_format("arrow")
    shuffled = stream.shuffle(seed=0, buffer_size=BUFFER_WINDOWS)
    loader = DataLoader(
        shuffled,
        batch_size=BATCH_WINDOWS,
        num_workers=request.workers,
        collate_fn=collate_tables,
        drop_last=True,
        persistent_workers=request.workers > 0,
    )

    def epoch(number: int) -> Iterable[Batch]:
        shuffled.set_epoch(number)
        return loader

    return forever(epoch)


READERS = (
    Reader(
        name="HF datasets",
        kind="whole batches",
        settings="pre-cut windows in one Arrow file, arrow format, `dataset[numbers]`, `DataLoader`",
        distribution="datasets",
        libraries=("torch", "datasets"),
        form="arrow",
        prepare=prepare,
        batches=batches_by_number,
    ),
    Reader(
        name="HF datasets, streamed",
        kind="one by one",
        settings="the same file, `to_iterable_dataset`, arrow format, `DataLoader`",
        distribution="datasets",
        libraries=("torch", "datasets"),
        form="arrow",
        prepare=prepare,
        batches=batches_streamed,
        workers=(0,),
        shuffle=f"buffer of {BUFFER_WINDOWS:,} windows over 10 shards",
    ),
)
