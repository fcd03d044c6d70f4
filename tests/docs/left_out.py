"""What of the documentation no test runs, and why; and what takes long, or needs something from the reader.

Keys are a page and the beginning of a command, or the first line of a block; a page may be given as `*`.
"""

from __future__ import annotations

_WEIGHTS = "needs weights of Wan's, which are not here, and a GPU"
_MANY = "needs as many GPUs; tests/launch/test_torchrun.py and tests/launch/cluster run smaller groups"
_INSTALLS = "installs; scripts/first_hour.py does it in an environment of its own"
_PIPELINE = "tests/spectrum/diffusers/test_diffusers_page.py runs it on a tiny model"
_FOREVER = "runs until Ctrl-C"
_OTHERS = "a program of others"

LEFT_OUT = {
    (
        "*",
        "make ",
    ): "scripts/first_hour.py runs `make video` in another checkout",
    ("*", "lockstep generate PROMPT --config wan2"): _WEIGHTS,
    ("*", "lockstep generate 'two cats boxing on a stage'"): _WEIGHTS,
    ("*", "torchrun "): _MANY,
    ("*", "lockstep generate PROMPT --ranks 8"): _MANY,
    ("*", "ray "): f"{_OTHERS}, for a cluster; tests/launch/test_ray_job.py submits a job",
    ("README.md", "source "): _INSTALLS,
    ("README.md", "lockstep status --watch"): _FOREVER,
    ("docs/calibration.md", "lockstep calibrate --config wan2.1-t2v-14b-480p"): _WEIGHTS,
    ("docs/calibration.md", "lockstep plan wan-14b.json"): "its calibration needs weights",
    ("docs/configs.md", "lockstep generate PROMPT --config mine.yaml"): _WEIGHTS,
    ("docs/configs.md", "lockstep generate PROMPT --model someone/"): _WEIGHTS,
    (
        "docs/diffusers.md",
        "# flux.py",
    ): _PIPELINE,
    (
        "docs/diffusers.md",
        "# calibrated.py",
    ): "tests/spectrum/diffusers/test_calibrating_pipelines.py does the same with a tiny model",
    (
        "docs/diffusers.md",
        "# wan.py",
    ): _PIPELINE,
    ("docs/extending.md", "# "): "tests/test_extending.py installs the package of this page, and runs it",
    ("docs/extending.md", "seen = self.attend("): "a line of a method that the page explains",
    ("docs/install.md", "python3 -m venv"): _INSTALLS,
    ("docs/install.md", "pip "): _INSTALLS,
    ("docs/install.md", "'~/lockstep/bin/pip' install"): _INSTALLS,
    ("docs/install.md", "podman "): "needs a container engine",
    (
        "docs/models.md",
        "lockstep convert ",
    ): "needs weights; see tests/runtime/models/layouts/test_convert.py",
    ("docs/models.md", "from runtime import load"): _WEIGHTS,
    ("docs/previews.md", "lockstep status --watch"): _FOREVER,
    ("docs/python.md", 'load("mine.yaml")'): "names what only a reader has; test_notebook.py loads each kind",
    ("docs/ray.md", "RAY_ADDRESS=auto"): "needs a cluster with 8 GPUs",
    ("docs/ray.md", "export "): f"{_OTHERS}, for a cluster; tests/launch/test_ray_job.py submits a job",
    ("docs/ray.md", "lockstep status --queue films --watch"): _FOREVER,
    (
        "docs/serve.md",
        "from openai import",
    ): "tests/launch/http/test_openai_client.py runs it",
    ("docs/serve.md", "lockstep serve"): f"{_FOREVER}; tests/launch/http has servers",
    ("docs/serve.md", "serve run"): f"{_OTHERS}; tests/launch/http/test_deployment.py deploys the app",
}

SLOW = {
    ("README.md", "lockstep generate 'a blue square"),
    ("README.md", "lockstep compare"),
    ("README.md", "lockstep generate --prompts"),
    ("README.md", "lockstep queue run"),
    ("README.md", "lockstep storyboard"),
    ("docs/calibration.md", "lockstep calibrate"),
    ("docs/calibration.md", "lockstep generate"),
    ("docs/configs.md", "lockstep generate"),
    ("docs/presets.md", "lockstep generate"),
    ("docs/previews.md", "lockstep generate"),
    ("docs/previews.md", "lockstep queue run"),
    ("docs/prompts.md", "lockstep generate"),
    ("docs/python.md", "request = model.request("),
    ("docs/python.md", "from runtime import CancelledError"),
    ("docs/python.md", "report = model.write("),
    ("docs/python.md", "comparison = model.compare("),
    ("docs/python.md", "from runtime import plan"),
    ("docs/python.md", "lockstep queue run"),
    ("docs/python.md", "report = waiting.wait("),
    ("docs/ray.md", "lockstep generate"),
    ("docs/ray.md", "lockstep queue run"),
    ("docs/rehearse.md", "lockstep rehearse"),
    ("docs/storyboards.md", "lockstep storyboard"),
}

_CIRCLE = "a red circle growing on a gray background"
_FILM = "title: Two\nshots:\n  - {id: one, prompt: a red circle}\n  - {id: two, prompt: a blue square}\n"
_REPORT = (
    '{"step_seconds": {"computed_median": 0.2, "forecast_median": 0.01}, '
    '"topology": {"world": 1}, "request": {}, "videos": []}'
)

FILES = {  # what the reader of a page has already: name → content
    "README.md": {"prompts.txt": f"{_CIRCLE}\na blue square\n", "film.yaml": _FILM},
    "docs/calibration.md": {"video.json": _REPORT},
    "docs/presets.md": {"fast.yaml": "schedule: {kind: paper, warmup: 3}\n"},
    "docs/prompts.md": {
        "prompts.txt": f"# two\n{_CIRCLE}\n\na blue square\n",
        "prompts.jsonl": '{"prompt": "a red circle growing on a gray background", "seed": 7}\n'
        '{"prompt": "a blue square", "frames": 33, "spectrum": "planned-14", "out": "square.mp4"}\n',
    },
}
BEFORE = {  # what the reader has done already
    "docs/previews.md": [f"lockstep queue add '{_CIRCLE}' --out queued.mp4"],
    "docs/ray.md": [f"lockstep queue add '{_CIRCLE}' --out {name}.mp4 --queue films" for name in "xy"],
}

SLOW_DOCSTRINGS = {
    "runtime.engine.Engine",
    "runtime.jobs.options.JobOptions",
    "runtime.notebook.model.load",
}
