"""Instruction data: sources, formats, templates, noise, order."""

from deft_lightning.data.module import InstructionDataModule
from deft_lightning.data.noise import Noise, NoiseOp, ResponseNoise, ResponseSwap, TokenNoise, TokenReplace, known_noise

__all__ = [
    "InstructionDataModule",
    "Noise",
    "NoiseOp",
    "ResponseNoise",
    "ResponseSwap",
    "TokenNoise",
    "TokenReplace",
    "known_noise",
]
