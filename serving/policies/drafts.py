"""A plan while a policy builds it, and room for the answers that outgrew their memory."""

from collections.abc import Callable, Iterable

from serving.request import FOREVER, CostEstimator, Limits, Plan, Record, View

BLOCK_TOKENS = 64  # an answer's reservation grows by so much at a time
WATERMARK = 0.01  # share of the KV memory left free at admission


class PlanDraft:
    """A plan while it is built, and the KV tokens and rows that it leaves free or takes.

    Attributes:
        free: KV tokens that are not reserved.
        rows: sequences in the batch.
        reserve: KV tokens by request id.
        preempted_ids: ids of the preempted requests.
    """

    __slots__ = ("view", "free", "rows", "admit", "preempt", "reserve", "preempted_ids")

    def __init__(self, view: View):
        self.view = view
        self.free = view.kv_free_tokens
        self.rows = len(view.running)
        self.admit: list[Record] = []
        self.preempt: list[Record] = []
        self.reserve: dict[int, int] = {}
        self.preempted_ids: set[int] = set()

    def try_admit(self, record: Record, tokens: int) -> bool:
        """Admit with so many KV tokens reserved; False where tokens or a row are lacking."""
        if tokens > self.free or self.rows >= self.view.limits.max_batch:
            return False
        self.admit.append(record)
        self.reserve[record.request.id] = tokens
        self.free -= tokens
        self.rows += 1
        return True

    def try_grow(self, record: Record, tokens: int) -> bool:
        """Raise a running record's reservation to so many KV tokens; False where they lack."""
        if tokens - record.reserved_tokens > self.free:
            return False
        self.reserve[record.request.id] = tokens
        self.free -= tokens - record.reserved_tokens
        return True

    def preempt_record(self, record: Record) -> None:
        """Preempt a running record."""
        self.preempt.append(record)
        self.preempted_ids.add(record.request.id)
        self.free += self.reserve.pop(record.request.id, record.reserved_tokens)
        self.rows -= 1

    def plan(self, wake_s: float = FOREVER, wake_on_arrival: bool = True) -> Plan:
        return Plan(
            tuple(self.admit),
            tuple(self.preempt),
            self.reserve,
            wake_s=wake_s,
            wake_on_arrival=wake_on_arrival,
        )


def make_room(
    draft: PlanDraft, wanted: Callable[[Record], int], victims: Callable[[], list[Record]]
) -> None:
    """Grow or preempt all records that overran.

    Args:
        wanted: record -> KV tokens to reserve for it. Where they are lacking,
            victims are preempted in turn; where there are none left, the record itself.
        victims: running records, the first to preempt first; called at most once.
    """
    queue = None
    for record in draft.view.overran:
        if record.request.id in draft.preempted_ids:
            continue
        tokens = wanted(record)
        while not draft.try_grow(record, tokens):
            if queue is None:
                queue = iter(victims())
            victim = next((v for v in queue if v.request.id not in draft.preempted_ids), record)
            draft.preempt_record(victim)
            if victim is record:
                break


def prompts_left(view: View, pass_s: float) -> float:
    """Prompt tokens of the running records that are still to be computed, about.

    Those of records without a first token, less what has been computed since the first of them was
    admitted, or the last first token of another, at prefill_tokens a pass of pass_s seconds.
    """
    left, since_s, last_started_s = 0.0, FOREVER, 0.0
    for record in view.running.values():  # the hottest loop of a simulation: no calls in it
        first_token_s = record.first_token_s
        if first_token_s < 0:
            left += record.context_tokens
            since_s = min(since_s, record.admitted_s)
        elif first_token_s > last_started_s:
            last_started_s = first_token_s
    if not left:
        return 0.0
    passes = max(view.now_s - max(since_s, last_started_s), 0.0) / pass_s
    return max(left - passes * view.limits.prefill_tokens, 0.0)


def with_block(tokens: int, limits: Limits) -> int:
    """KV tokens of so many of a prompt and its answer, and of a block more."""
    return min(tokens + BLOCK_TOKENS, limits.max_tokens)


def plan_in_turn(
    view: View,
    cost: CostEstimator,
    victims: Callable[[], list[Record]],
    overdue: Callable[[], Record | None] | None = None,
) -> Plan:
    """Make room for what overran; where that preempts none, admit in turn. Memory is in blocks.

    Args:
        victims: as make_room takes them.
        overdue: the waiting record that must be the next one, if there is one; called where
            requests wait.
    """
    draft, limits = PlanDraft(view), view.limits
    if view.overran:
        make_room(
            draft,
            lambda r: with_block(r.request.prompt_tokens + view.generated(r), limits),
            victims,
        )
    wake_s = FOREVER
    if not draft.preempt and len(view.waiting):
        first = overdue() if overdue is not None else None
        in_turn = view.waiting if first is None else (first,)
        wake_s = admit_in_turn(draft, cost, in_turn)
        if first is not None and draft.admit:
            wake_s = view.now_s  # after the next pass, for the record that is the oldest then
    full = draft.rows >= limits.max_batch or wake_s < FOREVER
    return draft.plan(wake_s, wake_on_arrival=not full)


def admit_in_turn(draft: PlanDraft, cost: CostEstimator, in_turn: Iterable[Record]) -> float:
    """Admit in an order, no more prompts than the engine computes in its next pass.

    An engine computes prompts in the order of their admission, so what is admitted early can no
    longer be overtaken. The token budget of a pass does the same in vLLM and SGLang. A WATERMARK
    of memory is left free, unless nothing runs.

    Args:
        in_turn: the waiting records, the first to admit first.
    Returns:
        When to plan again: once the admitted prompts are computed but for a pass; FOREVER where
        none waits for that.
    """
    view, limits = draft.view, draft.view.limits
    budget, spare = limits.prefill_tokens, int(WATERMARK * limits.kv_tokens)
    pass_s = cost.chunk_s(budget, 0, draft.rows)
    if draft.rows:
        pass_s += cost.decode_step_s(draft.rows, limits.kv_tokens - view.kv_free_tokens)
    left = prompts_left(view, pass_s)
    for record in in_turn:
        if left >= budget:
            return view.now_s + (left // budget) * pass_s
        tokens = with_block(record.context_tokens, limits)
        if (draft.free - tokens < spare and draft.rows) or not draft.try_admit(record, tokens):
            break
        left += record.context_tokens
    return FOREVER
