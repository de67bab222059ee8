"""Deterministic label noise with token-level truth."""

from deft_lightning.data.noise.base import Noise, NoiseOp, ResponseNoise, TokenNoise, known_noise
from deft_lightning.data.noise.responses import ResponseSwap
from deft_lightning.data.noise.tokens import TokenReplace

__all__ = ["Noise", "NoiseOp", "ResponseNoise", "ResponseSwap", "TokenNoise", "TokenReplace", "known_noise"]
