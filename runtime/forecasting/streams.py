"""Names of streams, with the traits that presets need; `runtime.sampling.streams` implements them."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.files.extensions import Registry


@dataclass(frozen=True, slots=True)
class StreamTraits:
    """Traits of a stream that presets need.

    Attributes:
        joint: whether it covers both branches together, so that they share one schedule.
        outputs: whether it is of the model's output, which several experts may have in common.
        source: identity of its code; None for Lockstep's own.
    """

    joint: bool = False
    outputs: bool = False
    source: str | None = None


STREAM_TRAITS: Registry[StreamTraits] = Registry(
    "stream",
    {
        "feature": StreamTraits(),
        "velocity": StreamTraits(outputs=True),
        "guided": StreamTraits(joint=True, outputs=True),
    },
)


def known_stream(name: str) -> str:
    """Return the name of a stream.

    Raises:
        ValueError: there is no such stream.
    """
    if STREAM_TRAITS.find(name) is None:
        raise ValueError(f"it must be one of {', '.join(STREAM_TRAITS)}")
    return name
