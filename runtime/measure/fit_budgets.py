"""The stage of a calibration that fits solvers: for each number of computed steps, trial passes and a last.

The trial passes differ in how nodes are chosen: for the solver, or for planned forecasts. The last pass takes
the best nodes, and gives less weight to videos that went badly, as unweighted squares would be spent on them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from runtime.forecasting.trials import Trial
from runtime.measure.session import Session
from runtime.measure.solvers import Pass, SolverFitting, score, weights_of
from runtime.media.quality import psnr
from spectrum.calibration import Findings

POWERS = (1.0, 0.5)  # of sensitivities in the choice of nodes: more of them early, or fewer
PASSES = len(POWERS) + 2  # at most: these, one with the steps of the plan, and the last
_CLEARLY = 1.0  # dB by which the steps of the plan must be better: so few videos cannot tell less
_Nodes = tuple[int, ...]


class BudgetFitting:
    """Fits solvers and adds them to the findings, as one rank of the engine's group.

    Args:
        session: the videos.
        fitting: makes passes.
        found: findings of the stages before.
        keep: keeps the findings; called after every pass.
        passes: is given the number of passes of each solver, by its computed steps, before they are made.
    """

    def __init__(
        self,
        session: Session,
        fitting: SolverFitting,
        found: Findings,
        keep: Callable[[], None],
        passes: dict[int, int],
    ):
        self._session, self._fitting, self._found = session, fitting, found
        self._keep, self._passes = keep, passes

    def fit(self, nfe: int) -> None:
        """Make the passes of a solver of `nfe` computed steps that are left to do."""
        session = self._session
        choices = self._choices(nfe)
        passes = self._passes[nfe] = len(choices) + 1
        kept = {tuple(one["nodes"]): one for one in self._found.passes if one["nfe"] == nfe}
        trials = []
        for number, (power, nodes) in enumerate(choices, 1):
            if nodes not in kept:
                made = self._fitting.run(nodes, None, f"solver of {nfe} steps, pass {number} of {passes}")
                one = {"nfe": nfe, "power": power, "nodes": list(nodes), "errors": made.errors}
                kept[nodes] = session.tell(one)
                self._found.passes.append(kept[nodes])
                self._keep()
            trials.append(kept[nodes])
        best = max(trials, key=grade)
        name = f"solver of {nfe} steps, pass {passes} of {passes}"
        made = self._fitting.run(tuple(best["nodes"]), weights_of(best["errors"]), name)
        fit: dict[str, Any] = {
            "nodes": best["nodes"],
            "rows": made.rows,
            "forecasts": made.forecasts,
            "expected": made.expected,
            "power": best["power"],
            "passes": passes,
            "trials": self._trials(made, nfe),
        }
        self._found.fits.append(session.tell(fit))
        self._keep()

    def _choices(self, nfe: int) -> list[tuple[float | None, _Nodes]]:
        """Plan different nodes on the first rank, and tell them to all: power of the sensitivities → nodes.

        The steps of the plan have no power. They are not among the choices if an expert has none of them.
        """
        found, steps, ranks = self._found, self._session.steps, self._session.ranks
        choices: dict[_Nodes, float | None] = {}
        if ranks.is_leader:
            with ranks.busy("planning nodes"):
                measured = found.trajectory(steps), found.sensitivity(steps), found.response(steps)
                for power in POWERS:
                    choices.setdefault(self._fitting.planner(*measured, power).plan(nfe), power)
                planned = found.planner(self._fitting.levels).plan(nfe).computed
                experts = self._session.plan.course.numbers
                if {experts[step] for step in planned} == {*experts}:
                    choices.setdefault(tuple(planned), None)
        told = self._session.tell([(power, nodes) for nodes, power in choices.items()])
        return [(power, tuple(nodes)) for power, nodes in told]

    def _trials(self, made: Pass, nfe: int) -> list[dict[str, Any]]:
        """Quality of the frames of each video of a pass, on the first rank."""
        session, done = self._session, []
        for video in range(session.videos):
            truth = session.frames(session.share(self._found.latents, video))
            frames = session.frames(session.share(made.results, video))
            if session.ranks.is_leader:
                trial = Trial(
                    video=video,
                    nfe=nfe,
                    expected=math.sqrt(statistics.fmean(error**2 for error in made.errors)),
                    surprise=made.surprises[video],
                    measured=made.errors[video],
                    psnr=psnr(frames, truth),
                )
                done.append(trial.model_dump())
        return done


def grade(trial: dict[str, Any]) -> float:
    """Grade of a trial pass in dB, by which nodes are chosen: that of its errors, less for a plan's steps."""
    planned = trial["power"] is None
    return score(trial["errors"]) - (_CLEARLY if planned else 0.0)
