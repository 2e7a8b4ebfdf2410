#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on all devices of one node, one process for each.
#
#     examples/train_one_node.sh configs/RECIPE.yaml --output runs/a
#
# Everything after the recipe goes to vidgen train. SIGTERM and ctrl-C may be sent to this script: on SIGTERM all
# processes write a checkpoint and end. The same command goes on from the newest checkpoint.
#
# NPROC     processes (default: the devices of the node, or 1 without an accelerator)
# RESTARTS  how often all are started again when one is killed (default 3)
# PYTHON    interpreter (default python)
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: $0 RECIPE [options of vidgen train]" >&2
    exit 2
fi
recipe=$1
shift
python=${PYTHON:-python}
devices='import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 1)'
nproc=${NPROC:-$("$python" -c "$devices")}

exec "$python" -m vidgen train "$recipe" --nproc "$nproc" --max-restarts "${RESTARTS:-3}" "$@"
