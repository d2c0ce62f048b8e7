#!/usr/bin/env bash
# A jaxdpo command on TPU slices of a GKE cluster, as a JobSet that XPK makes; the pods find each other.
#
#   export CLUSTER=my-cluster TPU_TYPE=v5litepod-16 IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/jaxdpo
#   experiments/launch/gke_xpk.sh my-run dpo --model MODEL --data DATA --output-dir /shared/my-run
#
# Needs xpk (pip install xpk) with gcloud and kubectl, and an image with jaxdpo: experiments/launch/Dockerfile. Storage
# that every pod mounts is attached to the cluster first (xpk storage attach) and named in STORAGE. SLICES=2 runs on two
# slices. XPK_OPTIONS holds further options of xpk, such as "--spot". A pod that is evicted gets SIGTERM, saves and exits
# with 143, at which the JobSet starts again and goes on from there; at 1 and 2, errors of the run, it ends.
set -euo pipefail
: "${CLUSTER:?set it to the name of the cluster}" "${TPU_TYPE:?set it to the kind of slice, such as v5litepod-16}"
: "${IMAGE:?set it to an image with jaxdpo, built by experiments/launch/Dockerfile}"
if [ $# -lt 2 ]; then
  echo "usage: $0 NAME COMMAND [OPTIONS], such as: $0 my-run dpo --model MODEL --data DATA --output-dir DIR" >&2
  exit 2
fi
name=$1
shift
read -ra further <<< "${XPK_OPTIONS:-}"

xpk workload create \
  --cluster="$CLUSTER" \
  --workload="$name" \
  --tpu-type="$TPU_TYPE" \
  --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" \
  ${STORAGE:+--storage="$STORAGE"} \
  --max-restarts=100 \
  --termination-grace-period-seconds=600 \
  --command="exec jaxdpo $(printf '%q ' "$@")" \
  "${further[@]}"
