"""A process that has transformers and not this project, and the tiny folders that it opens."""

import gzip
import json
import random
import shutil
import subprocess
import sys

from chatglm.tokenization import ChatGLMTokenizer
from tests.conftest import shared_file, tiny_model, write_tokenizer

# name: (family, changes of the configuration)
RELEASES = {
    "glm2": ("glm2", {}),
    "glm2-32k": ("glm2", {"rope_ratio": 16}),
    "glm3": ("glm3", {"layernorm_epsilon": 1e-3}),
    "glm3-32k": ("glm3", {"rope_ratio": 50}),
    "glm4": ("glm4", {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}),
    "glm4-tied": ("glm4", {"tie_word_embeddings": True, "multi_query_group_num": 2}),
}
VOCABULARY = 400
STRINGS = 12_000
ODD = " \n\t ab▁éß你好😀\x00ǅ  ,.!<s>|[]sope'12345"


def make_release(folder, name):
    """A tiny model of RELEASES with its tokenizer."""
    family, changes = RELEASES[name]
    folder.mkdir(parents=True)
    write_tokenizer(folder, family)
    tokenizer = ChatGLMTokenizer.from_pretrained(str(folder))
    tiny_model(family, padded_vocab_size=VOCABULARY, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_outside(code: str, place, *arguments) -> str:
    """What Python prints that runs `code` in a folder of its own, without this project."""
    script = place / "outside.py"
    ending = "\nassert not {'chatglm', 'finetune'} & set(sys.modules)\n"
    script.write_text(f"import sys\n{code}{ending}", encoding="utf-8")
    command = [sys.executable, "-P", str(script), *map(str, arguments)]
    if sys.version_info < (3, 11):
        command.remove("-P")
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- the real vocabularies, and texts for them


def real_folder(place, family):
    """A folder with the family's real vocabulary, from the shared data."""
    place.mkdir()
    if family == "glm4":
        packed = shared_file("data/relatives-tokenizers/glm4/tokenizer.model.gz")
        (place / "tokenizer.model").write_bytes(gzip.decompress(packed.read_bytes()))
    else:
        shutil.copy(shared_file("data/chatglm2-tokenizer/tokenizer.model"), place)
    (place / "tokenizer_config.json").write_text(json.dumps({"glm_family": family}))
    return place


def shared_texts() -> list[str]:
    """Questions and answers of the shared data, and random strings of odd characters."""
    found = []
    with gzip.open(
        shared_file("data/length/instructions.jsonl.gz"), "rt", encoding="utf-8"
    ) as file:
        for line in file:
            row = json.loads(line)
            found += [row["instruction"], row["output"] or ""]
    draw = random.Random(0)
    chosen = draw.sample(found, STRINGS - 2000)
    for _ in range(2000):
        chosen.append("".join(draw.choices(ODD, k=draw.randint(0, 30))))
    return chosen
