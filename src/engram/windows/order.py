"""Order: which windows make up a batch, as a pure function of seed, epoch and batch number.

Nothing is drawn from a generator and nothing is remembered between batches, so the order is
the same for any world size, number of workers, storage and budget, and a training continues
in the middle of an epoch from three values: a ``Cursor``. What the windows are, ``index``
decides; who reads them, ``batches``.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from engram.errors import InputError

__all__ = ["Cursor", "Mode", "Order", "drawn_below", "whole_number"]

Mode = Literal["sequential", "shuffled", "blocks", "groups", "lengths", "balanced"]
"""How an epoch walks through the windows.

``"sequential"``
    By number: by recording, then time.
``"shuffled"``
    One permutation of all windows.
``"blocks"``
    Blocks of consecutive windows in shuffled order, mixed within pools of blocks: for media
    that are slow at reading here and there.
``"groups"``
    Every batch holds windows of one group, such as a session with units of its own.
``"lengths"``
    Every batch holds windows of nearly one length, so that little is padded.
``"balanced"``
    Groups are drawn equally, or by weights, whatever their sizes.
"""


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a training has come in its order.

    Raises
    ------
    InputError
        If a count is negative or no whole number.

    Examples
    --------
    >>> cursor = Cursor("8c1f", epoch=2, n_batches=30)
    >>> Cursor.from_dict(cursor.to_dict()) == cursor
    True
    """

    fingerprint: str
    """Of the order."""
    epoch: int = 0
    """The epoch under way, from 0."""
    n_batches: int = 0
    """Batches of that epoch that were handed to the training step."""

    def __post_init__(self) -> None:
        counts = (self.epoch, self.n_batches)
        if not all(type(n) is int and n >= 0 for n in counts):
            raise InputError(
                f"{self} is no position in an order: both counts are whole numbers from 0 up. "
                "Restore the checkpoint it came from."
            )

    def to_dict(self) -> dict[str, str | int]:
        """Give plain text and numbers, for a checkpoint."""
        return {"fingerprint": self.fingerprint, "epoch": self.epoch, "n_batches": self.n_batches}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild a cursor from ``to_dict``.

        Raises
        ------
        InputError
            If it is not what ``to_dict`` gives.
        """
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"This is no cursor: {error}. Restore the checkpoint it came from.") from error


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """The windows sorted by group, and how many batches or draws of an epoch each group has."""

    members: NDArray[np.signedinteger]
    """Window numbers, group after group."""
    starts: NDArray[np.int64]
    """(group + 1,) where each group begins in ``members``."""
    firsts: NDArray[np.int64]
    """(group + 1,) where each group begins among the epoch's batches, or draws."""

    def arrays(self) -> tuple[NDArray[np.signedinteger], ...]:
        """Give all that is held."""
        return self.members, self.starts, self.firsts


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """The order of the windows, built by ``Order.of``.

    Notes
    -----
    Safe to share between threads and processes: it never changes. It holds a few numbers, and
    in the modes ``groups``, ``lengths`` and ``balanced`` 4 bytes per window (8 from 2**31
    windows on).

    References
    ----------
    J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002: the
    permutation of the shuffled modes.

    Examples
    --------
    >>> order = Order.of("fingerprint of the index", 10, 4, mode="shuffled", drop_last=False)
    >>> [order.batch(0, number).tolist() for number in range(order.n_batches)]
    [[2, 5, 4, 3], [8, 9, 7, 0], [6, 1]]
    >>> order.share(0, 1, rank=1, world=2).tolist()
    [9, 0]
    """

    index_fingerprint: str
    """Of the index whose windows these are."""
    n_windows: int
    """Windows of the index."""
    batch_size: int
    """Windows in a global batch, that is of all ranks together."""
    mode: Mode
    """How an epoch walks through the windows."""
    seed: int
    """Which of the possible orders."""
    drop_last: bool
    """True if short batches are left out."""
    block_size: int
    """Consecutive windows that stay together in mode ``blocks``."""
    pool_blocks: int
    """Blocks that are mixed with each other in mode ``blocks``."""
    n_batches: int
    """Batches of every epoch."""
    fingerprint: str
    """Equal for two orders only if every batch of every epoch is equal."""
    _groups: _Groups | None

    @classmethod
    def of(
        cls,
        index_fingerprint: str,
        n_windows: int,
        batch_size: int,
        *,
        mode: Mode,
        drop_last: bool,
        seed: int = 0,
        groups: NDArray[np.integer] | None = None,
        lengths: NDArray[np.number] | None = None,
        weights: Sequence[float] | NDArray[np.number] | None = None,
        block_size: int = 32,
        pool_blocks: int = 128,
        bucket_batches: int = 8,
    ) -> Self:
        """Set up the order of an index's windows.

        Parameters
        ----------
        index_fingerprint
            Of the index: a cursor of other windows is refused.
        n_windows
            Windows of the index.
        batch_size
            Windows in a global batch.
        mode
            How an epoch walks through the windows; see ``Mode``.
        drop_last
            True to leave out the last batch if it is short (in mode ``groups``, each group's;
            in mode ``lengths``, each bucket's), unless it is the only one; as for training.
            False to visit every window exactly once, as for evaluation (in mode ``balanced``:
            to make as many draws as there are windows).
        seed
            Which of the possible orders.
        groups
            (window,) number of each window's group from 0 up, for modes ``groups`` and ``balanced``.
        lengths
            (window,) length of each window in any unit, for mode ``lengths``.
        weights
            One per group, for mode ``balanced``: how often a group is drawn. None for equally.
            Groups without windows are passed over.
        block_size
            For mode ``blocks``: consecutive windows that stay together.
        pool_blocks
            For mode ``blocks``: blocks that are mixed with each other.
        bucket_batches
            For mode ``lengths``: windows are sorted by length and cut into buckets of so many
            batches, and shuffled within their bucket. More mixes better and pads more.

        Raises
        ------
        InputError
            If a number is out of range, or the mode lacks or does not use what was given.
        """
        # The defaults of mode "blocks": 32 windows of 129 channels x 200 samples in float16 are
        # 1.6 MB, what a hard disk reads in the 8 ms that it takes to seek; 128 such blocks are
        # 210 MB. At batch size 64 and windows of a block all alike, the variance of a batch's
        # mean is then 1 + 63 * 31 / 4095 = 1.5 times that of a full shuffle, mostly far less.
        if mode not in get_args(Mode):
            raise InputError(f"There is no mode {mode!r}. Use one of: {', '.join(get_args(Mode))}.")
        if not n_windows:
            raise InputError("There are no windows to put in order. Take some.")
        n_windows = whole_number("n_windows", n_windows, 1, 2**62)
        batch_size = whole_number("batch_size", batch_size, 1, 2**31)
        seed = whole_number("seed", seed)
        block_size = whole_number("block_size", block_size, 1, 2**31)
        pool_blocks = whole_number("pool_blocks", pool_blocks, 1, 2**31)
        bucket_size = batch_size * whole_number("bucket_batches", bucket_batches, 1, 2**31)
        _check_array("groups", groups, n_windows, mode, is_used=mode in {"groups", "balanced"})
        _check_array("lengths", lengths, n_windows, mode, is_used=mode == "lengths")
        if weights is not None and mode != "balanced":
            raise InputError(f"Mode {mode!r} uses no weights. Leave them out, or use mode 'balanced'.")

        table = None
        if groups is not None:
            sizes = np.bincount(groups)
            if mode == "balanced":
                counts = _quotas(sizes, weights)
            else:
                counts = _count_batches(sizes, batch_size, drop_last)
            table = _Groups(_sorted_by(groups, seed), _bounds(sizes), _bounds(counts))
        elif lengths is not None:
            sizes = np.diff(np.append(np.arange(0, n_windows, bucket_size), n_windows))
            counts = _count_batches(sizes, batch_size, drop_last)
            table = _Groups(_sorted_by(lengths, seed), _bounds(sizes), _bounds(counts))
        if table is None or mode == "balanced":
            counts = _count_batches(np.array([n_windows]), batch_size, drop_last)

        # Options that do nothing in this mode do not part orders that are equal.
        blocks = (block_size, pool_blocks) if mode == "blocks" else None
        content = (index_fingerprint, n_windows, batch_size, mode, seed, bool(drop_last), blocks)
        digest = hashlib.blake2b(f"engram order 1 {content!r}".encode(), digest_size=16)
        for array in table.arrays() if table else ():
            digest.update(array.data)
        return cls(
            index_fingerprint=index_fingerprint,
            n_windows=n_windows,
            batch_size=batch_size,
            mode=mode,
            seed=seed,
            drop_last=bool(drop_last),
            block_size=block_size,
            pool_blocks=pool_blocks,
            n_batches=int(counts.sum()),
            fingerprint=digest.hexdigest(),
            _groups=table,
        )

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays that are held."""
        return sum(array.nbytes for array in self._groups.arrays()) if self._groups else 0

    def __repr__(self) -> str:
        return f"Order({self.mode}: {self.n_windows} windows, {self.n_batches} batches of {self.batch_size})"

    def batch(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Name the windows of a global batch.

        Parameters
        ----------
        epoch
            From 0.
        number
            Of the batch in its epoch, from 0.

        Returns
        -------
        ndarray
            (window,) int64, window numbers.

        Raises
        ------
        InputError
            If there is no such batch.
        """
        return self.batches(epoch, [number])[0]

    def batches(self, epoch: int, numbers: Sequence[int]) -> list[NDArray[np.int64]]:
        """Name the windows of several global batches at once, for little more than one of them takes.

        Parameters
        ----------
        epoch
            From 0.
        numbers
            Of the batches in their epoch, from 0, ascending.

        Returns
        -------
        list of ndarray
            Of each batch, (window,) int64, window numbers.

        Raises
        ------
        InputError
            If there is no such batch.
        """
        # As Python's own numbers: NumPy's are written otherwise, and so would give other keys.
        epoch, numbers = operator.index(epoch), [operator.index(number) for number in numbers]
        for number in numbers:
            if epoch < 0 or not 0 <= number < self.n_batches:
                raise InputError(
                    f"There is no batch {number} of epoch {epoch}. Ask for batches 0 to {self.n_batches - 1} "
                    "of epochs from 0 up."
                )
        if not numbers:
            return []
        if self._groups is not None and self.mode != "balanced":
            return [self._batch_of_a_group(self._groups, epoch, number) for number in numbers]
        each = [self._positions(number) for number in numbers]
        found = self._found_at(epoch, np.concatenate(each))
        return np.split(found, np.cumsum([len(positions) for positions in each[:-1]]))

    def _found_at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Name the windows at some positions of an epoch."""
        if self._groups is not None:
            return self._draws(self._groups, epoch, positions)
        if self.mode == "sequential":
            return positions
        if self.mode == "blocks":
            return self._in_blocks(epoch, positions)
        return _permuted(positions, self.n_windows, _keys(self.seed, epoch, "windows"))

    def share(self, epoch: int, number: int, rank: int, world: int) -> NDArray[np.int64]:
        """Name the windows of one rank: every ``world``-th of the batch, maybe none of a short one.

        Parameters
        ----------
        epoch, number
            Of the batch.
        rank
            From 0.
        world
            How many ranks there are.

        Returns
        -------
        ndarray
            (window,) int64, window numbers.

        Raises
        ------
        InputError
            If there is no such batch or rank.
        """
        if not 0 <= rank < world:
            raise InputError(f"There is no rank {rank} among {world}. Use 0 to {world - 1}.")
        return self.batch(epoch, number)[rank::world]

    def check(self, cursor: Cursor) -> None:
        """Refuse a cursor that is no position in this order.

        Raises
        ------
        InputError
            If it belongs to another order, or is past the epoch's end.
        """
        if cursor.fingerprint != self.fingerprint:
            raise InputError(
                f"This position belongs to order {cursor.fingerprint}, not to {self.fingerprint}: the "
                "windows, the mode, the seed or the batch size changed. Restore what it was made with."
            )
        if cursor.n_batches > self.n_batches:
            raise InputError(
                f"This position is {cursor.n_batches} batches into an epoch of {self.n_batches}. "
                "Restore the checkpoint it came from."
            )

    def _positions(self, number: int) -> NDArray[np.int64]:
        """Give the places of a batch in the epoch."""
        start = number * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.n_windows))

    def _in_blocks(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find which windows stand at these positions, in mode ``blocks``.

        The windows are taken as a ring that every epoch cuts into blocks from another window
        on. So the short block, which comes last and may be dropped, is another one every time.
        """
        n, n_whole = self.n_windows, self.n_windows // self.block_size
        pool_size = self.pool_blocks * self.block_size
        mixed = np.empty_like(positions)
        for pool in range(positions[0] // pool_size, positions[-1] // pool_size + 1):
            start, stop = pool * pool_size, min((pool + 1) * pool_size, n)
            inside = (start <= positions) & (positions < stop)
            keys = _keys(self.seed, epoch, "pool", pool)
            mixed[inside] = start + _permuted(positions[inside] - start, stop - start, keys)
        block, offset = np.divmod(mixed, self.block_size)
        is_whole = block < n_whole
        block[is_whole] = _permuted(block[is_whole], n_whole, _keys(self.seed, epoch, "blocks"))
        cut = int(_keys(self.seed, epoch, "cut")[0]) % n
        return (block * self.block_size + offset + cut) % n

    def _batch_of_a_group(self, groups: _Groups, epoch: int, number: int) -> NDArray[np.int64]:
        """Find which windows are in a batch, in modes ``groups`` and ``lengths``."""
        keys = _keys(self.seed, epoch, "batches")
        slot = int(_permuted(np.array([number]), self.n_batches, keys)[0])
        group = int(np.searchsorted(groups.firsts, slot, side="right")) - 1
        start, stop = (int(bound) for bound in groups.starts[group : group + 2])
        first = (slot - int(groups.firsts[group])) * self.batch_size
        positions = np.arange(first, min(first + self.batch_size, stop - start))
        keys = _keys(self.seed, epoch, "group", group)
        return groups.members[start + _permuted(positions, stop - start, keys)].astype(np.int64)

    def _draws(self, groups: _Groups, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find which windows are drawn at these positions, in mode ``balanced``.

        A group's draws of all epochs are one walk in circles over its windows. So after any
        epoch they were drawn equally often to within one, whereas independent draws, as many
        as there are windows, would miss a third of them.
        """
        keys = _keys(self.seed, epoch, "draws")
        draws = _permuted(positions, self.n_windows, keys)
        group = np.searchsorted(groups.firsts, draws, side="right") - 1
        turn = epoch * np.diff(groups.firsts)[group] + draws - groups.firsts[group]
        steps = turn % np.diff(groups.starts)[group]
        return groups.members[groups.starts[group] + steps].astype(np.int64)


def whole_number(name: str, value: int, least: int = 0, most: int = 2**63 - 1) -> int:
    """Refuse what is no whole number, or out of range; give it as Python's own, which fingerprints alike.

    Parameters
    ----------
    name
        What the caller calls it.
    value
        A whole number of Python's, NumPy's or PyTorch's.
    least, most
        Both allowed; as they are by default, PyTorch and NumPy hold the number.

    Raises
    ------
    InputError
        If it is none, or outside.

    Examples
    --------
    >>> whole_number("epoch", np.int64(3), 0, 9)
    3
    >>> whole_number("epoch", 1.5, 0, 9)
    Traceback (most recent call last):
    ...
    engram.errors.InputError: epoch is 1.5, and must be a whole number from 0 to 9. Use one.
    """
    is_whole = not isinstance(value, bool) and hasattr(value, "__index__")
    if not is_whole or not least <= operator.index(value) <= most:
        raise InputError(f"{name} is {value!r}, and must be a whole number from {least} to {most}. Use one.")
    return operator.index(value)


def _check_array(
    name: str, array: NDArray[np.number] | None, n_windows: int, mode: str, *, is_used: bool
) -> None:
    """Refuse an array that the mode lacks or does not use, or that does not fit the windows."""
    if array is None:
        if is_used:
            raise InputError(
                f"Mode {mode!r} needs {name}, one number per window. Name them, or change the mode."
            )
        return
    if not is_used:
        raise InputError(f"Mode {mode!r} uses no {name}. Leave them out, or change the mode.")
    if array.shape != (n_windows,):
        raise InputError(f"{name} has shape {array.shape}, not ({n_windows},). Give one number per window.")
    if name == "groups" and (array.dtype.kind not in "iu" or array.min() < 0):
        raise InputError(f"groups has {array.dtype} numbers from {array.min()}. Number groups from 0 up.")
    if name == "lengths" and not np.isfinite(array).all():
        raise InputError("lengths has numbers that are not finite. Give the true length of each window.")


def _count_batches(sizes: NDArray[np.int64], batch_size: int, drop_last: bool) -> NDArray[np.int64]:
    """Count the batches that so many windows make."""
    all_batches = -(-sizes // batch_size)
    return np.minimum(all_batches, np.maximum(1, sizes // batch_size)) if drop_last else all_batches


def _bounds(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give where each of some consecutive stretches begins, and where the last ends."""
    bounds = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return bounds


def _quotas(
    sizes: NDArray[np.int64], weights: Sequence[float] | NDArray[np.number] | None
) -> NDArray[np.int64]:
    """Share out an epoch's draws, as many as there are windows: largest remainders first."""
    given = np.ones(len(sizes)) if weights is None else np.asarray(weights, np.float64)
    if given.ndim != 1 or len(given) < len(sizes) or not np.isfinite(given).all() or given.min() < 0:
        raise InputError(
            f"weights are {given.tolist()} for {len(sizes)} groups. Give each group a number from 0 up."
        )
    given = np.where(sizes > 0, given[: len(sizes)], 0.0)
    if not given.any():
        raise InputError("Every group with windows has weight 0. Give at least one a weight above 0.")
    exact = sizes.sum() * (given / given.sum())
    quotas: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    left = int(sizes.sum() - quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    return quotas


def _sorted_by(values: NDArray[np.number], seed: int) -> NDArray[np.signedinteger]:
    """Give the window numbers sorted by value, those of equal value shuffled once and for all.

    Left in their own order, windows of equal length would share a bucket with their neighbours
    in time, and a group that is rarely drawn would be drawn in runs of neighbours.
    """
    n = len(values)
    shuffled: NDArray[np.signedinteger] = np.empty(n, np.int32 if n <= 2**31 else np.int64)
    keys = _keys(seed, "members")
    step = 1 << 16  # the passes of the cipher then stay in the processor's cache
    for start in range(0, n, step):
        stop = min(start + step, n)
        shuffled[start:stop] = _permuted(np.arange(start, stop), n, keys)
    shuffled[:] = shuffled[np.argsort(values[shuffled], kind="stable")]
    return shuffled


_N_ROUNDS = 8
"""Rounds of the cipher.

Where two neighbours end up is nearer to evenly spread by the rectangle's shorter side with every
two rounds: whether they still share a row or column, and how far apart, is kept only where the
other coordinate happens to agree. With sides of 16 and more, eight rounds leave 1 part in 16**4.
"""

_SORTED_SIZES = 256
"""Up to this many numbers, a permutation is a sort of hashes.

On a square of 3 x 2, eight rounds leave some of the 720 permutations twice as likely as they
should be (computed over all permutations); a sort is exact, and up to here as fast.
"""

# David Stafford's "Mix13" constants, those of SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast
# splittable pseudorandom number generators", OOPSLA 2014).
_MIX_SHIFTS = np.uint64(30), np.uint64(27)
_MIX_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def drawn_below(
    place: tuple[int | str, ...], numbers: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Draw a number for each window, uniformly: a function of place and window alone.

    Parameters
    ----------
    place
        What is drawn, such as (seed, epoch, "crops").
    numbers
        (window,) numbers of the windows.
    sizes
        (window,) how many numbers there are to choose from, from 0; 1 to 2**31.

    Returns
    -------
    ndarray
        (window,) int64.

    Examples
    --------
    >>> drawn_below((0, 3, "crops"), np.arange(4), np.full(4, 201)).tolist()
    [169, 82, 105, 65]
    """
    hashes = _mixed(numbers.astype(np.uint64) ^ _keys(*place)[0])
    hashes >>= _HALF
    hashes *= sizes.astype(np.uint64)
    hashes >>= _HALF
    return hashes.view(np.int64)


def _keys(*place: int | str) -> NDArray[np.uint64]:
    """Give one key per round for a place such as (seed, epoch, "windows").

    blake2b is the same in every Python, which NumPy's generators do not promise of their draws.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8 * _N_ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def _permuted(positions: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Send every position below ``n`` to the number that a keyed permutation puts there.

    The numbers are laid out on a rectangle, nearly square and at most one row too large, and
    its columns and rows are turned in alternation by hashes of their places (a Feistel network
    in a mixed base, which Black and Rogaway call generalised). A number beyond ``n`` is sent on
    until it falls below ("cycle walking"). A network on bits alone would need the next power
    of four, and send on three of four numbers at worst; here it is one in the square root.
    """
    if n <= _SORTED_SIZES:
        hashes = _mixed(np.arange(n, dtype=np.uint64) ^ keys[0])
        places: NDArray[np.int64] = np.argsort(hashes, kind="stable")
        return places[positions]
    columns = math.isqrt(n - 1) + 1
    shape = np.uint64(-(-n // columns)), np.uint64(columns)
    numbers = _turned(positions.astype(np.uint64), shape, keys)
    while (outside := numbers >= n).any():
        numbers[outside] = _turned(numbers[outside], shape, keys)
    return numbers.view(np.int64)


def _turned(
    numbers: NDArray[np.uint64], shape: tuple[np.uint64, np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Permute the numbers of a rectangle once, all rounds."""
    n_rows, n_columns = shape
    row, column = np.divmod(numbers, n_columns)
    for key_of_row, key_of_column in keys.reshape(-1, 2):
        row += _hashed_below(column, key_of_row, n_rows)
        np.minimum(row, row - n_rows, out=row)  # below zero wraps to huge: a modulo without division
        column += _hashed_below(row, key_of_column, n_columns)
        np.minimum(column, column - n_columns, out=column)
    row *= n_columns
    row += column
    return row


def _hashed_below(values: NDArray[np.uint64], key: np.uint64, size: np.uint64) -> NDArray[np.uint64]:
    """Hash every value to a number below ``size``, which is at most 2**31."""
    hashes = _mixed(values ^ key)
    hashes >>= _HALF
    hashes *= size
    hashes >>= _HALF
    return hashes


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of every value, in place; one to one.

    SplitMix64's last step is left out: it mends the low bits, which are not looked at here.
    """
    for shift, factor in zip(_MIX_SHIFTS, _MIX_FACTORS, strict=True):
        values ^= values >> shift
        values *= factor
    return values
