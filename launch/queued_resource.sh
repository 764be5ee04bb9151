#!/usr/bin/env bash
# TPU slices through the queue of the Cloud TPU API, Spot too: waits for them, trains, and asks again when they are taken.
#   launch/queued_resource.sh [--dry-run] --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# Each host trains from its startup script, so nothing depends on this script once the slices are there; it only asks
# for new ones. Interrupted, it can be started again. If SLICES is above 1, also set --config.mesh.dcn_data=SLICES.

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
IDLE_SECONDS=${IDLE_SECONDS:-1800} # slices that are there, but run nothing and say no status, are given back after so long

parse_arguments "$@"
need PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION SLICES SOURCE SHARED POLL_SECONDS IDLE_SECONDS
need_shared_workdir /runs/

queued=(gcloud compute tpus queued-resources)
where=(--project="$PROJECT" --zone="$ZONE" --quiet)
node=$NAME
nodes=(--node-id="$NAME")
if ((SLICES > 1)); then
  node=$NAME-0
  nodes=(--node-count="$SLICES" --node-prefix="$NAME")
fi
options=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" --scopes=cloud-platform)
[[ $SPOT != true ]] || options+=(--spot)
[[ -z $SERVICE_ACCOUNT ]] || options+=(--service-account="$SERVICE_ACCOUNT")

startup=$(mktemp) errors=$(mktemp)
trap 'rm -f "$startup" "$errors"' EXIT
printf '#!/usr/bin/env bash\n%s\n' "$(start_command)" >"$startup"

create() {
  run "${queued[@]}" create "$NAME" "${where[@]}" "${nodes[@]}" "${options[@]}" \
    --metadata-from-file=startup-script="$startup"
}
delete() { run "${queued[@]}" delete "$NAME" "${where[@]}" --force; }
describe() { run "${queued[@]}" describe "$NAME" "${where[@]}" --format='value(state.state)'; }
# The status that the first host ended with, else what systemd says of its unit.
status() {
  run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=0 \
    --command='cat /opt/quietstar_jax/exit_status 2>/dev/null || systemctl is-active quietstar || true' </dev/null
}

# The state of the request. ABSENT only where the service says that there is none: no other error says anything about
# the slices, so the answer is then UNKNOWN.
state() {
  local said
  if said=$(describe 2>"$errors"); then
    echo "${said:-UNKNOWN}"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    echo "launch: the state cannot be read: $(<"$errors")" >&2
    echo UNKNOWN
  fi
}

# What the first host says, its last line; empty where it cannot be reached.
host_says() {
  local said
  if said=$(status 2>"$errors"); then
    echo "${said##*$'\n'}"
  else
    echo "launch: the first host cannot be reached: $(<"$errors")" >&2
  fi
}

# Slices are paid for until they are gone, so this does not end before they are.
give_back() {
  while true; do
    delete || echo "launch: the slices could not be deleted" >&2
    [[ $(state) != ABSENT ]] || return 0
    sleep "$POLL_SECONDS"
  done
}

if $DRY_RUN; then
  put_source
  echo "cat >$startup <<'EOF'"
  cat "$startup"
  echo "EOF"
  create
  echo "# every $POLL_SECONDS s:"
  describe
  echo "# when that says ACTIVE: has it ended?"
  status
  echo "# when it says SUSPENDED or FAILED:"
  delete
  echo "# when there is none, at most $MAX_RESTARTS times:"
  create
  echo "# when the run has ended, or nothing has run for $IDLE_SECONDS s, until there is none:"
  delete
  exit 0
fi

put_source
asked=0
pause=$RESTART_SECONDS
idle_since="" # seconds of this script; empty while something runs
while true; do
  now=$(state)
  [[ $now == ACTIVE ]] || idle_since=""
  case $now in
    ACTIVE)
      pause=$RESTART_SECONDS
      host=$(host_says)
      case $host in
        [0-9] | [0-9][0-9] | [0-9][0-9][0-9])
          echo "launch: the run ended with status $host; the slices are given back" >&2
          give_back
          exit "$host"
          ;;
        inactive | failed | unknown)
          : "${idle_since:=$SECONDS}"
          if ((SECONDS - idle_since >= IDLE_SECONDS)); then
            give_back
            fail "nothing ran on the slices for $IDLE_SECONDS s, so they were given back. Was the unit stopped? If not," \
              "the startup script failed: can the service account read $SOURCE?"
          fi
          ;;
        active | activating | deactivating) idle_since="" ;;
      esac
      ;;
    SUSPENDED | FAILED) # asked for again once they are gone
      echo "launch: the slices are $now" >&2
      delete || echo "launch: they could not be deleted; again in $POLL_SECONDS s" >&2
      ;;
    ABSENT)
      ((asked <= MAX_RESTARTS)) || fail "asked for slices $asked times; giving up"
      echo "launch: request $((asked += 1)), of at most $((MAX_RESTARTS + 1))" >&2
      create || { echo "launch: refused; again in $pause s" >&2 && sleep "$pause"; }
      pause=$((pause * 2 < MAX_RESTART_SECONDS ? pause * 2 : MAX_RESTART_SECONDS))
      ;;
  esac
  sleep "$POLL_SECONDS"
done
