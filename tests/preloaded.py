"""What a forked process of a test would import: imported once, in the process that it is forked from."""

from __future__ import annotations

import gc
from importlib import import_module
from pkgutil import walk_packages

from ray.dashboard import modules

_MODULES = (
    "hypothesis", "pytest",  # the modules of tests, in which tasks stand, import these
    "runtime.models.wan.family", "runtime.models.wan.image", "runtime.models.wan.text",
    "runtime.measure.calibrate", "runtime.reports.run_picture", "launch.shell.run",
    "runtime.parallel.agent", "launch.commands.torchrun", "launch.cluster.run", "launch.cluster.actor",
    "ray._private.workers.setup_worker", "ray._private.node", "ray._private.log_monitor",
    "ray.autoscaler._private.monitor", "ray.dashboard.dashboard", "ray.dashboard.agent",
    "ray._private.runtime_env.agent.main", "ray._private.runtime_env.agent.runtime_env_agent",
    "tests.ranks", "tests.spare",
)  # fmt: skip

gc.disable()  # modules are no garbage
for name in _MODULES:
    import_module(name)
for _, name, _ in walk_packages(modules.__path__, f"{modules.__name__}."):  # as Ray's dashboard and agent do
    import_module(name)
# A collection in a fork would touch all of these objects, and so copy the memory that they share.
gc.freeze()
gc.enable()
