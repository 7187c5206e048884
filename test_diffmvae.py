"""Tests of diffmvae.py and data_prep.py: one test an equation, then behaviour, then the commands.

    python -m pytest                                       # about 5 minutes on 2 cores, no network
    DIFFMVAE_REAL_DATA=/folder python -m pytest -k real    # + tests on raw data

Expected values are written down independently of the module: closed forms in float64, numerical
integration, torch.distributions.
"""
import ast
import copy
import functools
import inspect
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn as nn
from PIL import Image
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

import data_prep
import diffmvae as D

HERE = Path(__file__).parent
SDE = D.VPSDE()
FACE = D.MODALITIES["celeba"]


def tiny(dataset="celeba", **changes):
    """The smallest model that has every part."""
    base = D.Config(**{**D.PRESETS[dataset]["small"], **dict(
        dataset=dataset + "-toy", image_size=16, latent=16, image_channels=(8, 16, 16),
        mask_channels=(8, 8, 16), attr_widths=(32, 32), unet_width=16, unet_mults=(1, 2),
        unet_blocks=1, unet_attention=(4,), z_map=4, aux_width=16, aux_mults=(1,), batch_size=8,
        steps=6, aux_steps=4, log_every=2, probe_every=100, save_every=100)})
    if dataset == "cub":
        tokenizer = bird_tokenizer()
        base = replace(base, text_width=16, text_layers=2, text_heads=2, special=(0, 1, 2),
                       vocab=(D.vocabulary_size(tokenizer),) * 2, tokenizers=(tokenizer,) * 2)
    return replace(base, **changes)


@functools.cache
def bird_tokenizer():
    return D.small_tokenizer([t for ten in data_prep.toy_birds(40, 16)["text"] for t in ten])


@pytest.fixture(scope="module")
def faces():
    """16 drawn faces at 16x16 as the model's tensors."""
    return D.to_tensors(data_prep.toy_faces(16, 16, seed=5), "cpu")


@pytest.fixture(scope="module")
def birds():
    """16 drawn birds at 16x16 with a caption each as the model's tensors."""
    return toy("cub", 16).rows(np.arange(16))


def toy(dataset, n, config=None):
    """n toys as data: 5/8 training, the rest in two halves validation and test."""
    a, b = 5 * n // 8, 13 * n // 16
    split = {"train": np.arange(a), "val": np.arange(a, b), "test": np.arange(b, n)}
    data = D.Data(D.TOYS[dataset](n, 16), split, True, torch.device("cpu"))
    data.tokenize(config or tiny(dataset))
    return data


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return D.DiffMVAE(config)


def randomise(model, seed=0):
    """Give every parameter a random value, the zero-initialised ones too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def within(samples, expected, sigmas=5.0):
    """The mean of independent samples equals `expected` within its standard error."""
    error = samples.double().std() / math.sqrt(len(samples))
    assert abs(samples.double().mean().item() - expected) < sigmas * error.item() + 1e-9, \
        (samples.mean().item(), expected, error.item())


# === §1 Gaussians and fusion ===

def test_kl_closed_form():
    """[Sec. 3.2] 1/2 sum(var + mu^2 - 1 - log var): dims are summed, never averaged."""
    mu, var = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    assert D.kl_to_standard_normal(mu, var.log()).item() == pytest.approx(0.4969864022, abs=1e-9)
    mu, logvar = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(torch.zeros_like(mu), 1.0)).sum(1)
    got = D.kl_to_standard_normal(mu, logvar)
    assert got.shape == (5,) and torch.allclose(got, want, atol=1e-12)
    twice = D.kl_to_standard_normal(mu.repeat(1, 2), logvar.repeat(1, 2))
    assert torch.allclose(twice, 2 * got)


def test_kl_between_closed_form():
    """torch.distributions agrees, also with a broadcast first argument; KL to N(0, I) is a case."""
    torch.manual_seed(0)
    a, b = (torch.randn(2, 5, 3, 7, dtype=torch.float64) for _ in range(2))
    want = kl_divergence(Normal(a[0][:, :1], (0.5 * a[1][:, :1]).exp()),
                         Normal(b[0], (0.5 * b[1]).exp())).sum(-1)
    got = D.kl_between(a[0][:, :1], a[1][:, :1], *b)
    assert got.shape == (5, 3) and torch.allclose(got, want, atol=1e-12)
    zero = torch.zeros_like(a[0])
    assert torch.allclose(D.kl_between(*a, zero, zero), D.kl_to_standard_normal(*a), atol=1e-12)


def test_product_of_experts_is_the_product_on_a_grid():
    """[Sec. 3.2] [Sec. 3.3] N_1 N_2 N_3 renormalised by numerical integration."""
    mus, variances = np.array([0.5, -1.0, 2.0]), np.array([0.4, 1.5, 3.0])
    grid = np.linspace(-15, 15, 300_001)
    for subset in ([1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0, 1]):
        log_density = sum(-(grid - m) ** 2 / (2 * v) * s for m, v, s in zip(mus, variances, subset))
        p = np.exp(log_density - log_density.max())
        mean = (p * grid).sum() / p.sum()
        variance = (p * (grid - mean) ** 2).sum() / p.sum()
        mu, logvar = D.product_of_experts(torch.tensor(mus).view(1, 3, 1),
                                          torch.tensor(variances).log().view(1, 3, 1),
                                          torch.tensor([subset]).bool())
        assert mu.item() == pytest.approx(mean, abs=1e-6)
        assert logvar.exp().item() == pytest.approx(variance, abs=1e-6)


def test_product_of_experts_contract():
    """Order-free; absent experts count for nothing even as NaN, in gradients too; none: error."""
    mu = torch.randn(4, 3, 5, requires_grad=True)
    logvar = torch.randn(4, 3, 5)
    subset = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    want = D.product_of_experts(mu, logvar, subset)
    order = [2, 0, 1]
    other = D.product_of_experts(mu[:, order], logvar[:, order], subset[:, order])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(want, other))
    poisoned = mu.masked_fill(~subset.unsqueeze(-1), math.nan)
    unknown = logvar.masked_fill(~subset.unsqueeze(-1), math.nan)
    got = D.product_of_experts(poisoned, unknown, subset)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    got[0].sum().backward()
    assert torch.isfinite(mu.grad).all() and (mu.grad[~subset] == 0).all()
    single = D.product_of_experts(mu, logvar, torch.tensor([[0, 1, 0]] * 4).bool())
    assert torch.allclose(single[0], mu[:, 1]) and torch.allclose(single[1], logvar[:, 1])
    with pytest.raises(ValueError, match="no expert"):
        D.product_of_experts(mu, logvar, torch.zeros(4, 3).bool())


def test_all_subsets():
    """The 2^M - 1 non-empty subsets, each once, the full one last."""
    for m in (1, 2, 3, 4):
        rows = {tuple(row) for row in D.all_subsets(m).tolist()}
        assert len(rows) == len(D.all_subsets(m)) == 2 ** m - 1
        assert all(any(row) for row in rows) and D.all_subsets(m)[-1].all()


def test_prior_expert_joins_the_full_subset_only():
    """[Sec. 3.3] --prior-expert multiplies N(0, I) into the full subset, as MoPoE's code does."""
    mu, logvar = torch.randn(2, 3, 16).double(), torch.randn(2, 3, 16).double()
    plain, prior = model_of(tiny()), model_of(tiny(prior_expert=True))
    full, part = torch.ones(2, 3).bool(), torch.tensor([[1, 0, 1]] * 2).bool()
    precision = (-logvar).exp().sum(1) + 1
    got_mu, got_logvar = prior.fuse(mu, logvar, full)
    assert torch.allclose(got_logvar, -precision.log())
    assert torch.allclose(got_mu, ((-logvar).exp() * mu).sum(1) / precision)
    assert torch.equal(prior.fuse(mu, logvar, part)[0], plain.fuse(mu, logvar, part)[0])
    assert torch.allclose(plain.fuse(mu, logvar, full)[1], -(precision - 1).log())


# === §2 Diffusion ===

def test_forward_process_is_the_iterated_kernel():
    """[Eq. 1] x_t = alpha x_0 + sigma eps: many small Euler steps of the SDE's moments."""
    n, mean, variance = 400_000, 1.0, 0.0
    for k in range(n):
        if k in (n // 10, n // 2):
            t = torch.tensor(k / n, dtype=torch.float64)
            assert SDE.alpha(t).item() == pytest.approx(mean, rel=1e-4)
            assert SDE.sigma(t).item() ** 2 == pytest.approx(variance, rel=1e-4)
        b = (0.1 + 19.9 * (k + 0.5) / n) / n
        mean, variance = mean * (1 - b / 2), variance * (1 - b / 2) ** 2 + b
    one = torch.tensor(1.0, dtype=torch.float64)
    assert SDE.alpha(one).item() == pytest.approx(mean, rel=1e-3)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2, torch.ones_like(t), atol=1e-12)


def test_ddpm_schedule():
    """[Eq. 1] alpha_bar agrees with the product over 1000 linear betas from 1e-4 to 0.02."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    mine = (SDE.alpha(t) ** 2).numpy()
    assert np.abs(mine - alpha_bar).max() < 2e-3 and 3e-5 < mine[-1] < 5e-5


def test_log_snr_and_its_inverse():
    t = torch.linspace(1e-3, 1, 500, dtype=torch.float64)
    want = torch.log(SDE.alpha(t) ** 2 / SDE.sigma(t) ** 2)
    assert torch.allclose(SDE.log_snr(t), want, atol=1e-9)
    assert torch.allclose(SDE.time_of(SDE.log_snr(t)), t, atol=1e-9)


def quadrature(f, n=400_001):
    """int f(t) dt over [t_min, 1], on a grid regular in log t; f takes and returns NumPy arrays."""
    t = np.exp(np.linspace(math.log(SDE.t_min), 0.0, n))
    return np.trapezoid(f(t), t)


def beta_over_variance(t):
    integral = 0.1 * t + 9.95 * t ** 2
    return (0.1 + 19.9 * t) / (1 - np.exp(-integral))


def test_importance_sampling_of_time():
    """[Eq. 2] t ~ beta/sigma^2 normalised; the weight keeps 1/2 and the normaliser (19.17)."""
    torch.manual_seed(0)
    t, weight = SDE.draw_time(200_000, "likelihood", "cpu")
    normaliser = quadrature(beta_over_variance)
    assert normaliser == pytest.approx(19.17, abs=0.01)
    assert torch.allclose(weight, torch.full_like(weight, 0.5 * normaliser), rtol=1e-4)
    for edge in (0.002, 0.01, 0.1, 0.5, 0.9):
        below = quadrature(lambda s: beta_over_variance(s) * (s < edge)) / normaliser
        assert (t < edge).float().mean().item() == pytest.approx(below, abs=2e-3)


def test_uniform_time_and_its_weights():
    """[Eq. 1] lambda = 1: t uniform on [t_min, 1], weight 1; the warm-up has 1/alpha^2."""
    torch.manual_seed(0)
    t, weight = SDE.draw_time(100_000, "simple", "cpu")
    assert (weight == 1).all() and t.min() >= 1e-3 and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5005, abs=1e-4)
    assert t.var().item() == pytest.approx(0.999 ** 2 / 12, rel=1e-3)
    t, weight = SDE.draw_time(1000, "v", "cpu")
    assert torch.allclose(weight, torch.exp(0.1 * t + 9.95 * t ** 2), rtol=1e-4)
    draws = torch.stack([SDE.draw_time(8, "simple", "cpu")[0] for _ in range(20_000)])
    assert draws[:, 0].mean().item() == pytest.approx(0.5005, abs=0.01)  # each place is uniform
    apart = (draws[:, 1] - draws[:, 0]).abs()                    # of neighbours: in no order
    assert ((apart > 0.2) & (apart < 0.8)).float().mean().item() == pytest.approx(5 / 7, abs=0.02)


def test_loss_is_the_weighted_integral():
    """[Eq. 2] E loss = int 1/2 beta ||score - s||^2 dt for a network with a known error."""
    torch.manual_seed(0)
    x0 = 0.5 * torch.ones(200_000, 3)
    got = SDE.loss(lambda x_t, t: 0.3 * x_t, x0, "likelihood")
    # eps - 0.3 x_t = (1 - 0.3 sigma) eps - 0.3 alpha x_0, three dims, summed

    def error(t):
        alpha2 = np.exp(-(0.1 * t + 9.95 * t ** 2))
        return 3 * ((1 - 0.3 * np.sqrt(1 - alpha2)) ** 2 + 0.09 * alpha2 * 0.25)
    want = quadrature(lambda t: 0.5 * beta_over_variance(t) * error(t))
    assert got.shape == (200_000,)
    within(got, want)
    got = SDE.loss(lambda x_t, t: 0.3 * x_t, x0, "simple")
    within(got, quadrature(error) / (1 - SDE.t_min))             # [Eq. 1] no 1/2, no 1/sigma^2


def test_v_and_eps():
    """eps_from_v inverts v = alpha eps - sigma x_0; the warm-up weight makes it the error of v."""
    x0, eps, t = torch.randn(50, 3), torch.randn(50, 3), torch.rand(50)
    alpha, sigma = SDE.alpha(t)[:, None], SDE.sigma(t)[:, None]
    x_t, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
    assert torch.allclose(SDE.eps_from_v(v, x_t, t), eps, atol=1e-5)
    guess = v + 0.1 * torch.randn_like(v)
    error = (eps - SDE.eps_from_v(guess, x_t, t)).square() / alpha ** 2
    assert torch.allclose(error, (v - guess).square(), rtol=1e-3, atol=1e-5)


def gaussian_eps(mean, variance):
    """The exact eps of data N(mean, variance): sigma (x - alpha m) / (alpha^2 v + sigma^2)."""
    def eps_net(x, t):
        alpha, sigma = (D.per_sample(a, x) for a in (SDE.alpha(t), SDE.sigma(t)))
        return sigma * (x - alpha * mean) / (alpha ** 2 * variance + sigma ** 2)
    return eps_net


def draw(sampler, steps, eps_net, n=4000, dim=1, clamp=False):
    noise = D.Noise(n, torch.Generator().manual_seed(0))
    return D.sample_diffusion(SDE, eps_net, (dim,), sampler, steps, noise, clamp)


@pytest.mark.parametrize("sampler,steps,tolerance", [
    *[(s, n, 2e-4) for s in ("ddim", "ddpm", "dpm++") for n in (1, 7, 50)],
    ("euler-maruyama", 2000, 0.03)])  # a first-order discretisation, exact only in the limit
def test_samplers_point_mass(sampler, steps, tolerance):
    """Data at one point m: every sampler must return m, the exact ones in any number of steps."""
    x = draw(sampler, steps, gaussian_eps(0.6, 0.0), n=50)
    assert (x - 0.6).abs().max() < tolerance


def test_clamping_of_x0_hat():
    """Two DDIM steps by hand, x_0_hat held in [-1, 1] and eps made to fit it; Euler-Maruyama uses
    the raw score and is cut at the end only."""
    def draw(sampler, steps, clamp):
        noise = D.Noise(3, torch.Generator().manual_seed(0))
        return D.sample_diffusion(SDE, lambda x, t: 0.9 * x, (4,), sampler, steps, noise, clamp)

    x = D.Noise(3, torch.Generator().manual_seed(0))(4)
    (a1, s1), (a2, s2) = ((math.exp(-b / 2), math.sqrt(1 - math.exp(-b))) for b in (10.05, 2.5375))
    x0 = ((1 - 0.9 * s1) / a1 * x).clamp(-1, 1)
    x = a2 * x0 + s2 * (x - a1 * x0) / s1
    want = (1 - 0.9 * s2) / a2 * x
    assert want.abs().max() > 0.5 and torch.allclose(draw("ddim", 2, True), want.clamp(-1, 1),
                                                     atol=1e-4)
    raw = draw("euler-maruyama", 3, False)
    assert raw.abs().max() > 1 and torch.equal(draw("euler-maruyama", 3, True), raw.clamp(-1, 1))


def test_euler_maruyama_ends_without_noise():
    """One step by hand, beta(1) = 20 and g^2 dt = 20 (1 - 0.001): the mean, nothing drawn."""
    seed = lambda: torch.Generator().manual_seed(0)
    made = D.sample_diffusion(SDE, lambda x, t: 0.3 * x, (4,), "euler-maruyama", 1,
                              D.Noise(3, seed()), clamp=False)
    x = D.Noise(3, seed())(4)
    score = -0.3 * x / math.sqrt(1 - math.exp(-10.05))
    assert torch.allclose(made, x + 20 * 0.999 * (0.5 * x + score), rtol=1e-5)


@pytest.mark.parametrize("sampler,steps,tolerance", [
    ("ddim", 400, 0.02), ("dpm++", 60, 0.02), ("ddpm", 400, 0.02), ("euler-maruyama", 800, 0.03)])
def test_samplers_gaussian(sampler, steps, tolerance):
    """Data N(0.3, 0.25): mean and variance come back."""
    x = draw(sampler, steps, gaussian_eps(0.3, 0.25), n=4000)
    assert x.mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.var().item() == pytest.approx(0.25, abs=tolerance)


def test_samplers_converge_at_their_order():
    """DDIM and DPM-Solver++ follow the same ODE; the second-order solver is closer to its end."""
    fine = draw("ddim", 4000, gaussian_eps(0.3, 0.25), n=64)
    coarse = {s: (draw(s, 20, gaussian_eps(0.3, 0.25), n=64) - fine).abs().mean()
              for s in ("ddim", "dpm++")}
    assert coarse["dpm++"] < 0.5 * coarse["ddim"] < 0.1


@pytest.mark.parametrize("sampler,first,last", [
    ("ddim", 1.0, 0.02), ("ddpm", 1.0, 0.02), ("dpm++", 1.0, 1e-3),
    ("euler-maruyama", 1.0, 1 - 49 * 0.999 / 50)])
def test_samplers_times(sampler, first, last):
    """A network that records t: N calls for N steps, from t = 1 down, never below t_min."""
    seen = []

    def spy(x, t):
        assert t.shape == (len(x),)
        seen.append(t[0].item())
        return torch.zeros_like(x)
    draw(sampler, 50, spy, n=3)
    assert len(seen) == 50 and seen[0] == pytest.approx(first)
    assert seen[-1] == pytest.approx(last, rel=1e-4)
    assert all(a > b for a, b in zip(seen, seen[1:])) and min(seen) >= SDE.t_min - 1e-9
    if sampler in ("ddim", "ddpm"):
        assert np.allclose(seen, 1 - np.arange(50) / 50, atol=1e-6)


def test_sampler_arguments():
    for sampler, steps in (("nonsense", 5), ("ddim", 0)):
        with pytest.raises(ValueError, match="at least 1 step"):
            draw(sampler, steps, gaussian_eps(0, 1))
    inside = draw("ddim", 5, gaussian_eps(3.0, 0.0), clamp=True)
    assert inside.max() <= 1 and draw("ddim", 5, gaussian_eps(3.0, 0.0)).max() > 2


def test_noise_rows_depend_on_their_own_seed():
    long, short = (D.Noise(n, torch.Generator().manual_seed(3)) for n in (40, 5))
    for shape in ((7,), (2, 3)):
        a, b = long(*shape), short(*shape)
        assert torch.equal(a[:5], b) and not torch.equal(a[0], a[1])
    assert abs(long(1000).std().item() - 1) < 0.02


# === §3 Eq. 5 ===

WEIGHTS, STDS, POINT = (1.0, -0.8, 0.9), (0.6, 0.5, 0.7), (1.2, 0.3, -0.4)  # x_i = w_i z + s_i n


class LinearExpert(nn.Module):
    """Expert i of the linear-Gaussian model; the prior's precision is shared out over the three,
    so that the product of all is the exact posterior and no other product is."""

    def __init__(self, i):
        super().__init__()
        self.precision = WEIGHTS[i] ** 2 / STDS[i] ** 2 + 1 / 3
        self.factor = WEIGHTS[i] / STDS[i] ** 2 / self.precision

    def forward(self, x):
        return self.factor * x, torch.full_like(x, -math.log(self.precision))


class LinearDecoder(nn.Module):
    """The exact log-likelihood of modality i."""

    def __init__(self, i):
        super().__init__()
        self.i = i

    def nll(self, z, x):
        return -Normal(WEIGHTS[self.i] * z, STDS[self.i]).log_prob(x).squeeze(1)


class ExactScoreDecoder(D.DiffusionDecoder):
    """The real diffusion decoder with the exact score of modality 0 in place of its network."""

    def __init__(self):
        super().__init__(tiny(weighting="likelihood"))

    def eps(self, x_t, t, z):
        return gaussian_eps(WEIGHTS[0] * z, STDS[0] ** 2)(x_t, t)


def bound_constants(mu, variance):
    """What Eq. 5 leaves out for modality 0, E over z ~ N(mu, variance), in closed form:
    KL(q(x_1|x) || p(x_1|z)) at the noisy end plus E[-log p(x|x_s, z)] at s = t_min."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z, weights = mu + math.sqrt(variance) * nodes, weights / weights.sum()
    ends = torch.tensor([SDE.t_min, 1.0], dtype=torch.float64)
    alpha, sigma = SDE.alpha(ends).numpy(), SDE.sigma(ends).numpy()
    x, m, v = POINT[0], WEIGHTS[0] * z, STDS[0] ** 2
    marginal = alpha[1] ** 2 * v + sigma[1] ** 2
    prior = 0.5 * (math.log(marginal / sigma[1] ** 2) - 1
                   + (sigma[1] ** 2 + alpha[1] ** 2 * (x - m) ** 2) / marginal)
    posterior = 1 / (1 / v + alpha[0] ** 2 / sigma[0] ** 2)      # variance of x given x_s, z
    slope = posterior * alpha[0] / sigma[0] ** 2                 # of its mean in x_s
    offset = posterior * m / v
    squared = (x - slope * alpha[0] * x - offset) ** 2 + (slope * sigma[0]) ** 2
    reconstruction = 0.5 * math.log(2 * math.pi * posterior) + squared / (2 * posterior)
    return float((weights * (prior + reconstruction)).sum())


