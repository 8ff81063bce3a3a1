"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture.

Assran et al., CVPR 2023, arXiv 2301.08243, whose section numbers are given; [code]: not in the text
but in the authors' released code.

    python -m baselines.ijepa --data flowers102 --root data    # and any flag of scott.py

How it differs from MIM-JEPA:
- The student encodes the visible patches only, without mask tokens.
- Four target blocks are predicted, each on its own, from one large context block without them;
  patches in neither are used by neither.
- The predictor is a narrow transformer; its mask tokens say where, by their position.
- One view, without flips and colours.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import scott

@dataclass
class Config(baselines.Config):
    """Defaults of the ViT-S/16 of I-JEPA's recipe; its learning rate grows with the batch."""
    mask: Literal["multi-block"] = "multi-block"  # how patches are hidden
    mask_ratio: float = 0.6  # not used: the blocks decide
    predictor_depth: int | None = None  # blocks (default: half of the encoder's)
    loss: Literal["smooth-l1", "l2"] = "smooth-l1"  # smooth-l1 [code], or l2 as in sec. 3
    unused = ("mask_ratio",)

    def paper(self):
        lr = 1e-3 * self.batch_size / 2048 if self.lr is None else self.lr
        return dict(crop_scale=0.3, views="none", flip_prob=0.0, dropout=0.0, drop_path=0.0,
                    attention_dropout=0.0, lr=lr, lr_start=lr / 5, lr_end=lr / 1000, lr_flat=0.0)

