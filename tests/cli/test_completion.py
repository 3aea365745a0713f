"""`kbit <TAB>`: what the shells offer, asked as they ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from kbit.analysis.figures.registry import FIGURES
from kbit.cli.completion import find_words
from kbit.cli.figures import FIGURE_NAMES
from kbit.cli.main import make_parser

Kbit = Callable[..., Any]  # the fixture kbit of conftest.py
COMMANDS = [
    "run",
    "plan",
    "figures",
    "report",
    "results",
    "outliers",
    "fit",
    "recommend",
    "bench",
    "pack",
    "export",
    "models",
    "doctor",
]
COMMANDS += ["completion"]
ASK = """
eval "$(kbit completion bash)"
COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_kbit
printf '[%s]\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("kbit ", COMMANDS),
        ("kbit re", ["report", "results", "recommend"]),
        ("kbit x ", []),
        ("kbit figures figure_1", [name for name in FIGURES if name.startswith("figure_1")]),
        ("kbit figures --o", ["--out"]),
        ("kbit figures --out ", []),  # the shell completes files
        ("kbit results ", ["list", "delete", "compact", "merge"]),
        ("kbit results delete --", ["--results", "--where", "--failures", "--damaged", "--yes"]),
        ("kbit results merge --", ["--results"]),
        ("kbit completion ", ["bash", "zsh", "fish"]),
        ("kbit run --c", ["--cfg", "--config-dir"]),
        ("kbit plan --r", ["--results"]),
        ("kbit run --results ", []),  # the shell completes folders
        ("kbit run model.name=nano-gpt2", [f"model.name=nano-gpt2-{size}" for size in ("98k", "332k", "1m")]),
        ("kbit plan -m +sweeps=nano/bit", ["+sweeps=nano/bit_level"]),
    ],
)
def test_words_are_those_of_the_parsers(line: str, words: list[str]) -> None:
    assert find_words(line, make_parser()[1]) == words


def test_names_of_figures_are_those_of_the_registry() -> None:
    assert sorted(FIGURE_NAMES) == sorted(FIGURES)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("kbit run quant.bi", ["quant.bits="]),
        ("kbit plan -m quant.bits=3,4 quant=nf4", ["quant=nf4", "quant=nf4_dq"]),
        ("kbit doctor hydra/launcher=", ["hydra/launcher=basic", "hydra/launcher=kbit"]),
        ("kbit outliers eval.features.m", ["eval.features.magnitude=", "eval.features.measure="]),
        ("kbit run quant.bitz=3 quant.b", []),  # nothing is said of what is wrong
    ],
)
def test_keys_and_groups_are_hydras(kbit: Kbit, line: str, words: list[str]) -> None:
    done = kbit("completion", "--words", line)
    assert (done.code, done.out.split(), done.err) == (0, words, "")


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("kbit res", "[results ]"),
        ("kbit run quant.block_s", "[quant.block_size=]"),
        ("kbit run quant=nf4_", "[nf4_dq ]"),  # bash takes quant and = for words of their own
    ],
)
def test_bash_completes(line: str, replies: str) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", line], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (replies, "")


def test_zsh_completes(tmp_path: Path) -> None:
    """In a terminal of its own: after <TAB>, Ctrl-G prints the line as zsh has it."""
    if shutil.which("zsh") is None:
        pytest.skip("needs zsh")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    show = "show() { BUFFER=\"print -r -- '[$BUFFER]'\"; zle accept-line; }; zle -N show; bindkey '^G' show"
    (tmp_path / ".zshrc").write_text(f"autoload -U compinit; compinit -u -D\n{show}\nPS1='ready> '\n")
    zsh = pexpect.spawn(
        "zsh", ["-i"], env=os.environ | {"PATH": path, "ZDOTDIR": str(tmp_path), "TERM": "dumb"}, encoding="utf-8",
        timeout=120, dimensions=(24, 200),
    )  # fmt: skip
    zsh.expect_exact("ready> ")
    zsh.sendline('eval "$(kbit completion zsh)"; print loa""ded')
    zsh.expect_exact("loaded")
    for line, whole in [("kbit res", "kbit results "), ("kbit run quant=nf4_", "kbit run quant=nf4_dq ")]:
        zsh.expect_exact("ready> ")
        zsh.send(f"{line}\t\x07")
        zsh.expect(r"\n\[(.*)\]\r")
        assert zsh.match.group(1) == whole
    zsh.close(force=True)


def test_completion_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['kbit', 'completion', '--words', 'kbit run quant.b']\n"
        "from kbit.cli import main; main()\n"
        "print([name for name in ('torch', 'ray', 'pandas', 'transformers', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["quant.bits=", "quant.block_size=", "[]"]


def test_a_shell_must_be_named(kbit: Kbit) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "kbit completion --words" in kbit("completion", shell).out
    assert kbit("completion").err == "kbit: error: kbit completion needs a shell: bash, zsh, fish\n"
