"""The study: every objective in every regime of prior and noise, through the classes that `fit` uses.

``python -m deft_lightning study --config configs/study/regimes.yaml``; a finished cell is a file, so a study that was
killed goes on where it was, and ends with the same table.
"""

from deft_lightning.study.plan import Study
from deft_lightning.study.regime import Base, Regime

__all__ = ["Base", "Regime", "Study"]
