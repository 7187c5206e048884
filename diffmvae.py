"""Diff-MVAE: a multimodal VAE with a diffusion decoder for images, in one file.

Paper   Multimodal ELBO with Diffusion Decoders, D. Wesego & P. Rooshenas, arXiv 2408.16883v2.
        All section and equation numbers below are that version's.

Objective, minimised, in nats, sums over dimensions, mean over the batch [Eq. 5]:

    E_A E_{z ~ q(z|x_A)} [ sum_i -w_i log p(x_i|z)                          feed-forward decoders
                         + sum_j E_t 1/2 lambda(t) ||score_j - s_theta||^2 ]  diffusion decoders
    + beta E_A KL(q(z|x_A) || N(0, I))

    A is a uniformly drawn subset of the modalities, q(z|x_A) the product of its experts. The
    paper prints the score term with "+" inside a lower bound of log p(x); it belongs with "-".
    It is a bound, but for the ends of time (image_bound has them), for lambda = g^2, beta = 1 and
    w_i = 1. Our defaults are lambda = 1 after a warm-up, as the noise error of [Eq. 1] without the
    1/2, beta = 0.1, w = 20 for attributes and, in the small preset, for captions (README,
    "Choices the paper leaves open").

Use     python diffmvae.py --dataset celeba --train --sample cond --given mask
        python diffmvae.py --dataset celeba --sample cond --given mask=face.png attr=Smiling,Bangs
        python diffmvae.py --dataset celeba --sample uncond
        python diffmvae.py --dataset celeba --eval
        python diffmvae.py --dataset celeba --train --decoder feedforward    (a baseline, MoPoE*)
        python diffmvae.py --dataset cub --train --sample cond --given text="a small red bird"
        Without prepared data (data_prep.py) it draws its own toy faces, or birds with captions.
        --help lists all flags.

Notation    paper                 here                        shape
            x^(1), x^(2), x^(3)   x["image"|"mask"|"attr"]    (B, 3, H, W), (B, 1, H, W), (B, 18)
            x^(1), x^(2) of CUB   x["image"|"text"]           (B, 3, H, W), (B, 2, L) tokens
            mu_i, log var_i       mu, logvar                  (B, M, Z), of the product (B, Z)
            A, omega_A            subset, 1 / (2^M - 1)       (B, M) boolean
            z                     z                           (B, Z)
            alpha_bar_t           alpha(t)^2 = 1 - sigma(t)^2 (B,), t in [0, 1]
            x_t, epsilon          x_t, eps                    as x
            g(t)^2, lambda(t)     beta(t), weighting          (B,)
            beta (of the KL)      config.beta                 a number

Contents (grep '^# === §'); §2 to §4 are the method, the rest can be skipped at first.
    §1  Setups and configuration                 §6  Data, tokens, pretrained text
    §2  Gaussians and their fusion               §7  Training
    §3  Diffusion                                §8  Sampling to pictures
    §4  DiffMVAE: Eq. 5, ways of sampling        §9  Evaluation
    §5  Networks                                 §10 Command line

Where   [Eq. 1] VPSDE.loss, "simple"             [Sec. 3.1] §3, DiffusionDecoder
        [Eq. 2] VPSDE.loss, "likelihood"         [Sec. 3.2] product_of_experts, neg_elbo
        [Eq. 3] the bound in general: neg_elbo   [Sec. 3.3] posterior, sample_conditional
        [Eq. 4] neg_elbo, --decoder feedforward  [Sec. 3.4] AuxiliaryModel, sample_unconditional
        [Eq. 5] neg_elbo                         [Sec. 4.1] CUB, TextEncoder, TextDecoder
                                                 [Sec. 4.2] Config, §5
"""
import argparse
import copy
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data_prep
from data_prep import ATTRIBUTES, BIRD_FACTS

# === §1 Setups and configuration [Sec. 4.1] [Sec. 4.2] ===

# x^(1), x^(2), ... of the paper's two setups; their order numbers the experts
MODALITIES = {"celeba": ("image", "mask", "attr"), "cub": ("image", "text")}


@dataclass
class Config:
    """What defines a model and its training; the defaults are the paper's CelebAMask-HQ setup,
    CUB below what its CUB setup has otherwise.

    "paper" marks values that the paper states; the others are ours or, where it says "after",
    those of the code the paper builds on.
    """
    dataset: str = "celeba"
    preset: str = "paper"
    # Sizes
    image_size: int = 128           # paper Sec. 4.2; the prepared data decide
    latent: int = 256               # paper Sec. 4.2: Z
    # Networks
    image_channels: tuple = (64, 128, 256, 512, 512)  # after Soft-IntroVAE at 128 px, paper [4]
    image_rates: tuple = (2, 2, 2, 2, 2)              # average pooling after each width
    mask_channels: tuple = (64, 128, 256)             # after SBM-VAE, paper [42]
    mask_rates: tuple = (2, 4, 4)
    attr_widths: tuple = (128, 256, 512, 512, 512)    # after SBM-VAE
    text_width: int = 768           # BERT-base and GPT-2, as in Optimus: paper Sec. 4.1
    text_layers: int = 12
    text_heads: int = 12
    text_length: int = 64           # tokens a caption, the special ones included
    unet_width: int = 64
    unet_mults: tuple = (1, 2, 2, 4, 4)
    unet_blocks: int = 2            # residual blocks a resolution, down and up each
    unet_attention: tuple = (16, 8)  # sides of the feature maps with self-attention
    patch: int = 1                  # space-to-depth before the UNet; 2 quarters its positions
    z_map: int = 32                 # channels of the 8x8 map of z joined to the UNet's input
    dropout: float = 0.1            # in the UNets, BERT and GPT-2
    aux_width: int = 64
    aux_mults: tuple = (1, 2, 4)
    aux_dims: int = 2               # the latent as a picture, 1x16x16: paper Sec. 4.2; 1: as a row
    # Tokens, set when a training starts: of the text encoder, of the text decoder
    vocab: tuple = (28996, 50260)   # how many: bert-base-cased, GPT-2 with three special ones
    special: tuple = (50257, 50258, 50259)  # the decoder's <PAD>, <BOS>, <EOS>; the encoder pads 0
    tokenizers: tuple = ()          # as JSON
    # Objective, Eq. 5
    decoder: str = "diffusion"      # or "feedforward": Eq. 5 becomes Eq. 4
    objective: str = "mopoe"        # Eq. 5, over all subsets; or "mvtcae", a baseline of the paper
    weighting: str = "simple"       # lambda(t) = 1 (Diff-MVAE*); "likelihood": g^2 (Diff-MVAE)
    warmup: float = 0.4             # share of the steps with weight 1/alpha^2 first; 0: off
    beta: float = 0.1               # weight of the KL term; the paper's is unknown
    attr_weight: float = 20.0       # weight of the 18-dimensional attribute term (README, Choices)
    text_weight: float = 1.0        # weight of the caption term (README, Choices)
    prior_expert: bool = False      # N(0, I) as one more expert of the full subset, as in MoPoE
    # Training
    steps: int = 200_000            # about 500 passes over the 24,183 training faces at batch 64
    aux_steps: int = 100_000
    batch_size: int = 64
    aux_batch_size: int = 256
    lr: float = 1e-4
    lr_schedule: str = "cosine"     # to 0 along a cosine, or "constant"; times the warm-up
    lr_warmup: int = 1000
    grad_clip: float = 1.0          # largest norm of all gradients together
    ema: float = 0.9999             # decay of the averaged weights; ramped up from 0.1
    seed: int = 0
    # Habits
    log_every: int = 100
    probe_every: int = 5000         # steps between coherence figures with a picture
    save_every: int = 1000

    @property
    def modalities(self):
        return MODALITIES[self.dataset.removesuffix("-toy")]


CUB = dict(image_size=64, latent=768, aux_dims=1,                 # paper Sec. 4.1
           image_channels=(64, 128, 256, 512), image_rates=(2, 2, 2, 2),
           unet_mults=(1, 2, 4, 4), steps=70_000)                # about 500 passes over 8,855 birds

SMALL = dict(preset="small", image_size=32, latent=64,
             image_channels=(32, 64, 128), image_rates=(2, 2, 2),
             mask_channels=(16, 32, 32), mask_rates=(2, 2, 2), attr_widths=(128, 128),
             unet_width=64, unet_mults=(1, 2, 2), unet_blocks=1, unet_attention=(8,), patch=2,
             z_map=16, dropout=0.0, aux_width=48, aux_mults=(1, 2), aux_batch_size=128,
             steps=1800, aux_steps=1500, lr=1e-3, lr_warmup=50, ema=0.995,
             log_every=20, probe_every=400, save_every=200)
SMALL_TEXT = dict(aux_dims=1, text_width=128, text_layers=2, text_heads=4, text_length=32,
                  text_weight=20.0, steps=2400)
PRESETS = {"celeba": {"paper": {}, "small": SMALL},
           "cub": {"paper": CUB, "small": {**SMALL, **SMALL_TEXT}}}


# === §2 Gaussians and their fusion [Sec. 3.2] ===

def kl_to_standard_normal(mu, logvar):
    """KL(N(mu, diag exp(logvar)) || N(0, I)) in nats: (B, Z), (B, Z) -> (B,), dims summed."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def kl_between(mu, logvar, other_mu, other_logvar):
    """KL(N(mu, exp(logvar)) || N(other_mu, exp(other_logvar))) in nats: (..., Z) -> (...), dims
    summed. Only the baseline MVTCAE needs it."""
    ratio = (logvar - other_logvar).exp() + (mu - other_mu).square() * torch.exp(-other_logvar)
    return 0.5 * (ratio - 1 + other_logvar - logvar).sum(-1)


def product_of_experts(mu, logvar, subset):
    """Normalised product of the Gaussian experts that `subset` selects [Sec. 3.2] [Sec. 3.3].

    mu, logvar: (B, M, Z); subset: (B, M) boolean. -> mu, logvar: (B, Z) each. Precisions add,
    means are averaged with the precisions as weights. What experts outside the subset hold,
    NaN included, has no influence. A row without any expert raises ValueError.
    """
    if not bool(subset.any(1).all()):
        raise ValueError("product_of_experts: a row of subset selects no expert")
    absent = ~subset.unsqueeze(-1)                               # (B, M, 1)
    precision = torch.exp(-logvar.masked_fill(absent, math.inf))  # (B, M, Z), 0 where absent
    total = precision.sum(1)                                     # (B, Z)
    joint_mu = (precision * mu.masked_fill(absent, 0.0)).sum(1) / total
    return joint_mu, -total.log()


def all_subsets(m):
    """The 2^m - 1 non-empty subsets of m modalities: (2^m - 1, m) boolean; the last is full."""
    codes = torch.arange(1, 2 ** m)
    return (codes.unsqueeze(1) >> torch.arange(m) & 1).bool()    # (2^m - 1, m)


# === §3 Diffusion [Sec. 3.1] [Eq. 1] [Eq. 2] ===

class VPSDE:
    """The variance-preserving SDE dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw, t in [0, 1].

    x_t = alpha(t) x_0 + sigma(t) eps, where alpha(t)^2 is the paper's alpha_bar_t [Eq. 1] and
    g(t)^2 = beta(t) [Eq. 2]. With beta from 0.1 to 20 it is the 1000-step DDPM schedule, so one
    network serves every sampler below. The functions of t map times to a tensor of their shape.
    """
    beta_min, beta_max, t_min = 0.1, 20.0, 1e-3

    def beta(self, t):
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t):
        """int_0^t beta(s) ds = -log alpha_bar."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t ** 2

    def alpha(self, t):
        return torch.exp(-0.5 * self.integral(t))

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def log_snr(self, t):
        """log(alpha^2 / sigma^2); its slope is -beta / sigma^2."""
        return -torch.log(torch.expm1(self.integral(t)))

    def time_of(self, log_snr):
        """The inverse of log_snr(t), in closed form: a quadratic in t."""
        integral, slope = F.softplus(-log_snr), self.beta_max - self.beta_min
        return (torch.sqrt(self.beta_min ** 2 + 2 * slope * integral) - self.beta_min) / slope

    def draw_time(self, n, weighting, device):
        """Times t (n,) and weights w (n,) with E[w ||eps - eps_hat||^2] = the loss of `weighting`.

        "simple":     lambda = 1 on the noise error, t uniform [Eq. 1].
        "likelihood": lambda = g^2, that is 1/2 beta/sigma^2 on the noise error [Eq. 2]. Since
                      beta/sigma^2 is minus the slope of log_snr, t is drawn uniformly in log_snr;
                      the weight keeps the normaliser, so the estimate stays unbiased.
        "v":          1/alpha^2, the error of v: ours, for the warm-up only.
        The n uniform numbers are one shifted regular grid: each is uniform, their mean varies less.
        """
        def grid(n):
            return ((torch.rand(1) + torch.arange(n) / n) % 1)[torch.randperm(n)]

        u = drawn(grid, n).to(device)                            # (n,) in [0, 1)
        ends = self.log_snr(torch.tensor([self.t_min, 1.0], dtype=torch.float64)).tolist()
        if weighting == "likelihood":
            t = self.time_of(ends[0] + (ends[1] - ends[0]) * u)
            return t, torch.full_like(t, 0.5 * (ends[0] - ends[1]))  # Z / 2
        t = self.t_min + (1 - self.t_min) * u
        return t, self.alpha(t) ** -2 if weighting == "v" else torch.ones_like(t)

    def loss(self, eps_net, x0, weighting):
        """Denoising score matching, one draw of (t, eps) a sample: (B, ...) -> (B,), dims summed.

        `eps_net(x_t, t)` is eps_theta of Eq. 1; the score of Eq. 2 is s_theta = -eps_theta / sigma,
        so lambda ||score - s_theta||^2 = lambda / sigma^2 ||eps - eps_theta||^2.
        """
        t, weight = self.draw_time(len(x0), weighting, x0.device)
        eps = randn_like(x0)
        x_t = per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps
        error = (eps - eps_net(x_t, t)).square().flatten(1).sum(1)  # (B,) [Eq. 1]
        return weight * error                                    # (B,) [Eq. 1] or [Eq. 2]

    def eps_from_v(self, v, x_t, t):
        """The noise that a prediction of v = alpha eps - sigma x_0 stands for."""
        return per_sample(self.sigma(t), x_t) * x_t + per_sample(self.alpha(t), x_t) * v


def per_sample(a, x):
    """(B,) -> (B, 1, ..., 1), to scale the samples of x (B, ...)."""
    return a.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class Noise:
    """Standard normal draws in which row i depends on seed i alone, never on its batch.

    The n seeds come from `generator` in order (the global one if None). Drawn on the CPU, so
    every device sees the same numbers.
    """

    def __init__(self, n, generator=None, device="cpu"):
        seeds = torch.randint(2 ** 62, (n,), generator=generator).tolist()
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.device = device

    def __call__(self, *shape):
        """-> (n, *shape)."""
        rows = [torch.randn(shape, generator=g) for g in self.generators]
        return torch.stack(rows).to(self.device)


