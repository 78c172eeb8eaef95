"""CORPORA: the six Chinese corpora of RLHF (sunzeyeah) as prompts with graded answers.

A row that is made is {prompt, answers: [{answer, score}, ...], prefix}, the format `scored` of
train.py, from which --task reward and dpo make pairs. Recipes of RLHF's data_prepare.py, whose
loops over couplets and classical texts failed. Free of torch.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import Any

from chatglm.files import shorten
from finetune.rows.formats import BadRow
from finetune.rows.sources import find_files, read_file_items, read_lines

FLAG = "--input"
TRIES = 64  # draws for a text that differs; then the row has one answer less
Graded = dict[str, Any]
Fields = dict[str, str]


@dataclass(frozen=True)
class CorpusRow:
    """A row of a corpus; `place` is "file:line" for messages."""

    place: str
    value: dict[str, Any]

    def text(self, *keys: str, needed: bool = True) -> str:
        """The text at the first of `keys` that is there, without white space at its ends.

        Raises:
            BadRow: there is none, or it is no text.
        """
        for key in keys:
            value = self.value.get(key)
            if value is None:
                continue
            if not isinstance(value, str):
                raise BadRow(f'{self.place}: "{key}" must be text, got {type(value).__name__}')
            if value.strip() or not needed:
                return value.strip()
        if needed:
            raise BadRow(f'{self.place}: wanted text at "{keys[0]}", got {", ".join(self.value)}')
        return ""

    def number(self, *keys: str) -> float:
        """The finite number at the first of `keys` that is there, also as text; raises BadRow."""
        for key in keys:
            value = self.value.get(key)
            if value is None or isinstance(value, bool):
                continue
            try:
                found = float(value)
            except (TypeError, ValueError, OverflowError):
                found = nan
            if not isfinite(found):
                raise BadRow(f'{self.place}: "{key}" must be a number, got {shorten(value)}')
            return found
        raise BadRow(f'{self.place}: wanted a number at "{keys[0]}"')


def graded(prompt: str, prefix: str, answers: Sequence[tuple[str, float]]) -> Graded:
    """A row of the format `scored`, its answers from the best to the worst."""
    ordered = sorted(answers, key=lambda answer: -answer[1])
    listed = []
    for text, score in ordered:
        listed.append({"answer": text, "score": int(score) if score == int(score) else score})
    return {"prompt": prompt, "answers": listed, "prefix": prefix}


@dataclass
class Draws:
    """Draws other texts than those that are `taken`, each once.

    Attributes:
        texts: of every row.
    """

    rng: random.Random
    texts: Sequence[str]
    taken: set[str]

    def texts_of(
        self, pool: Sequence[int], count: int, fits: Callable[[int], bool] = lambda number: True
    ) -> list[str]:
        """At most `count` texts of rows of the pool that fit, as far as TRIES draws find them."""
        found: list[str] = []
        for _ in range(TRIES if pool else 0):
            if len(found) == count:
                break
            number = self.rng.choice(pool)
            text = self.texts[number]
            if text not in self.taken and fits(number):
                self.taken.add(text)
                found.append(text)
        return found


def differs(keys: Sequence[Any], own: object, number: int) -> bool:
    """Whether a row's key is another than `own`."""
    return bool(keys[number] != own)


def scored(texts: Sequence[str], score: float) -> list[tuple[str, float]]:
    """(text, score) of each."""
    return [(text, score) for text in texts]


def row_rng(seed: int, number: int) -> random.Random:
    """The random numbers of a row: they depend on nothing but the seed and its number."""
    return random.Random(f"{seed} {number}")


# ---- reading


def json_rows(path: Path) -> Iterator[CorpusRow]:
    """The rows of JSON, CSV or Parquet files; raises BadRow, with the place, for one that is no
    object."""
    for file in find_files(str(path), FLAG):
        for place, value in read_file_items(file):
            if isinstance(value, BadRow):
                raise value
            if not isinstance(value, dict):
                raise BadRow(f"{place}: wanted an object, got {type(value).__name__}")
            yield CorpusRow(place, value)


def text_lines_of(path: Path) -> list[str]:
    """The lines of a UTF-8 file; raises BadRow."""
    lines = []
    for number, line in read_lines(path):
        try:
            lines.append(line.decode("utf-8").strip())
        except UnicodeDecodeError:
            raise BadRow(f"{path}:{number}: not UTF-8; save it as UTF-8") from None
    return lines


