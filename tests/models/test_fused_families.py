"""The fused head of many families of models: loss, statistics and every gradient are those of the dense head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import (
    BIASED,
    DENSE,
    FAMILIES,
    LACKING,
    QUIET_MIXTURES,
    SCALED,
    SOFTCAPPED,
    assert_fused_is_dense,
    fused,
    options_of,
    statistics_by_hand,
    supervised,
    to_double,
    tokens,
)
from tiny import (
    assert_same_gradients,
    build,
    gradients,
    one_line,
)

from deft_lightning.errors import UserError
from deft_lightning.functional import TokenStats
from deft_lightning.models import check_causal, check_head, find_head
from deft_lightning.objectives import DEFT, EAFT, Cayley, Objective


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in (*FAMILIES, *QUIET_MIXTURES) if kind not in LACKING])
def test_of_many_families_fused_loss_statistics_and_every_gradient_equal_the_dense_ones(kind: str) -> None:
    model = build(options_of(kind))
    ids, _ = tokens()
    check_causal(model, ids)
    check_head(model, find_head(model), ids, DEFT())
    found = assert_fused_is_dense(to_double(model))
    seam = find_head(model)
    assert seam.projection.weight.grad is None and found
    assert (seam.projection.bias is not None) == (kind in BIASED)
    assert (seam.softcap == 2.0) == (kind in SOFTCAPPED)
    assert seam.logit_scale == pytest.approx(SCALED.get(kind, 1.0))


@pytest.mark.parametrize("kind", ["phi", "gptj", "codegen", "phimoe"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_bias_of_a_head_is_added_and_trained_tied_or_not(kind: str, tied: bool) -> None:
    model = to_double(build(options_of(kind, tie_word_embeddings=tied)))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) is tied
    found = assert_fused_is_dense(model)
    assert float(found["lm_head.bias"].abs().max()) > 0.1
    ids, targets = tokens()
    with torch.no_grad():
        before = fused(model, ids, targets).loss.item()
        head.bias.zero_()
        assert abs(fused(model, ids, targets).loss.item() - before) > 0.1, "the bias is not small"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gemma3n_text", "nanochat", "granite", "cohere", "cohere2"])
@pytest.mark.parametrize("tied", [True, False])
def test_softcapping_and_scale_tied_or_not(kind: str, tied: bool) -> None:
    model = to_double(build(options_of(kind, tie_word_embeddings=tied)))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert_fused_is_dense(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
        ("hyperclovax", {"logits_scaling": 3.0}),  # multiplies where Granite divides
        ("minicpm3", {}),  # divides the hidden states
        ("mpt", {"logit_scale": 0.5}),  # has the option and ignores it
        ("recurrent_gemma", {}),  # caps under another name
        ("prophetnet", {}),  # predicts several tokens a position
    ],
)
def test_a_family_whose_head_does_something_else_is_refused(kind: str, more: dict[str, Any]) -> None:
    model = build(options_of(kind, **more))
    with pytest.raises(UserError) as caught:
        check_head(model, find_head(model), tokens()[0], DEFT())
    one_line(caught, DENSE)


@pytest.mark.parametrize("objective", [EAFT(k=5), Cayley(floor=0.5)], ids=repr)
def test_objectives_that_ask_for_more_get_it_with_and_without_a_graph(objective: Objective) -> None:
    model = build(options_of("gemma2")).double()
    ids, targets = tokens()
    logits, wanted_targets = supervised(model, ids, targets)
    log_prob, collision, entropy, correct = statistics_by_hand(logits, wanted_targets)
    top = logits.topk(5, dim=-1).values.softmax(-1)
    stats = TokenStats(log_prob, *(t.detach() for t in (collision, entropy, correct, -(top * top.log()).sum(-1))))
    wanted = objective(stats).sum()
    wanted.backward()
    expected = gradients(model)
    found = fused(model, ids, targets, objective)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert_same_gradients(gradients(model), expected, 1e-9)
    with torch.no_grad():
        assert fused(model, ids, targets, objective).loss.item() == pytest.approx(wanted.item(), rel=1e-9)
