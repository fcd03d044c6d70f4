"""What Ray is told of a driver's job: where its ranks find their modules."""

from __future__ import annotations

import os
import sys

from ray.job_config import JobConfig


class OwnModules(JobConfig):  # type: ignore[misc]
    """Settings of a job whose ranks look for modules only where its driver does.

    Ray puts the driver's current folder first on the ranks' path. That is the user's, whose `random.py` or
    `launch.py` would be imported instead of the real one, unless the driver has its modules from there, too.
    """

    def _serialize(self) -> str:
        """Called by Ray when it has added its folders."""
        own = {os.path.realpath(folder) for folder in sys.path}
        path = self._py_driver_sys_path
        path[:] = [folder for folder in path if os.path.realpath(folder) in own]
        return super()._serialize()  # type: ignore[no-any-return]
