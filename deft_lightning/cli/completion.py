"""``deft-lightning --print_completion``: a script that completes verbs, options and ``deft:`` names in bash and zsh."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module

from deft_lightning.cli.shipped import names
from deft_lightning.cli.verbs import VERBS
from deft_lightning.errors import UserError
from deft_lightning.shipped_models import PREFIX

# Words are options if they begin with a dash; everything else is a file, by `-o default`, but behind --config also the
# name of a configuration of the package. bash takes a colon and an equals sign for words of their own, zsh does not.
SCRIPT = """\
# eval "$(deft-lightning --print_completion)"
if [ -n "$ZSH_VERSION" ]; then autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit; fi
_deft_lightning() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" known="" line="" typed part
    for part in "${{COMP_WORDS[@]:0:$((COMP_CWORD + 1))}}"; do
        case "$line$part" in *[:=]"$part"|*[:=]) line="$line$part" ;; *) line="$line $part" ;; esac
    done
    case "$word" in :|=) word="" ;; esac
    typed="${{line##* }}"
    typed="${{typed#--config=}}"
    case "$line" in
        *" --config $typed"|*" -c $typed"|*" --config=$typed")
            case "$typed" in d|de|def|deft|{prefix}*)
                part="${{typed%"$word"}}"
                COMPREPLY=($(compgen -W "{shipped}" -- "$typed"))
                COMPREPLY=("${{COMPREPLY[@]#"$part"}}" $(compgen -f -- "$typed"))
                return ;;
            esac ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then known="{verbs}"; else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
        case "$word" in -*) ;; *) known="" ;; esac
    fi
    COMPREPLY=($(compgen -W "$known" -- "$word"))
}}
complete -o default -o bashdefault -F _deft_lightning deft-lightning
"""


def main(arguments: Sequence[str] = ()) -> None:
    """Print the script.

    Raises:
        UserError: Something stands behind the option.
    """
    if arguments:
        raise UserError(
            f"--print_completion: takes no value, got {' '.join(arguments)}; the script is for bash and zsh"
        )
    print(script(), end="")


def script() -> str:
    """Return the script: the verbs of the table, the options of their parsers."""
    groups: dict[str, list[str]] = {}
    for verb, options in _options().items():
        groups.setdefault(" ".join(sorted(options)), []).append(verb)
    cases = "\n".join(f'        {"|".join(verbs)}) known="{options}" ;;' for options, verbs in groups.items())
    verbs = " ".join([*VERBS, "--help", "--version"])
    return SCRIPT.format(verbs=verbs, cases=cases, shipped=" ".join(PREFIX + name for name in names()), prefix=PREFIX)


def _options() -> dict[str, set[str]]:
    """Return the options of every verb, by the parsers that each home has."""
    parsers: dict[str, list[ArgumentParser]] = {}
    for home in dict.fromkeys(verb.home for verb in VERBS.values()):
        parsers |= import_module(home).parsers()
    return {
        verb: {option for parser in parsers[verb] for option in parser._option_string_actions if option[:2] == "--"}
        for verb in VERBS
    }
