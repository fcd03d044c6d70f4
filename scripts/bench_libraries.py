"""Libraries that could replace code of Lockstep's own, measured beside that code in one run.

    python scripts/bench_libraries.py

YAML: `runtime/files/yaml.py`, on PyYAML's parser, against ruamel.yaml's round-trip loader, which keeps
positions but applies none of Lockstep's rules. It is measured if it is installed (`pip install ruamel.yaml`);
Lockstep does not depend on it.

Checkpoint parts: `torch.save` and a mapped `torch.load`, as in `runtime/checkpoint`, against safetensors with
the nested state flattened into names and JSON. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from runtime.errors import BadRequestError
from runtime.files.tensors import each_tensor, map_tensors, save_tensors
from runtime.files.yaml import YamlFile

SHOTS = 1000
ODD = {
    "100,000 nested lists": "[" * 100_000,
    "a tag whose value is invalid": "title: !!bool abc",
    "an alias within its own anchor": "inner: &a {name: *a}",
    "a key given twice": "count: 1\ncount: 2",
    "`title: 1.50`": "title: 1.50",
    "`title: 2024-05-01`": "title: 2024-05-01",
}
STREAMS, STEPS = ("cond", "uncond"), 4


def seconds(task: Callable[[], object]) -> float:
    """CPU seconds of a task, as other work on the machine adds to wall time."""
    began = time.process_time()
    task()
    return time.process_time() - began


def alternate(rounds: int, tasks: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each task over alternating rounds, after a warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            took = seconds(task)
            if number:
                taken[name].append(took)
    return {name: statistics.median(found) for name, found in taken.items()}


def film() -> str:
    """Text of a storyboard of many shots."""
    shots = (
        f"  - {{id: s{number}, prompt: a red circle moving left, frames: 17, transition: {{kind: cut}}}}\n"
        for number in range(SHOTS)
    )
    return "title: T\nwidth: 64\nheight: 48\nshots:\n" + "".join(shots)


def outcome(read: Callable[[], Any]) -> str:
    """Describe in a few words what reading a text led to."""
    try:
        content = read()
    except BadRequestError as error:
        return "refused: " + str(error).rpartition("it is not valid YAML: ")[2][:60]
    except RecursionError:
        return "RecursionError"
    except Exception as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        return type(error).__name__ + ("" if line is None else f", line {line + 1}")
    return "accepted as " + ", ".join(f"{name}: {value}" for name, value in content.items())


def compare_yaml(rounds: int, folder: Path) -> None:
    """Print times and outcomes of both ways to read YAML."""
    try:
        from ruamel.yaml import YAML
    except ImportError:
        print("ruamel.yaml is not installed: `pip install ruamel.yaml`\n")
        return

    def own(text: str) -> Any:
        path = folder / "a.yaml"
        path.write_text(text, encoding="utf-8")
        return YamlFile.read(path, "config").root.content

    def theirs(text: str) -> Any:
        return YAML(typ="rt").load(text)

    text = film()
    took = alternate(rounds, {"ours": lambda: own(text), "ruamel": lambda: theirs(text)})
    row("YAML", "ours", "ruamel.yaml", head=True)
    row(f"storyboard of {SHOTS:,} shots, ms", *(f"{1000 * took[name]:.0f}" for name in ("ours", "ruamel")))
    for name, odd in ODD.items():
        row(name, outcome(lambda odd=odd: own(odd)), outcome(lambda odd=odd: theirs(odd)))
    print()


def part(megabytes: int) -> dict[str, Any]:
    """State of a checkpoint part: features in bfloat16, latents, and the state of a sampler."""
    values = megabytes * 2**20 // 2 // len(STREAMS) // STEPS
    history = {
        stream: {step: torch.randn(1, values // 64, 64).bfloat16() for step in range(STEPS)}
        for stream in STREAMS
    }
    latents = torch.randn(1, 16, 21, 60, 104)
    sampler = {"model_outputs": [latents * 0.5, None], "last_sample": latents, "lower_order_nums": 2}
    return {"own": {"sums": [0.25]}, "values": history, "shared": {"latents": latents, "sampler": sampler}}


def save_flat(content: dict[str, Any], path: Path) -> None:
    """Save a part with safetensors: tensors by number, and everything else as JSON in its header."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.clone()  # it refuses tensors that share memory
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):  # names of JSON are text, steps are numbers
            return {"items": [[key, plain(one)] for key, one in value.items()]}
        return [plain(one) for one in value] if isinstance(value, list) else value

    structure = json.dumps(plain(content))
    save_file(tensors, path, metadata={"structure": structure})


