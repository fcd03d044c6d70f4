"""Starts Lockstep: the command line, torchrun, Ray, and queues and films on Ray."""
