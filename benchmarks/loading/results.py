"""Results: rows of a run, what they come to, and the files that keep them.

``latest.json`` is a list with an entry for every reader, number of workers and regime;
``machine.json`` beside it says what they were measured on, with which versions and limits, and the ratios
that Engram promises.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.loading.cell import Measured
from benchmarks.loading.corpus import DELIVERED_BYTES, N_CHANNELS, WINDOW_BYTES, WINDOW_SAMPLES
from benchmarks.loading.machine import READ_BYTES, describe_machine, disk_meter, version_of
from benchmarks.loading.run import Cell, Outcome, Plan, Runs

ROWS = "latest.json"
MACHINE = "machine.json"
OTHERS = ("numpy", "torch", "engram")
"""Whose versions count for every reader."""


@dataclass(frozen=True, slots=True)
class Row:
    """One reader, one number of workers, one regime: medians over the rounds."""

    reader: str
    """Name of the reader; ours is ``engram``."""
    regime: str
    """``warm``, ``capped`` or ``overlap``."""
    workers: int
    """Worker processes."""
    outcome: str
    """``measured``; or ``killed`` for want of memory, or ``timed out``: then all rates are 0."""
    windows_per_s: float
    """Windows delivered per second, median."""
    windows_per_s_min: float
    """Slowest round."""
    windows_per_s_max: float
    """Fastest round."""
    gb_per_s: float
    """1e9 bytes of float32 delivered per second."""
    cpu_s_per_gb: float
    """CPU seconds of all processes for that, workers included."""
    peak_mb: float
    """1e6 bytes that the kernel could not take back, of all processes, at the highest."""
    stored_mb: float
    """1e6 bytes that the reader's form takes on disk."""
    first_batch_s: float
    """From the call to the first batch, libraries imported."""
    disk_bytes_per_window: float
    """Bytes that the processes had the disk read."""
    delivered_per_disk: float | None
    """Stored bytes of the windows delivered over bytes from the disk; None where it read next to
    nothing."""
    recordings_per_batch: float
    """Distinct recordings in a batch: how well the order is mixed."""
    rounds: int
    """How often it was measured; once where it is slower than 50 windows/s."""
    kind: str
    """How the reader is asked."""
    shuffle: str
    """In which order windows come."""
    version: str
    """Version of its library."""
    of_limit: list[float]
    """GB/s over what the machine could do right before and right after, of every round: delivered, over
    ``np.copyto``, where warm; from the disk, over its random reads, where capped. Of Engram only."""


def rows_of(outcome: Outcome) -> list[Row]:
    """Make rows; a cell that failed has none."""
    rows = [_row(cell, runs, outcome) for cell, runs in outcome.runs.items() if not runs.failure]
    return sorted(rows, key=lambda row: (("warm", "capped", "overlap").index(row.regime), -row.windows_per_s))


def _row(cell: Cell, runs: Runs, outcome: Outcome) -> Row:
    def median(name: str) -> float:
        return statistics.median(getattr(each, name) for each in measured) if measured else 0.0

    # A cell that was killed in a later round does not survive under this limit.
    measured = runs.measured if runs.outcome == "measured" else []
    rates = [each.windows_per_s for each in measured] or [0.0]
    disk_bytes = median("disk_bytes_per_window")
    windows_per_s = median("windows_per_s")
    return Row(
        reader=cell.reader.name,
        regime=cell.regime,
        workers=cell.workers,
        outcome=runs.outcome,
        windows_per_s=round(windows_per_s, 1),
        windows_per_s_min=round(min(rates), 1),
        windows_per_s_max=round(max(rates), 1),
        gb_per_s=round(windows_per_s * DELIVERED_BYTES / 1e9, 4),
        cpu_s_per_gb=round(median("cpu_s_per_window") / DELIVERED_BYTES * 1e9, 3),
        peak_mb=round(runs.peak_bytes / 1e6, 1),
        stored_mb=round(outcome.form_bytes[cell.reader.form] / 1e6, 1),
        first_batch_s=round(median("first_batch_s"), 3),
        disk_bytes_per_window=round(disk_bytes),
        delivered_per_disk=round(WINDOW_BYTES / disk_bytes, 3) if disk_bytes > WINDOW_BYTES / 100 else None,
        recordings_per_batch=round(median("recordings_per_batch"), 1),
        rounds=len(measured),
        kind=cell.reader.kind,
        shuffle=cell.reader.shuffle,
        version=version_of(cell.reader.distribution),
        of_limit=[
            round(_limited_gb_per_s(cell, each) / limit, 3)
            for each, limit in zip(measured, runs.limits_gb_per_s, strict=False)
        ],
    )


def _limited_gb_per_s(cell: Cell, measured: Measured) -> float:
    """Give what a regime's limit limits: bytes delivered, or bytes from the disk."""
    n_bytes = DELIVERED_BYTES if cell.regime == "warm" else measured.disk_bytes_per_window
    return measured.windows_per_s * n_bytes / 1e9


