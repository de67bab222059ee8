"""A dense head that shares no code with the package, and what the tests of the fused head measure with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from worlds import noise_models, random_context

from deft_lightning.functional import TokenContext, TokenStats
from deft_lightning.objectives import (
    DEFT,
    EAFT,
    BySource,
    Cayley,
    Contaminated,
    Likelihood,
    Needs,
    Objective,
    Truncated,
    Tsallis,
    known_objectives,
)
from deft_lightning.ops import ReferenceHead
from deft_lightning.ops.backend import Backend
from deft_lightning.ops.linear import linear_loss

FP32 = 5e-5  # of the largest entry
# All that the package has, and settings of them that take another way through a head.
OBJECTIVES: list[Objective] = [
    *(cls() for cls in known_objectives().values() if cls.__module__.startswith("deft_lightning.")),
    Tsallis(q=1.5),
    Cayley(floor=0.5),
    DEFT(eps=1e-6),
    EAFT(k=3, normalizer="none"),
    *noise_models(),
    BySource(base=Contaminated(), own={"a": Cayley(floor=0.5), "b": Contaminated(level="answer")}),
    Truncated(threshold=0.05, keep="below", base=Likelihood(), normalize_by="kept"),
    Truncated(threshold=0.05, base=Cayley(floor=0.5)),
]


class Problem(NamedTuple):
    """Everything a head is called with; ``options`` are softcap, logit_scale and ignore_index."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    token_weight: Tensor | None = None
    options: dict[str, Any] = {}  # noqa: RUF012

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = [None if t is None else t.to(dtype) for t in (self.hidden, self.weight, self.bias)]
        assert tensors[0] is not None and tensors[1] is not None
        return self._replace(hidden=tensors[0], weight=tensors[1], bias=tensors[2])


def problem(
    n: int, vocab: int, dim: int = 6, *, seed: int = 0, masked: float = 0.3, bias: bool = False, weighted: bool = False,
    scale: float = 2.0, **options: Any,
) -> Problem:  # fmt: skip
    """A float64 problem; a third of the targets is the likeliest entry, so that every range of p occurs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # Through float32, so that the float32 head is given the very numbers the oracle sees.
        return torch.randn(*shape, generator=generator).double()

    hidden, weight = normal(n, dim), scale / math.sqrt(dim) * normal(vocab, dim).float().double()
    weight = weight.float().double()
    targets = torch.randint(vocab, (n,), generator=generator)
    easy = torch.rand(n, generator=generator) < 0.3
    targets = torch.where(easy, (hidden @ weight.T).argmax(-1), targets)
    targets[torch.rand(n, generator=generator) < masked] = -100
    return Problem(
        hidden,
        weight,
        targets,
        normal(vocab) if bias else None,
        torch.rand(n, generator=generator).double() * 2 if weighted else None,
        options,
    )


class Result(NamedTuple):
    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def differentiate(
    head: Callable[[Problem], Tensor], case: Problem, upstream: float = 1.0, frozen: tuple[str, ...] = ()
) -> Result:
    """Value and gradients of ``upstream * head(case)`` by its hidden states, weight and bias."""
    fields = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {k: None if v is None else v.detach().clone().requires_grad_(k not in frozen) for k, v in fields.items()}
    loss = head(case._replace(**leaves))
    (loss * upstream).backward()
    return Result(loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves.values()))


def stats_from_logits(logits: Tensor, targets: Tensor, topk: int) -> TokenStats:
    """Statistics through plain ``log_softmax``; only log p keeps its graph."""
    log_pi = torch.log_softmax(logits, dim=-1)
    pi = log_pi.detach().exp()
    largest = pi.topk(min(topk, pi.shape[-1]), dim=-1).values
    return TokenStats(
        log_pi.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        pi.square().sum(-1),
        torch.special.entr(pi).sum(-1),
        logits.detach().argmax(-1) == targets,
        torch.special.entr(largest / largest.sum(-1, keepdim=True)).sum(-1) if topk else None,
        logits.detach().argmax(-1),
    )


def dense_logits(case: Problem) -> Tensor:
    """All logits at once, in float32 after the product as a model's own forward does, float64 for float64."""
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    return cap * torch.tanh(logits / cap) if cap else logits


