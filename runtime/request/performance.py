"""Performance profiles: named choices of what makes a step faster and changes its result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Profile = Literal["exact", "fast", "fastest"]
Quantization = Literal["none", "fp8", "int8"]
BatchGuidance = Literal["never", "auto", "always"]


@dataclass(frozen=True, slots=True)
class Performance:
    """What makes steps faster, most of it at a price in exactness.

    Attributes:
        profile: profile that it follows where a config says nothing else.
        compile: whether blocks are compiled with `torch.compile`; results differ by rounding.
        fuse_projections: whether query, key and value come from one matrix product; they differ by rounding.
        fuse_forecasts: whether a run of forecast steps of a guided stream is one weighted sum, together with
            the sampler's steps; results differ by rounding.
        batch_guidance: whether a rank evaluates both branches of guidance as one batch; results differ by
            rounding. `auto`: where that is faster; see `runtime.sampling.batching`.
        fastest_attention: whether `attention: auto` is the fastest kernel of the GPU, instead of torch's own
            choice; results differ by rounding.
        overlap_exchanges: whether ranks that share heads send values and keys while they compute what
            follows, in three exchanges instead of one; changes no bit.
        quantization: number format of the blocks' linear layers; see `runtime.models.quantization`. Results
            differ by more than rounding.
    """

    profile: Profile = "exact"
    compile: bool = False
    fuse_projections: bool = False
    fuse_forecasts: bool = False
    batch_guidance: BatchGuidance = "never"
    fastest_attention: bool = False
    overlap_exchanges: bool = False
    quantization: Quantization = "none"

    @property
    def text(self) -> str:
        """The profile and what is on, in words."""
        parts = {
            "compiled blocks": self.compile,
            "fused projections": self.fuse_projections,
            "fused forecasts": self.fuse_forecasts,
            f"guidance in one batch: {self.batch_guidance}": self.batch_guidance != "never",
            "overlapped exchanges": self.overlap_exchanges,
            f"{self.quantization} linears": self.quantization != "none",
        }
        named = ", ".join(part for part, is_on in parts.items() if is_on)
        return f"{self.profile} ({named})" if named else self.profile


_FAST = Performance(
    "fast",
    compile=True,
    fuse_projections=True,
    fuse_forecasts=True,
    batch_guidance="auto",
    fastest_attention=True,
)

PROFILES: dict[Profile, Performance] = {
    "exact": Performance(),
    "fast": _FAST,
    "fastest": replace(_FAST, profile="fastest", quantization="fp8"),
}
