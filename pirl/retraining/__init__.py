"""Retraining: changes of data, recipe and code, a warm start, and all steps up to the registry."""

from pirl.retraining.changes import Decision, Gating, data_uri, decide_retrain

__all__ = ["Decision", "Gating", "data_uri", "decide_retrain"]
