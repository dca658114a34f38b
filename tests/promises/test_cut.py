"""A power cut before any single operation on files leaves a sound old store and a build that resumes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram.preparation.ingest import prepare
from engram.preparation.steps import Scale
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.recordings.recording import Channel
from engram.store.verify import verify
from engram.testing.stores import digest

pytestmark = pytest.mark.slow

OPERATIONS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


class _Cut(BaseException):
    """The power is gone: nothing of ours may catch it, and nothing reaches the disk any more."""


@contextmanager
def cut_before(number: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Raise at one operation on files and at every one after it; None only counts them."""
    done: list[str] = []

    def counting(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if number is not None and len(done) >= number:
                raise _Cut
            done.append(name)
            return operation(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counting(name, getattr(os, name)))
        yield done


def source(names: str) -> ArraySource:
    """Make small recordings of EEG, each named by a letter."""
    channels = (Channel("Fz"), Channel("Cz"))
    recordings = {}
    for name in names:
        x = np.random.default_rng(ord(name)).normal(0, 20, (500, 2))
        recordings[name] = ArrayRecording({"eeg": ArraySignal(x, 100.0, channels=channels)})
    return ArraySource(recordings)


def build(store: Path, names: str, steps: list[Any]) -> None:
    """Prepare into groups of two recordings."""
    prepare(source(names), store, steps=steps, part_bytes="16 kB", memory="4 GB").store.close()


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [("", "abc", []), ("ab", "abcd", []), ("ab", "ab", [Scale(2.0)])],
    ids=["a first build", "an append", "a rebuild that drops the old call"],
)
def test_a_cut_before_any_operation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, steps: list[Any]
) -> None:
    """One cut per operation, in turn: what was there is sound, and run again the bytes are the same."""
    base, whole, store = tmp_path / "base", tmp_path / "whole", tmp_path / "store"
    if before:
        build(base, before, [])
        shutil.copytree(base, whole)
    with cut_before(None, monkeypatch) as operations:
        build(whole, after, steps)
    expected = digest(whole)
    assert len(operations) > 50

    for number in range(len(operations)):
        shutil.rmtree(store, ignore_errors=True)
        if before:
            shutil.copytree(base, store)
        with cut_before(number, monkeypatch), pytest.raises(_Cut):
            build(store, after, steps)
        if (store / "manifest.json").exists():
            assert verify(store).is_sound, f"after {operations[:number][-3:]}"
        build(store, after, steps)
        assert digest(store) == expected, f"cut before operation {number}, {operations[number]}"
