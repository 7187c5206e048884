"""Diff-MVAE: a multimodal VAE with a diffusion decoder for images, in one file.

Paper   Multimodal ELBO with Diffusion Decoders, D. Wesego & P. Rooshenas, arXiv 2408.16883v2.
        All section and equation numbers below are that version's.

Objective, minimised, summed over dimensions, averaged over the batch [Eq. 5]:

    E_A E_{z ~ q(z|x_A)} [ sum_i -w_i log p(x_i|z)                          feed-forward decoders
                         + sum_j E_t 1/2 lambda(t) ||score_j - s_theta||^2 ]  diffusion decoders
    + beta E_A KL(q(z|x_A) || N(0, I))

    A is a uniformly drawn subset of the modalities, q(z|x_A) the product of its experts. The
    paper prints the score term with "+" inside a lower bound of log p(x); it belongs with "-".
    With lambda = g^2, beta = 1, w_i = 1 it bounds -log p(x) in nats, but for the two ends of time,
    which bound_8bit adds. "lambda = 1", the default, is 2 sigma^2 here: weight 1 on the noise error
    [Eq. 1]. The small preset's Muon, MLP, convolution of words, warm-up, beta, w_i of 20 are ours.

Use     python diffmvae.py --dataset celeba --train --sample cond --given mask
        Without prepared data (data_prep.py) it draws toys. --help lists all flags.

Notation    paper                 here                        shape
            x^(1), x^(2), x^(3)   x["image"|"mask"|"attr"]    (B, 3, H, W), (B, 1, H, W), (B, 18)
            x^(1), x^(2) of CUB   x["image"|"text"]           (B, 3, H, W), (B, 2, L) tokens
            mu_i, log var_i       mu, logvar                  (B, M, Z), of the product (B, Z)
            A, omega_A            subset, 1 / (2^M - 1)       (B, M) boolean
            z                     z                           (B, Z)
            alpha_bar_t           alpha(t)^2 = 1 - sigma(t)^2 (B,), t in [0, 1]
            x_t, epsilon          x_t, eps                    as x
            g(t)^2; lambda(t)     beta(t); weighting          (B,); its name
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
        [Eq. 5] neg_elbo                         [Sec. 4.1] [Sec. 4.2] Config, CUB, §5
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import textwrap
import time
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, compress
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

# x^(1), x^(2), ... of the paper's two setups; their order numbers the experts
MODALITIES = {"celeba": ("image", "mask", "attr"), "cub": ("image", "text")}
TOYS = {"celeba": data_prep.toy_faces, "cub": data_prep.toy_birds}
TOY_COUNTS = {"train": 10_000, "val": 500, "test": 1000}
JUDGE_STEPS, CHUNK = 800, 50                # --eval: of its judge at least; items at a time
HUB = "bert-base-cased", "gpt2"             # what Optimus itself started from


def within(kind, low, high=2 ** 31):
    """An argparse type: an int or a float from `low` to `high`."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def flag(default, help, **options):
    """A field of Config that is a flag of the command line too, with options of argparse."""
    return field(default=default, metadata={"help": help, **options})


@dataclass
class Config:
    """What defines a model and its training. The defaults are the paper's CelebAMask-HQ setup.
    "paper Sec." is stated there, "after" is from the code of others, the rest is ours."""
    dataset: str = "celeba"
    toy: bool = False               # drawn by data_prep.py
    preset: str = flag("paper", "sizes, and the defaults of all flags below (toys: small)",
                       choices=("paper", "small"))
    image_size: int = 128           # paper Sec. 4.2; the prepared data decide
    latent: int = 256               # paper Sec. 4.2: Z
    image_channels: tuple = (64, 128, 256, 512, 512)  # after Soft-IntroVAE at 128 px, paper [4]
    image_rates: tuple = (2, 2, 2, 2, 2)              # average pooling after each width
    mask_channels: tuple = (64, 128, 256)             # after SBM-VAE, paper [42]
    mask_rates: tuple = (2, 4, 4)
    attr_widths: tuple = (128, 256, 512, 512, 512)    # after SBM-VAE
    text_width: int = 768           # BERT-base and GPT-2, as in Optimus: paper Sec. 4.1
    text_layers: int = 12
    text_heads: int = 12
    text_length: int = 64           # tokens a caption, the special ones included
    text_mix: int = 0               # words that a convolution before BERT joins; 0: none
    unet_width: int = 64
    unet_mults: tuple = (1, 2, 2, 4, 4)
    unet_blocks: int = 2            # residual blocks a resolution, down and up each
    unet_attention: tuple = (16, 8)  # sides of the feature maps with self-attention
    patch: int = 1                  # space-to-depth before the UNet; small preset: 4 from 64 px on
    z_map: int = 32                 # channels of the 8x8 map of z joined to the UNet's input
    dropout: float = 0.1            # in the UNets, BERT and GPT-2
    aux_width: int = 64
    aux_mults: tuple = (1, 2, 4)
    aux_dims: int = 2               # z as a picture, 1x16x16: paper Sec. 4.2; 1: a row; 0: channels
    vocab: tuple = (28996, 50260)   # tokens: bert-base-cased, GPT-2 with three special ones
    special: tuple = (50257, 50258, 50259)  # the decoder's <PAD>, <BOS>, <EOS>; the encoder pads 0
    tokenizers: tuple = ()          # as JSON, set when a training starts
    data: int = 0                   # Data.fingerprint of what is trained with
    # Objective, Eq. 5
    decoder: str = flag("diffusion", "image decoder; feedforward turns Eq. 5 into Eq. 4",
                        choices=("diffusion", "feedforward"))
    objective: str = flag("mopoe", "Eq. 5, or MVTCAE's (with --decoder feedforward --beta 2.5)",
                          choices=("mopoe", "mvtcae"))
    weighting: str = flag("simple", "lambda(t): 1 on the noise (Diff-MVAE*) or g(t)^2 (Diff-MVAE)",
                          choices=("simple", "likelihood"))
    warmup: float = flag(0.0, "share of each stage with weight 1/alpha^2 on the noise error "
                         "first, which is not in the paper", type=within(float, 0, 1))
    beta: float = flag(1.0, "weight of the KL term; the paper's is unknown")
    attr_weight: float = flag(1.0, "weight of the attribute term")
    text_weight: float = flag(1.0, "weight of the caption term")
    prior_expert: bool = flag(False, "N(0, I) as one more expert of the full subset (MoPoE's)")
    # Training
    steps: int = flag(200_000, "length of stage 1 in steps")     # 529 passes over 24,183 faces
    aux_steps: int = flag(100_000, "length of stage 2, the auxiliary model, in steps")
    batch_size: int = flag(64, "samples a step of stage 1", type=within(int, 2))
    aux_batch_size: int = 256
    optimizer: str = flag("adam", "of stage 1; paper: adam", choices=("adam", "muon"))
    lr: float = flag(1e-4, "peak learning rate of Adam; rises at first, ends along a cosine")
    muon_lr: float = 0.02           # of Muon, likewise
    lr_warmup: int = 1000           # steps of a rising rate
    ema: float = 0.9999             # decay of the averaged weights; ramped up from 0.1
    seed: int = 0
    log_every: int = 100            # divides the next two
    probe_every: int = 5000         # steps between coherence figures with a picture
    save_every: int = 1000

    @property
    def modalities(self):
        return MODALITIES[self.dataset]

    def sampling(self, sampler=None, steps=None):
        """-> sampler, steps of an image: the paper's for this lambda [Sec. 4.1], but our 100."""
        sampler = sampler or {"simple": "ddim", "likelihood": "euler-maruyama"}[self.weighting]
        return sampler, steps or (100 if sampler == "euler-maruyama" else 50)

    def model_name(self):
        """Which of MODELS this is, with all else of its objective as in the preset; or None."""
        names = "decoder objective weighting warmup beta attr_weight text_weight prior_expert"
        return next((model for model, flags in MODELS.items() if all(
            getattr(self, name) == getattr(preset_config(self.dataset, self.preset, **flags), name)
            for name in names.split())), None)


CUB = dict(image_size=64, latent=768, aux_dims=1,                # paper Sec. 4.1
           image_channels=(64, 128, 256, 512), image_rates=(2, 2, 2, 2), unet_mults=(1, 2, 4, 4),
           steps=66_000)  # 500 passes over the 8,440 birds or so that data_prep.py keeps to train
SMALL = dict(image_size=32, latent=64, image_channels=(32, 64, 128), image_rates=(2, 2, 2),
             mask_channels=(16, 32, 32), mask_rates=(2, 2, 2), attr_widths=(128, 128),
             unet_mults=(1, 2, 2), unet_blocks=1, unet_attention=(8,), patch=2, z_map=16,
             dropout=0.0, aux_width=512, aux_mults=(1,), aux_dims=0, beta=0.1, warmup=0.4,
             attr_weight=20.0, text_weight=20.0, optimizer="muon", lr=2e-3, lr_warmup=50, ema=0.995,
             steps=1800, aux_steps=6000, log_every=20, probe_every=400, save_every=200)
SMALL_CUB = dict(text_width=128, text_layers=2, text_heads=4, text_length=32, text_mix=3,
                 vocab=(2000, 2000), special=(0, 1, 2), steps=2400)
PRESETS = {"celeba": {"paper": {}, "small": SMALL},
           "cub": {"paper": CUB, "small": {**SMALL, **SMALL_CUB}}}
MODELS = {"Diff-MVAE*": {}, "Diff-MVAE": dict(weighting="likelihood"),  # of the paper's tables
          "MoPoE*": dict(decoder="feedforward"),
          "MoPoE": dict(decoder="feedforward", prior_expert=True),
          "MVTCAE": dict(decoder="feedforward", objective="mvtcae", beta=2.5)}


