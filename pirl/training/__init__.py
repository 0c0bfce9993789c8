"""Pretraining: what to train, and the loop that trains it."""
