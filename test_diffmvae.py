"""Tests of diffmvae.py and data_prep.py, in the order of the script's sections.

`python -m pytest` takes minutes on two cores and needs no network. Two tests read raw data from
the folder that DIFFMVAE_REAL_DATA names, and are skipped without it. Expected values do not come
from the module: they are closed forms, numerical integrals or the library's own distributions.
"""
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Bernoulli, Normal, kl_divergence

import data_prep
import diffmvae

HERE = Path(__file__).parent
CPU = torch.device("cpu")
SDE = diffmvae.VPSDE()
SETUPS = ("celeba", "cub")
FACE = ("image", "mask", "attr")
REAL = os.environ.get("DIFFMVAE_REAL_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="DIFFMVAE_REAL_DATA is not set")

# The smallest model that has every part
TINY = dict(
    toy=True, image_size=16, latent=16,
    image_channels=(8, 16, 16), mask_channels=(8, 8, 16), attr_widths=(32, 32),
    unet_width=16, unet_mults=(1, 2), unet_blocks=1, unet_attention=(4,), z_map=4, aux_width=16,
    batch_size=8, steps=6, aux_steps=4, log_every=2, probe_every=100, save_every=100)
TINY_TEXT = dict(text_width=16, text_layers=2, text_heads=2)


def tiny(dataset="celeba", **changes):
    """The configuration of the smallest model of a setup, except for the changes."""
    sizes = dict(TINY)
    if dataset == "cub":
        sizes.update(TINY_TEXT, tokenizers=(bird_tokenizer(), bird_tokenizer()))
    sizes.update(changes)
    return diffmvae.preset_config(dataset, "small", **sizes)


@functools.cache
def bird_tokenizer():
    """The JSON of a tokenizer made from the captions of 40 toy birds."""
    captions = []
    for ten in data_prep.toy_birds(40, 16)["text"]:
        captions += ten
    return diffmvae.small_tokenizer(captions)


@functools.cache
def toy_arrays(dataset, n):
    """n toys of 16x16 pixels, as they are stored."""
    if dataset == "celeba":
        return data_prep.toy_faces(n, 16)
    return data_prep.toy_birds(n, 16)


def three_splits(n):
    """The first 5/8 of n rows to train, the rest in two halves."""
    first, second = 5 * n // 8, 13 * n // 16
    return {
        "train": np.arange(first),
        "val": np.arange(first, second),
        "test": np.arange(second, n),
    }


def stored_toys(dataset, n=64):
    """n toys of 16x16 pixels as a data set."""
    names = diffmvae.ATTRIBUTES if dataset == "celeba" else ()
    return diffmvae.Stored(dict(toy_arrays(dataset, n)), three_splits(n), names, toy=True)


def toy(dataset="celeba", n=64, config=None):
    """n toys as the model of that configuration, or the smallest, sees them."""
    return diffmvae.Data(stored_toys(dataset, n), config or tiny(dataset), CPU)


@pytest.fixture(scope="module")
def faces():
    """16 toy faces as tensors."""
    return toy("celeba", 16).tensors(np.arange(16))


@pytest.fixture
def x(dataset):
    """16 toys of the test's parameter `dataset` as tensors."""
    return toy(dataset, 16).tensors(np.arange(16))


def model_of(config, seed=0):
    """A new model with the weights of that seed."""
    torch.manual_seed(seed)
    return diffmvae.DiffMVAE(config)


def randomise(model, seed=0):
    """Move every parameter, those that start at zero too: -> the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def seeded(seed=0):
    """A generator with that seed."""
    return torch.Generator().manual_seed(seed)


def assert_mean(samples, expected, sigmas=5.0):
    """The mean of independent samples equals `expected` within its standard error."""
    samples = samples.double()
    error = samples.std().item() / math.sqrt(len(samples))
    assert abs(samples.mean().item() - expected) < sigmas * error + 1e-9


def read_log(folder):
    """The rows of a run's log."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def averaged_weights(folder):
    """The averaged weights of a run's checkpoint: {name: tensor}."""
    return diffmvae.read_checkpoint(folder / "checkpoint.pt")["ema"]


def train_tiny(folder, dataset="celeba", **changes):
    """Train the smallest model on 64 toys into the folder: -> its configuration."""
    config = tiny(dataset, **changes)
    diffmvae.train(folder, config, toy(dataset, 64, config), [])
    return config


def run_command(*words, program=diffmvae):
    """What a command line does: -> exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = program.main([str(word) for word in words])
        except SystemExit as error:  # argparse leaves this way
            code = error.code
    return code, out.getvalue(), err.getvalue()


# === §1 Setups and configuration [Sec. 4.1] [Sec. 4.2] ===

def test_presets():
    """[Sec. 4.2] The defaults are the paper's faces. A preset changes them first, then the setup
    changes the preset, and what the caller names comes last."""
    assert diffmvae.preset_config("celeba", "paper") == diffmvae.Config()
    birds = diffmvae.preset_config("cub", "small", lr=7.0)
    assert (birds.dataset, birds.preset) == ("cub", "small")
    assert birds.modalities == ("image", "text")
    assert (birds.latent, birds.steps, birds.lr) == (64, 2400, 7)


@pytest.mark.parametrize("weighting,asked,want", [
    ("simple", (), ("ddim", 50)),
    ("likelihood", (), ("euler-maruyama", 100)),
    ("simple", ("euler-maruyama",), ("euler-maruyama", 100)),
    ("likelihood", ("dpm++", 7), ("dpm++", 7)),
])
def test_sampling_defaults(weighting, asked, want):
    """[Sec. 4.1] lambda decides the sampler and the sampler the steps, unless the user does."""
    assert diffmvae.Config(weighting=weighting).sampling(*asked) == want


def test_small_models_sample_by_ddpm():
    """The small preset draws images by DDPM, unless lambda is g^2 or the user names a sampler."""
    assert diffmvae.preset_config("celeba", "small").sampling() == ("ddpm", 50)
    likelihood = diffmvae.preset_config("cub", "small", weighting="likelihood")
    assert likelihood.sampling() == ("euler-maruyama", 100)


# === §2 Gaussians and their fusion [Sec. 3.2] ===

STANDARD = Normal(0.0, 1.0)
SUBSETS = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]


def double_normal(*shape):
    """Standard normal numbers of double precision."""
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def product_of(mu, logvar, keep):
    """The product of the experts that `keep` names, (B, Z): their precisions add."""
    precision = torch.exp(-logvar[:, keep])
    total = precision.sum(1)
    return Normal((precision * mu[:, keep]).sum(1) / total, total ** -0.5)


def test_all_subsets():
    """[Sec. 3.2] Every choice of at least one modality is there once; the last has all."""
    assert diffmvae.all_subsets(3).int().tolist() == SUBSETS


def test_product_of_experts_is_the_product_of_densities():
    """[Sec. 3.2] [Sec. 3.3] The log density of the joint Gaussian is the sum of those of its
    experts plus a constant: as all are quadratic, they agree if they do at three points."""
    experts = double_normal(2, 7, 3, 5)
    subsets = torch.tensor(SUBSETS).bool()
    mu, logvar = diffmvae.product_of_experts(*experts, subsets)
    product = Normal(mu, torch.exp(0.5 * logvar))
    each = Normal(experts[0], torch.exp(0.5 * experts[1]))
    constants = []
    for z in torch.tensor([-3.0, 0.0, 1.0]):
        log_densities = each.log_prob(z) * subsets.unsqueeze(2)  # (7, 3, 5)
        constants.append(product.log_prob(z) - log_densities.sum(1))
    assert torch.allclose(constants[0], constants[1])
    assert torch.allclose(constants[0], constants[2])


def test_absent_experts_have_no_part():
    """[Sec. 3.3] Experts outside the subset may be NaN without a trace in the values or in the
    gradients."""
    experts = double_normal(2, 4, 3, 5)
    subset = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    want = diffmvae.product_of_experts(*experts, subset)
    experts[:, ~subset] = math.nan
    experts.requires_grad_()
    got = diffmvae.product_of_experts(*experts, subset)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.stack(got).sum().backward()
    assert experts.grad.isfinite().all()
    assert torch.equal(experts.grad != 0, subset.unsqueeze(2).expand_as(experts))


@pytest.mark.parametrize("logvars,mean,logvar", [
    ([-100.0, 100.0, math.nan], 2.0, -30.0),
    ([100.0, 100.0, math.nan], 3.0, 30 - math.log(2)),
])
def test_extreme_experts_stay_finite(logvars, mean, logvar):
    """[Sec. 3.2] A log variance counts as within [-30, 30], so no precision is zero or infinite
    in float32, and the surer of the experts at 2 and 4 decides the mean; the third is absent."""
    experts = torch.tensor([[2.0, 4.0, math.nan], logvars]).view(2, 1, 3, 1)
    product = diffmvae.product_of_experts(*experts, torch.tensor([[True, True, False]]))
    assert torch.stack(product).flatten().tolist() == pytest.approx([mean, logvar], rel=1e-5)


# === §3 Diffusion [Sec. 3.1] [Eq. 1] [Eq. 2] ===

def alpha_squared(t):
    """alpha_bar = exp(-int_0^t (0.1 + 19.9 s) ds) of numbers or of arrays of NumPy."""
    return np.exp(-(0.1 * t + 9.95 * t ** 2))


def beta_over_variance(t):
    """beta(t) / sigma(t)^2, the weight of the noise error in [Eq. 2] but for the half."""
    return (0.1 + 19.9 * t) / (1 - alpha_squared(t))


def quadrature(function):
    """The integral over [t_min, 1], on a grid that is regular in log t."""
    t = np.geomspace(1e-3, 1, 400_001)
    return np.trapezoid(function(t), t)


def test_forward_process_solves_the_sde():
    """[Eq. 1] alpha is the mean that small steps of the SDE's drift give to x_0 = 1, as DDPM's
    steps with betas from 0.1 to 20 over their number do, and sigma^2 keeps the variance 1."""
    betas = np.linspace(0.1, 20, 1_000_000) / 1_000_000
    alpha_bar = np.cumprod(1 - betas)[99_999::100_000]
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    assert np.allclose(SDE.alpha(t) ** 2, alpha_bar, rtol=1e-3)
    assert np.allclose(SDE.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-3)


def test_likelihood_times():
    """[Eq. 2] t has the density beta / sigma^2, normalised; the weight keeps the normaliser and
    the half."""
    torch.manual_seed(0)
    t, weight = SDE.draw_time(200_000, "likelihood", "cpu")
    normaliser = quadrature(beta_over_variance)
    assert torch.allclose(weight, torch.tensor(0.5 * normaliser).float(), rtol=1e-4)
    for edge in (0.002, 0.01, 0.1, 0.5, 0.9):
        below = quadrature(lambda s: beta_over_variance(s) * (s < edge)) / normaliser
        assert (t < edge).double().mean().item() == pytest.approx(below, abs=2e-3)


def test_uniform_times():
    """[Eq. 1] With lambda = 1 times are uniform in [t_min, 1] and weigh 1, in the warm-up they
    weigh 1 / alpha^2. Those of a batch are a regular grid; each place has uniform times."""
    t, weight = SDE.draw_time(10_000, "simple", "cpu")
    grid = torch.linspace(1e-3, 1, 10_000)
    assert torch.allclose(t.sort().values, grid, atol=2e-4)
    assert (weight == 1).all()
    t, weight = SDE.draw_time(1000, "v", "cpu")
    assert torch.allclose(weight.log(), 0.1 * t + 9.95 * t ** 2, rtol=1e-3)
    torch.manual_seed(0)
    fourth = [SDE.draw_time(8, "simple", "cpu")[0][3] for _ in range(10_000)]
    counts = torch.histc(torch.stack(fourth), 10, 1e-3, 1)
    assert torch.allclose(counts, torch.tensor(1000.0), atol=150)  # 5 deviations


@pytest.mark.parametrize("weighting", ["likelihood", "simple"])
def test_loss_is_the_weighted_integral(weighting):
    """[Eq. 1] [Eq. 2] The mean loss of a network with a known error is the integral over t of its
    error times 1, or times 1/2 beta / sigma^2; dimensions are summed."""
    def weighted_error(t):
        # eps - 0.3 x_t = (1 - 0.3 sigma) eps - 0.3 alpha x_0, in three dimensions
        alpha2 = alpha_squared(t)
        error = 3 * ((1 - 0.3 * np.sqrt(1 - alpha2)) ** 2 + 0.09 * alpha2 * 0.25)
        if weighting == "simple":
            return error / 0.999
        return 0.5 * beta_over_variance(t) * error

    torch.manual_seed(0)
    losses = SDE.loss(lambda x_t, t: 0.3 * x_t, torch.full((200_000, 3, 1), 0.5), weighting)
    assert losses.shape == (200_000,)
    assert_mean(losses, quadrature(weighted_error))


def test_noise_of_a_row_is_its_own():
    """A row of row_noise depends on its seed and not on the number of rows; it is standard normal,
    and new in every row and at every call."""
    many = diffmvae.row_noise(2000, seeded(7))
    few = diffmvae.row_noise(2, seeded(7))
    first = many(3, 2)
    second = many(3, 2)
    assert torch.equal(first[:2], few(3, 2))
    assert torch.equal(second[:2], few(3, 2))
    both = torch.cat([first, second]).flatten()
    assert len(both.unique()) > 0.99 * len(both)                 # float32 repeats some by chance
    assert_mean(both, 0.0)
    assert_mean(both ** 2, 1.0)


def gaussian_eps(mean, variance):
    """E[eps | x_t] of data N(mean, variance): sigma (x_t - alpha mean) / (alpha^2 v + sigma^2)."""
    def eps_net(x_t, t):
        alpha = diffmvae.append_dims(SDE.alpha(t), x_t)
        sigma = diffmvae.append_dims(SDE.sigma(t), x_t)
        return sigma * (x_t - alpha * mean) / (alpha ** 2 * variance + sigma ** 2)
    return eps_net


def plain_noise(n):
    """Standard normal numbers for n samples, from one generator for all of them."""
    generator = seeded()

    def noise(*shape):
        return torch.randn(n, *shape, generator=generator)
    return noise


def draw(sampler, steps, eps_net, n, dim=1, clamp=False):
    """n samples of `dim` numbers from the diffusion model with that noise predictor."""
    noise = plain_noise(n)
    return diffmvae.sample_diffusion(SDE, eps_net, (dim,), sampler, steps, noise, clamp)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_point_mass_comes_back(sampler, steps):
    """[Sec. 4.1] If all data are one point, x_0_hat is exact, and so is any number of steps."""
    x = draw(sampler, steps, gaussian_eps(0.6, 0.0), 50)
    assert torch.allclose(x, torch.tensor(0.6), atol=2e-4)


@pytest.mark.parametrize("sampler,steps", [
    ("ddim", 800), ("dpm++", 60), ("ddpm", 800), ("euler-maruyama", 300)])
def test_gaussian_comes_back(sampler, steps):
    """[Sec. 4.1] Every sampler draws data N(0.3, 0.25) from their exact noise predictor."""
    x = draw(sampler, steps, gaussian_eps(0.3, 0.25), 20_000)
    assert x.mean().item() == pytest.approx(0.3, abs=0.015)
    assert x.var().item() == pytest.approx(0.25, abs=0.012)


def test_ddpm_draws_from_the_posterior_of_a_step():
    """[Eq. 1] A step of DDPM is q(x_s | x_t, x_0_hat), by Bayes' rule from x_s ~ N(0, sigma_s^2)
    and x_t = r x_s + (1 - r^2)^(1/2) eps; here x_0_hat = 0, t = 0.2 and s = 0.1."""
    seen = []

    def eps_net(x, t):
        seen.append(x)
        return x / diffmvae.append_dims(SDE.sigma(t), x)

    draw("ddpm", 10, eps_net, 20_000)
    r2 = alpha_squared(0.2) / alpha_squared(0.1)
    precision = 1 / (1 - alpha_squared(0.1)) + r2 / (1 - r2)
    rest = seen[-1] - math.sqrt(r2) / (1 - r2) / precision * seen[-2]
    assert_mean(rest * seen[-2], 0.0)
    assert_mean(rest ** 2, 1 / precision)


def solver_error(sampler, steps):
    """How far a sampler is from the end of the probability flow of data N(0.3, 0.25), on which
    (x_t - alpha mean) / (alpha^2 variance + sigma^2)^(1/2) is constant."""
    last = alpha_squared(1.0)
    place = (plain_noise(64)(1) - 0.3 * math.sqrt(last)) / math.sqrt(1 - 0.75 * last)
    x = draw(sampler, steps, gaussian_eps(0.3, 0.25), 64)
    return (x - 0.3 - 0.5 * place).abs().mean().item()


def test_solvers_converge_at_their_order():
    """[Sec. 4.1] Twice the steps halve the error of DDIM, which has the first order, and quarter
    that of DPM-Solver++(2M), which has the second."""
    assert 1.8 < solver_error("ddim", 20) / solver_error("ddim", 40) < 2.2
    assert 3.5 < solver_error("dpm++", 20) / solver_error("dpm++", 40) < 5.0


@pytest.mark.parametrize("sampler,times", [
    ("ddim", np.linspace(1, 0, 51)[:50]),
    ("euler-maruyama", np.linspace(1, math.sqrt(1e-3), 51)[:50] ** 2),
    ("dpm++", SDE.time_of(torch.linspace(SDE.log_snr(torch.tensor(1.0)),
                                         SDE.log_snr(torch.tensor(1e-3)), 50))),
])
def test_times_of_samplers(sampler, times):
    """[Sec. 4.1] N steps ask the network N times, at times from 1 down: evenly spaced, squares of
    evenly spaced numbers in Euler-Maruyama, or evenly spaced in log_snr to t_min."""
    asked = []

    def eps_net(x, t):
        asked.append(t)
        return torch.zeros_like(x)

    draw(sampler, 50, eps_net, 3)
    assert torch.allclose(torch.stack(asked), torch.as_tensor(times).float().unsqueeze(1))


def test_clamping_of_x0_hat():
    """[Sec. 4.1] Two steps of DDIM by hand: x_0_hat is held in [-1, 1], and eps_hat is what
    remains of x_t, so that both still make up x_t."""
    times = torch.tensor([1.0, 0.5])
    alpha, next_alpha = SDE.alpha(times)
    sigma, next_sigma = SDE.sigma(times)
    start = plain_noise(3)(4)
    x0 = ((1 - 0.9 * sigma) / alpha * start).clamp(-1, 1)
    eps = (start - alpha * x0) / sigma
    x = next_alpha * x0 + next_sigma * eps
    want = (1 - 0.9 * next_sigma) / next_alpha * x
    assert want.abs().min() < 1 < want.abs().max()
    got = draw("ddim", 2, lambda x, t: 0.9 * x, 3, 4, clamp=True)
    assert torch.allclose(got, want.clamp(-1, 1), atol=1e-4)


def test_euler_maruyama_has_the_raw_score():
    """[Sec. 4.1] One step by hand, which adds no noise at its end: x + beta (x/2 + score) dt. Only
    the result is clamped, not x_0_hat, which is beyond 50 here."""
    x = plain_noise(50)(4)
    score = -0.49 * x / math.sqrt(1 - alpha_squared(1.0))
    want = x + 20 * 0.999 * (0.5 * x + score)
    assert want.abs().min() < 1 < want.abs().max()
    got = draw("euler-maruyama", 1, lambda x, t: 0.49 * x, 50, 4, clamp=True)
    assert torch.allclose(got, want.clamp(-1, 1), atol=1e-4)


def test_euler_maruyama_leaves_no_grain():
    """[Sec. 4.1] By the exact score of one grey picture, the 100 steps that are the default leave
    noise of 0.8 to 1.3 of 255 grey levels."""
    decoder = diffmvae.DiffusionDecoder(tiny(weighting="likelihood"))
    decoder.eps = lambda x_t, t, z: gaussian_eps(0.3, 0.0)(x_t, t)
    levels = 127.5 * (decoder.sample(None, plain_noise(5)) - 0.3)
    assert 0.8 < levels.std() < 1.3
    assert abs(levels.mean()) < 0.1


# === §4 DiffMVAE and its two ways of sampling [Eq. 5] [Sec. 3.3] [Sec. 3.4] ===

# A model whose likelihood is known: z ~ N(0, 1), x_i = SLOPES[i] z + STDS[i] noise, seen at POINT
SLOPES = np.array([1.0, -0.8, 0.9])
STDS = np.array([0.6, 0.5, 0.7])
POINT = np.array([1.2, 0.3, -0.4])


class LinearGaussian(nn.Module):
    """The expert and the exact decoder of a modality; the three share the prior's precision."""

    def __init__(self, slope, std):
        super().__init__()
        self.slope = slope
        self.std = std

    def forward(self, x):
        precision = self.slope ** 2 / self.std ** 2 + 1 / 3
        mu = self.slope / self.std ** 2 / precision * x
        return torch.cat([mu, torch.full_like(x, -math.log(precision))], 1)

    def nll(self, z, x, weighting):
        return -Normal(self.slope * z, self.std).log_prob(x).squeeze(1)


class ExactScoreDecoder(diffmvae.DiffusionDecoder):
    """The real diffusion decoder with the exact score of modality 0 in place of its network."""

    def eps(self, x_t, t, z):
        return gaussian_eps(SLOPES[0] * z, STDS[0] ** 2)(x_t, t)


def linear_model(n):
    """The model with linear-Gaussian experts and decoders, and POINT n times."""
    model = model_of(tiny(beta=1.0, attr_weight=1.0))
    x = {}
    for name, slope, std, value in zip(FACE, SLOPES, STDS, POINT.tolist()):
        model.encoders[name] = LinearGaussian(slope, std)
        model.decoders[name] = model.encoders[name]
        x[name] = torch.full((n, 1), value)
    return model, x


def log_evidence():
    """log p(x) of the linear-Gaussian model at POINT: x ~ N(0, w w' + diag s^2)."""
    covariance = np.outer(SLOPES, SLOPES) + np.diag(STDS ** 2)
    quadratic = POINT @ np.linalg.solve(covariance, POINT)
    return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])


