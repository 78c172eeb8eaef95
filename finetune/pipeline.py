"""Pipeline parallelism (--num_stages): each rank holds some of the layers of a ChatGLM.

StagedModel is DeepSpeed's PipelineModule, run by its schedule of one forward, one backward (arXiv
2104.04473 section 2.2); a micro batch is a pass of --gradient_accumulation_steps. A stage sends the
next one a tuple of tensors: the hidden states, then integers, which need no gradient: the
positions, which also say where the sequences of a ragged row begin (chatglm.packing), and the
labels. Each stage makes its masks anew of them: NCCL sends no bool tensors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from chatglm.modeling_glm import ChatGLM1Model
from chatglm.modeling_glm2 import ChatGLM2Model
from finetune.checkpoint import trained_values
from finetune.distributed import device, pieces, rank, world_size
from finetune.loss import labelled_states, nll_of_states, without_peft
from finetune.stages import layer_bounds


class TiedLayer(TiedLayerSpec):
    """A layer whose trained weight another stage has too: DeepSpeed adds up their gradients."""

    def __init__(self, key: str, module: nn.Module):
        super().__init__(key, type(module))
        self.module = module

    def build(self, log: bool = False) -> nn.Module:
        """The module, which is built already."""
        return self.module


class StagedModel(PipelineModule):
    """This rank's stage of a model; its forward returns the next stage's input, or the loss.

    The model keeps the names and shapes of other stages' weights, but not the weights.

    Attributes:
        scale: factor of the loss in training, set before each step.
        owners: name of each parameter of the model -> the first stage that has it.
    """

    def __init__(self, model: nn.Module, stages: int, *, smoothing: float = 0.0):
        """`model`: with its output layer, bare or inside peft, the same on every rank.

        Raises:
            ValueError: it is no ChatGLM, or has fewer layers than stages.
        """
        inner = without_peft(model)
        body = inner.base_model
        if not isinstance(body, (ChatGLM1Model, ChatGLM2Model)):
            raise ValueError(
                f"--num_stages needs a ChatGLM or GLM-4; "
                f"{inner.name_or_path} is a {inner.config.model_type}"
            )
        embedding, output_layer = inner.get_input_embeddings(), inner.get_output_embeddings()
        layers = [embedding, *body.blocks, body.final_norm, output_layer]
        sizes = [layer_size(layer) for layer in layers]
        self.bounds = layer_bounds(sizes, stages)
        self.owners = owners_of(model, layers, self.bounds)
        check_trained(model, self.owners, stages)
        super().__init__(with_ties(layers), num_stages=stages, dynamic_shape=True)
        start, end = self.bounds[self.stage_id], self.bounds[self.stage_id + 1]
        drop_weights(model, layers[start:end])
        # The stage's blocks: layer 0 is the embedding, the last two are norm and output layer.
        first_block = max(start, 1) - 1
        end_block = min(end, len(layers) - 2) - 1
        # By __dict__, as nn.Module would register submodules, whose parameters the layers have.
        self.__dict__["model"] = model
        self.__dict__["body"] = body
        self.__dict__["blocks"] = body.blocks[first_block:end_block]
        self.__dict__["embedding"] = embedding
        self.__dict__["output_layer"] = output_layer
        self.smoothing = smoothing
        self.scale = 1.0

    def _partition_layers(self, method: str = "") -> None:
        """As DeepSpeed's, by bounds that count frozen parameters too."""
        self.parts = self.bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage, which computes the loss."""
        return self.stage_id == self.num_stages - 1

    @property
    def replicas(self) -> int:
        """The number of pipelines side by side."""
        return world_size() // self.num_stages

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """One micro batch.

        Args:
            inputs: token ids (B, S) in the first stage, else hidden states (B, S, H); positions;
                and labels (B, S), or of a ragged row the keep and targets of nll_sum.

        Returns:
            The same with this stage's hidden states; of the last stage the loss, a scalar.
        """
        states, positions, *labels = inputs
        is_ragged = len(labels) == 2
        if self.stage_id == 0:
            states = self.embedding(states)
        packing = None
        if is_ragged:
            packing = self.body.read_packing(positions)
            packing = replace(packing, keep=labels[0] if self.is_last else None)
        states = self.body.run_layers(self.blocks, states, None, positions, None, packing)
        if not self.is_last:
            return (states, positions, *labels)
        states = self.body.final_norm(states)
        if is_ragged:
            states, targets = states[0], labels[1]
        else:
            states, targets = labelled_states(states, labels[0])
        if not self.training:
            return nll_of_states(self.output_layer, states, targets, 1.0, 0.0)
        return nll_of_states(self.output_layer, states, targets, self.scale, self.smoothing)

    # ---- whole steps

    def attach(self, engine: Any) -> None:
        """Take the engine of this model; without ZeRO it clips by the norm over all stages."""
        self.__dict__["engine"] = engine
        if isinstance(engine.optimizer, torch.optim.Optimizer):
            engine.clip_fp32_gradients = self.clip  # DeepSpeed's stores no norm

    def clip(self) -> None:
        """Clip the gradients; a tied weight counts once in their norm."""
        engine = self.engine
        gradients: list[Tensor] = []
        for parameter in self.parameters():
            if parameter.grad is None:
                continue
            is_counted_elsewhere = vars(parameter)["ds_pipe_replicated"]
            if not is_counted_elsewhere:
                gradients.append(parameter.grad)
        stage_norm = torch.nn.utils.get_total_norm(pieces(gradients))
        squared = stage_norm.double().square().to(device())
        dist.all_reduce(squared, group=engine.grid.get_model_parallel_group())
        norm = squared.sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(self.parameters(), engine.gradient_clipping(), norm)
        engine._global_grad_norm = norm

    def micro_batches(self, batches: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
        """What DeepSpeed loads of collated batches: (the first stage's input, no labels apart)."""
        for batch in batches:
            ids = batch["input_ids"]
            lengths = batch.get("lengths") or [ids.shape[1]]
            shared = batch.get("shared") or [0]
            positions = self.body.packed_positions(ids, lengths, shared)
            if "labels" in batch:
                yield (ids, positions, batch["labels"]), ()
            else:
                yield (ids, positions, batch["keep"], batch["targets"]), ()

    def train_step(self, batches: Sequence[Mapping[str, Any]], scale: float) -> float:
        """Run a whole optimizer step; returns the loss, averaged over passes and replicas.

        Args:
            batches: of this rank's replica, the same in all of its stages.
            scale: factor of the loss.
        """
        self.scale = scale
        return float(self.engine.train_batch(self.micro_batches(batches)))

    def total_loss(self, batches: Iterable[Mapping[str, Any]]) -> float:
        """The loss without scale, summed over batches of this rank's replica."""
        total = torch.zeros(1, dtype=torch.float64, device=device())
        schedule: list[Mapping[str, Any]] = []  # batches that go through the pipeline together
        for batch in batches:
            schedule.append(batch)
            if len(schedule) == 8 * self.num_stages:
                total += self.schedule_loss(schedule)
                schedule = []
        if schedule:
            total += self.schedule_loss(schedule)
        grid = self.engine.grid
        last = grid.stage_to_global(self.num_stages - 1)
        dist.broadcast(total, last, group=grid.get_pipe_parallel_group())
        return float(total)

    def schedule_loss(self, batches: list[Mapping[str, Any]]) -> Tensor | float:
        """The loss summed over batches; 0 in other stages than the last."""
        losses = self.engine.eval_batch(
            self.micro_batches(batches),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(batches),
        )
        return torch.stack(losses).double().sum() if self.is_last else 0.0

    def gathered_state(self, *, trainable_only: bool) -> dict[str, Tensor]:
        """As checkpoint.gathered_state, of all stages: rank 0 gets them from the others."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if trainable_only and not parameter.requires_grad:
                continue
            owner = self.owners[name]
            source = owner * self.replicas  # the first rank of that stage
            values = torch.empty(0)
            if self.stage_id == owner:
                values = trained_values(parameter, trainable_only)
            if rank() == source and source != 0:
                dist.send(values.contiguous(), 0)
            if rank() == 0 and source != 0:
                values = torch.empty_like(parameter, device=device())
                dist.recv(values, source)
            if rank() == 0:
                state[name] = values.cpu()
        return state


def layer_size(layer: nn.Module) -> int:
    """Elements of a layer's parameters."""
    return sum(parameter.numel() for parameter in layer.parameters())


def with_ties(layers: list[nn.Module]) -> list[Any]:
    """The layers as PipelineModule takes them; the ends that share a trained weight as tied."""
    first, *inner, last = layers
    shared = set(first.parameters()) & set(last.parameters())
    if not any(parameter.requires_grad for parameter in shared):
        return list(layers)
    return [TiedLayer("ends", first), *inner, TiedLayer("ends", last)]


def owners_of(model: nn.Module, layers: list[nn.Module], bounds: list[int]) -> dict[str, int]:
    """{name of a parameter of `model`: the first stage that has it}."""
    stages: dict[nn.Parameter, int] = {}
    for stage, (start, end) in enumerate(zip(bounds, bounds[1:])):
        for parameter in nn.ModuleList(layers[start:end]).parameters():
            stages.setdefault(parameter, stage)
    owners: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owners[name] = stages[parameter]
    return owners


def check_trained(model: nn.Module, owners: dict[str, int], stages: int) -> None:
    """Raises ValueError for a stage without trained weights, to which no gradient would come."""
    training_stages: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            training_stages.add(owners[name])
    if len(training_stages) < stages:
        raise ValueError(
            f"--num_stages {stages}: wanted weights that train in each stage; "
            f"only {len(training_stages)} of them have any (--lora_module_name)"
        )


def drop_weights(model: nn.Module, kept: list[nn.Module]) -> None:
    """Replace the parameters outside of the modules `kept` by ones without values; ties stay."""
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in nn.ModuleList(kept).parameters():
        replacements[parameter] = parameter
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in replacements:
                empty = parameter.detach().to("meta")
                replacements[parameter] = nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, replacements[parameter])
