"""Compare two revisions of Lockstep on the same requests: frames, decision digests and bytes must be equal.

    python scripts/compare_revisions.py 6218bab          # against what is checked out now
    python scripts/compare_revisions.py 6218bab HEAD~3

Each revision is checked out in a folder of its own and run through its command line: one rank, split
guidance branches, Ulysses, ring, windows, blended presets, an image (I2V and VACE, small random models), and
a run that is stopped and resumed. Prints a table; exit code 1 if anything differs. Use it for changes that
must not alter results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT = "a red circle moving left on a black background"
SMALL = ("--size", "64x48", "--frames", "5", "--steps", "12")
COMPARED = ("frames_sha256", "decision_digest", "collective_bytes", "computed", "nfe", "resumed_at")
NAMED = ("decision_digest",)  # equal among themselves, but they prove the revision, too


@dataclass(frozen=True, slots=True)
class Case:
    """A request, as arguments of `lockstep generate`.

    Attributes:
        model: `i2v` or `vace` for a small random model; empty for wan-tiny.
        stop: whether it is stopped after some steps, and resumed.
    """

    name: str
    arguments: tuple[str, ...]
    model: str = ""
    stop: bool = False


def on(ranks: int, **degrees: int) -> tuple[str, ...]:
    """Options for so many ranks under torchrun."""
    given = [part for name, degree in degrees.items() for part in (f"--{name}", str(degree))]
    return ("--launcher", "torchrun", "--ranks", str(ranks), *given)


CASES = (
    Case("one rank, nothing skipped", (*SMALL, "--spectrum", "off")),
    Case("one rank, paper", (*SMALL, "--spectrum", "paper")),
    Case("two videos, no guidance", (*SMALL, "--spectrum", "paper", "--videos", "2", "--guidance", "1")),
    Case("planned", ("--steps", "50", "--spectrum", "planned-10")),
    Case("cfg 2", (*SMALL, "--spectrum", "paper", *on(2, cfg=2))),
    Case("ulysses 2", (*SMALL, "--spectrum", "paper", *on(2, cfg=1, ulysses=2))),
    Case("ring 2", (*SMALL, "--spectrum", "paper", *on(2, cfg=1, ring=2))),
    Case("sharded, 2 ranks", (*SMALL, "--spectrum", "off", "--shard", *on(2, cfg=1, ulysses=2))),
    Case("three windows", ("--size", "64x48", "--frames", "33", "--steps", "8", "--spectrum", "paper")),
    Case("image to video, two windows", ("--size", "64x48", "--frames", "13", "--steps", "8"), model="i2v"),
    Case("VACE, two windows", ("--size", "64x48", "--frames", "13", "--steps", "8"), model="vace"),
    Case("stopped and resumed", ("--steps", "50", "--spectrum", "paper"), stop=True),
)


@dataclass(frozen=True, slots=True)
class Revision:
    """A checkout, and the reports of its runs.

    Attributes:
        checkout: working directory of the commands, where Python looks for modules first.
    """

    name: str
    checkout: Path
    outputs: Path

    def ask(self, case: Case, models: Path) -> dict[str, Any]:
        """Run a case; return its report."""
        out = self.outputs / f"{case.name.replace(' ', '-').replace(',', '')}.mp4"
        command = [sys.executable, "-m", "launch", "generate", PROMPT, *case.arguments, "--out", str(out)]
        if case.model:
            command += ["--config", str(models / f"{case.model}.yaml"), "--image", str(models / "image.png")]
        if case.stop:
            self._stopped(command)
            command.append("--resume")
        done = subprocess.run(
            command, cwd=self.checkout, env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {case.name}: exit code {done.returncode}\n{done.stderr}")
        report = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        if case.stop and not report["resumed_at"]:
            raise SystemExit(f"{self.name}: {case.name}: it was not resumed")
        return {name: report[name] for name in COMPARED if not (case.stop and name == "resumed_at")}

    def _stopped(self, command: list[str]) -> None:
        process = subprocess.Popen(
            command, cwd=self.checkout, env=self._environment, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "step 5/" in line:
                process.send_signal(signal.SIGINT)
                break
        process.communicate()
        if process.returncode != 130:
            raise SystemExit(f"{self.name}: stopping ended in exit code {process.returncode}")

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": "1"}


def checked_out(revision: str, folder: Path) -> Path:
    """Check out `revision` in `folder`."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    folder.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def write_models(folder: Path) -> None:
    """Write small random models that take an image, and their configs."""
    import yaml

    from tests.conditioned import write_i2v, write_image, write_vace

    folder.mkdir()
    write_image(folder / "image.png")
    for name, write in (("i2v", write_i2v), ("vace", write_vace)):
        config = {
            "model": str(write(folder / name)), "fps": 8, "window": {"frames": 9, "overlap": 4},
            "dtype": dict.fromkeys(("transformer", "text_encoder", "vae"), "float32"),
            "defaults": {"width": 64, "height": 48, "frames": 9, "spectrum": "paper"},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the fields that differ between two reports; decision digests only have to agree among ranks."""
    changed = [name for name in before if name not in NAMED and before[name] != after[name]]
    return changed + [name for name in NAMED if len(set(after[name])) != 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", help="a revision that git knows")
    parser.add_argument("after", nargs="?", help="another; by default the files that lie here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-revisions-") as name:
        folder = Path(name)
        write_models(folder / "models")
        before = Revision(given.before, checked_out(given.before, folder / "a"), folder / "outputs-a")
        here = ROOT if given.after is None else checked_out(given.after, folder / "b")
        after = Revision(given.after or "here", here, folder / "outputs-b")
        before.outputs.mkdir()
        after.outputs.mkdir()
        failed = 0
        print("| request | frames (SHA-256) | bytes of a computed, a forecast step | differs |")
        print("| --- | --- | --- | --- |")
        for case in CASES:
            old, new = (revision.ask(case, folder / "models") for revision in (before, after))
            wrong = differences(old, new)
            failed += bool(wrong)
            frames = " ".join(one[:12] for one in new["frames_sha256"])
            sent = ", ".join(str(bytes_) for bytes_ in new["collective_bytes"].values())
            print(f"| {case.name} | {frames} | {sent} | {', '.join(wrong) or 'nothing'} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