def preset_config(dataset, preset, **changes):
    """The configuration of a preset but for the changes."""
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
    Precisions add, and weigh the means. Experts outside the subset may hold anything, even NaN."""
    absent = ~subset.unsqueeze(-1)                               # (B, M, 1)
    precision = torch.exp(-logvar.masked_fill(absent, math.inf))  # (B, M, Z), 0 where absent
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
    [Eq. 2]. With beta from 0.1 to 20 it is the limit of DDPM's 1000 steps, so one network serves
    every sampler below. The functions of t map times to a tensor of their shape."""
    beta_min, beta_max, t_min = 0.1, 20.0, 1e-3

    def beta(self, t):
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t):  # int_0^t beta(s) ds = -log alpha_bar
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
        """Times t, weights w, (n,) each, so that E[w ||eps - eps_hat||^2] is the loss with
        "simple":     1 on the noise error, t uniform [Eq. 1], the paper's lambda = 1.
        "likelihood": lambda = g^2, that is 1/2 beta/sigma^2 on the noise error [Eq. 2]. Since
                      beta/sigma^2 is minus the slope of log_snr, t is drawn uniformly in log_snr;
                      the weight keeps the normaliser, so the estimate stays unbiased.
        "v":          1/alpha^2, the error of v: ours, for the warm-up only."""
        # Each is uniform in [0, 1), together they are a regular grid: their mean varies less
        u = (torch.rand(1, device=device) + torch.arange(n, device=device) / n) % 1  # (n,)
        if weighting == "likelihood":
            high, low = self.log_snr(torch.tensor([self.t_min, 1.0], dtype=torch.float64)).tolist()
            t = self.time_of(high + (low - high) * u)
            return t, torch.full_like(t, 0.5 * (high - low))     # 1/2 int beta/sigma^2 dt
        t = self.t_min + (1 - self.t_min) * u
        return t, self.alpha(t) ** -2 if weighting == "v" else torch.ones_like(t)

    def loss(self, eps_net, x0, weighting, mean_eps=None):
        """Denoising score matching, one draw of (t, eps) a sample: (B, ...) -> (B,), dims summed.
        `eps_net(x_t, t)` is eps_theta of Eq. 1; `mean_eps(x_t, t)`, E[eps | x_t], if it is known.
        Scores in Eq. 2 are -eps / sigma and -eps_theta / sigma: ||eps - eps_theta||^2 / sigma^2."""
        t, weight = self.draw_time(len(x0), weighting, x0.device)  # (B,) each
        eps = torch.randn_like(x0)
        x_t = append_dims(self.alpha(t), x0) * x0 + append_dims(self.sigma(t), x0) * eps
        target = mean_eps(x_t, t) if mean_eps else eps           # as x0
        error = (target - eps_net(x_t, t)).square().flatten(1).sum(1)  # (B,) [Eq. 1]
        return weight * error                                    # (B,) [Eq. 1] or [Eq. 2]

    def eps_from_v(self, v, x_t, t):
        """The noise that a prediction of v = alpha eps - sigma x_0 stands for: as x_t."""
        return append_dims(self.sigma(t), x_t) * x_t + append_dims(self.alpha(t), x_t) * v


def row_noise(n, generator=None, device="cpu"):
    """-> noise(*shape): standard normal (n, *shape), of which row i depends on seed i alone, never
    on its batch. The n seeds come from `generator` in order (the global one if None)."""
    seeds = torch.randint(2 ** 62, (n,), generator=generator).tolist()
    rows = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return lambda *shape: torch.stack([torch.randn(shape, generator=g, device=device)
                                       for g in rows])  # (n, *shape)


def sample_ddim(sde, predict, x, steps, noise, eta=0.0):
    """Noise x (n, ...) -> samples; predict(x, t) -> x_0_hat, eps_hat, as x; noise: of row_noise.
    Times regular from 1 to 0. eta = 0: DDIM; eta = 1: DDPM's x_s ~ q(x_s | x_t, x_0_hat)."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:]):
        x0, eps = predict(x, t)
        fresh = (1 - (sde.alpha(t) / sde.alpha(s)) ** 2).sqrt()  # noise from s to t
        std = eta * sde.sigma(s) / sde.sigma(t) * fresh          # 0 at s = 0: no noise at the end
        x = sde.alpha(s) * x0 + (sde.sigma(s) ** 2 - std ** 2).sqrt() * eps
        if eta:
            x = x + std * noise(*x.shape[1:])
    return x


def sample_euler_maruyama(sde, predict, x, steps, noise):
    """The reverse SDE dx = -(1/2 beta x + beta score) dt + sqrt(beta) dw from 1 to t_min, at times
    that are squares: 100 equal steps would leave 3.7 of 255 grey levels of noise, these 1.1."""
    times = torch.linspace(1, sde.t_min ** 0.5, steps + 1, dtype=torch.float64) ** 2
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


SAMPLERS = {"ddim": sample_ddim, "ddpm": partial(sample_ddim, eta=1.0),
            "euler-maruyama": sample_euler_maruyama, "dpm++": sample_dpm_solver}


def sample_diffusion(sde, eps_net, shape, sampler, steps, noise, clamp):
    """Draw from a diffusion model: -> (n, *shape); `noise` of row_noise decides n. eps_net(x_t, t)
    -> eps; clamp: hold x_0_hat in [-1, 1], but not in Euler-Maruyama, which has the raw score."""
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
    """Encoders, decoders and the auxiliary model. Data x is a dict:
    "image" (B, 3, H, W) in [-1, 1], "mask" (B, 1, H, W) in {0, 1}, "attr" (B, 18) in {0, 1},
    "text" (B, 2, L) token numbers: row 0 as the encoder reads them, row 1 as the decoder writes.
    An encoder maps x_i to (B, 2 Z), mu and logvar; a decoder has nll(z, x_i, weighting), of which
    only the diffusion decoder uses the last, and sample(z, noise)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.encoders, self.decoders = networks(c)               # by modality
        self.aux = AuxiliaryModel(c)
        self.weights = {"image": 1.0, "mask": 1.0, "attr": c.attr_weight, "text": c.text_weight}

    def encode(self, x):
        """The experts q(z|x_i): -> mu, logvar (B, M, Z) each, float32; NaN for what x lacks."""
        nothing = torch.full((len(next(iter(x.values()))), 2 * self.config.latent), math.nan,
                             device=self.aux.mean.device)
        experts = [self.encoders[name](x[name]).float() if name in x else nothing
                   for name in self.config.modalities]
        return torch.stack(experts, 1).chunk(2, -1)              # (B, M, 2 Z) -> (B, M, Z) each

    def fuse(self, mu, logvar, subset):
        """q(z|x_A): the product of the experts in the subset [Sec. 3.2]. -> (B, Z) each."""
        if self.config.prior_expert:  # one more expert, N(0, I), that only the full subset has
            mu, logvar = (F.pad(a, (0, 0, 0, 1)) for a in (mu, logvar))  # (B, M + 1, Z)
            subset = torch.cat([subset, subset.all(1, keepdim=True)], 1)  # (B, M + 1)
        return product_of_experts(mu, logvar, subset)

    def reconstruct(self, z, x, weighting):
        """-log p(x_i|z) of every modality [Eq. 4], of the diffusion decoder the score matching term
        with that weighting [Eq. 5], or if "8 bits" its whole bound: -> dict of (B,)."""
        return {name: self.decoders[name].nll(z, x[name], weighting)
                for name in self.config.modalities}

    def neg_elbo(self, x, weighting):
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
        terms = self.reconstruct(z, x, weighting)                # (B,) each
        reconstruction = sum(self.weights[name] * nll for name, nll in terms.items())
        every = self.fuse(mu.repeat(s, 1, 1), logvar.repeat(s, 1, 1),
                          subsets.repeat_interleave(b, 0))       # (S B, Z) q(z|x_A) for all A
        terms["kl"] = kl_to_standard_normal(*every).view(s, b).mean(0)  # (B,) sum_A omega_A KL_A
        terms["total"] = reconstruction + self.config.beta * terms["kl"]  # (B,) [Eq. 5]
        return terms

    def neg_mvtcae(self, x, weighting):
        """The objective of MVTCAE, a baseline (paper [11]), minimised: as neg_elbo.
        (M - a)/M sum_i -log p(x_i|z) + beta (a/M sum_i KL(q || q_i) + (1 - a) KL(q || N(0, I))),
        where q is the product of all M experts q_i, from which z is drawn, and a = 0.9 as in
        SBM-VAE's code, paper [42]; MVTCAE's own, [11], has 5/6."""
        mu, logvar = self.encode(x)                              # (B, M, Z)
        alpha, m = 0.9, mu.shape[1]
        joint = product_of_experts(mu, logvar, torch.ones_like(mu[..., 0], dtype=torch.bool))
        terms = self.reconstruct(gaussian_sample(*joint), x, weighting)  # (B,) each
        reconstruction = sum(self.weights[name] * nll for name, nll in terms.items())
        normal = lambda mu, logvar: Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
        q, experts = normal(*(v.unsqueeze(1) for v in joint)), normal(mu, logvar)  # (B, 1|M, Z)
        terms["kl"] = (alpha / m * kl_divergence(q, experts).sum((1, 2))
                       + (1 - alpha) * kl_to_standard_normal(*joint))  # (B,)
        terms["total"] = (m - alpha) / m * reconstruction + self.config.beta * terms["kl"]
        return terms

    def posterior(self, x):
        """q(z|x_o), the product of the experts of what x has [Sec. 3.3]: -> (B, Z) each."""
        names = self.config.modalities
        if not x or not x.keys() <= set(names):
            raise ValueError(f"modalities {sorted(x)}: expected some of {', '.join(names)}")
        mu, logvar = self.encode(x)                              # (B, M, Z)
        observed = torch.tensor([name in x for name in names], device=mu.device)  # (M,)
        return self.fuse(mu, logvar, observed.expand(len(mu), -1))

    def decode(self, z, noise, names=None, sampler=None, steps=None):
        """z (n, Z), noise of row_noise -> dict of names, or of all; sampler, steps: of images."""
        return {name: self.decoders[name].sample(z, noise, sampler=sampler, steps=steps)
                for name in names or self.config.modalities}

    @torch.no_grad()
    def sample_conditional(self, given, n=1, generator=None, **options):
        """[Sec. 3.3] z ~ q(z|x_o), then each decoder: dict of B items -> dict of all modalities,
        (B * n, ...), n of an item after another; text as tokens (B * n, L). options: of decode."""
        mu, logvar = (a.repeat_interleave(n, 0) for a in self.posterior(given))  # (B * n, Z)
        noise = row_noise(len(mu), generator, mu.device)
        z = mu + torch.exp(0.5 * logvar) * noise(mu.shape[1])
        return self.decode(z, noise, **options)

    @torch.no_grad()
    def sample_unconditional(self, n, prior="aux", generator=None, **options):
        """[Sec. 3.4] z from the auxiliary model, or N(0, I) if prior="gaussian"; then decode."""
        noise = row_noise(n, generator, self.aux.mean.device)
        z = {"aux": self.aux.sample, "gaussian": lambda _: noise(self.config.latent)}[prior](noise)
        return self.decode(z, noise, **options)


