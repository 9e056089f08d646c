"""Runs the tests in the notebooks, some at a time, and prints a line as each one ends.

    python tests/notebooks.py                        all of them
    python tests/notebooks.py 01_core 09_lab/02_panel  those whose paths begin so
"""
import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("starts", nargs="*", metavar="PATH", help="of notebooks or rooms (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="notebooks at a time (default: %(default)s)")
    options = parser.parse_args()
    os.chdir(NBS)
    os.environ["MUSEKIT_DEMO"] = "none"  # a model of make demo would make some notebooks do more
    paths = {
        path.absolute().relative_to(NBS).as_posix(): path.absolute() for path in nbglob(None, as_path=True)
    }
    names = [name for name in sorted(paths) if name.startswith(tuple(options.starts) or "")]
    if not names:
        raise SystemExit(
            f"no notebook begins with {' or '.join(options.starts)}; there are {', '.join(paths)}"
        )
    settings = {"skip_flags": get_config().tst_flags.split(), "basepath": ROOT}
    start = time.perf_counter()
    failed = []
    with ProcessPoolExecutor(options.workers) as pool:  # a notebook takes the place of __main__ in its worker
        running = {pool.submit(test_nb, paths[name], **settings): name for name in names}
        for number, done in enumerate(as_completed(running), 1):
            passed, seconds = done.result()
            name = running[done]
            failed += [] if passed else [name]
            print(
                f"[{number:3}/{len(names)}] {name:40} {seconds:5.0f} s{'' if passed else '  FAILED'}",
                flush=True,
            )
    print(
        f"{len(names) - len(failed)} of {len(names)} notebooks passed in {time.perf_counter() - start:.0f} s"
    )
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
