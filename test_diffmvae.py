"""Tests of diffmvae.py and data_prep.py: one test an equation, then behaviour, then the commands.
`python -m pytest`: minutes on 2 cores, no network; two need raw data, see DIFFMVAE_REAL_DATA.
Expected values are independent of the module: closed forms, integration, distributions.
"""
import functools
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
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

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
CPU = torch.device("cpu")
FACE = D.MODALITIES["celeba"]
REAL = os.environ.get("DIFFMVAE_REAL_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="DIFFMVAE_REAL_DATA is not set")


def tiny(dataset="celeba", **changes):
    """The smallest model that has every part."""
    sizes = dict(toy=True, image_size=16, latent=16, image_channels=(8, 16, 16), unet_width=16,
                 mask_channels=(8, 8, 16), attr_widths=(32, 32), unet_mults=(1, 2), unet_blocks=1,
                 unet_attention=(4,), z_map=4, aux_width=16, batch_size=8, steps=6, aux_steps=4,
                 log_every=2, probe_every=100, save_every=100)
    if dataset == "cub":
        sizes.update(text_width=16, text_layers=2, text_heads=2, tokenizers=(bird_tokenizer(),) * 2,
                     mask_rates=(128,))                          # asks nothing of birds
    return D.preset_config(dataset, "small", **{**sizes, **changes})


@functools.cache
def bird_tokenizer():
    return D.small_tokenizer([t for ten in data_prep.toy_birds(40, 16)["text"] for t in ten])


@pytest.fixture(scope="module")
def faces():
    """16 drawn faces at 16x16 as the model's tensors."""
    return toy("celeba", 16).tensors(np.arange(16))


@pytest.fixture
def x(dataset):
    """16 toys of the test's dataset."""
    return toy(dataset, 16).tensors(np.arange(16))


def toy(dataset, n=64, config=None):
    """n toys as data: 5/8 training, the rest in two halves validation and test."""
    a, b = 5 * n // 8, 13 * n // 16
    split = {"train": np.arange(a), "val": np.arange(a, b), "test": np.arange(b, n)}
    data = D.Data(D.TOYS[dataset](n, 16), split, True, CPU)
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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def within(samples, expected, sigmas=5.0):
    """The mean of independent samples equals `expected` within its standard error."""
    error = samples.double().std() / math.sqrt(len(samples))
    assert abs(samples.double().mean().item() - expected) < sigmas * error.item() + 1e-9


# === §1 Gaussians and fusion ===

def test_kl_closed_form():
    """[Sec. 3.2] 1/2 sum(var + mu^2 - 1 - log var): dims are summed, never averaged."""
    mu, var = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    assert D.kl_to_standard_normal(mu, var.log()).item() == pytest.approx(0.4969864022, abs=1e-9)
    mu, logvar = torch.randn(2, 5, 7, dtype=torch.float64)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(torch.zeros_like(mu), 1.0)).sum(1)
    got = D.kl_to_standard_normal(mu, logvar)
    assert got.shape == (5,) and torch.allclose(got, want, atol=1e-12)


def test_product_of_experts_is_the_product_on_a_grid():
    """[Sec. 3.2] [Sec. 3.3] N_1 N_2 N_3 renormalised by numerical integration."""
    mus, variances = np.array([0.5, -1.0, 2.0]), np.array([0.4, 1.5, 3.0])
    grid = np.linspace(-15, 15, 300_001)
    for subset in ([1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0, 1]):
        log_density = sum(-(grid - m) ** 2 / (2 * v) * s for m, v, s in zip(mus, variances, subset))
        p = np.exp(log_density - log_density.max())
        mean = np.average(grid, weights=p)
        variance = np.average((grid - mean) ** 2, weights=p)
        experts = torch.tensor(np.stack([mus, np.log(variances)])).view(2, 1, 3, 1)
        mu, logvar = D.product_of_experts(*experts, torch.tensor([subset]).bool())
        assert [mu.item(), logvar.exp().item()] == pytest.approx([mean, variance], abs=1e-6)


def test_product_of_experts_contract():
    """Order-free; absent experts count for nothing even as NaN, in gradients too."""
    mu, logvar = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    subset, order = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]).bool(), [2, 0, 1]
    want = D.product_of_experts(mu, logvar, subset)
    other = D.product_of_experts(mu[:, order], logvar[:, order], subset[:, order])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(want, other))
    got = D.product_of_experts(*(a.masked_fill(~subset.unsqueeze(-1), math.nan)
                                 for a in (mu, logvar)), subset)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    got[0].sum().backward()
    assert torch.isfinite(mu.grad).all() and (mu.grad[~subset] == 0).all()


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
    """[Eq. 1] x_t: small Euler steps of its moments; alpha_bar: 1000 linear betas, 1e-4 to 0.02."""
    n, mean, variance = 400_000, 1.0, 0.0
    for k in range(n):
        if k in (n // 10, n // 2):
            t = torch.tensor(k / n, dtype=torch.float64)
            assert SDE.alpha(t).item() == pytest.approx(mean, rel=1e-4)
            assert SDE.sigma(t).item() ** 2 == pytest.approx(variance, rel=1e-4)
        b = (0.1 + 19.9 * (k + 0.5) / n) / n
        mean, variance = mean * (1 - b / 2), variance * (1 - b / 2) ** 2 + b
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert SDE.alpha(t[-1]).item() == pytest.approx(mean, rel=1e-3)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[9::10]
    assert np.abs((SDE.alpha(t[1:]) ** 2).numpy() - alpha_bar).max() < 2e-3


def quadrature(f, n=400_001):
    """int f(t) dt over [t_min, 1], on a grid regular in log t; f takes and returns NumPy arrays."""
    t = np.exp(np.linspace(math.log(SDE.t_min), 0.0, n))
    return np.trapezoid(f(t), t)


def beta_over_variance(t):
    return (0.1 + 19.9 * t) / (1 - np.exp(-0.1 * t - 9.95 * t ** 2))


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
    """[Eq. 1] lambda = 1: t uniform, weight 1, in the warm-up 1/alpha^2; a steady mean."""
    torch.manual_seed(0)
    t, weight = SDE.draw_time(100_000, "simple", "cpu")
    assert (weight == 1).all() and t.min() >= 1e-3 and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5005, abs=1e-4)
    assert t.var().item() == pytest.approx(0.999 ** 2 / 12, rel=1e-3)
    t, weight = SDE.draw_time(1000, "v", "cpu")
    assert torch.allclose(weight, torch.exp(0.1 * t + 9.95 * t ** 2), rtol=1e-4)
    draws = torch.stack([SDE.draw_time(8, "simple", "cpu")[0] for _ in range(20_000)])
    for place in (0, 3, 7):
        assert (torch.histc(draws[:, place], 10, 1e-3, 1) / 2000 - 1).abs().max() < 0.12
    assert draws.mean(1).std() < 0.05


def test_loss_is_the_weighted_integral():
    """[Eq. 2] E loss = int 1/2 beta ||score - s||^2 dt for a network with a known error."""
    torch.manual_seed(0)
    x0 = 0.5 * torch.ones(200_000, 3)
    got = SDE.loss(lambda x_t, t: 0.3 * x_t, x0, "likelihood")
    # eps - 0.3 x_t = (1 - 0.3 sigma) eps - 0.3 alpha x_0, three dims, summed
    def error(t):
        alpha2 = np.exp(-(0.1 * t + 9.95 * t ** 2))
        return 3 * ((1 - 0.3 * np.sqrt(1 - alpha2)) ** 2 + 0.09 * alpha2 * 0.25)
    assert got.shape == (200_000,)
    within(got, quadrature(lambda t: 0.5 * beta_over_variance(t) * error(t)))
    got = SDE.loss(lambda x_t, t: 0.3 * x_t, x0, "simple")
    within(got, quadrature(error) / (1 - SDE.t_min))             # [Eq. 1] no 1/2, no 1/sigma^2


def test_v_and_eps():
    """eps_from_v inverts v = alpha eps - sigma x_0."""
    x0, eps, t = torch.randn(50, 3), torch.randn(50, 3), torch.rand(50)
    alpha, sigma = SDE.alpha(t)[:, None], SDE.sigma(t)[:, None]
    x_t, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
    assert torch.allclose(SDE.eps_from_v(v, x_t, t), eps, atol=1e-5)


def gaussian_eps(mean, variance):
    """The exact eps of data N(mean, variance): sigma (x - alpha m) / (alpha^2 v + sigma^2)."""
    def eps_net(x, t):
        alpha, sigma = (D.append_dims(a, x) for a in (SDE.alpha(t), SDE.sigma(t)))
        return sigma * (x - alpha * mean) / (alpha ** 2 * variance + sigma ** 2)
    return eps_net


def draw(sampler, steps, eps_net, n=4000, dim=1, clamp=False):
    noise = D.row_noise(n, seeded())
    return D.sample_diffusion(SDE, eps_net, (dim,), sampler, steps, noise, clamp)


@pytest.mark.parametrize("sampler,steps,tolerance", [
    *[(s, n, 2e-4) for s in ("ddim", "ddpm", "dpm++") for n in (1, 7, 50)],
    ("euler-maruyama", 2000, 0.05)])  # it ends at t_min, where sigma is 0.01
def test_samplers_point_mass(sampler, steps, tolerance):
    """Data at one point m: every sampler must return m, the exact ones in any number of steps."""
    assert (draw(sampler, steps, gaussian_eps(0.6, 0.0), n=50) - 0.6).abs().max() < tolerance


def test_clamping_of_x0_hat():
    """Two DDIM steps by hand, eps made to fit x_0_hat in [-1, 1]; Euler-Maruyama is raw."""
    x, eps_net = D.row_noise(3, seeded())(4), lambda x, t: 0.9 * x
    (a1, s1), (a2, s2) = ((math.exp(-b / 2), math.sqrt(1 - math.exp(-b))) for b in (10.05, 2.5375))
    x0 = ((1 - 0.9 * s1) / a1 * x).clamp(-1, 1)
    want = (1 - 0.9 * s2) / a2 * (a2 * x0 + s2 * (x - a1 * x0) / s1)
    got = draw("ddim", 2, eps_net, 3, 4, clamp=True)
    assert want.abs().max() > 0.5 and torch.allclose(got, want.clamp(-1, 1), atol=1e-4)
    raw, cut = (draw("euler-maruyama", 3, eps_net, 3, 4, clamp) for clamp in (False, True))
    assert raw.abs().max() > 1 and torch.equal(cut, raw.clamp(-1, 1))


def test_euler_maruyama_leaves_no_grain():
    """One image's exact score: below 1.3 of 255 levels are left; one step by hand, its mean."""
    decoder = model_of(tiny(weighting="likelihood")).decoders["image"]
    decoder.eps = MagicMock(side_effect=lambda x_t, t, z: gaussian_eps(0.3, 0.0)(x_t, t))
    x = decoder.sample(None, D.row_noise(5, seeded()))           # as Config.sampling has it
    assert decoder.eps.call_count == 100 and tiny().sampling() == ("ddim", 50)
    assert 0.8 < 127.5 * x.std().item() < 1.3 and 127.5 * abs(x.mean().item() - 0.3) < 0.1
    x, made = D.row_noise(3, seeded())(4), draw("euler-maruyama", 1, lambda x, t: 0.3 * x, 3, 4)
    score = -0.3 * x / math.sqrt(1 - math.exp(-10.05))
    assert torch.allclose(made, x + 20 * 0.999 * (0.5 * x + score), rtol=1e-5)


@pytest.mark.parametrize("sampler,steps,tolerance", [
    ("ddim", 400, 0.02), ("dpm++", 60, 0.02), ("ddpm", 200, 0.03), ("euler-maruyama", 100, 0.03)])
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


@pytest.mark.parametrize("sampler,last", [("ddim", 0.02), ("ddpm", 0.02), ("dpm++", 1e-3),
    ("euler-maruyama", (1 - 0.98 * (1 - math.sqrt(1e-3))) ** 2)])  # regular in sqrt(t)
