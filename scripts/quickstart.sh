#!/usr/bin/env bash
# The main job end to end on a laptop: a small ChatGLM2 learns to extract triples with LoRA, a predictor learns how long that
# model's answers are, a server answers by those predictions, and first come first served is compared with it on the real engine.
#   bash scripts/quickstart.sh
#   MODEL=/path/to/chatglm2-6b bash scripts/quickstart.sh      a real checkpoint instead of the small model
# Everything lands in output/quickstart (OUT names another folder); summary.json holds the figures.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh serve
OUT="${OUT:-output/quickstart}"
if [ -e "$OUT" ] && [ ! -e "$OUT/.quickstart" ]; then
    echo "OUT=$OUT exists and is not an earlier quickstart's folder; name another" >&2
    exit 1
fi
rm -rf "$OUT"
mkdir -p "$OUT"
touch "$OUT/.quickstart"
export TOKENIZERS_PARALLELISM=false
steps="$OUT/seconds.txt"

step() { # step NAME COMMAND...: run, and note the seconds
    local name="$1" started=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    echo "$name $((SECONDS - started))" >> "$steps"
}

rate=2e-4  # for a real model; the small one below learns at its own
place=(--deployer helr)  # the server's devices: all GPUs
# Two ranks share two cores better than one rank with two threads; GPUs are counted by the launcher itself.
launch=(deepspeed --master_port 520)
if python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    launch+=(--num_gpus 1)
else
    ranks=$(( $(nproc) >= 2 ? 2 : 1 ))
    launch+=(--num_accelerators "$ranks")
    place+=(--num_gpus "$ranks")  # without GPUs: processes that share the cores
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) / ranks ))}"
    batch=$(( 16 / ranks ))
fi

if [ -z "${MODEL:-}" ]; then
    MODEL="$OUT/base"
    rate=4e-3
    step tokenizer python scripts/prepare_tokenizer.py --input data/copy_pretrain.json data/spo_train.json --output_dir "$OUT/tokenizer"
    step model python scripts/prepare_small_model.py --family glm2 --tokenizer "$OUT/tokenizer" --output_dir "$OUT/random" \
        --hidden_size 320 --num_layers 3 --heads 10 --groups 2 --ffn 880 --init_std 0.05
    # A base model that has learnt to read and copy, but has never seen a triple.
    step pretrain "${launch[@]}" train.py --model_name_or_path "$OUT/random" --train_path data/copy_pretrain.json \
        --train_type all --ds_file ds_zero2.json --max_len 160 --max_src_len 120 \
        --per_device_train_batch_size "${batch:-16}" \
        --learning_rate 2e-3 --weight_decay 0 --num_train_epochs 2 --max_steps 700 --show_loss_step 50 \
        --save_total_limit 1 --output_dir "$OUT/pretrain"
    mv "$OUT"/pretrain/epoch-*-step-* "$MODEL"
fi
evaluate() { python -m finetune.evaluate --model_path "$1" --test_path data/spo_test.json --max_src_len 120 --max_new_tokens 96 --batch_size 25 --output "$2"; }
step f1_before evaluate "$MODEL" "$OUT/before.json"
step lora "${launch[@]}" train.py --train_path data/spo_train.json --model_name_or_path "$MODEL" \
    --train_type lora --lora_dim 16 --lora_alpha 32 --lora_dropout 0 \
    --lora_module_name "query_key_value,dense_h_to_4h,dense_4h_to_h,dense" \
    --learning_rate "$rate" --weight_decay 0 --num_train_epochs 5 --max_steps 400 --show_loss_step 50 \
    --max_len 160 --max_src_len 120 --per_device_train_batch_size "${batch:-16}" \
    --ds_file ds_zero2_no_offload.json --output_dir "$OUT/lora"
adapter=$(ls -d "$OUT"/lora/epoch-*-step-* | sort -V | tail -n 1)
step merge python merge_lora.py --ori_model_dir "$MODEL" --model_dir "$adapter" --save_dir "$OUT/merged"
step f1_after evaluate "$OUT/merged" "$OUT/after.json"
step answer python - "$OUT" <<'PY'
import json, sys
row = json.load(open(f"{sys.argv[1]}/after.json"))["answers"][0]
print(f"prompt: {row['prompt']}\nanswer: {row['answer']}\ngold:   {row['gold']}")
PY
# How long are the tuned model's answers? Prompts of one to four sentences with as many facts, and some of other tasks: a spread of
# lengths. The model answers, a quarter of the prompts is held out, the lexical predictor learns from the rest.
step length_prompts python - "$OUT" <<'PY'
import json, random, sys
draw = random.Random(0)
facts, others = ([json.loads(line) for line in open(f"data/{name}.json")] for name in ("spo_train", "copy_pretrain"))
rows = [{"instruction": facts[0]["instruction"], "input": "".join(f["input"] for f in draw.sample(facts, 1 + i % 4))} for i in range(260)]
others = [{name: row[name] for name in ("instruction", "input")} for row in others if not row["instruction"].startswith("照抄")]
rows += draw.sample(others, 140)
with open(f"{sys.argv[1]}/length_prompts.jsonl", "w") as file:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
PY
step lengths python scripts/collect_lengths.py --model_path "$OUT/merged" --prompts "$OUT/length_prompts.jsonl" --output "$OUT/lengths.jsonl" \
    --served_model quickstart --max_src_len 120 --max_new_tokens 96 --batch_size 50
