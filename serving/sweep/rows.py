"""A row of a sweep, what is swept, and the table of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.cost_model.devices import GIB, MIB
from serving.simulate.experiment_common import TableRow


@dataclass(frozen=True)
class SweptSizes:
    """What is swept, and the batch's other sizes.

    Attributes:
        gpus, batches: numbers of devices, and of requests of a batch.
        prompt_tokens, output_tokens: of each request.
        deployer: places the layers, where there are several devices.
    """

    gpus: tuple[int, ...]
    batches: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    deployer: str

    @property
    def tokens(self) -> int:
        """Of a request, at its end."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class SweepRow:
    """One batch on so many devices.

    Attributes:
        layers: of each stage: "14+14"; "x 2" for two such replicas.
        seconds: from the first prompt to the last token; None where the batch does not fit.
        kv_bytes: keys and values of the whole batch at its end.
        device_bytes: weights and KV on the fullest device; None where that is not known.
        busy: the mean share of the time in which a device works; None where that is not known.
        predicted_s: what the cost model says of a measured batch.
        why: a batch does not fit.
    """

    gpus: int
    batch: int
    output_tokens: int
    kv_bytes: int
    layers: str = ""
    seconds: float | None = None
    device_bytes: int | None = None
    busy: float | None = None
    predicted_s: float | None = None
    why: str = ""

    @property
    def tokens_s(self) -> float | None:
        """Answer tokens a second."""
        if self.seconds is None:
            return None
        return self.batch * self.output_tokens / self.seconds

    def table_row(self) -> TableRow:
        row: TableRow = {"devices": self.gpus, "batch": self.batch, "layers": self.layers}
        row["seconds"] = self.seconds
        row["tokens/s"] = self.tokens_s
        row["KV MiB"] = self.kv_bytes / MIB
        row["fullest GiB"] = None if self.device_bytes is None else self.device_bytes / GIB
        row["busy %"] = None if self.busy is None else 100 * self.busy
        row["predicted s"] = self.predicted_s
        return row


def table_rows(rows: Sequence[SweepRow]) -> list[TableRow]:
    """The table, without columns that are empty in every row."""
    table = [row.table_row() for row in rows]
    used = []
    for name in table[0]:
        if any(row[name] not in (None, "") for row in table):
            used.append(name)
    shown = []
    for row in table:
        cells: TableRow = {}
        for name in used:
            value = row[name]
            cells[name] = "-" if value in (None, "") else value
        shown.append(cells)
    return shown
