"""What `make gpu` prints and keeps: the record, the table of what there is so far, and what was to be reached."""

from collections.abc import Iterator, Mapping
from typing import Any

from .. import report

UNNAMED = "gpu"  # until a stage has said which it is


def slug(kept: Mapping[str, Any]) -> str:
    return report.slug(kept["machine"]) if "machine" in kept else UNNAMED


def record(kept: Mapping[str, Any]) -> dict[str, Any]:
    """As benchmarks/report.py reads it."""
    empty = {"cases": [], "cores_used_by_others": None}
    return {"runs": {kept.get("instruction_set", "cuda"): {**empty, **kept}}}


def lines(kept: Mapping[str, Any]) -> list[str]:
    found = [f"{kept.get('machine', 'no device has been described')}, extension: {kept.get('build', '?')}"]
    found += ["", "seconds of each stage: " + ", ".join(f"{k} {v}" for k, v in kept["seconds"].items())]
    if passes := kept.get("passes"):
        found += ["", f"passes, of the rate of a copy, {kept.get('copy_gb_per_s', 0)} GB/s"]
        for item in passes:
            told = ", ".join(f"{side} {share:.1%}" for side, share in item["of_copy"].items())
            found.append(f"    {item['pass']:52} {told}")
    if cases := kept.get("cases"):
        found += ["", f"{kept.get('backend', 'auto')}: forward + backward, time on the device"]
        found.append(f"{'':56}{'x eager':>9}{'x compile':>11}{'x triton':>10}{'ms':>9}")
        for row in cases:
            ratios = [report.faster(row, side) for side in ("eager", "compile")]
            rival = f"{report.faster(row, 'triton'):10.2f}" if "triton" in row["median_ms"] else f"{'':10}"
            time = row["median_ms"]["fused"]
            found.append(f"{row['case']:56}{ratios[0]:9.1f}{ratios[1]:11.1f}{rival}{time:9.3f}")
            for label in ("host_us", "wall_us", "graph_replay_us"):
                if told := ", ".join(f"{side} {value}" for side, value in row.get(label, {}).items()):
                    found.append(f"    {label.removesuffix('_us').replace('_', ' ')}, us: {told}")
    for item in kept.get("steps", ()):
        told = ", ".join(f"{side} {value}" for side, value in item["us"].items())
        found += ["", f"a training step, us, {item['step']}", f"    {told} (compiled: {item['compiled']})"]
    if tuned := kept.get("tuned"):
        found += ["", "Triton's table"]
        for kernel, item in tuned.items():
            found.append(f"    {kernel}: {item['choice']}, {item['times_faster_than_table']} times as fast")
    if reached := list(floors(kept)):
        found += ["", *(f"{'ok ' if met else 'NOT'} {text}" for met, text in reached)]
    found += ["", *(f"FAILED: {text}" for text in kept["failures"])] if kept["failures"] else []
    return found


def floors(kept: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """(reached, what): what the kernels are meant to reach on an H200, of what has been measured."""
    main = kept.get("backend")
    for item in kept.get("passes", ()):
        if main not in item["of_copy"]:
            continue
        share = item["of_copy"][main]
        if (least := _least_share(item["pass"])) is not None:
            yield share >= least, f"{item['pass']}: {share:.1%} of a copy's rate (at least {least:.0%})"
    for row in kept.get("cases", ()):
        if "wall_us" in row:
            if row["case"].startswith("ELBO step"):
                for side, floor in (("eager", 3), ("compile", 2)):
                    ratio = row["wall_us"][side] / row["wall_us"]["fused"]
                    yield ratio >= floor, f"{row['case']}: {ratio:.1f} x {side} (at least {floor})"
        elif row["floors"]:
            ratio, least = report.faster(row, "compile"), row["floors"]["compile"]
            yield ratio >= least, f"{row['case']}: {ratio:.2f} x compile (at least {least})"
    for item in kept.get("steps", ()):
        if "MLP" in item["step"] and "graph_step(fused)" in item["us"]:
            for side, floor in (("eager", 5), ("compile", 1.5)):
                if side in item["us"]:
                    ratio = item["us"][side] / item["us"]["graph_step(fused)"]
                    yield ratio >= floor, f"{item['step']}: {ratio:.1f} x {side} (at least {floor})"


def _least_share(name: str) -> float | None:
    """Of the rate of a copy."""
    if name.startswith("reparameterise"):
        return None if "backward" in name else 0.75 if "fp32" in name else 0.45
    return 0.9
