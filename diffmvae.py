"""Diff-MVAE: a multimodal VAE with a diffusion decoder for images, in one file.

Paper   Multimodal ELBO with Diffusion Decoders, D. Wesego & P. Rooshenas, arXiv 2408.16883v2.
        All section and equation numbers below are that version's.

Objective, minimised, summed over dimensions, averaged over the batch [Eq. 5]:

    E_A E_{z ~ q(z|x_A)} [ sum_i -w_i log p(x_i|z)                          feed-forward decoders
                         + sum_j E_t 1/2 lambda(t) ||score_j - s_theta||^2 ]  diffusion decoders
    + beta E_A KL(q(z|x_A) || N(0, I))

    A is a uniformly drawn subset of the modalities, q(z|x_A) the product of its experts. The
    paper prints the score term with "+" inside a lower bound of log p(x); it belongs with "-".
    With lambda = g^2, beta = 1 and w_i = 1 this bounds -log p(x) in nats, but for the two ends of
    time, which DiffusionDecoder.bound_8bit adds. "lambda = 1", the default, has weight 1 on the
    noise error [Eq. 1]; on the score it is 2 sigma^2. The warm-up, the weights w_i other than 1
    and Muon belong to the small preset alone. They are ours, as is all that is marked so below.

Use     python diffmvae.py --dataset celeba --train --sample cond --given mask
        Without prepared data (data_prep.py) it trains on toys that it draws itself. --help lists
        all flags.

Notation    paper                 here                        shape
            x^(1), x^(2), x^(3)   x["image"|"mask"|"attr"]    (B, 3, H, W), (B, 1, H, W), (B, 18)
            x^(1), x^(2) of CUB   x["image"|"text"]           (B, 3, H, W), (B, 2, L) tokens
            mu_i, log var_i       mu, logvar                  (B, M, Z), of the product (B, Z)
            A                     subset                      (B, M) boolean
            omega_A               1 / (2^M - 1)               a number
            z                     z                           (B, Z)
            alpha_bar_t           alpha(t)^2 = 1 - sigma(t)^2 (B,), t in [0, 1]
            x_t, epsilon          x_t, eps                    same as x
            g(t)^2; lambda(t)     beta(t); weighting          (B,); its name
            beta (of the KL)      config.beta                 a number

Contents (grep '^# === §'); §2 to §4 are the method, the rest can be skipped at first.
    §1  Setups and configuration                 §7  Captions: tokens, pretrained weights
    §2  Gaussians and their fusion               §8  Modalities and data
    §3  Diffusion                                §9  Training
    §4  DiffMVAE: Eq. 5, ways of sampling        §10 Sampling to pictures
    §5  Decoders                                 §11 Evaluation
    §6  Networks                                 §12 Command line

Where   [Eq. 1] VPSDE.loss, "simple"             [Sec. 3.1] §3, DiffusionDecoder
        [Eq. 2] VPSDE.loss, "likelihood"         [Sec. 3.2] product_of_experts, neg_elbo
        [Eq. 3] the bound in general: neg_elbo   [Sec. 3.3] posterior, sample_conditional
        [Eq. 4] neg_elbo, --decoder feedforward  [Sec. 3.4] AuxiliaryModel, sample_unconditional
        [Eq. 5] neg_elbo                         [Sec. 4.1] [Sec. 4.2] Config, CUB, §6
"""
import argparse
import copy
import functools
import json
import math
import os
import signal
import sys
import textwrap
import time
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

import data_prep
from data_prep import ATTRIBUTES, UserError, user_error

# === §1 Setups and configuration [Sec. 4.1] [Sec. 4.2] ===

TOY_COUNTS = {"train": 10_000, "val": 500, "test": 1000}
JUDGE_STEPS = 800  # at least; --eval trains a judge, a CNN that reads facts off pictures
CHUNK = 50                                      # items that --eval handles at a time
TEXT_MODELS = ("bert-base-cased", "gpt2")  # of the Hugging Face hub; Optimus began with them


def within(kind, low, high=2 ** 31):
    """A type for argparse: an int or a float between `low` and `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return number


def flag(default, help, **options):
    """A field of Config that is a flag of the command line too, with options of argparse."""
    return field(default=default, metadata={"help": help, **options})


@dataclass
class Config:
    """What defines a model and its training. The defaults are the paper's CelebAMask-HQ setup.
    Comments name the source of a value: "paper Sec." is where the paper states it, "after X" means
    X's code; a value without a source is ours."""
    dataset: str = "celeba"
    preset: str = flag("paper", "sizes, and the defaults of all flags below (toys: small)",
                       choices=("paper", "small"))
    # The data decide these six
    toy: bool = False               # drawn by data_prep.py
    modalities: tuple = ("image", "mask", "attr")  # keys of MODALITIES; they number the experts
    attributes: tuple = ATTRIBUTES  # names of the columns of x["attr"]
    image_size: int = 128           # paper Sec. 4.2
    mirror: bool = False            # whether to train on mirrored pictures, too
    data_checksum: int = 0          # of the data that the model is trained with
    # Networks
    latent: int = 256               # paper Sec. 4.2: Z
    image_channels: tuple = (64, 128, 256, 512, 512)  # after Soft-IntroVAE at 128 px, paper [4]
    image_pooling: tuple = (2, 2, 2, 2, 2)            # average pooling after each width
    mask_channels: tuple = (64, 128, 256)             # after SBM-VAE, paper [42]
    mask_pooling: tuple = (2, 4, 4)
    attr_widths: tuple = (128, 256, 512, 512, 512)    # after SBM-VAE
    text_width: int = 768           # BERT-base and GPT-2, as in Optimus: paper Sec. 4.1
    text_layers: int = 12
    text_heads: int = 12
    text_length: int = 64           # tokens of a caption, with the special ones
    text_mix: int = 0               # tokens that a convolution before BERT spans; 0: none
    vocab: tuple = (28996, 50260)   # tokens: bert-base-cased, GPT-2 with three special ones
    special: tuple = (50257, 50258, 50259)  # <PAD>, <BOS>, <EOS> of the decoder; encoder pads: 0
    tokenizers: tuple = ()          # of encoder and decoder, as JSON; set when a training starts
    unet_width: int = 64
    unet_mults: tuple = (1, 2, 2, 4, 4)
    unet_blocks: int = 2            # residual blocks per resolution, on the way down and up each
    unet_attention: tuple = (16, 8)  # sides of maps with self-attention; the middle has it always
    patch: int = 1                  # space-to-depth before the UNet; small preset: 4 from 64 px on
    z_map: int = 32                 # channels of the 8x8 map of z joined to the UNet's input
    dropout: float = 0.1            # in the UNets, BERT and GPT-2
    aux_network: str = "2d"         # z as a 16x16 picture; "1d": as a row; "mlp": ours
    aux_width: int = 64
    aux_mults: tuple = (1, 2, 4)
    # Objective, Eq. 5
    decoder: str = flag("diffusion", "image decoder; feedforward turns Eq. 5 into Eq. 4",
                        choices=("diffusion", "feedforward"))
    objective: str = flag("mopoe", "Eq. 5, or MVTCAE's (with --decoder feedforward --beta 2.5)",
                          choices=("mopoe", "mvtcae"))
    weighting: str = flag("simple", "lambda(t): 1 on the noise (Diff-MVAE*) or g(t)^2 (Diff-MVAE)",
                          choices=("simple", "likelihood"))
    warmup: float = flag(0.0, "share of each stage that starts with weight 1/alpha^2 on the noise "
                         "error, which is not in the paper", type=within(float, 0, 1))
    beta: float = flag(1.0, "weight of the KL term; the paper's is unknown")
    attr_weight: float = flag(1.0, "weight of the attribute term")
    text_weight: float = flag(1.0, "weight of the caption term")
    prior_expert: bool = flag(False, "N(0, I) as one more expert of the full subset (MoPoE's)")
    image_sampler: str = "ddim"     # paper Sec. 4.1, for lambda = 1; small preset: ddpm is cleaner
    # Training
    steps: int = flag(200_000, "length of stage 1 in steps")  # about 530 passes over 24,183 faces
    aux_steps: int = flag(100_000, "length of stage 2, the auxiliary model, in steps")
    batch_size: int = flag(64, "samples in a step of stage 1", type=within(int, 2))
    aux_batch_size: int = 256
    optimizer: str = flag("adam", "of stage 1; paper: adam", choices=("adam", "muon"))
    lr: float = flag(1e-4, "peak learning rate of Adam; rises at first, ends along a cosine")
    muon_lr: float = 0.02           # of Muon, likewise
    lr_warmup: int = 1000           # steps of a rising rate
    ema: float = 0.9999             # decay of the averaged weights; ramped up from 0.1
    seed: int = 0
    log_every: int = 100            # must divide the next two
    probe_every: int = 5000         # steps between coherence figures with a picture
    save_every: int = 1000

    def sampling(self, sampler=None, steps=None):
        """-> sampler, steps of an image. For lambda = 1 the paper has 50 steps of DDIM, and for
        lambda = g^2 Euler-Maruyama [Sec. 4.1], but not how many steps: we take 100."""
        if sampler is None:
            sampler = "euler-maruyama" if self.weighting == "likelihood" else self.image_sampler
        if steps is None:
            steps = 100 if sampler == "euler-maruyama" else 50
        return sampler, steps


CUB = dict(
    modalities=("image", "text"), attributes=(),
    image_size=64, latent=768, aux_network="1d",                 # paper Sec. 4.1
    image_channels=(64, 128, 256, 512), image_pooling=(2, 2, 2, 2), unet_mults=(1, 2, 4, 4),
    steps=66_000)  # about 500 passes over the 8,440 birds or so that data_prep.py keeps to train
SMALL = dict(
    image_size=32, latent=64,
    image_channels=(32, 64, 128), image_pooling=(2, 2, 2),
    mask_channels=(16, 32, 32), mask_pooling=(2, 2, 2), attr_widths=(128, 128),
    text_width=128, text_layers=2, text_heads=4, text_length=32, text_mix=3,
    vocab=(2000, 2000), special=(0, 1, 2),
    unet_mults=(1, 2, 2), unet_blocks=1, unet_attention=(8,), patch=2, z_map=16, dropout=0.0,
    aux_network="mlp", aux_width=512,
    warmup=0.85, beta=0.05, attr_weight=20.0, text_weight=20.0, image_sampler="ddpm",
    steps=1800, aux_steps=6000, optimizer="muon", lr=2e-3, lr_warmup=50, ema=0.995,
    log_every=20, probe_every=400, save_every=200)
SMALL_CUB = dict(modalities=("image", "text"), attributes=(), steps=2400)
PRESETS = {
    "celeba": {"paper": {}, "small": SMALL},
    "cub": {"paper": CUB, "small": {**SMALL, **SMALL_CUB}},
}


def preset_config(dataset, preset, **changes):
    """The configuration of a preset, except for the changes."""
    return Config(**{**PRESETS[dataset][preset], "dataset": dataset, "preset": preset, **changes})


# === §2 Gaussians and their fusion [Sec. 3.2] ===

def gaussian_sample(mu, logvar):
    """One reparameterised draw from N(mu, exp(logvar)), of any shape."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def kl_to_standard_normal(mu, logvar):
    """KL(N(mu, diag exp(logvar)) || N(0, I)) in nats: (B, Z), (B, Z) -> (B,), dims summed."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def product_of_experts(mu, logvar, subset):
    """Normalised product of the Gaussian experts that `subset` selects [Sec. 3.2] [Sec. 3.3].
    mu, logvar: (B, M, Z); subset: (B, M) boolean, at least one a row. -> mu, logvar: (B, Z) each.
    Precisions add, and weigh the means. Experts outside the subset may hold anything, even NaN.
    logvar is clamped to [-30, 30], so that a precision is never infinite and never zero."""
    absent = ~subset.unsqueeze(-1)                               # (B, M, 1)
    logvar = logvar.clamp(-30, 30).masked_fill(absent, math.inf)
    precision = torch.exp(-logvar)                               # (B, M, Z), 0 where absent
    total = precision.sum(1)                                     # (B, Z)
    joint_mu = (precision * mu.masked_fill(absent, 0.0)).sum(1) / total
    return joint_mu, -total.log()


def all_subsets(m, device="cpu"):
    """The 2^m - 1 non-empty subsets of m modalities: (2^m - 1, m) boolean; the last is full."""
    codes = torch.arange(1, 2 ** m, device=device)
    return ((codes.unsqueeze(1) >> torch.arange(m, device=device)) & 1).bool()  # (2^m - 1, m)


# === §3 Diffusion [Sec. 3.1] [Eq. 1] [Eq. 2] ===

def append_dims(a, x):
    """(B,) -> (B, 1, ..., 1), or (B, C) -> (B, C, 1, ..., 1), to scale x (B, C, ...)."""
    return a.reshape(*a.shape, *[1] * (x.dim() - a.dim()))


