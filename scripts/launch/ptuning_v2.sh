#!/bin/bash
# P-Tuning v2: trained keys and values before those of every layer, through an MLP.
#   bash scripts/launch/ptuning_v2.sh MODEL DATA OUTPUT [more flags of train.py]
# The prefix in OUTPUT/epoch-E-step-S needs the model beside it.
# GPUs: CUDA_VISIBLE_DEVICES=0,1 chooses them; a step's rows are GPUs x batch x accumulation.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash scripts/launch/ptuning_v2.sh MODEL DATA OUTPUT [more flags of train.py]" >&2
    exit 2
fi
model="$1" data="$2" output="$3"
shift 3
root="$(cd "$(dirname "$0")/../.." && pwd)"
deepspeed --master_port "${MASTER_PORT:-29500}" "$root/train.py" \
    --model_name_or_path "$model" --train_path "$data" --output_dir "$output" \
    --train_type ptuning --ptuning_version v2 --prefix_projection True --pre_seq_len 16 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing \
    --max_len 768 --max_src_len 512 --learning_rate 1e-4 --num_train_epochs 2 \
    --ds_file ds_zero2_no_offload.json \
    "$@"  # a flag given here again wins
