"""Which windows make up a batch."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram.errors import InputError
from engram.windows.order import Cursor, Mode, Order, _keys, _permuted

VISITING: tuple[Mode, ...] = ("sequential", "shuffled", "blocks", "groups", "lengths")
MODES: tuple[Mode, ...] = (*VISITING, "balanced")


def group_of(n: int) -> NDArray[np.int32]:
    """Give windows of groups of uneven sizes, some without windows, in turns."""
    return np.array([(0, 2, 2, 3, 3, 3, 5)[i % 7] for i in range(n)], np.int32)


def length_of(n: int) -> NDArray[np.int64]:
    """Give windows' lengths, many of them equal."""
    return np.arange(n) * 7919 % 40 + 100


def make(n: int, batch_size: int, mode: Mode, *, drop_last: bool = False, **more: Any) -> Order:
    """Set up an order of any mode over n windows."""
    if mode in {"groups", "balanced"}:
        more = {"groups": group_of(n), **more}
    if mode == "lengths":
        more = {"lengths": length_of(n), **more}
    return Order.of("windows", n, batch_size, mode=mode, drop_last=drop_last, **more)


def make_changed(change: dict[str, Any], **settings: Any) -> Order:
    """Set up an order with some of the settings changed."""
    return make(**(settings | change))


def epoch_of(order: Order, epoch: int = 0) -> list[list[int]]:
    """List an epoch's batches."""
    return [order.batch(epoch, number).tolist() for number in range(order.n_batches)]


@st.composite
def orders(draw: st.DrawFn, modes: tuple[Mode, ...] = MODES, drop_last: bool | None = None) -> Order:
    """Draw an order of up to some hundred windows."""
    return make(
        draw(st.integers(1, 700)),
        draw(st.integers(1, 70)),
        draw(st.sampled_from(modes)),
        drop_last=draw(st.booleans()) if drop_last is None else drop_last,
        seed=draw(st.integers(0, 2**63 - 1)),
        block_size=draw(st.integers(1, 40)),
        pool_blocks=draw(st.integers(1, 8)),
        bucket_batches=draw(st.integers(1, 4)),
    )


# The permutation.


@given(st.integers(1, 3000), st.integers(0, 99))
def test_the_cipher_is_a_permutation_of_any_number(n: int, seed: int) -> None:
    """Every number below n is some position's, whatever n."""
    assert sorted(_permuted(np.arange(n), n, _keys(seed))) == list(range(n))


@given(st.integers(2**20, 2**62), st.integers(0, 2**62), st.integers(0, 99))
def test_the_cipher_is_one_to_one_far_beyond_memory(n: int, first: int, seed: int) -> None:
    """At up to 2**62 numbers, positions next to each other go to different numbers below n."""
    positions = (first + np.arange(1000)) % n

    numbers = _permuted(positions, n, _keys(seed))

    assert numbers.min() >= 0
    assert numbers.max() < n
    assert len(np.unique(numbers)) == 1000


