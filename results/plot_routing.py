"""Plot the routing weights of a router on one task: experts by layers, a panel per kind of linear.

    python results/plot_routing.py RUN_DIR [--router NAME] [--task NAME] [--out FILE]

Reads one task of one router from RUN_DIR/routing/, and writes
RUN_DIR/plots/routing_<router>_<task>.png.
"""

import argparse
from pathlib import Path

from harness.reporting.plots import plot_routing
from harness.storage import Folder
from phatgoose.errors import PhatgooseError


def main() -> None:
    """Parse the arguments, draw the plot, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", help="folder of the run")
    parser.add_argument("--router", help="router (default: phatgoose, or else the first)")
    parser.add_argument("--task", help="evaluation task (default: the first)")
    parser.add_argument("--out", type=Path, help="output file (default: in RUN_DIR/plots)")
    args = parser.parse_args()
    try:
        folder = Folder(args.run_dir)
        print(plot_routing(folder, router=args.router, task=args.task, out=args.out))
    except PhatgooseError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
