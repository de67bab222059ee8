"""The page of a probe: rows of the training data, every token coloured by gate or statistic, in one HTML file."""

from deft_lightning.probe.page.build import write_page
from deft_lightning.probe.page.numbers import Look
from deft_lightning.probe.page.spool import TokenSpool

__all__ = ["Look", "TokenSpool", "write_page"]
