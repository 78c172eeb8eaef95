"""vLLM's scheduler, decision by decision: what the simulator is compared with.

`vllm` is its name in SIMULATED (continuous.py): the simulator runs it, the engines that run a model
do not.
"""

from dataclasses import dataclass
from typing import ClassVar

from serving.policies.drafts import PlanDraft
from serving.request import FOREVER, CostEstimator, Limits, Moment, Plan, Record, Request, View


@dataclass(frozen=True)
class Vllm:
    """What `vllm.v1.core.sched.scheduler.Scheduler` of vLLM 0.32 decides, without prefix caching.

    Order. By priority, then arrival: its `priority` policy, and with equal priorities its `fcfs`.

    Passes. limits.prefill_tokens is its max_num_batched_tokens: every decoding answer takes one of
    them, then prompts in the order of their admission. A request is admitted in the pass that
    computes its first chunk. (`fcfs` here counts prompts only, and admits while there is memory.)

    Memory. In blocks, each taken by the pass that writes to it, prompts' too; a request is admitted
    where its whole prompt would fit. Where a block is lacking, the running request of the highest
    priority number, of those the latest arrival, is preempted, and in that pass none is admitted.
    A reservation here is its blocks' tokens and one more, for the newest token of an answer, which
    the next pass writes. So (limits.kv_tokens - limits.max_batch) // block_tokens are its blocks.

    Not the same: where a request preempts itself, vLLM leaves those admitted after it out of that
    pass; here they go on. With equal priorities there are none after it.

    Attributes:
        block_tokens: its block_size.
        watermark: share of the blocks left free at admission, unless nothing runs.
    """

    block_tokens: int = 16
    watermark: float = 0.0
    predicts: ClassVar[bool] = False

    def length(self, request: Request) -> float:
        return self.block_tokens

    def order(self, record: Record, moment: Moment) -> tuple[float, float]:
        return record.request.arrival_s, FOREVER

    def reserve(self, tokens: int, limits: Limits) -> int:
        """KV tokens to reserve where so many are written."""
        blocks = -(-tokens // self.block_tokens)
        return min(blocks * self.block_tokens + 1, limits.kv_tokens)

    def __call__(self, view: View, cost: CostEstimator) -> Plan:
        limits, draft = view.limits, PlanDraft(view)
        prompt = prompt_in_work(view)
        if view.overran:
            for record in in_order_of_admission(view):
                self.take_blocks(draft, record, record.reserved_tokens)
        if prompt is not None and prompt.request.id in draft.preempted_ids:
            prompt = None
        decoding = draft.rows - (prompt is not None)
        budget = self.prompt_budget(limits, decoding)
        chunk = 0
        if prompt is not None:
            done = view.computed(prompt)
            chunk = min(prompt.context_tokens - done, budget)
            if not self.take_blocks(draft, prompt, done + chunk):
                chunk = 0
        if not draft.preempt:
            chunk += self.admit_waiting(draft, budget - chunk)
        return Plan(
            tuple(draft.admit),
            tuple(draft.preempt),
            draft.reserve,
            prefill_tokens=chunk or None,
            horizon_steps=1 if chunk or draft.preempt else None,
            wake_on_arrival=draft.rows < limits.max_batch,
        )

    def prompt_budget(self, limits: Limits, decoding: int) -> int:
        """Prompt tokens of a pass with so many decoding answers."""
        return max(limits.prefill_tokens - decoding, 1)

    def rank(self, record: Record) -> tuple[float, ...]:
        """The running record with the largest is preempted first."""
        return record.request.priority, record.request.arrival_s

    def chunk_reserve(self, record: Record, chunk: int, limits: Limits) -> int:
        """KV tokens to reserve at the admission of a record of whose prompt a chunk is computed."""
        return self.reserve(chunk, limits)

    def take_blocks(self, draft: PlanDraft, record: Record, tokens: int) -> bool:
        """Reserve blocks for so many written tokens of a running record.

        Preempts what has to go; False where that is the record itself.
        """
        if record.request.id in draft.preempted_ids:
            return False
        wanted = self.reserve(tokens, draft.view.limits)
        while wanted - record.reserved_tokens > self.free(draft, draft.rows == 1):
            running = draft.view.running.values()
            left = [r for r in running if r.request.id not in draft.preempted_ids]
            victim = max(left, key=self.rank)
            draft.preempt_record(victim)
            if victim is record:
                return False
        if wanted > record.reserved_tokens:
            draft.try_grow(record, wanted)
        return True

    def admit_waiting(self, draft: PlanDraft, budget: int) -> int:
        """Admit while prompt tokens are left of the budget; returns how many are used."""
        limits, used = draft.view.limits, 0
        for record in draft.view.waiting:
            if used == budget or draft.rows >= limits.max_batch:
                break
            spare = int(self.watermark * limits.kv_tokens) if draft.rows else 0
            whole = self.reserve(record.context_tokens, limits) - 1
            if whole + spare > self.free(draft, not draft.rows):
                break
            chunk = min(record.context_tokens, budget - used)
            draft.try_admit(record, self.chunk_reserve(record, chunk, limits))
            used += chunk
        return used

    @staticmethod
    def free(draft: PlanDraft, alone: bool) -> int:
        """KV tokens free for blocks: one is kept for the newest token of each further sequence.

        Args:
            alone: of a sequence without others, which may take all.
        """
        return draft.free if alone else draft.free - (draft.view.limits.max_batch - draft.rows)


def prompt_in_work(view: View) -> Record | None:
    """The running record whose prompt is not computed yet: the last one that was admitted."""
    if not view.running:
        return None
    last = list(view.running.values())[-1]
    return last if view.computed(last) < last.context_tokens else None


def in_order_of_admission(view: View) -> list[Record]:
    """The records that fill their reservations."""
    full = {record.request.id for record in view.overran}
    return [record for record in view.running.values() if record.request.id in full]
