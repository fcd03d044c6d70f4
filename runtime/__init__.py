"""Lockstep's runtime: one video from one request, on one rank group. Knows torch.distributed, but no Ray."""

__version__ = "0.1.0"
