"""SCOTT + MIM-JEPA: train a Vision Transformer from scratch on a few thousand unlabelled images.

A reference implementation of "Escaping the Big Data Paradigm in Self-Supervised Representation
Learning" (arXiv 2502.18056), whose section, table and equation numbers are given.

    python scott.py                                  # demo: built-in data, minutes on a CPU
    python scott.py --data flowers102 --root data    # the paper's run
    python scott.py --data path/to/images            # your own folder, labels not needed

What is unusual here, in reading order ("To change ..." marks where people will want to):
- A mask (True = hidden from the student) is always an argument.
- The encoder has no biases, and ends in a LayerNorm whose output loss, monitors and probes share.
- Crop, flip, colours and mask are keyed by (seed, epoch, image): worker processes change nothing.
- A run tells whether it collapses: k-NN, rank and deviation beside the untrained encoder's.
"""

import copy
import ctypes
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from glob import glob
from pathlib import Path
from threading import Thread
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets, ops, utils
from torchvision.transforms import v2 as T

# ---- Settings ----------------------------------------------------------------------------------
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's

class UserError(ValueError):
    """A mistake in arguments or data; `main` prints it as one line and exits with code 2."""

@dataclass
class Config:
    """Every setting of a run, a flag each, its help beside it. Defaults: SCOTT-12/16 (Table 6)."""
    data: str = "demo"  # demo, flowers102 or a folder of images
    root: str = "data"  # folder that holds, or receives, flowers102
    split: str = "all"  # images to train on: all, train, val, test or trainval
    img_size: int = 224  # side of the input, pixels, a multiple of 16
    crop_scale: float = 0.2  # smallest crop, share of the image's area
    value_range: tuple[float, ...] = ()  # LOW HIGH: black and white of 16-bit and float images
    views: Literal["different", "same", "none"] = "different"  # colours of the two views
    color_prob: float = 0.6  # probability of a colour pipeline, per view
    flip_prob: float = 0.5  # probability of a horizontal flip
    model: str = "scott-12/16"  # scott- or vit- and tiny, 3, 7, 9 or 12 /16
    heads: int | None = None  # attention heads (default: the model's)
    dropout: float = 0.2  # after the positions and the attention projection
    attention_dropout: float = 0.1  # on the attention weights
    drop_path: float = 0.1  # stochastic depth of the last block, linear from 0
    predictor_depth: int = 3  # blocks of the predictor
    renormalise: bool = True  # divide by the visible share of each kernel
    residual_norm: bool = False  # LayerNorm on the residual stream, as the released code
    mask: Literal["blockwise", "hidden-blocks", "random"] = "blockwise"  # blocks: visible, hidden
    mask_ratio: float = 0.6  # share of the patches hidden from the student
    epochs: int = 300  # passes over the data
    batch_size: int = 128  # images a step
    grad_accum_steps: int = 1  # parts of a step, one after the other: less memory
    lr: float = 5e-4  # peak learning rate
    lr_start: float = 1e-6  # learning rate of the first step
    lr_end: float = 1e-5  # learning rate of the last step
    lr_flat: float = 0.72  # share of the steps after warm-up at the peak
    warmup_epochs: float | None = None  # default: 40, at most 40/300 of --epochs
    beta2: float = 0.999  # AdamW's memory of squared gradients
    wd_start: float = 0.04  # weight decay of the first step
    wd_end: float = 0.4  # weight decay of the last step
    ema_start: float = 0.996  # teacher momentum of the first step
    ema_end: float = 1.0  # teacher momentum of the last step
    seed: int = 0  # of weights, order, crops, colours and masks
    which: Literal["teacher", "student"] = "teacher"  # encoder to monitor and load
    knn_every: int | None = None  # epochs between monitors, 0: at the end (default: ten a run)
    out: str | None = None  # run folder (default: runs/<data>-<model>)
    resume: str | None = None  # go on: the last.pt of a run
    save_minutes: float = 10.0  # minutes between checkpoints
    max_minutes: float = 1e6  # stop after so long; --resume goes on
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    amp: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic
    workers: int | None = None  # loader processes (default: 1, with a GPU 16)
    cache_gib: float = 8.0  # memory for decoded images, GiB
    demo = {"model": "scott-tiny/16", "img_size": 64, "crop_scale": 0.5, "dropout": 0.0,
            "attention_dropout": 0.0, "drop_path": 0.0, "predictor_depth": 2, "which": "student",
            "epochs": 30, "batch_size": 32}  # no flag: what --data demo sets

    def schedule(self, step, total, warmup):
        """Learning rate, weight decay and teacher momentum of a step (Table 6)."""
        lr = lr_schedule(step, total, warmup, self.lr_start, self.lr, self.lr_end, self.lr_flat)
        decay = linear(step, total, self.wd_start, self.wd_end)
        return lr, decay, linear(step, total, self.ema_start, self.ema_end)

# ---- Masks: True = hidden from the student, exactly int(ratio * Gh * Gw) patches (sec. 3.2) ----
def blockwise_mask(grid, ratio=0.6, generator=None, hidden_blocks=False):
    """A union of BEiT's blocks is visible, as in Figure 2 and the released code, or, with
    `hidden_blocks`, hidden, which is how the text reads: (Gh, Gw) bool."""
    height, width = grid
    smallest = max(1, round(16 * height * width / 196))
    hidden = int(ratio * height * width)
    count = hidden if hidden_blocks else height * width - hidden
    blocks = torch.zeros(grid, dtype=torch.bool)
    while left := count - int(blocks.sum()):
        for size, shape, down, right in torch.rand(10, 4, generator=generator).tolist():
            area = smallest + size * (left - smallest)
            aspect = 0.3 ** (2 * shape - 1)  # log-uniform in [0.3, 1 / 0.3]
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            y, x = int(down * (height - h + 1)), int(right * (width - w + 1))
            block = blocks[y : y + h, x : x + w]
            if h < height and w < width and 0 < int((~block).sum()) <= left:
                block.fill_(True)
                break
        else:  # ten tries in vain: single patches fill up to the exact count
            free = (~blocks).flatten().nonzero().squeeze(1)
            blocks.view(-1)[free[torch.randperm(len(free), generator=generator)[:left]]] = True
    return blocks if hidden_blocks else ~blocks

