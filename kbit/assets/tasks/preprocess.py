"""Prompts that are too long for Jinja; the task YAMLs beside this file name these functions.

Standard library only: lm-eval loads this file by its path, outside any package.
"""

from __future__ import annotations

import re
from typing import Any

Doc = dict[str, Any]


def swap_gold(doc: Doc) -> int:
    """Index of the right word: answer "1" -> 0, "2" -> 1 (lm-eval reads it where other tasks have their text)."""
    return {"1": 0, "2": 1}[doc["answer"]]


def swap_contexts(doc: Doc) -> list[str]:
    """The text before the blank, followed by either word."""
    before = doc["sentence"].partition("_")[0]
    return [before + doc["option1"], before + doc["option2"]]


def swap_continuation(doc: Doc) -> str:
    """The text after the blank, which is what gets scored."""
    after: str = doc["sentence"].partition("_")[2]
    return after.strip()


def hellaswag_context(doc: Doc) -> str:
    """Activity, then the context with its second part capitalised."""
    return clean_hellaswag(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")


def hellaswag_endings(doc: Doc) -> list[str]:
    """The four endings, cleaned."""
    return [clean_hellaswag(ending) for ending in doc["endings"]]


def clean_hellaswag(text: str) -> str:
    """Remove WikiHow's bracketed marks: " [title]" ends a sentence, any other goes away."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
