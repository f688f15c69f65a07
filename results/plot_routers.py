"""Plot the routers of a run: means over tasks with 95 % intervals, one panel per metric.

    python results/plot_routers.py RUN_DIR [--metric primary nll] [--suite NAME] [--out FILE]

Reads RUN_DIR/summary.parquet and writes RUN_DIR/plots/routers.png. Each panel shows only the single
expert with the best mean.
"""

import argparse
from pathlib import Path

from harness.reporting.plots import plot_routers
from harness.storage import Folder
from phatgoose.errors import PhatgooseError


def main() -> None:
    """Parse the arguments, draw the plot, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", help="folder of the run")
    parser.add_argument(
        "--metric", nargs="+", help="metrics, one panel each (default: primary nll)"
    )
    parser.add_argument("--suite", help="suite of tasks (default: the first)")
    parser.add_argument("--out", type=Path, help="output file (default: RUN_DIR/plots/routers.png)")
    args = parser.parse_args()
    try:
        folder = Folder(args.run_dir)
        print(plot_routers(folder, metrics=args.metric, suite=args.suite, out=args.out))
    except PhatgooseError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