def sample_ddim(sde, predict, x, steps, noise):
    """DDIM, eta = 0: steps + 1 times from 1 to 0; the last step returns x_0_hat."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:]):
        x0, eps = predict(x, t)
        x = sde.alpha(s) * x0 + sde.sigma(s) * eps
    return x


def sample_ddpm(sde, predict, x, steps, noise):
    """Ancestral: x_s ~ q(x_s | x_t, x_0_hat), by Bayes' rule of two Gaussians."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:]):
        x0, _ = predict(x, t)
        alpha_ts = sde.alpha(t) / sde.alpha(s)                   # x_t = alpha_ts x_s + noise
        var_ts = sde.sigma(t) ** 2 - alpha_ts ** 2 * sde.sigma(s) ** 2
        mean = (alpha_ts * sde.sigma(s) ** 2 * x + sde.alpha(s) * var_ts * x0) / sde.sigma(t) ** 2
        std = sde.sigma(s) * var_ts.sqrt() / sde.sigma(t)        # 0 at s = 0: no noise at the end
        x = mean + std * noise(*x.shape[1:])
    return x


def sample_euler_maruyama(sde, predict, x, steps, noise):
    """The reverse SDE dx = -(1/2 beta x + beta score) dt + sqrt(beta) dw from 1 to t_min."""
    times = torch.linspace(1, sde.t_min, steps + 1, dtype=torch.float64)
    for k, (t, dt) in enumerate(zip(times[:-1], times[:-1] - times[1:])):
        _, eps = predict(x, t)
        score = -eps / sde.sigma(t)
        mean = x + sde.beta(t) * (0.5 * x + score) * dt
        x = mean + (sde.beta(t) * dt).sqrt() * noise(*x.shape[1:]) if k < steps - 1 else mean
    return x


def sample_dpm_solver(sde, predict, x, steps, noise):
    """DPM-Solver++(2M): second order from the last two x_0_hat, times regular in log_snr."""
    ends = sde.log_snr(torch.tensor([1.0, sde.t_min], dtype=torch.float64))
    half = torch.linspace(0.5 * ends[0], 0.5 * ends[1], steps, dtype=torch.float64)
    times = sde.time_of(2 * half)
    previous = None
    for k, t in enumerate(times):
        x0, _ = predict(x, t)
        if k == steps - 1:
            return x0
        s, h = times[k + 1], half[k + 1] - half[k]
        slope = 0.0 if previous is None else (x0 - previous) * (0.5 * h / (half[k] - half[k - 1]))
        x = sde.sigma(s) / sde.sigma(t) * x - sde.alpha(s) * torch.expm1(-h) * (x0 + slope)
        previous = x0


SAMPLERS = {"ddim": sample_ddim, "euler-maruyama": sample_euler_maruyama,
            "ddpm": sample_ddpm, "dpm++": sample_dpm_solver}


def sample_diffusion(sde, eps_net, shape, sampler, steps, noise, clamp):
    """Draw from a diffusion model: -> (n, *shape); `noise` decides n, see Noise.

    eps_net(x_t, t) -> eps; clamp: hold x_0_hat in [-1, 1] (images, not latents; and never
    inside Euler-Maruyama, which uses the raw score).
    """
    if sampler not in SAMPLERS or steps < 1:
        raise ValueError(f"sampler {sampler!r} with {steps} steps: choose from "
                         f"{', '.join(SAMPLERS)} and at least 1 step")
    clamp_inside = clamp and sampler != "euler-maruyama"

    def predict(x, t):
        """x_t -> x_0_hat and the eps that belongs to it."""
        eps = eps_net(x, t.to(x).expand(len(x)))
        x0 = (x - sde.sigma(t) * eps) / sde.alpha(t)
        if clamp_inside:
            x0 = x0.clamp(-1, 1)
            eps = (x - sde.alpha(t) * x0) / sde.sigma(t)
        return x0, eps

    x = SAMPLERS[sampler](sde, predict, noise(*shape), steps, noise)
    return x.clamp(-1, 1) if clamp else x


# === §4 DiffMVAE and its two ways of sampling [Eq. 5] [Sec. 3.3] [Sec. 3.4] ===

class DiffMVAE(nn.Module):
    """Encoders, decoders and the auxiliary model. Data x is a dict:

    "image" (B, 3, H, W) in [-1, 1], "mask" (B, 1, H, W) in {0, 1}, "attr" (B, 18) in {0, 1},
    "text" (B, 2, L) token numbers: row 0 as the encoder reads them, row 1 as the decoder writes.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        encoders = {
            "image": lambda: ConvEncoder(3, c.image_channels, c.image_rates, c),
            "mask": lambda: ConvEncoder(1, c.mask_channels, c.mask_rates, c),
            "attr": lambda: MLPEncoder(len(ATTRIBUTES), c),
            "text": lambda: TextEncoder(c)}
        decoders = {
            "image": lambda: DiffusionDecoder(c) if c.decoder == "diffusion" else
            GaussianDecoder(ConvDecoder(3, c.image_channels, c.image_rates, c)),
            "mask": lambda: BernoulliDecoder(ConvDecoder(1, c.mask_channels, c.mask_rates, c)),
            "attr": lambda: BernoulliDecoder(mlp_decoder(len(ATTRIBUTES), c)),
            "text": lambda: TextDecoder(c)}
        self.encoders = nn.ModuleDict({name: encoders[name]() for name in c.modalities})
        self.decoders = nn.ModuleDict({name: decoders[name]() for name in c.modalities})
        self.aux = AuxiliaryModel(c)
        self.weights = {"image": 1.0, "mask": 1.0, "attr": c.attr_weight, "text": c.text_weight}

    def encode(self, x):
        """Every expert: -> mu, logvar (B, M, Z) each, float32."""
        pairs = [self.encoders[name](x[name]) for name in self.config.modalities]
        mu, logvar = (torch.stack(parts, 1).float() for parts in zip(*pairs))  # (B, M, Z)
        return mu, logvar

    def fuse(self, mu, logvar, subset):
        """q(z|x_A): the product of the experts in the subset [Sec. 3.2]. -> (B, Z) each."""
        if self.config.prior_expert:  # one more expert, N(0, I), that only the full subset has
            mu, logvar = (F.pad(a, (0, 0, 0, 1)) for a in (mu, logvar))  # (B, M + 1, Z)
            subset = torch.cat([subset, subset.all(1, keepdim=True)], 1)  # (B, M + 1)
        return product_of_experts(mu, logvar, subset)

    def neg_elbo(self, x):
        """[Eq. 5] with one subset A ~ omega, one z and one t a sample: -> dict of (B,), in nats.

        With a feed-forward image decoder the same lines are [Eq. 4], with one modality [Eq. 3].

        "image", "mask", ...: -log p(x_i|z), for the diffusion decoder its bound if lambda is
        g^2; "kl": the mean over all subsets; "total": their weighted sum, to be minimised.
        """
        names = self.config.modalities
        mu, logvar = self.encode(x)                              # (B, M, Z)
        subsets = all_subsets(len(names)).to(mu.device)          # (S, M), omega = 1 / S
        codes = drawn(lambda n: torch.randint(len(subsets), (n,)), len(mu)).to(mu.device)
        subset = subsets[codes]                                  # (B, M)
        z = gaussian_sample(*self.fuse(mu, logvar, subset))      # (B, Z) z ~ q(z|x_A)
        terms = {name: self.decoders[name].nll(z, x[name]) for name in names}
        terms["kl"] = self.mean_kl(mu, logvar, subsets)          # (B,) sum_A omega_A KL_A
        terms["total"] = (sum(self.weights[name] * terms[name] for name in names)
                          + self.config.beta * terms["kl"])      # (B,) [Eq. 5]
        return terms

    def mean_kl(self, mu, logvar, subsets):
        """KL(q(z|x_A) || N(0, I)) averaged over the subsets A (S, M): -> (B,) nats."""
        s, b = len(subsets), len(mu)
        every = self.fuse(mu.repeat(s, 1, 1), logvar.repeat(s, 1, 1),
                          subsets.repeat_interleave(b, 0))       # (S B, Z)
        return kl_to_standard_normal(*every).view(s, b).mean(0)  # (B,)

    def posterior(self, x, subset=None):
        """q(z|x_o): the product of the experts of what is observed [Sec. 3.3]. -> (B, Z) each.

        x: dict with any of the modalities. subset: (B, M) boolean, default all in x. Rows of x
        outside the subset are never read, so they may hold anything, NaN included.
        """
        check_data(x, self.config)
        first, names = next(iter(x.values())), self.config.modalities
        if subset is None:
            subset = torch.tensor([name in x for name in names]).expand(len(first), -1)
        subset = subset.to(first.device)
        shape = len(first), len(names), self.config.latent
        mu, logvar = torch.zeros(2, *shape, device=first.device)  # (B, M, Z) each
        for i, name in enumerate(names):
            rows = subset[:, i].nonzero().squeeze(1)             # (R,) the rows that have it
            if len(rows):
                pair = self.encoders[name](x[name][rows])
                mu, logvar = (a.index_put((rows, torch.tensor(i, device=rows.device)), b.float())
                              for a, b in zip((mu, logvar), pair))
        return self.fuse(mu, logvar, subset)

    def decode(self, z, noise, names=None, **options):
        """z -> the named modalities, by default all; options: sampler, steps, top_p."""
        if unknown := options.keys() - {"sampler", "steps", "top_p"}:
            raise TypeError(f"decode: unknown options {', '.join(sorted(unknown))}")
        return {name: self.decoders[name].sample(z, noise, **options)
                for name in names or self.config.modalities}

    @torch.no_grad()
    def sample_conditional(self, given, n=1, generator=None, **options):
        """[Sec. 3.3] given: dict of B items -> dict of all modalities, (B * n, ...).

        z ~ q(z|x_o), then each decoder. The n results of an item follow one another; the given
        modalities come back decoded from z like the rest. Text comes as the decoder's token
        numbers (B * n, L), for captions_of. options: sampler="ddim", steps=50 for images,
        top_p=0.0 for text, names=[...] to decode only these.
        """
        mu, logvar = (a.repeat_interleave(n, 0) for a in self.posterior(given))  # (B * n, Z)
        noise = Noise(len(mu), generator, mu.device)
        z = mu + torch.exp(0.5 * logvar) * noise(mu.shape[1])
        return self.decode(z, noise, **options)

    @torch.no_grad()
    def sample_unconditional(self, n, prior="aux", generator=None, **options):
        """[Sec. 3.4] z from the auxiliary model, or N(0, I) if prior="gaussian"; then decode."""
        if prior not in ("aux", "gaussian"):
            raise ValueError(f"prior {prior!r}: choose aux or gaussian")
        noise = Noise(n, generator, self.aux.mean.device)
        z = self.aux.sample(noise) if prior == "aux" else noise(self.config.latent)
        return self.decode(z, noise, **options)


def gaussian_sample(mu, logvar):
    """One reparameterised draw from N(mu, exp(logvar))."""
    return mu + torch.exp(0.5 * logvar) * randn_like(mu)


def check_data(x, c):
    """Raise ValueError, naming the modality, unless x holds the setup's, of the right shapes."""
    shapes = {"image": (3, c.image_size, c.image_size), "mask": (1, c.image_size, c.image_size),
              "attr": (len(ATTRIBUTES),), "text": (2, c.text_length)}
    if not x or any(name not in c.modalities for name in x):
        raise ValueError(f"modalities {sorted(x)}: expected some of {', '.join(c.modalities)}")
    for name, value in x.items():
        if tuple(value.shape[1:]) != shapes[name]:
            raise ValueError(f"{name}: shape {tuple(value.shape)}, expected (B, "
                             f"{', '.join(map(str, shapes[name]))})")


class DiffusionDecoder(nn.Module):
    """M_D of Eq. 5: p(x|z) by a diffusion model conditioned on z [Sec. 3.1]."""

    def __init__(self, c):
        super().__init__()
        self.sde, self.shape = VPSDE(), (3, c.image_size, c.image_size)
        self.weighting = c.weighting  # lambda(t); training sets "v" during its warm-up
        self.unet = UNet(3, c.image_size, c.unet_width, c.unet_mults, c.unet_blocks,
                         c.unet_attention, c.dropout, c.patch, c.latent, c.z_map)

    def eps(self, x_t, t, z):
        """eps_theta(x_t, z, t); the network itself predicts v."""
        return self.sde.eps_from_v(self.unet(x_t, t, z).float(), x_t, t)

    def nll(self, z, x):
        """[Eq. 2] on [t_min, 1], in nats (image_bound adds the ends), or [Eq. 1] with lambda = 1:
        (B,)."""
        return self.sde.loss(lambda x_t, t: self.eps(x_t, t, z), x, self.weighting)

    def sample(self, z, noise, sampler="ddim", steps=50, **_):
        return sample_diffusion(self.sde, lambda x_t, t: self.eps(x_t, t, z), self.shape, sampler,
                                steps, noise, clamp=True)


class GaussianDecoder(nn.Module):
    """M_F of Eq. 5: N(x; net(z), 1/2), whose NLL is the squared error plus a constant."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def nll(self, z, x):
        return ((x - self.net(z).float()).square() + 0.5 * math.log(math.pi)).flatten(1).sum(1)

    def sample(self, z, *_, **__):
        """The mean, which needs neither noise nor options."""
        return self.net(z).float().clamp(-1, 1)


class BernoulliDecoder(nn.Module):
    """M_F of Eq. 5: independent Bernoulli variables with logits net(z)."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def nll(self, z, x):
        error = F.binary_cross_entropy_with_logits(self.net(z).float(), x, reduction="none")
        return error.flatten(1).sum(1)                           # (B,)

    def sample(self, z, *_, **__):
        """The more probable value of each variable, as the paper's F1 needs it."""
        return (self.net(z) > 0).float()


