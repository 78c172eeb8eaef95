#!/usr/bin/env python3
"""Write this project's own sample data: a made-up, regular language of car-fault notes.

Three JSON-lines files (keys `instruction`, `input`, `output`) and a README with their hashes:

    spo_train.json, spo_test.json   triple extraction: one line `subject_relation_object` per triple
    copy_pretrain.json              the sibling task, copying: nothing in it is a triple extracted from a sentence

The same options always give the same bytes: every draw goes through `random.Random.random()`, the one method whose
sequence Python keeps fixed across versions, and the held-out pairs are chosen by SHA-256.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from pathlib import Path

EXTRACT = "抽取故障三元组，每行一个："
COPY = "照抄："
COPY_AFTER = "抄写“{}”之后的部分："
JOIN = "把下列词用_连接："
JOIN_LINES = "把下列词用_连接，每组一行："

PART_FAULT, PERFORMANCE_FAULT, COMPOSED_OF, TEST_TOOL = RELATIONS = ("部件故障", "性能故障", "组成", "检测工具")

PARTS = (
    "水泵 发动机 变速器 起动机 发电机 压缩机 节气门 喷油嘴 火花塞 蓄电池 散热器 冷凝器 膨胀阀 节温器 "
    "曲轴 凸轮轴 连杆 活塞 皮带 离合器 传动轴 差速器 转向机 方向盘 制动总泵 稳定杆 "
    "雨刮 喇叭 仪表盘 保险丝 继电器 天窗 鼓风机 排气管 消声器 油箱"
).split()
CORNERS = "左前 右前 左后 右后".split()
CORNER_PARTS = "车门 车窗 轮胎 减震器 刹车片 轮毂".split()
STATES = (
    "损坏 松动 磨损 断裂 异响 变形 老化 卡死 破裂 烧坏 发烫 开裂 脱落 堵塞 进水 锈蚀 接触不良 不工作 漏油 抖动 失灵 打滑"
).split()
QUANTITIES = "水温 油压 怠速 油耗 电压 电流 转速 胎压 制动力 噪音 流量 真空度 电阻 扭矩".split()
LEVELS = "过高 过低 偏高 偏低 不稳 不足 超标 为零 忽高忽低 波动大 下降快".split()
COMPONENTS = "轴承 油封 密封圈 齿轮 弹簧 垫片 线圈 电刷 转子 壳体 叶片 阀芯 螺栓 滤网".split()
ASSEMBLIES = "发动机 变速器 起动机 发电机 压缩机 水泵 节气门 离合器 差速器 转向机 制动总泵 鼓风机".split()
TOOLS = "万用表 示波器 诊断仪 压力表 卡尺 千分尺 测温仪 听诊器 试灯 塞尺 扭力扳手 内窥镜".split()
HEALTHY = "正常 完好 良好".split()
BRANDS = "启程 远山 青禾 云帆".split()
BODIES = "轿车 货车 客车".split()

PART_TEMPLATES = ("{s}{o}", "发现{s}{o}", "{s}已经{o}", "出现{o}的是{s}")
LEVEL_TEMPLATES = ("{s}{o}", "测得{s}{o}", "{s}一直{o}")
COMPOSED_TEMPLATES = ("{s}装在{o}内", "{o}里有{s}", "{s}属于{o}")
TOOL_TEMPLATES = ("用{s}测量{o}", "{o}要用{s}检查", "拿{s}检测{o}")
NEUTRAL_TEMPLATES = ("{p}{h}", "清洗{p}后装回", "更换{p}后试车")


class Draw:
    """Draws that stay the same from one Python version to the next."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def chance(self, probability):
        return self._random.random() < probability

    def integer(self, low, high):
        """A whole number, low <= n <= high."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, items):
        return items[int(self._random.random() * len(items))]

    def several(self, items, count):
        """`count` different items, in drawn order."""
        rest = list(items)
        return [rest.pop(int(self._random.random() * len(rest))) for _ in range(count)]


def is_held_out(relation, subject, obj, share):
    """Whether the pair is kept for the test split; about `share` of all pairs are, whatever the seed."""
    digest = hashlib.sha256(f"{relation}_{subject}_{obj}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


class Language:
    """Sentences with their triples. `held_out` says which pairs a sentence may use: False seen ones, True kept ones."""

    def __init__(self, draw, held_out_share):
        self.draw = draw
        self.held_out_share = held_out_share

    def part(self):
        if self.draw.chance(0.25):
            return self.draw.one(CORNERS) + self.draw.one(CORNER_PARTS)
        return self.draw.one(PARTS)

    def _pair(self, relation, subject, obj, held_out):
        """Draw (subject, object) by the two functions until the pair is on the wanted side of the split."""
        while True:
            pair = subject(), obj()
            if is_held_out(relation, *pair, self.held_out_share) == held_out:
                return pair

    def fact(self, held_out):
        """A clause and its triples, one or two, in the order of the text."""
        draw, kind = self.draw, self.draw.integer(0, 9)
        if kind <= 2:
            relation, templates = PART_FAULT, PART_TEMPLATES
            pair = self._pair(relation, self.part, lambda: draw.one(STATES), held_out)
        elif kind == 3:
            return self._twin(held_out)
        elif kind <= 5:
            relation, templates = PERFORMANCE_FAULT, LEVEL_TEMPLATES
            pair = self._pair(relation, lambda: draw.one(QUANTITIES), lambda: draw.one(LEVELS), held_out)
        elif kind <= 7:
            relation, templates = COMPOSED_OF, COMPOSED_TEMPLATES
            pair = self._pair(relation, lambda: draw.one(COMPONENTS), lambda: draw.one(ASSEMBLIES), held_out)
        else:
            relation, templates = TEST_TOOL, TOOL_TEMPLATES
            pair = self._pair(relation, lambda: draw.one(TOOLS), self._measured, held_out)
        subject, obj = pair
        return draw.one(templates).format(s=subject, o=obj), [(subject, relation, obj)]

    def _measured(self):
        return self.part() if self.draw.chance(0.5) else self.draw.one(QUANTITIES)

    def _twin(self, held_out):
        """Two parts with one fault, or one part with two."""
        part, state = self._pair(PART_FAULT, self.part, lambda: self.draw.one(STATES), held_out)
        while True:
            if self.draw.chance(0.5):
                other = self.part(), state
                text = f"{part}和{other[0]}都{state}"
            else:
                other = part, self.draw.one(STATES)
                text = f"{part}{state}且{other[1]}"
            if other != (part, state) and is_held_out(PART_FAULT, *other, self.held_out_share) == held_out:
                return text, [(part, PART_FAULT, state), (other[0], PART_FAULT, other[1])]

    def neutral(self):
        """A clause that holds no triple."""
        template = self.draw.one(NEUTRAL_TEMPLATES)
        return template.format(p=self.part(), h=self.draw.one(HEALTHY))

    def opening(self):
        """Brand, body, year or mileage: noise in front of a sentence."""
        if self.draw.chance(0.5):
            return f"{self.draw.integer(2010, 2024)}年{self.draw.one(BRANDS)}{self.draw.one(BODIES)}"
        return f"行驶{self.draw.integer(2, 30)}万公里后"

    def sentence(self, held_out=False):
        """(text, triples): one fact, two facts, or a fact and a neutral clause; every triple is in the text's order."""
        text, triples = self.fact(held_out)
        clauses = [text]
        shape = self.draw.integer(0, 9)
        if shape <= 2:
            text, more = self.fact(held_out)
            clauses.append(text)
            triples = triples + [triple for triple in more if triple not in triples]
        elif shape <= 4:
            clauses.append(self.neutral())
        elif shape <= 6:
            clauses.insert(0, self.neutral())
        if self.draw.chance(0.2):
            clauses.insert(0, self.opening())
        return "，".join(clauses) + "。", triples

    def words(self, count):
        """Different words of the language, of every kind, in no order that means anything."""
        kinds = [PARTS, STATES, QUANTITIES, LEVELS, COMPONENTS, TOOLS, RELATIONS]
        chosen = []
        while len(chosen) < count:
            word = self.part() if self.draw.chance(0.2) else self.draw.one(self.draw.one(kinds))
            if word not in chosen:
                chosen.append(word)
        return chosen