class DiffusionDecoder(nn.Module):
    """M_D of Eq. 5: p(x|z) by a diffusion model conditioned on z [Sec. 3.1]."""

    def __init__(self, c):
        super().__init__()
        self.config, self.sde, self.shape = c, VPSDE(), (3, c.image_size, c.image_size)
        self.unet = UNet(3, c.image_size, c.unet_width, c.unet_mults, c.unet_blocks,
                         c.unet_attention, c.dropout, c.patch, c.latent, c.z_map)

    def eps(self, x_t, t, z):
        """eps_theta(x_t, z, t) [Sec. 3.1], as x_t, from v, which the network predicts (ours)."""
        return self.sde.eps_from_v(self.unet(x_t, t, z).float(), x_t, t)

    def nll(self, z, x, weighting):
        """By weighting: "likelihood" [Eq. 2] on [t_min, 1], "simple" [Eq. 1], "v", or "8 bits".
        (B, Z), (B, 3, H, W) -> (B,)."""
        if weighting == "8 bits":
            return self.bound_8bit(z, x)
        return self.sde.loss(lambda x_t, t: self.eps(x_t, t, z), x, weighting)

    def bound_8bit(self, z, x):
        """Upper bound on -log P(8-bit image | z): (B,) nats. [Eq. 2], mean of four draws, plus the
        two ends that it leaves out: KL(q(x_1|x_0) || N(0, I)), and the step from t_min to the 256
        values, N(x_0_hat, (sigma/alpha)^2) in bins."""
        ends = torch.tensor([self.sde.t_min, 1.0], device=x.device)
        (alpha, last_alpha), (sigma, last_sigma) = self.sde.alpha(ends), self.sde.sigma(ends)
        mu = last_alpha * x.flatten(1)                           # (B, D)
        prior = kl_to_standard_normal(mu, (2 * last_sigma.log()).expand_as(mu))
        score = sum(self.nll(z, x, "likelihood") for _ in range(4)) / 4  # [Eq. 2]
        eps = torch.randn_like(x)
        error = eps - self.eps(alpha * x + sigma * eps, ends[0].to(x).expand(len(x)), z)
        return prior + score + nll_8bit(x, x + sigma / alpha * error, sigma / alpha)  # x_0_hat

    def sample(self, z, noise, sampler=None, steps=None, **_):
        """-> images (n, 3, H, W) in [-1, 1]; by default as Config.sampling has it."""
        sampler, steps = self.config.sampling(sampler, steps)
        return sample_diffusion(self.sde, lambda x_t, t: self.eps(x_t, t, z), self.shape, sampler,
                                steps, noise, clamp=True)


class GaussianDecoder(nn.Sequential):
    """M_F of Eq. 5: N(x; self(z), 1/2), whose NLL is the squared error plus a constant."""

    def nll(self, z, x, weighting=None):  # (B, Z), (B, 3, H, W) -> (B,) nats
        return ((x - self(z).float()).square() + 0.5 * math.log(math.pi)).flatten(1).sum(1)

    def sample(self, z, noise=None, **_):  # the mean (n, 3, H, W), which needs no noise
        return self(z).float().clamp(-1, 1)


class BernoulliDecoder(nn.Sequential):
    """M_F of Eq. 5: independent Bernoulli variables with logits self(z)."""

    def nll(self, z, x, weighting=None):  # (B, Z), (B, ...) -> (B,) nats
        error = F.binary_cross_entropy_with_logits(self(z).float(), x, reduction="none")
        return error.flatten(1).sum(1)                           # (B,)

    def sample(self, z, noise=None, **_):  # the more probable values, as the paper's F1 needs
        return (self(z) > 0).float()


def nll_8bit(x, mean, std):
    """-log P of 8-bit x under N(mean, std^2) in 256 bins, the outer ones open: -> (B,) nats."""
    x, mean, std = x.double(), mean.double(), std.double()
    low = ((x - 1 / 255 - mean) / std).masked_fill(x < -1 + 1 / 255, -math.inf)
    high = ((x + 1 / 255 - mean) / std).masked_fill(x > 1 - 1 / 255, math.inf)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)  # the same mass
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log1p(-torch.exp(log_low - log_high))).flatten(1).sum(1)