class VPSDE:
    """The variance-preserving SDE dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw, t in [0, 1]: x_t =
    alpha(t) x_0 + sigma(t) eps, alpha(t)^2 is the paper's alpha_bar_t [Eq. 1], g(t)^2 = beta(t)
    [Eq. 2]. With beta from 0.1 to 20 it is the continuous limit of DDPM's 1000 steps; a network
    trained on it can be sampled by DDPM, DDIM and solvers of the SDE alike. The functions of t
    return a tensor of t's shape."""
    beta_min = 0.1
    beta_max = 20.0
    t_min = 1e-3

    def beta(self, t):
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def beta_integral(self, t):  # int_0^t beta(s) ds = -log alpha_bar
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t ** 2

    def alpha(self, t):
        return torch.exp(-0.5 * self.beta_integral(t))

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self.beta_integral(t)))

    def log_snr(self, t):
        """log(alpha^2 / sigma^2); its slope is -beta / sigma^2."""
        return -torch.log(torch.expm1(self.beta_integral(t)))

    def time_of(self, log_snr):
        """The inverse of log_snr(t), in closed form: a quadratic in t."""
        integral = F.softplus(-log_snr)                          # beta_integral of that time
        slope = self.beta_max - self.beta_min
        return (torch.sqrt(self.beta_min ** 2 + 2 * slope * integral) - self.beta_min) / slope

    def draw_time(self, n, weighting, device):
        """Times t, weights w, (n,) each, so that E[w ||eps - eps_hat||^2] is the loss with
        "simple":     1 on the noise error, t uniform [Eq. 1], the paper's lambda = 1.
        "likelihood": lambda = g^2, that is 1/2 beta/sigma^2 on the noise error [Eq. 2]. Since
                      beta/sigma^2 is minus the slope of log_snr, t is drawn uniformly in log_snr;
                      the weight keeps the normaliser, so the estimate stays unbiased.
        "v":          1/alpha^2, the error of v: ours, for the warm-up only."""
        # A regular grid with one random offset: each u is uniform, and their mean varies less
        u = (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1  # (n,)
        if weighting == "likelihood":
            high, low = self.log_snr(torch.tensor([self.t_min, 1.0], dtype=torch.float64)).tolist()
            t = self.time_of(high + (low - high) * u)
            return t, torch.full_like(t, 0.5 * (high - low))     # 1/2 int beta/sigma^2 dt
        t = self.t_min + (1 - self.t_min) * u
        if weighting == "v":
            return t, self.alpha(t) ** -2
        return t, torch.ones_like(t)

    def loss(self, eps_net, x0, weighting, mean_eps=None):
        """Denoising score matching, one draw of (t, eps) a sample: (B, ...) -> (B,), dims summed.
        `eps_net(x_t, t)` is eps_theta of Eq. 1; `mean_eps(x_t, t)` is E[eps | x_t], if it is known
        (see AuxiliaryModel.loss).
        In Eq. 2 the scores are -eps / sigma and -eps_theta / sigma."""
        t, weight = self.draw_time(len(x0), weighting, x0.device)  # (B,) each
        eps = torch.randn_like(x0)
        x_t = append_dims(self.alpha(t), x0) * x0 + append_dims(self.sigma(t), x0) * eps
        target = eps if mean_eps is None else mean_eps(x_t, t)   # same shape as x0
        error = (target - eps_net(x_t, t)).square().flatten(1).sum(1)  # (B,) [Eq. 1]
        return weight * error                                    # (B,) [Eq. 1] or [Eq. 2]

    def eps_from_v(self, v, x_t, t):
        """The noise that a prediction of v = alpha eps - sigma x_0 stands for; shapes as x_t."""
        return append_dims(self.sigma(t), x_t) * x_t + append_dims(self.alpha(t), x_t) * v


def row_noise(n, generator=None, device="cpu"):
    """-> noise(*shape): standard normal (n, *shape). Every row has a generator of its own, so that
    a sample does not change with the batch that it is drawn in. Their n seeds come from
    `generator`, or from the global one."""
    seeds = torch.randint(2 ** 62, (n,), generator=generator).tolist()
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def noise(*shape):
        rows = [torch.randn(shape, generator=g, device=device) for g in generators]
        return torch.stack(rows)                                 # (n, *shape)
    return noise


def sample_ddim(sde, predict, x, steps, noise, eta=0.0):
    """Noise x (n, ...) -> samples; predict(x, t) -> x_0_hat, eps_hat, same shape as x; `noise`
    comes from row_noise. Times are evenly spaced from 1 to 0. With eta = 0 this is DDIM, with
    eta = 1 each step draws DDPM's x_s ~ q(x_s | x_t, x_0_hat)."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:]):
        x0, eps = predict(x, t)
        fresh = (1 - (sde.alpha(t) / sde.alpha(s)) ** 2).sqrt()  # noise from s to t
        std = eta * sde.sigma(s) / sde.sigma(t) * fresh          # 0 at s = 0: no noise at the end
        x = sde.alpha(s) * x0 + (sde.sigma(s) ** 2 - std ** 2).sqrt() * eps
        if eta > 0:
            x = x + std * noise(*x.shape[1:])
    return x


def sample_ddpm(sde, predict, x, steps, noise):
    """Ancestral sampling, as sample_ddim with eta = 1."""
    return sample_ddim(sde, predict, x, steps, noise, eta=1.0)


def sample_euler_maruyama(sde, predict, x, steps, noise):
    """The reverse SDE dx = -(1/2 beta x + beta score) dt + sqrt(beta) dw from 1 to t_min. Times
    are squares of evenly spaced numbers, so that steps shrink: with a perfect score 100 equal
    steps would leave 3.7 of 255 grey levels of noise, these leave 1.1."""
    times = torch.linspace(1, sde.t_min ** 0.5, steps + 1, dtype=torch.float64) ** 2
    for t, s in zip(times[:-1], times[1:]):
        dt = t - s
        _, eps = predict(x, t)
        score = -eps / sde.sigma(t)
        mean = x + sde.beta(t) * (0.5 * x + score) * dt
        x = mean + (sde.beta(t) * dt).sqrt() * noise(*x.shape[1:])
    return mean                                                  # the last step adds no noise


def sample_dpm_solver(sde, predict, x, steps, noise):
    """DPM-Solver++(2M): second order from the last two x_0_hat, times evenly spaced in log_snr."""
    first, last = sde.log_snr(torch.tensor([1.0, sde.t_min], dtype=torch.float64))
    times = sde.time_of(torch.linspace(first, last, steps, dtype=torch.float64))
    x0, _ = predict(x, times[0])
    ahead = x0                                                   # x_0_hat, half a step further on
    for t, s in zip(times[:-1], times[1:]):
        grow = 0.5 * (sde.log_snr(s) - sde.log_snr(t))
        x = sde.sigma(s) / sde.sigma(t) * x - sde.alpha(s) * torch.expm1(-grow) * ahead
        previous = x0
        x0, _ = predict(x, s)
        ahead = 1.5 * x0 - 0.5 * previous
    return x0


SAMPLERS = {
    "ddim": sample_ddim,
    "ddpm": sample_ddpm,
    "euler-maruyama": sample_euler_maruyama,
    "dpm++": sample_dpm_solver,
}


def sample_diffusion(sde, eps_net, shape, sampler, steps, noise, clamp):
    """Draw from a diffusion model: -> (n, *shape), where `noise` of row_noise decides n.
    eps_net(x_t, t) -> eps. clamp: hold x_0_hat in [-1, 1] at every step, but not in
    Euler-Maruyama, which needs the score as it is; and hold the result there."""
    def predict(x, t):
        eps = eps_net(x, t.to(x).expand(len(x)))
        x0 = (x - sde.sigma(t) * eps) / sde.alpha(t)
        if clamp and sampler != "euler-maruyama":
            x0 = x0.clamp(-1, 1)
            eps = (x - sde.alpha(t) * x0) / sde.sigma(t)
        return x0, eps

    x = SAMPLERS[sampler](sde, predict, noise(*shape), steps, noise)
    return x.clamp(-1, 1) if clamp else x


# === §4 DiffMVAE and its two ways of sampling [Eq. 5] [Sec. 3.3] [Sec. 3.4] ===

class DiffMVAE(nn.Module):
    """Encoders, decoders and the auxiliary model. Data x is a dict, for example of
    "image" (B, 3, H, W) in [-1, 1], "mask" (B, 1, H, W) in {0, 1}, "attr" (B, 18) in {0, 1},
    "text" (B, 2, L) token numbers: row 0 as the encoder reads them, row 1 as the decoder writes.
    An encoder maps x_i to (B, 2 Z), mu and logvar. A decoder has nll(z, x_i, weighting) and
    sample(z, noise, sampler, steps); feed-forward ones use only z and x_i. MODALITIES builds
    them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleDict()
        self.decoders = nn.ModuleDict()
        self.weights = {}
        for name in config.modalities:
            modality = MODALITIES[name]
            self.encoders[name], self.decoders[name] = modality.networks(config)
            self.weights[name] = modality.weight(config)
        self.aux = AuxiliaryModel(config)

    @property
    def device(self):
        """Where the model is."""
        return self.aux.mean.device

    def encode(self, x):
        """The experts q(z|x_i): -> mu, logvar (B, M, Z) each, float32. Those of modalities that x
        lacks are NaN, so that nobody uses them by mistake."""
        shape = (len(next(iter(x.values()))), 2 * self.config.latent)
        experts = []
        for name in self.config.modalities:
            if name in x:
                experts.append(self.encoders[name](x[name]).float())
            else:
                experts.append(torch.full(shape, math.nan, device=self.device))
        return torch.stack(experts, 1).chunk(2, -1)              # (B, M, 2 Z) -> (B, M, Z) each

    def fuse(self, mu, logvar, subset):
        """q(z|x_A): the product of the experts in the subset [Sec. 3.2]. -> (B, Z) each."""
        if self.config.prior_expert:  # one more expert, N(0, I), that only the full subset has
            mu = F.pad(mu, (0, 0, 0, 1))                         # (B, M + 1, Z)
            logvar = F.pad(logvar, (0, 0, 0, 1))                 # (B, M + 1, Z)
            subset = torch.cat([subset, subset.all(1, keepdim=True)], 1)  # (B, M + 1)
        return product_of_experts(mu, logvar, subset)

    def reconstruct(self, z, x, weighting, bound=False):
        """-log p(x_i|z) of every modality [Eq. 4]; of a diffusion decoder the score matching term
        with that weighting [Eq. 5], or if `bound` its bound_8bit: -> dict of (B,)."""
        terms = {}
        for name in self.config.modalities:
            decoder = self.decoders[name]
            if bound and isinstance(decoder, DiffusionDecoder):
                terms[name] = decoder.bound_8bit(z, x[name])
            else:
                terms[name] = decoder.nll(z, x[name], weighting)
        return terms

    def neg_elbo(self, x, weighting, bound=False):
        """[Eq. 5] with one subset A ~ omega, one z and one t a sample: -> dict of (B,), in nats
        but for the image with lambda = 1. omega is uniform, as in MoPoE; the paper leaves it open.
        "image", "mask", ...: see reconstruct; "kl": the mean over all subsets; "total": their
        weighted sum, to be minimised. With feed-forward decoders alone this is [Eq. 4], the case
        of [Eq. 3] in which z makes the modalities independent."""
        mu, logvar = self.encode(x)                              # (B, M, Z)
        subsets = all_subsets(mu.shape[1], mu.device)            # (S, M), omega = 1 / S
        s, b = len(subsets), len(mu)
        subset = subsets[torch.randint(s, (b,), device=mu.device)]  # (B, M)
        z = gaussian_sample(*self.fuse(mu, logvar, subset))      # (B, Z) z ~ q(z|x_A)
        terms = self.reconstruct(z, x, weighting, bound)         # (B,) each
        reconstruction = sum(self.weights[name] * nll for name, nll in terms.items())
        every = self.fuse(mu.repeat(s, 1, 1), logvar.repeat(s, 1, 1),
                          subsets.repeat_interleave(b, 0))       # (S B, Z) q(z|x_A) for all A
        terms["kl"] = kl_to_standard_normal(*every).view(s, b).mean(0)  # (B,) sum_A omega_A KL_A
        terms["total"] = reconstruction + self.config.beta * terms["kl"]  # (B,) [Eq. 5]
        return terms

    def neg_mvtcae(self, x, weighting):
        """The objective of MVTCAE, a baseline (paper [11]), minimised; the result is neg_elbo's.
        (M - a)/M sum_i -log p(x_i|z) + beta (a/M sum_i KL(q || q_i) + (1 - a) KL(q || N(0, I))),
        where q is the product of all M experts q_i, from which z is drawn. a is MVTCAE's alpha:
        0.9 as in SBM-VAE's code, paper [42]; its own, [11], has 5/6."""
        mu, logvar = self.encode(x)                              # (B, M, Z)
        a, m = 0.9, mu.shape[1]
        everything = torch.ones_like(mu[..., 0], dtype=torch.bool)  # (B, M)
        joint_mu, joint_logvar = product_of_experts(mu, logvar, everything)  # (B, Z) each
        terms = self.reconstruct(gaussian_sample(joint_mu, joint_logvar), x, weighting)
        reconstruction = sum(self.weights[name] * nll for name, nll in terms.items())
        q = Normal(joint_mu.unsqueeze(1), torch.exp(0.5 * joint_logvar).unsqueeze(1))  # (B, 1, Z)
        experts = Normal(mu, torch.exp(0.5 * logvar))            # (B, M, Z)
        to_experts = kl_divergence(q, experts).sum((1, 2))       # (B,)
        to_prior = kl_to_standard_normal(joint_mu, joint_logvar)  # (B,)
        terms["kl"] = a / m * to_experts + (1 - a) * to_prior
        terms["total"] = (m - a) / m * reconstruction + self.config.beta * terms["kl"]
        return terms

    def posterior(self, x):
        """q(z|x_o), the product of the experts of the modalities in x [Sec. 3.3]: -> mu, logvar
        (B, Z) each."""
        names = self.config.modalities
        if not x or not x.keys() <= set(names):
            raise ValueError(f"modalities {sorted(x)}: expected some of {', '.join(names)}")
        mu, logvar = self.encode(x)                              # (B, M, Z)
        observed = torch.tensor([name in x for name in names], device=mu.device)  # (M,)
        return self.fuse(mu, logvar, observed.expand(len(mu), -1))

    def decode(self, z, noise, names=None, sampler=None, steps=None):
        """Generate the modalities `names`, or all, from z (n, Z): -> dict. noise: see row_noise;
        sampler, steps: of images."""
        made = {}
        for name in names or self.config.modalities:
            made[name] = self.decoders[name].sample(z, noise, sampler, steps)
        return made

    @torch.no_grad()
    def sample_conditional(self, given, n=1, generator=None, **options):
        """[Sec. 3.3] z ~ q(z|x_o), then each decoder: a dict of B items -> a dict of all
        modalities, (B * n, ...), in which the n samples of an item follow each other. options: of
        decode."""
        mu, logvar = self.posterior(given)                       # (B, Z) each
        mu = mu.repeat_interleave(n, 0)                          # (B * n, Z)
        logvar = logvar.repeat_interleave(n, 0)                  # (B * n, Z)
        noise = row_noise(len(mu), generator, mu.device)
        z = mu + torch.exp(0.5 * logvar) * noise(mu.shape[1])
        return self.decode(z, noise, **options)

    @torch.no_grad()
    def sample_unconditional(self, n, prior="aux", generator=None, **options):
        """[Sec. 3.4] z from the auxiliary model, or N(0, I) if prior="gaussian"; then decode."""
        if prior not in ("aux", "gaussian"):
            raise ValueError(f"prior {prior}: expected aux or gaussian")
        noise = row_noise(n, generator, self.device)
        if prior == "aux":
            z = self.aux.sample(noise)
        else:
            z = noise(self.config.latent)
        return self.decode(z, noise, **options)


class AuxiliaryModel(nn.Module):
    """Diffusion model of z ~ q(z|x), where x is a training item with all its modalities
    [Sec. 3.4]. Each dimension of z is standardised first (ours)."""

    def __init__(self, c):
        super().__init__()
        self.sde = VPSDE()
        if c.aux_network == "mlp":
            self.shape = (c.latent,)
            self.network = LatentMLP(c.latent, c.aux_width)
        else:
            if c.aux_network == "2d":
                side = math.isqrt(c.latent)
                self.shape = (1, side, side)                     # one channel
            else:
                side = c.latent
                self.shape = (1, side)
            self.network = UNet(1, side, c.aux_width, c.aux_mults, c.unet_blocks, (side // 2,),
                                c.dropout, dims=len(self.shape) - 1)
        self.register_buffer("mean", torch.zeros(c.latent))
        self.register_buffer("std", torch.ones(c.latent))

    def eps(self, z_t, t):
        """eps_theta(z_t, t) of standardised z_t (B, *shape). The network predicts v (ours)."""
        return self.sde.eps_from_v(self.network(z_t, t).float(), z_t, t)

    def loss(self, mu, logvar, weighting):
        """[Sec. 3.4] the noise error [Eq. 1], or 1/alpha^2 times it ("v"), of z ~ N(mu, e^logvar),
        (B, Z) each: -> (B,). The regression target is E[eps | z_t, mu, logvar] instead of eps
        (ours): the expected gradient is the same, its variance is smaller."""
        mu = ((mu - self.mean) / self.std).view(-1, *self.shape)
        std = (torch.exp(0.5 * logvar) / self.std).view(-1, *self.shape)

        def mean_eps(z_t, t):
            alpha = append_dims(self.sde.alpha(t), z_t)
            sigma = append_dims(self.sde.sigma(t), z_t)
            return sigma * (z_t - alpha * mu) / (alpha ** 2 * std ** 2 + sigma ** 2)

        z0 = mu + std * torch.randn_like(mu)
        return self.sde.loss(self.eps, z0, weighting, mean_eps)

    def sample(self, noise):
        """-> z (n, Z), always by 50 steps of DDIM [Sec. 4.1], whatever sampler images have."""
        z = sample_diffusion(self.sde, self.eps, self.shape, "ddim", 50, noise, clamp=False)
        return z.flatten(1) * self.std + self.mean               # (n, Z)


# === §5 Decoders: p(x_i|z) [Eq. 4] [Eq. 5] ===

class DiffusionDecoder(nn.Module):
    """One of the M_D diffusion decoders of Eq. 5: p(x|z) conditioned on z [Sec. 3.1]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.sde = VPSDE()
        self.shape = (3, c.image_size, c.image_size)
        self.unet = UNet(3, c.image_size, c.unet_width, c.unet_mults, c.unet_blocks,
                         c.unet_attention, c.dropout, c.patch, c.latent, c.z_map)

    def eps(self, x_t, t, z):
        """eps_theta(x_t, z, t) [Sec. 3.1], same shape as x_t. The network predicts v (ours)."""
        return self.sde.eps_from_v(self.unet(x_t, t, z).float(), x_t, t)

    def nll(self, z, x, weighting):
        """[Eq. 2] on [t_min, 1] if "likelihood", [Eq. 1] if "simple", or "v" of the warm-up.
        (B, Z), (B, 3, H, W) -> (B,)."""
        return self.sde.loss(lambda x_t, t: self.eps(x_t, t, z), x, weighting)

    def bound_8bit(self, z, x):
        """Upper bound on -log P(8-bit image | z): (B,) nats. [Eq. 2], averaged over four draws,
        plus the two ends of time that it leaves out: KL(q(x_1|x_0) || N(0, I)), and -log P of the
        256 values given x_t at t_min."""
        ends = torch.tensor([self.sde.t_min, 1.0], device=x.device)
        alpha, alpha_1 = self.sde.alpha(ends)
        sigma, sigma_1 = self.sde.sigma(ends)
        mu_1 = alpha_1 * x.flatten(1)                            # (B, D)
        logvar_1 = (2 * sigma_1.log()).expand_as(mu_1)           # (B, D)
        prior = kl_to_standard_normal(mu_1, logvar_1)            # (B,)
        score = sum(self.nll(z, x, "likelihood") for _ in range(4)) / 4  # (B,) [Eq. 2]
        eps = torch.randn_like(x)
        eps_hat = self.eps(alpha * x + sigma * eps, ends[0].to(x).expand(len(x)), z)
        x0_hat = x + sigma / alpha * (eps - eps_hat)
        return prior + score + nll_8bit(x, x0_hat, sigma / alpha)

    def sample(self, z, noise, sampler=None, steps=None):
        """-> images (n, 3, H, W) in [-1, 1]. Config.sampling has the default sampler and steps."""
        sampler, steps = self.config.sampling(sampler, steps)
        return sample_diffusion(self.sde, lambda x_t, t: self.eps(x_t, t, z), self.shape, sampler,
                                steps, noise, clamp=True)


def nll_8bit(x, mean, std):
    """-log P of 8-bit x under N(mean, std^2) in 256 bins, the outer ones open: -> (B,) nats."""
    x, mean, std = x.double(), mean.double(), std.double()
    low = (x - 1 / 255 - mean) / std
    high = (x + 1 / 255 - mean) / std
    low = low.masked_fill(x < -1 + 1 / 255, -math.inf)
    high = high.masked_fill(x > 1 - 1 / 255, math.inf)
    # A bin above the mean is mirrored to the other side: the same mass, without cancellation
    above = low > 0
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    log_low = torch.special.log_ndtr(low)
    log_high = torch.special.log_ndtr(high)
    log_mass = log_high + torch.log1p(-torch.exp(log_low - log_high))
    return -log_mass.flatten(1).sum(1)


class GaussianDecoder(nn.Sequential):
    """One of the M_F feed-forward decoders of Eq. 5: a Gaussian with mean self(z) and variance
    1/2. Its negative log-likelihood is the squared error plus a constant."""

    def nll(self, z, x, *unused):
        """(B, Z), (B, ...) -> (B,) nats."""
        nll = (x - self(z).float()).square() + 0.5 * math.log(math.pi)
        return nll.flatten(1).sum(1)

    def sample(self, z, *unused):
        """-> the mean (n, ...), held in [-1, 1]; it needs no noise."""
        return self(z).float().clamp(-1, 1)


class BernoulliDecoder(nn.Sequential):
    """One of the M_F of Eq. 5: independent Bernoulli variables with logits self(z)."""

    def nll(self, z, x, *unused):
        """(B, Z), (B, ...) -> (B,) nats."""
        nll = F.binary_cross_entropy_with_logits(self(z).float(), x, reduction="none")
        return nll.flatten(1).sum(1)

    def sample(self, z, *unused):
        """-> the more probable values (n, ...), as the paper's F1 needs them."""
        return (self(z) > 0).float()


class TextDecoder(nn.Module):
    """One of the M_F of Eq. 5, for captions: GPT-2 that sees z in two ways, both by linear maps as
    in Optimus. z is the key and value of an extra first position in every layer, and it is added
    to every token's embedding."""

    def __init__(self, c):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel  # here, as it takes seconds
        self.config = c
        self.pad, self.bos, self.eos = c.special
        self.gpt = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab[1],
            n_embd=c.text_width,
            n_layer=c.text_layers,
            n_head=c.text_heads,
            resid_pdrop=c.dropout,
            embd_pdrop=c.dropout,
            attn_pdrop=c.dropout,
            initializer_range=0.02 * math.sqrt(768 / c.text_width),
            pad_token_id=self.pad,
            bos_token_id=self.bos,
            eos_token_id=self.eos,
        ))
        self.memory = nn.Linear(c.latent, c.text_layers * c.text_width, bias=False)
        self.embed = nn.Linear(c.latent, c.text_width, bias=False)
        nn.init.normal_(self.memory.weight, std=0.02)            # as in Optimus
        nn.init.zeros_(self.embed.weight)  # ours: at first a random z would drown the words

    def remember(self, z):
        """The memory as a fresh cache of keys and values, which the transformer then extends."""
        from transformers import DynamicCache
        c = self.config
        shape = (len(z), c.text_layers, c.text_heads, 1, -1)
        keys = self.memory(z).view(shape)                        # (B, layers, heads, 1, d)
        return DynamicCache([(key, key) for key in keys.unbind(1)])

    def logits(self, z, ids, cache):
        """Tokens (B, T) -> logits of those after them. Positions continue those in the cache."""
        embeds = self.gpt.transformer.wte(ids) + self.embed(z).unsqueeze(1)  # (B, T, width)
        return self.gpt(None, cache, inputs_embeds=embeds).logits.float()  # (B, T, V)

    def nll(self, z, text, *unused):
        """-log p(caption|z), summed over its tokens and <EOS>: (B,) nats; padding is left out."""
        ids = text[:, 1]                                         # (B, L)
        logits = self.logits(z, ids[:, :-1], self.remember(z))   # (B, L - 1, V)
        error = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=self.pad,
                                reduction="none")                # (B, L - 1)
        return error.sum(1)

    def sample(self, z, *unused):
        """The most probable token each time: -> captions (n, 2, L) as in the data."""
        cache = self.remember(z)
        ids = [torch.full((len(z),), self.bos, device=z.device)]
        while len(ids) < self.config.text_length:
            logits = self.logits(z, ids[-1].unsqueeze(1), cache)  # (n, 1, V)
            ids.append(logits[:, -1].argmax(1))                  # (n,)
        ids = torch.stack(ids, 1)                                # (n, L)
        is_end = (ids == self.eos).long()
        ended_before = is_end.cumsum(1) - is_end
        ids = ids.masked_fill(ended_before > 0, self.pad)
        return with_encoder_tokens(ids, self.config)             # (n, 2, L)


