"""What `kbit run` and `kbit plan` refuse before any work, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BASIC = "hydra/launcher=basic"
TRACEBACK = "Traceback (most recent call last)"

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py

BAD_FILES = {
    "table.csv": b"text\na mouse\n",
    "empty.txt": b"",
    "latin1.txt": b"caf\xe9",
    "no_text.jsonl": b'{"txt": "a mouse"}\n',
    "tasks/broken.yaml": b"dataset_path: json\n task : {mine\n",
}
BAD_RUNS: list[tuple[list[str], list[str]]] = [
    (["quant.bitz=3"], ["no key 'bitz'", "bits, data_type"]),
    (["sweeps=nano/bit_level"], ["+sweeps=nano/bit_level"]),
    (["modle.name=x"], ["modle"]),
    (["quant.bits=four"], ["quant.bits", "'four'", "Integer"]),
    (["quant.data_type=flaot"], ["data_type='flaot'", "int, float, dynamic, quantile, nf"]),
    (["quant.bits=1"], ["bits=1", "2..8", "16"]),
    (["quant.bits=9"], ["bits=9", "2..8", "16"]),
    (["quant.data_type=float", "quant.exponent_bits=7"], ["exponent_bits=7", "bits=4", "1..3"]),
    (["quant.block_size=0"], ["block_size=0", ">= 1", "null"]),
    (["quant.method=gptqq"], ["quant.method='gptqq'", "rtn", "did you mean gptq?"]),
    (["eval.perplexity=table.csv"], ["table.csv is neither a plain text (.txt) nor JSON lines"]),
    (["eval.perplexity=empty.txt"], ["empty.txt has no text"]),
    (["eval.perplexity=latin1.txt"], ["latin1.txt is not a text in UTF-8"]),
    (["eval.perplexity=no_text.jsonl"], ["record 1 has no field 'text'"]),
    (["quant.method=gptq", "quant.calibration.text=empty.txt"], ["empty.txt has no text"]),
    (["eval.task_path=tasks", "eval.tasks=[mine]"], ["'mine'", "broken.yaml, line 2 cannot be parsed"]),
    (["quant.bits=3,4"], ["quant.bits=3,4: several values are a multirun: add -m", "quant.bits=[3,4]"]),
    (["-m", "quant.bits=3,,4", BASIC], ["quant.bits=3,,4: cannot be read at ','"]),
    (["-m", "quant.data_type=glob(*)", BASIC], ["quant.data_type=glob(*)", "config groups"]),
    (["quant.include='['"], ["quant.include='['", "regular expression"]),
    (["model.name=nano-neox-98"], ["'nano-neox-98'", "nano-neox-98k", "kbit models"]),
    (["model.dtype=fp16"], ["model.dtype='fp16'", "float32, bfloat16, float16"]),
    (["eval.perplexity=missing.txt"], ["'missing.txt'", "nano_held_out"]),
    (["eval.tasks=[nano_clozee]"], ["'nano_clozee'", "nano_cloze,"]),
    (["eval.tasks=[]", "eval.perplexity=null"], ["eval.tasks", "eval.perplexity"]),
    (["eval.task_path=nowhere"], ["eval.task_path", "nowhere"]),
    (["eval.limit=0"], ["eval.limit=0", ">= 1"]),
    (["device=gpu"], ["device='gpu'", "cpu, cuda, cuda:N"]),
    (["results=/proc/kbit"], ["results=/proc/kbit", "cannot write"]),
    (["+sweeps=nowhere"], ["sweeps/nowhere"]),
    (["-m", "quant.bits=3,9", BASIC], ["bits=9", "2..8"]),
    (["-m", "hydra/launcher=slurm"], ["hydra/launcher=slurm: kbit runs on Slurm by Ray workers", "docs/slurm.md"]),
    (["-m", "ray.address=nonsense"], ["nonsense"]),
    (["-m", "device=cuda", "ray.gpus_per_worker=0"], ["device=cuda", "ray.gpus_per_worker > 0"]),
    (["-m", "device=cuda:1"], ["device=cuda:1", "use device=cuda"]),
    (["-m", "ray.gpus_per_worker=1.5"], ["ray.gpus_per_worker=1.5", "whole above 1"]),
    (["-m", "ray.gpus_per_worker=100"], ["100 do not fit", "GPUs"]),
    (["quant.bits='???'"], ["quant.bits: Missing mandatory value: bits"]),
    (["eval.tasks=[[a]]"], ["eval.tasks is ['a'], which is no text"]),
    (["-m", "eval.tasks=[{a:1}]"], ["eval.tasks is {'a': 1}, which is no text"]),
    (["study='${oc.env:PATH}'"], ["study is '", "which is no mapping of keys to values"]),
    (["quant=null"], ["quant=null: quant is given by name; allowed are af4_published"]),
    (["quant=true"], ["quant=true: quant is given by name"]),
    (["quant=123"], ["quant=123: quant is given by name"]),
    (["eval=[[a]]"], ["eval=[[a]]: eval is given by name; allowed are nano, paper"]),
    (["-m", "hydra/launcher=[1]"], ["hydra/launcher=[1]: hydra/launcher is given by name; allowed are basic, kbit"]),
    ([f"quant={'a' * 4000}"], [f"error: {'a' * 60}... is too long for the name of a file"]),
    (["-m", "hydra.sweeper.max_batch_size=0"], ["error: hydra.sweeper.max_batch_size=0 is not a whole number above 0"]),
    (["-m", "hydra.launcher.engine=x"], ["error: hydra.launcher.engine='x' is not one of: ray, process"]),
    (["model.name='${oc.env:PATH}'"], ["model: ${oc.env:...} would be written into every record"]),
    (["results=~nobody-of-this-name/x"], ["results=~nobody-of-this-name/x"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_RUNS, ids=[" ".join(arguments) for arguments, _ in BAD_RUNS])
def test_bad_input_is_refused_before_any_work(
    kbit: Kbit, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    done = kbit("run", *arguments)
    assert done.code not in (0, None)
    assert [word for word in words if word not in done.err] == []
    assert TRACEBACK not in done.err
    assert "Error executing job" not in done.err
    assert list(tmp_path.rglob("*.json")) == []


def test_plan_refuses_what_run_refuses(kbit: Kbit) -> None:
    done = kbit("plan", "quant.bits=3,9")
    assert (done.code, "bits=9" in done.err) == (1, True)
