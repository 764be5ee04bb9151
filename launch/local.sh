#!/usr/bin/env bash
# Several processes on this machine that make one run, over gloo on CPUs: what a pod does, small.
#   launch/local.sh [--dry-run] --config configs/quickstart.py [--config.NAME=VALUE ...]
# All processes are started again when one is killed, or when the run saved and left. The first
# one writes to the terminal, the others to LOGS.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

PROCESSES=${PROCESSES:-2}
DEVICES=${DEVICES:-1} # per process
PORT=${PORT:-12355}
PYTHON=${PYTHON:-$here/../.venv/bin/python}
LOGS=${LOGS:-runs/logs}

parse_arguments "$@"
need PROCESSES DEVICES PORT PYTHON LOGS

process() {
  printf '%s\0' env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$DEVICES" "$PYTHON" -m quietstar_jax.train "${ARGUMENTS[@]}" \
    --config.distributed.processes=given --config.distributed.coordinator="127.0.0.1:$PORT" \
    --config.distributed.num_processes="$PROCESSES" --config.distributed.process_id="$1"
}

# One attempt. Its status is that of a process which must not be started again, if there is one.
all_processes() {
  local i pid status worst=0 pids=() command
  for ((i = 0; i < PROCESSES; i++)); do
    mapfile -d '' -t command < <(process "$i")
    if ((i == 0)); then "${command[@]}" & else "${command[@]}" >>"$LOGS/process-$i.log" 2>&1 & fi
    pids+=("$!")
  done
  trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
  for pid in "${pids[@]}"; do
    wait_for "$pid" && status=0 || status=$?
    if ((status != 0)) && { ((worst == 0)) || ! goes_on "$status"; }; then worst=$status; fi
  done
  return "$worst"
}

run mkdir -p "$LOGS"
if $DRY_RUN; then
  for ((i = 0; i < PROCESSES; i++)); do
    mapfile -d '' -t command < <(process "$i")
    log=""
    ((i == 0)) || log=" >>$(quote "$LOGS/process-$i.log") 2>&1"
    printf '%s%s &\n' "$(quote "${command[@]}")" "$log"
  done
  echo "# all again on status $EXIT_RETRY or a kill, at most $MAX_RESTARTS times"
  exit 0
fi
again all_processes || { status=$? && echo "launch: ended with status $status; the other processes wrote to $LOGS" >&2 && exit "$status"; }
