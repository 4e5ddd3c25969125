"""The output of `make gpu`: the record, the table of the results so far, and the targets."""

from collections.abc import Iterator, Mapping
from typing import Any

from .. import report

UNNAMED = "gpu"  # until a stage has reported the name of the GPU


def slug(results: Mapping[str, Any]) -> str:
    return report.slug(results["machine"]) if "machine" in results else UNNAMED


def record(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results in the format of benchmarks/report.py."""
    empty = {"cases": [], "cores_used_by_others": None}
    return {"runs": {results.get("instruction_set", "cuda"): {**empty, **results}}}


def lines(results: Mapping[str, Any]) -> list[str]:
    text = [
        f"{results.get('machine', 'no device has been described')}, extension: {results.get('build', '?')}"
    ]
    text += ["", "seconds of each stage: " + ", ".join(f"{k} {v}" for k, v in results["seconds"].items())]
    if passes := results.get("passes"):
        text += ["", f"passes, as a share of the rate of a copy, {results.get('copy_gb_per_s', 0)} GB/s"]
        for item in passes:
            shares = ", ".join(f"{side} {share:.1%}" for side, share in item["of_copy"].items())
            text.append(f"    {item['pass']:52} {shares}")
    if cases := results.get("cases"):
        text += ["", f"{results.get('backend', 'auto')}: forward + backward, time on the device"]
        text.append(f"{'':56}{'x eager':>9}{'x compile':>11}{'x triton':>10}{'ms':>9}")
        for row in cases:
            ratios = [report.speedup(row, side) for side in ("eager", "compile")]
            rival = f"{report.speedup(row, 'triton'):10.2f}" if "triton" in row["median_ms"] else f"{'':10}"
            time = row["median_ms"]["fused"]
            text.append(f"{row['case']:56}{ratios[0]:9.1f}{ratios[1]:11.1f}{rival}{time:9.3f}")
            replays = results.get("replay_us", {}).get(row["case"], {})
            for label, times in (
                ("host", row.get("host_us")),
                ("wall", row.get("wall_us")),
                ("graph replay", replays),
            ):
                if times:
                    text.append(
                        f"    {label}, us: " + ", ".join(f"{side} {value}" for side, value in times.items())
                    )
    for item in results.get("steps", ()):
        values = ", ".join(f"{side} {value}" for side, value in item["us"].items())
        text += ["", f"a training step, us, {item['step']}", f"    {values} (compiled: {item['compiled']})"]
    if tuned := results.get("tuned"):
        text += ["", "Triton's table"]
        for kernel, item in tuned.items():
            text.append(f"    {kernel}: {item['choice']}, {item['times_faster_than_table']} times as fast")
    if targets := list(check_targets(results)):
        text += ["", *(f"{'ok ' if met else 'NOT'} {target}" for met, target in targets)]
    text += ["", *(f"FAILED: {failure}" for failure in results["failures"])] if results["failures"] else []
    return text


def markdown(results: Mapping[str, Any]) -> str:
    """The cases and the steps as tables for docs/benchmarks.md."""
    text = [
        "| forward + backward | ms | × eager | × compiled | × Triton's kernels |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in results.get("cases", ()):
        ratios = [
            f"{report.speedup(row, s):.1f}" if s in row["median_ms"] else ""
            for s in ("eager", "compile", "triton")
        ]
        text.append(f"| {row['case']} | {row['median_ms']['fused']:.3f} | {' | '.join(ratios)} |")
    text += [
        "",
        "| training step, ms | hand-written | compiled | fused | `graph_step`, hand-written | `graph_step`, fused |",
    ]
    text += ["|---|--:|--:|--:|--:|--:|"]
    for item in results.get("steps", ()):
        sides = ("eager", "compile", "fused", "graph_step(eager)", "graph_step(fused)")
        times = " | ".join(f"{item['us'][side] / 1e3:.2f}" if side in item["us"] else "" for side in sides)
        text.append(f"| {item['step']} | {times} |")
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    text += [
        "",
        f"{results['machine']}; a copy moves {results['copy_gb_per_s']:.0f} GB/s; {versions}; {results['date']}.",
    ]
    return "\n".join(text)


def check_targets(results: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield (met, target) for the targets on an H200 that have been measured."""
    main = results.get("backend")
    for item in results.get("passes", ()):
        if main not in item["of_copy"]:
            continue
        share = item["of_copy"][main]
        if (target := _target_share(item["pass"])) is not None:
            yield share >= target, f"{item['pass']}: {share:.1%} of a copy's rate (at least {target:.0%})"
    for row in results.get("cases", ()):
        if "wall_us" in row:
            if row["case"].startswith("ELBO step"):
                for side, floor in (("eager", 3), ("compile", 2)):
                    ratio = row["wall_us"][side] / row["wall_us"]["fused"]
                    yield ratio >= floor, f"{row['case']}: {ratio:.1f} x {side} (at least {floor})"
        elif row["floors"]:
            ratio, target = report.speedup(row, "compile"), row["floors"]["compile"]
            yield ratio >= target, f"{row['case']}: {ratio:.2f} x compile (at least {target})"
    for item in results.get("steps", ()):
        if "MLP" in item["step"] and "graph_step(fused)" in item["us"]:
            for side, floor in (("eager", 5), ("compile", 1.5)):
                if side in item["us"]:
                    ratio = item["us"][side] / item["us"]["graph_step(fused)"]
                    yield ratio >= floor, f"{item['step']}: {ratio:.1f} x {side} (at least {floor})"


def _target_share(name: str) -> float | None:
    """The target of a pass as a share of the rate of a copy, or None."""
    if name.startswith("reparameterise"):
        return None if "backward" in name else 0.75 if "fp32" in name else 0.45
    return 0.9