def random_mask(grid, ratio=0.6, generator=None):
    """Hidden patches anywhere: (Gh, Gw) bool."""
    order = torch.randperm(grid[0] * grid[1], generator=generator).view(grid)
    return order < int(ratio * grid[0] * grid[1])

# To change how patches are hidden: add a function of (grid, ratio) here, and its name to --mask.
MASKS = {"blockwise": blockwise_mask, "random": random_mask,
         "hidden-blocks": partial(blockwise_mask, hidden_blocks=True)}

# ---- Tokenizers: sparse (Table 3), or plain (sec. 3.1) -----------------------------------------
def grid_of(images):
    """(Gh, Gw) of images (..., H, W)."""
    return images.shape[-2] // 16, images.shape[-1] // 16

def enlarge(mask, x):
    """Patch mask (B, 1, Gh, Gw) at the resolution of x (B, C, H, W): (B, 1, H, W)."""
    size = x.shape[-1] // mask.shape[-1]
    return mask.repeat_interleave(size, -2).repeat_interleave(size, -1)

class SparseConv2d(nn.Conv2d):
    """A convolution without bias that neither sees nor fills hidden patches (sec. 3.1).
    forward(x (B, C, H, W), mask (B, 1, Gh, Gw) bool or None): hidden sites are zeroed before and
    after; `renormalise`: divide by the visible share of the kernel's taps inside the image."""
    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, renormalise=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.renormalise = renormalise

    def forward(self, x, mask=None):
        if mask is None:
            return super().forward(x)
        hidden = enlarge(mask, x)
        x = super().forward(torch.where(hidden, 0, x))  # unlike masked_fill, keeps channels last
        scale = (~enlarge(mask, x)).float()
        if self.renormalise:
            share = F.avg_pool2d((~hidden).float(), self.kernel_size, self.stride, self.padding,
                                 count_include_pad=False)
            scale = scale / share.masked_fill(share == 0, 1)
        return x * scale.to(x.dtype)

def sparse_max_blur_pool(x, mask=None):
    """Anti-aliased max pooling (Zhang 2019), (B, C, H, W) -> (B, C, H/2, W/2), masks as above.
    Hidden sites never win the 2x2 maximum; then a binomial 3x3 blur, whose taps all see a visible
    site where the middle is one, as patches have an even side: nothing to renormalise."""
    if mask is not None:  # low enough to lose, but not to overflow in a mean
        x = torch.where(enlarge(mask, x), torch.finfo(x.dtype).min / 16, x)
    x = F.max_pool2d(x, 2, 1)
    x = F.avg_pool2d(F.avg_pool2d(x, 2, 1, 1), 2)  # [1 2 1] = [1 1] * [1 1], a fast gradient
    return x if mask is None else x * ~enlarge(mask, x)

