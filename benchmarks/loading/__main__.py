"""Command line of the benchmark of readers."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.loading.page import markdown, write_page
from benchmarks.loading.reader import Regime
from benchmarks.loading.readers import READERS
from benchmarks.loading.results import load, save
from benchmarks.loading.run import ROOT, Plan, run

from engram.units import parse_bytes

REGIMES: tuple[Regime, ...] = ("warm", "capped", "overlap")
PUBLISHED = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
ASSETS = ROOT / "docs" / "assets"
SCRATCH = ROOT / "build" / "benchmarks"
UNFINISHED = SCRATCH / "unfinished"
"""Results up to the last whole round: whoever breaks a run off has these."""

RECORDINGS, CAP, ROUNDS, SECONDS = 150, "512 MB", 5, 5.0
"""The corpus is 3.10 GB: 6.05 times the cap. Under 400 MB, braindecode with two workers is killed."""
QUICK_RECORDINGS, QUICK_CAP, QUICK_ROUNDS, QUICK_SECONDS = 50, "512 MB", 1, 1.0


def main() -> int:
    """Measure and write the results; the exit code says whether every reader was right."""
    options = _parser().parse_args()
    results = options.results or (PUBLISHED if _is_whole(options) else SCRATCH / "results")
    if not options.page:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is below is cleaned up
        plan = _plan(options)
        shutil.rmtree(plan.folder, ignore_errors=True)
        plan.folder.mkdir(parents=True)
        try:
            for n_rounds, outcome in enumerate(run(plan, lambda line: print(line, flush=True)), 1):
                save(UNFINISHED, replace(plan, rounds=n_rounds), outcome)
            save(results, plan, outcome)
        finally:
            if not options.keep:
                shutil.rmtree(plan.folder, ignore_errors=True)
    rows, machine = load(results)
    print(markdown(rows, machine))
    if results == PUBLISHED:
        write_page(PAGE, ASSETS, rows, machine)
    return 1 if machine["missing"] or machine["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round on a small corpus")
    parser.add_argument("--readers", help=f"some of: {'; '.join(READERS)}; separated by semicolons")
    parser.add_argument("--regimes", help=f"some of {', '.join(REGIMES)}, separated by commas")
    parser.add_argument("--rounds", type=int, help=f"how often each cell is measured ({ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"how long a cell is measured ({SECONDS:g})")
    parser.add_argument("--recordings", type=int, help=f"of 20.6 MB each, in the corpus ({RECORDINGS})")
    parser.add_argument("--cap", help=f"memory of a capped cell ({CAP})")
    parser.add_argument("--folder", type=Path, default=SCRATCH / "forms", help="where the readers' files go")
    parser.add_argument("--keep", action="store_true", help="leave the readers' files where they are")
    parser.add_argument("--results", type=Path, help="where results go; a whole run's are published")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page anew")
    return parser


def _is_whole(options: argparse.Namespace) -> bool:
    parts = (options.quick, options.readers, options.regimes, options.rounds, options.seconds,
             options.recordings, options.cap)  # fmt: skip
    return not any(parts)


def _plan(options: argparse.Namespace) -> Plan:
    names = [name.strip() for name in options.readers.split(";")] if options.readers else list(READERS)
    asked = options.regimes.split(",") if options.regimes else list(REGIMES)
    if unknown := {*names} - {*READERS} | {*asked} - {*REGIMES}:
        raise SystemExit(f"There is no {min(unknown)!r}. See --help for the names.")
    quick = options.quick
    return Plan(
        readers=tuple(READERS[name] for name in names),
        regimes=tuple(regime for regime in REGIMES if regime in asked),
        n_recordings=options.recordings or (QUICK_RECORDINGS if quick else RECORDINGS),
        cap_bytes=parse_bytes(options.cap or (QUICK_CAP if quick else CAP)),
        rounds=options.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        seconds=options.seconds or (QUICK_SECONDS if quick else SECONDS),
        folder=options.folder.resolve(),
    )


if __name__ == "__main__":
    sys.exit(main())
