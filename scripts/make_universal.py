"""The table of universal forecasts, from calibrations of different models.

    python scripts/make_universal.py --flux out/bench-flux/flux-50-6.json

The calibrations of wan-tiny and wan2.2-tiny are the shipped ones (`lockstep calibrate`); flux-tiny's is made
by `scripts/bench_flux.py`. The table holds of each what `spectrum.universal` needs, and nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from runtime.request.config import shipped
from spectrum.calibration import from_triangle
from spectrum.universal import TABLE, Example

_KEPT = ("noise_levels", "sensitivity")


def example(file: Path) -> Example:
    """Read what a universal table needs of a calibration."""
    content = json.loads(file.read_text(encoding="utf-8"))
    gram = from_triangle(content["grams"]["guided"], content["conditions"]["steps"])
    return Example(content["noise_levels"], gram, content["sensitivity"])


def kept(file: Path, name: str) -> dict[str, Any]:
    """Content of the table for one calibration."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return {
        "model": name,
        "revision": content["conditions"]["revision"],
        **{key: content[key] for key in _KEPT},
        "gram": content["grams"]["guided"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flux", type=Path, required=True, help="flux-tiny's calibration")
    parser.add_argument("--out", type=Path, default=TABLE)
    given = parser.parse_args()
    files = {name: shipped("calibrations", f"{name}.json") for name in ("wan-tiny", "wan2.2-tiny")}
    models = [kept(file, name) for name, file in {**files, "flux-tiny": given.flux}.items()]
    given.out.write_text(json.dumps({"models": models}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
