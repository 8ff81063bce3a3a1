"""CAPI: Cluster and Predict Latent Patches for Improved Masked Image Modeling.

Darcet et al., 2025, arXiv 2502.08769, whose section, equation and table numbers are given; [code]:
not in the text but in the authors' released code.

    python -m baselines.capi --data flowers102 --root data    # and any flag of scott.py

How it differs from MIM-JEPA:
- What is predicted is not a vector but a cluster: the teacher's tokens are assigned to prototypes,
  softly, by an online clustering that has a loss of its own.
- The student sees one block of patches and 16 registers, without mask tokens.
- The predictor asks the student's tokens by cross-attention, each position on its own.
- The teacher's momentum is 1 - learning rate.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import ops

import baselines
import scott

@dataclass
class Config(baselines.Config):
    """Defaults of Tables 6 and 8, but for the size of the clustering."""
    mask: Literal["rolled-block"] = "rolled-block"  # how patches are hidden
    mask_ratio: float = 0.65  # share of the patches hidden from the student
    registers: int = 16  # learnable tokens beside the patches
    predictor_depth: int | None = None  # blocks (default: half of the encoder's, at least 2)
    prototypes: int | None = None  # clusters (default: 4 an image of a step, at most 16384)
    predictions: int = 7  # hidden patches that are predicted, an image
    ema_start: float | None = None  # teacher momentum at the peak (default: 1 - learning rate)
    ema_end: float = 1.0  # not used: the momentum has no schedule of its own
    sinkhorn: Literal["positionwise", "global"] = "positionwise"  # over what clusters are balanced
    unused = ("ema_end",)

    def paper(self):
        lr = 1e-3 if self.lr is None else self.lr
        return dict(crop_scale=0.6, views="none", dropout=0.0, attention_dropout=0.0, drop_path=0.2,
                    lr=lr, lr_start=0.0, lr_end=0.0, lr_flat=0.0, beta2=0.95, wd_start=0.1,
                    wd_end=0.1, warmup_epochs=0.1 * self.epochs)

    def settled(self):
        if self.grad_accum_steps > 1:
            raise scott.UserError("--grad-accum-steps: CAPI's clusters are balanced over all "
                                  "images of a step, so it cannot be done in parts; use 1")
        config = super().settled()
        config.prototypes = self.prototypes or min(16384, 4 * self.batch_size)
        return config

    def schedule(self, step, total, warmup):
        """As in `scott.Config`, but the momentum is 1 - lr (sec. 4.1), or `ema_start` at the peak
        (Table 8), from where it moves to 1 as the rate to 0 [code]; and with the paper's recipe
        the run ends before the last fifth of the cosine (Table 6)."""
        whole = 1 + warmup + 1.25 * (total - 1 - warmup) if self.recipe == "paper" else total
        lr = scott.lr_schedule(step, whole, warmup, self.lr_start, self.lr, self.lr_end,
                               self.lr_flat)
        decay = scott.linear(step, total, self.wd_start, self.wd_end)
        fastest = self.lr if self.ema_start is None else 1 - self.ema_start
        return lr, decay, 1 - fastest * lr / (self.lr or 1)

def rolled_block_mask(grid, ratio=0.65, generator=None):
    """Hidden patches, (Gh, Gw) bool: all but one block, of aspect 1/2 to 2 [code], whose excess is
    cut off at its lower right end (App. C), rolled around both axes (sec. 4.2)."""
    height, width = grid
    count = height * width - int(ratio * height * width)
    aspect = 2 ** (2 * torch.rand((), generator=generator).item() - 1)
    h = min(max(round(math.sqrt(count * aspect)), math.ceil(count / width)), height)
    w = math.ceil(count / h)
    mask = torch.ones(grid, dtype=torch.bool)
    mask[:h, :w] = (torch.arange(h * w) >= count).view(h, w)
    down, right = (int(torch.randint(n, (), generator=generator)) for n in grid)
    return mask.roll((down, right), (0, 1))  # so it does not matter where the block was

def sinkhorn(logits, positionwise=True, iterations=3):
    """Assignments (B, N, P) that use all clusters alike, from logits (B, N, P) / temperature: by
    turns, a cluster's shares sum to 1 over the batch, at each position or over all (Figure 11),
    and a token's over the clusters. In float32, without a gradient, over all processes."""
    def total(x, how, op):
        x = how(x, (0,) if positionwise else (0, 1), keepdim=True)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(x, op)
        return x

    logits = logits.detach().float()
    m = (logits - total(logits, torch.amax, torch.distributed.ReduceOp.MAX)).exp()
    tiny = torch.finfo(m.dtype).tiny  # a token far from all clusters is assigned to none
    for _ in range(iterations):
        m = m / total(m, torch.sum, torch.distributed.ReduceOp.SUM)
        m = m / m.sum(-1, keepdim=True).clamp_min(tiny)
    return m