class AuxiliaryModel(nn.Module):
    """Score model of the full posterior's samples [Sec. 3.4], on z standardised per dimension."""

    def __init__(self, c):
        super().__init__()
        side = c.latent if c.aux_dims == 1 else math.isqrt(c.latent)
        if side ** c.aux_dims != c.latent:
            raise ValueError(f"latent {c.latent}: the auxiliary model needs a square number")
        self.sde, self.shape = VPSDE(), (1, *[side] * c.aux_dims)
        self.unet = UNet(1, side, c.aux_width, c.aux_mults, c.unet_blocks, (side // 2,), c.dropout,
                         dims=c.aux_dims)
        self.register_buffer("mean", torch.zeros(c.latent))
        self.register_buffer("std", torch.ones(c.latent))

    def eps(self, z_t, t):
        return self.sde.eps_from_v(self.unet(z_t, t).float(), z_t, t)

    def nll(self, z):
        """[Sec. 3.4] the objective of [Eq. 1] on z (B, Z): -> (B,)."""
        z0 = ((z - self.mean) / self.std).view(-1, *self.shape)  # (B, 1, side[, side])
        return self.sde.loss(self.eps, z0, "simple")

    def sample(self, noise):
        """-> z (n, Z), always by 50 DDIM steps [Sec. 4.1]."""
        z = sample_diffusion(self.sde, self.eps, self.shape, "ddim", 50, noise, clamp=False)
        return z.flatten(1) * self.std + self.mean               # (n, Z)


# === §5 Networks [Sec. 4.1] [Sec. 4.2] ===

class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d and 2d in one; training, with the moments of all processes' whole batch.
    (PyTorch's SyncBatchNorm does not take tensors on the CPU.)"""

    def _check_input_dim(self, x):
        """Both kinds of input will do."""

    def forward(self, x):
        if not self.training or ranks()[1] == 1:
            return super().forward(x)
        dims, shape = [d for d in range(x.dim()) if d != 1], (-1, *[1] * (x.dim() - 2))
        dtype, x, n = x.dtype, x.float(), ranks()[1] * x.numel() // x.shape[1]
        mean = MeanOfRanks.apply(x.mean(dims))                   # (C,)
        centred = x - mean.view(shape)
        var = MeanOfRanks.apply(centred.square().mean(dims))     # (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()           # (C,)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(dtype)


class ResidualBlock(nn.Module):
    """conv-BN-LeakyReLU-conv-BN plus skip, LeakyReLU, as in Soft-IntroVAE (paper [4])."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), BatchNorm(c_out),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), BatchNorm(c_out))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        return F.leaky_relu(self.body(x) + self.skip(x), 0.2)


class ConvEncoder(nn.Module):
    """Images or masks (B, C, H, W) -> mu, logvar (B, Z): widths `channels`, pooled by `rates`."""

    def __init__(self, c_in, channels, rates, c):
        super().__init__()
        layers = [nn.Conv2d(c_in, channels[0], 5, padding=2, bias=False),
                  BatchNorm(channels[0]), nn.LeakyReLU(0.2), nn.AvgPool2d(rates[0])]
        for a, b, rate in zip(channels, channels[1:], rates[1:]):
            layers += [ResidualBlock(a, b), nn.AvgPool2d(rate)]
        self.body = nn.Sequential(*layers, ResidualBlock(channels[-1], channels[-1]))
        side = c.image_size // math.prod(rates)
        self.head = nn.Linear(channels[-1] * side * side, 2 * c.latent)

    def forward(self, x):
        return self.head(self.body(x).flatten(1)).chunk(2, 1)    # (B, Z), (B, Z)


class ConvDecoder(nn.Module):
    """z (B, Z) -> (B, C, H, W): the encoder of the same widths and rates, mirrored."""

    def __init__(self, c_out, channels, rates, c):
        super().__init__()
        self.shape = channels[-1], *[c.image_size // math.prod(rates)] * 2
        self.stem = nn.Linear(c.latent, math.prod(self.shape))
        layers, widths = [], (channels[-1], *reversed(channels))
        for a, b, rate in zip(widths, widths[1:], reversed(rates)):
            layers += [ResidualBlock(a, b), nn.Upsample(scale_factor=rate)]
        self.body = nn.Sequential(*layers, ResidualBlock(channels[0], channels[0]),
                                  nn.Conv2d(channels[0], c_out, 5, padding=2))

    def forward(self, z):
        return self.body(F.relu(self.stem(z)).view(-1, *self.shape))  # (B, C, H, W)


def mlp(widths):
    """Linear-BatchNorm-ReLU for each pair of neighbouring widths."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), BatchNorm(b), nn.ReLU()]
    return nn.Sequential(*layers)


class MLPEncoder(nn.Module):
    """Attributes (B, A) -> mu, logvar (B, Z)."""

    def __init__(self, n, c):
        super().__init__()
        self.body = mlp((n, *c.attr_widths))
        self.head = nn.Linear(c.attr_widths[-1], 2 * c.latent)

    def forward(self, x):
        return self.head(self.body(x)).chunk(2, 1)               # (B, Z), (B, Z)


def mlp_decoder(n, c):
    """z (B, Z) -> logits (B, A)."""
    widths = (c.latent, *reversed(c.attr_widths))
    return nn.Sequential(mlp(widths), nn.Linear(widths[-1], n))


def initial_std(width):
    """0.02 as in BERT and GPT-2 at their width of 768; narrower layers need larger weights."""
    return 0.02 * math.sqrt(768 / width)


class TextEncoder(nn.Module):
    """Captions (B, 2, L) -> mu, logvar (B, Z): BERT, its pooled first token, a linear layer, as
    in Optimus (paper Sec. 4.1)."""

    def __init__(self, c):
        super().__init__()
        from transformers import BertConfig, BertModel  # here, as importing them takes seconds
        self.bert = BertModel(BertConfig(
            vocab_size=c.vocab[0], hidden_size=c.text_width, num_hidden_layers=c.text_layers,
            num_attention_heads=c.text_heads, intermediate_size=4 * c.text_width,
            hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
            initializer_range=initial_std(c.text_width)))
        self.head = nn.Linear(c.text_width, 2 * c.latent, bias=False)

    def forward(self, text):
        ids = text[:, 0]                                         # (B, L)
        pooled = self.bert(ids, attention_mask=(ids != 0).long()).pooler_output
        return self.head(pooled).chunk(2, 1)                     # (B, Z), (B, Z)


class TextDecoder(nn.Module):
    """M_F of Eq. 5 for captions: GPT-2 that gets z in two ways, as in Optimus (paper Sec. 4.1).

    As a memory: one position in front of the caption, whose key and value in every layer are one
    linear map of z. As an embedding: another linear map of z, added to every token's.
    """

    def __init__(self, c):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        self.pad, self.bos, self.eos = c.special
        self.length = c.text_length
        self.gpt = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab[1], n_embd=c.text_width, n_layer=c.text_layers, n_head=c.text_heads,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
            initializer_range=initial_std(c.text_width),
            pad_token_id=self.pad, bos_token_id=self.bos, eos_token_id=self.eos))
        self.memory = nn.Linear(c.latent, c.text_layers * c.text_width, bias=False)
        self.embed = nn.Linear(c.latent, c.text_width, bias=False)
        nn.init.normal_(self.memory.weight, std=0.02)            # as in Optimus
        nn.init.zeros_(self.embed.weight)  # ours: at first a random z would drown the words

    def remember(self, z):
        """The memory as a fresh cache of keys and values, which the transformer then extends."""
        from transformers import DynamicCache
        c = self.gpt.config
        keys = self.memory(z).view(len(z), c.n_layer, c.n_head, 1, -1)  # (B, layers, heads, 1, d)
        return DynamicCache([(k, k) for k in keys.unbind(1)])

    def logits(self, z, ids, cache):
        """Tokens (B, T) -> logits of the tokens after them (B, T, V); extends the cache."""
        embeds = self.gpt.transformer.wte(ids) + self.embed(z).unsqueeze(1)  # (B, T, width)
        return self.gpt(None, cache, inputs_embeds=embeds).logits.float()  # no names: they change

    def nll(self, z, text):
        """-log p(caption|z), summed over its tokens and <EOS>: (B,) nats; padding is left out."""
        ids = text[:, 1]                                         # (B, L)
        logits = self.logits(z, ids[:, :-1], self.remember(z))   # (B, L - 1, V)
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=self.pad,
                               reduction="none").sum(1)          # (B,)

    def sample(self, z, noise=None, top_p=0.0, **_):
        """-> token numbers (B, L), <BOS> first, <PAD> after <EOS>.

        top_p = 0: the most probable token each time; else a draw from the most probable ones
        that together just reach top_p (nucleus sampling).
        """
        cache, token = self.remember(z), torch.full((len(z), 1), self.bos, device=z.device)
        ids, done = [token], torch.zeros(len(z), 1, dtype=torch.bool, device=z.device)
        for _ in range(self.length - 1):
            logits = self.logits(z, token, cache)[:, -1]         # (B, V)
            token = nucleus(logits, top_p, noise()) if top_p else logits.argmax(1)
            token = token.view(-1, 1).masked_fill(done, self.pad)  # (B, 1)
            done = done | (token == self.eos)
            ids.append(token)
            if bool(done.all()):
                break
        ids = torch.cat(ids, 1)                                  # (B, at most L)
        return F.pad(ids, (0, self.length - ids.shape[1]), value=self.pad)  # (B, L)


def nucleus(logits, top_p, normal):
    """One token a row from the smallest set with mass top_p: (B, V), number, (B,) N(0, 1) draws
    that choose it -> (B,)."""
    p, order = logits.softmax(1).sort(1, descending=True)        # (B, V)
    before = p.cumsum(1) - p                                     # mass of the more probable ones
    p = p.masked_fill(before >= top_p, 0.0)
    u = torch.special.ndtr(normal) * p.sum(1)                    # (B,) uniform in [0, mass]
    pick = (p.cumsum(1) <= u.unsqueeze(1)).sum(1)                # (B,)
    pick = torch.minimum(pick, (p > 0).sum(1) - 1)               # u = mass, by rounding
    return order.gather(1, pick.unsqueeze(1)).squeeze(1)         # (B,)


def zero_init(layer):
    """Start a layer at zero, so that its branch starts as a no-op and the first loss is known."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    """Eight groups; more, smaller groups are slower on CPUs."""
    return nn.GroupNorm(8, channels)


def time_embedding(t, width):
    """Sinusoids of 1000 t: (B,) -> (B, width), cosines first."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = 1000 * t.unsqueeze(1) * freqs                       # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], 1)            # (B, width)


CONV = {1: nn.Conv1d, 2: nn.Conv2d}


def per_sample_channel(a, h):
    """(B, C) -> (B, C, 1, ..., 1), to scale the channels of h (B, C', ...)."""
    return a.view(*a.shape, *[1] * (h.dim() - 2))


