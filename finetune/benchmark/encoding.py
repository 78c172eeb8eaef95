"""Questions -> token ids, and what their choices have in common. Free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatglm.raw_prompts import RAW_TOKENS, raw_ids
from finetune.benchmark.questions import Question

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer


@dataclass(frozen=True)
class Continuation:
    """Token ids of a context and of what is scored after it; the latter begin at `start`."""

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
        extra = len(self) - longest
        if extra <= 0:
            return self
        # One token at least stays before what is scored, which its first token is predicted from.
        kept = max(front + back, 1)
        if extra > self.start - kept:
            wanted = len(self.ids) - self.start + kept - 1
            raise ValueError(f"--max_length {longest}: an answer alone needs {wanted} tokens")
        return Continuation(self.ids[:front] + self.ids[front + extra :], self.start - extra)


class PairEncoder:
    """Ids of contexts with their continuations, as lm-evaluation-harness splits them.

    A ChatGLM's control tokens surround the context, as `prompt_style` raw has them; other models'
    texts begin as their tokenizers begin them.
    """

    def __init__(self, tokenizer: "FamilyTokenizer", longest: int):
        self.tokenizer = tokenizer
        self.longest = longest
        self.tokens = RAW_TOKENS.get(tokenizer.family)
        start, after = raw_ids(self.tokens, tokenizer, [])
        # Of another model's text only an empty one begins with a token of its own, as the
        # harness cuts from the left whatever is there.
        self.front = len(start) if self.tokens else 0
        self.after = after
        self.empty = start

    def context(self, text: str) -> list[int]:
        """Ids of a text to go on with, its end kept where it is too long."""
        ids, after = raw_ids(self.tokens, self.tokenizer, self.tokenizer.encode_text(text))
        return ids + after

    def pair(self, context: str, continuation: str) -> Continuation:
        """Spaces at a context's end belong to what is scored: words begin with them."""
        encode = self.tokenizer.encode_text
        if self.after:  # the answer is a text of its own, and SentencePiece writes a space first
            source = self.context(context)
            found = Continuation(
                source + encode(continuation.lstrip(" ") or continuation), len(source)
            )
        elif not context and not self.tokens:
            found = self.after_start(encode(continuation))
        else:
            stripped = context.rstrip()
            source = raw_ids(self.tokens, self.tokenizer, encode(stripped))[0]
            whole = raw_ids(self.tokens, self.tokenizer, encode(context + continuation))[0]
            # As the harness: a token across the two is read as the context alone has it.
            found = Continuation(source + whole[len(source) :], len(source))
        if found.start >= len(found.ids):
            raise ValueError(f"nothing to score: {continuation!r:.60} after {context!r:.60}")
        return found.cut(self.longest, self.front, len(self.after))

    def question(self, question: Question) -> list[Continuation]:
        """Its choices' ids; raises ValueError where one has nothing to score, or no room."""
        return list(map(self.pair, question.contexts, question.continuations))

    def after_start(self, ids: list[int]) -> Continuation:
        """A text without a context, scored after the model's first token."""
        tokenizer = self.tokenizer
        first = tokenizer.bos_token_id
        if first is None:
            first = tokenizer.eos_token_id
        return Continuation(ids, 1) if ids[:1] == [first] else Continuation([first, *ids], 1)


def shared_start(sequences: Sequence[list[int]]) -> int:
    """How many first items all sequences have in common."""
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
        trunk = shared_inputs(choices)
        ids = choices[0].ids[:trunk]
        positions, branch = list(range(trunk)), [0] * trunk
        places: list[int] = []
        targets: list[int] = []
        counts = []
        for number, choice in enumerate(choices, 1):
            own = choice.inputs[trunk:]
            offset = len(ids) - trunk
            for place in range(choice.start - 1, len(choice.ids) - 1):
                places.append(place if place < trunk else place + offset)
            targets += choice.ids[choice.start :]
            counts.append(len(choice.ids) - choice.start)
            ids = ids + own
            positions += range(trunk, trunk + len(own))
            branch += [number] * len(own)
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
    trunk, count = shared_inputs(choices), len(choices)
    own = sum(map(len, choices)) - trunk * count
    if trunk * (count - 1) >= own:
        return [Tree.of_choices(choices)]
    return list(map(Tree.of_choices, zip(choices)))
