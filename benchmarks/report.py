"""Make a table and a picture of this machine's results: `python -m benchmarks.report`.

This reads the results of the last `pytest benchmarks/` in `.benchmarks/` (and runs it first if there are none, or with
`--run`), saves them in `benchmarks/results/<machine>.json`, draws `<machine>.png`, and prints the table. `--docs`
writes the table into docs/benchmarks.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LATEST = ROOT / ".benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"

LABELS = {"avx2": "AVX2", "avx512": "AVX-512", "default": "no SIMD"}
LABELS |= {"cuda": "GPU"}
# The first one available becomes the table; the others add columns to it.
ORDER = ("cuda", "avx2", "avx512", "default")

Runs = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--run", action="store_true", help="measure again, under AVX2 and, if available, AVX-512"
    )
    parser.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    options = parser.parse_args()

    if options.run or not any(LATEST.glob("latest-*.json")):
        _run_benchmarks(("avx2", "avx512") if options.run and _has_avx512() else (None,))
    for machine in dict.fromkeys(
        _save(json.loads(p.read_text())) for p in sorted(LATEST.glob("latest-*.json"))
    ):
        runs = _load(machine)
        lines = table(runs)
        print("\n".join(align(lines)))
        notes = "\n\n".join(filter(None, (caption(runs), weights(runs))))
        print("\n" + notes)
        draw(runs, machine.with_suffix(".png"))
        print(f"\nwrote {machine.relative_to(ROOT)} and {machine.with_suffix('.png').relative_to(ROOT)}")
        if options.docs:
            put_between(PAGE, "bench", "\n".join([*lines, "", notes]))


def _has_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " avx512f " in cpuinfo.read_text()


def _run_benchmarks(instruction_sets: tuple[str | None, ...]) -> None:
    for name in instruction_sets:
        # One process each, because torch chooses its kernels only once.
        environment = os.environ | ({"ATEN_CPU_CAPABILITY": name} if name else {})
        command = [sys.executable, "-m", "pytest", "-q", "benchmarks"]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
            sys.exit(f"the benchmarks failed: {' '.join(command)}")


def _save(run: dict[str, Any]) -> Path:
    """Save a run in its machine's file, in place of the last run on the same instruction set."""
    path = RESULTS / f"{slug(run['machine'])}.json"
    runs = _load(path) if path.exists() else {}
    runs[run["instruction_set"]] = run
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    return path


def slug(name: str) -> str:
    """A file name for a machine."""
    plain = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _load(path: Path) -> Runs:
    runs = json.loads(path.read_text())["runs"]
    return {name: runs[name] for name in sorted(runs, key=ORDER.index)}


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def speedup(row: dict[str, Any], side: str, times: str = "median_ms") -> float:
    return row[times][side] / row[times]["fused"]


def _speedup_and_floor(row: dict[str, Any], side: str) -> str:
    ratio = speedup(row, side)
    if not row["floors"]:
        return f"{ratio:.1f}"
    floor = row["floors"][side]
    return f"{ratio:.1f} ({floor:g} {_mark(ratio >= floor)})"


def _mark(reached: bool) -> str:
    return "✓" if reached else "✗"


def _speedups(row: dict[str, Any], times: str = "median_ms", *, floors: bool = False) -> str:
    sides = ("eager", "compile")
    return ", ".join(
        _speedup_and_floor(row, side) if floors else f"{speedup(row, side, times):.1f}" for side in sides
    )


