"""An entry to the EEG Foundation Challenge, scored on releases that it never saw, and its page."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import engram
from engram.cli import app
from engram.errors import InputError
from engram.store.reader import Store
from engram.tasks.eeg_challenge import (
    CHALLENGES,
    PUBLISHED,
    challenge_of,
    check_cutting,
    pool_scores,
    releases_in,
    releases_of,
    trained_releases,
)
from engram.tasks.entry import EntryScore, ReleaseScore, score_entry
from engram.tasks.entry_page import write_entry_page
from engram.tasks.submission import write_submission
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.training.recipe import Recipe
from engram.training.train import open_training, train
from engram.windows.spec import EventWindows, FixedWindows
from engram.windows.targets import EventColumn, RecordingColumn, TimeTo

WINDOWS: Mapping[int, Mapping[str, Any]] = {
    1: {
        "events": {
            "signal": "eeg",
            "anchor": ["left_target", "right_target"],
            "first_between": ["contrastTrial_start"],
            "trial_start_offset_s": 0.5,
            "trial_duration_s": 2.0,
        }
    },
    2: {"fixed": {"signal": "eeg", "window_size_s": 4.0, "window_stride_s": 2.0, "crop_s": 2.0}},
}
TARGETS: Mapping[int, Any] = {
    1: {"time_to": {"events": ["left_buttonPress", "right_buttonPress"], "max_s": 2.4}},
    2: {"recording": {"column": "externalizing"}},
}
TEST, VALID = ({"by": "release", "values": [name]} for name in ("R2", "R5"))
HELD_BACK = {"test": {"by": "release", "values": ["R2", "R5"]}}


def trained(store: Path, folder: Path, challenge: int, **changes: Any) -> Path:
    """Train a small network for a challenge."""
    content = {
        "store": str(store),
        "windows": WINDOWS[challenge],
        "target": TARGETS[challenge],
        "split": HELD_BACK,
        "model": {"name": "MultiScaleNet", "arguments": {"n_filters": 4, "n_blocks": 2}, "baselines": []},
        "training": {"epochs": 1, "batch_size": 32, "accelerator": "cpu", "seed": 3},
    }
    train(Recipe.model_validate_json(json.dumps(content | changes), strict=True), folder)
    return folder


def prepared(corpus: Path, store: Path, **options: Any) -> Path:
    """Prepare a corpus."""
    engram.prepare(corpus, store, memory="4 GB", **options).store.close()
    return store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three releases, and trainings on the first of them: two of challenge 1, one of challenge 2."""
    root = tmp_path_factory.mktemp("entry")
    corpus = HbnCorpus(4, ("R1", "R2", "R5"), n_trials=6, n_runs=1, rest_s=10)
    write_hbn(root / "corpus", corpus)
    store = prepared(root / "corpus", root / "store")
    trained(store, root / "rt-0", 1)
    trained(store, root / "rt-1", 1, split={"test": TEST, "valid": VALID})
    trained(store, root / "ext", 2)
    return root


@pytest.fixture(scope="module")
def entry(root: Path) -> EntryScore:
    """All three, scored on what is left."""
    return score_entry([root / "rt-0", root / "ext", root / "rt-1"], root / "store")


