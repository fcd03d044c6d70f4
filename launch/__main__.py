"""Entry point of `lockstep` and `python -m launch`."""

from __future__ import annotations

import sys

from launch.shell.namesakes import in_the_way


def main() -> None:
    """Run the command line."""
    try:
        from launch.shell.early import begin

        begin()
        from launch.cli import main as run
    except ImportError as error:
        if not (problem := in_the_way(error)):
            raise
        print(f"lockstep: {problem}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