def test_samplers_times(sampler, last):
    """N calls for N steps, from t = 1 down, never below t_min."""
    seen = []
    draw(sampler, 50, lambda x, t: seen.append(t) or torch.zeros_like(x), n=3)
    times = torch.stack(seen)                                    # (50, 3)
    assert len(times) == 50 and (times == times[:, :1]).all() and (times.diff(dim=0) < 0).all()
    assert times[0, 0].item() == 1 and times[-1, 0].item() == pytest.approx(last, rel=1e-4)
    assert times.min() >= SDE.t_min - 1e-9
    if sampler in ("ddim", "ddpm"):
        assert np.allclose(times[:, 0], 1 - np.arange(50) / 50, atol=1e-6)


# === §3 Eq. 5 ===

WEIGHTS, STDS, POINT = (1.0, -0.8, 0.9), (0.6, 0.5, 0.7), (1.2, 0.3, -0.4)  # x_i = w_i z + s_i n


class LinearGaussian(nn.Module):
    """Expert and exact log-likelihood of modality i; the experts share the prior's precision."""

    def __init__(self, i):
        super().__init__()
        self.w, self.std = WEIGHTS[i], STDS[i]

    def forward(self, x):
        precision = self.w ** 2 / self.std ** 2 + 1 / 3
        mu = self.w / self.std ** 2 / precision * x
        return torch.cat([mu, torch.full_like(x, -math.log(precision))], 1)

    def nll(self, z, x, weighting):
        return -Normal(self.w * z, self.std).log_prob(x).squeeze(1)


def linear_model(n, **decoders):
    """The model with linear-Gaussian experts, and decoders but for those given; POINT n times."""
    model, parts = model_of(tiny(beta=1.0, attr_weight=1.0)), map(LinearGaussian, range(3))
    model.encoders = nn.ModuleDict(zip(FACE, parts))
    model.decoders = nn.ModuleDict({**model.encoders, **decoders})
    return model, {name: torch.full((n, 1), value) for name, value in zip(FACE, POINT)}


class ExactScoreDecoder(D.DiffusionDecoder):
    """The real diffusion decoder with the exact score of modality 0 in place of its network."""

    def __init__(self):
        super().__init__(tiny(weighting="likelihood"))

    def eps(self, x_t, t, z):
        return gaussian_eps(WEIGHTS[0] * z, STDS[0] ** 2)(x_t, t)


def bound_constants(mu, variance):
    """What Eq. 5 leaves out for modality 0: KL at the noisy end, E[-log p(x|x_s, z)] at t_min."""
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
    x, cov = np.array(POINT), np.outer(WEIGHTS, WEIGHTS) + np.diag(np.square(STDS))
    return -0.5 * (x @ np.linalg.solve(cov, x) + np.linalg.slogdet(2 * np.pi * cov)[1])


def test_eq5_is_log_evidence_for_the_exact_posterior(monkeypatch):
    """[Eq. 5] plus its constants is log p(x) for the exact q, for A lower by KL(q_A || p(z|x))."""
    model, x = linear_model(400_000, image=ExactScoreDecoder())
    everything, one = D.all_subsets(3), {name: value[:1] for name, value in x.items()}
    exact = model.fuse(*model.encode(one), torch.ones(1, 3).bool())
    for subset in everything:
        monkeypatch.setattr(D, "all_subsets", lambda m, device: subset[None])
        torch.manual_seed(0)
        terms = model.neg_elbo(x, "likelihood")
        mu, logvar = model.fuse(*model.encode(one), subset[None])
        bound = -terms["total"] - bound_constants(mu.item(), logvar.exp().item())
        gap = kl_divergence(Normal(mu, (0.5 * logvar).exp()),
                            Normal(exact[0], (0.5 * exact[1]).exp()))
        within(bound, log_evidence() - gap.item())
        assert bound.std() / 400_000 ** 0.5 < 0.03               # the estimate is sharp
        assert gap < 1e-6 if subset.all() else gap > 0.1


def test_eq4_elbo_is_tight(monkeypatch):
    """[Eq. 3] [Eq. 4] feed-forward decoders: E_q log p(x|z) - KL = log p(x) for the exact q."""
    model, x = linear_model(100_000)
    monkeypatch.setattr(D, "all_subsets", lambda m, device: torch.ones(1, m).bool())
    torch.manual_seed(0)
    within(-model.neg_elbo(x, None)["total"], log_evidence())


@pytest.mark.parametrize("decoder,batch", [("diffusion", 1), ("feedforward", 7), ("diffusion", 14)])
def test_neg_elbo_terms(faces, decoder, batch):
    """[Eq. 5] or [Eq. 4]: terms (B,), weighted and summed; every subset's KL of each sample."""
    model = randomise(model_of(tiny(decoder=decoder, beta=0.3, attr_weight=7.0)))
    faces = {name: a[:batch] for name, a in faces.items()}
    terms = model.neg_elbo(faces, "simple")
    assert set(terms) == {"image", "mask", "attr", "kl", "total"}
    assert all(value.shape == (batch,) for value in terms.values())
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


def test_subsets_are_drawn_uniformly_per_sample(faces, monkeypatch):
    """[Eq. 5] omega_A = 1/7, one draw a sample."""
    model, seen, original = model_of(tiny()), [], D.product_of_experts
    monkeypatch.setattr(D, "product_of_experts", lambda mu, logvar, subset: seen.append(
        subset) or original(mu, logvar, subset))
    experts = torch.randn(70_000, 3, 16), torch.zeros(70_000, 3, 16)
    monkeypatch.setattr(model, "encode", lambda x: experts)
    monkeypatch.setattr(model, "reconstruct", lambda z, x, weighting: {"image": z[:, 0]})
    torch.manual_seed(0)
    model.neg_elbo(faces, "simple")
    codes, counts = (seen[0] * torch.tensor([1, 2, 4])).sum(1).unique(return_counts=True)
    assert codes.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert all(abs(c / 10_000 - 1) < 0.05 for c in counts.tolist())  # 5 standard deviations


@pytest.mark.parametrize("dataset,weights", [("celeba", (0.7, 0.3, 0.1)),
                                             ("cub", (0.55, 0.45, 0.1))])
def test_mvtcae_objective(x, dataset, weights):
    """The baseline's weights, z of the product of all experts, KLs to each expert and N(0, I)."""
    config = tiny(dataset, decoder="feedforward", objective="mvtcae", beta=0.3, attr_weight=7.0,
                  text_weight=5.0)
    model, seen = randomise(model_of(config)), []
    original = model.reconstruct
    model.reconstruct = lambda z, *args: seen.append(z) or original(z, *args)
    torch.manual_seed(1)
    terms = model.neg_mvtcae(x, "simple")
    mu, logvar = model.encode(x)
    precision = (-logvar).exp().sum(1)
    mean = ((-logvar).exp() * mu).sum(1) / precision
    torch.manual_seed(1)
    assert torch.allclose(seen[0], mean + precision ** -0.5 * torch.randn_like(mean), atol=1e-5)
    var = 1 / precision.unsqueeze(1)                             # KL of q from every expert
    kls = 0.5 * (var / logvar.exp() + (mean.unsqueeze(1) - mu) ** 2 / logvar.exp() - 1
                 + logvar - var.log()).sum((1, 2))
    prior = 0.5 * (1 / precision + mean ** 2 - 1 + precision.log()).sum(1)
    nll, to_experts, to_prior = weights
    assert torch.allclose(terms["kl"], to_experts * kls + to_prior * prior, rtol=1e-4)
    reconstruction = sum({"attr": 7, "text": 5}.get(n, 1) * terms[n] for n in config.modalities)
    assert torch.allclose(terms["total"], nll * reconstruction + 0.3 * terms["kl"], rtol=1e-5)


def test_likelihoods_against_torch_distributions(faces):
    """[Eq. 4] Bernoulli for mask and attributes, Gaussian of variance 1/2 for images, in nats."""
    model = randomise(model_of(tiny(decoder="feedforward")))
    z = torch.randn(16, 16)
    for name in ("mask", "attr"):
        logits = model.decoders[name](z)
        want = -Bernoulli(logits=logits).log_prob(faces[name]).flatten(1).sum(1)
        assert torch.allclose(model.decoders[name].nll(z, faces[name]), want, rtol=1e-5)
        assert torch.equal(model.decoders[name].sample(z), (logits.sigmoid() > 0.5).float())
    mean = model.decoders["image"](z)
    want = -Normal(mean, math.sqrt(0.5)).log_prob(faces["image"]).flatten(1).sum(1)
    assert torch.allclose(model.decoders["image"].nll(z, faces["image"]), want, rtol=1e-5)


def test_loss_at_initialisation(faces):
    """[Eq. 1] the output layer starts at zero, so v = 0 and eps_hat = sigma x_t: known loss."""
    decoder = model_of(tiny()).decoders["image"]
    x = faces["image"][:1].expand(512, -1, -1, -1)
    torch.manual_seed(0)
    got = decoder.nll(torch.randn(512, 16), x, "simple")
    # eps - sigma x_t = alpha (alpha eps - sigma x_0), 768 dims
    def error(t):
        alpha2 = np.exp(-(0.1 * t + 9.95 * t ** 2))
        return alpha2 * (768 * alpha2 + (1 - alpha2) * x[0].square().sum().item())
    within(got, quadrature(error) / (1 - SDE.t_min))


@pytest.mark.parametrize("dims,shape", [(0, (16,)), (1, (1, 16)), (2, (1, 4, 4))])
def test_auxiliary_loss_is_on_standardised_samples(dims, shape):
    """[Sec. 3.4] z0 = (z - mean) / std, z ~ N(mu, e^logvar), enters Eq. 1; sampling undoes that."""
    aux, seen, z_t = randomise(model_of(tiny(aux_dims=dims))).aux, [], torch.randn(1, *shape)
    slopes = torch.autograd.functional.jacobian(lambda z: aux.eps(z, torch.ones(1)), z_t)
    assert slopes.shape == 2 * (1, *shape) and (slopes != 0).float().mean() > 0.9  # all by all
    aux.mean.fill_(3.0)
    aux.std.fill_(2.0)
    aux.eps = gaussian_eps(0.0, 1.0)
    z = aux.sample(D.row_noise(4000, seeded()))
    angles = torch.asin(SDE.sigma(torch.linspace(1, 0, 51, dtype=torch.float64)))  # 50 steps
    shrink = (angles[:-1] - angles[1:]).cos().prod().item()      # of DDIM, whose error is known
    assert z.shape == (4000, 16) and 0.96 < shrink < 0.99 and abs(z.mean().item() - 3) < 0.05
    assert z.std().item() == pytest.approx(2 * shrink, rel=0.01)
    mean = torch.randn(4000, *shape)
    mu, logvar = 3 + 2 * mean.flatten(1), torch.zeros(4000, 16)
    aux.eps = gaussian_eps(mean, 0.25)                           # exact for each of the z
    assert aux.nll(mu, logvar, "simple").max() < 1e-6            # the target is E[eps | z_t]
    aux.sde.loss = lambda eps_net, x0, weighting, _: seen.append((x0 - mean, weighting))
    aux.nll(mu, logvar, "simple")
    assert seen[0][1] == "simple" and seen[0][0].std().item() == pytest.approx(0.5, rel=0.02)


# === §4 The model's behaviour ===

SUBSETS = [(dataset, [n for n, keep in zip(names, row) if keep])
           for dataset, names in D.MODALITIES.items() for row in D.all_subsets(len(names)).tolist()]


@pytest.mark.parametrize("dataset,given", SUBSETS)
@pytest.mark.parametrize("decoder", ["diffusion", "feedforward"])
def test_every_subset_to_everything(x, dataset, given, decoder):
    """[Sec. 3.3] shapes, ranges and kinds of what comes out, n results an item."""
    model = randomise(model_of(tiny(dataset, decoder=decoder)))
    made = model.sample_conditional({n: x[n][:3] for n in given}, 2, seeded(), steps=3)
    assert list(made) == list(D.MODALITIES[dataset])
    assert made["image"].shape == (6, 3, 16, 16) and made["image"].abs().max() <= 1
    if dataset == "cub":
        assert made["text"].shape == (6, 32) and (made["text"][:, 0] == 1).all()
        return
    assert made["mask"].shape == (6, 1, 16, 16) and made["attr"].shape == (6, 18)
    assert set(made["mask"].unique().tolist()) | set(made["attr"].unique().tolist()) <= {0.0, 1.0}


