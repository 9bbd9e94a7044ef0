"""Completion of command lines in bash, zsh and fish: scripts for the shell, and what these ask of ckptool.

A script runs ``ckptool`` with ``_CKPTOOL_COMPLETE=complete_SHELL`` and the words so far in ``COMP_WORDS``, a line each
(or as a shell has them), of which the one of index ``COMP_CWORD`` is to be completed; bash with the line up to the
cursor in ``COMP_LINE``. The answer is a candidate a line; with none, the shell completes names of files. Of files, only
headers are read; whatever goes wrong, there is no answer.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ckptool.errors import CkptoolError, OutputError, explain, one_of
from ckptool.io.paths import is_url

VARIABLE = "_CKPTOOL_COMPLETE"

SCRIPTS = {
    "bash": r"""_ckptool_completion() {
    local found line IFS=$'\n'
    found=$(_CKPTOOL_COMPLETE=complete_bash COMP_LINE="${COMP_LINE:0:COMP_POINT}" "$1" 2>/dev/null) || return
    COMPREPLY=()
    while IFS= read -r line; do [[ -n $line ]] && COMPREPLY+=("$line"); done <<< "$found"
    if [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *[.=] ]]; then compopt -o nospace; fi
}
complete -o default -F _ckptool_completion ckptool
""",
    "zsh": r"""#compdef ckptool
