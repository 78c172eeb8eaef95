#!/bin/bash
# Freeze: the last layers are trained, the others stay; FREEZE="layers.27.,layers.26." names them.
#   bash scripts/launch/freeze.sh MODEL DATA OUTPUT [more flags of train.py]
# OUTPUT/epoch-E-step-S is a whole model.
# GPUs: CUDA_VISIBLE_DEVICES=0,1 chooses them; a step's rows are GPUs x batch x accumulation.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash scripts/launch/freeze.sh MODEL DATA OUTPUT [more flags of train.py]" >&2
    exit 2
fi
model="$1" data="$2" output="$3"
shift 3
root="$(cd "$(dirname "$0")/../.." && pwd)"
deepspeed --master_port "${MASTER_PORT:-29500}" "$root/train.py" \
    --model_name_or_path "$model" --train_path "$data" --output_dir "$output" \
    --train_type freeze --freeze_module_name "${FREEZE:-layers.27.,layers.26.,layers.25.,layers.24.}" \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing \
    --max_len 1560 --max_src_len 1024 --learning_rate 1e-4 --num_train_epochs 2 \
    --ds_file ds_zero2_no_offload.json \
    "$@"  # a flag given here again wins
