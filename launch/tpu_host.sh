#!/usr/bin/env bash
# Runs on each host of a TPU slice, as root, started by tpu_vm.sh or queued_resource.sh: installs, mounts, trains.
#   SHARED=10.0.0.2:/runs launch/tpu_host.sh --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# Leaves the final status in ./exit_status of the repository.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

SHARED=${SHARED:-} # NFS export (Filestore), mounted at /runs: all hosts write one checkpoint
PYTHON_VERSION=${PYTHON_VERSION:-3.11} # uv brings it; images of TPU VMs have 3.10

parse_arguments "$@"
need SHARED PYTHON_VERSION

run cd "$here/.."
run rm -f exit_status
if $DRY_RUN || ! mountpoint -q /runs; then
  run apt-get -qq update
  run apt-get -qq install --yes nfs-common
  run mkdir -p /runs
  run mount -t nfs -o hard,noatime "$SHARED" /runs
fi
if $DRY_RUN || [[ ! -e .venv/.installed ]]; then
  run python3 -m pip install --quiet uv
  run python3 -m uv venv --clear --python "$PYTHON_VERSION" .venv
  run python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[tpu]'
  run touch .venv/.installed
fi
train=(.venv/bin/python -m quietstar_jax.train "${ARGUMENTS[@]}" --config.distributed.processes=cluster)
if $DRY_RUN; then
  echo "$(quote "${train[@]}") # again on status $START_AGAIN or a kill, at most $MAX_RESTARTS times"
  exit 0
fi
again "${train[@]}" && status=0 || status=$?
echo "$status" >exit_status
exit "$status"
