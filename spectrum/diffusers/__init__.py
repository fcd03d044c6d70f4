"""Spectrum for pipelines of diffusers: forecasts in one line, without a change to the pipeline.

It attaches to a pipeline's transformers through diffusers' own hooks, and `disable` takes it off.
"""

from spectrum.diffusers.calibrate import calibrate
from spectrum.diffusers.plans import Plan, plan
from spectrum.diffusers.presets import Preset
from spectrum.diffusers.report import Report
from spectrum.diffusers.switch import disable, enable, report

__all__ = ["Plan", "Preset", "Report", "calibrate", "disable", "enable", "plan", "report"]
