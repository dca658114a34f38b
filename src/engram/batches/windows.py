"""Windows: windows of a store, to be split, put in order and read.

This module joins what ``engram.windows`` works out from tables alone with the store that has
the samples. It decides how numbers of windows become a ``Batch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from engram.batches.batch import Batch
from engram.batches.dataset import WindowDataset, WindowStream
from engram.batches.loader import Check, Loader
from engram.batches.reading import Dtype, Reader, Reads, Stored, align, tables_of
from engram.errors import InputError
from engram.memory import Budget
from engram.store.gather import Ranges, can_gather_directly
from engram.store.reader import Store
from engram.windows.cutting import Located
from engram.windows.index import WindowIndex, WindowRefusal, build_index
from engram.windows.order import Mode, Order
from engram.windows.spec import EventWindows, FixedWindows
from engram.windows.splits import Split, split_index
from engram.windows.targets import SignalTarget, Target, TimeTo

__all__ = ["SplitWindows", "Windows", "cut_windows"]


def cut_windows(
    store: Store, spec: FixedWindows | EventWindows, target: Target | None = None, *, same_form: bool = True
) -> Windows:
    """Work out the windows of a store: ``Store.windows``.

    Parameters
    ----------
    store
        An open store, which stays the caller's to close.
    spec
        Which windows.
    target
        What is predicted from them, or None.
    same_form
        Refuse recordings whose signals have other channels than most have. False where recordings
        differ by nature, as units of spikes do; no batch may then mix them.

    Raises
    ------
    InputError
        If the store has no such signal, event or column.
    StoreDamaged
        If its tables cannot be read.
    """
    return Windows(store, build_index(tables_of(store), spec, target, same_form=same_form))


_LARGE_BYTES, _N_LOOKED_AT = 32 << 10, 512
"""A piece that is worth reading alone: past the page cache whole blocks of 4 KiB are read, an eighth of so
much for nothing. And how many windows are looked at for what they share."""

_TABLES_BYTES = 12_000_000, 2, 1_500
"""What the tables of a store take: what Arrow's allocator and a handful of threads hold, however small they
are; a byte of a table twice, with what malloc keeps of working windows out; Python's objects of one signal of
one recording. Measured: 5 MB of two recordings, 16 of a hundred thousand events of 200 recordings, 114 of a
million of 27,000 (``benchmarks/memory.py``)."""


class Windows:
    """Windows of a store.

    Parameters
    ----------
    store
        An open store, which stays the caller's to close.
    index
        The windows, worked out from the store's tables.

    Notes
    -----
    May be read by several threads, after ``fork``, and in another process after pickling.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> import engram
    >>> from engram.windows import FixedWindows
    >>> eeg = engram.ArraySignal(np.zeros((1000, 4), "float32"), 100.0)
    >>> recording = engram.ArrayRecording({"eeg": eeg}, fields={"subject": "A"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(engram.ArraySource({"a": recording}), f"{folder}/store").store
    ...     windows = store.windows(FixedWindows(signal="eeg", window_size_s=2.0))
    ...     batch = windows.read([0, 3])
    ...     store.close()
    >>> windows.n_chans, windows.n_times, windows.sfreq, len(windows)
    (4, 200, 100.0, 5)
    >>> batch.X.shape, batch.y, batch.numbers.tolist()
    (torch.Size([2, 4, 200]), None, [0, 3])
    """

    def __init__(self, store: Store, index: WindowIndex) -> None:
        self.store = store
        """Where the samples are."""
        self.index = index
        """Where the windows lie, and their targets."""
        self._reader = Reader(store, index.tables.ids)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {', '.join(self.index.spec.signals)}; {self.store!r})"

    @property
    def refusals(self) -> tuple[WindowRefusal, ...]:
        """What was left out, by recording and reason."""
        return self.index.refusals

    def counts(self) -> dict[str, int]:
        """Count what was left out, by reason."""
        return self.index.counts()

    def table(self, numbers: NDArray[np.int64] | None = None) -> pa.Table:
        """Describe windows, one row each; see ``WindowIndex.table``.

        Parameters
        ----------
        numbers
            (window,) int64 numbers of windows, or None for all.
        """
        return self.index.table(numbers)

    def with_targets(
        self, values: NDArray[np.number] | Sequence[float], classes: Sequence[str] = ()
    ) -> Windows:
        """Give the same windows with targets of the user's own; see ``WindowIndex.with_targets``.

        Parameters
        ----------
        values
            (window,) numbers to predict, or numbers of classes.
        classes
            Names of the classes; none for regression.
        """
        return Windows(self.store, self.index.with_targets(np.asarray(values), tuple(classes)))

    def take(self, keep: NDArray[np.bool_] | Sequence[bool]) -> Windows:
        """Give some of the windows, numbered anew.

        Parameters
        ----------
        keep
            (window,) True for those to keep.

        Raises
        ------
        InputError
            If it is not one boolean per window.
        """
        return Windows(self.store, self.index.take(np.asarray(keep)))

    def split(self, split: Split) -> SplitWindows:
        """Part the windows into training, validation and test.

        Parameters
        ----------
        split
            By what, and how much goes where.

        Raises
        ------
        InputError
            If a side would be empty, or a subject would be on two sides.
        """
        sides = split_index(self.index, split)
        return SplitWindows(
            train=Windows(self.store, sides.train),
            valid=None if sides.valid is None else Windows(self.store, sides.valid),
            test=None if sides.test is None else Windows(self.store, sides.test),
            unused=sides.unused,
            within_subject=sides.within_subject,
            n_subjects=sides.n_subjects,
        )

    def read(
        self, numbers: Sequence[int] | NDArray[np.integer], *, offset: NDArray[np.int64] | None = None
    ) -> Batch:
        """Read windows as one batch.

        Parameters
        ----------
        numbers
            (window,) numbers of windows, in any order; none gives tensors of no windows.
        offset
            (window,) samples from a window's first one to the first that is read, as
            ``WindowIndex.draw`` gives them; None: its first, or the middle where the spec asks for a crop.

        Raises
        ------
        InputError
            If there is no such window, or windows differ in channels.
        StoreDamaged
            If a file of the store is missing or cut short.
        """
        return self.fill(self.find(numbers, offset=offset))

    def find(
        self,
        numbers: Sequence[int] | NDArray[np.integer],
        *,
        n_global: int | None = None,
        dtype: Dtype | None = None,
        offset: NDArray[np.int64] | None = None,
    ) -> Reads:
        """Find what has to be read for a batch.

        Parameters
        ----------
        numbers
            (window,) numbers of windows, in any order.
        n_global
            Windows of the whole batch over all ranks; None: these.
        dtype
            What a model is given; None: float32, or the stored integers.
        offset
            As for ``read``.

        Raises
        ------
        InputError
            If there is no such window, or windows differ in channels.
        """
        given = np.asarray(numbers)
        n_of_all = given.size if n_global is None else n_global
        return next(self.find_each([given], [n_of_all], dtype=dtype, offset=offset))

    def find_each(
        self,
        batches: Sequence[NDArray[np.integer]],
        n_global: Sequence[int],
        *,
        dtype: Dtype | None = None,
        offset: NDArray[np.int64] | None = None,
    ) -> Iterator[Reads]:
        """Find what has to be read for each of some batches: hardly more work than for one.

        Parameters
        ----------
        batches
            (window,) numbers of windows, in any order, by batch.
        n_global
            Windows of the whole batch over all ranks, by batch.
        dtype
            What a model is given; None: float32, or the stored integers.
        offset
            As for ``read``, of all batches one after another.

        Raises
        ------
        InputError
            If there is no such window: at the first batch; or windows of one batch differ in channels: at
            that one.
        """
        every = np.concatenate(batches) if len(batches) > 1 else batches[0]
        located, targets = self.index.place(every, offset), self._targets(every)
        late_s = self._late_s(located, offset)
        if targets is not None and late_s is not None:
            targets = targets - late_s[:, None]
        bounds = [0, *accumulate(len(numbers) for numbers in batches)]
        found = {
            name: self._reader.find_each(located, bounds, name, None if name == self.target_signal else dtype)
            for name in self.index.spec.signals
        }
        for numbers, n_of_all, begin in zip(batches, n_global, bounds[:-1], strict=True):
            signals = {name: next(reads) for name, reads in found.items()} if len(numbers) else {}
            # Copies, which the batch may keep.
            of_batch = None if targets is None else targets[begin : begin + len(numbers)].copy()
            yield Reads(numbers.astype(np.int64), signals, n_of_all, dtype, of_batch)

    def _late_s(self, located: Located, offset: NDArray[np.int64] | None) -> NDArray[np.float32] | None:
        """Give by how many seconds windows are read later, where the target is a time that this shortens."""
        if offset is None or not isinstance(self.index.target, TimeTo):
            return None
        rate_hz = self.index.tables.signals[self.index.spec.signal].rate_hz[located.recording]
        return (offset / rate_hz).astype(np.float32)

    def fill(
        self,
        reads: Reads,
        buffer: NDArray[np.uint8] | None = None,
        *,
        is_checked: bool = False,
        is_direct: bool = False,
        progress: Callable[[Ranges], None] | None = None,
    ) -> Batch:
        """Read a batch.

        Parameters
        ----------
        reads
            What ``find`` gave.
        buffer
            Memory for the signals, of ``batch_bytes`` of at least one window; None for memory of the
            batch's own.
        is_checked
            Compare every block that is touched with its checksum first.
        is_direct
            Read past the page cache, where ``can_be_read_directly`` has said so.
        progress
            Called after every part of it that was read.

        Raises
        ------
        StoreDamaged
            If a file of the store is missing or cut short, or a block is not what was written.
        """
        if not len(reads):
            if not len(self):
                raise InputError("There are no windows, which would say what form a batch has. Take some.")
            return _no_rows(self.fill(self.find([0], dtype=reads.dtype), buffer), reads.n_global)
        signals, first = {}, 0
        for name, of_signal in reads.signals.items():
            out = None if buffer is None else of_signal.over(buffer[first:])
            array = self._reader.read(
                of_signal, out, is_checked=is_checked, is_direct=is_direct, progress=progress
            )
            values = torch.from_numpy(array)
            signals[name] = values.view(torch.bfloat16) if of_signal.dtype == "bfloat16" else values
            first += align(array.nbytes)
        y = None if self.target_signal is None else signals.pop(self.target_signal)
        if reads.targets is not None:
            y = torch.from_numpy(reads.targets)
        lengths = {name: torch.from_numpy(of_signal.lengths) for name, of_signal in reads.signals.items()}
        return Batch(signals, lengths, y, torch.from_numpy(reads.numbers), reads.n_global, self._y_time_axis)

    def _targets(self, numbers: NDArray[np.integer]) -> NDArray[np.float32] | NDArray[np.int64] | None:
        """Give the targets of windows as batches have them; None where there are none, or a signal is."""
        targets = None if self.target_signal else self.index.targets(numbers)
        return targets if targets is None or self.classes else targets[:, None]

    def order(
        self,
        batch_size: int = 64,
        *,
        mode: Mode = "sequential",
        by: str | None = None,
        seed: int = 0,
        drop_last: bool | None = None,
    ) -> Order:
        """Put the windows in order.

        Parameters
        ----------
        batch_size
            Windows in a batch, over all ranks.
        mode
            How an epoch walks through the windows; see ``engram.windows.order.Mode``.
        by
            For the modes ``groups`` and ``balanced``: the column that groups the windows, such as
            ``"recording"`` or ``"subject"``.
        seed
            Which of the possible orders.
        drop_last
            Leave out a short last batch; None: in every mode but ``sequential``.

        Raises
        ------
        InputError
            If a value is out of range, or the mode lacks or does not use ``by``.
        """
        return Order.of(
            self.index.fingerprint,
            len(self),
            batch_size,
            mode=mode,
            seed=seed,
            drop_last=mode != "sequential" if drop_last is None else drop_last,
            groups=None if by is None else self.index.column(by).codes,
            lengths=self._main_lengths() if mode == "lengths" else None,
        )

    def loader(
        self,
        batch_size: int = 64,
        *,
        mode: Mode = "sequential",
        by: str | None = None,
        seed: int = 0,
        drop_last: bool | None = None,
        memory: int | str | None = None,
        dtype: Dtype | None = None,
        check: Check | None = None,
        threads: int | None = None,
        rank: int = 0,
        world: int = 1,
        is_drawn: bool = False,
    ) -> Loader:
        """Make a loader of batches.

        Parameters
        ----------
        batch_size, mode, by, seed, drop_last
            As for ``order``.
        memory
            What the loader may hold beside all else in the process, as bytes or text such as
            ``"500 MB"``: it decides how many batches are read ahead. None: what 80 % of the memory
            there is leaves.
        dtype, check, threads
            As for ``Loader``.
        rank, world
            This process's number among those that share every batch, and how many there are.
        is_drawn
            Whether crops and shifts of windows are drawn anew in every pass, as in training.

        Raises
        ------
        DoesNotFit
            If the store's tables, index, order and two batches take more than ``memory``.
        InputError
            If a value is out of range.
        """
        order = self.order(batch_size, mode=mode, by=by, seed=seed, drop_last=drop_last)
        budget = None if memory is None else Budget.of(memory)
        return Loader(
            self,
            order,
            budget=budget,
            dtype=dtype,
            check=check,
            threads=threads,
            rank=rank,
            world=world,
            is_drawn=is_drawn,
        )

    def dataset(self) -> WindowDataset:
        """Give the windows as a map-style dataset, for ``DataLoader``, skorch and braindecode."""
        return WindowDataset(self)

    def iterable(
        self,
        batch_size: int = 64,
        *,
        mode: Mode = "sequential",
        by: str | None = None,
        seed: int = 0,
        drop_last: bool | None = None,
        dtype: Dtype | None = None,
        rank: int = 0,
        world: int = 1,
        is_drawn: bool = False,
    ) -> WindowStream:
        """Give whole batches in order, for ``DataLoader(..., batch_size=None, num_workers=n)``.

        Parameters
        ----------
        batch_size, mode, by, seed, drop_last
            As for ``order``.
        dtype
            As for ``Loader``.
        rank, world
            This process's number among those that share every batch, and how many there are.
        is_drawn
            As for ``Loader``.
        """
        order = self.order(batch_size, mode=mode, by=by, seed=seed, drop_last=drop_last)
        return WindowStream(self, order, dtype=dtype, rank=rank, world=world, is_drawn=is_drawn)

    @property
    def target_signal(self) -> str | None:
        """Name of the signal that is the target, or None where the target is another or none."""
        target = self.index.target
        return target.signal if isinstance(target, SignalTarget) else None

    @cached_property
    def _y_time_axis(self) -> int:
        if self.target_signal is None:
            return 1
        ids = self.index.tables.ids
        stored = self._reader.stored(ids[self._walk.recordings[0]], self.target_signal)
        return 2 if stored.is_channels else 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the signals that a model is given, the main one first."""
        return tuple(name for name in self.index.spec.signals if name != self.target_signal)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty for regression."""
        return self.index.classes

    @property
    def n_chans(self) -> int:
        """Channels of the first input signal.

        Raises
        ------
        InputError
            If its samples are not channels, or recordings differ.
        """
        return self._n_channels(self.inputs[0])

    def _n_channels(self, signal: str) -> int:
        stored = self._stored(signal)
        if not stored.is_channels:
            raise InputError(
                f"A sample of {signal!r} has shape {stored.sample_shape} and no channels. "
                "Use a model that takes such samples."
            )
        return stored.sample_shape[0]

    @property
    def n_times(self) -> int:
        """Samples of a window of the first input signal.

        Raises
        ------
        InputError
            If windows differ in length.
        """
        shortest, longest = self._walk.lengths[self.inputs[0]]
        if shortest != longest:
            raise InputError(
                f"Windows of {self.inputs[0]!r} have {shortest} to {longest} samples. Give window_size_s, "
                "or use a model that takes any length."
            )
        return longest

    @property
    def sfreq(self) -> float:
        """Samples per second of the first input signal.

        Raises
        ------
        InputError
            If recordings differ in rate.
        """
        rates = np.unique(self.index.tables.signals[self.inputs[0]].rate_hz[self._walk.recordings])
        if len(rates) > 1:
            raise InputError(
                f"{self.inputs[0]!r} has rates of {', '.join(f'{rate:g}' for rate in rates)} Hz. "
                "Resample when preparing, or ask for recordings of one rate."
            )
        return float(rates[0])

    @property
    def ch_names(self) -> tuple[str, ...]:
        """Names of the channels of the first input signal; empty where they have none."""
        extent = self._stored(self.inputs[0]).extent
        channels = self.store.channels(extent.recording, extent.part.signal)
        return tuple(channel["channel"] for channel in channels)

    def has_channels(self, signal: str) -> bool:
        """Whether a signal is delivered as (window, channel, time).

        Parameters
        ----------
        signal
            Name of the signal.
        """
        return all(stored.is_channels for stored in self._forms(signal))

    @property
    def units(self) -> tuple[str, ...]:
        """Units of the channels of the first input signal, each once, sorted."""
        extent = self._stored(self.inputs[0]).extent
        channels = self.store.channels(extent.recording, extent.part.signal)
        return tuple(sorted({channel["unit"] for channel in channels}))

    @property
    def n_outputs(self) -> int:
        """Values that a model gives per window: classes, 1 for regression, or a target signal's channels.

        Raises
        ------
        InputError
            If there is no target.
        """
        if self.target_signal is not None:
            return self._n_channels(self.target_signal)
        if self.index.task is None:
            raise InputError("These windows have no target. Give one, or use with_targets(values).")
        return len(self.classes) or 1

    @property
    def n_target_values(self) -> int:
        """Values of the target signal in all windows, at most; 0 where the target is no signal."""
        if self.target_signal is None:
            return 0
        n_samples = self._walk.n_samples[self.target_signal]
        return n_samples * max(math.prod(stored.sample_shape) for stored in self._forms(self.target_signal))

    def batch_bytes(self, n_windows: int, dtype: Dtype | None = None) -> int:
        """Predict the most that the signals of a batch take.

        Parameters
        ----------
        n_windows
            Windows in the batch.
        dtype
            What a model is given; None: float32, or the stored integers.

        Returns
        -------
        int
            Bytes if all its windows are the longest there are.
        """
        n_bytes = 0
        for signal, (_, longest) in self._walk.lengths.items():
            given = None if signal == self.target_signal else dtype
            of_window = max(stored.n_bytes(longest, given) for stored in self._forms(signal))
            n_bytes += align(n_windows * of_window)
        return n_bytes

    @property
    def found_bytes(self) -> int:
        """Predict what is known of one window, at most, from when it is found until it is read."""
        return sum(
            max(stored.found_bytes(longest) for stored in self._forms(signal))
            for signal, (_, longest) in self._walk.lengths.items()
        )

    def scratch_bytes(
        self, dtype: Dtype | None = None, *, is_checked: bool = False, is_direct: bool = False
    ) -> int:
        """Predict what windows pass through while one thread reads them, however many.

        Parameters
        ----------
        dtype
            What a model is given; None: float32, or the stored integers.
        is_checked
            Whether blocks are compared with their checksums, one after another.
        is_direct
            Whether they are read past the page cache.
        """
        has_files = self.store.backend.files([]) is not None
        return max(
            max(
                stored.scratch_bytes(
                    longest,
                    None if signal == self.target_signal else dtype,
                    has_files=has_files,
                    is_direct=is_direct,
                ),
                stored.extent.part.grid.block_bytes if is_checked else 0,
            )
            for signal, (_, longest) in self._walk.lengths.items()
            for stored in self._forms(signal)
        )

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all windows as stored, at least; what several windows share, as often."""
        return sum(
            n_samples * min(stored.extent.part.grid.sample_bytes for stored in self._forms(signal))
            for signal, n_samples in self._walk.n_samples.items()
        )

    @cached_property
    def is_in_large_pieces(self) -> bool:
        """Whether windows are of 32 KiB and more in every signal, and share nothing with the next one.

        Of many windows, some hundreds are looked at.
        """
        for signal, (shortest, _) in self._walk.lengths.items():
            for stored in self._forms(signal):
                if stored.numbers is not None:  # of a bank, whose rows come again
                    return False
                if shortest * stored.extent.part.grid.sample_bytes < _LARGE_BYTES:
                    return False
        numbers = np.unique(np.linspace(0, len(self) - 1, _N_LOOKED_AT, endpoint=False).astype(np.int64))
        one, after = self.index.locate(numbers), self.index.locate(np.minimum(numbers + 1, len(self) - 1))
        is_next = (one.recording == after.recording) & (numbers < len(self) - 1)
        return not any(
            (is_next & (after.starts[signal] < one.starts[signal] + one.lengths[signal])).any()
            for signal in one.starts
        )

    def can_be_read_directly(self) -> bool:
        """Try whether windows can be read past the page cache here."""
        (stored, *_) = self._forms(self.index.spec.signal)
        return can_gather_directly(self.store.backend, stored.extent.part)

    @property
    def tables_bytes(self) -> int:
        """Predict what the process holds of the store's tables, with what reads them, beside its imports."""
        at_least, of_table, of_row = _TABLES_BYTES
        return at_least + of_table * self.index.tables.n_bytes + of_row * int(self.store.signals.num_rows)

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales that values are read with, of all recordings; 0 where none is scaled int16."""
        precisions = {form.extent.precision for name in self._walk.lengths for form in self._forms(name)}
        return self.store.scales_bytes if "int16" in precisions else 0

    def _stored(self, signal: str) -> Stored:
        """Give how a signal is stored, where all recordings have it in one form."""
        table, recordings = self.index.tables.signals[signal], self._walk.recordings
        forms = np.unique(table.form[recordings]).tolist()
        if len(forms) > 1:
            raise InputError(
                f"Recordings differ in {signal!r}: {table.forms[forms[0]]}; {table.forms[forms[1]]}. "
                "Ask for recordings of one form."
            )
        return self._reader.stored(self.index.tables.ids[recordings[0]], signal)

    def _forms(self, signal: str) -> list[Stored]:
        """Give how a signal is stored, once for every part that its windows are read from."""
        return self._reader.forms(signal, self._walk.recordings)

    def _main_lengths(self) -> NDArray[np.int32]:
        main = self.index.spec.signal
        found = [np.repeat(lengths[main].astype(np.int32), n) for n, lengths in self.index.lengths()]
        return np.concatenate(found)

    @cached_property
    def _walk(self) -> _Walk:
        """What only walking through all trials tells."""
        if not len(self):
            raise InputError("There are no windows here. Choose others, or split differently.")
        shortest = dict.fromkeys(self.index.spec.signals, np.iinfo(np.int64).max)
        longest, n_samples = (dict.fromkeys(self.index.spec.signals, 0) for _ in range(2))
        for n_windows, lengths in self.index.lengths():
            for name, of_signal in lengths.items():
                n_samples[name] += int(n_windows @ of_signal)
                shortest[name] = min(shortest[name], int(of_signal.min()))
                longest[name] = max(longest[name], int(of_signal.max()))
        bounds = {name: (shortest[name], longest[name]) for name in longest}
        return _Walk(self.index.recordings, bounds, n_samples)


@dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    recordings: NDArray[np.int64]
    """Numbers of the recordings that have windows."""
    lengths: Mapping[str, tuple[int, int]]
    """Signal -> samples of its shortest and its longest window."""
    n_samples: Mapping[str, int]
    """Signal -> samples of all windows; those that several windows share, as often."""


def _no_rows(batch: Batch, n_global: int) -> Batch:
    return Batch(
        {name: tensor[:0] for name, tensor in batch.signals.items()},
        {name: tensor[:0] for name, tensor in batch.lengths.items()},
        None if batch.y is None else batch.y[:0],
        batch.numbers[:0],
        n_global,
        batch.y_time_axis,
    )


@dataclass(frozen=True, slots=True, eq=False)
class SplitWindows(Mapping[str, Windows]):
    """The sides of a split: a mapping of those that there are, train first.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> import engram
    >>> from engram.windows import FixedWindows
    >>> from engram.windows.splits import Side, Split
    >>> eeg = engram.ArraySignal(np.zeros((1000, 4), "float32"), 100.0)
    >>> recordings = {
    ...     name: engram.ArrayRecording({"eeg": eeg}, fields={"subject": name}) for name in "abcd"
    ... }
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(engram.ArraySource(recordings), f"{folder}/store").store
    ...     windows = store.windows(FixedWindows(signal="eeg", window_size_s=2.0))
    ...     sides = windows.split(Split(test=Side(values=("d",))))
    ...     store.close()
    >>> {name: len(side) for name, side in sides.items()}, sides.within_subject
    ({'train': 15, 'test': 5}, False)
    """

    train: Windows
    """To train on."""
    valid: Windows | None
    """To stop early and choose by, or None."""
    test: Windows | None
    """To report scores of, or None."""
    unused: Mapping[str, int]
    """Reason -> windows that are on no side."""
    within_subject: bool
    """True if subjects are on several sides: scores then say nothing about unseen people."""
    n_subjects: Mapping[str, int]
    """Side -> subjects on it."""

    def __getitem__(self, side: str) -> Windows:
        windows = {"train": self.train, "valid": self.valid, "test": self.test}.get(side)
        if windows is None:
            raise KeyError(side)
        return windows

    def __iter__(self) -> Iterator[str]:
        return (side for side in ("train", "valid", "test") if getattr(self, side) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)