def log_evidence():
    """log p(x) of the linear-Gaussian model: x ~ N(0, w w' + diag s^2)."""
    w, cov = np.array(WEIGHTS), np.outer(WEIGHTS, WEIGHTS) + np.diag(np.square(STDS))
    x = np.array(POINT)
    return -0.5 * (x @ np.linalg.solve(cov, x) + np.linalg.slogdet(2 * np.pi * cov)[1])


def test_eq5_is_log_evidence_for_the_exact_posterior(monkeypatch):
    """[Eq. 5] on a linear-Gaussian multimodal model: the bound plus its constants equals log p(x)
    for the full subset, where q is exact; for another subset A it is lower by KL(q_A || p(z|x))."""
    model = model_of(tiny(beta=1.0, attr_weight=1.0))
    model.encoders = nn.ModuleDict({n: LinearExpert(i) for i, n in enumerate(FACE)})
    model.decoders = nn.ModuleDict({"image": ExactScoreDecoder(), "mask": LinearDecoder(1),
                                    "attr": LinearDecoder(2)})
    x = {name: torch.full((400_000, 1), value) for name, value in zip(FACE, POINT)}
    everything, one = D.all_subsets(3), {name: value[:1] for name, value in x.items()}
    exact = model.fuse(*model.encode(one), torch.ones(1, 3).bool())
    for subset in everything:
        monkeypatch.setattr(D, "all_subsets", lambda m: subset[None])
        torch.manual_seed(0)
        terms = model.neg_elbo(x)
        mu, logvar = model.fuse(*model.encode(one), subset[None])
        bound = -terms["total"] - bound_constants(mu.item(), logvar.exp().item())
        gap = kl_divergence(Normal(mu, (0.5 * logvar).exp()),
                            Normal(exact[0], (0.5 * exact[1]).exp()))
        within(bound, log_evidence() - gap.item())
        assert bound.std() / 400_000 ** 0.5 < 0.03               # the estimate is sharp
        assert gap < 1e-6 if subset.all() else gap > 0.1


def test_eq4_elbo_is_tight(monkeypatch):
    """[Eq. 3] [Eq. 4] feed-forward decoders: E_q log p(x|z) - KL = log p(x) for the exact q."""
    model = model_of(tiny(decoder="feedforward", beta=1.0, attr_weight=1.0))
    model.encoders = nn.ModuleDict({n: LinearExpert(i) for i, n in enumerate(FACE)})
    model.decoders = nn.ModuleDict({n: LinearDecoder(i) for i, n in enumerate(FACE)})
    monkeypatch.setattr(D, "all_subsets", lambda m: torch.ones(1, m).bool())
    x = {name: torch.full((100_000, 1), value) for name, value in zip(FACE, POINT)}
    torch.manual_seed(0)
    within(-model.neg_elbo(x)["total"], log_evidence())


@pytest.mark.parametrize("decoder", ["diffusion", "feedforward"])
def test_neg_elbo_terms(faces, decoder):
    """[Eq. 5] and, with a feed-forward image decoder, [Eq. 4]: terms (B,), weighted and summed."""
    config = tiny(decoder=decoder, beta=0.3, attr_weight=7.0)
    model = randomise(model_of(config))
    torch.manual_seed(1)
    terms = model.neg_elbo(faces)
    assert set(terms) == {"image", "mask", "attr", "kl", "total"}
    assert all(value.shape == (16,) for value in terms.values())
    want = terms["image"] + terms["mask"] + 7 * terms["attr"] + 0.3 * terms["kl"]
    assert torch.allclose(terms["total"], want)
    mu, logvar = model.encode(faces)
    kls = []
    for subset in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]):
        keep = [i for i in range(3) if subset[i]]
        precision = (-logvar[:, keep]).exp().sum(1)
        mean = ((-logvar[:, keep]).exp() * mu[:, keep]).sum(1) / precision
        q = Independent(Normal(mean, precision ** -0.5), 1)
        kls.append(kl_divergence(q, Independent(Normal(torch.zeros(16), torch.ones(16)), 1)))
    assert torch.allclose(terms["kl"], torch.stack(kls).mean(0), rtol=1e-4)  # omega = 1/7


@pytest.mark.parametrize("batch", [1, 7, 14])
def test_mean_kl_is_over_every_subset_of_each_sample(batch):
    """[Eq. 5] one subset after the other; 7 samples and 7 subsets show what 16 would hide."""
    mu, logvar = torch.randn(2, batch, 3, 5, dtype=torch.float64)
    want = sum(D.kl_to_standard_normal(*D.product_of_experts(mu, logvar, a.expand(batch, 3))) / 7
               for a in D.all_subsets(3))
    got = model_of(tiny()).mean_kl(mu, logvar, D.all_subsets(3))
    assert torch.allclose(got, want, atol=1e-12)


def test_subsets_are_drawn_uniformly_per_sample(faces, monkeypatch):
    """[Eq. 5] omega_A = 1/7, one draw a sample."""
    model, seen, original = model_of(tiny()), [], D.product_of_experts

    def spy(mu, logvar, subset):
        seen.append(subset)
        return original(mu, logvar, subset)
    monkeypatch.setattr(D, "product_of_experts", spy)
    experts = torch.randn(70_000, 3, 16), torch.zeros(70_000, 3, 16)
    monkeypatch.setattr(model, "encode", lambda x: experts)
    for decoder in model.decoders.values():
        monkeypatch.setattr(decoder, "nll", lambda z, x: z[:, 0])
    torch.manual_seed(0)
    model.neg_elbo(faces)
    codes, counts = (seen[0] * torch.tensor([1, 2, 4])).sum(1).unique(return_counts=True)
    assert codes.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert all(abs(c / 10_000 - 1) < 0.05 for c in counts.tolist())  # 5 standard deviations


def test_mvtcae_objective(faces, birds, monkeypatch):
    """The baseline's weights for three and two modalities, z of the product of all experts, KLs to
    each expert and to N(0, I); training takes it if the configuration says so."""
    for x, dataset, weights in ((faces, "celeba", (0.7, 0.3, 0.1)),
                                (birds, "cub", (0.55, 0.45, 0.1))):
        config = tiny(dataset, decoder="feedforward", objective="mvtcae", beta=0.3, attr_weight=7.0,
                      text_weight=5.0, dropout=0.0)
        model, seen = randomise(model_of(config)), []
        original = model.decoders["image"].nll
        monkeypatch.setattr(model.decoders["image"], "nll",
                            lambda z, x: seen.append(z) or original(z, x))
        torch.manual_seed(1)
        terms = D.neg_mvtcae(model, x)
        mu, logvar = model.encode(x)
        precision = (-logvar).exp().sum(1)
        mean = ((-logvar).exp() * mu).sum(1) / precision
        q = Normal(mean, precision ** -0.5)
        torch.manual_seed(1)
        assert torch.allclose(seen[0], mean + q.stddev * torch.randn_like(mean), atol=1e-5)
        kls = [kl_divergence(q, Normal(mu[:, i], (0.5 * logvar[:, i]).exp())).sum(1)
               for i in range(mu.shape[1])]
        prior = kl_divergence(q, Normal(torch.zeros_like(mean), 1.0)).sum(1)
        nll, to_experts, to_prior = weights
        assert torch.allclose(terms["kl"], to_experts * sum(kls) + to_prior * prior, rtol=1e-4)
        reconstruction = sum({"attr": 7, "text": 5}.get(n, 1) * terms[n] for n in config.modalities)
        assert torch.allclose(terms["total"], nll * reconstruction + 0.3 * terms["kl"], rtol=1e-5)
    data = toy("celeba", 64)
    for objective, called in (("mvtcae", 1), ("mopoe", 0)):
        config, calls = tiny(objective=objective), []
        monkeypatch.setattr(D, "neg_mvtcae", lambda model, x: calls.append(1) or {"total": 0})
        D.stage1_loss(model_of(config), data, config, 0)
        assert len(calls) == called


def test_only_the_named_modalities_are_decoded(faces):
    """names=: those alone, each as it is when all are decoded."""
    model, given = randomise(model_of(tiny())), {"image": faces["image"]}
    options = dict(sampler="ddim", steps=2)
    for sample in (lambda **more: model.sample_conditional(
            given, generator=torch.Generator().manual_seed(0), **options, **more),
            lambda **more: model.sample_unconditional(
                16, "gaussian", torch.Generator().manual_seed(0), **options, **more)):
        some, every = sample(names=["attr", "image"]), sample()
        assert set(some) == {"attr", "image"} and set(every) == set(FACE)
        assert torch.equal(some["image"], every["image"])
        assert torch.equal(some["attr"], every["attr"])


def test_likelihoods_against_torch_distributions(faces):
    """[Eq. 4] Bernoulli for mask and attributes, Gaussian of variance 1/2 for images, in nats."""
    model = randomise(model_of(tiny(decoder="feedforward")))
    z = torch.randn(16, 16)
    for name in ("mask", "attr"):
        logits = model.decoders[name].net(z)
        want = -Bernoulli(logits=logits).log_prob(faces[name]).flatten(1).sum(1)
        assert torch.allclose(model.decoders[name].nll(z, faces[name]), want, rtol=1e-5)
        assert torch.equal(model.decoders[name].sample(z), (logits.sigmoid() > 0.5).float())
    mean = model.decoders["image"].net(z)
    want = -Normal(mean, math.sqrt(0.5)).log_prob(faces["image"]).flatten(1).sum(1)
    assert torch.allclose(model.decoders["image"].nll(z, faces["image"]), want, rtol=1e-5)


def test_loss_at_initialisation(faces):
    """[Eq. 1] the output layer starts at zero, so v = 0 and eps_hat = sigma x_t: known loss."""
    decoder = model_of(tiny()).decoders["image"]
    x = faces["image"][:1].expand(512, -1, -1, -1)
    torch.manual_seed(0)
    got = decoder.nll(torch.randn(512, 16), x)
    # eps - sigma x_t = alpha (alpha eps - sigma x_0), 768 dims

    def error(t):
        alpha2 = np.exp(-(0.1 * t + 9.95 * t ** 2))
        return alpha2 * (768 * alpha2 + (1 - alpha2) * x[0].square().sum().item())
    within(got, quadrature(error) / (1 - SDE.t_min))


def test_auxiliary_loss_is_on_standardised_samples():
    """[Sec. 3.4] z0 = (z - mean) / std enters Eq. 1; sampling undoes the standardisation."""
    aux, seen = model_of(tiny()).aux, []
    aux.mean.fill_(3.0)
    aux.std.fill_(2.0)
    z = 3 + 2 * torch.randn(64, 16)
    aux.sde.loss = lambda eps_net, x0, weighting: seen.append((x0, weighting)) or torch.zeros(64)
    aux.nll(z)
    assert seen[0][1] == "simple" and torch.allclose(seen[0][0].flatten(1), (z - 3) / 2)
    aux = model_of(tiny()).aux
    aux.eps = gaussian_eps(0.0, 1.0)
    aux.mean.fill_(3.0)
    aux.std.fill_(2.0)
    z = aux.sample(D.Noise(4000, torch.Generator().manual_seed(0)))
    times = torch.linspace(1, 0, 51, dtype=torch.float64)        # 50 steps of DDIM, whose error
    angles = torch.asin(SDE.sigma(times))                        # here is known
    shrink = (angles[:-1] - angles[1:]).cos().prod().item()
    assert z.shape == (4000, 16) and 0.96 < shrink < 0.99
    assert abs(z.mean().item() - 3) < 0.05
    assert z.std().item() == pytest.approx(2 * shrink, rel=0.01)


# === §4 The model's behaviour ===

SUBSETS = [(dataset, [n for n, keep in zip(names, row) if keep])
           for dataset, names in D.MODALITIES.items() for row in D.all_subsets(len(names)).tolist()]


@pytest.mark.parametrize("dataset,given", SUBSETS)
@pytest.mark.parametrize("decoder", ["diffusion", "feedforward"])
def test_every_subset_to_everything(faces, birds, dataset, given, decoder):
    """[Sec. 3.3] shapes, ranges and kinds of what comes out, n results an item."""
    model = randomise(model_of(tiny(dataset, decoder=decoder)))
    x = {"celeba": faces, "cub": birds}[dataset]
    made = model.sample_conditional({n: x[n][:3] for n in given}, n=2, steps=3,
                                    generator=torch.Generator().manual_seed(0))
    assert list(made) == list(D.MODALITIES[dataset])
    assert made["image"].shape == (6, 3, 16, 16) and made["image"].abs().max() <= 1
    if dataset == "cub":
        assert made["text"].shape == (6, 32) and (made["text"][:, 0] == 1).all()
        return
    assert made["mask"].shape == (6, 1, 16, 16) and made["attr"].shape == (6, 18)
    assert set(made["mask"].unique().tolist()) | set(made["attr"].unique().tolist()) <= {0.0, 1.0}


def test_the_results_of_an_item_follow_one_another(faces, monkeypatch):
    """[Sec. 3.3] n = 2: rows 0 and 1 belong to the first item, 2 and 3 to the second."""
    model = model_of(tiny()).eval()
    mu = torch.randn(3, 16)
    monkeypatch.setattr(model, "posterior", lambda x: (mu, torch.full((3, 16), -30.0)))
    monkeypatch.setattr(model, "decode", lambda z, noise: z)
    made = model.sample_conditional({"attr": faces["attr"][:3]}, 2)
    assert torch.allclose(made, mu[[0, 0, 1, 1, 2, 2]], atol=1e-5)


def test_conditional_z_is_a_sample_of_the_product(faces):
    """[Sec. 3.3] z ~ prod_i q(z|x_i) of what is given, with its mean and variance."""
    model, seen = randomise(model_of(tiny())), []
    model.decode = lambda z, noise, **_: seen.append(z)
    given = {n: faces[n][:1] for n in ("mask", "attr")}
    model.sample_conditional(given, n=20_000, generator=torch.Generator().manual_seed(0))
    mu, logvar = D.product_of_experts(
        torch.stack([model.encoders[n](given[n])[0] for n in given], 1),
        torch.stack([model.encoders[n](given[n])[1] for n in given], 1), torch.ones(1, 2).bool())
    assert torch.allclose(seen[0].mean(0), mu[0], atol=0.05)
    assert torch.allclose(seen[0].var(0), logvar[0].exp(), rtol=0.1)


@pytest.mark.parametrize("sampler", list(D.SAMPLERS))
def test_a_picture_depends_on_its_own_seed_not_its_batch(faces, sampler):
    model = randomise(model_of(tiny()))
    many, few = (model.sample_conditional(
        {"mask": faces["mask"][:n]}, sampler=sampler, steps=4,
        generator=torch.Generator().manual_seed(7)) for n in (6, 2))
    assert torch.allclose(many["image"][:2], few["image"], atol=1e-4)
    other = model.sample_unconditional(2, steps=4, generator=torch.Generator().manual_seed(8))
    again = model.sample_unconditional(5, steps=4, generator=torch.Generator().manual_seed(8))
    assert torch.allclose(other["image"], again["image"][:2], atol=1e-4)
    assert not torch.allclose(many["image"][0], many["image"][1], atol=1e-2)


def test_priors_differ():
    """[Sec. 3.4] "gaussian" decodes N(0, I), "aux" the auxiliary model's samples."""
    model, seen = randomise(model_of(tiny())), []
    model.aux.mean.fill_(5.0)
    model.decode = lambda z, noise, **_: seen.append(z)
    for prior in ("aux", "gaussian"):
        model.sample_unconditional(500, prior, steps=2, generator=torch.Generator().manual_seed(0))
    assert seen[0].mean() > 3 and abs(seen[1].mean()) < 0.05 and abs(seen[1].std() - 1) < 0.05
    with pytest.raises(ValueError, match="choose aux or gaussian"):
        model.sample_unconditional(2, "gausian")


def test_unknown_options_are_refused(faces):
    """A misspelt option must not silently mean the default."""
    with pytest.raises(TypeError, match="unknown options step"):
        model_of(tiny()).eval().sample_conditional({"mask": faces["mask"]}, step=20)


def test_absent_modalities_are_never_read(faces):
    """Rows outside the subset may be NaN: nothing changes, gradients included."""
    model = randomise(model_of(tiny()))
    subset = torch.tensor([[1, 0, 1], [0, 1, 0]] * 8).bool()
    poisoned = {n: x.masked_fill(~subset[:, i].view(-1, *[1] * (x.dim() - 1)), math.nan)
                for i, (n, x) in enumerate(faces.items())}
    want, got = model.posterior(faces, subset), model.posterior(poisoned, subset)
    assert all(torch.equal(a, b) and torch.isfinite(b).all() for a, b in zip(want, got))
    (got[0].sum() + got[1].sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    only = model.posterior({"attr": faces["attr"]})
    assert torch.allclose(only[0], model.encoders["attr"](faces["attr"])[0], atol=1e-6)


def test_samples_of_a_batch_do_not_mix(faces):
    """In eval mode, changing sample 3 moves its own terms only."""
    model = randomise(model_of(tiny()))

    def terms(x):
        torch.manual_seed(2)
        with torch.no_grad():
            return model.neg_elbo(x)
    other = {n: x.clone() for n, x in faces.items()}
    other["image"][3], other["mask"][3], other["attr"][3] = -other["image"][3], 0, 1
    for a, b in zip(terms(faces).values(), terms(other).values()):
        moved = ((a - b).abs() > 1e-3).nonzero().flatten().tolist()
        assert moved in ([3], [])
    assert (terms(faces)["total"] - terms(other)["total"])[3].abs() > 1e-3


def test_wrong_data_is_named(faces):
    model = model_of(tiny())
    for x, word in (({}, "expected some of"), ({"sound": faces["attr"]}, "sound"),
                    ({"mask": faces["image"]}, "mask"), ({"attr": faces["attr"][:, :5]}, "attr")):
        with pytest.raises(ValueError, match=word):
            model.posterior(x)


@pytest.mark.parametrize("dataset", D.MODALITIES)
@pytest.mark.parametrize("weighting", ["simple", "likelihood"])
def test_gradients_reach_everything(faces, birds, dataset, weighting):
    """[Eq. 5] end to end: the diffusion term alone moves every encoder; all parameters learn."""
    model = randomise(model_of(tiny(dataset, weighting=weighting))).train()
    x = {"celeba": faces, "cub": birds}[dataset]
    torch.manual_seed(0)
    model.neg_elbo(x)["image"].mean().backward()
    for name in D.MODALITIES[dataset]:  # the keys' biases of BERT cancel in the softmax
        assert all(p.grad.any() for n, p in model.encoders[name].named_parameters()
                   if not n.endswith("key.bias")), name
    model.neg_elbo(x)["total"].mean().backward()
    model.aux.nll(torch.randn(16, 16)).mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_unet_uses_time_and_z():
    unet = randomise(model_of(tiny())).decoders["image"].unet
    x, t, z = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.2]), torch.randn(2, 16)
    base = unet(x, t, z)
    assert base.shape == x.shape
    assert not torch.allclose(base, unet(x, t + 0.5, z), atol=1e-3)
    assert not torch.allclose(base, unet(x, t, -z), atol=1e-3)


@pytest.mark.parametrize("dims", [1, 2])
def test_attention_is_pytorchs(dims):
    """Two heads of 32 channels over the positions of rows and pictures, and a residual."""
    torch.manual_seed(0)
    layer, h = D.Attention(64, dims), torch.randn(2, 64, *[5] * dims)
    assert torch.equal(layer(h), h)                              # starts as a no-op
    randomise(layer)
    q, k, v = layer.qkv(layer.norm(h)).flatten(2).view(2, 3, 2, 32, -1).transpose(-1, -2).unbind(1)
    y = nn.functional.scaled_dot_product_attention(q, k, v)      # (2, heads, P, 32)
    want = h + layer.out(y.transpose(-1, -2).reshape(h.shape))
    assert torch.allclose(layer(h), want, atol=1e-5) and (want - h).abs().max() > 0.1


def test_time_embedding():
    """The network sees 1000 t: cos, then sin, of 1000 t / 10000^(k / half)."""
    angles = 370 / 10_000 ** (np.arange(4) / 4)
    want = np.concatenate([np.cos(angles), np.sin(angles)])
    assert np.allclose(D.time_embedding(torch.tensor([0.37]), 8)[0], want, atol=1e-3)


def test_published_sizes():
    """[Sec. 4.2] latent 256 at 128x128; the image encoder is Soft-IntroVAE's of 18.46 M."""
    config = D.Config()
    assert (config.image_size, config.latent) == (128, 256)
    with torch.device("meta"):
        model = D.DiffMVAE(config)
    count = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in
             (("encoder", model.encoders["image"]), ("unet", model.decoders["image"]))}
    assert count["encoder"] == pytest.approx(18.46, abs=0.01) and 20 < count["unet"] < 45
    assert model.aux.shape == (1, 16, 16)


