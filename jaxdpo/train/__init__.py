"""Training by preference: state, step, loop, checkpoints, and `run_dpo`, which puts them together."""
