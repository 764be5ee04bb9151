#!/usr/bin/env bash
# The figures of one large GPU (80 GB for the half-billion model, 141 GB for Mistral 7B), with traces.
# Usage: benchmarks/gpu.sh [OUTPUT_FOLDER]   (results.jsonl: one JSON object per run)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-python3}
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.97}
mkdir -p "$out"

record() {  # NAME MODULE FLAGS...
    local name=$1 module=$2
    shift 2
    echo "$name" >&2
    if "$python" -m "$module" "$@" --json >"$out/$name.log" 2>&1; then
        tail -n 1 "$out/$name.log" | tee -a "$out/results.jsonl"
    else
        echo "$name FAILED; see $out/$name.log" >&2
    fi
}

for attention in blocks triton; do  # the loss must be the same to rounding
    record "train_half_billion_$attention" benchmarks.train_step --preset half_billion --prefix-attention "$attention" \
        --profile "$out/trace_half_billion_$attention"
done
record train_half_billion_quarter benchmarks.train_step --preset half_billion --positions entropy --position-fraction 0.25
record generate_half_billion benchmarks.generate --preset half_billion
record generate_mistral_7b benchmarks.generate --preset mistral_7b
for megabytes in 2048 4096 8192; do
    record "train_mistral_7b_$megabytes" benchmarks.train_step --preset mistral_7b --chunk-megabytes "$megabytes"
done
record train_mistral_7b_triton benchmarks.train_step --preset mistral_7b --prefix-attention triton
record train_mistral_7b_trace benchmarks.train_step --preset mistral_7b --profile "$out/trace_mistral_7b"
