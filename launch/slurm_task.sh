#!/usr/bin/env bash
# One task of slurm.sh: runs a command, and writes its status into a file if starting again would not change it.
#   launch/slurm_task.sh FILE COMMAND...
# srun ends with the highest status of all tasks: that of those that lost touch with the one whose error it was.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

file=$1
shift
child=""
trap '[[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
"$@" &
child=$!
wait_for "$child" && status=0 || status=$?
if ((status != 0)) && ! goes_on "$status"; then echo "$status" >"$file"; fi
exit "$status"
