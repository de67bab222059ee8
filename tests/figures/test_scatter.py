"""The scatter: magnitudes against autograd on dense logits, and what a picture of them shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from deft_lightning.errors import UserError
from deft_lightning.figures import TokenSample, gradient_scatter
from deft_lightning.figures.scatter import gradient_norm
from deft_lightning.functional import token_loss, token_stats
from deft_lightning.objectives import DEFT, DFT, EAFT, NLL, Cayley, Focal, Likelihood, Objective, Tsallis

V = 30


def logits(tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 12, tokens, dtype=torch.float64)[:, None]
    z = spread * torch.randn(tokens, V, generator=generator, dtype=torch.float64)
    right = torch.rand(tokens, generator=generator) < 0.7
    return z, torch.where(right, z.argmax(1), torch.randint(0, V, (tokens,), generator=generator))


def sample(noise: bool = False, tokens: int = 200) -> TokenSample:
    z, y = logits(tokens)
    stats = token_stats(z, y, topk=20)
    code = (~stats.correct).long() if noise else torch.zeros_like(y)
    assert stats.topk_entropy is not None
    return TokenSample(
        *(part.float().numpy() for part in (stats.log_prob, stats.entropy, stats.collision)), stats.correct.numpy(),
        code.numpy(), np.asarray([20]), stats.topk_entropy.float().numpy()[None], np.arange(tokens),
        np.zeros(tokens, np.int64), np.asarray(["ResponseSwap"]), np.asarray(tokens),
    )  # fmt: skip


@pytest.mark.parametrize(
    "objective", [NLL(), Likelihood(), DEFT(), Cayley(floor=0.5), EAFT(), Focal(), DFT()], ids=repr
)
def test_magnitude_is_the_norm_of_what_autograd_sends_to_the_logits(objective: Objective) -> None:
    z, y = logits()
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(token_loss(z, y, objective).sum(), z)
    wanted = gradient.norm(dim=1)
    found = gradient_norm(token_stats(z.detach(), y, topk=objective.topk), objective)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-7, abs=1e-8)
    # From what the file keeps, in float32, as far as a picture can tell.
    assert gradient_norm(sample().stats(objective.topk), objective).tolist() == pytest.approx(wanted.tolist(), abs=2e-3)


@pytest.mark.slow
def test_every_objective_is_a_panel_on_one_scale(
    tmp_path: Path, drawn: list[Any], texts: Callable[[Path], list[str]]
) -> None:
    tokens = sample()
    png, svg = gradient_scatter(tokens, [NLL(), Likelihood(), DEFT()], tmp_path / "x")
    *found, bar = drawn[0].axes
    assert [axes.get_title("left") for axes in found] == ["NLL", "Likelihood", "DEFT"]
    (points,) = found[0].collections
    assert np.asarray(points.get_offsets())[:, 0] == pytest.approx(np.exp(tokens.log_prob))
    assert np.asarray(points.get_offsets())[:, 1] == pytest.approx(tokens.entropy)
    p = np.exp(tokens.log_prob)
    assert points.get_array().tolist() == pytest.approx(
        np.sqrt((1 - p) ** 2 + (tokens.collision - p**2).clip(0)), abs=1e-3
    )
    scales = [(axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) for axes in found]
    assert len(set(scales)) == 1 and scales[0][0] == 0 and scales[0][1] == pytest.approx(points.get_array().max())
    assert "norm" in bar.get_ylabel() and {"NLL", "DEFT", "entropy H (nats)"} <= set(texts(svg))
    assert not drawn[0].legends
    # In the picture, at the left edge of the panels, where the model is wrong: no pale point with NLL, all with
    # Likelihood, and with DEFT those where it is sure.
    image = imread(png)
    pale = (image[..., 0] > 0.8) & (image[..., 2] < 0.4)
    edges = [axes.get_position().x0 * image.shape[1] for axes in found]
    counts = [int(pale[:, int(edge) : int(edge) + 8].sum()) for edge in edges]
    assert counts[0] == 0 and 100 < counts[2] < 0.9 * counts[1], counts


@pytest.mark.slow
def test_noisy_labels_have_a_marker_and_a_legend(
    tmp_path: Path, drawn: list[Any], texts: Callable[[Path], list[str]]
) -> None:
    tokens = sample(noise=True)
    _, svg = gradient_scatter(tokens, [NLL(), DEFT()], tmp_path / "x")
    clean, noisy = drawn[0].axes[0].collections
    assert len(noisy.get_offsets()) == int((tokens.noise_code > 0).sum()) > 20
    assert len(clean.get_offsets()) + len(noisy.get_offsets()) == 200
    shapes = [len(points.get_paths()[0].vertices) for points in (clean, noisy)]
    assert shapes[1] == 4 < shapes[0] and {"clean label", "noisy label"} <= set(texts(svg))


def test_an_outlier_does_not_flatten_the_scale(tmp_path: Path, drawn: list[Any]) -> None:
    gradient_scatter(sample(), [Tsallis(q=2.0), NLL()], tmp_path / "x.png")
    norm = drawn[0].axes[0].collections[0].norm
    values = [axes.collections[0].get_array().tolist() for axes in drawn[0].axes[:2]]
    assert max(map(max, values)) > 1e3 and norm.vmax == pytest.approx(np.quantile(np.stack(values), 0.995))


@pytest.mark.slow
def test_of_a_large_sample_every_nth_is_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    for most, wanted in ((50, 50), (1, 1), (1000, 200)):
        gradient_scatter(sample(), [NLL()], tmp_path / "x.png", most=most)
        offsets = np.asarray(drawn[-1].axes[0].collections[0].get_offsets())
        assert len(offsets) == wanted


def test_a_sample_comes_back_from_its_file(tmp_path: Path) -> None:
    tokens = sample(noise=True)
    tokens.save(tmp_path / "tokens.npz")
    for path in (tmp_path, tmp_path / "tokens.npz"):
        found = TokenSample.load(path)
        for field in fields(TokenSample):
            assert np.array_equal(getattr(found, field.name), getattr(tokens, field.name)), field.name
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sample of tokens; the verb probe writes one"):
        gradient_scatter(tmp_path, [NLL()], tmp_path / "x.png")
    np.savez(tmp_path / "tokens.npz", log_prob=np.zeros(3))
    with pytest.raises(UserError, match="is not a sample of tokens"):
        gradient_scatter(tmp_path, [NLL()], tmp_path / "x.png")
    (tmp_path / "tokens.npz").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(UserError, match="is not a sample of tokens"):
        gradient_scatter(tmp_path, [NLL()], tmp_path / "x.png")
    with pytest.raises(UserError, match=r"5 largest.*there is: 20.*--model.objective.k 5"):
        gradient_scatter(sample(), [EAFT(k=5)], tmp_path / "x.png")
    with pytest.raises(UserError, match="at least one objective"):
        gradient_scatter(sample(), [], tmp_path / "x.png")
    with pytest.raises(UserError, match="at least one token per panel"):
        gradient_scatter(sample(), [NLL()], tmp_path / "x.png", most=0)
    empty = sample()
    short = {field.name: getattr(empty, field.name)[:0] for field in fields(empty)[:5]}
    with pytest.raises(UserError, match="the sample is empty"):
        gradient_scatter(replace(empty, **short), [NLL()], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
