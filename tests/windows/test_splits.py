"""Training, validation and test, and the proof that they are apart."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import InputError
from engram.windows.index import WindowIndex, build_index
from engram.windows.spec import FixedWindows, Span
from engram.windows.splits import Side, Sides, Split, _place, split_index
from engram.windows.tables import SignalTable, Tables

NO_EVENTS = pa.table({name: [] for name in ("recording", "onset_s", "duration_s", "description")})


def make_index(
    subjects: Sequence[str | None],
    duration_s: float = 10.0,
    spec: FixedWindows | None = None,
    robs_start_s: float = 0.0,
    **fields: Sequence[str | None],
) -> WindowIndex:
    """Cut recordings of stim at 240 Hz and robs at 120 Hz, one per entry of subjects."""
    n = len(subjects)

    def signal(rate_hz: float, start_s: float) -> SignalTable:
        return SignalTable(
            present=np.ones(n, np.bool_),
            n_samples=np.full(n, round(duration_s * rate_hz)),
            rate_hz=np.full(n, rate_hz),
            start_s=np.full(n, start_s),
            form=np.zeros(n, np.int32),
            forms=("one",),
        )

    ids = tuple(f"r{number:03}" for number in range(n))
    columns = {"subject": tuple(subjects), **{name: tuple(values) for name, values in fields.items()}}
    signals = {"stim": signal(240.0, 0.0), "robs": signal(120.0, robs_start_s)}
    spec = FixedWindows(signal="robs", window_size_s=1.0) if spec is None else spec
    return build_index(Tables(ids, ids, columns, signals, NO_EVENTS), spec)


@dataclass(frozen=True)
class Place:
    """Where a window lies: its recording, and samples [start, stop) per signal."""

    recording: int
    samples: tuple[tuple[int, int], ...]


def places_of(index: WindowIndex | None) -> list[Place]:
    """List where the windows of an index lie."""
    if index is None or not len(index):
        return []
    located = index.locate(np.arange(len(index)))
    spans = [
        zip(
            located.starts[name].tolist(),
            (located.starts[name] + located.lengths[name]).tolist(),
            strict=True,
        )
        for name in index.spec.signals
    ]
    rows = zip(located.recording.tolist(), zip(*spans, strict=True), strict=True)
    return [Place(recording, samples) for recording, samples in rows]


def subjects_of(index: WindowIndex | None) -> set[str | None]:
    """Name the subjects of an index's windows."""
    return set() if index is None else set(index.subjects().values)


def extent(place: Place, rates_hz: Sequence[float]) -> tuple[float, float]:
    """Give where a window starts and stops in seconds, over all signals that begin at 0."""
    starts = [start / rate for (start, _), rate in zip(place.samples, rates_hz, strict=True)]
    stops = [stop / rate for (_, stop), rate in zip(place.samples, rates_hz, strict=True)]
    return min(starts), max(stops)


def distance_s(one: Place, other: Place, rates_hz: Sequence[float]) -> float:
    """Give the seconds between two windows; negative where they overlap, infinite over recordings."""
    if one.recording != other.recording:
        return math.inf
    (start, stop), (other_start, other_stop) = extent(one, rates_hz), extent(other, rates_hz)
    return round(max(other_start - stop, start - other_stop), 9)


# Groups.


