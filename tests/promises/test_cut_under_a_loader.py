"""Files that are cut, replaced or flipped under a loader are errors in their place, and kill nothing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engram
from engram.batches import loader as loader_module
from engram.batches.batch import Batch
from engram.errors import StoreDamaged
from engram.store.reader import Store
from engram.store.verify import verify
from engram.windows.spec import FixedWindows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:This process .* is multi-threaded:DeprecationWarning"
    ),  # fork is the point
]

SPEC = FixedWindows(signal="eeg", window_size_samples=100)
N_WINDOWS, BATCH_SIZE = 40, 5
"""Windows of a recording, which is a part; eight batches to a part."""


def build(path: Path, names: str = "abcd", *, other: str = "") -> Path:
    """Prepare recordings named by letters, one to a part of 800 KB; those in ``other`` have other samples."""
    recordings = {}
    for name in names:
        noise = np.random.default_rng((name in other, ord(name))).normal(0, 10, (100 * N_WINDOWS, 100))
        recordings[name] = engram.ArrayRecording({"eeg": engram.ArraySignal(noise.astype("float32"), 100.0)})
    engram.prepare(engram.ArraySource(recordings), path, part_bytes="900 kB").store.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four parts that no test changes."""
    path = build(tmp_path_factory.mktemp("whole") / "store")
    with Store(path) as store:
        assert len({extent.part.path for extent in store.extents("eeg")}) == 4
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def part_of(path: Path, name: str) -> Path:
    """Give the file of a recording's samples."""
    with Store(path) as store:
        return path / store.extent(name, "eeg").part.file


def in_a_process(scenario: Callable[[], Any]) -> Any:
    """Run a scenario in a process of its own, which must end by itself and well; give what it found."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(scenario()))
    process.start()
    theirs.close()
    try:
        found = mine.recv() if mine.poll(120) else None
    except EOFError:  # it was killed: its exit code says by what
        found = None
    process.join(60)
    code = process.exitcode
    process.close()
    mine.close()
    assert code == 0
    return found


def passing(path: Path, change: Callable[[int], None], **options: Any) -> tuple[list[bytes], str]:
    """Pass through a store and change it after some batch; give the bytes of all batches, and the error."""
    found: list[bytes] = []
    with Store(path) as store:
        loader = store.windows(SPEC).loader(BATCH_SIZE, **{"memory": "30 MB", "threads": 2, **options})
        is_checked = "check" in options
        assert loader.is_direct == (
            not is_checked and loader_module._is_cache_useless(loader.windows, loader.order)
        )
        try:
            for number, batch in enumerate(loader):
                found.append(bytes_of(batch))
                change(number)
        except StoreDamaged as error:
            return found, str(error)
    return found, ""


def bytes_of(batch: Batch) -> bytes:
    """Give the samples of a batch."""
    return batch.signals["eeg"].numpy().tobytes()


@pytest.fixture(scope="module")
def expected(whole: Path) -> list[bytes]:
    """The bytes of the 32 batches of the whole store."""
    found, error = passing(whole, lambda _: None)
    assert (len(found), error) == (32, "")
    return found


@pytest.fixture(params=["page cache", "past it"])
def way(request: pytest.FixtureRequest, whole: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that a file is read; what is forked in a test reads in the same."""
    if request.param == "past it":
        with Store(whole) as store:
            if not store.windows(SPEC).can_be_read_directly():
                pytest.skip("temporary files cannot be read past the page cache here")
        monkeypatch.setattr(loader_module, "_is_cache_useless", lambda *_: True)
    return str(request.param)


def after(wanted: int, change: Callable[[], None]) -> Callable[[int], None]:
    """Do something once, after the batch of this number."""
    return lambda number: change() if number == wanted else None


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.usefixtures("way")
def test_a_part_that_is_shortened_is_an_error_at_the_first_batch_that_lacks_samples(
    path: Path, expected: list[bytes], threads: int
) -> None:
    """All batches before it are right, and no signal kills the process.

    The part is open and was read from; what is cut off lies further on than five batches read ahead.
    """
    file = part_of(path, "b")

    def scenario() -> tuple[list[bytes], str]:
        # Batch 8 is the part's first; the file ends in the last window of batch 14.
        def cut() -> None:
            os.truncate(file, (6 * BATCH_SIZE + 4) * 100 * 200 + 7)

        return passing(path, after(8, cut), threads=threads)

    found, error = in_a_process(scenario)
    assert found == expected[:14]
    assert error == (
        f"{file.relative_to(path)} ends at byte 680007, it should have {file_bytes(path, 'b')}. "
        "Run engram verify."
    )


def file_bytes(path: Path, name: str) -> int:
    """Give how long a recording's file should be."""
    with Store(path) as store:
        return store.extent(name, "eeg").part.grid.file_bytes


