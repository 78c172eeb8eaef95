"""What a grammar costs per token: the mask, and choosing under it, over a real vocabulary.

    python benchmarks/grammar_cost.py --model DIR

Prints milliseconds a token of greedy and of sampled rows, beside those without a grammar, and the
seconds that the vocabulary and a first grammar take.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chatglm import load_tokenizer  # noqa: E402
from chatglm.commands import run_command  # noqa: E402
from serving.engines.answers import Answer, Sampling, choose_tokens  # noqa: E402
from serving.engines.constraints import Grammar, TokenVocabulary  # noqa: E402
from serving.server.chat import answer_shape  # noqa: E402
from serving.server.structured import answer_grammar, json_form  # noqa: E402
from serving.server.vocabulary import token_bytes  # noqa: E402

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "age": {"type": "integer"},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}


def milliseconds(rows: torch.Tensor, sampling: Sampling, tokens: int, stop_ids: list[int]) -> float:
    """Of choosing a token from one of `rows` (N, V) at a time; an ended answer begins again."""
    answer, spent = Answer(0, [1], sampling, None), 0.0
    for number in range(tokens):
        row = rows[number % len(rows)][None]
        begin = time.perf_counter()
        [token] = choose_tokens(row, [answer])
        spent += time.perf_counter() - begin
        assert token is not None
        answer.add(token)
        if token in stop_ids:
            answer = Answer(0, [1], sampling, None)
    return spent / tokens * 1e3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder with a tokenizer")
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args(argv)
    return run_command("grammar_cost.py", lambda: measure_cost(args.model, args.tokens))


def measure_cost(model: str, tokens: int) -> int:
    """Print the figures of a folder's vocabulary."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(model)
    begin = time.perf_counter()
    vocabulary = TokenVocabulary(token_bytes(tokenizer), tokenizer.stop_ids)
    built_s = time.perf_counter() - begin
    source = answer_grammar(answer_shape(tokenizer), json_form("schema", SCHEMA), [])
    begin = time.perf_counter()
    grammar = Grammar(source, vocabulary)
    compiled_ms = (time.perf_counter() - begin) * 1e3
    random.seed(0)
    torch.manual_seed(0)
    rows = torch.randn(16, len(tokenizer)) * 3
    figures = {"vocabulary": len(tokenizer), "built_s": built_s, "compiled_ms": compiled_ms}
    for name, options in (("greedy", {}), ("sampled", {"temperature": 0.8, "top_p": 0.8})):
        for constrained in (None, grammar):
            sampling = Sampling(grammar=constrained, seed=1, **options)
            cost = milliseconds(rows, sampling, tokens, tokenizer.stop_ids)
            figures[f"{name}{'_grammar' if constrained else ''}_ms"] = cost
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
