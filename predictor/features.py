"""A prompt's features without a transformer: hashed n-grams, and counts and cues. numpy only.

One pass over the characters of a whole batch: characters are classified, a word begins where the
class changes, and every word and n-gram is hashed by a polynomial in wrapping 64-bit arithmetic. A
single Chinese character is a word, so that pairs of them are bigrams and no segmenter is needed.
"""

import re
import unicodedata
from functools import cache, cached_property
from math import log1p

import numpy as np

from finetune.rows.near_duplicates import BASE, finalise

# Characters read of a longer prompt, at its beginning and its end, where instructions stand.
HEAD, TAIL = 1400, 600

# A text's grams of a kind weigh KINDS[kind] / sqrt(their number) together.
KINDS = {"word": 1.0, "bigram": 0.7, "prefix": 0.5, "inside": 0.4, "first": 0.7, "last": 0.4}
PREFIX, INSIDE, FIRST, LAST = 5, 4, 4, 3  # characters, characters, words, words

# Words whose presence, anywhere and among the first 8 words, is a feature each. Two Chinese
# characters are a bigram.
CUES = {
    "list": "list lists bullet bullets enumerate items 列出 列举 清单 罗列",
    "explain": "explain describe discuss detail detailed elaborate analyze analyse analysis "
    "explanation thorough comprehensive 解释 说明 描述 详细 分析 阐述 讨论 论述",
    "write": "write compose create generate draft produce develop design structure "
    "写 撰写 创作 生成 编写 设计 起草 制作",
    "summary": "summarize summarise summary tldr shorten condense headline title caption slogan "
    "tagline 总结 概括 摘要 标题 口号 缩写",
    "rewrite": "translate translation convert rewrite rephrase paraphrase reword edit correct "
    "grammar fix replace 翻译 改写 转换 改成 重写 纠正 修改 替换",
    "classify": "classify categorize identify determine decide detect whether sentiment label "
    "choose select pick match true false 分类 判断 识别 确定 选择 是否 情感 哪个",
    "story": "story tale novel narrative backstory scene chapter fiction plot screenplay script "
    "dialogue monologue episode 故事 小说 剧本 对话 童话",
    "poem": "poem song lyrics verse haiku rap limerick sonnet rhyme joke pun "
    "诗 诗歌 歌词 笑话 对联 绝句",
    "essay": "essay article blog report paper speech proposal letter email post review section "
    "outline curriculum itinerary plan presentation guide tutorial "
    "文章 论文 作文 报告 演讲 邮件 信 博客 计划 方案 大纲 攻略 指南",
    "recipe": "recipe cook bake dish ingredients cake meal 食谱 菜 做法 烹饪",
    "code": "code python java javascript function sql html css algorithm class implement api regex "
    "bash array program 代码 程序 函数 算法 编程 脚本 实现",
    "maths": "calculate compute sum solve equation probability average multiply divided area "
    "percent 计算 求 方程 概率 多少",
    "brief": "short brief briefly concise concisely single word quick simple simply only just "
    "简短 简要 简洁 仅 只",
    "long": "long in-depth complete full every each step steps thoroughly extensive "
    "完整 全面 步骤 每个 深入 长",
    "what": "what whats 什么 哪些 啥",
    "how": "how 如何 怎么 怎样",
    "why": "why 为何 原因",
    "who": "who when where which whose whom name 谁 哪里 哪年 何时 地点",
    "many": "ways tips ideas examples reasons benefits advantages disadvantages pros cons options "
    "strategies suggestions differences types kinds methods "
    "方法 建议 例子 理由 好处 优点 缺点 区别 种类 措施 特点",
    "best": "best good better recommend suggest advice should could would 推荐 最好 应该 可以",
    "compare": "compare contrast difference between relationship impact role history effect "
    "importance 比较 关系 影响 历史 作用",
    "given": "given following below above this provided input text sentence passage paragraph "
    "给定 以下 下面 上述 这段 句子 段落",
    "persona": "imagine pretend act persona suppose scenario 想象 假设 扮演 假如 如果",
    "me": "me i my 我",
    "you": "you your 你 您",
    "others": "he she they his her their it its 他 她",
    "yes_no": "is are was were do does did can will has have am 吗",
}
OPENING_TEXT = (
    "what how why who when where which is are do does did can could give write explain list name "
    "describe create generate make tell find i you the a if provide suggest design rewrite come "
    "identify classify translate imagine please in for hi"
)
OPENING_WORDS = OPENING_TEXT.split()
EARLY = 8  # words
ONE_TO_TEN = "one two three four five six seven eight nine ten"
ENGLISH = {word: n for n, word in enumerate(ONE_TO_TEN.split(), 1)} | {"twenty": 20}
CHINESE = {word: n for n, word in enumerate("一二三四五六七八九十", 1)} | {"两": 2}
NUMBERS = ENGLISH | CHINESE
UNITS = {
    "words": "words?|characters?|字",
    "lines": "sentences?|lines?|verses?|句话?|行",
    "paragraphs": "paragraphs?|stanzas?|pages?|段|页|篇",
    "items": "examples?|ways|things|tips|ideas|items|reasons|steps|questions|names|points|bullets?|"
    "topics|facts|options|days?|个|点|条|种|首",
}
# A number and its unit, as in "3 short poems". The number is not inside a longer word or number;
# Chinese has no spaces around it, and 一个 is an article.
ASKED = re.compile(
    rf"(?<![a-z\d_.{''.join(CHINESE)}百千万零])"
    rf"(\d{{1,5}}(?!\d)|(?:{'|'.join(ENGLISH)})(?![a-z])|[{''.join(CHINESE)}](?<!一(?=[个篇])))"
    r"[\s\-+]*(?:[a-z]\w* )?"
    r"(?:" + "|".join(f"(?P<{k}>{v})" for k, v in UNITS.items()) + ")"
)
DIGITS, CAPITALS = re.compile(r"\d"), re.compile("[A-Z]")
PHRASES = {
    "one_sentence": re.compile("one sentence|a sentence|one word|single|一句"),
    "step_by_step": re.compile("step by step|step-by-step|一步"),
    "passage": re.compile("the given|the following|下面的|以下"),
}
COUNTS = (
    "log words",
    "log characters",
    "log all characters",
    "log lines",
    "log rest",
    "has rest",
    "question marks",
    "ends in question",
    "full stops",
    "commas",
    "quotes",
    "code marks",
    "colon",
    "chinese share",
    "mean word",
    "words <= 6",
    "words <= 12",
    "words > 60",
    "digits",
    "capitals",
)
CUE_FEATURE_NAMES = (
    [f"cue {name}" for name in CUES]
    + [f"early {name}" for name in CUES]
    + [f"opens {word}" for word in OPENING_WORDS]
    + list(COUNTS)
    + [f"asks {name}" for name in UNITS]
    + list(PHRASES)
)
NUM_CUE_FEATURES = len(CUE_FEATURE_NAMES)