class UNetBlock(nn.Module):
    """Residual block with time, then z, as scale and shift of its second norm; then attention."""

    def __init__(self, c_in, c_out, emb, z_dim, dropout, attention, dims):
        super().__init__()
        conv = CONV[dims]
        self.norm1, self.conv1 = group_norm(c_in), conv(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb, 2 * c_out)
        self.z = nn.Linear(z_dim, 2 * c_out) if z_dim else None
        self.norm2, self.dropout = group_norm(c_out), nn.Dropout(dropout)
        self.conv2 = zero_init(conv(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)
        self.attention = Attention(c_out, dims) if attention else nn.Identity()

    def forward(self, h, emb, z):
        y = self.norm2(self.conv1(F.silu(self.norm1(h))))
        for layer, condition in ((self.time, emb), (self.z, z)):
            if layer is not None:
                scale, shift = per_sample_channel(layer(condition), h).chunk(2, 1)  # (B, C, 1..)
                y = y * (1 + scale) + shift
        y = self.conv2(self.dropout(F.silu(y)))
        return self.attention(self.skip(h) + y)


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, heads of 32 channels."""

    def __init__(self, channels, dims):
        super().__init__()
        self.heads, self.norm = max(1, channels // 32), group_norm(channels)
        self.qkv = CONV[dims](channels, 3 * channels, 1)
        self.out = zero_init(CONV[dims](channels, channels, 1))

    def forward(self, h):
        b, c, *size = h.shape                                    # P = H W, or the length
        qkv = self.qkv(self.norm(h)).reshape(b, 3, self.heads, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                # (B, heads, P, c / heads)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, P, P)
        y = (weights.to(v.dtype) @ v).transpose(-1, -2)          # (B, heads, c / heads, P)
        return h + self.out(y.reshape(b, c, *size))


class UNet(nn.Module):
    """The network of every diffusion model here: (B, C, H, W), t (B,), z (B, Z) -> (B, C, H, W),
    or with dims=1 the same of (B, C, length).

    z, if any, enters twice: in every block, and as a map joined to the input.
    """

    def __init__(self, channels, size, width, mults, blocks, attention, dropout, patch=1,
                 z_dim=0, z_map=0, dims=2):
        super().__init__()
        conv = CONV[dims]
        self.patch, self.width, self.z_map, emb = patch, width, z_map, 4 * width
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        if z_map:
            self.map = nn.Linear(z_dim, z_map * 64)
            self.map_conv = nn.Conv2d(z_map, z_map, 3, padding=1)
        self.conv_in = conv(channels * patch ** 2 + z_map, width, 3, padding=1)
        if dims == 1:  # a row of latents, unlike a picture, has a meaning of its own at each place
            self.place = nn.Parameter(torch.zeros(width, size))
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), []
        c_in, size = width, size // patch

        def block(c_in, c_out, attend):
            return UNetBlock(c_in, c_out, emb, z_dim, dropout, attend, dims)

        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(block(c_in, width * mult, size in attention))
                c_in = width * mult
                skips.append(c_in)
            if level < len(mults) - 1:
                self.down.append(conv(c_in, c_in, 3, stride=2, padding=1))
                size //= 2
        self.middle = nn.ModuleList([block(c_in, c_in, True), block(c_in, c_in, False)])
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks):
                self.up.append(block(c_in + skips.pop(), width * mult, size in attention))
                c_in = width * mult
            if level > 0:
                c_out = width * mults[level - 1]
                self.up.append(nn.Sequential(conv(c_in, c_out, 3, padding=1),
                                             nn.Upsample(scale_factor=2)))
                c_in, size = c_out, size * 2
        self.norm_out = group_norm(c_in)
        self.conv_out = zero_init(conv(c_in, channels * patch ** 2, 3, padding=1))

    def forward(self, x, t, z=None):
        emb = self.time(time_embedding(t, self.width))           # (B, 4 width)
        h = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x  # (B, C p^2, H / p, W / p)
        if self.z_map:
            z_map = self.map(z).view(-1, self.z_map, 8, 8)       # (B, c, 8, 8)
            z_map = F.interpolate(z_map, size=h.shape[2:], mode="bilinear")
            h = torch.cat([h, self.map_conv(z_map)], 1)          # (B, C p^2 + c, H / p, W / p)
        h, skips = self.conv_in(h), []
        if h.dim() == 3:
            h = h + self.place                                   # (B, width, length)
        for layer in self.down:
            if isinstance(layer, UNetBlock):
                h = layer(h, emb, z)
                skips.append(h)
            else:
                h = layer(h)
        for layer in self.middle:
            h = layer(h, emb, z)
        for layer in self.up:
            if isinstance(layer, UNetBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb, z)
            else:
                h = layer(h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h  # as x


# === §6 Data, tokens, pretrained text ===

class UserError(Exception):
    """Something the user can mend; main() prints it as one line and exits with 2."""


@contextmanager
def user_error(message):
    """Whatever goes wrong inside becomes a UserError: the message and the error's first line.
    For calls into libraries that raise many kinds of errors on damaged files."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise UserError(f"{message} ({line})") from None


def to_tensors(arrays, device):
    """Rows as they are stored -> the tensors of DiffMVAE, on the device."""
    x = {name: torch.as_tensor(a).to(device) for name, a in arrays.items()}
    convert = {"image": lambda a: a.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1,
               "mask": lambda a: a.unsqueeze(1).float(), "attr": lambda a: a.float(),
               "text": lambda a: a.long(), "words": lambda a: a.float()}
    return {name: convert[name](a) for name, a in x.items()}


def eight_bits(image):
    """[-1, 1] -> {0, ..., 255} as uint8, as a picture file would hold it."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Data:
    """One data set with its splits: uint8 arrays by name, or for "text" lists of 10 captions.

    On a GPU the arrays are copied to the device if they take less than half of its free memory;
    else prepared data stay memory-mapped on the disk.
    """

    def __init__(self, arrays, split, toy, device):
        self.split = {name: np.asarray(rows, np.int64) for name, rows in split.items()}
        self.size, self.toy, self.device = arrays["image"].shape[1], toy, device
        self.arrays = dict(arrays)
        self.captions = self.arrays.pop("text", None)
        size = sum(a.nbytes for a in self.arrays.values())
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
            self.arrays = {n: torch.from_numpy(np.array(a)).to(device)
                           for n, a in self.arrays.items()}
        self.vocabulary = () if not self.captions else \
            BIRD_FACTS if toy else self.frequent_words()

    def frequent_words(self, n=50):
        """The n most frequent words of the training captions but for STOPWORDS."""
        counts = Counter()
        for row in self.split["train"]:
            counts.update(w for text in self.captions[row] for w in content_words(text))
        return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:n])

    def said(self, captions):
        """Which of the vocabulary each caption says: n texts -> (n, W) floats in {0, 1}."""
        words_of = data_prep.facts_of if self.toy else content_words
        said = [words_of(text) for text in captions]
        return torch.tensor([[float(w in one) for w in self.vocabulary] for one in said],
                            device=self.device)

    def tokenize(self, config):
        """Turn the captions into the array "text" (N, 10, 2, L), if there are any."""
        if self.captions:
            ids, cut = tokenize([t for ten in self.captions for t in ten], config)
            self.arrays["text"] = torch.from_numpy(ids.reshape(-1, 10, *ids.shape[1:]))
            if cut:
                print(f"{cut} of {len(ids)} captions are longer than {config.text_length} tokens "
                      "and are cut")

    def rows(self, rows, caption=0):
        """Rows by number -> dict of tensors; caption: which of the ten, one number or (B,)."""
        arrays = {n: a[rows, caption] if n == "text" else a[rows] for n, a in self.arrays.items()}
        return to_tensors(arrays, self.device)

    def batches(self, size):
        """Whole batches in one pass over the training split; a split smaller than one is one."""
        return max(1, len(self.split["train"]) // size)

    def batch(self, size, seed, step):
        """Training batch `step`, a function of (seed, step), or this process's share of it: every
        epoch is a new permutation, with one of its ten captions for each picture."""
        train = self.split["train"]
        epoch, k = divmod(step, self.batches(size))
        rng, part = np.random.default_rng((seed, epoch)), slice(k * size, (k + 1) * size)
        rows = train[rng.permutation(len(train))[part]]
        return self.rows(own_rows(rows), own_rows(rng.integers(10, size=len(train))[part]))


STOPWORDS = set("a also an and are as at bird but by for from has have in is it its of on or that "
                "the there this to very which while with".split())


def content_words(text):
    """The words of a caption, in lower case, without STOPWORDS: a set."""
    return set(re.findall("[a-z]+", text.lower())) - STOPWORDS


TOY_COUNTS = {"train": 10_000, "val": 500, "test": 1000}
TOYS = {"celeba": data_prep.toy_faces, "cub": data_prep.toy_birds}


def toy_data(dataset, size, device, counts=None):
    """The built-in set, by default TOY_COUNTS; rows 0.. are train, then val, then test."""
    counts = counts or TOY_COUNTS
    ends = np.cumsum([0, *counts.values()])
    split = {name: np.arange(a, b) for name, a, b in zip(counts, ends, ends[1:])}
    return Data(TOYS[dataset](int(ends[-1]), size), split, True, device)


def load_data(dataset, folder, device):
    """What data_prep.py wrote to `folder`; UserError if it is missing or does not fit together."""
    with user_error(f"{folder}: not a complete data set of data_prep.py"):
        meta = json.loads((folder / "meta.json").read_text())
        if meta["dataset"] != dataset:
            raise ValueError(f"it was prepared with --dataset {meta['dataset']}")
        n, size = meta["count"], meta["size"]
        shapes = {"image": (n, size, size, 3), "mask": (n, size, size),
                  "attr": (n, len(ATTRIBUTES)), "text": (n, 10)}
        arrays = {}
        for name in MODALITIES[dataset]:
            if name == "text":
                arrays[name] = json.loads((folder / "text.json").read_text())
                shape = len(arrays[name]), *{len(ten) for ten in arrays[name]}
                if not all(isinstance(text, str) for ten in arrays[name] for text in ten):
                    raise ValueError("a caption in text.json is not a string")
            else:
                arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
                shape = arrays[name].shape
                if arrays[name].dtype != np.uint8:
                    raise ValueError(f"{name} is {arrays[name].dtype}, not uint8")
            if shape != shapes[name]:
                raise ValueError(f"{name} has shape {shape}, not {shapes[name]}")
        for name in ("train", "val", "test"):
            rows = meta["split"][name]
            if len(rows) < 2 or min(rows) < 0 or max(rows) >= n:
                raise ValueError(f"split {name} has {len(rows)} rows, at least 2 of 0 to {n - 1} "
                                 "are needed")
    return Data(arrays, meta["split"], False, device)


def small_tokenizer(captions, size=2000):
    """Byte-level BPE made from the captions: -> its JSON; <PAD>, <BOS>, <EOS> are 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<PAD>", "<BOS>", "<EOS>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<BOS> $A <EOS>", special_tokens=[("<BOS>", 1), ("<EOS>", 2)])
    return tokenizer.to_str()


def tokenize(captions, config):
    """n texts -> token numbers (n, 2, L) int32, for encoder and decoder, and how many were cut."""
    from tokenizers import Tokenizer
    ids, cut = {}, {}
    for text, pad in zip(config.tokenizers, (0, config.special[0])):
        if text not in ids:  # the small preset has one for both
            tokenizer = Tokenizer.from_str(text)
            tokenizer.enable_truncation(config.text_length)
            tokenizer.enable_padding(length=config.text_length, pad_id=pad)
            rows = tokenizer.encode_batch(captions)
            ids[text] = np.array([row.ids for row in rows], np.int32)
            cut[text] = sum(bool(row.overflowing) for row in rows)
    return np.stack([ids[text] for text in config.tokenizers], 1), max(cut.values())


def vocabulary_size(tokenizer):
    """Of a tokenizer's JSON text."""
    from tokenizers import Tokenizer
    return Tokenizer.from_str(tokenizer).get_vocab_size()


def captions_of(ids, config):
    """The decoder's token numbers (n, L) -> n texts."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_str(config.tokenizers[1])
    return [text.strip() for text in tokenizer.decode_batch(ids.tolist())]


HUB = "bert-base-cased", "gpt2"  # what Optimus itself started from


def text_sources(path):
    """Where BERT and GPT-2 come from: the two folders of an Optimus download, or HUB for None."""
    if path is None:
        return HUB
    found = [sorted(path.glob(f"checkpoint-{part}-*")) for part in ("encoder", "decoder")]
    if [len(folders) for folders in found] != [1, 1]:
        raise UserError(f"--text-init {path}: needs one folder checkpoint-encoder-* and one "
                        "checkpoint-decoder-*, as an Optimus download has them")
    return found[0][0], found[1][0]


def pretrained_text(config, sources):
    """The configuration with the sizes, tokenizers and special tokens of pretrained models.

    Tokenizers come from folders named as in HUB beside those of `sources`, else from the hub.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, BertConfig, GPT2Config
    places = [source if sources == HUB else source.parent / name if
              (source.parent / name).exists() else name for source, name in zip(sources, HUB)]
    with user_error(f"text models {sources[0]}, {sources[1]}: cannot be had; --text-init PATH "
                    "takes a folder, --preset small needs none"):
        bert, gpt = BertConfig.from_pretrained(sources[0]), GPT2Config.from_pretrained(sources[1])
        reader = AutoTokenizer.from_pretrained(places[0], do_lower_case=False)
        writer = AutoTokenizer.from_pretrained(places[1], add_prefix_space=True)
    writer.add_special_tokens({"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"})
    special = tuple(writer.convert_tokens_to_ids(["<PAD>", "<BOS>", "<EOS>"]))
    writer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<BOS> $A <EOS>", special_tokens=[("<BOS>", special[1]), ("<EOS>", special[2])])
    sizes, vocab = (gpt.n_embd, gpt.n_layer, gpt.n_head), (len(reader), len(writer))
    if (bert.hidden_size, bert.num_hidden_layers, bert.num_attention_heads) != sizes or \
            vocab != (bert.vocab_size, gpt.vocab_size + 3 * (sources == HUB)):
        raise UserError(f"text models {sources[0]}, {sources[1]}: their sizes or their tokenizers' "
                        f"({places[0]}, {places[1]}: {vocab} tokens) do not fit together")
    return replace(config, text_width=sizes[0], text_layers=sizes[1], text_heads=sizes[2],
                   vocab=vocab, special=special, tokenizers=(
                       reader.backend_tokenizer.to_str(), writer.backend_tokenizer.to_str()))


def text_state(part, source, vocab):
    """The weights of the text encoder or decoder at `source`, by their names in Optimus."""
    from transformers import BertModel, GPT2LMHeadModel
    with user_error(f"text {part} from {source}: cannot be read; download it again"):
        if source not in HUB:
            return torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
        if part == "encoder":
            return BertModel.from_pretrained(source).state_dict()
        gpt = GPT2LMHeadModel.from_pretrained(source)
        gpt.resize_token_embeddings(vocab[1], mean_resizing=False)  # the special tokens
        return gpt.state_dict()


def load_text_weights(model, sources):
    """Start the text encoder and decoder from `sources`, see text_sources, and print what became
    of every tensor. UserError that names them if any is missing or of another shape."""
    ours = {"linear.weight": "head.weight", "transformer.linear.weight": "memory.weight",
            "transformer.linear_emb.weight": "embed.weight"}
    for part, net, prefix, source in (("encoder", model.encoders["text"], "bert.", sources[0]),
                                      ("decoder", model.decoders["text"], "gpt.", sources[1])):
        state = {ours.get(name, prefix + name): value for name, value in
                 text_state(part, source, model.config.vocab).items()
                 if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks
        own = net.state_dict()
        fresh = set(ours.values()) if source in HUB else set()  # Optimus's own layers
        missing = [n for n in own if n not in state and n != "gpt.lm_head.weight"]  # tied
        wrong = [f"{n} {tuple(state[n].shape)}, not {tuple(own[n].shape)}" for n in own
                 if n in state and state[n].shape != own[n].shape]
        print(f"text {part} from {source}:")
        for title, names in (("loaded", own.keys() & state.keys()), ("missing", missing),
                             ("unexpected", state.keys() - own.keys()), ("wrong shape", wrong)):
            counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
            print(f"  {title}: {len(names)}")
            for name, count in sorted(counts.items()):
                print(f"    {count:3d} x {name}")
        if wrong or set(missing) - fresh:
            raise UserError(f"text {part} from {source}: does not fit: missing "
                            f"{', '.join(missing) or 'nothing'}; wrong shape "
                            f"{', '.join(wrong) or 'none'} (the {model.config.preset} preset has "
                            f"latent {model.config.latent})")
        net.load_state_dict({n: v for n, v in state.items() if n in own}, strict=False)


# === §7 Training ===

def ranks():
    """(number of this process, how many train together): (0, 1) but under torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def own_rows(rows):
    """This process's share of the rows of a whole batch."""
    rank, count = ranks()
    n = len(rows) // count
    return rows[rank * n:(rank + 1) * n]


def drawn(sample, n):
    """Random numbers for n rows: sample(n). In training with several processes each draws those of
    the whole batch, from one seed, and keeps its share: they are the numbers of one process."""
    return own_rows(sample(n * ranks()[1])) if torch.is_grad_enabled() else sample(n)


def randn_like(x):
    """Standard normal numbers of x's shape (B, ...), see drawn."""
    return drawn(lambda n: torch.randn(n, *x.shape[1:], device=x.device, dtype=x.dtype), len(x))


def average(values):
    """Replace tensors by their means over the processes that train together."""
    if ranks()[1] > 1:
        whole = torch.cat([value.flatten() for value in values])
        torch.distributed.all_reduce(whole)
        for value, part in zip(values, whole.split([value.numel() for value in values])):
            value.copy_(part.view_as(value) / ranks()[1])


class MeanOfRanks(torch.autograd.Function):
    """The mean of a tensor over the processes; the same is the backward of it."""

    @staticmethod
    def forward(context, x):
        x = x.clone()
        average([x])
        return x

    backward = forward


def told_to_stop(run):
    """Whether a signal has come, to any of the processes; all of them get the same answer."""
    if ranks()[1] == 1:
        return run.stop
    stop = torch.tensor(float(run.stop or 0), device=run.device)
    torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
    run.stop = int(stop) or run.stop  # one that came meanwhile counts the next time
    return int(stop)


def has_fast_bf16(device):
    """Whether the hardware multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def autocast(device):
    """bfloat16 where has_fast_bf16, else nothing; losses are float32 either way."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device))


def build(config, device):
    """A fresh model, a function of config and config.seed, and its EMA copy."""
    torch.manual_seed(config.seed)
    model = DiffMVAE(config).to(device)
    if device.type == "cuda":  # on CPUs group norm is faster in the plain layout
        model = model.to(memory_format=torch.channels_last)
    return model, copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(pairs, decay, step):
    """ema <- ema + (1 - d) (net - ema), d ramped up from 0.1 at step 0; integers are copied."""
    d = min(decay, (1 + step) / (10 + step))
    for average, value in pairs:
        if average.is_floating_point():
            average.lerp_(value, 1 - d)
        else:
            average.copy_(value)


def ema_pairs(ema, model, prefixes):
    """(average, value) of the tensors whose names start so; weights that are tied come once."""
    averages = ema.state_dict()
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(averages[n], v) for n, v in named if n.startswith(prefixes) and n in averages]


def learning_rate(config, step, total):
    """A cosine to zero at `total`, or constant, times a linear warm-up."""
    decay = 0.5 * (1 + math.cos(math.pi * step / total)) if config.lr_schedule == "cosine" else 1.0
    return config.lr * min(1.0, (step + 1) / config.lr_warmup) * decay


FORMAT = 1  # of the checkpoints below


@contextmanager
def new_file(path, need):
    """A binary file of about `need` bytes that becomes `path` when it is whole and on the disk.

    UserError if it cannot be written; what was at `path` then stays, as after a kill at any moment.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # PyTorch makes a full disk a RuntimeError
        raise UserError(f"{path}: cannot be written ({error.__context__ or error}); {need:,} bytes "
                        "are needed, an old file is kept") from None
    finally:
        with suppress(OSError):
            part.unlink()


def write_file(path, content):
    """The bytes `content` as the file `path`, whole or not at all."""
    with new_file(path, len(content)) as file:
        file.write(content)


def tensor_bytes(value):
    """The bytes of the tensors in nested dicts."""
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return value.nbytes if torch.is_tensor(value) else 0


def save_checkpoint(path, checkpoint):
    """A dict of tensors and plain types, whole or not at all."""
    with new_file(path, tensor_bytes(checkpoint)) as file:
        torch.save(checkpoint, file)


def read_checkpoint(path, device="cpu"):
    """Tensors and plain types only; UserError unless it is a whole checkpoint of ours."""
    if not Path(path).exists():
        raise UserError(f"{path}: no checkpoint yet; train first with --train")
    with user_error(f"{path}: not a checkpoint of this script, or damaged"):
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format {checkpoint['format']}, this script reads "
                            f"{FORMAT}")
        names = {f.name for f in fields(Config)}
        if set(checkpoint["config"]) != names:
            raise UserError(f"{path}: made by another version of this script (its configuration "
                            f"differs in {', '.join(sorted(names ^ set(checkpoint['config'])))})")
        if checkpoint["stage"] not in (1, 2) or checkpoint["step"] < 0:
            raise ValueError(f"stage {checkpoint['stage']}, step {checkpoint['step']}")
        return checkpoint


def load(checkpoint_path, device="cpu"):
    """The trained model for notebooks: -> DiffMVAE with the EMA weights, in eval mode."""
    checkpoint = read_checkpoint(checkpoint_path, device)
    with user_error(f"{checkpoint_path}: its weights and its configuration do not fit together"):
        model = DiffMVAE(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval()


MVTCAE_ALPHA = 0.9  # alpha of the paper's [11], whose code has 5/6; as in SBM-VAE's code, [42]


def neg_mvtcae(model, x):
    """The objective of MVTCAE, a baseline (paper [11]), minimised: -> dict of (B,) like neg_elbo.

    (M - a)/M sum_i -log p(x_i|z) + beta (a/M sum_i KL(q || q_i) + (1 - a) KL(q || N(0, I))), where
    q is the product of all M experts q_i, from which z is drawn, and a = MVTCAE_ALPHA.
    """
    names, share = model.config.modalities, MVTCAE_ALPHA / len(model.config.modalities)
    mu, logvar = model.encode(x)                                 # (B, M, Z)
    joint = product_of_experts(mu, logvar, torch.ones_like(mu[..., 0], dtype=torch.bool))
    z = gaussian_sample(*joint)                                  # (B, Z)
    terms = {name: model.decoders[name].nll(z, x[name]) for name in names}
    to_experts = kl_between(*(a.unsqueeze(1) for a in joint), mu, logvar).sum(1)  # (B,)
    terms["kl"] = share * to_experts + (1 - MVTCAE_ALPHA) * kl_to_standard_normal(*joint)
    terms["total"] = ((1 - share) * sum(model.weights[name] * terms[name] for name in names)
                      + model.config.beta * terms["kl"])
    return terms


def stage1_loss(model, data, config, step):
    """One batch through Eq. 5, or through MVTCAE's objective; during the warm-up the diffusion
    term has weight 1/alpha^2."""
    if config.decoder == "diffusion":
        warm = step < config.warmup * config.steps
        model.decoders["image"].weighting = "v" if warm else config.weighting
    x = data.batch(config.batch_size, config.seed, step)
    return model.neg_elbo(x) if config.objective == "mopoe" else neg_mvtcae(model, x)


@torch.no_grad()
def full_posteriors(model, data, rows):
    """q(z|x) given all modalities, for many rows, with one of its ten captions for each picture:
    -> mu, logvar (N, Z) each."""
    parts, captions = [], np.random.default_rng(0).integers(10, size=len(rows))
    for k in range(0, len(rows), 256):
        with autocast(data.device):
            parts.append(model.posterior(data.rows(rows[k:k + 256], captions[k:k + 256])))
    return tuple(torch.cat(p) for p in zip(*parts))


def stage2_loss(model, posteriors, config, step):
    """[Sec. 3.4] the auxiliary model's loss on fresh samples of the full posterior."""
    mu, logvar = posteriors
    rows = drawn(lambda n: torch.randint(len(mu), (n,)), config.aux_batch_size // ranks()[1])
    rows = rows.to(mu.device)
    return {"total": model.aux.nll(gaussian_sample(mu[rows], logvar[rows]))}


class Means:
    """Running means of tensors by name, kept on the device until they are taken."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def take(self):
        """-> {name: float}, and start again."""
        means = {name: round(float(value) / self.count, 3) for name, value in self.sums.items()}
        self.__init__()
        return means


class Run:
    """One training: its folder, its weights and how far it is. The state is the checkpoint's."""

    def __init__(self, folder, config, device):
        self.folder, self.config, self.device = folder, config, device
        self.model, self.ema = build(config, device)
        self.stage, self.step, self.optimizer_state = 1, 0, None
        self.stop = None  # the signal that asked for an end, if any
        self.history = []  # the means logged in this stage
        self.said = set()  # (stage, name) of the hints already given

    def restore(self):
        """Continue from the folder's checkpoint; lines of the log after it are dropped."""
        checkpoint = read_checkpoint(self.folder / "checkpoint.pt", self.device)
        if checkpoint["config"] != asdict(self.config):
            theirs, ours = checkpoint["config"], asdict(self.config)
            names = [n for n in ours if ours[n] != theirs[n]]
            raise UserError(f"{self.folder}: --resume with another {', '.join(names)} than the "
                            "run was started with; give the same flags, or --overwrite")
        with user_error(f"{self.folder}/checkpoint.pt: weights of another model; --overwrite "
                        "starts over"):
            self.model.load_state_dict(checkpoint["model"])
            self.ema.load_state_dict(checkpoint["ema"])
            self.stage, self.step = checkpoint["stage"], checkpoint["step"]
            self.optimizer_state = checkpoint["optimizer"]
        path, rows = self.folder / "log.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                if (row["stage"], row["step"]) <= (self.stage, self.step):
                    rows.append(row)
            except (ValueError, TypeError, KeyError):  # a line cut short by a kill
                continue
        self.history = [row for row in rows if row["stage"] == self.stage and "total" in row]
        self.said = {(row["stage"], row.get("about")) for row in rows if "hint" in row}
        self.log_file_of(rows)

    def save(self, optimizer):
        if ranks()[0] > 0:
            return
        save_checkpoint(self.folder / "checkpoint.pt", {
            "format": FORMAT, "config": asdict(self.config), "stage": self.stage, "step": self.step,
            "model": self.model.state_dict(), "ema": self.ema.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None})

    def log_file_of(self, rows):
        """Start the log anew with these rows."""
        if ranks()[0] > 0:
            return
        write_file(self.folder / "log.jsonl",
                   "".join(json.dumps(row) + "\n" for row in rows).encode())

    def log(self, **row):
        if ranks()[0] > 0:
            return
        path, row = self.folder / "log.jsonl", {"stage": self.stage, "step": self.step, **row}
        with user_error(f"{path}: cannot be written; is the disk full? --resume goes on from the "
                        "last checkpoint"), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def warn(self, found):
        """Print and log every hint that has not been given yet."""
        for name, hint in found.items():
            if (self.stage, name) not in self.said:
                tqdm.write(f"*** stage {self.stage}, step {self.step}: {hint} ***")
                self.log(hint=hint, about=name)
                self.said.add((self.stage, name))


def finite_or_stop(run, values):
    """UserError naming the step and the values that are not finite."""
    if not bool(sum(value.sum() for value in values.values()).isfinite()):
        bad = [name for name, value in values.items() if not bool(value.isfinite().all())]
        raise UserError(f"stage {run.stage}, step {run.step}: {', '.join(bad)} not finite; the "
                        "last checkpoint is kept, a smaller --lr may help")


def seed_from(*numbers):
    """Seed PyTorch with a hash of the numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def gradient(optimizer, params, terms, grad_clip):
    """Set the gradients of the total, clipped together. -> their norm before clipping."""
    optimizer.zero_grad()
    terms["total"].mean().backward()                             # the one mean over the batch
    average([p.grad for p in params if p.grad is not None])
    return nn.utils.clip_grad_norm_(params, grad_clip)


GAPS = {"image": "gap", "text": "text gap"}  # how coherence() names them, by decoder


def hints(history, figures):
    """What looks wrong in a training though nothing fails: -> {name: one line}.

    history: rows of the log, of one stage; figures: those of coherence(), {} in stage 2.
    """
    first, last, found = history[0], history[-1], {}
    for name in ("mask", "attr", "text") if figures else ("total",):
        if name in last and len(history) >= 5 and \
                sum(row[name] for row in history[-5:]) / 5 > 0.98 * first[name] > 0:
            found[name] = f"{name} {last[name]} has not fallen since the start: " + (
                "is it cut off from the gradient, or --lr wrong?" if figures else
                "--aux-steps may be too few, or z so close to N(0, I) that nothing is to learn")
    if figures.get("information", math.inf) < 1:
        found["information"] = f"z holds {figures['information']} nats of x: the posterior has " \
                               "collapsed; a smaller --beta may help"
    for part, gap in GAPS.items():
        if gap in figures and figures[gap] < 0.01 * abs(figures[f"{part} nll"]):
            found[gap] = f"{gap} {figures[gap]} nats of {figures[f'{part} nll']}: the {part} " \
                         "decoder hardly uses z, and what it makes will not fit what is given; " \
                         "longer training or a larger warm-up (image) or weight (text) may help"
    return found


def without_gradient(model, prefixes):
    """Names of the sub-networks that the last step gave no gradient."""
    alive = {}
    for name, p in model.named_parameters():
        if name.startswith(prefixes):
            part = ".".join(name.split(".")[:2])
            alive[part] = alive.get(part, False) or p.grad is not None and bool(p.grad.any())
    return {part: f"{part} gets no gradient" for part, moves in alive.items() if not moves}


def one_step(run, optimizer, params, pairs, loss_of, total):
    """One step of Adam and of the averages: -> {name: mean over the batch}, and the gradient's
    norm. UserError, before any weight changes, if they are not finite."""
    config = run.config
    seed_from(config.seed, run.stage, run.step)
    with autocast(run.device):
        terms = loss_of(run.step)                                # dict of (B,)
    means = {name: value.detach().mean() for name, value in terms.items()}
    average(list(means.values()))
    finite_or_stop(run, means)
    optimizer.param_groups[0]["lr"] = learning_rate(config, run.step, total)
    norm = gradient(optimizer, params, terms, config.grad_clip)
    finite_or_stop(run, {"the gradient": norm})
    optimizer.step()
    update_ema(pairs, config.ema, run.step)
    run.step += 1
    return {**means, "grad_norm": norm}


def fit(run, prefixes, total, loss_of, probe=dict):
    """Train the sub-networks named by `prefixes` until step `total`: the loop of both stages.

    loss_of(step) -> dict of (B,) terms with "total"; its random numbers come from (seed, stage,
    step), so that resuming needs no generator state. probe() -> figures now and then.
    """
    config, device, first = run.config, run.device, ranks()[0] == 0
    params = [p for n, p in run.model.named_parameters() if n.startswith(prefixes)]
    pairs = ema_pairs(run.ema, run.model, prefixes)
    optimizer = torch.optim.Adam(params, config.lr, fused=device.type in ("cpu", "cuda"))
    if run.optimizer_state is not None:
        optimizer.load_state_dict(run.optimizer_state)
        run.optimizer_state = None
    means, start = Means(), time.time()
    run.model.train()
    with tqdm(total=total, initial=run.step, desc=f"stage {run.stage}", mininterval=1,
              disable=not first) as bar:
        while run.step < total and not told_to_stop(run):
            means.add(one_step(run, optimizer, params, pairs, loss_of, total))
            bar.update()
            if run.step % config.log_every == 0 or run.step == total:
                run.history.append(means.take())
                run.log(**run.history[-1], lr=optimizer.param_groups[0]["lr"],
                        seconds=round(time.time() - start, 1))
                bar.set_postfix({name: f"{value:.4g}" for name, value in run.history[-1].items()})
            if first and (run.step % config.probe_every == 0 or run.step == total):
                figures = probe()
                late = {1: 0.2, 2: 0.5}[run.stage] * total  # before, none of them means anything
                if run.history and run.step >= late:
                    run.warn(hints(run.history, figures) | without_gradient(run.model, prefixes))
            if run.step % config.save_every == 0:
                run.save(optimizer)
    run.save(optimizer)


def in_bits(data, config, name, value):
    """A modality as {0, 1} features for F1: text by what it says, (n, 2, L) as given or (n, L) as
    generated; masks and attributes as they are."""
    if name != "text":
        return value
    return data.said(captions_of(value[:, 1] if value.dim() == 3 else value, config))


@torch.no_grad()
def coherence(model, data, rows):
    """Figures that show what losses do not, on held-out rows of the data: -> dict of floats.
    Seeds PyTorch anew.

    "information" (nats): what z tells of x, for Gaussian means; near 0 the posterior collapsed.
    "gap" (nats): how much worse than "image nll" the image decoder does with the z of another
    sample; near 0 it ignores z. "text nll", "text gap": the same of captions. "mask->image"
    and so on (F1): the image made from that modality, read by the model's own encoder, against
    what was given. "image->mask" and so on (F1): what it reads off a real image, against the
    truth; of text, that is what the first caption says.
    """
    x, names = data.rows(rows), model.config.modalities
    bits = {n: in_bits(data, model.config, n, x[n]) for n in names[1:]}

    def f1(image, name):
        """What the model's own encoder and decoder see in an image, against the truth."""
        made = model.decoders[name].sample(model.posterior({"image": image})[0])
        return mean_f1(in_bits(data, model.config, name, made), bits[name])

    def nll(name, z):
        torch.manual_seed(0)  # the same noise and times for every z
        return model.decoders[name].nll(z, x[name]).mean().item()

    with autocast(data.device):
        mu, logvar = model.posterior(x)
        z, spread = gaussian_sample(mu, logvar), mu.var(0) / logvar.exp().mean(0)  # (B, Z), (Z,)
        figures = {"information": 0.5 * spread.log1p().sum().item()}
        for name, gap in GAPS.items():
            if name in names:
                figures[f"{name} nll"] = nll(name, z)
                figures[gap] = nll(name, z.roll(1, 0)) - figures[f"{name} nll"]
        for name in names[1:]:
            made = model.sample_conditional({name: x[name]}, sampler="dpm++", steps=10)["image"]
            figures[f"{name}->image"] = f1(made, name)
            figures[f"image->{name}"] = f1(x["image"], name)
    return {name: round(value, 3) for name, value in figures.items()}


def train(run, data):
    """Stage 1: Eq. 5 end to end [Sec. 3.2]. Stage 2: the auxiliary model [Sec. 3.4]."""
    config = run.config
    held_out = data.split["val"][:64]

    def probe():
        figures = coherence(run.ema, data, held_out)
        run.log(**figures)
        tqdm.write(f"step {run.step}: " + ", ".join(f"{n} {v}" for n, v in figures.items()))
        name = run.folder / "samples" / f"train-{run.step:06d}.png"
        sample_pictures(run.ema, data, name, [config.modalities[1]], 4, config.seed,
                        dict(sampler="dpm++", steps=10), quiet=True)
        return figures

    if run.stage == 1:
        fit(run, ("encoders.", "decoders."), config.steps,
            lambda step: stage1_loss(run.model, data, config, step), probe)
        if told_to_stop(run):
            return
        run.stage, run.step, run.history = 2, 0, []
    posteriors = full_posteriors(run.ema, data, data.split["train"])
    mu, logvar = posteriors
    for aux in (run.model.aux, run.ema.aux):  # moments of the samples, in closed form
        aux.mean.copy_(mu.mean(0))
        aux.std.copy_((mu.var(0) + logvar.exp().mean(0)).sqrt())
    fit(run, ("aux.",), config.aux_steps,
        lambda step: stage2_loss(run.model, posteriors, config, step))


# === §8 Sampling to pictures [Sec. 3.3] [Sec. 3.4] ===

def read_given(tokens, config):
    """`--given` words -> (names, None) to take from the test split, or (names, x) of the user.

    "mask" names a modality of the test split; "mask=face.png", "image=photo.jpg",
    "attr=Smiling,Bangs" and "text=a red bird" are the user's own input. UserError on anything
    else.
    """
    pairs = [token.split("=", 1) for token in tokens]
    names, known = [pair[0] for pair in pairs], config.modalities
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"--given {' '.join(tokens)}: choose from {', '.join(known)}, each once")
    if all(len(pair) == 1 for pair in pairs):
        return names, None
    if any(len(pair) == 1 for pair in pairs):
        raise UserError(f"--given {' '.join(tokens)}: either all from the test split "
                        f"({' '.join(known[1:])}) or all your own ({known[1]}=...)")
    return names, {name: read_own(name, value, config) for name, value in pairs}


def read_own(name, value, config):
    """One modality of the user's own: -> (1, ...) tensor. A mask is whatever is not black."""
    if name == "text":
        if not re.search(r"\w", value):
            raise UserError(f"--given text={value}: no words; say what the bird looks like")
        if not config.tokenizers:  # no model yet, which alone knows how to count tokens
            return None
        ids, cut = tokenize([value], config)
        if cut:
            raise UserError(f"--given text: longer than the {config.text_length - 2} tokens that "
                            "the model reads; shorten it")
        return torch.from_numpy(ids).long()                      # (1, 2, L)
    if name == "attr":
        chosen = [word for word in value.split(",") if word]
        unknown = [word for word in chosen if word not in ATTRIBUTES]
        if unknown:
            raise UserError(f"--given attr: no attribute {', '.join(unknown)}; the model knows "
                            f"{', '.join(ATTRIBUTES)}")
        return torch.tensor([[float(word in chosen) for word in ATTRIBUTES]])
    try:
        picture = Image.open(value).convert("RGB")
    except data_prep.DAMAGED as error:
        raise UserError(f"--given {name}={value}: cannot be read as a picture ({error})") from None
    if name == "mask":
        picture = Image.fromarray(np.asarray(picture).any(-1).astype(np.uint8) * 255)
    pixels = np.array(picture.resize([config.image_size] * 2, Image.Resampling.BILINEAR))
    arrays = {name: pixels[None] if name == "image" else (pixels[None] > 127).astype(np.uint8)}
    return to_tensors(arrays, "cpu")[name]


def in_words(name, values, config):
    """Attributes (n, 18) -> n lists of the names they have; text (n, L) -> n captions."""
    if name == "text":
        return captions_of(values, config)
    return [[word for word, value in zip(ATTRIBUTES, row) if value > 0.5]
            for row in values.tolist()]


def written(lines, width, height):
    """Lines of text as a picture of width x height."""
    picture = Image.new("RGB", (width, height), "white")
    pen, step = ImageDraw.Draw(picture), min(14, (height - 4) // len(lines))
    for k, line in enumerate(lines):
        pen.text((4, 2 + k * step), line, "black", font=ImageFont.load_default(min(12, step)))
    return picture


def cell(name, value, width, height):
    """One modality of one item as a picture of width x height; words are written out."""
    if name == "attr":
        lines = [word.replace("_", " ") for word in value] or ["(none of the 18)"]
        return written(lines, width, height)
    if name == "text":
        return written(textwrap.wrap(value, width // 6 - 1)[:12] or ["(nothing)"], width, height)
    pixels = eight_bits(2 * value - 1 if name == "mask" else value).expand(3, -1, -1)
    pixels = pixels.permute(1, 2, 0).cpu().numpy()               # (H, W, 3)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def draw_grid(path, title, columns, rows):
    """Save a labelled grid: columns [(label, name, values)], one value an item; rows: labels.
    Captions are written under the pictures of the column before them, with their own label."""
    tile, label, head, gap = 128, 72, 44, 6
    under = 84 * any(name == "text" for _, name, _ in columns)
    wide = 168 if under else tile
    widths = [168 if name == "attr" else wide for _, name, _ in columns]
    places, x = [], label  # of each column: left edge and height within the row
    for k, (_, name, _) in enumerate(columns):
        if name == "text" and k and columns[k - 1][1] == "image":
            places.append((places[-1][0], tile + 18))
        else:
            places.append((x, 0))
            x += widths[k] + gap
    height, font = tile + under + gap, ImageFont.load_default(13)
    across = max(x, math.ceil(font.getlength(title)) + 12)
    grid = Image.new("RGB", (across, head + height * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((6, 4), title, "black", font=font)
    for (text, name, values), (left, top), width in zip(columns, places, widths):
        if top == 0:
            pen.text((left + 2, 24), text, "black", font=font)
        for k, value in enumerate(values):
            y = head + k * height + top
            if top:
                pen.text((left + 4, y - 17), text + ":", "gray", font=font)
            size = (width, under - 18) if top else (width if name in ("attr", "text") else tile,
                                                    tile)
            grid.paste(cell(name, value, *size), (left, y))
    for k, text in enumerate(rows):
        pen.text((6, head + 8 + k * height), text, "black", font=font)
    png = io.BytesIO()
    grid.save(png, "PNG")
    write_file(path, png.getvalue())


def sample_pictures(model, data, path, given, num, seed, options, prior="aux", own=None,
                    quiet=False):
    """Generate, draw the grid at `path` and write what it shows beside it as JSON.

    given: names, [] for unconditional sampling; taken from the first `num` test items, or from
    `own`, one item that is then sampled `num` times. options: those of DiffMVAE.decode.
    """
    generator, config = torch.Generator().manual_seed(seed), model.config
    start, kind, columns = time.time(), "sample", []
    with autocast(data.device):
        if not given:
            made = model.sample_unconditional(num, prior, generator, **options)
        else:
            if own is None:
                x, n, kind = data.rows(data.split["test"][:num]), 1, "test"
            else:
                x, n = {name: a.to(data.device) for name, a in own.items()}, num
            made = model.sample_conditional({name: x[name] for name in given}, n, generator,
                                            **options)
            count = len(made["image"])
            x = {name: a.expand(count, *a.shape[1:]) for name, a in x.items()}
            if "text" in x:
                x["text"] = x["text"][:, 1]
            notes = {n: f"given: {n}" if n in given else f"{n} (not given)" for n in x}
            order = config.modalities if "text" in x else [*given, *x]
            columns = [(notes[n], n, x[n]) for n in dict.fromkeys(order) if n in x]
    columns += [("generated: " + name, name, made[name]) for name in config.modalities]
    columns = [(text, name, in_words(name, values, config) if name in ("attr", "text") else values)
               for text, name, values in columns]
    labels = [f"{kind} {k}" for k in range(len(made["image"]))]
    source = " + ".join(given) if given else f"nothing (prior: {prior})"
    nucleus = f", top-p {options['top_p']}" if options.get("top_p") else ""
    title = f"given {source}; {options['sampler']}, {options['steps']} steps{nucleus}, seed {seed}"
    draw_grid(path, title, columns, labels)
    record = {"title": title, "given": given, "rows": [
        {"item": label, **{text: values[k] for text, name, values in columns
                           if name in ("attr", "text")}} for k, label in enumerate(labels)]}
    write_file(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
    if not quiet:
        print(f"{path}: {len(labels)} rows, {time.time() - start:.1f} s")


# === §9 Evaluation ===

CHUNK = 50  # items at a time


def f1_samples(pred, target):
    """Sample-average F1 of binary predictions: (B, ...), (B, ...) in {0, 1} -> (B,).

    2 TP / (predicted + true positives); 0 where both are empty, as in scikit-learn's
    average="samples" with its default zero_division.
    """
    pred, target = pred.flatten(1) > 0.5, target.flatten(1) > 0.5
    both = (pred & target).sum(1)
    return 2 * both / (pred.sum(1) + target.sum(1)).clamp(min=1)


class Judge(nn.Module):
    """Reads the other modalities off an image; shares nothing with the model it judges.

    forward: (B, 3, H, W) -> features (B, 128) and logits by name: "attr" (B, 18) and "mask"
    (B, 1, H, W), or "text" (B, words), one for each word of the data's vocabulary.
    """

    def __init__(self, size, words=0):
        super().__init__()

        def conv(a, b, stride=1):
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b),
                                 nn.ReLU())

        self.body = nn.Sequential(conv(3, 32), conv(32, 64, 2), conv(64, 64), conv(64, 128, 2),
                                  conv(128, 128))
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(),
                                      nn.Linear(128 * 64, 128), nn.ReLU())
        if words:
            self.text = nn.Linear(128, words)
        else:
            self.attr = nn.Linear(128, len(ATTRIBUTES))
            self.mask = nn.Sequential(nn.Upsample(scale_factor=2), conv(128, 64),
                                      nn.Upsample(scale_factor=2), conv(64, 32),
                                      nn.Conv2d(32, 1, 3, padding=1))

    def forward(self, image):
        h = self.body(image)
        features = self.features(h)
        if hasattr(self, "text"):
            return features, {"text": self.text(features)}
        return features, {"attr": self.attr(features), "mask": self.mask(h)}


JUDGE_TOYS = 12_000


def train_judge(data, seed, steps=None, batch_size=64):
    """Supervised training on freshly drawn toys, or on a real data set's training split: 800 steps
    or, if that is longer, ten passes over real data."""
    steps = steps or (800 if data.toy else max(800, 10 * data.batches(batch_size)))
    if data.toy:  # nothing that the model has seen: another seed of the generator
        toys = TOYS["cub" if data.captions else "celeba"](JUDGE_TOYS, data.size, 1_000_003 + seed)
        data = Data(toys, {"train": np.arange(JUDGE_TOYS)}, True, data.device)
    if data.captions:  # whatever one of the ten captions says is true of the picture
        said = torch.stack([data.said(ten).amax(0) for ten in data.captions])  # (N, words)
        data = copy.copy(data)
        data.arrays = {"image": data.arrays["image"], "words": said}
    torch.manual_seed(seed)
    judge = Judge(data.size, len(data.vocabulary)).to(data.device)
    optimizer = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in tqdm(range(steps), desc="judge", mininterval=1):
        x = data.batch(batch_size, seed, step)
        with autocast(data.device):
            _, read = judge(x["image"])
        loss = sum(F.binary_cross_entropy_with_logits(
            logits.float(), x["words" if name == "text" else name])
            for name, logits in read.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def get_judge(path, data):
    """The judge cached at `path`, trained and saved there first if need be."""
    if not path.exists():
        weights = train_judge(data, seed=0).state_dict()
        save_checkpoint(path, {"words": data.vocabulary, "weights": weights})
    with user_error(f"{path}: not a judge of this data, or damaged; delete it to train it anew"):
        saved = torch.load(path, map_location=data.device, weights_only=True)
        if saved["words"] != data.vocabulary:
            raise ValueError("it reads other words")
        judge = Judge(data.size, len(data.vocabulary)).to(data.device)
        judge.load_state_dict(saved["weights"])
    return judge.eval()


def frechet_distance(a, b):
    """Between Gaussians fitted to features (N, D) and (M, D) [8]: |mu_a - mu_b|^2 + tr(C_a + C_b
    - 2 (C_a C_b)^1/2). That root has the trace of (R C_b R)^1/2, where R R = C_a.
    """
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)                # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T      # (D, D) R
    roots = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace()
            - 2 * roots.sum()).item()


def load_inception(path, device):
    """The network that FID is defined with, from pt_inception-2015-12-05-6726825d.pth of the
    pytorch-fid project: -> function of images (B, 3, H, W) in [-1, 1] -> features (B, 2048).

    It is torchvision's Inception v3 but for the pooling inside nine blocks: means leave out the
    padding, and the last block takes the largest value instead of the mean.
    """
    from torchvision.models import Inception3  # here, as importing it takes seconds
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    with user_error(f"--inception {path}: not pytorch-fid's weights of Inception v3, or damaged"):
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.fc = nn.Identity()
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c"):
        repool(getattr(net, f"Mixed_{name}"), largest=name == "7c")
    net = net.to(device).eval()

    @torch.no_grad()
    def features(image):
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(device.type, enabled=False), exact:
            return torch.cat([net(2 * F.interpolate(
                eight_bits(part).float() / 255, size=(299, 299), mode="bilinear") - 1)
                for part in image.split(CHUNK)])
    return features


def repool(block, largest):
    """Feed the block's pooling branch with another 3x3 pooling of the block's input."""
    seen = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, __: (
        F.max_pool2d(seen.pop(), 3, 1, 1) if largest else
        F.avg_pool2d(seen.pop(), 3, 1, 1, count_include_pad=False)))


def load_clip(name, device):
    """A CLIP model and its processor, from a folder or the Hugging Face hub."""
    from transformers import CLIPModel, CLIPProcessor
    with user_error(f"--clip {name}: no CLIP model"):
        net = CLIPModel.from_pretrained(name).to(device).eval()
        return net, CLIPProcessor.from_pretrained(name)


@torch.no_grad()
def clip_score(clip, image, captions):
    """100 max(cos, 0) between the embeddings of pictures (B, 3, H, W) and B captions: -> (B,).
    The definition of paper [7] with the factor 100, as the paper's Table 2 seems to have."""
    net, processor = clip
    batch = processor(text=captions, images=list(eight_bits(image)), return_tensors="pt",
                      padding=True, truncation=True).to(image.device)
    with torch.autocast(image.device.type, enabled=False):
        out = net(**batch)
    return 100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)


def eight_bit_nll(x, mean, std):
    """-log P of 8-bit values x in [-1, 1] under N(mean, std^2) cut into 256 bins, the outer ones
    open: (B, ...) -> (B,) nats, dims summed."""
    x, mean, std = (a.cpu().double() for a in (x, mean, torch.as_tensor(std)))
    low = ((x - 1 / 255 - mean) / std).masked_fill(x < -1 + 1 / 255, -math.inf)
    high = ((x + 1 / 255 - mean) / std).masked_fill(x > 1 - 1 / 255, math.inf)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)  # the same mass
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log1p(-torch.exp(log_low - log_high))).flatten(1).sum(1)


