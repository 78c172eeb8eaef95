"""What --task grpo and --task ppo have in common: prompts are answered, answers are learnt from.

RolloutTask.step_batches is where the loop comes in. The first step of a phase (phases.py) makes the
samples of all its prompts, in this order:

    prompts.py      rows -> ids of prompts
    sampling.py     prompts -> answers, by an implementation of rollout.py
    scoring.py      answers -> samples with rewards, by rewards.py and a reward model
    statistics.py   samples -> log-probabilities of policy and reference, the critic's values
    grpo.py, ppo.py rewards and statistics -> advantages (Algorithm.add_advantages)

collecting.py runs the middle three of them over the ranks. Every step of the phase then makes its
tensors of these samples (minibatches.py), whose loss is that of policy_loss.py and the Algorithm.
experience.py keeps the samples in checkpoints; evaluation.py records those of evaluation rows.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from chatglm.loading import stop_ids
from finetune.checkpoint import export_model, exported_bytes, inner_state
from finetune.distributed import rank
from finetune.epochs import StepBatches
from finetune.evaluation.metrics import check_packages
from finetune.parameters import parameter_sizes, trained_size
from finetune.preference.reference import can_switch_off
from finetune.preference.scorer import RewardScorer, find_reward_model
from finetune.reinforcement.averaging import WeightAverage
from finetune.reinforcement.collecting import SampleCollector
from finetune.reinforcement.config import RolloutConfig
from finetune.reinforcement.evaluation import evaluation_metrics, write_samples
from finetune.reinforcement.experience import (
    EVALUATION,
    STATE_FILE,
    Experience,
    Place,
    Sample,
    load_experience,
    save_experience,
    summary_of,
)
from finetune.reinforcement.minibatches import Minibatches
from finetune.reinforcement.networks import PolicyNetwork, make_critic, sharing_copy
from finetune.reinforcement.phases import Phases
from finetune.reinforcement.policy_loss import Algorithm, RolloutLoss
from finetune.reinforcement.prompts import (
    PromptReader,
    PromptRows,
    RolloutEncoder,
    choose_prompts,
    join_prompts,
    prompt_rows,
)
from finetune.reinforcement.rewards import MODEL, metric_packages, reference_rewards
from finetune.reinforcement.rollout import MakeRollouts, RolloutSetup
from finetune.reinforcement.sampling import lengths_of
from finetune.reinforcement.scoring import AnswerScoring
from finetune.row_task import RowTask
from finetune.rows.arrays import Dataset, RowArrays
from finetune.rows.encoding import Preparation
from finetune.rows.formats import parse_columns
from finetune.rows.sources import Source
from finetune.rows.streaming import Stream

EMA = "ema"  # the folder of the averaged policy in a checkpoint

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
        self.phases = Phases(config.rollout_steps, config.rollout_epochs)
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
        return RolloutEncoder(
            self.tokenizer,
            self.family,
            config.max_len,
            config.max_src_len,
            max_new_tokens=config.max_new_tokens,
        )

    def preparation(self, name: str) -> Preparation:
        """As RowTask's; of an evaluation row too all answers are references."""
        return replace(super().preparation(name), first_answer=False)

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
        if self.stream and steps:
            return count
        return self.phases.rows_per_epoch(count, step_rows)

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[PromptRows, np.ndarray, int]:
        """As in Task: every phase reads its prompts --rollout_epochs times."""
        self.step_rows = step_rows
        return self.prompts_of(self.phases.prompts_number(epoch * steps_per_epoch + place))

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
        """The policy, with a reference where it cannot be switched on, and a critic.

        Raises:
            ValueError: the policy's answers cannot be sampled.
        """
        policy: Any = super().build_model(dtype)
        try:
            self.rollouts.check(policy)
        except ValueError as error:
            raise ValueError(f"--task {self.config.task} samples answers: {error}") from None
        reference = critic = None
        if self.has_reference and not can_switch_off(self.config, self.model_path):
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
        save_experience(folder / STATE_FILE, self.experience, self.rollouts.state())
        if self.average is not None:
            (folder / EMA).mkdir()
            averaged = self.average.state_of(inner)
            export_model(model.model, self.method, self.tokenizer, averaged, folder / EMA)
            self.average.save(folder)

    def extra_bytes(self, model: Any) -> int:
        """Of the averaged weights, exported and in fp32. Rollouts are small beside them."""
        if self.average is None:
            return 0
        policy = model.model
        return exported_bytes(policy, self.method.saves) + 4 * trained_size(parameter_sizes(policy))

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

    # ---- a step

    def step_batches(self, loss_module: Any, collated: StepBatches, step: int) -> StepBatches:
        """The batches of a step with answers; its phase's first step writes them."""
        phase, within = self.phases.phase_of(step)
        if self.average is not None:
            self.average.update(loss_module.network.model, step)
        metrics: dict[str, float] = {}
        if self.experience is None or self.experience.phase != phase:
            if within:  # other weights would answer than those that did
                raise ValueError(f"{STATE_FILE} of the checkpoint lacks the answers of its step")
            self.experience, metrics = self.roll_out(loss_module, phase)
        self.done = step + 1
        number = self.phases.prompts_number(step)
        data: Any = collated.data
        batches: list[Mapping[str, Any]] = []
        tokens = collated.tokens
        for prompts_only in collated.batches:
            rows = []
            groups = []
            for row in prompts_only["rows"]:
                samples = self.samples_of(number, row)
                rows.append((data, row))
                groups.append(samples)
                tokens += sum(len(sample.tokens) for sample in samples)
            batches.append(self.minibatches.batch(rows, groups))
        if within + 1 == self.phases.steps:  # used up: a checkpoint after this step has none
            self.experience = None
        return replace(collated, batches=batches, tokens=tokens, metrics=metrics)

    def samples_of(self, number: int, row: int) -> list[Sample]:
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
        for number in self.phases.prompts_numbers(phase):
            data, order, place = self.prompts_of(number)
            prompts[number] = data
            rows = order[place * self.step_rows : (place + 1) * self.step_rows].tolist()
            for row in dict.fromkeys(rows):  # each once, in order
                places.append((number, row))
        started = time.perf_counter()
        groups = self.collector.collect(loss_module, prompts, places, self.config.num_generations)
        seconds = time.perf_counter() - started
        self.rollouts.learn(lengths_of(prompts, groups))
        experience = Experience(phase, groups)
        self.algorithm.add_advantages(experience)
        return experience, summary_of(experience.samples()) | {"rollout_seconds": seconds}

    @property
    def collector(self) -> SampleCollector:
        """What makes samples; the reward model is there after before_training."""
        scoring = AnswerScoring(self.config, self.tokenizer, self.scorer)
        return SampleCollector(self.config, self.rollouts, scoring, self.minibatches)

    @cached_property
    def minibatches(self) -> Minibatches:
        """How samples are laid out, in the dtype of build_model."""
        return Minibatches(self.algorithm, self.layout)

    # ---- metrics

    def evaluate(
        self, loss_module: Any, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Mean reward, divergence from the reference and tokens of one answer to each row."""
        data = self.eval_data
        if data is None:
            raise RuntimeError("the evaluation rows are not loaded")
        places = [(EVALUATION, row) for row in range(len(data))]
        groups = self.collector.collect(loss_module, {EVALUATION: data}, places, 1)
        samples = [groups[place][0] for place in places]
        metrics = evaluation_metrics(samples, self.config.kl_coef)
        if rank() == 0:
            write_samples(data, groups, self.tokenizer, predictions)
        return {name: metrics[name] for name in self.config.evaluated}
