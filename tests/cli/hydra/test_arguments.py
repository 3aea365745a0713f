"""What is wrong with an argument is said before anything runs, with what to type instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from kbit.checks import KbitError
from kbit.cli.hydra.app import quote_value
from kbit.cli.hydra.arguments import refuse_arguments

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py

REFUSED: list[tuple[list[str], str]] = [
    (["quant.bits=3,", "4"], "quant.bits=3, 4: the blank at the comma divides the value: quant.bits=3,4"),
    (["quant.bits=3", ",4"], "quant.bits=3 ,4: the blank at the comma divides the value: quant.bits=3,4"),
    (["eval.tasks=[a,", "b]"], "eval.tasks=[a, b]: the blank at the comma divides the value: eval.tasks=[a,b]"),
    (["quant.bits", "=", "4"], "quant.bits stands alone: a key and its value are one argument, without blanks"),
    (["quant.bits", "4"], "quant.bits stands alone: a key and its value are one argument, without blanks"),
    (["quant.bits=", "4"], "quant.bits= 4: a key and its value are one argument, without blanks"),
    (["--quant.bits", "4"], "--quant.bits 4: a key is given as quant.bits=4"),
    (["--quant.bits=4"], "--quant.bits=4: a key has no dashes: quant.bits=4"),
    (["bits=4"], "bits: no key 'bits'; did you mean quant.bits or quant.allocation.bits?"),
    (["seed=1"], "seed: no key 'seed'; did you mean quant.seed or quant.calibration.seed or train.seed?"),
    (["blocksize=4"], "blocksize: no key 'blocksize'; did you mean quant.block_size?"),
    (["quant.samples=4"], "quant.samples: no key 'samples'; did you mean quant.calibration.samples?"),
    (["modle.name=x"], "modle.name: no key 'modle'; did you mean model.name?"),
    (["model=nano-neox-1m"], "model=nano-neox-1m: model has keys of its own; did you mean model.name=nano-neox-1m?"),
    (["ray=auto"], "ray=auto: ray has keys of its own; did you mean ray.address=auto?"),
    (["quant.gptq=true"], "quant.gptq=true: quant.gptq has keys of its own; they are quant.gptq.act_order,"),
    (["quant=4"], "quant=4: quant is given by name; did you mean quant.bits=4?"),
    (["+quant.bits=4"], "+quant.bits=4: quant.bits is there already, and is set without +: quant.bits=4"),
    (["nano/quick"], "nano/quick is no KEY=VALUE; did you mean +sweeps=nano/quick?"),
    (["nf4"], "nf4 is no KEY=VALUE; did you mean quant=nf4?"),
    (["nano-neox-1m"], "nano-neox-1m is no KEY=VALUE; did you mean model.name=nano-neox-1m?"),
    (["whatever"], "whatever is no KEY=VALUE, such as quant.bits=4"),
    (["+sweep=nano/quick"], "+sweep: a ready study is added, not set: +sweeps=nano/quick"),
    (["study=nano/quick"], "study: a ready study is added, not set: +sweeps=nano/quick"),
    (["launcher=basic"], "launcher=basic: did you mean hydra/launcher=basic?"),
    (["hydra.launcher=basic"], "hydra.launcher=basic: did you mean hydra/launcher=basic?"),
    (["hydra/launcher=submitit_slurm"], "hydra/launcher=submitit_slurm: kbit runs on Slurm by Ray workers"),
    (["-sc", "install=bash"], 'a shell completes keys and values after: eval "$(kbit completion bash)"'),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_a_wrong_argument_is_named_with_the_right_one(arguments: list[str], message: str) -> None:
    with pytest.raises(KbitError) as refused:
        refuse_arguments(["-m", *arguments])
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", "studies", "+sweeps=own"],
        ["-cd", "studies", "--info", "all", "--cfg", "job"],
        ["~quant.table", "++quant.bits=4", "+sweeps=nano/quick,nano/all"],
        ["eval.tasks=[a,b]", "model={name: x}", "study='${oc.env:X}'", "quant.bits=3,4"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_hydra_understands_is_left_to_it(arguments: list[str]) -> None:
    refuse_arguments(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("quant=nf", "quant=nf: there is no quant/nf; did you mean quant=nf4 (with 4 bits) or quant.data_type=nf?"),
        ("quant=gptq", "quant=gptq: there is no quant/gptq; did you mean quant.method=gptq?"),
        ("eval=piqa", "eval=piqa: there is no eval/piqa; did you mean eval.tasks=[piqa]?"),
        ("hydra/launcher=ray", "hydra/launcher=ray: there is no hydra/launcher/ray; did you mean hydra/launcher=kbit"),
        ("quant.bits=3;4", "quant.bits=3;4: cannot be read; values are written a,b or [a,b]"),
        ("eval.tasks=piqa", "eval.tasks=piqa: eval.tasks is a list, such as [a,b]; did you mean eval.tasks=[piqa]?"),
    ],
)
def test_what_hydra_refuses_is_explained(kbit: Kbit, argument: str, message: str) -> None:
    done = kbit("plan", argument)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"kbit: error: {message}")


@pytest.mark.parametrize(
    "text",
    ["results", "a b", "it's", "s3://bucket/a,b", "null", "True", "2024", "[a]", "a\\", "\\'", "/~/x", "a=b", ""],
)
def test_a_quoted_value_is_read_as_the_same_text(text: str) -> None:
    [read] = OverridesParser.create().parse_overrides([f"results={quote_value(text)}"])
    assert read.value() == text
