"""Plot one column of metrics.csv of several training runs.

    python -m benchmarks.curves val_neg_bound runs/vae runs/iwae --out curves.png

A run without this column is shown with `val_neg_elbo`, which is the bound of one draw. The axis shows the lowest nats.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(run: Path, column: str) -> tuple[str, list[int], list[float]]:
    """The name of the column, the epochs and the values."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    name = column if column in rows[0] else "val_neg_elbo"
    return name, [int(row["epoch"]) for row in rows], [float(row[name]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("column")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    lowest, epochs = [], [0]
    for run in options.runs:
        name, epochs, values = read(run, options.column)
        axis.plot(epochs, values, label=f"{run.name}: {name}")
        lowest.append(min(values))
        marks = [i for i in range(len(epochs)) if (i + 1) % max(1, len(epochs) // 6) == 0]
        print(f"{run.name}, {name}:", ", ".join(f"{epochs[i]}: {values[i]:.2f}" for i in marks))
    axis.set_ylim(min(lowest) - 1, max(lowest) + 12)
    axis.set_xlabel("epoch")
    axis.set_ylabel("nats per image")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(options.out, dpi=120)
    plt.close(figure)
    print(options.out)


if __name__ == "__main__":
    main()
