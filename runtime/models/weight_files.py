"""Weight files of a model's component, compared with the weights that its settings describe.

Only headers are read, so this is quick for any size of model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.files.text import read_json
from runtime.models.layouts.plain import NOT_READ, SCALES
from runtime.models.layouts.sources import Sources, has_sources
from runtime.models.layouts.stored import Stored, stored_in
from runtime.models.layouts.weights import EIGHT_BITS, FLOATS, Weight, whole

Shapes = Mapping[str, tuple[int, ...]]
DIFFUSERS_STEM = "diffusion_pytorch_model"
"""Stem of the names of weight files that diffusers writes."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of one component: safetensors beside its settings, or files in another layout.

    Args:
        folder: folder of the component.
        stem: stem of the files' names, as diffusers or transformers choose it.
    """

    folder: Path
    stem: str

    def listed(self) -> Mapping[str, Stored | Weight]:
        """List all weights by their names, from the files' headers.

        Raises:
            OSError, ValueError: a file is missing or corrupt, or contradicts the index.
        """
        if has_sources(self.folder):
            return Sources.read(self.folder).weights
        index = self.folder / f"{self.stem}.safetensors.index.json"
        if not index.is_file():
            single = self.folder / f"{self.stem}.safetensors"
            if not single.is_file():
                raise FileNotFoundError(f"{single} is missing{self._instead()}")
            return stored_in(single)
        placed = read_json(index).get("weight_map")
        if (
            not isinstance(placed, dict)
            or not placed
            or any(isinstance(f, dict | list) for f in placed.values())
        ):
            raise ValueError(f"{index}: weight_map must be an object that names the file of each weight")
        held: dict[str, Mapping[str, Stored]] = {}
        for file in sorted(set(placed.values()), key=str):
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: {file!r} is not the name of a file beside it")
            held[file] = stored_in(self.folder / file)
        for name, file in placed.items():
            if name not in held[file]:
                raise ValueError(f"{index}: {name} should be in {file}, which does not hold it")
        return {name: one for tensors in held.values() for name, one in tensors.items()}

    def weights(self) -> Mapping[str, Weight]:
        """List all weights by their names, each with how it is made; errors as of `listed`."""
        return {name: one if isinstance(one, Weight) else whole(one) for name, one in self.listed().items()}

    def check(self, wanted: Shapes, *, prefix: str = "", complete: bool = True) -> None:
        """Check the files against the weights of a model.

        Args:
            wanted: names and shapes of the model's weights.
            prefix: prefix that names in the files may have before the model's names.
            complete: whether the files must hold every weight of the model.

        Raises:
            OSError, ValueError: a weight is missing, quantised or has another shape, or see `listed`.
        """
        found = {name.removeprefix(prefix): one for name, one in self.listed().items()}
        missing = sorted(wanted.keys() - found.keys())
        if missing and complete:
            raise ValueError(f"{self.folder} lacks {len(missing)} weights, the first is {missing[0]}")
        for name in sorted(wanted.keys() & found.keys()):
            one, module = found[name], name.rpartition(".")[0]
            scale = next((leaf for leaf in SCALES if f"{module}.{leaf}" in found), None)
            if one.dtype not in (*FLOATS, *EIGHT_BITS):
                raise ValueError(f"{self.folder}: {name} is stored as {one.dtype}, {NOT_READ}")
            if one.dtype in EIGHT_BITS and scale is not None:
                raise ValueError(
                    f"{self.folder}: {name} is stored as {one.dtype} with {module}.{scale}, {NOT_READ}"
                )
            if one.shape != wanted[name]:
                raise ValueError(
                    f"{self.folder}: {name} has shape {list(one.shape)}, "
                    f"by config.json it should be {list(wanted[name])}"
                )

    def _instead(self) -> str:
        """Describe a file in the folder that cannot be read, and say what to do about it; empty if none."""
        for file in sorted(self.folder.glob("*")):
            if file.suffix == ".safetensors" and file.name.startswith(f"{self.stem}."):
                variant = file.name.removeprefix(f"{self.stem}.").removesuffix(".safetensors")
                return f", {file.name} is there: rename it if you want the variant {variant!r}"
            if file.suffix in {".bin", ".pth", ".pt", ".ckpt"}:
                return f", {file.name} is there: pickled weights are not read, convert them to safetensors"
        return ""
