"""Keeps the libraries' progress bars and notices out of kbit's own output. Their errors still show."""

from __future__ import annotations

import functools
import logging
import warnings


def silence_libraries() -> None:
    """Silence the progress bars and notices of transformers, datasets and lm-eval in this process, not their errors."""
    import datasets
    import lm_eval.api.task
    import tqdm
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm.tqdm, disable=True)  # this bar has no switch
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|datasets|lm_eval")