class SparseConvTokenizer(nn.Module):
    """SCOTT's stem (Table 3): images (B, C, H, W), mask (B, N) bool or None -> tokens (B, N, D),
    N = H/16 * W/16. Tokens of hidden patches are zero; the others know nothing of their pixels."""
    def __init__(self, embed_dim=384, renormalise=True, in_channels=3):
        super().__init__()
        self.conv1 = SparseConv2d(in_channels, embed_dim // 6, 7, 2, 3, renormalise)
        self.conv2 = SparseConv2d(embed_dim // 6, embed_dim, 7, 2, 3, renormalise)
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.kaiming_normal_(self.conv2.weight)

    def forward(self, images, mask=None):
        if mask is not None:
            mask = mask.view(-1, 1, *grid_of(images))
        x = sparse_max_blur_pool(F.relu(self.conv1(images, mask)), mask)  # (B, D/6, H/4, W/4)
        x = sparse_max_blur_pool(F.relu(self.conv2(x, mask)), mask)  # (B, D, H/16, W/16)
        return x.flatten(2).transpose(1, 2)

class PatchEmbed(nn.Conv2d):
    """ViT's patch embedding, one 16x16 convolution: images (B, C, H, W) -> tokens (B, N, D)."""
    def __init__(self, embed_dim=384, in_channels=3):
        super().__init__(in_channels, embed_dim, 16, 16, bias=False)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, images, mask=None):  # a patch is a token: nothing to hide from the others
        return super().forward(images).flatten(2).transpose(1, 2)

# ---- Vision Transformer (sec. 3.1, App. A.2) ---------------------------------------------------
def sincos_positions(height, width, dim, device="cpu"):
    """Fixed 2-D sin-cos positions of the integer grid indices: (height * width, dim) float32."""
    frequency = 10000 ** (-torch.arange(dim // 4, device=device) / (dim // 4))
    axes = (torch.arange(side, device=device) for side in (height, width))
    angle = torch.cartesian_prod(*axes)[..., None] * frequency  # (N, 2, dim / 4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)

class Attention(nn.Module):
    """Multi-head self-attention without bias: (B, N, D) -> (B, N, D)."""
    def __init__(self, dim, num_heads, dropout=0.0, attention_dropout=0.0):
        super().__init__()
        self.num_heads, self.dropout, self.attention_dropout = num_heads, dropout, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv, dropout_p=self.attention_dropout * self.training)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)

class SwiGLU(nn.Module):
    """Gated feed-forward layer without bias, 8/3 D wide rounded to a multiple of 128."""
    def __init__(self, dim):
        super().__init__()
        hidden = max(1, round(dim * 8 / 3 / 128)) * 128
        self.gate_value = nn.Linear(dim, 2 * hidden, bias=False)
        self.proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        gate, value = self.gate_value(x).chunk(2, -1)
        return self.proj(F.silu(gate) * value)

class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D); `layer`, from 1, scales its init.
    residual_norm: LayerNorm the residual stream itself between the halves, as the released code."""
    def __init__(self, dim, num_heads, layer=1, drop_path=0.0, residual_norm=False, **dropouts):
        super().__init__()
        self.drop_path, self.residual_norm = drop_path, residual_norm
        self.attention = Attention(dim, num_heads, **dropouts)
        self.ffn = SwiGLU(dim)
        for name, weight in self.named_parameters():
            nn.init.trunc_normal_(weight, std=0.02)
            if name.endswith("proj.weight"):
                weight.data /= math.sqrt(2 * layer)

    def forward(self, x):
        drop = partial(ops.stochastic_depth, p=self.drop_path, mode="row", training=self.training)
        x = x + drop(self.attention(F.layer_norm(x, x.shape[-1:])))
        inner = F.layer_norm(x, x.shape[-1:])
        return (inner if self.residual_norm else x) + drop(self.ffn(inner))

def make_blocks(depth, dim, num_heads, drop_path=0.0, **options):
    """`depth` blocks whose stochastic depth grows linearly from 0 to `drop_path`."""
    rates = np.linspace(0, drop_path, depth).tolist()
    blocks = [Block(dim, num_heads, i, rate, **options) for i, rate in enumerate(rates, 1)]
    return nn.Sequential(*blocks)

class ViT(nn.Module):
    """Vision Transformer over a tokenizer: no class token, fixed positions, one mask token (Eq. 1).
    forward(images (B, C, H, W), mask (B, N) bool or None) -> (B, N, D) after the final LayerNorm;
    ValueError unless 16 divides H and W. registers: learnable extra tokens; options: of `Block`."""
    def __init__(self, tokenizer, embed_dim=384, depth=12, num_heads=6, registers=0, **options):
        super().__init__()
        self.tokenizer, self.embed_dim, self.num_heads = tokenizer, embed_dim, num_heads
        self.block_options, self.dropout = options, options.get("dropout", 0.0)
        self.mask_token = nn.Parameter(torch.randn(embed_dim) * 1e-6)
        self.blocks = make_blocks(depth, embed_dim, num_heads, **options)
        self.registers = nn.Parameter(torch.randn(registers, embed_dim) / 50) if registers else None

    def positions(self, images):
        """Positions (N, D) of the patches of `images`."""
        return sincos_positions(*grid_of(images), self.embed_dim, images.device)

    def embed(self, images, mask=None):
        """What goes into the blocks (Eq. 1): (B, N, D)."""
        if any(side % 16 for side in images.shape[-2:]):
            raise ValueError(f"image size {tuple(images.shape[-2:])} is not divisible by 16")
        tokens = self.tokenizer(images, mask)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        return F.dropout(tokens + self.positions(images), self.dropout, self.training)

    def forward(self, images, mask=None):
        tokens = self.embed(images, mask)
        patches = tokens.shape[1]
        if self.registers is not None:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], 1)
        return F.layer_norm(self.blocks(tokens), (self.embed_dim,))[:, -patches:]

SIZES = {"tiny": (192, 4, 3), "3": (384, 3, 4), "7": (384, 7, 4), "9": (384, 9, 4),
         "12": (384, 12, 6)}  # width, depth, heads (Tables 4, 11; heads of 3 and 9 are not stated)

def create_encoder(name, heads=None, renormalise=True, **options):
    """A new `ViT` of a name as in --model; options: of `ViT`. Raises UserError for other names."""
    kind, _, size = name.removesuffix("/16").partition("-")
    if kind not in ("scott", "vit") or size not in SIZES:
        raise UserError(f"--model {name}: must be scott-S/16 or vit-S/16, S of {', '.join(SIZES)}")
    width, depth, num_heads = SIZES[size]
    if width % (heads or num_heads):
        raise UserError(f"--heads {heads}: must divide the width, {width}")
    # To change the tokenizer: any module with this forward(images, mask) will do.
    tokenizer = SparseConvTokenizer(width, renormalise) if kind == "scott" else PatchEmbed(width)
    return ViT(tokenizer, width, depth, heads or num_heads, **options)

def encoder_of(config):
    """The new, untrained encoder that the dict of a `Config` describes."""
    names = "heads renormalise dropout attention_dropout drop_path residual_norm registers".split()
    return create_encoder(config["model"], **{name: config[name] for name in config.keys() & names})

# ---- MIM-JEPA (sec. 3.2) and its schedules (sec. 4.2, Table 6) ---------------------------------
class MIMJEPA(nn.Module):
    """Predict what the teacher says about patches that the student does not see (Eq. 2)."""
    def __init__(self, encoder, predictor_depth=3):
        super().__init__()
        width = encoder.embed_dim
        self.student = encoder  # context encoder f_theta
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)  # target encoder, its average
        head = nn.Linear(width, width)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        blocks = make_blocks(predictor_depth, width, encoder.num_heads, **encoder.block_options)
        self.predictor = nn.Sequential(blocks, nn.LayerNorm(width, elementwise_affine=False), head)

    def forward(self, view_a, view_b, mask):
        """Views (B, 3, H, W), mask (B, N) bool -> Smooth-L1 loss, mean over the hidden tokens."""
        with torch.no_grad():  # in eval mode: no dropout in the targets
            target = self.teacher.eval()(view_b)  # N(s_y): it ends in a LayerNorm
        context = self.student(view_a, mask) + self.student.positions(view_a)  # s_x
        context = F.dropout(context, self.student.dropout, self.training)
        prediction = self.predictor(context)  # s^_y
        # To change the loss: return any other scalar here; for another method see `train`.
        loss = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none").mean(-1)
        return (loss * mask).sum() / mask.sum()

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_bar <- momentum * theta_bar + (1 - momentum) * theta."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)  # all in one call

def linear(step, total_steps, start, end):
    """From `start` at step 0 to `end` at the last step, total_steps - 1, exact at both."""
    share = step / max(1, total_steps - 1)
    return start * (1 - share) + end * share

def lr_schedule(step, total_steps, warmup_steps=0, start=1e-6, peak=5e-4, end=1e-5, flat=0.72):
    """Learning rate: linear warm-up, `flat` of the remaining steps at the peak, cosine to `end`."""
    if step < warmup_steps:
        return linear(step, warmup_steps + 1, start, peak)
    last = total_steps - 1
    decay_start = warmup_steps + flat * (last - warmup_steps)
    share = (step - decay_start) / (last - decay_start or 1) if step < last else 1
    return peak if share <= 0 else end + (peak - end) * (1 + math.cos(math.pi * share)) / 2

def parameter_groups(parameters, lr_scale=1.0):
    """For AdamW: matrices are `decayed`, vectors are not; lr_scale: share of the learning rate."""
    weights = [weight for weight in parameters if weight.requires_grad]
    return [{"params": [weight for weight in weights if (weight.ndim > 1) == decayed],
             "decayed": decayed, "lr_scale": lr_scale} for decayed in (True, False)]

# ---- Views (sec. 3.2, App. C) ------------------------------------------------------------------
BICUBIC = T.InterpolationMode.BICUBIC

def view_transforms(config):
    """The crop and flip that both views share, and the colours that each draws on its own."""
    # To change the views: edit these, of torchvision's transforms.
    width = 2 * max(1, round((config.img_size * 9 / 224 - 1) / 2)) + 1  # of the blur, pixels
    colors = T.RandomOrder([T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                            T.RandomApply([T.GaussianBlur(width, (0.1, 2.0))], 0.3),
                            T.RandomGrayscale(0.1)])
    crop = T.RandomResizedCrop(config.img_size, (config.crop_scale, 1), interpolation=BICUBIC)
    crop = T.Compose([crop, T.RandomHorizontalFlip(config.flip_prob)])
    return crop, T.RandomApply([colors], config.color_prob)

def normalise(images):
    """uint8, or float in [0, 1] -> float32 standardised by ImageNet's colours, channels last."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    colors = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    mean, deviation = colors.to(images.device, non_blocking=True)
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)

