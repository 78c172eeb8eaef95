"""A sweep by the cost model: no model is loaded. Free of torch."""

from collections.abc import Iterator
from dataclasses import replace

from serving.cost_model.devices import Cluster
from serving.cost_model.model import CostModel, ModelSizes, Profile
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import Infeasible, Need, Placement
from serving.sweep.rows import SweepRow, SweptSizes


def sweep_on_paper(
    model: ModelSizes, profile: Profile, gpu: str | None, sizes: SweptSizes
) -> Iterator[SweepRow]:
    """A row for each number of devices and batch.

    Args:
        gpu: a name of serving.cost_model.devices, or a .json file; None for the profile's.
    """
    for count in sizes.gpus:
        cluster = profile.cluster(count) if gpu is None else Cluster.uniform(gpu, count)
        for batch in sizes.batches:
            yield row_on_paper(model, profile, cluster, sizes, batch)


def row_on_paper(
    model: ModelSizes, profile: Profile, cluster: Cluster, sizes: SweptSizes, batch: int
) -> SweepRow:
    """One batch, shared by the replicas that the deployer finds room for."""
    row = SweepRow(
        len(cluster.devices),
        batch,
        sizes.output_tokens,
        kv_bytes=batch * sizes.tokens * model.kv_bytes_per_token,
    )
    try:
        placement = placed(model, profile, cluster, sizes, batch)
        replicas = placement.replicas
        share = -(-batch // replicas)
        if replicas > 1:
            smaller = placed(model, profile, cluster, sizes, share)
            placement = smaller if smaller.replicas >= replicas else placement
    except Infeasible as error:
        return replace(row, why=str(error))
    cost = CostModel.of(model, placement, profile)
    return replace(
        row,
        layers=layers_text(placement.layers, replicas),
        seconds=cost.equal_batch_s(share, sizes.prompt_tokens, sizes.output_tokens),
        device_bytes=max(placement.memory_bytes.values()),
        busy=placement.utilisation,
    )


def placed(
    model: ModelSizes, profile: Profile, cluster: Cluster, sizes: SweptSizes, batch: int
) -> Placement:
    """Where the deployer puts the layers for this batch. Raises Infeasible."""
    need = Need(batch * sizes.tokens, batch, sizes.prompt_tokens, sizes.output_tokens)
    return DEPLOYERS[sizes.deployer].place(model, cluster, need, profile)


def layers_text(layers: tuple[int, ...], replicas: int) -> str:
    """Layers of the stages: "14+14", or "28 x 2" for two replicas."""
    chain = "+".join(map(str, layers))
    return chain if replicas == 1 else f"{chain} x {replicas}"
