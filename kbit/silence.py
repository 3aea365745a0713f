"""Keeps the libraries' progress bars and notices out of kbit's own output. Their errors still show."""

from __future__ import annotations

import logging
import warnings


def silence_libraries() -> None:
    """Silence transformers, datasets and lm-eval in this process: their progress bars and notices, not their errors.

    The progress bar of lm-eval has no switch (see kbit.data.lm_eval_private.hide_progress).
    """
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|datasets|lm_eval")
