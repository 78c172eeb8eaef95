"""Scores of written answers, for the task files beside this one.

The harness imports it as `answers`, by `!function answers.extraction_scores`; it imports nothing of
this project.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Written Chinese as single characters: the unified ideographs.
FIRST_IDEOGRAPH, LAST_IDEOGRAPH = "\u4e00", "\u9fff"


def answer_parts(text: str) -> list[str]:
    """What CMRC 2018 counts of an answer: Chinese characters, and runs of all else.

    Punctuation, white space and letter case do not count.
    """
    parts: list[str] = []
    run = ""
    for character in unicodedata.normalize("NFKC", text).lower():
        is_ideograph = FIRST_IDEOGRAPH <= character <= LAST_IDEOGRAPH
        is_between = character.isspace() or unicodedata.category(character)[0] in "PS"
        if not (is_ideograph or is_between):
            run += character
            continue
        if run:
            parts.append(run)
            run = ""
        if is_ideograph:
            parts.append(character)
    return parts + [run] if run else parts


def longest_common_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest run of parts that both have, without gaps."""
    longest = 0
    before = [0] * (len(b) + 1)
    for part in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if part == other else 0)
        longest = max(longest, max(row))
        before = row
    return longest


def extraction_f1(answer: str, reference: str) -> float:
    """CMRC 2018's F1: of the longest common run, as a share of either text's parts."""
    found, wanted = answer_parts(answer), answer_parts(reference)
    common = longest_common_run(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def extraction_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """{"exact_match", "f1"} of a written answer, the best over the row's `answers`."""
    answer = results[0]
    matches, overlaps = [], []
    for reference in doc["answers"]:
        matches.append(float(answer_parts(answer) == answer_parts(reference)))
        overlaps.append(extraction_f1(answer, reference))
    return {"exact_match": max(matches), "f1": max(overlaps)}