def plain(root: Path, name: str, release: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give targets and the mean of the networks' predictions, window by window."""
    folders = {"challenge1": ["rt-0", "rt-1"], "challenge2": ["ext"]}[name]
    with Store(root / "store") as store:
        windows = CHALLENGES[name].of(store, (release,))
        table = windows.table().to_pandas()
        predictions = []
        for folder in folders:
            generators: dict[str, random.Random] = {}
            with open_training(root / folder) as training, torch.no_grad():
                network = training.network.eval()
                for number, recording in enumerate(table["recording"]):
                    offset = None
                    if name == "challenge2":
                        own = generators.setdefault(recording, random.Random(42))
                        offset = np.array([own.randint(0, 200)])
                    predictions.append(float(network(windows.read([number], offset=offset).X)))
    predicted = np.array(predictions).reshape(len(folders), -1).mean(axis=0)
    return table["target"].to_numpy(np.float64), predicted


def plain_nrmse(targets: NDArray[np.float64], predictions: NDArray[np.float64] | float) -> float:
    """Root mean squared error over the population deviation."""
    return float(np.sqrt(((targets - predictions) ** 2).mean()) / targets.std())


@pytest.mark.parametrize("name", CHALLENGES)
def test_scores_are_those_of_the_windows(root: Path, entry: EntryScore, name: str) -> None:
    """Each release, all of them pooled, and both constants, beside NumPy alone."""
    scored = entry.challenges[name]
    assert list(scored.releases) == ["R2", "R5"]
    found = {release: plain(root, name, release) for release in scored.releases}
    found["pooled"] = tuple(np.concatenate(each) for each in zip(*found.values(), strict=True))  # type: ignore[assignment]
    mean = float(np.mean([member.train_mean for member in scored.members]))
    for release, (targets, predictions) in found.items():
        one = scored.pooled if release == "pooled" else scored.releases[release]
        np.testing.assert_allclose(one.score.targets, targets, atol=1e-6)
        np.testing.assert_allclose(one.score.predictions, predictions, atol=1e-5)
        assert one.score.nrmse == pytest.approx(plain_nrmse(targets, predictions), abs=1e-4)
        assert one.chance == pytest.approx(1.0, abs=1e-9)
        assert one.chance_beforehand == pytest.approx(plain_nrmse(targets, mean), abs=1e-5)
        assert one.chance_beforehand >= 1.0
        assert one.n_windows == len(targets) > 5
        assert one.interval is None  # with so few subjects


def test_pooled_is_every_window_and_every_refusal(entry: EntryScore) -> None:
    """In the order of the releases; subjects keep their scores; refusals are added up."""
    for each in entry.challenges.values():
        pooled, releases = each.pooled, list(each.releases.values())
        assert pooled.releases == ("R2", "R5")
        for name in ("targets", "predictions", "subjects"):
            joined = np.concatenate([getattr(one.score, name) for one in releases])
            np.testing.assert_array_equal(getattr(pooled.score, name), joined)
        for one in releases:
            assert one.n_subjects == len(set(one.score.subjects.tolist())) > 1
            for subject, told in one.score.by_subject.items():
                mine = one.score.subjects == subject
                error = one.score.targets[mine] - one.score.predictions[mine].astype(np.float64)
                assert told == pooled.score.by_subject[subject]
                assert told.n_windows == mine.sum()
                assert told.rmse == pytest.approx(np.sqrt(np.mean(error**2)))
        for reason, n in pooled.refused.items():
            assert n == sum(one.refused.get(reason, 0) for one in releases) > 0
        assert "no target" in pooled.refused


def test_the_overall_score_weighs_the_pooled_ones(entry: EntryScore) -> None:
    """0.3 and 0.7, to five decimals; one challenge alone has none."""
    first, second = (entry.challenges[name].pooled.score.nrmse for name in CHALLENGES)
    assert entry.overall == round(0.3 * first + 0.7 * second, 5)
    assert entry.interval is None
    one = EntryScore(entry.store, 0, (), {"challenge1": entry.challenges["challenge1"]})
    assert (one.overall, one.interval, one.releases) == (None, None, ("R2", "R5"))


def test_members_are_told(entry: EntryScore) -> None:
    """What each was trained on, and what chose its epoch."""
    one, other = entry.challenges["challenge1"].members
    assert (one.folder.name, one.trained_on, one.chosen_on) == ("rt-0", ("R1",), ())
    assert (other.folder.name, other.trained_on, other.chosen_on) == ("rt-1", ("R1",), ("R5",))
    assert (one.model, one.seed) == ("MultiScaleNet", 3)
    assert entry.chosen_on() == {"R5": (str(other.folder),)}


def test_r5_never_trains(root: Path, tmp_path: Path) -> None:
    """Neither command takes such a training, and both name it; R5 to validate is fine."""
    bad = trained(root / "store", tmp_path / "bad", 1, split={"test": TEST})
    for refused in (
        run("submit", bad, root / "ext", "--out", tmp_path / "s.zip"),
        run("evaluate", bad, "--challenge", "eeg2025", "--store", root / "store", "--release", "R2"),
    ):
        assert isinstance(refused.exception, InputError)
        assert f"{bad} was trained on " in str(refused.exception)
        assert " windows of R5, which the rules keep for validation" in str(refused.exception)
    assert not (tmp_path / "s.zip").exists()
    assert write_submission([root / "rt-1", root / "ext"], tmp_path / "s.zip").path.exists()


@pytest.mark.parametrize("release", ["r5", "R05", "Release 5", "5", "R12", "HBN"])
def test_only_releases_that_may_train_do(root: Path, tmp_path: Path, release: str) -> None:
    """However R5 is spelled, and whatever else a release is called, it is no training release by its name."""
    with engram.open(
        prepared(renamed(root, tmp_path / "corpus", release, "people"), tmp_path / "store")
    ) as store:
        sides = CHALLENGES["challenge2"].of(store).split(engram.Split(test=engram.Side(fraction=0.5)))
        with pytest.raises(InputError, match=r"run was trained on \d+ windows of (R5|release '|R12)"):
            trained_releases("run", sides)


def test_steps_are_not_the_scorers(root: Path, tmp_path: Path) -> None:
    """A network of a high-passed store is not handed in, and a score on such a store says so."""
    store = prepared(root / "corpus", tmp_path / "steps", steps=[engram.preparation.steps.HighPass(1.0)])
    other = trained(store, tmp_path / "other", 2, split=HELD_BACK)
    with pytest.raises(InputError, match=r"other was trained on a store that was prepared with high_pass"):
        write_submission([other, root / "rt-0"], tmp_path / "s.zip")
    entry = score_entry([other], store, ["R2"])
    assert entry.to_dict()["steps"] == list(entry.steps)
    assert "this is no score of theirs" in audited(entry, tmp_path / "entry.html").text
    assert "prepared with high_pass" in run(
        "evaluate", other, "--challenge", "eeg2025", "--store", store, "--release", "R2"
    ).stdout.replace("\n", " ")


def test_what_cannot_be_proved_is_refused(root: Path, tmp_path: Path) -> None:
    """Recordings without a release may be anybody's."""
    corpus = renamed(root, tmp_path / "corpus", "n/a", "people")
    store = prepared(corpus, tmp_path / "store")
    split = {"test": {"fraction": 0.5}}
    unknown = trained(store, tmp_path / "unknown", 2, split=split)
    with pytest.raises(
        InputError, match=r"store has recordings without a release, .* or give release_number"
    ):
        write_submission([unknown, root / "rt-0"], tmp_path / "s.zip")
    with pytest.raises(InputError, match="without a release, so that nothing proves"):
        score_entry([unknown], root / "store")
    with pytest.raises(InputError, match="without a release, so that nothing proves"):
        score_entry([root / "ext"], store)


def renamed(root: Path, corpus: Path, release: str, folder: str) -> Path:
    """Give the people of R1 another release, or none."""
    shutil.copytree(root / "corpus" / "R1_L100_bdf", corpus / folder)
    people = corpus / folder / "participants.tsv"
    people.write_text(people.read_text().replace("\tR1\t", f"\t{release}\t"))
    return corpus


def test_what_was_trained_on_is_not_scored(root: Path, tmp_path: Path) -> None:
    """Not a release by its name, not people under another name; and something has to be left."""
    with pytest.raises(InputError, match=r"ext was trained on R1: a score on it says nothing"):
        score_entry([root / "ext"], root / "store", ["R1"])
    store = prepared(renamed(root, tmp_path / "corpus", "R9", "R9_L100_bdf"), tmp_path / "store")
    with pytest.raises(InputError, match=r"ext was trained on \d of the \d subjects of R9, NDAR"):
        score_entry([root / "ext"], store)
    all_of_it = trained(root / "store", tmp_path / "all", 2, split={"test": VALID})
    with pytest.raises(InputError, match="No recording has release R7"):
        score_entry([all_of_it], root / "store", ["R7"])
    alone = prepared(root / "corpus" / "R1_L100_bdf", tmp_path / "alone")
    with pytest.raises(InputError, match=r"Every release of .*alone was trained on: R1\."):
        score_entry([all_of_it], alone)


def test_what_does_not_fit_together_is_refused(root: Path, tmp_path: Path) -> None:
    """A store of another form, a training twice, or none."""
    slow = prepared(root / "corpus", tmp_path / "slow", steps=[engram.preparation.steps.Resample(50)])
    with pytest.raises(InputError, match=r"R2 of .*slow has .* at 50 Hz .*hands over 129 .*at 100 Hz"):
        score_entry([root / "ext"], slow)
    with pytest.raises(InputError, match="named twice"):
        score_entry([root / "ext", root / "ext" / ".." / "ext"], root / "store")
    with pytest.raises(InputError, match="named twice"):
        write_submission([root / "ext", root / "rt-0", root / "ext"], tmp_path / "s.zip")
    with pytest.raises(InputError, match="Name the folder"):
        score_entry([], root / "store")


def test_a_target_says_which_challenge() -> None:
    """A time may be bounded; another column is of none."""
    assert (
        challenge_of(TimeTo(("left_buttonPress", "right_buttonPress"), max_s=2.0)) is CHALLENGES["challenge1"]
    )
    assert challenge_of(RecordingColumn("externalizing")) is CHALLENGES["challenge2"]
    for other in (RecordingColumn("age"), EventColumn("value", task="classification"), TimeTo(("x",)), None):
        assert challenge_of(other) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"anchor": ("contrastTrial_start",)},
            "these from contrastTrial_start, in windows that begin at 0.5 s",
        ),
        ({"trial_start_offset_s": 0.0}, "these from left_target or right_target, .* at 0 s"),
    ],
)
def test_a_time_counts_from_the_target(changes: dict[str, Any], said: str) -> None:
    """In windows as the scorer cuts them; which trials there are and how windows are moved is anybody's."""
    one, two = CHALLENGES["challenge1"], CHALLENGES["challenge2"]
    assert isinstance(one.windows, EventWindows)
    with pytest.raises(InputError, match=said):
        check_cutting(one, replace(one.windows, **changes))
    check_cutting(one, replace(one.windows, first_between=(), anchor=("left_target",), shift_s=0.1))
    in_samples = replace(one.windows, trial_start_offset_s=None, trial_start_offset_samples=50)
    check_cutting(one, in_samples)
    check_cutting(two, FixedWindows(signal="eeg", window_size_s=2.0))
    check_cutting(two, replace(one.windows, **changes))


