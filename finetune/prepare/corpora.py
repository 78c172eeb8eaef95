"""CORPORA: the six Chinese corpora of RLHF (sunzeyeah) as prompts with graded answers.

A Corpus has a function that reads its files and one that makes rows of them; both are below.

A row that is made is {prompt, answers: [{answer, score}, ...], prefix}, the format `scored` of
train.py, from which --task reward and dpo make pairs. Recipes of RLHF's data_prepare.py, whose
loops over couplets and classical texts failed. Free of torch.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                number = nan
            if not isfinite(number):
                raise BadRow(f'{self.place}: "{key}" must be a number, got {shorten(value)}')
            return number
        raise BadRow(f'{self.place}: wanted a number at "{keys[0]}"')


def graded(prompt: str, prefix: str, answers: Sequence[tuple[str, float]]) -> Graded:
    """A row of the format `scored`, its answers from the best to the worst."""
    ordered = sorted(answers, key=lambda answer: -answer[1])
    graded_answers = []
    for text, score in ordered:
        is_whole = score == int(score)
        graded_answers.append({"answer": text, "score": int(score) if is_whole else score})
    return {"prompt": prompt, "answers": graded_answers, "prefix": prefix}


@dataclass
class TextSampler:
    """Samples texts of other rows, each text once.

    Attributes:
        texts: of every row.
        used: texts that are not sampled: the row's own, then those that were.
    """

    rng: random.Random
    texts: Sequence[str]
    used: set[str]

    def sample(
        self,
        rows: Sequence[int],
        count: int,
        *,
        keys: Sequence[Any] | None = None,
        other_than: object = None,
    ) -> list[str]:
        """At most `count` texts of these rows, as far as TRIES draws find them.

        Args:
            keys: of every row; with them, only rows whose key is `other_than` that.
        """
        sampled: list[str] = []
        if not rows:
            return sampled
        for _ in range(TRIES):
            if len(sampled) == count:
                break
            row = self.rng.choice(rows)
            text = self.texts[row]
            if text in self.used or (keys is not None and keys[row] == other_than):
                continue
            self.used.add(text)
            sampled.append(text)
        return sampled


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
    first_lines, second_lines = text_lines_of(first), text_lines_of(second)
    if len(first_lines) != len(second_lines):
        number = min(len(first_lines), len(second_lines)) + 1
        raise BadRow(
            f"{second}:{number}: {len(second_lines)} lines, "
            f"and {first.name} beside it has {len(first_lines)}"
        )
    for number, (one, other) in enumerate(zip(first_lines, second_lines), 1):
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
        likes_of: dict[str, float] = {}
        for text, likes in comments_of(row):
            likes_of[text] = max(likes, likes_of.get(text, likes))
        answers = sorted(
            likes_of.items(), key=lambda comment: (comment[1], len(comment[0])), reverse=True
        )
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
        fields = CorpusRow(row.place, comment)
        text = fields.text("text", "comment", "content", needed=False)
        if text:
            yield text, fields.number("likes", "like", "score")


def couplets(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{first, second}: the second half 1, two others of its length 0, two of other lengths -1."""
    seconds = [row.text("second") for row in rows]
    lengths = [len(second) for second in seconds]
    rows_of_length = numbers_by_key(lengths)
    all_rows = range(len(seconds))
    for number, row in enumerate(rows):
        second, length = seconds[number], lengths[number]
        sampler = TextSampler(row_rng(seed, number), seconds, {second})
        same_length = sampler.sample(rows_of_length[length], 2)
        other_length = sampler.sample(all_rows, 2, keys=lengths, other_than=length)
        answers = [(second, 1.0), *scored(same_length, 0.0), *scored(other_length, -1.0)]
        yield graded(f"上联：{row.text('first')}", "下联：", answers)


def numbers_by_key(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """{key: the numbers of what has it}."""
    numbers: dict[Any, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        numbers[key].append(number)
    return numbers


def zhidao(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{title, question, reply, is_best}, a row a reply; a question's replies, scored is_best."""
    questions: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = row.text("title"), row.text("question", needed=False)
        replies = questions.setdefault(key, {})
        reply = row.text("reply", needed=False)
        if reply:
            is_best = row.number("is_best")
            replies[reply] = max(is_best, replies.get(reply, is_best))
    for (title, question), replies in questions.items():
        if not replies:
            continue
        prompt = f"问题：{title}"
        if question and question != title:
            prompt += f" 内容：{question}"
        yield graded(prompt, "答：", list(replies.items()))


def classical(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{classical, modern, book}, in a drawn direction: the translation 1, two of the same book 0,
    two of other books -1."""
    names = {"classical": "古文", "modern": "现代文"}
    texts = {key: [row.text(key) for row in rows] for key in names}
    books = [row.text("book", needed=False) for row in rows]
    rows_of_book = numbers_by_key(books)
    all_rows = range(len(rows))
    for number in all_rows:
        rng = row_rng(seed, number)
        source, target = rng.sample(("classical", "modern"), 2)
        translation, book = texts[target][number], books[number]
        sampler = TextSampler(rng, texts[target], {translation})
        same_book = sampler.sample(rows_of_book[book], 2)
        other_book = sampler.sample(all_rows, 2, keys=books, other_than=book)
        answers = [(translation, 1.0), *scored(same_book, 0.0), *scored(other_book, -1.0)]
        prompt = f"{names[source]}：{texts[source][number]}"
        yield graded(prompt, f"{names[target]}：", answers)


PROSE = ("文", "赋", "论", "记", "序", "铭")  # genres that are counted as 篇; others as 首


def poetry(rows: Sequence[CorpusRow], seed: int) -> Iterator[Graded]:
    """{author, title or rhythmic, paragraphs or content, genre}: the work 1, another of its author
    0, of its genre by another author -1, of another genre -2."""
    works = [work_of(row) for row in rows]
    texts = [work["text"] for work in works]
    authors = [work["author"] for work in works]
    genres = [work["genre"] for work in works]
    rows_of_author, rows_of_genre = numbers_by_key(authors), numbers_by_key(genres)
    for number, work in enumerate(works):
        text, author, genre = work["text"], work["author"], work["genre"]
        sampler = TextSampler(row_rng(seed, number), texts, {text})
        same_author = sampler.sample(rows_of_author[author], 1)
        same_genre = sampler.sample(rows_of_genre[genre], 1, keys=authors, other_than=author)
        other_genre = sampler.sample(range(len(works)), 1, keys=genres, other_than=genre)
        answers = [(text, 1.0), *scored(same_author, 0.0), *scored(same_genre, -1.0)]
        answers += scored(other_genre, -2.0)
        measure = "篇" if genre.endswith(PROSE) else "首"
        prompt = f"以{author}的风格，写一{measure}{genre}，题为{work['title']}"
        yield graded(prompt, "", answers)


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
        answer = row.text("answer", needed=False)
        if answer:
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
