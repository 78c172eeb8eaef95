"""Which layers each stage of a pipeline holds (--num_stages). Free of torch."""

from collections.abc import Sequence

from finetune.ds_file import read_ds_file


def check_zero_stage(num_stages: int, ds_file: str) -> None:
    """Raises ValueError where a DeepSpeed file's ZeRO does not go with a pipeline: stage 2 or 3."""
    path, ds = read_ds_file(ds_file)
    zero = ds.get("zero_optimization", {}).get("stage", 0)
    if num_stages > 1 and zero not in (0, 1):
        raise ValueError(
            f"--num_stages {num_stages} takes ZeRO-0 or 1, --ds_file ds_zero1.json; "
            f"{path.name} asks for ZeRO-{zero}"
        )


def layer_bounds(sizes: Sequence[int], stages: int) -> list[int]:
    """(stages + 1,) edges of the stages in a list of layers, by which the largest is smallest.

    Of equal ones the first stages are the shorter: they hold the most micro batches at a time.

    Args:
        sizes: of the embedding, of each block, of the final norm, of the output layer. A stage has
            at least one block; the embedding is the first's, norm and output layer the last's.

    Raises:
        ValueError: there are fewer blocks than stages.
    """
    blocks = list(sizes[1:-2])
    if stages > len(blocks):
        raise ValueError(f"--num_stages {stages}: this model has {len(blocks)} layers, one a stage")
    blocks[0] += sizes[0]
    blocks[-1] += sum(sizes[-2:])
    bounds = [0]
    for edge in best_edges(blocks, stages)[1:-1]:
        bounds.append(edge + 1)  # the embedding comes before the blocks
    return [*bounds, len(sizes)]


def best_edges(blocks: Sequence[int], stages: int) -> list[int]:
    """(stages + 1,) edges in a list of sizes, from 0 to its length; as layer_bounds chooses them.

    Dynamic programming, a stage at a time.
    """
    sums = [0]
    for size in blocks:
        sums.append(sums[-1] + size)
    # best[n]: how to cut the first n blocks into the stages so far, (its largest stage, its edges).
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for _ in range(stages):
        with_one_more: dict[int, tuple[int, list[int]]] = {}
        for end in range(1, len(sums)):
            for start, (largest, edges) in best.items():
                if start >= end:
                    continue
                new_stage = sums[end] - sums[start]
                cut = (max(largest, new_stage), [*edges, end])
                if end not in with_one_more or cut < with_one_more[end]:
                    with_one_more[end] = cut
        best = with_one_more
    _, edges = best[len(blocks)]
    return edges
