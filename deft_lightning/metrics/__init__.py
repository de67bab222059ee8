"""Metrics whose sums are exact over ranks: torchmetrics with packed states."""

from deft_lightning.metrics.auroc import binned_auroc, exact_auroc, spread
from deft_lightning.metrics.by_source import SourceSums, TokenSources
from deft_lightning.metrics.example_sums import ExampleSums
from deft_lightning.metrics.histogram import Histogram, PackedHistogram
from deft_lightning.metrics.quantiles import Quantiles
from deft_lightning.metrics.tokens import TokenMeter

__all__ = [
    "ExampleSums",
    "Histogram",
    "PackedHistogram",
    "Quantiles",
    "SourceSums",
    "TokenMeter",
    "TokenSources",
    "binned_auroc",
    "exact_auroc",
    "spread",
]