def load_flat(path: Path, stream: str) -> tuple[dict[str, Any], Any]:
    """Read one stream, and all that is small, of a part that `save_flat` wrote."""
    with safe_open(path, framework="pt") as file:

        def nested(value: Any) -> Any:
            if isinstance(value, list):
                return [nested(one) for one in value]
            if not isinstance(value, dict):
                return value
            if "tensor" in value:
                return file.get_tensor(str(value["tensor"])).clone()
            return {key: nested(one) for key, one in value["items"]}

        whole = dict(json.loads(file.metadata()["structure"])["items"])
        return nested(dict(whole["values"]["items"])[stream]), nested(whole["shared"])


def load_mapped(path: Path, stream: str) -> tuple[dict[str, Any], Any]:
    """Read the same as `runtime/checkpoint/reader.py` does."""
    whole = map_tensors(path)
    copied = each_tensor({"values": whole["values"][stream], "shared": whole["shared"]}, torch.Tensor.clone)
    return copied["values"], copied["shared"]


def load_whole(path: Path, stream: str) -> tuple[dict[str, Any], Any]:
    """Read the same by reading the whole file."""
    whole = torch.load(path, weights_only=True)
    return whole["values"][stream], whole["shared"]


LOADERS = {"mapped": load_mapped, "whole": load_whole, "safetensors": load_flat}


def peak_memory(loader: str, path: Path) -> float:
    """Most MiB of its own memory, beyond mapped files, that a process needs to load one stream; sampled."""
    command = [sys.executable, __file__, "--load", loader, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()  # it has imported everything
        before = peak = anonymous_bytes(child.pid)
        child.stdin.close()
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
    return (peak - before) / 2**20


def load_when_told(loader: str, path: Path) -> None:
    """Load one stream once stdin is closed; runs in a child process."""
    print(flush=True)
    sys.stdin.read()
    LOADERS[loader](path, STREAMS[0])


def anonymous_bytes(process: int) -> int:
    """Memory of a process that is not a mapped file; 0 once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def compare_parts(rounds: int, megabytes: int, folder: Path) -> None:
    """Print times, sizes and memory of both formats of checkpoint parts."""
    content, pickled, flat = part(megabytes), folder / "part.pt", folder / "part.safetensors"
    saving = {"ours": lambda: save_tensors(content, pickled), "safetensors": lambda: save_flat(content, flat)}
    saved = alternate(rounds, saving)
    files = {"mapped": pickled, "whole": pickled, "safetensors": flat}
    tasks = {name: lambda name=name: LOADERS[name](files[name], STREAMS[0]) for name in LOADERS}
    loaded = alternate(rounds, tasks)
    memory = {name: peak_memory(name, files[name]) for name in LOADERS}
    row(f"part of {megabytes} MiB", "torch, mapped (ours)", "torch, read whole", "safetensors", head=True)
    row("save, ms of CPU", f"{1000 * saved['ours']:.0f}", "the same", f"{1000 * saved['safetensors']:.0f}")
    row("load one of two streams, ms of CPU", *(f"{1000 * loaded[name]:.0f}" for name in LOADERS))
    row("most memory meanwhile, MiB", *(f"{memory[name]:.0f}" for name in LOADERS))
    sizes = [files[name].stat().st_size - megabytes * 2**20 for name in ("mapped", "whole", "safetensors")]
    row("bytes beside the features", *(f"{size:,}" for size in sizes))


def row(*cells: object, head: bool = False) -> None:
    """Print a row of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |")
    if head:
        print("| --- " * len(cells) + "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--load", nargs=2, metavar=("LOADER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.load:
        load_when_told(arguments.load[0], Path(arguments.load[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare_yaml(arguments.rounds, Path(folder))
        compare_parts(arguments.rounds, arguments.megabytes, Path(folder))


if __name__ == "__main__":
    main()
