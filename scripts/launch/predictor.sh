#!/bin/bash
# The length predictor on the model that is served; DATA is what scripts/collect_lengths.py wrote.
#   bash scripts/launch/predictor.sh MODEL DATA OUTPUT [more flags of train.py]
# serving.server takes OUTPUT's checkpoint as --predictor.
# GPUs: CUDA_VISIBLE_DEVICES=0,1 chooses them; a step's rows are GPUs x batch x accumulation.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash scripts/launch/predictor.sh MODEL DATA OUTPUT [more flags of train.py]" >&2
    exit 2
fi
model="$1" data="$2" output="$3"
shift 3
root="$(cd "$(dirname "$0")/../.." && pwd)"
deepspeed --master_port "${MASTER_PORT:-29500}" "$root/train.py" \
    --model_name_or_path "$model" --train_path "$data" --output_dir "$output" \
    --task predictor --backbone chatglm --train_type lora --lora_dim 8 \
    --per_device_train_batch_size 8 --learning_rate 1e-4 --num_train_epochs 1 \
    --ds_file ds_zero2_no_offload.json \
    "$@"  # a flag given here again wins