def posterior_of(subset):
    """q(z|x_A) of the linear-Gaussian model in closed form."""
    precision = subset @ (SLOPES ** 2 / STDS ** 2 + 1 / 3)
    mean = subset @ (SLOPES / STDS ** 2 * POINT) / precision
    return Normal(mean.item(), precision.item() ** -0.5)


def ends_of_time(q):
    """What [Eq. 5] leaves out for modality 0, averaged over z ~ q: KL(q(x_1|x) || p(x_1|z)), and
    -log p(x|x_t, z) at t_min."""
    variance = STDS[0] ** 2
    squared = (POINT[0] - SLOPES[0] * q.mean) ** 2 + SLOPES[0] ** 2 * q.variance
    last = alpha_squared(1.0)
    marginal = last * variance + 1 - last
    prior = 0.5 * (math.log(marginal / (1 - last)) - 1 + (1 - last + last * squared) / marginal)
    ratio = alpha_squared(1e-3) / (1 - alpha_squared(1e-3))
    precision = 1 / variance + ratio                             # of x, given x_t and z
    error = squared / (variance * precision) ** 2 + ratio / precision ** 2
    return prior + 0.5 * (math.log(2 * math.pi / precision) + precision * error)


def draw_only(monkeypatch, subset):
    """Let the objective know no other subset than this."""
    monkeypatch.setattr(diffmvae, "all_subsets", lambda m, device: torch.tensor([subset]).bool())


@pytest.mark.parametrize("subset", SUBSETS)
def test_eq5_is_log_evidence_for_the_exact_posterior(monkeypatch, subset):
    """[Eq. 5] With the exact score and what it leaves out at the ends of time, Eq. 5 is log p(x)
    for the exact q(z|x), and for q(z|x_A) it is lower by KL(q(z|x_A) || p(z|x))."""
    draw_only(monkeypatch, subset)
    model, x = linear_model(400_000)
    model.decoders["image"] = ExactScoreDecoder(tiny())
    torch.manual_seed(0)
    q = posterior_of(subset)
    bound = -model.neg_elbo(x, "likelihood")["total"] - ends_of_time(q)
    gap = kl_divergence(q, posterior_of([1, 1, 1])).item()
    assert gap > 0.1 or all(subset)                              # so a wrong q would be seen
    assert_mean(bound, log_evidence() - gap)
    assert bound.std() / math.sqrt(400_000) < 0.03               # the estimate is sharp


def test_eq4_is_tight(monkeypatch):
    """[Eq. 3] [Eq. 4] With feed-forward decoders, E_q log p(x|z) - KL(q || p(z)) is log p(x) for
    the exact q."""
    draw_only(monkeypatch, [1, 1, 1])
    model, x = linear_model(100_000)
    torch.manual_seed(0)
    assert_mean(-model.neg_elbo(x, None)["total"], log_evidence())


WEIGHTS = dict(beta=0.3, attr_weight=7.0, text_weight=5.0)


def weighted(terms, x):
    """The sum of the modalities' terms with the weights above; each is one number a sample."""
    total = 0
    for name, values in x.items():
        assert terms[name].shape == (len(values),)
        total = total + {"attr": 7, "text": 5}.get(name, 1) * terms[name]
    return total


@pytest.mark.parametrize("dataset,decoder", [
    ("celeba", "diffusion"), ("celeba", "feedforward"), ("cub", "diffusion")])
def test_terms_of_the_objective(x, dataset, decoder):
    """[Eq. 4] [Eq. 5] Terms are one number a sample; the total is their weighted sum plus beta
    times the mean KL over all subsets, whichever was drawn."""
    model = randomise(model_of(tiny(dataset, decoder=decoder, **WEIGHTS)))
    x = {name: values[:14] for name, values in x.items()}        # a multiple of the 7 subsets
    terms = model.neg_elbo(x, "simple")
    assert set(terms) == {*x, "kl", "total"}
    mu, logvar = model.encode(x)
    kls = []
    for subset in diffmvae.all_subsets(len(x)):
        kls.append(kl_divergence(product_of(mu, logvar, subset), STANDARD).sum(1))
    torch.testing.assert_close(terms["kl"], torch.stack(kls).mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["total"], weighted(terms, x) + 0.3 * terms["kl"])


def test_subsets_are_drawn_uniformly_per_sample():
    """[Eq. 5] omega_A = 1/7, and each sample has a subset of its own: of sure experts with the
    means 0, 2 and 10, the mean of the product tells which were drawn."""
    model = model_of(tiny())
    mu = torch.tensor([0.0, 2.0, 10.0]).view(1, 3, 1).expand(70_000, 3, 1)
    model.encode = lambda x: (mu, torch.full_like(mu, -25.0))
    model.reconstruct = lambda z, x, weighting, bound: {"image": z[:, 0]}
    torch.manual_seed(0)
    z = model.neg_elbo({}, "simple")["image"]
    means, counts = (6 * z).round().unique(return_counts=True)
    assert means.tolist() == [0, 6, 12, 24, 30, 36, 60]
    assert torch.allclose(counts / 10_000, torch.tensor(1.0), atol=0.05)  # 5 deviations


@pytest.mark.parametrize("bound,want", [(False, 10.0), (True, 20.0)])
def test_bound_of_the_image(faces, bound, want):
    """[Eq. 5] A diffusion decoder gets the weighting, here a number to tell it by; `bound` takes
    its bound_8bit instead, and leaves the other decoders."""
    model = model_of(tiny())
    model.decoders["image"].nll = lambda z, x, weighting: weighting
    model.decoders["image"].bound_8bit = lambda z, x: 20.0
    assert model.neg_elbo(faces, 10.0, bound)["image"] == want


@pytest.mark.parametrize("dataset,weights", [
    ("celeba", (0.7, 0.3, 0.1)), ("cub", (0.55, 0.45, 0.1))])
def test_mvtcae_objective(x, dataset, weights):
    """The baseline's three weights, z of the product of all experts, and the KLs of this product
    to each expert and to N(0, I)."""
    model = randomise(model_of(tiny(dataset, decoder="feedforward", **WEIGHTS)))
    torch.manual_seed(1)
    terms = model.neg_mvtcae(x, "simple")
    mu, logvar = model.encode(x)
    q = product_of(mu, logvar, slice(None))
    torch.manual_seed(1)
    z = q.mean + q.stddev * torch.randn_like(q.mean)
    image = model.decoders["image"].nll(z, x["image"])
    torch.testing.assert_close(terms["image"], image)
    kl = weights[2] * kl_divergence(q, STANDARD).sum(1)
    for i in range(len(x)):
        expert = Normal(mu[:, i], torch.exp(0.5 * logvar[:, i]))
        kl = kl + weights[1] * kl_divergence(q, expert).sum(1)
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-4, atol=1e-4)
    total = weights[0] * weighted(terms, x) + 0.3 * kl
    torch.testing.assert_close(terms["total"], total)


def test_prior_expert_joins_the_full_subset_only():
    """[Sec. 3.3] --prior-expert multiplies N(0, I), one more expert of zeros, into the product of
    all modalities, and into no other."""
    experts = double_normal(2, 1, 3, 16)
    model = model_of(tiny(prior_expert=True))
    with_zeros = F.pad(experts, (0, 0, 0, 1))
    full = product_of(*with_zeros, [0, 1, 2, 3])
    part = product_of(*experts, [0, 2])
    for subset, want in (([1, 1, 1], full), ([1, 0, 1], part)):
        mu, logvar = model.fuse(*experts, torch.tensor([subset]).bool())
        assert torch.allclose(mu, want.mean)
        assert torch.allclose(logvar.exp(), want.variance)


def test_posterior_of_what_is_there(faces):
    """[Sec. 3.3] Experts of absent modalities are NaN; the posterior is the product of the others,
    in the order of the setup whatever that of x, and its gradients are finite."""
    model = randomise(model_of(tiny()))
    given = {"attr": faces["attr"], "mask": faces["mask"]}
    assert model.encode(given)[0][:, 0].isnan().all()
    mu, logvar = model.posterior(given)
    want = product_of(*model.encode(faces), [1, 2])
    assert torch.allclose(mu, want.mean, atol=1e-5)
    assert torch.allclose(logvar.exp(), want.variance, atol=1e-5)
    (mu + logvar).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.encoders["attr"].parameters())


@pytest.mark.parametrize("names", [[], ["sound"], ["image", "text"]])
def test_posterior_of_what_cannot_be(faces, names):
    """[Sec. 3.3] Nothing at all and modalities that the setup lacks are refused by their names."""
    x = dict.fromkeys(names, faces["image"])
    with pytest.raises(ValueError, match=re.escape(f"{names}: expected some of image, mask")):
        model_of(tiny()).posterior(x)


def test_conditional_z_is_a_sample_of_the_posterior():
    """[Sec. 3.3] z comes from the posterior of what is given, here N(1, e) and N(5, e), and the n
    results of an item follow one another."""
    model = model_of(tiny())
    model.posterior = lambda given: (torch.tensor([[1.0], [5.0]]), torch.ones(2, 1))
    model.decode = lambda z, noise: z.squeeze(1)
    z = model.sample_conditional({}, 10_000, seeded())
    assert z.shape == (20_000,)
    assert_mean(z[:10_000], 1.0)
    assert_mean(z[10_000:], 5.0)
    assert_mean((z[:10_000] - 1) ** 2, math.e)


@pytest.mark.parametrize("sampler", diffmvae.SAMPLERS)
def test_a_picture_depends_on_its_own_seed_not_its_batch(faces, sampler):
    """[Sec. 3.3] [Sec. 3.4] The first two pictures are the same in a batch of two and of five, and
    differ from one another, whether something is given or not."""
    model = randomise(model_of(tiny()))
    how = dict(names=["image"], sampler=sampler, steps=4)
    pictures = {}
    for n in (2, 5):
        given = {"mask": faces["mask"][:n]}
        from_mask = model.sample_conditional(given, 1, seeded(7), **how)
        from_prior = model.sample_unconditional(n, "aux", seeded(7), **how)
        pictures[n] = torch.stack([from_mask["image"], from_prior["image"]])
    assert torch.allclose(pictures[5][:, :2], pictures[2], atol=1e-4)
    assert (pictures[2][:, 0] - pictures[2][:, 1]).abs().mean() > 0.01


def test_captions_can_be_given_again():
    """[Sec. 3.3] Sampled captions are like those of the data, so they can be given again; only
    what is named is made."""
    birds = toy("cub", 3)
    model = randomise(model_of(birds.config))
    image = birds.tensors(np.arange(3))["image"]
    made = model.sample_conditional({"image": image}, names=["text"])
    assert list(made) == ["text"]
    assert made["text"].shape == (3, 2, 32)
    again = model.sample_conditional(made, 2, steps=1)
    assert again["image"].shape == (6, 3, 16, 16)


def test_priors():
    """[Sec. 3.4] z is a sample of the auxiliary model, whose mean is moved to 5 here, unless the
    prior is "gaussian", N(0, I); there is no other."""
    model = randomise(model_of(tiny()))
    model.aux.mean.fill_(5.0)
    model.decode = lambda z, noise: z
    z = model.sample_unconditional(500, generator=seeded())
    assert z.shape == (500, 16)
    assert z.mean() > 3
    z = model.sample_unconditional(500, "gaussian", seeded()).flatten()
    assert_mean(z, 0.0)
    assert_mean(z ** 2, 1.0)
    with pytest.raises(ValueError, match="uniform"):
        model.sample_unconditional(1, "uniform")


AUX_SHAPES = pytest.mark.parametrize("kind,shape", [
    ("2d", (1, 4, 4)), ("1d", (1, 16)), ("mlp", (16,))])


def standardised(kind):
    """An auxiliary model of z with the mean 3 and the standard deviation 2."""
    aux = randomise(model_of(tiny(aux_network=kind))).aux
    aux.mean.fill_(3.0)
    aux.std.fill_(2.0)
    return aux


@AUX_SHAPES
def test_auxiliary_network(kind, shape):
    """[Sec. 3.4] [Sec. 4.2] The network sees z as a picture, a row or a vector and predicts v =
    alpha eps - sigma z_0, from which sigma z_t + alpha v is eps. Every number of eps depends on
    every number of z."""
    aux = standardised(kind)
    z_t = torch.randn(1, *shape, generator=seeded())
    t = torch.tensor([0.5])
    alpha2 = alpha_squared(0.5)
    v = aux.network(z_t, t)
    want = math.sqrt(1 - alpha2) * z_t + math.sqrt(alpha2) * v
    assert torch.allclose(aux.eps(z_t, t), want, atol=1e-5)
    slopes = torch.autograd.functional.jacobian(lambda z_t: aux.eps(z_t, t), z_t)
    assert slopes.shape == (1, *shape, 1, *shape)
    assert (slopes != 0).float().mean() > 0.9


@AUX_SHAPES
def test_auxiliary_loss_is_on_standardised_samples(kind, shape):
    """[Sec. 3.4] [Eq. 1] z ~ N(mu, e^logvar) enters the loss less the mean and by the std. Its
    target is E[eps | z_t, mu, logvar], so the exact predictor of each z has no loss."""
    aux = standardised(kind)
    mean = torch.randn(4000, *shape, generator=seeded())
    posteriors = (3 + 2 * mean.flatten(1), torch.zeros(4000, 16))  # standardised, 1/2 wide
    aux.eps = gaussian_eps(mean, 0.25)
    losses = aux.loss(*posteriors, "simple")
    assert losses.shape == (4000,)
    assert losses.max() < 1e-5
    aux.sde.loss = lambda eps_net, z0, weighting, mean_eps: (z0 - mean, weighting)
    noise, weighting = aux.loss(*posteriors, "v")
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert weighting == "v"


@AUX_SHAPES
def test_auxiliary_samples(kind, shape):
    """[Sec. 3.4] Sampling undoes the standardisation, by 50 steps of DDIM: for z standardised to
    N(0, I) each of them shrinks z by a known factor, and x_0_hat is not clamped."""
    aux = standardised(kind)
    aux.eps = gaussian_eps(0.0, 1.0)
    z = aux.sample(plain_noise(4000))
    angles = np.arccos(np.sqrt(alpha_squared(np.linspace(1, 0, 51))))
    assert z.shape == (4000, 16)
    assert z.mean().item() == pytest.approx(3, abs=0.05)
    assert z.std().item() == pytest.approx(2 * np.cos(np.diff(angles)).prod(), rel=0.005)


# === §5 Decoders: p(x_i|z) [Eq. 4] [Eq. 5] ===

@pytest.mark.parametrize("name", FACE)
def test_feed_forward_likelihoods(faces, name):
    """[Eq. 4] images are Gaussians of variance 1/2, masks and attributes independent Bernoulli
    variables, all summed in nats. Samples are the mean in [-1, 1] and the more probable values."""
    decoder = randomise(model_of(tiny(decoder="feedforward"))).decoders[name]
    z = 30 * torch.randn(16, 16, generator=seeded())             # some means are beyond [-1, 1]
    out = decoder(z)
    if name == "image":
        distribution = Normal(out, math.sqrt(0.5))
        sample = out.clamp(-1, 1)
    else:
        distribution = Bernoulli(logits=out)
        sample = (out.sigmoid() > 0.5).float()
    nll = -distribution.log_prob(faces[name]).flatten(1).sum(1)
    assert torch.allclose(decoder.nll(z, faces[name]), nll, rtol=1e-5)
    assert torch.equal(decoder.sample(z), sample)


def test_diffusion_loss_at_initialisation():
    """[Eq. 1] the output layer starts at zero, so v = 0 and eps_hat = sigma x_t. The error is then
    alpha (alpha eps - sigma x_0), whose mean over t and eps is known."""
    decoder = model_of(tiny()).decoders["image"]
    torch.manual_seed(0)
    losses = decoder.nll(torch.randn(512, 16), torch.full((512, 3, 16, 16), 0.5), "simple")
    t = np.linspace(0.001, 1, 100_001)
    alpha2 = np.exp(-(0.1 * t + 9.95 * t ** 2))
    error = 768 * alpha2 * (alpha2 + (1 - alpha2) * 0.5 ** 2)    # a picture has 768 numbers
    assert_mean(losses, np.trapezoid(error, t) / 0.999)


def test_nll_8bit_is_a_distribution():
    """The probabilities of the 256 values sum to one, for means beyond the values as well."""
    values = torch.arange(256).view(256, 1) / 127.5 - 1
    for mean, std in ((0.0, 0.7), (0.3, 0.01), (-2.0, 0.3), (5.0, 0.02)):
        nll = diffmvae.nll_8bit(values, torch.tensor(mean), torch.tensor(std))
        assert nll.isfinite().all()
        assert torch.logsumexp(-nll, 0).item() == pytest.approx(0, abs=1e-6)


def test_nll_8bit_is_density_times_width():
    """In the middle of the values a bin's probability is the density times the width 2/255, and
    the pixels of one picture are summed."""
    x = torch.tensor([[0.2, -0.1]])
    mean = torch.tensor([[0.3, 0.1]])
    want = -Normal(mean, 0.5).log_prob(x).sum(1) - 2 * math.log(2 / 255)
    assert torch.allclose(diffmvae.nll_8bit(x, mean, torch.tensor(0.5)).float(), want, atol=1e-4)


def test_image_bound_is_tight_for_the_exact_score(monkeypatch):
    """[Eq. 2] with both ends of time, the bound of 8-bit Gaussian pictures of variance 0.09 is
    their entropy plus KL(q(x_1) || N(0, I)) for the exact score, and more for a wrong one."""
    monkeypatch.setattr(diffmvae.VPSDE, "beta_max", 2.0)         # so that this KL is not zero
    grey = (0.3 * torch.randn(200, 3, 16, 16, generator=seeded()) + 1) * 127.5
    x = grey.round() / 127.5 - 1
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.09) + math.log(127.5)
    last = 1 - 0.91 * math.exp(-1.05)                            # the variance at t = 1
    want = 768 * (entropy + 0.5 * (last - 1 - math.log(last)))

    def bound(variance):
        def eps(x_t, t, z):
            sigma2 = SDE.sigma(t) ** 2
            factor = sigma2.sqrt() / ((1 - sigma2) * variance + sigma2)
            return factor.view(-1, 1, 1, 1) * x_t

        decoder = diffmvae.DiffusionDecoder(tiny())
        decoder.eps = eps
        torch.manual_seed(0)
        return decoder.bound_8bit(None, x)

    assert bound(0.09).mean().item() == pytest.approx(want, rel=0.005)
    assert bound(0.2).mean() > 1.01 * want


