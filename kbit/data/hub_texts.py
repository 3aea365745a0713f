"""The texts of the quantization papers on the hub: WikiText-2, C4 and the Pile's Common Crawl part."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class HubText:
    """Where a text is and how its rows make documents.

    Attributes:
        dataset, config, data_files, split: the arguments of datasets.load_dataset.
        keep: whether a row belongs to the text.
        joined: whether rows are lines of one document, joined by blank lines (GPTQ's WikiText-2), or documents.
    """

    dataset: str
    config: str | None
    data_files: str | None
    split: str
    keep: Callable[[dict[str, Any]], bool] = lambda row: True
    joined: bool = False


HUB_TEXTS: Final = {
    # GPTQ's text (Frantar et al. 2023, github.com/IST-DASLab/gptq, datautils.py, get_wikitext2): all rows of the raw
    # test split, joined by blank lines. kbit puts one end-of-text token before the text, GPTQ what the tokenizer adds.
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", joined=True),
    # The file of GPTQ's C4, the first shard of the validation split, but not GPTQ's windows. GPTQ takes the first 256
    # windows of 1,100 documents joined by spaces (get_c4_new), or 256 windows at random places of long documents
    # (get_c4). Here documents follow each other, each after an end-of-text token. The text compares variants, but its
    # values do not compare with published ones.
    "c4": HubText("allenai/c4", None, "en/c4-validation.00000-of-00008.json.gz", "train"),
    # GPTQ calibrates on these: the training split, and the first documents of the first training shard.
    "wikitext2_train": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", joined=True),
    "c4_train": HubText("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz", "train[:20000]"),
    # Dettmers & Zettlemoyer measure cross entropy on The Pile Common Crawl. The Pile's own page is gone.
    "pile_cc": HubText(
        "monology/pile-uncopyrighted",
        None,
        "test.jsonl.zst",
        "train",
        keep=lambda row: bool(row["meta"]["pile_set_name"] == "Pile-CC"),
    ),
}


@functools.lru_cache(maxsize=1)
def load_hub_text(name: str) -> tuple[str, ...]:
    """Return the documents of one of HUB_TEXTS, from the hub or from the local cache of `datasets`.

    Raises:
        FileNotFoundError: the text is neither reachable nor in the cache.
    """
    import datasets  # here, as it takes a second that local texts do without

    text = HUB_TEXTS[name]
    try:
        rows = datasets.load_dataset(text.dataset, text.config, data_files=text.data_files, split=text.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # offline, any of these is raised
        offline = " (HF_HUB_OFFLINE=1 is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise FileNotFoundError(
            f"text {name!r} is the data set {text.dataset} of the hub, which cannot be loaded{offline}: {error}"
        ) from error
    documents = [row["text"] for row in rows if text.keep(row)]
    return ("\n\n".join(documents),) if text.joined else tuple(documents)
