"""A study on the stock launcher, hydra-ray-launcher: a job loads its model, quantizes, evaluates, and ends.

benchmarks/engine.py runs this file, with an interpreter that has hydra-ray-launcher. A job's numbers and times go to
its own file in the folder `out`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore


@dataclass
class Job:
    """One job.

    Attributes:
        evaluator: "kbit" (run_experiment, as in kbit's own workers) or "hflm" (lm-eval's simple_evaluate and model
            class).
        tasks: folder of task YAMLs with absolute paths, for hflm.
        batch_size: number of sequences in a batch of hflm. kbit takes its default.
        out: folder for the numbers.
    """

    model: str = "nano-neox-98k"
    bits: int = 4
    data_type: str = "int"
    limit: int = 100
    evaluator: str = "kbit"
    tasks: str = ""
    batch_size: int = 32
    out: str = ""
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"override hydra/launcher": "ray"}])


ConfigStore.instance().store(name="job", node=Job)


@hydra.main(version_base="1.3", config_path=None, config_name="job")
def main(job: Job) -> None:
    """Run one job on one thread."""
    begin = time.time()
    import torch

    from kbit.evaluation.config import EvalConfig
    from kbit.experiments.config import Experiment
    from kbit.methods.config import QuantConfig
    from kbit.models.config import ModelConfig
    from kbit.silence import silence_libraries

    silence_libraries()
    torch.set_num_threads(1)
    quant = QuantConfig(bits=job.bits, data_type=job.data_type)
    experiment = Experiment(ModelConfig(job.model), quant, EvalConfig(limit=job.limit, perplexity=None))
    accuracies = _score_with_kbit(experiment) if job.evaluator == "kbit" else _score_with_hflm(job, experiment)
    done = {"pid": os.getpid(), "begin": begin, "end": time.time(), "accuracies": accuracies}
    name = f"{job.model}-{job.bits}-{job.data_type}.json"
    (Path(job.out) / name).write_text(json.dumps(done))


def _score_with_kbit(experiment: Any) -> dict[str, float]:
    from kbit.experiments.session import run_experiment

    result = run_experiment(experiment)
    return {m.task: m.value for m in result.measurements if m.metric == "acc"}


def _score_with_hflm(job: Job, experiment: Any) -> dict[str, float]:
    """Evaluate with lm-eval: its quickest way to these numbers, without its own tasks and without bootstrap."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from kbit.methods.quantize_model import quantize_model
    from kbit.models.loading import load_model

    loaded = load_model(job.model)
    quantize_model(loaded.model, experiment.quant, loaded.tokenizer)
    model = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=job.batch_size)
    names = list(experiment.eval.tasks)
    manager = TaskManager(include_path=job.tasks, include_defaults=False)
    done = lm_eval.simple_evaluate(model, tasks=names, limit=job.limit, task_manager=manager, bootstrap_iters=0)
    return {name: done["results"][name]["acc,none"] for name in names}


if __name__ == "__main__":
    main()
