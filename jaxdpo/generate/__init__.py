"""Completions drawn from a model: `sampler.py` is the way in, `programs.py` what is compiled, `warp.py` the choice of
one token, `run.py` the command."""