# ---- Data: image sets, decoding, crops (App. C) ------------------------------------------------
class ImageSet:
    """Images: arrays of paths, labels (-1 = unknown) and splits ("" = none); names of the classes.
    Item (epoch, index), keyed by both and the seed: views a and b, uint8 (3, S, S), a mask (N,)
    bool. Item index: the centre crop of the image resized to 256/224 of the size."""
    def __init__(self, config, paths, labels, splits, classes, decoded=None):
        self.config, self.classes, self.decoded = config, [*classes], decoded or {}
        self.paths, self.labels, self.splits = map(np.array, ([*paths], labels, splits))
        size, scale = config.img_size, max(config.crop_scale, 0.01)
        self.side = math.ceil(size * max(256 / 224, scale**-0.5))  # larger ones are shrunk to it
        self.centre = T.Compose([T.Resize(round(size * 256 / 224), BICUBIC), T.CenterCrop(size)])
        self.crop, self.colors = view_transforms(config)

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            return self.centre(self.load(key))
        draw_mask = MASKS.get(self.config.mask, random_mask)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the default generator
            torch.default_generator.manual_seed(hash((self.config.seed, *key)))
            crop = self.crop(self.load(key[1]))
            mask = draw_mask(grid_of(crop), self.config.mask_ratio).flatten()
            view_a = crop if self.config.views == "none" else self.colors(crop)
            view_b = self.colors(crop) if self.config.views == "different" else view_a
            return view_a, view_b, mask

    def load(self, index):
        """Image `index`, uint8 (3, H, W), not to be written to. Raises UserError if unreadable."""
        path = str(self.paths[index])
        if path in self.decoded:
            return self.decoded[path]
        try:
            with Image.open(path) as image:
                image.draft("RGB", (self.side, self.side))  # JPEG: decode at 1/2, 1/4 or 1/8
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":  # 16 bits, floats: scaled alike in the whole set
                    span = self.config.value_range
                    if len(span) != 2 or span[0] >= span[1]:
                        raise ValueError("say what is black and white, --value-range LOW HIGH; its "
                                         "own values are {:g} to {:g}".format(*image.getextrema()))
                    levels = np.interp(np.nan_to_num(image), span, (0, 255))
                    image = Image.fromarray(levels.round().astype(np.uint8))
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {path}: {error}") from None
        if min(image.size) > self.side:
            image = ImageOps.cover(image, (self.side, self.side), Image.Resampling.BICUBIC)
        return T.functional.pil_to_tensor(image)

    def read(self, gib):
        """Read all, keep `gib` GiB; returns how many are unreadable: left out. UserError: all."""
        def try_load(index):
            try:
                return self.load(index)
            except UserError as error:
                print(f"left out: {error}")
        used, readable = 0, []
        with ThreadPoolExecutor() as pool:
            for path, image in zip(self.paths, pool.map(try_load, range(len(self.paths)))):
                readable.append(image is not None)
                if readable[-1] and used + image.numel() < gib * 2**30:
                    self.decoded[path] = image
                    used += image.numel()
        self.keep(np.array(readable))
        if not any(readable):
            raise UserError(f"none of the {len(readable)} images can be read")
        return readable.count(False)

    def keep(self, indices):
        """Forget all other images."""
        self.paths, self.labels = self.paths[indices], self.labels[indices]
        self.splits = self.splits[indices]

    def select(self, split):
        """Indices of a split, "all" or "trainval". Raises UserError for unknown names."""
        wanted = {"all": np.unique(self.splits), "trainval": ["train", "val"]}.get(split, [split])
        if not np.isin(wanted, self.splits).all():
            raise UserError(f"--split {split}: has {' '.join(['all', *np.unique(self.splits)])}")
        return np.flatnonzero(np.isin(self.splits, wanted))

