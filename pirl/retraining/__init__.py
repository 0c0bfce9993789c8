"""Keeping a model up to date: whether anything has changed, a warm start, and the whole way to the registry."""

from pirl.retraining.changes import Decision, Gating, data_uri, decide_retrain

__all__ = ["Decision", "Gating", "data_uri", "decide_retrain"]