def test_releases_are_named_in_order(root: Path) -> None:
    """Of a store, and of windows."""
    with Store(root / "store") as store:
        assert releases_in(store) == ("R1", "R2", "R5")
        assert releases_of(CHALLENGES["challenge2"].of(store, ("R5", "R1"))) == ("R1", "R5")


def run(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_says_it_all(root: Path, entry: EntryScore, tmp_path: Path) -> None:
    """As JSON, on a page, and as a table."""
    folders = (root / "rt-0", root / "ext", root / "rt-1")
    words = ("evaluate", *folders, "--challenge", "eeg2025", "--store", root / "store")
    page = tmp_path / "pages" / "challenge.html"
    said = run(*words, "--json", "--page", page)
    assert said.exit_code == 0
    told = json.loads(said.stdout)
    assert told == json.loads(json.dumps(entry.to_dict()))
    assert told["releases"] == ["R2", "R5"]
    assert told["n_unprepared"] == 1  # the file that is cut short
    assert told["challenges"]["challenge2"]["releases"]["R5"]["chance"] == pytest.approx(1.0)
    assert [each["seed"] for each in told["challenges"]["challenge1"]["trainings"]] == [3, 3]
    assert page.stat().st_size > 10_000

    shown = run(*words, "--release", "R5").stdout
    one = score_entry(folders, root / "store", ["R5"])
    assert f"overall {one.overall:.5f}; chance 1" in shown
    assert "R2" not in shown
    assert f"R5 chose the epoch of {root / 'rt-1'}" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--challenge", "eeg"], "There is no challenge 'eeg'"),
        (["--challenge", "eeg2025"], "Give --store"),
        (["--challenge", "eeg2025", "--store", "{store}", "--side", "valid"], "do not go with --challenge"),
        (["--challenge", "eeg2025", "--store", "{store}", "--memory", "2GB"], "do not go with --challenge"),
        (["--challenge", "eeg2025", "--store", "{store}", "--page", "{store}"], "is a folder"),
        (["--release", "R5"], "Add --challenge eeg2025"),
        (["--page", "x.html"], "Add --challenge eeg2025"),
        (["{store}"], "Add --challenge eeg2025"),
    ],
)
def test_options_that_do_not_go_together_are_refused(root: Path, words: list[str], message: str) -> None:
    """Before anything is read."""
    said = run("evaluate", root / "ext", *(word.format(store=root / "store") for word in words))
    assert isinstance(said.exception, InputError)
    assert message in str(said.exception)