def test_overfits_one_batch(faces):
    """Every term of Eq. 5 falls far below its start on eight fixed faces."""
    model = model_of(tiny(latent=16)).train()
    x = {n: a[:8] for n, a in faces.items()}
    optimizer, history = torch.optim.Adam(model.parameters(), 3e-3), []
    for step in range(250):
        torch.manual_seed(step)
        terms = model.neg_elbo(x)
        optimizer.zero_grad()
        terms["total"].mean().backward()
        optimizer.step()
        history.append({n: v.mean().item() for n, v in terms.items()})
    first, last = ({n: np.mean([row[n] for row in rows]) for n in history[0]}
                   for rows in (history[:5], history[-30:]))
    assert last["image"] < 0.6 * first["image"] and last["mask"] < 0.5 * first["mask"]
    assert last["attr"] < 0.4 * first["attr"]


# === §5 Text: Optimus's encoder and decoder ===

def layer_norm(x, state, name, eps):
    return nn.functional.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"],
                                    eps)


def attend(q, k, v, heads, allowed):
    """(B, T, C), (B, S, C), (B, S, C), mask (B or 1, T or 1, S): multi-head attention."""
    split = lambda a: a.view(*a.shape[:2], heads, -1).transpose(1, 2)
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~allowed.unsqueeze(1), -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def optimus_encode(state, ids, heads):
    """Optimus's encoder from its own tensors: BERT's pooled [CLS], mean and logvar."""
    linear = lambda x, name: x @ state[name + ".weight"].T + state[name + ".bias"]
    x = state["embeddings.word_embeddings.weight"][ids] \
        + state["embeddings.position_embeddings.weight"][:ids.shape[1]] \
        + state["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(x, state, "embeddings.LayerNorm", 1e-12)
    for n in range(2):
        at = f"encoder.layer.{n}."
        q, k, v = (linear(x, f"{at}attention.self.{name}") for name in ("query", "key", "value"))
        y = linear(attend(q, k, v, heads, (ids > 0).unsqueeze(1)), at + "attention.output.dense")
        x = layer_norm(x + y, state, at + "attention.output.LayerNorm", 1e-12)
        y = nn.functional.gelu(linear(x, at + "intermediate.dense"))
        x = layer_norm(x + linear(y, at + "output.dense"), state, at + "output.LayerNorm", 1e-12)
    return (torch.tanh(linear(x[:, 0], "pooler.dense")) @ state["linear.weight"].T).chunk(2, 1)


def optimus_decode(state, z, ids, heads, memory=True):
    """Optimus's decoder from its own tensors: -> logits (B, T, V).

    The memory is key and value of one position in front, past the attention's projection;
    positions count from 1; a map of z is added to every embedding.
    """
    linear = lambda x, name: x @ state[name + ".weight"] + state[name + ".bias"]  # [in, out]
    b, t = ids.shape
    slots = (z @ state["transformer.linear.weight"].T).chunk(2, 1)
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][1:t + 1] \
        + (z @ state["transformer.linear_emb.weight"].T).unsqueeze(1)
    causal = torch.cat([torch.full((t, 1), memory), torch.ones(t, t).tril().bool()], 1)[None]
    for n in range(2):
        at = f"transformer.h.{n}."
        q, k, v = linear(layer_norm(x, state, at + "ln_1", 1e-5), at + "attn.c_attn").chunk(3, 2)
        k, v = (torch.cat([slots[n].unsqueeze(1), a], 1) for a in (k, v))
        x = x + linear(attend(q, k, v, heads, causal), at + "attn.c_proj")
        y = linear(layer_norm(x, state, at + "ln_2", 1e-5), at + "mlp.c_fc")
        x = x + linear(nn.functional.gelu(y, approximate="tanh"), at + "mlp.c_proj")
    return layer_norm(x, state, "transformer.ln_f", 1e-5) @ state["transformer.wte.weight"].T


def draw_tokenizers(folder):
    """A WordPiece and a byte-level BPE tokenizer in folders named and filled as on the hub, with
    defaults that Optimus does not use: -> their sizes, with its three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    captions = [t for ten in data_prep.toy_birds(40, 16)["text"] for t in ten]
    wordpiece, bpe = Tokenizer(models.WordPiece(unk_token="[UNK]")), Tokenizer(models.BPE())
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.train_from_iterator([*captions, "Red"], trainers.WordPieceTrainer(
        vocab_size=100, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    for name, kind, tokenizer in (("bert-base-cased", "bert", wordpiece), ("gpt2", "gpt2", bpe)):
        (folder / name).mkdir(parents=True)
        tokenizer.model.save(str(folder / name))                 # vocab.txt; vocab.json, merges.txt
        (folder / name / "config.json").write_text(json.dumps({"model_type": kind}))
    return wordpiece.get_vocab_size(), bpe.get_vocab_size() + 3


def draw_optimus(folder, width=32, latent=64):
    """Folders in the layout and with the key names of an Optimus download: 2 layers, random
    weights, old-style configurations; beside them tiny tokenizers. -> the two state dicts."""
    vocab, g = draw_tokenizers(folder), torch.Generator().manual_seed(0)
    rand = lambda *shape: 0.3 * torch.randn(shape, generator=g)
    norm = lambda name: {name + ".weight": 1 + rand(width), name + ".bias": rand(width)}
    dense = lambda name, out, inp: {name + ".weight": rand(out, inp), name + ".bias": rand(out)}
    conv = lambda name, inp, out: {name + ".weight": rand(inp, out), name + ".bias": rand(out)}
    encoder = {"embeddings.word_embeddings.weight": rand(vocab[0], width),
               "embeddings.position_embeddings.weight": rand(512, width),
               "embeddings.token_type_embeddings.weight": rand(2, width),
               **norm("embeddings.LayerNorm"), **dense("pooler.dense", width, width),
               "linear.weight": rand(2 * latent, width)}
    decoder = {"transformer.wte.weight": rand(vocab[1], width),
               "transformer.wpe.weight": rand(1024, width), **norm("transformer.ln_f"),
               "transformer.linear.weight": rand(2 * width, latent),
               "transformer.linear_emb.weight": rand(width, latent)}
    decoder["lm_head.weight"] = decoder["transformer.wte.weight"]
    for n in range(2):
        at = f"encoder.layer.{n}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            encoder.update(dense(f"{at}attention.{name}", width, width))
        encoder.update({**norm(at + "attention.output.LayerNorm"), **norm(at + "output.LayerNorm"),
                        **dense(at + "intermediate.dense", 4 * width, width),
                        **dense(at + "output.dense", width, 4 * width)})
        at = f"transformer.h.{n}."
        decoder.update({**norm(at + "ln_1"), **norm(at + "ln_2"),
                        **conv(at + "attn.c_attn", width, 3 * width),
                        **conv(at + "attn.c_proj", width, width),
                        **conv(at + "mlp.c_fc", width, 4 * width),
                        **conv(at + "mlp.c_proj", 4 * width, width),
                        at + "attn.bias": torch.ones(1, 1, 1024, 1024).tril()})
    save_optimus(folder, encoder, decoder, vocab, width)
    return encoder, decoder


def save_optimus(folder, encoder, decoder, vocab, width):
    configs = {"encoder": dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
                               intermediate_size=4 * width, vocab_size=vocab[0]),
               "decoder": dict(n_embd=width, n_layer=2, n_head=4, vocab_size=vocab[1])}
    for part, state in (("encoder", encoder), ("decoder", decoder)):
        where = folder / f"checkpoint-{part}-508523"
        where.mkdir(parents=True)
        (where / "config.json").write_text(json.dumps(configs[part]))
        torch.save(state, where / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def from_optimus(folder):
    """A small model whose text parts start from the folder."""
    sources = D.text_sources(folder)
    config = replace(D.pretrained_text(tiny("cub"), sources), latent=64, aux_dims=1)
    model = model_of(config).eval()
    D.load_text_weights(model, sources)
    return model


def test_optimus_checkpoint_gives_optimus_logits(tmp_path, capsys):
    """Every tensor is loaded, and encoder and decoder compute what Optimus's would."""
    encoder, decoder = draw_optimus(tmp_path)
    model = from_optimus(tmp_path)
    report = capsys.readouterr().out
    assert report.count("missing: 0\n") == report.count("unexpected: 0\n") == 2
    assert f"loaded: {len(encoder)}\n" in report and f"loaded: {len(decoder) - 2}\n" in report
    text, cut = D.tokenize(["this small bird has red wings.",
                            "a bird with a blue head and a curved black bill."], model.config)
    text, z = torch.from_numpy(text).long(), torch.randn(2, 64)
    assert text[0, 0, 0] == 2 and text[0, 1, 0] == model.config.special[1] and cut == 0
    for got, want in zip(model.encoders["text"](text), optimus_encode(encoder, text[:, 0], 4)):
        assert (got - want).abs().max() < 1e-5 and want.std() > 0.1
    net, ids = model.decoders["text"], text[:, 1, :-1]
    got, want = net.logits(z, ids, net.remember(z)), optimus_decode(decoder, z, ids, 4)
    real = ids != model.config.special[0]
    assert (got - want)[real].abs().max() < 1e-5
    blind = optimus_decode(decoder, z, ids, 4, memory=False)
    assert (got - blind)[real].abs().max() > 0.1                 # the memory matters
    p = want.log_softmax(-1).gather(2, text[:, 1, 1:, None]).squeeze(2)
    want = -(p * (text[:, 1, 1:] != model.config.special[0])).sum(1)  # nats a caption
    assert torch.allclose(net.nll(z, text), want, atol=1e-4)
    words = D.captions_of(text[:, 1], model.config)
    assert words[0] == "this small bird has red wings."
    assert D.in_bits(toy("cub", 16), model.config, "text", text).sum(1).tolist() == [2, 3]


def test_optimus_reads_case_and_a_first_space(tmp_path):
    """Its tokenizers never lower-case, and see a caption as if a space came before it."""
    draw_optimus(tmp_path)
    config = D.pretrained_text(tiny("cub"), D.text_sources(tmp_path))
    (upper, lower), _ = D.tokenize(["Red", "red"], config)
    assert not np.array_equal(upper[0], lower[0])
    ids, _ = D.tokenize(["red", "small red"], config)
    one, two = (row[1][row[1] < config.special[0]].tolist() for row in ids)
    tokenizer = tokenizers.Tokenizer.from_str(config.tokenizers[1])
    assert tokenizer.decode(one) == " red" and two[-len(one):] == one


@pytest.mark.parametrize("damage,words", [
    (lambda f: (f / "checkpoint-decoder-508523").rename(f / "gone"), "needs one folder"),
    (lambda f: (f / "checkpoint-encoder-508523/pytorch_model.bin").write_bytes(b"PK"),
     "cannot be read"),
    (lambda f: drop(f, "encoder", "encoder.layer.1.output.dense.bias"),
     "missing bert.encoder.layer.1.output.dense.bias"),
    (lambda f: drop(f, "decoder", "transformer.linear.weight"), "missing memory.weight"),
    (lambda f: drop(f, "encoder", "linear.weight", torch.zeros(64, 32)),
     "head.weight (64, 32), not (128, 32)"),
    (lambda f: (f / "checkpoint-encoder-508523/config.json").write_text('{"vocab_size": 7}'),
     "do not fit together")])
def test_optimus_checkpoint_says_which_keys(tmp_path, damage, words):
    draw_optimus(tmp_path)
    damage(tmp_path)
    with pytest.raises(D.UserError, match=re.escape(words)):
        from_optimus(tmp_path)


def drop(folder, part, name, value=None):
    """Take a tensor out of an Optimus folder, or replace it."""
    path = folder / f"checkpoint-{part}-508523" / "pytorch_model.bin"
    state = torch.load(path)
    del state[name]
    torch.save(state if value is None else {**state, name: value}, path)


def test_text_from_the_hub_names(tmp_path, monkeypatch, capsys):
    """Without --text-init: bert-base-cased and gpt2, here small ones in folders of these names;
    three special tokens are added and Optimus's own layers start fresh."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
    draw_optimus(tmp_path)
    bert = BertModel(BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2,
                                num_attention_heads=4, intermediate_size=128))
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4))
    bert.save_pretrained(tmp_path / "bert-base-cased")
    gpt.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    sources = D.text_sources(None)
    config = D.pretrained_text(tiny("cub"), sources)
    assert config.vocab == (100, 303) and config.special == (300, 301, 302)
    model = model_of(config)
    D.load_text_weights(model, sources)
    assert re.findall(r"1 x (\w+\.weight)", capsys.readouterr().out.replace("gpt.", "")).count(
        "memory.weight") == 1
    assert torch.equal(model.encoders["text"].bert.pooler.dense.weight, bert.pooler.dense.weight)
    got, want = model.decoders["text"].gpt.transformer.wte.weight, gpt.transformer.wte.weight
    assert torch.equal(got[:300], want) and len(got) == 303


def generated(decoder, z, **how):
    """The transformers library's generate() with Optimus's memory and embedding."""
    gpt, n = decoder.gpt, len(z)
    hook = gpt.transformer.wte.register_forward_hook(
        lambda module, args, out: out + decoder.embed(z).unsqueeze(1))
    try:
        name = list(inspect.signature(gpt.forward).parameters)[1]  # transformers renamed it
        return gpt.generate(input_ids=torch.full((n, 1), decoder.bos),
                            attention_mask=torch.ones(n, 2).long(), pad_token_id=decoder.pad,
                            eos_token_id=decoder.eos, max_length=decoder.length,
                            **{name: decoder.remember(z)}, **how)
    finally:
        hook.remove()


def sharp_decoder():
    """A random text decoder that is sure of itself, and ends captions now and then."""
    decoder = randomise(model_of(tiny("cub"))).decoders["text"]
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(4)
        decoder.gpt.transformer.wte.weight[decoder.eos].mul_(3)
    return decoder


def test_text_networks_warn_of_nothing(birds):
    """The transformers library renames arguments, with a warning first."""
    model = model_of(tiny("cub"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.neg_elbo(birds)["total"].sum().backward()
        model.sample_conditional({"text": birds["text"]}, steps=1)


def test_greedy_captions_are_those_of_generate():
    """Our loop and the transformers library write the same tokens, ends included."""
    decoder, z = sharp_decoder(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = decoder.sample(z), generated(decoder, z, do_sample=False)
    want = nn.functional.pad(want, (0, 32 - want.shape[1]), value=0)
    assert torch.equal(got, want)
    ends = (got == decoder.eos).any(1)
    assert ends.any() and not ends.all() and len(got.unique(dim=0)) > 5


def test_nucleus_captions_have_the_distribution_of_generate():
    """First tokens of 20,000 captions, top_p = 0.8: ours, generate()'s and the exact ones."""
    decoder = randomise(model_of(tiny("cub"))).decoders["text"]
    decoder.length = 2
    z = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first = lambda: decoder.logits(z, torch.full((1, 1), 1), decoder.remember(z))[0, 0]
        for p in decoder.gpt.transformer.ln_f.parameters():
            p.mul_(2.5 / first().std())                          # neither flat nor one token
        p = first().softmax(0)
        order = p.argsort(descending=True)
        last = int((p[order].cumsum(0) < 0.8).sum())             # the one that reaches 0.8
        exact = torch.zeros_like(p)
        exact[order[:last + 1]] = p[order[:last + 1]] / p[order[:last + 1]].sum()
        z, count = z.expand(20_000, -1), lambda ids: torch.bincount(
            ids[:, 1], minlength=len(p)) / len(ids)
        ours = count(decoder.sample(z, D.Noise(20_000, torch.Generator().manual_seed(0)), 0.8))
        torch.manual_seed(0)
        theirs = count(generated(decoder, z, do_sample=True, top_p=0.8, top_k=0))
    assert 3 < (exact > 0).sum() < len(p) - 10
    for found in (ours, theirs):
        assert (found - exact).abs().sum() / 2 < 0.04 and torch.equal(found > 0, exact > 0)


def test_captions_depend_on_their_own_seed_not_their_batch(birds):
    model = randomise(model_of(tiny("cub")))
    many, few = (model.sample_conditional({"image": birds["image"][:n]}, steps=2, top_p=0.9,
                                          generator=torch.Generator().manual_seed(7))["text"]
                 for n in (6, 2))
    assert torch.equal(many[:2], few) and not torch.equal(many[0], many[1])


def test_caption_nll_counts_the_caption_and_its_end_only(birds):
    """[Eq. 4] a sum over tokens in nats: padding, and what follows it, has no part in it."""
    model = randomise(model_of(tiny("cub")))
    decoder, z, text = model.decoders["text"], torch.randn(16, 16), birds["text"].clone()
    uniform = copy.deepcopy(decoder)
    for p in uniform.gpt.parameters():
        nn.init.zeros_(p)
    length = (text[:, 1] != 0).sum(1)                            # with <BOS> and <EOS>
    want = (length - 1) * math.log(model.config.vocab[1])
    assert torch.allclose(uniform.nll(z, text), want.float(), rtol=1e-5)
    alone = [decoder.nll(z[k:k + 1], text[k:k + 1, :, :length[k]]) for k in range(16)]
    assert torch.allclose(decoder.nll(z, text), torch.cat(alone), rtol=1e-4)
    mu, _ = model.encoders["text"](text)
    alone = [model.encoders["text"](text[k:k + 1, :, :length[k]])[0] for k in range(16)]
    assert torch.allclose(mu, torch.cat(alone), atol=1e-5)


def test_caption_term_has_its_weight(birds):
    """[Eq. 5] for birds: image + text_weight * text + beta * KL."""
    terms = model_of(tiny("cub", text_weight=7.0, beta=0.3)).neg_elbo(birds)
    assert list(terms) == ["image", "text", "kl", "total"]
    want = terms["image"] + 7 * terms["text"] + 0.3 * terms["kl"]
    assert torch.allclose(terms["total"], want)


def test_small_tokenizer_round_trip():
    """Byte-level: any text comes back; <PAD>, <BOS>, <EOS> are 0, 1, 2; long ones are cut."""
    config = tiny("cub")
    texts = ["a small red bird.", "Qué? 95% 'zébra'", "a " * 100]
    ids, cut = D.tokenize(texts, config)
    assert ids.shape == (3, 2, 32) and cut == 1 and (ids[:, 0] == ids[:, 1]).all()
    assert D.captions_of(ids[:2, 1], config) == texts[:2]
    assert (ids[:, 1, 0] == 1).all() and ids[2, 1, -1] == 2
    assert bird_tokenizer() == D.small_tokenizer(
        [t for ten in data_prep.toy_birds(40, 16)["text"] for t in ten])


def test_batches_take_one_of_ten_captions(birds):
    """Every picture comes with each of its captions in turn, by chance, as a function of the
    step; held-out rows come with the first."""
    data = toy("cub", 64)
    first = D.captions_of(data.rows(np.arange(4))["text"][:, 1], tiny("cub"))
    assert first == [ten[0] for ten in data.captions[:4]]
    one, again = (data.batch(8, 3, 7)["text"] for _ in range(2))
    assert torch.equal(one, again)
    seen = {}
    for step in range(200):
        x = data.batch(8, 0, step)
        for image, text in zip(x["image"], D.captions_of(x["text"][:, 1], tiny("cub"))):
            row = int((torch.from_numpy(data.arrays["image"][:40]).permute(0, 3, 1, 2) / 127.5 - 1
                       - image).abs().flatten(1).sum(1).argmin())
            assert text in data.captions[row]
            seen.setdefault(row, set()).add(text)
    assert len(seen) == 40 and min(map(len, seen.values())) >= 7


def test_one_dimensional_auxiliary_model():
    """[Sec. 4.1] the latent as a row: its UNet moves information along it; paper: 1x768."""
    aux = randomise(model_of(tiny("cub"))).aux
    assert aux.shape == (1, 16)
    x = torch.randn(2, 1, 16)
    y = aux.unet(x, torch.tensor([0.5, 0.5]))
    assert y.shape == x.shape
    x[:, 0, 0] += 1
    assert (aux.unet(x, torch.tensor([0.5, 0.5])) - y)[:, 0, -1].abs().min() > 0  # end to end
    assert aux.sample(D.Noise(3)).shape == (3, 16)
    with torch.device("meta"):
        model = D.DiffMVAE(D.Config(**{**D.PRESETS["cub"]["paper"], "dataset": "cub"}))
    assert model.aux.shape == (1, 768) and model.config.image_size == 64
    count = {n: sum(p.numel() for p in net["text"].parameters()) for n, net in
             (("encoder", model.encoders), ("decoder", model.decoders))}
    assert sum(count.values()) == 241_599_744                    # Optimus at latent 768


# === §5 Training ===

def start(tmp_path, **changes):
    """A tiny run on 64 toys."""
    device, data = torch.device("cpu"), toy(changes.get("dataset", "celeba"), 64)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "log.jsonl").touch()
    return D.Run(tmp_path, tiny(**changes), device), data


def weights(path):
    checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
    return {(kind, n): v for kind in ("model", "ema") for n, v in checkpoint[kind].items()}


