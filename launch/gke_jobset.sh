#!/usr/bin/env bash
# TPU slices in a GKE cluster, as a JobSet: one Job per slice, one pod per host.
#   launch/gke_jobset.sh [--dry-run] --config configs/mistral_7b_openwebmath.py [--config.NAME=VALUE ...]
# IMAGE holds the package (launch/Dockerfile). CLAIM is a ReadWriteMany volume (Filestore, Lustre, Cloud Storage FUSE),
# mounted at /runs. If SLICES is above 1, also set --config.mesh.dcn_data=SLICES.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

NAME=${NAME:-quietstar}
NAMESPACE=${NAMESPACE:-default}
IMAGE=${IMAGE:-}
CLAIM=${CLAIM:-}
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} # tpu-v4-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x
TOPOLOGY=${TOPOLOGY:-4x4}
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4} # of the node pool's machine type, the number before its final t
SLICES=${SLICES:-1}
SPOT=${SPOT:-false}
QUEUE=${QUEUE:-} # LocalQueue of Kueue; empty = scheduled at once
GRACE_SECONDS=${GRACE_SECONDS:-300} # to save in; a Spot node leaves 25 of them

parse_arguments "$@"
need NAME NAMESPACE IMAGE CLAIM ACCELERATOR TOPOLOGY CHIPS_PER_HOST SLICES GRACE_SECONDS
need_shared_workdir /runs/
[[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "TOPOLOGY is $TOPOLOGY; it looks like 4x4 or 2x2x4"
chips=$((${TOPOLOGY//x/*}))
((chips % CHIPS_PER_HOST == 0)) || fail "TOPOLOGY $TOPOLOGY has $chips chips, no multiple of CHIPS_PER_HOST $CHIPS_PER_HOST"
hosts=$((chips / CHIPS_PER_HOST))

# A JSON string is a YAML string too, whatever is in it.
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//$'\n'/\\n}"
}

# Pods whose nodes are there first wait for the others; to give up would use up a restart.
[[ " ${ARGUMENTS[*]}" == *" --config.distributed.start_seconds"* ]] || ARGUMENTS+=(--config.distributed.start_seconds=86400)
arguments=""
for argument in "${ARGUMENTS[@]}" --config.distributed.processes=cluster; do
  arguments+="
                    - $(json "$argument")"
done
spot="" spot_toleration=""
if [[ $SPOT == true ]]; then
  spot='
                cloud.google.com/gke-spot: "true"'
  spot_toleration='
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule'
fi
queue=""
if [[ -n $QUEUE ]]; then
  queue="
  labels:
    kueue.x-k8s.io/queue-name: $(json "$QUEUE")"
fi

# A pod that ends with a status that starting again would not change fails its Job for the reason PodFailurePolicy, and
# that ends the JobSet. Everything else (saved and left, killed, evicted) makes the JobSet start all pods again.
manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$NAME")
  namespace: $(json "$NAMESPACE")$queue
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    enableDNSHostnames: true # the headless service by which the pods of a slice find each other
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: Count
                onPodConditions:
                  - type: DisruptionTarget
                    status: \"True\"
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: NotIn
                  values: [129, $(seq -s ', ' 131 159), $EXIT_RETRY] # goes_on: 128 and a signal
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $GRACE_SECONDS
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY$spot
              tolerations:
                - key: google.com/tpu
                  operator: Exists
                  effect: NoSchedule$spot_toleration
              containers:
                - name: train
                  image: $(json "$IMAGE")
                  command: [python, -m, quietstar_jax.train]
                  args:$arguments
                  ports:
                    - containerPort: 8471 # between the hosts of a slice
                    - containerPort: 8476 # coordinator of jax.distributed
                  resources:
                    requests:
                      google.com/tpu: $CHIPS_PER_HOST
                    limits:
                      google.com/tpu: $CHIPS_PER_HOST
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: $(json "$CLAIM")"

run_with_input "$manifest" kubectl apply --filename=-
echo "# logs: kubectl $(quote --namespace="$NAMESPACE" logs --follow --prefix --selector="jobset.sigs.k8s.io/jobset-name=$NAME")"