def line_pairs(first: Path, second: Path) -> Iterator[tuple[str, str, str]]:
    """(place, line, line) of two files whose lines belong together; blank ones are left out.

    Raises:
        BadRow: one has more lines than the other.
    """
    ours, theirs = text_lines_of(first), text_lines_of(second)
    if len(ours) != len(theirs):
        raise BadRow(
            f"{second}:{min(len(ours), len(theirs)) + 1}: {len(theirs)} lines, "
            f"and {first.name} beside it has {len(ours)}"
        )
    for number, (one, other) in enumerate(zip(ours, theirs), 1):
        if one and other:
            yield f"{first}:{number}", one, other


def couplet_rows(path: Path) -> Iterator[CorpusRow]:
    """Folders with in.txt and out.txt, words divided by spaces, or rows {first, second}."""
    folders = sorted(path.rglob("in.txt")) if path.is_dir() else []
    if not folders:
        yield from json_rows(path)
        return
    for first in folders:
        for place, one, other in line_pairs(first, first.with_name("out.txt")):
            yield CorpusRow(
                place, {"first": "".join(one.split()), "second": "".join(other.split())}
            )


def classical_rows(path: Path) -> Iterator[CorpusRow]:
    """BOOK/.../source.txt (classical) with target.txt, or rows {classical, modern, book}."""
    folders = sorted(path.rglob("source.txt")) if path.is_dir() else []
    if not folders:
        yield from json_rows(path)
        return
    for source in folders:
        below = source.relative_to(path).parts
        book = below[0] if len(below) > 1 else path.name
        for place, one, other in line_pairs(source, source.with_name("target.txt")):
            yield CorpusRow(place, {"classical": one, "modern": other, "book": book})


# ---- the six


