"""Lockstep's own engine on tensors that do not exist: what a job would compute, hold, send and launch.

It needs neither weights nor a GPU, and says nothing of numbers, hangs or the real speed of anything.
"""
