"""`python -m benchmarks.gpu` runs all stages; with `--stage NAME`, it runs one of them in this process."""

import argparse
import json
import sys
from pathlib import Path

from .. import report
from . import plan, run, stage, table

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results"
    )
    parser.add_argument("--seconds", type=float, default=480, help="total time (default: 480)")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU, on small shapes")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="STAGE=SECONDS", help="change the time of a stage"
    )
    parser.add_argument(
        "--docs", type=Path, metavar="RESULTS", help="write these results into docs/benchmarks.md"
    )
    parser.add_argument("--stage", choices=plan.SHARES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.docs:
        (results,) = json.loads(options.docs.read_text())["runs"].values()
        report.put_between(report.PAGE, "gpu", table.markdown(results))
        return
    if options.stage:
        stage.main(options.stage, options.out, options.seconds)
        return
    limits = {name: float(seconds) for name, _, seconds in (text.partition("=") for text in options.limit)}
    if unknown := limits.keys() - plan.SHARES.keys():
        parser.error(f"--limit: unknown stage {', '.join(unknown)}; the stages are {', '.join(plan.SHARES)}")
    if not options.rehearse and not plan.sees_gpu():
        print("make gpu: torch sees no GPU on this machine, so there is nothing to do")
        return
    sys.exit(run.all_stages(plan.stages(options.rehearse), options.out, options.seconds, limits))


if __name__ == "__main__":
    main()
