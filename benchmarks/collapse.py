"""Plot two text runs beside each other: with and without the measures against posterior collapse.

    fastvae train text --data sentences.txt --out runs/text
    fastvae train text --data sentences.txt --out runs/collapsed --free-bits 0 --warmup none --word-dropout 0
    python -m benchmarks.collapse runs/text runs/collapsed --out collapse.png

This reads the runs' metrics.csv, whose values were measured on held-out sentences after each epoch.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("val_kl", "KL, nats"),
    ("mutual_information", "mutual information of x and z, nats"),
    ("active_units", "active units"),
    ("val_perplexity", "perplexity (upper bound)"),
)


def read(run: Path) -> dict[str, list[float]]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in ("epoch", *(name for name, _ in PANELS))}


def draw(protected: dict[str, list[float]], collapsed: dict[str, list[float]], out: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.2 * len(PANELS), 2.8), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS, strict=True):
        axis.plot(protected["epoch"], protected[name], marker=".", label="free bits, warm-up, word dropout")
        axis.plot(collapsed["epoch"], collapsed[name], marker=".", label="none of them")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("protected", type=Path, help="the run with these measures")
    parser.add_argument("collapsed", type=Path, help="the run without them")
    parser.add_argument("--out", type=Path, default=Path("collapse.png"))
    options = parser.parse_args()
    draw(read(options.protected), read(options.collapsed), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
