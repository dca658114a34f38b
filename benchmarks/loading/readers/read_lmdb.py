"""LMDB: pre-cut windows as values.

Values are the bytes of the window, not a pickled array. ``readahead=False`` is what LMDB's
documentation asks for where data exceed memory; ``lock=False`` and ``meminit=False`` save work that
only writers need; one read transaction with ``buffers=True`` gives views of the mapped file, so that
stacking is the only copy. Every worker opens the environment for itself: it must not cross a fork.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.loading.corpus import N_CHANNELS, WINDOW_SAMPLES, Corpus
from benchmarks.loading.reader import Batch, Item, Reader, Request, collate, load_with_torch


def prepare(corpus: Corpus, folder: Path) -> None:
    """Write windows in the order of their keys, which packs the pages."""
    import lmdb

    # The map is an upper bound: values take whole pages of 4 KiB.
    with lmdb.open(str(folder), map_size=2 * corpus.n_bytes, sync=False) as environment:
        number = 0
        for windows in corpus.windows():
            with environment.begin(write=True) as transaction:
                for window in windows:
                    transaction.put(_key(number), window.tobytes(), append=True)
                    number += 1
        environment.sync()


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")


@dataclass(slots=True)
class Environment:
    """An environment with one read transaction, opened by each process when it first reads."""

    path: Path
    _transaction: Any = field(default=None, init=False)

    def __getitem__(self, number: int) -> Item:
        if self._transaction is None:
            import lmdb

            environment = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, meminit=False)
            self._transaction = environment.begin(buffers=True)
        value = np.frombuffer(self._transaction.get(_key(number)), np.float16)
        return number, value.reshape(N_CHANNELS, WINDOW_SAMPLES)


def batches(request: Request) -> Iterator[Batch]:
    """Window by window."""
    return load_with_torch(Environment(request.folder), request, collate)


READERS = (
    Reader(
        name="LMDB",
        kind="one by one",
        settings="pre-cut windows as raw values, `readahead=False, lock=False, buffers=True`, `DataLoader`",
        distribution="lmdb",
        libraries=("torch", "lmdb"),
        form="lmdb",
        prepare=prepare,
        batches=batches,
    ),
)
