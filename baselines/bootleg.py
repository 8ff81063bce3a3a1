"""Bootleg: predict what hidden layers of the teacher say, not its output alone.

Lowe et al., 2026, arXiv 2603.15553; its section numbers are given. [ours]: not stated there.

    python -m baselines.bootleg --data flowers102 --root data    # and any flag of scott.py

How it differs from I-JEPA (`ijepa.py`):
- The targets are the outputs of the blocks 1, 4, 8 and 12, each standardised, joined.
- Squared error; a class token and four registers; a deeper predictor with more heads.
- The masks: tall and wide blocks alternate, and what is too much is dropped from a corner.
- The teacher's momentum is constant.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import baselines
import scott
from baselines.ijepa import IJEPA, block_size, draw_size, place_blocks, uniform

@dataclass
class Config(baselines.Config):
    """Defaults of ViT-S/16 (Tables 6 and 7); the learning rate grows with the batch."""
    mask: Literal["alternating-blocks"] = "alternating-blocks"  # how patches are hidden
    mask_ratio: float = 0.6  # not used: the blocks decide
    registers: int = 5  # a class token, and registers
    predictor_depth: int | None = None  # blocks (default: five sixths of the encoder's)
    hidden_targets: bool = True  # blocks 1, 4, 8, 12 as targets, not the last alone
    ema_start: float = 0.9985  # teacher momentum of the first step
    ema_end: float = 0.9985  # teacher momentum of the last step
    unused = ("mask_ratio",)

    def paper(self):
        lr = 3e-3 * self.batch_size / 2048 if self.lr is None else self.lr
        warmup = min(33 + 0.12 * self.epochs, 0.23 * self.epochs)  # alike at 300 epochs
        return dict(crop_scale=0.35, views="none", dropout=0.0, attention_dropout=0.0,
                    drop_path=0.0, lr=lr, lr_start=lr / 30, lr_end=lr / 30, lr_flat=0.0,
                    beta2=0.95, wd_start=0.05, wd_end=0.05, warmup_epochs=warmup)

SHARES = (30 / 196, 36 / 196)  # of the image: the smallest and largest target on 14 x 14 patches

def alternating_blocks(count, grid, generator):
    """Masks (App. C): four target blocks of 16 to 18.3 % of the image (36 of 196 patches [ours]),
    of aspect 2/3 to 3/2, log-uniform [ours], every second one turned; a context of 85 to 100 %. The
    surplus is dropped from one of the four corners inwards, by rows or by columns."""
    height, width = grid
    patches = math.prod(grid)

    def draw():
        area = int(patches * uniform(0.16, 36 / 196, generator))
        return block_size(area, 1.5 ** uniform(-1, 1, generator), grid)

    size = draw_size(draw, grid, SHARES)
    side, _ = block_size(int(patches * uniform(0.85, 1.0, generator)), 1.0, grid)

    def from_corner(rows, columns):
        down, right, by_rows = torch.randint(2, (3,), generator=generator).tolist()
        rows = rows if down else height - 1 - rows
        columns = columns if right else width - 1 - columns
        return torch.argsort(rows * width + columns if by_rows else columns * height + rows)

    return place_blocks(count, grid, [size, size[::-1]] * 2, side, from_corner, 1, generator)

def hidden_layers(depth):
    """Blocks whose outputs are predicted: 1, 4, 8 and 12 of 12, in proportion of others."""
    return sorted({1, round(depth / 3), round(2 * depth / 3), depth} - {0})

def encode_layers(encoder, images, layers):
    """The outputs of the blocks `layers`, from 1, each LayerNormed, joined: (B, N, layers * D)."""
    tokens, outputs = encoder.embed(images), []
    patches = tokens.shape[1]
    tokens = baselines.add_registers(encoder, tokens)
    for layer, block in enumerate(encoder.blocks, 1):
        tokens = block(tokens)
        if layer in layers:
            outputs.append(F.layer_norm(tokens[:, -patches:], (encoder.embed_dim,)))
    return torch.cat(outputs, -1)

class Bootleg(IJEPA):
    """Predict hidden layers of the teacher at target blocks (sec. 4). Of the encoder's registers,
    the first is the class token, which the predictor gets; it has four registers of its own."""
    draw_blocks, shares = staticmethod(alternating_blocks), SHARES

    def __init__(self, encoder, config):
        depth = len(encoder.blocks)
        layers = hidden_layers(depth) if config.hidden_targets else [depth]
        heads = max(16, encoder.num_heads)
        super().__init__(encoder, config, len(layers), 5 / 6, num_heads=heads, class_tokens=1,
                         registers=4)
        self.layers = layers

    def target(self, images):
        """What the layers of the teacher say of each patch: (B, N, layers * D)."""
        return encode_layers(self.teacher.eval(), images, self.layers)

    def departures(self):
        """What is not as in the paper, and why: texts."""
        depth, config = len(self.student.blocks), self.config
        if self.layers != [1, 4, 8, 12]:
            yield f"target blocks {self.layers} of {depth}, not 1, 4, 8, 12 of 12"
        if config.recipe == "paper" and config.warmup_epochs == 0.23 * config.epochs:
            yield (f"warm-up of {config.warmup_epochs:g} epochs, 23 % as in a run of 300, not 33 "
                   "epochs and 12 %")
        yield from self.block_departures((config.img_size // 16,) * 2)

    def loss(self, prediction, target):
        """Mean squared error of (B, M, T, layers * D); predicting 0 costs 1."""
        return F.mse_loss(prediction, target)

def main(argv=None):
    """The command line; returns the exit code."""
    return scott.main(argv, lambda config: baselines.run(config, Bootleg, "bootleg"), Config)

if __name__ == "__main__":
    sys.exit(main())