@given(st.lists(st.integers(0, 15), min_size=3, max_size=40), st.integers(0, 9), st.data())
def test_sides_part_the_subjects(numbers: list[int], seed: int, data: st.DataObject) -> None:
    """By subject, every window is on one side, with all others of its subject, and fractions are kept."""
    subjects = [f"s{number}" for number in numbers]
    n = len(set(subjects))
    test, valid = (data.draw(st.floats(0.05, 0.4)) for _ in range(2))
    index = make_index(subjects)
    split = Split(test=Side(fraction=test), valid=Side(fraction=valid), seed=seed)
    n_test = max(1, math.floor(test * n + 0.5))
    n_valid = min(n - n_test, max(1, math.floor(valid * (n - n_test) + 0.5)))
    if n - n_test - n_valid < 1:
        with pytest.raises(InputError, match="No window is left for"):
            split_index(index, split)
        return

    sides = split_index(index, split)

    assert sides.n_subjects == {"train": n - n_test - n_valid, "valid": n_valid, "test": n_test}
    assert set.union(*(subjects_of(side) for side in sides.values())) == set(subjects)
    assert sum(len(subjects_of(side)) for side in sides.values()) == n
    parts = [place for side in sides.values() for place in places_of(side)]
    assert sorted(parts, key=repr) == sorted(places_of(index), key=repr)
    assert (sides.unused, sides.within_subject) == ({"gap": 0, "not named": 0}, False)


@given(st.sets(st.integers(0, 60), min_size=4), st.sets(st.integers(0, 60)), st.integers(0, 9))
def test_more_subjects_leave_the_order_of_the_others(few: set[int], more: set[int], seed: int) -> None:
    """Of two subjects, the same one comes first into the test side, whoever else there is."""
    split = Split(test=Side(fraction=0.3), seed=seed)
    one = subjects_of(split_index(make_index([f"s{n}" for n in sorted(few)], 1.0), split).test)
    other = subjects_of(split_index(make_index([f"s{n}" for n in sorted(few | more)], 1.0), split).test)

    known = {f"s{n}" for n in few}
    assert (one & known) <= (other & known) or (other & known) <= (one & known)


def test_sides_of_a_seed_are_pinned() -> None:
    """Which subjects a seed takes never changes, and differs between seeds."""
    index = make_index([f"sub-{number:02}" for number in range(10)])

    def test_subjects(seed: int) -> list[str]:
        side = split_index(index, Split(test=Side(fraction=0.3), seed=seed)).test
        return sorted(filter(None, subjects_of(side)))

    assert test_subjects(0) == ["sub-00", "sub-06", "sub-07"]
    assert test_subjects(1) == ["sub-00", "sub-04", "sub-06"]


def test_sides_are_taken_by_name() -> None:
    """Values of any column name the groups of a side; the rest is for training."""
    index = make_index(list("abcdef"), release=["R1", "R1", "R2", "R2", "R3", "R3"])
    test, valid = Side(by="release", values=("R3",)), Side(values=("a", "c"))

    sides = split_index(index, Split(test=test, valid=valid))

    assert [subjects_of(side) for side in sides.values()] == [{"b", "d"}, {"a", "c"}, {"e", "f"}]
    assert list(sides) == ["train", "valid", "test"]


def test_train_may_be_named_too() -> None:
    """Where train takes a part only, the rest is counted as not named."""
    index = make_index(list("abcde"))

    sides = split_index(index, Split(test=Side(values=("a",)), train=Side(fraction=0.5)))

    assert sides.n_subjects == {"train": 2, "test": 1}
    assert sides.unused == {"gap": 0, "not named": 20}


def test_a_window_without_a_value_is_in_no_group() -> None:
    """No fraction takes a window that the column says nothing of; it is left for training."""
    index = make_index(list("abc"), site=["x", None, None])

    sides = split_index(index, Split(test=Side(by="site", fraction=1.0)))

    assert [subjects_of(side) for side in sides.values()] == [{"b", "c"}, {"a"}]
    with pytest.raises(InputError, match="No window is left for valid: of 30 windows, test 10, valid 0"):
        split_index(index, Split(test=Side(by="site", fraction=1.0), valid=Side(by="site", fraction=1.0)))


def test_a_recording_without_subject_is_a_subject_of_its_own() -> None:
    """Where no subject is told, recordings are kept apart."""
    sides = split_index(make_index([None] * 4), Split(test=Side(fraction=0.5)))

    assert sides.n_subjects == {"train": 2, "test": 2}


def test_a_small_fraction_takes_at_least_one_group() -> None:
    """A side that is asked for has a group, however small its fraction."""
    sides = split_index(make_index(list("abc")), Split(test=Side(fraction=0.01), valid=Side(fraction=0.01)))

    assert sides.n_subjects == {"train": 1, "valid": 1, "test": 1}