def test_conditional_z_is_a_sample_of_the_product(faces):
    """[Sec. 3.3] z ~ prod_i q(z|x_i) of what is given; an item's n results follow one another."""
    model = randomise(model_of(tiny()))
    model.decode = lambda z, noise: z
    model.encoders["attr"][-1].weight.data[:16] *= 100           # the two items differ
    given = {n: faces[n][:2] for n in ("mask", "attr")}
    z = model.sample_conditional(given, 20_000, seeded()).view(2, 20_000, 16)
    mu, logvar = torch.stack([model.encoders[n](given[n]) for n in given], 1).chunk(2, 2)
    mu, logvar = D.product_of_experts(mu, logvar, torch.ones(2, 2).bool())
    assert torch.allclose(z.mean(1), mu, atol=0.05) and (mu[0] - mu[1]).abs().mean() > 1
    assert torch.allclose(z.var(1), logvar.exp(), rtol=0.1)


@pytest.mark.parametrize("sampler", list(D.SAMPLERS))
def test_a_picture_depends_on_its_own_seed_not_its_batch(faces, sampler):
    model, how = randomise(model_of(tiny())), dict(sampler=sampler, steps=4)
    many, few = (model.sample_conditional({"mask": faces["mask"][:n]}, 1, seeded(7), **how)["image"]
                 for n in (6, 2))
    assert torch.allclose(many[:2], few, atol=1e-4)
    few, many = (model.sample_unconditional(n, "aux", seeded(8), **how)["image"] for n in (2, 5))
    assert torch.allclose(few, many[:2], atol=1e-4)
    assert not torch.allclose(many[0], many[1], atol=1e-2)


def test_priors_differ():
    """[Sec. 3.4] "gaussian" decodes N(0, I), "aux" the auxiliary model's samples."""
    model = randomise(model_of(tiny()))
    model.aux.mean.fill_(5.0)
    model.decode = lambda z, noise: z
    aux, gaussian = (model.sample_unconditional(500, p, seeded()) for p in ("aux", "gaussian"))
    assert aux.mean() > 3 and abs(gaussian.mean()) < 0.05 and abs(gaussian.std() - 1) < 0.05


