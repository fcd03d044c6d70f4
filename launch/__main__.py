"""`python -m launch` is `lockstep`."""

from launch.cli import main

main()
