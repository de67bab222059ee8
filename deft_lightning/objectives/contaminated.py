r"""A noise model behind the gate: how probable it is that a label is right, given what model and chance say of it.

The label comes from the model with probability ``1 - e``, else from a chance distribution ``u`` (Huber's contamination
model). The gate is the posterior ``P(label is right | label)``; the rate ``e`` is estimated by EM as training goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.objectives.base import Objective
from deft_lightning.objectives.noise_rates import LOWEST, TELLING, NoiseRates, TrackedRates, logit, rate_by_em
from deft_lightning.objectives.run_state import Needs, RunState, Sampled

TokenChance = Literal["unigram", "marginal", "least", "unprompted"]
AnswerChance = Literal["unigram", "marginal", "least", "unprompted", "best"]
Level = Literal["both", "token", "answer"]


class Posterior(NamedTuple):
    """What the noise model makes of N tokens.

    Attributes:
        mixture: ``log((1 - e2) p + e2 u)`` in nats, differentiable where ``log p`` is.
        token: ``P(the token is right | its answer is)`` in ``[0, 1]``, detached.
        answer: ``P(its answer is right)`` in ``[0, 1]``, the same for all tokens of an answer, detached.
        noise: ``log b`` in nats, how probable the token is in an answer that is noise, detached.
        evidence: ``sum log a - log b`` over its answer, in nats, detached; 0 where answers are not judged.
        size: Tokens of its answer.
    """

    mixture: Tensor
    token: Tensor
    answer: Tensor
    noise: Tensor
    evidence: Tensor
    size: Tensor


@dataclass(frozen=True, repr=False)
class Contaminated(Objective):
    r"""Label noise model: gate ``P(the label is right | the label)``, the posterior of a mixture with chance.

    A token of a right answer has the label that the model would give with probability ``1 - e2``, else one by chance
    ``u``; a whole answer is noise with probability ``e1``, all its tokens by chance. For the tokens t of an answer

        a_t = (1 - e2) p_t + e2 u_t             b_t = (1 - e2) q_t + e2 u_t
        w = sigmoid(sum_t log(a_t / b_t) - logit(e1))
        loss = -log((1 - e1) prod_t a_t + e1 prod_t b_t)          gate_t = w (1 - e2) p_t / a_t

    with ``q`` the chance of answers; where it is that of tokens, ``b = u``. Of any other ``q`` the evidence of a token
    is weighted by ``1 - q``: ``b`` is ``a^q`` times the above to the power of ``1 - q``, see :func:`open_to_choice`.
    The loss is a likelihood in nats, shared out to the tokens of an answer: each has ``-w log a - (1 - w) log b``, and
    an even part of what the verdict on the answer costs. Rates of 0 are NLL. After
    each optimizer step they move towards the mean posterior of its tokens (EM): ``e1`` to the mean of ``1 - w`` over
    answers, ``e2`` to that of ``1 - (1 - e2) p / a`` over tokens, each counted ``w`` times, within [0.01, 0.95].
    ``noise/estimated`` and ``noise/estimated_tokens`` log them. Source: Huber (1964); as a gate over tokens, this
    package.

    Before the first step ``e1`` is estimated on a sample of the training answers, unless the model finds fewer than one
    in ten of them better than chance: then, and outside a run, the rates begin at 0.01.

    Args:
        level: `token` judges tokens alone (``w = 1``), `answer` whole answers alone (``e2 = 0``), `both` does both.
        chance: ``u`` of a token: `unigram`, how frequent the label is among the training labels; `marginal`, how often
            the model says it, whatever the prompt; `least`, the smaller of the two, and ``1 / V`` at least;
            `unprompted`, what the model says of the answer without its prompt, behind a few other answers, in the same
            step.
        answer_chance: ``u`` of the sum over an answer. `best` is of `least` and `unprompted` the one that explains the
            answer better; null is that of tokens.
        start: Rates of the first step, in ``[0, 1)``, in place of the estimate.
        decay: What a rate keeps of itself in a step, in ``[0, 1)``.
        opening: Share of the optimizer steps, from the first, in which the gate is at least a tenth of the collision
            probability: a model that is sure of another rule is freed by it.

    Attributes:
        rates: At the step at hand; no setting.
        opened: Whether the step at hand is one of the opening; no setting.
    """

    level: Level = "both"
    chance: TokenChance = "least"
    answer_chance: AnswerChance | None = "best"
    start: float | None = None
    decay: float = 0.9
    opening: float = 0.0
    rates: NoiseRates = field(default=NoiseRates(0.0, 0.0), init=False)
    opened: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Refuse what is no share, and words that mean nothing."""
        known = {"level": get_args(Level), "chance": get_args(TokenChance), "answer_chance": get_args(AnswerChance)}
        for name, words in known.items():
            word = getattr(self, name)
            if word not in words and not (name == "answer_chance" and word is None):
                raise UserError(f"Contaminated: {name} must be one of {', '.join(words)}, not {word!r}")
        for name, share in (("start", self._start), ("decay", self.decay)):
            if not 0.0 <= share < 1.0:
                raise UserError(f"Contaminated: {name} {share} is outside [0, 1)")
        if not 0.0 <= self.opening <= 1.0:
            raise UserError(f"Contaminated: opening {self.opening} is outside [0, 1]")
        object.__setattr__(self, "rates", self._started())

    @property
    def _start(self) -> float:
        return LOWEST if self.start is None else self.start

    def _started(self) -> NoiseRates:
        return NoiseRates(0.0 if self.level == "token" else self._start, 0.0 if self.level == "answer" else self._start)

    @property
    def needs(self) -> Needs:
        """Return what it looks at: chance, and the answers where they are judged."""
        answers = self.level != "token"
        return Needs(self.chance, (self.answer_chance or self.chance) if answers else None, answers)

    @property
    def needs_batch(self) -> bool:
        """Return whether whole answers are judged: the sum over their tokens enters."""
        return self.level != "token"

    @property
    def scheduled(self) -> bool:
        """Return whether there is an opening."""
        return self.opening > 0

    @property
    def tracks(self) -> TrackedRates:
        """Return its noise rates."""
        return TrackedRates(self, self.decay, self._started(), self.start is None and self.level != "token")

    def at(self, state: RunState) -> Objective:
        """Return it with the rates of this point of the run."""
        rates = NoiseRates(*state.rates) if state.rates else self._started()
        return self.with_(rates=rates, opened=self.opening > 0 and state.progress < self.opening)

    def updated(self, stats: TokenStats) -> Contaminated:
        """Return it after one step of EM on these tokens, for a training loop of one's own.

        Args:
            stats: Statistics with chance, and with answers where they are judged.
        """
        rates = self.tracks.fold(self.rates, self.noise_sums(stats).tolist())
        return self.with_(rates=NoiseRates(*rates))

    @torch.no_grad()
    def rate_on(self, stats: TokenStats) -> Sampled:
        """Return the noise rate of answers by EM on a sample; above 0.9 the model tells nothing of them.

        Args:
            stats: Statistics of the sample with chance and answers, of the model before training.
        """
        found = self.posterior(stats.detach())
        weight = torch.ones_like(found.size) if stats.weight is None else stats.weight
        each = (weight / found.size).double()
        answers = round(float((1 / found.size.double()).sum()))
        if not float(each.sum()) > 0:
            return Sampled(answers, None)
        rate = rate_by_em(found.evidence.double(), each, LOWEST)
        return Sampled(answers, rate if rate <= TELLING else None)

    def posterior(self, stats: TokenStats) -> Posterior:
        """Return what the noise model makes of tokens; differentiable in ``log p`` through the mixture alone.

        Raises:
            UserError: The statistics lack what it needs.
        """
        log_prob, chance = stats.log_prob, stats.chance
        if chance is None:
            raise UserError(
                f"{self!r} needs TokenStats.chance, how probable each label is by chance (log u): train with SFTModule"
                " and InstructionDataModule, or give context=TokenContext(chance=...)"
            )
        chance = chance.detach()
        rate = self.rates.tokens
        mixture = log_prob
        token = torch.ones_like(log_prob)
        if rate > 0:
            mixture = torch.logaddexp(log_prob + math.log1p(-rate), chance + math.log(rate))
            token = (log_prob.detach() + math.log1p(-rate) - mixture.detach()).exp()
        if self.level == "token":
            ones = torch.ones_like(token)
            return Posterior(mixture, token, ones, chance, torch.zeros_like(token), ones)
        if stats.example is None:
            raise UserError(f"{self!r} needs TokenStats.example, the answer of each token, to judge whole answers")
        noise = chance if stats.answer_chance is None else stats.answer_chance.detach()
        if rate > 0 and stats.answer_chance is not None:
            # Single tokens may be noise in either kind of answer: else each that nobody expects, of which real text has
            # many, would speak for the answer.
            noise = torch.logaddexp(noise + math.log1p(-rate), chance + math.log(rate))
        if stats.answer_chance is not None:
            noise = open_to_choice(noise, mixture.detach(), stats.answer_chance.detach())
        place = answers_of(stats.example)
        total = torch.zeros_like(log_prob).index_add_(0, place, mixture.detach() - noise)
        size = torch.zeros_like(log_prob).index_add_(0, place, torch.ones_like(token))
        evidence = total[place]
        answer = torch.sigmoid(evidence - logit(self.rates.answers))
        return Posterior(mixture, token, answer, noise, evidence, size[place])

    def noise_sums(self, stats: TokenStats) -> Tensor:
        """Return ``sum 1 - w`` and count of answers, ``sum w (1 - token)`` and ``sum w`` of tokens; float64.

        An answer counts the mean weight of its tokens, a token its own, where they have weights.
        """
        found = self.posterior(stats.detach())
        weight = torch.ones_like(found.token) if stats.weight is None else stats.weight
        # In float64: the sums of micro-batches and ranks are to be those of one batch.
        token, answer, size, weight = (x.double() for x in (found.token, found.answer, found.size, weight))
        each = weight / size if self.level != "token" else torch.zeros_like(weight)
        kept = weight * answer if self.level != "answer" else torch.zeros_like(weight)
        return torch.stack([((1 - answer) * each).sum(), each.sum(), ((1 - token) * kept).sum(), kept.sum()])

    @torch.no_grad()
    def _of_answer(self, found: Posterior, stats: TokenStats) -> Tensor:
        """Return what makes ``-w log a`` of the tokens of an answer ``-log((1 - e1) prod a + e1 prod b)``.

        Of each token ``-(1 - w) log b``, and evenly the divergence of w from what it is before an answer is seen.
        """
        rate = self.rates.answers
        if rate <= 0:
            return torch.zeros_like(found.noise)
        log_odds = found.evidence - logit(rate)
        return -torch.sigmoid(-log_odds) * found.noise + _divergence(log_odds, rate) / found.size

    def __call__(self, stats: TokenStats) -> Tensor:
        """Return the loss per token; its derivative by ``log p`` is minus the posterior."""
        found = self.posterior(stats)
        loss = -found.mixture
        if self.level != "token":
            # The derivative by an answer's log p is that of -log((1 - e1) prod a + e1 prod b): with w held fixed, what
            # is added has none. Token by token, so that a weight on one does not reach the others of its answer.
            loss = -found.answer * found.mixture + self._of_answer(found, stats)
        if self.opened:
            posterior = found.answer * found.token
            lift = (0.1 * stats.collision - posterior).clamp_min(0)
            loss = loss - lift * (stats.log_prob - stats.log_prob.detach())
        return loss