class CrossAttention(nn.Module):
    """Queries (B, Q, D) gather a context (B, K, D), without bias -> (B, Q, D). The keys know where
    their tokens are, by the positions (B, K, D); the values do not."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, context, positions):
        parts = self.q(x), self.k(context + positions), self.v(context)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts]
        x = F.scaled_dot_product_attention(*heads)
        return self.proj(x.transpose(1, 2).flatten(2))

class CrossBlock(nn.Module):
    """Cross-attention and feed-forward, pre-norm, no self-attention: (B, Q, D) -> (B, Q, D)."""
    def __init__(self, dim, num_heads, layer=1, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.attention, self.ffn = CrossAttention(dim, num_heads), scott.SwiGLU(dim)
        for name, weight in self.named_parameters():
            nn.init.trunc_normal_(weight, std=0.02)
            weight.data /= math.sqrt(2 * layer) if name.endswith("proj.weight") else 1

    def forward(self, x, context, positions):
        drop = partial(ops.stochastic_depth, p=self.drop_path, mode="row", training=self.training)
        x = x + drop(self.attention(F.layer_norm(x, x.shape[-1:]), context, positions))
        return x + drop(self.ffn(F.layer_norm(x, x.shape[-1:])))

class CosineHead(nn.Linear):
    """Cosines of (..., D) with P rows, each times a trainable scale: (..., P) [code]. The rows
    start short, of std 0.02: AdamW moves a weight by the learning rate, whatever the row's length,
    so it would hardly turn long ones."""
    def __init__(self, dim, prototypes):
        super().__init__(dim, prototypes, bias=False)
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.scale = nn.Parameter(torch.ones(prototypes))

    def forward(self, x):
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))

class Predictor(nn.Module):
    """The student's R registers and tokens of the visible (B, K) patches, (B, R + K, D), of the
    wanted (B, Q) ones -> logits of clusters (B, Q, P), each on its own (sec. 3.2)."""
    def __init__(self, dim, depth, num_heads, prototypes, drop_path=0.0):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(dim) / 50)
        blocks = [CrossBlock(dim, num_heads, i, drop_path) for i in range(1, depth + 1)]
        self.blocks, self.head = nn.ModuleList(blocks), CosineHead(dim, prototypes)

    def forward(self, context, visible, wanted, grid):
        positions = scott.sincos_positions(*grid, context.shape[-1], context.device)
        x, registers = self.mask_token + positions[wanted], context.shape[1] - visible.shape[1]
        keys = F.pad(positions[visible], (0, 0, registers, 0))  # registers have no place
        for block in self.blocks:
            x = block(x, context, keys)
        return self.head(x)

class CAPI(scott.MIMJEPA):
    """Predict the cluster of the teacher's token where the student sees nothing (sec. 3).
    encoder: `scott.ViT`; config: a settled `Config`."""
    def __init__(self, encoder, config):
        super().__init__(encoder, predictor_depth=0)  # it gets another predictor
        self.student.mask_token.requires_grad_(False)  # not used: what is hidden is left out
        self.config, dim = config, encoder.embed_dim
        depth = config.predictor_depth or max(2, len(encoder.blocks) // 2)
        heads, rate = encoder.num_heads, config.drop_path
        self.predictor = Predictor(dim, depth, heads, config.prototypes, rate)
        for block in self.student.blocks:
            block.drop_path = rate  # constant, not linear [code]
        self.prototypes = nn.Linear(dim, config.prototypes, bias=False)
        nn.init.normal_(self.prototypes.weight)  # [code]

    def draw_masks(self, count, grid, generator):
        """Of the images of a batch: what is hidden from the student, (B, N) bool, and the indices
        (B, Q) of the hidden patches that are predicted."""
        ratio = self.config.mask_ratio
        masks = [rolled_block_mask(grid, ratio, generator).flatten() for _ in range(count)]
        hidden = torch.stack(masks)
        order = torch.rand(hidden.shape, generator=generator).masked_fill(~hidden, -1)
        return hidden, order.topk(min(self.config.predictions, int(hidden[0].sum()))).indices

    def parameter_groups(self):
        """For AdamW: with shares of the learning rate (Table 6)."""
        prototypes = self.prototypes.weight
        tokenizer = list(self.student.tokenizer.parameters())
        special = {id(weight) for weight in [prototypes, *tokenizer]}
        rest = [weight for weight in self.parameters() if id(weight) not in special]
        scale = 0.2 if self.config.recipe == "paper" else 1.0
        clustering = {"params": [prototypes], "decayed": 0.1, "lr_scale": 0.5}  # a tenth: [code]
        slow = scott.parameter_groups(tokenizer, scale)
        return [*scott.parameter_groups(rest), *slow, clustering]

    def departures(self):
        """What is not as in the paper, and why: texts."""
        config, patches = self.config, (self.config.img_size // 16) ** 2
        if config.prototypes != 16384:
            yield f"{config.prototypes} clusters, for {config.batch_size} images a step, not 16384"
        if config.recipe == "paper":
            yield f"learning rate {config.lr:g} at any batch size, the paper has one, 16384"
        if int(config.mask_ratio * patches) < config.predictions:
            yield f"all {int(config.mask_ratio * patches)} hidden patches predicted, not 7"

    def forward(self, view_a, view_b, mask, wanted):
        """Views (B, 3, H, W), and what `draw_masks` returns -> loss."""
        hidden = int(self.config.mask_ratio * mask.shape[1])
        visible = mask.int().argsort(dim=1, stable=True)[:, : mask.shape[1] - hidden]
        with torch.no_grad():
            tokens = self.teacher.eval()(view_b).float()
        context = baselines.encode_visible(self.student, view_a, mask, visible)
        prediction = self.predictor(context, visible, wanted, scott.grid_of(view_a)).float()
        with torch.autocast(mask.device.type, enabled=False):  # of clusters, in float32
            logits = self.prototypes(F.normalize(tokens, dim=-1))  # (B, N, P) (Eq. 1)
            targets = sinkhorn(logits / 0.06, self.config.sinkhorn == "positionwise")  # (Eq. 4)
            clustering = cross_entropy(targets, logits / 0.12)  # trains the prototypes only
            targets = targets.take_along_dim(wanted[..., None], 1)
            return clustering + cross_entropy(targets, prediction / 0.12)

def cross_entropy(targets, logits):
    """Mean over all but the last dimension; targets: probabilities (Eq. 5)."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()

def main(argv=None):
    """The command line; returns the exit code."""
    return scott.main(argv, lambda config: baselines.run(config, CAPI, "capi"), Config)

if __name__ == "__main__":
    sys.exit(main())
