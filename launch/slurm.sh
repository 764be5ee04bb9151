#!/usr/bin/env bash
# A GPU cluster under SLURM: one task per GPU, which is how JAX recognises the tasks of a job step.
#   launch/slurm.sh [--dry-run] --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# Run it where REPOSITORY, with its .venv, and config.workdir are on a file system that all nodes see.
# SIGTERM comes SAVE_SECONDS before the time limit, or from a preemption; the job then saves, and requeues itself.
# scancel is a SIGTERM too: to end job N for good, `scontrol update jobid=N requeue=0 && scancel N`.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

NAME=${NAME:-quietstar}
PARTITION=${PARTITION:-} # empty = the cluster's default
ACCOUNT=${ACCOUNT:-}
NODES=${NODES:-1}
GPUS=${GPUS:-8} # per node
CPUS=${CPUS:-12} # per GPU
TIME=${TIME:-24:00:00}
SAVE_SECONDS=${SAVE_SECONDS:-300}
REPOSITORY=${REPOSITORY:-$(dirname "$here")}
PYTHON=${PYTHON:-$REPOSITORY/.venv/bin/python}
LOGS=${LOGS:-$REPOSITORY/runs/logs}

parse_arguments "$@"
need NAME NODES GPUS CPUS TIME SAVE_SECONDS REPOSITORY PYTHON LOGS
((NODES == 1)) || need_shared_workdir ""

# srun does not take --cpus-per-task over from sbatch
step=(srun --cpus-per-task="$CPUS" --kill-on-bad-exit=0 --gpu-bind=none "$REPOSITORY/launch/slurm_task.sh")
train=("$PYTHON" -m quietstar_jax.train "${ARGUMENTS[@]}" --config.distributed.processes=cluster)
options=(--job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS"
  --cpus-per-task="$CPUS" --exclusive --time="$TIME" --signal="TERM@$SAVE_SECONDS" --requeue --open-mode=append
  --chdir="$REPOSITORY" --output="$LOGS/%x-%j.log")
[[ -z $PARTITION ]] || options+=(--partition="$PARTITION")
[[ -z $ACCOUNT ]] || options+=(--account="$ACCOUNT")

# --signal and preemptions reach the tasks of the step; the shell around it only has to outlive them.
batch="#!/usr/bin/env bash
set -euo pipefail
source $(quote "$REPOSITORY/launch/common.sh")
trap : TERM
# of a task which must not be started again; a new name each time, since file systems remember what they did not find
final=$(quote "$LOGS/$NAME")-\$SLURM_JOB_ID-\${SLURM_RESTART_COUNT:-0}.status
$(quote "${step[@]}") \"\$final\" $(quote "${train[@]}") &
wait_for \$! && status=0 || status=\$?
if [[ -s \$final ]]; then status=\$(<\"\$final\") && rm -f \"\$final\"; fi
echo \"launch: status \$status, \${SLURM_RESTART_COUNT:-0} restarts so far\"
if goes_on \"\$status\" && ((\${SLURM_RESTART_COUNT:-0} < $MAX_RESTARTS)); then
  scontrol requeue \"\$SLURM_JOB_ID\" || echo \"launch: not requeued\"
fi
exit \"\$status\""

run mkdir -p "$LOGS"
run_with_input "$batch" sbatch "${options[@]}"