def image_bound(decoder, z, x):
    """-log P(8-bit image | z), of a diffusion decoder its upper bound: -> (B,) nats on the CPU.

    Diffusion: [Eq. 2], mean of four draws, plus the two ends that the loss leaves out:
    KL(q(x_1|x_0) || N(0, I)), and the step from t_min to the 256 values, N(x_0_hat,
    (sigma/alpha)^2) in bins. Feed-forward: the Gaussian in bins, with the variance that suits these
    very images best, which favours it: the 1/2 of training costs 7.8 bits a value at its best.
    """
    if isinstance(decoder, GaussianDecoder):
        mean = decoder.net(z).float()
        return eight_bit_nll(x, mean, (x - mean).square().mean().sqrt())
    sde, eps_net = decoder.sde, lambda x_t, t: decoder.eps(x_t, t, z)
    one, t = torch.ones(len(x), device=x.device), torch.full((len(x),), sde.t_min, device=x.device)
    mu = (per_sample(sde.alpha(one), x) * x).flatten(1)          # (B, D)
    prior = kl_to_standard_normal(mu, 2 * sde.sigma(one).log().unsqueeze(1).expand_as(mu))
    score = sum(sde.loss(eps_net, x, "likelihood") for _ in range(4)) / 4  # [Eq. 2]
    alpha, sigma = per_sample(sde.alpha(t), x), per_sample(sde.sigma(t), x)
    eps = torch.randn_like(x)
    error = eps - eps_net(alpha * x + sigma * eps, t)            # x_0_hat = x + sigma / alpha error
    last = eight_bit_nll(x, x + sigma / alpha * error, sigma / alpha)
    return (prior + score).cpu() + last


