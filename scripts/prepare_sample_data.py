#!/usr/bin/env python3
"""Write this project's own sample data: a made-up, regular language of car-fault notes.

Three JSON-lines files (keys `instruction`, `input`, `output`) and a README with their hashes:

    spo_train.json, spo_test.json   triple extraction: one line `subject_relation_object` per triple
    copy_pretrain.json              the sibling task, copying: no triple of a sentence is asked for

The same options always give the same bytes: every draw goes through `random.Random.random()`, the
one method whose sequence Python keeps fixed across versions, and the held-out pairs are chosen by
SHA-256.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command  # noqa: E402
from finetune.files import write_aside  # noqa: E402
from scripts.sample_formats import render_samples  # noqa: E402

EXTRACT = "抽取故障三元组，每行一个："
COPY = "照抄："
COPY_TWICE = "照抄两遍："
PICK = "抄写其中的{}："
JOIN = "把下列词用_连接："
JOIN_LINES = "把下列词用_连接，每组一行："

PART_FAULT, PERFORMANCE_FAULT, COMPOSED_OF, TEST_TOOL = RELATIONS = (
    "部件故障",
    "性能故障",
    "组成",
    "检测工具",
)

PARTS = [
    "水泵",
    "发动机",
    "变速器",
    "起动机",
    "发电机",
    "压缩机",
    "节气门",
    "喷油嘴",
    "火花塞",
    "蓄电池",
    "散热器",
    "膨胀阀",
    "曲轴",
    "活塞",
    "皮带",
    "离合器",
    "传动轴",
    "差速器",
    "转向机",
    "方向盘",
    "雨刮",
    "喇叭",
    "仪表盘",
    "保险丝",
    "天窗",
    "鼓风机",
    "排气管",
    "油箱",
]
CORNERS = ["左前", "右前", "左后", "右后"]
CORNER_PARTS = ["车门", "轮胎", "减震器"]
STATES = [
    "损坏",
    "松动",
    "磨损",
    "断裂",
    "异响",
    "变形",
    "老化",
    "卡死",
    "烧坏",
    "发烫",
    "脱落",
    "堵塞",
    "进水",
    "锈蚀",
    "接触不良",
    "不工作",
    "漏油",
    "抖动",
]
QUANTITIES = [
    "水温",
    "油压",
    "怠速",
    "油耗",
    "电压",
    "电流",
    "转速",
    "胎压",
    "制动力",
    "噪音",
    "流量",
    "真空度",
    "电阻",
    "扭矩",
]
LEVELS = [
    "过高",
    "过低",
    "偏高",
    "偏低",
    "不稳",
    "不足",
    "超标",
    "为零",
    "忽高忽低",
    "波动大",
    "下降快",
]
COMPONENTS = [
    "轴承",
    "油封",
    "密封圈",
    "齿轮",
    "弹簧",
    "垫片",
    "线圈",
    "电刷",
    "转子",
    "壳体",
    "叶片",
    "阀芯",
    "螺栓",
    "滤网",
]
ASSEMBLIES = [
    "发动机",
    "变速器",
    "起动机",
    "发电机",
    "压缩机",
    "水泵",
    "节气门",
    "离合器",
    "差速器",
    "转向机",
    "鼓风机",
]
TOOLS = [
    "万用表",
    "示波器",
    "诊断仪",
    "压力表",
    "卡尺",
    "千分尺",
    "测温仪",
    "听诊器",
    "试灯",
    "塞尺",
    "扭力扳手",
    "内窥镜",
]
BRANDS = ["启程", "远山", "青禾", "云帆"]
BODIES = ["轿车", "货车", "客车"]

PART_TEMPLATES = ("{s}{o}", "发现{s}{o}", "{s}已经{o}", "出现{o}的是{s}")
LEVEL_TEMPLATES = ("{s}{o}", "测得{s}{o}", "{s}一直{o}")
COMPOSED_TEMPLATES = ("{s}装在{o}内", "{o}里有{s}", "{s}属于{o}")
TOOL_TEMPLATES = ("用{s}测量{o}", "{o}要用{s}检查", "拿{s}检测{o}")
TWIN_TEMPLATE = "{s}和{t}都{o}"
NEUTRAL_CLAUSES = ["清洗后装回", "试车正常", "客户很满意", "外观完好", "其余良好", "更换后再看"]

# The kinds a PICK row can ask for, by the word its instruction uses.
KINDS = {
    "部件": PARTS,
    "状态": STATES,
    "指标": QUANTITIES,
    "程度": LEVELS,
    "零件": COMPONENTS,
    "工具": TOOLS,
}


Triple = tuple[str, str, str]  # subject, relation, object


class Draw:
    """Draws that stay the same from one Python version to the next."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number, low <= n <= high."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, items: Sequence[str]) -> str:
        return items[int(self._random.random() * len(items))]

    def several(self, items: Sequence[str], count: int) -> list[str]:
        """`count` different items, in drawn order."""
        rest = list(items)
        chosen = []
        for _ in range(count):
            chosen.append(rest.pop(int(self._random.random() * len(rest))))
        return chosen


