"""From a source to a store, once."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engram.errors import DoesNotFit, InputError, SourceError, StoreLocked
from engram.memory.usage import read_usage
from engram.preparation import fingerprint as fingerprint_module
from engram.preparation import group as group_module
from engram.preparation import ingest
from engram.preparation.group import GroupTask
from engram.preparation.ingest import Progress, prepare
from engram.preparation.raw_steps import RawStep
from engram.preparation.steps import Clip, DropFlat, HighPass, Resample, Scale
from engram.recordings.bids import BidsSource
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.recordings.recording import Channel
from engram.store import crc
from engram.store.reader import Store
from engram.store.verify import verify
from engram.store.writer import locked
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.testing.kinds import make_arrays, make_source
from engram.testing.stores import digest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the notes on files out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two releases of three subjects, two runs and rest each, with every fault that is planted."""
    root = tmp_path_factory.mktemp("corpus")
    write_hbn(root, HbnCorpus(n_subjects=3, n_runs=2, n_trials=3, rest_s=20))
    return root


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    """A corpus that a test may change."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def eeg(n_samples: int = 1000, n_channels: int = 4, *, seed: int = 0, offset: float = 0.0) -> ArraySignal:
    """Draw noise of 20 microvolts with an offset."""
    x = np.random.default_rng(seed).normal(offset, 20, (n_samples, n_channels))
    return ArraySignal(x, 100.0, channels=tuple(Channel(f"E{c}") for c in range(n_channels)))


def one(signal: ArraySignal, name: str = "eeg") -> ArraySource:
    """Make a source of one recording, ``a``, with one signal."""
    return ArraySource({"a": ArrayRecording({name: signal})})


def test_a_corpus_becomes_a_store_and_its_faults_are_named(corpus: Path, tmp_path: Path) -> None:
    """What can be read is stored as MNE reads it; what cannot is refused by name."""
    prepared = prepare(corpus, tmp_path / "store")
    import mne

    truncated = [refusal for refusal in prepared.refusals if refusal.reason == "unreadable"]
    assert len(truncated) == 1
    assert "is truncated" in truncated[0].detail
    assert prepared.n_prepared + len(prepared.refusals) == len(BidsSource(corpus).entries())
    assert verify(tmp_path / "store").is_sound
    for entry in BidsSource(corpus).entries()[:4]:
        raw = mne.io.read_raw_bdf(entry.files[0].path, verbose="ERROR")
        expected = raw.get_data(units="uV").T.astype(np.float32).astype(np.float16)
        assert np.array_equal(prepared.store.read(entry.id, "eeg"), expected.astype(np.float32))
    prepared.store.close()


def test_another_release_is_appended_and_nothing_is_done_twice(corpus: Path, tmp_path: Path) -> None:
    """The first release's bytes stay as they are; the second call does only the second."""
    first = prepare(BidsSource(corpus, releases="R1"), tmp_path / "store")
    before = digest(tmp_path / "store")
    second = prepare(BidsSource(corpus, releases=["R1", "R2"]), tmp_path / "store")
    after = digest(tmp_path / "store")

    assert (first.n_unchanged, second.n_unchanged) == (0, first.n_prepared)
    assert second.store.recordings.num_rows == first.n_prepared + second.n_prepared
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: value for name, value in before.items() if name != "manifest.json"
    }
    assert verify(tmp_path / "store").is_sound


def test_called_again_with_nothing_new_it_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    """Not a byte, and refused recordings are refused again with the same words."""
    first = prepare(corpus, tmp_path / "store")
    before = digest(tmp_path / "store")
    again = prepare(corpus, tmp_path / "store")

    assert (again.n_prepared, again.n_unchanged) == (0, first.n_prepared)
    assert set(again.refusals) == set(first.refusals)
    assert digest(tmp_path / "store") == before


def test_a_copy_of_the_corpus_elsewhere_gives_the_same_store(
    corpus: Path, copy: Path, tmp_path: Path
) -> None:
    """No path, time or host goes into a store; a moved corpus is not prepared again."""
    prepare(corpus, tmp_path / "one")
    prepare(copy, tmp_path / "two")
    again = prepare(copy, tmp_path / "one")

    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert again.n_prepared == 0