class AuxiliaryModel(nn.Module):
    """Score model of the full posterior's samples [Sec. 3.4]; it sees z standardised (ours)."""

    def __init__(self, c):
        super().__init__()
        side = round(c.latent ** (1 / c.aux_dims)) if c.aux_dims else 1
        self.sde, self.shape = VPSDE(), (c.latent // side ** c.aux_dims, *[side] * c.aux_dims)
        self.unet = UNet(self.shape[0], side, c.aux_width, c.aux_mults, c.unet_blocks, (side // 2,),
                         c.dropout, dims=c.aux_dims)
        self.register_buffer("mean", torch.zeros(c.latent))
        self.register_buffer("std", torch.ones(c.latent))

    def eps(self, z_t, t):
        return self.sde.eps_from_v(self.unet(z_t, t).float(), z_t, t)

    def nll(self, mu, logvar, weighting):
        """[Sec. 3.4] [Eq. 1] ("simple"), or "v", on z ~ N(mu, e^logvar), (B, Z) each: -> (B,). The
        target is E[eps | z_t, mu, logvar] (ours): gradients keep their mean, with less variance."""
        mu, std = (a.view(-1, *self.shape) for a in (            # (B, 1, side[, side]), (B, Z)
            (mu - self.mean) / self.std, torch.exp(0.5 * logvar) / self.std))
        def mean_eps(z_t, t):
            alpha, sigma = (append_dims(a(t), mu) for a in (self.sde.alpha, self.sde.sigma))
            return sigma * (z_t - alpha * mu) / (alpha ** 2 * std ** 2 + sigma ** 2)
        return self.sde.loss(self.eps, mu + std * torch.randn_like(mu), weighting, mean_eps)

    def sample(self, noise):
        """-> z (n, Z), always by 50 DDIM steps [Sec. 4.1]; how images are drawn is apart."""
        z = sample_diffusion(self.sde, self.eps, self.shape, "ddim", 50, noise, clamp=False)
        return z.flatten(1) * self.std + self.mean               # (n, Z)


# === §5 Networks [Sec. 4.1] [Sec. 4.2] ===

def networks(c):
    """-> encoders, decoders: a ModuleDict each, by modality."""
    build = {
        "image": lambda: (conv_encoder(3, c.image_channels, c.image_rates, c),
                          DiffusionDecoder(c) if c.decoder == "diffusion" else
                          GaussianDecoder(conv_decoder(3, c.image_channels, c.image_rates, c))),
        "mask": lambda: (conv_encoder(1, c.mask_channels, c.mask_rates, c),
                         BernoulliDecoder(conv_decoder(1, c.mask_channels, c.mask_rates, c))),
        "attr": lambda: (mlp((len(ATTRIBUTES), *c.attr_widths), 2 * c.latent),
                         BernoulliDecoder(mlp((c.latent, *c.attr_widths[::-1]), len(ATTRIBUTES)))),
        "text": lambda: (TextEncoder(c), TextDecoder(c))}
    pairs = [build[name]() for name in c.modalities]
    return [nn.ModuleDict(dict(zip(c.modalities, nets))) for nets in zip(*pairs)]


class ResidualBlock(nn.Module):
    """conv-BN-LeakyReLU-conv-BN plus skip, LeakyReLU, as in Soft-IntroVAE (paper [4])."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x):
        return F.leaky_relu(self.body(x) + self.skip(x), 0.2)


def conv_encoder(c_in, channels, rates, c):
    """Images or masks (B, C, H, W) -> (B, 2 Z): widths `channels`, pooled by `rates`."""
    layers = [nn.Conv2d(c_in, channels[0], 5, padding=2, bias=False),
              nn.BatchNorm2d(channels[0]), nn.LeakyReLU(0.2), nn.AvgPool2d(rates[0])]
    for a, b, rate in zip(channels, channels[1:], rates[1:]):
        layers += [ResidualBlock(a, b), nn.AvgPool2d(rate)]
    size = channels[-1] * (c.image_size // math.prod(rates)) ** 2
    return nn.Sequential(*layers, ResidualBlock(channels[-1], channels[-1]), nn.Flatten(),
                         nn.Linear(size, 2 * c.latent))


def conv_decoder(c_out, channels, rates, c):
    """z (B, Z) -> (B, C, H, W): the encoder of the same widths and rates, mirrored."""
    shape = channels[-1], *[c.image_size // math.prod(rates)] * 2
    layers = [nn.Linear(c.latent, math.prod(shape)), nn.ReLU(), nn.Unflatten(1, shape)]
    for a, b, rate in zip((channels[-1], *channels[::-1]), channels[::-1], rates[::-1]):
        layers += [ResidualBlock(a, b), nn.Upsample(scale_factor=rate)]
    return nn.Sequential(*layers, ResidualBlock(channels[0], channels[0]),
                         nn.Conv2d(channels[0], c_out, 5, padding=2))


def mlp(widths, n_out):
    """(B, widths[0]) -> (B, n_out): Linear-BatchNorm-ReLU from width to width, then Linear."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_out))


class TextEncoder(nn.Module):
    """Captions (B, 2, L) -> (B, 2 Z): BERT, its pooled first token, a linear layer, as in Optimus
    (paper Sec. 4.1). Narrow BERTs start with larger weights: 0.02 is for a width of 768. Ours, in
    the small preset: words see their neighbours first; BERT alone learns whose a colour is late."""

    def __init__(self, c):
        super().__init__()
        from transformers import BertConfig, BertModel  # here, as importing them takes seconds
        self.bert = BertModel(BertConfig(
            vocab_size=c.vocab[0], hidden_size=c.text_width, num_hidden_layers=c.text_layers,
            num_attention_heads=c.text_heads, intermediate_size=4 * c.text_width,
            hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=c.dropout,
            initializer_range=0.02 * math.sqrt(768 / c.text_width)))
        self.mix = nn.Conv1d(c.text_width, c.text_width, c.text_mix, padding="same", bias=False) \
            if c.text_mix else None
        self.head = nn.Linear(c.text_width, 2 * c.latent, bias=False)

    def forward(self, text):
        ids = text[:, 0]                                         # (B, L)
        words = self.bert.embeddings.word_embeddings(ids)        # (B, L, width), 0 for padding
        words = words + self.mix(words.mT).mT if self.mix else words  # (B, L, width)
        return self.head(self.bert(None, (ids != 0).long(), inputs_embeds=words).pooler_output)


class TextDecoder(nn.Module):
    """M_F of Eq. 5 for captions: GPT-2 that gets z twice, by linear maps, as in Optimus: as key and
    value of one position in front, in every layer; added to every token's embedding."""

    def __init__(self, c):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        self.length, (self.pad, self.bos, self.eos) = c.text_length, c.special
        self.gpt = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab[1], n_embd=c.text_width, n_layer=c.text_layers, n_head=c.text_heads,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
            initializer_range=0.02 * math.sqrt(768 / c.text_width),
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
        """Tokens (B, T) -> logits of those after them (B, T, V); positions go on from the cache."""
        embeds = self.gpt.transformer.wte(ids) + self.embed(z).unsqueeze(1)  # (B, T, width)
        return self.gpt(None, cache, inputs_embeds=embeds).logits.float()

    def nll(self, z, text, weighting=None):
        """-log p(caption|z), summed over its tokens and <EOS>: (B,) nats; padding is left out."""
        ids = text[:, 1]                                         # (B, L)
        logits = self.logits(z, ids[:, :-1], self.remember(z))   # (B, L - 1, V)
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=self.pad,
                               reduction="none").sum(1)          # (B,)

    def sample(self, z, noise=None, **_):
        """The most probable token each time: -> (B, L), <BOS> first, <PAD> after <EOS>."""
        cache, ids = self.remember(z), [torch.full((len(z),), self.bos, device=z.device)]
        while len(ids) < self.length:
            ids.append(self.logits(z, ids[-1].unsqueeze(1), cache)[:, -1].argmax(1))  # (B,)
        ids = torch.stack(ids, 1)                                # (B, L)
        ended = (ids == self.eos).cumsum(1) - (ids == self.eos).long()  # <EOS> before this one
        return ids.masked_fill(ended > 0, self.pad)


# By the dimensions of a UNet: convolutions and norms. With none it is an MLP over the channels
# alone. Norms have 8 groups; more, smaller ones are slower on CPUs.
LAYERS = [(lambda c_in, c_out, *_, **__: nn.Linear(c_in, c_out), nn.LayerNorm),
          (nn.Conv1d, partial(nn.GroupNorm, 8)), (nn.Conv2d, partial(nn.GroupNorm, 8))]


class UNetBlock(nn.Module):
    """Residual block, scaled and shifted by time, then by z; self-attention with heads of 32."""

    def __init__(self, c_in, c_out, attend, emb, z_dim, dropout, dims):
        super().__init__()
        (conv, norm), attend = LAYERS[dims], attend and dims
        self.norm1, self.conv1 = norm(c_in), conv(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb, 2 * c_out)
        self.z = nn.Linear(z_dim, 2 * c_out) if z_dim else None
        self.norm2, self.dropout = norm(c_out), nn.Dropout(dropout)
        self.conv2 = conv(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)
        self.norm3 = norm(c_out) if attend else None
        self.qkv, self.proj = (conv(c_out, n, 1) if attend else None for n in (3 * c_out, c_out))

    def forward(self, h, emb, z):
        y = self.norm2(self.conv1(F.silu(self.norm1(h))))
        for layer, condition in ((self.time, emb), (self.z, z)):
            if layer is not None:
                scale, shift = append_dims(layer(condition), h).chunk(2, 1)  # (B, C, 1..)
                y = y * (1 + scale) + shift
        h = self.skip(h) + self.conv2(self.dropout(F.silu(y)))
        if self.qkv:  # PyTorch's fused attention is slower on CPUs in bfloat16; q: (B, n, 32, H W)
            heads = 3, -1, math.gcd(32, h.shape[1])
            q, k, v = self.qkv(self.norm3(h)).flatten(2).unflatten(1, heads).unbind(1)
            weight = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(3)  # (B, n, H W, H W)
            h = h + self.proj((v @ weight.transpose(2, 3)).reshape(h.shape))  # (B, C, H, W)
        return h


class UNetLevel(nn.Module):
    """Blocks at one resolution, then the next level at half of it, then blocks that see the outputs
    of the first ones again. In the last level two blocks stand for the next."""

    def __init__(self, c_in, size, widths, blocks, attention, conv, block):
        super().__init__()
        c, attend, self.next = widths[0], size in attention, None
        self.down = nn.ModuleList([block(c if k else c_in, c, attend) for k in range(blocks)])
        self.up = nn.ModuleList([block(2 * c, c, attend) for _ in range(blocks)])
        if len(widths) > 1:
            self.shrink = conv(c, c, 3, stride=2, padding=1)
            self.next = UNetLevel(c, size // 2, widths[1:], blocks, attention, conv, block)
            self.grow = nn.Sequential(conv(widths[1], c, 3, padding=1), nn.Upsample(scale_factor=2))
        else:
            self.middle = nn.ModuleList([block(c, c, True), block(c, c, False)])

    def forward(self, h, emb, z):
        skips = []
        for block in self.down:
            h = block(h, emb, z)
            skips.append(h)
        if self.next:
            h = self.grow(self.next(self.shrink(h), emb, z))     # half the size, and back
        else:
            for block in self.middle:
                h = block(h, emb, z)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], 1), emb, z)
        return h


class UNet(nn.Module):
    """The network of every diffusion model here: x (B, C, H, W), with dims=1 (B, C, length), with 0
    (B, C); t (B,), z (B, Z) -> as x. z, if any, enters every block and, as a map, the input."""

    def __init__(self, channels, size, width, mults, blocks, attention, dropout, patch=1,
                 z_dim=0, z_map=0, dims=2):
        super().__init__()
        self.patch, side, emb = patch, size // patch, 256
        conv, norm = LAYERS[dims]
        freqs = torch.exp(-math.log(10000) / (width // 2) * torch.arange(width // 2))
        self.register_buffer("freqs", freqs, persistent=False)   # of the sinusoids of 1000 t
        self.time = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.z_map = None if not z_map else nn.Sequential(
            nn.Linear(z_dim, z_map * 64), nn.Unflatten(1, (z_map, 8, 8)),
            nn.Upsample((side, side), mode="bilinear"), nn.Conv2d(z_map, z_map, 3, padding=1))
        self.conv_in = conv(channels * patch ** 2 + z_map, width, 3, padding=1)
        if dims == 1:  # a row of latents, unlike a picture, has a meaning of its own at each place
            self.place = nn.Parameter(torch.zeros(width, size))
        block = partial(UNetBlock, emb=emb, z_dim=z_dim, dropout=dropout, dims=dims)
        widths = [width * mult for mult in mults]
        self.levels = UNetLevel(width, side, widths, blocks, attention, conv, block)
        self.norm_out = norm(widths[0])
        self.conv_out = conv(widths[0], channels * patch ** 2, 3, padding=1)
        for name, p in self.named_parameters():  # each branch starts as a no-op, the output at 0
            if {"conv2", "proj", "conv_out"} & set(name.split(".")):
                nn.init.zeros_(p)

    def forward(self, x, t, z=None):
        angles = 1000 * t.unsqueeze(1) * self.freqs              # (B, width / 2)
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1))  # (B, 256)
        h = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x  # (B, C p^2, H / p, W / p)
        if self.z_map:
            h = torch.cat([h, self.z_map(z)], 1)                 # (B, C p^2 + c, H / p, W / p)
        h = self.conv_in(h)
        if h.dim() == 3:
            h = h + self.place                                   # (B, width, length)
        h = self.conv_out(F.silu(self.norm_out(self.levels(h, emb, z))))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h  # as x


# === §6 Data, tokens, pretrained text ===

def to_tensors(arrays, device):
    """Rows as they are stored -> the tensors of DiffMVAE, on the device."""
    convert = {"image": lambda a: a.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1,
               "mask": lambda a: a.unsqueeze(1).float(), "attr": lambda a: a.float(),
               "text": lambda a: a.long()}
    return {name: convert[name](torch.as_tensor(a).to(device, non_blocking=True))
            for name, a in arrays.items()}


