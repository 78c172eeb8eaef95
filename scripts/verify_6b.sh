#!/usr/bin/env bash
# UNVERIFIED: nobody has run this yet. It is what a person with a GPU (24 GB or more) and real weights runs to check the toolkit
# on a real ChatGLM:   bash scripts/verify_6b.sh /path/to/chatglm2-6b [work folder]
# 1. parity: logits and greedy answers of our model against the original code that lies in the checkpoint's folder, run in a
#    venv of its own with the library versions it was written for (transformers 4.33);
# 2. one LoRA run on the sample data, 3. merge (checks merged == adapted), 4. predict with adapter and merged model.
set -euo pipefail
cd "$(dirname "$0")/.."
model="${1:?usage: bash scripts/verify_6b.sh MODEL_DIR [WORK_DIR]}"
work="${2:-output/verify_6b}"
mkdir -p "$work"
source scripts/setup.sh

echo "== 1. parity with the original code"
if [ ! -x "$work/original/bin/python" ]; then
    "${ORIGINAL_PYTHON:-python3.10}" -m venv "$work/original"
    "$work/original/bin/pip" install --quiet "torch==2.1.2" "transformers==4.33.0" "sentencepiece==0.1.99" "numpy<2" accelerate
fi
"$work/original/bin/python" - "$model" "$work/original.pt" <<'PY'
import sys, torch
from transformers import AutoModel, AutoTokenizer
path, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True).half().cuda().eval()
result = {}
for query in ("你好", "晚上睡不着应该怎么办", "Write a haiku about snow."):
    inputs = tokenizer([query], return_tensors="pt").to("cuda")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float().cpu()
        ids = model.generate(**inputs, do_sample=False, max_length=128)[0].tolist()
    result[query] = {"ids": inputs["input_ids"][0].tolist(), "logits": logits, "generated": ids}
torch.save(result, out)
PY
python - "$model" "$work/original.pt" <<'PY'
import sys, torch
from chatglm import load_model, load_tokenizer
path, out = sys.argv[1:]
expected = torch.load(out, weights_only=True)
tokenizer, model = load_tokenizer(path), load_model(path, dtype=torch.float16).cuda()
failed = False
for query, want in expected.items():
    inputs = tokenizer([query], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == want["ids"], f"{query}: other prompt ids"
    inputs = {k: v.cuda() for k, v in inputs.items()}
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float().cpu()
        ids = model.generate(**inputs, do_sample=False, max_length=128)[0].tolist()
    same = sum(a == b for a, b in zip(ids, want["generated"]))
    apart = float((logits - want["logits"]).abs().max())
    print(f"{query}: largest difference of logits {apart:.3f}, same tokens {same} of {len(want['generated'])}")
    # fp16 on both sides, and rotary tables that the original keeps in fp16: near, not equal.
    failed |= apart > 0.5
sys.exit(failed)
PY

echo "== 2. LoRA"
deepspeed --master_port 520 --num_gpus 1 train.py --train_path data/spo_train.json --model_name_or_path "$model" \
    --per_device_train_batch_size 4 --max_len 160 --max_src_len 120 --learning_rate 1e-4 --num_train_epochs 1 --max_steps 200 \
    --train_type lora --lora_dim 16 --lora_alpha 64 --gradient_checkpointing --ds_file ds_zero2_no_offload.json --output_dir "$work/lora"
adapter=$(ls -d "$work"/lora/epoch-*-step-* | sort -V | tail -n 1)

echo "== 3. merge"
python merge_lora.py --ori_model_dir "$model" --model_dir "$adapter" --save_dir "$work/merged"

echo "== 4. predict"
for folder in "$adapter" "$work/merged"; do
    python -m finetune.evaluate --model_path "$folder" --base_model "$model" --test_path data/spo_test.json --max_src_len 120 --max_new_tokens 96
done
echo "verified: $model"
