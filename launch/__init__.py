"""Starts Lockstep: the command line, torchrun, Ray, and queues and films on Ray."""

import gc

# torch, diffusers and transformers are 3,000 modules, which stay: looking through them for garbage after
# every 700 new objects takes a fifth of the time that a command, a rank or an actor needs to start.
gc.set_threshold(20_000, 10, 10)