def test_greedy_captions():
    """A caption has the most probable token after all those before it, as one pass over the whole
    caption finds it, and nothing but padding after <EOS>."""
    decoder = randomise(model_of(tiny("cub"))).decoders["text"]
    for p in decoder.parameters():
        p.data *= 4                                              # it is sure of itself
    decoder.gpt.transformer.wte.weight.data[2] *= 3              # and some captions end
    z = torch.randn(64, 16, generator=seeded(1))
    ids = decoder.sample(z)[:, 1]
    likeliest = decoder.logits(z, ids[:, :-1], decoder.remember(z)).argmax(2)
    ended = (ids[:, :-1] == 2).cumsum(1) > 0                     # <EOS> is there or before
    assert (ids[:, 0] == 1).all()                                # <BOS>
    assert torch.equal(ids[:, 1:], likeliest.masked_fill(ended, 0))  # <PAD>
    assert 0 < ended[:, -1].sum() < 64


def test_text_decoder_starts_with_z_in_its_memory_only():
    """The map of z into the words starts at zero, that into the memory with Optimus's 0.02."""
    decoder = model_of(tiny("cub")).decoders["text"]
    assert not decoder.embed.weight.any()
    assert decoder.memory.weight.std().item() == pytest.approx(0.02, rel=0.1)


# === §6 Networks [Sec. 4.1] [Sec. 4.2] ===

def every_subset():
    """Every setup with every choice of modalities that can be given."""
    cases = []
    for dataset, names in (("celeba", FACE), ("cub", ("image", "text"))):
        for number in range(1, 2 ** len(names)):
            given = [name for k, name in enumerate(names) if number >> k & 1]
            cases.append((dataset, given))
    return cases


@pytest.mark.parametrize("dataset,given", every_subset())
@pytest.mark.parametrize("decoder", ["diffusion", "feedforward"])
def test_every_subset_to_everything(x, dataset, given, decoder):
    """[Sec. 3.3] whatever is given, all modalities come out, two results an item, with the shapes
    and the ranges of the data."""
    model = randomise(model_of(tiny(dataset, decoder=decoder)))
    part = {name: x[name][:3] for name in given}
    made = model.sample_conditional(part, 2, seeded(), steps=3)
    assert list(made) == list(x)
    for name, values in made.items():
        assert values.shape == (6, *x[name].shape[1:])
    assert made["image"].abs().max() <= 1


@pytest.mark.parametrize("aux_network", ["1d", "2d", "mlp"])
@pytest.mark.parametrize("dataset", SETUPS)
@pytest.mark.filterwarnings("error")                             # transformers renames arguments
def test_gradients_reach_everything(x, dataset, aux_network):
    """[Eq. 5] the diffusion term alone moves every encoder, and the objectives of both stages
    together move every parameter, all with finite gradients. All channels that enter a convolution
    of the image's UNet have a part, those of its skips too."""
    model = randomise(model_of(tiny(dataset, aux_network=aux_network))).train()
    torch.manual_seed(0)
    terms = model.neg_elbo(x, "likelihood")
    terms["image"].mean().backward(retain_graph=True)
    for name, p in model.encoders.named_parameters():
        if not name.endswith("key.bias"):  # these biases of BERT cancel in the softmax
            assert p.grad.any(), name
    terms["total"].mean().backward()
    model.aux.loss(*torch.randn(2, 16, 16), "simple").mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.any(), name
        assert p.grad.isfinite().all(), name
        if "unet.levels" in name and p.dim() == 4:
            assert p.grad.sum((0, 2, 3)).all(), name


def count(*nets):
    """How many parameters networks have together."""
    return sum(p.numel() for p in nn.ModuleList(nets).parameters())


@pytest.mark.parametrize("dataset,size,aux", [
    ("celeba", 128, (1, 16, 16)), ("cub", 64, (1, 768))])
def test_published_sizes(dataset, size, aux):
    """[Sec. 4.1] [Sec. 4.2] sizes are the paper's, the image encoder of faces has the 18.46
    million parameters of Soft-IntroVAE's and the text parts those of Optimus's. Nothing of ours
    is in the paper's [Eq. 5]."""
    with torch.device("meta"):
        model = diffmvae.DiffMVAE(diffmvae.preset_config(dataset, "paper"))
    c = model.config
    assert (c.image_size, model.aux.shape) == (size, aux)
    assert (c.optimizer, c.warmup, c.beta, c.prior_expert) == ("adam", 0, 1, False)
    assert (c.attr_weight, c.text_weight) == (1, 1)
    if dataset == "celeba":
        assert round(count(model.encoders["image"]) / 1e6, 2) == 18.46
    else:
        assert count(model.encoders["text"], model.decoders["text"]) == 241_599_744


def test_text_encoder_by_hand():
    """In the small preset a word is its embedding plus a convolution over three words, then BERT
    reads them, its first token is pooled, and padding has no part in any of it."""
    encoder = model_of(tiny("cub")).encoders["text"].eval()
    text = toy("cub", 16).tensors(np.arange(16))["text"]
    table = encoder.bert.embeddings.word_embeddings
    got = encoder(text)
    for k in range(16):
        ids = text[k:k + 1, 0]
        words = table(ids[ids != 0]).unsqueeze(0)                # (1, T, width)
        words = words + F.conv1d(words.mT, encoder.mix.weight, padding=1).mT
        want = encoder.head(encoder.bert(inputs_embeds=words).pooler_output)
        assert torch.allclose(got[k], want[0], atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2])
def test_attention_is_the_librarys(dims):
    """Self-attention over the places of rows and pictures is PyTorch's, with two heads of 32
    channels, and the input is added."""
    block = randomise(diffmvae.Attention(64, dims))
    h = 3 * torch.randn(2, 64, *[5] * dims, generator=seeded())
    x = F.group_norm(h, 8, block.norm.weight, block.norm.bias)
    q, k, v = block.qkv(x).view(2, 3, 2, 32, -1).mT.unbind(1)    # (2, heads, P, 32) each
    attended = F.scaled_dot_product_attention(q, k, v).mT.reshape(h.shape)
    assert torch.allclose(block(h), h + block.proj(attended), atol=1e-5)


def test_unet_starts_at_zero():
    """The output layer and the last layer of every branch start at zero, so v starts at zero."""
    unet = model_of(tiny()).decoders["image"].unet
    assert not unet(torch.randn(1, 3, 16, 16), torch.rand(1), torch.randn(1, 16)).any()
    for name, p in unet.named_parameters():
        if "proj" in name or "conv2" in name:
            assert not p.any(), name


def test_time_enters_as_waves_of_1000_t():
    """Time enters as the cosines, then the sines, of 1000 t / 10000^(k / 8) for a width of 16."""
    embedding = diffmvae.TimeEmbedding(16)
    embedding.layers = nn.Identity()
    angles = 370 / 10_000 ** (np.arange(8) / 8)
    waves = [*np.cos(angles), *np.sin(angles)]
    assert np.allclose(embedding(torch.tensor([0.37]))[0], waves, atol=1e-3)


def test_latent_mlp():
    """The auxiliary model's MLP keeps the shape of z_t and sees t."""
    network = randomise(diffmvae.LatentMLP(16, 32))
    z_t = torch.randn(5, 16, generator=seeded())
    early = network(z_t, torch.zeros(5))
    late = network(z_t, torch.ones(5))
    assert early.shape == (5, 16)
    assert not torch.allclose(early, late, atol=1e-3)


# === §7 Captions: tokens, pretrained weights [Sec. 4.1] ===

def test_small_tokenizer_gives_any_text_back():
    """Tokens give any text back, <BOS> and <EOS> stand at its ends, and a long text is cut."""
    config = tiny("cub")
    texts = ["a small red bird.", "qué? 95% 'zébra'.", "a " * 100]
    ids, cut = diffmvae.tokenize(texts, config)
    assert ids.shape == (3, 2, 32)
    assert cut == 1
    assert diffmvae.captions_of(ids[:2], config) == texts[:2]
    assert (ids[:, :, 0] == 1).all()
    assert (ids == 2).sum() == 6                                 # one <EOS> a row, cut or not


def test_captions_have_one_shape():
    """Captions are (n, 2, L) from everywhere: what the decoder wrote, read again by a different
    tokenizer for the encoder, is what tokenize() makes of its text."""
    letters = diffmvae.small_tokenizer(["a red bird."], 270)     # hardly more than 256 bytes
    config = tiny("cub", tokenizers=(letters, bird_tokenizer()))
    texts = ["this bird has red wings.", "a blue bird.", "bill " * 12]
    ids, cut = diffmvae.tokenize(texts, config)
    ids = torch.from_numpy(ids)
    assert cut == 1                                              # the last, for the encoder alone
    assert torch.equal(diffmvae.with_encoder_tokens(ids[:, 1], config), ids)
    assert diffmvae.captions_of(ids[:2], config) == texts[:2]


WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK] Red a and bill bird black blue curved has head red small
    this wings with .""".split()
CAPTIONS = ["this small bird has red wings.", "a bird with a blue head and a curved black bill."]


def write_optimus(folder, part, state):
    """Write one half of Optimus's download: -> its folder."""
    folder = folder / f"checkpoint-{part}-508523"
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return str(folder)


@pytest.fixture
def optimus(tmp_path):
    """A small Optimus, two layers of 16 channels, as its authors stored it, and the tokenizers
    of BERT, with the words above, and of GPT-2, with letters, as the hub has them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
    letters = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]   # 0 to 256
    files = {
        "bert-base-cased/config.json": '{"model_type": "bert"}',
        "bert-base-cased/vocab.txt": "\n".join(WORDS),
        "gpt2/config.json": '{"model_type": "gpt2"}',
        "gpt2/vocab.json": json.dumps({letter: k for k, letter in enumerate(letters)}),
        "gpt2/merges.txt": "#version: 0.2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(
        vocab_size=21, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.3)).eval()
    gpt = GPT2LMHeadModel(GPT2Config(
        vocab_size=260, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    encoder = bert.state_dict()
    encoder["linear.weight"] = torch.randn(32, 16)
    decoder = gpt.state_dict()
    decoder["transformer.linear.weight"] = 0.3 * torch.randn(32, 16)
    decoder["transformer.linear_emb.weight"] = 0.3 * torch.randn(16, 16)
    config = tiny("cub", text_length=64, text_mix=0, vocab=(21, 260), special=(257, 258, 259))
    sources = (write_optimus(tmp_path, "encoder", encoder),
               write_optimus(tmp_path, "decoder", decoder))
    return SimpleNamespace(bert=bert, gpt=gpt, encoder=encoder, decoder=decoder, config=config,
                           sources=sources)


def start_from(folder, config, sources):
    """How a training starts from these sources: -> the averages, captions as tokens."""
    config = diffmvae.pretrained_tokenizers(config, sources)
    run = diffmvae.start_training(folder, config, SimpleNamespace(device=CPU), [], False, sources)
    ids, _ = diffmvae.tokenize(CAPTIONS, config)
    return run.ema, torch.from_numpy(ids).long()


def test_optimus_encoder(tmp_path, optimus):
    """[Sec. 4.1] from Optimus's checkpoint the encoder is BERT without padding, its pooled first
    token and Optimus's linear layer."""
    model, text = start_from(tmp_path, optimus.config, optimus.sources)
    pooled = optimus.bert(text[:, 0], (text[:, 0] > 0).long()).pooler_output
    want = pooled @ optimus.encoder["linear.weight"].T
    assert torch.allclose(model.encoders["text"](text), want, atol=1e-5)


def split_heads(a):
    """(B, T, width) -> (B, 2 heads, T, d)."""
    return a.unflatten(2, (2, -1)).transpose(1, 2)


def optimus_logits(optimus, z, ids):
    """What Optimus's decoder computes: -> logits (B, T, V). It is GPT-2 but that in both layers a
    memory of z is key and value of one position in front."""
    gpt = optimus.gpt.transformer
    memory = z @ optimus.decoder["transformer.linear.weight"].T
    in_words = z @ optimus.decoder["transformer.linear_emb.weight"].T
    length = ids.shape[1]
    x = gpt.wte(ids) + gpt.wpe.weight[1:length + 1] + in_words.unsqueeze(1)
    visible = torch.ones(length, length + 1).tril(1).bool()
    for slot, layer in zip(memory.view(2, 2, 1, 16).unbind(1), gpt.h):
        q, k, v = layer.attn.c_attn(layer.ln_1(x)).chunk(3, 2)   # (B, T, 16) each
        k = torch.cat([slot, k], 1)
        v = torch.cat([slot, v], 1)
        y = F.scaled_dot_product_attention(split_heads(q), split_heads(k), split_heads(v), visible)
        x = x + layer.attn.c_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.ln_2(x))
    return optimus.gpt.lm_head(gpt.ln_f(x))


def test_optimus_decoder(tmp_path, optimus):
    """[Sec. 4.1] from Optimus's checkpoint the decoder has the loss of Optimus's logits, with z in
    the memory of every layer and in every word; the loss is the caption's with <EOS>."""
    model, text = start_from(tmp_path, optimus.config, optimus.sources)
    z = torch.randn(2, 16, generator=seeded())
    ids = text[:, 1]
    assert ids[:, 0].tolist() == [258, 258]                      # <BOS>
    logits = optimus_logits(optimus, z, ids[:, :-1])
    error = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    want = (error * (ids[:, 1:] != 257)).sum(1)                  # no <PAD>
    assert torch.allclose(model.decoders["text"].nll(z, text), want, rtol=1e-5)


def test_pretrained_tokenizers_see_tidy_captions(optimus):
    """Captions are made lower case before the cased tokenizers, and a blank stands in front of
    the decoder's first word, as Optimus has it."""
    config = diffmvae.pretrained_tokenizers(optimus.config, optimus.sources)
    (upper, lower), _ = diffmvae.tokenize(["Red", "red."], config)
    assert np.array_equal(upper, lower)
    assert (lower[1] < 257).sum() == len(" red.")                # a token a letter


def test_pretrained_text_that_does_not_fit(tmp_path, optimus):
    """Tokenizers of other sizes, and a checkpoint that lacks a tensor, are the user's errors."""
    other = replace(optimus.config, vocab=(100, 260))
    with pytest.raises(diffmvae.UserError, match="tokens, not"):
        diffmvae.pretrained_tokenizers(other, optimus.sources)
    del optimus.decoder["transformer.linear.weight"]
    write_optimus(tmp_path, "decoder", optimus.decoder)
    with pytest.raises(diffmvae.UserError, match="missing memory.weight"):
        start_from(tmp_path, optimus.config, optimus.sources)


def test_start_from_the_hub(tmp_path, optimus, monkeypatch):
    """[Sec. 4.1] from the hub's names BERT and GPT-2 are theirs, and GPT-2 gets three more words;
    Optimus's own layers are not asked for."""
    optimus.gpt.resize_token_embeddings(257)
    optimus.bert.save_pretrained(tmp_path / "bert-base-cased")
    optimus.gpt.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    model, _ = start_from(tmp_path, optimus.config, diffmvae.TEXT_MODELS)
    for name, p in optimus.bert.named_parameters():
        assert torch.equal(p, model.encoders["text"].bert.get_parameter(name))
    words = model.decoders["text"].gpt.transformer.wte.weight
    assert torch.equal(words[:257], optimus.gpt.transformer.wte.weight)


# === §9 Training ===

@pytest.fixture
def no_probe(monkeypatch):
    """Training without figures and pictures on the way."""
    monkeypatch.setattr(diffmvae, "coherence", lambda *_: {})
    monkeypatch.setattr(diffmvae, "sample_pictures", lambda *_, **__: None)


