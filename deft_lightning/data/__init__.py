"""Instruction data: sources, formats, templates, noise, order."""

from deft_lightning.data.module import InstructionDataModule
from deft_lightning.data.noise import (
    AnswerCorrupt,
    CharNoise,
    Edit,
    ExampleNoise,
    Noise,
    NoiseOp,
    OptionFlip,
    ResponseNoise,
    ResponseSwap,
    StepEdit,
    TokenNoise,
    TokenReplace,
    WrongRule,
    known_noise,
)

__all__ = [
    "AnswerCorrupt",
    "CharNoise",
    "Edit",
    "ExampleNoise",
    "InstructionDataModule",
    "Noise",
    "NoiseOp",
    "OptionFlip",
    "ResponseNoise",
    "ResponseSwap",
    "StepEdit",
    "TokenNoise",
    "TokenReplace",
    "WrongRule",
    "known_noise",
]