@pytest.mark.parametrize("size_bytes", [0, 100_000])
@pytest.mark.usefixtures("way")
def test_a_part_that_is_shortened_before_it_is_opened_is_an_error_at_its_first_batch(
    path: Path, expected: list[bytes], size_bytes: int
) -> None:
    """Even if that batch's own samples are there."""
    file = part_of(path, "c")
    found, error = in_a_process(lambda: passing(path, after(2, lambda: os.truncate(file, size_bytes))))
    assert found == expected[:16]
    assert f"c/0/0 ends at byte {size_bytes}" in error


@pytest.mark.usefixtures("way")
def test_a_part_that_is_gone_is_an_error_at_its_first_batch(path: Path, expected: list[bytes]) -> None:
    """With its name."""
    file = part_of(path, "c")
    found, error = in_a_process(lambda: passing(path, after(2, file.unlink)))
    assert found == expected[:16]
    assert error == f"{file.relative_to(path)} is missing. Run engram verify."


@pytest.mark.usefixtures("way")
def test_a_part_that_is_replaced_is_served_to_the_end_as_it_was_opened(
    path: Path, expected: list[bytes]
) -> None:
    """A rename over a file that is open, and even its removal, is seen by nobody who reads it."""
    file = part_of(path, "a")

    def replace() -> None:
        other = file.with_name("other")
        other.write_bytes(bytes(1000))
        other.replace(file)

    found, error = in_a_process(lambda: passing(path, after(0, replace)))
    assert (found, error) == (expected, "")


@pytest.mark.usefixtures("way")
def test_recordings_that_are_appended_disturb_no_pass(path: Path, expected: list[bytes]) -> None:
    """Parts opened afterwards are still those of the tables that were read."""

    def append() -> None:
        build(path, "abcdef")

    found, error = passing(path, after(1, append))
    assert (found, error) == (expected, "")
    with Store(path) as store:
        assert len(store.windows(SPEC)) == 6 * N_WINDOWS


def anew(path: Path) -> None:
    """Prepare a store in the place of another; only c and d have other samples."""
    shutil.rmtree(path)
    build(path, other="cd")


@pytest.mark.usefixtures("way")
def test_a_store_that_is_prepared_anew_is_an_error_at_the_first_part_that_is_another(
    path: Path, expected: list[bytes]
) -> None:
    """Files that are open are served; those opened afterwards must be the ones that were described."""
    found, error = in_a_process(lambda: passing(path, after(1, lambda: anew(path))))
    assert found == expected[:16]
    assert error == f"{path} was prepared anew since it was opened. Open it again."


def test_a_store_that_is_prepared_anew_is_an_error_in_spawned_workers(path: Path) -> None:
    """They open files of their own, by the tables that their parent read."""
    with Store(path) as store:
        stream = store.windows(SPEC).iterable(BATCH_SIZE)
        first = bytes_of(next(iter(stream)))
        anew(path)
        passing: Any = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=1, multiprocessing_context="spawn"
        )
        batches: Iterator[Batch] = iter(passing)
        assert bytes_of(next(batches)) == first
        with pytest.raises(StoreDamaged, match="was prepared anew since it was opened"):
            list(batches)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_flipped_byte_is_found_by_who_checks(path: Path, expected: list[bytes], threads: int) -> None:
    """At the first batch that touches its block; without a check it is delivered, and verify finds it."""
    file = part_of(path, "b")
    place = 20 * 100 * 200  # in the first window of batch 12

    def flip() -> None:
        with file.open("r+b") as opened:
            byte = os.pread(opened.fileno(), 1, place)
            os.pwrite(opened.fileno(), bytes([byte[0] ^ 1]), place)

    with Store(path) as store:
        grid = store.extent("b", "eeg").part.grid
    block = place // grid.block_bytes
    # Batches of 500 samples; the block begins in batch 11.
    first = 8 + block * grid.block_samples // (100 * BATCH_SIZE)

    found, error = passing(path, after(2, flip), check="crc", threads=threads, memory="14 MB")
    assert found == expected[:first]
    assert error.startswith(f"Block {block} of {file.relative_to(path)} (samples ")
    assert error.endswith("is not what was written. Run engram verify.")

    found, error = passing(path, lambda _: None, threads=threads)
    assert error == ""
    assert [n for n, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other] == [12]
    assert [damage.path for damage in verify(path).damages] == [str(file.relative_to(path))]


def test_a_checked_pass_of_a_sound_store_is_the_same(whole: Path, expected: list[bytes]) -> None:
    """Over all blocks, the last of each part too."""
    assert passing(whole, lambda _: None, check="crc") == (expected, "")


PROGRAM = """
import sys
import engram
from engram.windows.spec import FixedWindows
loader = engram.open(sys.argv[1]).windows(FixedWindows(signal="eeg", window_size_samples=100)).loader(5)
batches = iter(loader)
print(next(batches).numbers.tolist())
"""


def test_a_program_that_ends_in_the_middle_of_a_pass_ends_at_once_and_well(whole: Path) -> None:
    """Threads that read keep nobody waiting, and say nothing."""
    command = [sys.executable, "-c", PROGRAM, str(whole)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[0, 1, 2, 3, 4]\n", "")
