"""Page: the tables and the plot that the documentation shows, out of a run's files.

The page is written by hand but for what stands between two marks; that part is replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.loading.corpus import DELIVERED_BYTES, WINDOW_BYTES
from benchmarks.loading.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEGIN = "<!-- what follows is written by make bench -->"
END = "<!-- what comes before is written by make bench -->"
PLOT = "benchmarks.svg"
REGIMES = {
    "warm": "Warm: everything in the page cache",
    "capped": "Capped: memory for a sixth of the data, cold cache",
    "overlap": "Overlap: capped, windows at half a window's stride",
}
OURS, THEIRS = "#c2410c", "#64748b"


def write_page(page: Path, assets: Path, rows: list[Row], machine: dict[str, Any]) -> None:
    """Replace what is generated, and draw the plot.

    Raises
    ------
    ValueError
        If the page has lost its marks.
    """
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        raise ValueError(f"{page.name} has lost its marks. Put back {BEGIN!r} and {END!r}.")
    generated = markdown(rows, machine)
    page.write_text(f"{before}{BEGIN}\n\n{generated}\n{END}{after}", encoding="utf-8")
    draw(assets / PLOT, rows, machine)


def markdown(rows: list[Row], machine: dict[str, Any]) -> str:
    """Write all tables."""
    parts = [_machine_text(machine), f"![Windows per second of every reader](../assets/{PLOT})"]
    for regime, title in REGIMES.items():
        found = [row for row in rows if row.regime == regime]
        if found:
            parts += [f"## {title}", _table(found)]
    parts += ["## What Engram promises", _ratios(machine["ratios"])]
    parts += ["## Settings of each reader", _settings(machine["settings"])]
    parts += _left_out(machine)
    return "\n\n".join(parts) + "\n"


def _machine_text(machine: dict[str, Any]) -> str:
    copy, disk = machine["copy_gb_per_s"], machine["disk_gb_per_s"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = {
        "Date": machine["date"],
        "Processor": machine["processor"],
        "Memory, disk": f"{machine['memory']}, {machine['disk']}",
        "System": machine["system"],
        "Windows": machine["windows"],
        "Data": f"{machine['corpus_gb']:.2f} GB in {machine['n_recordings']} recordings",
        "Memory in the capped regime": f"{machine['cap_mb']:.0f} MB for all processes, page cache included",
        "A cell": f"{machine['seconds']:g} s, the median of {machine['rounds']} rounds",
        "`np.copyto`, one thread": f"{_spread(copy, 1)} GB/s",
        "Disk, random reads": f"{_spread(disk, 2)} GB/s, by {machine['disk_meter']}, depth 32",
        "Versions": versions,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())])


def _table(rows: list[Row]) -> str:
    head = (
        "| reader | workers | windows/s | (min to max) | GB/s | CPU s/GB | peak MB | on disk, GB "
        "| first batch, s | disk kB/window | stored/disk | recordings/batch |"
    )
    align = "|---|" + "--:|" * 11
    return "\n".join([head, align, *(_table_row(row) for row in rows)])


def _table_row(row: Row) -> str:
    name = f"**{row.reader}**" if row.reader == "engram" else row.reader
    mark = "" if row.shuffle == "global" else " ¹"
    common = [f"{name}{mark}", str(row.workers)]
    if row.outcome != "measured":
        cells = [*common, row.outcome, "", "", "", f"{row.peak_mb:.0f}", f"{row.stored_mb / 1000:.2f}"]
        return f"| {' | '.join([*cells, '', '', '', ''])} |"
    share = "" if row.delivered_per_disk is None else f"{row.delivered_per_disk:.2f}"
    cells = [
        *common, _rate(row.windows_per_s),
        f"{_rate(row.windows_per_s_min)} to {_rate(row.windows_per_s_max)}" if row.rounds > 1 else "once",
        f"{row.gb_per_s:.2f}", f"{row.cpu_s_per_gb:.2f}", f"{row.peak_mb:.0f}", f"{row.stored_mb / 1000:.2f}",
        f"{row.first_batch_s:.2f}", f"{row.disk_bytes_per_window / 1000:.1f}", share,
        f"{row.recordings_per_batch:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _rate(windows_per_s: float) -> str:
    return f"{windows_per_s:,.0f}" if windows_per_s >= 10 else f"{windows_per_s:.1f}"


def _ratios(ratios: dict[str, Any]) -> str:
    lines = ["| | measured |", "|---|--:|"]
    for name, value in ratios.items():
        if isinstance(value, dict) and "peer" in value:
            shown = f"{value['ratio']:.2f} ({value['peer']}, {value['workers']} workers)"
        elif isinstance(value, dict):
            shown = _spread(value, 3)
        elif isinstance(value, list):
            shown = ", ".join("not measured" if each is None else f"{each:,.0f}" for each in value)
        else:
            shown = "not measured" if value is None else f"{value:.2f}"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


def _spread(found: dict[str, float] | None, digits: int) -> str:
    if found is None:
        return "not measured"
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def _settings(settings: dict[str, dict[str, str]]) -> str:
    lines = ["| reader | library | settings | order |", "|---|---|---|---|"]
    for name, each in settings.items():
        mark = "" if each["order"] == "global" else " ¹"
        lines.append(f"| {name}{mark} | {each['library']} | {each['settings']} | {each['order']} |")
    return "\n".join([*lines, "", "¹ Not a global shuffle: easier to read, and less mixed."])


def _left_out(machine: dict[str, Any]) -> list[str]:
    lines = [f"- {name}: {why}" for name, why in {**machine["missing"], **machine["failed"]}.items()]
    return ["## Not measured", "\n".join(lines)] if lines else []


def draw(path: Path, rows: list[Row], machine: dict[str, Any]) -> None:
    """Draw windows per second by reader, a panel for each regime, the best number of workers."""
    import matplotlib as mpl

    mpl.use("svg")
    # Without these, every drawing of the same rows is another file.
    mpl.rcParams["svg.hashsalt"] = "engram"
    from matplotlib import pyplot as plt

    regimes = [regime for regime in REGIMES if any(row.regime == regime for row in rows)]
    best = {regime: _best(rows, regime) for regime in regimes}
    heights = [len(found) for found in best.values()]
    figure, panels = plt.subplots(
        len(regimes), 1, figsize=(9, 0.28 * sum(heights) + 1.1 * len(regimes)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for panel, regime in zip(panels[:, 0], regimes, strict=True):
        _draw_panel(panel, best[regime], REGIMES[regime])
        _draw_limit(panel, regime, machine)
    panels[-1, 0].set_xlabel("windows/s (129 x 200, float32 delivered), median, slowest and fastest round")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _best(rows: list[Row], regime: str) -> list[Row]:
    """Give each reader's faster row, the fastest last."""
    found: dict[str, Row] = {}
    for row in sorted((row for row in rows if row.regime == regime), key=lambda row: row.windows_per_s):
        found[row.reader] = row
    return sorted(found.values(), key=lambda row: row.windows_per_s)