@pytest.mark.parametrize("dataset", D.MODALITIES)
@pytest.mark.parametrize("stop_at", [(1, 3), (2, 2)])
def test_resume_is_bitwise(tmp_path, stop_at, dataset):
    """N steps equal k steps + resume + N - k steps, weights and averages, in either stage."""
    changes = dict(dataset=dataset, dropout=0.1)
    run, data = start(tmp_path / "whole", **changes)
    D.train(run, data)
    run, data = start(tmp_path / "parts", **changes)
    original = D.learning_rate

    def stopping(config, step, total):  # asks for an end during step `stop_at`
        if (run.stage, step + 1) == stop_at:
            run.stop = signal.SIGTERM
        return original(config, step, total)
    D.learning_rate = stopping
    try:
        D.train(run, data)
    finally:
        D.learning_rate = original
    assert (run.stage, run.step) == stop_at
    run, data = start(tmp_path / "parts", **changes)
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"stage": 2, "step": 999}\n{"stage": 2, "st')  # written after the checkpoint
    run.restore()
    assert (run.stage, run.step) == stop_at
    D.train(run, data)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    logs = [[(row["stage"], row["step"]) for row in map(json.loads, open(p / "log.jsonl"))]
            for p in (tmp_path / "whole", tmp_path / "parts")]
    assert logs[0] == logs[1]
    untrained = D.Run(tmp_path / "x", tiny(**changes), torch.device("cpu")).model.state_dict()
    assert any(not torch.equal(value, whole["model", n]) for n, value in untrained.items())


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(tmp_path):
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run, data = start(tmp_path / name, seed=seed, steps=3, aux_steps=2)
        D.train(run, data)
        results.append(weights(tmp_path / name))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert any(not torch.equal(results[0][k], results[2][k]) for k in results[0])


def test_ema_closed_form():
    """Averaging a constant 1 from 0 leaves prod d_k of the 0; the ramp and the limit hold."""
    average, count = torch.zeros(3), torch.zeros((), dtype=torch.long)
    left = 1.0
    for step in range(6):
        D.update_ema([(average, torch.ones(3)), (count, torch.tensor(step))], 0.3, step)
        left *= min(0.3, (1 + step) / (10 + step))
        assert torch.allclose(1 - average, torch.full((3,), left), rtol=1e-3, atol=1e-7)
    assert count == 5


def test_tied_weights_are_averaged_once(tmp_path):
    """GPT-2's input and output embeddings are one tensor, which must not move twice a step."""
    run, _ = start(tmp_path, dataset="cub")
    pairs = D.ema_pairs(run.ema, run.model, ("encoders.", "decoders."))
    places = [average.data_ptr() for average, _ in pairs]
    assert len(set(places)) == len(places)
    tied = run.ema.decoders["text"].gpt.lm_head.weight
    assert tied.data_ptr() in places
    averages = {n for n, _ in run.ema.named_parameters()} | {n for n, _ in run.ema.named_buffers()}
    saved = {n for n in averages & run.ema.state_dict().keys() if not n.startswith("aux.")}
    assert len(pairs) == len(saved)


def test_load_gives_the_averaged_weights(tmp_path):
    run, data = start(tmp_path)
    D.train(run, data)
    model = D.load(tmp_path / "checkpoint.pt")
    saved = weights(tmp_path)
    assert not model.training and model.config == run.config
    assert all(torch.equal(v, saved["ema", n]) for n, v in model.state_dict().items())
    assert any(not torch.equal(v, saved["model", n]) for n, v in model.state_dict().items())


def test_learning_rate():
    """Linear warm-up, cosine to zero, or constant."""
    config = tiny(lr=1.0, lr_warmup=10)
    assert D.learning_rate(config, 0, 1000) == pytest.approx(0.1)
    assert D.learning_rate(config, 500, 1000) == pytest.approx(0.5)
    assert D.learning_rate(config, 999, 1000) == pytest.approx(0.0, abs=1e-5)
    constant = replace(config, lr_schedule="constant")
    assert D.learning_rate(constant, 999, 1000) == 1.0 and D.learning_rate(constant, 4, 1000) == 0.5


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    """Every epoch visits every training row at most once, in a new order."""
    _, data = start(tmp_path)
    data.arrays = dict(data.arrays, attr=np.arange(64, dtype=np.uint8)[:, None].repeat(18, 1))
    epoch = torch.cat([data.batch(8, 0, step)["attr"][:, 0] for step in range(5)])
    assert sorted(epoch.tolist()) == list(range(40))
    again = torch.cat([data.batch(8, 0, step)["attr"][:, 0] for step in range(5, 10)])
    assert sorted(again.tolist()) == list(range(40)) and not torch.equal(epoch, again)
    assert torch.equal(data.batch(8, 0, 7)["attr"][:, 0], again[16:24])
    assert not torch.equal(data.batch(8, 1, 0)["attr"][:, 0], epoch[:8])


def test_warmup_weighting(tmp_path):
    """The first `warmup` of the steps train the error of v, the rest the chosen lambda(t)."""
    run, data = start(tmp_path, warmup=0.5, weighting="likelihood")
    seen = []
    for step in range(6):
        D.stage1_loss(run.model, data, run.config, step)
        seen.append(run.model.decoders["image"].weighting)
    assert seen == ["v"] * 3 + ["likelihood"] * 3
    off, data = start(tmp_path, warmup=0.0)
    D.stage1_loss(off.model, data, off.config, 0)
    assert off.model.decoders["image"].weighting == "simple"


def test_auxiliary_model_learns_samples_not_means(monkeypatch):
    """[Sec. 3.4] z ~ N(mu, exp(logvar)) of rows drawn at random, with their own variance."""
    config, seen = tiny(aux_batch_size=4000), []
    model = model_of(config)
    monkeypatch.setattr(model.aux, "nll", lambda z: seen.append(z) or z.sum(1))
    mu = torch.tensor([[-100.0], [100.0]]).expand(2, 16)
    logvar = torch.tensor([[0.0], [4.0]]).expand(2, 16)
    D.stage2_loss(model, (mu, logvar), config, 0)
    low, high = seen[0][seen[0][:, 0] < 0], seen[0][seen[0][:, 0] > 0]
    assert len(low) == pytest.approx(2000, abs=200) and len(low) + len(high) == 4000
    assert low.std().item() == pytest.approx(1, rel=0.02)
    assert high.std().item() == pytest.approx(math.exp(2), rel=0.02)


def test_auxiliary_moments_are_those_of_the_samples(tmp_path, monkeypatch):
    """[Sec. 3.4] mean and std of z ~ q(z|x) over the training set: spread of means, and noise."""
    run, data = start(tmp_path, steps=1, aux_steps=1)
    mu, logvar = 3 + 2 * torch.randn(5000, 16), torch.full((5000, 16), math.log(0.5))
    monkeypatch.setattr(D, "full_posteriors", lambda *_: (mu, logvar))
    D.train(run, data)
    z = torch.cat([D.gaussian_sample(mu, logvar) for _ in range(20)])
    for aux in (run.model.aux, run.ema.aux):
        assert torch.allclose(aux.mean, z.mean(0), atol=0.02)
        assert torch.allclose(aux.std, z.std(0), rtol=0.02)


def test_full_posteriors_are_products_of_all(tmp_path):
    """[Sec. 3.4] q(z|x) = prod_i q(z|x_i) with every modality, row by row."""
    run, data = start(tmp_path)
    rows = data.split["train"][:5]
    got, x = D.full_posteriors(run.ema, data, rows), data.rows(rows)
    want = D.product_of_experts(*run.ema.encode(x), torch.ones(5, 3).bool())
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(got, want))  # bfloat16


def test_gradient_is_of_the_mean_over_the_batch():
    """Its norm is returned as it was, clipped it is used; an earlier one has no part in it."""
    x = torch.randn(8, 3)
    p = nn.Parameter(torch.zeros(3))
    optimizer, want = torch.optim.Adam([p]), x.mean(0).norm().item()
    for clip in (2 * want, 0.5 * want):
        norm = D.gradient(optimizer, [p], {"total": (p * x).sum(1)}, clip)
        assert norm.item() == pytest.approx(want) and p.grad.norm().item() == pytest.approx(
            min(want, clip), rel=1e-4)


def test_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    run, data = start(tmp_path, steps=1)
    before = {n: v.clone() for n, v in run.model.named_parameters()}
    run.model.decoders["attr"].net[-1].bias.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(D.UserError, match="step 0: the gradient not finite"):
        D.train(run, data)
    assert all(torch.equal(v, before[n]) for n, v in run.model.named_parameters())