# ---- Masks (sec. 3, Figure 4) ------------------------------------------------------------------
def uniform(low, high, generator):
    """A number from [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()

def block_size(area, aspect, grid):
    """(height, width) in patches of a block of that area and height / width, inside the grid."""
    sizes = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return tuple(min(max(1, round(size)), *grid) for size in sizes)

def draw_size(draw, grid, shares, tries=100):
    """The first (height, width) of draw() whose share of the image is within `shares` (lowest,
    highest): what the paper's sampler leaves after rounding on its 14 x 14 patches. On a grid that
    has none, the closest of so many."""
    def excess(size):
        share = math.prod(size) / math.prod(grid)
        return max(shares[0] - share, share - shares[1], 0.0)

    sizes = []
    while len(sizes) < tries and (not sizes or excess(sizes[-1])):
        sizes.append(draw())
    return min(sizes, key=excess)

def place_blocks(count, grid, sizes, side, order, smallest, generator):
    """The masks of `count` images: visible (B, K) and targets (B, M, T), indices of patches.
    sizes: (height, width) of the M target blocks, of equal area T; side: of the square context;
    all lie anywhere in the grid. Visible is the context without the targets, redrawn if it has
    fewer than `smallest` patches. The image with the fewest gives K: the others keep the first K
    of the order (indices) that order(rows, columns) puts them in."""
    height, width = grid
    patches = torch.arange(height * width).view(grid)

    def place(h, w):
        y = int(torch.randint(height - h + 1, (), generator=generator))
        x = int(torch.randint(width - w + 1, (), generator=generator))
        return patches[y : y + h, x : x + w].flatten()

    visible, targets = [], []
    while len(visible) < count:
        blocks = torch.stack([place(h, w) for h, w in sizes])
        context = place(side, side)
        context = context[~torch.isin(context, blocks)]
        if len(context) >= smallest:
            visible.append(context[order(context // width, context % width)])
            targets.append(blocks)
    shortest = min(map(len, visible))
    visible = [kept[:shortest].sort().values for kept in visible]
    return torch.stack(visible), torch.stack(targets)

def smallest_context(patches):
    """10 of 196 patches [code], in proportion of others."""
    return max(1, round(10 * patches / 196))

SHARES = (25 / 196, 42 / 196)  # of the image: the smallest and largest target on 14 x 14 patches

def multi_block(count, grid, generator):
    """Four target blocks of 15 to 20 % of the image and aspect 0.75 to 1.5, a context of 85 to
    100 %; the sizes are one draw a batch [code]. Not as the released code, whose sampler uses one
    number for scale and aspect, never reaches the last row and column, and drops the surplus at
    the bottom: here all draws are independent, on the whole grid, and the surplus is random."""
    patches = math.prod(grid)

    def draw():
        area = patches * uniform(0.15, 0.2, generator)
        return block_size(area, uniform(0.75, 1.5, generator), grid)

    size = draw_size(draw, grid, SHARES)
    side, _ = block_size(patches * uniform(0.85, 1.0, generator), 1.0, grid)

    def anyhow(rows, columns):
        return torch.randperm(len(rows), generator=generator)

    return place_blocks(count, grid, [size] * 4, side, anyhow, smallest_context(patches), generator)

# ---- Method (sec. 3) ---------------------------------------------------------------------------
def gather(tokens, targets):
    """Of tokens (B, N, D), those at targets (B, M, T): (B, M, T, D)."""
    rows = tokens.take_along_dim(targets.flatten(1)[..., None], 1)
    return rows.unflatten(1, targets.shape[1:])

class NarrowPredictor(nn.Module):
    """What the visible tokens say of each target block, alone, in a transformer `width` wide.
    forward(context (B, R + K, dim), visible (B, K), targets (B, M, T), grid) -> (B, M, T, out).
    Of the R tokens without a place it gets the first `class_tokens`; registers: its own."""
    def __init__(self, dim, out, width, depth, num_heads, class_tokens=0, registers=0, **options):
        super().__init__()
        self.width, self.class_tokens = width, class_tokens
        self.embed, self.head = nn.Linear(dim, width), nn.Linear(width, out)
        for layer in (self.embed, self.head):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mask_token = nn.Parameter(torch.randn(width) / 50)
        self.registers = nn.Parameter(torch.randn(registers, width) / 50) if registers else None
        self.blocks = scott.make_blocks(depth, width, num_heads, **options)

    def forward(self, context, visible, targets, grid):
        positions = scott.sincos_positions(*grid, self.width, context.device)
        patches = context[:, -visible.shape[1] :]
        parts = [self.embed(patches) + positions[visible]]
        if self.class_tokens:
            parts = [self.embed(context[:, : self.class_tokens]), *parts]
        if self.registers is not None:
            parts = [self.registers.expand(len(context), -1, -1), *parts]
        seen = torch.cat(parts, 1).repeat_interleave(targets.shape[1], 0)
        wanted = (self.mask_token + positions[targets]).flatten(0, 1)
        x = self.blocks(torch.cat([seen, wanted], 1))
        x = x[:, -targets.shape[2] :]  # (B M, T, width)
        x = self.head(F.layer_norm(x, (self.width,)))
        return x.unflatten(0, targets.shape[:2])

class IJEPA(scott.MIMJEPA):
    """Predict blocks of the teacher's output from the patches that the student sees.
    encoder: `scott.ViT`; config: a settled `Config`; layers: of the teacher, that are predicted;
    depth: the predictor's, as a share of the encoder's; predictor: further options of its own."""
    draw_blocks, shares = staticmethod(multi_block), SHARES

    def __init__(self, encoder, config, layers=1, depth=1 / 2, **predictor):
        super().__init__(encoder, predictor_depth=0)  # it gets another predictor
        self.student.mask_token.requires_grad_(False)  # not used: what is hidden is left out
        self.config = config
        dim, depth = encoder.embed_dim, math.ceil(depth * len(encoder.blocks))
        depth = depth if config.predictor_depth is None else config.predictor_depth
        options = {"num_heads": encoder.num_heads} | encoder.block_options | predictor
        self.predictor = NarrowPredictor(dim, dim * layers, dim // 2, depth, **options)

    def departures(self):
        """What is not as in the paper, and why: texts."""
        side = self.config.img_size // 16
        if side != 14:
            smallest = smallest_context(side**2)
            yield f"a context of at least {smallest} of {side**2} patches, not 10 of 196"
        yield from self.block_departures((side, side))

    def block_departures(self, grid):
        """Texts, if the grid has no block of the size that the paper asks for."""
        *_, targets = self.draw_blocks(1, grid, torch.Generator().manual_seed(0))
        patches, (low, high) = math.prod(grid), self.shares
        if not low <= targets.shape[-1] / patches <= high:
            yield (f"target blocks of {targets.shape[-1]} of {patches} patches, "
                   f"{targets.shape[-1] / patches:.0%}, not {low:.0%} to {high:.0%}")

    def draw_masks(self, count, grid, generator):
        """Of the images of a batch, whose blocks have one size: hidden (B, N) bool, and the indices
        visible (B, K) and targets (B, M, T)."""
        visible, targets = self.draw_blocks(count, grid, generator)
        hidden = torch.ones(count, math.prod(grid), dtype=torch.bool)
        return hidden.scatter(1, visible, False), visible, targets

    def target(self, images):
        """What the teacher, which sees all of the images, says of each patch: (B, N, D)."""
        return self.teacher.eval()(images)

    def loss(self, prediction, target):
        """(B, M, T, D) each; l2: the sum over a block, the mean over blocks (sec. 3, Loss)."""
        if self.config.loss == "l2":
            return (prediction - target).square().sum((-1, -2)).mean()
        return F.smooth_l1_loss(prediction, target)

    def forward(self, view_a, view_b, hidden, visible, targets):
        """Views (B, 3, H, W), and what `draw_masks` returns -> loss."""
        with torch.no_grad():
            target = gather(self.target(view_b), targets)
        context = baselines.encode_visible(self.student, view_a, hidden, visible)
        prediction = self.predictor(context, visible, targets, scott.grid_of(view_a))
        return self.loss(prediction.float(), target.float())

def main(argv=None):
    """The command line; returns the exit code."""
    return scott.main(argv, lambda config: baselines.run(config, IJEPA, "ijepa"), Config)

if __name__ == "__main__":
    sys.exit(main())
