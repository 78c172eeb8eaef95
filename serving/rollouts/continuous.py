"""Rollouts on the continuous engine, on the weights that are trained.

The model's own modules compute the passes, its adapters among them: no weight is copied. Answers
are begun in a GuessedOrder as rows become free. An answer's tokens are drawn by its own seed, so
the order changes when they come and not what they are, as far as the arithmetic of a pass does not
depend on which rows are in it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.reinforcement.rollout import (
    RolloutAnswer,
    RolloutRequest,
    RolloutSampling,
    RolloutSetup,
)
from serving.engines.answers import Answer, Sampling
from serving.engines.bodies import check_runs
from serving.engines.continuous_engine import ContinuousEngine
from serving.engines.passes import plain_model
from serving.policies.continuous import Fcfs
from serving.request import FOREVER, Limits, Request
from serving.rollouts.order import GuessedOrder, LengthHistory
from serving.scheduler import VirtualClock, run_scheduler
from serving.simulate.engine import LinearCost

if TYPE_CHECKING:
    from predictor.runtime import LengthPredictor

PREFILL_TOKENS = 512  # prompt tokens of a pass, at most
SHARED_PROMPTS = 4  # longest prompts that are kept for siblings that begin later


class ContinuousRollouts:
    """Rollouts as finetune.reinforcement.rollout has them.

    Args:
        predictor: its guesses order the first answers to a prompt; None for none.
        ordered: by guessed length; else in the order of the requests.
    """

    def __init__(
        self,
        stop_ids: Sequence[int],
        max_batch: int,
        predictor: "LengthPredictor | None" = None,
        ordered: bool = True,
    ):
        self.stop_ids = list(stop_ids)
        self.max_batch = max_batch
        self.predictor = predictor
        self.ordered = ordered
        self.history = LengthHistory()

    def check(self, model: Any) -> None:
        check_runs(plain_model(model))

    def answers(
        self, model: Any, requests: Sequence[RolloutRequest], sampling: RolloutSampling
    ) -> list[RolloutAnswer]:
        """The answers, in the order of the requests.

        Raises:
            ValueError: the continuous engine cannot run the model, or its output was not finite.
        """
        arrivals = RolloutArrivals(self, model, requests, sampling)
        arrivals.run()
        return [arrivals.result(number) for number in range(len(requests))]

    def priors(self, requests: Sequence[RolloutRequest]) -> dict[str, float]:
        """{group: tokens to expect}: of earlier rollouts, else as predicted."""
        known: dict[str, float] = {}
        unknown: dict[str, str] = {}
        for request in requests:
            if request.group in self.history.means:
                known[request.group] = self.history.means[request.group]
            else:
                unknown[request.group] = request.question
        if self.predictor is not None and unknown:
            predictions = self.predictor.predict(list(unknown.values()))
            for group, prediction in zip(unknown, predictions):
                known[group] = prediction.expected_tokens
        return known

    def learn(self, lengths: Mapping[str, Sequence[int]]) -> None:
        self.history.learn(lengths)

    def state(self) -> dict[str, Any]:
        return self.history.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.history.load_state(state)


class RolloutArrivals:
    """The answers of one rollout as the scheduler's arrivals: one comes as soon as a row is free.

    So the queue is empty, and the next answer is chosen by what is known when a row becomes free.
    """

    def __init__(
        self,
        rollouts: ContinuousRollouts,
        model: Any,
        requests: Sequence[RolloutRequest],
        sampling: RolloutSampling,
    ):
        self.requests = requests
        self.sampling = sampling
        self.max_batch = rollouts.max_batch
        if rollouts.ordered:
            groups = [request.group for request in requests]
            self.order = GuessedOrder(groups, rollouts.priors(requests))
        else:  # each a group of its own, of equal length
            names = [str(number) for number in range(len(requests))]
            self.order = GuessedOrder(names, dict.fromkeys(names, 1.0))
        prompt = max(len(request.prompt) for request in requests)
        longest = prompt + max(request.max_new_tokens for request in requests) + 1
        # Room for all that run: nothing is preempted.
        limits = Limits(self.max_batch, 2 * self.max_batch * longest, longest, PREFILL_TOKENS)
        cost = LinearCost()  # the policy does not read it
        self.engine = ContinuousEngine(
            model, limits, cost, rollouts.stop_ids, prefix_cache_tokens=SHARED_PROMPTS * prompt
        )
        self.made: dict[int, Answer] = {}
        self.running = 0

    def run(self) -> None:
        """Write all answers."""
        for _ in run_scheduler(Fcfs(), self.engine, VirtualClock(), self):
            pass

    @property
    def closed(self) -> bool:
        return not len(self.order)

    def next_s(self) -> float:
        return 0.0 if self.has_room() else FOREVER

    def has_room(self) -> bool:
        return len(self.order) > 0 and self.running < self.max_batch

    def due(self, now_s: float) -> list[Request]:
        """The next requests, as many as there are free rows."""
        found = []
        while self.has_room():
            number = self.order.begin()
            asked = self.requests[number]
            request = Request(len(self.made), len(asked.prompt), now_s, FOREVER)
            answer = self.engine.submit(
                request, asked.prompt, self.sampling_of(asked), self.listener(number)
            )
            self.made[number] = answer
            self.order.watch(number, answer.tokens)
            self.running += 1
            found.append(request)
        return found

    def withdrawn(self) -> list[int]:
        """None: nobody cancels a rollout's answer."""
        return []

    def sampling_of(self, request: RolloutRequest) -> Sampling:
        chosen = self.sampling
        return Sampling(
            request.max_new_tokens,
            chosen.temperature,
            chosen.top_p,
            request.seed,
            top_k=chosen.top_k,
        )

    def listener(self, number: int) -> Any:
        """What the engine calls for each token of an answer."""

        def listen(answer: Answer, token: int | None) -> None:
            if answer.reason is not None:
                self.running -= 1
                self.order.end(number, len(answer.tokens))

        return listen

    def result(self, number: int) -> RolloutAnswer:
        """An ended answer; raises ValueError where it failed."""
        answer = self.made[number]
        if answer.reason not in ("stop", "length"):
            raise ValueError(
                f"no answer could be sampled to {self.requests[number].question!r:.80}: "
                f"it ended by {answer.reason!r}, as where the model's output is not finite"
            )
        return RolloutAnswer(list(answer.tokens), answer.reason == "stop")


def make_rollouts(setup: RolloutSetup) -> ContinuousRollouts:
    """As finetune.reinforcement.rollout.MakeRollouts.

    Raises:
        ValueError: --length_predictor is none, or one of another tokenizer.
    """
    predictor = None
    if setup.length_predictor:
        from predictor.runtime import LengthPredictor

        try:
            predictor = LengthPredictor.from_pretrained(
                setup.length_predictor, served_model=setup.model_path
            )
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"--length_predictor: {error}") from None
    return ContinuousRollouts(setup.stop_ids, setup.max_batch, predictor)