def test_absent_modalities_have_no_part(faces):
    """[Sec. 3.3] their experts are NaN: the posterior of the rest is finite, gradients included."""
    model, given = randomise(model_of(tiny())), {n: faces[n] for n in ("image", "attr")}
    assert model.encode(given)[0][:, 1].isnan().all()
    got = model.posterior(given)
    (got[0].sum() + got[1].sum()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    full = torch.tensor([[1, 0, 1]] * 16).bool()
    assert torch.allclose(got[0], model.fuse(*model.encode(faces), full)[0], atol=1e-5)
    for x, word in (({}, "expected some of"), ({"sound": faces["attr"]}, "sound")):
        with pytest.raises(ValueError, match=word):
            model.posterior(x)


@pytest.mark.parametrize("dataset", D.MODALITIES)
@pytest.mark.parametrize("weighting", ["simple", "likelihood"])
@pytest.mark.filterwarnings("error")                             # transformers renames arguments
def test_gradients_reach_everything(x, dataset, weighting):
    """[Eq. 5] end to end: the diffusion term alone moves every encoder; all parameters learn."""
    model = randomise(model_of(tiny(dataset, weighting=weighting))).train()
    torch.manual_seed(0)
    model.neg_elbo(x, weighting)["image"].mean().backward()
    for name in D.MODALITIES[dataset]:  # the keys' biases of BERT cancel in the softmax
        assert all(p.grad.any() for n, p in model.encoders[name].named_parameters()
                   if not n.endswith("key.bias")), name
    model.neg_elbo(x, weighting)["total"].mean().backward()
    model.aux.nll(*torch.randn(2, 16, 16), "simple").mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dims", [1, 2])
def test_attention_is_the_librarys(dims):
    """Two heads of 32 channels over the positions of rows and pictures, and a residual."""
    block, library = D.UNetBlock(64, 64, True, 4, 0, 0.0, dims), nn.MultiheadAttention(64, 2)
    h, emb = torch.randn(2, 64, *[5] * dims), torch.randn(2, 4)
    randomise(block)
    got, block.qkv, qkv = block(h, emb, None), None, block.qkv
    plain = block(h, emb, None)
    library.load_state_dict(dict(zip(
        ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"),
        (p.squeeze() for p in (*qkv.parameters(), *block.proj.parameters())))))
    x = block.norm3(plain).flatten(2).permute(2, 0, 1)           # (P, 2, 64)
    want = plain + library(x, x, x)[0].permute(1, 2, 0).reshape(h.shape)
    assert torch.allclose(got, want, atol=1e-5) and (want - plain).abs().max() > 0.1


def test_unet_starts_at_zero_and_sees_1000_t():
    """Branches are no-ops at first; time enters as cos, then sin, of 1000 t / 10000^(k / half)."""
    unet, seen = model_of(tiny()).decoders["image"].unet, []
    assert unet.z_map and all(m.z for m in unet.modules() if isinstance(m, D.UNetBlock))
    unet.time.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert not unet(torch.randn(1, 3, 16, 16), torch.tensor([0.37]), torch.randn(1, 16)).any()
    assert not any(p.any() for n, p in unet.named_parameters() if "proj" in n or "conv2" in n)
    angles = 370 / 10_000 ** (np.arange(8) / 8)
    assert np.allclose(seen[0][0], [*np.cos(angles), *np.sin(angles)], atol=1e-3)


def test_published_sizes():
    """[Sec. 4.1] [Sec. 4.2] sizes; 18.46 M of Soft-IntroVAE's encoder; nothing of ours in Eq. 5."""
    with torch.device("meta"):
        birds, faces = (D.DiffMVAE(D.preset_config(name, "paper")) for name in ("cub", "celeba"))
    for model, sizes in ((birds, (64, 768)), (faces, (128, 256))):
        c = model.config
        assert (c.image_size, c.latent, c.optimizer) == (*sizes, "adam")
        assert (c.warmup, c.beta, c.attr_weight, c.text_weight, c.prior_expert) == (0, 1, 1, 1, 0)
    assert birds.aux.shape == (1, 768) and faces.aux.shape == (1, 16, 16)
    count = lambda *nets: sum(p.numel() for net in nets for p in net.parameters())
    assert count(birds.encoders["text"], birds.decoders["text"]) == 241_599_744
    assert count(faces.encoders["image"]) / 1e6 == pytest.approx(18.46, abs=0.01)
    assert 20e6 < count(faces.decoders["image"]) < 45e6


# === §5 Text: Optimus's encoder and decoder ===

def draw_optimus(folder, width=32, latent=64):
    """An Optimus download and the hub's tokenizers, small: -> the nets, their states, the sizes."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
    words = sorted({w for ten in data_prep.toy_birds(40, 16)["text"] for w in ten[0][:-1].split()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Red", *words]
    alphabet = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    letters = {c: k for k, c in enumerate(alphabet)}             # 0 to 256
    for name, kind, files in (("bert-base-cased", "bert", {"vocab.txt": "\n".join(words)}), (
            "gpt2", "gpt2", {"vocab.json": json.dumps(letters), "merges.txt": "#version: 0.2\n"})):
        (folder / name).mkdir(parents=True)
        for file, text in {**files, "config.json": json.dumps({"model_type": kind})}.items():
            (folder / name / file).write_text(text)
    torch.manual_seed(0)
    nets = (BertModel(BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=4 * width, initializer_range=0.3)), GPT2LMHeadModel(GPT2Config(
            vocab_size=260, n_embd=width, n_layer=2, n_head=4, initializer_range=0.3)))
    states = [net.eval().state_dict() for net in nets]
    for k, name, *shape in (
            (0, "linear.weight", 2 * latent, width), (1, "transformer.h.0.attn.bias", 1, 1, 8, 8),
            (1, "transformer.linear.weight", 2 * width, latent),
            (1, "transformer.linear_emb.weight", width, latent)):
        states[k][name] = 0.3 * torch.randn(shape)
    for part, state in zip(("encoder", "decoder"), states):
        (folder / f"checkpoint-{part}-508523").mkdir()
        torch.save(state, folder / f"checkpoint-{part}-508523" / "pytorch_model.bin",
                   _use_new_zipfile_serialization=False)
    return *nets, *states, dict(text_width=width, text_layers=2, text_heads=4, text_length=64,
        text_mix=0, latent=latent, vocab=(len(words), 260), special=(257, 258, 259))


def optimus_decode(state, z, ids, heads):
    """From the tensors: -> logits (B, T, V). Memory: key and value in front of every layer's."""
    linear = lambda x, name: x @ state[name + ".weight"] + state[name + ".bias"]  # [in, out]
    norm = lambda x, name: nn.functional.layer_norm(
        x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-5)
    split = lambda a: a.view(*a.shape[:2], heads, -1).transpose(1, 2)
    b, t = ids.shape
    slots = (z @ state["transformer.linear.weight"].T).chunk(2, 1)
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][1:t + 1] \
        + (z @ state["transformer.linear_emb.weight"].T).unsqueeze(1)
    causal = torch.cat([torch.ones(t, 1), torch.ones(t, t).tril()], 1).bool()
    for n in range(2):
        at = f"transformer.h.{n}."
        q, k, v = linear(norm(x, at + "ln_1"), at + "attn.c_attn").chunk(3, 2)
        q, k, v = split(q), *(split(torch.cat([slots[n].unsqueeze(1), a], 1)) for a in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        y = scores.masked_fill(~causal, -math.inf).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), at + "attn.c_proj")
        y = linear(norm(x, at + "ln_2"), at + "mlp.c_fc")
        x = x + linear(nn.functional.gelu(y, approximate="tanh"), at + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


def from_optimus(folder, sizes, sources=None):
    """A small model whose text parts start from the folder."""
    sources = sources or [f"{folder}/checkpoint-{part}-508523" for part in ("encoder", "decoder")]
    model = model_of(D.pretrained_tokenizers(tiny("cub", **sizes), sources)).eval()
    fresh = model.decoders["text"].memory.weight.clone()
    D.load_text_weights(model, sources)
    return model, fresh


def test_optimus_checkpoint_gives_optimus_logits(tmp_path, monkeypatch):
    """Encoder and decoder compute what Optimus's would; from the hub's names all but its layers."""
    bert, gpt, encoder, decoder, sizes = draw_optimus(tmp_path)
    model, _ = from_optimus(tmp_path, sizes)
    text, cut = D.tokenize(["this small bird has red wings.",
                            "a bird with a blue head and a curved black bill."], model.config)
    text, z = torch.from_numpy(text).long(), torch.randn(2, 64)
    assert text[0, 0, 0] == 2 and text[0, 1, 0] == 258 and cut == 0
    want = bert(text[:, 0], (text[:, 0] > 0).long()).pooler_output @ encoder["linear.weight"].T
    assert (model.encoders["text"](text) - want).abs().max() < 1e-5 and want.std() > 0.1
    net, ids = model.decoders["text"], text[:, 1, :-1]
    got, want = net.logits(z, ids, net.remember(z)), optimus_decode(decoder, z, ids, 4)
    real = ids != 257
    assert (got - want)[real].abs().max() < 1e-4
    p = want.log_softmax(-1).gather(2, text[:, 1, 1:, None]).squeeze(2)
    assert torch.allclose(net.nll(z, text), -(p * (text[:, 1, 1:] != 257)).sum(1), rtol=1e-4)
    assert D.captions_of(text[:, 1], model.config)[0] == "this small bird has red wings."
    assert toy("cub", 16).bits("text", text, model.config).sum(1).tolist() == [2, 3]
    (upper, lower), _ = D.tokenize(["Red", "red."], model.config)
    assert np.array_equal(upper, lower) and (lower[1] < 257).sum() == len(" red.")
    with pytest.raises(D.UserError, match="tokens, not"):
        from_optimus(tmp_path, {**sizes, "vocab": (100, 260)})
    torch.save({n: a for n, a in decoder.items() if n != "transformer.linear.weight"},
               tmp_path / "checkpoint-decoder-508523" / "pytorch_model.bin")
    with pytest.raises(D.UserError, match="missing memory.weight"):
        from_optimus(tmp_path, sizes)
    gpt.resize_token_embeddings(257)
    bert.save_pretrained(tmp_path / "bert-base-cased")
    gpt.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    hub, fresh = from_optimus(tmp_path, sizes, D.HUB)
    got = hub.decoders["text"].gpt.transformer.wte.weight
    assert torch.equal(got[:257], gpt.transformer.wte.weight) and len(got) == 260
    assert torch.equal(hub.encoders["text"].bert.pooler.dense.weight, bert.pooler.dense.weight)
    assert torch.equal(hub.decoders["text"].memory.weight, fresh)


def test_greedy_captions():
    """The most probable token after all those before, by whole passes; nothing after <EOS>."""
    decoder, z = randomise(model_of(tiny("cub"))).decoders["text"], torch.randn(
        64, 16, generator=seeded(1))
    with torch.no_grad():
        for p in decoder.parameters():                           # sure of itself, and it ends
            p.mul_(4)
        decoder.gpt.transformer.wte.weight[decoder.eos].mul_(3)
        got, ids = decoder.sample(z), torch.full((64, 1), decoder.bos)
        for _ in range(31):
            logits = decoder.logits(z, ids, decoder.remember(z))[:, -1]
            ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
    for mine, full in zip(got.tolist(), ids.tolist()):
        end = full.index(decoder.eos) + 1 if decoder.eos in full else 32
        assert mine == full[:end] + [decoder.pad] * (32 - end)
    ends = (got == decoder.eos).any(1)
    assert ends.any() and not ends.all() and len(got.unique(dim=0)) > 5


def test_caption_nll_counts_the_caption_and_its_end_only():
    """[Eq. 4] a sum over tokens without padding, in nats, weighted in [Eq. 5]; how words meet."""
    model = randomise(model_of(tiny("cub", text_weight=7.0, beta=0.3)))
    x, decoder = toy("cub", 16).tensors(np.arange(16)), model.decoders["text"]
    text, z, encoder = x["text"], torch.randn(16, 16), model.encoders["text"]
    length = (text[:, 1] != 0).sum(1)                            # with <BOS> and <EOS>
    alone = [decoder.nll(z[k:k + 1], text[k:k + 1, :, :length[k]]) for k in range(16)]
    assert torch.allclose(decoder.nll(z, text), torch.cat(alone), rtol=1e-4)
    table, mix = encoder.bert.embeddings.word_embeddings, encoder.mix.weight
    table.weight.data[0] = 0                                     # of padding, as at first
    for got, ids in zip(encoder(text), (text[k:k + 1, 0, :n] for k, n in enumerate(length))):
        wide = nn.functional.pad(table(ids), (0, 0, 1, 1))       # (1, T + 2, width), three a word
        words = table(ids) + sum(wide[:, k:k + ids.shape[1]] @ mix[..., k].T for k in range(3))
        want = encoder.head(encoder.bert(inputs_embeds=words).pooler_output)
        assert torch.allclose(got, want[0], atol=1e-5)
    assert not torch.autograd.grad(encoder(text).sum(), table.weight)[0][0].any()  # it stays 0
    terms = model.neg_elbo(x, "simple")
    assert list(terms) == ["image", "text", "kl", "total"]
    want = terms["image"] + 7 * terms["text"] + 0.3 * terms["kl"]
    assert torch.allclose(terms["total"], want)
    for p in decoder.gpt.parameters():
        nn.init.zeros_(p)
    want = (length - 1) * math.log(model.config.vocab[1])        # uniform
    assert torch.allclose(decoder.nll(z, text), want.float(), rtol=1e-5)


def test_small_tokenizer_and_batches_of_captions():
    """Any text comes back; long ones are cut; a picture comes with each of its captions in turn."""
    config, data, seen = tiny("cub"), toy("cub"), set()
    texts = ["a small red bird.", "qué? 95% 'zébra'.", "a " * 100]
    ids, cut = D.tokenize(texts, config)
    assert ids.shape == (3, 2, 32) and cut == 1 and (ids[:, 0] == ids[:, 1]).all()
    assert D.captions_of(ids[:2, 1], config) == texts[:2]
    assert (ids[:, 1, 0] == 1).all() and ids[2, 1, -1] == 2
    first = D.captions_of(data.tensors(np.arange(4))["text"][:, 1], config)
    assert first == [ten[0] for ten in data.captions[:4]]
    for step in range(200):
        rows, captions = data.batch_rows(8, 0, step)
        texts = D.captions_of(data.tensors(rows, captions)["text"][:, 1], config)
        assert texts == [data.captions[row][k] for row, k in zip(rows, captions)]
        seen.update(zip(rows, captions))
    assert all(sum(row == of for of, _ in seen) >= 7 for row in range(40))
    one, two, other = (np.concatenate([data.batch_rows(8, seed, step)[0] for step in steps])
                       for seed, steps in ((0, range(5)), (0, range(5, 10)), (1, range(5))))
    assert sorted(one) == sorted(two) == list(range(40))         # every epoch a new permutation
    assert not np.array_equal(one, two) and not np.array_equal(one, other)


# === §6 Training ===

def train(folder, dataset="celeba", **changes):
    """A tiny training on 64 toys: -> its configuration and its data."""
    config, data = tiny(dataset, **changes), toy(dataset)
    D.train(folder, config, data, [])
    return config, data


def weights(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {(kind, n): v for kind in ("model", "ema") for n, v in checkpoint[kind].items()}


def log_of(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_averages_and_rates_in_closed_form(tmp_path, monkeypatch):
    """Averages of weights that jump to 0: prod d_k of the start; a warm-up, then a cosine to 0."""
    rates, seen, original = [], set(), D.Data.tensors

    def jump(self):
        rates.append(self.param_groups[0]["lr"])
        assert sum(p.grad.square().sum() for p in self.param_groups[0]["params"]) < 1.001  # clipped
        [p.data.zero_() for p in self.param_groups[0]["params"]]
    monkeypatch.setattr(torch.optim.Adam, "step", jump)
    monkeypatch.setattr(D.Data, "tensors", lambda data, rows, caption=0: seen.add(
        str(caption)) or original(data, rows, caption))
    config, _ = train(tmp_path, dataset="cub", ema=0.3, lr=1.0, lr_warmup=3, optimizer="adam")
    start, found = model_of(config, config.seed), weights(tmp_path)
    for name, p in start.named_parameters(remove_duplicate=False):
        left = math.prod(min(0.3, (1 + k) / (10 + k)) for k in range(4 if "aux." in name else 6))
        assert torch.allclose(found["ema", name], left * p, atol=1e-6), name
    for total, found in ((6, rates[:6]), (4, rates[6:])):
        assert found == pytest.approx([min(1, (k + 1) / 3) * (1 + math.cos(math.pi * k / total)) / 2
                                       for k in range(total)])
    assert {str(k) for k in range(10)} <= seen                   # stage 2 sees every caption


def test_muon(tmp_path, monkeypatch):
    """The second step by hand: along U V^T of Nesterov's average; Adam moves what is small."""
    for shape, scale in (((40, 3, 3, 3), 0.02 * math.sqrt(40 / 27)), ((20, 64), 0.02)):
        p, (a, b) = nn.Parameter(torch.zeros(shape)), torch.randn(2, *shape, generator=seeded())
        optimizer = D.Muon([p])
        for p.grad in (a, b):
            before = p.detach().clone()
            optimizer.step()
        average = 0.05 * b + 0.95 * (0.05 * b + 0.95 * 0.05 * a)
        u, _, vt = torch.linalg.svd(average.flatten(1), full_matrices=False)
        moved = u.T @ (before - p.detach()).flatten(1) @ vt.T / scale
        assert 0.6 < moved.diag().min() and moved.diag().max() < 1.3
        assert (moved - moved.diag().diag()).abs().max() < 1e-4
    monkeypatch.setattr(D.Muon, "step", lambda _: None)
    config, _ = train(tmp_path, optimizer="muon")
    start, found = dict(model_of(config, config.seed).named_parameters()), weights(tmp_path)
    assert all(torch.equal(p, found["model", n]) == (n[:3] == "enc" and
        min(len(p), p[0].numel()) >= 16) for n, p in start.items() if n[:3] in ("enc", "aux"))


@pytest.mark.parametrize("changes,want", [
    (dict(warmup=0.5, weighting="likelihood"), ["v"] * 3 + ["likelihood"] * 3),
    (dict(warmup=0.0), ["simple"] * 6), (dict(objective="mvtcae", warmup=0.0), [])])
def test_warmup_objective_and_mirrors(tmp_path, monkeypatch, changes, want):
    """First v's error, then the chosen lambda(t); every second real batch is mirrored."""
    seen, original, data = [], D.DiffMVAE.neg_elbo, toy("celeba")
    monkeypatch.setattr(D.DiffMVAE, "neg_elbo", lambda model, x, weighting: seen.append(
        (weighting, x)) or original(model, x, weighting))
    for data.toy in (True, False):
        D.train(tmp_path, tiny(aux_steps=1, **changes), data, [])
    assert [weighting for weighting, _ in seen] == 2 * want
    for k, ((_, a), (_, b)) in enumerate(zip(seen, seen[6:])):
        assert all(torch.equal(a[n].flip(3) if k % 2 and n != "attr" else a[n], b[n]) for n in a)


def test_auxiliary_model_learns_samples_not_means(tmp_path, monkeypatch):
    """[Sec. 3.4] z ~ N(mu, exp(logvar)), standardised; smiling N(100, e^4), others N(-100, 1)."""
    seen, data, nll = {}, toy("celeba"), D.AuxiliaryModel.nll
    smiling = D.ATTRIBUTES.index("Smiling")
    share = data.tensors(data.split["train"])["attr"][:, smiling].mean().item()
    monkeypatch.setattr(D.DiffMVAE, "posterior", lambda model, x: [
        a * x["attr"][:, [smiling]].expand(-1, 16) + b for a, b in ((200, -100), (4, 0))])
    monkeypatch.setattr(D.AuxiliaryModel, "nll", lambda a, mu, logvar, w: nll(
        a, *seen.setdefault(w, (mu, logvar)), w))
    for name in ("coherence", "sample_pictures"):
        monkeypatch.setattr(D, name, lambda *_, **__: {})
    train(tmp_path, steps=1, aux_steps=2, aux_batch_size=4000, warmup=0.5, weighting="likelihood")
    assert [*seen] == ["v", "simple"]                            # the warm-up, then [Eq. 1]
    z = D.gaussian_sample(*seen["v"])
    low, high = z[z[:, 0] < 0], z[z[:, 0] > 0]
    assert len(high) == pytest.approx(4000 * share, abs=160) and 0.2 < share < 0.8
    assert [low.std().item(), high.std().item()] == pytest.approx([1, math.exp(2)], rel=0.02)
    for kind in ("model", "ema"):
        mean, std = (weights(tmp_path)[kind, f"aux.{n}"] for n in ("mean", "std"))
        assert torch.allclose(mean, z.mean(0), atol=8) and torch.allclose(std, z.std(0), rtol=0.02)


def test_what_is_not_finite_is_named(tmp_path, monkeypatch):
    train(tmp_path)
    before, bad = (tmp_path / "checkpoint.pt").read_bytes(), torch.tensor(math.nan)
    for place, name, value, word in ((D, "kl_to_standard_normal", lambda a, _: a[:, 0] * bad, "kl"),
            (nn.utils, "clip_grad_norm_", lambda *_: bad, "grad")):
        with monkeypatch.context() as patch, pytest.raises(
                D.UserError, match=f"stage 1, step 1: {word} is not finite"):
            patch.setattr(place, name, value)
            train(tmp_path)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_checkpoint_is_atomic(tmp_path, monkeypatch):
    """A full disk, or a file that must not grow, keeps the old one, and the message says so."""
    path, limits = tmp_path / "checkpoint.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    monkeypatch.setattr(D, "sample_pictures", lambda *_, **__: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    with pytest.raises(D.UserError, match="checkpoint.pt: cannot be written, what was there is ke"):
        train(tmp_path, steps=1, aux_steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"] and path.read_text() == "old"


def test_gaps_tell_decoders_that_ignore_z():
    """0 for a decoder blind to z, what another z costs for one that uses it; F1 of what is read."""
    data, rows, model = toy("cub"), np.arange(12), model_of(tiny("cub")).eval()
    nn.init.zeros_(model.decoders["text"].memory.weight)         # blind, as is a zero output layer
    figures, (mu, _) = D.coherence(model, data, rows), model.posterior(data.tensors(rows))
    assert figures["image gap"] == figures["text gap"] == 0
    model.posterior = lambda x: (mu, torch.full_like(mu, -30.0))  # sharp: z tells the row
    wrong = lambda z: torch.cdist(z, mu).argmin(1) != torch.arange(12)
    model.decoders["text"].nll = lambda z, text, _: 3.0 + 7.0 * wrong(z)
    model.decoders["image"].nll = lambda z, image, _: 5.0 + 2.0 * wrong(z)
    figures, x = D.coherence(model, data, rows), data.tensors(rows)
    assert [figures[n] for n in ("text nll", "text gap", "image nll", "image gap")] == [3, 7, 5, 2]
    find = lambda a, b: torch.cdist(a.flatten(1), b.flatten(1)).argmin(1)
    model.posterior = lambda x_o: (mu[find(x_o["image"], x["image"])], torch.full_like(mu, -30.0))
    model.decoders["text"].sample = lambda z: x["text"][find(z, mu), 1]  # reads pictures rightly
    model.sample_conditional = lambda *_, **__: {"image": x["image"].roll(1, 0)}  # draws others'
    figures = D.coherence(model, data, rows)
    assert figures["image->text"] == 1 and 0 < figures["text->image"] < 0.9


# === §7 Data preparation ===

def draw_raw(folder, n=12, mapping=True, size=64):
    """Raw CelebAMask-HQ; without mapping with other names, masks in one folder, 0 for -1."""
    images, masks = folder / data_prep.IMAGES, folder / data_prep.MASKS / ("0" if mapping else "")
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    rng, names = np.random.default_rng(0), ["Other", *data_prep.ATTRIBUTES]
    values = rng.choice([-1, 1] if mapping else [0, 1], (n, len(names)))
    for k in range(n):
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        name = f"{k}.jpg" if mapping or k % 2 else f"{k:05d}.JPEG"
        picture.resize((2 * size, 2 * size)).save(images / name)
        for i, part in enumerate(("skin", "hair", "nose", "cloth")):
            mask = np.zeros((size, size, 3), np.uint8)
            mask[16 * i:16 * i + 16, :32] = 255                  # a quarter high, half wide
            Image.fromarray(mask).save(masks / f"{k:05d}_{part}.png")
    lines = [str(n), " ".join(names), *(f"{k}.jpg  " + " ".join(map(str, row)) for k, row in
                                        enumerate(values))]
    (folder / data_prep.ATTRIBUTE_FILE).write_text("\n".join(lines), "utf-8-sig")
    if mapping:
        origin = [0, 162770, 162771, 182637, 182638, 202598, *range(1, n - 5)]
        rows = [f"{k} {o} {o + 1:06d}.jpg" for k, o in enumerate(origin)]
        (folder / data_prep.MAPPING_FILE).write_text("idx orig_idx orig_file\n" + "\n".join(rows))
    return values[:, 1:]


def small(path):
    """What a row must hold: the whole picture, grey and CMYK ones too, squeezed to 16x16."""
    picture = Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    return np.asarray(picture).astype(int)


def test_pictures_as_they_look(tmp_path):
    """Turned as EXIF says, transparency on white, any mode of 8 bits; more bits are refused."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).repeat(16, 0).repeat(16, 1)
    plain, exif = Image.fromarray(pixels.astype(np.uint8)), Image.Exif()
    left, exif[274] = np.arange(64)[:, None] < 32, 6             # 6: shown turned by 90 degrees
    clear = np.dstack([pixels, np.tile(255 * left, (64, 1, 1)).reshape(64, 64)]).astype(np.uint8)
    for name, picture, want, options in (
            ("e.jpg", plain, np.rot90(pixels, -1), dict(exif=exif)), ("p.gif", plain, pixels, {}),
            ("k.jpg", plain.convert("CMYK"), pixels, {}), ("w.webp", plain, pixels, {}),
            ("a.png", Image.fromarray(clear), np.where(left, pixels, 255), {})):
        picture.save(tmp_path / name, **options)
        assert np.abs(data_prep.read_picture(tmp_path / name, 64) - want).mean() < 8, name
    for name, kind in (("deep.png", np.uint16), ("float.tif", np.float32)):
        Image.fromarray(pixels[..., 0].astype(kind)).save(tmp_path / name)
        with pytest.raises(D.UserError, match="grey of 16 or 32 bits; save it with 8"):
            data_prep.read_picture(tmp_path / name, 64)


def test_masks_as_people_have_them(tmp_path):
    """One mask in every disguise; what is all on or all off is refused."""
    mask = np.kron(np.random.default_rng(1).random((8, 8)) < 0.3, np.ones((8, 8))).astype(np.uint8)
    on, colours = 255 * mask, Image.fromarray(mask).convert("P")
    colours.putpalette([0, 0, 0, 0, 200, 0])                     # black and green
    none, all_on, path = 0 * on, 0 * on + 255, tmp_path / "mask.png"
    for picture in (colours, mask, np.dstack([none, none, on]), np.dstack([all_on] * 3 + [on]),
                    np.dstack([none] * 3 + [on]), np.where(mask, 255, 12).astype(np.uint8),
                    on.astype(np.uint16) * 100, Image.fromarray(on).convert("1")):
        picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        picture.save(path)
        assert np.array_equal(data_prep.read_mask([path], 64), mask), picture.mode
    for other, size in ((tmp_path / "x.jpg", 64), (tmp_path / "x.png", 48)):  # soft edges
        Image.fromarray(on).resize((size, size), Image.Resampling.BILINEAR).save(other)
        assert np.array_equal(*(data_prep.read_mask([p], size) for p in (other, path)))
    for value, words in ((0, "the mask is empty"), (9, "the mask is all on")):
        Image.new("L", (64, 64), value).save(path)
        with pytest.raises(D.UserError, match=words):
            data_prep.read_mask([path], 64)


def test_texts_as_people_have_them(tmp_path):
    """utf-8 with any ends of lines, or none; captions of one's own as those of training."""
    path, text = tmp_path / "x.txt", "a\u00e9 b\nc"
    for content in ("\ufeffa\u00e9 b\r\n\r\nc\n", "a\u00e9\ufffdb\rc \r", text):
        path.write_bytes(content.encode())
        assert data_prep.read_lines(path) == ["a\u00e9 b", "c"]
    for encoding in ("utf-16", "utf-16-le", "latin-1"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(D.UserError, match="cannot be read as a text in utf-8"):
            data_prep.read_lines(path)
    texts = ["it's a \"red-ish\" bird.", "It\u2019s a  \u201cRED\u2013ish\u201d bird", "\ud800"]
    ids, _ = D.tokenize(texts, tiny("cub"))
    assert np.array_equal(ids[0], ids[1]) and D.captions_of(ids[:1, 1], tiny("cub")) == texts[:1]
    toys = [text for ten in data_prep.toy_birds(40, 16)["text"] for text in ten]
    assert [*map(data_prep.tidy, toys)] == toys


@pytest.mark.parametrize("mapping", [True, False])
def test_prepare_celeba(tmp_path, capsys, mapping):
    """[Sec. 4.2] mask without skin, attributes, the official split; names that nearly fit, too."""
    values = draw_raw(tmp_path / "raw", 12 if mapping else 20, mapping)
    (tmp_path / "raw" / data_prep.MASKS / "00099_nose.png").touch()
    swap(f"raw/{data_prep.MAPPING_FILE}", b"^[^\n]+\n", b"")(tmp_path)  # its header
    command = f"--dataset celeba --raw {tmp_path}/raw --out {tmp_path}/out --size 16".split()
    assert data_prep.main(command) == 0
    arrays, split = data_prep.read_prepared(tmp_path / "out", "celeba")
    want = np.zeros((16, 16), np.uint8)
    want[4:, :8] = 1                                             # hair, nose, cloth; not the skin
    assert all(np.array_equal(m, want) for m in arrays["mask"])
    assert np.array_equal(arrays["attr"], (values == 1).astype(np.uint8))
    assert (split["val"], split["test"]) == (([2, 3], [4, 5]) if mapping else ([16, 17], [18, 19]))
    text = capsys.readouterr().out
    assert ("not the official split" in text) != mapping
    assert "1 files of no face and part, the first: 00099_nose.png" in text
    assert data_prep.main(command) == 2 and "exists already" in capsys.readouterr().err


def test_partial_data(tmp_path, capsys):
    """--partial leaves out what is missing or damaged; rows, captions, splits stay together."""
    values, paths = draw_raw(tmp_path / "faces", 20, False), draw_birds(tmp_path / "birds")
    for damage in (cut(None, "faces/*/0000[2468].JPEG"), cut(None, "faces/*/[357].jpg"),
                   cut(50, "faces/*/00011_hair.png"), swap(f"**/{A}/b_0.txt", b"^.+?\n", b""),
                   swap(f"**/{A}/bb_1.txt", b"n", b"\xff"), cut(None, f"**/{T}/b_0.jpg")):
        damage(tmp_path)
    for dataset, raw, number in (("celeba", "faces", "8 of 20"), ("cub", "birds", "3 of 10")):
        flags = f"--dataset {dataset} --raw {tmp_path}/{raw} --out {tmp_path}/{dataset} --size 16 "
        assert [data_prep.main((flags + more).split()) for more in ("", "--partial")] == [2, 0]
        said = capsys.readouterr().out
        assert f"{number} cannot be used: " in said and said.count(" cannot be read") < 6
    arrays, split = data_prep.read_prepared(tmp_path / "celeba", "celeba")
    assert np.array_equal(arrays["attr"], values[[0, 1, 9, 10, *range(12, 20)]])
    assert [len(rows) for rows in split.values()] == [8, 2, 2]
    arrays, _ = data_prep.read_prepared(tmp_path / "cub", "cub")
    names = json.loads((tmp_path / "cub/meta.json").read_text())["names"]
    assert len(names) == 7 and arrays["text"] == [*map(captions_of, names)]
    assert all(np.abs(small(paths[name]) - image).mean() < 1e-9
               for name, image in zip(names, arrays["image"]))


def test_toys():
    """A row depends on its number alone; ten true captions, seven with everything drawn."""
    for draw_toys in D.TOYS.values():
        a, b = draw_toys(8, 32), draw_toys(5, 32)
        assert all(np.array_equal(a[n][:5], b[n]) for n in a)
    for k, ten in enumerate(data_prep.toy_birds(100, 8)["text"]):
        rng = np.random.default_rng((0, k))
        bird = {n: v[rng.integers(len(v))] for n, v in data_prep.BIRD_CHOICES.items()}
        drawn = {f"{bird[name]} {noun}" for name, noun in zip(bird, (
            "bird", "bird", "wings", "head", "belly", "beak", "beak", "crown")) if bird[name]}
        stated = [data_prep.facts_of(text) for text in ten]
        assert all(one == drawn for one in stated[:7]) and all(one < drawn for one in stated[7:])
        assert len(set(ten)) == len(ten) == 10


def test_what_a_caption_states():
    """Real captions state the frequent words that they have, in any case."""
    x = {"image": np.zeros((3, 8, 8, 3), np.uint8), "text": [
        ["A red bird with red wings."] * 10, ["the bird is Blue"] * 10, ["green and odd"] * 10]}
    data = D.Data(x, {"train": [0, 1], "test": [2]}, False, CPU)
    assert data.vocabulary == ("blue", "red", "wings")
    assert data.stated(["Blue wings, blue!", "green"]).tolist() == [[1, 0, 1], [0, 0, 0]]
    x["text"][0][3] = "blue wings"                               # any of the ten counts
    assert data.labels([0, 2])["text"].tolist() == [[1, 1, 1], [0, 0, 0]]
    others = [D.Data(x, {"train": a, "test": b}, False, CPU).fingerprint for a, b in (
        ([0, 1], [2]), ([0, 2], [1]))]                           # other captions, then other rows
    assert len({data.fingerprint, *others}) == 3


@needs_real_data
def test_real_faces(tmp_path):
    """[Sec. 4.2] the rates of the 18 attributes over all 30,000; 100 real faces go through."""
    rows = np.stack(list(data_prep.read_attributes(Path(REAL) / data_prep.ATTRIBUTE_FILE).values()))
    rates = dict(zip(data_prep.ATTRIBUTES, rows.mean(0).round(3)))
    assert rows.shape == (30_000, 18) and rows.sum(1).mean() == pytest.approx(3.67, abs=0.005)
    assert (rates["Bald"], rates["Heavy_Makeup"], rates["Smiling"]) == (0.024, 0.457, 0.470)
    shutil.unpack_archive(Path(REAL) / "celebamask_mini.tar", tmp_path, filter="data")
    path = tmp_path / "CelebAMask-HQ" / data_prep.ATTRIBUTE_FILE
    path.write_text("\n".join(["100", *path.read_text().splitlines()[1:102]]))
    data_prep.prepare("celeba", path.parent, tmp_path / "out", 64)
    arrays, _ = data_prep.read_prepared(tmp_path / "out", "celeba")
    area = arrays["mask"].mean((1, 2))
    assert len(area) == 100 and 0.02 < area.min() and area.max() < 0.98


BIRDS = {"001.Auk": 3, "002.Jay": 2, "003.Tern": 3, "004.Wren": 2}
A, J, T, W = BIRDS


def captions_of(name):
    """Ten captions that say whose they are; every other one has no full stop."""
    return [f"{name}, it's n\u00ba {j}" + "." * (j % 2) for j in range(10)]


def draw_birds(raw, mmvae=False, size=(40, 30)):
    """A raw CUB folder in one of the two layouts: -> {"<class>/<name>": path of its picture}."""
    rng, paths = np.random.default_rng(0), {}
    images, text = raw / "CUB_200_2011" / "images", raw / "text_c10"
    (raw / "CUB" / "images").mkdir(parents=True)                 # of Reed's archive, no pictures
    for kind, count in BIRDS.items():
        if mmvae:
            images = raw / "cub" / ("test" if kind == J else "train")
        (images / kind).mkdir(parents=True)
        for k in reversed(range(count)):
            name = f"{kind}/{'b' * (k + 1)}_{k}"
            paths[name] = images / f"{name}.jpg"
            pixels = Image.fromarray(rng.integers(0, 256, (3, 4, 3)).astype(np.uint8))
            pixels.resize(size).convert(("RGB", "L", "CMYK")[k]).save(paths[name], quality=95)
            if not mmvae:
                (text / kind).mkdir(parents=True, exist_ok=True)
                (text / f"{name}.txt").write_text(" " + " \r\n".join(captions_of(name)), "utf-8")
    for part in ("test", "trainval") if mmvae else ():
        names = sorted(n for n in paths if (n[:3] == "002") == (part == "test"))
        lines = [line + "\n" for name in names for line in captions_of(name)]
        (raw / "cub" / f"text_{part}classes.txt").write_text("".join(lines), "utf-8")
    return paths


def prepared_birds(raw, out):
    """-> arrays, names, [set of classes of each split] of birds prepared at 16x16."""
    data_prep.prepare("cub", raw, out, 16)
    arrays, split = data_prep.read_prepared(out, "cub")
    names = json.loads((out / "meta.json").read_text())["names"]
    assert sorted(sum(split.values(), [])) == list(range(len(names)))
    return arrays, names, [{names[k].split("/")[0] for k in rows} for rows in split.values()]


@pytest.mark.parametrize("mmvae,size,files,want", [
    (False, (40, 30), {}, [{A, J}, {T}, {W}]), (True, (500, 333), {}, [{A, T}, {W}, {J}]),
    (False, (40, 30), {"text_c10/test": [J], "text_c10/val": [T, A]}, [{A, T}, {W}, {J}]),
    (False, (40, 30), {"CUB_200_2011/test": [A, "099.Owl"]}, [{J, T}, {W}, {A}])])
def test_prepare_cub(tmp_path, capsys, mmvae, size, files, want):
    """[Sec. 4.1] rows have their picture and captions; files of class names decide the split."""
    paths, limit = draw_birds(tmp_path / "raw", mmvae, size), 2 if size[0] > 99 else 1e-9
    for name, kinds in files.items():
        (tmp_path / "raw" / f"{name}classes.txt").write_text("\n".join(kinds))
    arrays, names, split = prepared_birds(tmp_path / "raw" / ("cub" * mmvae), tmp_path / "out")
    assert split == want and sorted(names) == sorted(paths)
    assert ("not the official" in capsys.readouterr().out) == (not mmvae and not files)
    assert arrays["text"] == [*map(captions_of, names)]
    assert all(np.abs(small(paths[name]) - image).mean() < limit
               for name, image in zip(names, arrays["image"]))


@needs_real_data
def test_real_birds(tmp_path):
    """[Sec. 4.1] 1,258 real birds; of the one-file layout's captions 9,054 of 9,830 are equal."""
    shutil.unpack_archive(Path(REAL) / "cub_mini.tar", tmp_path, filter="data")
    arrays, names, split = prepared_birds(tmp_path, tmp_path / "out")
    assert len(names) == 1258 and [*map(len, split)] == [18, 2, 2]
    texts = data_prep.named_files(tmp_path / "text_c10", ".txt")
    assert all(arrays["text"][row] == data_prep.read_lines(texts[names[row]])
               for row in range(0, 1258, 37))
    lines = data_prep.read_lines(Path(REAL) / "cub_text_testclasses.txt")
    blocks = json.loads((Path(REAL) / "reed_test_filenames_sorted.json").read_text())
    equal = [sum(a == b for a, b in zip(lines[10 * k:], data_prep.read_lines(texts[name])))
             for k, name in enumerate(blocks) if name in texts]
    assert len(equal) == 983 and sum(equal) == 9054 and min(equal) == 4


# === §8 Pictures and figures ===

def test_f1_and_frechet_distance():
    """F1 0 where both are empty; |m - n|^2 + tr(A + B) - 2 sum of the roots of AB's eigenvalues."""
    pred = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    true = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]])
    assert D.mean_f1(pred, true) == (0.5 + 0.0 + 1.0 + 0.0) / 4
    noise = torch.randn(200_000, 3, generator=seeded())
    noise = (noise - noise.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T))).T
    s, t, mean = torch.randn(7, 3, generator=seeded(1)).split((3, 3, 1))
    want = mean.square().sum() + s.square().sum() + t.square().sum() - 2 * torch.linalg.eigvals(
        s.T @ s @ t.T @ t).real.sqrt().sum()
    assert D.frechet_distance(noise @ s, noise @ t + mean) == pytest.approx(want.item(), rel=1e-3)


