"""I-JEPA, CAPI and Bootleg in the training loop of scott.py: what the three share.

A method is a `Config`, whose `paper` says what its paper sets, and an objective, a subclass of
`scott.MIMJEPA` with its own masks, predictor, targets and loss, whose `departures` says what is
other than in the paper. A mask is boolean, True = hidden from the student; `visible` and `targets`
are indices of patches.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import scott

@dataclass
class Config(scott.Config):
    """The flags of scott.py, with a recipe: the method's own optimiser and views, or MIM-JEPA's.
    Masks, predictor, targets, loss and teacher momentum are the method's own in both."""
    model: str = "vit-12/16"  # scott- or vit- and tiny, 3, 7, 9 or 12 /16
    registers: int = 0  # learnable tokens beside the patches
    recipe: Literal["paper", "controlled"] = "paper"  # whose optimiser and views: own, MIM-JEPA's
    crop_scale: float | None = None  # smallest crop, share of the area (default: by --recipe)
    views: Literal["different", "same", "none"] | None = None  # colours (default: by --recipe)
    flip_prob: float | None = None  # probability of a horizontal flip (default: by --recipe)
    dropout: float | None = None  # after positions and attention (default: by --recipe)
    attention_dropout: float | None = None  # on the attention weights (default: by --recipe)
    drop_path: float | None = None  # stochastic depth, last block (default: by --recipe)
    lr: float | None = None  # peak learning rate (default: by --recipe)
    lr_start: float | None = None  # learning rate of the first step (default: by --recipe)
    lr_end: float | None = None  # learning rate of the last step (default: by --recipe)
    lr_flat: float | None = None  # share of the steps at the peak (default: by --recipe)
    warmup_epochs: float | None = None  # before the peak (default: by --recipe)
    beta2: float | None = None  # AdamW's memory of squared gradients (default: by --recipe)
    wd_start: float | None = None  # weight decay of the first step (default: by --recipe)
    wd_end: float | None = None  # weight decay of the last step (default: by --recipe)
    unused = ()  # flags of scott.py that mean nothing to the method
    demo = {name: scott.Config.demo[name] for name in
            ("model", "img_size", "which", "epochs", "batch_size")}  # the rest is the recipe's

    def paper(self):
        """{flag: value} of the method's own recipe."""
        raise NotImplementedError

    def settled(self):
        """The config with every flag that --recipe decides. Raises UserError for unused flags."""
        for name in self.unused:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                raise scott.UserError(f"--{name.replace('_', '-')} {value}: this method has no use "
                                      "for it; leave it out")
        values = asdict(scott.Config())
        if self.recipe == "paper":
            values |= self.paper()
        elif self.data == "demo":  # as `python scott.py`, which it is to be compared with
            values |= scott.Config.demo
        names = [item.name for item in fields(Config) if item.default is None]
        missing = [name for name in names if getattr(self, name) is None]
        return replace(self, **{name: values[name] for name in missing})

def run(config, objective, name):
    """Train `objective(encoder, config)` as the command line says; returns the run's folder. Raises
    `scott.UserError`."""
    config = config.settled()
    shared = {item.name: getattr(config, item.name) for item in fields(scott.Config)}
    scott.check_ranges(scott.Config(**shared))  # where our default is None, only it knows a range
    data, model = Path(config.data).resolve().name, config.model.replace("/", "-")
    out = config.out or f"runs/{data}-{name}-{model}"

    def build(encoder, config):
        method = objective(encoder, config)
        if config.data == "demo":
            print(f"{name}: the demo sets", ", ".join(map(str, config.demo)))
        for text in method.departures():
            print(f"{name}, other than in its paper: {text}")
        return method

    return scott.train(replace(config, out=out), build)

def add_registers(encoder, tokens):
    """Tokens (B, N, D) with the encoder's R registers in front: (B, R + N, D)."""
    if encoder.registers is None:
        return tokens
    return torch.cat([encoder.registers.expand(len(tokens), -1, -1), tokens], 1)

def encode_visible(encoder, images, mask, visible):
    """What `encoder` says of images (B, 3, H, W) of which it gets the patches visible (B, K) alone;
    mask (B, N) bool: what its tokenizer must not see -> (B, R + K, D), the R registers first."""
    tokens = encoder.embed(images, mask).take_along_dim(visible[..., None], 1)
    tokens = encoder.blocks(add_registers(encoder, tokens))
    return F.layer_norm(tokens, (encoder.embed_dim,))