def test_the_cipher_has_an_inverse_beyond_memory() -> None:
    """Every round can be undone, so no two of 2**33 + 5 numbers go to one: undone by hand."""
    n, keys = 2**33 + 5, _keys("inverse")
    positions = np.linspace(0, n - 1, 500).astype(np.int64)
    columns = math.isqrt(n - 1) + 1
    rows = -(-n // columns)

    def hashed(value: int, key: int, size: int) -> int:
        z = value ^ key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = ((z ^ (z >> shift)) * factor) % 2**64
        return (z >> 32) * size >> 32

    def undone(number: int) -> int:
        row, column = divmod(number, columns)
        for key_of_row, key_of_column in reversed(keys.reshape(-1, 2).tolist()):
            column = (column - hashed(row, key_of_column, columns)) % columns
            row = (row - hashed(column, key_of_row, rows)) % rows
        number = row * columns + column
        return number if number < n else undone(number)

    numbers = _permuted(positions, n, keys)

    assert [undone(number) for number in numbers.tolist()] == positions.tolist()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_permutation_of_few_windows_is_equally_likely(n: int) -> None:
    """Over seeds and epochs, all n! orders come up at about the same rate (chi-square, 5 sigma)."""
    n_cells = math.factorial(n)
    per_cell = 40
    orders = [make(n, n, "shuffled", seed=seed) for seed in range(n_cells)]
    counts = Counter(tuple(order.batch(epoch, 0)) for order in orders for epoch in range(per_cell))
    chi_square = sum((counts[cell] - per_cell) ** 2 for cell in itertools.permutations(range(n))) / per_cell

    assert set(counts) <= set(itertools.permutations(range(n)))
    assert abs(chi_square - (n_cells - 1)) < 5 * math.sqrt(2 * (n_cells - 1))


@pytest.mark.parametrize("n", [257, 1000, 100_003])
def test_pairs_of_neighbours_land_anywhere(n: int) -> None:
    """Where two neighbours go is even over the square of all pairs of places (chi-square, 5 sigma)."""
    n_keys, n_cells, first = 6400, 8, n // 3
    places = [_permuted(np.array([first, first + 1]), n, _keys(seed)) for seed in range(n_keys)]
    cells = np.array(places) * n_cells // n
    counts = np.bincount(cells[:, 0] * n_cells + cells[:, 1], minlength=n_cells**2)
    # A cell's share of the places, exactly: n is no multiple of the cells.
    share = np.bincount(np.arange(n) * n_cells // n) / n
    expected = n_keys * np.outer(share, share).ravel()
    chi_square = float(((counts - expected) ** 2 / expected).sum())

    assert abs(chi_square - (n_cells**2 - 1)) < 5 * math.sqrt(2 * (n_cells**2 - 1))


@pytest.mark.parametrize("n", [1000, 100_003])
def test_neighbours_are_not_correlated(n: int) -> None:
    """Over one epoch, a window's number says nothing of the next ones, nor of its own place."""
    numbers = _permuted(np.arange(n), n, _keys("correlation")).astype(float)

    for lag in (1, 2, 3, math.isqrt(n), math.isqrt(n) + 1):
        correlation = np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(numbers, np.arange(n))[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("n", [256, 1000, 100_003])
def test_epochs_and_seeds_are_unrelated(n: int) -> None:
    """Two epochs, or two seeds, agree on about one place, as two random permutations do."""
    epochs = [np.concatenate(epoch_of(make(n, 512, "shuffled", seed=s), e)) for s in (0, 1) for e in (0, 1)]

    for one, other in itertools.combinations(epochs, 2):
        assert int((one == other).sum()) < 10
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(n)


# Epochs.


@given(orders(VISITING, drop_last=False), st.integers(0, 1000))
def test_evaluation_visits_every_window_once(order: Order, epoch: int) -> None:
    """Without drop_last, an epoch of any visiting mode is a permutation of the windows."""
    batches = epoch_of(order, epoch)

    assert sorted(itertools.chain(*batches)) == list(range(order.n_windows))
    assert all(1 <= len(batch) <= order.batch_size for batch in batches)


@given(orders(("sequential", "shuffled", "blocks", "lengths"), drop_last=True), st.integers(0, 1000))
def test_training_drops_only_the_last_short_batch(order: Order, epoch: int) -> None:
    """With drop_last, no window twice, every batch full, and too few left for another one.

    In mode lengths this holds of every bucket, the last alone being uneven. A batch that is
    the only one is kept.
    """
    batches = epoch_of(order, epoch)
    visited = list(itertools.chain(*batches))

    assert len(visited) == len(set(visited))
    assert set(visited) <= set(range(order.n_windows))
    if order.n_windows < order.batch_size:
        assert len(visited) == order.n_windows
    elif order.mode != "lengths":
        assert {len(batch) for batch in batches} == {order.batch_size}
    assert order.n_windows - len(visited) < order.batch_size


def test_what_is_dropped_differs_between_epochs() -> None:
    """The window that one epoch leaves out, others visit, in every mode that shuffles."""
    for mode in ("shuffled", "blocks", "groups", "lengths"):
        order = make(103, 10, mode, drop_last=True, block_size=8, bucket_batches=2)
        visited = {n for epoch in range(40) for n in itertools.chain(*epoch_of(order, epoch))}
        assert visited == set(range(103)), mode


@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_differs_from_the_next(mode: Mode) -> None:
    """Epochs are ordered differently, but for mode sequential; the same one is always the same."""
    order = make(300, 16, mode, block_size=8)

    assert (epoch_of(order, 0) == epoch_of(order, 1)) == (mode == "sequential")
    assert epoch_of(order, 1) == epoch_of(make(300, 16, mode, block_size=8), 1)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_numpy_name_the_same_batch(mode: Mode) -> None:
    """Epochs and batches may be counted in NumPy's numbers, and seeds be drawn by it."""
    epoch: Any = np.int64(2)
    number: Any = np.int32(1)

    same = make(300, 16, mode, seed=np.int64(5)).batch(epoch, number)

    assert same.tolist() == make(300, 16, mode, seed=5).batch(2, 1).tolist()


@given(orders(), st.integers(0, 5), st.data())
def test_many_batches_at_once_are_the_single_ones(order: Order, epoch: int, data: st.DataObject) -> None:
    """Neighbours, or every so many-th as one of several workers asks for them; none give none."""
    first, step = data.draw(st.integers(0, order.n_batches)), data.draw(st.integers(1, 9))
    numbers = range(first, data.draw(st.integers(first, order.n_batches)), step)

    batches = order.batches(epoch, numbers)

    assert [batch.tolist() for batch in batches] == [order.batch(epoch, n).tolist() for n in numbers]
    assert all(batch.dtype == np.int64 for batch in batches)


def test_sequential_is_by_number() -> None:
    """Mode sequential goes through the windows by number."""
    assert epoch_of(make(7, 3, "sequential")) == [[0, 1, 2], [3, 4, 5], [6]]
    assert epoch_of(make(7, 3, "sequential", drop_last=True)) == [[0, 1, 2], [3, 4, 5]]


# Ranks, and going on in the middle.


@given(orders(), st.integers(0, 5), st.integers(1, 16), st.data())
def test_ranks_share_a_batch_row_by_row(order: Order, epoch: int, world: int, data: st.DataObject) -> None:
    """Row r of the batch is rank r % world's, so the batch is the same for any world size."""
    number = data.draw(st.integers(0, order.n_batches - 1))
    batch = order.batch(epoch, number).tolist()
    shares = [order.share(epoch, number, rank, world).tolist() for rank in range(world)]

    dealt = itertools.chain(*itertools.zip_longest(*shares))
    assert [n for n in dealt if n is not None] == batch


@given(orders(), st.integers(0, 5), st.data())
def test_any_position_resumes_the_unbroken_epoch(order: Order, epoch: int, data: st.DataObject) -> None:
    """A fresh equal order goes on from any cursor as the unbroken one does."""
    cursor = Cursor(order.fingerprint, epoch, data.draw(st.integers(0, order.n_batches)))
    unbroken = epoch_of(order, epoch)

    fresh: Order = pickle.loads(pickle.dumps(order))
    restored = Cursor.from_dict(cursor.to_dict())
    fresh.check(restored)

    rest = [fresh.batch(epoch, number).tolist() for number in range(restored.n_batches, fresh.n_batches)]
    assert unbroken[: restored.n_batches] + rest == unbroken


# Groups, lengths, blocks, balance.


@given(orders(("groups",)), st.integers(0, 5))
def test_a_batch_is_of_one_group(order: Order, epoch: int) -> None:
    """In mode groups, no batch mixes groups, and a group loses its short tail in training only.

    A group whose only batch is short keeps it.
    """
    groups, batch_size = group_of(order.n_windows), order.batch_size
    batches = epoch_of(order, epoch)
    by_group: dict[int, list[list[int]]] = {}
    for batch in batches:
        (group,) = {int(groups[n]) for n in batch}
        by_group.setdefault(group, []).append(batch)

    for group in set(groups.tolist()):
        members = np.flatnonzero(groups == group).tolist()
        visited = sorted(itertools.chain(*by_group[group]))
        if order.drop_last and len(members) >= batch_size:
            assert {len(batch) for batch in by_group[group]} == {batch_size}
            assert len(visited) == len(set(visited)) == len(members) // batch_size * batch_size
            assert set(visited) <= set(members)
        else:
            assert visited == members


def test_batches_of_groups_alternate() -> None:
    """In mode groups, the groups do not come one after another."""
    order = Order.of("windows", 4000, 10, mode="groups", drop_last=True, groups=np.repeat([0, 1], 2000))
    first = [order.batch(0, number)[0] // 2000 for number in range(order.n_batches)]

    assert 150 < sum(one != other for one, other in itertools.pairwise(first)) < 250


@given(orders(("lengths",)), st.integers(0, 5))
def test_batches_hold_near_lengths(order: Order, epoch: int) -> None:
    """In mode lengths, at most a bucket of windows has a length between a batch's shortest and longest."""
    lengths = length_of(order.n_windows)
    spans = sorted((int(lengths[b].min()), int(lengths[b].max())) for b in epoch_of(order, epoch))
    bucket = 4 * order.batch_size  # the largest that the strategy draws
    ranks = np.sort(lengths)

    for low, high in spans:
        between = np.searchsorted(ranks, high, "left") - np.searchsorted(ranks, low, "right")
        assert between <= bucket


def test_buckets_waste_little_padding() -> None:
    """Windows of 100 to 5,500 samples in batches of 32 are padded by less than 5 percent; shuffled, by 90."""
    lengths = np.arange(7200) * 7919 % 5400 + 100

    def padding(mode: Mode, **more: Any) -> float:
        order = Order.of("sentences", 7200, 32, mode=mode, drop_last=False, **more)
        batches = [order.batch(0, number) for number in range(order.n_batches)]
        return sum(int(lengths[b].max()) * len(b) for b in batches) / int(lengths.sum()) - 1

    assert padding("lengths", lengths=lengths) < 0.05
    assert padding("shuffled") > 0.85


def test_windows_of_equal_length_are_shuffled_over_all_batches() -> None:
    """Where all lengths are equal, mode lengths mixes windows from everywhere."""
    order = Order.of("windows", 8192, 64, mode="lengths", drop_last=True, lengths=np.full(8192, 5))

    assert min(np.ptp(order.batch(0, number)) for number in range(order.n_batches)) > 4096


@given(orders(("blocks",), drop_last=False), st.integers(0, 5))
def test_a_pool_reads_whole_blocks(order: Order, epoch: int) -> None:
    """In mode blocks, the windows of one pool are whole runs of consecutive windows, on a ring.

    Only the last block of the epoch may be short.
    """
    n, block_size = order.n_windows, order.block_size
    visited = list(itertools.chain(*epoch_of(order, epoch)))
    pool_size = block_size * order.pool_blocks
    for start in range(0, n, pool_size):
        pool = set(visited[start : start + pool_size])
        if len(pool) == n:
            continue
        begins = sorted(w for w in pool if (w - 1) % n not in pool)
        runs = [next(k for k in itertools.count() if (b + k) % n not in pool) for b in begins]
        short = len(pool) % block_size
        assert len(runs) <= order.pool_blocks
        assert sum(run % block_size != 0 for run in runs) <= (short != 0)
        assert sum(runs) == len(pool)


def test_blocks_are_mixed_within_their_pool() -> None:
    """In mode blocks, neighbours in the order are seldom of one block."""
    order = Order.of("windows", 32 * 1024, 64, mode="blocks", drop_last=True)
    batches = np.array(epoch_of(order))

    assert (np.abs(np.diff(batches, axis=1)) < 32).mean() < 0.05


@given(st.integers(1, 300), st.lists(st.integers(0, 5), min_size=6, max_size=6), st.integers(0, 20))
def test_groups_are_drawn_by_their_weights(n: int, weights: list[int], epoch: int) -> None:
    """In mode balanced, each group has its share of the draws, to within one, in every epoch."""
    groups = group_of(n)
    present = [weight if group in groups else 0 for group, weight in enumerate(weights)]
    if not any(present):
        with pytest.raises(InputError, match="weight 0"):
            make(n, 8, "balanced", weights=weights)
        return
    order = make(n, 8, "balanced", weights=weights)

    drawn = Counter(int(groups[w]) for batch in epoch_of(order, epoch) for w in batch)

    assert sum(drawn.values()) == n
    for group, weight in enumerate(present):
        assert abs(drawn[group] - n * weight / sum(present)) < 1


def test_groups_are_drawn_equally_by_default() -> None:
    """In mode balanced, a group of 100 windows is drawn as often as one of 900."""
    groups = np.repeat([0, 1], [900, 100])
    order = Order.of("windows", 1000, 50, mode="balanced", drop_last=True, groups=groups)

    assert np.bincount(groups[np.concatenate(epoch_of(order))]).tolist() == [500, 500]


def test_a_rarely_drawn_group_is_gone_through_before_any_window_returns() -> None:
    """In mode balanced, windows of a group differ by at most one draw, over any number of epochs."""
    groups = np.repeat([0, 1], [900, 100])
    order = Order.of("windows", 1000, 50, mode="balanced", drop_last=True, groups=groups)
    drawn = np.zeros(1000, int)
    for epoch in range(5):
        np.add.at(drawn, np.concatenate(epoch_of(order, epoch)), 1)
        for members in (drawn[:900], drawn[900:]):
            assert np.ptp(members) <= 1


# What it costs, and what it refuses.


@pytest.mark.parametrize("mode", MODES)
def test_an_order_holds_at_most_four_bytes_per_window(mode: Mode) -> None:
    """Modes with groups or lengths hold 4 bytes per window, the others nothing; n_bytes is honest."""
    order = make(100_000, 64, mode)

    assert order.n_bytes == 0 if mode in {"sequential", "shuffled", "blocks"} else order.n_bytes < 410_000
    assert order.n_bytes <= len(pickle.dumps(order)) < order.n_bytes + 2000


def test_every_setting_that_changes_batches_changes_the_fingerprint() -> None:
    """Orders of other windows, sizes, seeds or groups are told apart; equal ones are not."""
    settings: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"drop_last": True},
        {"batch_size": 5},
        {"n": 101},
        *({"mode": mode} for mode in MODES if mode != "shuffled"),
        {"mode": "blocks", "block_size": 8},
        {"mode": "blocks", "pool_blocks": 8},
        {"mode": "lengths", "bucket_batches": 2},
        {"mode": "lengths", "lengths": length_of(100) % 3},
        {"mode": "groups", "groups": group_of(100) % 2},
        {"mode": "balanced", "weights": [1, 0, 2, 1, 0, 3]},
    ]
    fingerprints = [make_changed(each, n=100, batch_size=4, mode="shuffled").fingerprint for each in settings]

    assert len(set(fingerprints)) == len(settings)
    assert Order.of("others", 100, 4, mode="shuffled", drop_last=False).fingerprint not in fingerprints
    # Options of another mode, and numbers of NumPy, mean the same order.
    same = make(100, 4, "shuffled", block_size=8, pool_blocks=3, bucket_batches=2, seed=np.int64(0))
    assert same.fingerprint == fingerprints[0]


@pytest.mark.parametrize(
    ("mode", "fingerprint", "batches"),
    [
        ("sequential", "656ae89dcc5ca8a965823d8770e0a405", [[0, 1, 2, 3], [12, 13, 14, 15]]),
        ("shuffled", "f9efe3a356b1e942e35835f74bbeedc7", [[975, 332, 135, 679], [728, 539, 280, 759]]),
        ("blocks", "5b586ecee5e990a1e60d001f9d3d69fd", [[985, 878, 986, 821], [215, 42, 880, 867]]),
        ("groups", "c8f4a70b37dbc89c429119aa27ed2a04", [[416, 306, 705, 494], [915, 388, 662, 844]]),
        ("lengths", "156a1a2a356c50bc344a1c927920f29d", [[254, 454, 935, 335], [56, 536, 176, 617]]),
        ("balanced", "e2fa7c5890f71d44b96b3ba7a721dc98", [[126, 286, 476, 745], [729, 907, 791, 76]]),
    ],
)
def test_orders_are_pinned(mode: Mode, fingerprint: str, batches: list[list[int]]) -> None:
    """These batches never change: a training that was begun with an older Engram goes on with its order.

    A change needs a new number in the text that is fingerprinted, and a fragment.
    """
    order = make(1000, 4, mode, drop_last=True, seed=7)

    assert [order.batch(2, number).tolist() for number in (0, 3)] == batches
    assert order.fingerprint == fingerprint


def test_a_cursor_of_another_order_is_refused() -> None:
    """Going on with other windows or settings is an error that names both fingerprints."""
    order, other = make(100, 4, "shuffled"), make(100, 4, "shuffled", seed=1)

    with pytest.raises(InputError, match=f"order {other.fingerprint}, not to {order.fingerprint}"):
        order.check(Cursor(other.fingerprint))
    order.check(Cursor(order.fingerprint, 3, 25))
    with pytest.raises(InputError, match="26 batches into an epoch of 25"):
        order.check(Cursor(order.fingerprint, 3, 26))


@pytest.mark.parametrize("content", [{}, {"fingerprint": "a", "epoch": 1, "windows": 2}])
def test_what_is_no_cursor_is_refused(content: dict[str, Any]) -> None:
    """A checkpoint that lacks a field, or has one too many, is refused with a remedy."""
    with pytest.raises(InputError, match="Restore the checkpoint"):
        Cursor.from_dict(content)


@pytest.mark.parametrize("count", [-1, 1.5, "3", None])
def test_a_cursor_counts_in_whole_numbers(count: Any) -> None:
    """A count that is negative or no whole number is no position."""
    for name in ("epoch", "n_batches"):
        with pytest.raises(InputError, match="whole numbers from 0 up"):
            Cursor.from_dict({"fingerprint": "a", name: count})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "random"}, "no mode 'random'. Use one of: sequential, shuffled"),
        ({"n": 0}, "no windows to put in order. Take some"),
        ({"batch_size": 1.5}, "batch_size is 1.5, and must be a whole number from 1 to"),
        ({"batch_size": "4"}, "batch_size is '4', and must be"),
        ({"batch_size": True}, "batch_size is True, and must be"),
        ({"seed": None}, "seed is None, and must be"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"pool_blocks": -1}, "pool_blocks is -1"),
        ({"bucket_batches": 0}, "bucket_batches is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"groups": np.zeros(10, int)}, "'shuffled' uses no groups"),
        ({"lengths": np.zeros(10, int)}, "'shuffled' uses no lengths"),
        ({"weights": [1.0]}, "'shuffled' uses no weights"),
        ({"mode": "groups", "groups": None}, "'groups' needs groups"),
        ({"mode": "lengths", "lengths": None}, "'lengths' needs lengths"),
        ({"mode": "groups", "groups": np.zeros(9, int)}, r"shape \(9,\), not \(10,\)"),
        ({"mode": "groups", "groups": np.full(10, -1)}, "Number groups from 0 up"),
        ({"mode": "groups", "groups": np.zeros(10)}, "float64 numbers"),
        ({"mode": "lengths", "lengths": np.full(10, np.nan)}, "not finite"),
        ({"mode": "balanced", "weights": [1.0]}, "for 6 groups"),
        ({"mode": "balanced", "weights": [1, 1, 1, 1, 1, -1]}, "from 0 up"),
        ({"mode": "balanced", "weights": [1, 1, 1, 1, 1, math.nan]}, "from 0 up"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    """A number out of range, or an array that the mode lacks or does not use, is named."""
    with pytest.raises(InputError, match=message):
        make_changed(change, n=10, batch_size=4, mode="shuffled")


def test_batches_and_ranks_that_do_not_exist_are_refused() -> None:
    """A batch, epoch or rank out of range is an error, never another batch."""
    order = make(10, 4, "shuffled")

    for epoch, number in ((0, 3), (0, -1), (-1, 0)):
        with pytest.raises(InputError, match="Ask for batches 0 to 2"):
            order.batch(epoch, number)
        with pytest.raises(InputError, match=f"no batch {number} of epoch {epoch}"):
            order.batches(epoch, [number])
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match=f"no rank {rank} among {world}"):
            order.share(0, 0, rank, world)


def test_a_short_batch_may_leave_a_rank_without_windows() -> None:
    """With more ranks than rows, the last ranks get no window of that batch."""
    order = make(5, 4, "sequential")

    assert [order.share(0, 1, rank, 4).tolist() for rank in range(4)] == [[4], [], [], []]