LETTER, DIGIT, SINGLE = 1, 2, 3  # classes of characters; 0: between words
# One for each kind: odd multiples of one number, modulo 2^64.
SALTS = np.uint64(0x1F83D9ABFB41BD6B) * np.arange(1, 2 * len(KINDS), 2, dtype=np.uint64)
KIND_WEIGHTS = np.array(list(KINDS.values()))


@cache
def character_tables() -> tuple[np.ndarray, np.ndarray]:
    """(class of each character below 0x30000, powers of the base)."""
    classes = np.zeros(0x30000, np.uint8)
    for code in range(0x3000):
        character = chr(code)
        if character.isalpha() or character == "'":
            classes[code] = LETTER
        elif unicodedata.category(character) == "Nd":
            classes[code] = DIGIT
    singles = (
        (0x3040, 0x3100),
        (0x3400, 0xA000),
        (0xAC00, 0xD7A4),
        (0xF900, 0xFB00),
        (0x20000, 0x30000),
    )
    for first, last in singles:
        classes[first:last] = SINGLE
    powers = np.full(HEAD + TAIL + 4, BASE, np.uint64)
    powers[0] = 1
    return classes, np.multiply.accumulate(powers)


@cache
def cue_tables() -> tuple[tuple[np.ndarray, np.ndarray], dict[int, int]]:
    """The hashes of CUES and OPENING_WORDS.

    ((hashes of words and bigrams ascending, number of the cue), {hash of an opener: its number}).
    """
    cues: list[str] = []
    owners: list[int] = []
    for i, words in enumerate(CUES.values()):
        cues += words.split()
        owners += [i] * len(words.split())
    hashes, texts = cue_hashes(cues)
    numbers = np.array(owners)[texts]
    order = np.lexsort((numbers, hashes))
    openers = {int(h): i for i, h in enumerate(cue_hashes(OPENING_WORDS)[0])}
    return (hashes[order], numbers[order]), openers