def ratios_of(rows: list[Row]) -> dict[str, Any]:
    """Compute what Engram promises; None where a part of a ratio was not measured."""
    by_regime = {
        regime: [row for row in rows if row.regime == regime] for regime in ("warm", "capped", "overlap")
    }
    ours = {
        regime: next((row for row in found if row.reader == "engram"), None)
        for regime, found in by_regime.items()
    }

    def against(regime: str, **wanted: Any) -> dict[str, Any] | None:
        """Divide by the best peer of a regime whose fields are as wanted."""
        peers = [
            row
            for row in by_regime[regime]
            if row.reader != "engram"
            and row.windows_per_s > 0
            and all(getattr(row, name) in values for name, values in wanted.items())
        ]
        own = ours[regime]
        if own is None or not peers:
            return None
        best = max(peers, key=lambda row: row.windows_per_s)
        return {
            "ratio": round(own.windows_per_s / best.windows_per_s, 3),
            "peer": best.reader,
            "workers": best.workers,
        }

    warm, capped = ours["warm"], ours["capped"]
    one_by_one = ("as usual", "one by one")
    loaded = (*one_by_one, "whole batches")
    pre_cut = ("gather, pre-cut", "tensordict", "HF datasets", "scDataset", "tensorstore", "zarr-python")
    return {
        "warm: x a DataLoader as most people write it": against("warm", kind=("as usual",)),
        "warm: x the best reader window by window": against("warm", kind=one_by_one),
        "warm: x the best batched reader of pre-cut windows": against("warm", reader=pre_cut),
        "warm: x the best peer": against("warm"),
        "warm: fraction of np.copyto": warm and _spread(warm.of_limit, 3),
        "capped: fraction of the disk's random reads, in bytes from the disk": capped
        and _spread(capped.of_limit, 3),
        "capped: stored bytes delivered / bytes from the disk": capped and capped.delivered_per_disk,
        "capped: x tensorstore": against("capped", reader=("tensorstore",)),
        "capped: x a DataLoader as most people write it": against("capped", kind=("as usual",)),
        "capped: x the best DataLoader peer": against("capped", kind=loaded),
        "capped: x the best peer in global shuffle": against("capped", shuffle=("global",)),
        "capped: x the best peer": against("capped"),
        "overlap: bytes from the disk per window, capped's": [
            ours["overlap"] and ours["overlap"].disk_bytes_per_window,
            capped and capped.disk_bytes_per_window,
        ],
    }


def _spread(values: list[float], digits: int) -> dict[str, float] | None:
    """Give the median of some figures, the lowest and the highest; None of none."""
    if not values:
        return None
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def machine_of(plan: Plan, outcome: Outcome, rows: list[Row], date: datetime) -> dict[str, Any]:
    """Say what the rows were measured on and with."""
    limits = {
        cell.regime: runs.limits_gb_per_s for cell, runs in outcome.runs.items() if runs.limits_gb_per_s
    }
    names = dict.fromkeys([*OTHERS, *(reader.distribution for reader in plan.readers)])
    failed = {str(cell): runs.failure for cell, runs in outcome.runs.items() if runs.failure}
    return {
        "date": date.strftime("%Y-%m-%d"),
        **describe_machine(plan.folder),
        "versions": {name: version_of(name) for name in names},
        "windows": f"{N_CHANNELS} channels x {WINDOW_SAMPLES} samples, float16, {WINDOW_BYTES:,} bytes",
        "corpus_gb": round(plan.n_recordings * 400 * WINDOW_BYTES / 1e9, 2),
        "n_recordings": plan.n_recordings,
        "cap_mb": plan.cap_bytes / 1e6,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "copy_gb_per_s": _spread(limits.get("warm", []), 2),
        "disk_gb_per_s": _spread(limits.get("capped", []), 3),
        "disk_meter": f"{disk_meter()}, {READ_BYTES:,} bytes",
        "settings": {
            reader.name: {
                "library": f"{reader.distribution} {version_of(reader.distribution)}",
                "settings": reader.settings,
                "order": reader.shuffle,
            }
            for reader in plan.readers
        },
        "ratios": ratios_of(rows),
        "missing": outcome.missing,
        "failed": failed,
    }


def save(folder: Path, plan: Plan, outcome: Outcome) -> None:
    """Write both files."""
    rows = rows_of(outcome)
    machine = machine_of(plan, outcome, rows, datetime.now(UTC))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((ROWS, [asdict(row) for row in rows]), (MACHINE, machine)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


def load(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Read both files."""
    rows = [Row(**entry) for entry in json.loads((folder / ROWS).read_text(encoding="utf-8"))]
    return rows, json.loads((folder / MACHINE).read_text(encoding="utf-8"))