def background(image):
    """Mean colour of the upper left corner, which no toy face reaches: (B, 3, H, W) -> (B, 3)."""
    k = max(1, image.shape[-1] // 10)
    return image[:, :, :k, :k].mean((2, 3))


def correlation(a, b):
    """Pearson's, of all numbers of two tensors of one shape."""
    return np.corrcoef(a.flatten().cpu(), b.flatten().cpu())[0, 1]


def read_images(judge, image):
    """The judge's features (N, 128), and by name what it reads, in {0, 1}: see Judge."""
    features, logits = zip(*map(judge, image.split(250)))
    return torch.cat(features).float(), {
        name: (torch.cat([part[name] for part in logits]) > 0).float() for name in logits[0]}


# What the paper reports (Tables 1 to 3) for the models that can be trained here
PAPER = {
    "celeba": {
        "figures": ("attr from image + mask: F1", "attr from image: F1",
                    "image from mask + attr: FID", "image from mask: FID", "image from attr: FID",
                    "image from nothing: FID", "mask from image + attr: F1", "mask from image: F1"),
        "Diff-MVAE": (0.76, 0.75, 42.3, 41.9, 45.1, 43.5, 0.90, 0.90),
        "Diff-MVAE*": (0.76, 0.76, 28.3, 28.5, 32.3, 28.4, 0.90, 0.90),
        "MoPoE*": (0.74, 0.75, 104.8, 105.8, 182.3, 139.8, 0.90, 0.90),
        "MoPoE": (0.68, 0.71, 114.9, 101.1, 186.7, 164.8, 0.85, 0.92),
        "MVTCAE": (0.71, 0.69, 94.0, 84.2, 87.2, 162.2, 0.89, 0.89),
        "Supervised": (None, 0.79, None, None, None, None, None, 0.94)},
    "cub": {
        "figures": ("image from text: FID", "image from nothing: FID", "text from image: CLIP",
                    "image from text: CLIP", "image + text from nothing: CLIP"),
        "Diff-MVAE": (57.4, 70.4, 27.7, 28.8, 28.23),
        "Diff-MVAE*": (35.5, 37.5, 28.1, 28.52, 28.12),
        "MoPoE": (290.6, 199.6, 26.8, 22.0, 24.8),
        "MVTCAE": (176.3, 168.9, 27.1, 26.6, 28.08)}}


def model_name(config):
    """Which row of the paper's tables a configuration is. MoPoE* has all that Diff-MVAE* has but
    the decoder; MoPoE also the prior expert of its own paper, [35]."""
    if config.decoder == "diffusion":
        name = "Diff-MVAE*" if config.weighting == "simple" else "Diff-MVAE"
        name += " with MVTCAE's objective" * (config.objective == "mvtcae")
        return name + " with a prior expert" * bool(config.prior_expert)
    if config.objective == "mvtcae":
        return "MVTCAE"
    return "MoPoE" if config.prior_expert else "MoPoE*"


class Evaluation:
    """A model against the first `num` test items of its data.

    inception: of load_inception, for FID; clip: of load_clip. Always there: FD-judge, the Fréchet
    distance of the judge's features, which is not FID.
    """

    def __init__(self, model, data, judge, num, inception=None, clip=None):
        self.model, self.judge, self.clip, self.data = model, judge, clip, data
        rows = data.split["test"][:num]
        self.x = data.rows(rows)
        self.given = {n: self.bits(n, self.x[n]) for n in model.config.modalities[1:]}
        self.true = dict(self.given)
        if data.captions:  # all that the ten captions of each say
            self.true["text"] = torch.stack([data.said(data.captions[r]).amax(0) for r in rows])
        self.features = {"FD-judge": lambda image: read_images(judge, image)[0]}
        if inception:
            self.features["FID"] = inception
        with torch.no_grad(), autocast(data.device):
            self.real = {name: f(self.x["image"]) for name, f in self.features.items()}

    def bits(self, name, value):
        return in_bits(self.data, self.model.config, name, value)

    @torch.no_grad()
    def run(self, repeats, seed, options):
        """-> {figure: {"mean", "std", "paper"}} over that many repeats, with seeds from `seed`.
        std is None for one repeat; mean is None for what the paper has and was not measured here.
        options: those of DiffMVAE.decode."""
        n, m = len(self.x["image"]), len(self.model.config.modalities)
        with autocast(self.data.device), tqdm(
                total=repeats * (2 ** m + 1) * math.ceil(n / CHUNK), desc="eval") as bar:
            fixed = self.supervised()
            drawn = [self.repeat(seed + k, options, bar) for k in range(repeats)]
        paper = self.paper()
        out = {name: {"mean": None, "std": None, "paper": number} for name, number in paper.items()}
        for name in [*fixed, *drawn[0]]:
            values = np.array([figures.get(name, fixed.get(name)) for figures in drawn])
            out[name] = {"mean": round(values.mean(), 4), "paper": paper.get(name), "std": None
                         if repeats == 1 or name in fixed else round(values.std(ddof=1), 4)}
        return out

    def paper(self):
        """The paper's row for this model, {figure: number}. Its baselines draw z from N(0, I)."""
        config = self.model.config
        table = PAPER[config.dataset.removesuffix("-toy")]
        source = "nothing" if config.decoder == "diffusion" else "N(0, I)"
        row = {name.replace("nothing", source): number for name, number in
               zip(table["figures"], table.get(model_name(config), ()))}
        row.update({f"Supervised, {name}": number for name, number in
                    zip(table["figures"], table.get("Supervised", ())) if number})
        return row

    def supervised(self):
        """The judge's own row of Table 3, and what bounds the other figures from below, another
        item's truth, and with captions from above: a true caption says but a part."""
        read = read_images(self.judge, self.x["image"])[1]
        out = {f"Supervised, {n} from image: F1": mean_f1(read[n], self.true[n]) for n in read}
        if "text" in self.x:
            out["Supervised, one caption from image: F1"] = mean_f1(read["text"],
                                                                    self.given["text"])
            out["one true caption against all ten: F1"] = mean_f1(self.given["text"],
                                                                  self.true["text"])
        out.update({f"{n} of another item: F1": mean_f1(self.given[n].roll(1, 0), self.true[n])
                    for n in self.given})
        return out

    def repeat(self, seed, options, bar):
        """One draw of everything that the seed decides: -> {figure: float}."""
        names, out = self.model.config.modalities, {}
        for subset in all_subsets(len(names))[:-1].tolist():
            given = [n for n, there in zip(names, subset) if there]
            wanted = [n for n in names if n not in given or given == ["image"]]
            made = self.draw(lambda a, b, generator: self.model.sample_conditional(
                {n: self.x[n][a:b] for n in given}, generator=generator, names=wanted,
                **options), seed, bar)
            out.update(self.compare(" + ".join(given), given, made))
        for prior, source in (("aux", "nothing"), ("gaussian", "N(0, I)")):
            made = self.draw(lambda a, b, generator: self.model.sample_unconditional(
                b - a, prior, generator, **options), seed, bar)
            out.update(self.compare(source, [], made))
        torch.manual_seed(seed)
        return {**out, **self.bounds(bar)}

    def draw(self, sample, seed, bar):
        """sample(start, stop, generator) for all items in chunks: -> dict of modalities."""
        generator, parts = torch.Generator().manual_seed(seed), []
        for k in range(0, len(self.x["image"]), CHUNK):
            parts.append(sample(k, min(k + CHUNK, len(self.x["image"])), generator))
            bar.update()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def compare(self, source, given, made):
        """Figures of what was made from `source`. Text counts by the words of the vocabulary: a
        generated caption against all that the item's ten captions say, an image against the one
        caption that it was made from or with."""
        out, bits = {}, {n: self.bits(n, made[n]) for n in made if n != "image"}
        for name in bits if given else ():
            out[f"{name} from {source}: F1"] = mean_f1(bits[name], self.true[name])
            if name == "text":  # frequent words suit every bird; this shows how much
                out[f"text from {source}: F1 with another's"] = mean_f1(
                    bits[name], self.true[name].roll(1, 0))
        if "image" in made:
            for name, features in self.features.items():
                out[f"image from {source}: {name}"] = frechet_distance(
                    features(made["image"]), self.real[name])
            read = read_images(self.judge, made["image"])[1]
            if given:
                out.update({f"image from {source}: judged {n}, F1": mean_f1(read[n], self.given[n])
                            for n in given if n != "image"})
            else:
                out.update({f"image + {n} from {source}: agree, F1": mean_f1(read[n], bits[n])
                            for n in bits})
        if given == ["image"]:
            out["image from image: corner correlation"] = correlation(
                background(made["image"]), background(self.x["image"]))
        if self.clip:
            out.update(self.clip_figures(source, given, made))
        return out

    def clip_figures(self, source, given, made):
        """CLIP score of the pair of picture and caption: given ones as they are, the rest made."""
        image = (self.x if "image" in given else made)["image"]
        ids = self.x["text"][:, 1] if "text" in given else made["text"]
        captions = captions_of(ids, self.model.config)
        kind = {"image": "text", "text": "image"}.get(source, "image + text")
        scores = [clip_score(self.clip, image[k:k + CHUNK], captions[k:k + CHUNK])
                  for k in range(0, len(image), CHUNK)]
        return {f"{kind} from {source}: CLIP": torch.cat(scores).mean().item()}

    def bounds(self, bar):
        """Upper bounds on -log P(x) of 8-bit images with all the rest [Eq. 5], in bits over the
        number of the image's values: A drawn as in training, and A = all, with its terms."""
        sums, n, dims = Counter(), len(self.x["image"]), self.x["image"][0].numel()
        subsets = all_subsets(len(self.x))
        for k in range(0, n, CHUNK):
            x = {name: a[k:k + CHUNK] for name, a in self.x.items()}
            drawn = subsets[torch.randint(len(subsets), (len(x["image"]),))]  # (B, M)
            for label, subset in (("A drawn", drawn), ("A = all", torch.ones_like(drawn))):
                mu, logvar = self.model.posterior(x, subset)
                z = gaussian_sample(mu, logvar)
                terms = {name: decoder.nll(z, x[name]) if name != "image" else
                         image_bound(decoder, z, x[name])
                         for name, decoder in self.model.decoders.items()}
                terms["KL"] = kl_to_standard_normal(mu, logvar)
                nats = {name: value.sum().item() / n for name, value in terms.items()}
                sums[f"Eq. 5 bound, {label}: bits per image value"] += \
                    sum(nats.values()) / dims / math.log(2)
                if label == "A = all":
                    sums.update({f"Eq. 5 bound, {label}: {part}, nats": value
                                 for part, value in nats.items()})
                    if "text" in x:
                        sums["text, z of another item: nats"] += self.model.decoders["text"].nll(
                            z.roll(1, 0), x["text"]).sum().item() / n
            bar.update()
        return dict(sums)


def mean_f1(pred, target):
    """Mean of f1_samples over the items: a number."""
    return f1_samples(pred, target).mean().item()


def print_summary(figures):
    """One line a figure: mean, standard deviation over the repeats, the paper's number."""
    print(f"  {'':44s} {'here':>10s} {'':>9s} {'paper':>8s}")
    for name, row in figures.items():
        mean = "not run" if row["mean"] is None else f"{row['mean']:.3f}"
        std = "" if row["std"] is None else f"± {row['std']:.3f}"
        paper = "" if row["paper"] is None else f"{row['paper']:g}"
        print(f"  {name:44s} {mean:>10s} {std:>9s} {paper:>8s}".rstrip())


# === §10 Command line ===

def parse_args(argv=None):
    """All flags, checked."""
    parser = data_prep.Parser(
        prog="diffmvae.py",
        description="Diff-MVAE: train, sample and evaluate. Modes combine, in that order.")
    add = parser.add_argument_group("what to do").add_argument
    add("--dataset", choices=list(MODALITIES), required=True,
        help="the setup: celeba has image, mask and 18 attributes, cub image and caption (text)")
    add("--train", action="store_true", help="train both stages: Eq. 5, then the auxiliary model")
    add("--sample", choices=["cond", "uncond"], help="write a picture of samples")
    add("--eval", action="store_true", help="measure the figures of the paper's tables, coherence "
        "and the bound of Eq. 5")
    add("--dry-run", action="store_true", help="print configuration and sizes, time one training "
        "step and one DDIM step, write nothing")
    add = parser.add_argument_group("where").add_argument
    add("--data", type=Path, help="folder made by data_prep.py, or toy for the built-in toy set "
        "(default: data/<dataset> if it is there, else toy)")
    add("--run", type=Path, help="run folder (default: runs/<dataset>[-toy][-variant])")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: cuda if there is one, else cpu)")
    add("--seed", type=number(int, lambda n: 0 <= n < 2 ** 63, "below zero or too large"),
        help="of training, sampling and evaluation (default: 0)")
    add_training_flags(parser)
    add_sampling_flags(parser)
    add_evaluation_flags(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def add_sampling_flags(parser):
    """What --sample draws, and how it and --eval generate."""
    add = parser.add_argument_group("sampling").add_argument
    add("--given", nargs="+", default=[], metavar="NAME[=VALUE]",
        help="for --sample cond: modalities of the test split (mask attr) or your own "
             "(image=photo.jpg mask=mask.png attr=Smiling,Bangs text='a small red bird')")
    add("--prior", choices=["aux", "gaussian"], default="aux",
        help="for --sample uncond: z from the auxiliary model (default) or from N(0, I)")
    add("--num", type=positive(int), default=8, help="rows of the picture (default: 8)")
    add = parser.add_argument_group("generating, in --sample and --eval").add_argument
    add("--sampler", choices=list(SAMPLERS), help="of diffusion image decoders (default: ddim, "
        "with --weighting likelihood euler-maruyama)")
    add("--sampler-steps", type=positive(int),
        help="network calls an image (default: 50, of euler-maruyama 100)")
    add("--top-p", type=number(float, lambda p: 0 <= p <= 1, "not between 0 and 1"),
        default=0.0, help="captions by nucleus sampling with this mass; 0, "
        "the default, takes the most probable token each time")


def add_evaluation_flags(parser):
    """What --eval measures, and how often."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-num", type=positive(int), help="test items of --eval (default: 400, with "
        "--inception the whole test split, as FID depends on the number)")
    add("--eval-repeats", type=positive(int), default=3, help="draws of everything that --eval "
        "generates, with seeds counting from --seed; it prints mean and deviation (default: 3)")
    add("--inception", type=Path, help="for --eval: pt_inception-2015-12-05-6726825d.pth, the "
        "weights of pytorch-fid, for FID")
    add("--clip", metavar="NAME_OR_PATH", help="for --eval of cub: a CLIP model of the Hugging "
        "Face hub or a folder, for the CLIP score")


def add_training_flags(parser):
    """Flags that define a model and its training; None means the preset's value in Config."""
    group = parser.add_argument_group("training (defaults: by preset)")
    add, length = group.add_argument, group.add_mutually_exclusive_group()
    add("--preset", choices=["paper", "small"], help="sizes and training length (default: small "
        "for the toy set, paper for prepared data)")
    add("--decoder", choices=["diffusion", "feedforward"],
        help="image decoder; feedforward turns Eq. 5 into Eq. 4 (default: diffusion)")
    add("--weighting", choices=["simple", "likelihood"],
        help="lambda(t) of Eq. 5: 1 (Diff-MVAE*, default) or g(t)^2 (Diff-MVAE)")
    add("--objective", choices=["mopoe", "mvtcae"], help="Eq. 5 over all subsets of the "
        "modalities (mopoe, default), or that of MVTCAE, a baseline of the paper")
    add("--prior-expert", action="store_true", default=None,
        help="multiply N(0, I) into the full subset, as the MoPoE paper's code does")
    add("--beta", type=positive(float), help="weight of the KL term")
    length.add_argument("--steps", type=positive(int), help="length of stage 1 in steps")
    length.add_argument("--epochs", type=positive(int), help="length of stage 1 in passes")
    add("--aux-steps", type=positive(int), help="length of stage 2 in steps")
    add("--batch-size", type=positive(int), help="samples a step of stage 1")
    add("--lr", type=positive(float), help="peak learning rate of Adam")
    add("--lr-schedule", choices=["cosine", "constant"],
        help="to zero along a cosine, or constant; a short warm-up comes first in both")
    add("--text-init", type=Path, help="cub: folder of an Optimus download to start the text "
        "encoder and decoder from (default: fresh ones in the small preset, bert-base-cased and "
        "gpt2 from the Hugging Face hub in the paper preset)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue the run exactly where its checkpoint is")
    add("--overwrite", action="store_true", help="start over in a folder that has a checkpoint")


def number(kind, fits, otherwise):
    """An argparse type: an int or a float for which fits(value)."""
    def convert(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is {otherwise}")
        return value
    convert.__name__ = "number"
    return convert


def positive(kind):
    """An argparse type: a number above zero."""
    return number(kind, lambda value: 0 < value < 2 ** 31, "not above zero, or too large")


OVERRIDES = ("decoder", "weighting", "objective", "prior_expert", "beta", "steps", "aux_steps",
             "batch_size", "lr", "lr_schedule", "seed")


def check_args(parser, args):
    """Combinations that make no sense: one line and exit code 2."""
    if not (args.train or args.sample or args.eval or args.dry_run):
        parser.error("nothing to do: give --train, --sample, --eval or --dry-run")
    if (args.sample == "cond") != bool(args.given):
        parser.error("--sample cond and --given belong together")
    if (args.resume or args.overwrite) and not args.train:
        parser.error("--resume and --overwrite need --train")
    if args.eval_num == 1:
        parser.error("--eval-num 1: a distance between distributions needs at least 2")
    if args.batch_size == 1:
        parser.error("--batch-size 1: batch normalisation needs at least 2")
    for flag, value in (("--text-init", args.text_init), ("--clip", args.clip)):
        if value and args.dataset != "cub":
            parser.error(f"{flag}: only the cub setup has text")
    if (args.inception or args.clip) and not args.eval:
        parser.error("--inception and --clip need --eval")
    if args.decoder == "feedforward" and args.weighting == "likelihood":
        parser.error("--weighting likelihood is of the diffusion decoder, not feedforward")
    if args.objective == "mvtcae" and args.prior_expert:
        parser.error("--objective mvtcae has no --prior-expert")
    training = [n for n in ("preset", "beta", "steps", "epochs", "aux_steps",
                            "batch_size", "lr", "lr_schedule", "text_init")
                if getattr(args, n) is not None]
    if training and not (args.train or args.dry_run):
        parser.error(f"--{training[0].replace('_', '-')} needs --train or --dry-run; a trained "
                     "model keeps its own")


def pick_device(name):
    """The named device, or CUDA if there is any, else the CPU; UserError if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with user_error(f"--device {name}: cannot be used"):
        zero = torch.zeros(1, device=name)
        zero.item()  # which "meta", that computes nothing, cannot give
        return zero.device


def trained_config(args, folder, dataset):
    """The configuration of the run's checkpoint; UserError if the flags ask for something else."""
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    config, stage, step = Config(**checkpoint["config"]), checkpoint["stage"], checkpoint["step"]
    asked = {"dataset": dataset, "decoder": args.decoder, "weighting": args.weighting,
             "objective": args.objective, "prior_expert": args.prior_expert}
    for name, value in asked.items():
        if value not in (None, getattr(config, name)):
            raise UserError(f"{folder}: trained with {name} {getattr(config, name)}, not {value}")
    if stage == 1 and (args.eval or args.sample == "uncond" and args.prior == "aux"):
        raise UserError(f"{folder}: the auxiliary model is not trained yet; go on with --train "
                        "--resume, or take --sample with --given or --prior gaussian")
    if (stage, step) != (2, config.aux_steps):
        print(f"{folder}: training is not finished (stage {stage}, step {step})", file=sys.stderr)
    return config


def new_config(args, dataset, toy):
    """The preset's configuration with what the flags say instead."""
    preset = args.preset or ("small" if toy else "paper")
    values = dict(PRESETS[args.dataset][preset], dataset=dataset, preset=preset)
    values.update({n: getattr(args, n) for n in OVERRIDES if getattr(args, n) is not None})
    return Config(**values)


TEXT_FIELDS = ("text_width", "text_layers", "text_heads", "vocab", "special", "tokenizers")


def fit_to_data(args, config, data, source, folder):
    """The configuration with what the data decide: size, steps, tokens; UserError on bad sizes."""
    steps = args.epochs * data.batches(config.batch_size) if args.epochs else config.steps
    config = replace(config, image_size=data.size, steps=steps)
    unit = max(math.prod(config.image_rates), config.patch * 2 ** (len(config.unet_mults) - 1),
               math.prod(config.mask_rates) if "mask" in config.modalities else 1)
    if config.image_size % unit:
        raise UserError(f"{source}: {config.image_size} px, preset {config.preset} needs a "
                        f"multiple of {unit}; take --preset small or prepare another --size")
    if "text" in config.modalities:
        if args.resume:
            old = read_checkpoint(folder / "checkpoint.pt")["config"]
            return replace(config, **{name: old[name] for name in TEXT_FIELDS})
        if args.text_init or config.preset == "paper" and not args.dry_run:
            return pretrained_text(config, text_sources(args.text_init))
        captions = (text for row in data.split["train"] for text in data.captions[row])
        tokenizer = small_tokenizer(captions)
        config = replace(config, tokenizers=(tokenizer, tokenizer), special=(0, 1, 2))
        if config.preset == "small":
            config = replace(config, vocab=(vocabulary_size(tokenizer),) * 2)
    return config


def choose(args):
    """Device, data, configuration and run folder from the flags and from what is on the disk."""
    device, source = pick_device(args.device), args.data or Path("data") / args.dataset
    toy = args.data == Path("toy") or args.data is None and not source.exists()
    variant = "".join(f"-{word}" for word, on in (
        ("feedforward", args.decoder == "feedforward"), ("prior", args.prior_expert),
        ("likelihood", args.weighting == "likelihood"), ("mvtcae", args.objective == "mvtcae"))
        if on)
    dataset = args.dataset + "-toy" * toy
    folder = args.run or Path("runs") / f"{dataset}{variant}"
    new, exists = args.train or args.dry_run, (folder / "checkpoint.pt").exists()
    if args.inception and not args.inception.is_file():
        raise UserError(f"--inception {args.inception}: no such file")
    if args.train and exists and not (args.resume or args.overwrite):
        raise UserError(f"{folder}: has a checkpoint; --resume continues it, --overwrite starts "
                        "over")
    if args.resume and not exists:
        raise UserError(f"{folder}: no checkpoint to resume; start with --train alone")
    config = new_config(args, dataset, toy) if new else trained_config(args, folder, dataset)
    if toy:
        name = {"celeba": "FACES", "cub": "BIRDS"}[args.dataset]
        reason = "" if args.data else f"No data at {source}. "
        print(f"*** {reason}Using the built-in TOY {name}, preset {config.preset}. ***")
        few = {"train": config.batch_size, "val": 2, "test": 2} if args.dry_run else None
        data = toy_data(args.dataset, config.image_size, device, few)
    else:
        data = load_data(args.dataset, source, device)
    if new:
        config = fit_to_data(args, config, data, source, folder)
    data.tokenize(config)
    return device, data, config, folder


def parameter_counts(model):
    """Millions of parameters by sub-network, as one line."""
    parts = {**{f"{n} encoder": m for n, m in model.encoders.items()},
             **{f"{n} decoder": m for n, m in model.decoders.items()}, "auxiliary": model.aux}
    return ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
                     for name, part in parts.items())


def dry_run(config, data, device, text_init):
    """One training step and one DDIM step, timed; nothing is written."""
    import resource
    model, _ = build(config, device)
    if text_init:
        load_text_weights(model, text_sources(text_init))
    print(f"parameters: {parameter_counts(model)}")
    optimizer = torch.optim.Adam(model.parameters())
    start = time.time()
    with autocast(device):
        terms = stage1_loss(model, data, config, 0)
    terms["total"].mean().backward()
    optimizer.step()
    values = ", ".join(f"{n} {v.mean().item():.1f}" for n, v in terms.items())  # waits for a GPU
    print(f"one training step, batch {config.batch_size}: {time.time() - start:.2f} s; {values}")
    start = time.time()
    with autocast(device):
        made = model.eval().sample_conditional(data.rows(data.split["test"][:1]), steps=1)
    made["image"].cpu()
    print(f"one DDIM step, 1 picture: {time.time() - start:.2f} s")
    if device.type == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GiB")
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20  # bytes on macOS, KiB on Linux
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB")


def run_training(args, config, data, folder, device):
    """--train: start or continue the run in `folder`. -> 0, or 130/143 when told to stop."""
    rows = min(config.batch_size, len(data.split["train"]))
    if rows % ranks()[1]:
        raise UserError(f"a batch of {rows} does not divide by {ranks()[1]} processes; take "
                        f"--batch-size {rows - rows % ranks()[1]}")
    run = Run(folder, config, device)
    print(f"{folder}: parameters: {parameter_counts(run.model)}")
    if ranks()[1] > 1:
        torch.distributed.barrier()  # all have looked for a checkpoint before there is one
    if args.resume:
        run.restore()
    else:
        if config.preset == "paper" and "text" in config.modalities or args.text_init:
            load_text_weights(run.model, text_sources(args.text_init))
            run.ema.load_state_dict(run.model.state_dict())
        run.save(None)  # an unwritable folder shows now; an older run ends only if this succeeds
        run.log_file_of([])
        (folder / "eval.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "samples", ignore_errors=True)

    def stop(number, _):
        run.stop = number

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train(run, data)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    if run.stop:
        if ranks()[0] == 0:
            print(f"{folder}: stopped and saved at stage {run.stage}, step {run.step}; go on with "
                  "--resume", file=sys.stderr)
        return 128 + run.stop
    print(f"{folder}/checkpoint.pt: trained")
    return 0


def sampling_options(args, config):
    """What DiffMVAE.decode takes, from the flags or as the paper samples the model [Sec. 4.1]; how
    many Euler-Maruyama steps it takes, it does not say."""
    sampler = args.sampler or ("ddim" if config.weighting == "simple" else "euler-maruyama")
    steps = args.sampler_steps or (100 if sampler == "euler-maruyama" else 50)
    return dict(sampler=sampler, steps=steps, top_p=args.top_p)


def run_sampling(args, model, data, folder):
    """--sample: one picture of the flags' kind."""
    names, own = read_given(args.given, model.config)
    stem = "-".join(["given", *names]) if names else f"uncond-{args.prior}"
    stem += f"-top{args.top_p}" * bool(args.top_p)
    path = folder / "samples" / f"{stem}{'-own' if own else ''}-seed{args.seed or 0}.png"
    options = sampling_options(args, model.config)
    sample_pictures(model, data, path, names, args.num, args.seed or 0, options, args.prior, own)


def run_evaluation(args, model, data, folder):
    """--eval: print the figures and write eval.json."""
    count = JUDGE_TOYS if data.toy else len(data.split["train"])
    name = f"judge-{args.dataset}{'-toy' * data.toy}-{data.size}px-{count}.pt"
    inception = load_inception(args.inception, data.device) if args.inception else None
    clip = load_clip(args.clip, data.device) if args.clip else None
    judge = get_judge(folder.parent / name, data)
    start, seed, options = time.time(), args.seed or 0, sampling_options(args, model.config)
    num = args.eval_num or (len(data.split["test"]) if inception else 400)
    evaluation = Evaluation(model, data, judge, num, inception, clip)
    figures = evaluation.run(args.eval_repeats, seed, options)
    settings = {"model": model_name(model.config), "items": len(evaluation.x["image"]),
                "repeats": args.eval_repeats, "seed": seed, **options}
    print(f"{folder}: {', '.join(f'{k} {v}' for k, v in settings.items())}; "
          f"{time.time() - start:.0f} s. The paper's numbers are for its own data.")
    print_summary(figures)
    config = {**asdict(model.config), "tokenizers": len(model.config.tokenizers)}
    record = {**settings, "figures": figures, "config": config}
    write_file(folder / "eval.json", json.dumps(record, indent=1).encode())


def join_ranks(args):
    """Under torchrun, meet the other processes: one for each GPU, or all on the CPU."""
    if not torch.distributed.is_torchelastic_launched():
        return
    if not args.train or args.dry_run or args.device not in (None, "cpu", "cuda"):
        raise UserError("torchrun: is for --train, on all GPUs or with --device cpu; the rest "
                        "runs without it")
    cuda, local = torch.cuda.is_available() and args.device != "cpu", os.environ["LOCAL_RANK"]
    if cuda and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise UserError(f"torchrun: {torch.cuda.device_count()} GPUs, not "
                        f"{os.environ['LOCAL_WORLD_SIZE']}")
    if int(os.environ["RANK"]) > 0:
        sys.stdout = open(os.devnull, "w")
    if cuda:
        args.device = f"cuda:{local}"
        torch.cuda.set_device(int(local))
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))