step length_split python - "$OUT" <<'PY'
import json, sys
from finetune.rows.near_duplicates import group_prompts
from predictor.labels import split_groups
out = sys.argv[1]
lines = open(f"{out}/lengths.jsonl").readlines()
prompts = [json.loads(line)["prompt"] for line in lines]
for side, chosen in split_groups(group_prompts(prompts), prompts, {"train": 0.75, "test": 0.25}).items():
    open(f"{out}/lengths_{side}.jsonl", "w").writelines(lines[i] for i in chosen)
PY
step predictor python train.py --task predictor --backbone lexical --model_name_or_path "$OUT/merged" --served_model quickstart \
    --train_path "$OUT/lengths_train.jsonl" --output_dir "$OUT/predictor"
step predictor_test python -m predictor.evaluate --predictor "$OUT/predictor" --data "$OUT/lengths_test.jsonl" \
    --json "$OUT/predictor.json" --picture "$OUT/predictor.png"
# Served by predicted length: a deployer places the model on the devices there are, each replica a process of its own; 8 clients ask the
# held-out prompts; the server says what it expected of each answer's length and what came.
serve() {
    python -u -m serving.server --model "$OUT/merged" --predictor "$OUT/predictor" --policy deadline --port 0 --max_tokens 512 "${place[@]}" \
        --log "$OUT/served.jsonl" --log_prompts > "$OUT/server.txt" &
    local server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    python scripts/ask_server.py --server "$OUT/server.txt" --prompts "$OUT/lengths_test.jsonl" --clients 8 --json "$OUT/asked.json"
    cat "$OUT/server.txt"  # the placement, with what was predicted and taken
    kill $server
    wait $server
    trap - EXIT
}
step serve serve
step predictor_drift python -m predictor.update --predictor "$OUT/predictor" --log "$OUT/served.jsonl" --dry_run
step policies python benchmarks/serving_real.py --folder "$OUT" --policies fifo,fcfs,deadline --at fifo,fcfs --requests 150 --repetitions 2 \
    --profile_repetitions 2 --json "$OUT/policies.json"
python - "$OUT" "$MODEL" <<'PY'
import json, os, sys
out, model = sys.argv[1:]
seconds = {name: int(s) for name, s in (line.split() for line in open(f"{out}/seconds.txt"))}
f1 = {when: json.load(open(f"{out}/{when}.json"))["f1"] for when in ("before", "after")}
lengths = json.load(open(f"{out}/predictor.json"))
predictor = {name: lengths["all"][name] for name in ("answers", "cut", "tau", "mae", "mae_constant", "coverage_90", "coverage_975", "reserved_90")}
predictor["milliseconds_p50"] = lengths["milliseconds"]["single_p50"]
asked = json.load(open(f"{out}/asked.json"))
loads = [
    {
        "at": load["at"],
        "requests_s": load["rate"],
        "policies": {
            row["policy"]: {name: sum(values) / len(values) for name, values in row["measured"].items()} for row in load["rows"]
        },
    }
    for load in json.load(open(f"{out}/policies.json"))["loads"]
]
summary = {
    "model": model, "f1_before": f1["before"], "f1_after": f1["after"], "predictor": predictor,
    "served": {name: asked[name] for name in ("answers", "in_time", "within_q90")}, "loads": loads, "seconds": seconds,
    "seconds_total": sum(seconds.values()),
}
with open(f"{out}/.summary.tmp", "w") as file:
    json.dump(summary, file, indent=2)
os.replace(f"{out}/.summary.tmp", f"{out}/summary.json")
print(f"\nF1 {f1['before']:.3f} before LoRA, {f1['after']:.3f} after; {summary['seconds_total']} s; figures in {out}/summary.json")
print(f"lengths of its answers, {predictor['answers']} held out: tau-b {predictor['tau']:.3f}, MAE {predictor['mae']:.1f} tokens against the constant's "
      f"{predictor['mae_constant']:.1f}, q90 covers {predictor['coverage_90']:.0%}, q97.5 {predictor['coverage_975']:.0%}; "
      f"predictor: {out}/predictor, picture: {out}/predictor.png")
print(f"served by deadline: {asked['in_time']:.0%} of {asked['answers']} answers in time")
what = {"fifo": "static batches", "fcfs": "continuous, as vLLM", "deadline": "continuous, by predicted length"}
for load in loads:
    print(f"\nreal engine, {load['requests_s']:.1f} requests/s, where {load['at']} answers half in time by simulation:")
    print(f"{'policy':<10} {'':<32} {'in time, %':>10} {'mean latency, s':>16} {'p99, s':>8}")
    for name, of in load["policies"].items():
        figures = f"{100 * of['attainment']:>10.0f} {of['latency_mean_s']:>16.2f} {of['latency_p99_s']:>8.2f}"
        print(f"{name:<10} {what[name]:<32} {figures}")
PY
echo
echo "talk to it and watch it: $(command -v python) -m serving.server --model $OUT/merged --predictor $OUT/predictor"
echo "then open http://127.0.0.1:8000/ in a browser (Ctrl-C ends the server)"
