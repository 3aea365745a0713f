"""`kbit completion`: what <TAB> offers in bash, zsh and fish.

Each shell's script hands the line up to the cursor to `kbit completion --words`, which prints the words that may stand
there. Hydra's own completion finds the keys, groups and values of the commands that take the arguments of `kbit run`.
Nothing else is printed, whatever goes wrong: an error in the middle of the user's line would help nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kbit.checks import KbitError

_BASH: Final = """\
_kbit() {
    local line="${COMP_LINE:0:COMP_POINT}" word
    local current="${line##*[[:space:]]}" kept=""
    # bash replaces only what follows the last of COMP_WORDBREAKS within the word
    [[ $COMP_WORDBREAKS == *=* && $current == *=* ]] && kept="${current%"${current##*=}"}"
    [[ $COMP_WORDBREAKS == *:* && $current == *:* ]] && kept="${current%"${current##*:}"}"
    COMPREPLY=()
    while read -r word; do
        [[ $word == *[=./,] ]] || word+=" "
        COMPREPLY+=("${word#"$kept"}")
    done < <(kbit completion --words "$line" 2>/dev/null)
}
complete -o nospace -o default -F _kbit kbit
"""

_ZSH: Final = """\
#compdef kbit
_kbit() {
    local -a whole open
    local word
    for word in ${(f)"$(kbit completion --words "$LBUFFER" 2>/dev/null)"}; do
        [[ $word == *[=./,] ]] && open+=("$word") || whole+=("$word")
    done
    (( $#whole + $#open )) || { _files; return }
    compadd -S '' -- $open
    compadd -- $whole
}
compdef _kbit kbit
"""

_FISH: Final = """\
complete -c kbit -a '(kbit completion --words (commandline --cut-at-cursor | string collect) 2>/dev/null)'
"""

_SCRIPTS: Final = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

_EXAMPLES: Final = """\
examples:
  eval "$(kbit completion bash)"       in ~/.bashrc
  eval "$(kbit completion zsh)"        in ~/.zshrc, after compinit
  kbit completion fish | source        in ~/.config/fish/config.fish
"""

# Options that are worth a word, all but the first Hydra's. `kbit run --hydra-help` lists all.
_FLAGS: Final = ("--results", "--multirun", "--help", "--hydra-help", "--cfg", "--info", "--config-dir")


def add_completion(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `kbit completion`."""
    parser = commands.add_parser(
        "completion",
        help="print the script that lets a shell complete these commands",
        description="Print a script for a shell, which then completes commands, options, keys and values of kbit.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", nargs="?", choices=tuple(_SCRIPTS), help="the shell")
    parser.add_argument("--words", metavar="LINE", help="print what may follow a line, as the scripts ask")
    parser.set_defaults(run=complete, words_offered=tuple(_SCRIPTS))


def complete(options: argparse.Namespace) -> None:
    """Print a shell's script, or the words that complete a line.

    Raises:
        KbitError: neither is asked for.
    """
    if options.words is not None:
        print("\n".join(find_words(options.words, options.commands)))
    elif options.shell is not None:
        print(_SCRIPTS[options.shell], end="")
    else:
        raise KbitError(f"kbit completion needs a shell: {', '.join(_SCRIPTS)}")


def find_words(line: str, commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """Return the words that may stand at the end of a line, each beginning with the line's last word.

    Args:
        line: the command line up to the cursor, such as "kbit run quant.b".
        commands: the parser of each command.
    """
    given = line.split()[1:]
    word = given.pop() if given and not line[-1].isspace() else ""
    parser, choices = None, commands
    while given and given[0] in choices:
        parser = choices[given.pop(0)]
        choices = parser.get_default("commands") or {}
    if parser is None:
        return _select([] if given else choices, word)
    if parser.get_default("takes_keys"):
        return _find_keys(given, word)
    usage = parser.format_usage()
    if given and re.search(rf"\[{re.escape(given[-1])} ", usage):
        return []  # the shell completes an option's value as a file
    if word.startswith("-"):
        return _select(re.findall(r"(?<=\[)--?[\w-]+", usage), word)
    return _select([*(() if given else choices), *(parser.get_default("words_offered") or ())], word)


def _select(words: Iterable[str], beginning: str) -> list[str]:
    return [word for word in words if word.startswith(beginning)]


def _find_keys(given: Sequence[str], word: str) -> list[str]:
    """Return the keys, groups and values that complete a word of the arguments of `kbit run`."""
    if word.startswith("-"):
        return _select(_FLAGS, word)
    if given and given[-1] in ("--results", "--config-dir"):
        return []  # the shell completes a folder
    key, is_value, beginning = word.rpartition("=")
    if is_value and key.endswith("model.name"):
        from kbit.models.catalog import STUDIED

        return [f"{key}={name}" for name in _select(STUDIED, beginning)]
    if word.startswith("+"):  # Hydra would offer +sweeps/nano, which is no way to name a study
        from kbit.cli.hydra.explain import list_files

        return _select((f"+sweeps={name}" for name in list_files("sweeps")), word)
    return _ask_hydra([*given, word])


def _ask_hydra(arguments: Sequence[str]) -> list[str]:
    """Return what Hydra's completion for bash answers, which reads the line from the environment and prints words."""
    import hydra
    from hydra.errors import HydraException

    from kbit.cli.hydra.app import register_schema

    register_schema()
    os.environ["COMP_LINE"] = " ".join(["kbit", *arguments])
    sys.argv = ["kbit run", "-sc", "query=bash"]
    answer = io.StringIO()
    with (
        contextlib.redirect_stdout(answer),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(HydraException, SystemExit),
    ):
        hydra.main(version_base="1.3", config_path="pkg://kbit.conf", config_name="run")(_ask_hydra)()
    return answer.getvalue().split()
