"""One rank under torchrun: `torchrun --nproc-per-node N -m launch.torchrun PROMPT …`, like `generate`."""

from __future__ import annotations

from launch.shell.early import begin


def main() -> None:
    """Run one rank."""
    begin()
    from launch.commands.torchrun import main as run

    run()


if __name__ == "__main__":
    main()
