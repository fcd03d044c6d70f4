"""Starts Lockstep: the command line, torchrun, Ray, and queues and films on Ray.

What is named here is for programs of others, and explained in docs/python.md; nothing else is promised.
"""

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.serve.submission import Submitted, submit

# torch, diffusers and transformers are 3,000 modules, which stay: looking through them for garbage after
# every 700 new objects takes a fifth of the time that a command, a rank or an actor needs to start.
gc.set_threshold(20_000, 10, 10)

__all__ = ["Submitted", "submit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from launch.serve import submission

    return getattr(submission, name)
