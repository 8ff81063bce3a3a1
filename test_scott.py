"""Tests of scott.py and probe.py: behaviour that someone relies on.

`pytest -q test_scott.py` takes about a minute. Slow ones are left out;
`pytest -q test_scott.py -m slow` runs them.
"""

import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image

import probe
import scott
from baselines import bootleg, capi, ijepa

SCOTT = str(Path(scott.__file__).resolve())
TINY = ["--epochs", "1", "--batch-size", "8", "--img-size", "32", "--workers", "0", "--amp", "fp32"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in scott.SIGNALS}
    yield
    for number, handler in handlers.items():  # `main` sets its own
        signal.signal(number, handler)


def tiny_encoder(**options):
    return scott.create_encoder("scott-tiny/16", depth=2, embed_dim=48, num_heads=2, **options)


def random_patch_mask(batch=2, grid=(4, 4), ratio=0.6):
    return torch.stack([scott.random_mask(grid, ratio) for _ in range(batch)])


def save_images(folder, count, size=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{i}.png")


def open_folder(path):
    return scott.open_data(scott.Config(data=str(path)))


# ---- Sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count",
    [
        ("scott-3/16", 6_522_432),
        ("scott-7/16", 13_600_320),
        ("scott-9/16", 17_139_264),
        ("scott-12/16", 22_447_680),
    ],
)
def test_parameter_counts_are_the_papers(name, count):
    encoder = scott.create_encoder(name)
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_patch_embedding_counts_are_within_the_papers_rounding():
    for name, millions in (("vit-7/16", 12.7), ("vit-12/16", 21.5)):
        encoder = scott.create_encoder(name)
        count = sum(p.numel() for p in encoder.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", ["scott-tiny/16", "vit-tiny/16"])
def test_vit_takes_any_size_divisible_by_16(name):
    encoder = scott.create_encoder(name).eval()
    for height, width in ((96, 96), (48, 160), (224, 32)):
        tokens = encoder(torch.randn(1, 3, height, width))
        assert tokens.shape == (1, height // 16 * (width // 16), 192)
        assert tokens.mean(-1).abs().max() < 1e-4  # the output is LayerNormed
    with pytest.raises(ValueError, match="divisible by 16"):
        encoder(torch.randn(1, 3, 100, 96))


def test_a_position_depends_on_row_and_column_alone():
    small, large = scott.sincos_positions(2, 3, 48), scott.sincos_positions(4, 5, 48)
    assert small.shape == (6, 48)
    assert torch.equal(small.view(2, 3, 48), large.view(4, 5, 48)[:2, :3])
    assert len(torch.unique(large, dim=0)) == 20


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(scott.UserError, match="scott-12/16"):
        scott.create_encoder("scott-13/16")


# ---- Sparse layers: the properties of mask and renormalise -------------------------------------

LAYERS = {
    "conv": lambda **kw: scott.SparseConv2d(3, 5, 7, 2, 3, **kw),
    "pool": lambda **kw: scott.SparseMaxBlurPool2d(3),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_without_hidden_patches_a_sparse_layer_is_the_dense_one(layer, size):
    sparse = LAYERS[layer]()
    x = torch.randn(2, 3, *size)
    mask = torch.zeros(2, 1, size[0] // 8, size[1] // 8, dtype=torch.bool)
    if layer == "conv":
        dense = F.conv2d(x, sparse.weight, stride=2, padding=3)
    else:
        kernel = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16
        kernel = kernel.expand(3, 1, 3, 3)
        dense = F.conv2d(F.max_pool2d(x, 2, 1), kernel, stride=2, padding=1, groups=3)
    assert torch.allclose(sparse(x), dense, atol=1e-6)
    assert torch.equal(sparse(x, mask), sparse(x))
    assert torch.equal(sparse(x), dense) or layer == "pool"  # which adds up in another order


def test_the_sparse_layers_keep_the_layout_of_their_input(monkeypatch):
    """Lost once, it cost a CPU a third of a step: masked_fill turns channels-last into another."""
    seen = []
    for name in ("conv2d", "max_pool2d", "avg_pool2d"):

        def record(x, *args, original=getattr(F, name), **kwargs):
            seen.append(x)
            return original(x, *args, **kwargs)

        monkeypatch.setattr(F, name, record)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    mask = random_patch_mask()[:, None]
    for layer in LAYERS.values():
        seen.append(layer().to(memory_format=torch.channels_last)(x, mask))
    assert len(seen) == 7  # convolution, share, result; maximum, two means, result
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


def test_a_sparse_convolution_may_have_a_bias():
    sparse = scott.SparseConv2d(3, 5, 3, padding=1, bias=True)
    x, mask = torch.zeros(2, 3, 32, 32), random_patch_mask()[:, None]
    visible = (~scott.enlarge(mask, x)).expand(-1, 5, -1, -1)
    assert torch.equal(sparse(x, mask), sparse.bias[:, None, None] * visible)


def test_dropout_on_a_cpu_drops_at_its_rate_and_keeps_the_mean():
    x = torch.ones(1000, 333, requires_grad=True)
    for rate in (0.1, 0.5):
        out = scott.dropout(x, rate)
        assert (out == 0).float().mean().item() == pytest.approx(rate, abs=0.005)
        assert set(out.unique().tolist()) == {0.0, out.max().item()}
        assert out.mean().item() == pytest.approx(1, abs=0.01)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out)
    assert scott.dropout(x, 0.0) is x or torch.equal(scott.dropout(x, 0.0), x)
    assert torch.equal(scott.dropout(x, 0.5, training=False), x)


def test_attention_on_a_cpu_equals_the_fused_one():
    """Values and gradients; the fused one runs on other devices."""
    attention, x = scott.Attention(48, 2), torch.randn(3, 9, 48, requires_grad=True)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    fused = F.linear(fused, attention.proj.weight)
    weight = torch.randn_like(fused)
    assert torch.allclose(attention(x), fused, atol=1e-5)
    own, other = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (attention(x), fused))
    assert torch.allclose(own, other, atol=1e-4)


def plain_conv(self, x, mask=None):
    """SparseConv2d, written for reading: zero, convolve, divide by the visible share, zero."""
    out = F.conv2d(x if mask is None else x.masked_fill(scott.enlarge(mask, x), 0), self.weight,
                   stride=self.stride, padding=self.padding)
    if mask is None:
        return out
    inside = torch.ones_like(x[:, :1])
    taps = torch.ones_like(self.weight[:1, :1])
    visible = inside.masked_fill(scott.enlarge(mask, x), 0)
    count, seen = (F.conv2d(y, taps, stride=self.stride, padding=self.padding)
                   for y in (inside, visible))
    return (out * count / seen.clamp_min(1)).masked_fill(scott.enlarge(mask, out), 0)


def plain_pool(self, x, mask=None):
    """SparseMaxBlurPool2d with the blur as a depthwise convolution."""
    x = x if mask is None else x.masked_fill(scott.enlarge(mask, x), -1e4)
    x = F.max_pool2d(x, 2, 1)
    kernel = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16
    kernel = kernel.expand(x.shape[1], 1, 3, 3)
    x = F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
    return x if mask is None else x.masked_fill(scott.enlarge(mask, x), 0)


def plain_attention(self, x):
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_fast_training_step_equals_a_plain_one(monkeypatch):
    """Losses of five steps, gradients of the first, weights of student and teacher after them."""

    def steps(layout, optimizer_of, update):
        torch.manual_seed(0)
        objective = scott.MIMJEPA(tiny_encoder(), 1).to(memory_format=layout)
        optimizer, losses = optimizer_of(objective), []
        before = [p.detach().clone() for p in objective.parameters()]
        for _ in range(5):
            views = torch.randn(2, 4, 3, 64, 64)
            mask = random_patch_mask(4).flatten(1)
            optimizer.zero_grad()
            loss = objective(*(view.contiguous(memory_format=layout) for view in views), mask)
            loss.backward()
            grads = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
            first = grads if not losses else first
            losses.append(loss.item())
            optimizer.step()
            update(objective)
        return losses, first, [p - b for p, b in zip(objective.parameters(), before)]

    def plain_update(objective):
        with torch.no_grad():
            for target, source in zip(objective.teacher.parameters(),
                                      objective.student.parameters()):
                target.copy_(0.9 * target + 0.1 * source)

    def plain_optimizer(objective):
        groups = scott.create_optimizer(objective, 1e-3).param_groups
        return torch.optim.AdamW([{"params": g["params"]} for g in groups], 1e-3, foreach=False)

    fast = steps(torch.channels_last, lambda objective: scott.create_optimizer(objective, 1e-3),
                 lambda objective: objective.update_teacher(0.9))
    monkeypatch.setattr(scott.SparseConv2d, "forward", plain_conv)
    monkeypatch.setattr(scott.SparseMaxBlurPool2d, "forward", plain_pool)
    monkeypatch.setattr(scott.Attention, "forward", plain_attention)
    plain = steps(torch.contiguous_format, plain_optimizer, plain_update)
    assert fast[0] == pytest.approx(plain[0], rel=1e-4)
    for own, other in zip(fast[1], plain[1]):
        assert torch.allclose(own, other, atol=1e-5, rtol=1e-3)
    for own, other in zip(fast[2], plain[2]):  # the teacher's are ten times smaller
        assert (own - other).norm() < 0.02 * other.norm() + 1e-6


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("renormalise", [True, False])
def test_hidden_sites_have_no_influence_and_stay_empty(layer, renormalise):
    sparse = LAYERS[layer](renormalise=renormalise)
    mask = random_patch_mask()[:, None]
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    hidden = scott.enlarge(mask, x).expand_as(x)
    out = sparse(x, mask)
    assert torch.equal(sparse(torch.where(hidden, 1e6, x), mask), out)
    assert torch.equal(sparse(torch.where(hidden, torch.nan, x), mask), out)
    out.square().sum().backward()
    assert x.grad[hidden].abs().max() == 0 and x.grad[~hidden].abs().max() > 0
    empty = scott.enlarge(mask, out).expand_as(out)
    assert out[empty].abs().max() == 0 and (out[~empty] != 0).all()


def test_hidden_sites_never_win_the_maximum_of_negative_features():
    pool, mask = scott.SparseMaxBlurPool2d(1), random_patch_mask()[:, None]
    out = pool(torch.full((2, 1, 32, 32), -3.0), mask)
    dense = pool(torch.full((2, 1, 32, 32), -3.0))
    visible = ~scott.enlarge(mask, out)
    assert torch.allclose(out[visible], dense[visible])


@pytest.mark.parametrize("layer", LAYERS)
def test_a_constant_image_stays_constant_at_the_edge_of_a_hole(layer):
    x, mask = torch.ones(2, 3, 32, 32), random_patch_mask()[:, None]
    differs = {}
    for renormalise in (True, False):
        sparse = LAYERS[layer](renormalise=renormalise)
        if layer == "conv":
            torch.nn.init.constant_(sparse.weight, 0.01)
        out, dense = sparse(x, mask), sparse(x)
        visible = ~scott.enlarge(mask, out).expand_as(out)
        differs[renormalise] = (out - dense)[visible].abs().max().item()
    assert differs[True] < 1e-5
    # The pooling needs no renormalising, as its docstring explains; the convolution does.
    assert differs[False] > 0.05 if layer == "conv" else differs[False] < 1e-5


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_blur_sees_a_visible_site_in_every_tap(patch):
    mask = torch.stack([scott.random_mask((8, 8), 0.6) for _ in range(8)])[:, None]
    sites = ~scott.enlarge(mask, torch.empty(1, 1, 8 * patch, 8 * patch))
    visible = F.max_pool2d(sites.float(), 2, 1)
    kernel = torch.ones(1, 1, 3, 3)
    taps = F.conv2d(visible, kernel, stride=2, padding=1)
    inside = F.conv2d(torch.ones_like(visible), kernel, stride=2, padding=1)
    seen = ~scott.enlarge(mask, taps)
    assert torch.equal(taps[seen], inside[seen])


def test_masks_of_a_batch_may_hide_different_numbers():
    tokenizer = scott.SparseConvTokenizer(48)
    images, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 16, dtype=torch.bool)
    mask[1, :9] = True
    both = tokenizer(images, mask)
    assert torch.allclose(both[0], tokenizer(images[:1])[0], atol=1e-6)
    assert torch.allclose(both[1], tokenizer(images[1:], mask[1:])[0], atol=1e-6)


@pytest.mark.parametrize("name", ["SparseConvTokenizer", "PatchEmbed"])
@pytest.mark.parametrize("size", [(64, 64), (64, 112)])
def test_tokens_of_visible_patches_know_nothing_of_hidden_pixels(name, size):
    tokenizer, grid = getattr(scott, name)(48), (size[0] // 16, size[1] // 16)
    mask = random_patch_mask(grid=grid).flatten(1)
    images = torch.rand(2, 3, *size, requires_grad=True)
    hidden = scott.enlarge(mask.view(2, 1, *grid), images).expand_as(images)
    tokens = tokenizer(images, mask)
    assert tokens.shape == (2, grid[0] * grid[1], 48)
    changed = torch.where(hidden, torch.rand_like(images), images)
    assert torch.equal(tokenizer(changed, mask), tokens)
    assert tokens[mask].abs().max() == 0
    tokens.square().sum().backward()
    assert images.grad[hidden].abs().max() == 0


# ---- Masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", scott.MASKS)
@pytest.mark.parametrize("grid", [(14, 14), (10, 10), (2, 2), (1, 5), (3, 17)])
@pytest.mark.parametrize("ratio", [0.05, 0.29, 0.6, 0.95])
def test_masks_hide_exactly_the_asked_number(kind, grid, ratio):
    for seed in range(5):
        mask = scott.MASKS[kind](grid, ratio, torch.Generator().manual_seed(seed))
        assert mask.shape == grid and mask.dtype == torch.bool
        assert mask.sum() == int(ratio * grid[0] * grid[1])


@pytest.mark.parametrize("kind", scott.MASKS)
def test_every_position_is_hidden_sometimes_and_visible_sometimes(kind):
    generator = torch.Generator().manual_seed(0)
    share = sum(scott.MASKS[kind]((14, 14), 0.6, generator).float() for _ in range(400)) / 400
    assert 0 < share.min() and share.max() < 1


def test_blockwise_hides_blocks_and_inverse_shows_blocks():
    def neighbours(kind, hidden):
        generator, total = torch.Generator().manual_seed(0), 0.0
        for _ in range(100):
            mask = scott.MASKS[kind]((14, 14), 0.6, generator) == hidden
            total += (mask[:, 1:] & mask[:, :-1]).sum() / mask.sum()
        return total / 100

    assert neighbours("blockwise", True) > neighbours("random", True) + 0.1
    assert neighbours("inverse", False) > neighbours("random", False) + 0.2


def test_masks_repeat_with_their_generator():
    a, b = (scott.blockwise_mask((14, 14), 0.6, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


# ---- The method --------------------------------------------------------------------------------


def make_method(**options):
    objective = scott.MIMJEPA(tiny_encoder(**options), predictor_depth=1)
    mask = random_patch_mask(4).flatten(1)
    return objective, torch.rand(4, 3, 64, 64), torch.rand(4, 3, 64, 64), mask


def test_loss_is_smooth_l1_on_hidden_tokens_only():
    objective, view_a, view_b, mask = make_method()
    with torch.no_grad():
        target = objective.teacher(view_b)
        context = objective.student(view_a, mask)
        prediction = objective.predictor(context + objective.student.grid_positions(view_a))
        expected = F.smooth_l1_loss(prediction[mask], target[mask])
    assert torch.allclose(objective(view_a, view_b, mask), expected, atol=1e-6)
    # A change of the teacher's output at visible places only must not change the loss.
    objective.teacher.register_forward_hook(lambda m, a, out: out + 100 * ~mask[..., None])
    assert torch.allclose(objective(view_a, view_b, mask), expected, atol=1e-6)


def test_the_student_does_not_see_hidden_pixels_and_the_teacher_does():
    objective, view_a, view_b, mask = make_method()
    hidden = scott.enlarge(mask.view(4, 1, 4, 4), view_a).expand_as(view_a)
    loss = objective(view_a, view_b, mask)
    assert torch.equal(objective(torch.where(hidden, 0.0, view_a), view_b, mask), loss)
    assert not torch.equal(objective(view_a, torch.where(hidden, 0.0, view_b), mask), loss)


def test_teacher_gets_no_gradient_and_everything_else_does():
    objective, *batch = make_method()
    objective(*batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    for part in (objective.student, objective.predictor):
        assert all(p.grad.abs().max() > 0 for p in part.parameters())


def test_teacher_starts_as_the_student_and_follows_it():
    objective, *_ = make_method()
    student, teacher = objective.student.mask_token, objective.teacher.mask_token
    assert all(map(torch.equal, objective.student.parameters(), objective.teacher.parameters()))
    student.data += 1
    before = teacher.clone()
    objective.update_teacher(1.0)
    assert torch.equal(teacher, before)
    objective.update_teacher(0.75)
    assert torch.allclose(teacher, 0.75 * before + 0.25 * student)
    objective.update_teacher(0.0)
    assert torch.equal(teacher, student)


def test_dropout_is_for_the_student_only():
    rates = dict(dropout=0.5, attention_dropout=0.5, drop_path=0.5)
    objective, view_a, view_b, mask = make_method(**rates)
    objective.train()
    assert torch.equal(objective.teacher(view_b), objective.teacher(view_b))
    assert not torch.equal(objective.student(view_a, mask), objective.student(view_a, mask))


def test_residual_norm_changes_the_block():
    block = scott.Block(48, 2)
    other = copy.deepcopy(block)
    other.residual_norm = True
    x = torch.randn(1, 4, 48)
    y = F.layer_norm(x + block.attention(F.layer_norm(x, (48,))), (48,))
    assert torch.allclose(other(x), y + block.ffn(y), atol=1e-6)
    assert not torch.allclose(other(x), block(x), atol=1e-3)


# ---- Schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("total, warmup", [(18_900, 2520), (100, 0), (7, 3), (2, 0), (2, 1)])
def test_schedules_are_exact_at_both_ends(total, warmup):
    assert scott.lr_schedule(0, total, warmup) == (1e-6 if warmup else 5e-4)
    assert scott.lr_schedule(total - 1, total, warmup) == 1e-5
    assert scott.weight_decay_schedule(0, total) == 0.04
    assert scott.weight_decay_schedule(total - 1, total) == 0.4
    assert scott.ema_schedule(0, total) == 0.996
    assert scott.ema_schedule(total - 1, total) == 1.0


def test_learning_rate_rises_stays_and_falls():
    rates = [scott.lr_schedule(step, 1000, 100) for step in range(1000)]
    assert rates[50] == pytest.approx((1e-6 + 5e-4) / 2)
    flat = [i for i, rate in enumerate(rates) if rate == 5e-4]
    assert flat == list(range(100, 100 + len(flat)))
    assert len(flat) == pytest.approx(0.72 * 900, abs=2)
    assert all(a > b for a, b in zip(rates[flat[-1] :], rates[flat[-1] + 1 :]))


def test_warmup_is_40_epochs_and_shorter_in_short_runs():
    for epochs, expected in ((300, 40), (1200, 40), (30, 4)):
        assert scott.resolve(scott.Config(epochs=epochs)).warmup_epochs == pytest.approx(expected)
    assert scott.resolve(scott.Config(epochs=1200, warmup_epochs=60)).warmup_epochs == 60


# ---- Colours -----------------------------------------------------------------------------------

TORCHVISION = {
    "brightness": (TF.adjust_brightness, [0.6, 1.0, 1.4]),
    "contrast": (TF.adjust_contrast, [0.6, 1.0, 1.4]),
    "saturation": (TF.adjust_saturation, [0.8, 1.0, 1.2]),
    "hue": (TF.adjust_hue, [-0.1, 0.0, 0.1]),
    "blur": (lambda x, sigma: TF.gaussian_blur(x, [9, 9], [sigma, sigma]), [0.1, 0.7, 2.0]),
    "grayscale": (lambda x, _: TF.rgb_to_grayscale(x, 3), [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", scott.COLORS)
def test_batched_colours_equal_torchvision_image_by_image(name):
    reference, strengths = TORCHVISION[name]
    images = torch.rand(3, 3, 224, 224)
    images[0, :, :60] = 0.5  # gray, black and white have no hue
    images[1, :, :60], images[2, :, :60] = 0, 1
    out = scott.COLORS[name](images, torch.tensor(strengths).view(-1, 1, 1, 1))
    expected = torch.stack([reference(image, s) for image, s in zip(images, strengths)])
    assert torch.allclose(out, expected, atol=1e-5)


def test_views_kinds():
    crops = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    draws = torch.rand(16, 2, 10)

    def views(kind, probability):
        return scott.make_views(crops, draws, kind, probability, np.random.default_rng(0))

    plain = scott.normalise(crops)
    assert all(torch.equal(view, plain) for view in views("none", 1.0))
    assert all(torch.allclose(view, plain) for view in views("different", 0.0))
    view_a, view_b = views("same", 1.0)
    assert torch.equal(view_a, view_b) and not torch.allclose(view_a, plain)
    view_a, view_b = views("different", 1.0)
    assert not torch.allclose(view_a, view_b)


def test_colour_probabilities():
    draws = torch.rand(4000, 10)
    images = torch.rand(1, 3, 4, 4).expand(4000, -1, -1, -1)
    out = scott.color_pipeline(images, draws, 0.6, np.random.default_rng(0))
    changed = (out != images).flatten(1).any(1).float().mean()
    gray = (out.std(1) < 1e-6).flatten(1).all(1).float().mean()
    assert changed == pytest.approx(0.6 * (1 - 0.2 * 0.9 * 0.7), abs=0.03)
    assert gray == pytest.approx(0.6 * 0.1, abs=0.02)


# ---- Data --------------------------------------------------------------------------------------


def test_crops_are_keyed_by_seed_epoch_and_image_and_leave_the_generator_alone():
    images = probe.draw_flowers(count=4, size=48)
    crops = scott.Crops(images, 32, seed=1)
    torch.manual_seed(5)
    first = crops[(3, 2)]
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(()))
    assert first[0].shape == (3, 32, 32) and first[0].dtype == torch.uint8
    assert first[2].shape == (4,) and first[2].sum() == 2
    for other, same in ((crops[(3, 2)], True), (crops[(4, 2)], False), (crops[(3, 1)], False)):
        assert torch.equal(first[0], other[0]) == same and torch.equal(first[1], other[1]) == same


def test_batches_visit_every_image_once_an_epoch_and_resume_anywhere():
    whole = list(scott.epoch_batches(list(range(10, 21)), 3, 0, 9, seed=0))
    assert len(whole) == 9 and [batch[0][0] for batch in whole] == [0] * 3 + [1] * 3 + [2] * 3
    for epoch in range(3):
        seen = [i for batch in whole[3 * epoch : 3 * epoch + 3] for _, i in batch]
        assert len(set(seen)) == 9 and set(seen) <= set(range(10, 21))
    assert whole[0] != whole[3]
    assert list(scott.epoch_batches(list(range(10, 21)), 3, 4, 9, seed=0)) == whole[4:]


def test_a_folder_with_splits_and_labels(tmp_path):
    for place, count in (("train/rose", 3), ("train/tulip", 2), ("val/rose", 1), ("val/tulip", 1)):
        save_images(tmp_path / place, count)
    save_images(tmp_path / "train", 1)  # loose
    save_images(tmp_path / "train/rose/deep", 1)  # nested deeper
    save_images(tmp_path / ".hidden", 1)
    (tmp_path / "train/notes.txt").write_text("not an image")
    images = open_folder(tmp_path)
    assert images.classes == ["rose", "tulip"]
    assert sorted(images.labels) == [-1, -1, 0, 0, 0, 0, 1, 1, 1]
    assert len(images.select("all")) == 9 and len(images.select("train")) == 7
    train, test = probe.evaluation_split(images)
    assert len(train) == 5 and len(test) == 2
    assert all("/val/" in images.paths[i] for i in test)
    with pytest.raises(scott.UserError, match="has all, train, trainval, val"):
        images.select("test")


def test_a_folder_with_labels_only_gets_a_stratified_split(tmp_path):
    save_images(tmp_path / "a", 20)
    save_images(tmp_path / "b", 10)
    images = open_folder(tmp_path)
    train, test = probe.evaluation_split(images)
    assert sorted([*train, *test]) == list(range(30))
    assert [images.labels[i] for i in test] == [0] * 4 + [1] * 2
    assert all(map(np.array_equal, probe.evaluation_split(images), (train, test)))


def test_a_flat_folder_is_unlabelled(tmp_path):
    save_images(tmp_path, 3)
    images = open_folder(tmp_path)
    assert images.labels == [-1] * 3 and probe.evaluation_split(images) is None


def test_decoding_shrinks_to_the_side_and_the_cache_changes_nothing(tmp_path):
    save_images(tmp_path, 2, size=100)
    images = open_folder(tmp_path)
    images.side = 50
    plain = [images.load(i) for i in range(2)]
    assert plain[0].shape == (3, 50, 54) and plain[0].dtype == torch.uint8
    assert images.cache(range(2), 1.0) == []
    assert set(images.images) == {0, 1}
    assert all(torch.equal(images.load(i), plain[i]) for i in range(2))


def test_the_demo_is_the_same_everywhere_and_has_eight_classes():
    a, b = probe.draw_flowers(count=16, size=32), probe.draw_flowers(count=16, size=32)
    assert all(torch.equal(a.load(i), b.load(i)) for i in range(16))
    assert len(a.classes) == 8 and set(a.labels) == set(range(8))
    train, test = probe.evaluation_split(a)
    assert {a.labels[i] for i in test} <= {a.labels[i] for i in train}


SHARED = Path(__file__).resolve().parent.parent / "shared"


@pytest.mark.skipif(not (SHARED / "flowers-102").is_dir(), reason="Flowers-102 is not here")
def test_flowers102_has_its_official_splits():
    images = scott.open_data(scott.Config(data="flowers102", root=str(SHARED)))
    sizes = [len(images.select(split)) for split in ("train", "val", "test", "trainval", "all")]
    assert sizes == [1020, 1020, 6149, 2040, 8189]
    assert len(images.classes) == 102 and set(images.labels) == set(range(102))
    train, test = probe.evaluation_split(images)
    assert (len(train), len(test)) == (2040, 6149)
    assert images.load(0).shape[0] == 3


# ---- Monitors ----------------------------------------------------------------------------------


def test_knn_finds_clusters_and_nothing_in_noise():
    labels = torch.arange(400) % 4
    centres = F.one_hot(labels, 16).float()
    noise = torch.randn(400, 16)
    for features, low, high in ((centres + 0.1 * noise, 1, 1), (noise, 0.1, 0.4)):
        scores = probe.knn_scores(features[:200], labels[:200], features[200:], 4)
        assert low <= (scores.argmax(1) == labels[200:]).float().mean() <= high


def test_effective_rank_counts_directions():
    features = torch.randn(4096, 8) @ torch.randn(8, 64)
    assert probe.effective_rank(torch.randn(4096, 32) + 7) == pytest.approx(32, abs=0.5)
    assert 4 < probe.effective_rank(features) < 8.01


# ---- Runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a small labelled folder: (its folder, what it printed)."""
    place = tmp_path_factory.mktemp("run")
    save_images(place / "pictures/a", 12)
    save_images(place / "pictures/b", 12)
    flags = ["--data", "pictures", "--model", "scott-tiny/16", *TINY, "--epochs", "2"]
    command = [sys.executable, SCOTT, *flags, "--dropout", "0.1"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return place / "runs/pictures-scott-tiny-16", result.stdout


def test_a_run_leaves_config_metrics_checkpoint_and_preview(run):
    folder, printed = run
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "last.pt", "metrics.csv", "preview.png",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["epochs"] == 2 and config["device"] != "auto"
    assert config["torch"] == torch.__version__
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and rows[0]["loss"] == ""
    assert all(math.isfinite(float(row["effective_rank"])) and row["knn_top1"] for row in rows)
    assert float(rows[-1]["lr"]) == 1e-5 and float(rows[-1]["ema"]) == 1.0
    assert Image.open(folder / "preview.png").size[0] > 8 * 32
    assert "untrained" in printed and "student" in printed


def test_a_checkpoint_holds_everything_and_loads_without_code(run):
    folder, _ = run
    state = torch.load(folder / "last.pt", weights_only=True)
    assert set(state) == {
        "config", "epoch", "step", "student", "teacher", "predictor", "optimizer", "rng", "format",
        "rows", "loss",
    }  # fmt: skip
    assert (state["epoch"], state["step"]) == (2, 6)
    by_default = scott.load_encoder(folder / "last.pt")
    student = scott.load_encoder(folder / "last.pt", which="student")
    assert not by_default.training and not any(p.requires_grad for p in by_default.parameters())
    weights = by_default.state_dict()  # this run's config says teacher
    assert all(torch.equal(weights[name], state["teacher"][name]) for name in weights)
    assert not all(map(torch.equal, student.parameters(), by_default.parameters()))
    assert by_default(torch.rand(1, 3, 48, 32)).shape == (1, 6, 192)


def train_here(place, monkeypatch, *flags):
    """Train on a small unlabelled folder in this process: (student's weights, metrics rows)."""
    monkeypatch.chdir(place)
    if not (place / "loose").exists():
        save_images(place / "loose", 17)
    config = ["--data", "loose", "--model", "scott-tiny/16", *TINY, *flags]
    folder = scott.train(scott.parse_config(config))
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    return torch.load(folder / "last.pt", weights_only=True)["student"], rows


def test_the_same_seed_gives_the_same_run_whatever_the_workers(tmp_path, monkeypatch):
    one, rows = train_here(tmp_path, monkeypatch)
    two, again = train_here(tmp_path, monkeypatch, "--workers", "2", "--cache-gib", "0")
    other, _ = train_here(tmp_path, monkeypatch, "--seed", "1")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    for row in rows + again:
        del row["images_per_s"]
    assert rows == again and rows[-1]["knn_top1"] == ""
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())  # none overwrote another
    assert names == ["loose-scott-tiny-16", "loose-scott-tiny-16-2", "loose-scott-tiny-16-3"]


def test_training_takes_another_objective(tmp_path, monkeypatch):
    class Pixels(scott.MIMJEPA):
        """Regress the mean colour of hidden patches: a toy with the same calls."""

        def forward(self, view_a, view_b, mask):
            colors = F.avg_pool2d(view_b, 16).flatten(2).transpose(1, 2)
            tokens = self.predictor(self.student(view_a, mask))
            return F.mse_loss(tokens[..., :3][mask], colors[mask])

    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    config = scott.parse_config(["--data", "loose", "--model", "scott-tiny/16", *TINY])
    folder = scott.train(config, Pixels(scott.create_encoder("scott-tiny/16"), 1))
    assert scott.load_encoder(folder / "last.pt").embed_dim == 192


def test_a_collapse_is_called_one(tmp_path, monkeypatch, capsys):
    def collapse(self, view_a, view_b, mask):
        return self.student(view_a, mask).std(1).mean() + self.student(view_a).std(0).mean()

    train_here(tmp_path, monkeypatch)
    assert "collapse" not in capsys.readouterr().out
    monkeypatch.setattr(scott.MIMJEPA, "forward", collapse)
    flags = ["--epochs", "20", "--lr", "0.01", "--which", "student", "--knn-every", "5"]
    train_here(tmp_path, monkeypatch, *flags)
    assert "collapse" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["inverse", "random"])
def test_other_masks_and_models_train(tmp_path, monkeypatch, kind):
    flags = ["--mask", kind, "--model", "vit-tiny/16", "--views", "none"]
    _, rows = train_here(tmp_path, monkeypatch, *flags)
    assert 0 < float(rows[-1]["loss"]) < 2


def test_hidden_targets_and_registers_train_and_load(tmp_path, monkeypatch):
    flags = ["--hidden-targets", "--registers", "2", "--flip-prob", "0", "--beta2", "0.95"]
    _, rows = train_here(tmp_path, monkeypatch, *flags)
    assert 0 < float(rows[-1]["loss"]) < 2
    encoder = scott.load_encoder("runs/loose-scott-tiny-16/last.pt")
    assert encoder.registers.shape == (2, 192)
    assert encoder(torch.rand(1, 3, 32, 48)).shape == (1, 6, 192)


def test_a_checkpoint_from_before_a_flag_existed_loads_and_goes_on(tmp_path, monkeypatch):
    train_here(tmp_path, monkeypatch)
    path = "runs/loose-scott-tiny-16/last.pt"
    checkpoint = torch.load(path, weights_only=True)
    for name in ("registers", "hidden_targets", "flip_prob", "beta2"):
        del checkpoint["config"][name]
    for group in checkpoint["optimizer"]["param_groups"]:
        del group["lr_scale"]
    torch.save(checkpoint, path)
    assert scott.load_encoder(path).registers is None
    assert scott.main(["--resume", path, "--epochs", "9"]) == 0
    assert scott.load_checkpoint(path)["step"] == 9 * checkpoint["step"]


def test_training_lowers_the_loss_on_a_fixed_batch():
    objective, *batch = make_method()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(40):
        loss = objective(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- Probes ------------------------------------------------------------------------------------


def fit_heads(train, test, classes, epochs=30, **heads):
    """Fit on given tokens (n, N, D), both sets with labels: last accuracies of each head, in %."""
    config = scott.Config(epochs=epochs, warmup_epochs=epochs / 5, batch_size=64, lr=0.005)
    config.device, config.amp = "cpu", "fp32"

    def batches(tokens, order):
        return ((tokens[rows], rows) for rows in order.split(64))

    heads = heads or {name: head(train[0].shape[-1], classes) for name, head in probe.HEADS.items()}
    labels = train[1], test[1]
    curves = probe.fit(
        heads,
        lambda epoch, order: batches(train[0], order),
        lambda order: batches(test[0], order),
        labels,
        config,
        evaluations=1,
    )
    return {name: curve[-1][1] for name, curve in curves.items()}


def test_heads_read_a_label_that_is_there_and_guess_where_there_is_none():
    classes, labels = 8, torch.arange(1024) % 8
    tokens = torch.randn(1024, 9, 48)
    tokens[:, :, :8] += 3 * F.one_hot(labels, classes)[:, None]
    train, test = (tokens[:512], labels[:512]), (tokens[512:], labels[512:])
    for result in fit_heads(train, test, classes).values():
        assert result["top1"] == result["top5"] == result["per_class"] == 100
    train, test = ((part[0], part[1][torch.randperm(512)]) for part in (train, test))
    for result in fit_heads(train, test, classes).values():
        assert abs(result["top1"] - 100 / classes) < 5  # 3.4 standard deviations
        assert abs(result["top5"] - 500 / classes) < 7


def test_an_output_is_never_written_over_another(tmp_path):
    wanted, other = str(tmp_path / "a.b.png"), tmp_path / "a.b-2.png"
    assert str(probe.output_path(wanted, ".png")) == wanted
    Path(wanted).touch()
    assert probe.output_path(wanted, ".png") == other
    other.touch()
    assert probe.output_path(wanted, ".png") == tmp_path / "a.b-3.png"


def test_the_attentive_head_finds_the_token_that_tells():
    labels = torch.arange(1024) % 8
    tokens = torch.randn(1024, 16, 48)
    tokens[:, 3, :8] += 6 * F.one_hot(labels, 8)
    tokens[:, 3, 8:12] += 4  # what tells it from the others
    train, test = (tokens[:512], labels[:512]), (tokens[512:], labels[512:])
    result = fit_heads(train, test, 8)
    assert result["attentive"]["top1"] > 95 and result["linear"]["top1"] < 85


def test_the_linear_head_is_within_a_point_of_bayes():
    """Equally likely isotropic Gaussians whose means have one norm: the nearest mean is Bayes."""
    classes, dim = 10, 32
    means = torch.randn(classes, dim)
    means = 2.0 * F.normalize(means - means.mean(1, keepdim=True), dim=1)
    labels = torch.arange(24_000) % classes
    x = means[labels] + torch.randn(len(labels), dim)
    bayes = 100 * (torch.cdist(x, means).argmin(1) == labels)[8000:].float().mean().item()
    train, test = (x[:8000, None], labels[:8000]), (x[8000:, None], labels[8000:])
    heads = {"linear": probe.LinearHead(dim, classes)}
    assert 50 < bayes < 90  # otherwise this says nothing
    assert abs(fit_heads(train, test, classes, **heads)["linear"]["top1"] - bayes) < 1


def test_the_attentive_head_is_cross_attention_written_out():
    head = probe.AttentiveHead(24, 5).eval()
    torch.nn.init.normal_(head.query)
    tokens = torch.randn(3, 7, 24)
    x = head.norm_tokens(tokens)
    q, k, v = head.q(head.query).view(4, 6), head.k(x).view(3, 7, 4, 6), head.v(x).view(3, 7, 4, 6)
    weights = (torch.einsum("hd,bnhd->bhn", q, k) / 6**0.5).softmax(-1)
    z = head.query + head.proj(torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1))
    z = z + head.ffn(head.norm_ffn(z))
    assert torch.allclose(head(tokens), head.head(head.norm(z)), atol=1e-5)


def test_accuracies_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 3, 3])  # class 2 is not tested on
    scores = torch.eye(8)[[0, 0, 1, 1, 3, 7]] + torch.eye(8)[labels] * 0.5
    result = probe.accuracies(scores, labels)
    assert result["top1"] == pytest.approx(100 * 4 / 6) and result["top5"] == 100
    assert result["per_class"] == pytest.approx(100 * (2 / 3 + 1 + 1 / 2) / 3)
    low, high = result["interval"]
    assert (low, high) == pytest.approx((30.0, 90.3), abs=0.1)  # Wilson, from a table
    many = probe.accuracies(torch.eye(2).repeat(500, 1), torch.tensor([0, 1]).repeat(500))
    assert many["interval"] == pytest.approx([99.62, 100], abs=0.01)


def test_tokens_in_memory_equal_those_computed_again(tmp_path):
    save_images(tmp_path, 5)
    images = open_folder(tmp_path)
    config = scott.Config(img_size=32, batch_size=2, workers=0, device="cpu", amp="fp32")
    calls = []
    encoder = tiny_encoder().eval()
    encoder.register_forward_hook(lambda *_: calls.append(1))
    order = torch.tensor([4, 1, 0, 3, 2])
    for gib, computed in ((1.0, 3), (0.0, 6)):
        tokens = probe.FrozenTokens(encoder, images, range(5), config, copies=2, gib=gib)
        calls.clear()
        first = torch.cat([x for x, _ in tokens.batches(1, order)])
        again = torch.cat([x for x, _ in tokens.batches(1, order.flip(0))]).flip(0)
        assert len(calls) == computed
        assert torch.allclose(first, again, atol=2e-3)  # float16
        rows = torch.cat([rows for _, rows in tokens.batches(1, order)])
        assert torch.equal(rows, order)
    centre = torch.cat([x for x, _ in tokens.batches(0, torch.arange(5))])
    plain = encoder(scott.normalise(torch.stack([scott.Crops(images, 32)[i] for i in range(5)])))
    assert torch.allclose(centre, plain, atol=2e-2)
    assert not torch.allclose(centre[order], first, atol=0.1)  # copy 1 is a random crop
    assert torch.allclose(tokens.vectors(), plain.mean(1), atol=1e-2)
    second = torch.cat([x for x, _ in tokens.batches(2, order)])
    assert not torch.allclose(second, first, atol=0.1)  # and copy 2 is another
    pooled = probe.FrozenTokens(encoder, images, range(5), config, pooled=True)
    assert torch.allclose(pooled.vectors(), plain.mean(1), atol=1e-2)
    assert pooled.memory[0].shape == (5, 1, 48)


def test_dropout_and_the_training_set_are_for_training_only():
    class Spy(torch.nn.Linear):
        def forward(self, x):
            seen.add((self.training, int(x[0, 1])))
            return super().forward(x)

    seen = set()
    sets = [torch.tensor([[0.0, kind]]).repeat(8, 1) for kind in (0, 1)]
    labels = torch.arange(8) % 2
    fit_heads((sets[0], labels), (sets[1], labels), 2, epochs=2, spy=Spy(2, 2))
    assert seen == {(True, 0), (False, 1)}


def test_the_table_has_the_last_epoch_first_and_names_the_best():
    curve = [
        (epoch, {"top1": x, "top5": x, "per_class": x, "interval": [x - 1, x + 1]})
        for epoch, x in ((1, 50), (2, 40))
    ]
    _, row = probe.table({"linear": ({}, curve)}).splitlines()
    assert row.split() == "linear 40.0 39.0 to 41.0 40.0 40.0 50.0 (epoch 1)".split()


def test_fine_tuning_trains_the_encoder(tmp_path):
    for name in "ab":
        save_images(tmp_path / name, 5)
    images = open_folder(tmp_path)
    options = probe.ProbeConfig(random_init="vit-tiny/16", epochs=1)
    config = scott.Config(img_size=32, batch_size=4, workers=0, device="cpu", amp="fp32")
    encoder = tiny_encoder().requires_grad_(False)
    before = copy.deepcopy(encoder)
    split = probe.evaluation_split(images)
    labels = [torch.tensor(images.labels)[rows] for rows in split]
    probe.finetune(encoder, images, split, labels, options, config)
    for part in ("tokenizer", "blocks"):
        pairs = zip(getattr(before, part).parameters(), getattr(encoder, part).parameters())
        assert not any(torch.equal(a, b) for a, b in pairs)


def entries(folder):
    return json.loads((folder / "probe.json").read_text())


def test_probes_of_a_run_are_reported_and_appended(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(folder.parent.parent)
    flags = ["--ckpt", str(folder / "last.pt"), "--epochs", "3", "--copies", "2", "--workers", "0"]
    flags += ["--amp", "fp32"]
    assert probe.main(flags) == 0
    printed = capsys.readouterr().out
    first = entries(folder)
    assert [entry["mode"] for entry in first] == ["linear", "attentive", "knn"]
    assert "picked on the test set" in printed and "95 % interval" in printed
    for entry in first:
        result = entry["results"]
        assert f"{result['top1']:.1f}" in printed
        assert result["interval"][0] <= result["top1"] <= result["interval"][1] <= 100
        assert entry["counts"] == {"train": 20, "test": 4, "classes": 2}
        assert entry["settings"]["which"] == "teacher" and entry["seed"] == 0
    assert first[0]["best_on_test"]["top1"] >= first[0]["results"]["top1"]
    assert first[0]["settings"]["epochs"] == 3 and first[0]["settings"]["copies"] == 2
    # k-NN is what the run's monitor said
    monitored = list(csv.DictReader(open(folder / "metrics.csv")))[-1]["knn_top1"]
    assert first[2]["results"]["top1"] == pytest.approx(float(monitored))
    assert probe.main([*flags, "--mode", "linear"]) == 0
    again = entries(folder)
    assert again[:3] == first and len(again) == 4
    assert again[3]["results"] == first[0]["results"]  # alone or with others, in memory or pooled
    assert probe.main([*flags, "--mode", "knn", "--which", "student", "--out", str(tmp_path)]) == 0
    assert entries(tmp_path)[0]["settings"]["which"] == "student" and entries(folder) == again


def test_an_untrained_encoder_is_probed_and_trained_from_scratch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, value in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(20):
            noise = np.random.default_rng([value, i]).integers(-40, 40, (40, 40, 3)) + value
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "data" / kind / f"{i}.png")
    flags = ["--random-init", "vit-tiny/16", "--data", "data", "--img-size", "32", "--workers", "0"]
    flags += ["--amp", "fp32", "--mode", "finetune", "knn", "--epochs", "15", "--batch-size", "8"]
    assert probe.main(flags) == 0
    knn, finetuned = entries(tmp_path / "runs/data-vit-tiny-16-untrained")
    assert finetuned["mode"] == "finetune" and finetuned["results"]["top1"] == 100
    assert finetuned["settings"]["which"] is None and finetuned["settings"]["lr"] == 5e-4
    assert knn["best_on_test"] is None


def test_components_show_the_object_and_its_parts():
    """Tokens of a background, and of a disk with two halves: black around, two colours within."""
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    inside, left = torch.hypot(y, x) < 3, x < 0
    kind = torch.where(inside, torch.where(left, 1, 2), 0).expand(3, 8, 8)
    for sign in (1, -1):  # whatever the components' sign
        centres = torch.zeros(3, 16)
        centres[0, 0], centres[1, 0], centres[2, 0] = -4 * sign, 4 * sign, 4 * sign
        centres[1, 1], centres[2, 1] = 1, -1
        colors = probe.token_colors(centres[kind] + 0.02 * torch.randn(3, 8, 8, 16))
        assert colors.shape == (3, 8, 8, 3) and colors.min() >= 0 and colors.max() <= 1
        assert (colors[kind == 0] == 0).all()
        red = colors[..., 0]
        assert (red[kind == 1].mean() - red[kind == 2].mean()).abs() > 0.8
        assert red[kind == 1].std() < 0.1 and red[kind == 2].std() < 0.1


def test_pca_pictures_and_exports_of_a_run(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(folder.parent.parent)
    save_images(tmp_path / "loose", 7)
    paths = [str(path) for path in sorted((tmp_path / "loose").iterdir())]
    flags = ["--ckpt", str(folder / "last.pt"), "--workers", "0", "--amp", "fp32"]
    loose = str(tmp_path / "loose")
    for _ in range(2):
        assert probe.main([*flags, "--pca", str(tmp_path / "parts.png"), *paths]) == 0
        assert probe.main([*flags, "--export", str(tmp_path / "v1.npz"), loose]) == 0
    names = {path.name for path in tmp_path.iterdir()}  # nothing was overwritten
    assert names == {"loose", "parts.png", "parts-2.png", "v1.npz", "v1-2.npz"}
    assert Image.open(tmp_path / "parts.png").size == (7 * 34 + 2, 2 * 34 + 2)
    data = np.load(tmp_path / "v1.npz", allow_pickle=False)
    assert data["features"].shape == (7, 192) and data["features"].dtype == np.float32
    assert data["paths"].tolist() == paths and (data["labels"] == -1).all()
    assert len(data["classes"]) == 0
    crop = scott.Crops(open_folder(loose), 32)[4]
    expected = scott.load_encoder(folder / "last.pt")(scott.normalise(crop[None])).mean(1)[0]
    assert torch.allclose(torch.tensor(data["features"][4]), expected, atol=1e-4)
    # without images or a folder: some of one class, and all, of the data it was trained on
    assert probe.main([*flags, "--pca", str(tmp_path / "own.png")]) == 0
    assert Image.open(tmp_path / "own.png").size == (10 * 34 + 2, 2 * 34 + 2)
    assert probe.main([*flags, "--export", str(tmp_path / "own.npz")]) == 0
    data = np.load(tmp_path / "own.npz")
    assert len(data["features"]) == 24 and data["classes"].tolist() == ["a", "b"]


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the checkpoint was run')",))


def make_wrong_files(place, run):
    whole = (run / "last.pt").read_bytes()
    state = torch.load(run / "last.pt", weights_only=True)
    (place / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (place / "empty.pt").write_bytes(b"")
    (place / "text.pt").write_text("epoch 1 loss 0.5")
    torch.save({"model": {}, "epoch": 3}, place / "foreign.pt")
    torch.save(state | {"format": 99}, place / "newer.pt")
    torch.save(state | {"extra": Payload()}, place / "code.pt")
    save_images(place / "loose", 3)
    for name in ("single/only", "damaged/a", "damaged/b", "sound/a", "sound/b"):
        save_images(place / name, 6)
    (place / "damaged/b/image2.png").write_bytes(b"no image")
    (place / "nothing").mkdir()
    (place / "bad").mkdir()
    (place / "bad/probe.json").write_text("[{")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "--ckpt FILE or --random-init MODEL"),
        ("--ckpt GOOD --random-init vit-3/16", "--ckpt FILE or --random-init MODEL"),
        ("--ckpt nosuch.pt", "nosuch.pt: No such file"),
        ("--ckpt loose", "Is a directory"),
        ("--ckpt cut.pt", "cut.pt: cut short"),
        ("--ckpt empty.pt", "empty.pt: of other software"),
        ("--ckpt text.pt", "text.pt: of other software"),
        ("--ckpt foreign.pt", "foreign.pt: of other software"),
        ("--ckpt newer.pt", "newer.pt: of a newer scott.py, format 99"),
        ("--ckpt code.pt", "code.pt: holds code"),
        ("--ckpt GOOD --data loose", "at least two classes"),
        ("--ckpt GOOD --data single", "at least two classes"),
        ("--ckpt GOOD --data nothing", "no images in nothing"),
        ("--ckpt GOOD --data damaged", "damaged/b/image2.png"),
        ("--ckpt GOOD --data nosuch", "--data nosuch: no folder"),
        ("--ckpt GOOD --data sound --out bad", "bad/probe.json"),
        ("--ckpt GOOD --data sound --out cut.pt", "--out cut.pt"),
        ("--ckpt GOOD --lr nan", "--lr"),
        ("--ckpt GOOD --copies -1", "--copies -1"),
        ("--ckpt GOOD --img-size 50", "multiple of the patch size"),
        ("--ckpt GOOD --mode magic", "invalid choice"),
        ("--random-init scott-4/16 --data damaged", "scott-3/16"),
        ("--ckpt GOOD --pca picture.jpg", "must end in .png"),
        ("--ckpt GOOD --pca nowhere/picture.png", "in a folder that exists"),
        ("--ckpt GOOD --pca picture.png damaged/b/image2.png", "damaged/b/image2.png"),
        ("--ckpt GOOD --export vectors.npz nothing", "no images in nothing"),
        ("--ckpt GOOD --export vectors.npz damaged --workers 1", "damaged/b/image2.png"),
        ("--ckpt GOOD --export vectors.npz loose single", "one folder at most"),
    ],
)
def test_mistakes_of_a_probe_are_one_line_and_exit_code_2(
    run, tmp_path, monkeypatch, capsys, flags, says
):
    monkeypatch.chdir(tmp_path)
    make_wrong_files(tmp_path, run[0])
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    try:
        code = probe.main(flags.replace("GOOD", str(run[0] / "last.pt")).split())
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2 and says in printed and printed.count("\n") == 1, printed
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- Trust: images of all kinds, runs that end early, several processes ------------------------


def save_odd_images(folder):
    """Readable images of unusual kinds: {name: colour of the upper left corner, or None}."""
    folder.mkdir(parents=True)
    red = np.zeros((30, 40, 3), np.uint8)
    red[:, :20, 0] = 255  # the left half is red, the right half black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left half comes up
    Image.fromarray(red).save(folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    alpha = np.dstack([red, np.full((30, 40), 0, np.uint8)])
    Image.fromarray(alpha, "RGBA").save(folder / "transparent.png")
    Image.fromarray(alpha, "RGBA").convert("LA").save(folder / "gray-alpha.png")
    Image.fromarray(red).quantize(4).save(folder / "palette.png")
    palette = Image.fromarray(red).quantize(4)
    palette.save(folder / "palette-transparent.png", transparency=palette.getpixel((0, 0)))
    Image.fromarray(red).convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    Image.fromarray(np.full((30, 40), 65535, np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(np.full((30, 40), 32896, np.uint16)).save(folder / "sixteen-half.tif")
    Image.fromarray(np.full((30, 40), 70000, np.int32)).save(folder / "more-than-sixteen.tif")
    Image.new("L", (40, 30), 128).save(folder / "gray.png")
    Image.new("1", (40, 30), 1).save(folder / "bits.png")
    frames = [Image.new("RGB", (40, 30), color) for color in ("blue", "green", "white")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1), "blue").save(folder / "point.png")
    Image.new("RGB", (5000, 3), "blue").save(folder / "line.png")
    red, white, gray, blue = (255, 0, 0), (255,) * 3, (128,) * 3, (0, 0, 255)
    return {
        "turned.jpg": red, "transparent.png": white, "gray-alpha.png": white, "palette.png": red,
        "palette-transparent.png": white, "cmyk.jpg": red, "sixteen.png": white,
        "sixteen-half.tif": gray, "more-than-sixteen.tif": white, "gray.png": gray,
        "bits.png": white, "film.gif": blue, "point.png": blue, "line.png": blue,
    }  # fmt: skip


def save_broken_images(folder):
    """Files that are no images, or not whole: their names."""
    save_images(folder / "whole", 1, size=200)
    data = (folder / "whole/image0.png").read_bytes()
    (folder / "whole/image0.png").unlink()
    (folder / "whole").rmdir()
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("not an image")
    bomb = b"P6 30000 30000 255\n" + bytes(1000)  # 900 million pixels, says its header
    (folder / "bomb.ppm").write_bytes(bomb)
    return ["bomb.ppm", "cut.png", "text.jpg", "zero.jpg"]


def test_images_of_all_kinds_are_read_as_people_see_them(tmp_path):
    colors = save_odd_images(tmp_path / "odd")
    images = open_folder(tmp_path / "odd")
    assert len(images) == len(colors)
    for i, path in enumerate(images.paths):
        image, color = images.load(i), colors[Path(path).name]
        assert image.dtype == torch.uint8 and len(image) == 3
        assert (image[:, 0, 0].int() - torch.tensor(color)).abs().max() <= 3, path
    turned = images.load([Path(path).name for path in images.paths].index("turned.jpg"))
    assert turned.shape == (3, 40, 30)
    assert turned[0, 0, 29] > 250 and turned[0, 39, 0] < 5
    crops = scott.Crops(images, 32)
    for i in range(len(images)):
        assert crops[i].shape == crops[(0, i)][0].shape == (3, 32, 32)
    images.paths = [str(tmp_path / "long.png")]
    Image.new("RGB", (20_000, 10), "blue").save(images.paths[0])
    assert crops[0].shape == crops[(0, 0)][0].shape == (3, 32, 32)


LOOSE = ["--data", "loose", "--model", "scott-tiny/16", *TINY]


def test_unreadable_images_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    save_images(tmp_path / "loose", 120, size=16)
    (tmp_path / "loose/broken.jpg").write_text("not an image")
    _, rows = train_here(tmp_path, monkeypatch, "--batch-size", "60")
    printed = capsys.readouterr().out
    assert sum("loose/broken.jpg: " in line for line in printed.splitlines()) == 1
    assert len(rows) == 2


def test_too_many_unreadable_images_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    broken = save_broken_images(tmp_path / "loose")
    assert scott.main(LOOSE) == 2
    printed = capsys.readouterr()
    skipped = [line for line in printed.out.splitlines() if line.startswith("skipped")]
    assert [name for name in broken for line in skipped if f"/{name}: " in line] == broken
    assert printed.err.count("\n") == 1 and "4 of 21 images" in printed.err
    assert not (tmp_path / "runs").exists()


RESUMED = [*LOOSE, "--epochs", "4", "--dropout", "0.1"]


def final_state(folder):
    state = torch.load(folder / "last.pt", weights_only=True)
    return {part: state[part] for part in ("student", "teacher", "predictor", "optimizer", "step")}


def rows_of(folder):
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    return [{key: row[key] for key in row if key != "images_per_s"} for row in rows]


def assert_equal(a, b):
    """Bit for bit, whatever is nested in dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, (dict, list)):
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_and_resumed_run_ends_bit_for_bit_as_if_it_was_not(
    tmp_path, monkeypatch, capsys, stop
):
    """8 steps of dropout, 2 an epoch; stopped by SIGINT or SIGTERM after `stop` steps."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    assert scott.main([*RESUMED, "--out", "whole"]) == 0
    number, code = {1: (signal.SIGINT, 130), 3: (signal.SIGTERM, 143)}[stop]
    update, calls = scott.MIMJEPA.update_teacher, []

    def update_and_signal(self, momentum):
        update(self, momentum)
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(scott.MIMJEPA, "update_teacher", update_and_signal)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        scott.main([*RESUMED, "--out", "cut"])
    assert stopped.value.code == code
    assert "--resume cut/last.pt" in capsys.readouterr().out
    assert scott.load_checkpoint("cut/last.pt")["step"] == stop
    assert scott.main(["--resume", "cut/last.pt"]) == 0
    assert_equal(final_state(Path("cut")), final_state(Path("whole")))
    assert rows_of(Path("cut")) == rows_of(Path("whole"))
    # a finished run says so, with --out as well
    before = Path("cut/last.pt").stat()
    capsys.readouterr()
    assert scott.main(["--out", "cut", "--resume"]) == 0
    assert "finished" in capsys.readouterr().out
    assert Path("cut/last.pt").stat() == before and not Path("cut-2").exists()


def test_resume_goes_on_for_more_epochs_and_refuses_other_settings(
    run, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "runs/pictures-scott-tiny-16"
    shutil.copytree(run[0], folder)
    monkeypatch.chdir(run[0].parent.parent)
    checkpoint = str(folder / "last.pt")
    before = final_state(folder)
    flags = ["--mask", "random", "--lr", "0.001", "--epochs", "1"]
    assert scott.main(["--resume", checkpoint, *flags]) == 2
    printed = capsys.readouterr().err
    for words in ("mask random (there blockwise)", "lr 0.001", "epochs 1 (there 2)"):
        assert words in printed
    assert printed.count("\n") == 1
    assert_equal(final_state(folder), before)
    more = Path(shutil.copy("pictures/a/image0.png", "pictures/a/more.png"))
    assert scott.main(["--resume", checkpoint, "--epochs", "3"]) == 2
    assert "images 25 (there 24)" in capsys.readouterr().err
    more.unlink()
    assert scott.main(["--resume", checkpoint, "--epochs", "3", "--workers", "0"]) == 0
    assert "3 epochs" in capsys.readouterr().out
    assert scott.load_checkpoint(checkpoint)["step"] == 9
    assert [row["epoch"] for row in rows_of(folder)] == ["0", "1", "2", "3"]
    assert float(rows_of(folder)[-1]["lr"]) == 1e-5


def test_max_minutes_ends_cleanly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    assert scott.main([*RESUMED, "--max-minutes", "0"]) == 0
    assert "--resume runs/loose-scott-tiny-16/last.pt" in capsys.readouterr().out
    assert scott.load_checkpoint("runs/loose-scott-tiny-16/last.pt")["step"] == 1


def test_a_stop_before_the_first_step_says_that_nothing_is_saved(tmp_path, monkeypatch, capsys):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    monkeypatch.setattr(probe, "monitor", stop)
    with pytest.raises(SystemExit) as stopped:
        scott.main(RESUMED)
    assert stopped.value.code == 143
    assert "nothing to save" in capsys.readouterr().err


def kill_and_resume(place, monkeypatch, kills, seed):
    """Kill a run `kills` times at random moments of its steps and saves; finish it at last."""
    monkeypatch.chdir(place)
    save_images(place / "loose", 17)
    rng, last = np.random.default_rng(seed), place / "killed/last.pt"
    settings = [*RESUMED, "--epochs", str(10 + 4 * kills), "--knn-every", "9"]
    flags = [*settings, "--save-minutes", "0", "--out", "killed"]
    for _ in range(kills):
        before = scott.load_checkpoint(last)["step"] if last.exists() else 0
        process = subprocess.Popen([sys.executable, SCOTT, *flags], stdout=subprocess.DEVNULL)
        while process.poll() is None and not (
            last.exists() and scott.load_checkpoint(last)["step"] > before
        ):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None  # there is something to kill
        process.kill()
        process.wait()
        scott.load_encoder(last)  # whole at any moment
        flags = ["--resume", "killed/last.pt"]
    assert scott.main(flags) == scott.main([*settings, "--out", "whole"]) == 0
    assert_equal(final_state(place / "killed"), final_state(place / "whole"))
    assert rows_of(place / "killed") == rows_of(place / "whole")


def test_three_kills_lose_nothing(tmp_path, monkeypatch):
    kill_and_resume(tmp_path, monkeypatch, 3, seed=0)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path, monkeypatch):
    kill_and_resume(tmp_path, monkeypatch, 20, seed=1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    forward, calls = scott.MIMJEPA.forward, []

    def break_at_step_4(self, *views):
        calls.append(1)
        return forward(self, *views) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    monkeypatch.setattr(scott.MIMJEPA, "forward", break_at_step_4)
    assert scott.main([*RESUMED, "--save-minutes", "0"]) == 2
    printed = capsys.readouterr().err
    assert "step 4" in printed and "--lr" in printed and printed.count("\n") == 1
    state = scott.load_checkpoint("runs/loose-scott-tiny-16/last.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["student"].values())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys):
    path = tmp_path / "last.pt"
    scott.write_file(path, lambda file: file.write(b"before"))
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(scott.UserError, match="No space left"):
        scott.write_file(path, lambda file: torch.save(torch.zeros(10**6), file))
    assert path.read_bytes() == b"before"


TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", SCOTT]
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0", "--drop-path", "0"]


def weight_changes_differ(config, one, two):
    """Largest norm of the difference of two students, a share of the change since the start."""
    torch.manual_seed(0)
    start = scott.encoder_of(config).state_dict()
    return max(((one[name] - two[name]).norm() / (one[name] - start[name]).norm()).item()
               for name in ("tokenizer.conv1.weight", "blocks.3.ffn.proj.weight", "mask_token"))


def test_a_step_in_parts_is_the_same_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 41)
    flags = [*LOOSE, *NO_DROPOUT, "--epochs", "4", "--lr-start", "1e-4"]
    for parts in ("1", "4"):
        assert scott.main([*flags, "--grad-accum-steps", parts, "--out", parts]) == 0
    whole, parts = (scott.load_checkpoint(f"{name}/last.pt") for name in ("1", "4"))
    assert whole["step"] == parts["step"] == 20
    assert weight_changes_differ(whole["config"], whole["student"], parts["student"]) < 1e-3
    for one, two in zip(rows_of(Path("1"))[1:], rows_of(Path("4"))[1:]):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-4)
    # the number of parts may change from one resume to the next
    assert scott.main(["--resume", "4/last.pt", "--epochs", "5", "--grad-accum-steps", "2"]) == 0


def test_a_step_in_parts_needs_equal_parts_and_says_when_memory_runs_out(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    assert scott.main([*RESUMED, "--grad-accum-steps", "3"]) == 2
    assert "--grad-accum-steps 3: must divide" in capsys.readouterr().err

    def full(self, view_a, view_b, mask):
        if len(view_a) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.student(view_a, mask).mean()

    monkeypatch.setattr(scott.MIMJEPA, "forward", full)
    assert scott.main([*RESUMED, "--grad-accum-steps", "2"]) == 2
    printed = capsys.readouterr().err
    assert "--grad-accum-steps 4" in printed and printed.count("\n") == 1
    assert scott.main([*RESUMED, "--grad-accum-steps", "4"]) == 0


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 41)
    flags = [*LOOSE, *NO_DROPOUT, "--epochs", "4", "--lr-start", "1e-4"]
    assert scott.main([*flags, "--out", "one"]) == 0
    command, environment = [*TWO, *flags, "--out", "two"], os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--grad-accum-steps", "2"]  # of a process: two parts of two images
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained in") == 1  # only one of the two speaks
    assert not Path("two-2").exists()
    one, two = (scott.load_checkpoint(f"{name}/last.pt") for name in ("one", "two"))
    assert one["step"] == two["step"] == 20
    assert weight_changes_differ(one["config"], one["student"], two["student"]) < 0.01
    losses = [[row["loss"] for row in rows_of(Path(name))][1:] for name in ("one", "two")]
    assert losses[0] != losses[1]  # each writes the loss of its own images


def test_a_batch_that_the_processes_cannot_share_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert scott.main(RESUMED) == 2
    assert "--batch-size 8: 3 processes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_one_process_ends_the_run(tmp_path, monkeypatch, capfd, number):
    """A rank that is killed must not leave the other waiting; one that is stopped saves."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 41)
    flags = [*LOOSE, "--epochs", "1000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*TWO, *flags, "--save-minutes", "0", "--out", "two"], env=environment)
    while not Path("two/last.pt").exists():
        assert run.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), number)
    assert run.wait(timeout=60) != 0
    step = scott.load_checkpoint("two/last.pt")["step"]
    said = f"stopped after step {step} of 5000; to go on: --resume two/last.pt"
    assert step > 0 and (said in capfd.readouterr().out) == (number == signal.SIGTERM)


# ---- baselines/: I-JEPA, CAPI and Bootleg -------------------------------------------------------

METHODS = {
    "ijepa": (ijepa, ijepa.IJEPA),
    "capi": (capi, capi.CAPI),
    "bootleg": (bootleg, bootleg.Bootleg),
}


def make_baseline(name, model="vit-tiny/16", size=96, count=4, **options):
    """(method, its arguments): two views, then the masks."""
    module, objective = METHODS[name]
    config = module.Config(data="x", model=model, img_size=size, batch_size=count, **options)
    config = scott.resolve(config.settled())
    encoder = scott.create_encoder(model, depth=3, embed_dim=96, registers=config.registers)
    method = objective(encoder, config)
    draw = partial(method.draw_mask, (size // 16, size // 16), config.mask_ratio)
    items = [(torch.rand(3, size, size), torch.rand(2, 10), draw().flatten()) for _ in range(count)]
    collate = getattr(method, "collate", torch.utils.data.default_collate)
    views, _, *masks = collate(items)
    return method, [views, torch.rand_like(views), *masks]


def rectangle(patches, width):
    """(height, width) of the block that the sorted indices are; None if they are no block."""
    rows, columns = patches // width, patches % width
    h, w = (int(x.max() - x.min()) + 1 for x in (rows, columns))
    return (h, w) if h * w == len(set(patches.tolist())) else None


def randomise(views, hidden):
    """The views with other pixels where `hidden` (B, N)."""
    side = views.shape[-1] // 16
    return torch.where(scott.enlarge(hidden.view(-1, 1, side, side), views), torch.rand(()), views)


def multi_block_batches(draw, count, batch=8):
    generator = torch.Generator().manual_seed(0)
    return [draw(batch, (14, 14), generator) for _ in range(count)]


def test_ijepa_masks_are_four_equal_blocks_and_a_square_without_them(monkeypatch):
    sides, place = [], ijepa.place_blocks

    def noting(count, grid, sizes, side, *rest):
        sides.append(side)
        return place(count, grid, sizes, side, *rest)

    monkeypatch.setattr(ijepa, "place_blocks", noting)
    seen, wanted = torch.zeros(196), torch.zeros(196)
    for side, (visible, targets) in zip(sides, multi_block_batches(ijepa.multi_block, 60)):
        assert targets.shape[:2] == (8, 4) and 25 <= targets.shape[2] <= 42
        assert len({rectangle(block, 14) for block in targets.flatten(0, 1)} - {None}) == 1
        for context, blocks in zip(visible, targets):
            assert len(context) == len(set(context.tolist())) >= 10
            assert not set(context.tolist()) & set(blocks.flatten().tolist())
            rows, columns = context // 14, context % 14
            assert max(rows.max() - rows.min(), columns.max() - columns.min()) < side
        seen += visible.flatten().bincount(minlength=196)
        wanted += targets.flatten().bincount(minlength=196)
    assert set(sides) == {13, 14}
    assert seen.min() > 0 and wanted.min() > 0


def test_ijepa_scale_and_aspect_of_a_block_are_independent():
    sizes = [rectangle(t[0, 0], 14) for _, t in multi_block_batches(ijepa.multi_block, 400, 1)]
    h, w = np.array(sizes, dtype=float).T
    assert abs(np.corrcoef(h * w, np.log(h / w))[0, 1]) < 0.15


def test_all_images_of_a_batch_see_as_much_as_the_one_that_sees_least():
    for draw in (ijepa.multi_block, bootleg.alternating_blocks):
        one, two = (draw(n, (14, 14), torch.Generator().manual_seed(5)) for n in (1, 2))
        assert torch.equal(one[1][0], two[1][0])  # the same draws
        assert set(two[0][0].tolist()) <= set(one[0][0].tolist())
        assert two[0].shape[1] <= one[0].shape[1]


def test_bootleg_masks_alternate_and_are_symmetric():
    areas, seen = set(), torch.zeros(14, 14)
    for visible, targets in multi_block_batches(bootleg.alternating_blocks, 150):
        areas.add(targets.shape[2])
        for blocks in targets:
            sizes = [rectangle(block, 14) for block in blocks]
            assert sizes[0] == sizes[2] == sizes[1][::-1] == sizes[3][::-1]
        assert not set(visible[0].tolist()) & set(targets[0].flatten().tolist())
        seen += visible.flatten().bincount(minlength=196).view(14, 14)
    assert areas == {30, 35, 36}
    seen /= 150 * 8
    assert 0.30 < seen.mean() < 0.42  # 0.37 for batches of 8
    for other in (seen.flip(0), seen.flip(1), seen.T):
        assert (seen - other).abs().max() < 0.08


def test_bootleg_drops_what_is_too_much_from_a_corner(monkeypatch):
    monkeypatch.setattr(bootleg, "place_blocks", lambda *args: args)
    count, grid, sizes, side, order, *_ = bootleg.alternating_blocks(
        1, (14, 14), torch.Generator().manual_seed(1)
    )
    rows, columns = torch.arange(196) // 14, torch.arange(196) % 14
    assert sorted(order(rows, columns).tolist()) == list(range(196))
    first = order(rows, columns)[0].item()
    assert first in (0, 13, 182, 195)  # what is dropped first lies in the corner across


@pytest.mark.parametrize("grid, hidden", [((14, 14), 127), ((16, 16), 166), ((6, 6), 23)])
def test_capi_hides_all_but_a_rolled_block(grid, hidden):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mask = capi.rolled_block_mask(grid, 0.65, generator)
        assert mask.sum() == hidden
        for y, x in np.ndindex(grid):  # some roll back makes a block without its tail
            back = ~mask.roll((-y, -x), (0, 1))
            h, w = back.any(1).sum(), back.any(0).sum()
            if back[:h, :w].flatten().int().diff().max() <= 0 and back[:h, :w].sum() == back.sum():
                break
        else:
            raise AssertionError(mask)


def test_capi_hides_every_position_alike():
    generator = torch.Generator().manual_seed(0)
    masks = [capi.rolled_block_mask((14, 14), 0.65, generator) for _ in range(8000)]
    share = torch.stack(masks).float().mean(0)
    assert 0.62 < share.min() and share.max() < 0.68


@pytest.mark.parametrize("model", ["vit-tiny/16", "scott-tiny/16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_baselines_student_does_not_see_hidden_pixels_and_its_teacher_does(name, model):
    method, (view_a, view_b, hidden, *masks) = make_baseline(name, model)
    wanted = {"ijepa": 0.2, "bootleg": 0.2, "capi": 0.35}[name]
    assert (~hidden).float().mean() > wanted - 0.15

    def loss(a, b):
        torch.manual_seed(0)  # of CAPI's choice of positions
        return method(a, b, hidden, *masks).item()

    changed = randomise(view_a, hidden)
    assert not torch.equal(changed, view_a)
    assert loss(changed, view_b) == loss(view_a, view_b)
    assert loss(view_a, randomise(view_b, hidden)) != loss(view_a, view_b)
    assert loss(view_a, randomise(view_b, ~hidden)) != loss(view_a, view_b)


def test_capi_does_not_leak_around_the_border_of_a_rolled_block():
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:3, :4] = False
    mask = mask.roll((-1, -2), (0, 1)).flatten()[None]  # four pieces, one in each corner
    visible = (~mask).nonzero()[:, 1][None]
    encoder, image = scott.create_encoder("scott-tiny/16", depth=1), torch.rand(1, 3, 96, 96)
    tokens = encoder(image, mask, visible)
    assert tokens.shape == (1, 12, 192)
    assert torch.equal(tokens, encoder(randomise(image, mask), mask, visible))


@pytest.mark.parametrize("name", METHODS)
def test_a_baselines_teacher_has_no_gradient_and_everything_else_has(name):
    method, batch = make_baseline(name)
    method.train()
    assert not method.teacher.training
    method(*batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    trained = {n: p for n, p in method.named_parameters() if not n.startswith("teacher.")}
    without = {n for n, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0}
    assert without == {"student.mask_token"}
    before = method.teacher.registers.clone() if name != "ijepa" else None
    method.update_teacher(1.0)
    assert all(map(torch.equal, method.student.parameters(), method.teacher.parameters()))
    method.student.blocks[0].ffn.proj.weight.data += 1
    method.update_teacher(0.75)
    difference = (method.student.blocks[0].ffn.proj.weight
                  - method.teacher.blocks[0].ffn.proj.weight)
    assert torch.allclose(difference, torch.tensor(0.75), atol=1e-6)
    assert before is None or torch.equal(method.teacher.registers, before)


@pytest.mark.parametrize("name", ["ijepa", "bootleg"])
def test_target_blocks_are_predicted_each_on_its_own(name):
    method, (view, _, hidden, visible, targets) = make_baseline(name)
    layers = {"ijepa": 1, "bootleg": 3}[name]
    context = method.student(view, hidden, visible)
    assert context.shape == (4, visible.shape[1] + {"ijepa": 0, "bootleg": 5}[name], 96)
    whole = method.predictor(context, visible, targets, (6, 6))
    assert whole.shape == (*targets.shape, 96 * layers)
    first = method.predictor(context, visible, targets[:, :1], (6, 6))
    assert torch.allclose(first, whole[:, :1], atol=1e-5)
    others = torch.cat([targets[:, :1], targets[:, 1:].roll(1, 0)], 1)
    assert torch.allclose(method.predictor(context, visible, others, (6, 6))[:, 0], whole[:, 0],
                          atol=1e-5)
    swapped = torch.arange(targets.shape[2])
    swapped[:2] = torch.tensor([1, 0])
    again = method.predictor(context, visible, targets[..., swapped], (6, 6))
    assert torch.allclose(again, whole[..., swapped, :], atol=1e-5)
    assert not torch.allclose(whole[..., 0, :], whole[..., 1, :], atol=1e-3)


def test_bootlegs_predictor_gets_the_class_token_and_no_registers():
    method, (view, _, hidden, visible, targets) = make_baseline("bootleg")
    context = method.student(view, hidden, visible)
    before = method.predictor(context, visible, targets, (6, 6))
    registers, class_token = context.clone(), context.clone()
    registers[:, 1:5] = 0
    class_token[:, 0] = 0
    assert torch.equal(method.predictor(registers, visible, targets, (6, 6)), before)
    assert not torch.equal(method.predictor(class_token, visible, targets, (6, 6)), before)


def test_ijepas_losses():
    method, _ = make_baseline("ijepa", loss="l2")
    prediction, target = torch.randn(2, 3, 4, 5, 96)
    assert method.loss(target, target) == 0
    blocks = [(prediction[b, m] - target[b, m]).norm(dim=-1).square().sum()
              for b in range(3) for m in range(4)]
    assert torch.allclose(method.loss(prediction, target), sum(blocks) / 12)
    method, _ = make_baseline("ijepa")
    assert method.loss(target, target) == 0
    assert torch.equal(method.loss(prediction, target), F.smooth_l1_loss(prediction, target))


def test_bootlegs_targets_are_hidden_layers_each_standardised():
    assert scott.hidden_layers(12) == [1, 4, 8, 12]
    assert scott.hidden_layers(3) == [1, 2, 3] and scott.hidden_layers(1) == [1]
    method, (_, view, *_) = make_baseline("bootleg")
    teacher, outputs = method.teacher, []
    for block in teacher.blocks:
        block.register_forward_hook(lambda m, a, out: outputs.append(out[:, 5:]))
    target = teacher(view, layers=method.layers)
    assert target.shape == (4, 36, 3 * 96)
    for part, output in zip(target.chunk(3, -1), outputs):
        assert part.mean(-1).abs().max() < 1e-5
        assert part.var(-1, correction=0).sub(1).abs().max() < 1e-2
        assert torch.allclose(part, F.layer_norm(3 * output + 2, (96,)), atol=1e-3)
    assert method.loss(torch.zeros_like(target), target).item() == pytest.approx(1, abs=1e-2)
    assert torch.equal(target[..., -96:], teacher(view))


def test_mimjepa_can_predict_hidden_layers():
    objective = scott.MIMJEPA(scott.create_encoder("vit-tiny/16"), 1, hidden_targets=True)
    assert objective.layers == [1, 3, 4]
    view, mask = torch.rand(2, 3, 64, 64), random_patch_mask().flatten(1)
    with torch.no_grad():
        target = objective.teacher(view, layers=[1, 3, 4])
        context = objective.student(view, mask) + objective.student.grid_positions(view)
        expected = F.smooth_l1_loss(objective.predictor(context)[mask], target[mask])
    assert torch.allclose(objective(view, view, mask), expected, atol=1e-6)


def test_sinkhorn_assigns_every_token_and_uses_all_clusters():
    logits = torch.randn(64, 4, 16, requires_grad=True)
    for positionwise in (True, False):
        assert not capi.sinkhorn(logits, positionwise).requires_grad
        for iterations in (1, 3, 50):
            shares = capi.sinkhorn(logits, positionwise, iterations)
            assert torch.allclose(shares.sum(-1), torch.ones(64, 4), atol=1e-6)
        used = shares.sum(0) if positionwise else shares.sum((0, 1)) / 4
        assert (used / 4 - 1).abs().max() < 0.05
        shape = (1, 4, 16) if positionwise else (1, 1, 16)
        moved = capi.sinkhorn(logits + 10 * torch.randn(shape), positionwise)
        assert torch.allclose(moved, capi.sinkhorn(logits, positionwise), atol=1e-4)
        far = torch.cat([logits, logits[:1] - 1000])
        assert capi.sinkhorn(far, positionwise).isfinite().all()


def test_positionwise_clusters_say_nothing_of_the_position():
    features = torch.randn(9, 1, 16) + 0.05 * torch.randn(9, 64, 16)  # of a position, mostly
    logits = F.normalize(features.transpose(0, 1), dim=-1) @ torch.randn(16, 16) / 0.06

    def information(shares):  # between position and cluster, nats
        joint, entropy = shares.mean(0) / 9, torch.special.entr
        return entropy(joint.sum(0)).sum() + math.log(9) - entropy(joint).sum()

    assert information(capi.sinkhorn(logits)) < 0.01
    assert information(capi.sinkhorn(logits, positionwise=False)) > 1


def test_capis_two_losses_train_apart(monkeypatch):
    method, batch = make_baseline("capi")

    def gradients():
        method.zero_grad()
        torch.manual_seed(0)
        method(*batch).backward()
        return method.prototypes.weight.grad.clone(), method.predictor.head.weight.grad.clone()

    prototypes, head = gradients()
    losses = []
    monkeypatch.setattr(capi, "cross_entropy", lambda t, x: losses.append((t, x)) or x.sum() * 0)
    method(*batch)
    monkeypatch.undo()
    (targets, logits), (picked, predicted) = losses
    assert not targets.requires_grad and predicted.shape == (4, 7, 512)
    weight = method.prototypes.weight
    clustering = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(torch.autograd.grad(clustering, weight)[0], prototypes, atol=1e-6)
    method.predictor.head.weight.data = torch.randn_like(method.predictor.head.weight)
    other_prototypes, other_head = gradients()
    assert torch.equal(other_prototypes, prototypes) and not torch.equal(other_head, head)


def test_capi_predicts_hidden_positions_each_on_its_own():
    method, (view, _, mask) = make_baseline("capi")
    asked = []
    method.predictor.register_forward_hook(lambda m, args, out: asked.append((args, out)))
    method(view, view, mask)
    (context, wanted, grid), whole = asked[0]
    assert context.shape == (4, 16 + 13, 96) and wanted.shape == (4, 7)
    assert mask.gather(1, wanted).all() and all(len(set(row.tolist())) == 7 for row in wanted)
    alone = method.predictor(context, wanted[:, 3:4], grid)
    assert torch.allclose(alone, whole[:, 3:4], atol=1e-5)


def test_capis_schedule_and_groups():
    config = capi.Config(epochs=100).settled()
    total, warmup = 1000, 100
    values = [config.schedule(step, total, warmup) for step in range(total)]
    assert values[0] == (0, 0.1, 1) and values[warmup][0] == config.lr
    assert values[-1][0] / config.lr == pytest.approx(0.0955, abs=1e-4)
    assert all(momentum == 1 - lr for lr, _, momentum in values)
    method, _ = make_baseline("capi")
    optimizer = scott.create_optimizer(method, 1e-3)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(method.prototypes.weight)] == 0.5
    assert {scales[id(p)] for p in method.student.tokenizer.parameters()} == {0.2}
    assert scales[id(method.predictor.head.weight)] == 1


def test_recipes_and_flags_of_a_baseline():
    parse = partial(scott.parse_config, cls=bootleg.Config)
    flags = ["--data", "flowers102"]
    paper = parse(flags).settled()
    assert (paper.crop_scale, paper.views, paper.lr) == (0.35, "none", 3e-3 * 128 / 2048)
    controlled = parse([*flags, "--recipe", "controlled"]).settled()
    plain = scott.Config(data="flowers102")
    for name in ("crop_scale", "views", "flip_prob", "dropout", "lr", "lr_flat", "beta2", "wd_end"):
        assert getattr(controlled, name) == getattr(plain, name)
    for config in (paper, controlled):
        assert (config.ema_start, config.ema_end) == (0.9985, 0.9985)
        assert (config.model, config.predictor_depth) == ("vit-12/16", 10)
    assert parse([*flags, "--lr", "0.01", "--views", "same"]).settled().lr == 0.01


BASELINE = [*TINY, "--epochs", "3", "--data", "loose", "--save-minutes", "0"]


@pytest.mark.parametrize("name", METHODS)
def test_a_baseline_trains_stops_resumes_and_is_probed(name, tmp_path, monkeypatch, capsys):
    module, objective = METHODS[name]
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose" / "a", 17)
    save_images(tmp_path / "loose" / "b", 8)
    monkeypatch.setitem(scott.SIZES, "tiny", (48, 2, 2))
    flags = [*BASELINE, "--model", "scott-tiny/16", "--predictor-depth", "2", "--dropout", "0.1"]
    flags[flags.index("32")] = "64"
    if name == "bootleg":  # 16 heads
        monkeypatch.setitem(scott.SIZES, "tiny", (96, 2, 2))
    assert module.main(flags) == 0
    whole = Path(f"runs/loose-{name}-scott-tiny-16")
    assert "other than in its paper" in capsys.readouterr().out
    update, calls = scott.MIMJEPA.update_teacher, []

    def update_and_signal(self, momentum):
        update(self, momentum)
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(scott.MIMJEPA, "update_teacher", update_and_signal)
    with pytest.raises(SystemExit):
        module.main([*flags, "--out", "cut"])
    monkeypatch.setattr(scott.MIMJEPA, "update_teacher", update)
    assert scott.load_checkpoint("cut/last.pt")["step"] == 4
    assert scott.main(["--resume", "cut/last.pt"]) == 2  # another method
    printed = capsys.readouterr().err
    assert "other settings" in printed and printed.count("\n") == 1
    assert module.main(["--resume", "cut/last.pt"]) == 0
    assert_equal(final_state(Path("cut")), final_state(whole))
    groups = scott.load_checkpoint(whole / "last.pt")["optimizer"]["param_groups"]
    rates = {(group["lr_scale"], round(group["lr"] / group["lr_scale"], 12)) for group in groups}
    assert len({rate for _, rate in rates}) == 1  # each its share of one learning rate
    assert len(rates) == {"ijepa": 1, "bootleg": 1, "capi": 3}[name]
    assert probe.main(["--ckpt", str(whole / "last.pt"), "--mode", "knn", "--workers", "0"]) == 0
    assert json.loads((whole / "probe.json").read_text())[0]["mode"] == "knn"


@pytest.mark.parametrize("name", ["ijepa", "bootleg"])
def test_a_baselines_step_in_parts_is_the_same_step(name):
    method, batch = make_baseline(name)
    gradients, losses = [], []
    for parts in (1, 2):
        losses.append(scott.backward(method, batch, parts, nullcontext))
        trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
        gradients.append({n: p.grad.clone() for n, p in trained.items()})
        method.zero_grad()
    assert torch.allclose(*losses)
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, rtol=1e-3, atol=1e-6), key


def test_mistakes_with_a_baseline_are_one_line(capsys):
    for main, flags, says in (
        (capi.main, ["--grad-accum-steps", "2"], "--grad-accum-steps"),
        (ijepa.main, ["--mask-ratio", "0.4"], "--mask-ratio 0.4"),
        (capi.main, ["--hidden-targets"], "--hidden-targets"),
        (bootleg.main, ["--model", "vit-13/16"], "vit-12/16"),
    ):
        assert main(flags) == 2
        printed = capsys.readouterr().err
        assert says in printed and printed.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        ijepa.main(["--mask", "random"])
    assert stopped.value.code == 2


# ---- The command line --------------------------------------------------------------------------


def test_demo_is_the_default_and_a_given_flag_wins():
    demo = scott.parse_config([])
    assert (demo.data, demo.model, demo.which) == ("demo", "scott-tiny/16", "student")
    assert demo.img_size == 64
    given = scott.parse_config(["--img-size", "96", "--which", "teacher"])
    assert (given.img_size, given.which, given.model) == (96, "teacher", "scott-tiny/16")
    paper = scott.parse_config(["--data", "flowers102"])
    assert paper == scott.Config(data="flowers102")
    assert (paper.model, paper.img_size, paper.epochs) == ("scott-12/16", 224, 300)


def test_help_shows_every_flag():
    result = subprocess.run([sys.executable, SCOTT, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for name in scott.Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in result.stdout


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--img-size 100", "multiple of the patch size"),
        ("--mask-ratio 1", "hides none or all"),
        ("--mask-ratio nan", "must be from"),
        ("--epochs 0", "must be from"),
        ("--lr -1", "must be from"),
        ("--epochs many", "invalid int"),
        ("--views blue", "invalid choice"),
        ("--data nosuch", "--data nosuch: no folder"),
        ("--data empty", "no images in empty"),
        ("--data flowers102 --root nowhere", "flowers-102/ with jpg/"),
        ("--model scott-5/16", "scott-7/16"),
        ("--heads 7", "must divide the width"),
        ("--split valid", "train"),
        ("--batch-size 100000", "more than"),
        ("--device cuda:7", "--device"),
        ("--nosuch 1", "unrecognized"),
        ("--data taken", "--data taken: no folder"),
        ("--data flower102", "the closest is flowers102"),
        ("--out taken", "--out taken: is a file"),
        ("--out taken/run", "cannot write taken/run/config.json"),
        ("--resume nosuch.pt", "nosuch.pt: No such file"),
        ("--resume taken", "taken: of other software"),
        ("--out empty --resume", "empty/last.pt: No such file"),
        ("--max-minutes nan", "must be from"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, says):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.flowers102.download_and_extract_archive", offline)
    monkeypatch.setattr(probe, "draw_flowers", partial(probe.draw_flowers, count=64, size=32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("a file")
    try:
        code = scott.main(flags.split())
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2 and says in printed and printed.count("\n") == 1, printed
    assert not (tmp_path / "runs").exists()


def test_benchmark_ends_with_json_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    monkeypatch.setattr(probe, "WINDOW", 0.01)
    assert scott.main([*LOOSE, "--benchmark"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(numbers) == [
        "step_images_per_s", "data_images_per_s", "train_images_per_s", "flops_per_s",
        "matmul_flops_per_s", "peak_memory_bytes",
    ]  # fmt: skip
    assert all(value > 0 for value in numbers.values())
    flops = numbers["flops_per_s"] / numbers["step_images_per_s"]  # of an image
    weights = sum(p.numel() for p in scott.create_encoder("scott-tiny/16").blocks.parameters())
    assert 4 * 4 * 2 * weights < flops < 30 * 4 * 2 * weights  # 4 tokens, student and teacher, ...
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_compiled_training_is_training(tmp_path, monkeypatch):
    flags = ["--dropout", "0", "--attention-dropout", "0", "--drop-path", "0", "--out"]
    _, rows = train_here(tmp_path, monkeypatch, *flags, "a")
    _, compiled = train_here(tmp_path, monkeypatch, *flags, "b", "--compile")
    assert float(compiled[-1]["loss"]) == pytest.approx(float(rows[-1]["loss"]), rel=1e-3)


@pytest.mark.slow
def test_compile_without_a_compiler_is_explained(tmp_path):
    env = os.environ | {"PATH": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, SCOTT, "--device", "cpu", "--compile"]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "--compile" in run.stderr and "ompiler" in run.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_demo_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = scott.train(scott.parse_config([]))
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert float(rows[-1]["knn_top1"]) > float(rows[0]["knn_top1"]) + 3
