"""Trackers: where the curves and samples of a run can be looked at, TensorBoard unless asked for others."""

from engine.observe.trackers.callback import Trackers, problems

__all__ = ["Trackers", "problems"]
