"""Lockstep's runtime: makes a video from a request, on one rank group. Uses torch.distributed, not Ray."""

__version__ = "0.1.0"
