"""Rehearsals: the engine on fake tensors, counting what a job would compute, hold, send and launch.

A rehearsal needs neither weights nor a GPU, and tells nothing about numbers, hangs or real speed.
"""
