"""Where weights and forecast histories are while they are not in use."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from runtime.errors import BadRequestError


class Memory(BaseModel):
    """Location of weights and forecast histories while they are not in use.

    Attributes:
        text_encoder: `keep` it on the device of the first rank, `offload` it to host memory after each prompt
            (pinned for a GPU), or `free` it and load it again for the next new prompt. `auto` keeps it if a
            job fits beside it by its rehearsal, else offloads it, or frees it if the host has no room either.
        transformer: `replicate` it on every rank, `shard` its blocks over the ranks (FSDP2), or `offload` its
            blocks to the host memory of every rank: each comes to the device while the one before it runs.
        experts: of a model of several transformers that are replicated, `keep` all on the device, or `swap`
            them: the blocks of one are on the device, until the sampler comes to the steps of another.
        vae: `keep` it on the device, or `offload` it to host memory (pinned for a GPU) while it is not used.
            `auto` keeps it if a job fits beside it by its rehearsal, else offloads it.
        history: `keep` the features that forecasts are made from on the device, or `offload` them to host
            memory, as for videos of many windows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_encoder: Literal["auto", "keep", "offload", "free"] = "keep"
    transformer: Literal["replicate", "shard", "offload"] = "replicate"
    experts: Literal["keep", "swap"] = "keep"
    vae: Literal["auto", "keep", "offload"] = "keep"
    history: Literal["keep", "offload"] = "keep"

    @model_validator(mode="after")
    def _one_way_to_save(self) -> Self:
        if self.experts == "swap" and self.transformer == "shard":
            raise ValueError("experts: shards stay on their devices; swap needs transformer: replicate")
        return self

    @property
    def undecided(self) -> tuple[str, ...]:
        """Fields that are `auto`."""
        return tuple(name for name in ("text_encoder", "vae") if getattr(self, name) == "auto")

    def decided(self, **places: str) -> Memory:
        """Return a copy in which the fields that are `auto` have the given values; others stay.

        Args:
            places: field → where it is to be.
        """
        return self.model_copy(update={name: places[name] for name in self.undecided if name in places})

    def moved(self, *, shard: bool | None = None, offload: bool = False) -> Memory:
        """Return a copy with what `--shard`, `--replicate` and `--offload` say of the transformer.

        Args:
            shard: whether to shard it or to replicate it; None for neither.
            offload: whether to offload it.

        Raises:
            BadRequestError: they contradict each other or the rest.
        """
        if offload and shard is not None:
            raise BadRequestError(
                "offload: it keeps all blocks in the host memory of every rank, but shard keeps a share on "
                "each device; give only one of --shard, --replicate and --offload (in Python: shard, offload)"
            )
        if shard and self.experts == "swap":
            raise BadRequestError(
                "shard: shards stay on their devices, but the config has memory.experts: swap; change it to "
                "keep"
            )
        if shard is None and not offload:
            return self
        where = "offload" if offload else "shard" if shard else "replicate"
        return self.model_copy(update={"transformer": where})
