#!/usr/bin/env bash
# A TPU slice of the Cloud TPU API that exists already: starts the run on all its hosts, and follows the log of the first.
#   launch/tpu_vm.sh [--dry-run] --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# The run is a systemd unit on each host: it goes on when you log out, and ends with `systemctl stop quietstar`.
# A host that reboots does not take it up again: run this script again.
# A slice that may be taken away as a whole (Spot) is for queued_resource.sh.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"
# shellcheck source=tpu_start.sh
source "$here/tpu_start.sh"

PROJECT=${PROJECT:-}
ZONE=${ZONE:-}
NAME=${NAME:-quietstar}
SOURCE=${SOURCE:-} # gs://bucket/quietstar_jax.tar.gz: where this repository is put for the hosts
SHARED=${SHARED:-} # NFS export (Filestore), mounted at /runs on every host; give --config.workdir=/runs/...

parse_arguments "$@"
need PROJECT ZONE NAME SOURCE SHARED
need_shared_workdir /runs/

on() {
  run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet --worker="$1" --command="$2" </dev/null
}

put_source
on all "sudo bash -c $(quote "$(start_command)")"
on 0 "sudo journalctl --unit=quietstar --follow --lines=+1"