# === §6 Networks [Sec. 4.1] [Sec. 4.2] ===

class ResidualBlock(nn.Module):
    """conv-BN-LeakyReLU-conv-BN plus skip, LeakyReLU, as in Soft-IntroVAE (paper [4])."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.skip = nn.Identity()
        if c_in != c_out:
            self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        return F.leaky_relu(self.body(x) + self.skip(x), 0.2)


def conv_encoder(c_in, channels, rates, c):
    """Pictures (B, C, H, W) -> (B, 2 Z): widths `channels`, pooled by `rates`."""
    layers = [
        nn.Conv2d(c_in, channels[0], 5, padding=2, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(rates[0]),
    ]
    for k in range(1, len(channels)):
        layers.append(ResidualBlock(channels[k - 1], channels[k]))
        layers.append(nn.AvgPool2d(rates[k]))
    side = c.image_size // math.prod(rates)
    layers.append(ResidualBlock(channels[-1], channels[-1]))
    layers.append(nn.Flatten())
    layers.append(nn.Linear(channels[-1] * side ** 2, 2 * c.latent))
    return nn.Sequential(*layers)


def conv_decoder(c_out, channels, rates, c):
    """z (B, Z) -> pictures (B, C, H, W): the encoder of the same widths and rates, mirrored."""
    side = c.image_size // math.prod(rates)
    shape = (channels[-1], side, side)
    layers = [nn.Linear(c.latent, math.prod(shape)), nn.ReLU(), nn.Unflatten(1, shape)]
    width = channels[-1]
    for next_width, rate in zip(channels[::-1], rates[::-1]):
        layers.append(ResidualBlock(width, next_width))
        layers.append(nn.Upsample(scale_factor=rate))
        width = next_width
    layers.append(ResidualBlock(width, width))
    layers.append(nn.Conv2d(width, c_out, 5, padding=2))
    return nn.Sequential(*layers)


def mlp(widths, n_out):
    """(B, widths[0]) -> (B, n_out): Linear-BatchNorm-ReLU from width to width, then Linear."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    layers.append(nn.Linear(widths[-1], n_out))
    return nn.Sequential(*layers)


