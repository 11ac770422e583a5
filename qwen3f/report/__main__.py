"""python -m qwen3f.report W [--picture=OUT.svg]: write W/report.html, or a single figure for a README."""

import argparse
import sys
from pathlib import Path

from qwen3f.errors import UserError
from qwen3f.report.picture import write_picture
from qwen3f.report.write import NAME, write_report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m qwen3f.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("workdir", type=Path, help="of a run, or of a pipeline")
    parser.add_argument("--picture", type=Path, help="write this .svg or .png instead of the report")
    given = parser.parse_args(arguments)
    try:
        print(write_picture(given.workdir, given.picture) if given.picture else write_report(given.workdir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = given.picture or given.workdir / NAME  # the error itself names a temporary file
        other = "another --picture" if given.picture else "a copy of the directory, or write --picture=OUT.svg"
        print(f"error: {place} cannot be written ({error.strerror or error}); choose {other}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
