#!/usr/bin/env bash
# On each machine: HEAD=gpu-node-1 NODES=2 GPUS=8 RUN_ID=llama3 launch/torchrun.sh --config A.yaml output_dir=...
# HEAD is the machine at which all others meet; it listens on PORT. RUN_ID is any word that the machines share.
set -euo pipefail
: "${HEAD:?set HEAD to the name of the first machine}" "${NODES:=1}" "${GPUS:=8}" "${RUN_ID:=run}" "${PORT:=29400}"
# torchrun would die of these signals; ignored by it, they still reach the run's own handlers.
trap "" USR1 USR2
# So many seconds after SIGTERM it kills whoever still saves its step; by itself after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-id "$RUN_ID" --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:$PORT" -m sparse_llm_ft train "$@"