def _draw_panel(panel: Axes, rows: list[Row], title: str) -> None:
    names = [f"{row.reader}{'' if row.shuffle == 'global' else ' ¹'} ({row.workers})" for row in rows]
    rates = [max(row.windows_per_s, 1) for row in rows]
    spread = [
        [rate - max(row.windows_per_s_min, 1) for rate, row in zip(rates, rows, strict=True)],
        [max(row.windows_per_s_max, 1) - rate for rate, row in zip(rates, rows, strict=True)],
    ]
    colors = [OURS if row.reader == "engram" else THEIRS for row in rows]
    panel.barh(names, rates, xerr=spread, color=colors, ecolor="black", height=0.7)
    for place, row in enumerate(rows):
        text = f"{row.windows_per_s:,.0f}" if row.outcome == "measured" else row.outcome
        end = max(row.windows_per_s_max, 1)
        panel.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    panel.set_xscale("log")
    panel.set_xlim(1, 4 * max(rates))
    panel.tick_params(axis="y", labelsize=8)
    panel.set_title(title, fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _draw_limit(panel: Axes, regime: str, machine: dict[str, Any]) -> None:
    name = "np.copyto" if regime == "warm" else "disk"
    found = machine["copy_gb_per_s" if regime == "warm" else "disk_gb_per_s"]
    if found is None:
        return
    limit = found["median"] * 1e9 / (DELIVERED_BYTES if regime == "warm" else WINDOW_BYTES)
    panel.axvline(limit, color="black", linestyle=":", linewidth=1)
    panel.annotate(name, (limit, 0), (3, -2), textcoords="offset points", fontsize=7)