def eight_bits(image):
    """[-1, 1] -> {0, ..., 255} as uint8, as a picture file would hold it."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Data:
    """One data set: uint8 arrays by name, for birds also N lists of 10 captions, and its splits."""

    def __init__(self, arrays, split, toy, device):
        self.split = {name: np.asarray(rows) for name, rows in split.items()}
        self.arrays = {name: a for name, a in arrays.items() if name != "text"}
        self.size, self.toy, self.device = arrays["image"].shape[1], toy, device
        self.captions, self.vocabulary = arrays.get("text"), ()
        self.fingerprint = zlib.crc32(json.dumps(self.captions).encode())
        for a in (*self.split.values(), *self.arrays.values()):
            self.fingerprint = zlib.crc32(a, self.fingerprint)   # another for other data or splits
        if self.captions:  # the facts of toys, the 50 words of most real captions
            count = Counter(word for row in self.split["train"] for text in self.captions[row]
                            for word in data_prep.content_words(text))
            self.vocabulary = data_prep.BIRD_FACTS if toy else tuple(
                sorted(count, key=lambda word: (-count[word], word))[:50])

    def stated(self, captions):
        """Which of the vocabulary each caption states: n texts -> (n, W) in {0, 1}."""
        find = data_prep.facts_of if self.toy else data_prep.content_words
        return torch.tensor([[float(word in words) for word in self.vocabulary]
                             for words in map(find, captions)], device=self.device)

    def bits(self, name, value, config):
        """{0, 1} features to score: what captions (n, 2, L) or (n, L) state; the rest as it is."""
        return value if name != "text" else self.stated(
            captions_of(value[:, 1] if value.dim() == 3 else value, config))

    def labels(self, rows):
        """What is to be read off pictures: mask, attributes, or all that their captions state."""
        if self.captions:
            return {"text": torch.stack([self.stated(self.captions[row]).amax(0) for row in rows])}
        return {name: a for name, a in self.tensors(rows).items() if name != "image"}

    def tokenize(self, config):
        """Turn the captions, if there are any, into the array "text" (N, 10, 2, L)."""
        if self.captions:
            ids, cut = tokenize([text for ten in self.captions for text in ten], config)
            self.arrays["text"] = ids.reshape(-1, 10, *ids.shape[1:])
            if cut:
                print(f"{cut} captions are longer than {config.text_length} tokens and are cut")

    def tensors(self, rows, caption=0):
        """Rows by number -> dict of tensors; caption: which of the ten, one number or (B,)."""
        return to_tensors({name: a[rows, caption] if name == "text" else a[rows]
                           for name, a in self.arrays.items()}, self.device)

    def batches(self, size):
        """Whole batches in one pass over the training split; a split smaller than one is one."""
        return max(1, len(self.split["train"]) // size)

    def batch_rows(self, size, seed, step):
        """Rows of training batch `step`, and which caption of each; epochs are permutations."""
        epoch, k = divmod(step, self.batches(size))
        rng, part = np.random.default_rng((seed, epoch)), slice(k * size, (k + 1) * size)
        rows = rng.permutation(self.split["train"])
        return rows[part], rng.integers(10, size=len(rows))[part]


def small_tokenizer(captions, size=2000):
    """Byte-level BPE made from the captions: -> its JSON; <PAD>, <BOS>, <EOS> are 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(map(data_prep.tidy, captions), trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<PAD>", "<BOS>", "<EOS>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return with_ends(tokenizer, 1, 2)


def with_ends(tokenizer, bos, eos):
    """Make it put <BOS> and <EOS>, of these numbers, around a caption: -> its JSON."""
    from tokenizers.processors import TemplateProcessing
    tokenizer.post_processor = TemplateProcessing(
        single="<BOS> $A <EOS>", special_tokens=[("<BOS>", bos), ("<EOS>", eos)])
    return tokenizer.to_str()


def tokenize(captions, config):
    """n texts -> token numbers (n, 2, L), for encoder and decoder, and how many were cut."""
    from tokenizers import Tokenizer
    columns, cut, captions = [], 0, [data_prep.tidy(text) for text in captions]
    for text, pad in zip(config.tokenizers, (0, config.special[0])):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.enable_truncation(config.text_length)
        tokenizer.enable_padding(length=config.text_length, pad_id=pad)
        rows = tokenizer.encode_batch(captions)
        columns.append(np.array([row.ids for row in rows], np.int32))
        cut = max(cut, sum(bool(row.overflowing) for row in rows))
    return np.stack(columns, 1), cut


def captions_of(ids, config):
    """The decoder's token numbers (n, L) -> n texts."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_str(config.tokenizers[1])
    return [text.strip() for text in tokenizer.decode_batch(ids.tolist())]


def pretrained_tokenizers(config, sources):
    """The configuration with the tokenizers of BERT and GPT-2, from folders named as in HUB beside
    those of `sources`, else from the hub. UserError if they are not of the preset's sizes."""
    from transformers import AutoTokenizer
    places = [beside if (beside := Path(source).parent / name).exists() else name
              for source, name in zip(sources, HUB)]
    with user_error(f"tokenizers {places[0]}, {places[1]}: cannot be had or do not fit"):
        reader = AutoTokenizer.from_pretrained(places[0], do_lower_case=False)
        writer = AutoTokenizer.from_pretrained(places[1], add_prefix_space=True)
        writer.add_special_tokens(dict(pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>"))
        special = tuple(writer.convert_tokens_to_ids(["<PAD>", "<BOS>", "<EOS>"]))
        if (len(reader), len(writer), special) != (*config.vocab, config.special):
            raise ValueError(f"{len(reader)} and {len(writer)} tokens, not {config.vocab}")
    return replace(config, tokenizers=(reader.backend_tokenizer.to_str(), with_ends(
        writer.backend_tokenizer, *special[1:])))


def load_text_weights(model, sources):
    """Start the text parts from two folders of Optimus, or from HUB but for its own layers."""
    from transformers import BertModel, GPT2LMHeadModel
    own = {"linear.weight": "head.weight", "transformer.linear.weight": "memory.weight",
           "transformer.linear_emb.weight": "embed.weight"}
    for kind, net, prefix, source, vocab in zip(
            (BertModel, GPT2LMHeadModel), (model.encoders["text"], model.decoders["text"]),
            ("bert.", "gpt."), sources, model.config.vocab):
        with user_error(f"text weights of {source}: cannot be read or do not fit"):
            if source in HUB:
                pretrained = kind.from_pretrained(source)
                pretrained.resize_token_embeddings(vocab, mean_resizing=False)  # special tokens
                state = pretrained.state_dict()
            else:
                state = torch.load(Path(source) / "pytorch_model.bin", "cpu", weights_only=True)
            missing, unused = net.load_state_dict(
                {own.get(name, prefix + name): value for name, value in state.items()}, False)
            missing = [name for name in missing if name != "gpt.lm_head.weight" and not (
                source in HUB and name in own.values())]         # lm_head is tied; own start afresh
            if missing:
                raise ValueError(f"missing {', '.join(missing)}")
        print(f"text weights of {source}: {len(state) - len(unused)} tensors, not used: {unused}")


# === §7 Training ===

def autocast(device):
    """bfloat16 where the hardware multiplies it faster than float32; losses are float32 anyway."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024): a weight as a matrix (out, rest) moves along its averaged gradient
    with all singular values made about 1, by five Newton-Schulz iterations. PyTorch's own takes
    only matrices, in bfloat16, which many CPUs lack. On the Gram matrix they take half as long."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.02))

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x = p.grad.lerp(mean, 0.95).flatten(1)               # (out, rest), Nesterov's momentum
            out, rest = x.shape
            x = (x.T if out > rest else x) / (x.norm() + 1e-12)  # fewer rows than columns
            gram, one = x @ x.T, torch.eye(len(x), device=x.device)
            total = one
            for _ in range(5):  # x <- turn x, five times, in terms of the smaller x x^T
                turn = 3.4445 * one - 4.775 * gram + 2.0315 * gram @ gram
                gram, total = turn @ gram @ turn, turn @ total
            x = (total @ x).T if out > rest else total @ x
            p.sub_(x.reshape(p.shape), alpha=self.param_groups[0]["lr"] * max(1, out / rest) ** 0.5)


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


def read_checkpoint(path, device="cpu"):
    """What train() saved: tensors and plain types, the configuration as a Config; "done"."""
    if not Path(path).exists():
        raise UserError(f"{path}: no checkpoint yet; train first with --train")
    with user_error(f"{path}: not a checkpoint of this version of the script, or damaged"):
        checkpoint = torch.load(path, device, weights_only=True)
        return {**checkpoint, "config": Config(**checkpoint["config"]),
                "done": (checkpoint["stage"], checkpoint["step"])}


def load(path, device="cpu"):
    """The trained model for notebooks: -> DiffMVAE with the EMA weights, in eval mode."""
    checkpoint = read_checkpoint(path, device)
    with user_error(f"{path}: its weights and its configuration do not fit together"):
        model = DiffMVAE(checkpoint["config"])
        model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval()


@torch.no_grad()
def coherence(model, data, rows):
    """Figures that show what losses do not: -> dict. "image gap": by how much the decoder's loss is
    above "image nll" with the z of another row. "mask->image": F1 of the image made from a mask,
    read by the model's own encoder, against it; "image->mask": of what it reads off real images."""
    x, config, losses, figures = data.tensors(rows), model.config, [], {}
    quick = dict(names=["image"], sampler="dpm++", steps=10)
    with autocast(data.device):
        z = gaussian_sample(*model.posterior(x))                 # (B, Z)
        for code in (z, z.roll(1, 0)):
            torch.manual_seed(0)  # the same noise and times for both
            losses.append(model.reconstruct(code, x, config.weighting))
        for name in [name for name in ("image", "text") if name in x]:
            right, wrong = (terms[name].mean().item() for terms in losses)
            figures |= {f"{name} nll": right, f"{name} gap": wrong - right}
        for name in config.modalities[1:]:
            made = model.sample_conditional({name: x[name]}, **quick)["image"]
            for key, image in ((f"{name}->image", made), (f"image->{name}", x["image"])):
                read = model.decoders[name].sample(model.posterior({"image": image})[0])
                figures[key] = mean_f1(*(data.bits(name, a, config) for a in (read, x[name])))
    return {name: round(value, 3) for name, value in figures.items()}


def train(folder, config, data, stop, resume=False, text_init=None):
    """Stage 1: Eq. 5 end to end [Sec. 3.2]; stage 2: the auxiliary model [Sec. 3.4]. Writes
    checkpoint.pt, log.jsonl and pictures; saves and leaves when the list `stop` gets an item.
    Random numbers depend on (seed, stage, step) alone: resuming needs no generator's state."""
    device, first_stage, begin, states, log = data.device, 1, 0, (), []
    torch.manual_seed(config.seed)
    model = DiffMVAE(config).to(device)
    if device.type == "cuda":  # on CPUs group norm is faster in the plain layout
        model = model.to(memory_format=torch.channels_last)
    if text_init:
        load_text_weights(model, text_init)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if resume:
        checkpoint = read_checkpoint(folder / "checkpoint.pt")
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        (first_stage, begin), states, log = map(checkpoint.get, ("done", "optimizers", "log"))
    folder.mkdir(parents=True, exist_ok=True)                    # now, not at the first checkpoint
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    for stage in range(first_stage, 3):
        total, goal = {1: (config.steps, config.weighting), 2: (config.aux_steps, "simple")}[stage]
        nets, averages = (nn.ModuleList([m.encoders, m.decoders] if stage == 1 else [m.aux])
                          for m in (model, ema))
        params, pending, start = list(nets.parameters()), [], time.time()
        hidden = [p for p in params
                  if stage == 1 and config.optimizer == "muon" and min(len(p), p[0].numel()) >= 16]
        others = [p for p in params if all(p is not q for q in hidden)]
        optimizers = [torch.optim.Adam(others, fused=True)] + ([Muon(hidden)] if hidden else [])
        for optimizer, state in zip(optimizers, states):
            optimizer.load_state_dict(state)
        if stage == 2:
            with torch.no_grad(), autocast(device):
                parts = [ema.posterior(data.tensors(rows, caption))  # q(z|x) given all modalities
                         for caption in range(10 if data.captions else 1)
                         for rows in np.array_split(data.split["train"], data.batches(256))]
            mu, logvar = (torch.cat(part) for part in zip(*parts))  # (N, Z) each
            for aux in (model.aux, ema.aux):  # moments of the samples, in closed form
                aux.mean.copy_(mu.mean(0))
                aux.std.copy_((mu.var(0) + logvar.exp().mean(0)).sqrt())
        model.train()
        bar = tqdm(range(begin, total), f"stage {stage}", total, initial=begin, mininterval=1)
        for step in bar:
            # Loss of one batch
            numbers = np.random.SeedSequence((config.seed, stage, step)).generate_state(1)
            torch.manual_seed(int(numbers[0]))
            weighting = "v" if step < config.warmup * total else goal  # [Eq. 5]; [Sec. 3.4]
            with autocast(device):
                if stage == 1:
                    x = data.tensors(*data.batch_rows(config.batch_size, config.seed, step))
                    if not data.toy and step % 2:                # ours: images, masks mirrored
                        x |= {name: x[name].flip(3) for name in x.keys() & {"image", "mask"}}
                    objective = {"mopoe": model.neg_elbo, "mvtcae": model.neg_mvtcae}
                    terms = objective[config.objective](x, weighting)  # dict of (B,)
                else:
                    rows = torch.randint(len(mu), (config.aux_batch_size,), device=device)
                    terms = {"total": model.aux.nll(mu[rows], logvar[rows], weighting)}
            # One step; the learning rates warm up, then follow a cosine to zero
            nets.zero_grad()
            terms["total"].mean().backward()                     # the one mean over the batch
            norm = nn.utils.clip_grad_norm_(params, 1.0)         # always: in stage 1 it is hundreds
            rate = min(1, (step + 1) / config.lr_warmup) * math.cos(math.pi / 2 * step / total) ** 2
            for optimizer, peak in zip(optimizers, (config.lr, config.muon_lr)):
                optimizer.param_groups[0]["lr"] = peak * rate
                optimizer.step()
            # EMA of weights and of batch norm's statistics; over a short time at first
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for a, b in zip(chain(averages.parameters(), averages.buffers()),
                                chain(nets.parameters(), nets.buffers())):
                    a.lerp_(b, 1 - decay) if a.is_floating_point() else a.copy_(b)
            # Log, figures and a picture, checkpoint
            pending.append(torch.stack([*(v.detach().mean() for v in terms.values()), norm]))
            done = step + 1
            last = done == total or bool(stop)
            if done % config.log_every == 0 or last:
                names, values = [*terms, "grad"], torch.stack(pending).cpu()  # (steps, names)
                if len(bad := (~values.isfinite()).nonzero()):
                    raise UserError(f"stage {stage}, step {done - len(pending) + bad[0, 0] + 1}: "
                                    f"{names[bad[0, 1]]} is not finite and not saved; a "
                                    "smaller --lr, or Adam, may help")
                means = {name: round(v, 3) for name, v in zip(names, values.mean(0).tolist())}
                log.append({"stage": stage, "step": done, **means,
                            "seconds": round(time.time() - start, 1)})
                bar.set_postfix(means)
                pending = []
            if stage == 1 and (done % config.probe_every == 0 or done == total):
                log.append({"stage": stage, "step": done,
                            **coherence(ema, data, data.split["val"][:64])})
                tqdm.write(str(log[-1]))
                sample_pictures(ema, data, folder / "samples" / f"train-{done:06d}.png",
                                [config.modalities[1]], 4, sampler="dpm++", steps=10)
            if done % config.save_every == 0 or last:
                with new_file(folder / "checkpoint.pt") as file:
                    torch.save({"config": asdict(config), "stage": stage, "step": done, "log": log,
                                "model": model.state_dict(), "ema": ema.state_dict(),
                                "optimizers": [o.state_dict() for o in optimizers]}, file)
                with new_file(folder / "log.jsonl") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in log).encode())
            if stop and last:  # not a signal since then: nothing is saved yet
                return
        begin, states = 0, ()


# === §8 Sampling to pictures [Sec. 3.3] [Sec. 3.4] ===

def read_given(words, config):
    """`--given` words -> names, x. "mask": of the test split, x is empty. "mask=face.png",
    "attr=Smiling,Bangs", "text=a red bird": x has the user's own. UserError on others."""
    pairs = [word.partition("=") for word in words]
    names, known = [pair[0] for pair in pairs], config.modalities
    if not set(names) <= set(known) or len(set(names)) < len(names) or len(
            {sign for _, sign, _ in pairs}) > 1:
        raise UserError(f"--given {' '.join(words)}: choose from {', '.join(known)}, each once, "
                        f"all of the test split ({known[1]}) or all your own ({known[1]}=...)")
    return names, {name: read_own(name, value, config) for name, sign, value in pairs if sign}


def read_own(name, value, config):
    """One modality of the user's own: -> (1, ...) tensor, read as data_prep.py and training do."""
    if name == "text":
        ids, cut = tokenize([value], config)                     # (1, 2, L)
        if cut or not any(map(str.isalnum, value)):
            raise UserError(f"--given text={value}: not 1 to {config.text_length - 2} tokens long")
        return torch.from_numpy(ids).long()
    if name == "attr":
        chosen = set(value.replace(",", " ").split())
        if unknown := chosen - set(ATTRIBUTES):
            raise UserError(f"--given attr: no attribute {', '.join(sorted(unknown))}; the model "
                            f"knows {', '.join(ATTRIBUTES)}")
        return torch.tensor([[float(word in chosen) for word in ATTRIBUTES]])
    path, size = Path(os.path.expanduser(value)), config.image_size
    pixels = data_prep.read_picture(path, size) if name == "image" else \
        data_prep.read_mask([path], size)
    return to_tensors({name: pixels[None].copy()}, "cpu")[name]


def draw_grid(path, title, columns, rows, config):
    """Save a labelled grid; columns: {label: {modality: (n, ...)}}, rows: n labels."""
    tall, font = 222 if len(config.modalities) == 2 else 134, ImageFont.load_default(13)
    width = max(72 + 174 * len(columns), math.ceil(font.getlength(title)) + 12)
    grid = Image.new("RGB", (width, 44 + tall * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    pen.text((6, 4), title, "black", font)
    for j, (label, x) in enumerate(columns.items()):
        left = 72 + 174 * j
        pen.text((left, 24), label, "black", font)
        for k, (row, *values) in enumerate(zip(rows, *x.values())):
            top = 44 + tall * k
            pen.text((6, top + 8), row, "black", font)
            for name, value in zip(x, values):
                if name in ("image", "mask"):
                    pixels = eight_bits(2 * value - 1 if name == "mask" else value).cpu()
                    picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
                    grid.paste(picture.resize((128, 128), Image.Resampling.NEAREST), (left, top))
                    top += 130
                else:
                    lines = textwrap.wrap(captions_of(value[None], config)[0], 28) if \
                        name == "text" else [word.replace("_", " ") for word, bit in
                                             zip(ATTRIBUTES, value) if bit]
                    size = max(6, min(12, 105 // max(1, len(lines))))
                    pen.multiline_text((left, top), "\n".join(lines) or "(nothing)", "black",
                                       ImageFont.load_default(size), spacing=1)
    with new_file(path) as file:
        grid.save(file, "PNG")


def sample_pictures(model, data, path, given, num, seed=0, prior="aux", own=None, **options):
    """Generate and draw the grid at `path`. given: names of the first `num` test items or of `own`,
    one that is then sampled `num` times; [] for unconditional sampling. options: of decode."""
    generator, config, x, columns = torch.Generator().manual_seed(seed), model.config, {}, {}
    if own:
        x = {name: a.to(data.device).expand(num, *a.shape[1:]) for name, a in own.items()}
    elif given:
        x = data.tensors(data.split["test"][:num])
    with autocast(data.device):
        made = model.sample_conditional({n: x[n] for n in given}, 1, generator, **options) if \
            given else model.sample_unconditional(num, prior, generator, **options)
    if "text" in x:
        x["text"] = x["text"][:, 1]                              # (n, L) as the decoder writes
    groups = [config.modalities] if "text" in made else [[name] for name in made]
    for kind, values in (("test", x), ("made", made)):
        for group in groups:
            if shown := {name: values[name] for name in group if name in values}:
                columns[", ".join(f"given: {n}" if kind == "test" and n in given else
                                  f"{kind}: {n}" for n in shown)] = shown
    title = f"given {' + '.join(given) or f'nothing (prior: {prior})'}, seed {seed}"
    if config.decoder == "diffusion":
        title += ", {}, {} steps".format(*config.sampling(**options))
    draw_grid(path, title, columns, [f"{k}" for k in range(len(made["image"]))], config)


# === §9 Evaluation ===

def mean_f1(pred, target):
    """Sample-average F1 of (B, ...) in {0, 1}: 2 TP / (predicted + true) of an item, 0 of none."""
    pred, target = pred.flatten(1) > 0.5, target.flatten(1) > 0.5
    return (2 * (pred & target).sum(1) / (pred.sum(1) + target.sum(1)).clamp(min=1)).mean().item()


class Judge(nn.Module):
    """Shares no weight with what it judges: images -> features (B, 128), logits by modality."""

    def __init__(self, size, words=0):
        super().__init__()
        c = Config(image_size=size, latent=128)
        self.body = conv_encoder(3, (32, 64, 128), (2, 2, 2), replace(c, latent=64))  # 2 Z = 128
        self.heads = nn.ModuleDict({"text": nn.Linear(128, words)} if words else {
            "attr": nn.Linear(128, len(ATTRIBUTES)),
            "mask": conv_decoder(1, (16, 32, 64), (2, 2, 2), c)})

    def forward(self, image):
        features = F.relu(self.body(image))                      # (B, 128)
        return features, {name: head(features) for name, head in self.heads.items()}

    def read(self, image):
        """-> features (N, 128), and by name what it sees, in {0, 1}."""
        features, logits = zip(*map(self, image.split(CHUNK)))
        return torch.cat(features).float(), {
            name: (torch.cat([part[name] for part in logits]) > 0).float() for name in self.heads}


def get_judge(path, data):
    """The judge kept at `path`; if there is none it is trained first, on the training split."""
    torch.manual_seed(0)  # its weights decide every FD-judge, whatever was drawn before
    judge = Judge(data.size, len(data.vocabulary)).to(data.device)
    if path.exists():
        with user_error(f"{path}: not a judge of this data, or damaged; delete it"):
            judge.load_state_dict(torch.load(path, data.device, weights_only=True))
        return judge.eval()
    steps = max(JUDGE_STEPS, 5 * data.batches(64))               # batches of five passes
    adam = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, steps)
    for step in tqdm(range(steps), "judge"):
        rows, _ = data.batch_rows(64, 0, step)
        with autocast(data.device):
            _, logits = judge(data.tensors(rows)["image"])
        adam.zero_grad()
        sum(F.binary_cross_entropy_with_logits(logits[name].float(), truth)
            for name, truth in data.labels(rows).items()).backward()
        adam.step()
        schedule.step()
    with new_file(path) as file:
        torch.save(judge.state_dict(), file)
    return judge.eval()


def frechet_distance(a, b):
    """Between Gaussians fitted to features (N, D) and (M, D) [8]: |mu_a - mu_b|^2 + tr(C_a + C_b
    - 2 (C_a C_b)^1/2). That root has the trace of (R C_b R)^1/2, where R R = C_a."""
    a, b = a.cpu().double(), b.cpu().double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)                # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T      # (D, D) R
    roots = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace()
            - 2 * roots.sum()).item()


def load_inception(path, device):
    """FID's network, pt_inception-2015-12-05-6726825d.pth of pytorch-fid: -> function of images ->
    (B, 2048). Inception v3, but means leave out the padding and the last block takes maxima."""
    from torchvision.models import Inception3  # here, as importing it takes seconds
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False).to(device).eval()
    with user_error(f"--inception {path}: not pytorch-fid's weights of Inception v3, or damaged"):
        net.load_state_dict(torch.load(path, "cpu", weights_only=True))
    net.fc, inputs = nn.Identity(), []
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        getattr(net, f"Mixed_{name}").branch_pool.register_forward_pre_hook(
            lambda _, args: args[0] / F.avg_pool2d(torch.ones_like(args[0]), 3, 1, 1))
    net.Mixed_7c.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    net.Mixed_7c.branch_pool.register_forward_pre_hook(
        lambda _, args: F.max_pool2d(inputs.pop(), 3, 1, 1))

    def features(image):
        with torch.autocast(device.type, enabled=False):
            return torch.cat([net(2 * F.interpolate(
                eight_bits(part).float() / 255, size=(299, 299), mode="bilinear") - 1)
                for part in image.split(CHUNK)])
    return features


def load_clip(name, device):
    """A CLIP model: -> function of images (B, 3, H, W), captions -> 100 max(cos, 0) [7], (B,)."""
    from transformers import CLIPModel, CLIPProcessor
    with user_error(f"--clip {name}: no CLIP model"):
        net = CLIPModel.from_pretrained(name).to(device).eval()
        processor = CLIPProcessor.from_pretrained(name)

    def score(image, captions):
        batch = processor(text=captions, images=list(eight_bits(image)), return_tensors="pt",
                          padding=True, truncation=True,
                          max_length=net.config.text_config.max_position_embeddings).to(device)
        with torch.autocast(device.type, enabled=False):
            out = net(**batch)
        return 100 * F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)
    return score


