"""The training text of the nano models, from a folder of plain texts, and their tokenizer.

Nothing is fetched. The folder holds the files that SOURCES names. Four books are held out: they are the embedded text
`nano_held_out`, and the nano tasks are made from them. All families share the tokenizer and the split, so that their
losses can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kbit.data.texts import read_documents
from kbit.nano.tasks import BOOKS

SOURCES: Final = (
    "gutenberg-children/*.txt",
    "tinystories/*train*.jsonl",
)  # a file is a book, or has a story a line
VOCABULARY: Final = 1024
END_OF_TEXT: Final = "<|endoftext|>"  # id 0: begins every document


def read_training_documents(folder: str | Path) -> list[str]:
    """Return the documents of SOURCES below a folder, sorted by file name, without the held-out books.

    Raises:
        FileNotFoundError: a pattern of SOURCES matches nothing there.
    """
    documents: list[str] = []
    for pattern in SOURCES:
        paths = [path for path in sorted(Path(folder).glob(pattern)) if path.stem not in BOOKS]
        if not paths:
            raise FileNotFoundError(f"no training text {pattern} in {Path(folder).resolve()}")
        documents += [document for path in paths for document in read_documents(str(path))[0]]
    return documents


def train_tokenizer(documents: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Return a byte-level BPE tokenizer that is learned from the documents. As with GPT-2's, any text round-trips.

    The merges depend on the text alone. The training text gives the merges of the shipped tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