def extraction_rows(language, count, taken, held_out_rows=0):
    """`count` rows whose inputs are not in `taken` (which grows); the first `held_out_rows` use held-out pairs only."""
    rows = []
    while len(rows) < count:
        text, triples = language.sentence(held_out=len(rows) < held_out_rows)
        if text not in taken:
            taken.add(text)
            rows.append({"instruction": EXTRACT, "input": text, "output": "\n".join("_".join(t) for t in triples)})
    return rows


def copy_row(language):
    """One row of the copying task."""
    draw, kind = language.draw, language.draw.integer(0, 9)
    if kind <= 1:
        text, _ = language.sentence()
        return {"instruction": COPY, "input": text, "output": text}
    if kind <= 4:
        text = "".join(language.words(draw.integer(2, 6)))
        return {"instruction": COPY, "input": text, "output": text}
    if kind <= 6:
        words = language.words(draw.integer(3, 7))
        at = draw.integer(0, len(words) - 2)
        return {
            "instruction": COPY_AFTER.format(words[at]),
            "input": "".join(words),
            "output": "".join(words[at + 1 :]),
        }
    if kind <= 7:
        words = language.words(draw.integer(2, 4))
        return {"instruction": JOIN, "input": "、".join(words), "output": "_".join(words)}
    groups = [language.words(draw.integer(2, 3)) for _ in range(2)]
    return {
        "instruction": JOIN_LINES,
        "input": "；".join("、".join(group) for group in groups),
        "output": "\n".join("_".join(group) for group in groups),
    }


def copy_rows(language, count, forbidden):
    """`count` different copying rows, none with an input in `forbidden`."""
    rows, seen = [], set()
    while len(rows) < count:
        row = copy_row(language)
        key = row["instruction"], row["input"]
        if key not in seen and row["input"] not in forbidden:
            seen.add(key)
            rows.append(row)
    return rows