def test_own_input(tmp_path, monkeypatch):
    """The user's files as data_prep.py reads them; ~ is home; attributes by name, with blanks."""
    path = tmp_path / "m.png"
    Image.fromarray(np.tril(np.full((20, 20), 9, np.uint8))).save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names, x = D.read_given(["mask=~/m.png", "image=~/m.png", "attr=Smiling, Bald"], tiny())
    assert names == ["mask", "image", "attr"] and D.read_given(names, tiny()) == (names, {})
    assert np.array_equal(x["mask"][0, 0], data_prep.read_mask([path], 16))
    image = D.eight_bits(x["image"])[0].permute(1, 2, 0)
    assert np.array_equal(image, data_prep.read_picture(path, 16))
    assert [n for n, bit in zip(D.ATTRIBUTES, x["attr"][0]) if bit] == ["Bald", "Smiling"]


@pytest.mark.parametrize("dataset,columns,tall", [("celeba", 6, 134), ("cub", 2, 222)])
def test_grid(tmp_path, dataset, columns, tall):
    """A column a modality, a row an item; captions below the pictures, none beyond the edge."""
    data, model = toy(dataset), model_of(tiny(dataset)).eval()
    given = model.config.modalities[1:2]
    model.sample_conditional = spy = MagicMock(wraps=model.sample_conditional)
    D.sample_pictures(model, data, tmp_path / "x.png", given, 2, 7, sampler="ddim", steps=2)
    assert (*spy.call_args.args[0],) == given and spy.call_args.args[2].initial_seed() == 7
    grid = np.asarray(Image.open(tmp_path / "x.png"))            # (H, W, 3)
    assert len(grid) == 44 + 2 * tall and grid.shape[1] >= 72 + columns * 174
    image = D.eight_bits(data.tensors(data.split["test"][:2])["image"])[1].permute(1, 2, 0).numpy()
    assert np.array_equal(grid[44 + tall:172 + tall, 72:200], image.repeat(8, 0).repeat(8, 1))


