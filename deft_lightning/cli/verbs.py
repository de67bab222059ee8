"""The verbs: one table that dispatch, ``--help``, suggestions, completion and the README read. It imports nothing."""

from __future__ import annotations

from typing import NamedTuple

from deft_lightning.errors import did_you_mean

PROGRAM = "python -m deft_lightning"
TRAINER = "deft_lightning.cli.main"  # home of the verbs that are methods of the trainer


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        name: What is typed.
        home: The module whose ``main(arguments)`` runs it; it is imported when the verb is asked for.
        help: What it does, in a line.
    """

    name: str
    home: str
    help: str


VERBS = {
    verb.name: verb
    for verb in (
        Verb("fit", TRAINER, "Train a model; afterwards test it and export it"),
        Verb("validate", TRAINER, "Compute loss and plain NLL on the validation data"),
        Verb("test", TRAINER, "Generate for held-out prompts or benchmarks, and grade the answers"),
        Verb("predict", TRAINER, "Generate for prompts, and write the answers to a file"),
        Verb("export", TRAINER, "Write a checkpoint as a Hugging Face folder"),
        Verb("probe", TRAINER, "Compare every objective on the data before training; rank suspect examples"),
        Verb("preview", TRAINER, "Show examples with every token coloured by its role"),
        Verb("score", "deft_lightning.evaluation.command", "Grade a file that predict wrote, without a model"),
        Verb("figures", "deft_lightning.figures.command", "Draw figures of runs, objectives and probes"),
        Verb("study", "deft_lightning.study.command", "Compare objectives over regimes of prior and noise"),
    )
}


def overview() -> str:
    """Return the list of verbs as ``--help`` prints it."""
    lines = [f"  {verb.name:<9} {verb.help}" for verb in VERBS.values()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [--config FILE] [options]", "",
            "Fine-tune causal language models on imperfect instruction data.", "", *lines, "",
            f"Options of a verb, with all objectives and label noise: {PROGRAM} fit --help",
            "Completion of verbs and options in bash and zsh: eval \"$(deft-lightning --print_completion)\"",
            "Version: --version",
        ]
    )  # fmt: skip


def unknown_verb(word: str) -> str:
    """Return the line that refuses a word which is no verb, with the verb that comes closest."""
    return f"unknown verb {word}.{did_you_mean(word, VERBS, most=1)} Known: {', '.join(VERBS)}"
