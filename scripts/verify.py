"""Hash the files of an experiment again, and name what is not what its manifests and its table say."""

import argparse
import sys
from pathlib import Path

from lorasweep.verification import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="an experiment's folder: results/<experiment>")
    arguments = parser.parse_args()
    files, mismatches = verify(arguments.results)
    for mismatch in mismatches:
        print(f"{mismatch.path}: {mismatch.what}")
    if mismatches or not files:
        sys.exit(f"{len(mismatches)} of {files} files and rows do not match" if files else "there is no manifest")
    print(f"{files} files are what their manifests say")


if __name__ == "__main__":
    main()
