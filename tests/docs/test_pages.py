"""The documentation as it stands: every block of code runs, every command is one, every name is in its reference."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib.image
import pytest

import kbit
from kbit.analysis.figures import emergence, int8, law_table, maps, roofline, tables
from kbit.analysis.figures.costs import slope, times
from kbit.analysis.figures.costs.against import COST_FIGURES
from kbit.analysis.figures.paper import CURVE_FIGURES
from kbit.analysis.figures.relations import RELATIONS
from kbit.cli.figures import FIGURE_NAMES
from kbit.cli.main import make_parser
from kbit.data.presets import list_presets
from kbit.methods.config import METHODS
from kbit.numerics.data_types import DATA_TYPES

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"
PAGES: Final = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
LANGUAGES: Final = ("python", "console", "sh", "yaml", "text")  # text is output
KEYS: Final = ("run", "plan", "doctor", "outliers")  # commands that take keys
Kbit = Callable[..., Any]


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    language: str
    text: str

    def list_commands(self) -> list[list[str]]:
        """Return the words of each command: each line of sh, and each line of a console that begins with $."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [shlex.split(line, comments=True) for line in lines]


def read_blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)]


BLOCKS: Final = {name: read_blocks(path) for name, path in PAGES.items()}
RUN: Final = [name for name, blocks in BLOCKS.items() if any(b.language in ("python", "console") for b in blocks)]


def test_every_block_says_its_language() -> None:
    assert {block.language for blocks in BLOCKS.values() for block in blocks} <= set(LANGUAGES)
    indented = [name for name, path in PAGES.items() if re.search(r"\n\n {4}(?![-*])\S", path.read_text())]
    assert not indented  # a block without a fence would escape these tests


@pytest.mark.parametrize("name", RUN)
def test_blocks_run_one_after_the_other(name: str, kbit: Kbit) -> None:
    """In one process, in an empty folder, with what the blocks before have defined."""
    defined: dict[str, Any] = {"__name__": name}
    for block in BLOCKS[name]:
        if block.language == "python":
            exec(compile(block.text, name, "exec"), defined)
        if block.language == "console":
            for command in block.list_commands():
                done = kbit(*command[1:])
                assert (command[0], done.code) == ("kbit", 0), f"{command}\n{done.err}"


def list_shell_commands() -> list[list[str]]:
    """Return the distinct commands of the sh blocks of all pages."""
    commands = [
        words for blocks in BLOCKS.values() for b in blocks if b.language == "sh" for words in b.list_commands()
    ]
    return [list(words) for words in dict.fromkeys(map(tuple, commands))]


def test_commands_are_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    parser, _ = make_parser()
    for words in list_shell_commands():
        if words[0] == "make":
            assert set(words[1:]) <= set(targets)
        elif words[0] in ("python", "sbatch") and words[1] != "-m":
            assert (ROOT / words[1]).is_file()
        elif words[0] == "kbit":
            options, rest = parser.parse_known_args(words[1:])
            assert not rest or options.takes_keys or options.takes_rest, words
        else:
            assert words[0] in ("pip", "python", "eval", "sbatch"), words


def test_grids_can_be_planned(kbit: Kbit) -> None:
    """tests/cli/hydra/test_compose.py composes the ready studies."""
    asked = {tuple(words[2:]) for words in list_shell_commands() if words[0] == "kbit" and words[1] in KEYS}
    names = {name for words in asked for word in words if "sweeps=" in word for name in word.split("=")[1].split(",")}
    assert names
    assert {name for name in names if not (ROOT / "sweeps" / f"{name}.yaml").is_file()} == set()
    grids = [words for words in asked if not any("sweeps=" in word for word in words)]
    assert grids
    for words in grids:
        done = kbit("plan", *words)
        assert done.code == 0, f"{words}\n{done.err}"


def test_a_study_of_ones_own_is_a_file(kbit: Kbit, tmp_path: Path) -> None:
    [text] = [block.text for block in BLOCKS["docs/guides/study.md"] if block.language == "yaml"]
    (tmp_path / "own" / "sweeps").mkdir(parents=True)
    (tmp_path / "own" / "sweeps" / "mine.yaml").write_text(text)
    done = kbit("plan", "--config-dir", str(tmp_path / "own"), "+sweeps=mine")
    assert "12 asked, 10 distinct" in done.out


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "FINDINGS.md"])
def test_links_lead_to_files(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_every_figure_has_a_section_and_a_picture() -> None:
    text = (DOCS / "reference" / "figures.md").read_text()
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    named = [name for section in sections for name in re.findall(r"`(\w+)`", section.splitlines()[0])]
    assert sorted(named) == sorted(FIGURE_NAMES)
    for section in sections:
        [picture] = re.findall(r"!\[.+?\]\((\S+)\)", section) or [None]
        assert picture or "No example" in section, section.splitlines()[0]


def test_claims_are_those_of_the_figures() -> None:
    own = (CURVE_FIGURES, RELATIONS, COST_FIGURES)
    claims = [figure.claim for figures in own for figure in figures]
    claims += [int8.CLAIM, emergence.CLAIM, law_table.CLAIM, roofline.CLAIM, tables.TABLE_1, tables.TABLE_2]
    claims += [maps.MAP_CLAIM, maps.SENSITIVITY_CLAIM, slope.CLAIM, times.CLAIM]
    text = " ".join((DOCS / "reference" / "figures.md").read_text().split())
    assert [claim for claim in claims if f"*{claim}*" not in text] == []


def test_pictures_are_small_and_shown() -> None:
    texts = "".join(path.read_text() for path in PAGES.values())
    for path in DOCS.rglob("*.png"):
        assert path.name in texts, path
        assert path.stat().st_size < 250_000, path
        assert min(matplotlib.image.imread(path).shape[:2]) > 100, path


def test_every_command_is_in_its_reference() -> None:
    text = (DOCS / "reference" / "commands.md").read_text()
    assert [name for name in make_parser()[1] if f"| `kbit {name}` |" not in text] == []


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "api.md").read_text()
    # of kbit.optim the names within it; what lies behind a link (analysis) is described by hand
    named = set(re.findall(r"^(?:::: |### `)kbit\.(\w+)", text, re.MULTILINE))
    assert set(kbit.__all__) - named == set()


def test_every_choice_is_in_its_reference() -> None:
    data_types = (DOCS / "reference" / "data_types.md").read_text()
    assert [name for name in DATA_TYPES if f"| `{name}` |" not in data_types] == []
    ranges = re.findall(r"`([a-z]+)(\d)` to `\1(\d)`", data_types)
    named = {f"{kind}{bits}" for kind, low, high in ranges for bits in range(int(low), int(high) + 1)}
    assert [name for name in list_presets() if name not in named and f"`{name}`" not in data_types] == []
    methods = (DOCS / "reference" / "methods.md").read_text() + (DOCS / "outliers.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in methods] == []


def test_the_bits_of_named_quantizers_are_as_counted() -> None:
    text = (DOCS / "reference" / "data_types.md").read_text()
    for names, numbers in re.findall(r"^\| (`.*?`[^|]*)\|[^|]*\| ([\d., ]+) \|$", text, re.MULTILINE):
        found = [
            kbit.QuantSpec.from_name(name).count_bits((4096, 4096)) / 4096**2 for name in re.findall(r"`(\w+)`", names)
        ]
        assert found == pytest.approx([float(number) for number in numbers.split(",")], abs=1e-3), names