_ckptool() {
    local -a found open
    found=("${(@f)$(_CKPTOOL_COMPLETE=complete_zsh COMP_WORDS="${(F)words[1,CURRENT]}" COMP_CWORD=$((CURRENT-1)) \
        "$words[1]" 2>/dev/null)}")
    found=("${(@)found:#}")
    open=("${(@M)found:#*[.=]}")
    found=("${(@)found:#*[.=]}")
    (( $#open )) && compadd -S '' -- "${open[@]}"
    (( $#found )) && compadd -- "${found[@]}"
    (( $#open + $#found )) || _files
}
if [ "$funcstack[1]" = "_ckptool" ]; then _ckptool "$@"; else compdef _ckptool ckptool; fi
""",
    "fish": r"""function _ckptool_completion
    set -l words (commandline -opc) (commandline -ct)
    set -l found (_CKPTOOL_COMPLETE=complete_fish COMP_WORDS=(string join \n -- $words | string collect) \
        COMP_CWORD=(math (count $words) - 1) $words[1] 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c ckptool -f -a '(_ckptool_completion)'
""",
}

PLACES = {
    "bash": (".bash_completions/ckptool.sh", ".bashrc", "source ~/.bash_completions/ckptool.sh"),
    "zsh": (".zfunc/_ckptool", ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
    "fish": (".config/fish/completions/ckptool.fish", "", ""),
}
"""Where a script goes in the home directory; and the file with a line that has the shell read it, if it needs one."""

SECONDS = 3
"""A shell waits for an answer no longer."""
MOST = 100
"""Keys that are offered whole; of more, only what they have up to their next dot."""


def shell_of(given: str | None) -> str:
    """Returns the shell that was named, else the one of ``SHELL``. Raises: UsageError for one without a script."""
    return one_of(SCRIPTS, given or os.path.basename(os.environ.get("SHELL", "")), "completion")


def install(shell: str) -> str:
    """Writes the script where the shell reads it, and returns what was done. Raises: OutputError."""
    place, start, line = PLACES[shell]
    script = Path.home() / place
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPTS[shell])
        done = f"{script}: written"
        if start:
            settings = Path.home() / start
            text = settings.read_text() if settings.exists() else ""
            if line not in text.splitlines():
                with settings.open("a") as file:
                    file.write(("\n" if text and not text.endswith("\n") else "") + line + "\n")
                done += f", and a line in {settings} that reads it"
    except OSError as error:
        raise OutputError(f"cannot be written: {explain(error)}", error.filename) from error
    return f"{done}; it works in the next {shell} that is started"


def answer(app: Any, commands: Sequence[str]) -> None:
    """Prints the candidates that a script asks for. Never fails: a shell would show it in the middle of a line."""
    kind, _, shell = os.environ[VARIABLE].partition("_")
    if kind == "source":
        print(SCRIPTS.get(shell, ""), end="")
        return
    with contextlib.suppress(Exception, SystemExit), _hurried():
        words, begun = _words(shell)
        found = sorted({one for one in _candidates(app, commands, words, begun) if one.startswith(begun)})
        # bash itself begins a new word behind these
        cut = max(begun.rfind("="), begun.rfind(":")) + 1 if shell == "bash" else 0
        for one in filter(str.isprintable, found):
            bare = shell != "bash" or re.fullmatch(r"[\w.,:=@%+/-]+", one)
            print(one[cut:] if bare else shlex.quote(one[cut:]))


@contextlib.contextmanager
def _hurried() -> Iterator[None]:
    """Ends the block with SystemExit after `SECONDS`."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _words(shell: str) -> tuple[list[str], str]:
    """Returns the words before the one that is to be completed, without the program's name, and what it begins with."""
    line = os.environ.get("COMP_LINE") if shell == "bash" else None
    if line is not None:
        words = _split(line)
        return words[1:-1], words[-1]
    text = os.environ.get("COMP_WORDS", "")
    words = [_split(one)[0] for one in text.split("\n")] if "\n" in text else _split(text)
    at = int(os.environ.get("COMP_CWORD", len(words) - 1))
    return words[1:at], words[at] if at < len(words) else ""


def _split(line: str) -> list[str]:
    """Returns the words of a line as a shell would; the last is empty behind a space, and a quote may be open."""
    for closed in ("", "'", '"', "\\"):
        with contextlib.suppress(ValueError):
            reader = shlex.shlex(line.removesuffix("\\") + closed, posix=True, punctuation_chars=False)
            reader.whitespace_split, reader.commenters = True, ""
            words = list(reader)
            return words if words and (closed or not line[-1:].isspace()) else [*words, ""]
    return [""]


def _candidates(app: Any, commands: Sequence[str], words: list[str], begun: str) -> Iterable[str]:
    """Returns what may stand at the end of a command line; names of files are the shell's business."""
    at, command = _command(app, commands, words)
    if command is None and at:  # a word that is no command
        return ()
    if command is None:
        return commands if not begun.startswith("-") else _names(app)
    options = {name: one for one in command.params if one.param_type_name == "option" for name in _all_names(one)}
    name, equals, value = begun.partition("=")
    if "--" in words[at:]:
        return ()
    if equals and name in options:
        return [f"{name}={one}" for one in _values(name, options, words[at:], value)]
    if words[-1] in options and not options[words[-1]].is_flag:
        return _values(words[-1], options, words[at:-1], begun)
    return _names(command) if begun.startswith("-") else ()


def _command(app: Any, commands: Sequence[str], words: list[str]) -> tuple[int, Any]:
    """Returns the command that is among the words, and at which index its own words begin."""
    takes = {name for one in app.params if not one.is_flag for name in _all_names(one)}
    for at, word in enumerate(words):
        if not word.startswith("-") and (not at or words[at - 1] not in takes):
            return at + 1, app.get_command(None, word) if word in commands else None
    return 0, None


def _all_names(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def _names(command: Any) -> list[str]:
    return [name for one in command.params if one.param_type_name == "option" for name in _all_names(one)]


KEYS = ("include", "exclude", "ignore", "keep", "drop", "require", "freeze", "init", "adapt")
PREFIXES = ("strip-prefix", "strip-prefix-a", "strip-prefix-b")
OF_TARGET = ("require", "freeze", "init", "adapt", "match-root", "into-root")
"""Options that take keys, or what keys begin with; and those that take what the target has, not the sources."""

RULES = ("init", "adapt")
"""Options that take ``GLOB=RULE``."""


def _listed(long: str) -> list[str]:
    """Returns the words of known lists that an option takes."""
    from ckptool import formats, limits
    from ckptool.cli.terminal import colours
    from ckptool.core import dtypes
    from ckptool.directories.parallel import joining
    from ckptool.ops import rules
    from ckptool.partial import presets

    lists: dict[str, Iterable[str]] = {
        "to": formats.names(), "dtype": dtypes.DTYPES, "preset": rules.PRESETS, "color": colours.CHOICES,
        "init-preset": ["list", *presets.PRESETS], "tp-rules": joining.shipped(), "freeze": ["loaded", "first:"],
        "map-location": ["cpu", "cuda", "cuda:0", "meta", "mps"],
        "limit": [f"{one.name}=" for one in limits.ALL.values() if one.raisable],
    }  # fmt: skip
    return [*lists.get(long, ())]


def _rules(long: str) -> Iterable[str]:
    from ckptool.partial import adapters, init

    return init.METHODS if long == "init" else adapters.ADAPTERS


def _kinds(words: list[str]) -> Iterable[str]:
    from ckptool.core import findings
    from ckptool.ops import diff

    return findings.KINDS if "--check" in words else diff.KINDS


def _values(name: str, options: dict[str, Any], words: list[str], begun: str) -> Iterable[str]:
    """Returns what an option of a command may be given; ``words``: those of the command so far."""
    option = options[name]
    long = max(option.opts, key=len).removeprefix("--")
    pattern, equals, _ = begun.partition("=")
    if equals and long in RULES:
        return [f"{pattern}={one}" for one in _rules(long)]
    if long == "fail-on":
        before = begun[: begun.rfind(",") + 1]
        return [before + one for one in _kinds(words)]
    known = _listed(long)
    if re.fullmatch(r"[\w-]+(\|[\w-]+)+", option.metavar or ""):
        known += option.metavar.split("|")
    if long in (*KEYS, *PREFIXES) or "root" in long:
        for path, root in _files(long, options, words):
            with contextlib.suppress(CkptoolError):
                known += _found(long, path, root, begun)
    return known


def _files(long: str, options: dict[str, Any], words: list[str]) -> list[tuple[str, str | None]]:
    """Returns (path, its root) of the files that a command line names, whose content an option is about."""
    given: dict[str, str] = {}
    paths: list[str] = []
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        if name in options and not options[name].is_flag:
            given[name] = value if equals else "".join(words[at + 1 : at + 2])
            at += 0 if equals else 1
        elif not words[at].startswith("-"):
            paths.append(words[at])
        at += 1
    targets: list[tuple[str, str | None]] = [(given[one], None) for one in ("--match", "--into") if one in given]
    return targets if targets and long in OF_TARGET else [(path, given.get("--root")) for path in paths]


def _found(long: str, path: str, root: str | None, begun: str) -> list[str]:
    """Returns roots, prefixes or keys of a file that begin with what is there. No model is run, no URL asked."""
    if is_url(path):
        return []
    import ckptool
    from ckptool.core import roots

    if "root" in long:
        tree = ckptool.open(path).tree
        found = roots.find_root(tree)
        return [text for one in (found.path, *found.others, *found.ema) if (text := roots.root_text(tree, one))]
    keys = [key for key in ckptool.open(path, root=root).state_dict() if key.startswith(begun)]
    if long in PREFIXES or len(keys) > MOST:
        ends = (key.find(".", len(begun)) + 1 for key in keys)
        cut = {key[:end] if end else key for key, end in zip(keys, ends, strict=True)}
        return sorted(one for one in cut if long not in PREFIXES or one.endswith("."))
    return keys
