"""Lockstep in a notebook or a script of one's own; `runtime` names what is promised."""
