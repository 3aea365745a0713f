"""kbit as a model of lm-eval: the same numbers as kbit's own evaluation of the same quantizer."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

from kbit.checkpoints.loading import load_model, pack_loaded
from kbit.checkpoints.saving import save_packed
from kbit.evaluation.config import EvalConfig
from kbit.experiments.config import Experiment
from kbit.experiments.session import run_experiment
from kbit.lmeval import QuantizedLM, read_options
from kbit.methods.config import CalibrationConfig, GptqConfig, QuantConfig
from kbit.models.config import ModelConfig

ARGUMENTS = "pretrained=nano-neox-98k,bits=4,data_type=nf,block_size=64"


def test_lm_eval_gives_what_an_experiment_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # kbit's own tasks are found from any folder
    record = lm_eval.simple_evaluate(
        model="kbit",
        model_args=ARGUMENTS,
        tasks=["nano_cloze", "nano_choice"],
        task_manager=TaskManager(include_defaults=False),  # the index of its own takes seconds
        limit=10,
        device="cpu",
        bootstrap_iters=0,
    )
    few = EvalConfig(tasks=("nano_cloze", "nano_choice"), limit=10, perplexity=None)
    mine = run_experiment(
        Experiment(ModelConfig("nano-neox-98k"), QuantConfig(bits=4, data_type="nf", block_size=64), few)
    )
    shared = [m for m in mine.measurements if m.task != "mean_zero_shot"]
    assert len(shared) == 5
    for m in shared:
        assert record["results"][m.task][f"{m.metric},none"] == pytest.approx(m.value, rel=1e-5)
    assert record["config"]["kbit"]["total_bits"] == mine.total_bits
    assert record["config"]["kbit"]["scorer"] == "prefix sharing"


def test_the_command_line_needs_no_network_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))  # as above
    arguments = ["run", "--model", "kbit", "--model_args", ARGUMENTS, "--tasks", "nano_*", "--limit", "3"]
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments, "--device", "cpu", "--output_path", "out"])
    cli_evaluate()
    [written] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert sorted(results) == ["nano_choice", "nano_cloze", "nano_endings", "nano_swap"]
    assert results["nano_choice"]["acc,none"] in {0, 1 / 3, 2 / 3, 1}
    assert not (tmp_path / "cache").exists()


def test_a_task_of_the_users_folder_wins_over_a_nano_task(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: nano_cloze\ndataset_path: json\n")
    index = TaskManager(include_path=str(tmp_path), include_defaults=False).task_index
    assert index["nano_cloze"].yaml_path == tmp_path / "mine.yaml"
    assert index["nano_swap"].yaml_path is None
    assert "piqa" not in index  # lm-eval's own


def test_the_registry_knows_the_model() -> None:
    assert lm_eval.api.registry.get_model("kbit") is QuantizedLM


def test_a_whole_tensor_block_is_asked_for_by_none() -> None:
    lm = QuantizedLM.create_from_arg_string(ARGUMENTS.replace("64", "none"), {"batch_size": 1, "device": "cpu"})
    assert lm.report.spec.block_size is None
    assert lm.budget.tokens == 1024  # one sequence at a time is a default of lm-eval's that costs and changes nothing


def test_int8_products_that_see_the_whole_input_are_computed_one_text_at_a_time() -> None:
    lm = QuantizedLM.create_from_arg_string(
        "pretrained=nano-neox-98k,bits=8,method=absmax", {"batch_size": 8, "device": "cpu"}
    )
    assert (lm.batch_tokens, lm.batch_size) == (1, 1)  # of log-likelihoods, of generation
    assert lm.get_model_info()["kbit"]["scorer"] == "one sequence per row"


def test_methods_and_outliers_are_asked_for_as_in_an_experiment() -> None:
    arguments = ARGUMENTS + ",method=gptq,calibration.samples=4,gptq.damping=0.1,outlier_fraction=0.05,exclude=none"
    lm = QuantizedLM.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    assert lm.quant == QuantConfig(
        data_type="nf",
        method="gptq",
        calibration=CalibrationConfig(samples=4),
        gptq=GptqConfig(damping=0.1),
        outlier_fraction=0.05,
    )
    assert lm.report.notes["calibration"]["samples"] == 4
    assert lm.get_model_info()["kbit"]["gptq"]["damping"] == 0.1
    with pytest.raises(ValueError, match=r"no key 'calibration\.size'.*calibration\.samples"):
        read_options({"calibration.size": 3})


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no key 'blocksize'; of the quantizer there are bits, data_type"):
        QuantizedLM("nano-neox-98k", bits=4, blocksize=64)


def test_lm_evals_default_of_a_gpu_means_the_cpu_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert QuantizedLM("nano-neox-98k", device="cuda:0", bits=16).device.type == "cpu"
    assert "no CUDA device here" in caplog.text
    with pytest.raises(ValueError, match="device=cuda:1"):
        QuantizedLM("nano-neox-98k", device="cuda:1", bits=4)


def test_a_packed_folder_is_evaluated_as_it_is(tmp_path: Path) -> None:
    loaded, quant = load_model("nano-neox-98k"), QuantConfig(bits=3, data_type="nf")
    pack_loaded(loaded, quant)
    save_packed(loaded.model, loaded.tokenizer, tmp_path)
    packed = QuantizedLM(str(tmp_path))
    plain = QuantizedLM("nano-neox-98k", bits=3, data_type="nf")
    requests = [((" Once", " upon"), [5, 6, 7], [8, 9]), (("a", "b"), [3], [4])]
    assert packed.score_tokens(requests) == plain.score_tokens(requests)
    model_info, expected = (lm.get_model_info()["kbit"] for lm in (packed, plain))
    assert model_info == expected
    assert QuantizedLM(str(tmp_path), bits=16).quant == quant
    with pytest.raises(ValueError, match="is packed by kbit already, and is not quantized again: leave out bits"):
        QuantizedLM(str(tmp_path), bits=4)
