# Shared by tpu_vm.sh and queued_resource.sh, which source it: how the repository gets to the hosts and is started.
# shellcheck shell=bash disable=SC2154

# What is committed, as one file in the bucket.
put_source() {
  local archive
  archive="git -C $(quote "$(dirname "$here")") archive --format=tar.gz HEAD"
  run bash -o pipefail -c "$archive | gcloud storage cp - $(quote "$SOURCE")"
}

# Shell text that starts tpu_host.sh as a unit on one host; as root. SIGTERM goes to the script, which hands it on.
start_command() {
  local unit=(systemd-run --unit=quietstar --collect --property=KillMode=mixed --property=TimeoutStopSec=300
    --setenv=HOME=/root) name
  for name in SHARED MAX_RESTARTS RESTART_SECONDS MAX_RESTART_SECONDS PYTHON_VERSION; do
    [[ -z ${!name:-} ]] || unit+=(--setenv="$name=${!name}")
  done
  unit+=(bash /opt/quietstar_jax/launch/tpu_host.sh "${ARGUMENTS[@]//\$/\$\$}") # systemd would put its variables in
  echo "set -euo pipefail
mkdir -p /opt/quietstar_jax
gcloud storage cat $(quote "$SOURCE") | tar -xz -C /opt/quietstar_jax
$(quote "${unit[@]}")"
}
