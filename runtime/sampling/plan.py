"""Plan of a generation: the request with every decision that can be made before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from diffusers import SchedulerMixin

from runtime.forecasting.expectation import Expectation
from runtime.forecasting.presets import Preset
from runtime.forecasting.streams import STREAM_TRAITS
from runtime.models.course import Course
from runtime.parallel.topology import Topology
from runtime.request.video_request import VideoRequest
from runtime.request.windows import Windows
from runtime.sampling.coordinator import Coordinator
from spectrum import Schedule, StepKind
from spectrum.solver import Multistep


@dataclass(frozen=True, slots=True)
class Plan:
    """A request with all decisions that can be made before it runs.

    Attributes:
        request, preset: the request and its preset.
        fresh_sampler: makes a sampler at its first step, with its timesteps set.
        steps: number of sampler steps.
        topology: arrangement of the ranks.
        attention: resolved name of the attention kernel.
        windows: windows of the video; a single one if the video fits the model.
        course: expert that computes each step.
        fused: coefficients of the sampler, where forecasts are fused with its steps; None where not.
        batched: whether ranks evaluate both branches of guidance as one batch.
    """

    request: VideoRequest
    preset: Preset
    fresh_sampler: Callable[[], SchedulerMixin]
    steps: int
    topology: Topology
    attention: str
    windows: Windows
    course: Course
    fused: Multistep | None = None
    batched: bool = False

    @property
    def fresh(self) -> Mapping[int, int]:
        """Steps before which the history is dropped, as another expert begins anew → steps from there on that
        are computed whatever the schedule says."""
        return self.course.fresh(outputs=STREAM_TRAITS[self.preset.stream].outputs)

    @property
    def forced(self) -> frozenset[int]:
        """Steps that are computed whatever the schedule says: an expert's first, where it begins anew."""
        return self.course.forced(outputs=STREAM_TRAITS[self.preset.stream].outputs)

    @property
    def segments(self) -> int:
        """Number of segments that are denoised one after the other.

        It is 1 for a video from text alone, however many windows there are. With an image, or if the video
        extends another, each window is a segment, which continues the one before.
        """
        return len(self.windows) if self.request.continues else 1

    @property
    def kinds(self) -> list[StepKind]:
        """Expected kind of every step of all segments."""
        return self.preset.expected_kinds(self.steps, self.fresh) * self.segments

    @property
    def next_computed(self) -> list[int | None]:
        """For every step of all segments, the step within its segment that is expected to be computed next;
        None if none is."""
        following: list[int | None] = []
        coming: int | None = None
        for index, kind in reversed([*enumerate(self.kinds)]):
            following.append(coming)
            if kind is StepKind.COMPUTE:
                coming = index % self.steps
        return following[::-1]

    def first_step(self) -> Plan:
        """Plan of the first step alone, of a plan without forecasts."""
        course = replace(self.course, numbers=self.course.numbers[:1], outputs_forgotten=frozenset())
        return replace(self, fresh_sampler=partial(_first_step, self.fresh_sampler), steps=1, course=course)

    def expectation(self, coordinator: Coordinator) -> Expectation:
        """Expected errors of a finished generation of one segment."""
        return self.preset.expectation(
            self.steps,
            coordinator.computed("cond"),
            coordinator.errors,
            coordinator.schedules,
            coordinator.dropped,
            self.fresh,
        )

    def fresh_schedules(self) -> dict[str, Schedule]:
        """Make the schedule of each branch; schedules have state, so each segment needs new ones."""
        return self.preset.schedules_of(self.steps, self.request.branches, self.fresh)


def _first_step(fresh_sampler: Callable[[], SchedulerMixin]) -> SchedulerMixin:
    """Make a sampler whose later steps are left out."""
    sampler = fresh_sampler()
    sampler.timesteps = sampler.timesteps[:1]
    return sampler
