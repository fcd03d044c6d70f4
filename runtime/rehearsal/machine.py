"""GPUs by their data sheets: for judging whether a job fits, and for estimates."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.request.bounds import NUMBER
from runtime.request.config import open_yaml
from runtime.request.video_request import Title

_Speed = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False), NUMBER]

RESERVE = 2 * 2**30  # bytes, assumed: the CUDA context, communicators, and workspaces of kernels
FRAGMENTED = 0.05  # share of what is held, assumed: lost between blocks of the allocator


class Gpu(BaseModel):
    """A GPU by its maker's numbers.

    Attributes:
        name: displayed name.
        memory_gib: memory as torch reports it, in GiB.
        bfloat16_tflops, tf32_tflops, float32_tflops: 10¹² operations per second, without sparsity.
        fp8_tflops: the same with sums in float32; None if it has no fp8.
        memory_gbps: memory bandwidth, 10⁹ bytes per second.
        link_gbps: bandwidth to a GPU of the same machine, 10⁹ bytes per second in each direction.
        network_gbps: bandwidth to a GPU of another machine, 10⁹ bytes per second in each direction.
        host_gbps: bandwidth of the bus between a GPU and its host, 10⁹ bytes per second in each direction.
        per_node: GPUs in one machine.
        cudnn: whether `attention: auto` chooses cuDNN's kernel in a ring.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Title
    memory_gib: _Speed
    bfloat16_tflops: _Speed
    tf32_tflops: _Speed
    float32_tflops: _Speed
    fp8_tflops: _Speed | None = None
    memory_gbps: _Speed
    link_gbps: _Speed
    network_gbps: _Speed
    host_gbps: _Speed = 32.0
    per_node: Annotated[int, Field(ge=1, le=1024), NUMBER] = 8
    cudnn: bool = False

    @model_validator(mode="after")
    def _wider_is_slower(self) -> Self:
        if self.float32_tflops > self.bfloat16_tflops:
            raise ValueError("float32_tflops must not be above bfloat16_tflops")
        return self

    @property
    def memory(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gib * 2**30)

    def room(self, held: int) -> int:
        """Bytes left when tensors hold `held` bytes, after assumed losses; negative if they do not fit."""
        return self.memory - RESERVE - int(held * (1 + FRAGMENTED))


def load_gpu(name: str) -> Gpu:
    """Load a GPU by its name in `configs/gpus/`, or from a YAML file.

    Raises:
        BadRequestError: there is none, or it is not valid; the message lists the available ones.
    """
    return open_yaml(name, folder="gpus", field="gpu").parse(Gpu)
