"""The driver of a Ray job: `ray job submit --working-dir . -- python -m launch.ray_job PROMPT …`.

Takes the options of `lockstep generate` and runs on the cluster to which it is submitted.
"""

from __future__ import annotations

from launch.shell.early import begin


def main() -> None:
    """Run the driver."""
    begin()
    from launch.commands.ray_job import main as run

    run()


if __name__ == "__main__":
    main()
