"""Tokens that an objective holds shut though the model is sure and wrong about them, and the plateau they can mean."""

from __future__ import annotations

from collections import deque
from statistics import fmean

from lightning_utilities.core.rank_zero import rank_zero_warn

WINDOW = 10  # logged steps that are looked back on
SHARE = 0.1  # of locked tokens, below which nothing is said: among labels of any kind some are odd
MOVE = 0.01  # less than this, from one half of the window to the other, is no move


class LockWatch:
    """Warns once in a run when tokens stay locked and nothing is being learnt.

    Over the last 10 logged steps: the share of locked tokens is at least 0.1 throughout, its mean in the later five is
    not lower than in the earlier five, and the mean of p is not higher; by less than 0.01 counts as not at all. Labels
    known to be wrong are to be left out before. What is left is either labels that are wrong and not known to be, shut
    out as the objective means to, or a plateau on which the gate is shut on what would correct the model. The training
    data cannot tell them apart; validation on clean data can.
    """

    def __init__(self) -> None:
        self.seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.warned = False

    def see(self, share: float, prob: float, legend: str) -> None:
        """Take note of a logged step.

        Args:
            share: Of locked tokens among those not known to be noisy.
            prob: Mean p of the same tokens.
            legend: Of the objective.
        """
        self.seen.append((share, prob))
        if self.warned or len(self.seen) < WINDOW or not self.stuck():
            return
        self.warned = True
        rank_zero_warn(
            f"gate/locked: for {WINDOW} logged steps the model has been confidently wrong about"
            f" {fmean(share for share, _ in self.seen):.0%} of the labels, {legend} nearly closes the gate on "
            "them, and prob/mean does not rise. Either these labels are wrong and rightly ignored, or "
            "training is stuck on a plateau. If val/nll and val/token_accuracy do not improve either, it is "
            "a plateau: open the"
            " gate first with --model.objective Schedule (docs/guides/monitors.md)"
        )

    def stuck(self) -> bool:
        """Return whether the window is one of a plateau, or of labels that are shut out."""
        half = WINDOW // 2
        early, late = list(self.seen)[:half], list(self.seen)[half:]
        (share, prob), (share_late, prob_late) = (map(fmean, zip(*part, strict=True)) for part in (early, late))
        least = min(share for share, _ in self.seen)
        return least >= SHARE and share_late > share - MOVE and prob_late < prob + MOVE
