"""LoRAs of a model: which ones are to be merged into it, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import BadRequestError, reason
from runtime.request.config import Lora

if TYPE_CHECKING:
    from runtime.models.folder import ModelFolder
    from runtime.parallel.ranks import Ranks

_SHOWN = 3  # files of a folder that are named


@dataclass(frozen=True, slots=True)
class KnownLora:
    """A LoRA whose file was checked.

    Attributes:
        lora: the file, its scale, and the expert that it is for.
        digest: digest of the file's content, which must be the same when it is merged.
    """

    lora: Lora
    digest: str

    @property
    def word(self) -> str:
        """What a model's revision has of it: all on which the merged weights depend."""
        expert = "" if self.lora.expert is None else f"@{self.lora.expert}"
        return f"lora:{self.digest}×{float(self.lora.scale)!r}{expert}"


def fit_on_all(folder: ModelFolder, loras: Sequence[Lora], ranks: Ranks) -> ModelFolder:
    """Check that LoRAs fit a model; collective. The first rank of each machine reads their files.

    Returns:
        The model with these LoRAs, and no others.

    Raises:
        BadRequestError: one of them does not fit, or its file is not the same on all machines; raised on
            every rank.
    """
    problem, own = "", list[str]()
    if ranks.node.rank == 0:
        try:
            with ranks.busy("checking LoRA files"):
                own = [one.digest for one in folder.with_loras(loras).loras]
        except BadRequestError as error:
            problem = str(error)
    ranks.refuse_together(problem)
    told = [digests for digests in ranks.control.all_gather_object(own) if digests]
    for lora, *digests in zip(loras, *told, strict=True):
        if len(set(digests)) > 1:
            raise BadRequestError(f"lora: {lora.file!r} given; it is not the same file on all machines")
    return folder.having(KnownLora(*one) for one in zip(loras, told[0] if told else [], strict=True))


def check_lora_file(file: str) -> None:
    """Refuse a file of LoRA weights that cannot be opened; nothing slow is imported, and nothing is read.

    Raises:
        BadRequestError: it cannot be opened, or is a folder.
    """
    path, problem = Path(file), ""
    try:
        if path.is_dir():
            inside = sorted(one.name for one in path.glob("*.safetensors"))[:_SHOWN]
            problem = "it is a folder" + (f"; name the file in it: {', '.join(inside)}" if inside else "")
        elif path.exists() and not path.is_file():
            problem = "it cannot be read: it is not a regular file"
        else:
            path.open("rb").close()
            return
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        problem = f"it cannot be read: {reason(error)}"
    raise lora_refusal(file, problem)


def lora_refusal(file: str, problem: str) -> BadRequestError:
    """Refusal of a file of LoRA weights, with what is wrong with it."""
    return BadRequestError(f"lora: {file!r} given; {problem}")