def test_loss_that_is_not_finite_stops_and_is_named(tmp_path):
    run, data = start(tmp_path)
    D.train(run, data)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run, data = start(tmp_path)
    with torch.no_grad():
        run.model.decoders["mask"].net.stem.bias.fill_(math.nan)
    with pytest.raises(D.UserError, match="step 0: mask, total not finite"):
        D.train(run, data)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_checkpoint_is_atomic_and_safe(tmp_path, monkeypatch):
    """A crash while writing keeps the old file; damaged or foreign files are named."""
    path = tmp_path / "checkpoint.pt"
    D.save_checkpoint(path, {"format": D.FORMAT, "value": 1})

    def full(*_):
        raise OSError(28, "No space left on device")
    for module, name in ((os, "replace"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(D.UserError, match="checkpoint.pt: cannot.*No space.*old file"):
                D.save_checkpoint(path, {"format": D.FORMAT, "value": 2})
        assert torch.load(path, weights_only=True)["value"] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    for content, words in ((b"PK rubbish", "damaged"), (b"", "damaged")):
        path.write_bytes(content)
        with pytest.raises(D.UserError, match=words):
            D.load(path)
    with pytest.raises(D.UserError, match="train first"):
        D.load(tmp_path / "none.pt")
    D.save_checkpoint(path, {"format": 99, "config": {}})
    with pytest.raises(D.UserError, match="format 99"):
        D.load(path)
    D.save_checkpoint(path, {"format": D.FORMAT, "config": {"dataset": "celeba"}})
    with pytest.raises(D.UserError, match="another version"):
        D.load(path)


def test_gap_tells_a_decoder_that_ignores_z(tmp_path):
    """The shuffled-z gap is 0 for a decoder blind to z and positive for one that uses it."""
    run, data = start(tmp_path)
    model, x = run.ema, data.rows(np.arange(12))
    rows = np.arange(12)
    assert D.coherence(model, data, rows)["gap"] == 0.0          # zero output layer: blind
    decoder = model.decoders["image"]

    def knows_z(x_t, t, z):                                      # decodes z by its nearest mean
        keys = torch.tensor(list(truth))
        nearest = torch.cdist(z.float(), keys).argmin(1)
        images = torch.stack(list(truth.values()))[nearest]
        return (x_t - D.per_sample(SDE.alpha(t), x_t) * images) / D.per_sample(SDE.sigma(t), x_t)
    decoder.eps = knows_z
    model.encoders["image"].head.bias.data[16:] = -20            # a sharp posterior
    truth = {tuple(z.tolist()): image for z, image in zip(model.posterior(x)[0], x["image"])}
    assert D.coherence(model, data, rows)["gap"] > 1.0


def test_text_gap_tells_a_decoder_that_ignores_z(tmp_path):
    """0 for a decoder blind to z, positive for one that knows the caption of each z."""
    run, data = start(tmp_path, dataset="cub")
    model, rows = run.ema, np.arange(12)
    decoder, x = model.decoders["text"], data.rows(rows)
    nn.init.zeros_(decoder.memory.weight)
    assert D.coherence(model, data, rows)["text gap"] == 0.0
    data.split["test"] = rows
    evaluation = D.Evaluation(model, data, D.Judge(16, len(data.vocabulary)).eval(), 12)
    right, wrong = "Eq. 5 bound, A = all: text, nats", "text, z of another item: nats"
    figures = evaluation.bounds(D.tqdm(disable=True))
    assert figures[right] == pytest.approx(figures[wrong], rel=1e-6)
    for name in ("image", "text"):
        model.encoders[name].head.weight.data[16:] = 0           # a sharp posterior
        model.encoders[name].head.weight.data[:16] *= 20
    model.encoders["image"].head.bias.data[16:] = -30
    known = model.posterior(x)[0]

    def nll(z, text):                                            # nats: 3, and 7 more if wrong
        wrong = (text != x["text"][torch.cdist(z, known).argmin(1)]).flatten(1).any(1)
        return 3.0 + 7.0 * wrong
    decoder.nll = nll
    figures = D.coherence(model, data, rows)
    assert figures["text nll"] == 3.0 and figures["text gap"] == 7.0
    figures = evaluation.bounds(D.tqdm(disable=True))
    assert figures[right] == 3.0 and figures[wrong] == 10.0


def test_hints_name_what_is_wrong():
    """A term that does not fall, a collapsed posterior, decoders that ignore z: each named; a
    healthy training gets none."""
    healthy = [{"mask": 400.0 - 9 * k, "text": 30.0 - k, "attr": 0.9 - 0.1 * k, "total": 9.0}
               for k in range(6)]
    good = {"gap": 50.0, "image nll": 100.0, "text gap": 4.0, "text nll": 30.0, "information": 40.0}
    assert D.hints(healthy, good) == {}

    def names(rows=6, figures=good, **changes):
        return set(D.hints([{**row, **changes} for row in healthy[:rows]], figures))
    assert names(mask=400.0) == {"mask"} and names(rows=4, mask=400.0) == set()
    assert names(figures={**good, "information": 0.5}) == {"information"}
    assert names(figures={**good, "gap": 0.9}) == {"gap"}
    assert names(figures={**good, "gap": -1.0, "text gap": 0.2}) == {"gap", "text gap"}
    assert names(figures={}) == {"total"}                        # stage 2 has nothing else
    assert D.hints([{"total": 9.0 - k} for k in range(5)], {}) == {}


def test_training_gives_each_hint_once(tmp_path, capsys):
    """An image encoder and others that say nothing, a mask decoder that is cut off: on the screen
    and in the log, once each, from a fifth of the steps on."""
    run, data = start(tmp_path, steps=10, probe_every=1, log_every=1, decoder="feedforward")
    for model in (run.model, run.ema):
        model.encode = lambda x: torch.zeros(2, len(x["image"]), 3, 16) + 0.0 * sum(
            p.sum() for p in run.model.encoders.parameters())
        for encoder in model.encoders.values():
            encoder.forward = lambda x: torch.zeros(2, len(x), 16)
        model.decoders["mask"].nll = lambda z, x: torch.full((len(x),), 5.0)
    D.train(run, data)
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    said = {word: [row["step"] for row in rows if word in row.get("hint", "")] for word in (
        "z holds", "encoders.image gets no", "decoders.mask gets no", "mask 5.0 has not fallen",
        "decoders.attr gets no")}
    assert list(said.values()) == [[2], [2], [2], [5], []], said
    assert capsys.readouterr().out.count("z holds") == 1


def test_second_stage_is_judged_from_its_half(tmp_path):
    """The auxiliary model of captions begins to learn late: no hint before half of its steps."""
    run, data = start(tmp_path, steps=1, aux_steps=14, probe_every=1, log_every=1)
    aux = run.model.aux
    aux.nll = lambda z: torch.full((len(z),), 5.0) + 0.0 * sum(p.sum() for p in aux.parameters())
    D.train(run, data)
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [row["step"] for row in rows if "--aux-steps may be" in row.get("hint", "")] == [7]


def test_resume_remembers_the_log_and_its_hints(tmp_path):
    """What a term is compared with is its start, not where the run was resumed; hints given are
    not given again; a log cut short or missing stops nothing."""
    run, data = start(tmp_path, log_every=1)
    D.train(run, data)
    run.warn({"total": "said before"})
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"stage": 2, "st')         # as a kill leaves it
    again, _ = start(tmp_path, log_every=1)
    again.restore()
    assert [row["step"] for row in again.history] == [1, 2, 3, 4]
    assert again.said == run.said and (2, "total") in again.said
    before = log.read_text()
    again.warn({"total": "said before"})
    assert log.read_text() == before and before.count("said before") == 1
    log.write_text("5\n[]\n{}\nrubbish\n")
    again.restore()
    log.unlink()
    again.restore()
    assert again.history == [] and log.exists()


def test_information_of_z(tmp_path):
    """0.5 sum log(1 + var(mu) / var): 0 for a constant encoder."""
    run, data = start(tmp_path)
    model, rows = run.ema, np.arange(12)
    mu, logvar = model.posterior(data.rows(rows))
    want = 0.5 * sum(math.log(1 + mu[:, j].var().item() / logvar[:, j].exp().mean().item())
                     for j in range(16))
    assert D.coherence(model, data, rows)["information"] == pytest.approx(want, abs=2e-3)
    model.posterior = lambda x: (torch.ones(12, 16), torch.zeros(12, 16))
    assert D.coherence(model, data, rows)["information"] == 0


# === §6 Data preparation ===

def draw_raw(folder, n=12, mapping=True, size=64):
    """A raw CelebAMask-HQ folder of n random pictures with three parts and the skin each."""
    rng = np.random.default_rng(0)
    (folder / data_prep.IMAGES).mkdir(parents=True)
    (folder / data_prep.MASKS / "0").mkdir(parents=True)
    names = ["Other", *data_prep.ATTRIBUTES]
    lines, values = [str(n), " ".join(names)], rng.choice([-1, 1], (n, len(names)))
    for k in range(n):
        pixels = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((2 * size, 2 * size))
        picture.save(folder / data_prep.IMAGES / f"{k}.jpg")
        for i, part in enumerate(("skin", "hair", "nose", "cloth")):
            mask = np.zeros((size, size, 3), np.uint8)
            mask[16 * i:16 * i + 16, :32] = 255                  # a quarter high, half wide
            Image.fromarray(mask).save(folder / data_prep.MASKS / "0" / f"{k:05d}_{part}.png")
        lines.append(f"{k}.jpg  " + " ".join(map(str, values[k])))
    (folder / data_prep.ATTRIBUTE_FILE).write_text("\n".join(lines) + "\n")
    if mapping:
        origin = [0, 162770, 162771, 182637, 182638, 202598] + list(range(1, n - 5))
        rows = [f"{k} {o} {o + 1:06d}.jpg" for k, o in enumerate(origin)]
        (folder / data_prep.MAPPING_FILE).write_text("idx orig_idx orig_file\n" + "\n".join(rows))
    return values[:, 1:]


def prepare(raw, out, *flags):
    command = [sys.executable, str(HERE / "data_prep.py"), "--dataset", "celeba", "--raw", str(raw),
               "--out", str(out), "--size", "16", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_prepare_celeba(tmp_path):
    """Composite mask without skin, 0/1 attributes, official split, checksums, arrays that map."""
    values = draw_raw(tmp_path / "raw")
    result = prepare(tmp_path / "raw", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    image, mask, attr = (np.load(tmp_path / "out" / f"{n}.npy", mmap_mode="r")
                         for n in ("image", "mask", "attr"))
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    want = np.zeros((16, 16), np.uint8)
    want[4:, :8] = 1                                             # hair, nose, cloth; not the skin
    assert all(np.array_equal(m, want) for m in mask)
    assert np.array_equal(attr, (values == 1).astype(np.uint8))
    full = Image.open(tmp_path / "raw" / data_prep.IMAGES / "3.jpg")
    full = np.asarray(full.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(full - image[3]).mean() < 2                    # reduced decoding is harmless
    assert meta["split"]["val"] == [2, 3] and meta["split"]["test"] == [4, 5]
    assert meta["counts"] == {"train": 8, "val": 2, "test": 2} and meta["count"] == 12
    assert meta["attributes"] == list(data_prep.ATTRIBUTES) and meta["size"] == 16
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in meta["sha256"].values())
    assert not (tmp_path / "out.partial").exists()
    data = D.load_data("celeba", tmp_path / "out", torch.device("cpu"))
    x = data.rows(data.split["test"])
    assert x["image"].shape == (2, 3, 16, 16) and x["image"].abs().max() <= 1
    again = prepare(tmp_path / "raw", tmp_path / "out")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_prepare_without_mapping_says_so(tmp_path):
    draw_raw(tmp_path / "raw", n=20, mapping=False)
    result = prepare(tmp_path / "raw", tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert "not the official split" in result.stdout and not meta["official_split"]
    assert meta["split"]["val"] == [16, 17] and meta["split"]["test"] == [18, 19]


def test_prepare_skips_bad_images_and_lists_them(tmp_path):
    values = draw_raw(tmp_path / "raw")
    cut(300, "**/7.jpg")(tmp_path / "raw")
    delete("**/8.jpg")(tmp_path / "raw")
    delete("**/00009_*.png")(tmp_path / "raw")
    result = prepare(tmp_path / "raw", tmp_path / "out", "--skip-bad")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert result.returncode == 0 and meta["ids"] == [*range(7), 10, 11]
    for words in ("7.jpg: cannot be read", "8.jpg: cannot be read", "no mask of face 9"):
        assert words in result.stdout
    assert np.array_equal(np.load(tmp_path / "out" / "attr.npy"),
                          np.delete(values, [7, 8, 9], 0) == 1)


def test_toy_faces_are_a_function_of_the_seed():
    a, b, c = data_prep.toy_faces(8), data_prep.toy_faces(5), data_prep.toy_faces(5, seed=1)
    assert all(np.array_equal(a[n][:5], b[n]) for n in a)
    assert not np.array_equal(b["image"], c["image"])
    assert set(np.unique(a["mask"])) == {0, 1} and set(np.unique(a["attr"])) == {0, 1}


@pytest.mark.parametrize("name", data_prep.ATTRIBUTES)
def test_toy_attributes_are_visible(name):
    """Switching one attribute alone changes many pixels of the picture, clearly."""
    changed = []
    for seed in range(300):
        has = data_prep.draw_attributes(np.random.default_rng(seed))
        hidden = {"Bald": ("Bangs", "Receding_Hairline", "Wearing_Hat", "Straight_Hair",
                           "Wavy_Hair"), "Wearing_Hat": ("Bangs", "Receding_Hairline")}
        colours = list(data_prep.HAIR_COLOURS)
        if any(has[n] for n in ("Bald", "Wearing_Hat", "Bangs", "Receding_Hairline", *colours)) \
                and name in ("Bald", "Wearing_Hat", "Bangs", "Receding_Hairline", *colours):
            continue
        if any(has[n] and name in hidden[n] for n in hidden) or (has["Bald"] and name in colours):
            continue
        faces = [data_prep.draw_face({**has, name: value}, np.random.default_rng(seed))[0]
                 .astype(int) for value in (False, True)]
        changed.append((np.abs(faces[0] - faces[1]).max(-1) > 40).sum())
    assert len(changed) >= 10 and np.median(changed) >= 6, (len(changed), np.median(changed))


REAL = os.environ.get("DIFFMVAE_REAL_DATA")


@pytest.mark.skipif(not REAL, reason="DIFFMVAE_REAL_DATA is not set")
def test_real_attribute_file():
    """[Sec. 4.2] the rates of the 18 attributes over all 30,000 faces."""
    rows = np.stack(list(data_prep.read_attributes(Path(REAL) / data_prep.ATTRIBUTE_FILE).values()))
    rates = dict(zip(data_prep.ATTRIBUTES, rows.mean(0).round(3)))
    assert rows.shape == (30_000, 18) and rows.sum(1).mean() == pytest.approx(3.67, abs=0.005)
    assert (rates["Bald"], rates["Heavy_Makeup"], rates["Smiling"]) == (0.024, 0.457, 0.470)


@pytest.mark.skipif(not REAL, reason="DIFFMVAE_REAL_DATA is not set")
def test_real_faces(tmp_path):
    """Real faces go through: 1,000 of them, masks neither empty nor full, and one training step."""
    import tarfile
    with tarfile.open(Path(REAL) / "celebamask_mini.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    assert prepare(tmp_path / "CelebAMask-HQ", tmp_path / "out").returncode == 0
    mask = np.load(tmp_path / "out" / "mask.npy")
    assert len(mask) == 1000 and 0.02 < mask.mean((1, 2)).min() and mask.mean((1, 2)).max() < 0.98
    data = D.load_data("celeba", tmp_path / "out", torch.device("cpu"))
    terms = model_of(tiny()).neg_elbo(data.batch(8, 0, 0))
    assert torch.isfinite(terms["total"]).all()


BIRDS = {"001.Auk": 3, "002.Jay": 2, "003.Tern": 3, "004.Wren": 2}
CUB = "--dataset", "cub"


def captions_of(name):
    """Ten captions that say whose they are; every other one has no full stop."""
    return [f"{name}, it's n\u00ba {j}" + "." * (j % 2) for j in range(10)]


def draw_birds(raw, mmvae=False, size=(40, 30)):
    """A raw CUB folder in one of the two layouts: -> {"<class>/<name>": path of its picture}."""
    rng, paths = np.random.default_rng(0), {}
    images, text = raw / data_prep.CUB / "images", raw / "text_c10"
    for kind, count in BIRDS.items():
        if mmvae:
            images = raw / "cub" / ("test" if kind == "002.Jay" else "train")
        (images / kind).mkdir(parents=True)
        for k in reversed(range(count)):
            name = f"{kind}/{'b' * (k + 1)}_{k}"
            paths[name] = images / f"{name}.jpg"
            pixels = Image.fromarray(rng.integers(0, 256, (3, 4, 3)).astype(np.uint8))
            pixels.resize(size).convert(("RGB", "L", "CMYK")[k]).save(paths[name], quality=95)
            if not mmvae:
                (text / kind).mkdir(parents=True, exist_ok=True)
                (text / f"{name}.t7").write_bytes(b"of no use here")
                (text / f"{name}.txt").write_text(" " + " \r\n".join(captions_of(name)), "utf-8")
    for part in ("test", "trainval") if mmvae else ():
        names = sorted(n for n in paths if (n[:3] == "002") == (part == "test"))
        lines = [line + "\n" for name in names for line in captions_of(name)]
        (raw / "cub" / f"text_{part}classes.txt").write_text("".join(lines), "utf-8")
    return paths


def prepared_birds(out):
    """-> image (N, H, W, 3), the lists of captions, meta, {split: set of classes}."""
    meta = json.loads((out / "meta.json").read_text())
    split = {part: {meta["names"][row].split("/")[0] for row in rows}
             for part, rows in meta["split"].items()}
    return np.load(out / "image.npy"), json.loads((out / "text.json").read_text()), meta, split


def small_bird(path):
    """What a row must hold: the whole picture, grey and CMYK ones too, squeezed to 16x16."""
    return np.asarray(Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("mmvae", [False, True])
def test_prepare_cub(tmp_path, mmvae):
    """[Sec. 4.1] every row has its picture, its captions word for word, one split a class."""
    paths = draw_birds(tmp_path / "raw", mmvae)
    result = prepare(tmp_path / "raw", tmp_path / "out", *CUB)
    assert result.returncode == 0 and "10 birds at 16x16" in result.stdout, result.stderr
    image, text, meta, split = prepared_birds(tmp_path / "out")
    assert sorted(meta["names"]) == sorted(paths) and len(image) == len(text) == meta["count"] == 10
    for row, name in enumerate(meta["names"]):
        assert np.array_equal(image[row], small_bird(paths[name]))
        assert text[row] == captions_of(name)
    assert meta["dataset"] == "cub" and meta["size"] == 16 and meta["classes"] == list(BIRDS)
    assert sorted(sum(meta["split"].values(), [])) == list(range(10)) and meta["skipped"] == []
    assert meta["counts"] == {part: len(rows) for part, rows in meta["split"].items()}
    assert meta["official_split"] == mmvae
    assert split == ({"train": {"001.Auk", "003.Tern"}, "val": {"004.Wren"}, "test": {"002.Jay"}}
                     if mmvae else
                     {"train": {"001.Auk", "002.Jay"}, "val": {"003.Tern"}, "test": {"004.Wren"}})
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in meta["sha256"].values())
    assert len(meta["sha256"]) == (3 if mmvae else 2)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("folder", [data_prep.CUB, "cub"])
def test_prepare_cub_from_large_pictures_one_folder_down(tmp_path, folder):
    """--raw may be the inner folder; decoding at a smaller scale changes next to nothing."""
    paths = draw_birds(tmp_path / "raw", folder == "cub", size=(500, 333))
    if folder != "cub":
        (tmp_path / "raw" / "text_c10").rename(tmp_path / "raw" / folder / "text_c10")
    assert prepare(tmp_path / "raw" / folder, tmp_path / "out", *CUB).returncode == 0
    image, _, meta, _ = prepared_birds(tmp_path / "out")
    for row, name in enumerate(meta["names"]):
        assert np.abs(small_bird(paths[name]).astype(int) - image[row]).mean() < 2


def split_files(place, **classes):
    """A damage: files in `place` that say which class belongs to which split."""
    def write(folder):
        for part, kinds in classes.items():
            (folder / place / f"{part}classes.txt").write_text("\n".join(kinds) + "\n")
    return write


A, J, T, W = BIRDS


@pytest.mark.parametrize("mmvae", [False, True])
def test_prepare_skips_bad_birds_and_their_captions(tmp_path, mmvae):
    """Rows after the picture left out still have their own captions and class."""
    paths = draw_birds(tmp_path / "raw", mmvae)
    cut(200, "**/001.Auk/b_0.jpg")(tmp_path / "raw")
    result = prepare(tmp_path / "raw", tmp_path / "out", *CUB, "--skip-bad")
    image, text, meta, split = prepared_birds(tmp_path / "out")
    assert result.returncode == 0 and "left out:" in result.stdout and len(meta["skipped"]) == 1
    assert set(paths) - set(meta["names"]) == {"001.Auk/b_0"}
    assert len(image) == len(text) == len(meta["names"]) == meta["count"] == 9
    for row, name in enumerate(meta["names"]):
        assert np.array_equal(image[row], small_bird(paths[name]))
        assert text[row] == captions_of(name)
    assert sorted(sum(meta["split"].values(), [])) == list(range(9))
    assert sum(map(len, split.values())) == 4 and "002.Jay" in split["test" if mmvae else "train"]


@pytest.mark.parametrize("place", [".", data_prep.CUB, "text_c10"])
@pytest.mark.parametrize("files,want", [
    ({}, [{A, J}, {T}, {W}]),
    ({"train": [T, "099.Owl"], "val": [W, A], "test": [J]}, [{T}, {A, W}, {J}]),
    ({"train": [T], "val": [W], "trainval": [T, W, A], "test": [J, A]}, [{T}, {W}, {A, J}]),
    ({"trainval": [W, T, J], "test": [A, "099.Owl"]}, [{J, T}, {W}, {A}]),
    ({"train": [T, W], "trainval": [T, W, J], "test": [A]}, [{J, T}, {W}, {A}])])
def test_cub_split_files(tmp_path, place, files, want):
    """The files decide, wherever they lie; without them the made-up split is said aloud."""
    draw_birds(tmp_path / "raw")
    split_files(place, **files)(tmp_path / "raw")
    result = prepare(tmp_path / "raw", tmp_path / "out", *CUB)
    meta, split = prepared_birds(tmp_path / "out")[2:]
    assert list(split.values()) == want and list(split) == ["train", "val", "test"], result.stderr
    assert meta["official_split"] == bool(files) == ("not the official split" not in result.stdout)
    assert len(meta["sha256"]) == 2 + len(files)


def test_cub_split_sizes_and_default_sizes():
    """Tenths without split files, a twentieth out of the classes to train on; 64 and 128 pixels."""
    classes = [f"{k:03d}" for k in range(200)]
    split = list(data_prep.split_by_files(classes, {}).values())
    assert split == ["train"] * 160 + ["val"] * 20 + ["test"] * 20
    assert list(data_prep.carve_val(classes[:150]).values()) == ["train"] * 143 + ["val"] * 7
    sizes = [data_prep.parse_args(["--raw", "x", "--dataset", n]).size for n in ("celeba", "cub")]
    assert sizes == [128, 64]


def unpack_birds(folder):
    """The 1,258 real birds of 22 classes."""
    import tarfile
    with tarfile.open(Path(REAL) / "cub_mini.tar") as tar:
        tar.extractall(folder, filter="data")


@pytest.mark.skipif(not REAL, reason="DIFFMVAE_REAL_DATA is not set")
def test_real_birds(tmp_path):
    """[Sec. 4.1] 1,258 real birds go through at 64x64; each has the captions of its own file."""
    unpack_birds(tmp_path)
    assert prepare(tmp_path, tmp_path / "out", *CUB, "--size", "64").returncode == 0
    image, text, meta, split = prepared_birds(tmp_path / "out")
    assert image.shape == (1258, 64, 64, 3) and image.std((1, 2, 3)).min() > 5
    assert [len(kinds) for kinds in split.values()] == [18, 2, 2] and len(meta["classes"]) == 22
    assert meta["counts"] == {"train": 1020, "val": 119, "test": 119}
    for row in range(0, 1258, 37):
        name = meta["names"][row]
        lines = (tmp_path / "text_c10" / f"{name}.txt").read_text("utf-8").splitlines()
        assert text[row] == [line.strip() for line in lines]
        picture = Image.open(tmp_path / data_prep.CUB / "images" / f"{name}.jpg").convert("RGB")
        picture = picture.resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(picture).astype(int) - image[row]).mean() < 2


@pytest.mark.skipif(not REAL, reason="DIFFMVAE_REAL_DATA is not set")
def test_real_captions_join(tmp_path):
    """[Sec. 4.1] block k of the one-file layout is image k: its captions are those joined by name.

    The one-file text is a corrected edition (spelling, final full stops), so 92 % of the captions
    are equal to the letter, at least 4 of any image; one block further it is 0 or 1 of an image.
    """
    unpack_birds(tmp_path)
    lines = data_prep.read_lines(Path(REAL) / "cub_text_testclasses.txt")
    names = json.loads((Path(REAL) / "reed_test_filenames_sorted.json").read_text())
    assert len(lines) == 29_330 == 10 * len(names) and len({name[:3] for name in names}) == 50
    assert all(line[-1] == "." for line in lines)
    texts = data_prep.named_files(tmp_path / "text_c10", ".txt")
    joined = [k for k, name in enumerate(names) if name in texts]
    equal, shifted = ([sum(a == b for a, b in zip(
        lines[10 * (k + shift):], data_prep.read_lines(texts[names[k]])))
        for k in joined] for shift in (0, 1))
    assert len(joined) == 983 and sum(equal) == 9054 and min(equal) == 4
    assert sum(e == 10 for e in equal) == 723 and max(shifted) == 1 and sum(shifted) < 50


# === §7 Pictures and figures ===

def test_f1_samples():
    """2 TP / (pred + true) a row; 0 where both are empty."""
    pred = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    true = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]])
    assert D.f1_samples(pred, true).tolist() == [0.5, 0.0, 1.0, 0.0]


def test_frechet_distance_closed_form():
    """Diagonal Gaussians: sum (m - n)^2 + (s - t)^2; 0 for equal sets."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 3, generator=generator)
    noise = (noise - noise.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T))).T
    mean, s, t = torch.tensor([[1.0, -2.0, 0.5], [1.0, 2.0, 0.5], [0.3, 1.0, 1.5]])
    got = D.frechet_distance(noise * s, noise * t + mean)
    assert got == pytest.approx((mean.square().sum() + (s - t).square().sum()).item(), rel=1e-3)
    assert D.frechet_distance(noise, noise) == pytest.approx(0, abs=1e-3)


def test_own_input(tmp_path):
    """The user's files: any size, a mask is what is not black, attributes by name."""
    mask = np.zeros((100, 100), np.uint8)
    mask[:50] = 7
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.new("RGB", (50, 80), (255, 0, 0)).save(tmp_path / "i.jpg", quality=100)
    blue = Image.fromarray(mask[..., None] * np.array([0, 0, 1], np.uint8) // 7)
    blue.save(tmp_path / "blue.png")
    config = tiny()
    assert D.read_given([f"mask={tmp_path}/blue.png"], config)[1]["mask"][0, 0, :8].all()
    names, x = D.read_given(
        [f"mask={tmp_path}/m.png", f"image={tmp_path}/i.jpg", "attr=Smiling,Bald"], config)
    assert names == ["mask", "image", "attr"]
    mask, (red, green, _) = x["mask"][0, 0], x["image"][0]
    assert mask.shape == (16, 16) and mask[:8].all() and not mask[8:].any()
    assert red.shape == (16, 16) and red.min() > 0.95 and green.max() < -0.95
    assert D.in_words("attr", x["attr"], config) == [["Bald", "Smiling"]]
    assert D.read_given(["mask", "attr"], config) == (["mask", "attr"], None)
    assert not D.read_given(["attr="], config)[1]["attr"].any()


def test_grid_and_its_record(tmp_path, faces):
    """The PNG shows what was given and made; the JSON beside it writes the attributes out."""
    run, data = start(tmp_path)
    path = tmp_path / "samples" / "x.png"
    D.sample_pictures(run.ema, data, path, ["mask", "attr"], 3, 0, dict(sampler="ddim", steps=2))
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["given"] == ["mask", "attr"] and len(record["rows"]) == 3
    rows = data.split["test"][:3]
    want = D.in_words("attr", data.rows(rows)["attr"], run.config)
    assert [row["given: attr"] for row in record["rows"]] == want
    grid = np.asarray(Image.open(path))
    assert grid.shape[0] == 44 + 3 * 134
    given = grid[44:44 + 128, 72:72 + 128, 0]                    # first cell: the mask of test 0
    want = data.rows(rows)["mask"][0, 0].numpy().repeat(8, 0).repeat(8, 1) * 255
    assert np.array_equal(given, want)


def figures_of(run, data, judge, repeats=1, **more):
    """What --eval measures on 8 items with two sampler steps, without a command line."""
    evaluation = D.Evaluation(run.ema, data, judge, 8, **more)
    return evaluation.run(repeats, 0, dict(sampler="ddim", steps=2))


def test_evaluation_of_a_perfect_writer(tmp_path):
    """Captions that are the items' first ones: F1 1 from the image on toys, where they say all;
    the truth of an item is what all its ten captions say."""
    run, data = start(tmp_path, dataset="cub")
    x = data.rows(data.split["test"][:8])
    run.ema.decoders["text"].sample = lambda z, *_, **__: x["text"][:len(z), 1]
    judge = D.Judge(16, len(data.vocabulary)).eval()
    figures = figures_of(run, data, judge)
    assert figures["text from image: F1"]["mean"] == 1.0
    assert figures["text from image: F1 with another's"]["mean"] < 0.6
    assert figures["one true caption against all ten: F1"]["mean"] == 1.0
    assert 0 < figures["image from text: judged text, F1"]["mean"] < 0.9
    data.captions = [[f"{text.split()[-1]} it has {k} wings." for k in ("red", "blue") * 5]
                     for (text, *_) in data.captions]
    truth = D.Evaluation(run.ema, data, judge, 8).true["text"]
    names = [{w for w, bit in zip(data.vocabulary, row) if bit} for row in truth]
    assert all(one == {"red wings", "blue wings"} for one in names)


def test_one_caption_says_a_part(tmp_path):
    """Against all ten captions a first one that says half of it has F1 2/3, also when generated;
    a judge that reads all ten has 1, and 2/3 against the one caption of an item."""
    run, data = start(tmp_path, dataset="cub")
    data.captions = [[f"it has {k} wings." for k in ("red", "blue") * 5] for _ in data.captions]
    data.tokenize(run.config)

    class Oracle(nn.Module):
        def forward(self, image):
            wings = [word in ("red wings", "blue wings") for word in data.vocabulary]
            return image.flatten(1)[:, :20], {
                "text": (torch.tensor(wings).float() - 0.5).expand(len(image), -1)}
    evaluation = D.Evaluation(run.ema, data, Oracle(), 8)
    figures = evaluation.supervised()
    assert figures["Supervised, text from image: F1"] == 1.0
    made = {"image": evaluation.x["image"], "text": evaluation.x["text"][:, 1]}
    figures.update(evaluation.compare("image", ["image"], made))
    figures.update(evaluation.compare("text", ["text"], {"image": made["image"]}))
    for name in ("one true caption against all ten: F1", "text of another item: F1",
                 "Supervised, one caption from image: F1", "text from image: F1",
                 "image from text: judged text, F1"):
        assert figures[name] == pytest.approx(2 / 3), name


def test_evaluation_of_a_perfect_painter(tmp_path):
    """A model that gives back the test items and a judge that knows them: F1 1 and distance 0
    for every source, as coherent from nothing as from what was given."""
    run, data = start(tmp_path)
    x, model = data.rows(data.split["test"][:8]), run.ema
    for name, decoder in model.decoders.items():
        decoder.sample = lambda z, *_, name=name, **__: x[name][:len(z)]

    class Oracle(nn.Module):
        def forward(self, image):
            nearest = torch.cdist(image.flatten(1), x["image"].flatten(1)).argmin(1)
            return image.flatten(1)[:, :20], {n: x[n][nearest] - 0.5 for n in ("attr", "mask")}
    figures = figures_of(run, data, Oracle())
    kept = {n: f["mean"] for n, f in figures.items() if "F1" in n and "another" not in n}
    assert len(kept) == 2 + 6 + 8 and set(kept.values()) == {1.0}, kept
    assert set(kept) >= {"image from mask + attr: judged attr, F1", "attr from image + mask: F1",
                         "image + mask from nothing: agree, F1", "Supervised, mask from image: F1"}
    want = D.f1_samples(x["mask"].roll(1, 0), x["mask"]).mean().item()
    assert figures["mask of another item: F1"]["mean"] == pytest.approx(want, abs=1e-4)
    priors = []

    def flipped(n, prior, generator, **_):                       # coherent, but other items
        priors.append(prior)
        return {name: a.flip(0)[:n] if prior == "aux" else a[:n] for name, a in x.items()}
    model.sample_unconditional = flipped
    x["image"], x["mask"] = x["image"].clone(), x["mask"].clone()
    evaluation = D.Evaluation(model, data, Oracle(), 8)
    evaluation.bounds = lambda bar: {}
    figures = evaluation.run(1, 0, dict(sampler="ddim", steps=2))
    assert priors == ["aux", "gaussian"]
    assert all(figures[f"image + {n} from {source}: agree, F1"]["mean"] == 1.0
               for n in ("mask", "attr") for source in ("nothing", "N(0, I)"))
    distances = [f["mean"] for n, f in figures.items() if "FD-judge" in n]
    assert len(distances) == 6 and max(distances) < 1e-3
    assert figures["image from image: corner correlation"]["mean"] == pytest.approx(1.0)


@pytest.mark.parametrize("dataset,figure", [("celeba", "image from attr: judged attr, F1"),
                                            ("cub", "image from text: judged text, F1")])
def test_evaluation_is_reproducible(tmp_path, monkeypatch, dataset, figure):
    """Twice with one seed: the same digits, the judge trained once and cached. Repeats differ and
    are what single seeds give; what needs no sampling has no deviation."""
    run, data = start(tmp_path, dataset=dataset)
    trained = []
    original = D.train_judge
    monkeypatch.setattr(D, "train_judge",
                        lambda data, seed: trained.append(1) or original(data, seed, 4, 8))
    monkeypatch.setattr(D, "JUDGE_TOYS", 64)
    first, again = (figures_of(run, data, D.get_judge(tmp_path / "judge.pt", data), 2)
                    for _ in range(2))
    assert first == again and len(trained) == 1
    single = [D.Evaluation(run.ema, data, D.get_judge(tmp_path / "judge.pt", data), 8).run(
        1, seed, dict(sampler="ddim", steps=2)) for seed in (0, 1)]
    apart = {n: abs(f["mean"] - single[1][n]["mean"]) for n, f in single[0].items() if f["mean"]}
    name = max(apart, key=apart.get)                             # where seeds differ most
    a, b = (one[name]["mean"] for one in single)
    assert apart[name] > 0.01 and first[name]["mean"] == pytest.approx((a + b) / 2, abs=1e-4)
    assert first[name]["std"] == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-4)
    assert single[0][name]["std"] is None and figure in first
    measured = {n: f for n, f in first.items() if f["mean"] is not None}
    assert all(math.isfinite(f["mean"]) for f in measured.values())
    assert {n for n, f in measured.items() if f["std"] is None} == {
        n for n in measured if n.startswith(("Supervised", "one true")) or "of another" in n
        and "nats" not in n}


def test_evaluation_in_chunks(tmp_path, monkeypatch):
    """However many items are done at a time: all of them, each once, in order."""
    run, data = start(tmp_path, decoder="feedforward")
    judge, whole, seen = D.Judge(16).eval(), [], []
    for size in (8, 3):
        monkeypatch.setattr(D, "CHUNK", size)
        evaluation = D.Evaluation(run.ema, data, judge, 8)
        monkeypatch.setattr(evaluation, "bounds", lambda bar: {})
        whole.append(evaluation.run(1, 0, dict(sampler="ddim", steps=2)))
        rows = []
        evaluation.draw(lambda a, b, _: rows.append((a, b)) or {"mask": torch.arange(a, b)}, 0,
                        D.tqdm(disable=True))
        seen.append(rows)
    assert seen == [[(0, 8)], [(0, 3), (3, 6), (6, 8)]]
    assert whole[0].keys() == whole[1].keys()
    same = "mask from image: F1", "attr from image + mask: F1"   # up to the noise of z
    assert all(abs(whole[0][n]["mean"] - whole[1][n]["mean"]) < 0.2 for n in same)


def test_clip_figures_pair_what_belongs_together(tmp_path, monkeypatch):
    """Given pictures and captions as they are, the others as made, for every source."""
    run, data = start(tmp_path, dataset="cub")
    monkeypatch.setattr(D, "CHUNK", 3)
    seen = []
    monkeypatch.setattr(D, "clip_score", lambda clip, image, captions: seen.append(
        (image, captions)) or torch.full((len(image),), 7.0))
    evaluation = D.Evaluation(run.ema, data, D.Judge(16, len(data.vocabulary)).eval(), 8,
                              clip="clip")
    x, config = evaluation.x, run.config
    made = {"image": -x["image"], "text": x["text"][:, 1].roll(1, 0)}
    for source, given, name, image, ids in (
            ("image", ["image"], "text from image: CLIP", x["image"], made["text"]),
            ("text", ["text"], "image from text: CLIP", made["image"], x["text"][:, 1]),
            ("nothing", [], "image + text from nothing: CLIP", made["image"], made["text"])):
        seen.clear()
        assert evaluation.clip_figures(source, given, made) == {name: 7.0}
        assert torch.equal(torch.cat([part for part, _ in seen]), image)
        assert sum((part for _, part in seen), []) == D.captions_of(ids, config)


def test_fid_is_the_distance_of_its_own_features(tmp_path):
    """inception= adds one figure for each source of images, from that function's features."""
    run, data = start(tmp_path, decoder="feedforward")
    features = lambda image: image[:, :, ::5, ::5].flatten(1)
    evaluation = D.Evaluation(run.ema, data, D.Judge(16).eval(), 8, features)
    made = {"image": 0.5 * evaluation.x["image"]}
    figures = evaluation.compare("mask", ["mask"], made)
    want = D.frechet_distance(features(made["image"]), features(evaluation.x["image"]))
    assert figures["image from mask: FID"] == pytest.approx(want, rel=1e-6) and want > 0
    assert figures["image from mask: FD-judge"] != figures["image from mask: FID"]


def test_pooling_of_inception():
    """The pooling branch gets the mean without padding, or the largest value, of 3x3 inputs."""
    x = torch.randn(2, 1, 5, 6)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch_pool = nn.Identity()

        def forward(self, x):
            return self.branch_pool(x * 0)
    for largest in (False, True):
        block = Block()
        D.repool(block, largest)
        for _ in range(2):                                       # nothing is kept between calls
            got = block(x)
            for i, j in ((0, 0), (0, 3), (2, 2), (4, 5)):
                window = x[:, 0, max(0, i - 1):i + 2, max(0, j - 1):j + 2].flatten(1)
                want = window.max(1).values if largest else window.mean(1)
                assert torch.allclose(got[:, 0, i, j], want, atol=1e-6)


def test_supervised_training_of_real_data_is_longer(monkeypatch):
    """800 steps, or ten passes over prepared data if those are more."""
    lengths, one = [], {"image": np.zeros((6500, 16, 16, 3), np.uint8),
                        "mask": np.zeros((6500, 16, 16), np.uint8),
                        "attr": np.zeros((6500, 18), np.uint8)}
    monkeypatch.setattr(D, "tqdm", lambda steps, **_: lengths.append(len(steps)) or [])
    for rows, toy in ((6400, False), (64, False), (6400, True)):
        split = {"train": np.arange(rows)}
        monkeypatch.setattr(D, "JUDGE_TOYS", 64)
        D.train_judge(D.Data(one, split, toy, torch.device("cpu")), 0)
    assert lengths == [1000, 800, 800]


def test_rows_of_the_paper(tmp_path, capsys):
    """The names of the models, the paper's numbers beside their figures, "not run" beside those
    that need weights."""
    names = {"Diff-MVAE*": {}, "Diff-MVAE": dict(weighting="likelihood"),
             "MoPoE*": dict(decoder="feedforward"),
             "MoPoE": dict(decoder="feedforward", prior_expert=True),
             "MVTCAE": dict(decoder="feedforward", objective="mvtcae")}
    for name, changes in names.items():
        assert D.model_name(tiny(**changes)) == name
    assert "MVTCAE" in D.model_name(tiny(objective="mvtcae"))
    assert D.model_name(tiny(prior_expert=True)) not in D.PAPER["celeba"]
    assert all(len(row) == len(table["figures"]) for table in D.PAPER.values()
               for row in table.values())
    run, data = start(tmp_path)
    figures = figures_of(run, data, D.Judge(16).eval())
    assert figures["mask from image: F1"]["paper"] == 0.90
    assert figures["Supervised, attr from image: F1"]["paper"] == 0.79
    assert figures["image from nothing: FID"] == {"mean": None, "std": None, "paper": 28.4}
    assert set(D.PAPER["celeba"]["figures"]) <= set(figures)
    run.ema.config = replace(run.config, decoder="feedforward")  # its Unc. is from N(0, I)
    paper = D.Evaluation(run.ema, data, D.Judge(16).eval(), 8).paper()
    assert paper["image from N(0, I): FID"] == 139.8 and "image from nothing: FID" not in paper
    D.print_summary(figures)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == "image from mask: FID not run 28.5".split() for line in lines)
    value = f"{figures['attr from image: F1']['mean']:.3f}"
    assert any(line.split() == f"attr from image: F1 {value} 0.76".split() for line in lines)


def test_f1_equals_scikit_learn():
    """Mean of f1_samples against average="samples", 1,000 random cases with empty rows."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for _ in range(1000):
        pred, true = rng.random((2, 5, 6)) < rng.random((2, 5, 1))
        pred[0], true[rng.integers(2)] = False, False
        want = metrics.f1_score(true, pred, average="samples", zero_division=0)
        got = D.f1_samples(torch.from_numpy(pred).float(), torch.from_numpy(true).float())
        assert got.shape == (5,) and got.mean().item() == pytest.approx(want, abs=1e-6)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of the shapes and names of FID's, with features of order one."""
    from torchvision.models import Inception3
    torch.manual_seed(0)
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.normal_(std=0.3)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)  # as FID's are
    return path