class TextEncoder(nn.Module):
    """Captions (B, 2, L) -> (B, 2 Z): BERT, its pooled first token, a linear layer, as in Optimus
    (paper Sec. 4.1). Narrow BERTs start with larger weights: 0.02 is for a width of 768. In the
    small preset a convolution comes first (ours): without it BERT takes long to learn which part
    of the bird a colour belongs to."""

    def __init__(self, c):
        super().__init__()
        from transformers import BertConfig, BertModel
        self.bert = BertModel(BertConfig(
            vocab_size=c.vocab[0],
            hidden_size=c.text_width,
            num_hidden_layers=c.text_layers,
            num_attention_heads=c.text_heads,
            intermediate_size=4 * c.text_width,
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout,
            initializer_range=0.02 * math.sqrt(768 / c.text_width),
        ))
        self.mix = None
        if c.text_mix > 0:
            self.mix = nn.Conv1d(c.text_width, c.text_width, c.text_mix, padding="same",
                                 bias=False)
        self.head = nn.Linear(c.text_width, 2 * c.latent, bias=False)

    def forward(self, text):
        ids = text[:, 0]                                         # (B, L)
        words = self.bert.embeddings.word_embeddings(ids)        # (B, L, width)
        if self.mix is not None:
            words = words + self.mix(words.mT).mT                # (B, L, width)
        out = self.bert(attention_mask=(ids != 0).long(), inputs_embeds=words)
        return self.head(out.pooler_output)


class TimeEmbedding(nn.Module):
    """Times t (B,) -> (B, 256): cosines and sines of 1000 t at `width` / 2 frequencies, an MLP."""

    def __init__(self, width):
        super().__init__()
        half = width // 2
        freqs = torch.exp(-math.log(10000) / half * torch.arange(half))
        self.register_buffer("freqs", freqs, persistent=False)
        self.layers = nn.Sequential(nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, 256),
                                    nn.SiLU())

    def forward(self, t):
        angles = 1000 * t.unsqueeze(1) * self.freqs              # (B, width / 2)
        return self.layers(torch.cat([angles.cos(), angles.sin()], 1))  # (B, 256)


class LatentMLP(nn.Module):
    """The auxiliary model's network in the small preset: z_t (B, Z), t (B,) -> (B, Z)."""

    def __init__(self, size, width):
        super().__init__()
        self.time = TimeEmbedding(width)
        self.layer_in = nn.Linear(size + 256, width)
        self.blocks = nn.ModuleList()
        for _ in range(4):
            self.blocks.append(nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)))
        self.layer_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))

    def forward(self, z_t, t):
        h = self.layer_in(torch.cat([z_t, self.time(t)], 1))     # (B, width)
        for block in self.blocks:
            h = h + block(h)
        return self.layer_out(h)


