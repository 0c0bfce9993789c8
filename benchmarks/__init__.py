"""Benchmarks of the speed claims: both sides of each in one run, in turns.

`python -m benchmarks` runs all, `python -m benchmarks.gNN_name` one. Each has a goal: G1 sharding, G2 reading, G3
loading, G4 loss, G5 step, G6 host time, G7 two ranks, G8 stall of a checkpoint, G9 restart, G10 evaluation.
`required` is the ratio of the two sides that a goal asks for. docs/performance.md has the figures.
"""
