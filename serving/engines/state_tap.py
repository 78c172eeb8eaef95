"""Hidden states of the answers that an engine makes, collected from the passes that make them.

No pass is added: a stage shows the output of chosen blocks to a StateTap, which keeps running sums
for each answer and gives a StateReading when its prompt is complete and after every so many tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from serving.engines.answers import LOGPROB_TOKENS
from serving.engines.pass_plans import ChunkPart, PlannedPass
from serving.engines.pass_plans import Sequence as Row
from serving.engines.state_sums import StateSums

LARGEST = float(np.finfo(np.float16).max)  # states are stored in fp16: beyond this they are clipped

LONGEST = 1 << 62  # tokens

LogitsOf = Callable[[Tensor], Tensor]


class StateReading(NamedTuple):
    """States of an answer after `at` of its tokens were fed to the model; L layers, fp32.

    Attributes:
        at: answer tokens fed; 0 is the prompt alone.
        last: (L, hidden_size) at the newest token: the prompt's last, or the answer's at-th.
        mean: (L, hidden_size) over the prompt's tokens (at = 0), or over the answer's so far. None
            where the states of some of them are not known here (StateTap).
        entropy: as mean; over a prompt weighted by the entropy of the next token's distribution at
            each of its tokens. None unless asked for.
    """

    request_id: int
    at: int
    last: np.ndarray
    mean: np.ndarray | None
    entropy: np.ndarray | None = None


class StateTap:
    """Reads the states of a stage's answers at the end of a prompt and every so many tokens.

    The means are those of one plain pass over prompt and answer, whatever batching, chunked prefill
    and preemption do. A token that is copied from a common prefix is not computed: its state comes
    as part of a sum that the prefix brings along (StateSums.marks), for which prefixes are copied
    in multiples of `mark_every` tokens. A mean is None, never one over the rest, where that is not
    so: of an answer that was begun elsewhere (another replica) and partly copied here.

    Args:
        layers: numbers of blocks from 1; 22 is the output of the 22nd, before any norm after it.
        every: answer tokens between two readings.
        entropy: weigh the prompt's tokens by entropy too (EGTP, arXiv 2602.11812); the last block
            and the output layer are then computed for all tokens of prompts.
        on_reading: called with each reading after its pass; without it they are kept for `take`.
    Attributes:
        mark_every: tokens between two sums that later prompts may begin with; 0 for none.
    Raises:
        ValueError: no layers, or numbers below 1.
    """

    def __init__(
        self,
        layers: Sequence[int],
        every: int,
        entropy: bool = False,
        on_reading: Callable[[StateReading], None] | None = None,
    ):
        if not layers or min(layers) < 1 or every < 1:
            raise ValueError(
                f"wanted layers from 1 and every >= 1; got {list(layers)} and every {every}"
            )
        self.layers = tuple(layers)
        self.every = every
        self.entropy = entropy
        self._on_reading = on_reading
        self.mark_every = 0
        self._readings: list[StateReading] = []
        self._states: dict[int, Tensor] = {}  # block's number from 1 -> (N, hidden_size)
        self._blocks = 0

    def attach(self, blocks: int) -> None:
        """Say how many blocks the model has. Raises ValueError where a layer is beyond them."""
        if max(self.layers) > blocks:
            raise ValueError(
                f"hidden states of layer {max(self.layers)} are wanted, the model has {blocks}"
            )
        self._blocks = blocks

    @property
    def wants_all_tokens(self) -> bool:
        """Whether the last block must compute all tokens of a prompt."""
        return self.entropy or self._blocks in self.layers

    def see(self, layer: int, hidden: Tensor) -> None:
        """Keep a pass's states (1, N, hidden_size) after the block `layer` (from 0)."""
        number = layer + 1
        if number in self.layers or (self.entropy and number == self._blocks):
            self._states[number] = hidden[0]

    def add(self, planned: PlannedPass, logits_of: LogitsOf) -> None:
        """Add the pass's tokens to the sums of their answers, and read those that are due.

        Args:
            logits_of: of states after the last block.
        """
        states = [self._states[layer] for layer in self.layers]
        count = len(planned.decoding)
        if count:
            newest = torch.stack([state[:count] for state in states], 1).float()
            for row, state in zip(planned.decoding, newest.unbind()):
                self._add_token(row, state)
        for part in planned.parts:
            self._add_part(part, states, logits_of)
        self._states = {}

    def take(self) -> list[StateReading]:
        """The readings since the last call, in order of their passes."""
        taken, self._readings = self._readings, []
        return taken

    def _sums(self, row: Row, states: Sequence[Tensor]) -> StateSums:
        sums = row.answer.states
        if sums is None:
            hidden_size, device = states[0].shape[-1], states[0].device
            sums = row.answer.states = StateSums(len(self.layers), hidden_size, device)
        return sums

    def _add_token(self, row: Row, state: Tensor) -> None:
        """Add the newest token (L, hidden_size) of a decoding row, which was never added before."""
        sums = self._sums(row, (state,))
        sums.answer += state
        sums.seen += 1
        self._mark(sums)
        self._read_if_due(row, sums, len(row.answer.tokens), state)

    def _add_part(self, part: ChunkPart, states: Sequence[Tensor], logits_of: LogitsOf) -> None:
        """Add the tokens of a chunk that were not added before."""
        row, sums = part.row, self._sums(part.row, states)
        prompt_size, end = len(row.answer.prompt), part.start + part.tokens
        if row.copied is not None:
            sums.adopt(*row.copied, prompt_size)
            row.copied = None
        if part.start > sums.seen:
            sums.has_prompt = sums.has_prompt and sums.seen >= prompt_size
            sums.has_answer = sums.has_answer and part.start <= prompt_size
        first = max(sums.seen, part.start)
        if first >= end:
            return
        offset = part.place - part.start
        if self.entropy and first < prompt_size:
            span = slice(offset + first, offset + min(prompt_size, end))
            self._weigh(sums, states, span, logits_of)
        sums.seen = first
        while sums.seen < end:
            stop = min(self._next_stop(sums.seen, prompt_size), end)
            total = sums.prompt if sums.seen < prompt_size else sums.answer
            for layer, state in enumerate(states):
                total[layer] += state[offset + sums.seen : offset + stop].float().sum(0)
            sums.seen = stop
            self._mark(sums)
        if end == len(row.ids):
            newest = torch.stack([state[offset + end - 1] for state in states]).float()
            self._read_if_due(row, sums, end - prompt_size, newest)

    def _next_stop(self, seen: int, prompt_size: int) -> int:
        """Where the next sum is wanted: at the prompt's end, or for a mark."""
        stop = prompt_size if seen < prompt_size else LONGEST
        if self.mark_every:
            stop = min(stop, seen - seen % self.mark_every + self.mark_every)
        return stop

    def _mark(self, sums: StateSums) -> None:
        """Keep the sum over all tokens so far, where one is wanted and all are known."""
        if not self.mark_every or sums.seen % self.mark_every:
            return
        if sums.has_prompt and sums.has_answer:
            sums.marks[sums.seen] = sums.prompt + sums.answer

    def _weigh(
        self, sums: StateSums, states: Sequence[Tensor], span: slice, logits_of: LogitsOf
    ) -> None:
        """Add prompt tokens of the pass, weighted by the entropy of what may follow each."""
        if sums.weighted is None:
            sums.weighted = torch.zeros_like(sums.prompt)
        final = self._states[self._blocks]
        for start in range(span.start, span.stop, LOGPROB_TOKENS):
            end = min(start + LOGPROB_TOKENS, span.stop)
            logprobs = torch.log_softmax(logits_of(final[start:end]).float(), dim=-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            for layer, state in enumerate(states):
                sums.weighted[layer] += entropy @ state[start:end].float()
            sums.weight += float(entropy.sum())

    def _read_if_due(self, row: Row, sums: StateSums, at: int, newest: Tensor) -> None:
        """Give a reading where `at` answer tokens are a multiple of `every`."""
        if at % self.every or not bool(newest.isfinite().all()):
            return
        mean = entropy = None
        if at and sums.has_answer:
            mean = host_array(sums.answer / at)
        elif not at and sums.has_prompt:
            mean = host_array(sums.prompt / len(row.answer.prompt))
        if self.entropy:
            entropy = mean
            if not at and mean is not None and sums.weighted is not None and sums.weight > 0:
                entropy = host_array(sums.weighted / sums.weight)
        reading = StateReading(row.id, at, host_array(newest), mean, entropy)
        if self._on_reading is None:
            self._readings.append(reading)
        else:
            self._on_reading(reading)


def host_array(states: Tensor) -> np.ndarray:
    """fp32 states on the host, within what fp16 holds."""
    return states.clamp(-LARGEST, LARGEST).cpu().numpy()