def test_fid_equals_pytorch_fid(inception_file, tmp_path, monkeypatch):
    """Features to 1e-4 and distance to 1e-3 of the pytorch-fid package's, from PNG files of 300
    images and the same weights."""
    theirs = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid is not installed")
    from pytorch_fid import fid_score
    monkeypatch.setattr(theirs, "load_state_dict_from_url",
                        lambda *_, **__: torch.load(inception_file, weights_only=True))
    net = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    images = D.to_tensors({"image": data_prep.toy_faces(300, 32)["image"]}, "cpu")["image"]
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        for j, picture in enumerate(D.eight_bits(images[150 * k:150 * (k + 1)])):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{k}/{j:03d}.png")
    between = 0.9 * (torch.rand(images.shape) - 0.5) / 127.5     # of two 8-bit values: rounded off
    ours = D.load_inception(inception_file, torch.device("cpu"))(images + between)
    folders = [sorted((tmp_path / str(k)).iterdir()) for k in range(2)]
    want = np.concatenate([fid_score.get_activations(files, net, num_workers=0)
                           for files in folders])
    assert 0.1 < np.abs(want).mean() < 10 and want.std(0).mean() > 0.01
    assert np.abs(ours.numpy() - want).max() < 1e-4
    halves = want[:150, ::20], want[150:, ::20]  # their root needs more images than dimensions
    distance = fid_score.calculate_frechet_distance(*(
        statistic for part in halves for statistic in (part.mean(0), np.cov(part, rowvar=False))))
    assert D.frechet_distance(ours[:150, ::20], ours[150:, ::20]) == pytest.approx(
        distance, rel=1e-3)
    a, b = (part - part.mean(0) for part in (want[:150].astype(float), want[150:].astype(float)))
    trace = np.linalg.norm(a @ b.T, "nuc") / 149                 # of the root, in closed form
    distance = np.square(want[:150].mean(0) - want[150:].mean(0)).sum() + (
        np.square(a).sum() + np.square(b).sum()) / 149 - 2 * trace
    assert D.frechet_distance(ours[:150], ours[150:]) == pytest.approx(distance, rel=1e-3)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP with its processor."""
    from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor,
                              CLIPTokenizer)
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)] + list(".,-'")
    words = [*letters, *(a + "</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: k for k, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                              model_max_length=20)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=len(words), max_position_embeddings=20,
                         bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, **sizes),
        vision_config=dict(image_size=16, patch_size=8, **sizes),
        projection_dim=8)).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
                  tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_by_hand(clip_folder):
    """100 max(cos, 0) of the projected embeddings, pictures and captions prepared by hand."""
    net, processor = clip = D.load_clip(clip_folder, "cpu")
    image = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a red bird.", "blue", "a bird with a beak", "wings, green", "x", "abc " * 40]
    pixels = ((image + 1) * 127.5).round() / 255
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    want = []
    with torch.no_grad():
        for picture, caption in zip(pixels, captions):
            letters = [w for word in re.findall(r"[a-z]+|[.,]", caption)
                       for w in [*word[:-1], word[-1] + "</w>"]]
            ids = processor.tokenizer.convert_tokens_to_ids(
                ["<|startoftext|>", *letters[:18], "<|endoftext|>"])
            a = net.visual_projection(net.vision_model(picture[None]).pooler_output)[0].numpy()
            b = net.text_projection(net.text_model(torch.tensor([ids])).pooler_output)[0].numpy()
            want.append(100 * max(0.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    got = D.clip_score(clip, image, captions)
    assert got.shape == (6,) and np.allclose(got.numpy(), want, atol=1e-3)
    assert min(want) == 0 < max(want)


def test_eight_bit_nll_is_a_distribution():
    """Over the 256 values it sums to one, also for means beyond them; far tails stay finite; in
    the middle it is the density times the width of a bin."""
    values = torch.arange(256).view(-1, 1) / 127.5 - 1           # (256, 1)
    for mean, std in ((0.0, 0.7), (0.3, 0.01), (-2.0, 0.3), (5.0, 0.02)):
        nll = D.eight_bit_nll(values, torch.full_like(values, mean), std)
        assert nll.isfinite().all()
        assert torch.logsumexp(-nll, 0).item() == pytest.approx(0, abs=1e-6)
    x, mean = torch.tensor([[0.2, -0.1]]), torch.tensor([[0.3, 0.1]])
    want = -Normal(mean, 0.5).log_prob(x).sum() - 2 * math.log(2 / 255)
    assert D.eight_bit_nll(x, mean, 0.5).item() == pytest.approx(want.item(), abs=1e-4)


def test_image_bound_is_tight_for_the_exact_score():
    """[Eq. 2] with its two ends: for Gaussian images and their score it is their entropy, in nats
    of 8-bit values; with a wrong score it is more."""
    std, generator = 0.3, torch.Generator().manual_seed(0)
    x = D.eight_bits(std * torch.randn(200, 3, 16, 16, generator=generator)).float() / 127.5 - 1
    decoder = D.DiffusionDecoder(tiny())
    entropy = x[0].numel() * (0.5 * math.log(2 * math.pi * math.e * std ** 2) + math.log(127.5))

    def score_of(std):
        def eps(x_t, t, z):
            alpha, sigma = D.per_sample(SDE.alpha(t), x_t), D.per_sample(SDE.sigma(t), x_t)
            return sigma * x_t / (alpha ** 2 * std ** 2 + sigma ** 2)
        return eps
    torch.manual_seed(0)
    decoder.eps = score_of(std)
    right = D.image_bound(decoder, torch.zeros(200, 16), x)
    assert right.shape == (200,)
    assert right.mean().item() == pytest.approx(entropy, rel=0.005)
    decoder.eps = score_of(1.5 * std)
    assert D.image_bound(decoder, torch.zeros(200, 16), x).mean().item() > 1.01 * entropy


def test_image_bound_counts_what_is_left_at_the_end(monkeypatch):
    """An SDE that ends early leaves KL(q(x_1|x_0) || N(0, I)) of the signal, which is counted:
    without it the bound would fall below the entropy."""
    monkeypatch.setattr(D.VPSDE, "beta_max", 2.0)
    generator = torch.Generator().manual_seed(0)
    x = D.eight_bits(0.3 * torch.randn(200, 3, 16, 16, generator=generator)).float() / 127.5 - 1
    decoder, sde = D.DiffusionDecoder(tiny()), D.VPSDE()

    def eps(x_t, t, z):
        alpha, sigma = D.per_sample(sde.alpha(t), x_t), D.per_sample(sde.sigma(t), x_t)
        return sigma * x_t / (alpha ** 2 * 0.09 + sigma ** 2)
    decoder.eps = eps
    torch.manual_seed(0)
    bound = D.image_bound(decoder, torch.zeros(200, 16), x).mean().item()
    entropy = x[0].numel() * (0.5 * math.log(2 * math.pi * math.e * 0.09) + math.log(127.5))
    var = 1 - sde.alpha(torch.tensor(1.0)).item() ** 2 * 0.91    # of x_1, against 1
    assert bound == pytest.approx(entropy + x[0].numel() * 0.5 * (var - 1 - math.log(var)),
                                  rel=0.005)
    assert sde.alpha(torch.tensor(1.0)) ** 2 > 0.3


def test_bounds_add_up(tmp_path):
    """[Eq. 5] bits over the image's values: all terms and the KL, of all modalities; a feed-forward
    image term is the 8-bit probability under the Gaussian of the best variance."""
    run, data = start(tmp_path, decoder="feedforward")
    model, evaluation = run.ema, D.Evaluation(run.ema, data, D.Judge(16).eval(), 8)
    terms, bar = ("image", "mask", "attr", "KL"), D.tqdm(disable=True)
    torch.manual_seed(0)
    figures = evaluation.bounds(bar)
    parts = [figures[f"Eq. 5 bound, A = all: {n}, nats"] for n in terms]
    unit = 3 * 16 * 16 * math.log(2)
    assert figures["Eq. 5 bound, A = all: bits per image value"] == pytest.approx(
        sum(parts) / unit, rel=1e-6)
    x = evaluation.x
    torch.manual_seed(0)
    drawn = torch.tensor([[k >> i & 1 for i in range(3)] for k in torch.randint(7, (8,)) + 1])
    for subset, label in ((drawn.bool(), "A drawn"), (torch.ones(8, 3).bool(), "A = all")):
        mu, logvar = model.posterior(x, subset)
        q = Normal(mu, (0.5 * logvar).exp())
        kl = kl_divergence(q, Normal(torch.zeros_like(mu), 1.0)).sum(1).mean().item()
        z = mu + q.stddev * torch.randn(8, 16)
        mean = model.decoders["image"].net(z).double()
        edges = torch.linspace(-1 - 1 / 255, 1 + 1 / 255, 257, dtype=torch.float64)
        edges[0], edges[-1] = -math.inf, math.inf
        k = ((x["image"] + 1) * 127.5).round().long()
        normal = Normal(mean, (x["image"] - mean).square().mean().sqrt())
        image = -(normal.cdf(edges[k + 1]) - normal.cdf(edges[k])).log().flatten(1).sum(1).mean()
        others = sum(model.decoders[n].nll(z, x[n]).mean().item() for n in ("mask", "attr"))
        assert figures[f"Eq. 5 bound, {label}: bits per image value"] == pytest.approx(
            (image.item() + others + kl) / unit, rel=1e-5)
    assert parts[0] == pytest.approx(image.item(), rel=1e-5)
    assert parts[3] == pytest.approx(kl, rel=1e-5)


def test_what_a_caption_says(birds):
    """Toys by facts, each adjective with its noun; real captions by their frequent words."""
    data = toy("cub", 16)
    said = data.said(["the bird is tiny and red with a blue breast, wings that are green and a "
                      "long black bill.", "a pointed crest."])
    facts = [{f for f, bit in zip(data.vocabulary, row) if bit} for row in said]
    assert facts == [{"small bird", "red bird", "blue belly", "green wings", "long beak",
                      "black beak"}, {"pointed crown"}]
    x = {"image": np.zeros((3, 8, 8, 3), np.uint8), "text": [
        ["A red bird with red wings."] * 10, ["the bird is Blue"] * 10, ["green and odd"] * 10]}
    data = D.Data(x, {"train": [0, 1], "test": [2]}, False, torch.device("cpu"))
    assert data.vocabulary == ("blue", "red", "wings")
    assert data.said(["Blue wings, blue!", "green"]).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_every_toy_caption_is_true():
    """Ten different captions a bird, all true; eight of them name everything that is drawn."""
    for k, ten in enumerate(data_prep.toy_birds(100, 8)["text"]):
        bird = data_prep.draw_choices(np.random.default_rng((0, k)))
        drawn = {f"{bird[name]} {noun}" for name, noun in zip(bird, (
            "bird", "bird", "wings", "head", "belly", "beak", "beak", "crown")) if bird[name]}
        stated = [data_prep.facts_of(text) for text in ten]
        assert all(one == drawn for one in stated[:8]) and all(one < drawn for one in stated[8:])
        assert len(set(ten)) == len(ten) == 10


@pytest.mark.parametrize("name,values", data_prep.BIRD_CHOICES.items())
def test_toy_bird_words_are_visible(name, values):
    """Changing one word, and nothing else, changes the picture."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        bird = data_prep.draw_choices(rng)
        seed = int(rng.integers(1000))
        images = [data_prep.draw_bird({**bird, name: value}, np.random.default_rng(seed))
                  for value in values]
        changed = (images[0].astype(int) != images[1]).any(-1).sum()
        assert changed >= 3, (name, changed)


def test_captions_wrap_to_their_cell():
    """No letter reaches the right edge, however narrow the cell."""
    for width in (128, 168):
        picture = np.asarray(D.cell("text", "a large blue bird with a red belly " * 2, width, 128))
        assert (picture[:, -3:] == 255).all() and (picture[:, width // 2:] < 128).any()


def test_title_fits_a_narrow_grid(tmp_path):
    """A grid of one column is as wide as its title."""
    sizes = []
    for title in ("short", "long " * 40):
        D.draw_grid(tmp_path / "x.png", title, [("a", "mask", torch.zeros(1, 1, 8, 8))], ["0"])
        sizes.append(Image.open(tmp_path / "x.png").width)
    assert sizes[0] < 250 and sizes[1] > 1000


def test_captions_are_drawn_under_the_pictures(tmp_path):
    """Birds: one column for the test item, one for what is made, each with its caption below."""
    run, data = start(tmp_path, dataset="cub")
    path = tmp_path / "samples" / "x.png"
    D.sample_pictures(run.ema, data, path, ["text"], 2, 0, dict(sampler="ddim", steps=2))
    record = json.loads(path.with_suffix(".json").read_text())
    rows = data.split["test"][:2]
    assert [row["given: text"] for row in record["rows"]] == [data.captions[r][0] for r in rows]
    grid = np.asarray(Image.open(path))
    assert grid.shape == (44 + 2 * 218, 72 + 2 * 174, 3)
    assert (grid[44 + 146:44 + 212, 72:72 + 168] < 128).sum() > 100  # the caption below the first


# === §8 The command line ===

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run made through the command line with short lengths."""
    folder = tmp_path_factory.mktemp("cli")
    result = shell(folder, "--train --steps 3 --aux-steps 2 --batch-size 8 --sample cond "
                           "--given mask --num 2 --sampler-steps 2")
    assert result.returncode == 0, result.stderr
    return folder, result


SHORT = "import sys, diffmvae as D; D.TOY_COUNTS = dict(train=64, val=8, test=8); " \
        "D.JUDGE_TOYS = 64; D.train_judge.__defaults__ = (4, 8); sys.exit(D.main(sys.argv[1:]))"
PATHS = {**os.environ, "PYTHONPATH": str(HERE)}


def shell(folder, flags):
    """Run diffmvae.py in `folder`, with fewer toys and a short training of the judge."""
    return subprocess.run([sys.executable, "-c", SHORT, "--dataset", "celeba", *shlex.split(flags)],
                          cwd=folder, capture_output=True, text=True, env=PATHS)


def command(folder, flags, dataset="celeba", **changes):
    """The same in this process, which saves the import. changes: names of diffmvae to replace;
    a dataset "prep celeba" is for data_prep.py."""
    main = data_prep.main if dataset.startswith("prep") else D.main
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(D.train_judge, "__defaults__", (4, 8))
        for name, value in {"TOY_COUNTS": dict(train=64, val=8, test=8), "JUDGE_TOYS": 64,
                            **changes}.items():
            patch.setattr(D, name, value)
        try:
            code = main(["--dataset", dataset.removeprefix("prep "), *shlex.split(flags)])
        except SystemExit as error:
            code = error.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_command_train_and_sample(trained):
    """The README's main command, short: checkpoint, log, picture with its record, path printed."""
    folder, result = trained
    run = folder / "runs" / "celeba-toy"
    assert "TOY FACES" in result.stdout
    assert "given-mask-seed0.png" in result.stdout
    assert (run / "samples" / "given-mask-seed0.png").exists()
    assert (run / "samples" / "given-mask-seed0.json").exists()
    rows = [json.loads(line) for line in open(run / "log.jsonl")]
    assert {"image", "mask", "attr", "kl", "total"} <= set(rows[0])
    assert any("gap" in row for row in rows) and rows[-1]["stage"] == 2
    assert D.load(run / "checkpoint.pt").config.steps == 3


@pytest.mark.parametrize("flags,file", [
    ("--sample uncond", "uncond-aux-seed0"),
    ("--sample uncond --prior gaussian", "uncond-gaussian-seed0"),
    ("--sample cond --given image attr --seed 3 --sampler euler-maruyama",
     "given-image-attr-seed3"),
    ("--sample cond --given attr=Smiling,Eyeglasses --sampler ddpm --device cpu",
     "given-attr-own-seed0"),
    ("--sample cond --given mask --sampler dpm++ --run runs/celeba-toy", "given-mask-seed0")])
def test_command_sample(trained, flags, file):
    folder, _ = trained
    result = command(folder, flags + " --num 2 --sampler-steps 2")
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "runs/celeba-toy/samples" / f"{file}.json").read_text())
    assert len(record["rows"]) == 2


