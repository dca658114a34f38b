"""A training that was broken off anywhere ends with the weights and losses of an unbroken one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.batches.windows import SplitWindows
from engram.errors import DoesNotFit, InputError
from engram.ledger import Ledger, MemoryLine
from engram.store.reader import Store
from engram.training.resume import (
    History,
    check_same,
    get_rng,
    read_checkpoint,
    set_rng,
    write_checkpoint,
)
from engram.training.settings import FitSettings
from engram.windows.targets import RecordingColumn

PROGRAM = Path(__file__).with_name("program.py")
program = runpy.run_path(str(PROGRAM))
Killed: type[BaseException] = program["Killed"]
train: Callable[..., Any] = program["train"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 8 recordings."""
    path = tmp_path_factory.mktemp("prepared") / "store"
    program["make_store"](path).close()
    return path


@pytest.fixture
def sides(prepared: Path) -> Iterator[SplitWindows]:
    """40 windows to train on, 20 to validate, 20 to test."""
    store = Store(prepared)
    yield program["make_sides"](store)
    store.close()


def train_in_parts(sides: SplitWindows, folder: Path, kill_at: int, **settings: Any) -> int:
    """Train, die at a call of the network, go on, die at that call again, to the end; count the parts."""
    for n_parts in range(1, 40):
        try:
            train(sides, folder, kill_at, **settings)
        except Killed:
            continue
        return n_parts
    raise AssertionError("the training does not come forward")


def assert_same(one: Path, other: Path) -> None:
    """Compare two finished trainings bit for bit, but for the time they took."""
    for name in ("last", "best"):
        weights, others = program["weights"](one, name), program["weights"](other, name)
        assert list(weights) == list(others)
        for key, weight in weights.items():
            assert torch.equal(weight, others[key]), key
    a, b = Ledger.read(one), Ledger.read(other)
    timeless = [
        [
            (line.epoch, line.train_loss, line.valid_loss, line.valid_score, line.learning_rate)
            for line in lines
        ]
        for lines in (a.epochs, b.epochs)
    ]
    assert timeless[0] == timeless[1]
    assert (a.scores, a.best_epoch, a.stopped) == (b.scores, b.best_epoch, b.stopped)
    assert (one / "predictions.parquet").read_bytes() == (other / "predictions.parquet").read_bytes()


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "accumulation, cosine, clipping": {
        "accumulate": 4,
        "scheduler": "cosine",
        "warmup_epochs": 0.5,
        "clip_norm": 1.0,
    },
    "onecycle, sgd, elastic net": {
        "accumulate": 2,
        "scheduler": "onecycle",
        "optimizer": "sgd",
        "momentum": 0.9,
        "learning_rate": 1e-4,
        "l1": 1e-3,
        "l2": 1e-3,
    },
    "plateau, adamax, huber, early stopping": {
        "epochs": 6,
        "scheduler": "plateau",
        "optimizer": "adamax",
        "loss": "huber",
        "patience": 1,
        "learning_rate": 0.3,
    },
    "half precision": {"precision": "bf16-mixed"},
    "one recording per batch": {"mode": "groups", "by": "recording"},
    "balanced": {"mode": "balanced", "by": "group"},
    "few checkpoints": {"checkpoint_every_steps": 3},
    "noise, dropped channels, masks": {"noise": 3.0, "channel_dropout": 0.3, "time_mask_samples": 12},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_in_many_parts_ends_as_an_unbroken_one(
    sides: SplitWindows, tmp_path: Path, variant: str
) -> None:
    """Whatever the order, accumulation, schedule, optimizer and precision, and wherever it dies."""
    train(sides, tmp_path / "whole", **VARIANTS[variant])
    assert train_in_parts(sides, tmp_path / "parts", 9, **VARIANTS[variant]) > 2
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_classification_in_many_parts_ends_as_an_unbroken_one(prepared: Path, tmp_path: Path) -> None:
    """Classes are no other case."""
    store = Store(prepared)
    sides = program["make_sides"](store, RecordingColumn("group", "classification"))
    train(sides, tmp_path / "whole")
    train_in_parts(sides, tmp_path / "parts", 6)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    store.close()


@pytest.mark.slow
def test_a_kill_at_any_call_of_the_network_is_resumed_exactly(sides: SplitWindows, tmp_path: Path) -> None:
    """Before the first step, inside an accumulation, in validation, between epochs, in the last scoring."""
    train(sides, tmp_path / "whole", accumulate=4)
    n_calls = 3 * (5 + 3) + 3 + 3
    for kill_at in range(n_calls):
        with pytest.raises(Killed):
            train(sides, tmp_path / f"{kill_at}", kill_at, accumulate=4)
        train(sides, tmp_path / f"{kill_at}", accumulate=4)
        assert_same(tmp_path / f"{kill_at}", tmp_path / "whole")


