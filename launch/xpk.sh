#!/usr/bin/env bash
# TPU slices in a GKE cluster that xpk made: xpk writes the JobSet and queues it with Kueue.
#   launch/xpk.sh [--dry-run] --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# IMAGE holds the package (launch/Dockerfile). config.workdir must be on a storage that `xpk storage attach` mounts.
# If SLICES is above 1, also set --config.mesh.dcn_data=SLICES.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

PROJECT=${PROJECT:-}
ZONE=${ZONE:-}
CLUSTER=${CLUSTER:-}
NAME=${NAME:-quietstar}
IMAGE=${IMAGE:-}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
SLICES=${SLICES:-1}
PRIORITY=${PRIORITY:-medium}
GRACE_SECONDS=${GRACE_SECONDS:-300}

parse_arguments "$@"
need PROJECT ZONE CLUSTER NAME IMAGE TPU_TYPE SLICES PRIORITY GRACE_SECONDS
need_shared_workdir /

# xpk starts a workload again that ended with 42 or 127 .. 255, and with what is named here.
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$TPU_TYPE" --num-slices="$SLICES" --priority="$PRIORITY" --docker-image="$IMAGE" \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes="$EXIT_RETRY" \
  --termination-grace-period-seconds="$GRACE_SECONDS" \
  --command="exec python -m quietstar_jax.train $(quote "${ARGUMENTS[@]}" --config.distributed.processes=cluster)"