@pytest.mark.parametrize("weighting,flags,want", [
    ("simple", "", ("ddim", 50)), ("likelihood", "", ("euler-maruyama", 100)),
    ("simple", "--sampler euler-maruyama", ("euler-maruyama", 100)),
    ("likelihood", "--sampler dpm++", ("dpm++", 50)),
    ("likelihood", "--sampler-steps 7", ("euler-maruyama", 7))])
def test_models_are_sampled_as_in_the_paper(weighting, flags, want):
    """[Sec. 4.1] DDIM with 50 steps for lambda = 1, Euler-Maruyama for lambda = g^2."""
    args = D.parse_args(f"--dataset celeba --sample uncond {flags}".split())
    options = D.sampling_options(args, tiny(weighting=weighting))
    assert (options["sampler"], options["steps"]) == want


def test_data_toy(tmp_path):
    """--data toy: the built-in set, in its own run folder, though prepared data are there."""
    (tmp_path / "data/celeba").mkdir(parents=True)
    flags = "--train --steps 1 --aux-steps 1 --batch-size 4"
    assert "not a complete data set" in command(tmp_path, flags).stderr
    result = command(tmp_path, flags + " --data toy")
    assert result.returncode == 0 and "*** Using the built-in TOY FACES" in result.stdout
    assert (tmp_path / "runs/celeba-toy/checkpoint.pt").exists()


def test_command_birds(tmp_path, clip_folder):
    """The same commands for CUB: train, every --given, no given, captions greedy and not,
    --eval, --resume."""
    length = "--train --steps 3 --aux-steps 2 --batch-size 8"
    result = command(tmp_path, f"{length} --sample cond --given text --num 2 --sampler-steps 2 "
                     f"--eval --eval-num 8 --eval-repeats 2 --clip {clip_folder}", "cub")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "cub-toy"
    assert "TOY BIRDS" in result.stdout and (run / "samples/given-text-seed0.png").exists()
    rows = [json.loads(line) for line in open(run / "log.jsonl")]
    assert {"image", "text", "kl", "total"} <= set(rows[0])
    assert any({"gap", "text nll", "text gap", "text->image", "image->text"} <= set(row)
               for row in rows)
    record = json.loads((run / "eval.json").read_text())
    assert {"text from image: CLIP", "image from text: CLIP", "image + text from nothing: CLIP"
            } <= {n for n, f in record["figures"].items() if f["mean"] is not None}
    assert record["top_p"] == 0 and record["repeats"] == 2
    before = weights(run)
    assert command(tmp_path, length + " --resume", "cub").returncode == 0
    assert all(torch.equal(v, before[k]) for k, v in weights(run).items())
    captions = {}
    for flags, stem in [("cond --given image", "given-image"), ("uncond", "uncond-aux"),
                        ("uncond --top-p 0.9", "uncond-aux-top0.9"),
                        ("cond --given 'text=A small red bird, with a yellow beak!'",
                         "given-text-own")]:
        result = command(tmp_path, f"--sample {flags} --num 2 --sampler-steps 2", "cub")
        assert result.returncode == 0, result.stderr
        record = json.loads((run / f"samples/{stem}-seed0.json").read_text())
        captions[flags] = [row["generated: text"] for row in record["rows"]]
        assert len(captions[flags]) == 2
    assert captions["uncond"] != captions["uncond --top-p 0.9"]
    again = json.loads((run / "samples/uncond-aux-top0.9-seed0.json").read_text())
    assert "top-p 0.9" in again["title"]
    assert record["rows"][0]["given: text"] == "A small red bird, with a yellow beak!"


def test_readme_code_runs(trained, monkeypatch):
    """The README's Python, as it stands, on short trainings of both setups."""
    folder, _ = trained
    monkeypatch.chdir(folder)
    monkeypatch.setattr(D, "TOY_COUNTS", dict(train=64, val=8, test=8))
    monkeypatch.setattr(D, "JUDGE_TOYS", 64)
    monkeypatch.setattr(D.train_judge, "__defaults__", (4, 8))
    result = command(folder, "--train --steps 1 --aux-steps 1 --batch-size 8", "cub")
    assert result.returncode == 0, result.stderr
    blocks = re.findall(r"```python\n(.+?)```", (HERE / "README.md").read_text(), re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, {})


def test_command_text_init(tmp_path):
    """--text-init: sizes, tokenizers and weights of an Optimus folder, for birds only."""
    draw_optimus(tmp_path / "optimus")
    flags = "--train --steps 2 --aux-steps 1 --batch-size 4 --text-init optimus"
    result = command(tmp_path, flags + " --sample cond --given text='a red bird' --num 1 "
                     "--sampler-steps 2", "cub")
    assert result.returncode == 0 and "missing: 0" in result.stdout, result.stderr
    config = D.load(tmp_path / "runs/cub-toy/checkpoint.pt").config
    assert (config.text_width, config.text_layers) == (32, 2) and config.special[0] == 300
    flags = flags.replace("--text-init optimus", "--resume")     # the checkpoint has it all
    assert command(tmp_path, flags, "cub").returncode == 0
    result = command(tmp_path, "--dry-run --batch-size 2 --text-init optimus", "cub")
    assert result.returncode == 0 and "text decoder from" in result.stdout
    result = command(tmp_path, "--dry-run --text-init nowhere", "cub")
    assert result.returncode == 2 and "needs one folder" in result.stderr


def test_command_resume_and_overwrite(trained):
    """A finished run is not overwritten unless asked; --resume of it changes nothing."""
    folder, _ = trained
    flags = "--train --steps 3 --aux-steps 2 --batch-size 8"
    before = weights(folder / "runs/celeba-toy")
    result = command(folder, flags)
    assert result.returncode == 2 and "--resume continues it" in result.stderr
    result = command(folder, flags + " --resume --lr 0.5")
    assert result.returncode == 2 and "another lr" in result.stderr
    assert command(folder, flags + " --resume").returncode == 0
    after = weights(folder / "runs/celeba-toy")
    assert all(torch.equal(before[k], after[k]) for k in before)
    flags = "--run other --train --aux-steps 1 --batch-size 32 "
    assert command(folder, flags + "--steps 1").returncode == 0
    old, stale = weights(folder / "other"), folder / "other" / "eval.json"
    stale.write_text("{}")
    result = command(folder, flags + "--overwrite --epochs 1 --lr 1e-4 --lr-schedule constant "
                     "--beta 0.2 --preset small --prior-expert")
    config = D.load(folder / "other/checkpoint.pt").config
    assert result.returncode == 0
    assert (config.steps, config.batch_size, config.aux_steps) == (2, 32, 1)
    assert (config.lr, config.lr_schedule, config.beta) == (1e-4, "constant", 0.2)
    assert config.prior_expert
    new = weights(folder / "other")
    assert any(not torch.equal(old[k], new[k]) for k in old) and not stale.exists()
    assert {json.loads(line)["step"] for line in open(folder / "other/log.jsonl")} == {1, 2}
    for flags, words in (("--decoder feedforward", "trained with decoder diffusion"),
                         ("--objective mvtcae", "trained with objective mopoe")):
        result = command(folder, f"--run other {flags} --sample uncond")
        assert result.returncode == 2 and words in result.stderr


@pytest.mark.parametrize("flags,run", [
    ("--decoder feedforward --prior-expert", "celeba-toy-feedforward-prior"),
    ("--decoder feedforward --objective mvtcae", "celeba-toy-feedforward-mvtcae"),
    ("--weighting likelihood", "celeba-toy-likelihood")])
def test_command_variants(tmp_path, flags, run):
    """Each variant has its own run folder, and sampling finds it by the same flag."""
    result = command(tmp_path, flags + " --train --steps 2 --aux-steps 1 --batch-size 8 --sample "
                     "uncond --num 2 --sampler-steps 2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / run / "samples" / "uncond-aux-seed0.png").exists()
    assert command(tmp_path, flags + " --sample uncond --num 1 --sampler-steps 1").returncode == 0


def test_command_eval(trained, inception_file):
    """Figures on the screen and in eval.json, the paper's beside them; FID with --inception."""
    folder, _ = trained
    result = command(folder, f"--eval --eval-num 4 --eval-repeats 1 --sampler-steps 1 "
                     f"--inception {inception_file}")
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "runs/celeba-toy/eval.json").read_text())
    assert (record["model"], record["items"], record["repeats"]) == ("Diff-MVAE*", 4, 1)
    row = record["figures"]["image from mask: FID"]
    assert row["paper"] == 28.5 and row["mean"] > 0 and row["std"] is None
    assert f"image from mask: FID {row['mean']:.3f} 28.5".split() in [
        line.split() for line in result.stdout.splitlines()]
    assert "9/9" in result.stderr                                # the progress bar
    assert record["config"]["steps"] == 3 and record["config"]["dataset"] == "celeba-toy"


def test_command_eval_without_its_weights(trained, tmp_path):
    """Files that are not what --inception and --clip take are named."""
    folder, _ = trained
    (tmp_path / "x.pth").write_bytes(b"PK no weights")
    for flags, dataset, words in (
            (f"--inception {tmp_path}/x.pth", "celeba", "not pytorch-fid's weights"),
            (f"--train --inception {tmp_path}/y.pth", "celeba", "no such file")):
        result = command(folder, f"--eval {flags}", dataset)
        assert result.returncode == 2 and words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    with pytest.raises(D.UserError, match="no CLIP model"):
        D.load_clip(str(tmp_path), "cpu")


def test_command_dry_run(tmp_path):
    result = shell(tmp_path, "--dry-run --batch-size 2 --preset small")
    assert result.returncode == 0, result.stderr
    for word in ("image decoder", "one training step, batch 2", "one DDIM step", "peak memory"):
        assert word in result.stdout
    assert not list(tmp_path.iterdir())


def torchrun(folder, flags):
    """The command as two processes on the CPU, float32, a line of the log every step."""
    script = folder / "short.py"
    script.write_text(SHORT.replace(
        "sys.exit", "D.SMALL.update(log_every=1, save_every=10); "
        "D.has_fast_bf16 = lambda device: False; original = D.save_checkpoint; "
        "D.save_checkpoint = lambda path, c: original(path, c) or original("
        "path.with_name(f'{c[\"stage\"]}-{c[\"step\"]}.pt'), c); sys.exit"))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "--", str(script), "--dataset", "celeba", *shlex.split(flags)],
        cwd=folder, capture_output=True, text=True, env={**PATHS, "OMP_NUM_THREADS": "1"})


def test_torchrun_equals_one_process(tmp_path):
    """Two processes: the losses and gradients of one with the same whole batch, over 20 steps and
    the second stage; one writes; --resume goes on; a picture at the end is made once."""
    flags = "--train --steps 20 --aux-steps 3 --batch-size 8 --lr 1e-5 "  # Adam amplifies rounding
    logs, often = [], {**D.PRESETS["celeba"]["small"], "log_every": 1, "save_every": 10}
    for run, program in (
            ("1", functools.partial(command, has_fast_bf16=lambda device: False,
                                    PRESETS={"celeba": {"small": often}})), ("2", torchrun)):
        (tmp_path / run).mkdir()
        result = program(tmp_path / run, flags + "--sample uncond --num 1 --sampler-steps 1")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("checkpoint.pt: trained") == 1 == result.stdout.count("1 rows")
        rows = open(tmp_path / run / "runs/celeba-toy/log.jsonl").read().splitlines()
        logs.append([row for row in map(json.loads, rows) if "hint" not in row])
    assert [len(log) for log in logs] == [24, 24]                # 20 + 3, and the figures
    for one, two in zip(*logs):
        assert (one["stage"], one["step"]) == (two["stage"], two["step"])
        close = 1e-4 if one["stage"] == 1 else 1e-2              # of the second: other posteriors
        for name in set(one) - {"seconds"}:
            assert two[name] == pytest.approx(one[name], rel=close, abs=0.05 * (
                "lr" not in one)), (name, one, two)
    run = tmp_path / "2/runs/celeba-toy"
    shutil.copytree(tmp_path / "2/runs", tmp_path / "2/whole")
    shutil.copy(run / "1-10.pt", run / "checkpoint.pt")          # half of the first stage
    result = torchrun(tmp_path / "2", flags + "--resume")
    assert result.returncode == 0, result.stderr
    before, after = (weights(tmp_path / "2" / f / "celeba-toy") for f in ("whole", "runs"))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_batch_norm_of_one_process_is_pytorchs():
    """Both kinds of input, training and evaluation: values, statistics, names of the weights."""
    torch.manual_seed(0)
    for x, theirs in ((torch.randn(8, 4, 3, 3), nn.BatchNorm2d(4)),
                      (torch.randn(8, 4), nn.BatchNorm1d(4))):
        ours = D.BatchNorm(4)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.eval()(x), theirs.eval()(x))
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


def test_command_on_prepared_data(tmp_path):
    """Raw data to arrays to training, sampling and evaluation; a size the preset cannot take."""
    draw_raw(tmp_path / "raw", n=30, mapping=False)
    assert prepare(tmp_path / "raw", tmp_path / "data" / "celeba").returncode == 0
    result = command(tmp_path, "--preset small --train --steps 2 --aux-steps 1 --batch-size 4 "
                     "--sample cond --given mask --num 2 --sampler-steps 2 --eval --eval-num 3 "
                     "--eval-repeats 1")
    assert result.returncode == 0 and "TOY" not in result.stdout, result.stderr
    assert (tmp_path / "runs/celeba/samples/given-mask-seed0.png").exists()
    assert json.loads((tmp_path / "runs/celeba/eval.json").read_text())["items"] == 3
    assert D.load(tmp_path / "runs/celeba/checkpoint.pt").config.image_size == 16
    result = command(tmp_path, "--dry-run")
    assert result.returncode == 2 and "16 px, preset paper needs a multiple of 32" in result.stderr
    meta = tmp_path / "data/celeba/meta.json"
    meta.write_text(meta.read_text().replace('"test": [27, 28, 29]', '"test": []'))
    result = command(tmp_path, "--sample uncond")
    assert result.returncode == 2 and "split test has 0 rows" in result.stderr


def test_command_on_prepared_birds(tmp_path):
    """Raw birds to arrays to training, pictures and figures; faces are not taken for birds."""
    draw_birds(tmp_path / "raw")
    assert prepare(tmp_path / "raw", tmp_path / "data" / "cub", *CUB).returncode == 0
    result = command(tmp_path, "--preset small --train --steps 2 --aux-steps 1 --batch-size 4 "
                     "--sample cond --given text --num 2 --sampler-steps 2 --eval --eval-num 3 "
                     "--eval-repeats 1", "cub")
    assert result.returncode == 0 and "TOY" not in result.stdout, result.stderr
    record = json.loads((tmp_path / "runs/cub/samples/given-text-seed0.json").read_text())
    assert {row["given: text"] for row in record["rows"]} == {
        f"004.Wren/{name}, it's n\u00ba 0" for name in ("b_0", "bb_1")}
    assert json.loads((tmp_path / "runs/cub/eval.json").read_text())["items"] == 2
    result = command(tmp_path, "--dry-run --data data/cub")
    assert result.returncode == 2 and "prepared with --dataset cub" in result.stderr


def test_torchrun_is_for_training(tmp_path, monkeypatch):
    """Whatever else is asked of several processes is refused before they meet, and a batch that
    they cannot share out."""
    result = command(tmp_path, "--train --batch-size 3", ranks=lambda: (0, 2))
    assert result.returncode == 2 and "3 does not divide by 2 processes" in result.stderr
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "0")
    for flags in ("--sample uncond", "--dry-run", "--train --device mps"):
        result = command(tmp_path, flags)
        assert result.returncode == 2 and "torchrun: is for --train" in result.stderr
    monkeypatch.setenv("RANK", "1")                              # said once, by the first process
    result = command(tmp_path, "--sample uncond")
    assert result.returncode == 2 and result.stderr == ""


# === §9 Bad input and faults ===

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with raw data in all three layouts, prepared data and a run of either setup."""
    folder = tmp_path_factory.mktemp("place")
    draw_raw(folder / "faces")
    draw_birds(folder / "birds")
    draw_birds(folder / "mmvae", True)
    data_prep.prepare_celeba(folder / "faces", folder / "prepared/celeba", 16)
    data_prep.prepare_cub(folder / "mmvae", folder / "prepared/cub", 16)
    for dataset in D.MODALITIES:
        run = D.Run(folder / "runs" / f"{dataset}-toy", tiny(dataset), torch.device("cpu"))
        run.log_file_of([])
        run.stage, run.step = 2, 4
        run.save(None)
    return folder


def contents(folder):
    """Every path below a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def rewrite(name, change):
    """A damage: the bytes of the file or files `name` (a pattern) go through `change`."""
    def damage(folder):
        for path in list(folder.glob(name)):
            path.write_bytes(change(path.read_bytes()))
    return damage


def cut(length, name):
    """A damage: only the first bytes of a file are left."""
    return rewrite(name, lambda content: content[:length])


def swap(name, old, new):
    """A damage: other words in a text file."""
    return rewrite(name, lambda content: content.replace(old.encode(), new.encode()))


def delete(name):
    """A damage: the files are gone."""
    return lambda folder: [path.unlink() for path in list(folder.glob(name))]


def change_checkpoint(change, name="runs/celeba-toy/checkpoint.pt"):
    """A damage: change(checkpoint) in place, or what it returns instead."""
    def damage(folder):
        checkpoint = torch.load(folder / name, weights_only=True)
        changed = change(checkpoint)
        torch.save(checkpoint if changed is None else changed, folder / name)
    return damage


