"""Lockstep's runtime: makes a video from a request, on one rank group. Uses torch.distributed, not Ray.

What is named here is for programs of others, and explained in docs/python.md; nothing else is promised. It is
imported when it is first used, as torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtime.errors import BadRequestError, CancelledError, JobFailedError, LockstepError

if TYPE_CHECKING:
    from runtime.notebook.model import VideoModel, load, plan
    from runtime.notebook.steps import Step
    from runtime.notebook.video import Video
    from runtime.request.video_request import VideoRequest

__version__ = "0.1.0"

_LATER = {
    **dict.fromkeys(("VideoModel", "load", "plan"), "runtime.notebook.model"),
    "Step": "runtime.notebook.steps",
    "Video": "runtime.notebook.video",
    "VideoRequest": "runtime.request.video_request",
}

__all__ = [
    "BadRequestError",
    "CancelledError",
    "JobFailedError",
    "LockstepError",
    "Step",
    "Video",
    "VideoModel",
    "VideoRequest",
    "load",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LATER[name]), name)
    except ImportError as error:
        foreign = (error.name or "").partition(".")[0] == "spectrum" or _raised_by_spectrum(error)
        if not foreign:
            raise
        raise ImportError(
            f"{error}. This 'spectrum' is not Lockstep's, or is incomplete: rename or uninstall it, start "
            "Python in another folder, or install Lockstep into an environment of its own (docs/python.md)"
        ) from error


def _raised_by_spectrum(error: ImportError) -> bool:
    """Whether an import failed in a package of this name: PyPI's overwrites the file of Lockstep's."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__") == "spectrum":
            return True
        frame = frame.tb_next
    return False


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
