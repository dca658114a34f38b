"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engram.cli import app, main
from engram.store.reader import Store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``engram generate`` writes."""
    root = tmp_path_factory.mktemp("cli") / "corpus"
    result = CliRunner().invoke(app, ["generate", str(root), "--subjects", "2"])
    assert result.exit_code == 0
    assert "planted fault truncated" in result.stdout
    return root


def run(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def engram(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, for exit codes and both streams."""
    command = [sys.executable, "-m", "engram", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_list_prepare_inspect_verify_tell_one_story(corpus: Path, tmp_path: Path) -> None:
    """The four commands of the demo, with figures that agree."""
    store = tmp_path / "store"
    listed = json.loads(run("list", corpus, "--json").stdout)
    prepared = json.loads(run("prepare", corpus, store, "--high-pass", "0.5", "--json").stdout)
    inspected = json.loads(run("inspect", store, "--json").stdout)
    verified = json.loads(run("verify", store, "--json").stdout)

    assert len(listed["recordings"]) == prepared["n_prepared"] + len(prepared["refusals"])
    assert inspected["recordings"] == prepared["n_prepared"]
    assert sum(row["n_recordings"] for row in inspected["signals"]) == prepared["n_prepared"]
    assert inspected["calls"][0]["steps"]["eeg"] == [{"step": "high_pass", "l_freq": 0.5}]
    assert inspected["fields"]["subject"] == prepared["n_prepared"]
    assert sum(inspected["events"].values()) == Store(store).events.num_rows
    assert verified["is_sound"]


def test_tables_for_people_name_what_matters(corpus: Path, tmp_path: Path) -> None:
    """Counts, sizes, memory, and every refusal with its reason."""
    listed = run("list", corpus, "--task", "RestingState").stdout
    prepared = run("prepare", corpus, tmp_path / "store", "--memory", "2 GB").stdout
    inspected = run("inspect", tmp_path / "store").stdout

    assert "4 recordings of 4 subjects" in listed
    for words in ("recordings prepared", "memory at its peak", "memory allowed", "is truncated"):
        assert words in prepared
    assert "float16" in inspected
    assert "eeg, worst channel:" in inspected
    assert "events: " in inspected
    assert "right_buttonPress (" in inspected
    assert re.search(r"^fields: .*\bage\b.*\btask\b", inspected, re.MULTILINE)
    assert "sound" in run("verify", tmp_path / "store").stdout


def test_filters_choose_recordings(corpus: Path) -> None:
    """Several values are separated by commas; a number of subjects is a number."""
    ids = [
        row["id"]
        for row in json.loads(
            run(
                "list",
                corpus,
                "--task",
                "contrastChangeDetection",
                "--run",
                "1,3",
                "--release",
                "R1",
                "--subjects",
                1,
                "--json",
            ).stdout
        )["recordings"]
    ]

    assert [name.split("_", 1)[1] for name in ids] == [
        "task-contrastChangeDetection_run-1",
        "task-contrastChangeDetection_run-3",
    ]


def test_releases_of_a_url_are_told_one_by_one_and_in_all(corpus: Path, tmp_path: Path) -> None:
    """With what was fetched, stored, refused and deleted; as JSON with the same figures."""
    words = ("prepare", corpus.as_uri(), tmp_path / "store", "--release", "R2,R1", "--run", 1)
    said = run(*words, "--fetch-to", tmp_path / "raw").stdout.splitlines()
    told = json.loads(run(*words, "--fetch-to", tmp_path / "raw", "--delete-raw", "--json").stdout)

    assert [line.partition(":")[0] for line in said if line.startswith("R")] == ["R2_L100_bdf", "R1_L100_bdf"]
    assert said[-1].startswith("2 releases: ")
    assert [each["name"] for each in told["releases"]] == ["R2_L100_bdf", "R1_L100_bdf"]
    assert [each["n_files"] for each in told["releases"]] == [0, 0]
    assert all(each["deleted_bytes"] > 0 and each["prepared"] is None for each in told["releases"])
    assert told["n_recordings"] == Store(tmp_path / "store").recordings.num_rows
    refusals = [refusal["id"] for each in told["releases"] for refusal in each["refusals"]]
    assert sum(told["refused"].values()) == len(refusals) == sum("refused: " in line for line in said)
    assert not list((tmp_path / "raw").glob("*/*"))


def test_every_step_has_an_option(corpus: Path, tmp_path: Path) -> None:
    """In the order in which they are usually run."""
    options = [
        "--drop-flat",
        "--notch",
        "20",
        "--high-pass",
        "1",
        "--low-pass",
        "30",
        "--reference",
        "average",
    ]
    run(
        "prepare",
        corpus,
        tmp_path / "store",
        "--subjects",
        1,
        "--task",
        "RestingState",
        *options,
        "--resample",
        "50",
    )
    steps = json.loads(run("inspect", tmp_path / "store", "--json").stdout)["calls"][0]["steps"]["eeg"]

    assert [step["step"] for step in steps] == ["drop_flat", "notch", "band_pass", "rereference", "resample"]


def test_a_damaged_store_is_exit_code_1_and_located(corpus: Path, tmp_path: Path) -> None:
    """The recording and the seconds are named."""
    run("prepare", corpus, tmp_path / "store", "--subjects", 1, "--task", "RestingState")
    shard = next((tmp_path / "store").glob("parts/*/eeg/c/0/0"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    said = engram("verify", tmp_path / "store")

    assert said.returncode == 1
    assert "block 0: sub-" in said.stdout
    assert "RestingState eeg 0.00-" in said.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["inspect", "nowhere"], 4, "engram: nowhere holds no store"),
        (["prepare", "nowhere", "store"], 2, "engram: "),
        (["prepare", "{corpus}", "store", "--memory", "lots"], 2, "'lots' is not a size"),
        (["prepare", "{corpus}", "store", "--memory", "30 MB"], 3, "Raise the memory budget to at least"),
        (["prepare", "{corpus}", "store", "--precision", "float8"], 2, "Unknown precision 'float8'"),
        (["prepare", "{corpus}", "store", "--high-pass", "-1"], 2, "engram: "),
        (["list", "{corpus}", "--task", "Sleeping"], 2, "engram: "),
        (
            ["list", "s3://nmdatasets/NeurIPS25"],
            2,
            "is a URL. Prepare it with engram prepare s3://nmdatasets",
        ),
        (["list", "{corpus}", "--subjects", ""], 2, "has an empty value"),
        (["list", "{corpus}", "--subjects", "007"], 2, "007"),
        (["prepare", "{corpus}", "store", "--notch", "50,a"], 2, "are not all numbers"),
        (["prepare", "{corpus}", "{corpus}"], 2, "is no store and is not empty"),
        (["prepare", "{corpus}", "store", "--delete-raw"], 2, "is no URL, and nothing deleted"),
        (["prepare", "file://{corpus}", "store", "--release", "R9"], 2, "Use one of: R1, R2."),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, message: str
) -> None:
    """No traceback: what happened, and what to do."""
    monkeypatch.chdir(tmp_path)
    said = engram(*(word.format(corpus=corpus) for word in words))

    assert said.returncode == code
    assert message in said.stderr
    assert said.stderr.count("\n") == 1


def test_ctrl_c_ends_without_a_traceback_and_is_resumed(corpus: Path, tmp_path: Path) -> None:
    """Exit code 130, as shells have it."""
    command = [sys.executable, "-m", "engram", "-v", "prepare", str(corpus), str(tmp_path / "store")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "building" in line:
                process.send_signal(signal.SIGINT)
                break
        said = process.stderr.read()

    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("engram: interrupted. Run the same again: what is finished is not done again.\n")
    assert engram("prepare", corpus, tmp_path / "store").returncode == 0


def test_memory_shows_the_limit_that_binds() -> None:
    """Exactly one."""
    limits = json.loads(run("memory", "--json").stdout)["limits"]

    assert sum(limit["binds"] for limit in limits) == 1
    assert limits[-1]["kind"] == "disk"
    assert "binds" in run("memory").stdout


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``--version``, without a command."""
    monkeypatch.setattr(sys, "argv", ["engram", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("engram 0.")
