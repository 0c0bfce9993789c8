"""Speed claims: both sides of each in one run, alternating. `python -m benchmarks` runs all, `.gNN_name` one."""