def cue_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, numbers of texts): of a text of one word its hash, of a longer one its pairs'."""
    grams = TextGrams(texts)
    single = grams.word_counts[grams.text_of] == 1
    pairs, first = grams.pairs
    hashes = np.concatenate([grams.words[single], pairs])
    owners = np.concatenate([grams.text_of[single], grams.text_of[first]])
    order = owners.argsort(kind="stable")
    return hashes[order], owners[order]


def clip(text: str) -> str:
    """The first HEAD and the last TAIL characters of a text that is longer than both."""
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]}\n{text[-TAIL:]}"


class TextGrams:
    """The words of a batch of texts and their hashes; n-grams and features derive from them.

    Attributes:
        words: (W,) uint64 hashes; text_of: (W,) number of each word's text; place: (W,) place in
            that text; starts: (W,) first character in `codes`.
        codes, kinds: all characters in lower case, a zero after each text, and their classes.
    """

    def __init__(self, texts: list[str]):
        self.texts = texts
        self.raw = [clip(text) for text in texts]
        self.lower = [text.lower() for text in self.raw]
        joined = "\0".join([*self.lower, ""])
        self.codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        self.kinds = character_tables()[0][np.minimum(self.codes, 0x2FFFF)]
        self._find_words()
        self._number_words()

    def _find_words(self) -> None:
        """Set starts, lengths and hashes of the words, and the values that hashes sum over.

        begins: (W,) where each word's characters begin in `values`, which has those of all words
        end to end.
        """
        codes, kinds, powers = self.codes, self.kinds, character_tables()[1]
        # A word begins where the class changes; a character that is a word by itself always begins
        # one. The last character is a zero.
        border = np.empty(len(kinds) + 1, bool)
        border[0] = border[-1] = True
        np.not_equal(kinds[1:], kinds[:-1], out=border[1:-1])
        border[:-1] |= kinds == SINGLE
        inner = kinds > 0
        self.starts = starts = (border[:-1] & inner).nonzero()[0]
        ends = border[1:]
        ends[:-1] |= kinds[1:] == SINGLE
        self.lengths = lengths = (ends & inner).nonzero()[0] + 1 - starts
        # The characters of words, each times the power of its place in the word.
        self.begins = begins = lengths.cumsum() - lengths
        characters = inner.nonzero()[0]
        within = characters - starts.repeat(lengths)
        self.values = (codes[characters] + np.uint64(1)) * powers[within]
        if len(starts):
            self.words = finalise(np.add.reduceat(self.values, begins))
        else:
            self.words = np.empty(0, np.uint64)

    def _number_words(self) -> None:
        """Set each word's text and its place in that text, and the words of each text."""
        count = len(self.texts)
        self.text_starts = np.array([0, *map(len, self.lower)]).cumsum() + np.arange(count + 1)
        numbers = np.arange(len(self.starts))
        if count == 1:
            self.text_of = np.zeros(len(self.starts), np.int64)
            self.place = numbers
        else:
            self.text_of = self.text_starts.searchsorted(self.starts, side="right") - 1
            first_words = self.text_of.searchsorted(np.arange(count))
            self.place = numbers - first_words[self.text_of]
        self.word_counts = np.bincount(self.text_of, minlength=count)

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(values, numbers of their first words) of neighbouring words of one text."""
        first = (self.text_of[:-1] == self.text_of[1:]).nonzero()[0]
        return self.words[first] * np.uint64(3) + self.words[first + 1], first

    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hashes uint64, numbers of texts, weights float32) of all grams of all kinds."""
        words, texts, place = self.words, self.text_of, self.place
        pairs, first = self.pairs
        long = (self.lengths > PREFIX).nonzero()[0]
        prefix = np.add.reduce(self.values[self.begins[long][:, None] + np.arange(PREFIX)], axis=1)
        early = (place < FIRST).nonzero()[0]
        # Each early word alone, and with the word before it.
        opening = words[early]
        before = words[early - 1] * (place[early] > 0)
        opening_pairs = (opening * np.uint64(3) + before) * np.uint64(7)
        late = (self.word_counts[texts] - place <= LAST).nonzero()[0]
        inside, of_inside = self.inside()
        grams = (  # values and their texts, in the order of KINDS
            (words, texts),
            (pairs, texts[first]),
            (prefix, texts[long]),
            (inside, of_inside),
            (np.concatenate([opening, opening_pairs]), np.concatenate([texts[early]] * 2)),
            (words[late], texts[late]),
        )
        all_values, all_owners = zip(*grams)
        kind = np.arange(len(KINDS)).repeat(list(map(len, all_values)))
        values, owners = np.concatenate(all_values), np.concatenate(all_owners)
        hashes = finalise(values + SALTS[kind])
        cell = owners * len(KINDS) + kind
        counts = np.bincount(cell, minlength=len(self.texts) * len(KINDS))
        shares = KIND_WEIGHTS / np.sqrt(np.maximum(counts, 1).reshape(-1, len(KINDS)))
        return hashes, owners, shares.ravel()[cell].astype(np.float32)

    def inside(self) -> tuple[np.ndarray, np.ndarray]:
        """(values, numbers of their texts) of INSIDE letters in a row."""
        letter = self.kinds == LETTER
        pair = letter[:-1] & letter[1:]
        at = (pair[:-2] & pair[2:]).nonzero()[0]
        windows = self.codes[at[:, None] + np.arange(INSIDE)] + np.uint64(1)
        if len(self.texts) == 1:
            owners = np.zeros(len(at), np.int64)
        else:
            owners = self.text_starts.searchsorted(at, side="right") - 1
        return windows @ character_tables()[1][1 : INSIDE + 1], owners

    def cue_features(self) -> np.ndarray:
        """(N, NUM_CUE_FEATURES): counts and cues in the order of CUE_FEATURE_NAMES."""
        count = len(self.texts)
        features = np.zeros((count, NUM_CUE_FEATURES), np.float32)
        cues, (table, openers) = len(CUES), cue_tables()
        pairs, first = self.pairs
        found, column = look_up(table, np.concatenate([self.words, pairs]))
        row = np.concatenate([np.arange(len(self.words)), first])[found]
        features[self.text_of[row], column] = 1
        early = self.place[row] < EARLY
        features[self.text_of[row[early]], cues + column[early]] = 1
        for i in (self.place == 0).nonzero()[0].tolist():
            opener = openers.get(int(self.words[i]))
            if opener is not None:
                features[self.text_of[i], 2 * cues + opener] = 1
        is_single = self.kinds[self.starts] == SINGLE
        single = np.bincount(self.text_of, is_single, minlength=count).tolist()
        letters = np.bincount(self.text_of, self.lengths, minlength=count).tolist()
        lengths = map(len, self.texts)
        rows = zip(self.raw, self.lower, lengths, self.word_counts.tolist(), single, letters)
        for i, text in enumerate(rows):
            features[i, 2 * cues + len(OPENING_WORDS) :] = counts_of(*text)
        return features