def open_data(config):
    """The `ImageSet` that `--data` and `--root` name. Raises UserError if there is none."""
    # To change the data: return an ImageSet of your files here.
    if config.data == "demo":
        return draw_flowers(config)
    if config.data != "flowers102":
        return image_folder(config)
    rows = []
    try:
        for split in ("train", "val", "test"):
            part = datasets.Flowers102(config.root, split, download=True)
            rows += [(path, label, split) for path, label in zip(part._image_files, part._labels)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"no flowers102 in --root {config.root}: {error}") from None
    return ImageSet(config, *zip(*rows), range(102))

def image_folder(config):
    """Any folder of images: train/ and val/ or test/ are splits; within a split, or without any,
    sub-folders that hold images are labels; images loose or nested deeper are unlabelled."""
    folder, found = Path(config.data), []
    known = ("train", "val", "test") if (folder / "train").is_dir() else ("",)
    files = sorted(glob("**/*.*", root_dir=folder, recursive=True), key=lambda f: (len(f), f))
    once = {(folder / f).parent.resolve() / Path(f).name: Path(f) for f in reversed(files)}
    for path in sorted(once.values()):  # a folder that links to itself is read once
        split = path.parts[0] if path.parts[0] in known else ""
        label = path.parts[-2] if len(path.parts) == 2 + bool(split) and split in known else ""
        if path.suffix.lower() in (*datasets.folder.IMG_EXTENSIONS, ".gif"):
            found.append((str(folder / path), label, split))
    if not found:
        raise UserError(f"--data {folder}: no such folder, or no images in {folder}")
    paths, names, splits = zip(*found)
    classes, labels = np.unique(["", *names], return_inverse=True)  # "" is 0, to become -1
    return ImageSet(config, paths, labels[1:] - 1, splits, classes[1:].tolist())

