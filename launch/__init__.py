"""Lockstep's launchers: the command line and, later, torchrun and Ray."""
