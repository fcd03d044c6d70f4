"""Entry point of `lockstep` and `python -m launch`."""

from __future__ import annotations

from launch.shell.early import begin


def main() -> None:
    """Run the command line."""
    begin()
    from launch.cli import main as run

    run()


if __name__ == "__main__":
    main()