# Subjects on two sides.


def test_a_subject_on_two_sides_is_an_error() -> None:
    """Split by a column that parts a subject, the error names subject and sides, and the remedy."""
    index = make_index(["a", "a", "b", "c"], session=["1", "2", "1", "1"])
    split = Split(test=Side(by="session", values=("2",)))

    message = r"On two sides: a \(train, test\)\. .* set within_subject = true"
    with pytest.raises(InputError, match=message):
        split_index(index, split)


def test_of_many_subjects_on_two_sides_some_are_named() -> None:
    """An error over hundreds of subjects names three and counts the rest."""
    index = make_index(sorted([f"s{n}" for n in range(10)] * 2), session=["1", "2"] * 10)

    with pytest.raises(InputError, match=r"s0 .*, s1 .*, s2 .* and 7 more"):
        split_index(index, Split(test=Side(by="session", values=("2",))))


def test_within_subject_allows_it_and_says_so() -> None:
    """With within_subject, subjects may be on two sides; the sides say whether any is."""
    index = make_index(["a", "a", "b", "c"], session=["1", "2", "1", "1"])

    by_session = split_index(index, Split(test=Side(by="session", values=("2",)), within_subject=True))
    by_subject = split_index(index, Split(test=Side(values=("c",)), within_subject=True))

    assert (by_session.within_subject, by_subject.within_subject) == (True, False)
    assert by_session.n_subjects == {"train": 3, "test": 1}


# Blocks of time, and gaps.


