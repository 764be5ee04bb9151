#!/usr/bin/env bash
# TPU slices through the queue of the Cloud TPU API, Spot too: waits for them, trains, and asks again when they are taken.
#   launch/queued_resource.sh [--dry-run] --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# Each host trains from its startup script, so nothing depends on this script once the slices are there; it only asks
# for new ones. Interrupted, it can be started again. With SLICES above 1 say --config.mesh.dcn_data=SLICES too.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"
# shellcheck source=tpu_start.sh
source "$here/tpu_start.sh"

PROJECT=${PROJECT:-}
ZONE=${ZONE:-}
NAME=${NAME:-quietstar}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16} # v5p-32, v6e-16 ...
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite} # v2-alpha-tpuv5, v2-alpha-tpuv6e ...
SLICES=${SLICES:-1}
SPOT=${SPOT:-true}
SOURCE=${SOURCE:-} # gs://bucket/quietstar_jax.tar.gz: where this repository is put for the hosts
SHARED=${SHARED:-} # NFS export (Filestore), mounted at /runs on every host; give --config.workdir=/runs/...
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-} # reads SOURCE; empty = the project's default
POLL_SECONDS=${POLL_SECONDS:-60}

parse_arguments "$@"
need PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION SLICES SOURCE SHARED POLL_SECONDS

queued=(gcloud compute tpus queued-resources)
where=(--project="$PROJECT" --zone="$ZONE")
node=$NAME
nodes=(--node-id="$NAME")
if ((SLICES > 1)); then
  node=$NAME-0
  nodes=(--node-count="$SLICES" --node-prefix="$NAME")
fi
options=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" --scopes=cloud-platform)
[[ $SPOT != true ]] || options+=(--spot)
[[ -z $SERVICE_ACCOUNT ]] || options+=(--service-account="$SERVICE_ACCOUNT")

startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
printf '#!/usr/bin/env bash\n%s\n' "$(start_command)" >"$startup"

create() {
  run "${queued[@]}" create "$NAME" "${where[@]}" "${nodes[@]}" "${options[@]}" \
    --metadata-from-file=startup-script="$startup"
}
delete() { run "${queued[@]}" delete "$NAME" "${where[@]}" --force --quiet; }
state() { run "${queued[@]}" describe "$NAME" "${where[@]}" --format='value(state.state)'; }
# The status that the first host ended with; empty while it runs, or cannot be reached.
status() {
  run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=0 \
    --command='cat /opt/quietstar_jax/exit_status 2>/dev/null || true'
}

if $DRY_RUN; then
  put_source
  echo "cat >$startup <<'EOF'"
  cat "$startup"
  echo "EOF"
  create
  echo "# every $POLL_SECONDS s:"
  state
  echo "# when that says ACTIVE: has it ended?"
  status
  echo "# when it says SUSPENDED or FAILED, at most $MAX_RESTARTS times:"
  delete
  create
  echo "# when it has ended:"
  delete
  exit 0
fi

put_source
asked=0
pause=$RESTART_SECONDS
while true; do
  case $(state 2>/dev/null || echo ABSENT) in
    ACTIVE)
      pause=$RESTART_SECONDS
      ended=$(status 2>/dev/null || true)
      if [[ $ended =~ ^[0-9]+$ ]]; then
        echo "launch: the run ended with status $ended; the slices are given back" >&2
        delete
        exit "$ended"
      fi
      ;;
    SUSPENDED | FAILED | ABSENT)
      ((asked <= MAX_RESTARTS)) || fail "asked for slices $asked times; giving up"
      echo "launch: request $((asked += 1)), of at most $((MAX_RESTARTS + 1))" >&2
      if state >/dev/null 2>&1; then delete; fi
      create || { echo "launch: refused; again in $pause s" >&2 && sleep "$pause"; }
      pause=$((pause * 2 < MAX_RESTART_SECONDS ? pause * 2 : MAX_RESTART_SECONDS))
      ;;
  esac
  sleep "$POLL_SECONDS"
done
