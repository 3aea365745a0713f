"""An evaluation leaves the model and its tokenizer as they were, whatever it measures and whatever it raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kbit.evaluation.zero_shot import evaluate
from kbit.methods.config import QuantConfig
from kbit.methods.quantize_model import quantize_model
from kbit.models.parameters import hash_weights

Build = Callable[..., Any]
GENERATION = """
task: talk
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["!"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROWS = '{"text": "one mouse", "gold": "0"}\n{"text": "two mice and", "gold": "2"}\n'


@pytest.fixture
def model(build_tiny: Build) -> Any:
    """A model in training mode, whose head was untied and quantized by itself though the configuration ties it."""
    model = build_tiny("gpt2", vocab_size=1024, tie_word_embeddings=True, resid_pdrop=0.5, embd_pdrop=0.5)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    quantize_model(model, QuantConfig(bits=3, data_type="int", include="lm_head"))
    model.train()
    model.transformer.h[0].eval()  # some modules may be frozen
    return model


def describe(model: Any, tokenizer: Any) -> dict[str, Any]:
    """All that a library could change."""
    return {
        "weights": hash_weights(model),
        "parameters": [id(p) for _, p in model.named_parameters(remove_duplicate=False)],
        "gradients": [p.requires_grad for p in model.parameters()],
        "buffers": {name: (b.dtype, b.sum().item()) for name, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "configuration": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "tokenizer": [getattr(tokenizer, n) for n in ("pad_token", "padding_side", "truncation_side")],
        "vocabulary": len(tokenizer),
    }


def test_nothing_is_changed_and_the_untied_head_is_scored(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "talk.yaml").write_text(GENERATION)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    before, tasks = describe(model, tokenizer), ["talk", "nano_cloze", "nano_choice"]
    measured = evaluate(model, tokenizer, tasks, limit=4, task_path=str(tmp_path))
    assert describe(model, tokenizer) == before
    untied = copy.deepcopy(model).eval()
    untied.config.tie_word_embeddings = False  # so that no library has a reason to tie it
    assert evaluate(untied, tokenizer, tasks, limit=4, task_path=str(tmp_path)) == measured
    untied.lm_head.weight = untied.transformer.wte.weight
    assert evaluate(untied, tokenizer, tasks, limit=4, task_path=str(tmp_path)) != measured


def test_nothing_is_changed_by_an_error(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe(model, tokenizer)
    with monkeypatch.context() as broken:
        broken.setattr("lm_eval.models.huggingface.configure_pad_token", _raise)
        with pytest.raises(FileNotFoundError):
            evaluate(model, tokenizer, "nano_cloze", limit=2)
    assert describe(model, tokenizer) == before
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] = float("nan")
    before = describe(model, tokenizer)
    with pytest.raises(ArithmeticError):
        evaluate(model, tokenizer, "nano_cloze", limit=2)
    assert describe(model, tokenizer) == before


def _raise(*_: Any, **__: Any) -> Any:
    raise FileNotFoundError
