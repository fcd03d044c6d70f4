"""Presets: which steps are computed, and how the others are forecast; the files of `lockstep --spectrum`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from spectrum.diffusers.conditions import Conditions
from spectrum.predictor import Blend, ChebyshevRidge, LinearExtrapolation, Predictor
from spectrum.schedule import ErrorSchedule, FixedSchedule, Schedule, paper_schedule

STREAMS = ("feature", "velocity")
_UNIVERSAL = "universal"
_T = TypeVar("_T")
_Builder = Callable[..., _T]


@dataclass(frozen=True, slots=True)
class Preset:
    """Which steps are computed, and how the others are forecast.

    Attributes:
        name: how reports and errors call it.
        schedule: makes the schedule of a generation with that many steps.
        predictor: makes the predictor of a generation with that many steps.
        stream: forecast quantity: `feature`, the output of the last transformer block, or `velocity`, the
            output of the whole transformer.
        carried: whether the transformers of one pipeline, such as Wan2.2's, have one schedule and one history
            for all steps; for `velocity` only. By default each begins anew.
        forecasts: False if every step is computed, so that nothing has to be remembered.
        conditions: what it is valid for; None if that is any pipeline.

    Example:
        >>> sparse = Preset(
        ...     "sparse", lambda steps: paper_schedule(steps, alpha=1.5), lambda steps: LinearExtrapolation()
        ... )
        >>> sparse.schedule(50).nfe
        12
    """

    name: str
    schedule: Callable[[int], Schedule]
    predictor: Callable[[int], Predictor]
    stream: str = "feature"
    forecasts: bool = True
    conditions: Conditions | None = None
    carried: bool = False

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise ValueError(f"stream: {self.stream!r} given; it must be one of {_listed(STREAMS)}")
        if self.carried and self.stream == "feature":
            raise ValueError("carried: features of two transformers have nothing in common; carry velocities")

    def at(self, levels: Callable[[], Sequence[float]]) -> Preset:
        """The preset for a generation; most are the same for all.

        Args:
            levels: tells the noise levels of the scheduler, `[n + 1]`, which may wait for the device.
        """
        return self

    @classmethod
    def load(cls, given: Preset | str | PathLike[str] | Mapping[str, Any]) -> Preset:
        """Return a preset, given itself, its name, its YAML file or what such a file contains.

        Raises:
            ValueError: there is none of that name, or it is not valid here; the message says why.
        """
        if isinstance(given, Preset):
            return given
        if isinstance(given, Mapping):
            return cls._of("preset", given)
        if isinstance(given, str) and given in PRESETS:
            return cls._of(given, PRESETS[given])
        path = Path(given)
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"preset: {str(given)!r} given; it must be one of {_listed(PRESETS)}, or a YAML file (.yaml)"
            )
        import yaml  # comes with diffusers

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"preset: {path} cannot be read: {error}") from None
        return cls._of(path.name, content if isinstance(content, Mapping) else {})

    @classmethod
    def _of(cls, name: str, content: Mapping[str, Any]) -> Preset:
        unknown = content.keys() - {"stream", "schedule", "predictor"}
        if unknown:
            raise ValueError(f"preset {name}: {_listed(sorted(unknown))} cannot be used here")
        if "schedule" not in content:
            raise ValueError(f"preset {name}: schedule is missing")
        if _UNIVERSAL in (_kind(content["schedule"]), _kind(content.get("predictor"))):
            return _universal(name, content)
        schedule = _part(name, "schedule", content["schedule"], _SCHEDULES)
        predictor = _part(name, "predictor", content.get("predictor", {"kind": "chebyshev"}), _PREDICTORS)
        forecasts = content["schedule"]["kind"] != "full"
        return cls(name, schedule, predictor, content.get("stream", "feature"), forecasts)


def _part(preset: str, part: str, given: Any, known: Mapping[str, _Builder[_T]]) -> Callable[[int], _T]:
    """Return what builds a schedule or predictor from a number of steps, its settings checked by name."""
    kind = _kind(given)
    if not isinstance(given, Mapping) or not isinstance(kind, str) or kind not in known:
        names = _listed((*known, _UNIVERSAL))
        raise ValueError(f"preset {preset}: {part}: kind {kind!r} given; it must be one of {names}")
    settings = {key: value for key, value in given.items() if key != "kind"}
    build = known[kind]
    allowed = list(inspect.signature(build).parameters)[1:]
    missing = [
        key for key, of in list(inspect.signature(build).parameters.items())[1:] if of.default is of.empty
    ]
    if settings.keys() - set(allowed) or set(missing) - settings.keys():
        raise ValueError(
            f"preset {preset}: {part}: {_listed(settings) or 'no settings'} given; "
            f"{kind} takes {_listed(allowed) or 'none'}"
        )
    return lambda steps: build(steps, **settings)


def _kind(given: Any) -> Any:
    return given.get("kind") if isinstance(given, Mapping) else given


def _universal(name: str, content: Mapping[str, Any]) -> Preset:
    """Make a universal preset, whose schedule and predictor go together.

    A pipeline calls its transformer for each branch, so where Lockstep forecasts the guided velocity, those
    of both branches are forecast here.
    """
    from spectrum.diffusers.universal import universal_preset  # it makes a kind of preset

    schedule, stream = content["schedule"], content.get("stream", "feature")
    if content.get("predictor") != {"kind": _UNIVERSAL} or _kind(schedule) != _UNIVERSAL:
        raise ValueError(f"preset {name}: a universal schedule and predictor, without settings, go together")
    if not isinstance(schedule, Mapping) or schedule.keys() - {"kind", "nfe"}:
        raise ValueError(f"preset {name}: schedule: {schedule} given; universal takes nfe")
    return universal_preset(name, schedule.get("nfe"), "velocity" if stream == "guided" else stream)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _full(steps: int) -> Schedule:
    return FixedSchedule.full(steps)


def _paper(steps: int, warmup: int = 5, window: float = 2.0, alpha: float = 0.75) -> Schedule:
    return paper_schedule(steps, warmup=warmup, window=window, alpha=alpha)


def _explicit(steps: int, computed: Iterable[int]) -> Schedule:
    return FixedSchedule.explicit(steps, computed)


def _error(
    steps: int, tolerance: float = 0.1, warmup: int = 5, longest: int = 8, budget: int | None = None
) -> Schedule:
    return ErrorSchedule(steps, tolerance, warmup, longest, budget)


def _chebyshev(
    steps: int, degree: int = 4, ridge: float = 0.1, blend: float = 1.0, horizon: float | None = None
) -> Predictor:
    spectral = ChebyshevRidge(horizon=horizon or steps, degree=degree, ridge=ridge)
    return spectral if blend == 1.0 else Blend(spectral, LinearExtrapolation(), blend)


def _linear(steps: int) -> Predictor:
    return LinearExtrapolation()


_SCHEDULES: dict[str, _Builder[Schedule]] = {
    "full": _full,
    "paper": _paper,
    "explicit": _explicit,
    "error": _error,
}
_PREDICTORS: dict[str, _Builder[Predictor]] = {"chebyshev": _chebyshev, "linear": _linear}
_SPECTRAL = {"kind": "chebyshev", "degree": 4, "ridge": 0.1, "blend": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "off": {"schedule": {"kind": "full"}},
    "paper": {
        "stream": "feature",
        "schedule": {"kind": "paper", "warmup": 5, "window": 2, "alpha": 0.75},
        "predictor": _SPECTRAL,
    },
    "paper-fast": {
        "stream": "feature",
        "schedule": {"kind": "paper", "warmup": 5, "window": 2, "alpha": 3.0},
        "predictor": _SPECTRAL,
    },
    **{
        name: {"stream": "guided", "schedule": schedule, "predictor": {"kind": _UNIVERSAL}}
        for name, schedule in {
            "universal": {"kind": _UNIVERSAL},
            "universal-10": {"kind": _UNIVERSAL, "nfe": 10},
            "universal-8": {"kind": _UNIVERSAL, "nfe": 8},
        }.items()
    },
}
"""Presets by name; those of `configs/spectrum/` that need no calibration."""
