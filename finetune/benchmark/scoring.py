"""Log-likelihoods of choices, and greedy answers.

A question's choices are one row, a tree: the context is computed once, and each choice sees it and
itself. Rows of like lengths are a pass. What all rows of a task begin with (examples, mostly) is
computed once for all of them, as keys and values.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.benchmark.encoding import (
    Continuation,
    PairEncoder,
    Tree,
    rows_of_choices,
    shared_start,
)
from finetune.benchmark.questions import Question
from finetune.evaluation.generation import decoded_text, generate_batch
from finetune.loss import token_log_probs, without_peft

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer

SHARED_FROM = 16  # tokens that all rows begin with, for which a cache is worth while
LOGITS_BYTES = 8 << 20  # of logits at a time: about a cache
DEFAULT_LENGTH = 2048  # as the harness's, of a model that does not say
Report = Callable[[int], object]  # told how many questions are done


def longest_input(model: "PreTrainedModel") -> int:
    """Tokens that a model may read, by its configuration."""
    config = model.config
    for name in ("seq_length", "max_sequence_length", "max_position_embeddings", "n_positions"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return DEFAULT_LENGTH


class ChoiceScorer:
    """Scores of choices by one model.

    Args:
        batch_tokens: of a pass, at most; a longer row is a pass of its own.
        max_length: longest input; None for the model's own limit.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "FamilyTokenizer",
        batch_tokens: int,
        max_length: int | None = None,
    ):
        self.model = model
        self.inner: Any = without_peft(model)
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.max_length = max_length or longest_input(self.inner)
        self.encoder = PairEncoder(tokenizer, self.max_length)

    @property
    def grows_trees(self) -> bool:
        """Whether choices may share their context.

        ChatGLM-6B's context looks ahead, and P-Tuning v1's vectors have no place in a tree's mask.
        """
        body = self.inner.base_model
        looks_ahead = self.tokenizer.family == "glm"
        return not looks_ahead and not getattr(body, "prompt_length", 0)

    def scores(self, questions: Sequence[Question], report: Report) -> list[list[float]]:
        """The log-likelihood of each question's continuations.

        Raises ValueError where one has nothing to score, no room in the model, or comes out NaN.
        """
        encoded = list(map(self.encoder.question, questions))
        with torch.inference_mode():
            scored = self.score_trees if self.grows_trees else self.score_ragged
            found = scored(encoded, report)
        for number, values in enumerate(found, 1):
            if any(map(math.isnan, values)):
                raise ValueError(
                    f"row {number}: the model's log-likelihoods are no numbers: its weights are "
                    "damaged, or too large for their type (--precision fp32)"
                )
        return found

    # ---- trees

    def score_trees(
        self, encoded: Sequence[list[Continuation]], report: Report
    ) -> list[list[float]]:
        trees: list[Tree] = []
        owners: list[int] = []  # of each tree, the question whose choices it holds
        for number, choices in enumerate(encoded):
            rows = rows_of_choices(choices)
            trees += rows
            owners += [number] * len(rows)
        shared = self.common_beginning(trees)
        cache = self.computed(trees[0].ids[:shared]) if shared else None
        of_trees: dict[int, list[float]] = {}
        left = Counter(owners)
        for numbers in self.passes(list(map(len, trees)), -shared):
            chosen = list(map(trees.__getitem__, numbers))
            done = 0
            for number, values in zip(numbers, self.pass_scores(chosen, shared, cache)):
                of_trees[number] = values
                left[owners[number]] -= 1
                done += not left[owners[number]]
            report(done)
        found: list[list[float]] = []
        for number, owner in enumerate(owners):
            if owner == len(found):
                found.append([])
            found[-1] += of_trees[number]
        return found

    def common_beginning(self, trees: Sequence[Tree]) -> int:
        """How many first tokens all trees have in common, or 0 where it is not worth while."""
        if len(trees) < 2:
            return 0
        shared = shared_start([tree.ids for tree in trees])
        for tree in trees:
            shared = min(shared, tree.first_place)
        return shared if shared >= SHARED_FROM else 0

    def passes(self, lengths: Sequence[int], more: int = 0) -> Iterator[list[int]]:
        """Numbers of rows that are computed together, the longest first.

        `more`: tokens that each takes beside its length.
        """
        numbers: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[numbers[0]] + more if numbers else 0
            if (len(numbers) + 1) * longest > self.batch_tokens:
                yield numbers
                numbers = []
            numbers.append(number)
        if numbers:
            yield numbers

    def computed(self, ids: list[int]) -> "DynamicCache":
        """Keys and values of a beginning, of one row."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.inner.config)
        row = torch.tensor([ids], device=self.inner.device)
        self.inner.base_model(input_ids=row, past_key_values=cache, use_cache=True)
        return cache

    def pass_scores(
        self, trees: Sequence[Tree], shared: int, cache: "DynamicCache | None"
    ) -> list[list[float]]:
        """The scores of each tree's choices; the first `shared` tokens are in the cache."""
        device = self.inner.device
        ids, positions, branch = padded_trees(trees, shared)
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(trees))
            options = {"past_key_values": own, "use_cache": True}
        if cache is not None or (branch > 0).any():  # else each token sees all before it
            mask = tree_mask(branch.to(device), shared, self.inner.dtype)
            options |= {"attention_mask": mask, "position_ids": positions.to(device)}
        states = self.inner.base_model(input_ids=ids.to(device), **options).last_hidden_state
        rows: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        for row, tree in enumerate(trees):
            rows += [row] * len(tree.places)
            places += tree.places
            targets += tree.targets
        where = torch.tensor([rows, places], device=device)
        where[1] -= shared
        found = self.log_probs(states, where, torch.tensor(targets, device=device)).tolist()
        scores = []
        start = 0
        for tree in trees:
            of_choices = []
            for count in tree.counts:
                of_choices.append(sum(found[start : start + count]))
                start += count
            scores.append(of_choices)
        return scores

    def log_probs(self, states: Tensor, where: Tensor, targets: Tensor) -> Tensor:
        """(N,) fp64 of targets (N,) predicted at `where` (2, N), rows and places of (B, S, H).

        Choices of one token are predicted at one place, whose logits are computed once.
        """
        places, index = torch.unique(where[0] * states.shape[1] + where[1], return_inverse=True)
        hidden = states.flatten(0, 1)[places]
        head = self.inner.get_output_embeddings()
        step = max(1, LOGITS_BYTES // (4 * head.weight.shape[0]))
        found = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        for start in range(0, len(hidden), step):
            logits = head(hidden[start : start + step]).float()
            mine = ((index >= start) & (index < start + step)).nonzero().flatten()
            of_targets = logits[index[mine] - start, targets[mine]]
            found[mine] = (of_targets - logits.logsumexp(-1)[index[mine] - start]).double()
        return found

    # ---- one choice after the other

    def score_ragged(
        self, encoded: Sequence[list[Continuation]], report: Report
    ) -> list[list[float]]:
        """As `score_trees`, for models whose choices share nothing: all end to end in a row."""
        found: list[list[float]] = []
        for choices in encoded:
            scores = [0.0] * len(choices)
            for numbers in self.passes(list(map(len, choices))):
                chosen = list(map(choices.__getitem__, numbers))
                for number, value in zip(numbers, self.ragged_scores(chosen)):
                    scores[number] = value
            found.append(scores)
            report(1)
        return found

    def ragged_scores(self, choices: Sequence[Continuation]) -> list[float]:
        ids: list[int] = []
        keep: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        for choice in choices:
            counts.append(len(choice.ids) - choice.start)
            keep += range(len(ids) + choice.start - 1, len(ids) + len(choice))
            targets += choice.ids[choice.start :]
            ids += choice.inputs
        device = self.inner.device
        lengths = list(map(len, choices))
        found = token_log_probs(
            self.model,
            torch.tensor([ids], device=device),
            lengths=lengths,
            shared=[0] * len(lengths),
            keep=torch.tensor(keep, device=device),
            targets=torch.tensor(targets, device=device),
        )
        return list(map(float, map(torch.sum, found.double().split(counts))))

    # ---- written answers

    def answers(
        self, questions: Sequence[Question], until: Sequence[str], max_new: int, report: Report
    ) -> list[str]:
        """Greedy answers up to the first of the texts `until`, at most `max_new` tokens each.

        Raises ValueError where the model has no room for a context and an answer.
        """
        room = self.max_length - max_new
        if room <= self.encoder.front + len(self.encoder.after):
            raise ValueError(f"--max_length {self.max_length} has no room for {max_new} new tokens")
        encoded = []
        for question in questions:
            ids = self.encoder.context(question.contexts[0])
            front, extra = self.encoder.front, max(0, len(ids) - room)
            encoded.append(ids[:front] + ids[front + extra :])
        found = [""] * len(questions)
        for numbers in self.passes(list(map(len, encoded)), max_new):
            prompts = list(map(encoded.__getitem__, numbers))
            stops = StopTexts(self.tokenizer, max(map(len, prompts)), until)
            options = {"max_new_tokens": max_new, "stopping_criteria": [stops]}
            written = generate_batch(self.model, self.tokenizer, prompts, **options)
            for number, (ids, _) in zip(numbers, written):
                found[number] = cut_before(decoded_text(self.tokenizer, ids), until)
            report(len(numbers))
        return found


def padded_trees(trees: Sequence[Tree], shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, positions, branches), each (B, S), of trees without their first `shared` tokens.

    Padding is on the right, of branch -1.
    """
    longest = max(map(len, trees)) - shared
    parts = torch.zeros(3, len(trees), longest, dtype=torch.long)
    parts[2] = -1
    for row, tree in enumerate(trees):
        columns = (tree.ids, tree.positions, tree.branch)
        for part, values in zip(parts, columns):
            part[row, : len(values) - shared] = torch.tensor(values[shared:])
    return parts[0], parts[1], parts[2]


def tree_mask(branch: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, shared + S) added to scores: 0 where a token sees another, else far below.

    Args:
        branch: (B, S) of each token; all see the trunk, 0, and their own before them.
        shared: tokens in the cache, which all see.
    """
    length = branch.shape[1]
    own = branch[:, None, :] == branch[:, :, None]
    seen = (own | (branch == 0)[:, None, :]).tril()
    hidden = torch.zeros(seen.shape, dtype=dtype, device=branch.device)
    hidden.masked_fill_(~seen, torch.finfo(dtype).min)
    mask = torch.nn.functional.pad(hidden, (shared, 0))
    return mask.view(len(branch), 1, length, shared + length)


class StopTexts:
    """A stopping criterion of generate(): every row has written one of the texts."""

    def __init__(self, tokenizer: "FamilyTokenizer", prompt: int, until: Sequence[str]):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.until = until
        # A token has a byte at least, so a text that has just ended is in so many tokens.
        self.tail = max([0, *map(len, map(str.encode, until))])

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """(B,) bool: which rows may end."""
        ended = []
        start = max(self.prompt, input_ids.shape[1] - self.tail)
        for row in input_ids[:, start:].tolist():
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            ended.append(any(stop in text for stop in self.until))
        return torch.tensor(ended, device=input_ids.device)


def cut_before(text: str, until: Sequence[str]) -> str:
    """The text before the first of the texts `until`."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