def leave_ranks():
    """The end of training together. -> whether this process goes on: number 0 does, alone."""
    rank, count = ranks()
    if count > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return rank == 0


def main(argv=None):
    """The command line: -> exit code; 2 after one line on stderr for anything the user can mend."""
    args = parse_args(argv)
    try:  # first what is wrong with --given, before any training
        join_ranks(args)
        read_given(args.given, Config(dataset=args.dataset, image_size=8))
        device, data, config, folder = choose(args)
        if args.dry_run:
            print(json.dumps({**asdict(config), "tokenizers": len(config.tokenizers)}))
            dry_run(config, data, device, args.text_init)
            return 0
        if args.train:
            code = run_training(args, config, data, folder, device)
            if not leave_ranks() or code:
                return code
        if args.sample or args.eval:
            model = load(folder / "checkpoint.pt", device)
            if model.config.image_size != data.size:
                raise UserError(f"{folder}: trained at {model.config.image_size} px, the data have "
                                f"{data.size} px")
        if args.sample:
            run_sampling(args, model, data, folder)
        if args.eval:
            run_evaluation(args, model, data, folder)
    except (UserError, OSError) as error:
        if not torch.distributed.is_torchelastic_launched() or os.environ["RANK"] == "0":
            print(f"diffmvae.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and \
                "allocate memory" not in str(error):  # as PyTorch says it of a CPU
            raise
        print("diffmvae.py: out of memory; take a smaller --batch-size, --num or --eval-num",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffmvae.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