def context_for(objective: Callable[[TokenStats], Tensor], case: Problem) -> TokenContext:
    """What is known of the tokens beside the prediction: random, and nothing where the objective does not look."""
    looks = isinstance(objective, Objective) and (objective.needs != Needs() or objective.sources)
    return random_context(len(case.targets)) if looks else TokenContext()


def reference_for(objective: Callable[[TokenStats], Tensor], case: Problem) -> ReferenceHead | None:
    """A reference at half the hidden states, where the objective looks at one."""
    if not (isinstance(objective, Objective) and objective.needs.reference):
        return None
    bias = None if case.bias is None else case.bias.detach()
    return ReferenceHead(case.hidden.detach() / 2, case.weight.detach(), bias)


def dense_loss(objective: Callable[[TokenStats], Tensor]) -> Callable[[Problem], Tensor]:
    def head(case: Problem) -> Tensor:
        keep = case.targets != -100
        stats = stats_from_logits(dense_logits(case)[keep], case.targets[keep], getattr(objective, "topk", 0))
        known: dict[str, Tensor] = {
            name: field[keep].to(stats.log_prob.dtype if field.is_floating_point() else field.dtype)
            for name, field in context_for(objective, case)._asdict().items()
            if field is not None
        }
        if (reference := reference_for(objective, case)) is not None:
            before = case._replace(hidden=reference.hidden, weight=reference.weight, bias=reference.bias)
            log_pi0 = dense_logits(before)[keep].log_softmax(-1)
            apart = (log_pi0.exp() * (log_pi0 - dense_logits(case)[keep].log_softmax(-1))).sum(-1)
            stats = stats._replace(reference_kl=apart)
        if case.token_weight is None:
            return objective(stats._replace(**known)).sum()
        weight = case.token_weight[keep]
        return (objective(stats._replace(**(known | {"weight": weight}))) * weight).sum()

    return head


def fused_loss(objective: Callable[[TokenStats], Tensor], backend: Backend = "auto") -> Callable[[Problem], Tensor]:
    def head(case: Problem) -> Tensor:
        token_weight = None if case.token_weight is None else case.token_weight.to(dtype_of_loss(case.hidden.dtype))
        return linear_loss(
            case.hidden, case.weight, case.targets, objective, bias=case.bias, token_weight=token_weight,
            backend=backend, context=context_for(objective, case), reference=reference_for(objective, case),
            **case.options,
        )[0]  # fmt: skip

    return head


def dtype_of_loss(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_dtype(stats: TokenStats, dtype: torch.dtype) -> TokenStats:
    return stats.map(lambda field: field.to(dtype) if field.is_floating_point() else field)


def distance(found: Tensor | None, wanted: Tensor | None) -> float:
    """Largest error as a share of the largest entry; where everything should be 0, the largest error itself."""
    assert (found is None) == (wanted is None)
    if found is None or wanted is None or not found.numel():
        return 0.0
    largest = wanted.double().abs().max().item()
    return (found.double() - wanted.double()).abs().max().item() / (largest or 1.0)


def relative_error(found: Tensor | None, wanted: Tensor | None) -> float:
    """Norm of the error as a share of the norm: one narrow head is held to a multiple of another's."""
    assert found is not None and wanted is not None
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def assert_close(found: Result, wanted: Result, tolerance: float) -> None:
    errors = {name: distance(f, w) for name, f, w in zip(Result._fields, found, wanted, strict=True)}
    assert all(error <= tolerance for error in errors.values()), errors


def assert_stats_close(found: TokenStats, wanted: TokenStats, rtol: float, atol: float) -> None:
    for name, f, w in zip(TokenStats._fields, found, wanted, strict=True):
        assert (f is None) == (w is None), name
        if f is not None and w is not None:
            torch.testing.assert_close(
                f.to(w.dtype), w, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def bytes_held(run: Callable[[], object]) -> list[int]:
    """What the allocator holds beyond the start after each of its calls, kernels' own temporaries included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [0, *accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))]


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of what the allocator holds beyond the start."""
    return max(bytes_held(run))