class Perfect:
    """A model that gives back the items x, whatever of them it is given, and a judge of them."""

    def __init__(self, *args):
        self.config, self.x, self.labels, self.told, self.next, self.asked = *args, 0, set()

    def find(self, name, value):
        return torch.cdist(value.float().flatten(1), self.x[name].float().flatten(1)).argmin(1)

    def sample_conditional(self, given, n, generator, names, told=None):
        self.asked.add((*given,))
        rows = self.find(*next(iter(given.items())))
        made = {n: (told or self.x)[n][rows] for n in names}     # its pictures are a bit brighter
        return {n: {"image": a + 1e-3, "text": a[:, -1]}.get(n, a) for n, a in made.items()}

    def sample_unconditional(self, n, prior, generator):
        rows = torch.arange(self.next, self.next + n) % 12
        self.next += n
        made = self.sample_conditional({"image": self.x["image"][rows]}, 1, None, self.x, self.told)
        return {**made, "image": made["image"] + 0.1 * (prior == "gaussian")}  # brighter still

    def read(self, image):
        rows = self.find("image", image)
        return image.flatten(1)[:, :20], {name: a[rows] for name, a in self.labels.items()}


@pytest.mark.parametrize("dataset", D.MODALITIES)
def test_evaluation_of_a_perfect_model(dataset, monkeypatch):
    """F1 1, distance 0 but from N(0, I), also of FID; CLIP's pairs; captions count by facts."""
    data, config, clip, pairs = toy(dataset), tiny(dataset, decoder="feedforward"), None, []
    x, want = data.tensors(rows := data.split["test"]), []
    told = {n: a.roll(1, 0) if n == "text" else a for n, a in data.tensors(rows, 9).items()}
    if dataset == "cub":
        facts = [[*map(data_prep.facts_of, data.captions[row])] for row in rows]
        right = sum(len(facts[k - 1][9] & set().union(*ten)) for k, ten in enumerate(facts))
        want = [1.0, 1.0, *2 * [round(right / sum(len(ten[9]) for ten in facts), 4)]]
        clip = lambda image, texts: pairs.append(
            ((image[0] - x["image"][0]).mean().item(), texts[0])) or torch.zeros(len(image))
    perfect = Perfect(config, x, data.labels(rows), told)
    monkeypatch.setattr(D, "CHUNK", 5)
    figures = D.evaluate(perfect, data, perfect, 12, 1, 0, lambda a: a.flatten(1)[:, :9], clip)
    f1 = {n: v for n, (v,) in figures.items() if "F1" in n and "another" not in n}
    assert set(f1.values()) == {1.0} and len(f1) == (18 if dataset == "celeba" else 2), f1
    assert [v for n, (v,) in figures.items() if "share" in n] == want
    far = [("N(0, I)" in n, v) for n, (v,) in figures.items() if re.search(" from .*: F.?D", n)]
    assert all(0.05 < v if gaussian else v < 1e-3 for gaussian, v in far)
    assert (len(far), len(perfect.asked)) == ((21, 7) if dataset == "celeba" else (15, 3))
    if dataset == "cub":  # three chunks from the image, from the caption, from nothing, N(0, I)
        assert pairs[::3] == [(pytest.approx(light, abs=1e-4), data.captions[rows[k]][n]) for
            light, k, n in ((0, 0, 0), (1e-3, 0, 0), (1e-3, -1, 9), (0.101, -1, 9))]
    small = x["image"].unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5)).flatten(1)  # of 16 px
    for kind, a in (("FID", x["image"].flatten(1)[:, :9]), ("FD-8x8", small)):
        halves = D.frechet_distance(a[::2], a[1::2])
        assert figures[f"real halves: {kind}"][0] == pytest.approx(halves, abs=1e-4) != 0
    assert 0 < max(v for n, (v,) in figures.items() if "another" in n) < 0.9


