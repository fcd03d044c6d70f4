"""What a forked process of a test would import: imported once, in the process that it is forked from.

Tables that libraries make when they are first used are made here, too, and the sampler of wan-tiny is tried.
No weights are loaded, and no model runs: its threads would be lost in a fork.
"""

from __future__ import annotations

import gc
from importlib import import_module
from io import BytesIO
from pkgutil import walk_packages

from ray.dashboard import modules

_MODULES = (
    "hypothesis", "pytest",  # the modules of tests, in which tasks stand, import these
    "runtime.models.clips", "runtime.models.wan.attention", "runtime.models.wan.colours",
    "runtime.models.wan.family", "runtime.models.wan.image", "runtime.models.wan.text",
    "transformers.models.mt5", "transformers.models.t5.tokenization_t5",
    "runtime.measure.calibrate", "runtime.reports.run_picture", "launch.shell.run",
    "runtime.parallel.agent", "launch.cli", "launch.commands.torchrun", "launch.http.pool",
    "launch.cluster.run", "launch.cluster.actor",
    "ray._private.workers.setup_worker", "ray._private.node", "ray._private.log_monitor",
    "ray.autoscaler._private.monitor", "ray.dashboard.dashboard", "ray.dashboard.agent",
    "ray._private.runtime_env.agent.main", "ray._private.runtime_env.agent.runtime_env_agent",
    "tests.ranks", "tests.spare",
)  # fmt: skip


def _make_tables() -> None:
    from matplotlib.figure import Figure
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from runtime.profile import ModelProfile
    from runtime.request.config import load_config
    from tests.spare import forget_settings

    ModelProfile(load_config("wan-tiny"))
    get_checkpoint_conversion_mapping("")  # of all models
    forget_settings()  # where Ray has them is found once
    figure = Figure(layout="constrained")
    figure.subplots().set_ylabel("fonts")
    figure.savefig(BytesIO(), format="png")


gc.disable()  # modules are no garbage
for name in _MODULES:
    import_module(name)
for _, name, _ in walk_packages(modules.__path__, f"{modules.__name__}."):  # as Ray's dashboard and agent do
    import_module(name)
_make_tables()
# A collection in a fork would touch all of these objects, and so copy the memory that they share.
gc.freeze()
gc.enable()