class Crafted:
    """Unpickled without care it runs code that leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def lines(change, name):
    """A damage: change(list of lines) of a text file."""
    return rewrite(name, lambda content: b"\n".join(change(content.split(b"\n"))))


RAW_FACES, RAW_BIRDS, JUDGE = "prep celeba", "prep cub", "judge-celeba-toy-16px-64.pt"
BAD_FLAGS = [
    ("", "nothing to do"), ("--sample cond", "belong together"),
    ("--sample uncond --given mask", "belong together"),
    ("--sample cond --given sound", "choose from image, mask, attr"),
    ("--train --decoder feedforward --weighting likelihood", "of the diffusion decoder"),
    ("--sample cond --given mask mask", "each once"),
    ("--sample cond --given mask attr=Bald", "all your own"),
    ("--sample cond --given attr=Freckles", "no attribute Freckles; the model knows Bald, Bangs"),
    ("--sample cond --given mask=nowhere.png", "cannot be read as a picture"),
    ("--sample uncond --run nowhere", "train first with --train"),
    ("--eval --run nowhere", "train first"),
    ("--train --data nowhere --run new", "not a complete data set"),
    ("--train --steps 0", "not above zero"), (f"--train --steps {10 ** 400}", "too large"),
    ("--train --steps 1e3", "invalid number value"),
    ("--train --epochs -1", "not above zero"), ("--train --aux-steps 0", "not above zero"),
    ("--train --lr nan", "not above zero"), ("--train --beta -1", "not above zero"),
    ("--train --batch-size -8", "not above zero"), ("--train --batch-size 1", "at least 2"),
    ("--train --seed -1", "below zero"), (f"--train --seed {2 ** 63}", "too large"),
    ("--train --steps 5 --epochs 5", "not allowed with"),
    ("--train --resume --overwrite", "not allowed with"),
    ("--resume --sample uncond", "need --train"),
    ("--train --resume --run new", "no checkpoint to resume"),
    ("--sample uncond --beta 1", "keeps its own"), ("--sample uncond --num 0", "not above zero"),
    ("--sample uncond --top-p 2", "not between 0 and 1"),
    ("--sample uncond --sampler-steps 0", "not above zero"),
    ("--sample uncond --sampler heun", "invalid choice"),
    ("--eval --eval-num 1", "at least 2"), ("--eval --eval-repeats 0", "not above zero"),
    ("--train --text-init here", "only the cub setup has text"),
    ("--eval --clip here", "only the cub setup has text"),
    ("--sample uncond --inception x.pth", "need --eval"), ("--eval --inception y.pth", "no such"),
    ("--train --objective mvtcae --prior-expert", "has no --prior-expert"),
    ("--train --device nowhere --run new", "nowhere"), ("--train --device meta --run new", "meta"),
    ("--what", "unrecognized arguments"),
]
BAD_INPUT = [("celeba", *case, None) for case in BAD_FLAGS] + [
    # the user's own pictures and words
    ("celeba", "--sample cond --given image=faces/CelebA-HQ-img/7.jpg", "7.jpg: cannot be read as",
     cut(300, "faces/*/7.jpg")),
    ("celeba", "--sample cond --given mask=runs", "Is a directory", None),
    ("cub", "--sample cond --given text='" + "red " * 40 + "'", "longer than the 30 tokens", None),
    ("cub", "--sample cond --given 'text=. !'", "no words", None),
    ("cub", "--sample cond --given mask", "choose from image, text", None),
    ("cub", "--dry-run --text-init nowhere", "needs one folder checkpoint-encoder-*", None),
    # checkpoints
    ("celeba", "--sample uncond", "not a checkpoint of this script, or damaged",
     cut(50_000, "runs/*/checkpoint.pt")),
    ("celeba", "--train --resume", "not a checkpoint of this script, or damaged",
     cut(0, "runs/*/checkpoint.pt")),
    ("celeba", "--sample uncond", "damaged (UnpicklingError",
     change_checkpoint(lambda checkpoint: {"format": Crafted()})),
    ("celeba", "--sample uncond", "format 99, this script reads 1",
     change_checkpoint(lambda checkpoint: {"format": 99})),
    ("celeba", "--sample uncond", "made by another version of this script (its configuration "
     "differs in attr_", change_checkpoint(lambda checkpoint: checkpoint["config"].clear())),
    ("celeba", "--sample uncond", "its weights and its configuration do not fit together",
     change_checkpoint(lambda checkpoint: checkpoint["config"].update(latent=32))),
    ("celeba", "--sample uncond", "damaged (ValueError: stage 3, step 4",
     change_checkpoint(lambda checkpoint: checkpoint.update(stage=3))),
    ("celeba", "--train --resume --batch-size 8 --steps 6", "--resume with another", None),
    ("celeba", "--train", "--resume continues it, --overwrite starts over", None),
    ("celeba", "--sample uncond --run runs/cub-toy", "trained with dataset cub-toy, not celeba",
     None),
    ("celeba", "--sample uncond --run runs/celeba-toy --decoder feedforward",
     "trained with decoder diffusion, not feedforward", None),
    ("celeba", "--sample uncond", "the auxiliary model is not trained yet",
     change_checkpoint(lambda checkpoint: checkpoint.update(stage=1))),
    ("celeba", "--eval", "the auxiliary model is not trained yet",
     change_checkpoint(lambda checkpoint: checkpoint.update(stage=1))),
    ("celeba", "--train --run prepared/celeba/meta.json/run", "checkpoint.pt: cannot be written",
     None),
    ("celeba", "--sample uncond --num 1 --sampler-steps 1", "uncond-aux-seed0.png: cannot be writ",
     lambda folder: (folder / "runs/celeba-toy/samples").touch()),
    # weights of others
    ("celeba", "--eval --inception prepared/celeba/meta.json", "not pytorch-fid's weights", None),
    ("cub", "--eval --clip prepared", "--clip prepared: no CLIP model", None),
    ("celeba", "--eval", f"{JUDGE}: not a judge of this data, or damaged; delete it",
     lambda folder: (folder / f"runs/{JUDGE}").write_bytes(b"PK")),
    # prepared data
    *[("celeba", "--train --run new --preset small --data prepared/celeba", words, damage)
      for words, damage in (
          ("No such file", delete("prepared/celeba/attr.npy")),
          ("mask has shape (11, 16, 16), not (12, 16, 16)", lambda folder: np.save(
              folder / "prepared/celeba/mask.npy", np.zeros((11, 16, 16), np.uint8))),
          ("not a complete data set", cut(1000, "prepared/*/image.npy")),
          ("not a complete data set", cut(0, "prepared/*/image.npy")),
          ("not a complete data set", cut(100, "prepared/*/meta.json")),
          ("mask is float32, not uint8", lambda folder: np.save(
              folder / "prepared/celeba/mask.npy", np.zeros((12, 16, 16), np.float32))),
          ("split test has 0 rows", swap("prepared/celeba/meta.json", "[4, 5]", "[]")),
          ("split test has 2 rows, at least 2 of 0 to 11",
           swap("prepared/celeba/meta.json", "[4, 5]", "[4, 12]")))],
    ("celeba", "--train --run new --data prepared/cub", "prepared with --dataset cub", None),
    ("celeba", "--train --run new --data prepared/celeba", "16 px, preset paper needs a multiple",
     None),
    ("celeba", "--sample uncond --run runs/other --data prepared/celeba", "trained with dataset",
     lambda folder: shutil.copytree(folder / "runs/celeba-toy", folder / "runs/other")),
    ("cub", "--train --run new --preset small --data prepared/cub", "text has shape (9, 10)",
     lambda folder: (folder / "prepared/cub/text.json").write_text(json.dumps([["a"] * 10] * 9))),
    ("cub", "--train --run new --preset small --data prepared/cub", "a caption in text.json is not",
     lambda folder: (folder / "prepared/cub/text.json").write_text(json.dumps([[1] * 10] * 10))),
    # raw faces
    (RAW_FACES, "--raw faces --out prepared/celeba", "exists already", None),
    (RAW_FACES, "--raw faces --size 20", "--size 20: must be a positive multiple of 8", None),
    (RAW_FACES, "--raw faces --size -8", "must be a positive multiple of 8", None),
    (RAW_FACES, "", "required: --raw", None),
    (RAW_FACES, "--raw faces --out runs/celeba-toy/log.jsonl/out", "cannot be written", None),
    (RAW_FACES, "--raw faces --out a/b/c", "12 train, 0 val, 0 test: every split needs 2 at least",
     rewrite("faces/*mapping.txt", lambda content: re.sub(rb" \d+ ", b" 1 ", content))),
    (RAW_FACES, "--raw faces --out out", "exists already",
     lambda folder: (folder / "out").symlink_to("nowhere")),
    *[(RAW_FACES, "--raw faces --out out", words, damage) for words, damage in (
        ("faces: no CelebAMask-HQ-attribute-anno.txt; --raw takes",
         delete("faces/CelebAMask-HQ-attribute-anno.txt")),
        ("1 of 12 images are missing, the first is 2.jpg", delete("faces/CelebA-HQ-img/2.jpg")),
        ("2 of 12 faces have no mask, the first is 6 (00006_*.png)",
         delete("faces/*/0/0000[68]_*")),
        ("no mask of face 6 (00006_*.png)", delete("faces/*/0/00006_[!s]*")),
        ("no line for 11 images", rewrite("faces/*mapping.txt", lambda content: b"a\n0 0 x\n")),
        ("mapping.txt: no line for 12 images", cut(0, "faces/*mapping.txt")),
        ("a line is not 'idx orig_idx", rewrite("faces/*mapping.txt", lambda content: b"a\nx\n")),
        ("7.jpg: cannot be read", cut(300, "faces/*/7.jpg")),
        ("7.jpg: cannot be read", cut(0, "faces/*/7.jpg")),
        ("_hair.png: cannot be read", cut(60, "faces/*/0/00003_hair.png")),
        ("anno.txt: line 8 is not", swap("faces/*anno.txt", "5.jpg  ", "5.jpg  x ")),
        ("anno.txt: line 14 is not", swap("faces/*anno.txt", "11.jpg", "\u00b2.jpg")),
        ("4.jpg: cannot be read (Image size (268435456 pixels)", lambda folder: Image.new(
            "1", (2 ** 14, 2 ** 14)).save(folder / "faces" / data_prep.IMAGES / "4.jpg", "PNG")),
        ("line 2 names no Bald;", swap("faces/*anno.txt", "Bald", "Bold")),
        ("line 1 says 0 images, 0 rows follow", lines(
            lambda all: [b"0", all[1]], "faces/*anno.txt")),
        ("line 2 names no Bald, Bangs", cut(0, "faces/*anno.txt")),
        ("line 1 says 12 images, 11 rows", lines(lambda all: all[:-2], "faces/*anno.txt")),
        ("00004_hair.png: 64x64 pixels, another part", lambda folder: Image.new(
            "RGB", (32, 32)).save(folder / "faces" / data_prep.MASKS / "0/00004_nose.png")))],
    (RAW_FACES, "--raw faces --out out --skip-bad",
     "none of the 12 pictures can be read; the first: faces/CelebA-HQ-img/0.jpg: cannot",
     cut(0, "faces/*/*.jpg")),
    # raw birds
    *[(RAW_BIRDS, "--raw birds --out out", words, damage) for words, damage in (
        ("1 images without captions, the first is 003.Tern/b", delete("**/003.Tern/b_0.txt")),
        ("1 captions without image, the first is 001.Auk/b_0", delete("birds/**/001.Auk/b_0.jpg")),
        ("003.Tern/b_0.txt: 9 captions, not 10", lines(lambda all: all[1:], "**/003.Tern/b_0.txt")),
        ("b_0.txt: 11 captions", lines(lambda all: [b"", *all, b"x"], "**/003.Tern/b_0.txt")),
        ("no images; for the MMVAE download, no train, text_trainvalclasses.txt, test, text_testc",
         lambda folder: (folder / "birds" / data_prep.CUB / "images").rename(folder / "img")),
        ("Reed's captions, no text_c10; for",
         lambda folder: (folder / "birds/text_c10").rename(folder / "text")),
        ("2 classes, none of them for train", lambda folder: [
            path.unlink() for k in ("003", "004") for path in folder.glob(f"birds/**/{k}*/*")]),
        ("1 classes are in none of them, the first is 0",
         split_files("birds", train=[A], val=[J], test=[T])),
        ("002.Jay is in trainclasses.txt too",
         split_files("birds", train=[A, J], val=[J, T], test=[W])),
        ("4 classes, none of them for val",
         split_files("birds", train=[A, J], val=["099.Owl"], test=[T, W])),
        ("002.Jay/b_0.jpg: cannot be read",
         cut(200, "birds/**/002.Jay/b_0.jpg")))],
    *[(RAW_BIRDS, "--raw mmvae --out out", words, damage) for words, damage in (
        ("002.Jay/b_0.jpg: cannot be read",
         cut(200, "mmvae/**/002.Jay/b_0.jpg")),
        ("text_testclasses.txt: 19 captions, not 10 for each of the 2 images",
         lines(lambda all: all[1:], "mmvae/cub/text_testclasses.txt")),
        ("text_trainvalclasses.txt: 81 captions, not 10 for each of the 8 images",
         lines(lambda all: all + [b"x"], "mmvae/cub/text_trainvalclasses.txt")),
        ("the MMVAE download, no test; --raw",
         lambda folder: (folder / "mmvae/cub/test").rename(folder / "t")),
        ("images, text_c10; for the MMVAE download, no text_trainvalclasses.txt; --raw",
         delete("mmvae/cub/text_trainvalclasses.txt")),
        ("class 003.Tern is in", lambda folder: (folder / "mmvae/cub/test" / J).rename(
            folder / "mmvae/cub/test" / T)))],
]


def test_crafted_file_would_run_code(tmp_path, monkeypatch):
    """What the table has refused does harm where weights_only is forgotten."""
    monkeypatch.chdir(tmp_path)
    torch.save({"format": Crafted()}, "checkpoint.pt")
    torch.load("checkpoint.pt", weights_only=False)
    assert Path("owned").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 1")])
def test_out_of_memory_is_said_in_one_line(place, error):
    def load(*_):
        raise error
    result = command(place, "--sample uncond", load=load)
    assert result.returncode == 2 and "out of memory; take a smaller --batch" in result.stderr
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        command(place, "--sample uncond", load=load)


def test_worker_that_is_killed():
    with pytest.raises(data_prep.DataError, match="a worker process was killed"):
        list(data_prep.in_parallel(os._exit, [(1,)]))


def test_unfinished_training_can_be_sampled(place, tmp_path):
    """After stage 1 what is given needs no auxiliary model; it says how far the training is."""
    folder = shutil.copytree(place, tmp_path / "place")
    change_checkpoint(lambda checkpoint: checkpoint.update(stage=1))(folder)
    result = command(folder, "--sample cond --given mask --num 1 --sampler-steps 1")
    assert result.returncode == 0
    assert "training is not finished (stage 1, step 4)" in result.stderr


@pytest.mark.parametrize("dataset,flags,words,damage", BAD_INPUT)
def test_bad_input(place, tmp_path, capfd, dataset, flags, words, damage):
    """One line on stderr that says what is wrong, exit code 2; nothing written, nothing changed."""
    folder = shutil.copytree(place, tmp_path / "place")
    if damage:
        damage(folder)
    before = contents(folder)
    result = command(folder, flags, dataset)
    said = [line for line in result.stderr.splitlines() if line and "%|" not in line]
    assert result.returncode == 2 and capfd.readouterr().err == ""  # nothing by the workers
    assert len(said) == 1 and words in said[0], said
    program = "data_prep.py" if dataset in (RAW_FACES, RAW_BIRDS) else "diffmvae.py"
    assert said[0].startswith(f"{program}: ")
    assert contents(folder) == before


@contextmanager
def files_up_to(size):
    """No file can grow beyond `size` bytes, as on a disk that fills up: a true error of write()."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_keeps_the_old_checkpoint(tmp_path, capsys):
    """While training writes one: the message names file and need, the old one loads."""
    run, data = start(tmp_path, save_every=1)
    run.save(None)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    need = sum(2 * v.nbytes for v in run.model.state_dict().values())  # and the averages
    with files_up_to(2 * len(before) // 3), pytest.raises(D.UserError) as caught:
        D.train(run, data)
    said = re.fullmatch(r"(.+): cannot be written \(.*File too large.*\); ([0-9,]+) bytes are "
                        "needed, an old file is kept", str(caught.value))
    assert said[1] == str(tmp_path / "checkpoint.pt")
    assert 1.2 * need < int(said[2].replace(",", "")) < 2.2 * need
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part")) and D.load(tmp_path / "checkpoint.pt")
    assert capsys.readouterr().err.endswith("\n")                # the bar's line has ended


def test_full_disk_while_logging(tmp_path):
    run, data = start(tmp_path, steps=40, log_every=1)
    with files_up_to(2000), pytest.raises(D.UserError, match="log.jsonl: cannot be written"):
        D.train(run, data)


@pytest.mark.parametrize("free", [1000, 10 ** 12])
def test_full_disk_while_preparing(place, tmp_path, monkeypatch, free):
    """Too little room is said before anything is read, or when it runs out; nothing is left."""
    folder = shutil.copytree(place, tmp_path / "place")
    before = contents(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with files_up_to(5000):
        result = command(folder, "--raw faces --out out --size 32", RAW_FACES)
    assert result.returncode == 2
    said = result.stderr.splitlines()[-1]
    assert said.startswith("data_prep.py: out.partial: 0.05 MB needed"), said
    assert ("cannot be written (File too large); nothing is kept" if free > 1000 else
            "0.00 MB free; make room or take another --out") in said
    assert contents(folder) == before


def kill(command, folder, number, code, ready, delay):
    """Start a command, send it a signal `delay` seconds after ready(): it must end with `code`.
    -> what it said on stderr."""
    process = subprocess.Popen(command, cwd=folder, env=PATHS, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ready():
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    return said


def test_killed_training_goes_on(tmp_path):
    """SIGTERM and Ctrl-C save, kill -9 leaves a checkpoint that loads, in either stage; after
    --resume the weights are those of a run that nobody disturbed."""
    small = dict(D.PRESETS["celeba"]["small"], log_every=1, save_every=10, image_size=16,
                 unet_width=16, image_channels=(8, 8, 16), aux_width=16)
    script = SHORT.replace("sys.exit", f"D.PRESETS['celeba']['small'] = {small}; sys.exit")
    flags = "--train --steps 40 --aux-steps 100 --batch-size 2 --run run "
    here = functools.partial(command, PRESETS={"celeba": {"small": small}})
    (tmp_path / "whole").mkdir()
    assert here(tmp_path / "whole", flags).returncode == 0
    folder, rng = tmp_path / "parts", np.random.default_rng(0)
    log = folder / "run/log.jsonl"
    folder.mkdir()
    rows = lambda: log.read_text().splitlines() if log.exists() else []
    for number, code, ready in (
            (signal.SIGKILL, -9, lambda: len(rows()) > 5),
            (signal.SIGTERM, 143, lambda: len(rows()) > count + 5),
            (signal.SIGKILL, -9, lambda: '"stage": 2' in "".join(rows()[-3:]))):
        count = len(rows())
        all_flags = ["--dataset", "celeba", *shlex.split(flags), *["--resume"] * bool(count)]
        said = kill([sys.executable, "-c", script, *all_flags], folder, number, code, ready,
                    rng.uniform(0, 0.2))
        assert code < 0 or "go on with --resume" in said
        D.load(folder / "run/checkpoint.pt")
    rate = D.learning_rate

    def interrupted(config, step, total):
        if step == 90:
            signal.raise_signal(signal.SIGINT)                   # Ctrl-C
        return rate(config, step, total)

    stopped = here(folder, flags + "--resume", learning_rate=interrupted)
    assert stopped.returncode == 130 and "stage 2, step 91; go on" in stopped.stderr
    assert here(folder, flags + "--resume").returncode == 0
    one, two = weights(tmp_path / "whole/run"), weights(tmp_path / "parts/run")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    logs = [[(row["stage"], row["step"], row.get("total")) for row in map(json.loads, open(
        tmp_path / name / "run/log.jsonl"))] for name in ("whole", "parts")]
    assert logs[0] == logs[1]                                    # no line lost, none twice


@pytest.mark.parametrize("number,code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143),
                                         (signal.SIGINT, 130)])
def test_killed_preparation_starts_over(tmp_path, number, code):
    """Nothing at --out until all is there; no worker stays behind; a second run does it all."""
    draw_raw(tmp_path / "raw")
    picture, partial = tmp_path / "raw" / data_prep.IMAGES / "11.jpg", tmp_path / "out.partial"
    picture.rename(tmp_path / "11.jpg")
    os.mkfifo(picture)                                           # whoever reads it has to wait
    command = [sys.executable, str(HERE / "data_prep.py"), "--dataset", "celeba", "--raw", "raw",
               "--out", "out", "--size", "16"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not (partial / "mask.npy").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)  # Ctrl-C is for all
    let_go = os.open(picture, os.O_RDWR)
    os.replace(tmp_path / "11.jpg", picture)
    os.close(let_go)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in said, said
    with pytest.raises(ProcessLookupError):                      # its workers end as well
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert not (tmp_path / "out").exists() and partial.exists() == (code < 0)
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert len(np.load(tmp_path / "out/image.npy")) == 12 and not partial.exists()


# === §10 The repository ===

SOURCE, TESTS = (HERE / "diffmvae.py").read_text(), Path(__file__).read_text()


def test_import_does_nothing_else(tmp_path):
    code = "import diffmvae, torch; assert not torch.cuda.is_initialized(); print('quiet')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, env=PATHS)
    assert result.stdout == "quiet\n" and not result.stderr and not list(tmp_path.iterdir())


def test_equation_tags_agree():
    """Header index, code and tests name the same equations and sections of the paper."""
    header, code = SOURCE.split('"""', 2)[1:]
    index, used, proved = (set(re.findall(r"(?:Eq|Sec)\. \d(?:\.\d)?", " ".join(
        re.findall(r"\[[^]]*(?:Eq|Sec)\. [^]]*\]", text)))) for text in (header, code, TESTS))
    equations = {tag for tag in used if tag.startswith("Eq")}
    assert equations == {f"Eq. {k}" for k in range(1, 6)} == {t for t in index if "Eq" in t}
    assert equations <= proved and used <= index


def test_contents_match_the_banners():
    """The header lists the sections that the banners open, in order."""
    banners = re.findall(r"^# === §(\d+) (.+?) ===$", SOURCE, re.M)
    contents = re.search(r"^Contents.+?\n\n", SOURCE, re.M | re.S).group()
    listed = [int(n) for n in re.findall(r"§(\d+)  ? ?\w", contents.split("\n", 1)[1])]
    assert [int(n) for n, _ in banners] == sorted(listed) == list(range(1, 11))


@pytest.mark.parametrize("name", ["diffmvae.py", "data_prep.py", "test_diffmvae.py"])
def test_style(name):
    """Functions up to 40 lines, lines up to 100 columns."""
    source = (HERE / name).read_text()
    assert [n for n, line in enumerate(source.splitlines(), 1)
            if len(line) > 100 or line != line.rstrip()] == []
    long = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
            and node.end_lineno - node.lineno + 1 > 40]
    assert long == []


def test_every_flag_has_help_and_a_test():
    """Each flag explains itself, differently, and is used somewhere in this file."""
    help_text = subprocess.run([sys.executable, str(HERE / "diffmvae.py"), "--help"],
                               capture_output=True, text=True).stdout
    flags = set(re.findall(r"^  (--[a-z-]+)", help_text, re.M))
    assert len(flags) > 20
    assert [flag for flag in flags if flag not in TESTS] == []
    helps = re.findall(r'help=\s*"([^"]+)', SOURCE)
    assert len(set(helps)) == len(helps)


def test_readme_commands_parse():
    """Every diffmvae.py and data_prep.py command of the README is one the scripts accept."""
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    pattern = r"^    (?:.*&& )?(python (?:diffmvae|data_prep)\.py .*)$"
    commands = re.findall(pattern, text, re.M)
    assert len(commands) >= 8
    for line in commands:
        script, *flags = shlex.split(line)[1:]
        {"diffmvae.py": D.parse_args, "data_prep.py": data_prep.parse_args}[script](flags)
