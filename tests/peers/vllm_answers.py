"""What vLLM answers: run in an environment that has it (benchmarks/client_env.py vllm).

python vllm_answers.py CASE.json: {name: {folder, prompts: [[ids]], tokens, texts: [str],
chats: [[messages]], adapter: a LoRA's folder, options: of vllm.LLM}}, all but the first three
optional; writes CASE.json.found: {name: {answers: greedy ids up to an end token, spoken: their
texts, ids, chats, registered: whether this project's plug-in is there}}.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores that were given
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all models in this one process

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

SHARED = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16}


def read_folder(case: dict) -> dict:
    options = SHARED | case.get("options", {})
    lora = None
    if adapter := case.get("adapter"):
        rank = json.loads(Path(adapter, "adapter_config.json").read_text("utf-8"))["r"]
        options |= {"enable_lora": True, "max_lora_rank": max(8, rank)}
        lora = LoRARequest("adapter", 1, adapter)
    model = LLM(case["folder"], **options)
    tokenizer = model.get_tokenizer()
    found: dict = {"answers": [], "spoken": [], "ids": [], "chats": []}
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    sampling = SamplingParams(temperature=0.0, max_tokens=case["tokens"])
    for answer in model.generate(prompts, sampling, use_tqdm=False, lora_request=lora):
        found["answers"].append(list(answer.outputs[0].token_ids))
        found["spoken"].append(answer.outputs[0].text)
    for text in case.get("texts", []):
        found["ids"].append(tokenizer.encode(text))
    if chats := case.get("chats"):
        for answer in model.chat(chats, SamplingParams(max_tokens=1), use_tqdm=False):
            found["chats"].append(list(answer.prompt_token_ids))
    found["registered"] = "chatglm" in sys.modules
    del model
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    case_file = Path(sys.argv[1])
    results = {}
    for name, case in json.loads(case_file.read_text("utf-8")).items():
        results[name] = read_folder(case)
    Path(f"{case_file}.found").write_text(json.dumps(results))
