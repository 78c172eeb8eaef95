"""Questions -> token ids. Free of torch.

`PairEncoder.question` gives a Continuation for each choice; `rows_of_choices` lays a question's
choices out as rows of a batch, those that share their context as one Tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatglm.raw_prompts import RAW_TOKENS, raw_ids
from finetune.benchmark.questions import Question

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer


@dataclass(frozen=True)
class Continuation:
    """Token ids of a context and of the continuation that is scored, from `ids[start]` on."""

    ids: list[int]
    start: int

    def __len__(self) -> int:
        """Tokens that the model reads."""
        return len(self.ids) - 1

    @property
    def inputs(self) -> list[int]:
        """What the model reads: the last token is only predicted."""
        return self.ids[:-1]

    def cut(self, longest: int, front: int, back: int) -> "Continuation":
        """With inputs of at most `longest` tokens: a long context loses its beginning.

        Args:
            front, back: control tokens at the context's ends, which stay.

        Raises:
            ValueError: what is scored is longer by itself.
        """
        excess = len(self) - longest
        if excess <= 0:
            return self
        # One token at least stays before what is scored, which its first token is predicted from.
        kept = max(front + back, 1)
        removable = self.start - kept
        if excess > removable:
            needed = len(self) - removable
            raise ValueError(f"--max_length {longest}: an answer alone needs {needed} tokens")
        return Continuation(self.ids[:front] + self.ids[front + excess :], self.start - excess)


class PairEncoder:
    """Ids of contexts with their continuations, as lm-evaluation-harness splits them.

    A ChatGLM's control tokens surround the context, as `prompt_style` raw has them; other models'
    texts begin as their tokenizers begin them.
    """

    def __init__(self, tokenizer: "FamilyTokenizer", longest: int):
        self.tokenizer = tokenizer
        self.longest = longest
        self.tokens = RAW_TOKENS.get(tokenizer.family)
        before, after = raw_ids(self.tokens, tokenizer, [])
        # Another model's first token may be cut off too: the harness cuts from the left whatever
        # is there.
        self.front = len(before) if self.tokens else 0
        self.after = after

    def context(self, text: str) -> list[int]:
        """Ids of a text to go on with, its end kept where it is too long."""
        ids, after = raw_ids(self.tokens, self.tokenizer, self.tokenizer.encode_text(text))
        return ids + after

    def pair(self, context: str, continuation: str) -> Continuation:
        """The ids of both, at most `longest` inputs.

        Raises:
            ValueError: there is nothing to score, or the continuation alone is too long.
        """
        if self.after:
            encoded = self.separate_pair(context, continuation)
        elif not context and not self.tokens:
            encoded = self.after_start(self.tokenizer.encode_text(continuation))
        else:
            encoded = self.joint_pair(context, continuation)
        if encoded.start >= len(encoded.ids):
            raise ValueError(f"nothing to score: {continuation!r:.60} after {context!r:.60}")
        return encoded.cut(self.longest, self.front, len(self.after))

    def separate_pair(self, context: str, continuation: str) -> Continuation:
        """Both encoded alone, control tokens between them; SentencePiece writes a space first."""
        context_ids = self.context(context)
        text = continuation.lstrip(" ") or continuation
        return Continuation(context_ids + self.tokenizer.encode_text(text), len(context_ids))

    def joint_pair(self, context: str, continuation: str) -> Continuation:
        """Both encoded as one text. Spaces at the context's end belong to what is scored."""
        encode = self.tokenizer.encode_text
        context_ids, _ = raw_ids(self.tokens, self.tokenizer, encode(context.rstrip()))
        whole_ids, _ = raw_ids(self.tokens, self.tokenizer, encode(context + continuation))
        # As the harness: a token across the two is read as the context alone has it.
        continuation_ids = whole_ids[len(context_ids) :]
        return Continuation(context_ids + continuation_ids, len(context_ids))

    def question(self, question: Question) -> list[Continuation]:
        """Its choices' ids; raises ValueError where one has nothing to score, or no room."""
        pairs = zip(question.contexts, question.continuations)
        return [self.pair(context, continuation) for context, continuation in pairs]

    def after_start(self, ids: list[int]) -> Continuation:
        """A text without a context, scored after the model's first token."""
        tokenizer = self.tokenizer
        first = tokenizer.bos_token_id
        if first is None:
            first = tokenizer.eos_token_id
        if ids[:1] == [first]:
            return Continuation(ids, 1)
        return Continuation([first, *ids], 1)


def shared_start(sequences: Sequence[list[int]]) -> int:
    """How many first items all sequences have in common."""
    # In lexicographic order, all others lie between these two and begin as both do.
    first, last = min(sequences), max(sequences)
    for i, (a, b) in enumerate(zip(first, last)):
        if a != b:
            return i
    return min(len(first), len(last))


def shared_inputs(choices: Sequence[Continuation]) -> int:
    """How many first tokens the model reads alike of all choices."""
    return shared_start([choice.inputs for choice in choices])


@dataclass(frozen=True)
class Tree:
    """The choices of a question as one row: a trunk, then what each choice adds to it.

    Attributes:
        ids: of the trunk and the branches.
        positions: of each token in its own sequence.
        branch: of each token, 0 for the trunk; a token sees the trunk and its own branch.
        places: where a scored token is predicted from.
        targets: the scored tokens.
        counts: scored tokens of each choice.
    """

    ids: list[int]
    positions: list[int]
    branch: list[int]
    places: list[int]
    targets: list[int]
    counts: list[int]

    @classmethod
    def of_choices(cls, choices: Sequence[Continuation]) -> "Tree":
        """The longest beginning that all choices have in common is the trunk."""
        trunk = shared_inputs(choices)
        ids = choices[0].ids[:trunk]
        positions = list(range(trunk))
        branch = [0] * trunk
        places: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        for number, choice in enumerate(choices, 1):
            offset = len(ids) - trunk  # of this branch's tokens in the row
            for place in range(choice.start - 1, len(choice)):
                is_in_trunk = place < trunk
                places.append(place if is_in_trunk else place + offset)
            scored = choice.ids[choice.start :]
            targets += scored
            counts.append(len(scored))
            added = choice.inputs[trunk:]
            ids += added
            positions += range(trunk, trunk + len(added))
            branch += [number] * len(added)
        return cls(ids, positions, branch, places, targets, counts)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def first_place(self) -> int:
        """How many tokens come before the first place that predicts, or the first branch."""
        trunk = self.branch.count(0)
        return min(trunk, min(self.places))


def rows_of_choices(choices: Sequence[Continuation]) -> list[Tree]:
    """The choices as one tree, or one row each where they have little in common: a tree's
    attention is over all of its tokens, seen or not."""
    trunk = shared_inputs(choices)
    saved = trunk * (len(choices) - 1)  # tokens, by computing the trunk once
    branches = 0
    for choice in choices:
        branches += len(choice) - trunk
    if saved >= branches:
        return [Tree.of_choices(choices)]
    return [Tree.of_choices([choice]) for choice in choices]