class Audit(HTMLParser):
    """Read a page as a browser does, and note what matters."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "data"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def audited(entry: EntryScore, out: Path) -> Audit:
    """Write the page and check that it is complete in itself."""
    assert write_entry_page(entry, out) == out
    text = out.read_text(encoding="utf-8")
    page = Audit(text)
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/", "")
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert len(page.ids) == len(set(page.ids))
    assert str(out.parent) not in text
    return page


def test_the_page_tells_the_entry(root: Path, entry: EntryScore, tmp_path: Path) -> None:
    """Scores beside chance and beside others', windows refused, and each training."""
    page = audited(entry, tmp_path / "challenge.html")
    assert f"Overall {entry.overall:.5f} (challenge 1: " in page.text
    for each in entry.challenges.values():
        for one in (each.pooled, *each.releases.values()):
            assert f"{one.score.nrmse:.5f}" in page.text
            assert f"{one.chance_beforehand:.5f}" in page.text
        for member in each.members:
            assert f"{member.ledger.n_parameters:,}" in page.text
    for published in PUBLISHED.values():
        assert str(published.best) in page.text
        assert str(published.median) in page.text
    for words in (
        "Leaderboard of 2025-11-14",
        "on generated data cannot be compared",
        "R5 chose the epoch of rt-1",
        "With fewer than 10 subjects",
        "the target is missing",
        "MultiScaleNet",
        "peak memory",
        "by the mean of 2 networks",
    ):
        assert words in page.text
    # Scores; three of each challenge; loss and memory of each training, and one that was validated.
    assert page.tags.count("svg") == 1 + 2 * 3 + 3 * 2 + 1
    assert str(root) not in page.text