def look_up(
    table: tuple[np.ndarray, np.ndarray], hashes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(places in `hashes`, feature numbers) of the hashes in the table; a hash may have several."""
    keys, numbers = table
    left = keys.searchsorted(hashes)
    known = (keys[np.minimum(left, len(keys) - 1)] == hashes).nonzero()[0]
    left = left[known]
    times = keys.searchsorted(hashes[known], side="right") - left
    row = known.repeat(times)
    nth = np.arange(len(row)) - (times.cumsum() - times).repeat(times)
    return row, numbers[left.repeat(times) + nth]


def counts_of(
    text: str, low: str, whole: int, words: int, single: float, letters: float
) -> list[float]:
    """COUNTS, UNITS and PHRASES of one text; see CUE_FEATURE_NAMES."""
    word_count = words - 0.4 * single  # Chinese words have nearly two characters
    _, _, rest = low.partition("\n")
    values = [
        log1p(word_count),
        log1p(len(low)),
        log1p(whole),
        log1p(low.count("\n")),
        log1p(len(rest)),
        bool(rest.strip()),
        log1p(low.count("?") + low.count("？")),
        low.rstrip().endswith(("?", "？")),
        log1p(low.count(".") + low.count("。")),
        log1p(low.count(",") + low.count("，")),
        '"' in low or "“" in low,
        "`" in low or "{" in low or "()" in low or "</" in low,
        ":" in low or "：" in low,
        single / max(1, letters),
        letters / max(1, word_count),
        0 < word_count <= 6,
        word_count <= 12,
        word_count > 60,
        DIGITS.search(low) is not None,
        CAPITALS.subn("", text[:400])[1] / (min(len(text), 400) + 1),
    ]
    values.extend(asked_amounts(low))
    for phrase in PHRASES.values():
        values.append(phrase.search(low) is not None)
    return values


def asked_amounts(low: str) -> list[float]:
    """log(1 + the largest amount of each of UNITS that a lower-case text asks for), 0 for none."""
    asked = dict.fromkeys(UNITS, 0.0)
    for match in ASKED.finditer(low):
        number, unit = match.group(1), match.lastgroup
        if unit:
            value = NUMBERS.get(number) or int(number)
            asked[unit] = max(asked[unit], log1p(value))
    return list(asked.values())
