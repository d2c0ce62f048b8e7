#!/usr/bin/env bash
# A jaxdpo command on every host of a Cloud TPU VM slice; the hosts find each other.
#
#   export TPU=my-slice ZONE=us-east5-b
#   experiments/launch/cloud_tpu_vm.sh install          # this checkout, with libtpu, on every host
#   experiments/launch/cloud_tpu_vm.sh start dpo --model MODEL --data DATA --output-dir /mnt/shared/run
#   experiments/launch/cloud_tpu_vm.sh log              # of the first host, which prints for all
#   experiments/launch/cloud_tpu_vm.sh stop             # saves at the current step; `start` goes on from there
#
# Needs gcloud, logged in, and the slice (gcloud compute tpus tpu-vm create). Several slices: one queued resource with
# --node-count; name them all, TPU="a b". --output-dir and --data are paths that every host sees: Filestore, say.
set -euo pipefail
: "${TPU:?set it to the name of the slice}" "${ZONE:?set it to the zone of the slice}"

on_hosts() { # which hosts of each slice, what to run there
  for slice in $TPU; do
    gcloud compute tpus tpu-vm ssh "$slice" --zone="$ZONE" --worker="$1" --command="$2" &
  done
  wait
}

case "${1:-}" in
  install)
    top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    built=$(mktemp -d)
    trap 'rm -rf "$built"' EXIT
    pip wheel --quiet --no-deps --wheel-dir "$built" "$top"
    wheel=$(basename "$built"/jaxdpo-*.whl)
    for slice in $TPU; do
      gcloud compute tpus tpu-vm scp "$built/$wheel" "$slice:" --zone="$ZONE" --worker=all
    done
    # The images' own Python may be older than 3.11; uv brings one.
    on_hosts all "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --clear --python 3.12 ~/jaxdpo &&
      ~/.local/bin/uv pip install --python ~/jaxdpo \"jaxdpo[tpu] @ file://\$HOME/$wheel\""
    ;;
  start)
    shift
    : "${1:?start needs a jaxdpo command, such as: dpo --model MODEL --data DATA --output-dir DIR}"
    # Detached: a run does not end with the connection.
    on_hosts all "nohup ~/jaxdpo/bin/jaxdpo $(printf '%q ' "$@") > ~/jaxdpo.log 2>&1 < /dev/null &"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "${TPU%% *}" --zone="$ZONE" --worker=0 --command="tail -n 100 -F ~/jaxdpo.log"
    ;;
  stop)
    on_hosts all "pkill -TERM -f jaxdpo/bin/jaxdp[o]" # the brackets keep it from finding itself
    ;;
  *)
    echo "usage: $0 install | start COMMAND [OPTIONS] | log | stop" >&2
    exit 2
    ;;
esac