# What the paper reports (Tables 1 to 3) for the models that can be trained here
PAPER = {"celeba": {
    "figures": ("attr from image + mask: F1", "attr from image: F1",
                "image from mask + attr: FID", "image from mask: FID", "image from attr: FID",
                "image from nothing: FID", "mask from image + attr: F1", "mask from image: F1",
                "Supervised, attr from image: F1", "Supervised, mask from image: F1"),
    "Diff-MVAE": (0.76, 0.75, 42.3, 41.9, 45.1, 43.5, 0.90, 0.90, 0.79, 0.94),
    "Diff-MVAE*": (0.76, 0.76, 28.3, 28.5, 32.3, 28.4, 0.90, 0.90, 0.79, 0.94),
    "MoPoE*": (0.74, 0.75, 104.8, 105.8, 182.3, 139.8, 0.90, 0.90, 0.79, 0.94),
    "MoPoE": (0.68, 0.71, 114.9, 101.1, 186.7, 164.8, 0.85, 0.92, 0.79, 0.94),
    "MVTCAE": (0.71, 0.69, 94.0, 84.2, 87.2, 162.2, 0.89, 0.89, 0.79, 0.94)}, "cub": {
    "figures": ("image from text: FID", "image from nothing: FID", "text from image: CLIP",
                "image from text: CLIP", "image + text from nothing: CLIP"),
    "Diff-MVAE": (57.4, 70.4, 27.7, 28.8, 28.23), "Diff-MVAE*": (35.5, 37.5, 28.1, 28.52, 28.12),
    "MoPoE": (290.6, 199.6, 26.8, 22.0, 24.8), "MVTCAE": (176.3, 168.9, 27.1, 26.6, 28.08)}}