@pytest.mark.parametrize("dataset", D.MODALITIES)
def test_evaluation_is_reproducible(tmp_path, monkeypatch, dataset):
    """Twice the same digits, also by a judge trained anew; kept; [Eq. 5] the bound adds up."""
    monkeypatch.setattr(D, "JUDGE_STEPS", 4)
    data, model = toy(dataset), randomise(model_of(tiny(dataset))).requires_grad_(False)
    ask = lambda judge, *a: D.evaluate(model, data, D.get_judge(tmp_path / judge, data), 8, *a,
                                       sampler="ddim", steps=2)
    first, a, b = ask("1", 2, 0), ask("2", 1, 0), ask("2", 1, 1)
    assert first == {n: a[n] + b[n] * (len(first[n]) > 1) for n in a}
    monkeypatch.setattr(D, "new_file", None)                     # nothing is trained any more
    assert first == ask("1", 2, 0) and {p.name for p in tmp_path.iterdir()} == {"1", "2"}
    assert any(v[0] != v[1] for v in first.values() if len(v) > 1)
    torch.manual_seed(0)
    nats = model.neg_elbo(data.tensors(data.split["test"][:8]), "8 bits")["image"].mean()
    assert a["Eq. 5 bound: image, nats"][0] == pytest.approx(nats.item(), abs=1e-2)
    bits = sum(a[f"Eq. 5 bound: {n}, nats"][0] for n in (*D.MODALITIES[dataset], "kl")) / 768
    assert a["Eq. 5 bound: bits per image value"][0] * math.log(2) == pytest.approx(bits, abs=1e-3)


def test_inception(tmp_path, monkeypatch):
    """Nine pooling branches get means without the padding, or in the end the largest values."""
    import torchvision
    torch.manual_seed(0)
    net, inputs, pooled = torchvision.models.Inception3(1008, False, init_weights=False), [], []
    torch.save(net.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torchvision.models, "Inception3", lambda **_: net)
    features = D.load_inception(tmp_path / "x.pth", CPU)
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for block in net.children():
        if hasattr(block, "branch_pool"):
            block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            block.branch_pool.conv.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    assert features(image := torch.rand(2, 3, 32, 32) * 2 - 1).shape == (2, 2048)
    want = nn.functional.interpolate(D.eight_bits(image) / 127.5 - 1, (299, 299), mode="bilinear")
    assert torch.allclose(inputs[0], want, atol=1e-5) and len(inputs) == 10
    for k, (x, got) in enumerate(zip(inputs[1:], pooled, strict=True)):
        want = nn.functional.max_pool2d(x, 3, 1, 1) if k == 8 else nn.functional.avg_pool2d(
            x, 3, 1, 1, count_include_pad=False)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_clip_score(monkeypatch):
    """100 max(cos, 0) of the embeddings of 8-bit pictures and captions that may be cut."""
    import transformers
    net, processor = MagicMock(), MagicMock()
    net.to.return_value.eval.return_value = net
    net.config.text_config.max_position_embeddings = 77
    net.return_value = SimpleNamespace(image_embeds=torch.tensor([[3.0, 4.0], [1.0, 0.0]]),
                                       text_embeds=torch.tensor([[8.0, 6.0], [-1.0, 1.0]]))
    for name, value in (("CLIPModel", net), ("CLIPProcessor", processor)):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda _, v=value: v)
    image = torch.rand(2, 3, 4, 4) * 2 - 1
    assert D.load_clip("x", CPU)(image, ["a", "b"]).tolist() == pytest.approx([96, 0])
    options = processor.call_args.kwargs
    assert torch.equal(torch.stack(options["images"]), D.eight_bits(image))
    assert options["text"] == ["a", "b"] and options["max_length"] == 77 and options["truncation"]


def test_nll_8bit_is_a_distribution():
    """It sums to one, also for means beyond the values; in the middle density times width."""
    values = torch.arange(256).view(-1, 1) / 127.5 - 1           # (256, 1)
    for mean, std in ((0.0, 0.7), (0.3, 0.01), (-2.0, 0.3), (5.0, 0.02)):
        nll = D.nll_8bit(values, torch.full_like(values, mean), torch.tensor(std))
        assert nll.isfinite().all()
        assert torch.logsumexp(-nll, 0).item() == pytest.approx(0, abs=1e-6)
    x, mean = torch.tensor([[[0.2, -0.1]], [[0.3, 0.1]]])
    want = -Normal(mean, 0.5).log_prob(x).sum() - 2 * math.log(2 / 255)
    assert D.nll_8bit(x, mean, torch.tensor(0.5)).item() == pytest.approx(want.item(), abs=1e-4)


@pytest.mark.parametrize("beta_max", [20.0, 2.0])
def test_image_bound_is_tight_for_the_exact_score(monkeypatch, beta_max):
    """[Eq. 2] with its ends: the entropy of 8-bit Gaussian images; with a wrong score more."""
    monkeypatch.setattr(D.VPSDE, "beta_max", beta_max)
    decoder = D.DiffusionDecoder(tiny())
    x = D.eight_bits(0.3 * torch.randn(200, 3, 16, 16, generator=seeded())).float() / 127.5 - 1
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.09) + math.log(127.5)
    var = 1 - D.VPSDE().alpha(torch.tensor(1.0)).item() ** 2 * 0.91  # of x_1, against 1
    want = x[0].numel() * (entropy + 0.5 * (var - 1 - math.log(var)))
    torch.manual_seed(0)
    decoder.eps = lambda x_t, t, z: gaussian_eps(0.0, 0.09)(x_t, t)
    right = decoder.nll(torch.zeros(200, 16), x, "8 bits")
    assert right.shape == (200,) and right.mean().item() == pytest.approx(want, rel=0.005)
    decoder.eps = lambda x_t, t, z: gaussian_eps(0.0, 0.2)(x_t, t)
    assert decoder.nll(torch.zeros(200, 16), x, "8 bits").mean().item() > 1.01 * want


def test_rows_of_the_paper():
    """[Sec. 4] a row of the paper for the flags of its models, and for no others."""
    for dataset, preset in (("celeba", "small"), ("celeba", "paper"), ("cub", "small")):
        config = functools.partial(D.preset_config, dataset, preset, steps=3, seed=1)
        for name, flags in D.MODELS.items():
            assert config(**flags).model_name() == name
            assert bool(D.paper_row(config(**flags))) == (name in D.PAPER[dataset])
        for flags in (dict(decoder="feedforward", beta=0.7), dict(decoder="feedforward", beta=0.3,
                      prior_expert=True), dict(prior_expert=True), dict(objective="mvtcae"),
                      dict(attr_weight=3.0, text_weight=3.0), dict(warmup=0.1)):
            assert config(**flags).model_name() is None and D.paper_row(config(**flags)) == {}
    for kind, source, figure in (("diffusion", "nothing", 28.4), ("feedforward", "N(0, I)", 139.8)):
        assert D.paper_row(tiny(decoder=kind))[f"image from {source}: FID"] == figure


# === §9 The command line ===

TINY = {name: vars(tiny(name)) for name in D.MODALITIES}
CHANGES = dict(TOY_COUNTS=dict(train=64, val=8, test=8), JUDGE_STEPS=4,
               PRESETS={name: {**D.PRESETS[name], "small": TINY[name]} for name in TINY})
SHORT = "--train --steps 3 --aux-steps 2 --batch-size 8"
PATHS = {**os.environ, "PYTHONPATH": str(HERE)}


def command(folder, flags, dataset="celeba", **changes):
    """A command in this process, with fewer toys, changes to diffmvae: -> code, stdout, stderr."""
    main = data_prep.main if dataset.startswith("prep") else D.main
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        for name, value in {**CHANGES, **changes}.items():
            patch.setattr(D, name, value)
        try:
            code = main(shlex.split(f"--dataset {dataset.removeprefix('prep ')} {flags}"))
        except SystemExit as error:
            code = error.code
    texts = [stream.seek(0) or stream.read() for stream in (out, err)]
    return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs of both setups, made through the command line with short lengths."""
    folder = tmp_path_factory.mktemp("cli")
    for dataset, names in D.MODALITIES.items():
        flags = f"{SHORT} --sample cond --num 2 --sampler-steps 2 --given {names[1]}"
        result, run = command(folder, flags, dataset), folder / f"runs/{dataset}-toy"
        assert result.returncode == 0 and "TOY" in result.stdout, result.stderr
        assert (run / "samples" / f"given-{names[1]}-seed0.png").exists()
        log = log_of(run)
        assert {*names, "kl", "total", "grad"} <= set(log[0])
        assert "image gap" in log[2] and log[-1]["stage"] == 2
    Image.fromarray(np.eye(30, dtype=np.uint8) * 255).save(folder / "own.png")
    return folder


@pytest.mark.parametrize("dataset,flags,file", [("celeba", "uncond", "uncond-aux-seed0"),
    ("celeba", "uncond --prior gaussian --data toy", "uncond-gaussian-seed0"),
    ("celeba", "cond --given mask attr --seed 3 --sampler euler-maruyama", "given-mask-attr-seed3"),
    ("celeba", "cond --given attr=Smiling,Eyeglasses --sampler ddpm", "given-attr-own-seed0"),
    ("celeba", "cond --given mask=own.png image=own.png --sampler ddim --run runs/celeba-toy",
     "given-mask-image-own-seed0"),
    ("cub", "cond --given image --sampler dpm++", "given-image-seed0"),
    ("cub", "cond --given 'text=A small red bird, with a yellow beak!'", "given-text-own-seed0"),
    ("cub", "uncond --decoder diffusion", "uncond-aux-seed0")])
def test_command_sample(trained, dataset, flags, file):
    result = command(trained, f"--sample {flags} --num 2 --sampler-steps 2", dataset)
    assert result.returncode == 0, result.stderr
    assert Image.open(trained / f"runs/{dataset}-toy/samples/{file}.png").height > 44 + 2 * 130


@pytest.mark.parametrize("flags,more,run", [
    ("--decoder feedforward --prior-expert", "--beta 0.7 --optimizer adam", "feedforward-prior"),
    ("--decoder feedforward --objective mvtcae", "--preset small", "feedforward-mvtcae"),
    ("--weighting likelihood", "--warmup 0.5 --attr-weight 3 --text-weight 2", "likelihood")])
def test_command_variants(tmp_path, flags, more, run):
    """Each variant has its own run folder, and sampling finds it by the same flags."""
    uncond = "--sample uncond --num 1 --sampler-steps 2"
    result = command(tmp_path, f"{flags} {more} {SHORT} {uncond}")
    assert result.returncode == 0, result.stderr
    config = D.load(tmp_path / f"runs/celeba-toy-{run}/checkpoint.pt").config
    for name, value in re.findall(r"--(\S+) ([^- ]\S*)", f"{flags} {more}"):
        found = getattr(config, name.replace("-", "_"))
        assert found == type(found)(value)
    assert command(tmp_path, f"{flags} {uncond}").returncode == 0


@pytest.mark.parametrize("dataset,extra,figure,paper", [
    ("celeba", "inception", "image from mask: FID", 28.5),
    ("cub", "clip", "text from image: CLIP", 28.1)])
def test_command_eval(trained, monkeypatch, dataset, extra, figure, paper):
    """Figures in eval.json even if the screen fails; the paper's beside them; FID, CLIP."""
    stub = lambda *_: lambda image, text=None: image[:, 0].flatten(1)[:, ::99]
    stubs = dict(load_inception=stub, load_clip=stub)
    flags = f"--eval --eval-num 4 --eval-repeats 2 --sampler-steps 1 --{extra} x"
    path, result = trained / f"runs/{dataset}-toy/eval.json", command(
        trained, flags, dataset, **stubs)
    record = json.loads(path.read_text())
    assert record["paper"][figure] == paper and record["items"] == 4
    assert sum("CLIP" in name for name in record["figures"]) == 4 * (extra == "clip")
    a, b = record["figures"][figure]
    want = rf"^  {figure} +{(a + b) / 2:.3f} \+- {abs(a - b) / math.sqrt(2):.3f} +{paper}$"
    assert re.search(want, result.stdout, re.M)
    path.unlink()
    monkeypatch.setattr("builtins.print", lambda *a, **_: "mean" in str(a) and os.stat("/no"))
    assert command(trained, flags, dataset, **stubs).returncode == 2 and path.exists()