@pytest.mark.parametrize("written", [1, 4, 5, 8])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    sides: SplitWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Half a file is never taken for a checkpoint."""
    train(sides, tmp_path / "whole")
    save, n_saved = torch.save, 0

    def half(content: Any, file: Any) -> None:
        nonlocal n_saved
        n_saved += 1
        save(content, file)
        if n_saved == written:
            file.truncate(file.tell() // 2)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            train(sides, tmp_path / "parts")
    train(sides, tmp_path / "parts")
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_training_is_not_repeated(sides: SplitWindows, tmp_path: Path) -> None:
    """It says so and gives back what is there."""
    first = train(sides, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    again = train(sides, tmp_path, kill_at=0)
    assert again.ledger == first.ledger
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == files
    for key, weight in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], weight)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 0.5}, r"settings\.learning_rate = 0\.01, not 0\.5"),
        ({"seed": 3}, r"settings\.seed"),
        ({"epochs": 9}, r"settings\.epochs"),
    ],
)
def test_another_training_in_the_folder_is_refused_by_name(
    sides: SplitWindows, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    """Settings that the weights depend on may not change between two parts."""
    with pytest.raises(Killed):
        train(sides, tmp_path, 6)
    with pytest.raises(InputError, match=named):
        train(sides, tmp_path, **changed)


def test_other_windows_and_another_model_are_refused_by_name(sides: SplitWindows, tmp_path: Path) -> None:
    """So may neither windows nor the model's weights."""
    with pytest.raises(Killed):
        train(sides, tmp_path, 6)
    store = program["make_store"](tmp_path / "other store", n_samples=550)
    with pytest.raises(InputError, match="other windows on its side train"):
        train(program["make_sides"](store), tmp_path)
    store.close()
    narrow = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(200, 1))
    settings = program["FitSettings"](
        epochs=3, batch_size=8, accelerator="cpu", checkpoint_every_steps=1, learning_rate=1e-2
    )
    with pytest.raises(InputError, match=r"model\.1\.weight"):
        program["fit"](narrow, sides, tmp_path, settings)


def test_settings_that_change_no_weight_may_change(sides: SplitWindows, tmp_path: Path) -> None:
    """A training that was short of memory goes on with more of it."""
    train(sides, tmp_path / "whole")
    with pytest.raises(Killed):
        train(sides, tmp_path / "parts", 6)
    free = {"memory": "8 GB", "memory_share": 0.9, "memory_every_steps": 1, "checkpoint_every_steps": 2}
    train(sides, tmp_path / "parts", **free)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_folder_with_a_training_is_refused_where_a_new_one_is_asked_for(
    sides: SplitWindows, tmp_path: Path
) -> None:
    """``resume=False`` never overwrites."""
    with pytest.raises(Killed):
        train(sides, tmp_path, 6)
    with pytest.raises(InputError, match="already holds a training"):
        program["fit"](program["Network"](), sides, tmp_path, resume=False)


# ---------------------------------------------------------------- several processes


def train_on_two_ranks(
    store: Path, folder: Path, settings: Mapping[str, Any], kill_at: int = -1, network: str = "Network"
) -> list[int]:
    """Train with 2 processes over gloo, as a cluster would start them; give their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "OMP_NUM_THREADS": "1",
        }
        arguments = [str(store), str(folder), json.dumps(settings), str(kill_at), network]
        command = [sys.executable, str(PROGRAM), *arguments]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE))
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    assert set(codes) <= {0, -signal.SIGKILL, 1} if kill_at >= 0 else codes == [0, 0], said
    return codes


@pytest.mark.slow
def test_two_processes_are_resumed_exactly(prepared: Path, tmp_path: Path) -> None:
    """Random states of every rank are kept; the kill is inside an accumulation of the second epoch."""
    settings = {
        "epochs": 2,
        "batch_size": 8,
        "accumulate": 2,
        "accelerator": "cpu",
        "devices": 2,
        "checkpoint_every_steps": 1,
        "learning_rate": 0.01,
    }
    train_on_two_ranks(prepared, tmp_path / "whole", settings)
    codes = train_on_two_ranks(prepared, tmp_path / "parts", settings, kill_at=5 + 3 + 3)
    assert -signal.SIGKILL in codes
    train_on_two_ranks(prepared, tmp_path / "parts", settings)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(prepared: Path, sides: SplitWindows, tmp_path: Path) -> None:
    """Losses weighted by rows give the gradient of one process: also where shares differ (5 and 4 of 9)."""
    settings: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 9,
        "accumulate": 3,
        "accelerator": "cpu",
        "optimizer": "sgd",
        "learning_rate": 1e-4,
        "l1": 1e-3,
    }
    train_on_two_ranks(prepared, tmp_path / "two", {**settings, "devices": 2}, network="Plain")
    program["fit"](program["Plain"](), sides, tmp_path / "one", FitSettings(**settings))
    one, two = (program["weights"](tmp_path / name) for name in ("one", "two"))
    start = program["Plain"]().state_dict()
    for key, weight in one.items():
        assert not torch.equal(weight, start[key])
        torch.testing.assert_close(two[key], weight, rtol=1e-5, atol=1e-6)
    losses = [[line.train_loss for line in Ledger.read(tmp_path / name).epochs] for name in ("one", "two")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    scores = [[score.value for score in Ledger.read(tmp_path / name).scores] for name in ("one", "two")]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)


# ---------------------------------------------------------------- the parts


def test_a_checkpoint_that_would_execute_something_is_refused(tmp_path: Path) -> None:
    """Checkpoints are data: a stranger's file runs nothing."""
    path = tmp_path / "last.ckpt"
    torch.save({"version": 1, "model": subprocess.run}, path)
    with pytest.raises(InputError, match="more than tensors"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no archive", pickle.dumps({"version": 1}, protocol=2)[:-3]]
)
def test_a_damaged_checkpoint_is_told(tmp_path: Path, content: bytes) -> None:
    """By its name, with what to do."""
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt"):
        read_checkpoint(path)