def test_one_target_alone_has_no_score(entry: EntryScore, tmp_path: Path) -> None:
    """A single subject's externalizing does not vary: null in JSON, in words on the page."""
    each = entry.challenges["challenge2"]
    score = each.releases["R5"].score
    mine = score.subjects == score.subjects[0]
    arrays = {name: getattr(score, name)[mine] for name in ("targets", "predictions", "subjects")}
    alone = ReleaseScore(("R5",), pool_scores([replace(score, **arrays)]), np.nan, np.nan, None, {})
    one = EntryScore(entry.store, 0, (), {"challenge2": replace(each, releases={"R5": alone}, pooled=alone)})
    told = json.loads(json.dumps(one.to_dict(), allow_nan=False))["challenges"]["challenge2"]["pooled"]
    assert (told["nrmse"], told["chance"], told["n_subjects"]) == (None, None, 1)
    page = audited(one, tmp_path / "one.html")
    assert "Challenge 2: not defined on R5; chance 1." in page.text
    assert "all targets are the same" in page.text


def test_a_page_of_one_challenge_says_that_the_other_is_missing(entry: EntryScore, tmp_path: Path) -> None:
    """There is no overall score."""
    one = EntryScore(entry.store, 0, (), {"challenge2": entry.challenges["challenge2"]})
    page = audited(one, tmp_path / "one.html")
    assert page.text.count("Overall") == 0
    assert "No training of challenge 1, response time was given: there is no overall score." in page.text
    assert "R5 chose" not in page.text
