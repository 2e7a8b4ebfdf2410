#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on several nodes: run this on each of them, for example with srun or mpirun, one task for each node.
#
#     NODES=4 RENDEZVOUS=node-0:29400 RUN_ID=a examples/train_many_nodes.sh configs/RECIPE.yaml --output /shared/a
#
# The folder of the run must be on a file system that all nodes share. Nodes may come in any order; they meet at the
# first one. When a process is killed, torchrun starts all processes of all nodes again, and they go on from the newest
# checkpoint that is whole.
#
# NODES       number of nodes
# RENDEZVOUS  HOST:PORT of the node where they meet, which is one of them
# RUN_ID      the same on all nodes, another one for each run
# NPROC       processes of this node (default: its devices, or 1 without an accelerator)
# RESTARTS    how often all are started again (default 3)
# SAVE_S      seconds that processes have to write a checkpoint on SIGTERM (default 600; older PyTorch waits 30)
# PYTHON      interpreter (default python)
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: NODES=N RENDEZVOUS=HOST:PORT RUN_ID=NAME $0 RECIPE [options of vidgen train]" >&2
    exit 2
fi
recipe=$1
shift
: "${NODES:?number of nodes}" "${RENDEZVOUS:?HOST:PORT of one of the nodes}" "${RUN_ID:?name of the run}"
python=${PYTHON:-python}
devices='import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 1)'
nproc=${NPROC:-$("$python" -c "$devices")}
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')
threads=$((cores / nproc))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_S:-600}
# A new store for each start, without the addresses of processes that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "$python" -m torch.distributed.run \
    --nnodes "$NODES" \
    --nproc-per-node "$nproc" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$RENDEZVOUS" \
    --rdzv-id "$RUN_ID" \
    --max-restarts "${RESTARTS:-3}" \
    -m vidgen train "$recipe" "$@"
