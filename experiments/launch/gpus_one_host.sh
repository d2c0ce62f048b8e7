#!/usr/bin/env bash
# A jaxdpo command on the GPUs of this host. One process drives all of them: nothing has to find anything.
#
#   experiments/launch/gpus_one_host.sh dpo --model MODEL --data DATA --output-dir DIR
#
# VENV is the environment with jaxdpo[cuda], by default .venv; CUDA_VISIBLE_DEVICES=0,1 takes some of the GPUs.
set -euo pipefail
: "${1:?a jaxdpo command is missing, such as: dpo --model MODEL --data DATA --output-dir DIR}"

# Without this jax takes three quarters of each GPU's memory and leaves the rest unused.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
# Collectives run beside products.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
exec "${VENV:-.venv}/bin/jaxdpo" "$@"