def watch(monkeypatch, place, name):
    """Record the calls of a function that goes on as before: -> the list of their arguments."""
    calls = []
    original = getattr(place, name)

    def watched(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(place, name, watched)
    return calls


def change_call(monkeypatch, place, name, number, change):
    """Let change(result) be the result of that call, counted from 1, of a function."""
    calls = []
    original = getattr(place, name)

    def changed(*args):
        result = original(*args)
        calls.append(args)
        if len(calls) == number:
            return change(result)
        return result

    monkeypatch.setattr(place, name, changed)


def assert_same_run(folder, other):
    """Two runs have the same weights, averages and log, bit by bit."""
    one = diffmvae.read_checkpoint(folder / "checkpoint.pt")
    two = diffmvae.read_checkpoint(other / "checkpoint.pt")
    assert one["log"] == two["log"]
    for kind in ("model", "ema"):
        for name, value in one[kind].items():
            assert torch.equal(value, two[kind][name]), name


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_bfloat16_where_the_processor_has_it(monkeypatch, name):
    """On CPUs training is in bfloat16 if either set of instructions for it is there."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    with diffmvae.autocast(CPU):
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("shape,scale", [((40, 3, 3, 3), math.sqrt(40 / 27)), ((20, 64), 1)])
def test_muon_step_by_hand(shape, scale):
    """The second step goes along U V^T of Nesterov's average, with a rate that grows with the
    ratio of rows to columns if there are more rows."""
    first, second = torch.randn(2, *shape, generator=seeded())
    p = nn.Parameter(torch.zeros(shape))
    optimizer = diffmvae.Muon([p])
    optimizer.param_groups[0]["lr"] = 0.5
    for gradient in (first, second):
        before = p.detach().clone()
        p.grad = gradient
        optimizer.step()
    nesterov = second + 0.95 * (second + 0.95 * first)           # but for a factor of 0.05
    u, _, vt = torch.linalg.svd(nesterov.flatten(1), full_matrices=False)
    moved = u.T @ (before - p.detach()).flatten(1) @ vt.T / (0.5 * scale)
    assert torch.allclose(moved.diag(), torch.tensor(0.95), atol=0.35)
    assert torch.allclose(moved, moved.diag().diag(), atol=1e-4)


def test_muon_moves_matrices_and_adam_the_rest(tmp_path, monkeypatch, no_probe):
    """Without Muon's steps the large matrices of the encoders keep their weights, and all else
    moves; Muon has its own rate and belongs to stage 1."""
    rates = []

    def stand_still(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(diffmvae.Muon, "step", stand_still)
    config = train_tiny(tmp_path, optimizer="muon", muon_lr=0.5, lr_warmup=1)
    assert len(rates) == 6
    assert rates[0] == 0.5
    found = diffmvae.read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    for name, p in model_of(config, config.seed).encoders.named_parameters("encoders"):
        is_matrix = len(p) >= 16 and p[0].numel() >= 16
        assert torch.equal(p, found[name]) == is_matrix, name


def test_adam_has_a_tiny_eps():
    """Adam's eps is far below the smallest gradients of a clipped step."""
    assert diffmvae.adam([nn.Parameter(torch.zeros(1))]).defaults["eps"] == 1e-12


def test_averages_and_rates_in_closed_form(tmp_path, monkeypatch, no_probe):
    """Averages of weights that jump to zero are the product of all decays times the start. The
    rates of both stages warm up, then follow a cosine to zero. Gradients are clipped to one."""
    rates = []

    def jump_to_zero(optimizer):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        assert sum(p.grad.square().sum() for p in group["params"]) < 1.001
        for p in group["params"]:
            p.data.zero_()

    monkeypatch.setattr(torch.optim.Adam, "step", jump_to_zero)
    config = train_tiny(tmp_path, "cub", ema=0.3, lr=1.0, lr_warmup=3, optimizer="adam")
    averages = averaged_weights(tmp_path)
    decays = [0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3]                  # the smaller of 0.3 and a ramp
    for name, p in model_of(config, config.seed).named_parameters():
        steps = 4 if name.startswith("aux.") else 6
        assert torch.allclose(averages[name], math.prod(decays[:steps]) * p, atol=1e-6), name
    want = []
    for total in (6, 4):
        k = np.arange(total)
        want.extend(np.minimum(1, (k + 1) / 3) * (1 + np.cos(np.pi * k / total)) / 2)
    assert rates == pytest.approx(want)


def test_averages_of_batch_norm():
    """The statistics of batch norm are averaged like weights, and its counter is copied."""
    ours = nn.BatchNorm1d(2)
    theirs = nn.BatchNorm1d(2)
    theirs.running_mean.fill_(4.0)
    theirs.num_batches_tracked.fill_(7)
    diffmvae.average(ours, theirs, 0.75)
    assert ours.running_mean.tolist() == [1, 1]
    assert ours.num_batches_tracked == 7


def test_warmup_comes_first(tmp_path, monkeypatch, no_probe):
    """Stage 1 minimises [Eq. 5] with the error of v in the warm-up and with the chosen lambda(t)
    after it; stage 2 goes on to [Eq. 1]."""
    calls = watch(monkeypatch, diffmvae.DiffMVAE, "neg_elbo")
    aux_calls = watch(monkeypatch, diffmvae.AuxiliaryModel, "loss")
    train_tiny(tmp_path, warmup=0.5, weighting="likelihood")
    assert [call[2] for call in calls] == ["v"] * 3 + ["likelihood"] * 3
    assert [call[3] for call in aux_calls] == ["v"] * 2 + ["simple"] * 2


def test_mvtcae_has_its_own_objective(tmp_path, monkeypatch, no_probe):
    """Stage 1 minimises MVTCAE's objective in every step if the configuration says so."""
    calls = watch(monkeypatch, diffmvae.DiffMVAE, "neg_mvtcae")
    train_tiny(tmp_path, objective="mvtcae")
    assert len(calls) == 6


def test_every_second_batch_is_mirrored(tmp_path, monkeypatch, no_probe):
    """If mirrored pictures are as good, the second, fourth ... batch has its images and masks
    turned from left to right, and the attributes stay."""
    calls = watch(monkeypatch, diffmvae.DiffMVAE, "neg_elbo")
    train_tiny(tmp_path)
    train_tiny(tmp_path, mirror=True)
    for step in range(6):
        plain = calls[step][1]
        mirrored = calls[6 + step][1]
        if step % 2 == 1:
            plain["image"] = plain["image"].flip(3)
            plain["mask"] = plain["mask"].flip(3)
        for name in FACE:
            assert torch.equal(plain[name], mirrored[name])


def test_no_noise_comes_twice(tmp_path, monkeypatch, no_probe):
    """Every step of every stage of every seed has random numbers of its own."""
    numbers = []
    monkeypatch.setattr(diffmvae, "average", lambda *_: numbers.append(torch.initial_seed()))
    for seed in (0, 1):
        train_tiny(tmp_path, seed=seed)
    assert len(set(numbers)) == 20


def three_posteriors(model, data):
    """Posteriors N(k, e^k) for k = 0, 1, 2, of the averages, which are never in training mode."""
    assert not model.training
    k = torch.arange(3.0).view(3, 1).expand(3, 16)
    return k, k


def test_auxiliary_model_learns_the_posteriors(tmp_path, monkeypatch, no_probe):
    """[Sec. 3.4] every batch of stage 2 has posteriors of random items, and the auxiliary model
    standardises their samples: mean 1, variance 1 + (1 + e + e^2) / 3."""
    monkeypatch.setattr(diffmvae, "all_posteriors", three_posteriors)
    calls = watch(monkeypatch, diffmvae.AuxiliaryModel, "loss")
    train_tiny(tmp_path, aux_batch_size=3000)
    _, mu, logvar, _ = calls[0]
    assert mu.shape == (3000, 16)
    assert torch.equal(mu, logvar)
    assert not torch.equal(mu, calls[1][1])
    assert mu.unique().tolist() == [0, 1, 2]
    std = math.sqrt(1 + (1 + math.e + math.e ** 2) / 3)
    checkpoint = diffmvae.read_checkpoint(tmp_path / "checkpoint.pt")
    for kind in ("model", "ema"):
        assert torch.allclose(checkpoint[kind]["aux.mean"], torch.tensor(1.0))
        assert torch.allclose(checkpoint[kind]["aux.std"], torch.tensor(std))


def test_posteriors_of_all_captions(monkeypatch):
    """[Sec. 3.4] stage 2 has the posterior of every training item with each of its captions."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)     # float32
    model = randomise(model_of(tiny("cub")))
    data = toy("cub", 16)
    got = torch.stack(diffmvae.all_posteriors(model, data))
    assert got.shape == (2, 100, 16)                             # 10 items, 10 captions each
    for choice in range(10):
        want = torch.stack(model.posterior(data.tensors(np.arange(10), choice)))
        assert torch.allclose(got[:, 10 * choice:10 * choice + 10], want, atol=1e-5)


def test_log_and_figures_come_in_time(tmp_path, monkeypatch):
    """The log has a row every log_every steps and at a stage's end. Figures and a picture come
    from the averages every probe_every steps of stage 1 and at its end, on validation rows, of
    which 40 is the first."""
    monkeypatch.setattr(diffmvae, "coherence", lambda model, data, rows: {
        "training": model.training, "first": int(rows[0])})
    train_tiny(tmp_path, log_every=3, probe_every=4)
    log = read_log(tmp_path)
    losses = [(row["stage"], row["step"]) for row in log if "total" in row]
    assert losses == [(1, 3), (1, 6), (2, 3), (2, 4)]
    for row, step in ((1, 4), (3, 6)):
        assert log[row] == {"stage": 1, "step": step, "training": False, "first": 40}
        assert (tmp_path / "samples" / f"train-00000{step}.png").exists()


def test_finite_means():
    """A row of the log has means over the steps since the last one."""
    run = SimpleNamespace(stage=1, step=2)
    values = torch.tensor([[1.0, 4.0], [3.0, 8.0]])
    assert diffmvae.finite_means(run, ["total", "grad"], values) == {"total": 2, "grad": 6}


@pytest.mark.parametrize("place,name,term", [
    (diffmvae, "kl_to_standard_normal", "kl"), (nn.utils, "clip_grad_norm_", "grad")])
def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch, no_probe, place, name, term):
    """Training ends at a number that is not finite, names it and its step, and saves nothing of
    it. Numbers are looked at every second step here."""
    change_call(monkeypatch, place, name, 3, lambda result: result * math.nan)
    with pytest.raises(diffmvae.UserError, match=f"stage 1, step 3: {term} is not finite"):
        train_tiny(tmp_path, save_every=2)
    assert diffmvae.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def fail(*args):
    """What a full disk does."""
    raise OSError("no space left on device")


@pytest.mark.parametrize("place,name", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, no_probe, place, name):
    """A checkpoint that cannot be written leaves the one before it and no other file."""
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    monkeypatch.setattr(place, name, fail)
    with pytest.raises(diffmvae.UserError, match="written, what was there is kept .*no space"):
        train_tiny(tmp_path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_load_gives_the_averages(tmp_path, no_probe):
    """load() gives the averaged weights in eval mode, and the configuration of the training."""
    config = train_tiny(tmp_path)
    model = diffmvae.load(tmp_path / "checkpoint.pt")
    assert (model.training, model.config) == (False, config)
    for name, value in averaged_weights(tmp_path).items():
        assert torch.equal(value, model.state_dict()[name])


def test_one_flipped_bit_in_a_checkpoint_is_noticed(tmp_path, no_probe):
    """A flipped bit in a stored tensor is found by its checksum and is a user's error."""
    train_tiny(tmp_path)
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        offsets = {member.file_size: member.header_offset for member in archive.infolist()}
    size = max(offsets)
    content = bytearray(path.read_bytes())
    content[offsets[size] + size // 2] ^= 1                      # its header is far shorter
    path.write_bytes(content)
    with pytest.raises(diffmvae.UserError, match="or damaged .*the checksum of .* is wrong"):
        diffmvae.read_checkpoint(path)


def test_checkpoints_that_do_not_fit(tmp_path, no_probe):
    """No checkpoint, one whose weights do not fit and one of another version are told apart."""
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(diffmvae.UserError, match="no checkpoint yet; train first"):
        diffmvae.load(path)
    train_tiny(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    for name, message in (("latent", "do not fit together"), ("halves", "not a checkpoint of")):
        checkpoint["config"][name] = 32
        torch.save(checkpoint, path)
        with pytest.raises(diffmvae.UserError, match=message):
            diffmvae.load(path)


@pytest.mark.parametrize("dataset", SETUPS)
def test_resume_is_bitwise(tmp_path, monkeypatch, no_probe, dataset):
    """A training that is stopped saves and leaves, and one that crashes loses the steps since the
    last checkpoint. Resumed, both end with the weights and the log of one that ran through. The
    eighth step is the second of stage 2."""
    monkeypatch.setattr(diffmvae.time, "time", float)            # seconds in the log are zero
    whole = tmp_path / "whole"
    config = train_tiny(whole, dataset, dropout=0.1, log_every=1, save_every=3)
    data = toy(dataset)
    for calls, crash, place in ((4, False, (1, 4)), (5, True, (1, 3)), (8, False, (2, 2))):
        folder = tmp_path / f"{calls}"
        stop = []

        def interrupt(result):
            stop.append(15)
            if crash:
                fail()

        with monkeypatch.context() as patch:
            change_call(patch, diffmvae, "average", calls, interrupt)
            try:
                diffmvae.train(folder, config, data, stop)
            except OSError:
                assert crash
        checkpoint = diffmvae.read_checkpoint(folder / "checkpoint.pt")
        assert (checkpoint["stage"], checkpoint["step"]) == place
        diffmvae.train(folder, config, data, [], resume=True)
        assert_same_run(folder, whole)


def test_stop_after_the_save_was_decided(tmp_path, monkeypatch, no_probe):
    """A stop that comes while step 4, which is not saved, is logged lets one more step go by, and
    that one is saved."""
    stop = []

    def stop_now(means):
        stop.append(15)
        return means

    change_call(monkeypatch, diffmvae, "finite_means", 2, stop_now)
    diffmvae.train(tmp_path, tiny(), toy(), stop)
    assert diffmvae.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def nearest(a, b):
    """For every row of a the number of the nearest row of b."""
    return torch.cdist(a.flatten(1), b.flatten(1)).argmin(1)


def test_coherence_of_known_decoders():
    """The gap is what the z of another row costs with the same noise. A model that reads pictures
    rightly has a perfect "image->text", and one that draws other rows' pictures has a poor
    "text->image"."""
    data = toy("cub")
    rows = np.arange(12)
    x = data.tensors(rows)
    model = model_of(tiny("cub"))
    own = torch.randn(12, 16, generator=seeded())                # the z of every row

    def posterior(given):
        return own[nearest(given["image"], x["image"])], torch.full((12, 16), -30.0)

    def noisy_error(z, *_):
        return (nearest(z, own) != torch.arange(12)) + torch.rand(12)

    def draw_others(given, **options):
        assert list(given) == ["text"]
        return {"image": x["image"].roll(1, 0)}

    model.posterior = posterior
    model.sample_conditional = draw_others
    model.decoders["image"].nll = noisy_error
    model.decoders["text"].nll = noisy_error
    model.decoders["text"].sample = lambda z: x["text"][nearest(z, own)]
    figures = diffmvae.coherence(model, data, rows)
    for name in ("image", "text"):
        assert 0 < figures[f"{name} loss"] < 1
        assert figures[f"{name} gap"] == 1
    assert figures["image->text"] == 1
    assert 0 < figures["text->image"] < 0.9


# === §8 Modalities and data ===

OWN = 40                                        # items of a data set of one's own
OWN_NAMES = ("striped", "tall", "old")
OWN_SPLIT = {name: rows.tolist() for name, rows in three_splits(OWN).items()}


def write_own(folder, *names, **meta):
    """Write a data set of one's own: pictures, and of masks, attributes and captions those in
    `names`. meta: more of meta.json. -> the folder."""
    folder.mkdir()
    birds = toy_arrays("cub", OWN)
    np.save(folder / "image.npy", birds["image"])
    if "mask" in names:
        np.save(folder / "mask.npy", toy_arrays("celeba", OWN)["mask"])
    if "attr" in names:
        bits = np.random.default_rng(0).integers(0, 2, (OWN, len(OWN_NAMES)), np.uint8)
        np.save(folder / "attr.npy", bits)
        meta["attributes"] = OWN_NAMES
    if "text" in names:
        (folder / "text.json").write_text(json.dumps(birds["text"]))
    (folder / "meta.json").write_text(json.dumps({"split": OWN_SPLIT, **meta}))
    return folder


@pytest.fixture
def tiny_presets(monkeypatch):
    """The small preset of faces, and the judge, are as small as those of the other tests."""
    sizes = {**diffmvae.PRESETS["celeba"]["small"], **TINY, **TINY_TEXT}
    monkeypatch.setitem(diffmvae.PRESETS["celeba"], "small", sizes)
    monkeypatch.setattr(diffmvae, "JUDGE_STEPS", 4)


def run_own(folder, *words):
    """A command on the data set in that folder, which has to succeed."""
    place = ["--dataset", "celeba", "--data", folder, "--run", folder / "run"]
    code, _, err = run_command(*place, *words)
    assert code == 0, err


def use_own(folder, names):
    """Train on the data set in that folder, sample from nothing and from each modality, evaluate:
    -> the model, as its checkpoint has it, and the figures."""
    sizes = ["--steps", 3, "--aux-steps", 2, "--batch-size", 8]
    fast = ["--sampler-steps", 1]
    run_own(folder, "--train", "--preset", "small", *sizes)
    run_own(folder, "--sample", "uncond", *fast)
    for name in names:
        run_own(folder, "--sample", "cond", "--given", name, *fast)
        assert (folder / f"run/samples/given-{name}-seed0.png").exists()
    run_own(folder, "--eval", "--eval-repeats", 1, *fast)
    figures = json.loads((folder / "run/eval.json").read_text())["figures"]
    for values in figures.values():
        assert np.isfinite(values).all()
    return diffmvae.load(folder / "run/checkpoint.pt"), figures


@pytest.mark.parametrize("names", [
    ("image", "mask"),
    ("image", "attr"),
    ("image", "attr", "text"),
])
def test_own_data(tmp_path, tiny_presets, names):
    """A folder of one's own is trained on, sampled from each modality and evaluated, whichever
    files it has. The model keeps its modalities and the names of its attributes."""
    folder = write_own(tmp_path / "own", *names)
    model, figures = use_own(folder, names)
    assert model.config.modalities == names
    assert model.config.attributes == (OWN_NAMES if "attr" in names else ())
    assert (model.config.toy, model.config.mirror) == (False, False)
    assert tuple(model.encoders) == tuple(model.decoders) == names
    for name in names[1:]:
        assert f"image from {name}: FD-judge" in figures
        assert f"{name} from image: F1" in figures
        assert f"Eq. 5 bound: {name}, nats" in figures


# Depth: begin
class Depth(diffmvae.Modality):
    """Depth maps, stored as (N, H, W), 0 for near and 255 for far; a Gaussian likelihood."""
    file = "depth.npy"
    mirrored = True

    def load(self, path, n, size, meta):
        return diffmvae.load_array(path, (n, size, size))

    def tensor(self, rows):
        return rows.unsqueeze(1) / 127.5 - 1                     # (B, 1, H, W)

    def networks(self, c):
        encoder = diffmvae.conv_encoder(1, c.mask_channels, c.mask_pooling, c)
        decoder = diffmvae.conv_decoder(1, c.mask_channels, c.mask_pooling, c)
        return encoder, diffmvae.GaussianDecoder(decoder)

    def parse(self, word, c):
        pixels = data_prep.read_picture(Path(word), c.image_size)[..., 0]
        return self.tensor(torch.tensor(pixels).unsqueeze(0))    # (1, 1, H, W)

    def draw(self, value, c):
        return Image.fromarray(diffmvae.eight_bits(value[0]).cpu().numpy())
# Depth: end


def test_own_modality(tmp_path, monkeypatch, tiny_presets):
    """A subclass of Modality and an entry in MODALITIES add a modality, which is modelled, sampled
    from nothing and from itself, evaluated, read from files and mirrored like the others."""
    depth = Depth()
    monkeypatch.setitem(diffmvae.MODALITIES, "depth", depth)
    folder = write_own(tmp_path / "own", mirror=True)
    y, x = np.indices((16, 16))
    maps = np.stack([10 * x + 5 * y + k for k in range(OWN)]).astype(np.uint8)
    np.save(folder / "depth.npy", maps)
    model, figures = use_own(folder, ["depth"])
    assert model.config.modalities == ("image", "depth")
    assert "image from depth: FD-patch" in figures
    assert "image from depth: FD-judge" not in figures           # a judge could read nothing
    assert "Eq. 5 bound: depth, nats" in figures
    data = diffmvae.Data(diffmvae.read_prepared(folder), model.config, CPU)
    item = data.tensors(np.array([3]))
    mirrored = data.mirror(item)["depth"][0]
    assert np.array_equal(depth.draw(item["depth"][0], None), maps[3])
    assert np.array_equal(depth.draw(mirrored, None), maps[3][:, ::-1])
    Image.fromarray(maps[3]).save(folder / "own.png")
    assert torch.equal(depth.parse(folder / "own.png", model.config), item["depth"])


def test_prepared_folder_is_what_was_written(tmp_path):
    """Arrays come as they were saved, without being read into memory; splits, attributes and
    whether to mirror come from meta.json, and modalities in the order of MODALITIES."""
    folder = write_own(tmp_path / "own", "mask", "attr", "text", mirror=True)
    stored = diffmvae.read_prepared(folder)
    for name in FACE:
        assert isinstance(stored.arrays[name], np.memmap)
        assert np.array_equal(stored.arrays[name], np.load(folder / f"{name}.npy"))
    assert stored.arrays["text"] == toy_arrays("cub", OWN)["text"]
    for name, rows in stored.split.items():
        assert rows.tolist() == OWN_SPLIT[name]
    stored.arrays = dict(reversed(stored.arrays.items()))
    assert stored.settings() == dict(
        toy=False, modalities=(*FACE, "text"), attributes=OWN_NAMES, image_size=16, mirror=True,
        data_checksum=stored.checksum())


def assert_not_complete(folder, words):
    """Reading the folder is a UserError in one line, which has these words."""
    with pytest.raises(diffmvae.UserError) as caught:
        diffmvae.read_prepared(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: not a complete data set (")
    assert words in message
    assert "\n" not in message


def zeros(*shape, dtype=np.uint8):
    """An array of zeros."""
    return np.zeros(shape, dtype)


@pytest.mark.parametrize("file,content,words", [
    ("mask.npy", zeros(39, 16, 16), "mask.npy has uint8 (39, 16, 16), not uint8 (40, 16, 16)"),
    ("mask.npy", zeros(40, 16, 16, dtype=float), "mask.npy has float64 (40, 16, 16), not uint8"),
    ("mask.npy", zeros(40, 16, 16) + np.uint8(2), "mask.npy has values up to 2, not 0 and 1"),
    ("mask.npy", zeros(16, 16, 40).T, "mask.npy is in Fortran order"),
    ("image.npy", zeros(40, 16, 12, 3), "image.npy has uint8 (40, 16, 12, 3), not uint8 (40, 16"),
    ("attr.npy", zeros(40, 4), "attr.npy has uint8 (40, 4), not uint8 (40, 3)"),
    ("attr.npy", zeros(40, 3) + np.uint8(2), "attr.npy has values up to 2, not 0 and 1"),
    ("text.json", [["a"]] * 39, "text.json has not 40 lists of captions, equally many each"),
    ("text.json", [["a"]] * 39 + [["a", "b"]], "text.json has not 40 lists of captions, equally"),
    ("text.json", [[]] * 40, "text.json has not 40 lists of captions, equally many each"),
])
def test_prepared_files_that_do_not_fit(tmp_path, file, content, words):
    """An array of another shape, type, order or range, or captions of unequal counts, are a
    UserError in one line that names folder and file."""
    folder = write_own(tmp_path / "own", "mask", "attr", "text")
    if file.endswith(".npy"):
        np.save(folder / file, content)
    else:
        (folder / file).write_text(json.dumps(content))
    assert_not_complete(folder, words)


@pytest.mark.parametrize("old,new,words", [
    ("tall", "striped", "meta.json names an attribute twice"),
    ("[25, 26, 27, 28, 29, 30, 31]", "[25]", "meta.json: a split has under two rows"),
    ("[25, ", "[24, ", "meta.json: a split has a row that is not one of 0 to 39, or"),
    ("39]", "40]", "meta.json: a split has a row that is not one of 0 to 39, or is there twice"),
    ("[25, ", "[-1, ", "meta.json: a split has a row that is not one of 0 to 39, or"),
    ("split", "spilt", "'split'"),
])
def test_meta_that_does_not_fit(tmp_path, old, new, words):
    """An attribute named twice, a split of under two rows, a row in two splits or in none, and
    what cannot be read are a UserError in one line that says where."""
    folder = write_own(tmp_path / "own", "mask", "attr")
    path = folder / "meta.json"
    path.write_text(path.read_text().replace(old, new))
    assert_not_complete(folder, words)


def test_folder_that_lacks_a_file(tmp_path):
    """Pictures, meta.json and a second modality are needed."""
    folder = write_own(tmp_path / "own", "mask")
    (folder / "mask.npy").unlink()
    assert_not_complete(folder, "a second modality is needed")
    (folder / "image.npy").unlink()
    assert_not_complete(folder, "image.npy")
    (folder / "meta.json").unlink()
    assert_not_complete(folder, "meta.json")


def test_pictures_as_tensors_and_back():
    """[0, 255] is mapped to [-1, 1], colours first; a picture is drawn with its own grey levels,
    and values outside are held at the ends."""
    image = diffmvae.MODALITIES["image"]
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    x = image.tensor(torch.tensor(pixels))
    assert np.allclose(x, pixels.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    assert np.array_equal(image.draw(x[0], None), pixels[0])
    beyond = torch.tensor([-1.5, 0.011, 1.5])
    assert diffmvae.eight_bits(beyond).tolist() == [0, 129, 255]


def test_masks_and_attributes_as_tensors_and_back(faces):
    """Both are 0 and 1. A mask has one channel and is drawn in black and white; attributes are
    written with their names, a line for each."""
    stored = toy_arrays("celeba", 16)
    picture = diffmvae.MODALITIES["mask"].draw(faces["mask"][2], None)
    assert np.array_equal(faces["mask"], stored["mask"][:, None])
    assert np.array_equal(faces["attr"], stored["attr"])
    assert np.array_equal(picture, 255 * stored["mask"][2])
    attr = diffmvae.MODALITIES["attr"]
    config = tiny(attributes=("Wavy_Hair", "tall", "Male"))
    assert attr.draw([1, 0, 1], config) == "Wavy Hair\nMale"
    assert attr.draw([0, 0, 0], config) == "(nothing)"


def test_captions_as_tensors_and_back(capsys):
    """The drawn caption of an item becomes tokens, for encoder and decoder, that give it back."""
    text = diffmvae.MODALITIES["text"]
    data = toy("cub", 16)
    config = data.config
    x = data.tensors(np.array([3, 5]), np.array([7, 2]))["text"]
    want = [data.captions[3][7], data.captions[5][2]]
    assert (x.dtype, x.shape) == (torch.int64, (2, 2, config.text_length))
    assert diffmvae.captions_of(x, config) == want
    assert text.draw(x[0], config).split() == want[0].split()
    assert capsys.readouterr().out == ""
    text.array(data.captions, replace(config, text_length=8))
    assert "160 captions are longer than 8 tokens and are cut" in capsys.readouterr().out


@pytest.mark.parametrize("dataset,names", [("celeba", data_prep.ATTRIBUTES), ("cub", ())])
def test_drawn_toys_have_three_splits(monkeypatch, dataset, names):
    """Toys fill the splits in order, as many as TOY_COUNTS says; they are not mirrored."""
    monkeypatch.setattr(diffmvae, "TOY_COUNTS", {"train": 5, "val": 3, "test": 4})
    stored = diffmvae.draw_toys(dataset, 16)
    split = {name: rows.tolist() for name, rows in stored.split.items()}
    assert split == {"train": [0, 1, 2, 3, 4], "val": [5, 6, 7], "test": [8, 9, 10, 11]}
    assert np.array_equal(stored.arrays["image"], toy_arrays(dataset, 12)["image"])
    assert (stored.toy, stored.mirror, stored.attributes) == (True, False, names)


def test_checksum_tells_data_sets_apart():
    """Other pixels, masks, attributes, captions or rows of a split give another checksum."""
    faces = stored_toys("celeba", 16)
    birds = stored_toys("cub", 16)
    checksums = [faces.checksum(), birds.checksum()]
    assert toy("celeba", 16).checksum == checksums[0]
    faces.split["val"] = faces.split["val"][::-1].copy()
    checksums.append(faces.checksum())
    for name, array in faces.arrays.items():
        faces.arrays[name] = array[::-1].copy()
        checksums.append(faces.checksum())
    birds.arrays["text"] = birds.arrays["text"][::-1]
    checksums.append(birds.checksum())
    assert len(set(checksums)) == 7


def test_description(capsys):
    """Modalities, sizes of the splits, size of pictures, and for each attribute its share of the
    training split."""
    bits = zeros(8, 3)
    bits[:3, 1] = 1
    bits[:, 2] = 1
    arrays = {"image": zeros(8, 16, 16, 3), "attr": bits}
    config = tiny(modalities=("image", "attr"), attributes=OWN_NAMES)
    diffmvae.Data(diffmvae.Stored(arrays, three_splits(8)), config, CPU).describe()
    assert capsys.readouterr().out.splitlines() == [
        "data: image, attr of 5 train, 1 val, 2 test items, 16x16 pixels",
        "attributes: striped 0.00, tall 0.60, old 1.00",
    ]


def test_batches_of_an_epoch_are_a_permutation():
    """An epoch has whole batches of the training split, no row twice; each has its own order,
    which the seed decides. One of ten captions is drawn anew for each row."""
    data = toy("cub", 64)
    batches = [data.batch_rows(12, 5, step) for step in range(6)]
    rows = np.stack([batch[0] for batch in batches])             # (6, 12)
    choice = np.stack([batch[1] for batch in batches])
    assert data.batches(12) == 3  # of 40 rows to train
    for epoch in (rows[:3], rows[3:]):
        assert len(np.unique(epoch)) == 36
        assert set(epoch.flat) <= set(range(40))
    assert not np.array_equal(rows[:3], rows[3:])
    assert not np.array_equal(choice[:3], choice[3:])
    assert set(choice.flat) == set(range(10))
    assert not np.array_equal(data.batch_rows(12, 6, 0)[0], rows[0])


def test_what_a_caption_states():
    """Captions state the words that are frequent in training, in any case. What a picture shows
    is what any of its captions states."""
    captions = [
        ["A red bird with red wings."] * 2,
        ["the bird is Blue", "blue wings"],
        ["green, odd"] * 2,
    ]
    arrays = {"image": zeros(3, 16, 16, 3), "text": captions}
    split = {"train": np.array([0, 1]), "test": np.array([2])}
    data = diffmvae.Data(diffmvae.Stored(arrays, split), tiny("cub"), CPU)
    assert data.vocabulary == ("wings", "blue", "red")
    assert data.stated(["Red wings, red!", "green"]).tolist() == [[1, 0, 1], [0, 0, 0]]
    shown = data.truth(np.array([1, 2]))
    assert list(shown) == ["text"]
    assert shown["text"].tolist() == [[1, 1, 0], [0, 0, 0]]
    birds = toy("cub", 16)                                       # toys have facts instead of words
    assert birds.vocabulary == data_prep.BIRD_FACTS
    assert birds.stated(["a small bird with red wings"]).sum() == 2


def test_common_words():
    """The 50 most frequent words, one count a caption, those of one frequency sorted."""
    captions = ["zebra zebra zebra fox", "fox and owl", "ant"]
    assert diffmvae.common_words(captions) == ("fox", "ant", "owl", "zebra")
    words = [f"z{a}{b}" for a in "abcdef" for b in "abcdefghij"]
    assert diffmvae.common_words([" ".join(words), "zfj"]) == ("zfj", *words[:49])


# === data_prep.py: toys ===

@pytest.mark.parametrize("draw_toys", [data_prep.toy_faces, data_prep.toy_birds])
def test_toy_depends_on_seed_and_number_alone(draw_toys):
    """Toy k is the same in every set that has it; other numbers and seeds give others."""
    many = draw_toys(8, 32, seed=3)
    few = draw_toys(5, 32, seed=3)
    for name in many:
        assert np.array_equal(many[name][:5], few[name])
    pictures = [*many["image"], *draw_toys(8, 32, seed=4)["image"]]
    assert len({picture.tobytes() for picture in pictures}) == 16


def test_toy_attributes_can_be_shown_and_are_not_rare():
    """No bald head has hair, one thing is on top of a head, one colour and one cut belong to its
    hair, and moustaches are for men. Each attribute is in 5 to 60 % of the faces."""
    rng = np.random.default_rng(0)
    drawn = [data_prep.draw_attributes(rng) for _ in range(2000)]
    bits = np.array([list(has.values()) for has in drawn])       # (2000, 18)
    has = dict(zip(data_prep.ATTRIBUTES, bits.T.astype(int)))    # {name: (2000,)}
    colours = sum(has[name] for name in data_prep.HAIR_COLOURS)
    cuts = has["Straight_Hair"] + has["Wavy_Hair"]
    tops = has["Bald"] + has["Bangs"] + has["Receding_Hairline"] + has["Wearing_Hat"]
    for count in (colours, cuts, tops, has["Bald"] + colours, has["Bald"] + cuts):
        assert count.max() == 1
    assert (has["Mustache"] <= has["Male"]).all()
    assert 0.05 < bits.mean(0).min() < bits.mean(0).max() < 0.6


def face_with(*names, size=64, seed=0):
    """A toy face that has these attributes and no other: -> image, mask."""
    has = {name: name in names for name in data_prep.ATTRIBUTES}
    return data_prep.draw_face(has, np.random.default_rng(seed), size)


def differing(a, b):
    """How many pixels of two pictures differ by more than ten grey levels."""
    difference = np.abs(a.astype(int) - b).max(2)
    return (difference > 10).sum()


@pytest.fixture
def flat(monkeypatch):
    """Toys without texture: backgrounds are grey and no material has a pattern."""
    def grey(rng, size, colour, deviation):
        real_background(rng, size, colour, deviation)  # so that the same numbers are drawn
        return Image.new("RGB", (4 * size, 4 * size), GREY)

    real_background = data_prep.out_of_focus
    monkeypatch.setattr(data_prep, "out_of_focus", grey)
    monkeypatch.setattr(data_prep.Pen, "add_texture", skip)


GREY = (128, 128, 128)


def skip(*args):
    """Do nothing."""


@pytest.mark.parametrize("name", data_prep.ATTRIBUTES)
def test_every_attribute_is_visible(flat, name):
    """An attribute changes more than 20 of 4096 pixels, whatever else is drawn."""
    for seed in range(5):
        plain, _ = face_with(seed=seed)
        shown, _ = face_with(name, seed=seed)
        assert differing(plain, shown) > 20


@pytest.mark.parametrize("cut", ["Straight_Hair", "Wavy_Hair"])
def test_texture_of_faces(request, cut):
    """Strands run through the hair, clothes have a pattern and backgrounds vary, but skin stays
    clean, and the mask is the same. It has hair and clothes, and not the skin of the face."""
    textured, mask = face_with("Blond_Hair", "Male", cut)
    request.getfixturevalue("flat")
    plain, same_mask = face_with("Blond_Hair", "Male", cut)
    hair = (plain == data_prep.HAIR_COLOURS["Blond_Hair"]).all(2)
    background = (plain == GREY).all(2)
    shirt = np.index_exp[58:64, 6:14]
    cheek = np.index_exp[36:40, 21:24]
    assert np.array_equal(mask, same_mask)
    assert mask[hair].all()
    assert mask[shirt].all()
    assert not mask[background].any()
    assert not mask[cheek].any()
    assert not face_with()[1][cheek].any()
    blue = textured[..., 2].astype(float)  # of plain hair 95, so never cut off
    assert 80 < blue[hair].var() < 400
    assert blue[background].var() > 100
    assert blue[shirt].var() > 50
    assert np.ptp(plain[shirt], (0, 1)).max() == 0
    assert np.ptp(textured[cheek], (0, 1)).max() == 0


def forty_lighter(x, y):
    """A texture that adds 40 grey levels."""
    return np.full(len(x), 40.0)


def test_textures_stay_within_the_grey_levels():
    """What a texture would make lighter than white is white."""
    pen = data_prep.Pen(Image.new("RGB", (32, 32), (250, 5, 128)))
    pen.add_texture(0, forty_lighter)
    assert pen.image.getpixel((3, 4)) == (255, 45, 168)


def bird_with(seed=0, **choices):
    """A toy bird of those choices, the others being the first of each."""
    bird = {name: values[0] for name, values in data_prep.BIRD_CHOICES.items()}
    bird.update(choices)
    return data_prep.draw_bird(bird, np.random.default_rng(seed), 64)


def all_choices():
    """(name, value) of everything that a caption can say and that is not a first choice."""
    pairs = []
    for name, values in data_prep.BIRD_CHOICES.items():
        pairs += [(name, value) for value in values[1:]]
    return pairs


@pytest.mark.parametrize("name,value", all_choices())
def test_every_choice_of_a_bird_is_visible(name, value):
    """Another size, colour or shape changes more than 10 of 4096 pixels."""
    for seed in range(3):
        assert differing(bird_with(seed), bird_with(seed, **{name: value})) > 10


@pytest.mark.parametrize("wings,sign", [("black", 1), ("white", -1)])
def test_texture_of_wings_is_not_clipped(request, wings, sign):
    """Dark wings get lighter and light ones darker, so that a pattern fits into 0 to 255."""
    textured = bird_with(wings=wings, size="large").astype(float)
    request.getfixturevalue("flat")
    plain = bird_with(wings=wings, size="large")
    wing = (plain == data_prep.BIRD_COLOURS[wings]).all(2)
    assert wing.sum() > 100
    greys = textured[wing][:, 0]
    assert sign * (greys - plain[wing][:, 0]).mean() > 10
    assert 60 < greys.var() < 500
    assert 0 < greys.min() < greys.max() < 255


def test_captions_of_toys_are_true():
    """Ten captions a bird, all different. Seven state everything that is drawn, three state some
    of it, and none states anything else."""
    nouns = ("bird", "bird", "wings", "head", "belly", "beak", "beak", "crown")
    for k, ten in enumerate(data_prep.toy_birds(100, 8)["text"]):
        rng = np.random.default_rng((0, k))
        drawn = set()
        for values, noun in zip(data_prep.BIRD_CHOICES.values(), nouns):
            value = values[rng.integers(len(values))]
            if value:
                drawn.add(f"{value} {noun}")
        stated = [data_prep.facts_of(text) for text in ten]
        assert len(set(ten)) == 10
        assert stated[:7] == [drawn] * 7
        for some in stated[7:]:
            assert set() < some < drawn


def test_facts_of_captions_of_ones_own():
    """Adjectives belong to the noun of their part of the sentence, or else to the last one."""
    text = "This tiny bird has a Red breast and a blue head: black, odd, white"
    want = {"small bird", "red belly", "blue head", "black head", "white head"}
    assert data_prep.facts_of(text) == want
    assert data_prep.facts_of("nothing to see") == set()


def test_content_words():
    """Words of two letters or more, in lower case, each once, without those that say nothing."""
    assert data_prep.content_words("A Red bird's Wing, x red") == {"red", "wing"}


# === data_prep.py: raw data ===

FACE_PARTS = ("skin", "hair", "nose", "cloth")
OFFICIAL_ENDS = (0, 162770, 162771, 182637, 182638, 202598)  # first and last of train, val, test
BIRDS = {"001.Auk": 3, "002.Jay": 2, "003.Tern": 3, "004.Wren": 2}


def noise_picture(rng, colours, size):
    """A smooth picture of that size, enlarged from (height, width) random colours."""
    pixels = rng.integers(0, 256, (*colours, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size)


def draw_raw_faces(folder, n=12, mapping=True, size=64):
    """Write a raw CelebAMask-HQ of n faces, with one attribute too many. Without the mapping file
    the files have other names, all masks share one folder, and 0 stands for -1.
    -> the 18 attributes (n, 18)."""
    images = folder / data_prep.IMAGES
    masks = folder / data_prep.MASKS
    if mapping:
        masks = masks / "0"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["Other", *data_prep.ATTRIBUTES]
    no = -1 if mapping else 0
    values = rng.choice([no, 1], (n, len(names)))
    lines = [str(n), " ".join(names)]
    for k in range(n):
        file = f"{k}.jpg" if mapping or k % 2 else f"{k:05d}.JPEG"
        noise_picture(rng, (4, 4), (2 * size, 2 * size)).save(images / file)
        for j, part in enumerate(FACE_PARTS):
            mask = np.zeros((size, size, 3), np.uint8)
            mask[16 * j:16 * j + 16, :32] = 255
            Image.fromarray(mask).save(masks / f"{k:05d}_{part}.png")
        lines.append(f"{k}.jpg  " + " ".join(map(str, values[k])))
    (folder / data_prep.ATTRIBUTE_FILE).write_text("\n".join(lines), "utf-8-sig")
    if mapping:
        origin = [*OFFICIAL_ENDS, *range(1, n - 5)]
        rows = [f"{k} {number} {number + 1:06d}.jpg" for k, number in enumerate(origin)]
        text = "\n".join(["idx orig_idx orig_file", *rows])
        (folder / data_prep.MAPPING_FILE).write_text(text)
    return values[:, 1:]


def captions_of_bird(name):
    """Ten captions that say whose they are; every other one has no full stop."""
    return [f"{name}, it's n\u00ba {j}" + "." * (j % 2) for j in range(10)]


def draw_raw_birds(folder, mmvae=False, size=(40, 30)):
    """Write a raw CUB of ten birds in four classes: `images` beside `text_c10`, or as the MMVAE
    code has it, `train` and `test` with a text for each. -> {"<class>/<name>": its picture}."""
    rng = np.random.default_rng(0)
    paths = {}
    (folder / "CUB" / "images").mkdir(parents=True)              # of Reed's archive, no pictures
    for kind, count in BIRDS.items():
        images = folder / "CUB_200_2011" / "images"
        if mmvae:
            images = folder / "cub" / ("test" if kind == "002.Jay" else "train")
        (images / kind).mkdir(parents=True)
        for k in reversed(range(count)):                         # not in the order of the names
            name = f"{kind}/{'b' * (k + 1)}_{k}"
            paths[name] = images / f"{name}.jpg"
            picture = noise_picture(rng, (3, 4), size).convert(("RGB", "L", "CMYK")[k])
            picture.save(paths[name], quality=95)
    if mmvae:
        write_whole_texts(folder / "cub", paths)
    else:
        write_texts(folder / "text_c10", paths)
    return paths


def write_texts(folder, paths):
    """One text for each bird, with blanks and line ends that do not count."""
    for name in paths:
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" " + " \r\n".join(captions_of_bird(name)), "utf-8")


def write_whole_texts(folder, paths):
    """One text for the training birds and one for the others, in the order of the names."""
    texts = {"test": [], "trainval": []}
    for name in sorted(paths):
        part = "test" if name.startswith("002.Jay") else "trainval"
        texts[part] += captions_of_bird(name)
    for part, lines in texts.items():
        (folder / f"text_{part}classes.txt").write_text("\n".join(lines) + "\n", "utf-8")


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("file,mode", [("p.gif", "RGB"), ("k.jpg", "CMYK"), ("w.webp", "RGB")])
def test_pictures_of_any_kind(tmp_path, file, mode):
    """Pictures are read whatever their format and mode."""
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / file)
    assert_looks_like(PIXELS, tmp_path / file)


def test_pictures_as_they_look(tmp_path):
    """Pictures are turned as EXIF says, and are on white where they are transparent."""
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees
    Image.fromarray(PIXELS).save(tmp_path / "e.jpg", exif=exif)
    assert_looks_like(np.rot90(PIXELS, -1), tmp_path / "e.jpg")
    alpha = np.full((64, 64, 1), 255, np.uint8)
    alpha[:, 32:] = 0
    Image.fromarray(np.dstack([PIXELS, alpha])).save(tmp_path / "a.png")
    assert_looks_like(np.where(alpha, PIXELS, 255), tmp_path / "a.png")


def assert_looks_like(pixels, path):
    """The picture in that file is read as these pixels, but for what compression does."""
    read = data_prep.read_picture(path, 64).astype(float)
    assert np.abs(read - pixels).mean() < 8


@pytest.mark.parametrize("file,kind", [("deep.png", np.uint16), ("float.tif", np.float32)])
def test_pictures_of_more_than_8_bits(tmp_path, file, kind):
    """They are refused, as their grey levels would be cut off."""
    Image.fromarray(PIXELS[..., 0].astype(kind)).save(tmp_path / file)
    with pytest.raises(diffmvae.UserError, match="grey of 16 or 32 bits; save it with 8"):
        data_prep.read_picture(tmp_path / file, 64)


MASK = np.kron(np.random.default_rng(1).random((8, 8)) < 0.3, np.ones((8, 8))).astype(np.uint8)


def disguises():
    """The same mask in every mode that people have."""
    on = 255 * MASK
    none = 0 * MASK
    white = none + 255
    colours = Image.fromarray(MASK).convert("P")
    colours.putpalette([0, 0, 0, 0, 200, 0])                     # black and green
    arrays = [
        MASK,
        np.where(MASK, 255, 12).astype(np.uint8),
        np.dstack([none, none, on]),
        np.dstack([white, white, white, on]),
        np.dstack([none, none, none, on]),
        on.astype(np.uint16) * 100,
    ]
    return [colours, Image.fromarray(on).convert("1"), *map(Image.fromarray, arrays)]


@pytest.mark.parametrize("picture", disguises())
def test_masks_as_people_have_them(tmp_path, capsys, picture):
    """A pixel is in the mask if it is brighter than half of the brightest, in alpha or colour."""
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(data_prep.read_mask([tmp_path / "mask.png"], 64), MASK)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file,size", [("x.jpg", 64), ("x.png", 48)])
def test_masks_with_soft_edges(tmp_path, capsys, file, size):
    """Edges that JPEG or resizing made soft count up to their middle, without a warning."""
    sharp = Image.fromarray(255 * MASK)
    soft = sharp.resize((size, size), Image.Resampling.BILINEAR)
    sharp.save(tmp_path / "sharp.png")
    soft.save(tmp_path / file)
    want = data_prep.read_mask([tmp_path / "sharp.png"], size)
    assert np.array_equal(data_prep.read_mask([tmp_path / file], size), want)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value,words", [(0, "the mask is empty"), (9, "the mask is all on")])
def test_masks_of_one_value(tmp_path, value, words):
    """What is empty or all on is no mask."""
    Image.new("L", (64, 64), value).save(tmp_path / "mask.png")
    with pytest.raises(diffmvae.UserError, match=words):
        data_prep.read_mask([tmp_path / "mask.png"], 64)


@pytest.mark.parametrize("rows,level,warned", [
    (6, 100, False),
    (7, 55, True),
    (7, 45, False),
    (7, 145, True),
    (7, 155, False),
])
def test_photographs_are_no_masks(tmp_path, capsys, rows, level, warned):
    """A file is named on stderr if more than a tenth of its pixels, here of 64 rows, is between
    1/4 and 3/4 of the largest value, here 200."""
    grey = zeros(64, 64)
    grey[40:] = 200
    grey[:rows] = level
    path = tmp_path / "photo.png"
    Image.fromarray(grey).save(path)
    mask = data_prep.read_mask([path], 64)
    assert mask[0].all() == (level > 100)
    said = capsys.readouterr()
    assert said.out == ""
    assert bool(said.err) == warned
    if warned:
        assert said.err == f"{path}: 11 % of the pixels are grey; is it a mask?\n"


@pytest.mark.parametrize("content", [
    "\ufeffa\u00e9 b\r\n\r\nc\n", "a\u00e9\ufffdb\rc \r", "a\u00e9 b\nc",
])
def test_lines_of_texts(tmp_path, content):
    """Texts are utf-8 with any ends of lines, or none; only lines that are not blank count."""
    path = tmp_path / "x.txt"
    path.write_bytes(content.encode())
    assert data_prep.read_lines(path) == ["a\u00e9 b", "c"]


@pytest.mark.parametrize("text,encoding", [
    ("a b\nc", "utf-16"), ("a b\nc", "utf-16-le"), ("a\u00e9 b", "latin-1"),
])
def test_texts_in_other_encodings(tmp_path, text, encoding):
    """They are refused, not misread."""
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(diffmvae.UserError, match="cannot be read as a text in utf-8"):
        data_prep.read_lines(path)


def test_tidy_captions():
    """Models see lower case, plain quotes and dashes, single blanks and one full stop; captions of
    toys are so already."""
    text = "It\u2019s  a \u201cRED\u2013ish\u201d \ud800 bird !"
    assert data_prep.tidy(text) == "it's a \"red-ish\" ? bird."
    for ten in data_prep.toy_birds(40, 16)["text"]:
        assert [data_prep.tidy(text) for text in ten] == ten


def prepare(dataset, folder, *flags):
    """Run data_prep.py on the raw data in `folder`/raw, at 16x16: -> exit code, stdout, stderr."""
    places = ["--raw", folder / "raw", "--out", folder / "out", "--size", 16]
    return run_command("--dataset", dataset, *places, *flags, program=data_prep)


def prepared(*arguments):
    """Do so with success: -> the data set, the names of its items, stdout."""
    code, out, _ = prepare(*arguments)
    assert code == 0
    folder = arguments[1] / "out"
    meta = json.loads((folder / "meta.json").read_text())
    return diffmvae.read_prepared(folder), meta["names"], out


@pytest.mark.parametrize("mapping,n,val,test", [
    (True, 12, [2, 3], [4, 5]),
    (False, 20, [16, 17], [18, 19]),
])
def test_prepare_faces(tmp_path, mapping, n, val, test):
    """[Sec. 4.2] The mask is all parts but the skin, the attributes are 18, and the split is the
    official one where the mapping file is. Names that nearly fit are found, others named."""
    values = draw_raw_faces(tmp_path / "raw", n, mapping)
    (tmp_path / "raw" / data_prep.MASKS / "00099_nose.png").touch()
    stored, names, out = prepared("celeba", tmp_path)
    mask = zeros(16, 16)
    mask[4:, :8] = 1                                             # hair, nose, cloth; not the skin
    assert names == list(range(n))
    assert (stored.arrays["mask"] == mask).all()
    assert np.array_equal(stored.arrays["attr"], values == 1)
    assert stored.attributes == data_prep.ATTRIBUTES
    assert stored.mirror
    assert stored.split["val"].tolist() == val
    assert stored.split["test"].tolist() == test
    assert ("not the official split" in out) != mapping
    assert "1 files of no face and part, the first: 00099_nose.png" in out


def test_all_cores_read_what_one_reads(tmp_path):
    """What several processes read and write is, in the order of the split, what `read` gives."""
    draw_raw_faces(tmp_path / "raw")
    raw = data_prep.RawFaces(tmp_path / "raw", 16)
    stored, _, _ = prepared("celeba", tmp_path)
    for row, name in enumerate(raw.split):
        for kind, value in zip(FACE, raw.read(name)):
            assert np.array_equal(stored.arrays[kind][row], value)


JAYS = {"text_c10/testclasses.txt": "002.Jay", "text_c10/valclasses.txt": "001.Auk"}
AUKS = {"CUB_200_2011/testclasses.txt": "001.Auk\n099.Owl"}


@pytest.mark.parametrize("mmvae,lists,want", [
    (False, {}, "Auk Jay, Tern, Wren"),
    (True, {}, "Auk Tern, Wren, Jay"),
    (False, JAYS, "Auk Tern, Wren, Jay"),
    (False, AUKS, "Jay Tern, Wren, Auk"),
])
def test_prepare_birds(tmp_path, mmvae, lists, want):
    """[Sec. 4.1] Rows have their picture and captions in either layout and are shuffled; classes
    decide the split, those that a file or the folder `test` names are for testing."""
    size = (500, 333) if mmvae else (40, 30)
    paths = draw_raw_birds(tmp_path / "raw", mmvae, size)
    for file, text in lists.items():
        (tmp_path / "raw" / file).write_text(text)
    stored, names, out = prepared("cub", tmp_path)
    assert ("not the official split" in out) != bool(mmvae or lists)
    assert sorted(names) == sorted(paths) != names
    assert_birds(stored, names, paths, 2)
    classes = []
    for rows in stored.split.values():
        found = {names[k][4:].split("/")[0] for k in rows}
        classes.append(" ".join(sorted(found)))
    assert ", ".join(classes) == want
    assert sum(map(len, stored.split.values())) == len(names)


def assert_birds(stored, names, paths, tolerance):
    """Every row has the captions and the picture of its name, the whole picture at 16x16, within
    a mean difference in grey levels."""
    assert stored.arrays["text"] == [captions_of_bird(name) for name in names]
    for name, image in zip(names, stored.arrays["image"]):
        picture = Image.open(paths[name]).convert("RGB")
        want = picture.resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(np.float32(want) - image).mean() <= tolerance


def test_captions_that_do_not_fit_the_pictures(tmp_path):
    """One text for all birds needs ten lines for each picture."""
    draw_raw_birds(tmp_path / "raw", mmvae=True)
    path = tmp_path / "raw/cub/text_testclasses.txt"
    path.write_text(path.read_text() + "one more\n")
    code, _, err = prepare("cub", tmp_path)
    assert code == 2
    assert f"{path}: 21 captions, not 10 for each of the 2 images in test; extract" in err


def test_partial_faces(tmp_path):
    """Faces without a picture or with a damaged mask are a UserError that names five, and nothing
    is kept; --partial leaves them out. Rows and splits stay together."""
    values = draw_raw_faces(tmp_path / "raw", 20, False)
    for k in (2, 4, 6, 8, 12):
        (tmp_path / "raw" / data_prep.IMAGES / f"{k:05d}.JPEG").unlink()
    mask = tmp_path / "raw" / data_prep.MASKS / "00011_hair.png"
    mask.write_bytes(mask.read_bytes()[:50])
    code, _, err = prepare("celeba", tmp_path)
    assert code == 2
    assert "6 of 20 cannot be used: " in err
    assert err.count("cannot be read") == 5
    assert os.listdir(tmp_path) == ["raw"]
    stored, names, _ = prepared("celeba", tmp_path, "--partial")
    kept = [0, 1, 3, 5, 7, 9, 10, *range(13, 20)]
    assert names == kept
    assert np.array_equal(stored.arrays["attr"], values[kept] == 1)
    assert [len(rows) for rows in stored.split.values()] == [10, 2, 2]


def test_partial_birds(tmp_path):
    """So are birds without a picture, with nine captions, or with captions in another encoding."""
    paths = draw_raw_birds(tmp_path / "raw")
    first, second, third, *rest = paths
    texts = tmp_path / "raw/text_c10"
    paths[first].unlink()
    (texts / f"{second}.txt").write_text("a caption\n" * 9)
    (texts / f"{third}.txt").write_bytes(b"\xff\xfe")
    stored, names, out = prepared("cub", tmp_path, "--partial")
    assert "3 of 10 cannot be used: " in out
    assert f"{second}: 9 captions, not 10" in out
    assert sorted(names) == sorted(rest)
    assert_birds(stored, names, paths, 0)


def test_defaults_of_preparing():
    """[Sec. 4.1] [Sec. 4.2] Birds have 64 pixels a side, faces 128, in data/<dataset>."""
    for dataset, size in (("cub", 64), ("celeba", 128)):
        args = data_prep.parse_args(["--dataset", dataset, "--raw", "x"])
        assert (args.size, args.out, args.partial) == (size, Path("data") / dataset, False)


@pytest.mark.parametrize("error,line", [
    (KeyboardInterrupt(), "name: KeyboardInterrupt\n"),
    (diffmvae.UserError("a\nb"), "name: a b\n"),
    (OSError(28, "full"), "name: [Errno 28] full\n"),
])
def test_errors_take_one_line(capsys, error, line):
    """What the user can mend, and Ctrl-C, is one line on stderr and exit code 2."""
    def work():
        raise error

    assert data_prep.exit_code("name", work) == 2
    assert capsys.readouterr() == ("", line)


@needs_real_data
@needs_real_data
def test_real_faces(tmp_path):
    """[Sec. 4.2] The rates of the 18 attributes over all 30,000; 100 real faces go through."""
    values = data_prep.read_attributes(Path(REAL) / data_prep.ATTRIBUTE_FILE)
    rows = np.stack(list(values.values()))
    rates = dict(zip(data_prep.ATTRIBUTES, rows.mean(0).round(3)))
    assert rows.shape == (30_000, 18)
    assert rows.sum(1).mean() == pytest.approx(3.67, abs=0.005)
    assert (rates["Bald"], rates["Heavy_Makeup"], rates["Smiling"]) == (0.024, 0.457, 0.470)
    shutil.unpack_archive(Path(REAL) / "celebamask_mini.tar", tmp_path, filter="data")
    (tmp_path / "CelebAMask-HQ").rename(tmp_path / "raw")
    path = tmp_path / "raw" / data_prep.ATTRIBUTE_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["100", *lines[1:102]]))
    stored, names, _ = prepared("celeba", tmp_path)
    area = stored.arrays["mask"].mean((1, 2))
    assert len(names) == 100
    assert 0.02 < area.min() < area.max() < 0.98


@needs_real_data
@needs_real_data
def test_real_birds(tmp_path):
    """[Sec. 4.1] 1,258 real birds go through with their captions; of the one-file layout's
    captions 9,054 of 9,830 are equal."""
    shutil.unpack_archive(Path(REAL) / "cub_mini.tar", tmp_path / "raw", filter="data")
    stored, names, _ = prepared("cub", tmp_path)
    texts = data_prep.named_files(tmp_path / "raw/text_c10", ".txt")
    captions = {name: data_prep.read_lines(path) for name, path in texts.items()}
    assert len(names) == 1258
    assert stored.arrays["text"] == [captions[name] for name in names]
    lines = data_prep.read_lines(Path(REAL) / "cub_text_testclasses.txt")
    blocks = json.loads((Path(REAL) / "reed_test_filenames_sorted.json").read_text())
    equal = []
    for k, name in enumerate(blocks):
        if name in captions:
            same = np.array(lines[10 * k:10 * k + 10]) == captions[name]
            equal.append(same.sum())
    assert (len(equal), sum(equal), min(equal)) == (983, 9054, 4)
# === §10 Sampling to pictures ===

def test_given_names_stand_for_the_test_split():
    """[Sec. 3.3] Names alone mean items of the test split, so nothing is read from anywhere."""
    names, own = diffmvae.read_given(["mask", "image"], tiny())
    assert names == ["mask", "image"]
    assert own == {}


def test_given_values_are_read():
    """[Sec. 3.3] Values after "=" are the user's own; attributes are named, with blanks too."""
    names, own = diffmvae.read_given(["attr=Smiling, Bald"], tiny())
    chosen = [name for name, bit in zip(diffmvae.ATTRIBUTES, own["attr"][0]) if bit == 1]
    assert names == ["attr"]
    assert chosen == ["Bald", "Smiling"]


@pytest.mark.parametrize("words,message", [
    ("sound", "choose from image, mask, attr"),
    ("sound=a.mp3", "choose from image, mask, attr"),
    ("mask mask", "each once"),
    ("mask attr=Bald", "all of the test split .* or all your own"),
    ("mask attr=Red", "all of the test split .* or all your own"),
    ("attr=Bald mask", "all of the test split .* or all your own"),
    ("attr=Freckles,Bald", "no attribute Freckles; the model knows Bald"),
    ("mask=nowhere.png", "nowhere.png: cannot be read as a mask"),
    ("image=nowhere.png", "nowhere.png: cannot be read as a picture"),
])
def test_unusable_given_is_refused(words, message):
    """What --given cannot mean is a user's error, also a mixture of own values and names."""
    with pytest.raises(data_prep.UserError, match=message):
        diffmvae.read_given(words.split(), tiny())


TOP = 44       # pixels above the first row of a grid
CELL = 134     # height of a row
COLUMN = 174   # width of a column


def drawn_grid(folder, title, columns, config):
    """The pixels of a grid: (H, W, 3)."""
    diffmvae.draw_grid(folder / "grid.png", title, columns, config)
    return np.asarray(Image.open(folder / "grid.png"))


def test_grid_has_a_row_an_item_and_a_column_a_modality(tmp_path, faces):
    """Every item has a row, every modality a column, and pixels are enlarged without blur."""
    image = faces["image"][:3]
    grid = drawn_grid(tmp_path, "", [("", "image", image), ("", "image", image)], tiny())
    assert grid.shape == (TOP + 3 * CELL, 2 * COLUMN + 12, 3)
    enlarged = np.kron(toy_arrays("celeba", 16)["image"][2], np.ones((8, 8, 1), np.uint8))
    for left in (6, 6 + COLUMN):
        third = grid[TOP + 2 * CELL:, left:]
        assert np.array_equal(third[:128, :128], enlarged)


def test_nothing_in_a_grid_leaves_its_place(tmp_path):
    """Captions are wrapped and long lists set smaller, so that they stay in the item's cell; the
    grid is as wide as its title."""
    config = tiny("cub", attributes=diffmvae.ATTRIBUTES)
    caption = "a bird with a red head and a white belly and a blue wing and a black bill"
    text = torch.from_numpy(diffmvae.tokenize([caption], config)[0])
    columns = [("", "text", text), ("", "attr", torch.ones(1, 18))]
    columns.append(("", "image", torch.ones(1, 3, 16, 16)))
    dark = drawn_grid(tmp_path, "m" * 100, columns, config).min(2) < 128
    assert not dark[-2:].any()
    for column, used in enumerate([True, True, False]):
        assert dark[TOP:, COLUMN * column:][:, 6:COLUMN].any() == used
        assert not dark[TOP:, COLUMN * column:][:, :5].any()
    assert dark.any(0).nonzero()[0].max() in range(1000, dark.shape[1] - 3)


@pytest.fixture
def drawn(monkeypatch):
    """What draw_grid is asked for instead of drawing: [path, title, columns, config]."""
    asked = []

    def keep(*arguments):
        asked[:] = arguments

    monkeypatch.setattr(diffmvae, "draw_grid", keep)
    return asked


def assert_columns(columns, labels, *values):
    """The columns have these labels and, to the last digit, these values."""
    assert [label for label, _, _ in columns] == labels
    for (label, name, got), want in zip(columns, values, strict=True):
        assert label.endswith(f": {name}")
        assert torch.equal(got, want)


MADE = ["made: image", "made: mask", "made: attr"]


def test_picture_of_test_items(drawn):
    """[Sec. 3.3] The picture has the test items, what is given marked, and the model's samples."""
    model = randomise(model_of(tiny()))
    data = toy()
    options = {"sampler": "dpm++", "steps": 2}
    diffmvae.sample_pictures(model, data, "x.png", ["mask"], 2, 7, **options)
    path, title, columns, config = drawn
    items = data.tensors(data.split["test"][:2])
    with diffmvae.autocast(CPU):
        made = model.sample_conditional({"mask": items["mask"]}, 1, seeded(7), **options)
    labels = ["test: image", "given: mask", "test: attr", *MADE]
    assert_columns(columns, labels, *items.values(), *made.values())
    assert (path, config) == ("x.png", model.config)
    assert title == "given mask, seed 7, dpm++, 2 steps"


def test_picture_of_an_own_item(drawn):
    """[Sec. 3.3] One item of the user's is sampled as often as asked, without any data."""
    model = randomise(model_of(tiny()))
    own = {"attr": torch.eye(18)[:1]}
    diffmvae.sample_pictures(model, None, "x.png", ["attr"], 3, own=own, steps=2)
    given = own["attr"].repeat(3, 1)
    with diffmvae.autocast(CPU):
        made = model.sample_conditional({"attr": given}, 1, seeded(0), steps=2)
    assert_columns(drawn[2], ["given: attr", *MADE], given, *made.values())
    assert not torch.equal(made["image"][0], made["image"][1])


@pytest.mark.parametrize("prior", ["aux", "gaussian"])
def test_picture_from_nothing(drawn, prior):
    """[Sec. 3.4] Without anything given z is drawn from the prior that is named."""
    model = randomise(model_of(tiny(decoder="feedforward")))
    diffmvae.sample_pictures(model, None, "x.png", [], 2, 3, prior)
    with diffmvae.autocast(CPU):
        made = model.sample_unconditional(2, prior, seeded(3))
    assert_columns(drawn[2], MADE, *made.values())
    assert drawn[1] == f"given nothing (prior: {prior}), seed 3"


# === §11 Evaluation ===

def test_mean_f1():
    """F1 is 2 TP / (predicted + true), averaged over items, and 0 where both are empty."""
    predicted = torch.tensor([[[1, 1, 0]], [[0, 0, 0]], [[1, 0, 1]], [[0, 0, 1]]])
    true = torch.tensor([[[1, 0, 1]], [[0, 0, 0]], [[1, 0, 1]], [[1, 1, 0]]])
    assert diffmvae.mean_f1(predicted, true) == (0.5 + 0.0 + 1.0 + 0.0) / 4


def random_gaussian(seed, rank):
    """A mean and a covariance of that rank, in four dimensions and float64."""
    mean = torch.randn(4, generator=seeded(seed), dtype=torch.float64)
    factor = torch.randn(4, rank, generator=seeded(seed + 10), dtype=torch.float64)
    return mean, factor @ factor.T


@pytest.mark.parametrize("rank", [4, 2])
def test_frechet_distance(rank):
    """It is |m - n|^2 + tr(A + B) - 2 sum of the roots of the eigenvalues of AB."""
    m, a = random_gaussian(0, rank)
    n, b = random_gaussian(1, 4)
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt()
    want = (m - n).square().sum() + a.trace() + b.trace() - 2 * roots.sum()
    got = diffmvae.frechet_distance((m, a), (n, b))
    assert got == pytest.approx(want.item(), abs=1e-5)


def test_moments_are_those_of_all_features(monkeypatch, faces):
    """Mean and covariance equal numpy's, though pictures come in chunks of unequal size."""
    monkeypatch.setattr(diffmvae, "CHUNK", 5)

    def rows_of_six(image):
        """Eight rows of six features of each picture."""
        return image[:, :, ::4, ::4].reshape(-1, 6)

    mean, covariance = diffmvae.moments(rows_of_six, faces["image"])
    features = rows_of_six(faces["image"]).double().numpy()
    assert mean.dtype == torch.float64
    assert np.allclose(mean, features.mean(0), atol=1e-9)
    assert np.allclose(covariance, np.cov(features.T), atol=1e-9)


def test_patches():
    """Patches are all 4x4 windows, item by item, row by row, with values colour by colour."""
    image = torch.randn(2, 3, 6, 7, generator=seeded())
    want = []
    for item in image:
        for top in range(3):
            for left in range(4):
                want.append(item[:, top:top + 4, left:left + 4].flatten())
    assert torch.equal(diffmvae.patches(image), torch.stack(want))


def test_texture_energy(monkeypatch, faces):
    """It is the mean variance within 4x4 windows of one colour; brightness has no part in it."""
    monkeypatch.setattr(diffmvae, "CHUNK", 5)
    image = faces["image"]
    windows = np.lib.stride_tricks.sliding_window_view(image.numpy(), (4, 4), (2, 3))
    want = windows.var((4, 5)).mean()
    colour = torch.tensor([0.5, -0.2, 0.0]).view(3, 1, 1)
    assert diffmvae.texture_energy(image + colour) == pytest.approx(want, rel=1e-4)


def test_judge_learns_to_read_pictures(tmp_path, monkeypatch):
    """A judge reads masks and attributes off pictures that it was trained with, and is kept."""
    monkeypatch.setattr(diffmvae, "JUDGE_STEPS", 40)
    data = toy("celeba", 32)
    judge = diffmvae.get_judge(tmp_path / "judge.pt", data)
    rows = data.split["train"]
    image = data.tensors(rows)["image"]
    seen = judge.facts(image)
    for name, truth in data.truth(rows).items():
        assert set(seen[name].unique().tolist()) == {0, 1}
        assert diffmvae.mean_f1(seen[name], truth) > 0.9
    again = diffmvae.get_judge(tmp_path / "judge.pt", data)
    assert torch.equal(again.features(image), judge.features(image))
    assert judge.features(image).shape == (len(rows), 128)
    assert not judge.training and not again.training


def test_judge_trains_for_five_passes_at_least(tmp_path, monkeypatch):
    """It trains on batches of 64 of the training split, in order, with seed 0."""
    data = toy("celeba", 224)
    batches = []

    def batch_rows(size, seed, step):
        batches.append((size, seed, step))
        return data.split["train"][:16], None

    monkeypatch.setattr(diffmvae, "JUDGE_STEPS", 4)
    monkeypatch.setattr(data, "batch_rows", batch_rows)
    diffmvae.get_judge(tmp_path / "judge.pt", data)
    assert batches == [(64, 0, step) for step in range(5 * 2)]


class Perfect:
    """A model that gives back the test items, whichever part of them it is given; and a judge of
    pictures that makes no mistake."""

    def __init__(self, data):
        self.config = data.config
        self.items = data.tensors(data.split["test"])
        self.truth = data.truth(data.split["test"])
        self.given = set()
        self.next = 0

    def find(self, name, value):
        """The numbers of the items that have these values."""
        known = self.items[name].float().flatten(1)
        return torch.cdist(value.float().flatten(1), known).argmin(1)

    def sample_conditional(self, given, n, generator, names):
        self.given.add(tuple(given))
        first = list(given)[0]
        rows = self.find(first, given[first])
        return {name: self.items[name][rows] for name in names}

    def sample_unconditional(self, n, prior, generator):
        """The next n items; from N(0, I) they are brighter than they should be."""
        rows = torch.arange(self.next, self.next + n) % len(self.items["image"])
        self.next += n
        made = {name: value[rows] for name, value in self.items.items()}
        made["image"] = made["image"] + 0.1 * (prior == "gaussian")
        return made

    def features(self, image):
        return image.flatten(1)[:, :20]

    def facts(self, image):
        rows = self.find("image", image)
        return {name: truth[rows] for name, truth in self.truth.items()}


def corner(image):
    """Nine pixels that stand for the features of FID."""
    return image.flatten(1)[:, :9]


def evaluation_of(data, num=12, model=None, clip=None, **options):
    """An evaluation of the first test items of that model, by the perfect judge."""
    perfect = Perfect(data)
    return diffmvae.Evaluation(model or perfect, data, perfect, num, corner, clip, **options)


IMAGE_SOURCES = {
    "celeba": ("image", "mask", "attr", "mask + attr", "image + mask + attr", "nothing",
               "N(0, I)"),
    "cub": ("image", "text", "image + text", "nothing", "N(0, I)"),
}
AGREEMENT = {
    "celeba": {
        "mask from image: F1",
        "attr from image: F1",
        "attr from mask: F1",
        "attr from image + mask: F1",
        "mask from attr: F1",
        "mask from image + attr: F1",
        "image from mask: judged mask, F1",
        "image from attr: judged attr, F1",
        "image from mask + attr: judged mask, F1",
        "image from mask + attr: judged attr, F1",
        "image from image + mask + attr: judged mask, F1",
        "image from image + mask + attr: judged attr, F1",
        "image + mask from nothing: agree, F1",
        "image + attr from nothing: agree, F1",
        "image + mask from N(0, I): agree, F1",
        "image + attr from N(0, I): agree, F1",
        "Supervised, mask from image: F1",
        "Supervised, attr from image: F1",
    },
    "cub": {
        "text from image: F1",
        "image from text: judged text, share",
        "image from image + text: judged text, share",
        "image + text from nothing: agree, share",
        "image + text from N(0, I): agree, share",
        "Supervised, text from image: F1",
    },
}


@pytest.mark.parametrize("dataset", SETUPS)
def test_evaluation_of_a_perfect_model(dataset, monkeypatch):
    """What is generated from every subset, and from nothing, agrees with what it has to; images
    have distance 0 and all their texture, but those from N(0, I), which are too bright."""
    monkeypatch.setattr(diffmvae, "CHUNK", 5)
    evaluation = evaluation_of(toy(dataset, 64, tiny(dataset, decoder="feedforward")))
    want = dict.fromkeys(AGREEMENT[dataset], 1.0)
    for source in IMAGE_SOURCES[dataset]:
        want[f"image from {source}: texture, share of real energy"] = 1.0
        for kind in ("FD-judge", "FD-patch", "FID"):
            want[f"image from {source}: {kind}"] = pytest.approx(0, abs=1e-3)
    figures = {}
    for name, values in evaluation.run(2, 5).items():
        if "another item" in name or "other real" in name:
            continue
        figures[name] = values[-1]
        if "N(0, I): F" in name:
            assert figures.pop(name) > 0.05
            del want[name]
    assert figures == want
    assert len(evaluation.model.given) == 2 ** len(evaluation.names) - 1


def test_less_texture_has_a_smaller_share():
    """Images with half the contrast have a quarter of the real energy."""
    evaluation = evaluation_of(toy())
    evaluation.quality("here", 0.5 * evaluation.x["image"])
    assert evaluation.figures["image from here: texture, share of real energy"] == [0.25]


@pytest.mark.parametrize("num", [8, 12])
def test_real_images_are_compared_with_others(num):
    """The distance is to as many real images that are not evaluated: of test, then of val."""
    data = toy()
    evaluation = evaluation_of(data, num)
    evaluation.compare_real()
    test = data.split["test"]
    moments = []
    for rows in ([*test[num:], *data.split["val"]][:num], test[:num]):
        features = corner(data.tensors(rows)["image"]).double()
        moments.append((features.mean(0), torch.cov(features.T)))
    want = diffmvae.frechet_distance(*moments)
    assert evaluation.figures[f"{num} other real images: FID"] == [round(want, 4)]
    attr = evaluation.x["attr"]
    want = diffmvae.mean_f1(attr[[*range(1, num), 0]], attr)
    assert evaluation.figures["attr of another item: F1"] == [round(want, 4)]


def f1_of_sets(predicted, true):
    """F1 of two sets of facts."""
    return 2 * len(predicted & true) / (len(predicted) + len(true))


def share_of_sets(told, shown):
    """The share of the facts told, of all items together, that are shown."""
    both = [a & b for a, b in zip(told, shown)]
    return sum(map(len, both)) / sum(map(len, told))


def test_captions_count_by_their_facts():
    """A caption is right by what any of the ten says; a picture must show what is told."""
    stored = stored_toys("cub")
    stored.arrays["text"] = [ten[::-1] for ten in stored.arrays["text"]]  # the first tell less
    data = diffmvae.Data(stored, tiny("cub"), CPU)
    given = []
    written = []
    shown = []
    for row in data.split["test"]:
        stated = [data_prep.facts_of(text) for text in data.captions[row]]
        given.append(stated[0])
        written.append(stated[1])
        shown.append(set().union(*stated))
    before = shown[-1:] + shown[:-1]
    evaluation = evaluation_of(data)
    image = evaluation.x["image"].roll(1, 0)
    text = data.tensors(data.split["test"], 1)["text"]
    evaluation.agreement("A", ["image"], {"text": text})
    evaluation.agreement("B", [], {"image": image, "text": text})
    evaluation.agreement("C", ["text"], {"image": image})
    f1 = np.mean([f1_of_sets(one, every) for one, every in zip(written, shown)])
    assert evaluation.figures == {
        "text from A: F1": [round(f1, 4)],
        "image + text from B: agree, share": [round(share_of_sets(written, before), 4)],
        "image from C: judged text, share": [round(share_of_sets(given, before), 4)],
    }


@pytest.mark.parametrize("given,name,sign,caption", [
    (["image"], "text from here: CLIP", 1, 9),
    (["text"], "image from here: CLIP", -1, 0),
    ([], "image + text from here: CLIP", -1, 9),
])
def test_clip_score_is_of_the_pair(monkeypatch, given, name, sign, caption):
    """The score is of what was generated with what it was generated from, mean of all items."""
    monkeypatch.setattr(diffmvae, "CHUNK", 5)
    data = toy("cub")
    images = []
    captions = []

    def clip(image, texts):
        images.extend(image)
        captions.extend(texts)
        return torch.full((len(image),), float(len(image)))

    evaluation = evaluation_of(data, clip=clip)
    rows = data.split["test"]
    real = evaluation.x["image"]
    made = {"image": -real, "text": data.tensors(rows, 9)["text"]}
    evaluation.measure("here", given, made)
    assert evaluation.figures[name] == [4.5]                     # (5 * 5 + 5 * 5 + 2 * 2) / 12
    assert torch.equal(torch.stack(images), sign * real)
    assert captions == [data.captions[row][caption] for row in rows]


def test_no_clip_score_of_what_was_given():
    """The pair has no score if both of it were given."""
    evaluation = evaluation_of(toy("cub"))
    evaluation.clip_score("here", ["image", "text"], evaluation.x)
    assert evaluation.figures == {}


def test_two_images_of_one_z():
    """The figure is the RMS difference of two draws in grey levels, sqrt(2) of their noise; z is
    the posterior's mean."""
    data = toy()

    def posterior(x):
        return x["attr"], 50 + x["attr"]                         # variances that must not be used

    def decode(z, noise, names, steps):
        assert torch.equal(z, data.tensors(data.split["test"])["attr"].repeat(2, 1))
        assert (names, steps) == (["image"], 2)
        return {"image": 0.1 * noise(3, 16, 16)}

    model = SimpleNamespace(config=data.config, posterior=posterior, decode=decode)
    evaluation = evaluation_of(data, model=model, steps=2)
    for seed in (0, 0, 1):
        evaluation.two_draws(seed)
    first, again, other = evaluation.figures["two images of one z: difference, grey levels"]
    assert first == again != other
    assert first == pytest.approx(127.5 * 0.1 * math.sqrt(2), rel=0.05)


def test_bound_is_in_nats_and_in_bits_per_value(monkeypatch):
    """[Eq. 5] Terms are averaged over all items; their sum / ln 2 / values of an image is bits."""
    monkeypatch.setattr(diffmvae, "CHUNK", 5)
    data = toy()

    def neg_elbo(x, weighting, bound):
        """Sums of what there is, with one number more."""
        assert (weighting, bound) == ("likelihood", True)
        terms = {name: value.flatten(1).sum(1) for name, value in x.items()}
        return {**terms, "kl": 3 * terms["attr"], "total": 0 * terms["attr"]}

    evaluation = evaluation_of(data, model=SimpleNamespace(config=data.config, neg_elbo=neg_elbo))
    evaluation.bound(4)
    want = {name: value.sum().item() / 12 for name, value in evaluation.x.items()}
    want["kl"] = 3 * want["attr"]
    for name, nats in want.items():
        assert evaluation.figures.pop(f"Eq. 5 bound: {name}, nats") == pytest.approx([nats])
    bits = sum(want.values()) / math.log(2) / (3 * 16 * 16)
    assert evaluation.figures == {"Eq. 5 bound: bits per image value": [round(bits, 4)]}


@pytest.mark.parametrize("dataset", SETUPS)
def test_evaluation_is_reproducible(tmp_path, monkeypatch, dataset):
    """Draws depend on their seed alone: run together or apart they have the same digits, even
    with a judge trained anew."""
    monkeypatch.setattr(diffmvae, "JUDGE_STEPS", 4)
    config = tiny(dataset, text_length=8)                        # short captions are fast
    data = toy(dataset, 64, config)
    model = randomise(model_of(config))

    def figures(judge, repeats, seed):
        """Figures of some seeds, with the judge of that name."""
        judge = diffmvae.get_judge(tmp_path / judge, data)
        evaluation = diffmvae.Evaluation(model, data, judge, 8, sampler="ddim", steps=2)
        return evaluation.run(repeats, seed)

    together = figures("one", 2, 0)
    first = figures("two", 1, 0)
    second = figures("two", 1, 1)
    for name, values in together.items():
        apart = first[name] + second[name]
        assert values == apart[:len(values)]
    for name in ("image from image: FD-patch", "Eq. 5 bound: image, nats",
                 "two images of one z: difference, grey levels"):
        assert together[name][0] != together[name][1]


def test_inception_pools_as_fid_wants(tmp_path, monkeypatch):
    """Of the nine pooling branches eight take means without the padding, the last one maxima; the
    network sees 8-bit pictures of 299x299 pixels in [-1, 1]."""
    import torchvision
    torch.manual_seed(0)
    net = torchvision.models.Inception3(1008, False, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "weights.pth")

    def inception3(num_classes, aux_logits, init_weights):
        assert (num_classes, aux_logits) == (1008, False)
        return net

    monkeypatch.setattr(torchvision.models, "Inception3", inception3)
    features = diffmvae.load_inception(tmp_path / "weights.pth", CPU)
    inputs = []
    pooled = []

    def keep_input(_, arguments):
        inputs.append(arguments[0])

    def keep_pooled(_, arguments):
        pooled.append(arguments[0])

    net.Conv2d_1a_3x3.register_forward_pre_hook(keep_input)
    for block in net.children():
        if hasattr(block, "branch_pool"):
            block.register_forward_pre_hook(keep_input)
            block.branch_pool.conv.register_forward_pre_hook(keep_pooled)
    image = 2.2 * torch.rand(2, 3, 32, 32) - 1.1
    with torch.no_grad():
        assert features(image).shape == (2, 2048)
    stored = (127.5 * (image + 1)).round().clamp(0, 255)
    want = F.interpolate(stored / 127.5 - 1, (299, 299), mode="bilinear")
    assert torch.allclose(inputs[0], want, atol=1e-5)
    wanted = [F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in inputs[1:9]]
    wanted.append(F.max_pool2d(inputs[9], 3, 1, 1))
    for got, want in zip(pooled, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


class FakeClip(nn.Module):
    """Stands for CLIP's model and its processor: it keeps what it is given."""
    config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))

    def from_pretrained(self, name):
        assert name == "name"
        return self

    def forward(self, image_embeds=None, text_embeds=None, **batch):
        if image_embeds is not None:
            return SimpleNamespace(image_embeds=image_embeds, text_embeds=text_embeds)
        import transformers
        self.batch = batch
        image = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        text = torch.tensor([[8.0, 6.0], [-1.0, 1.0]])
        return transformers.BatchEncoding({"image_embeds": image, "text_embeds": text})


def test_clip_score_of_a_model(monkeypatch):
    """The score is 100 max(cos, 0) of embeddings of 8-bit pictures and captions, maybe cut."""
    import transformers
    clip = FakeClip()
    monkeypatch.setattr(transformers, "CLIPModel", clip)
    monkeypatch.setattr(transformers, "CLIPProcessor", clip)
    image = 2 * torch.rand(2, 3, 4, 4) - 1
    score = diffmvae.load_clip("name", CPU)
    assert score(image, ["a", "b"]).tolist() == pytest.approx([96, 0])
    stored = (127.5 * (image + 1)).round().to(torch.uint8)
    assert torch.equal(torch.stack(clip.batch.pop("images")), stored)
    assert clip.batch == dict(text=["a", "b"], return_tensors="pt", padding=True,
                              truncation=True, max_length=77)


# === §12 Command line ===

TOYS = {"train": 64, "val": 8, "test": 8}
SHORT = "--train --steps 3 --aux-steps 2 --batch-size 8 "
ONE = " --num 1 --sampler-steps 1 "
FAST_EVAL = "--eval --eval-num 4 --eval-repeats 1 --sampler-steps 1 "
UNCOND = "--sample uncond "
COND = "--sample cond --given "
NEW = "--train --run new "


def command(folder, flags, dataset="celeba", program=diffmvae, **changes):
    """What a command line does in the folder, with the smallest models, few toys, and changes to
    names of diffmvae: -> exit code, standard output, standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(diffmvae.PRESETS[dataset], "small", vars(tiny(dataset)))
        for name, value in {"TOY_COUNTS": TOYS, "JUDGE_STEPS": 4, **changes}.items():
            patch.setattr(diffmvae, name, value)
        return run_command("--dataset", dataset, *shlex.split(flags), program=program)


def succeed(*arguments, **changes):
    """A command that has to succeed: -> what it printed on both streams. arguments: of command."""
    code, out, err = command(*arguments, **changes)
    assert code == 0, err
    return out + err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the command line trained both setups on toys, for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    for dataset in SETUPS:
        assert "the built-in TOY" in succeed(folder, SHORT, dataset)
    Image.fromarray(255 * np.eye(30, dtype=np.uint8)).save(folder / "own.png")
    return folder


@pytest.mark.parametrize("dataset,flags,picture", [
    ("celeba", "uncond", "uncond-aux-seed0"),
    ("celeba", "uncond --prior gaussian --data toy --device cpu", "uncond-gaussian-seed0"),
    ("celeba", "cond --sampler euler-maruyama --given mask attr --seed 3",
     "given-mask-attr-seed3"),
    ("celeba", "cond --given attr=Smiling,Eyeglasses --sampler ddpm", "given-attr-own-seed0"),
    ("celeba", "cond --given mask=own.png image=own.png --sampler ddim --run runs/celeba-toy",
     "given-mask-image-own-seed0"),
    ("cub", "cond --given image --sampler dpm++", "given-image-seed0"),
    ("cub", "cond --given 'text=A small red bird, with a yellow beak!'", "given-text-own-seed0"),
    ("cub", "uncond --decoder diffusion", "uncond-aux-seed0"),
])
def test_sampling_commands(trained, dataset, flags, picture):
    """[Sec. 3.3] [Sec. 3.4] Every way of sampling writes a picture of two rows, named by it."""
    said = succeed(trained, f"--sample {flags} --num 2 --sampler-steps 2", dataset)
    path = f"runs/{dataset}-toy/samples/{picture}.png"
    assert said.endswith(f"{path}\n")
    assert Image.open(trained / path).height == TOP + 2 * CELL


@pytest.mark.parametrize("flags,given,prior", [
    (UNCOND + "--prior gaussian", [], "gaussian"),
    (COND + "attr", ["attr"], "aux"),
])
def test_sampling_flags_reach_the_picture(trained, flags, given, prior):
    """--num, --seed, --prior, --sampler and --sampler-steps go into the sampling."""
    def check(model, data, path, *arguments, sampler, steps):
        assert arguments == (given, 3, 5, prior, {})
        assert (sampler, steps) == ("ddpm", 9)

    flags += " --num 3 --seed 5 --sampler ddpm --sampler-steps 9"
    succeed(trained, flags, sample_pictures=check)


@pytest.mark.parametrize("flags", [UNCOND, COND + "attr=Bald", COND + "mask=own.png"])
def test_sampling_without_test_items_reads_no_data(trained, flags):
    """The user's own values, or nothing, need no data: reading any would be an error here."""
    succeed(trained, flags + ONE, read_data=None)
    with pytest.raises(TypeError):
        succeed(trained, COND + "mask" + ONE, read_data=None)


@pytest.mark.parametrize("flags,more,folder", [
    ("--decoder feedforward --prior-expert ", "--beta 0.7 --optimizer adam", "feedforward-prior"),
    ("--decoder feedforward --objective mvtcae ", "--preset small --seed 4", "feedforward-mvtcae"),
    ("--weighting likelihood ", "--warmup 0.5 --attr-weight 3 --text-weight 2", "likelihood"),
])
def test_variants_have_folders_of_their_own(tmp_path, flags, more, folder):
    """Training keeps all flags in the checkpoint; sampling finds it by those of the model."""
    succeed(tmp_path, flags + more + f" {SHORT}")
    config = diffmvae.load(tmp_path / f"runs/celeba-toy-{folder}/checkpoint.pt").config
    for name, value in re.findall(r"--(\S+) ([^- ]\S*)", f"{flags} {more} {SHORT}"):
        found = getattr(config, name.replace("-", "_"))
        assert found == type(found)(value)
    assert config.prior_expert == ("prior" in flags)
    succeed(tmp_path, flags + UNCOND + ONE)


class FakeEvaluation:
    """Stands for Evaluation: it keeps what it is asked for, and has two figures."""
    asked = {}

    def __init__(self, model, data, judge, num, *networks, sampler, steps):
        self.asked.update(num=num, networks=networks, steps=steps)

    def run(self, repeats, seed):
        self.asked.update(repeats=repeats, seed=seed)
        return {"drawn": [1.0, 3.0], "real": [2.0]}


def many_test_items(source, dataset, size):
    """Stands for read_data: toys with 402 items to test with, in numbers."""
    split = {"train": np.arange(40), "val": np.arange(2), "test": np.zeros(402, int)}
    return replace(stored_toys(dataset), split=split)


EVAL_STUBS = {
    "Evaluation": FakeEvaluation,
    "read_data": many_test_items,
    "get_judge": print,
    "load_inception": "inception {}, {}".format,
    "load_clip": "clip {}, {}".format,
}


@pytest.mark.parametrize("flags,want", [
    ("", dict(num=400, networks=(None, None), repeats=3, seed=0, steps=None)),
    ("--inception a --clip b", dict(num=402, networks=("inception a, cpu", "clip b, cpu"))),
    ("--eval-num 7 --inception a --eval-repeats 2 --seed 6", dict(num=7, repeats=2, seed=6)),
    ("--eval-num 999 --sampler-steps 5", dict(num=402, steps=5)),
])
def test_eval_command(trained, flags, want):
    """Its flags reach the evaluation; without them it takes 400 items, or with FID all. Mean and
    deviation of the draws are printed."""
    said = succeed(trained, f"--eval --device cpu {flags}", "cub", **EVAL_STUBS)
    asked = FakeEvaluation.asked
    assert {name: asked[name] for name in want} == want
    assert re.search(r"^  drawn +2.000 \+- 1.414$", said, re.M)
    assert re.search(r"^  real +2.000 *$", said, re.M)
    assert json.loads((trained / "runs/cub-toy/eval.json").read_text()) == {
        "items": asked["num"],
        "seed": asked["seed"],
        "sampling": ["ddpm", asked["steps"] or 50],
        "figures": {"drawn": [1.0, 3.0], "real": [2.0]},
    }


def test_figures_are_kept_though_printing_fails(trained, monkeypatch):
    """A screen that is gone costs no figures: eval.json is written before."""
    def broken_print(*words, **options):
        if "deviation" in str(words):
            raise OSError("no screen")

    monkeypatch.setattr("builtins.print", broken_print)
    code, _, _ = command(trained, "--eval", **EVAL_STUBS)
    assert code == 2
    assert (trained / "runs/celeba-toy/eval.json").exists()


@pytest.mark.parametrize("dataset,draw,given,size,patch", [
    ("celeba", draw_raw_faces, "mask", 16, 2),
    ("cub", draw_raw_birds, "text", 64, 4),
])
def test_commands_on_prepared_data(tmp_path, dataset, draw, given, size, patch):
    """Raw data are prepared, trained with, sampled and evaluated; from 64 px on patches are 4."""
    draw(tmp_path / "raw")
    succeed(tmp_path, f"--raw raw --size {size}", dataset, data_prep)
    flags = f"--preset small {SHORT} {COND} {given} --num 2 {FAST_EVAL} --eval-num 2"
    assert "TOY" not in succeed(tmp_path, flags, dataset)
    run = tmp_path / "runs" / dataset
    assert diffmvae.load(run / "checkpoint.pt").config.patch == patch
    assert json.loads((run / "eval.json").read_text())["items"] == 2
    assert (run / f"samples/given-{given}-seed0.png").exists()


def test_data_other_than_trained_on(trained, tmp_path):
    """Training does not go on with other data. Sampling and evaluation warn where they use it,
    and a judge is kept for the data that it was trained with."""
    shutil.copytree(trained / "runs/celeba-toy", tmp_path / "runs/celeba-toy")
    other = {"TOY_COUNTS": {**TOYS, "train": 65}}
    refusal = "was trained with other data (data_checksum: "
    assert_refused(refusal, tmp_path, "--train --resume", **other)
    warning = "was trained with other data, which may hold these test items"
    assert warning not in succeed(tmp_path, UNCOND + ONE, **other)
    assert warning in succeed(tmp_path, COND + "mask" + ONE, **other)
    assert warning in succeed(tmp_path, FAST_EVAL, **other)
    assert warning not in succeed(tmp_path, FAST_EVAL)
    assert len(list(tmp_path.glob("runs/judge-celeba-*.pt"))) == 2


def test_text_init(tmp_path):
    """The text parts start from the folders named, or from the hub; not when training resumes."""
    asked = []

    def pretrained(config, sources):
        asked.append(tuple(sources))
        return replace(config, tokenizers=tiny("cub").tokenizers)

    def load(model, sources):
        asked.append(tuple(sources))

    stubs = {"pretrained_tokenizers": pretrained, "load_text_weights": load,
             "PRESETS": {"cub": {"small": {}, "paper": vars(tiny("cub"))}}}
    flags = f"--data toy --preset paper {SHORT}"
    for more in ("--text-init a b", "--resume --text-init a b", "--run other"):
        succeed(tmp_path, flags + more, "cub", **stubs)
    assert asked == 2 * [("a", "b")] + 2 * [("bert-base-cased", "gpt2")]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_training(tmp_path, which):
    """Ctrl-C and SIGTERM make training save and leave, with 128 + their number, as shells say."""
    before = signal.getsignal(which)

    def train(folder, config, data, stop, resume, text_init):
        signal.raise_signal(which)
        assert stop == [which]

    code, out, _ = command(tmp_path, SHORT, train=train)
    assert code == 128 + which
    assert "stopped and saved; --train --resume goes on" in out
    assert signal.getsignal(which) == before


def test_half_trained_model_says_so(copy):
    """A model whose training stopped early can be sampled, and a line says that it did."""
    assert "only" not in succeed(copy, UNCOND + ONE)
    change_checkpoint(copy, stage=1, step=3)
    assert "trained up to stage 1, step 3 only" in succeed(copy, UNCOND + ONE)


@pytest.mark.parametrize("changes,unit", [
    (dict(patch=2, unet_mults=(1, 2, 4)), 8),
    (dict(image_pooling=(2, 2, 2, 2)), 16),
    (dict(mask_pooling=(2, 4, 4)), 32),
])
def test_size_of_pictures(changes, unit):
    """Pictures must be halved as often as the UNet, the image and the mask networks halve them."""
    config = tiny(image_pooling=(2,), mask_pooling=(2,), patch=1, unet_mults=(1, 1), image_size=96)
    diffmvae.check_size(replace(config, **changes))
    with pytest.raises(data_prep.UserError, match=f"needs a multiple of {unit}$"):
        diffmvae.check_size(replace(config, **changes, image_size=3 * unit // 2))


# === Bad input and faults ===

def change_checkpoint(folder, **changes):
    """Other contents in the checkpoint of the faces in that folder."""
    path = folder / "runs/celeba-toy/checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def flip_stored_byte(path):
    """One wrong byte in the middle of the largest record of an archive of torch.save."""
    with zipfile.ZipFile(path) as archive:
        record = max(map(archive.read, archive.namelist()), key=len)
    content = bytearray(path.read_bytes())
    content[content.index(record) + len(record) // 2] ^= 1
    path.write_bytes(content)


def contents(folder):
    """Everything in a folder: {path: bytes, or False for a folder}."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def assert_refused(words, folder, *arguments, **changes):
    """The command ends with exit code 2 and one line, which has these words, and changes no file.
    arguments: of command."""
    before = contents(folder)
    code, _, err = command(folder, *arguments, **changes)
    lines = [line for line in err.splitlines() if line and "%|" not in line]
    assert (code, len(lines)) == (2, 1), err
    assert words in lines[0]
    assert lines[0].startswith(("diffmvae.py: ", "data_prep.py: "))
    assert contents(folder) == before


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
    """A folder with raw data, prepared faces and a run of either setup: not to be changed."""
    folder = tmp_path_factory.mktemp("place")
    draw_raw_faces(folder / "faces")
    draw_raw_birds(folder / "birds")
    data_prep.prepare("celeba", folder / "faces", folder / "prepared", 16)
    shutil.copytree(trained / "runs", folder / "runs")
    return folder


@pytest.fixture
def copy(place, tmp_path):
    """A copy of that folder, which may be changed."""
    return shutil.copytree(place, tmp_path / "place")


@pytest.mark.parametrize("flags,words", [
    ("", "give --train"),
    ("--sample cond", "goes with"),
    (UNCOND + "--given mask", "goes with"),
    ("--eval --prior gaussian", "--prior needs"),
    (UNCOND + "--beta 1", "need --train"),
    (UNCOND + "--resume", "need --train"),
    (UNCOND + "--text-init a b", "need --train"),
    (UNCOND + "--clip x", "need --eval"),
    (UNCOND + "--inception x", "need --eval"),
    (UNCOND + "--num 0", "not between"),
    (UNCOND + "--sampler-steps 0", "not between"),
    (UNCOND + "--device quantum", "invalid choice"),
    ("--eval --eval-num 1", "not between"),
    (NEW + "--warmup 2", "2 is not between 0 and 1"),
    (NEW + "--lr nan", "not between"),
    (NEW + "--beta -1", "not between"),
    (NEW + "--steps 0", "not between"),
    (NEW + "--batch-size 1", "not between"),
    (NEW + "--seed -1", "not between"),
    (NEW + "--decoder feedforward --weighting likelihood", "of the diffusion decoder"),
    (NEW + "--objective mvtcae --prior-expert", "has no prior-expert"),
    (COND + "sound", "choose from image, mask, attr"),
    (COND + "mask attr=Bald", "all your own"),
    (COND + "attr=Freckles", "no attribute Freckles"),
    (COND + "mask=~no/m.png", "~no/m.png: cannot be read as a mask"),
    (UNCOND + "--run nowhere", "no checkpoint yet; train first with --train"),
    (UNCOND + "--run runs/celeba-toy --decoder feedforward", "was trained with decoder diffusion"),
    (UNCOND + "--run runs/celeba-toy --data prepared", "was trained with toy True"),
    (UNCOND + "--run runs/cub-toy", "was trained with dataset cub"),
    ("--train --resume --lr 0.5", "was trained with lr 0.002"),
    ("--train", "exists; give --resume, or another --run"),
    (NEW + "--resume", "no checkpoint yet"),
    (NEW + "--data nowhere", "nowhere: not a complete data set"),
    (NEW + "--data prepared", "16 px; the model needs a multiple of 32"),
    (NEW + "--data toy --text-init a b", "--text-init needs --preset paper"),
    ("--eval --inception no.pth", "not pytorch-fid's weights"),
    ("--eval --clip x", "this model has no captions"),
])
def test_flags_that_do_not_fit(place, flags, words):
    """What the user can mend takes one line and exit code 2, before anything is written."""
    assert_refused(words, place, flags)


@pytest.mark.parametrize("flags,words", [
    (COND + "text='" + "red " * 40 + "'", "must have a word, and at most 30 tokens"),
    (COND + "text=!", "must have a word, and at most 30 tokens"),
    ("--eval --clip runs", "--clip runs: no CLIP model"),
])
def test_flags_that_do_not_fit_birds(place, flags, words):
    """So do captions that are too long or say nothing, and networks that are not there."""
    assert_refused(words, place, flags, "cub")


def test_devices(place):
    """"auto" is a GPU if there is one; to ask for one that is not there is a user's error."""
    if torch.cuda.is_available():
        assert diffmvae.find_device("auto").type == "cuda"
        pytest.skip("there is a GPU")
    assert diffmvae.find_device("auto") == CPU
    assert_refused("--device cuda: there is none here", place, UNCOND + "--device cuda")


@pytest.mark.parametrize("flags", [UNCOND, "--train --resume", "--eval"])
def test_damaged_checkpoint(copy, flags):
    """A file cut short and one wrong byte are found before anything is done with the weights."""
    path = copy / "runs/celeba-toy/checkpoint.pt"
    whole = path.read_bytes()
    flip_stored_byte(path)
    assert_refused("checkpoint of this version of the script, or damaged", copy, flags)
    path.write_bytes(whole[:50_000])
    assert_refused("checkpoint of this version of the script, or damaged", copy, flags)


def test_damaged_judge(copy):
    """One wrong byte in the judge is found, and the line says what to do."""
    succeed(copy, FAST_EVAL)
    flip_stored_byte(list(copy.glob("runs/judge-celeba-*.pt"))[0])
    assert_refused("not a judge of this data, or damaged; delete it", copy, FAST_EVAL)


@pytest.mark.parametrize("flags,words", [
    ("--out prepared", "prepared: exists already"),
    ("--out x --size 20", "must be a multiple of 8 up to 1024"),
    ("--out x --size 0", "must be a multiple of 8 up to 1024"),
    ("--out x --size 1032", "must be a multiple of 8 up to 1024"),
    ("--out runs/celeba-toy/log.jsonl/x", "not prepared, nothing is kept"),
])
def test_preparing_that_cannot_be(place, flags, words):
    """What is there is never written over, and every size is checked first."""
    assert_refused(words, place, f"--raw faces {flags}", "celeba", data_prep)


@pytest.mark.parametrize("dataset,damage,words", [
    ("celeba", "rm faces/*/0/00006_[!s]*",
     "1 of 12 cannot be used: faces/CelebAMask-HQ-mask-anno/0/00006_hair.png: cannot be read as"),
    ("celeba", "rm faces/*anno.txt", "anno.txt: cannot be read as a text"),
    ("celeba", "perl -pi -e 's/5.jpg  /5.jpg x /' faces/*anno.txt", "'5.jpg x"),
    ("celeba", "perl -pi -e 's/5.jpg  /5.jpg 1 /' faces/*anno.txt", "'5.jpg 1"),
    ("celeba", "perl -pi -e s/12/13/ faces/*anno.txt", "line 1 says 13 images, 12 rows"),
    ("celeba", "perl -pi -e 's/ [0-9]+ / 1 /' faces/*mapping.txt", "every split needs 2"),
    ("cub", "mv birds/text_c10 birds/text", "birds: neither images and text_c10, nor text_trainv"),
])
def test_raw_data_that_do_not_fit(copy, dataset, damage, words):
    """What is missing in raw data, or contradicts itself, is named."""
    subprocess.run(damage, shell=True, cwd=copy, check=True)
    raw = {"celeba": "faces", "cub": "birds"}[dataset]
    assert_refused(words, copy, f"--raw {raw} --out x", dataset, data_prep)


# === The repository and its README ===

SOURCE = (HERE / "diffmvae.py").read_text()
TESTS = Path(__file__).read_text()
README = (HERE / "README.md").read_text()
HEADER = SOURCE.split('"""')[1]


def equation_tags(text):
    """The equations and sections of the paper that stand in brackets in a text."""
    brackets = re.findall(r"\[[^]]*(?:Eq|Sec)\. [^]]*\]", text)
    return set(re.findall(r"(?:Eq|Sec)\. \d(?:\.\d)?", " ".join(brackets)))


def test_equation_tags_agree():
    """Header, code and tests name the same equations; sections in the code are in the header."""
    code = SOURCE.replace(HEADER, "")
    for text in (HEADER, code, TESTS):
        equations = [tag for tag in equation_tags(text) if "Eq" in tag]
        assert sorted(equations) == [f"Eq. {k}" for k in range(1, 6)]
    assert equation_tags(code) <= equation_tags(HEADER)


def test_contents_agree_with_the_sections():
    """The header lists the twelve sections, each by number and first word, in two columns."""
    sections = re.findall(r"^# === §(\d+) (\w+).* ===$", SOURCE, re.M)
    contents = re.search(r"^Contents.+?\n(.+?)\n\n", HEADER, re.M | re.S)[1]
    listed = re.findall(r"§(\d+) +(\w+)", contents)
    assert listed[::2] + listed[1::2] == sections
    assert [int(number) for number, _ in sections] == list(range(1, 13))


def test_the_method_is_short_and_lines_fit():
    """[Eq. 5] The method, §2 to §4, has 400 lines at most; no line has more than 100 columns."""
    method = re.search(r"^# === §2 .*?(?=^# === §5 )", SOURCE, re.M | re.S)[0]
    assert len(method.splitlines()) <= 400
    for path in HERE.glob("*.py"):
        assert max(map(len, path.read_text().splitlines())) <= 100


def test_import_is_silent(tmp_path):
    """Importing prints nothing, writes nothing and leaves the GPU alone."""
    code = "import diffmvae, torch; assert not torch.cuda.is_initialized()"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program,least", [(diffmvae, 30), (data_prep, 5)])
def test_every_flag_has_help_and_a_test(program, least):
    """--help explains every flag in words of small letters, and these tests use it."""
    code, out, err = run_command("--help", program=program)
    assert (code, err) == (0, "")
    flags = re.findall(r"^  (--[a-z-]+)(.*(?:\n {10}.*)*)", out, re.M)
    assert len(flags) >= least
    for flag, text in flags:
        assert f"{flag} " in TESTS or f'{flag}"' in TESTS
        assert re.search(r"  [^{].*[a-z]{3}", text)


def test_readme_commands():
    """The scripts accept every command of the README."""
    joined = README.replace("\\\n", " ")
    commands = re.findall(r"^    (?:.*&& )?(python \w+\.py .*)$", joined, re.M)
    assert len(commands) >= 8
    for line in commands:
        _, script, *flags = shlex.split(line, comments=True)
        {"diffmvae.py": diffmvae, "data_prep.py": data_prep}[script].parse_args(flags)


def test_readme_code(trained, tmp_path, monkeypatch):
    """Every Python block of the README runs where the toys were trained, in a namespace of its
    own; the modality of one's own is the one that is tested above, line by line."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "here"))
    marked = re.search(r"^# Depth: begin\n(.+?)^# Depth: end$", TESTS, re.M | re.S)[1]
    blocks = re.findall(r"^```python\n(.+?)^```", README, re.M | re.S)
    depth = [block for block in blocks if "class Depth" in block]
    assert len(depth) == 1
    assert marked.strip() in depth[0]
    for block in blocks:
        if block not in depth:
            exec(block, {})


def test_readme_names_what_there_is():
    """The equation map has all equations, with tests that exist, and so do the pictures."""
    rows = re.findall(r"^\| (Eqs?\. .*?) \|.*`(test_\w+)`", README, re.M)
    assert set(re.findall(r"\d", str([equations for equations, _ in rows]))) == set("12345")
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in TESTS
    for path in re.findall(r"!\[[^]]*\]\((.+?)\)", README):
        assert (HERE / path).exists()
