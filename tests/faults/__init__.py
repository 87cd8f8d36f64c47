"""Harm, done on purpose and by seed: what a fault may cost is time, never data. `python -m tests.faults --help`."""