def paper_row(config):
    """{figure: number} for a model of the paper, else {}; its baselines have z from N(0, I)."""
    table, source = PAPER[config.dataset], {"diffusion": "nothing"}.get(config.decoder, "N(0, I)")
    return {figure.replace("nothing", source): number for figure, number in zip(
        table["figures"], table.get(config.model_name(), ()))}


@torch.no_grad()
def evaluate(model, data, judge, num, repeats, seed, inception=None, clip=None, **options):
    """Figures of the first `num` test items: -> {figure: a number for each repeat, with seeds from
    `seed`; one if nothing is drawn}. inception, clip: of load_*; options: sampler, steps."""
    config, rows, figures = model.config, data.split["test"][:num], {}
    names, x, truth = config.modalities, data.tensors(rows), data.labels(rows)
    chunks = [{name: a[k:k + CHUNK] for name, a in x.items()} for k in range(0, len(rows), CHUNK)]
    given = {name: data.bits(name, x[name], config) for name in names[1:]}
    features = {"FD-judge": lambda image: judge.read(image)[0], "FID": inception,
                "FD-8x8": lambda image: F.adaptive_avg_pool2d(image, 8).flatten(1)}  # (N, 192)
    real = {label: function(x["image"]) for label, function in features.items() if function}
    subsets = [[*compress(names, subset)] for subset in all_subsets(len(names))]
    sources = {**{" + ".join(subset): (subset, None) for subset in subsets},
               "nothing": ([], "aux"), "N(0, I)": ([], "gaussian")}
    share = lambda seen, told: (seen * told).sum() / told.sum().clamp(min=1)  # of facts told
    put = lambda figure, value: figures.setdefault(figure, []).append(round(float(value), 4))
    for label, a in real.items() if len(rows) > 3 else ():       # to compare the distances with
        put(f"real halves: {label}", frechet_distance(a[::2], a[1::2]))
    for name, seen in judge.read(x["image"])[1].items():
        put(f"Supervised, {name} from image: F1", mean_f1(seen, truth[name]))
        put(f"{name} of another item: F1", mean_f1(given[name].roll(1, 0), truth[name]))
    for draw in range(seed, seed + repeats):
        for source, (observed, prior) in tqdm(sources.items(), f"seed {draw}"):
            generator = torch.Generator().manual_seed(draw)
            wanted = [n for n in names if n not in observed or observed == ["image"]] or ["image"]
            parts = [model.sample_unconditional(len(part["image"]), prior, generator, **options)
                     if prior else model.sample_conditional(
                         {n: part[n] for n in observed}, 1, generator, names=wanted, **options)
                     for part in chunks]
            made = {name: torch.cat([part[name] for part in parts]) for name in wanted}
            bits = {n: data.bits(n, made[n], config) for n in wanted if n != "image"}
            for name in bits if observed else ():
                put(f"{name} from {source}: F1", mean_f1(bits[name], truth[name]))
            if "image" in made:
                for label in real:
                    put(f"image from {source}: {label}", frechet_distance(
                        features[label](made["image"]), real[label]))
                for name, seen in judge.read(made["image"])[1].items():
                    score, unit = (share, "share") if name == "text" else (mean_f1, "F1")
                    if prior:
                        put(f"image + {name} from {source}: agree, {unit}", score(seen, bits[name]))
                    elif name in observed:
                        put(f"image from {source}: judged {name}, {unit}", score(seen, given[name]))
            if clip and (new := [name for name in wanted if name not in observed]):
                image = (made if "image" in new else x)["image"].split(CHUNK)
                ids = (made["text"] if "text" in new else x["text"][:, 1]).split(CHUNK)
                put(f"{' + '.join(new)} from {source}: CLIP", torch.cat(
                    [clip(a, captions_of(b, config)) for a, b in zip(image, ids)]).mean())
        if config.decoder == "diffusion":                        # [Eq. 5], images of 8 bits
            torch.manual_seed(draw)
            parts = [model.neg_elbo(part, "8 bits") for part in chunks]
            nats = {n: torch.cat([part[n] for part in parts]).mean() for n in (*names, "kl")}
            for name, value in nats.items():
                put(f"Eq. 5 bound: {name}, nats", value)
            put("Eq. 5 bound: bits per image value",
                sum(nats.values()) / x["image"][0].numel() / math.log(2))
    return figures