def test_a_flipped_bit_is_told(tmp_path: Path) -> None:
    """It would be another weight, and nobody would know."""
    path = tmp_path / "best.ckpt"
    write_checkpoint(path, {"model": {"weight": torch.full((1000,), 1.5)}})
    content = bytearray(path.read_bytes())
    content[content.index(np.full(1000, 1.5, np.float32).tobytes()) + 402] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        read_checkpoint(path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as what it is, and the file that was begun does not fill the disk further."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, {"epoch": 1})

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFit, match="is full") as caught:
        write_checkpoint(path, {"epoch": 2})
    assert caught.value.resource == "disk"
    assert read_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told_through_pytorchs_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which fails a second time while it closes, and raises that."""
    (tmp_path / "last.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(DoesNotFit, match="is full"):
        write_checkpoint(tmp_path / "last.ckpt", {"weight": torch.zeros(1_000_000)})
    assert not list(tmp_path.iterdir())


def test_weights_alone_are_nothing_to_go_on_from(sides: SplitWindows, tmp_path: Path) -> None:
    """The best weights, copied over the last checkpoint, lack the optimizer."""
    train(sides, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "last.ckpt").write_bytes((folder / "best.ckpt").read_bytes())
    with pytest.raises(InputError, match="weights alone"):
        train(sides, tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    """What it would mean is not guessed."""
    torch.save({"version": 0}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="no checkpoint that this Engram reads"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Tensors, numbers, text, lists, dicts, infinities."""
    content = {"a": torch.arange(3), "b": [1, 2.5, "x", float("inf")], "c": {"d": None}}
    write_checkpoint(tmp_path / "last.ckpt", content)
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(found.pop("a"), torch.arange(3))
    assert found == {"version": 1, "b": content["b"], "c": content["c"]}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def draw() -> list[float]:
    """Draw from every global generator, the normal ones twice: they keep a number back."""
    return [
        random.random(),
        random.gauss(),
        random.gauss(),
        float(np.random.normal()),  # noqa: NPY002 - the global generator is what is tested
        float(np.random.uniform()),  # noqa: NPY002 - as above
        float(torch.rand(())),
    ]


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_random_generators_go_on_where_they_were(seed: int, n_draws: int) -> None:
    """Python's, NumPy's and PyTorch's, also with a normal number kept back, through a file's plain values."""
    before = get_rng()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - as above
    torch.manual_seed(seed)
    for _ in range(n_draws):
        random.gauss()
        np.random.normal()  # noqa: NPY002 - as above
    state = get_rng()
    drawn = draw()
    set_rng(state)
    assert draw() == drawn
    set_rng(before)


def test_the_first_field_that_differs_is_named() -> None:
    """Also one that is missing on one side."""
    check_same({"a": 1}, {"a": 1}, Path("folder"))
    with pytest.raises(InputError, match="folder has other windows on its side train"):
        check_same({"windows.train": "3f17"}, {"windows.train": "90e3"}, Path("folder"))
    with pytest.raises(InputError, match=r"has b = 2, not None"):
        check_same({"a": 1, "b": 2}, {"a": 1}, Path("folder"))


@given(st.integers(0, 9000))
def test_memory_lines_stay_few_and_evenly_spaced(n_readings: int) -> None:
    """At most 2000 lines, the first among them, at equal distances; the peak is of all readings."""
    history = History()
    for step in range(n_readings):
        history.note_memory(MemoryLine(0.0, step, 10 * (step == n_readings // 2) + 1))
    steps = [line.step for line in history.memory]
    assert steps == list(range(0, n_readings, history.readings_per_line))
    assert len(steps) <= 2000
    assert history.peak_bytes == (11 if n_readings else 0)
    assert History.from_dict(history.to_dict()) == history
