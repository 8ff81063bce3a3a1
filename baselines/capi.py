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
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import scott

@dataclass
class Config(baselines.Config):
    """Defaults of Tables 6 and 8, but for the size of the clustering."""
    mask: Literal["rolled-block"] = "rolled-block"  # how patches are hidden
    mask_ratio: float = 0.65  # share of the patches hidden from the student
    registers: int = 16  # learnable tokens beside the patches
    predictor_depth: int | None = None  # blocks (default: half of the encoder's, at least 2)
    prototypes: int | None = None  # clusters (default: 512, or 4 an image of a larger batch)
    predictions: int = 7  # hidden patches that are predicted, an image
    ema_start: float = 0.996  # not used: the momentum is 1 - learning rate
    ema_end: float = 1.0  # not used: the momentum is 1 - learning rate
    sinkhorn: Literal["positionwise", "global"] = "positionwise"  # over what clusters are balanced
    unused = ("ema_start", "ema_end")

    def paper(self):
        return dict(crop_scale=0.6, views="none", dropout=0.0, attention_dropout=0.0, drop_path=0.2,
                    lr=1e-3, lr_start=0.0, lr_end=0.0, lr_flat=0.0, beta2=0.95, wd_start=0.1,
                    wd_end=0.1, warmup_epochs=0.1 * self.epochs)

    def settled(self):
        if self.grad_accum_steps > 1:
            raise scott.UserError("--grad-accum-steps: CAPI's clusters are balanced over all "
                                  "images of a step, so it cannot be done in parts; use 1")
        config = super().settled()
        size = 512 if self.batch_size <= 256 else min(16384, 4 * self.batch_size)
        config.prototypes = self.prototypes or size
        return config

    def schedule(self, step, total, warmup):
        """As in `scott.Config`, but the momentum is 1 - lr (sec. 4.1), and with the paper's recipe
        the run ends before the last fifth of the cosine (Table 6)."""
        lr, decay, _ = super().schedule(step, total, warmup)
        if self.recipe == "paper":
            whole = 1 + warmup + 1.25 * (total - 1 - warmup)
            lr = scott.lr_schedule(step, whole, warmup, self.lr_start, self.lr, self.lr_end,
                                   self.lr_flat)
        return lr, decay, 1 - lr

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
    """Queries (B, Q, D) gather a context (B, K, D), without bias -> (B, Q, D)."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = (nn.Linear(dim, n * dim, bias=False) for n in (1, 2, 1))

    def forward(self, x, context):
        k, v = self.kv(context).chunk(2, -1)
        heads = [y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), k, v)]
        x = F.scaled_dot_product_attention(*heads)
        return self.proj(x.transpose(1, 2).flatten(2))

class CrossBlock(nn.Module):
    """Cross-attention and feed-forward, pre-norm, no self-attention: (B, Q, D) -> (B, Q, D)."""
    def __init__(self, dim, num_heads, layer=1):
        super().__init__()
        self.attention, self.ffn = CrossAttention(dim, num_heads), scott.SwiGLU(dim)
        for name, weight in self.named_parameters():
            nn.init.trunc_normal_(weight, std=0.02)
            weight.data /= math.sqrt(2 * layer) if name.endswith("proj.weight") else 1

    def forward(self, x, context):
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]), context)
        return x + self.ffn(F.layer_norm(x, x.shape[-1:]))

class Predictor(nn.Module):
    """The student's tokens (B, K, D), of `wanted` (B, Q) positions -> logits of clusters (B, Q, P),
    each position on its own (sec. 3.2)."""
    def __init__(self, dim, depth, num_heads, prototypes):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(dim) / 50)
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads, i + 1) for i in range(depth))
        self.head = nn.Linear(dim, prototypes, bias=False)
        nn.init.normal_(self.head.weight)

    def forward(self, context, wanted, grid):
        positions = scott.sincos_positions(*grid, context.shape[-1], context.device)
        x = self.mask_token + positions[wanted]
        for block in self.blocks:
            x = block(x, context)
        return F.normalize(x, dim=-1) @ F.normalize(self.head.weight, dim=-1).T  # cosines [code]

class CAPI(scott.MIMJEPA):
    """Predict the cluster of the teacher's token where the student sees nothing (sec. 3).
    encoder: `scott.ViT`; config: a settled `Config`."""
    def __init__(self, encoder, config):
        super().__init__(encoder, predictor_depth=0)  # it gets another predictor
        self.student.mask_token.requires_grad_(False)  # not used: what is hidden is left out
        self.config, dim = config, encoder.embed_dim
        depth = config.predictor_depth or max(2, len(encoder.blocks) // 2)
        self.predictor = Predictor(dim, depth, encoder.num_heads, config.prototypes)
        self.prototypes = nn.Linear(dim, config.prototypes, bias=False)
        nn.init.normal_(self.prototypes.weight)  # [code]

    def draw_masks(self, count, grid, generator):
        """What is hidden from the student in each image of a batch: (B, N) bool."""
        ratio = self.config.mask_ratio
        masks = [rolled_block_mask(grid, ratio, generator).flatten() for _ in range(count)]
        return (torch.stack(masks),)

    def parameter_groups(self):
        """For AdamW: with shares of the learning rate (Table 6)."""
        prototypes = [self.prototypes.weight]
        tokenizer = list(self.student.tokenizer.parameters())
        special = {id(weight) for weight in prototypes + tokenizer}
        rest = [weight for weight in self.parameters() if id(weight) not in special]
        scale = 0.2 if self.config.recipe == "paper" else 1.0
        return [*scott.parameter_groups(rest), *scott.parameter_groups(prototypes, 0.5),
                *scott.parameter_groups(tokenizer, scale)]

    def departures(self):
        """What is not as in the paper, and why: texts."""
        config, patches = self.config, (self.config.img_size // 16) ** 2
        if config.prototypes != 16384:
            yield f"{config.prototypes} clusters, for {config.batch_size} images a step, not 16384"
        if config.recipe == "paper":
            yield f"learning rate {config.lr:g} at any batch size, the paper has one, 16384"
        if int(config.mask_ratio * patches) < config.predictions:
            yield f"all {int(config.mask_ratio * patches)} hidden patches predicted, not 7"

    def forward(self, view_a, view_b, mask):
        """Views (B, 3, H, W), mask (B, N) bool with equally many hidden -> loss."""
        hidden = int(self.config.mask_ratio * mask.shape[1])
        visible = mask.int().argsort(dim=1, stable=True)[:, : mask.shape[1] - hidden]
        wanted = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1)
        wanted = wanted.topk(min(self.config.predictions, hidden), 1).indices
        with torch.no_grad():
            tokens = self.teacher.eval()(view_b).float()
        context = baselines.encode_visible(self.student, view_a, mask, visible)
        prediction = self.predictor(context, wanted, scott.grid_of(view_a)).float()
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
