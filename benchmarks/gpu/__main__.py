"""`python -m benchmarks.gpu`; with `--stage NAME` one of its stages, in this process."""

import argparse
import sys
from pathlib import Path

from . import plan, run, stage

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    parser.add_argument("--seconds", type=float, default=480, help="for all of it (default: 480)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on small shapes")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another share for a stage"
    )
    parser.add_argument("--stage", choices=plan.SHARES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage.main(options.stage, options.out, options.seconds)
        return
    limits = {name: float(seconds) for name, _, seconds in (text.partition("=") for text in options.limit)}
    if unknown := limits.keys() - plan.SHARES.keys():
        parser.error(f"--limit: no stage {', '.join(unknown)}; the stages are {', '.join(plan.SHARES)}")
    if not options.rehearse and not plan.sees_gpu():
        print("make gpu: torch sees no GPU here, so there is nothing to do")
        return
    sys.exit(run.all_stages(plan.stages(options.rehearse), options.out, options.seconds, limits))


if __name__ == "__main__":
    main()
