"""Which objective to train with, by what a probe has measured: a few rules with all their thresholds in one place."""

from __future__ import annotations

from typing import Literal, NamedTuple

# All thresholds. They come from studies of small models: strong prior with 60 % wrong answers, neighbouring prior with
# 40 %, from scratch, and a sure model under a new rule.
FEW = 0.1  # share of answers with a gain below which the model is said to know nothing of the labels
OFTEN_SURE = 1 / 3  # share of tokens from which the model is said to be sure
MOSTLY_WRONG = 0.5  # how often it is right where it is sure, below which it is sure of something else
CLEAN = 0.05  # estimated share of wrong answers, and of wrong tokens in the others, below which data count as clean
LARGE = 0.5  # gain a token in nats from which the model counts as knowing the task

CONTAMINATED = "Contaminated"  # with its defaults


class Facts(NamedTuple):
    """What the rules look at.

    Attributes:
        noise: Estimated share of wrong answers.
        noise_tokens: Estimated share of wrong tokens in the others.
        gain_token: Mean gain over chance a token, in nats.
        gain_positive: Share of answers that the model explains better than chance.
        sure: Share of tokens where the model is sure.
        sure_right: How often the label is the first choice there; None where it is never sure.
    """

    noise: float
    noise_tokens: float
    gain_token: float
    gain_positive: float
    sure: float
    sure_right: float | None


class Recommendation(NamedTuple):
    """An objective, and why.

    Attributes:
        objective: Its legend; None where the numbers do not tell.
        rule: Which rule has spoken.
        text: One sentence.
    """

    objective: str | None
    rule: Literal["other", "unknown", "clean", "mixed"]
    text: str


def recommend(facts: Facts) -> Recommendation:
    """Recommend an objective.

    The first rule that fits speaks:

    - ``other``: hardly any answer has a gain, and the model is sure and mostly wrong. A new rule and noise that agrees
      with itself look alike: none is recommended.
    - ``unknown``: hardly any answer has a gain, and the model is not sure. It knows nothing of the task.
    - ``clean``: little noise and a large gain. Objectives hardly differ: NLL.
    - ``mixed``: everything else. The noise model sorts the answers.
    """
    seen = f"{facts.noise:.2f} of the answers and {facts.noise_tokens:.2f} of the tokens in the others look like noise"
    if facts.gain_positive < FEW:
        some = f"it explains {facts.gain_positive:.2f} of the answers better than chance"
        if facts.sure >= OFTEN_SURE and facts.sure_right is not None and facts.sure_right < MOSTLY_WRONG:
            return Recommendation(
                None, "other",
                f"cannot tell: the model is sure of something else ({some}, and right on {facts.sure_right:.2f} of"
                " those tokens); take NLL if the labels are right, and do not train if most of them are wrong",
            )  # fmt: skip
        return Recommendation(
            CONTAMINATED, "unknown",
            f"{CONTAMINATED}: the model does not know this task yet ({some}), so the noise rate is not an estimate, and"
            " this objective learns from scratch about as well as NLL",
        )  # fmt: skip
    if max(facts.noise, facts.noise_tokens) < CLEAN and facts.gain_token >= LARGE:
        return Recommendation(
            "NLL", "clean",
            f"NLL: {seen}, and the model gains {facts.gain_token:.2f} nats per token over chance, so that objectives"
            " hardly differ (Contaminated does as well)",
        )  # fmt: skip
    return Recommendation(
        CONTAMINATED, "mixed",
        f"{CONTAMINATED}: {seen}, and the model explains {facts.gain_positive:.2f} of the answers better than chance,"
        " so that it can tell which (measured on small models; on a pretrained one, SmolLM2-135M, DEFT keeps as much)",
    )  # fmt: skip
