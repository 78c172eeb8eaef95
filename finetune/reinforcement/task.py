"""What --task grpo and --task ppo have in common: prompts are answered, answers are learnt from.

`--rollout_steps` steps make a phase with `--rollout_epochs` passes over its answers: at its first
step the prompts of all its steps are answered by the weights of that moment. Every rank answers a
part of them and gets the others' samples.

RolloutTask.step_batches is where the loop comes in: it starts a phase (`roll_out`), which samples
answers (`answer`), rewards them (`score`), adds the models' log-probabilities (`add_statistics`)
and the algorithm's advantages; then it makes the tensors of a step (`batch`).
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from chatglm.loading import stop_ids
from finetune.checkpoint import export_model, inner_state
from finetune.distributed import on_device, rank, say, whole_weights, world_size
from finetune.epochs import StepBatches
from finetune.evaluation.generation import decoded_text
from finetune.evaluation.metrics import check_packages
from finetune.files import write_aside
from finetune.preference.scorer import RewardScorer, find_reward_model
from finetune.reinforcement.averaging import WeightAverage
from finetune.reinforcement.config import RolloutConfig
from finetune.reinforcement.experience import (
    STATE_FILE,
    Experience,
    Place,
    Sample,
    load_experience,
    save_experience,
    summary_of,
)
from finetune.reinforcement.networks import PolicyNetwork, make_critic, sharing_copy
from finetune.reinforcement.policy_loss import Algorithm, RolloutLoss
from finetune.reinforcement.prompts import (
    PromptReader,
    PromptRows,
    RolloutEncoder,
    choose_prompts,
    join_prompts,
    prompt_rows,
    with_reply,
)
from finetune.reinforcement.rewards import (
    MODEL,
    ScoredAnswer,
    function_reward,
    metric_packages,
    reference_rewards,
)
from finetune.reinforcement.rollout import (
    MakeRollouts,
    RolloutAnswer,
    RolloutRequest,
    RolloutSampling,
    RolloutSetup,
)
from finetune.row_task import RowTask
from finetune.rows.arrays import Dataset, RowArrays
from finetune.rows.batches import lay_end_to_end
from finetune.rows.formats import Row, parse_columns
from finetune.rows.sources import Source
from finetune.rows.streaming import Stream

EMA = "ema"  # the folder of the averaged policy in a checkpoint
LARGEST_REWARD = 1e30  # its square, and sums of many, are finite in fp64
EVALUATION = -1  # in place of a step's number, in seeds

Config = TypeVar("Config", bound=RolloutConfig)


class RolloutTask(RowTask[Config, PromptRows]):
    """A policy that learns from rewards of its own answers, by an Algorithm."""

    def __init__(self, config: Config, make_rollouts: MakeRollouts):
        check_packages(metric_packages(config.reward_weights))
        if MODEL in config.reward_weights:  # before anything of an earlier run is replaced
            find_reward_model(config.reward_model, "--reward_model")
        super().__init__(config)
        self.title = f"{config.task} of {self.family.title}"
        self.default_output_dir = f"output-{self.family.name}-{config.task}-{config.train_type}"
        setup = RolloutSetup(
            stop_ids(self.tokenizer), config.rollout_batch, config.length_predictor, self.model_path
        )
        self.rollouts = make_rollouts(setup)
        self.scorer: RewardScorer | None = None
        self.experience: Experience | None = None
        decay = config.ema_decay
        self.average = None if decay is None else WeightAverage(decay)
        self.step_rows = 0  # prompts of an optimizer step
        self.done = 0  # steps that have begun

    @property
    def algorithm(self) -> Algorithm:
        """What is learnt of a rollout, by the configuration."""
        raise NotImplementedError

    # ---- rows

    @property
    def reader(self) -> PromptReader:
        config = self.config
        columns = parse_columns(config.columns, config.column_names)
        return PromptReader(config.prompt_text, config.data_format, columns, self.family.name)

    @property
    def encoder(self) -> RolloutEncoder:
        config = self.config
        return RolloutEncoder(self.tokenizer, self.family, config.max_len, config.max_src_len)

    def choose(self, rows: RowArrays, *, is_evaluation: bool) -> PromptRows:
        return choose_prompts(rows, self.config.is_skip and not is_evaluation)

    def load_training_rows(self, sources: list[Source], replay: list[Source]) -> None:
        """As RowTask's; raises ValueError where a reward compares with answers and there are none.

        A stream's rows are not known: there such a reward may be 0 for all.
        """
        super().load_training_rows(sources, replay)
        names = reference_rewards(self.config.reward_weights)
        if not names:
            return
        for row in range(len(self.data)):
            if any(self.data.question(row).answers):
                return
        raise ValueError(
            f"--rewards {names[0]} compares with the rows' own answers: no row of "
            f"--train_path {self.config.train_path} has one"
        )

    def join(self, parts: Sequence[PromptRows]) -> PromptRows:
        return join_prompts(parts)

    def of_stream(self, data: Dataset) -> PromptRows:
        return prompt_rows(data)

    def open_stream(self, sources: list[Source], replay: list[Source]) -> Stream:
        stream = super().open_stream(sources, replay)
        stream.group = 2
        return stream

    def rows_per_epoch(self, steps: int | None, step_rows: int) -> int:
        """As in Task: an epoch has --rollout_epochs passes over its prompts."""
        count = super().rows_per_epoch(steps, step_rows)
        epochs = self.config.rollout_epochs
        if epochs == 1 or (self.stream and steps):
            return count
        return epochs * math.ceil(count / step_rows) * step_rows

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[PromptRows, np.ndarray, int]:
        """As in Task: every phase reads its prompts --rollout_epochs times."""
        self.step_rows = step_rows
        return self.prompts_of(self.prompts_number(epoch * steps_per_epoch + place))

    def prompts_number(self, step: int) -> int:
        """Which prompts a step reads, counted without the repetitions."""
        config = self.config
        phase, within = divmod(step, config.phase_steps)
        return phase * config.rollout_steps + within % config.rollout_steps

    def prompts_of(self, number: int) -> tuple[PromptRows, np.ndarray, int]:
        """As rows_of_step, of prompts by their number."""
        if self.stream:
            first = number * self.step_rows
            data = prompt_rows(self.stream.rows(first, first + self.step_rows))
            return data, np.arange(self.step_rows), 0
        epoch, place = divmod(number, math.ceil(self.epochs.count() / self.step_rows))
        return self.epochs.of_step(epoch, place, self.step_rows)

    def collate(self, data: PromptRows, rows: list[int]) -> dict[str, Any]:
        """What step_batches makes a batch of: the answers are not there yet."""
        return {"rows": rows}

    def count_labels(self, batch: Any) -> float:
        """As in Task."""
        return self.algorithm.count(batch["weights"], float(batch["samples"]))

    # ---- the model

    def build_model(self, dtype: torch.dtype) -> PolicyNetwork:
        """The policy, with a reference where it cannot be switched on, and a critic."""
        policy: Any = super().build_model(dtype)
        reference = critic = None
        if self.has_reference and not self.config.switches_off:
            reference = self.build_another(policy, dtype).requires_grad_(False)
        if self.algorithm.has_critic:
            critic = make_critic(self.build_another(policy, dtype))
        return PolicyNetwork(policy, reference, critic)

    def build_another(self, policy: Any, dtype: torch.dtype) -> Any:
        """A second model, equal to the policy before its first step."""
        if self.method.saves != "model":
            return sharing_copy(policy)
        # A whole model is loaded anew: ZeRO-3 may have partitioned it, so it has no copy.
        return super().build_model(dtype)

    @property
    def has_reference(self) -> bool:
        return bool(self.config.kl_coef)

    def loss_module(self, model: Any) -> RolloutLoss:
        """The loss of the networks that build_model returned."""
        return RolloutLoss(model, self.algorithm, self.config.temperature, self.has_reference)

    def before_training(self, loss_module: Any, output_dir: Path) -> None:
        """Load the reward model."""
        if MODEL not in self.config.reward_weights:
            return
        device = next(loss_module.parameters()).device
        place = str(device.index or 0) if device.type == "cuda" else "cpu"
        self.scorer = RewardScorer.load(
            self.config.reward_model, device=place, precision=self.config.precision
        )

    def export(self, model: Any, state: dict[str, Tensor], folder: Path) -> None:
        """Write the policy, and beside it the rollout that a resumed run goes on with."""
        inner = inner_state(state)
        export_model(model.model, self.method, self.tokenizer, inner, folder)
        is_within_phase = self.done % self.config.phase_steps != 0
        current = self.experience if is_within_phase else None
        save_experience(folder / STATE_FILE, current, self.rollouts.state())
        if self.average is not None:
            (folder / EMA).mkdir()
            averaged = self.average.state_of(inner)
            export_model(model.model, self.method, self.tokenizer, averaged, folder / EMA)
            self.average.save(folder)

    def before_save(self, loss_module: Any, *, evaluated: bool) -> None:
        """Average the weights of the last step too."""
        if self.average is not None:
            self.average.update(loss_module.network.model, self.done)

    def load_state(self, folder: Path) -> None:
        """Go on with the rollout of a checkpoint."""
        self.experience, state = load_experience(folder / STATE_FILE)
        try:
            self.rollouts.load_state(state)
        except ValueError as error:
            raise ValueError(f"{folder / STATE_FILE}: {error}") from None
        if self.average is not None:
            self.average.load(folder)

    # ---- a rollout

    def step_batches(self, loss_module: Any, collated: StepBatches, step: int) -> StepBatches:
        """The batches of a step with answers; its phase's first step writes them."""
        phase, within = divmod(step, self.config.phase_steps)
        if self.average is not None:
            self.average.update(loss_module.network.model, step)
        metrics: dict[str, float] = {}
        if self.experience is None or self.experience.phase != phase:
            if within:  # other weights would answer than those that did
                raise ValueError(f"{STATE_FILE} of the checkpoint lacks the answers of its step")
            self.experience, metrics = self.roll_out(loss_module, phase)
        self.done = step + 1
        number = self.prompts_number(step)
        data: Any = collated.data
        batches: list[Mapping[str, Any]] = []
        tokens = collated.tokens
        for prompts_only in collated.batches:
            rows = []
            groups = []
            for row in prompts_only["rows"]:
                samples = self.answers_of(number, row)
                rows.append((data, row))
                groups.append(samples)
                tokens += sum(len(sample.tokens) for sample in samples)
            batches.append(self.batch(rows, groups))
        return replace(collated, batches=batches, tokens=tokens, metrics=metrics)

    def answers_of(self, number: int, row: int) -> list[Sample]:
        """The answers to a prompt in this phase; none to an empty place.

        Raises:
            ValueError: a checkpoint's rollout has none, or not what the loss reads.
        """
        if row < 0 or self.experience is None:
            return []
        samples = self.experience.groups.get((number, row), [])
        needed = {"old", *self.algorithm.columns}
        if not self.has_reference:
            needed.discard("reference")
        if not samples or needed - samples[0].columns.keys():
            raise ValueError(f"{STATE_FILE} of the checkpoint lacks answers, or their statistics")
        return samples

    def roll_out(self, loss_module: Any, phase: int) -> tuple[Experience, dict[str, float]]:
        """(the answers of a phase, all that is learnt from them; its metrics)."""
        prompts: dict[int, PromptRows] = {}
        places: list[Place] = []
        first = phase * self.config.rollout_steps
        for number in range(first, first + self.config.rollout_steps):
            data, order, place = self.prompts_of(number)
            prompts[number] = data
            rows = order[place * self.step_rows : (place + 1) * self.step_rows].tolist()
            for row in dict.fromkeys(rows):  # each once, in order
                places.append((number, row))
        started = time.perf_counter()
        groups = self.sample(loss_module, prompts, places, self.config.num_generations)
        seconds = time.perf_counter() - started
        self.rollouts.learn(lengths_of(prompts, groups))
        experience = Experience(phase, groups)
        self.algorithm.add_advantages(experience)
        return experience, summary_of(experience.samples()) | {"rollout_seconds": seconds}

    def sample(
        self, loss_module: Any, prompts: Mapping[int, PromptRows], places: list[Place], count: int
    ) -> dict[Place, list[Sample]]:
        """`count` scored answers to each prompt, of all ranks, with the models' statistics."""
        was_training = loss_module.training
        loss_module.eval()
        rank_places = places[rank() :: world_size()]
        answers = self.answer(loss_module.network, prompts, rank_places, count)
        groups = self.score(prompts, rank_places, answers)
        size = self.config.per_device_train_batch_size
        if EVALUATION in prompts:
            size = self.config.per_device_eval_batch_size or size
        most = math.ceil(len(places) / world_size())
        self.add_statistics(loss_module, prompts, groups, most, size)
        loss_module.train(was_training)
        if world_size() == 1:
            return groups
        groups_of_ranks: list[Any] = [None] * world_size()
        dist.all_gather_object(groups_of_ranks, groups)
        all_groups: dict[Place, list[Sample]] = {}
        for rank_groups in groups_of_ranks:
            all_groups.update(rank_groups)
        return all_groups

    def answer(
        self, network: Any, prompts: Mapping[int, PromptRows], places: list[Place], count: int
    ) -> list[RolloutAnswer]:
        """`count` answers to each prompt of this rank, one after the other."""
        config = self.config
        requests = []
        for number, row in places:
            data = prompts[number]
            ids, question, key = data.prompt(row), data.question(row).prompt, data.key(row)
            for sample in range(count):
                request = RolloutRequest(
                    prompt=ids,
                    question=question,
                    group=key,
                    seed=answer_seed(config.seed, number, data.content(row), sample),
                    max_new_tokens=config.max_new_tokens,
                )
                requests.append(request)
        sampling = RolloutSampling(config.temperature, config.top_p, config.top_k)
        with whole_weights(network.model):  # a collective operation: also without requests
            if not requests:
                return []
            return self.rollouts.answers(network.model, requests, sampling)

    def score(
        self,
        prompts: Mapping[int, PromptRows],
        places: list[Place],
        answers: list[RolloutAnswer],
    ) -> dict[Place, list[Sample]]:
        """The answers as samples with their rewards."""
        config = self.config
        answers_per_prompt = len(answers) // max(len(places), 1)
        answer_places: list[Place] = []
        for place in places:
            answer_places += [place] * answers_per_prompt
        rows: list[Row] = []  # question and answer, for the reward model
        scored: list[ScoredAnswer] = []  # the same, for functions
        for (number, row), answer in zip(answer_places, answers):
            question = prompts[number].question(row)
            ids = text_ids(answer.tokens, answer.finished)
            text = decoded_text(self.tokenizer, ids)
            references = tuple(reference for reference in question.answers if reference)
            rows.append(with_reply(question, text))
            scored.append(ScoredAnswer(text, len(ids), references))
        model_scores = [0.0] * len(rows)
        if self.scorer is not None:
            model_scores = self.scorer.scores(rows)
        groups: dict[Place, list[Sample]] = {place: [] for place in places}
        for i, (place, answer) in enumerate(zip(answer_places, answers)):
            parts = function_reward(scored[i], config.reward_weights, config.reward_knobs)
            parts[MODEL] = model_scores[i]
            reward = self.total_reward(parts, answer.finished)
            if not abs(reward) < LARGEST_REWARD:
                number, row = place
                got = ", ".join(f"{name} {parts[name]:g}" for name in config.reward_weights)
                raise ValueError(
                    f"{prompts[number].place(row)}: wanted a finite reward of an answer, got "
                    f"{reward:g} of {got}"
                )
            tokens = np.array(answer.tokens, np.int32)
            groups[place].append(Sample(tokens, answer.finished, reward))
        return groups

    def total_reward(self, parts: dict[str, float], is_finished: bool) -> float:
        """The weighted sum of an answer's rewards by name, clipped, less the penalty."""
        config = self.config
        reward = sum(weight * parts[name] for name, weight in config.reward_weights.items())
        if config.reward_clip is not None:
            reward = min(max(reward, -config.reward_clip), config.reward_clip)
        if not is_finished:
            reward -= config.missing_end_penalty
        return reward

    def add_statistics(
        self,
        loss_module: Any,
        prompts: Mapping[int, PromptRows],
        groups: dict[Place, list[Sample]],
        most: int,
        size: int,
    ) -> None:
        """Add the columns of RolloutLoss.statistics to the samples of this rank.

        Args:
            most: prompts of the rank that has most; every rank runs as many passes.
            size: prompts of a pass.
        """
        places = list(groups)
        device = next(loss_module.parameters()).device
        filler = (next(iter(prompts)), -1)  # a rank that has no prompt left runs the pass too
        for start in range(0, most, size):
            pass_places = places[start : start + size] or [filler]
            rows = [(prompts[number], row) for number, row in pass_places]
            samples = [groups.get(place, []) for place in pass_places]
            batch = on_device(self.batch(rows, samples), device)
            statistics = loss_module(output="statistics", **batch).cpu().numpy()
            split_columns(statistics, loss_module.statistics_names, samples)

    def batch(
        self, rows: list[tuple[PromptRows, int]], groups: list[list[Sample]]
    ) -> dict[str, Any]:
        """The arguments of RolloutLoss: every answer to the prompts `rows` a sequence of one
        ragged row.

        Where there is no answer, a prompt without targets keeps the ranks in step.
        """
        ids: list[np.ndarray] = []
        masked: list[int] = []  # of each sequence, the prompt's tokens, which carry no loss
        all_samples: list[Sample] = []
        for (data, row), samples in zip(rows, groups):
            for sample in samples:
                prompt = data.prompt(row)
                ids.append(np.concatenate([prompt, sample.tokens]))
                masked.append(len(prompt))
                all_samples.append(sample)
        if not all_samples:
            data, _ = rows[0]
            shortest = data.prompt(int(data.row_lengths.argmin()))
            ids, masked = [np.array(shortest)], [len(shortest)]
        layout = self.layout
        batch: dict[str, Any] = dict(
            lay_end_to_end(ids, masked, layout["share"], layout["multiple"])
        )
        batch["samples"] = len(all_samples)
        algorithm = self.algorithm
        weights = []
        for sample in all_samples:
            size = len(sample.tokens)
            weights.append(np.full(size, algorithm.weight(size), np.float32))
        places = len(batch["keep"])
        batch["weights"] = laid_out(weights, places)
        for name in ("old", *algorithm.columns):
            if all(name in sample.columns for sample in all_samples):
                columns = [sample.columns[name] for sample in all_samples]
                batch[name] = laid_out(columns, places)
        return batch

    # ---- metrics

    def evaluate(
        self, loss_module: Any, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Mean reward, divergence from the reference and tokens of one answer to each row.

        The loss is what is minimised: -(reward - kl_coef kl).
        """
        data = self.eval_data
        if data is None:
            raise RuntimeError("the evaluation rows are not loaded")
        places = [(EVALUATION, row) for row in range(len(data))]
        groups = self.sample(loss_module, {EVALUATION: data}, places, 1)
        metrics = summary_of(groups[place][0] for place in places)
        metrics["loss"] = self.config.kl_coef * metrics["kl"] - metrics["reward"]
        if rank() == 0:
            self.write_answers(data, groups, predictions)
        return {name: metrics[name] for name in self.config.evaluated}

    def write_answers(
        self, data: PromptRows, groups: dict[Place, list[Sample]], path: Path
    ) -> None:
        """JSON lines of {prompt, answer, reward}; a disk that takes none is a warning."""
        lines = []
        for (_, row), samples in sorted(groups.items()):
            for sample in samples:
                ids = text_ids(sample.tokens.tolist(), sample.finished)
                line = {
                    "prompt": data.question(row).prompt,
                    "answer": decoded_text(self.tokenizer, ids),
                    "reward": round(sample.reward, 6),
                }
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            write_aside(path, "".join(lines))
        except OSError as error:
            say(f"WARNING: {path} cannot be written ({error.strerror or error}); going on")


def text_ids(tokens: list[int], is_finished: bool) -> list[int]:
    """An answer's ids without its end token."""
    return tokens[:-1] if is_finished else tokens


def answer_seed(seed: int, number: int, content: bytes, sample: int) -> int:
    """The seed of an answer: of the run's, the prompts' number, the row and the sample."""
    digest = hashlib.sha256(f"{seed} {number} {sample} ".encode() + content).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def lengths_of(
    prompts: Mapping[int, PromptRows], groups: dict[Place, list[Sample]]
) -> dict[str, list[int]]:
    """{key of a prompt: tokens of its answers}."""
    lengths: dict[str, list[int]] = {}
    for (number, row), samples in sorted(groups.items()):
        prompt_lengths = lengths.setdefault(prompts[number].key(row), [])
        for sample in samples:
            prompt_lengths.append(len(sample.tokens))
    return lengths


def laid_out(parts: Sequence[np.ndarray], places: int) -> Tensor:
    """(places,) fp32: the parts end to end, then zeros."""
    row = np.zeros(places, np.float32)
    if parts:
        values = np.concatenate(parts)
        row[: len(values)] = values
    return torch.from_numpy(row)


def split_columns(statistics: np.ndarray, names: list[str], groups: list[list[Sample]]) -> None:
    """Give each sample its part of (columns, N), which has all answers end to end."""
    start = 0
    for samples in groups:
        for sample in samples:
            end = start + len(sample.tokens)
            for name, column in zip(names, statistics):
                sample.columns[name] = column[start:end].copy()
            start = end