def test_blocks_cut_every_recording_in_time() -> None:
    """By block, the same stretches of every recording are on a side, of equally many windows."""
    index = make_index(["a", "b"], 20.0)
    side = Side(by="block", values=("1", "4"), n_blocks=5)

    sides = split_index(index, Split(test=side, within_subject=True))

    starts = [(place.recording, place.samples[0][0] // 120) for place in places_of(sides.test)]
    assert starts == [(r, s) for r in (0, 1) for s in (4, 5, 6, 7, 16, 17, 18, 19)]


def test_blocks_may_be_taken_by_fraction() -> None:
    """A fraction of the blocks is a fraction of every recording."""
    sides = split_index(
        make_index(["a", "b"]), Split(test=Side(by="block", fraction=0.3), within_subject=True)
    )

    assert sorted(place.recording for place in places_of(sides.test)) == [0, 0, 0, 1, 1, 1]


def test_windows_that_touch_share_nothing() -> None:
    """Windows one right after another stay on their sides, at rates whose periods are no decimals."""
    for size in (1, 7, 40):
        index = make_index(["a"], spec=FixedWindows(signal="robs", window_size_samples=size))
        split = Split(test=Side(by="block", fraction=0.5), within_subject=True)

        assert split_index(index, split).unused == {"gap": 0, "not named": 0}


def test_windows_that_share_a_sample_are_parted() -> None:
    """Of two overlapping windows on two sides, the one of the side that is taken later is dropped."""
    spec = FixedWindows(signal="robs", window_size_samples=120, window_stride_samples=119)
    index = make_index(["a"], spec=spec)
    split = Split(test=Side(by="block", values=("1",), n_blocks=2), within_subject=True)

    sides = split_index(index, split)

    assert (len(index), len(sides.train), len(sides["test"]), sides.unused["gap"]) == (10, 4, 5, 1)


def test_a_signal_beside_counts_too() -> None:
    """Frames before an anchor reach into the time of the windows before it, and part them."""
    lags = Span(signal="stim", offset_samples=-32, window_size_samples=33)
    spec = FixedWindows(signal="robs", window_size_samples=1, beside=(lags,))
    split = Split(test=Side(by="block", values=("1",), n_blocks=2), within_subject=True)

    sides = split_index(make_index(["a"], spec=spec), split)

    last_frame = max(place.samples[1][1] for place in places_of(sides.train))
    first_frame = min(place.samples[1][0] for place in places_of(sides.test))
    assert last_frame <= first_frame
    assert sides.unused["gap"] == 16


def test_clocks_of_signals_are_compared_by_time() -> None:
    """A signal that starts later on the recording's clock is compared in seconds, not in samples."""
    beside = Span(signal="robs", offset_s=0.0, window_size_s=1.0)
    spec = FixedWindows(signal="stim", window_size_s=1.0, start_offset_s=2.0, beside=(beside,))
    split = Split(test=Side(by="block", fraction=0.5, n_blocks=2), within_subject=True)

    assert split_index(make_index(["a"], spec=spec, robs_start_s=1.5), split).unused["gap"] == 0


@st.composite
def split_cases(draw: st.DrawFn) -> tuple[WindowIndex, Split]:
    """Draw windows that overlap or have gaps between, and sides that cut recordings."""
    n = draw(st.integers(1, 4))
    beside = draw(st.sampled_from([(), (Span(signal="stim", offset_samples=-100, window_size_samples=90),)]))
    spec = FixedWindows(
        signal="robs",
        window_size_samples=draw(st.integers(1, 200)),
        window_stride_samples=draw(st.integers(20, 200)),
        start_offset_s=1.0,
        beside=beside,
    )
    index = make_index([f"s{draw(st.integers(0, 2))}" for _ in range(n)], spec=spec)
    fractions = st.floats(0.1, 0.5)
    sides = st.builds(Side, by=st.just("block"), fraction=fractions, n_blocks=st.integers(2, 8))
    return index, Split(
        test=draw(sides),
        valid=draw(st.none() | sides | st.builds(Side, fraction=fractions)),
        train=draw(st.none() | sides),
        seed=draw(st.integers(0, 99)),
        within_subject=True,
        gap_s=draw(st.sampled_from([0.0, 0.01, 0.5, 3.0])),
    )


def expected(index: WindowIndex, split: Split) -> dict[str, list[Place]]:
    """Split by the rules in plain Python: lists, loops and every pair of windows."""
    places = places_of(index)
    numbers = {r: [p for p in places if p.recording == r] for r in {p.recording for p in places}}
    subjects = index.tables.fields["subject"]

    def group(place: Place, side: Side) -> str | None:
        if side.by == "subject":
            return subjects[place.recording]
        mine = numbers[place.recording]
        return str(mine.index(place) * side.n_blocks // len(mine))

    left, taken = places, {}
    for name in ("test", "valid", "train"):
        side: Side | None = getattr(split, name)
        chosen = left if name == "train" else []
        if side is not None:
            assert side.fraction is not None
            hashed = sorted((_place(split.seed, side.by, g), g) for g in {group(p, side) for p in left})
            names = [name for _, name in hashed]
            names = names[: max(1, math.floor(side.fraction * len(names) + 0.5))]
            chosen = [p for p in left if group(p, side) in names]
        taken[name] = chosen
        left = [p for p in left if p not in chosen]
    rates_hz = [index.tables.signals[name].rate_hz[0] for name in index.spec.signals]
    kept = taken["test"]
    for name in ("valid", "train"):
        taken[name] = [p for p in taken[name] if all(distance_s(p, q, rates_hz) >= split.gap_s for q in kept)]
        kept = kept + taken[name]
    return taken


@given(split_cases())
def test_sides_are_those_of_the_plain_rules(case: tuple[WindowIndex, Split]) -> None:
    """Sides, gaps and counts equal those of lists and loops; windows of two sides share no sample."""
    index, split = case
    want = expected(index, split)
    asked = ["train", *(name for name in ("valid", "test") if getattr(split, name))]
    if not all(want[name] for name in asked):
        with pytest.raises(InputError, match="No window is left for"):
            split_index(index, split)
        return

    sides = split_index(index, split)

    assert {name: places_of(side) for name, side in sides.items()} == {name: want[name] for name in asked}
    assert sum(sides.unused.values()) == len(index) - sum(len(want[name]) for name in asked)
    for one, other in itertools.combinations(sides.values(), 2):
        for p, q in itertools.product(places_of(one), places_of(other)):
            shares = zip(p.samples, q.samples, strict=True)
            assert p.recording != q.recording or all(a[1] <= b[0] or b[1] <= a[0] for a, b in shares)


def test_a_gap_beyond_the_recording_leaves_one_side() -> None:
    """A gap longer than the recording leaves nothing for training there, and the error counts."""
    index = make_index(["a"])
    split = Split(test=Side(by="block", fraction=0.5), within_subject=True, gap_s=1e9)

    with pytest.raises(
        InputError, match="left for train: of 10 windows, test 5, valid 0, train 0, too near 5"
    ):
        split_index(index, split)


# Values.


def test_sides_are_a_mapping_of_those_there_are() -> None:
    """Sides iterate over train, valid and test, as far as they were asked for; others are no keys."""
    sides = split_index(make_index(list("ab")), Split(test=Side(values=("b",))))

    assert (list(sides), len(sides), sides.valid) == (["train", "test"], 2, None)
    assert sides["test"] is sides.test
    for name in ("valid", "unused"):
        with pytest.raises(KeyError, match=name):
            sides[name]


def test_a_split_without_sides_trains_on_all() -> None:
    """With no side asked for, every window is for training."""
    sides = split_index(make_index(list("ab")), Split())

    assert (list(sides), len(sides.train)) == (["train"], 20)


def test_sides_travel_between_processes() -> None:
    """Sides are pickled whole."""
    sides = split_index(make_index(list("abc")), Split(test=Side(values=("b",))))
    copy: Sides = pickle.loads(pickle.dumps(sides))

    assert {name: side.fingerprint for name, side in copy.items()} == {
        name: side.fingerprint for name, side in sides.items()
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give one of the two"),
        ({"fraction": 0.1, "values": ("a",)}, "Give one of the two"),
        ({"fraction": 0.0}, "above 0 and at most 1"),
        ({"fraction": 1.5}, "above 0 and at most 1"),
        ({"fraction": math.nan}, "above 0 and at most 1"),
        ({"values": "abc"}, "not a tuple"),
        ({"by": "block", "fraction": 0.1, "n_blocks": 1}, "at least 2"),
    ],
)
def test_a_side_that_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    """A side takes a fraction or values, within their ranges."""
    with pytest.raises(InputError, match=message):
        Side(**settings)


@pytest.mark.parametrize("gap_s", [-1.0, math.inf, math.nan])
def test_a_gap_is_a_time(gap_s: float) -> None:
    """A gap is a finite number of seconds from 0 up."""
    with pytest.raises(InputError, match="gap_s is"):
        Split(gap_s=gap_s)


def test_a_side_is_a_side() -> None:
    """A fraction alone is told how it becomes a side, where it is written."""
    with pytest.raises(InputError, match=r"test=0.2 is no side. Write for example test=Side"):
        Split(test=0.2)  # type: ignore[arg-type]


def test_unknown_columns_and_groups_are_refused() -> None:
    """A column or group that there is not is named beside those that there are."""
    index = make_index(list("abc"))

    with pytest.raises(InputError, match="no column 'release'"):
        split_index(index, Split(test=Side(by="release", fraction=0.5)))
    with pytest.raises(InputError, match=r"No window has subject 'x'. Name some of its 3 values: a, b, c"):
        split_index(index, Split(test=Side(values=("a", "x"))))
    with pytest.raises(InputError, match="No window has block '10'"):
        split_index(index, Split(test=Side(by="block", values=("10",))))


def test_a_group_that_another_side_took_is_not_left() -> None:
    """A group that is named for two sides is the first one's, and the second is told."""
    index = make_index(list("abc"))

    with pytest.raises(InputError, match="left for valid: of 30 windows, test 10"):
        split_index(index, Split(test=Side(values=("a",)), valid=Side(values=("a",))))