def conv_layer(dims, c_in, c_out, size, stride=1):
    """A convolution over rows (dims = 1) or pictures (2) that keeps their size if stride is 1."""
    kind = nn.Conv1d if dims == 1 else nn.Conv2d
    return kind(c_in, c_out, size, stride, padding=size // 2)


def zeroed(layer):
    """The layer with weights and biases of 0: its branch starts as a no-op."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def norm_layer(channels):
    """Group norm with 8 groups; more, smaller groups are slower on CPUs."""
    return nn.GroupNorm(8, channels)


class Attention(nn.Module):
    """Self-attention over all positions of h (B, C, ...), with heads of 32 channels, fewer where
    32 does not divide C, and a skip."""

    def __init__(self, channels, dims):
        super().__init__()
        self.heads = channels // math.gcd(32, channels)
        self.norm = norm_layer(channels)
        self.qkv = conv_layer(dims, channels, 3 * channels, 1)
        self.proj = zeroed(conv_layer(dims, channels, channels, 1))

    def forward(self, h):
        # PyTorch's fused attention is slower than this on CPUs in bfloat16
        qkv = self.qkv(self.norm(h)).flatten(2)                  # (B, 3 C, P)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, heads, d, P) each
        weight = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(3)  # (B, heads, P, P)
        out = v @ weight.transpose(2, 3)                         # (B, heads, d, P)
        return h + self.proj(out.reshape(h.shape))               # (B, C, ...)


class UNetBlock(nn.Module):
    """Residual block, scaled and shifted by time, then by z; self-attention if `attend`."""

    def __init__(self, c_in, c_out, attend, z_dim, dropout, dims):
        super().__init__()
        self.norm1 = norm_layer(c_in)
        self.conv1 = conv_layer(dims, c_in, c_out, 3)
        self.time = nn.Linear(256, 2 * c_out)
        self.z = nn.Linear(z_dim, 2 * c_out) if z_dim else None
        self.norm2 = norm_layer(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv_layer(dims, c_out, c_out, 3))
        self.skip = nn.Identity()
        if c_in != c_out:
            self.skip = conv_layer(dims, c_in, c_out, 1)
        self.attention = Attention(c_out, dims) if attend else nn.Identity()

    def forward(self, h, emb, z):
        y = self.norm2(self.conv1(F.silu(self.norm1(h))))
        scale, shift = append_dims(self.time(emb), h).chunk(2, 1)  # (B, C, 1, ...) each
        y = y * (1 + scale) + shift
        if self.z is not None:
            scale, shift = append_dims(self.z(z), h).chunk(2, 1)  # (B, C, 1, ...) each
            y = y * (1 + scale) + shift
        h = self.skip(h) + self.conv2(self.dropout(F.silu(y)))
        return self.attention(h)


class UNetLevel(nn.Module):
    """Blocks at one resolution, then the next level at half of it, then as many blocks that also
    see the outputs of the first ones. The last level has two middle blocks instead of a next one.
    widths: channels of this level and those below; options: of every block."""

    def __init__(self, c_in, size, widths, blocks, attention, **options):
        super().__init__()
        c = widths[0]
        dims = options["dims"]
        attend = size in attention
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for k in range(blocks):
            self.down.append(UNetBlock(c_in if k == 0 else c, c, attend, **options))
            self.up.append(UNetBlock(2 * c, c, attend, **options))
        self.next = None
        if len(widths) > 1:
            self.shrink = conv_layer(dims, c, c, 3, stride=2)
            self.next = UNetLevel(c, size // 2, widths[1:], blocks, attention, **options)
            self.grow = nn.Sequential(conv_layer(dims, widths[1], c, 3),
                                      nn.Upsample(scale_factor=2))
        else:
            self.middle = nn.ModuleList()
            self.middle.append(UNetBlock(c, c, True, **options))
            self.middle.append(UNetBlock(c, c, False, **options))

    def forward(self, h, emb, z):
        skips = []
        for block in self.down:
            h = block(h, emb, z)
            skips.append(h)
        if self.next is not None:
            h = self.grow(self.next(self.shrink(h), emb, z))     # half the size, and back
        else:
            for block in self.middle:
                h = block(h, emb, z)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], 1), emb, z)
        return h


class UNet(nn.Module):
    """The network of the image decoder and of the paper's auxiliary models: x (B, C, H, W), or
    (B, C, length) if dims is 1, with t (B,) and z (B, Z), gives the shape of x. z, if there is
    one, enters every block and, as an 8x8 map, the input."""

    def __init__(self, channels, size, width, mults, blocks, attention, dropout, patch=1,
                 z_dim=0, z_map=0, dims=2):
        super().__init__()
        self.patch = patch
        side = size // patch
        widths = [width * mult for mult in mults]
        self.time = TimeEmbedding(width)
        self.z_map = None
        if z_map > 0:
            self.z_map = nn.Sequential(
                nn.Linear(z_dim, z_map * 64),
                nn.Unflatten(1, (z_map, 8, 8)),
                nn.Upsample((side, side), mode="bilinear"),
                nn.Conv2d(z_map, z_map, 3, padding=1),
            )
        self.place = None
        if dims == 1:  # ours: tells the places of a row apart, each of which means something else
            self.place = nn.Parameter(torch.zeros(width, size))
        self.conv_in = conv_layer(dims, channels * patch ** 2 + z_map, width, 3)
        self.top_level = UNetLevel(width, side, widths, blocks, attention, z_dim=z_dim,
                                   dropout=dropout, dims=dims)
        self.norm_out = norm_layer(width * mults[0])
        self.conv_out = zeroed(conv_layer(dims, width * mults[0], channels * patch ** 2, 3))

    def forward(self, x, t, z=None):
        emb = self.time(t)                                       # (B, 256)
        h = x
        if self.patch > 1:  # space to depth
            h = F.pixel_unshuffle(h, self.patch)                 # (B, C p^2, H / p, W / p)
        if self.z_map is not None:
            h = torch.cat([h, self.z_map(z)], 1)                 # (B, C p^2 + c, H / p, W / p)
        h = self.conv_in(h)                                      # (B, width, H / p, W / p)
        if self.place is not None:
            h = h + self.place                                   # (B, width, length)
        h = self.top_level(h, emb, z)
        h = self.conv_out(F.silu(self.norm_out(h)))
        if self.patch > 1:
            h = F.pixel_shuffle(h, self.patch)                   # (B, C, H, W)
        return h


# === §7 Captions: tokens, pretrained weights [Sec. 4.1] ===

def small_tokenizer(captions, size=2000):
    """Byte-level BPE made from the captions: -> its JSON; <PAD>, <BOS>, <EOS> are 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<PAD>", "<BOS>", "<EOS>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([data_prep.tidy(text) for text in captions], trainer)
    return with_ends(tokenizer, 1, 2)


def with_ends(tokenizer, bos, eos):
    """Make the tokenizer put <BOS> and <EOS>, of these numbers, around a caption: -> its JSON."""
    from tokenizers.processors import TemplateProcessing
    ends = [("<BOS>", bos), ("<EOS>", eos)]
    tokenizer.post_processor = TemplateProcessing(single="<BOS> $A <EOS>", special_tokens=ends)
    return tokenizer.to_str()


@functools.cache
def tokenizer_of(text):
    """The tokenizer that a JSON of Config.tokenizers describes."""
    from tokenizers import Tokenizer
    return Tokenizer.from_str(text)


def token_rows(captions, tokenizer, length, pad):
    """n texts -> their token numbers (n, length), int32, and how many texts had to be cut."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad)
    encoded = tokenizer.encode_batch(captions)
    cut = sum(bool(row.overflowing) for row in encoded)
    return np.array([row.ids for row in encoded], np.int32), cut


def tokenize(captions, config):
    """n texts -> token numbers (n, 2, L), for encoder and decoder, and how many were cut."""
    captions = [data_prep.tidy(text) for text in captions]
    reader, writer = [tokenizer_of(text) for text in config.tokenizers]
    read, cut_reading = token_rows(captions, reader, config.text_length, 0)
    written, cut_writing = token_rows(captions, writer, config.text_length, config.special[0])
    return np.stack([read, written], 1), max(cut_reading, cut_writing)


def captions_of(text, config):
    """Captions as tokens (n, 2, L) -> n texts."""
    tokenizer = tokenizer_of(config.tokenizers[1])
    return [caption.strip() for caption in tokenizer.decode_batch(text[:, 1].tolist())]


def with_encoder_tokens(ids, config):
    """What the decoder wrote (n, L) -> captions (n, 2, L), which the encoder can read as well."""
    texts = captions_of(torch.stack([ids, ids], 1), config)
    reader = tokenizer_of(config.tokenizers[0])
    read, _ = token_rows(texts, reader, config.text_length, 0)
    return torch.stack([torch.from_numpy(read).to(ids), ids], 1)  # (n, 2, L)


def pretrained_tokenizers(config, sources):
    """The configuration with the tokenizers of BERT and GPT-2: from folders bert-base-cased and
    gpt2 beside those of `sources` if they are there, else from the hub. UserError if they are not
    of the preset's sizes."""
    from transformers import AutoTokenizer
    places = []
    for source, name in zip(sources, TEXT_MODELS):
        beside = Path(source).parent / name
        places.append(beside if beside.exists() else name)
    with user_error(f"tokenizers {places[0]}, {places[1]}: cannot be loaded or do not fit"):
        reader = AutoTokenizer.from_pretrained(places[0], do_lower_case=False)
        writer = AutoTokenizer.from_pretrained(places[1], add_prefix_space=True)
        writer.add_special_tokens(
            {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"})
        special = tuple(writer.convert_tokens_to_ids(["<PAD>", "<BOS>", "<EOS>"]))
        if (len(reader), len(writer)) != config.vocab or special != config.special:
            raise ValueError(f"{len(reader)} and {len(writer)} tokens, not {config.vocab}")
    written = with_ends(writer.backend_tokenizer, *special[1:])
    return replace(config, tokenizers=(reader.backend_tokenizer.to_str(), written))


# Layers that Optimus adds to BERT and GPT-2, under its names and ours
OPTIMUS_LAYERS = {
    "linear.weight": "head.weight",
    "transformer.linear.weight": "memory.weight",
    "transformer.linear_emb.weight": "embed.weight",
}


def load_text_weights(model, sources):
    """Start the text parts from two folders of Optimus, or from plain BERT and GPT-2, which leave
    Optimus's own layers random."""
    from transformers import BertModel, GPT2LMHeadModel
    start_from(model.encoders["text"], "bert.", BertModel, sources[0], model.config.vocab[0])
    start_from(model.decoders["text"], "gpt.", GPT2LMHeadModel, sources[1], model.config.vocab[1])


def start_from(net, prefix, kind, source, vocab):
    """Load the weights of `source` into net, where they are called prefix + name."""
    with user_error(f"text weights of {source}: cannot be read or do not fit"):
        may_lack = {"gpt.lm_head.weight"}                        # it is tied to the embedding
        if source in TEXT_MODELS:
            may_lack |= set(OPTIMUS_LAYERS.values())
            pretrained = kind.from_pretrained(source)
            pretrained.resize_token_embeddings(vocab, mean_resizing=False)  # special tokens
            state = pretrained.state_dict()
        else:
            state = torch.load(Path(source) / "pytorch_model.bin", "cpu", weights_only=True)
        ours = {}
        for name, value in state.items():
            ours[OPTIMUS_LAYERS.get(name, prefix + name)] = value
        missing, unused = net.load_state_dict(ours, strict=False)
        missing = sorted(set(missing) - may_lack)
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
    print(f"text weights of {source}: {len(state) - len(unused)} tensors, not used: {unused}")


# === §8 Modalities and data ===

def load_array(path, shape, largest=255):
    """A uint8 array of that shape, not yet in memory; ValueError if it is another, or if it has
    values above `largest`."""
    array = np.load(path, mmap_mode="r")
    if (array.shape, array.dtype) != (shape, np.uint8):
        raise ValueError(f"{path.name} has {array.dtype} {array.shape}, not uint8 {shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{path.name} is in Fortran order; save np.ascontiguousarray of it")
    if largest < 255 and array.max() > largest:
        raise ValueError(f"{path.name} has values up to {array.max()}, not 0 and {largest}")
    return array


class Modality:
    """One kind of data: how it is stored, modelled, read, drawn and scored. MODALITIES has one
    object of each subclass; methods that a subclass does not override are these. c is a Config.

    Scores are about facts, 0 or 1 each: the pixels of a mask, attributes, words of a caption.
    facts(value) is what a value states; truth(value, rows) is what the pictures of these rows
    show, which for captions is what any of their ten states."""
    file = ""               # its file in a prepared folder
    mirrored = False        # whether mirroring the picture mirrors it, too
    score = "F1"            # name of what agree() measures

    def load(self, path, n, size, meta):
        """What is stored of n items with pictures of that size; ValueError if it does not fit."""
        raise NotImplementedError

    def array(self, stored, c):
        """What is stored -> an array, of which tensor() takes rows."""
        return stored

    def take(self, array, rows, choice):
        """Those rows of the array; choice (B,), or one number, says which caption is meant."""
        return array[rows]

    def tensor(self, rows):
        """Rows as a tensor of any type -> the tensor that the networks see."""
        raise NotImplementedError

    def networks(self, c):
        """-> encoder, decoder, with the calls that DiffMVAE needs."""
        raise NotImplementedError

    def weight(self, c):
        """w_i of Eq. 5."""
        return 1.0

    def parse(self, word, c):
        """A word of the command line, a file's name or a text -> tensor (1, ...)."""
        raise NotImplementedError

    def draw(self, value, c):
        """One item -> a PIL picture, or a text."""
        raise NotImplementedError

    def facts(self, value, data):
        """The facts that n values state: -> (n, W) in {0, 1}; None if there is no score."""
        return None

    def truth(self, value, rows, data):
        """The facts that the pictures of these rows, which have that value, show: -> (n, W)."""
        return self.facts(value, data)

    def judge_head(self, width, c, data):
        """The layers that read the facts off `width` features of a picture."""
        raise NotImplementedError

    def agree(self, seen, stated):
        """How well facts seen in pictures agree with those stated, both (n, W): a number."""
        return mean_f1(seen, stated)


class ImageModality(Modality):
    """Pictures, stored as (N, H, W, 3)."""
    file = "image.npy"
    mirrored = True

    def load(self, path, n, size, meta):
        return load_array(path, (n, size, size, 3))

    def tensor(self, rows):
        rows = rows.permute(0, 3, 1, 2).contiguous()             # (B, 3, H, W)
        return rows.float() / 127.5 - 1

    def networks(self, c):
        encoder = conv_encoder(3, c.image_channels, c.image_pooling, c)
        if c.decoder == "diffusion":
            return encoder, DiffusionDecoder(c)
        return encoder, GaussianDecoder(conv_decoder(3, c.image_channels, c.image_pooling, c))

    def parse(self, word, c):
        pixels = data_prep.read_picture(Path(os.path.expanduser(word)), c.image_size)
        return self.tensor(torch.tensor(pixels).unsqueeze(0))    # (1, 3, H, W)

    def draw(self, value, c):
        pixels = eight_bits(value).permute(1, 2, 0)              # (H, W, 3)
        return Image.fromarray(pixels.cpu().numpy())


class MaskModality(Modality):
    """Masks, stored as (N, H, W) in {0, 1}."""
    file = "mask.npy"
    mirrored = True

    def load(self, path, n, size, meta):
        return load_array(path, (n, size, size), largest=1)

    def tensor(self, rows):
        return rows.unsqueeze(1).float()                         # (B, 1, H, W)

    def networks(self, c):
        encoder = conv_encoder(1, c.mask_channels, c.mask_pooling, c)
        return encoder, BernoulliDecoder(conv_decoder(1, c.mask_channels, c.mask_pooling, c))

    def parse(self, word, c):
        pixels = data_prep.read_mask([Path(os.path.expanduser(word))], c.image_size)
        return self.tensor(torch.tensor(pixels).unsqueeze(0))    # (1, 1, H, W)

    def draw(self, value, c):
        pixels = eight_bits(2 * value[0] - 1)                    # (H, W)
        return Image.fromarray(pixels.cpu().numpy())

    def facts(self, value, data):
        return value.flatten(1)                                  # (B, H W)

    def judge_head(self, width, c, data):
        head = conv_decoder(1, (16, 32, 64), (2, 2, 2), replace(c, latent=width))
        return nn.Sequential(head, nn.Flatten())


class AttributeModality(Modality):
    """Yes or no for each of A attributes, stored as (N, A) in {0, 1}; meta.json names them."""
    file = "attr.npy"

    def load(self, path, n, size, meta):
        names = meta["attributes"]
        if len(set(names)) < len(names):
            raise ValueError("meta.json names an attribute twice")
        return load_array(path, (n, len(names)), largest=1)

    def tensor(self, rows):
        return rows.float()

    def networks(self, c):
        count = len(c.attributes)
        encoder = mlp((count, *c.attr_widths), 2 * c.latent)
        return encoder, BernoulliDecoder(mlp((c.latent, *c.attr_widths[::-1]), count))

    def weight(self, c):
        return c.attr_weight

    def parse(self, word, c):
        chosen = set(word.replace(",", " ").split())
        unknown = chosen - set(c.attributes)
        if unknown:
            raise UserError(f"--given attr: no attribute {', '.join(sorted(unknown))}; the model "
                            f"knows {', '.join(c.attributes)}")
        return torch.tensor([[float(name in chosen) for name in c.attributes]])  # (1, A)

    def draw(self, value, c):
        names = [name.replace("_", " ") for name, bit in zip(c.attributes, value) if bit]
        return "\n".join(names) or "(nothing)"

    def facts(self, value, data):
        return value

    def judge_head(self, width, c, data):
        return nn.Linear(width, len(c.attributes))


class TextModality(Modality):
    """Captions, stored as N lists of texts, equally many each; one of them is drawn at a time."""
    file = "text.json"
    score = "share"

    def load(self, path, n, size, meta):
        captions = json.loads(path.read_text("utf-8"))
        counts = set(map(len, captions))
        if len(captions) != n or len(counts) != 1 or 0 in counts:
            raise ValueError(f"{path.name} has not {n} lists of captions, equally many each")
        return captions

    def array(self, stored, c):
        ids, cut = tokenize([text for texts in stored for text in texts], c)
        if cut:
            print(f"{cut} captions are longer than {c.text_length} tokens and are cut")
        return ids.reshape(len(stored), -1, *ids.shape[1:])      # (N, captions, 2, L)

    def take(self, array, rows, choice):
        return array[rows, choice]

    def tensor(self, rows):
        return rows.long()

    def networks(self, c):
        return TextEncoder(c), TextDecoder(c)

    def weight(self, c):
        return c.text_weight

    def parse(self, word, c):
        ids, cut = tokenize([word], c)                           # (1, 2, L)
        if cut or not any(map(str.isalnum, word)):
            raise UserError(f"--given text={word}: must have a word, and at most "
                            f"{c.text_length - 2} tokens")
        return torch.from_numpy(ids).long()

    def draw(self, value, c):
        return "\n".join(textwrap.wrap(captions_of(value[None], c)[0], 28))

    def facts(self, value, data):
        return data.stated(captions_of(value, data.config))      # (B, W)

    def truth(self, value, rows, data):
        stated = [data.stated(data.captions[row]).amax(0) for row in rows]
        return torch.stack(stated)                               # (B, W), by any of the captions

    def judge_head(self, width, c, data):
        return nn.Linear(width, len(data.vocabulary))

    def agree(self, seen, stated):
        """The share of the stated facts that are seen; pictures show more than captions say."""
        return ((seen * stated).sum() / stated.sum().clamp(min=1)).item()


MODALITIES = {
    "image": ImageModality(),
    "mask": MaskModality(),
    "attr": AttributeModality(),
    "text": TextModality(),
}


def eight_bits(image):
    """[-1, 1] -> {0, ..., 255} as uint8, as a picture file would hold it."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass
class Stored:
    """A data set as data_prep.py writes or draws it."""
    arrays: dict                    # {modality: N rows}, at least "image"
    split: dict                     # {"train": rows, "val": rows, "test": rows}
    attributes: tuple = ()
    mirror: bool = False
    toy: bool = False

    def training_captions(self):
        """All captions of the training split, in one list."""
        texts = []
        if "text" in self.arrays:
            for row in self.split["train"]:
                texts += self.arrays["text"][row]
        return texts

    def settings(self):
        """The fields of Config that the data decide."""
        return dict(
            toy=self.toy,
            modalities=tuple(name for name in MODALITIES if name in self.arrays),
            attributes=self.attributes,
            image_size=self.arrays["image"].shape[1],
            mirror=self.mirror,
            data_checksum=self.checksum())

    def checksum(self):
        """A checksum of arrays and splits, which tells data sets apart."""
        crc = 0
        for stored in (*self.split.values(), *self.arrays.values()):
            if isinstance(stored, list):                         # captions
                stored = json.dumps(stored).encode()
            crc = zlib.crc32(stored, crc)
        return crc


def draw_toys(dataset, size):
    """The built-in toy data of a setup, drawn anew."""
    ends = np.cumsum([0, *TOY_COUNTS.values()])
    split = {}
    for name, start, end in zip(TOY_COUNTS, ends[:-1], ends[1:]):
        split[name] = np.arange(start, end)
    if dataset == "celeba":
        arrays = data_prep.toy_faces(ends[-1], size)
        return Stored(arrays, split, ATTRIBUTES, toy=True)
    return Stored(data_prep.toy_birds(ends[-1], size), split, toy=True)


def read_prepared(folder):
    """A folder of data_prep.py, or the user's own: image.npy, one or more of the other files of
    MODALITIES, and meta.json with "split" and, if there are any, the names of the "attributes".
    UserError for what does not fit."""
    with user_error(f"{folder}: not a complete data set"):
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        n, size, *_ = np.load(folder / "image.npy", mmap_mode="r").shape
        arrays = {}
        for name, modality in MODALITIES.items():
            path = folder / modality.file
            if path.exists():
                arrays[name] = modality.load(path, n, size, meta)
        split = {name: np.array(meta["split"][name], int) for name in ("train", "val", "test")}
        check_split(split, n)
        if len(arrays) < 2:
            raise ValueError("there is nothing beside image.npy; a second modality is needed")
    attributes = tuple(meta["attributes"]) if "attr" in arrays else ()
    return Stored(arrays, split, attributes, mirror=meta.get("mirror", False))


def check_split(split, n):
    """ValueError unless every split has at least two rows, all from 0 to n - 1, none of them
    twice."""
    rows = np.concatenate(list(split.values()))
    if min(map(len, split.values())) < 2:
        raise ValueError("meta.json: a split has under two rows")
    if not set(rows) <= set(range(n)) or len(set(rows)) < len(rows):
        raise ValueError(f"meta.json: a split has a row that is not one of 0 to {n - 1}, or is "
                         "there twice")


def common_words(captions):
    """The 50 words that are most frequent in captions, those of one frequency sorted."""
    count = Counter()
    for text in captions:
        count.update(data_prep.content_words(text))
    return tuple(sorted(count, key=lambda word: (-count[word], word))[:50])


class Data:
    """A data set as one model sees it: arrays by modality, captions as tokens, and its splits."""

    def __init__(self, stored, config, device):
        self.config = config
        self.device = device
        self.split = stored.split
        self.checksum = stored.checksum()
        self.captions = stored.arrays.get("text", [])
        self.choices = len(self.captions[0]) if self.captions else 1  # captions of an item
        self.arrays = {}
        for name in config.modalities:
            self.arrays[name] = MODALITIES[name].array(stored.arrays[name], config)
        if stored.toy:  # the facts that captions may state, and what finds them in a caption
            self.facts_in = data_prep.facts_of
            self.vocabulary = data_prep.BIRD_FACTS
        else:
            self.facts_in = data_prep.content_words
            self.vocabulary = common_words(stored.training_captions())

    def describe(self):
        """What was found, in a few lines."""
        sizes = ", ".join(f"{len(rows)} {name}" for name, rows in self.split.items())
        size = self.config.image_size
        print(f"data: {', '.join(self.arrays)} of {sizes} items, {size}x{size} pixels")
        if "attr" in self.arrays:
            shares = self.arrays["attr"][self.split["train"]].mean(0)
            names = zip(self.config.attributes, shares)
            print("attributes: " + ", ".join(f"{name} {share:.2f}" for name, share in names))

    def tensors(self, rows, choice=0):
        """Rows by number -> dict of tensors; choice: which caption, one number or (B,)."""
        x = {}
        for name, array in self.arrays.items():
            part = MODALITIES[name].take(array, rows, choice)
            part = torch.as_tensor(part).to(self.device, non_blocking=True)
            x[name] = MODALITIES[name].tensor(part)
        return x

    def mirror(self, x):
        """x with image, mask and the like mirrored left to right."""
        mirrored = dict(x)
        for name, value in x.items():
            if MODALITIES[name].mirrored:
                mirrored[name] = value.flip(3)
        return mirrored

    def batches(self, size):
        """The number of whole batches in the training split; 1 if it is smaller than a batch."""
        return max(1, len(self.split["train"]) // size)

    def batch_rows(self, size, seed, step):
        """Rows of training batch `step`, and which caption of each; epochs are permutations."""
        epoch, k = divmod(step, self.batches(size))
        rng = np.random.default_rng((seed, epoch))
        rows = rng.permutation(self.split["train"])
        choice = rng.integers(self.choices, size=len(rows))
        part = slice(k * size, (k + 1) * size)
        return rows[part], choice[part]

    def stated(self, captions):
        """Which of the vocabulary each caption states: n texts -> (n, W) in {0, 1}."""
        rows = []
        for text in captions:
            found = self.facts_in(text)
            rows.append([float(word in found) for word in self.vocabulary])
        return torch.tensor(rows, device=self.device)

    def truth(self, rows):
        """What can be read off the pictures of these rows: -> {modality: (B, W) in {0, 1}}."""
        facts = {}
        for name, value in self.tensors(rows).items():
            truth = MODALITIES[name].truth(value, rows, self)
            if truth is not None:
                facts[name] = truth
        return facts


# === §9 Training ===

def autocast(device):
    """bfloat16 where the hardware multiplies it faster than float32; losses are float32 anyway."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        abilities = torch.cpu.get_capabilities()
        fast = bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024): a weight as a matrix (out, rest) moves along its averaged gradient
    with all singular values made about 1, by five Newton-Schulz iterations. PyTorch's own takes
    only matrices, in bfloat16, which many CPUs lack. The iterations run on the smaller Gram
    matrix, which is faster."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0})                    # optimise() sets it

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            if "mean" not in self.state[p]:
                self.state[p]["mean"] = torch.zeros_like(p)
            mean = self.state[p]["mean"].lerp_(p.grad, 0.05)
            update = p.grad.lerp(mean, 0.95).flatten(1)          # (out, rest), Nesterov's momentum
            out, rest = update.shape
            scale = max(1, out / rest) ** 0.5
            p.sub_(orthogonalise(update).reshape(p.shape), alpha=lr * scale)


def orthogonalise(x):
    """A matrix with the singular vectors of x and singular values of about 1: same shape as x."""
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.T).T                              # fewer rows than columns
    x = x / (x.norm() + 1e-12)
    gram = x @ x.T
    one = torch.eye(len(x), device=x.device)
    total = one
    for _ in range(5):  # x <- turn x, five times, in terms of the smaller x x^T
        turn = 3.4445 * one - 4.775 * gram + 2.0315 * gram @ gram
        gram = turn @ gram @ turn
        total = turn @ total
    return total @ x


@contextmanager
def new_file(path):
    """A binary file that becomes `path` when it is whole; else UserError, and `path` stays."""
    part = path.with_name(path.name + ".part")
    with user_error(f"{path}: cannot be written, what was there is kept"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read_archive(path, device="cpu"):
    """What torch.save wrote, tensors and plain types; ValueError if a checksum in it is wrong."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, device, weights_only=True)


def read_checkpoint(path, device="cpu"):
    """What train() saved: a dict of tensors and plain types, its "config" made a Config again."""
    if not Path(path).exists():
        raise UserError(f"{path}: no checkpoint yet; train first with --train")
    with user_error(f"{path}: not a checkpoint of this version of the script, or damaged"):
        checkpoint = read_archive(path, device)
        checkpoint["config"] = Config(**checkpoint["config"])
    return checkpoint


def load(path, device="cpu"):
    """The trained model for notebooks: -> DiffMVAE with the EMA weights, in eval mode."""
    checkpoint = read_checkpoint(path, device)
    with user_error(f"{path}: its weights and its configuration do not fit together"):
        model = DiffMVAE(checkpoint["config"])
        model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval()


@torch.no_grad()
def coherence(model, data, rows):
    """Figures that show what losses do not: -> dict. "image gap", "text gap": by how much the
    decoder's loss, "image loss" or "text loss", is worse with the z of another row. "mask->image":
    F1 of the image made from a mask, read by the model's own encoder, against that mask;
    "image->mask": of what the model reads off real images."""
    x = data.tensors(rows)
    config = model.config
    figures = {}
    with autocast(data.device):
        z = gaussian_sample(*model.posterior(x))                 # (B, Z)
        right = same_noise_losses(model, z, x)
        wrong = same_noise_losses(model, z.roll(1, 0), x)
        for name in config.modalities:
            if name in ("image", "text"):
                figures[f"{name} loss"] = right[name]
                figures[f"{name} gap"] = wrong[name] - right[name]
        for name in config.modalities:
            modality = MODALITIES[name]
            facts = modality.facts(x[name], data)
            if facts is None:
                continue
            made = model.sample_conditional({name: x[name]}, names=["image"], sampler="dpm++",
                                            steps=10)
            for key, image in ((f"{name}->image", made["image"]), (f"image->{name}", x["image"])):
                mu, _ = model.posterior({"image": image})
                read = model.decoders[name].sample(mu)
                figures[key] = mean_f1(modality.facts(read, data), facts)
    return {name: round(value, 3) for name, value in figures.items()}


def same_noise_losses(model, z, x):
    """Mean losses of every decoder, always with the same noise and times: -> dict of numbers."""
    torch.manual_seed(0)
    terms = model.reconstruct(z, x, model.config.weighting)
    return {name: term.mean().item() for name, term in terms.items()}


@dataclass
class Training:
    """A training under way. Random numbers depend on (seed, stage, step) alone, so that resuming
    needs no generator's state."""
    folder: Path
    config: Config
    data: Data
    stop: list                      # not empty once a signal has asked to save and stop
    model: DiffMVAE
    ema: DiffMVAE                   # its averaged weights
    stage: int = 1
    step: int = 0                   # steps of this stage that are done
    optimizer_states: list = field(default_factory=list)
    log: list = field(default_factory=list)

    def save(self, optimizers):
        """Write checkpoint.pt and log.jsonl, each whole or not at all."""
        with new_file(self.folder / "checkpoint.pt") as file:
            torch.save({
                "config": asdict(self.config),
                "stage": self.stage,
                "step": self.step,
                "log": self.log,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }, file)
        with new_file(self.folder / "log.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in self.log).encode())


def train(folder, config, data, stop, resume=False, text_init=None):
    """Stage 1: Eq. 5 end to end [Sec. 3.2]; stage 2: the auxiliary model [Sec. 3.4]. Writes
    checkpoint.pt, log.jsonl and pictures; saves and leaves when the list `stop` gets an item."""
    training = start_training(folder, config, data, stop, resume, text_init)
    if training.stage == 1:
        train_model(training)
        if stop:
            return
        training.stage = 2
        training.step = 0
        training.optimizer_states = []
    train_auxiliary(training)


def start_training(folder, config, data, stop, resume, text_init):
    """Build the model and its averages, or continue from the checkpoint: -> Training."""
    torch.manual_seed(config.seed)
    model = DiffMVAE(config).to(data.device)
    if data.device.type == "cuda":  # on CPUs group norm is faster in the plain layout
        model = model.to(memory_format=torch.channels_last)
    if text_init:
        load_text_weights(model, text_init)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    training = Training(folder, config, data, stop, model, ema)
    if resume:
        checkpoint = read_checkpoint(folder / "checkpoint.pt")
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        training.stage = checkpoint["stage"]
        training.step = checkpoint["step"]
        training.optimizer_states = checkpoint["optimizers"]
        training.log = checkpoint["log"]
    folder.mkdir(parents=True, exist_ok=True)                    # now, not at the first checkpoint
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return training


def train_model(training):
    """Stage 1: the encoders and decoders by Eq. 5, or by MVTCAE's objective."""
    config, data, model = training.config, training.data, training.model
    objective = model.neg_mvtcae if config.objective == "mvtcae" else model.neg_elbo

    def losses(step):
        warming_up = step < config.warmup * config.steps
        weighting = "v" if warming_up else config.weighting      # [Eq. 5]
        x = data.tensors(*data.batch_rows(config.batch_size, config.seed, step))
        if config.mirror and step % 2 == 1:                      # ours: every second batch
            x = data.mirror(x)
        return objective(x, weighting)                           # {term: (B,)}

    def probe(step):
        figures = coherence(training.ema, data, data.split["val"][:64])
        training.log.append({"stage": 1, "step": step, **figures})
        tqdm.write(str(training.log[-1]))
        path = training.folder / "samples" / f"train-{step:06d}.png"
        given = [config.modalities[1]]                           # mask, or text of birds
        sample_pictures(training.ema, data, path, given, 4, sampler="dpm++", steps=10)

    nets = nn.ModuleList([model.encoders, model.decoders])
    averages = nn.ModuleList([training.ema.encoders, training.ema.decoders])
    matrices, others = [], []
    for p in nets.parameters():
        if config.optimizer == "muon" and min(len(p), p[0].numel()) >= 16:
            matrices.append(p)                                   # embeddings included
        else:
            others.append(p)
    optimizers = [adam(others)]
    if matrices:
        optimizers.append(Muon(matrices))
    optimise(training, config.steps, nets, averages, optimizers, losses, probe)


def train_auxiliary(training):
    """Stage 2: the auxiliary model, on samples of the posterior given everything [Sec. 3.4]."""
    config, aux = training.config, training.model.aux
    mu, logvar = all_posteriors(training.ema, training.data)               # (N, Z) each
    for part in (aux, training.ema.aux):  # moments of the samples, in closed form
        part.mean.copy_(mu.mean(0))
        part.std.copy_((mu.var(0) + logvar.exp().mean(0)).sqrt())

    def losses(step):
        weighting = "v" if step < config.warmup * config.aux_steps else "simple"
        rows = torch.randint(len(mu), (config.aux_batch_size,), device=mu.device)
        return {"total": aux.loss(mu[rows], logvar[rows], weighting)}

    optimise(training, config.aux_steps, aux, training.ema.aux, [adam(aux.parameters())], losses)


def adam(params):
    """Adam as in the paper, but with an eps far below the smallest clipped gradients."""
    return torch.optim.Adam(params, eps=1e-12, fused=True)


@torch.no_grad()
def all_posteriors(model, data):
    """q(z|x) of every training item, with each of its captions: -> mu, logvar (N, Z) each."""
    mus, logvars = [], []
    with autocast(data.device):
        for choice in range(data.choices):
            for rows in np.array_split(data.split["train"], data.batches(256)):
                mu, logvar = model.posterior(data.tensors(rows, choice))
                mus.append(mu)
                logvars.append(logvar)
    return torch.cat(mus), torch.cat(logvars)


def optimise(training, total, nets, averages, optimizers, losses, probe=None):
    """The loop of both stages, up to step `total`: minimise losses(step)["total"], average the
    weights, log, call probe(step) now and then, save. It saves and ends early once training.stop
    is not empty."""
    config = training.config
    for optimizer, state in zip(optimizers, training.optimizer_states):
        optimizer.load_state_dict(state)
    params = list(nets.parameters())
    pending = []
    start = time.time()
    training.model.train()
    steps = range(training.step, total)
    bar = tqdm(steps, f"stage {training.stage}", total, initial=training.step, mininterval=1)
    for step in bar:
        # Loss of one batch
        numbers = np.random.SeedSequence((config.seed, training.stage, step)).generate_state(1)
        torch.manual_seed(int(numbers[0]))
        with autocast(training.data.device):
            terms = losses(step)
        # One step; the learning rates warm up, then follow a cosine to zero
        nets.zero_grad()
        terms["total"].mean().backward()                         # the one mean over the batch
        norm = nn.utils.clip_grad_norm_(params, 1.0)             # hundreds in stage 1, so always
        rate = min(1, (step + 1) / config.lr_warmup) * math.cos(math.pi / 2 * step / total) ** 2
        for optimizer, peak in zip(optimizers, (config.lr, config.muon_lr)):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
        average(averages, nets, min(config.ema, (1 + step) / (10 + step)))
        # Log, figures and a picture, checkpoint
        training.step = step + 1
        stopping = bool(training.stop)                           # a signal may come at any time
        at_end = training.step == total
        last = stopping or at_end
        pending.append(torch.stack([*(term.detach().mean() for term in terms.values()), norm]))
        if training.step % config.log_every == 0 or last:
            means = finite_means(training, [*terms, "grad"], torch.stack(pending).cpu())
            seconds = round(time.time() - start, 1)              # since this start or resume
            row = {"stage": training.stage, "step": training.step, **means, "seconds": seconds}
            training.log.append(row)
            bar.set_postfix(means)
            pending = []
        if probe is not None and (training.step % config.probe_every == 0 or at_end):
            probe(training.step)
        if training.step % config.save_every == 0 or last:
            training.save(optimizers)
        if stopping:
            return


@torch.no_grad()
def average(averages, nets, decay):
    """Exponential averages of weights and of batch norm's statistics; counters are copied."""
    for ours, theirs in zip(averages.parameters(), nets.parameters()):
        ours.lerp_(theirs, 1 - decay)
    for ours, theirs in zip(averages.buffers(), nets.buffers()):
        if ours.is_floating_point():
            ours.lerp_(theirs, 1 - decay)
        else:
            ours.copy_(theirs)


def finite_means(training, names, values):
    """Means of values (steps, names): -> dict; UserError if any is not finite."""
    bad = (~values.isfinite()).nonzero()                         # (n, 2)
    if len(bad) > 0:
        k, column = bad[0].tolist()
        raise UserError(f"stage {training.stage}, step {training.step - len(values) + k + 1}: "
                        f"{names[column]} is not finite; nothing after the last checkpoint is "
                        "saved. Try a smaller --lr, or Adam")
    return {name: round(value, 3) for name, value in zip(names, values.mean(0).tolist())}


# === §10 Sampling to pictures [Sec. 3.3] [Sec. 3.4] ===

def read_given(words, config):
    """`--given` words -> names, x. "mask": of the test split, and x is empty. "mask=face.png",
    "attr=Smiling,Bangs", "text=a red bird": x has the user's own. UserError on others."""
    known = config.modalities
    names = []
    x = {}
    for word in words:
        name, sign, value = word.partition("=")
        if name not in known or name in names or bool(sign) != ("=" in words[0]):
            raise UserError(f"--given {' '.join(words)}: choose from {', '.join(known)}, each "
                            f"once, all of the test split ({known[-1]}) or all your own "
                            f"({known[-1]}=...)")
        names.append(name)
        if sign:
            x[name] = MODALITIES[name].parse(value, config)
    return names, x


def draw_grid(path, title, columns, config):
    """Save a labelled grid. columns: [(label, modality, values (n, ...))]; a row is an item."""
    top, wide, tall = 44, 174, 134
    font = ImageFont.load_default(13)
    width = max(wide * len(columns), math.ceil(font.getlength(title))) + 12
    height = top + tall * max(len(values) for _, _, values in columns)
    grid = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((6, 4), title, "black", font)
    for j, (label, name, values) in enumerate(columns):
        x = 6 + wide * j
        pen.text((x, 24), label, "black", font)
        for k, value in enumerate(values):
            y = top + tall * k
            drawn = MODALITIES[name].draw(value, config)
            if isinstance(drawn, str):
                size = max(6, min(12, 105 // (drawn.count("\n") + 1)))
                pen.multiline_text((x, y), drawn, "black", ImageFont.load_default(size), spacing=1)
            else:
                grid.paste(drawn.resize((128, 128), Image.Resampling.NEAREST), (x, y))
    with new_file(path) as file:
        grid.save(file, "PNG")


def sample_pictures(model, data, path, given, num, seed=0, prior="aux", own=None, **options):
    """Generate and draw the grid at `path`. given: names of the modalities given, [] for sampling
    from nothing. Their values are those of the first `num` test items, or of `own`, one item of
    the user's that is sampled `num` times; then data may be None. options: of decode."""
    config = model.config
    device = model.device
    x = {}
    if own:
        x = {name: value.to(device).expand(num, *value.shape[1:]) for name, value in own.items()}
    elif given:
        x = data.tensors(data.split["test"][:num])
    generator = torch.Generator().manual_seed(seed)
    with autocast(device):
        if given:
            chosen = {name: x[name] for name in given}
            made = model.sample_conditional(chosen, 1, generator, **options)
            source = " + ".join(given)
        else:
            made = model.sample_unconditional(num, prior, generator, **options)
            source = f"nothing (prior: {prior})"
    columns = []
    for name, values in x.items():
        source_of = "given" if name in given else "test"
        columns.append((f"{source_of}: {name}", name, values))
    for name, values in made.items():
        columns.append((f"made: {name}", name, values))
    title = f"given {source}, seed {seed}"
    if config.decoder == "diffusion":
        sampler, steps = config.sampling(**options)
        title += f", {sampler}, {steps} steps"
    draw_grid(path, title, columns, config)


# === §11 Evaluation ===

def mean_f1(pred, target):
    """F1 of (B, ...) in {0, 1}, averaged over items: 2 TP / (predicted + true), 0 if both are
    empty."""
    pred = pred.flatten(1) > 0.5
    target = target.flatten(1) > 0.5
    both = 2 * (pred & target).sum(1)
    return (both / (pred.sum(1) + target.sum(1)).clamp(min=1)).mean().item()


class Judge(nn.Module):
    """A CNN that reads facts off pictures, trained on real ones; it shares no weights with the
    model that it judges. (B, 3, H, W) -> features (B, 128), {modality: logits (B, W)}."""

    def __init__(self, data):
        super().__init__()
        c = data.config
        self.body = conv_encoder(3, (32, 64, 128), (2, 2, 2), replace(c, latent=64))  # 2 Z = 128
        self.heads = nn.ModuleDict()
        for name in data.truth(data.split["train"][:1]):
            self.heads[name] = MODALITIES[name].judge_head(128, c, data)

    def forward(self, image):
        features = F.relu(self.body(image))                      # (B, 128)
        return features, {name: head(features) for name, head in self.heads.items()}

    def features(self, image):
        return self(image)[0].float()

    def facts(self, image):
        """-> {modality: the facts (N, W) in {0, 1} that it sees}."""
        parts = [self(part)[1] for part in image.split(CHUNK)]
        seen = {}
        for name in self.heads:
            logits = torch.cat([part[name] for part in parts])
            seen[name] = (logits > 0).float()
        return seen


def get_judge(path, data):
    """The judge kept at `path`; if there is none it is trained first, on the training split."""
    torch.manual_seed(0)  # the same judge, and so the same FD-judge, whatever was drawn before
    judge = Judge(data).to(data.device)
    if path.exists():
        with user_error(f"{path}: not a judge of this data, or damaged; delete it"):
            judge.load_state_dict(read_archive(path, data.device))
        return judge.eval()
    if not judge.heads:  # there is nothing to read off pictures
        return judge.eval()
    steps = max(JUDGE_STEPS, 5 * data.batches(64))               # batches of five passes
    optimizer = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in tqdm(range(steps), "judge"):
        rows, _ = data.batch_rows(64, 0, step)
        with autocast(data.device):
            _, logits = judge(data.tensors(rows)["image"])
        loss = torch.zeros((), device=data.device)
        for name, truth in data.truth(rows).items():
            loss = loss + F.binary_cross_entropy_with_logits(logits[name].float(), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with new_file(path) as file:
        torch.save(judge.state_dict(), file)
    return judge.eval()


@torch.no_grad()
def moments(function, image):
    """Mean (D,) and covariance (D, D), in float64, of the features (n, D) of pictures, which
    `function` computes, a chunk of pictures at a time."""
    count, total, squares = 0, 0.0, 0.0
    for part in image.split(CHUNK):
        features = function(part).double()
        count += len(features)
        total = total + features.sum(0)
        squares = squares + features.T @ features
    mean = total / count
    covariance = (squares - count * torch.outer(mean, mean)) / (count - 1)
    return mean.cpu(), covariance.cpu()


def frechet_distance(a, b):
    """Between Gaussians with moments a and b [8]: |mu_a - mu_b|^2 + tr(C_a + C_b
    - 2 (C_a C_b)^1/2). That root has the trace of (R C_b R)^1/2, where R R = C_a."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T      # (D, D) R
    roots = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    return distance.item()


def patches(image):
    """All 4x4 patches of pictures (B, 3, H, W) in [-1, 1]: -> (B (H - 3) (W - 3), 48)."""
    return F.unfold(image.float(), 4).transpose(1, 2).flatten(0, 1)


def texture_energy(image):
    """Mean variance of the pixels within the 4x4 patches, colour by colour: a number."""
    total = 0.0
    for part in image.split(CHUNK):
        colours = patches(part).unflatten(1, (3, 16))            # (patches, 3, 16)
        total += colours.var(2, unbiased=False).mean().item() * len(part)
    return total / len(image)


def load_inception(path, device):
    """FID's network, pt_inception-2015-12-05-6726825d.pth of pytorch-fid: -> function of images ->
    (B, 2048). It is torchvision's Inception v3, but average pooling does not count the padding,
    and the last block's pooling is a maximum: hooks on the layers after the pooling, of which
    one undoes its division and the other replaces its result."""
    from torchvision.models import Inception3  # here, as importing it takes seconds
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False).to(device).eval()
    with user_error(f"--inception {path}: not pytorch-fid's weights of Inception v3, or damaged"):
        net.load_state_dict(torch.load(path, "cpu", weights_only=True))
    net.fc = nn.Identity()

    def mean_without_padding(branch, args):
        return args[0] / F.avg_pool2d(torch.ones_like(args[0]), 3, 1, 1)

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        branch = getattr(net, f"Mixed_{name}").branch_pool
        branch.register_forward_pre_hook(mean_without_padding)
    last_input = []

    def keep_input(block, args):
        last_input[:] = args

    def largest_values(branch, args):
        return F.max_pool2d(last_input[0], 3, 1, 1)

    net.Mixed_7c.register_forward_pre_hook(keep_input)
    net.Mixed_7c.branch_pool.register_forward_pre_hook(largest_values)

    def features(image):
        pixels = eight_bits(image).float() / 255
        pixels = F.interpolate(pixels, size=(299, 299), mode="bilinear")
        with torch.autocast(device.type, enabled=False):
            return net(2 * pixels - 1)                           # (B, 2048)
    return features


def load_clip(name, device):
    """A CLIP model: -> function of images (B, 3, H, W), captions -> 100 max(cos, 0) [7], (B,)."""
    from transformers import CLIPModel, CLIPProcessor
    with user_error(f"--clip {name}: no CLIP model"):
        net = CLIPModel.from_pretrained(name).to(device).eval()
        processor = CLIPProcessor.from_pretrained(name)

    def score(image, captions):
        batch = processor(
            text=captions,
            images=list(eight_bits(image)),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=net.config.text_config.max_position_embeddings,
        ).to(device)
        with torch.autocast(device.type, enabled=False):
            out = net(**batch)
        return 100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)
    return score


class Evaluation:
    """Measures a model on the first `num` test items. `figures` has a list of values for each
    name, one value a draw. inception, clip: see load_*; options: sampler, steps of images."""

    def __init__(self, model, data, judge, num, inception=None, clip=None, **options):
        rows = data.split["test"][:num]
        self.model = model
        self.data = data
        self.judge = judge
        self.clip = clip
        self.options = options
        self.names = model.config.modalities
        self.x = data.tensors(rows)
        self.truth = data.truth(rows)                            # {modality: (N, W)}
        self.stated = {name: MODALITIES[name].facts(self.x[name], data) for name in self.truth}
        self.extractors = {"FD-patch": patches}
        if self.truth:
            self.extractors["FD-judge"] = judge.features
        if inception is not None:
            self.extractors["FID"] = inception
        self.real = self.all_moments(self.x["image"])
        self.figures = {}

    def add(self, name, value):
        self.figures.setdefault(name, []).append(round(float(value), 4))

    def all_moments(self, image):
        return {label: moments(function, image) for label, function in self.extractors.items()}

    @torch.no_grad()
    def run(self, repeats, seed):
        """Measure real pictures, then `repeats` draws with seeds from `seed`: -> figures."""
        self.compare_real()
        subsets = all_subsets(len(self.names)).tolist()
        for draw in range(seed, seed + repeats):
            for subset in tqdm(subsets, f"seed {draw}"):
                given = [name for name, observed in zip(self.names, subset) if observed]
                self.measure(" + ".join(given), given, self.generate(given, draw))
            for source, prior in (("nothing", "aux"), ("N(0, I)", "gaussian")):
                self.measure(source, [], self.generate([], draw, prior))
            if self.model.config.decoder == "diffusion":
                self.two_draws(draw)
                self.bound(draw)
        return self.figures

    def compare_real(self):
        """What to compare generated pictures with: as many other real ones; how well the judge
        reads real ones; the score of ignoring what is given."""
        num = len(self.x["image"])
        rows = [*self.data.split["test"][num:], *self.data.split["val"]][:num]
        for label, others in self.all_moments(self.data.tensors(np.array(rows))["image"]).items():
            self.add(f"{len(rows)} other real images: {label}",
                     frechet_distance(others, self.real[label]))
        for name, seen in self.judge.facts(self.x["image"]).items():
            truth = self.truth[name]
            self.add(f"Supervised, {name} from image: F1", mean_f1(seen, truth))
            self.add(f"{name} of another item: F1", mean_f1(self.stated[name].roll(1, 0), truth))

    def chunks(self):
        """The items, CHUNK at a time."""
        for start in range(0, len(self.x["image"]), CHUNK):
            yield {name: value[start:start + CHUNK] for name, value in self.x.items()}

    def generate(self, given, seed, prior=None):
        """What is not given, and the image if it is given alone or with everything: -> dict of
        (N, ...)."""
        generator = torch.Generator().manual_seed(seed)
        names = [name for name in self.names if name not in given]
        if given == ["image"] or not names:
            names.append("image")
        parts = []
        for part in self.chunks():
            if given:
                chosen = {name: part[name] for name in given}
                made = self.model.sample_conditional(chosen, 1, generator, names=names,
                                                     **self.options)
            else:
                made = self.model.sample_unconditional(len(part["image"]), prior, generator,
                                                       **self.options)
            parts.append(made)
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def measure(self, source, given, made):
        """All figures of what was generated from one source."""
        if "image" in made:
            self.quality(source, made["image"])
        self.agreement(source, given, made)
        if self.clip is not None:
            self.clip_score(source, given, made)

    def quality(self, source, image):
        """How near generated images are to real ones in distribution, and how rich in texture."""
        for label, generated in self.all_moments(image).items():
            self.add(f"image from {source}: {label}",
                     frechet_distance(generated, self.real[label]))
        share = texture_energy(image) / texture_energy(self.x["image"])
        self.add(f"image from {source}: texture, share of real energy", share)

    def agreement(self, source, given, made):
        """F1 of generated attributes, masks and captions. Then the judge reads generated images,
        and that is compared with what was given, or else with what was generated with them."""
        facts = {}
        for name in self.truth:
            if name in made:
                facts[name] = MODALITIES[name].facts(made[name], self.data)
                if given:
                    self.add(f"{name} from {source}: F1", mean_f1(facts[name], self.truth[name]))
        if "image" not in made:
            return
        for name, seen in self.judge.facts(made["image"]).items():
            modality = MODALITIES[name]
            if not given:
                self.add(f"image + {name} from {source}: agree, {modality.score}",
                         modality.agree(seen, facts[name]))
            elif name in given:
                self.add(f"image from {source}: judged {name}, {modality.score}",
                         modality.agree(seen, self.stated[name]))

    def clip_score(self, source, given, made):
        """Mean CLIP score of image and caption, of which one at least was generated."""
        new = [name for name in ("image", "text") if name in made and name not in given]
        if not new:
            return
        pair = {**self.x, **{name: made[name] for name in new}}
        scores = []
        for image, text in zip(pair["image"].split(CHUNK), pair["text"].split(CHUNK)):
            scores.append(self.clip(image, captions_of(text, self.model.config)))
        self.add(f"{' + '.join(new)} from {source}: CLIP", torch.cat(scores).mean())

    def two_draws(self, seed):
        """By how many grey levels two images of one z differ: detail that z does not determine."""
        mu, _ = self.model.posterior(next(self.chunks()))        # (n, Z)
        z = mu.repeat(2, 1)                                      # (2 n, Z)
        noise = row_noise(len(z), torch.Generator().manual_seed(seed), z.device)
        first, second = self.model.decode(z, noise, ["image"], **self.options)["image"].chunk(2)
        difference = (first - second).square().mean().sqrt()
        self.add("two images of one z: difference, grey levels", 127.5 * difference)

    def bound(self, seed):
        """An upper bound on -log P of the 8-bit items, in nats: [Eq. 5] with lambda = g^2, and for
        the image with the two ends of time (bound_8bit)."""
        torch.manual_seed(seed)
        parts = [self.model.neg_elbo(part, "likelihood", bound=True) for part in self.chunks()]
        total = 0.0
        for name in (*self.names, "kl"):
            nats = torch.cat([part[name] for part in parts]).mean().item()
            self.add(f"Eq. 5 bound: {name}, nats", nats)
            total += nats
        bits = total / math.log(2) / self.x["image"][0].numel()
        self.add("Eq. 5 bound: bits per image value", bits)


# === §12 Command line ===

def parse_args(argv=None):
    """All flags, checked; those of Config that were given are in args.config."""
    parser = data_prep.Parser(prog="diffmvae.py", description="Train, sample, evaluate, in turn.")
    count = within(int, 1)
    add = parser.add_argument_group("what to do").add_argument
    add("--dataset", choices=list(PRESETS), required=True,
        help="the setup: celeba (image, mask, attributes) or cub (image, caption)")
    add("--train", action="store_true", help="train both stages: Eq. 5, then the auxiliary model")
    add("--sample", choices=["cond", "uncond"], help="write a picture of samples")
    add("--eval", action="store_true", help="measure the figures of the paper's tables and more")
    add("--data", type=Path, help="prepared folder, or toy (default: data/<dataset> or toy)")
    add("--run", type=Path, help="run folder (default: runs/<dataset>[-toy][-variant])")
    add("--seed", type=within(int, 0, 2 ** 63 - 1), default=0,
        help="of training (a resumed one keeps its own), sampling, evaluation (default: 0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto: cuda if there is one, else cpu; mps is untried (default: auto)")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--given", nargs="+", default=[], metavar="NAME[=VALUE]", help="for --sample cond: of the "
        "test split (mask attr) or yours (image=a.jpg mask=b.png attr=Bangs,Male text='a bird')")
    add("--prior", choices=["aux", "gaussian"], default="aux",
        help="for --sample uncond: z from the auxiliary model (default) or from N(0, I)")
    add("--num", type=within(int, 1, 1000), default=8, help="rows of the picture (default: 8)")
    add("--sampler", choices=list(SAMPLERS),
        help="of diffusion's images (default: ddpm, in the paper preset ddim; for lambda = g(t)^2 "
        "euler-maruyama)")
    add("--sampler-steps", type=count, help="of that sampler (default: 50, of euler-maruyama 100)")
    add("--eval-num", type=within(int, 2), help="test items (default: 400, with --inception all)")
    add("--eval-repeats", type=count, default=3, help="draws, with seeds from --seed (default: 3)")
    add("--inception", help="for FID: pytorch-fid's file pt_inception-2015-12-05-6726825d.pth")
    add("--clip", help="for CLIP scores of captions: a model of the Hugging Face hub or a folder")
    add = parser.add_argument_group("training (defaults: by preset)").add_argument
    flags = [f for f in fields(Config) if f.metadata]
    for f in flags:
        options = {}
        if f.type is bool:
            options["action"] = "store_true"
        elif f.type is int:
            options["type"] = count
        elif f.type is float:
            options["type"] = within(float, 0)
        options.update(f.metadata)
        add("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **options)
    add("--text-init", nargs=2, metavar="FOLDER", help="captions, preset paper: Optimus's folders "
        "checkpoint-encoder-*, checkpoint-decoder-* (default: bert-base-cased, gpt2 of the hub)")
    add("--resume", action="store_true", help="continue the run exactly where its checkpoint is")
    args = parser.parse_args(argv)
    args.config = {f.name: getattr(args, f.name) for f in flags if hasattr(args, f.name)}
    check_args(parser, args)
    return args


def check_args(parser, args):
    """One line and exit code 2 for flags that do not go together."""
    c = args.config
    training = c.keys() - {"decoder", "objective", "weighting", "prior_expert"}
    if not (args.train or args.sample or args.eval):
        parser.error("give --train, --sample or --eval")
    if (args.sample == "cond") != bool(args.given):
        parser.error("--sample cond goes with --given")
    if args.prior != "aux" and args.sample != "uncond":
        parser.error("--prior needs --sample uncond")
    if (args.resume or args.text_init or training) and not args.train:
        parser.error("flags of training need --train; a trained model keeps its own")
    if c.get("decoder") == "feedforward" and c.get("weighting") == "likelihood":
        parser.error("--weighting likelihood is of the diffusion decoder, not feedforward")
    if c.get("objective") == "mvtcae" and "prior_expert" in c:
        parser.error("mvtcae has no prior-expert")
    if (args.clip or args.inception) and not args.eval:
        parser.error("--clip, --inception need --eval")


def find_device(name):
    """The device that --device names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with user_error(f"--device {name}: there is none here"):
        torch.zeros(1, device=name)
    return torch.device(name)


def find_data(args):
    """-> the prepared folder, or None for toys."""
    if args.data is None:
        default = Path("data") / args.dataset
        return default if default.exists() else None
    return None if args.data == Path("toy") else args.data


def find_run(args, toy):
    """The run folder; its default names the setup and the variant of the model."""
    if args.run is not None:
        return args.run
    words = [args.dataset]
    if toy:
        words.append("toy")
    for name in ("decoder", "weighting", "objective"):
        value = args.config.get(name)
        if value not in (None, getattr(Config, name)):
            words.append(value)
    if "prior_expert" in args.config:
        words.append("prior")
    return Path("runs") / "-".join(words)


def read_data(source, dataset, size):
    """The prepared folder `source`, or toys of that size if it is None: -> Stored."""
    if source is not None:
        return read_prepared(source)
    print(f"*** Not real data: the built-in TOY {dataset}. ***")
    return draw_toys(dataset, size)


def new_config(args, source):
    """The configuration of a new training, and its data: -> Config, Stored."""
    preset = args.config.get("preset", "small" if source is None else "paper")
    settings = {**args.config, "preset": preset, "seed": args.seed}
    config = preset_config(args.dataset, **settings)
    stored = read_data(source, args.dataset, config.image_size)
    config = replace(config, **stored.settings())
    if preset == "small" and config.image_size >= 64 and config.image_size % 16 == 0:
        config = replace(config, patch=4)
    check_size(config)
    if args.text_init and preset != "paper":
        raise UserError("--text-init needs --preset paper, whose sizes it has")
    if "text" not in config.modalities:
        return config, stored
    if preset == "paper":
        return pretrained_tokenizers(config, args.text_init or TEXT_MODELS), stored
    tokenizer = small_tokenizer(stored.training_captions())
    return replace(config, tokenizers=(tokenizer, tokenizer)), stored


def check_size(config):
    """UserError if the networks cannot halve pictures of this size as often as they do."""
    unet = config.patch * 2 ** (len(config.unet_mults) - 1)
    unit = max(unet, math.prod(config.image_pooling), math.prod(config.mask_pooling))
    if config.image_size % unit:
        raise UserError(f"the data have {config.image_size} px; the model needs a multiple of "
                        f"{unit}")


def known_config(args, folder, toy):
    """The configuration of the trained or half-trained model in the folder."""
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    config = checkpoint["config"]
    for name, value in {"dataset": args.dataset, "toy": toy, **args.config}.items():
        if getattr(config, name) != value:
            raise UserError(f"{folder}: was trained with {name} {getattr(config, name)}")
    done = (checkpoint["stage"], checkpoint["step"])
    if not args.train and done < (2, config.aux_steps):
        print(f"{folder}: trained up to stage {done[0]}, step {done[1]} only", file=sys.stderr)
    return config


def execute(args):
    """What the flags ask for, in the order train, sample, evaluate: -> exit code."""
    # Configuration
    device = find_device(args.device)
    source = find_data(args)
    folder = find_run(args, toy=source is None)
    path = folder / "checkpoint.pt"
    stored = None
    if args.train and not args.resume:
        if path.exists():
            raise UserError(f"{path}: exists; give --resume, or another --run, or remove it")
        config, stored = new_config(args, source)
    else:
        config = known_config(args, folder, toy=source is None)
    names, own = read_given(args.given, config)
    if args.clip and "text" not in config.modalities:
        raise UserError("--clip: this model has no captions")
    # Data, if any is needed
    data = None
    if args.train or args.eval or (names and not own):
        if stored is None:
            stored = read_data(source, args.dataset, config.image_size)
        check_data(stored, config, folder, args.train)
        data = Data(stored, config, device)
    inception = load_inception(args.inception, device) if args.inception else None
    clip = load_clip(args.clip, device) if args.clip else None
    # Modes
    if args.train:
        data.describe()
        stopped_by = train_until_stopped(args, folder, config, data)
        if stopped_by:
            print(f"{path}: stopped and saved; --train --resume goes on")
            return 128 + stopped_by
        print(f"{path}: trained")
    model = load(path, device)
    options = {"sampler": args.sampler, "steps": args.sampler_steps}
    if args.sample:
        sample_mode(args, folder, model, data, names, own, options)
    if args.eval:
        eval_mode(args, folder, model, data, inception, clip, options)
    return 0


def check_data(stored, config, folder, training):
    """UserError for data that the model cannot use, or cannot go on with; a warning for others."""
    for name, value in stored.settings().items():
        if value == getattr(config, name):
            continue
        if training or name != "data_checksum":
            raise UserError(f"{folder}: was trained with other data ({name}: {value}, not "
                            f"{getattr(config, name)})")
        print(f"{folder}: was trained with other data, which may hold these test items",
              file=sys.stderr)


def train_until_stopped(args, folder, config, data):
    """Train; Ctrl-C and SIGTERM save and leave: -> the number of that signal, or 0."""
    stop = []
    text_init = None
    if "text" in config.modalities and config.preset == "paper" and not args.resume:
        text_init = args.text_init or TEXT_MODELS
    before = {}
    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            before[which] = signal.signal(which, lambda code, frame: stop.append(code))
        train(folder, config, data, stop, args.resume, text_init)
    finally:
        for which, handler in before.items():                    # given back, whatever happens
            signal.signal(which, handler)
    return stop[0] if stop else 0


def sample_mode(args, folder, model, data, names, own, options):
    """Write a picture of samples into the run folder."""
    stem = f"uncond-{args.prior}"
    if names:
        stem = "-".join(["given", *names])
    if own:
        stem += "-own"
    path = folder / "samples" / f"{stem}-seed{args.seed}.png"
    sample_pictures(model, data, path, names, args.num, args.seed, args.prior, own, **options)
    print(path)


def eval_mode(args, folder, model, data, inception, clip, options):
    """Measure everything, write eval.json into the run folder and print it."""
    config = model.config
    judge = get_judge(folder.parent / f"judge-{config.dataset}-{data.checksum:08x}.pt", data)
    num = args.eval_num or (2 ** 31 if inception else 400)
    num = min(len(data.split["test"]), num)
    with autocast(data.device):
        evaluation = Evaluation(model, data, judge, num, inception, clip, **options)
        figures = evaluation.run(args.eval_repeats, args.seed)
    settings = {"items": num, "seed": args.seed}
    if config.decoder == "diffusion":
        settings["sampling"] = config.sampling(**options)
    with new_file(folder / "eval.json") as file:                 # first, as printing can fail
        file.write(json.dumps({**settings, "figures": figures}).encode())
    print(f"{folder}: {settings}; mean and deviation of the draws:")
    for name, values in figures.items():
        spread = f"+- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        print(f"  {name:60s} {np.mean(values):10.3f} {spread}")


def main(argv=None):
    """The command line: -> exit code; 2 after one line on stderr for what the user can correct."""
    args = parse_args(argv)
    return data_prep.exit_code("diffmvae.py", lambda: execute(args), torch.OutOfMemoryError)


if __name__ == "__main__":
    sys.exit(main())
