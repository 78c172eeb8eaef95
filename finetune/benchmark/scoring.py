"""Log-likelihoods of choices, and greedy answers, by one model: ChoiceScorer.

`ChoiceScorer.scores` is lm-evaluation-harness's `loglikelihood`, `ChoiceScorer.answers` its
`generate_until`. Most models score a question's choices as one row, a tree: the context is computed
once, and each choice attends to it and to itself (`score_trees`). Rows of like lengths are a pass.
What all rows of a task begin with, the examples mostly, is computed once and kept as a KV cache.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chatglm.families import family_of
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
Report = Callable[[int], object]  # called with how many more questions are done


def longest_input(model: "PreTrainedModel") -> int:
    """Tokens that a model may read, by its configuration."""
    config = model.config
    for name in ("seq_length", "max_sequence_length", "max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int):
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

        The contexts of ChatGLM-6B and GLM-10B look ahead, and P-Tuning v1's vectors have no place
        in a tree's mask.
        """
        looks_ahead = family_of(self.tokenizer).infills
        return not looks_ahead and not getattr(self.inner.base_model, "prompt_length", 0)

    def scores(self, questions: Sequence[Question], report: Report) -> list[list[float]]:
        """The log-likelihood of each question's continuations.

        Raises ValueError where one has nothing to score, no room in the model, or comes out NaN.
        """
        encoded = [self.encoder.question(question) for question in questions]
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
        questions: list[int] = []  # of each tree, the number of the question whose choices it holds
        for number, choices in enumerate(encoded):
            rows = rows_of_choices(choices)
            trees += rows
            questions += [number] * len(rows)
        shared = self.common_beginning(trees)
        cache = self.cache_of(trees[0].ids[:shared]) if shared else None
        tree_scores: list[list[float]] = [[] for _ in trees]
        trees_left = Counter(questions)
        for numbers in self.passes([len(tree) - shared for tree in trees]):
            chosen = [trees[number] for number in numbers]
            questions_done = 0
            for number, scores in zip(numbers, self.pass_scores(chosen, shared, cache)):
                tree_scores[number] = scores
                question = questions[number]
                trees_left[question] -= 1
                if trees_left[question] == 0:
                    questions_done += 1
            report(questions_done)
        question_scores: list[list[float]] = [[] for _ in encoded]
        for question, scores in zip(questions, tree_scores):
            question_scores[question] += scores
        return question_scores

    def common_beginning(self, trees: Sequence[Tree]) -> int:
        """How many first tokens all trees have in common, or 0 where it is not worth while."""
        if len(trees) < 2:
            return 0
        shared = shared_start([tree.ids for tree in trees])
        for tree in trees:
            shared = min(shared, tree.first_place)
        return shared if shared >= SHARED_FROM else 0

    def passes(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of rows that are computed together, by their lengths, the longest first."""
        numbers: list[int] = []
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[numbers[0]] if numbers else 0
            if (len(numbers) + 1) * longest > self.batch_tokens:
                yield numbers
                numbers = []
            numbers.append(number)
        if numbers:
            yield numbers

    def cache_of(self, ids: list[int]) -> "DynamicCache":
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
        states = self.tree_states(trees, shared, cache)
        rows: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        for row, tree in enumerate(trees):
            rows += [row] * len(tree.places)
            places += [place - shared for place in tree.places]
            targets += tree.targets
        where = torch.tensor([rows, places], device=states.device)
        log_probs = self.log_probs(states, where, torch.tensor(targets, device=states.device))
        values = log_probs.tolist()
        scores = []
        start = 0
        for tree in trees:
            choice_scores = []
            for count in tree.counts:
                choice_scores.append(sum(values[start : start + count]))
                start += count
            scores.append(choice_scores)
        return scores

    def tree_states(
        self, trees: Sequence[Tree], shared: int, cache: "DynamicCache | None"
    ) -> Tensor:
        """(B, S, H) last hidden states of trees without their first `shared` tokens."""
        device = self.inner.device
        ids, positions, branch = padded_trees(trees, shared)
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            batch_cache = copy.deepcopy(cache)  # the model adds to it
            batch_cache.batch_repeat_interleave(len(trees))
            options = {"past_key_values": batch_cache, "use_cache": True}
        has_branches = bool((branch > 0).any())
        if cache is not None or has_branches:  # else the model's own causal mask is right
            options["attention_mask"] = tree_mask(branch.to(device), shared, self.inner.dtype)
            options["position_ids"] = positions.to(device)
        return self.inner.base_model(input_ids=ids.to(device), **options).last_hidden_state

    def log_probs(self, states: Tensor, where: Tensor, targets: Tensor) -> Tensor:
        """(N,) fp64 of targets (N,) predicted at `where` (2, N), rows and places of (B, S, H).

        Choices of one token are predicted at one place, whose logits are computed once.
        """
        row, place = where
        flat_places = row * states.shape[1] + place
        # hidden[index[n]] predicts target n.
        unique_places, index = torch.unique(flat_places, return_inverse=True)
        hidden = states.flatten(0, 1)[unique_places]
        output_layer = self.inner.get_output_embeddings()
        chunk = max(1, LOGITS_BYTES // (4 * output_layer.weight.shape[0]))
        log_probs = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
        for start in range(0, len(hidden), chunk):
            logits = output_layer(hidden[start : start + chunk]).float()
            is_in_chunk = (index >= start) & (index < start + chunk)
            numbers = is_in_chunk.nonzero().flatten()
            index_in_chunk = index[numbers] - start
            target_logits = logits[index_in_chunk, targets[numbers]]
            log_normalisers = logits.logsumexp(-1)[index_in_chunk]
            log_probs[numbers] = (target_logits - log_normalisers).double()
        return log_probs

    # ---- one choice after the other

    def score_ragged(
        self, encoded: Sequence[list[Continuation]], report: Report
    ) -> list[list[float]]:
        """As `score_trees`, for models whose choices share nothing: all end to end in a row."""
        question_scores: list[list[float]] = []
        for choices in encoded:
            scores = [0.0] * len(choices)
            for numbers in self.passes([len(choice) for choice in choices]):
                chosen = [choices[number] for number in numbers]
                for number, score in zip(numbers, self.ragged_scores(chosen)):
                    scores[number] = score
            question_scores.append(scores)
            report(1)
        return question_scores

    def ragged_scores(self, choices: Sequence[Continuation]) -> list[float]:
        """The score of each choice, all of them end to end in one row."""
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
        lengths = [len(choice) for choice in choices]
        log_probs = token_log_probs(
            self.model,
            torch.tensor([ids], device=device),
            lengths=lengths,
            shared=[0] * len(lengths),
            keep=torch.tensor(keep, device=device),
            targets=torch.tensor(targets, device=device),
        )
        scores = []
        for choice_log_probs in log_probs.double().split(counts):
            scores.append(float(choice_log_probs.sum()))
        return scores

    # ---- written answers

    def answers(
        self, questions: Sequence[Question], until: Sequence[str], max_new: int, report: Report
    ) -> list[str]:
        """Greedy answers up to the first of the texts `until`, at most `max_new` tokens each.

        Raises ValueError where the model has no room for a context and an answer.
        """
        max_prompt = self.max_length - max_new
        if max_prompt <= self.encoder.front + len(self.encoder.after):
            raise ValueError(f"--max_length {self.max_length} has no room for {max_new} new tokens")
        encoded = []
        for question in questions:
            ids = self.encoder.context(question.contexts[0])
            front = self.encoder.front  # control tokens, which stay
            excess = max(0, len(ids) - max_prompt)
            encoded.append(ids[:front] + ids[front + excess :])
        answers = [""] * len(questions)
        for numbers in self.passes([len(ids) + max_new for ids in encoded]):
            prompts = [encoded[number] for number in numbers]
            longest = max(len(prompt) for prompt in prompts)
            stops = StopTexts(self.tokenizer, longest, until)
            options = {"max_new_tokens": max_new, "stopping_criteria": [stops]}
            generated = generate_batch(self.model, self.tokenizer, prompts, **options)
            for number, (ids, _) in zip(numbers, generated):
                text = decoded_text(self.tokenizer, ids)
                answers[number] = cut_before(text, until)
            report(len(numbers))
        return answers


def padded_trees(trees: Sequence[Tree], shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, positions, branches), each (B, S), of trees without their first `shared` tokens.

    Padding is on the right, of branch -1.
    """
    longest = max(len(tree) for tree in trees) - shared
    ids = torch.zeros(len(trees), longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    branch = torch.full_like(ids, -1)
    for row, tree in enumerate(trees):
        length = len(tree) - shared
        ids[row, :length] = torch.tensor(tree.ids[shared:])
        positions[row, :length] = torch.tensor(tree.positions[shared:])
        branch[row, :length] = torch.tensor(tree.branch[shared:])
    return ids, positions, branch


def tree_mask(branch: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, shared + S) added to scores: 0 where a token sees another, else far below.

    Args:
        branch: (B, S) of each token; all see the trunk, 0, and their own before them.
        shared: tokens in the cache, which all see.
    """
    length = branch.shape[1]
    is_same_branch = branch[:, None, :] == branch[:, :, None]
    is_trunk = (branch == 0)[:, None, :]
    is_seen = (is_same_branch | is_trunk).tril()
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=branch.device)
    mask.masked_fill_(~is_seen, torch.finfo(dtype).min)
    mask = torch.nn.functional.pad(mask, (shared, 0))
    return mask.view(len(branch), 1, length, shared + length)


class StopTexts:
    """A stopping criterion of generate(): every row has written one of the texts."""

    def __init__(self, tokenizer: "FamilyTokenizer", prompt: int, until: Sequence[str]):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.until = until
        # A token has a byte at least, so a text that has just ended is in so many tokens.
        self.tail = max((len(text.encode()) for text in until), default=0)

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
        if stop:
            text = text.split(stop)[0]
    return text
