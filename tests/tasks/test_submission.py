"""Submissions: what the scorer unpacks and runs says what the trained networks say."""

from __future__ import annotations

import ast
import errno
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

import engram
from engram.errors import InputError, StoreNotWritable
from engram.tasks import submission
from engram.tasks.eeg_challenge import CHALLENGE_1, CHALLENGE_2
from engram.tasks.submission import write_submission
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.training.recipe import Recipe
from engram.training.train import open_training, train

SMALL = {"epochs": 1, "batch_size": 32, "accelerator": "cpu"}


def recipe_of(store: Path, challenge: int, **changes: Any) -> Recipe:
    """Say what is trained for a challenge."""
    windows: Mapping[str, Any]
    if challenge == 1:
        windows = {
            "events": {
                "signal": "eeg",
                "anchor": ["left_target", "right_target"],
                "first_between": ["contrastTrial_start"],
                "trial_start_offset_s": 0.5,
                "trial_duration_s": 2.0,
            }
        }
        target: Any = {"time_to": {"events": list(CHALLENGE_1.target.events)}}  # type: ignore[union-attr]
    else:
        windows = {"fixed": {"signal": "eeg", "window_size_s": 4.0, "window_stride_s": 2.0, "crop_s": 2.0}}
        target = {"recording": {"column": CHALLENGE_2.target.column}}  # type: ignore[union-attr]
    content = {
        "store": str(store),
        "windows": windows,
        "target": target,
        "split": {"test": {"fraction": 0.34}},
        "model": {"name": "MultiScaleNet", "arguments": {"n_filters": 4, "n_blocks": 2}, "baselines": []},
        "training": SMALL,
    }
    return Recipe.model_validate_json(json.dumps(content | changes), strict=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings for both challenges, of several kinds of network."""
    root = tmp_path_factory.mktemp("trained")
    write_hbn(root / "corpus", HbnCorpus(3, ("R1",), n_trials=6, n_runs=1, rest_s=10, quirks=frozenset()))
    engram.prepare(root / "corpus", root / "store", memory="4 GB").store.close()
    framing = {"scaling": "channel", "downsample": 2, "reach": 0.5, "test_shifts": [-4, 0, 4]}
    models: Mapping[str, Any] = {
        "one": (1, {"name": "TimeLocalizer", "arguments": {"n_filters": 4}, "framing": framing}),
        "other": (
            1,
            {"name": "PatchAttentionNet", "arguments": {"width": 8}, "framing": {"scaling": "window"}},
        ),
        "braindecode": (1, {"name": "SCCNet", "arguments": {"n_spatial_filters": 2, "activation": "ELU"}}),
        "two": (2, {"name": "MultiScaleNet", "arguments": {"n_filters": 4, "kernels": [3, 5]}}),
    }
    for name, (challenge, model) in models.items():
        train(recipe_of(root / "store", challenge, model={**model, "baselines": []}), root / name)
    return root


def test_a_submission_says_what_the_networks_say(corpus: Path, tmp_path: Path) -> None:
    """Of volts, one window at a time, in a bare process; flat, with the names that the scorer asks for."""
    path = tmp_path / "submission.zip"
    checked = write_submission([corpus / "one", corpus / "two", corpus / "other"], path)
    assert [trial.n_networks for trial in checked.trials] == [2, 1]
    assert all(trial.largest_difference < 1e-4 for trial in checked.trials)
    assert checked.libraries == ("torch",)
    with zipfile.ZipFile(path) as packed:
        assert packed.namelist() == ["submission.py", "weights_challenge_1.pt", "weights_challenge_2.pt"]
        packed.extractall(tmp_path / "unpacked")
    tree = ast.parse((tmp_path / "unpacked" / "submission.py").read_text())
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert named == {"__future__", "collections.abc", "math", "pathlib", "torch", "torch.nn"}

    with open_training(corpus / "two") as training:
        windows = training.sides.train
        x = windows.read([0]).signals["eeg"]
        with torch.no_grad():
            expected = float(training.network.eval()(x))
    torch.save(x / 1e6, tmp_path / "X.pt")
    program = (
        "import torch; from submission import Submission; "
        "m = Submission(100, torch.device('cpu')).get_model_challenge_2(); "
        "print(float(m(torch.load('../X.pt'))[0][0]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "unpacked", capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(expected, abs=1e-5)


def test_a_network_of_braindecode_is_named_and_not_copied(corpus: Path, tmp_path: Path) -> None:
    """The scorer has the library, and the report says that it is needed."""
    checked = write_submission([corpus / "braindecode", corpus / "two"], tmp_path / "s.zip")
    assert checked.libraries == ("torch", "braindecode")


def test_a_network_that_the_scorer_may_have_otherwise_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial here cannot see it: the scorer has an older braindecode."""
    monkeypatch.setattr(submission, "_AS_AT_THE_SCORER", ("EEGNeX",))
    with pytest.raises(InputError, match=r"braindecode trained SCCNet, .* or one of: EEGNeX"):
        write_submission([corpus / "braindecode", corpus / "two"], tmp_path / "s.zip")


def test_a_place_that_cannot_be_written_is_refused_before_the_trial(corpus: Path, tmp_path: Path) -> None:
    """A folder, or a file in none."""
    for path in (tmp_path, tmp_path / "nowhere" / "s.zip"):
        with pytest.raises(InputError, match="is no file in a folder"):
            write_submission([corpus / "one", corpus / "two"], path)


def test_a_disk_that_cannot_be_written_is_told_before_the_trial(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder of others', or a medium that is read-only."""

    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(StoreNotWritable, match="cannot be written: Read-only file system"):
        write_submission([corpus / "one", corpus / "two"], tmp_path / "s.zip")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_was_tried(corpus: Path, tmp_path: Path) -> None:
    """A table, or JSON; a mistake is one line and exit code 2."""
    words = [sys.executable, "-m", "engram", "submit", str(corpus / "two"), "-o", str(tmp_path / "s.zip")]
    refused = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("engram: No training predicts the target of challenge1")
    told = json.loads(
        subprocess.run(
            [*words, str(corpus / "one"), "--json"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert [trial["challenge"] for trial in told["trials"]] == ["challenge1", "challenge2"]
    assert (tmp_path / "s.zip").stat().st_size == told["n_bytes"]


def test_the_same_networks_give_the_same_zip(corpus: Path, tmp_path: Path) -> None:
    """To the last byte."""
    for name in "ab":
        write_submission([corpus / "one", corpus / "two"], tmp_path / f"{name}.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_each_challenge_needs_a_training(corpus: Path, tmp_path: Path) -> None:
    """And nothing is written."""
    with pytest.raises(InputError, match="No training predicts the target of challenge2"):
        write_submission([corpus / "one"], tmp_path / "s.zip")
    assert not (tmp_path / "s.zip").exists()


def test_a_training_of_another_target_is_refused(corpus: Path, tmp_path: Path) -> None:
    """By its folder."""
    train(recipe_of(corpus / "store", 2, target={"recording": {"column": "age"}}), tmp_path / "age")
    with pytest.raises(InputError, match=r"age predicts RecordingColumn\(column='age'.*neither challenge"):
        write_submission([tmp_path / "age", corpus / "one"], tmp_path / "s.zip")


def test_a_time_from_another_event_is_refused(corpus: Path, tmp_path: Path) -> None:
    """It has the same name, and is another number."""
    cut = {"signal": "eeg", "anchor": ["contrastTrial_start"], "trial_duration_s": 2.0}
    train(recipe_of(corpus / "store", 1, windows={"events": cut}), tmp_path / "late")
    with pytest.raises(InputError, match=r"late: The times of challenge1 count from left_target or right_"):
        write_submission([tmp_path / "late", corpus / "two"], tmp_path / "s.zip")


END = 'weights_challenge_2.pt")\n'
FORWARD = "        out: Tensor = self.network(X * self.factor)\n"


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (END, "\nraise ValueError('no such luck')\n", "does not run by itself: ValueError: no such luck"),
        (END, "\nimport engram\n", "may not import engram"),
        (FORWARD, "        X.numpy()\n", "may not go by way of NumPy"),
    ],
)
def test_a_submission_that_fails_is_not_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, wrong: str, said: str
) -> None:
    """Whatever it fails at, in the process where it is tried."""
    program = submission._program
    monkeypatch.setattr(
        submission, "_program", lambda entries: program(entries).replace(place, place + wrong)
    )
    with pytest.raises(InputError, match=said):
        write_submission([corpus / "one", corpus / "two"], tmp_path / "s.zip")
    assert not (tmp_path / "s.zip").exists()


def test_a_submission_that_says_something_else_is_not_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are another network's, for instance."""
    weights = submission._weights
    monkeypatch.setattr(
        submission,
        "_weights",
        lambda network: weights(
            network.apply(lambda part: [p.data.mul_(2) for p in part.parameters(recurse=False)])
        ),
    )
    with pytest.raises(InputError, match="for a window of challenge1, the trained networks"):
        write_submission([corpus / "one", corpus / "two"], tmp_path / "s.zip")


SCORER = """
import importlib.util, json, sys
import torch

for name in ("engram", "braindecode", "mne", "lightning", "scipy", "pandas"):
    assert importlib.util.find_spec(name) is None, name
from submission import Submission

submission, out = Submission(100, torch.device("cpu")), {}
for name, windows in torch.load(sys.argv[1], weights_only=True).items():
    network = getattr(submission, f"get_model_{name}")()
    network.eval()
    with torch.inference_mode():
        out[name] = [float(network.forward(X[None])[0][0]) for X in windows]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_a_submission_needs_torch_and_numpy_alone(corpus: Path, tmp_path: Path) -> None:
    """In an environment of its own, without Engram and braindecode, it says what the trained networks say."""
    write_submission([corpus / "one", corpus / "two"], tmp_path / "s.zip")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        archive.extractall(unpacked)
    volts, expected = {}, {}
    for number, name in ((1, "one"), (2, "two")):
        with open_training(corpus / name) as training:
            assert training.sides.test is not None
            X = training.sides.test.read(range(5)).signals["eeg"]  # noqa: N806 - braindecode's word
            volts[f"challenge_{number}"] = X / 1e6
            with torch.inference_mode():
                expected[f"challenge_{number}"] = training.network.eval()(X)[:, 0].tolist()
    torch.save(volts, tmp_path / "volts.pt")
    python = bare_environment(tmp_path / "bare", ("torch", "numpy"))
    done = subprocess.run(
        [
            python,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(unpacked)!r})\n{SCORER}",
            tmp_path / "volts.pt",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name, values in json.loads(done.stdout).items():
        assert values == pytest.approx(expected[name], abs=1e-4)


def bare_environment(folder: Path, names: tuple[str, ...]) -> Path:
    """Make a virtual environment of some packages, and what they need, by links to those of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    told = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(
        subprocess.run([python, "-c", told], check=True, capture_output=True, text=True).stdout.strip()
    )
    wanted, seen = list(names), set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))))
        needed = (Requirement(text) for text in found.requires or ())
        wanted += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return python