# === §10 Command line ===

def parse_args(argv=None):
    """All flags, checked; those of Config that were given are in args.config."""
    parser = data_prep.Parser(prog="diffmvae.py", description="Train, sample, evaluate, in turn.")
    add, count = parser.add_argument_group("what to do").add_argument, within(int, 1)
    add("--dataset", choices=list(MODALITIES), required=True,
        help="the setup: celeba has image, mask and 18 attributes, cub image and caption (text)")
    add("--train", action="store_true", help="train both stages: Eq. 5, then the auxiliary model")
    add("--sample", choices=["cond", "uncond"], help="write a picture of samples")
    add("--eval", action="store_true", help="measure the figures of the paper's tables and more")
    add("--data", type=Path, help="folder of data_prep.py, or toy (default: data/<dataset> or toy)")
    add("--run", type=Path, help="run folder (default: runs/<dataset>[-toy][-variant])")
    add("--seed", type=within(int, 0, 2 ** 63 - 1), default=0,
        help="of training (a resumed one keeps its own), sampling, evaluation (default: 0)")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--given", nargs="+", default=[], metavar="NAME[=VALUE]", help="for --sample cond: of the "
        "test split (mask attr) or your own (image=a.jpg mask=b.png attr=Bangs,Male text='a bird')")
    add("--prior", choices=["aux", "gaussian"], default="aux",
        help="for --sample uncond: z from the auxiliary model (default) or from N(0, I)")
    add("--num", type=within(int, 1, 1000), default=8, help="rows of the picture (default: 8)")
    add("--sampler", choices=list(SAMPLERS),
        help="of diffusion's images (default: ddim, for lambda = g(t)^2 euler-maruyama)")
    add("--sampler-steps", type=count, help="of that sampler (default: 50, of euler-maruyama 100)")
    add("--eval-num", type=within(int, 2), help="test items (default: 400, with --inception all)")
    add("--eval-repeats", type=count, default=3, help="draws, with seeds from --seed (default: 3)")
    add("--inception", help="for FID: pytorch-fid's file pt_inception-2015-12-05-6726825d.pth")
    add("--clip", help="for CLIP scores of cub: a model of the Hugging Face hub or a folder")
    add = parser.add_argument_group("training (defaults: by preset)").add_argument
    flags = [f for f in fields(Config) if f.metadata]
    kinds = {bool: {"action": "store_true"}, str: {}, int: {"type": count},
             float: {"type": within(float, 0)}}
    for f in flags:
        add("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
            **{**kinds[f.type], **f.metadata})
    add("--text-init", nargs=2, metavar="FOLDER", help="cub, preset paper: Optimus's folders "
        "checkpoint-encoder-*, checkpoint-decoder-* (default: bert-base-cased, gpt2 of the hub)")
    add("--resume", action="store_true", help="continue the run exactly where its checkpoint is")
    args = parser.parse_args(argv)
    args.config = c = {f.name: getattr(args, f.name) for f in flags if hasattr(args, f.name)}
    training = c.keys() - {"decoder", "objective", "weighting", "prior_expert"}
    for wrong, message in (
            (not (args.train or args.sample or args.eval), "give --train, --sample or --eval"),
            ((args.sample == "cond") != bool(args.given), "--sample cond goes with --given"),
            (args.prior != "aux" and args.sample != "uncond", "--prior needs --sample uncond"),
            ((args.resume or args.text_init or training) and not args.train,
             "flags of training need --train; a trained model keeps its own"),
            ((args.clip or args.text_init) and args.dataset != "cub", "only cub has captions"),
            (c.get("decoder") == "feedforward" and c.get("weighting") == "likelihood",
             "--weighting likelihood is of the diffusion decoder, not feedforward"),
            (c.get("objective") == "mvtcae" and "prior_expert" in c, "mvtcae has no prior-expert"),
            ((args.clip or args.inception) and not args.eval, "--clip, --inception need --eval")):
        if wrong:
            parser.error(message)
    return args


def run(args):
    """What the flags ask for, in the order train, sample, evaluate: -> exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = args.data or Path("data") / args.dataset
    toy = source == Path("toy") or args.data is None and not source.exists()
    asked = Config(**args.config)
    words = [args.dataset, "toy" * toy, asked.decoder, "prior" * asked.prior_expert,
             asked.weighting, asked.objective]
    folder = args.run or Path("runs") / "-".join(
        word for word in words if word not in ("", "diffusion", "simple", "mopoe"))
    path, new = folder / "checkpoint.pt", args.train and not args.resume
    # Configuration and data
    if new and path.exists():
        raise UserError(f"{path}: exists; --resume goes on, or take another --run or remove it")
    if new:
        preset = {"preset": "small" if toy else "paper", "toy": toy, "seed": args.seed}
        config = preset_config(args.dataset, **{**preset, **args.config})
    else:
        checkpoint = read_checkpoint(path)
        config, done = checkpoint["config"], checkpoint["done"]
        for name, value in {"dataset": args.dataset, "toy": toy, **args.config}.items():
            if getattr(config, name) != value:
                raise UserError(f"{folder}: was trained with {name} {getattr(config, name)}")
        if not args.train and done < (2, config.aux_steps):
            print(f"{folder}: trained up to stage {done[0]}, step {done[1]} only", file=sys.stderr)
    if toy:
        print(f"*** Not real data: the built-in TOY {args.dataset}, preset {config.preset}. ***")
        ends = np.cumsum([0, *TOY_COUNTS.values()])
        split = {name: np.arange(a, b) for name, a, b in zip(TOY_COUNTS, ends, ends[1:])}
        data = Data(TOYS[args.dataset](ends[-1], config.image_size), split, True, device)
    else:
        data = Data(*data_prep.read_prepared(source, args.dataset), False, device)
    if args.text_init and config.preset != "paper":
        raise UserError("--text-init needs --preset paper, whose sizes it has")
    text_init = args.text_init or (HUB if data.captions and config.preset == "paper" else ())
    if new:  # what the data decide
        patch = {"small": 4 if data.size >= 64 and data.size % 16 == 0 else 2}.get(
            config.preset, config.patch)
        config = replace(config, image_size=data.size, patch=patch, data=data.fingerprint)
        if text_init:
            config = pretrained_tokenizers(config, text_init)
        elif data.captions:
            config = replace(config, tokenizers=2 * (small_tokenizer(
                [text for row in data.split["train"] for text in data.captions[row]]),))
    unit = max(math.prod(config.image_rates), config.patch * 2 ** (len(config.unet_mults) - 1),
               math.prod(config.mask_rates) * ("mask" in config.modalities))
    if data.size % unit or data.size != config.image_size:
        raise UserError(f"the data have {data.size} px; the model needs "
                        f"{f'a multiple of {unit}' if new else config.image_size}")
    data.tokenize(config)
    names, own = read_given(args.given, config)
    if config.data != data.fingerprint and (args.train or args.eval or names and not own):
        if args.train:
            raise UserError(f"{folder}: was trained with other data")
        print(f"{folder}: was trained with other data, maybe with these items", file=sys.stderr)
    inception = load_inception(args.inception, device) if args.inception else None
    clip = load_clip(args.clip, device) if args.clip else None
    # Modes
    if args.train:
        stop = []  # Ctrl-C and SIGTERM: save and leave
        with ExitStack() as after:
            for which in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(which, lambda code, _: stop.append(code))
                after.callback(signal.signal, which, before)     # given back, whatever happens
            train(folder, config, data, stop, args.resume, new and text_init)
        print(f"{path}: {'stopped and saved; --train --resume goes on' if stop else 'trained'}")
        if stop:
            return 128 + stop[0]
    model, options = load(path, device), dict(sampler=args.sampler, steps=args.sampler_steps)
    if args.sample:
        stem = "-".join(["given", *names, *["own"] * bool(own)]) if names else \
            f"uncond-{args.prior}"
        grid = folder / "samples" / f"{stem}-seed{args.seed}.png"
        sample_pictures(model, data, grid, names, args.num, args.seed, args.prior, own, **options)
        print(grid)
    if args.eval:
        judge = get_judge(folder.parent / f"judge-{args.dataset}-{data.fingerprint:08x}.pt", data)
        num = min(len(data.split["test"]), args.eval_num or (2 ** 31 if inception else 400))
        with autocast(device):
            figures = evaluate(model, data, judge, num, args.eval_repeats, args.seed, inception,
                               clip, **options)
        settings = {"model": config.model_name(), "items": num, "seed": args.seed,
                    "sampling": config.decoder == "diffusion" and config.sampling(**options)}
        paper = paper_row(config)
        with new_file(folder / "eval.json") as file:             # first, as printing can fail
            file.write(json.dumps({**settings, "figures": figures, "paper": paper}).encode())
        print(f"{folder}: {settings}\n  {'mean +- deviation':>70s}   the paper, on its data")
        for name in {**figures, **paper}:
            values = figures.get(name, ())
            mean = f"{np.mean(values):.3f}" if values else "not run"
            spread = f"+- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            print(f"  {name:46s} {mean:>10s} {spread:12s} {paper.get(name, '')}")
    return 0


def main(argv=None):
    """The command line: -> exit code; 2 after one line on stderr for anything the user can mend."""
    args = parse_args(argv)
    return data_prep.exit_code("diffmvae.py", lambda: run(args), torch.OutOfMemoryError)


if __name__ == "__main__":
    sys.exit(main())
