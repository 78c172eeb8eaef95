#!/bin/bash
# train.py on the nodes of a SLURM job, one torchrun a node. From the project's folder, which every node must see:
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch/slurm.sh --train_path rows.json --model_name_or_path chatglm2-6b --output_dir /shared/out
# A requeued job goes on from its newest checkpoint. GPUS_PER_NODE: processes a node, where SLURM does not tell.
#SBATCH --job-name=glm-foundry
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f train.py ]; then
    echo "scripts/launch/slurm.sh: no train.py in $PWD: submit from the project's folder" >&2
    exit 1
fi
if [ -f .venv/bin/activate ]; then
    . .venv/bin/activate
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
    train.py --resume_from_checkpoint auto "$@"