def _format_ms(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 1 else f"{milliseconds:.2f}"


def _mebibytes(row: dict[str, Any]) -> str:
    return " / ".join(f"{size / 2**20:.3g}" for size in row["peak_bytes_above_inputs"].values())


def table(runs: Runs) -> list[str]:
    """The results as a Markdown table, one line per case."""
    (_, first), *others = runs.items()
    # On a GPU, Triton's kernels are measured beside the native ones.
    rival = any("triton" in row["median_ms"] for row in first["cases"])
    head = ["case", "fused, ms", "eager, ms", "compiled, ms", "× eager", "× compiled", "GB/s (of mul)"]
    head += ["in cache: × eager, × compiled", "peak memory, MiB"]
    head += ["× Triton"] if rival else []
    head += [f"{LABELS[name]}: × eager, × compiled" for name, _ in others]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in first["cases"]:
        times = row["median_ms"]
        rate = row["bytes_to_move"] / times["fused"] / 1e6
        cells = [row["case"], *(_format_ms(times[side]) for side in ("fused", "eager", "compile"))]
        cells += [_speedup_and_floor(row, "eager"), _speedup_and_floor(row, "compile")]
        cells += [
            f"{rate:.1f} ({times['mul'] / times['fused']:.0%})",
            _speedups(row, "in_cache_median_ms"),
            _mebibytes(row),
        ]
        if rival:
            cells.append(f"{speedup(row, 'triton'):.2f}" if "triton" in times else "")
        for _, other in others:
            matches = [match for match in other["cases"] if match["case"] == row["case"]]
            cells.append(_speedups(matches[0], floors=True) if matches else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def align(lines: list[str]) -> list[str]:
    """Format a Markdown table for a terminal."""
    rows = [
        line.removeprefix("| ").removesuffix(" |").split(" | ")
        for line in lines
        if not line.startswith("|--")
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = []
    for case, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        aligned.append("  ".join([case.ljust(widths[0]), *numbers]))
    return aligned


def caption(runs: Runs) -> str:
    name, run = next(iter(runs.items()))
    versions = run["versions"]
    where = "GPU" if name == "cuda" else f"{run['threads']} threads, {LABELS[name]} on all sides"
    others = run["cores_used_by_others"] or 0.0
    busy = f" (other processes kept {others:.1f} cores busy)" if others > 0.1 else ""
    return (
        f"{run['machine']}; {where}; torch {versions['torch']}, fastvae {versions['fastvae']}; {run['date']}{busy}. "
        "All cases are fp32 unless stated otherwise. The numbers in brackets are the floors that were aimed at, and "
        "whether they are met. GB/s: the minimum number of bytes that a case must move, divided by the fused time, "
        "and its share of the rate at which `torch.mul(a, b, out=c)` moves as many bytes in the same run. In cache: "
        "called again on the same inputs, like a loss that reads the decoder's output in training; otherwise the "
        "inputs of cases that move 8 MiB or more come from memory. Peak memory: the maximum that forward and "
        "backward hold above the inputs, including gradients, for fused / eager / compiled."
    )


def weights(runs: Runs) -> str:
    """How much slower the cases with a limit (`Case.most`) are than the case without weights, by instruction set."""
    sentences = []
    for name, run in runs.items():
        fused = {row["case"]: row["median_ms"]["fused"] for row in run["cases"]}
        limited = [row for row in run["cases"] if row.get("most") and row["most"]["case"] in fused]
        parts = []
        for row in limited:
            ratio, most = fused[row["case"]] / fused[row["most"]["case"]], row["most"]["times"]
            parts.append(f"{row['case']}: {ratio:.2f} (at most {most:g} {_mark(ratio <= most)})")
        if parts:
            base = limited[0]["most"]["case"]
            sentences.append(f"Times as long as {base}, {LABELS[name]}: {'; '.join(parts)}.")
    return "\n".join(sentences)


def put_between(page: Path, mark: str, text: str) -> None:
    """Replace the text between the comments `<!-- mark:begin -->` and `<!-- mark:end -->` of a page."""
    opening, closing = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, begin, rest = page.read_text().partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end:
        sys.exit(f"{page} has no {opening} ... {closing} for the table")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    print(f"wrote {page}")


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------

_COLOURS = {"fused": "#1b7f5c", "eager": "#c8553d", "compile": "#4a6fa5"}
_NAMES = {"fused": "fused", "eager": "eager", "compile": "torch.compile"}


def draw(runs: Runs, path: Path) -> None:
    """Left: the speedup over each baseline. Right: peak memory as a multiple of the fused side's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    (name, run), *others = runs.items()
    rows = run["cases"]
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(12, 0.55 * len(rows) + 1.8), sharey=True, width_ratios=(3, 2), layout="constrained"
    )

    labels: list[tuple[float, float]] = []
    for offset, side in ((-0.2, "eager"), (0.2, "compile")):
        places = [i + offset for i in range(len(rows))]
        ratios = [speedup(row, side) for row in rows]
        speed.barh(places, ratios, 0.38, color=_COLOURS[side], label=f"than {_NAMES[side]}")
        labels += zip(ratios, places, strict=True)
        floors = [
            (row["floors"][side], place) for row, place in zip(rows, places, strict=True) if row["floors"]
        ]
        label = "floor" if side == "compile" else None
        speed.plot(
            *zip(*floors, strict=True), "|", color="black", markersize=11, markeredgewidth=2, label=label
        )
        for other, marker in zip((other for other, _ in others), "Dos", strict=False):
            speedups = {row["case"]: speedup(row, side) for row in runs[other]["cases"]}
            points = [
                (speedups[row["case"]], y)
                for row, y in zip(rows, places, strict=True)
                if row["case"] in speedups
            ]
            label = LABELS[other] if side == "compile" else None
            edge = {"markerfacecolor": "white", "markeredgecolor": "black", "markersize": 4}
            speed.plot(*zip(*points, strict=True), marker, label=label, **edge)
    speed.axvline(1, color="grey", linewidth=0.8)
    speed.set_xscale("log")
    speed.set_xlabel("times faster")
    low, high = speed.get_xlim()
    low *= 0.75
    speed.set_xlim(low, high)
    # The labels are at the foot of the bars, because the marks are at their ends.
    for ratio, place in labels:
        speed.text(low * 1.04, place, f"{ratio:.1f}", color="white", va="center", fontsize=8, weight="bold")
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    speed.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    speed.minorticks_off()
    speed.set_yticks(range(len(rows)), [row["case"] for row in rows])
    speed.invert_yaxis()
    speed.legend(loc="lower right", fontsize=8)

    for offset, side in ((-0.27, "fused"), (0.0, "eager"), (0.27, "compile")):
        shares = [_relative_memory(row, side) for row in rows]
        places = [i + offset for i in range(len(rows))]
        bars = memory.barh(places, shares, 0.25, color=_COLOURS[side], label=_NAMES[side])
        memory.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2, fontsize=7)
    memory.axvline(1, color="grey", linewidth=0.8)
    memory.set_xscale("log")
    memory.set_xlabel("peak memory above the inputs, 1 = fused")
    memory.legend(fontsize=8, loc="lower right")

    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    where = "" if name == "cuda" else f", {run['threads']} threads, {LABELS[name]}"
    figure.suptitle(
        f"Loss, forward + backward: {run['machine']}{where}, torch {run['versions']['torch']}", fontsize=11
    )
    figure.savefig(path, dpi=110)


def _relative_memory(row: dict[str, Any], side: str) -> float:
    peak = row["peak_bytes_above_inputs"]
    return peak[side] / peak["fused"]


if __name__ == "__main__":
    main()
