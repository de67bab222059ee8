"""Deterministic label noise with token-level truth."""

from deft_lightning.data.noise.answers import AnswerCorrupt
from deft_lightning.data.noise.base import ExampleNoise, Noise, NoiseOp, ResponseNoise, TokenNoise, known_noise
from deft_lightning.data.noise.chars import CharNoise
from deft_lightning.data.noise.edits import Edit, Mark, apply_edits
from deft_lightning.data.noise.options import OptionFlip
from deft_lightning.data.noise.responses import ResponseSwap
from deft_lightning.data.noise.rules import WrongRule
from deft_lightning.data.noise.steps import StepEdit
from deft_lightning.data.noise.tokens import TokenReplace

__all__ = [
    "AnswerCorrupt",
    "CharNoise",
    "Edit",
    "ExampleNoise",
    "Mark",
    "Noise",
    "NoiseOp",
    "OptionFlip",
    "ResponseNoise",
    "ResponseSwap",
    "StepEdit",
    "TokenNoise",
    "TokenReplace",
    "WrongRule",
    "apply_edits",
    "known_noise",
]