def test_command_on_prepared_data(tmp_path):
    """Raw data to arrays to training, pictures and figures of both setups."""
    draw_raw(tmp_path / "celeba", n=30, mapping=False)
    draw_birds(tmp_path / "cub")
    for dataset, given, px, patch in (("celeba", "mask", 16, 2), ("cub", "text", 64, 4)):
        assert command(tmp_path, f"--raw {dataset} --size {px}", f"prep {dataset}").returncode == 0
        result = command(tmp_path, f"--preset small {SHORT} --sample cond --given {given} --num 2 "
                         "--sampler-steps 2 --eval --eval-num 2 --eval-repeats 1", dataset)
        assert result.returncode == 0 and "TOY" not in result.stdout, result.stderr
        assert D.load(tmp_path / f"runs/{dataset}/checkpoint.pt").config.patch == patch
        assert json.loads((tmp_path / f"runs/{dataset}/eval.json").read_text())["items"] == 2
    path = tmp_path / "data/celeba/mask.npy"
    np.save(path, 1 - np.load(path))                             # prepared again, and repaired
    assert "trained with other data" in command(tmp_path, "--train --resume").stderr
    for flags, other in (("--eval --eval-num 2 --eval-repeats 1", True), ("--sample uncond", False),
            ("--sample cond --given mask", True), ("--sample cond --given attr=Bald", False)):
        result = command(tmp_path, flags + " --sampler-steps 2")
        assert result.returncode == 0 and ("other data, maybe with" in result.stderr) == other
    assert len([*tmp_path.glob("runs/judge-celeba-*.pt")]) == 2


def test_command_text_init(tmp_path):
    """--text-init: weights of two Optimus folders; --resume needs none of it."""
    *_, sizes = draw_optimus(tmp_path)
    changes = dict(PRESETS={"cub": {"paper": {**TINY["cub"], **sizes}}})
    flags = "--data toy --preset paper --train --steps 2 --aux-steps 1 --batch-size 4 "
    folders = "--text-init checkpoint-encoder-508523 checkpoint-decoder-508523"
    result = command(tmp_path, flags + folders, "cub", **changes)
    assert result.returncode == 0 and "not used: []" in result.stdout, result.stderr
    shutil.rmtree(tmp_path / "checkpoint-encoder-508523")
    assert command(tmp_path, flags + "--resume", "cub", **changes).returncode == 0


# === §10 Bad input and faults ===

@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
    """A folder with raw data, prepared data and a run of either setup."""
    folder = tmp_path_factory.mktemp("place")
    draw_raw(folder / "faces")
    draw_birds(folder / "birds")
    draw_birds(folder / "mmvae", True)
    data_prep.prepare("celeba", folder / "faces", folder / "prepared", 16)
    shutil.copytree(trained / "runs", folder / "runs")
    return folder


def cut(length, name):
    """A damage: the files of that pattern end early; None deletes them."""
    return lambda folder: [p.unlink() if length is None else p.write_bytes(p.read_bytes()[:length])
                           for p in list(folder.glob(name))]


def swap(name, old, new):
    """A damage: other bytes in a file."""
    return lambda folder: [p.write_bytes(re.sub(old, new, p.read_bytes(), flags=re.S))
                           for p in list(folder.glob(name))]


def change_checkpoint(**changes):
    """A damage: other contents."""
    def damage(folder):
        path = folder / "runs/celeba-toy/checkpoint.pt"
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return damage


UNCOND, NEW, COND = "--sample uncond ", "--train --run new ", "--sample cond --given "
FROM = NEW + "--preset small --data prepared"
BAD_INPUT = {"celeba": [
        ("", "give --train"), ("--train --resume --lr 0.5", "was trained with lr 0.002"),
        (NEW + "--warmup 2", "not betw"), ("--eval --prior gaussian", "--prior needs"),
        (COND + "sound", "choose from image, mask, a"), (COND + "mask attr=Bald", "all your own"),
        (COND + "attr=Freckles", "no attribute Freckles"), ("--eval --clip x", "only cub has "),
        (COND + "mask=~no/m.png", "~no/m.png: cannot be read as a mask"),
        (UNCOND + "--run nowhere", "train first with --train"), ("--train", "exists; --resume"),
        (NEW + "--resume", "no checkpoint yet"), (UNCOND + "--beta 1", "need --train"),
        (NEW + "--data nowhere", "not a complete data set"), (NEW + "--lr nan", "not between"),
        (NEW + "--decoder feedforward --weighting likelihood", "of the diffusion decoder"),
        (NEW + "--objective mvtcae --prior-expert", "has no prior-expert"),
        ("--eval --inception no.pth", "not pytorch-fid's weights"), ("--sample cond", "goes with"),
        (UNCOND + "--run runs/celeba-toy --data prepared", "was trained with toy True"),
        (NEW + "--data prepared", "16 px; the model needs a multiple of 32"),
        (UNCOND, "not a checkpoint of this version", cut(50_000, "runs/*/checkpoint.pt")),
        (UNCOND, "or damaged (UnpicklingError", change_checkpoint(log=Path("code"))),
        (UNCOND, "do not fit together", change_checkpoint(
            config={**TINY["celeba"], "latent": 64, "aux_steps": 2})),
        (FROM, "mask.npy has values up to 255, not 0 and 1", lambda folder: np.save(
            folder / "prepared/mask.npy", np.full((12, 16, 16), 255, np.uint8))),
        (FROM, "a row twice", swap("prepared/meta.json", rb"\[4, 5\]", b"[3, 5]")),
        (FROM, "attr.npy has uint8 (11, 18), not uint8 (12, 18)", lambda folder: np.save(
            folder / "prepared/attr.npy", np.zeros((11, 18), np.uint8))),
        (FROM, "not of 0 to 11", swap("prepared/meta.json", rb"\[4, 5\]", b"[4, 12]"))], "cub": [
        (NEW + "--data toy --text-init a b", "--text-init needs --preset paper"),
        (FROM, "text.json has not 12 lists of ten", lambda folder: (
            folder / "prepared/text.json").write_text("[]")),
        (COND + "text='" + "red " * 40 + "'", "not 1 to 30 tokens")], "prep celeba --raw faces": [
        ("--out prepared", "exists already"), ("--size 20", "must be a multiple of 8 up to 1024"),
        ("--out runs/celeba-toy/log.jsonl/out", "cannot be written"),
        ("", "every split needs 2", swap("faces/*mapping.txt", rb" \d+ ", b" 1 ")),
        ("", "anno.txt: cannot be read as a text", cut(None, "faces/*anno.txt")),
        ("", "1 of 12 cannot be used: faces/CelebAMask-HQ-mask-anno/0/00006_hair.png: cannot be",
         cut(None, "faces/*/0/00006_[!s]*")),
        ("", "'5.jpg x", swap("faces/*anno.txt", b"5.jpg  ", b"5.jpg  x ")),
        ("", "line 1 says 13 images, 12 rows", swap("faces/*anno.txt", b"12\n", b"13\n"))],
    "prep cub --raw birds": [
        ("", "birds: neither images and text_c10, nor text_trainvalclasses.txt",
         lambda folder: (folder / "birds/text_c10").rename(folder / "text"))],
    "prep cub --raw mmvae": [
        ("", "text_testclasses.txt: 19 captions, not 10 for each of the 2 images",
         swap("mmvae/cub/text_testclasses.txt", rb"^.+?\n", b""))]}
BAD_INPUT = [(start, *row, None)[:4] for start, rows in BAD_INPUT.items() for row in rows]


@pytest.mark.parametrize("start,flags,words,damage", BAD_INPUT)
def test_bad_input(place, tmp_path, start, flags, words, damage):
    """One line on stderr that says what is wrong, exit code 2; nothing written, nothing changed."""
    contents = lambda: {path: path.read_bytes() if path.is_file() else None
                        for path in folder.rglob("*")}
    folder = shutil.copytree(place, tmp_path / "place")
    if damage:
        damage(folder)
    out = " --out out" * ("prep" in start and "--out" not in flags)
    before, result = contents(), command(folder, flags + out, start)
    lines = [line for line in result.stderr.splitlines() if line and "%|" not in line]
    assert result.returncode == 2 and len(lines) == 1 and words in lines[0], (lines, words)
    assert lines[0].startswith("data_prep.py: " if "prep" in start else "diffmvae.py: ")
    assert contents() == before


@pytest.mark.parametrize("dataset", D.MODALITIES)
def test_resume_is_bitwise(tmp_path, dataset):
    """A crash loses the steps since the last checkpoint, Ctrl-C and SIGTERM none."""
    flags, in_step, in_log = "--train --steps 12 --aux-steps 15 --run ", (
        torch.optim.Adam, "step"), (D.tqdm, "set_postfix")
    preset = {**TINY[dataset], "dropout": 0.1, "log_every": 1, "save_every": 5}
    for place, at, event, code, more in (
            (in_step, 999, None, 0, "whole"), (in_step, 8, lambda: sys.exit(9), 9, "parts"),
            (in_step, 2, lambda: signal.raise_signal(2), 130, "parts --resume"),
            (in_log, 9, lambda: signal.raise_signal(15), 143, "parts --resume"),
            (in_step, 999, None, 0, "parts --resume"), (in_step, 999, None, 0, "other --seed 1")):
        steps, original = iter(range(1, 1000)), getattr(*place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*place, lambda *args: original(*args) or next(steps) == at and event())
            result = command(tmp_path, flags + more, dataset, PRESETS={dataset: {"small": preset}})
        assert (result.returncode, signal.getsignal(2)) == (code, signal.default_int_handler)
        path = tmp_path / more.split()[0] / "checkpoint.pt"
        model = D.load(path)                                     # the averages, in eval mode
        assert not model.training and equal(model.state_dict(), {
            n: v for (kind, n), v in weights(path.parent).items() if kind == "ema"})
    whole, parts, other = (weights(tmp_path / name) for name in ("whole", "parts", "other"))
    assert equal(whole, parts) and not equal(whole, other)
    logs = [[{**row, "seconds": 0} for row in log_of(tmp_path / n)] for n in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 12 + 1 + 15    # no line lost, none twice


# === §11 The repository ===

SOURCE, TESTS = (HERE / "diffmvae.py").read_text(), Path(__file__).read_text()
README = (HERE / "README.md").read_text().replace("\\\n", " ")


def test_equation_tags_and_contents_agree():
    """Header, code and tests name the same equations; the header lists the sections."""
    header, code = SOURCE.split('"""', 2)[1:]
    index, used, proved = (set(re.findall(r"(?:Eq|Sec)\. \d(?:\.\d)?", " ".join(
        re.findall(r"\[[^]]*(?:Eq|Sec)\. [^]]*\]", text)))) for text in (header, code, TESTS))
    equations = {tag for tag in used if tag.startswith("Eq")}
    assert equations == {f"Eq. {k}" for k in range(1, 6)} == {t for t in index if "Eq" in t}
    assert equations <= proved and used <= index
    banners = [int(n) for n in re.findall(r"^# === §(\d+) .+? ===$", SOURCE, re.M)]
    contents = re.search(r"^Contents.+?\n\n", header, re.M | re.S).group().split("\n", 1)[1]
    assert banners == sorted(map(int, re.findall(r"§(\d+)  ?\w", contents))) == [*range(1, 11)]


@pytest.mark.parametrize("name,budget", [("diffmvae.py", 1600), ("data_prep.py", 600),
                                         ("test_diffmvae.py", 1700), ("README.md", 250)])
def test_budgets(name, budget):
    """Lines up to 100 columns, files within their budgets; 400 for the paper, §2 to §4."""
    lines = (HERE / name).read_text().splitlines()
    starts = {line.split()[2]: n for n, line in enumerate(lines) if line.startswith("# === §")}
    assert len(lines) <= budget and (name == "README.md" or max(map(len, lines)) <= 100)
    assert name != "diffmvae.py" or starts["§5"] - starts["§2"] <= 400


def test_import_is_silent_and_every_flag_has_help_and_a_test(tmp_path):
    code = "import diffmvae as d, torch; assert not torch.cuda.is_initialized(); d.main(['-h'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, env=PATHS)
    assert result.stdout.startswith("usage") and not result.stderr and not list(tmp_path.iterdir())
    flags = re.findall(r"^  (--[a-z-]+)", result.stdout, re.M)
    assert len(flags) > 25 and [flag for flag in flags if flag not in TESTS] == []


def test_readme_commands_and_code(trained, monkeypatch):
    """The scripts accept every command of the README; its Python runs as it stands."""
    commands = re.findall(r"^    (?:.*&& )?(python (?:diffmvae|data_prep)\.py .*)$", README, re.M)
    assert len(commands) >= 8
    for line in commands:
        script, *flags = shlex.split(line)[1:]
        {"diffmvae.py": D.parse_args, "data_prep.py": data_prep.parse_args}[script](flags)
    monkeypatch.chdir(trained)
    for block in re.findall(r"```python\n(.+?)```", README, re.S):
        exec(block, {})