def draw_flowers(config, count=3072, size=128):
    """The demo: flowers of 3 to 6 petals, round or pointed (8 classes); the last third is test."""
    generator, axis = torch.Generator().manual_seed(0), torch.linspace(-1, 1, size)
    labels, images = torch.arange(count) % 8, []
    sector = torch.tensor([5.0, 3, 1]).view(3, 1, 1)  # of the hue, of red, green and blue
    def uniform(low, high, cells=1):
        return low + (high - low) * torch.rand(len(kind), 1, cells, cells, generator=generator)
    def texture(cells):
        return F.interpolate(uniform(-1, 1, cells), (size, size), mode="bicubic")
    for kind in labels.view(-1, 1, 1, 1).split(256):
        x, y = axis - uniform(-0.25, 0.25), axis[:, None] - uniform(-0.25, 0.25)
        radius = torch.hypot(x, y) / uniform(0.6, 0.9)
        turns = torch.atan2(y, x) / math.pi + uniform(0, 2)
        across = (turns * (3 + kind // 2) % 2 - 1).abs()  # 0: in a petal, 1: between two
        edge = 1 - 0.75 * torch.where(kind % 2 == 1, across, across**4)
        hue = (sector + uniform(0, 6).floor() + uniform(-0.2, 0.2)) % 6
        petal = 1 - 0.75 * torch.minimum(hue, 4 - hue).clamp(0, 1)
        petal = petal * (0.9 - 0.25 * across - 0.25 * radius + 0.05 * texture(24))
        light = uniform(0.3, 0.54) + 0.1 * texture(5) + 0.1 * texture(20)
        green = torch.cat([uniform(0.5, 0.9), uniform(0.9, 1.2), uniform(0.3, 0.6)], 1)
        disk = torch.tensor([0.85, 0.65, 0.1]).view(3, 1, 1) * (0.9 + 0.3 * texture(40))
        picture = torch.where(radius < edge, petal, light * green)
        images += (torch.where(radius < 0.24, disk, picture).clamp(0, 1) * 255).byte()
    decoded = {f"demo {i}": image for i, image in enumerate(images)}
    splits = ["train" if i < count * 2 / 3 else "test" for i in range(count)]
    return ImageSet(config, decoded, labels.numpy(), splits, range(8), decoded)

def make_loader(images, batches):
    """A DataLoader; batches: lists of keys. Its processes share the decoded images, not Ctrl-C."""
    config = images.config
    def shield(_):  # SIGTERM, which a batch system sends to all, is for the run to save
        os.setsid()
        if sys.platform == "linux":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            Thread(target=await_the_end, daemon=True).start()
    def await_the_end():  # Python sends SIGTERM, too, when an error ends the run
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)
    return torch.utils.data.DataLoader(
        images, batch_sampler=batches, worker_init_fn=shield, pin_memory="cuda" in config.device,
        num_workers=config.workers, multiprocessing_context="fork" if config.workers else None)

# ---- Monitors: is it learning, is it collapsing? -----------------------------------------------
def evaluation_split(images):
    """(train, test) indices of labelled images, or None: test is test, val or a seeded fifth."""
    order = np.random.default_rng(0).permutation(np.flatnonzero(images.labels >= 0))
    splits = images.splits[order]
    test = order[splits == ("test" if "test" in splits else "val")]
    if len(test) in (0, len(order)):
        test = order[np.argsort(images.labels[order], kind="stable")][4::5]
    train = np.setdiff1d(order, test)
    return (train, np.sort(test)) if len(test) and len({*images.labels[train]}) > 1 else None

@torch.no_grad()
def encode(encoder, images, indices):
    """Mean-pooled tokens of the images' centre crops, (n, D) float32 on the CPU."""
    encoder, features, config = copy.deepcopy(encoder).eval(), [], images.config
    batches = [part.tolist() for part in torch.as_tensor(indices).split(config.batch_size)]
    for crops in make_loader(images, batches):
        with autocast(config):
            tokens = encoder(normalise(crops.to(config.device, non_blocking=True)))
        features.append(tokens.float().mean(1))
    return torch.cat(features).cpu()

def knn_scores(train, labels, test, classes, k=20, temperature=0.07):
    """Votes (n, classes) of the `k` nearest by cosine, each exp(similarity / temperature)."""
    similarity = F.normalize(test, dim=-1) @ F.normalize(train, dim=-1).T
    similarity, nearest = similarity.topk(min(k, len(train)))
    votes = (similarity / temperature).exp()
    return votes.new_zeros(len(test), classes).scatter_add(1, labels[nearest], votes)

def effective_rank(features):
    """exp of the entropy of the singular values' shares, centred features (n, D) (RankMe 2023)."""
    sigma = torch.linalg.svdvals((features - features.mean(0)).double())
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()

def monitor(name, encoder, images, untrained=None):
    """Print and return effective_rank, feature_std and, with labels, knn_top1 (%) of an encoder."""
    split = evaluation_split(images)
    train, test = split or (np.random.default_rng(0).permutation(len(images.paths))[:2048], [])
    features = encode(encoder, images, [*train, *test])
    sample = features[:: max(1, len(features) // 2048)][:2048]
    row = {"effective_rank": effective_rank(sample), "feature_std": sample.std(0).mean().item()}
    if untrained and any(row[key] < 0.4 * untrained[key] for key in row):
        print("warning: the features collapse; try a lower --lr, or an --ema-start closer to 1")
    if split:
        labels, features = torch.tensor(images.labels), features.split([len(train), len(test)])
        votes = knn_scores(features[0], labels[train], features[1], len(images.classes))
        row["knn_top1"] = 100 * (votes.argmax(1) == labels[test]).float().mean().item()
    print(f"{name}:", ", ".join(f"{key} {row[key]:.3g}" for key in row), flush=True)
    return row

def write_metrics(path, rows):
    """metrics.csv: a line an epoch; what a row (dict) has not is blank."""
    columns = "epoch,step,loss,lr,weight_decay,ema,images_per_s,feature_std,effective_rank,knn_top1"
    lines = [",".join(str(row.get(name, "")) for name in columns.split(",")) for row in rows]
    write_file(path, "\n".join([columns, *lines, ""]))

def draw_views(path, view_a, view_b, mask):
    """Picture of what the model sees: views a and b (B, 3, S, S), and a without what is hidden."""
    hidden = enlarge(mask.view(-1, 1, *grid_of(view_a)), view_a)
    grid = torch.cat([view_a, view_b, view_a.masked_fill(hidden, 0)])
    write_file(path, partial(utils.save_image, grid, nrow=len(mask), normalize=True, format="png"))

# ---- Training ----------------------------------------------------------------------------------
def autocast(config):
    """The arithmetic of --amp."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, config.amp == "bf16")

def backward(model, batch, config):
    """Gradients of a batch's mean loss, part by part; returns it. UserError: out of memory."""
    parts, total = config.grad_accum_steps, 0.0
    try:
        for done, part in enumerate(zip(*(x.chunk(parts) for x in batch)), 1):
            model.require_backward_grad_sync = done == parts  # DDP's: add up once a step
            with autocast(config):
                loss = model(*part) / parts
            loss.backward()
            total += loss.detach()
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory: try --grad-accum-steps {2 * parts}, or more") from None
    return total

class Run:
    """The images, model and optimiser of a resolved config; method: as in `train`."""
    def __init__(self, config, method=None):
        self.config, self.images = config, open_data(config)
        self.images.read(config.cache_gib)
        self.indices = self.images.select(config.split)
        self.steps = len(self.indices) // config.batch_size  # of an epoch
        self.total = config.epochs * self.steps
        self.warmup = round(config.warmup_epochs * self.steps)
        if self.warmup >= self.total:
            raise UserError(f"{self.total} steps: choose a smaller --batch-size or --warmup-epochs")
        torch.manual_seed(config.seed)
        method = method or (lambda encoder, config: MIMJEPA(encoder, config.predictor_depth))
        self.objective = self.model = method(encoder_of(asdict(config)), config)
        self.objective.to(config.device, memory_format=torch.channels_last)
        if not hasattr(self.objective, config.which):
            self.config = replace(config, which="student")
        if PROCESSES > 1:
            self.model = nn.parallel.DistributedDataParallel(self.objective)
        plain = partial(parameter_groups, self.objective.parameters())
        groups = getattr(self.objective, "parameter_groups", plain)()
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=True)

    def batches(self, start=0):
        """A loader of the steps from `start` on: this process's share of each whole batch."""
        def keys(step):
            epoch, position = divmod(step, self.steps)
            order = np.random.default_rng([self.config.seed, epoch]).permutation(self.indices)
            batch = order[position * self.config.batch_size :][: self.config.batch_size].tolist()
            return [(epoch, i) for i in batch[RANK::PROCESSES]]
        return make_loader(self.images, map(keys, range(start, self.total)))

    def views(self, step, *batch):
        """Normalised views (B, 3, S, S) of a loaded batch, and its masks, on the device."""
        if hasattr(self.objective, "draw_masks"):  # of the whole batch: processes change nothing
            generator = torch.Generator().manual_seed(hash((self.config.seed, step)))
            masks = self.objective.draw_masks(self.config.batch_size, grid_of(batch[0]), generator)
            batch = *batch[:2], *(mask[RANK::PROCESSES] for mask in masks)
        view_a, view_b, *masks = (x.to(self.config.device, non_blocking=True) for x in batch)
        return normalise(view_a), normalise(view_b), *masks

    def update_student(self, step, views, lr, weight_decay):
        """One step of AdamW; returns the loss."""
        for group in self.optimizer.param_groups:
            group.update(lr=lr * group["lr_scale"], weight_decay=weight_decay * group["decayed"])
        torch.manual_seed(hash((self.config.seed, step, RANK)))  # of dropout
        loss = backward(self.model, views, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def save(self, **progress):
        """Write last.pt. All draws are keyed by seed and step: there is no other state."""
        state = {"format": FORMAT, "config": asdict(self.config), "images": len(self.indices),
                 "objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_file(f"{self.config.out}/last.pt", partial(torch.save, state | progress))

    def restore(self, path):
        """Load and return a checkpoint. Raises UserError if it is of another run."""
        state, count = load_checkpoint(path), len(self.indices)
        if state["objective"].keys() != self.objective.state_dict().keys():
            raise UserError(f"{path}: a run of another method")
        if state["images"] != count:
            raise UserError(f"{path}: a run on {state['images']} images, not {count}")
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state

def train(config, method=None):
    """Pretrain as `config` says, alone or under torchrun; returns the run's folder. Raises
    UserError. To change the method: method(encoder, config) returns a module that has
    - forward(view_a, view_b, mask) -> loss, and `student`, the encoder that is kept;
    - if it wants: `teacher`, another encoder, and update_teacher(momentum), after every step;
    - draw_masks(count, grid, generator) -> tensors of `count` rows, for forward instead of mask;
    - parameter_groups(), as the function of that name. All in its state_dict is saved."""
    begun, config = time.time(), resolve(config)
    if PROCESSES > 1:
        backend = "cpu:gloo,cuda:nccl" if "cuda" in config.device else "gloo"
        torch.distributed.init_process_group(backend)
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    out = config.out or f"runs/{Path(config.data).resolve().name}-{config.model.replace('/', '-')}"
    folder = Path(config.resume or f"{out}/last.pt").parent
    if folder.exists() and not config.resume:
        raise UserError(f"{folder} exists: choose another --out, or --resume {folder}/last.pt")
    run = Run(replace(config, out=str(folder)), method)
    config, objective = run.config, run.objective
    state = run.restore(config.resume) if config.resume else {"rows": [], "step": 0, "losses": 0.0}
    since, rows, noted = state["step"], state["rows"], []
    losses = torch.tensor(state["losses"], device=config.device)
    print(f"{config.model} on {len(run.indices):,} images of {config.data}, {config.img_size} px: "
          f"{config.epochs} epochs of {run.steps} steps, {config.device} {config.amp}, to {folder}")
    if not rows:
        write_file(f"{folder}/source.py", Path(__file__).read_text(), new=not config.resume)
        run.save(**state)  # whatever comes now, the run can go on
        rows.append({"epoch": 0, "step": 0} | monitor("untrained", objective.student, run.images))
    write_file(f"{folder}/config.json", json.dumps(asdict(config), indent=2) + "\n")
    saved = shown = time.time()

    for step, batch in enumerate(noting_signals(run.batches(since), noted), since):
        lr, decay, momentum = config.schedule(step, run.total, run.warmup)
        # 1. Two views of every image, and what the student does not see of the first.
        views = run.views(step, *batch)
        # 2. The student predicts what the teacher says there, and learns from its error.
        losses += run.update_student(step, views, lr, decay)
        # 3. The teacher follows the student.
        if hasattr(objective, "update_teacher"):
            objective.update_teacher(momentum)

        now, done, (epoch, position) = time.time(), step + 1, divmod(step, run.steps)
        stop = noted[0] if noted else int(now - begun > 60 * config.max_minutes)
        if PROCESSES > 1:  # all stop after the same step; on the CPU, so that no GPU is waited for
            agreed = torch.tensor(stop)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            stop = agreed.item()
        save = stop or done == run.total or now - saved > 60 * config.save_minutes
        epoch_ends = position + 1 == run.steps
        if step == 0:
            draw_views(f"{folder}/preview.png", *(x[:8] for x in views[:3]))
        if not (save or epoch_ends or now - shown > 60):
            continue  # only below is the device waited for
        sizes = torch._foreach_norm([losses, *objective.parameters()])
        if not torch.stack(sizes).isfinite().all():
            raise UserError(f"not finite by step {done}: try a lower --lr; last.pt is from before")
        speed = (done - since) * config.batch_size / (now - shown)
        row = {"epoch": epoch + 1, "step": done, "loss": losses.item() / (position + 1), "lr": lr,
               "weight_decay": decay, "ema": momentum, "images_per_s": round(speed, 1)}
        print(f"epoch {epoch + 1} step {done} loss {row['loss']:.4f} {speed:.1f} images/s, "
              f"{(run.total - done) * config.batch_size / speed / 60:.1f} min left", flush=True)
        if epoch_ends:
            if done == run.total or (epoch + 1) % (config.knn_every or math.inf) == 0:
                encoder = getattr(objective, config.which)
                row |= monitor(config.which, encoder, run.images, rows[0])
            rows.append(row)
            write_metrics(f"{folder}/metrics.csv", rows)
            losses = torch.zeros_like(losses)
        since, shown = done, time.time()
        if save:
            run.save(step=done, rows=rows, losses=losses.item())
            saved = now
        if stop and done < run.total:
            print(f"stopped after step {done} of {run.total}; to go on: --resume {folder}/last.pt")
            if stop in SIGNALS:
                raise SystemExit(128 + stop)
            return folder
    print(f"finished {config.epochs} epochs; next: python probe.py --ckpt {folder}/last.pt")
    return folder

# ---- Files -------------------------------------------------------------------------------------
FORMAT = 4  # of last.pt; to be raised when its keys, or their meaning, change
SIGNALS = (signal.SIGINT, signal.SIGTERM)

def write_file(path, content, new=False):
    """Write a text, or what content(file) writes: at any moment the old or the new file is there,
    whole. Raises UserError (disk full; new: its folder exists). Of processes, the first writes."""
    if RANK:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=not new)
        with open(f"{path}.tmp", "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's own
        raise UserError(f"cannot write {path} (what was there is untouched): {error}") from None

def load_checkpoint(path):
    """The dict of a checkpoint; code in it is not run. Raises UserError for any other file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # foreign files raise errors of all kinds
        raise UserError(f"{path}: missing, no checkpoint, cut short, or with code in it") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: of another scott.py; go on with the source.py beside it")
    older = asdict(Config(value_range=[0, 65535]))  # what was, before there was a flag for it
    checkpoint["config"] = older | checkpoint["config"]
    return checkpoint

def noting_signals(batches, noted):
    """The batches; meanwhile SIGNALS do not end the program, but are added to the list `noted`."""
    before = {n: signal.signal(n, lambda number, _: noted.append(number)) for n in SIGNALS}
    try:
        yield from batches
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# ---- Command line ------------------------------------------------------------------------------
FREE = ("root", "device", "workers", "cache_gib", "grad_accum_steps", "which", "knn_every",
        "save_minutes", "max_minutes", "resume")  # may change when a run goes on

def parse_config(argv=None, cls=Config):
    """Command line -> `cls`, a dataclass: its defaults, the demo's preset, then the flags that were
    given; to go on, the settings of that run. Raises UserError if a flag would make it another."""
    parser = ArgumentParser(description=sys.modules[cls.__module__].__doc__,
                            formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}; see --help\n")
    sources = "\n".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    helps = dict(re.findall(r"^ +(\w+): .*?  # (.*)$", sources, re.MULTILINE))
    for item in fields(cls):
        kind = item.type  # of "kind | None" and "tuple[kind, ...]" the kind
        if get_origin(kind) not in (None, Literal):
            kind = get_args(kind)[0]
        how = {"choices": get_args(kind)} if get_origin(kind) is Literal else {"type": kind}
        if kind is bool:
            how = {"action": BooleanOptionalAction}
        elif isinstance(item.default, tuple):
            how["nargs"] = "+"
        default = "" if item.default in (None, ()) else f" (default: {item.default})"
        how["help"] = helps[item.name] + default
        parser.add_argument(f"--{item.name.replace('_', '-')}", **how)
    given = vars(parser.parse_args(argv))
    if "resume" not in given:
        is_demo = issubclass(cls, Config) and given.get("data", cls.data) == "demo"
        return cls(**cls.demo | given if is_demo else given)
    saved = load_checkpoint(given["resume"])["config"]
    other = [f"--{name.replace('_', '-')} {saved.get(name)}" for name, value in given.items()
             if name not in FREE and value != saved.get(name)
             and not (name == "epochs" and value > saved[name])]  # longer is fine
    if other:
        raise UserError(f"{given['resume']}: its run has {', '.join(other)}; start a new one")
    names = saved.keys() & helps.keys() - {"max_minutes"}
    return cls(**{name: saved[name] for name in names} | given)

def check_ranges(config):
    """Raises UserError for a negative number, a share above 1, or none of what has to be some."""
    for item in fields(config):
        value, default = getattr(config, item.name), item.default
        low = int(type(default) is int and default > 0)
        high = 1 if type(default) is float and default <= 1 else math.inf
        if type(value) in (int, float) and not low <= value <= high:
            raise UserError(f"--{item.name.replace('_', '-')} {value}: not from {low} to {high}")

def resolve(config):
    """Check every setting, and settle what was left open (None, "auto"). Raises UserError."""
    check_ranges(config)
    patches, shares = (config.img_size // 16) ** 2, PROCESSES * config.grad_accum_steps
    if config.img_size % 16:
        raise UserError(f"--img-size {config.img_size}: must be a multiple of the patch size, 16")
    if not 0 < int(config.mask_ratio * patches) < patches:
        raise UserError(f"--mask-ratio {config.mask_ratio}: hides none or all of {patches} patches")
    if config.batch_size % shares:
        raise UserError(f"--batch-size {config.batch_size}: no multiple of {shares}, its parts")
    linux, gpu = sys.platform == "linux", f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's
    auto = gpu if torch.cuda.is_available() else "cpu"
    device = {"auto": auto, "cuda": gpu, "cuda:0": gpu}.get(config.device, config.device)
    try:
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    bf16 = linux and "bf16" in Path("/proc/cpuinfo").read_text()  # AVX512-BF16, AMX, ARM
    if "cuda" in device:
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    settled = {"amp": "bf16" if bf16 else "fp32", "knn_every": max(1, config.epochs // 10),
               "workers": 0 if not linux else 1 if device == "cpu" else min(16, os.cpu_count()),
               "warmup_epochs": min(40, config.epochs * 40 / 300)}
    given = {name: value for name, value in asdict(config).items() if value not in (None, "auto")}
    return replace(config, **{**settled, **given, "device": device})

def main(argv=None, run=train, cls=Config):
    """The command line of a program, `run(cls)`; returns the exit code."""
    if sys.platform == "linux":  # keep freed memory: fresh pages are a fifth of a CPU's step
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    try:
        run(parse_config(argv, cls))
    except UserError as error:
        text = str(error).split("UserError: ")[-1].strip()  # of a loader process: without its trace
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing to save beyond what is on disk", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