def weibo(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{article, abstract, comments}: comments with their likes as scores, more of them first, of
    equal ones the longer."""
    for row in rows:
        article, abstract = row.text("article"), row.text("abstract", "summary")
        found: dict[str, float] = {}
        for text, likes in comments_of(row):
            found[text] = max(likes, found.get(text, likes))
        answers = sorted(found.items(), key=lambda each: (each[1], len(each[0])), reverse=True)
        prompt = f"新闻内容：{without_spaces(article)}摘要：{without_spaces(abstract)}"
        if answers:
            yield graded(prompt, "评论：", answers)


def without_spaces(text: str) -> str:
    return "".join(text.split())


def comments_of(row: CorpusRow) -> Iterator[tuple[str, float]]:
    """(text, likes) of a weibo row's comments: objects, or pairs of text and number."""
    comments = row.value.get("comments")
    if not isinstance(comments, list):
        raise BadRow(f'{row.place}: "comments" must be a list')
    for comment in comments:
        if isinstance(comment, list) and len(comment) == 2:
            comment = {"text": comment[0], "likes": comment[1]}
        if not isinstance(comment, dict):
            raise BadRow(f"{row.place}: a comment is {{text, likes}} or [text, likes]")
        inner = CorpusRow(row.place, comment)
        if text := inner.text("text", "comment", "content", needed=False):
            yield text, inner.number("likes", "like", "score")


def couplets(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{first, second}: the second half 1, two others of its length 0, two of other lengths -1."""
    seconds = [row.text("second") for row in rows]
    lengths = list(map(len, seconds))
    by_length = numbers_by_key(lengths)
    everything = range(len(seconds))
    for number, row in enumerate(rows):
        own = seconds[number]
        draws = Draws(row_rng(seed, number), seconds, {own})
        length = lengths[number]
        same = draws.texts_of(by_length[length], 2)
        other = draws.texts_of(everything, 2, partial(differs, lengths, length))
        answers = [(own, 1.0), *scored(same, 0.0), *scored(other, -1.0)]
        yield graded(f"上联：{row.text('first')}", "下联：", answers)


def numbers_by_key(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """{key: the numbers of what has it}."""
    found: dict[Any, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        found[key].append(number)
    return found


def zhidao(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{title, question, reply, is_best}, a row a reply; a question's replies, scored is_best."""
    questions: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = row.text("title"), row.text("question", needed=False)
        replies = questions.setdefault(key, {})
        if reply := row.text("reply", needed=False):
            is_best = row.number("is_best")
            replies[reply] = max(is_best, replies.get(reply, is_best))
    for (title, question), replies in questions.items():
        more = f" 内容：{question}" if question and question != title else ""
        if replies:
            yield graded(f"问题：{title}{more}", "答：", list(replies.items()))


def classical(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{classical, modern, book}, in a drawn direction: the translation 1, two of the same book 0,
    two of other books -1."""
    names = {"classical": "古文", "modern": "现代文"}
    texts = {key: [row.text(key) for row in rows] for key in names}
    books = [row.text("book", needed=False) for row in rows]
    by_book = numbers_by_key(books)
    everything = range(len(rows))
    for number in everything:
        rng = row_rng(seed, number)
        asked, wanted = rng.sample(("classical", "modern"), 2)
        own, book = texts[wanted][number], books[number]
        draws = Draws(rng, texts[wanted], {own})
        near = draws.texts_of(by_book[book], 2)
        far = draws.texts_of(everything, 2, partial(differs, books, book))
        answers = [(own, 1.0), *scored(near, 0.0), *scored(far, -1.0)]
        yield graded(f"{names[asked]}：{texts[asked][number]}", f"{names[wanted]}：", answers)


PROSE = ("文", "赋", "论", "记", "序", "铭")  # genres that are counted as 篇; others as 首


def poetry(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{author, title or rhythmic, paragraphs or content, genre}: the work 1, another of its author
    0, of its genre by another author -1, of another genre -2."""
    works = [work_of(row) for row in rows]
    texts = [work["text"] for work in works]
    authors = [work["author"] for work in works]
    genres = [work["genre"] for work in works]
    by_author, by_genre = numbers_by_key(authors), numbers_by_key(genres)
    for number, work in enumerate(works):
        author, genre = work["author"], work["genre"]
        draws = Draws(row_rng(seed, number), texts, {work["text"]})
        near = draws.texts_of(by_author[author], 1)
        by_others = partial(differs, authors, author)
        alike = draws.texts_of(by_genre[genre], 1, by_others)
        other = draws.texts_of(range(len(works)), 1, partial(differs, genres, genre))
        answers = [(work["text"], 1.0), *scored(near, 0.0), *scored(alike, -1.0)]
        answers += scored(other, -2.0)
        measure = "篇" if genre.endswith(PROSE) else "首"
        asked = f"以{author}的风格，写一{measure}{genre}，题为{work['title']}"
        yield graded(asked, "", answers)


def work_of(row: CorpusRow) -> Fields:
    """Author, title, genre and text of a poem; a list of lines is joined."""
    lines = row.value.get("paragraphs")
    if isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines):
        row = CorpusRow(row.place, row.value | {"paragraphs": "\n".join(lines)})
    genre = row.text("genre", needed=False)
    return {
        "author": row.text("author"),
        "title": row.text("title", "rhythmic"),
        "genre": genre or ("词" if "rhythmic" in row.value else "诗"),
        "text": row.text("paragraphs", "content"),
    }


def baike(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{title, desc, answer}: the longer of title and desc is asked; the answer's score is 1."""
    for row in rows:
        title, desc = row.text("title"), row.text("desc", needed=False)
        if answer := row.text("answer", needed=False):
            yield graded(max(title, desc, key=len), "答：", [(answer, 1.0)])


@dataclass(frozen=True)
class Corpus:
    """One corpus.

    Attributes:
        read: a path's rows.
        make: (rows, seed) -> rows with graded answers; raises BadRow.
    """

    text: str
    read: Callable[[Path], Iterator[CorpusRow]]
    make: Callable[[Sequence[CorpusRow], int], Iterator[Graded]]


CORPORA = {
    "weibo": Corpus("news and comments, by likes", json_rows, weibo),
    "couplets": Corpus("couplets: in.txt and out.txt", couplet_rows, couplets),
    "zhidao": Corpus("questions and replies, one the best", json_rows, zhidao),
    "classical": Corpus("classical and modern Chinese, by book", classical_rows, classical),
    "poetry": Corpus("poems, by author and genre", json_rows, poetry),
    "baike": Corpus("questions and answers", json_rows, baike),
}
