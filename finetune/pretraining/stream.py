"""Packed rows of files larger than memory."""

import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from finetune.rows.arrays import Dataset, Place, RowArrays, RowWriter
from finetune.rows.formats import BadRow
from finetune.rows.groups import RowGroups, join_groups
from finetune.rows.sources import parse_row_line
from finetune.rows.streaming import Stream


class PackedStream(Stream):
    """The documents of each block of lines, packed; row n is a pure function of (seed, n).

    How many rows a block makes is known once it is tokenised: a run that resumes tokenises again
    what it has read.
    """

    def __init__(self, *args: Any, pack: Callable[[RowArrays], RowGroups], **options: Any):
        """pack: makes the rows of a block's encoded documents; the others are Stream's."""
        super().__init__(*args, **options)
        self.pack = pack
        self.pack_lock = threading.Lock()
        self.firsts = [0]  # the number of each block's first row, as far as blocks were packed
        self.packed: dict[int, RowGroups] = {}
        self.span = 1  # blocks that a step reads at most

    def groups(self, start: int, stop: int) -> RowGroups:
        """The rows `start` to `stop` (excluded)."""
        with self.pack_lock:
            while self.firsts[-1] < stop:
                self.firsts.append(self.firsts[-1] + len(self.block_rows(len(self.firsts) - 1)))
            first = bisect_right(self.firsts, start) - 1
            last = bisect_right(self.firsts, stop - 1) - 1
            self.span = max(self.span, last - first + 1)
            parts = []
            for number in range(first, last + 1):
                begin = max(0, start - self.firsts[number])
                end = min(stop, self.firsts[number + 1]) - self.firsts[number]
                parts.append(slice_groups(self.block_rows(number), begin, end))
            return join_groups(parts)

    def block_rows(self, number: int) -> RowGroups:
        """The packed rows of a block."""
        if number not in self.packed:
            self.packed[number] = self.pack_block(number)
            while len(self.packed) > (self.span + 1) * (self.workers + 2):
                del self.packed[min(self.packed)]
        return self.packed[number]

    def pack_block(self, number: int) -> RowGroups:
        """Raises BadRow: a document is malformed, without skip_bad; or none of them is of use."""
        writer, refusal = RowWriter(), None
        for place, line in self.block(number):
            try:
                row = self.reader.row(parse_row_line(line, place), place)
            except BadRow as error:
                if not self.skip_bad:
                    raise
                refusal = error
                self.dropped.add(place)
                continue
            for made in self.encoder.encode(row):
                writer.add(Place(0, place), made)
        count = len(writer.columns["n_masked"])
        if not count:
            raise BadRow(f"{refusal}; nor is any other of the {self.size} texts around it of use")
        return self.pack(writer.in_memory(("",), {"good": count}))


def slice_groups(groups: RowGroups, start: int, stop: int) -> RowGroups:
    """The groups `start` to `stop` (excluded) of one part's rows; nothing is copied."""
    (part,), (chosen,) = groups.data.parts, groups.data.chosen
    first, last = int(groups.starts[start]), int(groups.starts[stop])
    if chosen is None:
        raise ValueError("a block's rows are chosen by number")
    data = Dataset((part,), (chosen[first:last],))
    return RowGroups(data, groups.starts[start : stop + 1] - first)
