"""kbit as a model of lm-eval: the same numbers as kbit's own evaluation of the same quantizer."""

from __future__ import annotations

from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

import kbit.lmeval
from kbit.config import EvalConfig, Experiment, ModelConfig, QuantConfig
from kbit.experiment import run_experiment
from kbit.lmeval import QuantizedLM
from kbit.taskfiles import EMBEDDED_TASKS

ARGUMENTS = "pretrained=nano-neox-98k,bits=4,data_type=nf,block_size=64"


def test_lm_eval_gives_what_an_experiment_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EMBEDDED_TASKS)  # lm-eval looks for data files from here
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    record = lm_eval.simple_evaluate(
        model="kbit",
        model_args=ARGUMENTS,
        tasks=["nano_cloze", "nano_choice"],
        task_manager=TaskManager(include_path=".", include_defaults=False),  # the index of its own takes seconds
        limit=10,
        device="cpu",
        bootstrap_iters=0,
    )
    few = EvalConfig(tasks=("nano_cloze", "nano_choice"), limit=10, perplexity=None)
    mine = run_experiment(
        Experiment(ModelConfig("nano-neox-98k"), QuantConfig(bits=4, data_type="nf", block_size=64), few)
    )
    shared = [m for m in mine.measurements if m.task != "mean_zero_shot" and m.metric != "acc_bytes"]
    assert len(shared) == 4
    for m in shared:
        assert record["results"][m.task][f"{m.metric},none"] == pytest.approx(m.value, rel=1e-5)
    assert record["config"]["kbit"]["total_bits"] == mine.total_bits
    assert record["config"]["kbit"]["scorer"] == "prefix sharing"


def test_the_registry_knows_the_model() -> None:
    assert lm_eval.api.registry.get_model("kbit") is QuantizedLM


def test_a_whole_tensor_block_is_asked_for_by_none() -> None:
    lm = QuantizedLM.create_from_arg_string(ARGUMENTS.replace("64", "none"), {"batch_size": 1, "device": "cpu"})
    assert lm.report.spec.block_size is None
    assert lm.budget.tokens == 1024  # one sequence at a time is a default of lm-eval's that costs and changes nothing


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no key 'blocksize'; of the quantizer there are bits, data_type"):
        QuantizedLM("nano-neox-98k", bits=4, blocksize=64)


def test_lm_evals_default_of_a_gpu_means_the_cpu_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert kbit.lmeval._choose_device("cuda:0") == "cpu"
    assert "no CUDA device here" in caplog.text
    with pytest.raises(ValueError, match="device=cuda:1"):
        QuantizedLM("nano-neox-98k", device="cuda:1", bits=4)