def test_one_changed_byte_is_seen_and_its_recording_done_again(copy: Path, tmp_path: Path) -> None:
    """In the middle of a file of the same size; the reason is shown, the others stay."""
    first = prepare(copy, tmp_path / "store")
    stored = set(first.store.recordings["recording"].to_pylist())
    entry = next(entry for entry in BidsSource(copy).entries() if entry.id in stored)
    data = bytearray(entry.files[0].path.read_bytes())
    data[len(data) // 2] ^= 1
    entry.files[0].path.write_bytes(data)
    before = first.store.read(entry.id, "eeg")
    again = prepare(copy, tmp_path / "store")

    assert again.changed == {entry.id: "its files changed"}
    assert (again.n_prepared, again.n_unchanged) == (1, first.n_prepared - 1)
    assert not np.array_equal(again.store.read(entry.id, "eeg"), before)
    assert again.store.recordings.num_rows == first.n_prepared
    assert verify(tmp_path / "store").is_sound
    first.store.close()
    again.store.close()


def test_a_changed_participant_is_a_reason_of_its_own(copy: Path, tmp_path: Path) -> None:
    """The recordings of that subject, and no others."""
    first = prepare(copy, tmp_path / "store")
    subject = first.store.recordings["subject"].to_pylist()[-1]
    for table in copy.glob("*/participants.tsv"):
        rows = table.read_text().split("\n")
        table.write_text(
            "\n".join(
                row.replace("\tM\t", "\tX\t").replace("\tF\t", "\tX\t") if subject in row else row
                for row in rows
            )
        )
    again = prepare(copy, tmp_path / "store")

    assert set(again.changed.values()) == {"its descriptive fields changed"}
    assert set(again.changed) == {
        row["recording"] for row in first.store.recordings.to_pylist() if row["subject"] == subject
    }


def test_other_steps_replace_everything_and_clear_the_disk(corpus: Path, tmp_path: Path) -> None:
    """All recordings done again, the old call's files are gone."""
    first = prepare(corpus, tmp_path / "store")
    again = prepare(corpus, tmp_path / "store", steps=[HighPass(1.0)])

    assert set(again.changed.values()) == {"steps or precision changed"}
    assert again.n_prepared == first.n_prepared
    assert [call.number for call in again.store.manifest.calls] == [1]
    assert not list((tmp_path / "store").glob("*/0000*"))
    assert verify(tmp_path / "store").unlisted == ()


def test_steps_are_never_mixed_in_one_store(corpus: Path, tmp_path: Path) -> None:
    """A release whose raw files are gone cannot be done again, so other steps are refused."""
    prepare(BidsSource(corpus, releases="R1"), tmp_path / "store")
    before = digest(tmp_path / "store")

    with pytest.raises(InputError, match="prepared with other steps or precision"):
        prepare(BidsSource(corpus, releases="R2"), tmp_path / "store", steps=[HighPass(1.0)])
    assert digest(tmp_path / "store") == before


def test_steps_that_refuse_what_the_store_holds_leave_the_store_as_it_is(tmp_path: Path) -> None:
    """A precision mistyped on 3,000 recordings may not cost 2,999 of them."""
    recordings = {"a": ArrayRecording({"eeg": eeg()}), "b": ArrayRecording({"eeg": eeg(offset=3e4)})}
    prepare(ArraySource(recordings), tmp_path / "store", precision="float32")

    with pytest.raises(InputError, match=r"holds 1 recordings that these .* would refuse, such as b"):
        prepare(ArraySource(recordings), tmp_path / "store")
    with Store(tmp_path / "store") as store:
        assert store.recordings["recording"].to_pylist() == ["a", "b"]
        assert len(store.read("b", "eeg")) == 1000
    again = prepare(ArraySource(recordings), tmp_path / "store", precision="float32")
    assert (again.n_prepared, again.n_unchanged) == (0, 2)
    assert verify(tmp_path / "store").unlisted == ()


def test_a_folder_of_somebody_else_is_not_touched(corpus: Path, tmp_path: Path) -> None:
    """Its own parts, tables and building are no leftovers of ours."""
    for name in ("parts/deep/thesis.txt", "tables/results.parquet", "building/plan.dwg"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    before = digest(tmp_path / "mine")

    with pytest.raises(InputError, match=r"mine is no store and is not empty: it holds building/plan.dwg"):
        prepare(corpus, tmp_path / "mine")
    with pytest.raises(InputError, match="is no store and is not empty"):
        prepare(corpus, corpus)
    assert digest(tmp_path / "mine") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        prepare(corpus, tmp_path / "file")


def test_strangers_in_a_store_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    """What is not named as ours is not removed, links included."""
    prepare(corpus, tmp_path / "store")
    (tmp_path / "store/tables/mine.csv").write_text("mine")
    (tmp_path / "precious").mkdir()
    (tmp_path / "store/parts/9999-00000-eeg-0").symlink_to(tmp_path / "precious")
    prepare(corpus, tmp_path / "store", steps=[HighPass(1.0)])

    assert (tmp_path / "store/tables/mine.csv").read_text() == "mine"
    assert (tmp_path / "precious").is_dir()
    assert verify(tmp_path / "store").is_sound


def test_an_unreadable_file_is_a_refusal_and_not_the_stores_fault(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector under one recording does not stop the others."""
    bad = BidsSource(copy).entries()[0]
    original = crc.file_crc32c

    def read(path: Path) -> int:
        if path == bad.files[0].path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path)

    monkeypatch.setattr(fingerprint_module, "file_crc32c", read)
    prepared = prepare(copy, tmp_path / "store")

    refusal = next(refusal for refusal in prepared.refusals if refusal.id == bad.id)
    assert (refusal.reason, "Input/output error" in refusal.detail) == ("unreadable", True)
    assert prepared.n_prepared > 5


def test_any_column_name_of_a_table_is_a_column(corpus: Path, copy: Path, tmp_path: Path) -> None:
    """events.tsv is the user's: table, self and recording are names like any other."""
    for path in copy.rglob("*_events.tsv"):
        rows = path.read_text().splitlines()
        longer = [rows[0] + "\ttable\tself\trecording", *(row + "\ta\tb\tc" for row in rows[1:])]
        path.write_text("\n".join(longer))
    with prepare(copy, tmp_path / "store").store as store:
        assert {"table", "self", "event_recording"} <= set(store.events.column_names)


def test_more_memory_between_kill_and_resume_counts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal for memory is not taken over: it advised to give more."""
    original = group_module._check_fits

    def check(task: Any, entry: Any, n_bytes: int, why: str) -> None:
        original(replace(task, blocks_bytes=0), entry, n_bytes, why)

    prepare(corpus, tmp_path / "whole", part_bytes="2 MB")
    with monkeypatch.context() as patch:
        patch.setattr(group_module, "_check_fits", check)
        stop_after(patch, 2)
        with pytest.raises(_Stopped):
            prepare(corpus, tmp_path / "store", part_bytes="2 MB")
    prepare(corpus, tmp_path / "store", part_bytes="2 MB")

    assert digest(tmp_path / "store") == digest(tmp_path / "whole")


def test_a_group_that_lost_a_file_before_the_commit_is_built_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill inside the clearing of an old build, or a part that went missing."""
    prepare(corpus, tmp_path / "whole", part_bytes="2 MB")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(_Stopped):
            prepare(corpus, tmp_path / "store", part_bytes="2 MB")
    shutil.rmtree(next((tmp_path / "store/parts").glob("0000-00000-*")))
    (tmp_path / "store/building/0000-00001/scales.parquet").unlink()
    prepare(corpus, tmp_path / "store", part_bytes="2 MB")

    assert digest(tmp_path / "store") == digest(tmp_path / "whole")
    assert verify(tmp_path / "store").is_sound


def test_refusals_are_told_once_and_as_long_as_they_are_true(tmp_path: Path) -> None:
    """Over several calls, each of which refuses the same recording again."""
    good = {name: ArrayRecording({"eeg": eeg(seed=i)}) for i, name in enumerate("abc")}
    bad = {"x": ArrayRecording({"eeg": eeg(offset=1e5)})}
    for n in (1, 2, 3):
        prepare(ArraySource(bad | dict(list(good.items())[:n])), tmp_path / "store")
    with Store(tmp_path / "store") as store:
        assert store.table("refusals")["recording"].to_pylist() == ["x"]


def test_an_id_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    """A source of somebody's own may do that."""

    class Twice(ArraySource):
        def entries(self) -> tuple[Any, ...]:
            return (*super().entries(), *super().entries())

    with pytest.raises(InputError, match="lists 'a' more than once"):
        prepare(Twice({"a": ArrayRecording({"eeg": eeg()})}), tmp_path / "store")


@pytest.mark.parametrize("content", ["[]", "\udcff", "{"])
def test_notes_that_are_none_are_read_as_none(corpus: Path, tmp_path: Path, content: str) -> None:
    """The files are then read once more."""
    prepare(corpus, tmp_path / "store")
    for path in (tmp_path / "cache/engram").iterdir():
        path.write_text(content, errors="surrogateescape")

    assert prepare(corpus, tmp_path / "store").n_prepared == 0


def test_a_source_that_breaks_later_leaves_what_is_stored(copy: Path, tmp_path: Path) -> None:
    """With the same steps, the store keeps the samples that it has."""
    first = prepare(copy, tmp_path / "store")
    key = first.store.recordings["recording"][0].as_py()
    entry = next(entry for entry in BidsSource(copy).entries() if entry.id == key)
    entry.files[0].path.write_bytes(b"not a recording any more")
    again = prepare(copy, tmp_path / "store")

    assert key in {refusal.id for refusal in again.refusals}
    assert again.changed == {}
    with again.store as store:
        assert len(store.read(key, "eeg")) > 0


def test_a_number_of_jobs_that_means_nothing_is_refused(corpus: Path, tmp_path: Path) -> None:
    """joblib's rule, as our error."""
    with pytest.raises(InputError, match="n_jobs=0"):
        prepare(corpus, tmp_path / "store", n_jobs=0)


def test_a_mended_file_is_taken_up(copy: Path, corpus: Path, tmp_path: Path) -> None:
    """What was refused is tried again at the next call."""
    first = prepare(copy, tmp_path / "store")
    refused = next(refusal for refusal in first.refusals if "truncated" in refusal.detail)
    path = next(entry.files[0].path for entry in BidsSource(copy).entries() if entry.id == refused.id)
    sound = next(p for p in corpus.rglob("*contrastChangeDetection_run-2_eeg.bdf") if p.stat().st_size > 2e5)
    shutil.copy(sound, path)
    again = prepare(copy, tmp_path / "store")

    assert again.n_prepared == 1
    assert refused.id not in {refusal.id for refusal in again.refusals}
    assert refused.id not in again.store.table("refusals")["recording"].to_pylist()


@pytest.mark.parametrize("steps", [(), (HighPass(1.0), Resample(50.0))])
def test_the_bytes_do_not_depend_on_the_number_of_jobs(corpus: Path, tmp_path: Path, steps: Any) -> None:
    """One job here or two workers elsewhere, any budget."""
    for n_jobs, memory in ((1, "1 GB"), (2, "1500 MB")):
        prepare(
            corpus, tmp_path / f"store-{n_jobs}", steps=steps, n_jobs=n_jobs, memory=memory, part_bytes="2 MB"
        )

    assert digest(tmp_path / "store-1") == digest(tmp_path / "store-2")


def test_relative_paths_mean_the_folder_that_the_builder_is_in(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """joblib keeps its workers, and they stay where they were started."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / name / "corpus").symlink_to(corpus)
        prepare("corpus", "store", n_jobs=2, part_bytes="2 MB").store.close()

    assert digest(tmp_path / "here/store") == digest(tmp_path / "there/store")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # distributed's own, from Tornado
def test_a_dask_cluster_builds_the_same_store(corpus: Path, tmp_path: Path) -> None:
    """joblib.parallel_config puts the jobs on a cluster; the store does not show it."""
    import joblib

    distributed = pytest.importorskip("distributed")
    prepare(corpus, tmp_path / "here", part_bytes="2 MB")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        prepare(corpus, tmp_path / "there", part_bytes="2 MB")

    assert digest(tmp_path / "here") == digest(tmp_path / "there")


class _Stopped(BaseException):
    """Stands for the power cut: nothing of ours may catch it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, n_groups: int) -> None:
    """Let the build die after some groups."""
    original = group_module.build_group
    done: list[int] = []

    def build(task: GroupTask) -> int:
        if len(done) == n_groups:
            raise _Stopped
        done.append(task.group)
        return original(task)

    monkeypatch.setattr(ingest, "build_group", build)


@pytest.mark.parametrize("n_groups", [0, 1, 3])
def test_an_interrupted_build_is_resumed_to_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_groups: int
) -> None:
    """Finished groups are taken over, not built again; until then there is no store."""
    prepare(corpus, tmp_path / "whole", part_bytes="2 MB")
    with monkeypatch.context() as patch:
        stop_after(patch, n_groups)
        with pytest.raises(_Stopped):
            prepare(corpus, tmp_path / "store", part_bytes="2 MB")
    assert not (tmp_path / "store/manifest.json").exists()
    built: list[int] = []
    original = group_module.build_group

    def build(task: GroupTask) -> int:
        built.append(task.group)
        return original(task)

    monkeypatch.setattr(ingest, "build_group", build)
    prepare(corpus, tmp_path / "store", part_bytes="2 MB")

    assert built[0] == n_groups
    assert digest(tmp_path / "store") == digest(tmp_path / "whole")


def test_a_source_changed_between_kill_and_resume_is_read_again(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished group whose files are no longer the same is built again."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(_Stopped):
            prepare(copy, tmp_path / "store", part_bytes="2 MB")
    path = BidsSource(copy).entries()[0].files[0].path
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    prepare(copy, tmp_path / "store", part_bytes="2 MB")
    prepare(copy, tmp_path / "whole", part_bytes="2 MB")

    assert digest(tmp_path / "store") == digest(tmp_path / "whole")


def test_resumed_with_other_steps_it_begins_anew(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of another recipe are not taken over, and leave nothing behind."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(_Stopped):
            prepare(corpus, tmp_path / "store", part_bytes="2 MB")
    prepare(corpus, tmp_path / "store", steps=[HighPass(1.0)], part_bytes="4 MB")
    prepare(corpus, tmp_path / "whole", steps=[HighPass(1.0)], part_bytes="4 MB")

    assert digest(tmp_path / "store") == digest(tmp_path / "whole")
    assert verify(tmp_path / "store").unlisted == ()


def test_a_refused_recording_leaves_no_byte_between_its_neighbours(tmp_path: Path) -> None:
    """A store with a refused recording is the store without it, but for the refusal."""
    good = {name: ArrayRecording({"eeg": eeg(seed=i, n_samples=3000)}) for i, name in enumerate("ace")}
    bad = {name: ArrayRecording({"eeg": eeg(offset=1e5)}) for name in "bd"}
    with_bad = prepare(ArraySource(good | bad), tmp_path / "with")
    without = prepare(ArraySource(good), tmp_path / "without")

    assert with_bad.refused() == {"precision": 2}
    parts = [name for name in digest(tmp_path / "with") if name.startswith("parts")]
    assert {n: digest(tmp_path / "with")[n] for n in parts} == {
        n: digest(tmp_path / "without")[n] for n in parts
    }
    assert without.n_prepared == with_bad.n_prepared == 3


def test_a_precision_refusal_names_channel_figure_and_remedy(tmp_path: Path) -> None:
    """BioSemi's DC offset of tens of millivolts in float16."""
    with pytest.raises(
        SourceError, match=r"1 precision.*Channel E\d would keep .* dB in float16, the rule is 60 dB"
    ):
        prepare(one(eeg(offset=30_000.0)), tmp_path / "store")
    assert not list((tmp_path / "store").glob("parts/*-*"))


@pytest.mark.parametrize("precision", ["float32", "int16"])
def test_the_remedy_works(tmp_path: Path, precision: str) -> None:
    """The same recording is stored with float32, or with int16 that removes the offset."""
    signal = eeg(offset=30_000.0)
    with prepare(one(signal), tmp_path / "store", precision=precision).store as store:
        np.testing.assert_allclose(store.read("a", "eeg"), signal.data[:], atol=0.002)


def test_a_budget_that_cannot_hold_the_work_is_refused_with_its_lines(corpus: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(DoesNotFit, match="this process"):
        prepare(corpus, tmp_path / "store", memory="20 MB")
    assert not list((tmp_path / "store").glob("[a-z]*"))


def test_a_disk_that_cannot_hold_the_store_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a margin of 20 % over the prediction, before anything is written."""
    prepared = prepare(corpus, tmp_path / "store")
    size = sum(stamp.size_bytes for stamp in prepared.store.manifest.files.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    with pytest.raises(DoesNotFit, match="disk's free space") as caught:
        prepare(corpus, tmp_path / "other")
    assert caught.value.resource == "disk"
    assert 1.0 < caught.value.needed_bytes / size < 1.5
    assert not list((tmp_path / "other").glob("parts"))


def test_a_second_builder_is_refused(corpus: Path, tmp_path: Path) -> None:
    """One builder at a time."""
    with locked(tmp_path / "store"), pytest.raises(StoreLocked, match="Another process is building store"):
        prepare(corpus, tmp_path / "store")


def test_steps_run_by_blocks_give_the_whole_recordings_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long recording in many blocks is MNE's filter on all of it, to float32's own step."""
    import mne

    monkeypatch.setattr(group_module, "BLOCK_BYTES", 200_000)
    signal = eeg(40_000, 8)
    with prepare(
        one(signal), tmp_path / "store", steps=[HighPass(1.0), Resample(50.0)], precision="float32"
    ).store as store:
        raw = mne.io.RawArray(signal.data[:].T * 1e-6, mne.create_info(8, 100.0, "eeg"), verbose="ERROR")
        expected = raw.filter(1.0, None, verbose="ERROR").resample(50.0, method="polyphase", verbose="ERROR")
        np.testing.assert_allclose(store.read("a", "eeg"), expected.get_data(units="uV").T, atol=2e-5)
        assert store.extent("a", "eeg").rate_hz == 50.0


def test_every_kind_of_signal_is_read_back(tmp_path: Path) -> None:
    """Integers exactly, floats to their precision, in their own shapes."""
    arrays = make_arrays()
    with prepare(make_source(arrays), tmp_path / "store", precision={"eeg": "float32"}).store as store:
        for key, signals in arrays.items():
            for name, x in signals.items():
                expected: NDArray[Any] = x.astype(np.float32) if x.dtype.kind == "f" else x
                assert np.array_equal(store.read(key, name), expected)


def double(raw: Any) -> None:
    """Double every sample in place."""
    raw.apply_function(lambda x: 2 * x)


def test_callables_and_braindecode_preprocessors_run_on_the_whole_raw(corpus: Path, tmp_path: Path) -> None:
    """Their results are stored, and their name and version are in the manifest."""
    braindecode = pytest.importorskip("braindecode.preprocessing")
    source = BidsSource(corpus, subjects=1, tasks="RestingState")
    plain = prepare(source, tmp_path / "plain", precision="float32").store
    steps = [
        RawStep(double, name="double", version="1"),
        braindecode.Preprocessor("pick", apply_on_array=False, picks=["E1", "E2"]),
    ]
    store = prepare(source, tmp_path / "store", steps=steps, precision="float32").store
    key = store.recordings["recording"][0].as_py()

    np.testing.assert_allclose(store.read(key, "eeg"), 2 * plain.read(key, "eeg")[:, :2], rtol=1e-6)
    assert [step["step"] for step in store.manifest.calls[0].steps["eeg"]] == ["double", "mne.pick"]
    plain.close()
    store.close()


def test_a_callable_that_does_not_fit_is_refused_before_it_loads(tmp_path: Path) -> None:
    """The whole recording in memory is more than the budget leaves; steps on blocks would do."""
    import mne

    raw = mne.io.RawArray(np.zeros((4, 2_000_000)), mne.create_info(4, 100.0, "eeg"), verbose="ERROR")
    steps = [RawStep(double, name="double", version="1")]
    with pytest.raises(DoesNotFit, match="'samples'"):
        prepare(
            {"a": raw}, tmp_path / "store", steps=steps, memory=read_usage().unreclaimable_bytes + 200_000_000
        )


def test_steps_that_no_signal_takes_are_refused(tmp_path: Path) -> None:
    """A plain list is for the measured signals; others are named."""
    with pytest.raises(InputError, match=r"The steps are for .*this recording has robs. Give steps=\{'robs'"):
        prepare(one(eeg(), "robs"), tmp_path / "store", steps=[Scale(2.0)])
    store = prepare(one(eeg(), "robs"), tmp_path / "store", steps={"robs": [Scale(2.0), Clip(10.0)]}).store
    assert store.read("a", "robs").max() == 10.0
    store.close()


def test_a_name_that_no_signal_has_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A typing error beside something right is not swallowed."""
    steps = {"eeg": [Scale(2.0)], "egg": [Scale(2.0)]}
    prepare(one(eeg()), tmp_path / "store", steps=steps, precision={"egg": "float32"})

    assert "signal 'egg' touched no recording: there are eeg" in caplog.text
    with pytest.raises(InputError, match="Unknown precision 'float8' for signal 'egg'"):
        prepare(one(eeg()), tmp_path / "store", precision={"egg": "float8"})
    with pytest.raises(InputError, match="is no list"):
        prepare(one(eeg()), tmp_path / "store", steps=Scale(2.0))  # type: ignore[arg-type]  # the mistake


def test_one_precision_for_all_is_for_floats(tmp_path: Path) -> None:
    """Triggers and spike counts stay the integers that they are."""
    with prepare(make_source(make_arrays()), tmp_path / "store", precision="float32").store as store:
        assert {extent.precision for extent in store.extents("eeg")} == {"float32"}
        assert {extent.precision for extent in store.extents("robs")} == {"exact"}


def test_flat_channels_are_dropped_per_recording(corpus: Path, tmp_path: Path) -> None:
    """Cz, the reference, holds nothing: 128 channels are stored."""
    source = BidsSource(corpus, subjects=1, tasks="RestingState")
    store = prepare(source, tmp_path / "store", steps=[DropFlat()]).store
    key = store.recordings["recording"][0].as_py()

    assert store.extent(key, "eeg").part.grid.sample_shape == (128,)
    assert "Cz" not in [channel["channel"] for channel in store.channels(key, "eeg")]


def test_progress_ends_with_everything_done(corpus: Path, tmp_path: Path) -> None:
    """Recordings, bytes and memory are told while it runs, and once at the end."""
    seen: list[Progress] = []
    prepared = prepare(corpus, tmp_path / "store", part_bytes="2 MB", progress=seen.append)
    last = seen[-1]

    assert last.n_done == last.n_total == prepared.n_prepared + len(prepared.refusals)
    assert last.done_bytes == last.total_bytes
    assert last.usage.unreclaimable_bytes > 0
    assert [stage.name for stage in prepared.stages] == ["list", "compare", "plan", "build", "commit"]


def test_the_manifest_tells_steps_errors_and_software(corpus: Path, tmp_path: Path) -> None:
    """And nothing of the machine, the time or the path."""
    call = prepare(corpus, tmp_path / "store", steps=[HighPass(1.0)]).store.manifest.calls[0]
    text = (tmp_path / "store/manifest.json").read_text()

    assert call.steps["eeg"][0]["step"] == "high_pass"
    assert call.errors["eeg"]["min_snr_db"] > 60
    assert set(call.software) >= {"mne", "numpy"}
    assert str(tmp_path) not in text


def test_an_empty_listing_is_an_error(tmp_path: Path) -> None:
    """With the remedy, and without a store."""
    with pytest.raises(SourceError, match="lists no recording"):
        prepare(ArraySource({}), tmp_path / "store")
    assert not (tmp_path / "store").exists()
