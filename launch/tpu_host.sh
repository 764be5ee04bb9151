#!/usr/bin/env bash
# Runs on each host of a TPU slice, as root, started by tpu_vm.sh or queued_resource.sh: installs, mounts, trains.
#   SHARED=10.0.0.2:/runs launch/tpu_host.sh --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# Leaves the final status in ./exit_status of the repository, also that of an installation that failed; none where the
# machine is taken away, since the run then goes on elsewhere.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

SHARED=${SHARED:-} # NFS export (Filestore), mounted at /runs: all hosts write one checkpoint
PYTHON_VERSION=${PYTHON_VERSION:-3.11} # uv brings it; images of TPU VMs have 3.10

# Runs a command, and again when it fails, four times in all: servers of packages are not always there.
insist() {
  local status left pause=$RESTART_SECONDS
  for left in 3 2 1 0; do
    run "$@" && return || status=$?
    echo "launch: status $status of $(quote "$@"); $left more attempts" >&2
    ((left == 0)) || sleep "$pause"
    pause=$((pause * 2))
  done
  return "$status"
}

leave_status() {
  local status=$?
  if $TOLD_TO_LEAVE && goes_on "$status"; then return; fi
  echo "$status" >"$here/../exit_status"
}

parse_arguments "$@"
if ! $DRY_RUN; then
  trap leave_status EXIT
  trap 'TOLD_TO_LEAVE=true; exit "$EXIT_RETRY"' TERM INT # until `again` sets its own
fi
need SHARED PYTHON_VERSION
need_shared_workdir /runs/

run cd "$here/.."
run rm -f exit_status
if $DRY_RUN || ! mountpoint -q /runs; then
  # a machine that has just started is often still updating itself
  insist apt-get -qq -o DPkg::Lock::Timeout=600 update
  insist apt-get -qq -o DPkg::Lock::Timeout=600 install --yes nfs-common
  run mkdir -p /runs
  insist mount -t nfs -o hard,noatime "$SHARED" /runs
fi
if $DRY_RUN || [[ ! -e .venv/.installed ]]; then
  insist python3 -m pip install --quiet uv
  insist python3 -m uv venv --clear --python "$PYTHON_VERSION" .venv
  insist python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[tpu]'
  run touch .venv/.installed
fi
train=(.venv/bin/python -m quietstar_jax.train "${ARGUMENTS[@]}" --config.distributed.processes=cluster)
if $DRY_RUN; then
  echo "$(quote "${train[@]}") # again on status $EXIT_RETRY or a kill, at most $MAX_RESTARTS times"
  exit 0
fi
again "${train[@]}"