def _divergence(log_odds: Tensor, rate: float) -> Tensor:
    """Return ``KL(w || 1 - rate)`` of two coins in nats, ``w = sigmoid(log_odds)``."""
    right, wrong = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    of_right = logsigmoid(log_odds) - math.log1p(-rate)
    of_wrong = logsigmoid(-log_odds) - math.log(rate)
    return (right * of_right + wrong * of_wrong).clamp_min(0)


def open_to_choice(noise: Tensor, mixture: Tensor, answer_chance: Tensor) -> Tensor:
    """Return ``log b`` with each token's evidence ``log a - log b`` weighted by ``1 - q``, its room for choice.

    What other answers say at such a place anyway is format. A model that does not write it yet finds it improbable in
    right answers as well, so that it is no evidence against them.

    Args:
        noise: ``log b`` in nats, shape ``(N,)``.
        mixture: ``log a`` in nats, shape ``(N,)``.
        answer_chance: ``log q`` in nats, shape ``(N,)``.
    """
    return torch.lerp(noise, mixture, answer_chance.exp())


def answers_of(example: Tensor) -> Tensor:
    """Return the place of each token's answer, from 0: tokens that stand together under one number are one answer."""
    changed = torch.zeros_like(example, dtype=torch.long)
    changed[1:] = (example[1:] != example[:-1]).long()
    return changed.cumsum(0)


__all__ = ["Contaminated"]