def is_held_out(relation: str, subject: str, obj: str, share: float) -> bool:
    """Whether the pair is reserved for the test split; about `share` of all pairs are, whatever the
    seed.
    """
    digest = hashlib.sha256(f"{relation}_{subject}_{obj}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


class Language:
    """Sentences with their triples.

    `held_out` says which pairs a sentence may use: those of the training files, or the held-out
    ones.
    """

    def __init__(self, draw: Draw, held_out_share: float) -> None:
        self.draw = draw
        self.held_out_share = held_out_share

    def part(self) -> str:
        if self.draw.chance(0.2):
            return self.draw.one(CORNERS) + self.draw.one(CORNER_PARTS)
        return self.draw.one(PARTS)

    def _pair(
        self,
        relation: str,
        subject: Callable[[], str],
        obj: Callable[[], str],
        held_out: bool,
    ) -> tuple[str, str]:
        """Draw (subject, object) by the two functions until the pair is on the wanted side of the
        split.
        """
        while True:
            pair = subject(), obj()
            if is_held_out(relation, *pair, self.held_out_share) == held_out:
                return pair

    def fact(self, relation: str, held_out: bool) -> tuple[str, list[Triple]]:
        """A clause of the relation and its triples (one, or two about two parts), in the order of
        the text.
        """
        draw = self.draw
        templates: tuple[str, ...]
        if relation == PART_FAULT:
            subject, obj, templates = self.part, lambda: draw.one(STATES), PART_TEMPLATES
        elif relation == PERFORMANCE_FAULT:
            subject, obj, templates = (
                lambda: draw.one(QUANTITIES),
                lambda: draw.one(LEVELS),
                LEVEL_TEMPLATES,
            )
        elif relation == COMPOSED_OF:
            subject, obj, templates = (
                lambda: draw.one(COMPONENTS),
                lambda: draw.one(ASSEMBLIES),
                COMPOSED_TEMPLATES,
            )
        else:
            subject, obj, templates = lambda: draw.one(TOOLS), self._measured, TOOL_TEMPLATES
        s, o = self._pair(relation, subject, obj, held_out)
        if relation == PART_FAULT and draw.chance(0.1):
            t, _ = self._pair(relation, self.part, lambda: o, held_out)
            if t != s:
                return TWIN_TEMPLATE.format(s=s, t=t, o=o), [(s, relation, o), (t, relation, o)]
        return draw.one(templates).format(s=s, o=o), [(s, relation, o)]

    def _measured(self) -> str:
        return self.part() if self.draw.chance(0.5) else self.draw.one(QUANTITIES)

    def opening(self) -> str:
        """Brand, body, year or mileage: noise in front of a sentence."""
        if self.draw.chance(0.5):
            return (
                f"{self.draw.integer(2010, 2024)}年{self.draw.one(BRANDS)}{self.draw.one(BODIES)}"
            )
        return f"行驶{self.draw.integer(2, 30)}万公里后"

    def sentence(self, held_out: bool = False) -> tuple[str, list[Triple]]:
        """(text, triples): one or two facts, of different relations, with noise clauses around;
        triples in text order.
        """
        draw = self.draw
        clauses: list[str] = []
        triples: list[Triple] = []
        for relation in draw.several(RELATIONS, 2 if draw.chance(0.35) else 1):
            text, found = self.fact(relation, held_out)
            clauses.append(text)
            triples.extend(found)
        if draw.chance(0.25):
            clauses.insert(draw.integer(0, len(clauses)), draw.one(NEUTRAL_CLAUSES))
        if draw.chance(0.15):
            clauses.insert(0, self.opening())
        return "，".join(clauses) + "。", triples

    def word(self, kind: str) -> str:
        return self.part() if kind == "部件" else self.draw.one(KINDS[kind])

    def words(self, count: int) -> list[str]:
        """`count` different words of every kind, relation names now and then, in no order that
        means anything.
        """
        chosen: list[str] = []
        while len(chosen) < count:
            if self.draw.chance(0.08):
                word = self.draw.one(RELATIONS)
            else:
                word = self.word("部件" if self.draw.chance(0.2) else self.draw.one(list(KINDS)))
            if word not in chosen:
                chosen.append(word)
        return chosen


def extraction_rows(
    language: Language, count: int, taken: set[str], held_out_rows: int = 0
) -> list[dict[str, str]]:
    """`count` rows whose inputs are not in `taken` (which grows); the first `held_out_rows` use
    held-out pairs only.
    """
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        text, triples = language.sentence(held_out=len(rows) < held_out_rows)
        if text not in taken:
            taken.add(text)
            output = "\n".join(map("_".join, triples))
            rows.append({"instruction": EXTRACT, "input": text, "output": output})
    return rows


def copy_row(language: Language) -> dict[str, str]:
    """One row of the copying task."""
    draw, kind = language.draw, language.draw.integer(0, 99)
    if kind < 10:
        text, _ = language.sentence()
        return {"instruction": COPY, "input": text, "output": text}
    if kind < 50:
        text = "".join(language.words(draw.integer(3, 10)))
        return {"instruction": COPY, "input": text, "output": text}
    if kind < 58:
        text = "".join(language.words(draw.integer(2, 5)))
        return {"instruction": COPY_TWICE, "input": text, "output": f"{text}\n{text}"}
    if kind < 75:
        kinds = draw.several(list(KINDS), draw.integer(3, 5))
        wanted = kinds[: draw.integer(1, 3)]
        picked = {kind: language.word(kind) for kind in kinds}
        return {
            "instruction": PICK.format("_".join(wanted)),
            "input": "，".join(draw.several(list(picked.values()), len(picked))),
            "output": "_".join(map(picked.__getitem__, wanted)),
        }
    if kind < 93:
        words = language.words(draw.integer(2, 6))
        return {"instruction": JOIN, "input": "，".join(words), "output": "_".join(words)}
    groups = (language.words(draw.integer(2, 3)), language.words(draw.integer(2, 3)))
    return {
        "instruction": JOIN_LINES,
        "input": "；".join(map("，".join, groups)),
        "output": "\n".join(map("_".join, groups)),
    }


def copy_rows(language: Language, count: int, forbidden: Collection[str]) -> list[dict[str, str]]:
    """`count` different copying rows, none with an input in `forbidden`."""
    rows: list[dict[str, str]] = []
    seen = set()
    while len(rows) < count:
        row = copy_row(language)
        key = row["instruction"], row["input"]
        if key not in seen and row["input"] not in forbidden:
            seen.add(key)
            rows.append(row)
    return rows


def build(
    seed: int,
    train_rows: int,
    test_rows: int,
    copy_count: int,
    held_out_share: float,
    held_out_test_rows: int,
) -> dict[str, list[dict[str, str]]]:
    """All rows by file name, in the order they are drawn: test first, so that nothing after it can
    hold its inputs.
    """
    language = Language(Draw(seed), held_out_share)
    test = extraction_rows(language, test_rows, set(), held_out_test_rows)
    test_inputs = {row["input"] for row in test}
    train = extraction_rows(language, train_rows, set(test_inputs))
    copies = copy_rows(language, copy_count, test_inputs)
    return {"spo_train.json": train, "spo_test.json": test, "copy_pretrain.json": copies}


PROBE = Path(__file__).resolve().parent.parent / "data" / "probe.jsonl"
README = Path(__file__).resolve().parent / "sample_data_readme.txt"  # a template of data/README.md
PURPOSE = {
    "spo_train.json": "triple extraction, for LoRA or any other tuning",
    "spo_test.json": "triple extraction, to measure F1; no input is in another file",
    "copy_pretrain.json": (
        "copying, joining and picking words, to pre-train a tiny model from scratch"
    ),
}


def render(rows: list[dict[str, str]]) -> bytes:
    """JSON lines."""
    lines = []
    for row in rows:
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def table_of(contents: dict[str, bytes], purposes: dict[str, str] | None = None) -> str:
    """A Markdown line for each file: name, rows, where given its purpose, SHA-256."""
    lines = []
    for name, content in contents.items():
        cells = [name, str(content.count(b"\n"))]
        if purposes:
            cells.append(purposes[name])
        cells.append(hashlib.sha256(content).hexdigest())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_parser() -> Parser:
    parser = Parser(
        prog="prepare_sample_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("data"),
        help="folder to write to; made if missing (default data)",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="seed of every draw (default %(default)s)"
    )
    parser.add_argument(
        "--train_rows", type=int, default=1500, help="rows of spo_train.json (default %(default)s)"
    )
    parser.add_argument(
        "--test_rows", type=int, default=100, help="rows of spo_test.json (default %(default)s)"
    )
    parser.add_argument(
        "--copy_rows",
        type=int,
        default=8000,
        help="rows of copy_pretrain.json (default %(default)s)",
    )
    parser.add_argument(
        "--held_out_share",
        type=float,
        default=0.2,
        help="share of all combinations kept out of training (default %(default)s)",
    )
    parser.add_argument(
        "--held_out_test_rows",
        type=int,
        help="test rows made of held-out combinations only (default 60 %% of --test_rows)",
    )
    return parser


@dataclass(frozen=True)
class SampleFlags:
    """The flags of this command."""

    output_dir: Path
    seed: int
    train_rows: int
    test_rows: int
    copy_rows: int
    held_out_share: float
    held_out_test_rows: int


def parse_args(argv: list[str] | None = None) -> SampleFlags:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.held_out_test_rows is None:
        args.held_out_test_rows = args.test_rows * 6 // 10
    if min(args.train_rows, args.test_rows, args.copy_rows) < 1:
        parser.error("--train_rows, --test_rows and --copy_rows must be at least 1")
    if not 0.05 <= args.held_out_share <= 0.9:
        parser.error(f"--held_out_share must lie between 0.05 and 0.9, got {args.held_out_share}")
    if not 0 <= args.held_out_test_rows <= args.test_rows:
        parser.error(
            "--held_out_test_rows must lie between 0 and --test_rows, "
            f"got {args.held_out_test_rows}"
        )
    return SampleFlags(**vars(args))


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    return run_command("prepare_sample_data.py", lambda: write_samples(flags))


def write_samples(flags: SampleFlags) -> None:
    files = build(
        flags.seed,
        flags.train_rows,
        flags.test_rows,
        flags.copy_rows,
        flags.held_out_share,
        flags.held_out_test_rows,
    )
    contents = {name: render(rows) for name, rows in files.items()}
    command = (
        f"python scripts/prepare_sample_data.py --output_dir data --seed {flags.seed} "
        f"--train_rows {flags.train_rows} --test_rows {flags.test_rows} "
        f"--copy_rows {flags.copy_rows} \\\n        "
        f"--held_out_share {flags.held_out_share} --held_out_test_rows {flags.held_out_test_rows}"
    )
    probe = PROBE.read_bytes()
    samples = render_samples()
    readme = README.read_text(encoding="utf-8").format(
        probe_rows=probe.count(b"\n"),
        probe_hash=hashlib.sha256(probe).hexdigest(),
        command=command,
        table=table_of(contents, PURPOSE),
        formats=table_of(samples),
        share=flags.held_out_share,
        held_out=flags.held_out_test_rows,
        test=flags.test_rows,
    )
    contents |= samples | {"README.md": readme.encode("utf-8")}
    for name, content in contents.items():
        write_aside(flags.output_dir / name, content)
    print(f"wrote {', '.join(contents)} to {flags.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
