"""Tests of scott.py and probe.py: behaviour that someone relies on (-m slow: the slow ones)."""

import ast
import copy
import csv
import inspect
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

import probe
import scott

SCOTT = Path(scott.__file__).resolve()
TINY = ["--model", "scott-tiny/16", "--epochs", "1", "--batch-size", "8", "--img-size", "32",
        "--predictor-depth", "1", "--workers", "0", "--amp", "fp32"]
PROBE = ["--workers", "0", "--amp", "fp32"]

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def tiny_encoder(tokenizer=scott.SparseConvTokenizer, **options):
    return scott.ViT(tokenizer(48), 48, 2, 2, **options)

def random_patch_mask(batch=2, grid=(4, 4), ratio=0.6):
    return torch.stack([scott.random_mask(grid, ratio) for _ in range(batch)])

def hidden_pixels(images, mask):
    """Of images (B, 3, H, W) and a mask (B, N): bool, as the images."""
    return scott.enlarge(mask.view(-1, 1, *scott.grid_of(images)), images).expand_as(images)

def save_images(folder, count, size=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{i}.png")

def open_folder(path, **settings):
    settings = {"img_size": 32, "workers": 0, "device": "cpu", "amp": "fp32"} | settings
    return scott.open_data(scott.resolve(scott.Config(data=str(path), **settings)))

# ---- Sizes -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, count, within", [
    ("scott-3/16", 6_522_432, 0), ("scott-7/16", 13_600_320, 0),
    ("scott-9/16", 17_139_264, 0), ("scott-12/16", 22_447_680, 0),
    ("vit-7/16", 12_700_000, 60_000), ("vit-12/16", 21_500_000, 60_000),  # as the paper rounds
])
def test_parameter_counts_are_the_papers(name, count, within):
    assert abs(sum(p.numel() for p in scott.create_encoder(name).parameters()) - count) <= within

@pytest.mark.parametrize("tokenizer", [scott.SparseConvTokenizer, scott.PatchEmbed])
def test_vit_takes_any_size_divisible_by_16_and_any_number_of_channels(tokenizer):
    encoder = scott.ViT(tokenizer(48, in_channels=13), 48, 2, 2)
    for height, width in ((96, 96), (48, 160), (224, 32)):
        tokens = encoder(torch.randn(1, 13, height, width))
        assert tokens.shape == (1, height // 16 * (width // 16), 48)
        assert tokens.mean(-1).abs().max() < 1e-4  # the output is LayerNormed
    with pytest.raises(ValueError, match="divisible by 16"):
        encoder(torch.randn(1, 13, 100, 96))

def test_a_position_depends_on_row_and_column_alone():
    small, large = scott.sincos_positions(2, 3, 48), scott.sincos_positions(4, 5, 48)
    assert small.shape == (6, 48)
    assert torch.equal(small.view(2, 3, 48), large.view(4, 5, 48)[:2, :3])
    assert len(torch.unique(large, dim=0)) == 20

# ---- Sparse layers: the properties of mask and renormalise -------------------------------------
def plain_conv(x, weight, mask, renormalise):
    """SparseConv2d, written for reading: zero, convolve, divide by the visible share, zero."""
    hidden = torch.zeros_like(x[:, :1], dtype=torch.bool)
    if mask is not None:
        hidden = scott.enlarge(mask, x)
    inside, taps = torch.ones_like(x[:, :1]), torch.ones_like(weight[:1, :1])
    out = F.conv2d(x.masked_fill(hidden, 0), weight, stride=2, padding=3)
    count = F.conv2d(inside, taps, stride=2, padding=3)
    seen = F.conv2d(inside.masked_fill(hidden, 0), taps, stride=2, padding=3)
    if renormalise:
        out = out * count / seen.clamp_min(1)
    return out if mask is None else out.masked_fill(scott.enlarge(mask, out), 0)

def plain_pool(x, mask=None):
    """sparse_max_blur_pool, with the blur as a depthwise convolution."""
    if mask is not None:
        x = x.masked_fill(scott.enlarge(mask, x), -1e4)
    x = F.max_pool2d(x, 2, 1)
    kernel = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16
    kernel = kernel.expand(x.shape[1], 1, 3, 3)
    x = F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])
    return x if mask is None else x.masked_fill(scott.enlarge(mask, x), 0)

LAYERS = {
    "conv": lambda: scott.SparseConv2d(3, 5, 7, 2, 3),
    "not renormalised": lambda: scott.SparseConv2d(3, 5, 7, 2, 3, renormalise=False),
    "pool": lambda: scott.sparse_max_blur_pool,
}

@pytest.mark.parametrize("name", LAYERS)
def test_hidden_sites_have_no_influence_and_stay_empty(name):
    layer, mask = LAYERS[name](), random_patch_mask()[:, None]
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    hidden = scott.enlarge(mask, x).expand_as(x)
    out = layer(x, mask)
    assert out.is_contiguous(memory_format=torch.channels_last)  # the other one costs a third
    assert torch.equal(layer(torch.where(hidden, 1e6, x), mask), out)
    assert torch.equal(layer(torch.where(hidden, torch.nan, x), mask), out)
    out.square().sum().backward()
    assert x.grad[hidden].abs().max() == 0 and x.grad[~hidden].abs().max() > 0
    empty = scott.enlarge(mask, out).expand_as(out)
    assert out[empty].abs().max() == 0 and (out[~empty] != 0).all()

@pytest.mark.parametrize("hidden", [None, (0, 0), (10, 3)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_tokenizer_equals_one_written_for_reading(hidden, renormalise):
    """Tokens and gradients, whatever the memory format and the number of hidden patches."""
    tokenizer = scott.SparseConvTokenizer(48, renormalise=renormalise)
    images, mask = torch.rand(2, 3, 64, 64), None
    if hidden is not None:
        mask = torch.stack([torch.randperm(16) < count for count in hidden]).view(2, 1, 4, 4)
    weights = [tokenizer.conv1.weight, tokenizer.conv2.weight]
    plain = images
    for weight in weights:
        plain = plain_pool(F.relu(plain_conv(plain, weight, mask, renormalise)), mask)
    plain = plain.flatten(2).mT
    images = images.contiguous(memory_format=torch.channels_last)
    fast = tokenizer(images, None if mask is None else mask.flatten(1))
    assert torch.allclose(fast, plain, atol=1e-5)
    factor = torch.randn_like(plain)
    gradients = [torch.autograd.grad((y * factor).sum(), weights) for y in (fast, plain)]
    for own, other in zip(*gradients):
        assert torch.allclose(own, other, atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize("tokenizer", [scott.SparseConvTokenizer, scott.PatchEmbed])
@pytest.mark.parametrize("size", [(64, 64), (64, 112)])
def test_visible_tokens_and_all_outputs_know_nothing_of_hidden_pixels(tokenizer, size):
    encoder = tiny_encoder(tokenizer, registers=1)
    images = torch.rand(2, 3, *size, requires_grad=True)
    mask = random_patch_mask(grid=scott.grid_of(images)).flatten(1)
    hidden = hidden_pixels(images, mask)
    changed = torch.where(hidden, torch.rand_like(images), images)
    tokens, out = encoder.tokenizer(images, mask), encoder(images, mask)
    assert tokens.shape == out.shape == (*mask.shape, 48)
    assert torch.equal(encoder.tokenizer(changed, mask)[~mask], tokens[~mask])
    assert torch.equal(encoder(changed, mask), out)
    if tokenizer is scott.SparseConvTokenizer:
        assert tokens[mask].abs().max() == 0
    (gradient,) = torch.autograd.grad(out.square().sum(), images)
    assert gradient[hidden].abs().max() == 0

# ---- Masks -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", scott.MASKS)
@pytest.mark.parametrize("grid", [(14, 14), (10, 10), (2, 2), (1, 5), (3, 17)])
def test_masks_hide_the_asked_number_any_position_and_repeat_with_their_generator(kind, grid):
    def draw(ratio, seed):
        return scott.MASKS[kind](grid, ratio, torch.Generator().manual_seed(seed))
    for ratio in (0.05, 0.3, 0.6, 0.95):
        masks = torch.stack([draw(ratio, seed) for seed in range(100 if ratio == 0.6 else 5)])
        assert masks.shape[1:] == grid and masks.dtype == torch.bool
        assert (masks.sum((1, 2)) == int(ratio * grid[0] * grid[1])).all()
        assert torch.equal(masks[3], draw(ratio, 3))
        assert ratio != 0.6 or (masks.any(0) & ~masks.all(0)).all()

def test_blocks_are_visible_and_with_hidden_blocks_hidden():
    """How often corners, edges and the middle are hidden (docs/differences.md)."""
    def shares(kind):
        hidden = sum(scott.MASKS[kind]((14, 14), 0.6).float() for _ in range(600)) / 600
        corners, middle = hidden[[0, 0, -1, -1], [0, -1, 0, -1]], hidden[6:8, 6:8]
        return corners.mean(), hidden[0, 4:10].mean(), middle.mean()
    for found, expected in ((shares("blockwise"), (0.95, 0.81, 0.26)),
                            (shares("hidden-blocks"), (0.09, 0.33, 0.93)),
                            (shares("random"), (0.60, 0.60, 0.60))):
        assert found == pytest.approx(expected, abs=0.06)

def test_what_the_blocks_are_lies_together_and_is_smaller_than_the_grid():
    def neighbours(kind, hidden, grid=(14, 14)):
        masks = [scott.MASKS[kind](grid, 0.6) == hidden for _ in range(100)]
        return sum(float((m[1:] & m[:-1]).sum() / m.sum()) for m in masks) / 100
    for kind, hidden in (("blockwise", False), ("hidden-blocks", True)):
        assert neighbours(kind, hidden) > neighbours("random", hidden) + 0.1
        flat = neighbours("random", hidden, (2, 40))  # of two rows a block has one
        assert neighbours(kind, hidden, (2, 40)) == pytest.approx(flat, abs=0.04)

# ---- The method --------------------------------------------------------------------------------
def make_method(**options):
    objective = scott.MIMJEPA(tiny_encoder(**options), predictor_depth=1)
    mask = random_patch_mask(4).flatten(1)
    return objective, torch.rand(4, 3, 64, 64), torch.rand(4, 3, 64, 64), mask

def test_loss_is_smooth_l1_on_hidden_tokens_only():
    objective, view_a, view_b, mask = make_method()
    with torch.no_grad():
        context = objective.student(view_a, mask)
        prediction = objective.predictor(context + objective.student.positions(view_a))
        expected = F.smooth_l1_loss(prediction[mask], objective.teacher(view_b)[mask])
    assert torch.allclose(objective(view_a, view_b, mask), expected, atol=1e-6)
    # A change of the teacher's output at visible places only must not change the loss.
    objective.teacher.register_forward_hook(lambda m, a, out: out + 100 * ~mask[..., None])
    assert torch.allclose(objective(view_a, view_b, mask), expected, atol=1e-6)

def test_the_student_does_not_see_hidden_pixels_and_the_teacher_does():
    objective, view_a, view_b, mask = make_method()
    hidden = hidden_pixels(view_a, mask)
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
    objective, *batch = make_method(dropout=0.5, attention_dropout=0.5, drop_path=0.5)
    targets, contexts = [], []
    objective.train()
    objective.teacher.register_forward_hook(lambda m, a, out: targets.append(out))
    objective.student.register_forward_hook(lambda m, a, out: contexts.append(out))
    objective(*batch)
    objective(*batch)
    assert torch.equal(*targets) and not torch.equal(*contexts)

def test_matrices_decay_vectors_do_not_and_the_teacher_is_not_trained():
    objective, *_ = make_method()
    for group in scott.parameter_groups(objective.parameters(), lr_scale=0.5):
        members = {id(weight) for weight in group["params"]}
        for name, weight in objective.named_parameters():
            wanted = not name.startswith("teacher.") and group["decayed"] == (weight.ndim > 1)
            assert (id(weight) in members) == wanted, name
        assert group["lr_scale"] == 0.5

# ---- Schedules ---------------------------------------------------------------------------------
@pytest.mark.parametrize("total, warmup", [(18_900, 2520), (100, 0), (7, 3), (2, 0), (2, 1)])
def test_schedules_are_exact_at_both_ends(total, warmup):
    config = scott.Config()
    assert config.schedule(0, total, warmup) == (1e-6 if warmup else 5e-4, 0.04, 0.996)
    assert config.schedule(total - 1, total, warmup) == (1e-5, 0.4, 1.0)
    other = scott.Config(lr_end=1e-3, wd_end=0.1, ema_end=0.9)
    assert other.schedule(total - 1, total, warmup) == (1e-3, 0.1, 0.9)

def test_learning_rate_rises_stays_and_falls():
    rates = [scott.lr_schedule(step, 1000, 100) for step in range(1000)]
    assert rates[50] == pytest.approx((1e-6 + 5e-4) / 2)
    flat = [i for i, rate in enumerate(rates) if rate == 5e-4]
    assert flat == list(range(100, 100 + len(flat)))
    assert len(flat) == pytest.approx(0.72 * 900, abs=2)
    assert all(a > b for a, b in zip(rates[flat[-1] :], rates[flat[-1] + 1 :]))
    assert scott.lr_schedule(998, 1000, 100, flat=1) == 5e-4

def test_warmup_is_40_epochs_and_shorter_in_short_runs():
    for epochs, expected in ((300, 40), (1200, 40), (30, 4)):
        assert scott.resolve(scott.Config(epochs=epochs)).warmup_epochs == pytest.approx(expected)

# ---- Views -------------------------------------------------------------------------------------
def views_of(folder, count=1, **settings):
    """Plain crops, and `count` times the two views of the first image of a folder, as floats."""
    settings = {"flip_prob": 0.0, "color_prob": 1.0, "img_size": 32} | settings
    crop = open_folder(folder, **settings | {"views": "none"})[0, 0][0]
    images = open_folder(folder, **settings)
    return crop.float(), [[view.float() for view in images[i, 0][:2]] for i in range(count)]

def test_views_are_different_the_same_or_plain(tmp_path):
    save_images(tmp_path, 1)
    for views, changed, alike in (("none", False, True), ("same", True, True),
                                  ("different", True, False)):
        crop, [[view_a, view_b]] = views_of(tmp_path, views=views)
        assert torch.equal(view_a, crop) != changed, views
        assert torch.equal(view_a, view_b) == alike, views
    crop, [views] = views_of(tmp_path, views="different", color_prob=0.0)
    assert all(torch.equal(view, crop) for view in views)

def test_views_share_crop_flip_and_mask_and_draw_colours_as_often_as_asked(tmp_path):
    half = Image.new("RGB", (40, 40))
    half.paste((200, 60, 120), (0, 0, 20, 40))
    half.save(tmp_path / "half.png")
    crop, views = views_of(tmp_path, 1500, color_prob=0.6, flip_prob=0.5, crop_scale=1.0)
    first, second = (torch.stack(part) for part in zip(*views))
    flipped = [part[..., :12].mean((1, 2, 3)) < part[..., 20:].mean((1, 2, 3))
               for part in (first, second)]
    assert torch.equal(*flipped) and flipped[0].float().mean() == pytest.approx(0.5, abs=0.04)
    plain = torch.stack([crop, crop.flip(2)])
    for part in (first, second):
        changed = (part[:, None] != plain).flatten(2).any(2).all(1).float().mean()
        gray = (part.std(1) < 0.6).flatten(1).all(1).float().mean()
        assert changed == pytest.approx(0.6 * (1 - 0.2 * 0.7 * 0.9), abs=0.04)  # App. C
        assert gray == pytest.approx(0.6 * 0.1, abs=0.02)

@pytest.mark.parametrize("size, width", [(224, 9), (96, 3), (64, 3), (160, 7)])
def test_the_blur_grows_with_the_image(size, width):
    colors = str(scott.view_transforms(scott.Config(img_size=size))[1].transforms[0].transforms[1])
    assert f"kernel_size=({width}, {width}), sigma=[0.1, 2.0]" in colors

def test_normalise_takes_bytes_and_floats():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    out = scott.normalise(images)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out, scott.normalise(images / 255))
    assert scott.normalise(torch.full((1, 3, 1, 1), 0.406))[0, 2].abs() < 1e-6

# ---- Data --------------------------------------------------------------------------------------
def test_crops_are_keyed_by_seed_epoch_and_image_and_leave_the_generator_alone():
    images, other = (scott.draw_flowers(scott.Config(img_size=32, seed=seed), count=4, size=48)
                     for seed in (1, 2))
    before, first = torch.get_rng_state(), images[(3, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in first[:2])
    assert first[2].shape == (4,) and first[2].sum() == 2
    assert all(map(torch.equal, first, images[(3, 2)]))
    for changed in (images[(4, 2)], images[(3, 1)], other[(3, 2)]):
        assert not torch.equal(first[0], changed[0]) and not torch.equal(first[1], changed[1])
    assert torch.equal(images[2], other[2])  # the centre crop is not random

def test_a_folder_with_splits_and_labels(tmp_path):
    for place, count in (("train/rose", 3), ("train/tulip", 2), ("val/rose", 1), ("val/tulip", 1)):
        save_images(tmp_path / place, count)
    save_images(tmp_path / "train", 1)  # loose
    save_images(tmp_path / "train/rose/deep", 1)  # nested deeper
    save_images(tmp_path / ".hidden", 1)
    (tmp_path / "train/notes.txt").write_text("not an image")
    images = open_folder(tmp_path)
    assert list(images.classes) == ["rose", "tulip"]
    assert sorted(images.labels) == [-1, -1, 0, 0, 0, 0, 1, 1, 1]
    assert len(images.select("all")) == 9 and len(images.select("train")) == 7
    assert len(images.select("trainval")) == 9
    train, test = scott.evaluation_split(images)
    assert len(train) == 5 and len(test) == 2
    assert all("/val/" in images.paths[i] for i in test)
    with pytest.raises(scott.UserError, match="has all train val"):
        images.select("test")

def test_folders_without_splits_and_without_labels(tmp_path):
    save_images(tmp_path / "a", 20)
    save_images(tmp_path / "b", 10)
    images = open_folder(tmp_path)
    train, test = scott.evaluation_split(images)
    assert sorted([*train, *test]) == list(range(30))
    assert [images.labels[i] for i in test] == [0] * 4 + [1] * 2
    (tmp_path / "self").symlink_to(tmp_path)
    again = open_folder(tmp_path)  # of a folder that links to itself
    assert again.paths.tolist() == images.paths.tolist()
    assert all(map(np.array_equal, scott.evaluation_split(again), (train, test)))
    images = open_folder(tmp_path / "a")  # flat: unlabelled
    assert list(images.labels) == [-1] * 20 and scott.evaluation_split(images) is None

def test_decoding_shrinks_to_the_side_and_memory_changes_nothing(tmp_path):
    save_images(tmp_path, 2, size=100)
    images = open_folder(tmp_path, img_size=32, crop_scale=0.5)
    plain = [images.load(i) for i in range(2)]
    assert plain[0].shape == (3, 46, 50) and plain[0].dtype == torch.uint8  # 32 / sqrt(0.5)
    assert images.read(0.0) == 0 and not images.decoded
    assert images.read(1.0) == 0 and set(images.decoded) == set(images.paths)
    assert all(torch.equal(images.load(i), plain[i]) for i in range(2))

SHARED = SCOTT.parent.parent / "shared"
@pytest.mark.skipif(not (SHARED / "flowers-102").is_dir(), reason="Flowers-102 is not here")
def test_flowers102_has_its_official_splits():
    images = scott.open_data(scott.Config(data="flowers102", root=str(SHARED)))
    sizes = [len(images.select(split)) for split in ("train", "val", "test", "trainval", "all")]
    assert sizes == [1020, 1020, 6149, 2040, 8189]
    assert len(images.classes) == 102 and set(images.labels) == set(range(102))
    assert [len(part) for part in scott.evaluation_split(images)] == [2040, 6149]

def save_odd_images(folder):
    """Readable images of unusual kinds: {name: colour of the upper left corner}."""
    folder.mkdir(parents=True)
    red, white, gray, blue = (255, 0, 0), (255,) * 3, (128,) * 3, (0, 0, 255)
    colors = {}
    def save(name, color, image, **options):
        image.save(folder / name, **options)
        colors[name] = color
    half = Image.new("RGB", (40, 30))
    half.paste(red, (0, 0, 20, 30))  # the left half is red, the right half black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left half comes up
    best = {"quality": 100, "subsampling": 0}
    save("turned.jpg", red, half, exif=exif, **best)
    save("cmyk.jpg", red, half.convert("CMYK"), **best)
    clear = half.convert("RGBA")
    clear.putalpha(0)
    save("transparent.png", red, clear)  # what is below shows
    save("palette.png", red, half.quantize(4))
    save("sixteen.png", white, Image.fromarray(np.full((30, 40), 65535, np.uint16)))
    save("sixteen-half.tif", gray, Image.fromarray(np.full((30, 40), 32896, np.uint16)))
    save("more-than-sixteen.tif", white, Image.fromarray(np.full((30, 40), 70000, np.int32)))
    save("gray.png", gray, Image.new("L", (40, 30), 128))
    save("bits.png", white, Image.new("1", (40, 30), 1))
    frames = [Image.new("RGB", (40, 30), color) for color in ("blue", "green", "white")]
    save("film.gif", blue, frames[0], save_all=True, append_images=frames[1:])
    save("point.png", blue, Image.new("RGB", (1, 1), "blue"))
    save("line.png", blue, Image.new("RGB", (5000, 3), "blue"))
    return colors

def test_images_of_all_kinds_are_read_as_people_see_them(tmp_path):
    colors = save_odd_images(tmp_path / "odd")
    images = open_folder(tmp_path / "odd", value_range=[0, 65535])
    names = [Path(path).name for path in images.paths]
    assert sorted(names) == sorted(colors)
    for i, name in enumerate(names):
        image = images.load(i)
        assert image.dtype == torch.uint8 and len(image) == 3
        assert (image[:, 0, 0].int() - torch.tensor(colors[name])).abs().max() <= 3, name
        assert images[i].shape == images[(0, i)][0].shape == (3, 32, 32)
    turned = images.load(names.index("turned.jpg"))
    assert turned.shape == (3, 40, 30)
    assert turned[0, 0, 29] > 250 and turned[0, 39, 0] < 5

@pytest.mark.parametrize("name, scale, kind", [("a.png", 16, np.uint16), ("a.tif", 0.004, "f4")])
def test_16_bits_and_floats_are_scaled_by_one_range_for_the_set(tmp_path, name, scale, kind):
    for i in range(25):
        values = scale * (20 + np.add.outer(np.arange(64.0), np.arange(64) + 5 * i))
        values[0, 0] = 0 if scale == 16 else np.nan
        Image.fromarray(values.astype(kind)).save(tmp_path / f"{i:02} {name}")
    for wrong in ([], [255, 0]):
        with pytest.raises(scott.UserError, match="--value-range LOW HIGH; its own values are"):
            open_folder(tmp_path, value_range=wrong).load(0)
    images = open_folder(tmp_path, value_range=[20 * scale, 266 * scale])
    loaded = torch.stack([images.load(i)[0].float() for i in range(25)])
    steps = loaded.mean((1, 2)).diff()  # dark images stay dark
    assert loaded[:, 0, 0].max() == 0 and ((4 < steps) & (steps < 6)).all() and loaded.max() == 255

# ---- Monitors ----------------------------------------------------------------------------------
@pytest.mark.parametrize("scores_of", [scott.knn_scores, probe.ridge_scores])
def test_knn_and_ridge_find_clusters_and_nothing_in_noise(scores_of):
    labels = torch.arange(400) % 4
    centres = F.one_hot(labels, 300).float()
    noise = torch.randn(400, 300)  # more dimensions than vectors to learn from
    for features, low, high in ((centres + 0.1 * noise, 0.9, 1), (noise, 0.1, 0.4)):
        scores = scores_of(features[:200], labels[:200], features[200:], 4)
        assert low <= (scores.argmax(1) == labels[200:]).float().mean() <= high

def test_ridge_has_the_penalty_by_which_most_vectors_are_right_when_left_out():
    labels, everyone = torch.arange(60) % 6, torch.arange(60)
    x = (torch.randn(6, 20)[labels] + torch.randn(60, 20)).double()
    inputs = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(60, 1)], 1)
    def scores(rows, penalty):  # of all, learned on some; the intercept is not penalised
        gram = inputs[rows].T @ inputs[rows] + penalty * (torch.arange(21) < 20).diag()
        targets = F.one_hot(labels[rows], 6).double()
        return inputs @ torch.linalg.solve(gram, inputs[rows].T @ targets)
    def right(penalty):
        return sum(scores(everyone != i, penalty)[i].argmax() == labels[i] for i in range(60))
    best = max((right(penalty), penalty) for penalty in 10.0 ** np.arange(-2, 7))[1]
    assert torch.allclose(probe.ridge_scores(x, labels, x, 6), scores(everyone, best))

def test_effective_rank_counts_directions():
    assert scott.effective_rank(torch.randn(4096, 32) + 7) == pytest.approx(32, abs=0.5)
    assert 4 < scott.effective_rank(torch.randn(4096, 8) @ torch.randn(8, 64)) < 8.01

# ---- Runs --------------------------------------------------------------------------------------
LOOSE = ["--data", "loose", *TINY]
RESUMED = [*LOOSE, "--epochs", "4", "--dropout", "0.1"]  # 8 steps, 2 an epoch
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0", "--drop-path", "0"]

@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory; in it loose/, a folder of 17 unlabelled images."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 17)
    return tmp_path

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a small labelled folder: (its folder, what it printed). It is the run of a
    copy of scott.py, alone in its folder, whose loss is 100 more."""
    place = tmp_path_factory.mktemp("run")
    save_images(place / "pictures/a", 12)
    save_images(place / "pictures/b", 12)
    source = SCOTT.read_text()
    edited = source.replace("return (loss * mask).sum()", "return 100 + (loss * mask).sum()")
    assert edited != source
    (place / "my_scott.py").write_text(edited)
    command = [sys.executable, "my_scott.py", "--data", "pictures", *TINY, "--epochs", "2"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([*command, "--dropout", "0.1"], cwd=place, env=alone,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return place / "runs/pictures-scott-tiny-16", result.stdout

def rows_of(folder):
    """The lines of metrics.csv, without the speed."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{key: row[key] for key in row if key != "images_per_s"} for row in rows]

def train_here(*flags, method=None):
    """Train on the loose images in this process: (state of the objective, rows)."""
    if "--out" not in flags and "--resume" not in flags:
        flags = (*flags, "--out", f"runs/{len(list(Path('runs').glob('*')))}")
    folder = scott.train(scott.parse_config([*LOOSE, *flags]), method)
    return scott.load_checkpoint(folder / "last.pt")["objective"], rows_of(folder)

def final_state(folder):
    state = scott.load_checkpoint(folder / "last.pt")
    return {part: state[part] for part in ("objective", "optimizer", "step")}

def assert_equal(a, b):
    """Bit for bit, whatever is nested in dicts and lists."""
    (ours, structure), (theirs, other) = tree_flatten(a), tree_flatten(b)
    assert structure == other
    for x, y in zip(ours, theirs):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

def test_scott_imports_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(SCOTT.read_text())):  # within functions as well
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "torch", "torchvision", "PIL"}
    assert not imported & {"importlib", "runpy"}

def test_a_copy_of_scott_alone_runs_its_own_code_and_leaves_all_of_a_run(run):
    folder, printed = run
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "last.pt", "metrics.csv", "preview.png", "source.py"]
    assert (folder / "source.py").read_text() == (folder.parents[1] / "my_scott.py").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["epochs"] == 2 and config["device"] != "auto"
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and rows[0]["loss"] == ""
    assert all(100 < float(row["loss"]) < 110 for row in rows[1:])  # its own code's
    assert all(math.isfinite(float(row["effective_rank"])) and row["knn_top1"] for row in rows)
    assert float(rows[-1]["lr"]) == 1e-5 and float(rows[-1]["ema"]) == 1.0
    assert Image.open(folder / "preview.png").size[0] > 8 * 32
    assert "untrained" in printed and "teacher" in printed

def test_a_checkpoint_holds_both_encoders(run):
    path = run[0] / "last.pt"
    weights = scott.load_checkpoint(path)["objective"]
    by_default, student = probe.load_encoder(path), probe.load_encoder(path, which="student")
    assert not by_default.training and not any(p.requires_grad for p in by_default.parameters())
    for name, weight in by_default.state_dict().items():  # this run's config says teacher
        assert torch.equal(weight, weights[f"teacher.{name}"])
    assert not all(map(torch.equal, student.parameters(), by_default.parameters()))
    assert by_default(torch.rand(1, 3, 48, 32)).shape == (1, 6, 192)
    with pytest.raises(TypeError, match="no setting of a run: droput"):
        probe.load_encoder(path, droput=0.1)
    with pytest.raises(scott.UserError, match="last.pt: an encoder alone"):
        probe.load_classifier(path)

def test_batches_visit_every_image_once_an_epoch_and_resume_anywhere(tmp_path):
    save_images(tmp_path, 11)
    flags = ["--data", str(tmp_path), *TINY, "--batch-size", "3", "--epochs", "3"]
    def keys(*more, start=0):
        run = scott.Run(scott.resolve(scott.parse_config([*flags, *more])))
        return list(run.batches(start).batch_sampler)
    whole = keys()
    assert [{epoch for epoch, _ in batch} for batch in whole] == [{0}] * 3 + [{1}] * 3 + [{2}] * 3
    for epoch in range(3):
        seen = {i for batch in whole[3 * epoch : 3 * epoch + 3] for _, i in batch}
        assert len(seen) == 9 and seen <= set(range(11))
    assert [i for _, i in whole[0]] != [i for _, i in whole[3]]
    assert keys(start=4) == whole[4:]
    assert keys("--seed", "1")[0] != whole[0]

def test_the_same_seed_gives_the_same_run_whatever_the_workers(place):
    one, rows = train_here()
    two, again = train_here("--workers", "2", "--cache-gib", "0")
    other, _ = train_here("--seed", "1")
    assert_equal(one, two)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert rows == again and rows[-1]["knn_top1"] == ""

def test_a_run_is_never_written_over_another(place, capsys):
    train_here("--out", "runs/first")
    before = Path("runs/first/last.pt").stat()
    assert scott.main([*LOOSE, "--out", "runs/first"]) == 2
    assert "--resume runs/first/last.pt" in capsys.readouterr().err
    assert Path("runs/first/last.pt").stat() == before
    with pytest.raises(scott.UserError, match="File exists"):  # begun in the same minute
        scott.write_file("runs/first/source.py", "", new=True)

@pytest.mark.parametrize("kind", ["hidden-blocks", "random"])
def test_other_masks_models_and_views_train(place, kind):
    flags = ["--mask", kind, "--model", "vit-tiny/16", "--views", "none", "--residual-norm"]
    _, rows = train_here(*flags, "--flip-prob", "0", "--no-renormalise")
    assert 0 < float(rows[-1]["loss"]) < 2

def test_a_collapse_is_called_one(place, monkeypatch, capsys):
    def collapse(self, view_a, view_b, mask):
        return self.student(view_a, mask).std(1).mean() + self.student(view_a).std(0).mean()
    train_here()
    assert "collapse" not in capsys.readouterr().out
    monkeypatch.setattr(scott.MIMJEPA, "forward", collapse)
    train_here("--epochs", "14", "--lr", "0.01", "--which", "student", "--knn-every", "7")
    assert "collapse" in capsys.readouterr().out

def save_broken_images(folder):
    """Files that are no images, or not whole: their names."""
    save_images(folder, 1, size=200)
    data = (folder / "image0.png").read_bytes()
    (folder / "image0.png").unlink()
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "bomb.ppm").write_bytes(b"P6 30000 30000 255\n" + bytes(1000))  # 900 million pixels
    Image.new("F", (40, 30), 0.5).save(folder / "floats.tif")  # without --value-range
    return ["bomb.ppm", "cut.png", "floats.tif", "text.jpg", "zero.jpg"]

def test_unreadable_images_are_named_and_left_out(place, capsys):
    save_images(place / "loose/b", 6)
    broken = save_broken_images(place / "loose/a")
    save_images(place / "loose/a", 5)
    images = open_folder("loose")
    before = dict(zip(images.paths, images.labels))
    assert images.read(1.0) == 5
    printed = capsys.readouterr().out
    assert all(sum(f"/a/{name}: " in line for line in printed.splitlines()) == 1 for name in broken)
    assert len(images.paths) == len(images.labels) == len(images.splits) == len(before) - 5
    assert all(before[path] == label for path, label in zip(images.paths, images.labels))
    assert len(train_here()[1]) == 2

# ---- A method of one's own ---------------------------------------------------------------------
class Pixels(nn.Module):
    """Predict the pixels of hidden patches (as SimMIM)."""
    def __init__(self, encoder, config):
        super().__init__()
        self.student, self.head = encoder, nn.Linear(encoder.embed_dim, 3 * 16 * 16)

    def forward(self, view_a, view_b, mask):
        pixels = F.unfold(view_a, 16, stride=16).mT  # (B, N, 768)
        return F.l1_loss(self.head(self.student(view_a, mask))[mask], pixels[mask])

class PixelsWithState(Pixels):
    """With a parameter and a buffer directly on the objective."""
    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, view_a, view_b, mask):
        self.seen += len(view_a)
        return super().forward(self.scale * view_a, view_b, mask) + self.scale.square() / 9

@pytest.mark.parametrize("method", [Pixels, PixelsWithState])
def test_a_method_of_ones_own_stops_and_resumes_bit_for_bit(place, capsys, method):
    config = scott.parse_config([*LOOSE, "--epochs", "3", "--which", "student"])
    scott.train(replace(config, out="whole"), method)
    scott.train(replace(config, out="cut", max_minutes=0.0), method)
    cut = final_state(Path("cut"))
    scott.train(scott.parse_config(["--resume", "cut/last.pt"]), method)
    whole, rows = final_state(Path("whole")), rows_of(Path("whole"))
    assert cut["step"] == 1 and float(rows[-1]["loss"]) < float(rows[1]["loss"])
    assert_equal(final_state(Path("cut")), whole)
    assert rows_of(Path("cut")) == rows
    assert probe.load_encoder("cut/last.pt").embed_dim == 192
    if method is PixelsWithState:
        first, last = cut["objective"], whole["objective"]
        assert first["seen"] == 8 and last["seen"] == 48 and first["scale"] != last["scale"]
    assert scott.main(["--resume", "cut/last.pt", "--epochs", "4"]) == 2
    printed = capsys.readouterr().err
    assert "another method" in printed and printed.count("\n") == 1

def test_a_method_may_draw_masks_group_its_parameters_and_have_a_teacher(place):
    momenta, masks = [], []

    class Own(Pixels):
        def draw_masks(self, count, grid, generator):
            hidden = torch.rand(count, math.prod(grid), generator=generator) < 0.5
            return hidden, torch.arange(count)
        def forward(self, view_a, view_b, hidden, numbers):
            assert numbers.tolist() == list(range(8))
            masks.append(hidden)
            return super().forward(view_a, view_b, hidden)
        def update_teacher(self, momentum):
            momenta.append(momentum)
        def parameter_groups(self):
            slow = scott.parameter_groups(self.student.parameters(), 0.5)
            return slow + scott.parameter_groups(self.head.parameters())
    train_here("--which", "student", "--lr-end", "0.125", "--out", "own", method=Own)
    assert momenta == [0.996, 1.0] and not torch.equal(*masks)
    groups = scott.load_checkpoint("own/last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.0625, 0.0625, 0.125, 0.125]
    assert [group["weight_decay"] for group in groups] == [0.4, 0.0, 0.4, 0.0]

def test_the_readme_shows_the_method_that_is_tested_here():
    blocks = re.findall(r"```python\n(.*?)```", SCOTT.with_name("README.md").read_text(), re.DOTALL)
    (shown,) = (block for block in blocks if "class Pixels" in block)
    assert inspect.getsource(Pixels).strip() in shown

# ---- Trust: runs that end early ----------------------------------------------------------------
@pytest.mark.parametrize("stop, number, code", [(1, signal.SIGINT, 130), (3, signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_bit_for_bit(place, monkeypatch, capsys, stop, number, code):
    """After `stop` steps of 8, with dropout; SIGTERM comes to its loader as well, as in Slurm."""
    assert scott.main([*RESUMED, "--out", "whole"]) == 0
    update, calls = scott.MIMJEPA.update_teacher, []
    def update_and_signal(self, momentum):
        update(self, momentum)
        calls.append(1)
        if len(calls) == stop:
            for loader in multiprocessing.active_children() if number == signal.SIGTERM else ():
                subprocess.run(["kill", f"{loader.pid}"], check=True)  # torch ignores ours
            signal.raise_signal(number)
    monkeypatch.setattr(scott.MIMJEPA, "update_teacher", update_and_signal)
    with pytest.raises(SystemExit) as stopped:
        scott.main([*RESUMED, "--workers", "1", "--out", "cut"])
    assert stopped.value.code == code and "--resume cut/last.pt" in capsys.readouterr().out
    assert scott.load_checkpoint("cut/last.pt")["step"] == stop
    assert scott.main(["--resume", "cut/last.pt"]) == 0
    assert_equal(final_state(Path("cut")), final_state(Path("whole")))
    assert rows_of(Path("cut")) == rows_of(Path("whole"))
    before = Path("cut/last.pt").stat()
    capsys.readouterr()
    assert scott.main(["--resume", "cut/last.pt"]) == 0
    assert "finished" in capsys.readouterr().out
    assert Path("cut/last.pt").stat() == before and not Path("cut-2").exists()

def test_resume_takes_more_epochs_and_refuses_other_settings(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(run[0], folder)
    monkeypatch.chdir(run[0].parent.parent)
    checkpoint = str(folder / "last.pt")
    before = final_state(folder)
    for flags, says in (("--mask random", "--mask blockwise"), ("--lr 0.001", "--lr 0.0005"),
                        ("--epochs 1", "--epochs 2"), ("--out other", "--out")):
        assert scott.main(["--resume", checkpoint, *flags.split()]) == 2
        printed = capsys.readouterr().err
        assert says in printed and printed.count("\n") == 1
    more = Path(shutil.copy("pictures/a/image0.png", "pictures/a/more.png"))
    assert scott.main(["--resume", checkpoint, "--epochs", "3"]) == 2
    assert "24 images, not 25" in capsys.readouterr().err
    more.unlink()
    assert_equal(final_state(folder), before)
    state = scott.load_checkpoint(checkpoint)
    for name in ("flip_prob", "beta2", "value_range"):  # as if it was from before these flags
        del state["config"][name]
    torch.save(state, checkpoint)
    assert probe.open_encoder(probe.ProbeConfig(checkpoint))[1].value_range == [0, 65535]
    flags = ["--epochs", "3", "--workers", "1", "--mask", "blockwise"]
    assert scott.main(["--resume", checkpoint, *flags]) == 0
    assert scott.load_checkpoint(checkpoint)["step"] == 9
    assert [row["epoch"] for row in rows_of(folder)] == ["0", "1", "2", "3"]
    assert float(rows_of(folder)[-1]["lr"]) == 1e-5

def test_a_stop_before_the_first_step_says_that_nothing_is_saved(place, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.setattr(scott, "monitor", lambda *_: signal.raise_signal(signal.SIGINT))
    assert scott.main(RESUMED) == 130
    assert "nothing to save" in capsys.readouterr().err

def test_an_error_in_a_loader_ends_the_run_which_can_go_on(place):
    assert scott.main([*RESUMED, "--out", "whole"]) == 0
    broken = "import scott; scott.MASKS.clear(); scott.random_mask = None; scott.main()"
    command = [sys.executable, "-c", broken, *RESUMED, "--workers", "1", "--out", "died"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SCOTT.parent)},
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "object is not callable" in result.stderr
    assert scott.main(["--resume", "died/last.pt"]) == 0
    assert_equal(final_state(Path("died")), final_state(Path("whole")))

@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_of_steps_and_saves_lose_nothing(place, kills):
    rng, last = np.random.default_rng(kills), Path("killed/last.pt")
    settings = [*RESUMED, "--epochs", str(10 + 4 * kills), "--knn-every", "9"]
    flags = [*settings, "--save-minutes", "0", "--out", "killed"]
    def saved():
        return last.stat().st_mtime_ns if last.exists() else 0
    for _ in range(kills):
        before = saved()
        process = subprocess.Popen([sys.executable, SCOTT, *flags], stdout=subprocess.DEVNULL)
        while process.poll() is None and saved() == before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None  # there is something to kill
        process.kill()
        process.wait()
        probe.load_encoder(last)  # whole at any moment
        flags = ["--resume", "killed/last.pt"]
    assert scott.main(flags) == scott.main([*settings, "--out", "whole"]) == 0
    assert_equal(final_state(Path("killed")), final_state(Path("whole")))
    assert rows_of(Path("killed")) == rows_of(Path("whole"))

def test_a_loss_that_is_not_finite_stops_the_run(place, monkeypatch, capsys):
    forward, calls = scott.MIMJEPA.forward, []
    def break_at_step_4(self, *views):
        calls.append(1)
        return forward(self, *views) * (math.nan if len(calls) == 4 else 1)
    monkeypatch.setattr(scott.MIMJEPA, "forward", break_at_step_4)
    handler = signal.getsignal(signal.SIGINT)
    assert scott.main([*RESUMED, "--save-minutes", "0"]) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    printed = capsys.readouterr().err
    assert "step 4" in printed and "--lr" in printed and printed.count("\n") == 1
    state = scott.load_checkpoint("runs/loose-scott-tiny-16/last.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["objective"].values())

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "last.pt"
    scott.write_file(path, lambda file: file.write(b"before"))
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(scott.UserError, match="No space left"):
        scott.write_file(path, lambda file: torch.save(torch.zeros(10**6), file))
    assert path.read_bytes() == b"before"

# ---- Steps in parts, and several processes -----------------------------------------------------
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCOTT]

def assert_as_one(one, two, within):
    """Two runs' students changed alike: the difference is a share `within` of the change."""
    first, second = (scott.load_checkpoint(f"{name}/last.pt") for name in (one, two))
    assert first["step"] == second["step"]
    torch.manual_seed(0)
    start = scott.encoder_of(first["config"]).state_dict()
    for name in ("tokenizer.conv1.weight", "blocks.3.ffn.proj.weight", "mask_token"):
        a, b = (state["objective"][f"student.{name}"] for state in (first, second))
        assert (a - b).norm() < within * (a - start[name]).norm(), name

def test_a_step_in_parts_is_the_same_step(place):
    flags = [*LOOSE, *NO_DROPOUT, "--epochs", "4", "--lr-start", "1e-4"]
    for parts in ("1", "4"):
        assert scott.main([*flags, "--grad-accum-steps", parts, "--out", parts]) == 0
    assert_as_one("1", "4", within=1e-3)
    for one, two in zip(rows_of(Path("1"))[1:], rows_of(Path("4"))[1:]):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-4)
    # the number of parts may change from one resume to the next
    assert scott.main(["--resume", "4/last.pt", "--epochs", "5", "--grad-accum-steps", "2"]) == 0

def test_parts_must_be_equal_and_memory_that_runs_out_is_told(place, monkeypatch, capsys):
    for processes in (2, 1):
        monkeypatch.setattr(scott, "PROCESSES", processes)
        assert scott.main([*LOOSE, "--grad-accum-steps", "3"]) == 2
        assert f"8: no multiple of {3 * processes}, " in capsys.readouterr().err
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(scott.MIMJEPA, "forward", full)
    assert scott.main([*LOOSE, "--grad-accum-steps", "2"]) == 2
    printed = capsys.readouterr().err
    assert "--grad-accum-steps 4" in printed and printed.count("\n") == 1

def test_two_processes_train_as_one(place):
    flags = [*LOOSE, *NO_DROPOUT, "--epochs", "8", "--lr-start", "1e-4"]
    assert scott.main([*flags, "--out", "one"]) == 0
    command, environment = [*TWO, *flags, "--out", "two"], os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--grad-accum-steps", "2"]  # of a process: two parts of two images
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished 8 epochs") == 1  # only one of the two speaks
    assert_as_one("one", "two", within=0.01)

@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_one_process_ends_the_run(place, capfd, number):
    """A rank that is killed must not leave the other waiting; one that is stopped saves."""
    flags = [*LOOSE, "--epochs", "1000", "--save-minutes", "0", "--out", "two"]
    run = subprocess.Popen([*TWO, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"})
    last = Path("two/last.pt")
    while not (last.exists() and scott.load_checkpoint(last)["step"]):
        assert run.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    os.kill(int(children.split()[-1]), number)
    assert run.wait(timeout=60) != 0
    step = scott.load_checkpoint(last)["step"]
    said = f"stopped after step {step} of 2000; to go on: --resume two/last.pt"
    assert step > 0 and (said in capfd.readouterr().out) == (number == signal.SIGTERM)

# ---- What a GPU would meet, without one --------------------------------------------------------
class NoMixingNoWaiting(TorchDispatchMode):
    """Tensors on "meta" stand for a GPU's: they have no values, so that what would wait for one
    raises, as do here operations on two devices, and copies to it that would wait. (On tensors of
    FakeTensorMode, autograd would ask for the driver.)"""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}  # a number may come from the CPU
        if function is torch.ops.aten._to_copy.default:
            to_gpu = "cpu" in devices and torch.device(kwargs.get("device") or "cpu").type != "cpu"
            assert kwargs.get("non_blocking") or not to_gpu, "a copy that waits"
        else:
            assert len(devices) < 2, f"{function}: two devices"
        return function(*args, **kwargs)

@pytest.fixture
def on_gpu():
    """Crops and masks of a batch; what follows must not wait, nor mix."""
    crops = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8).to("meta")
    mask = random_patch_mask(8).flatten(1).to("meta")
    with NoMixingNoWaiting():
        yield crops, mask

def test_mixing_devices_and_waiting_are_noticed(on_gpu):
    crops = on_gpu[0]
    for mistake in (lambda: crops + torch.rand(64), lambda: crops[torch.tensor([1, 2])],
                    lambda: crops.sum().item(), lambda: crops[crops > 3], lambda: crops.cpu(),
                    lambda: torch.rand(3).to("meta")):
        with pytest.raises((AssertionError, RuntimeError)):
            mistake()

@pytest.mark.parametrize("model", ["scott-tiny/16", "vit-tiny/16"])
def test_a_step_neither_waits_for_a_gpu_nor_mixes_devices(on_gpu, model):
    crops, mask = on_gpu
    view_a, view_b = scott.normalise(crops), scott.normalise(crops.flip(0))
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.1}
    encoder = scott.create_encoder(model, **rates, registers=1)
    objective = scott.MIMJEPA(encoder, 1).to_empty(device="meta").train()
    parts = scott.Config(device="cpu", amp="fp32", grad_accum_steps=2)  # the device of autocast
    loss = scott.backward(objective, (view_a, view_b, mask), parts)
    torch.optim.AdamW(scott.parameter_groups(objective.parameters())).step()
    objective.update_teacher(0.9)
    assert loss.device.type == objective.student.mask_token.grad.device.type == "meta"

def test_encoding_and_heads_neither_wait_for_a_gpu_nor_mix_devices(on_gpu):
    encoder = scott.create_encoder("scott-tiny/16").to_empty(device="meta").eval()
    with torch.no_grad():
        tokens = encoder(scott.normalise(on_gpu[0])).float()
    assert tokens.mean(1).shape == (8, 192)
    for head in probe.HEADS.values():
        head = head(192, 5).to_empty(device="meta").train()
        F.cross_entropy(head(tokens), torch.zeros(8, dtype=torch.long, device="meta")).backward()
        assert all(weight.grad.device.type == "meta" for weight in head.parameters())

# ---- Probes ------------------------------------------------------------------------------------
def fit_heads(train, test, classes, epochs=30, **heads):
    """Fit on given tokens (n, N, D), both sets with labels: last accuracies of each head, in %."""
    config = scott.Config(epochs=epochs, warmup_epochs=epochs / 5, batch_size=64, lr=0.005,
                          device="cpu", amp="fp32")
    heads = heads or {name: head(train[0].shape[-1], classes) for name, head in probe.HEADS.items()}
    def batches(epoch, order, tokens=train[0]):
        return ((tokens[rows], rows) for rows in order.split(64))
    test_batches = partial(batches, None, tokens=test[0])
    curves = probe.fit(heads, batches, test_batches, (train[1], test[1]), config, evaluations=1)
    return {name: curve[-1][1] for name, curve in curves.items()}

def test_heads_read_a_label_that_is_there_and_guess_where_there_is_none():
    classes, labels = 8, torch.arange(1024) % 8
    tokens = torch.randn(1024, 4, 48)
    tokens[:, :, :8] += 4 * F.one_hot(labels, classes)[:, None]
    train, test = (tokens[:512], labels[:512]), (tokens[512:], labels[512:])
    for result in fit_heads(train, test, classes).values():
        assert result["top1"] == result["top5"] == result["per_class"] == 100
    train, test = ((part[0], part[1][torch.randperm(512)]) for part in (train, test))
    for result in fit_heads(train, test, classes, epochs=10).values():
        assert abs(result["top1"] - 100 / classes) < 5  # 3.4 standard deviations
        assert abs(result["top5"] - 500 / classes) < 7

def test_the_attentive_head_is_cross_attention_written_out():
    head = probe.AttentiveHead(24, 5).eval()
    nn.init.normal_(head.query)
    tokens = torch.randn(3, 7, 24)
    x = head.norm_tokens(tokens)
    q, k, v = head.q(head.query).view(4, 6), head.k(x).view(3, 7, 4, 6), head.v(x).view(3, 7, 4, 6)
    weights = (torch.einsum("hd,bnhd->bhn", q, k) / 6**0.5).softmax(-1)
    z = head.query + head.proj(torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1))
    z = z + head.ffn(head.norm_ffn(z))
    assert torch.allclose(head(tokens), head.head(head.norm(z)), atol=1e-5)

def test_dropout_and_the_training_set_are_for_training_only():
    class Spy(nn.Linear):
        def forward(self, x):
            seen.add((self.training, int(x[0, 1])))
            return super().forward(x)
    seen = set()
    sets = [torch.tensor([[0.0, kind]]).repeat(8, 1) for kind in (0, 1)]
    labels = torch.arange(8) % 2
    fit_heads((sets[0], labels), (sets[1], labels), 2, epochs=2, spy=Spy(2, 2))
    assert seen == {(True, 0), (False, 1)}

def test_accuracies_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 3, 3])  # class 2 is not tested on
    scores = torch.eye(8)[[0, 0, 1, 1, 3, 7]] + torch.eye(8)[labels] * 0.5
    result = probe.accuracies(scores, labels)
    assert result["top1"] == pytest.approx(100 * 4 / 6) and result["top5"] == 100
    assert result["per_class"] == pytest.approx(100 * (2 / 3 + 1 + 1 / 2) / 3)
    assert result["interval"] == pytest.approx([30.0, 90.3], abs=0.1)  # Wilson, from a table

def test_tokens_in_memory_equal_those_computed_again(tmp_path):
    save_images(tmp_path, 5)
    images = open_folder(tmp_path, batch_size=2)
    encoder, calls = tiny_encoder().eval(), []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    order = torch.tensor([4, 1, 0, 3, 2])
    for gib, computed in ((1.0, 3), (0.0, 6)):
        tokens = probe.FrozenTokens(encoder, images, range(5), copies=2, gib=gib)
        calls.clear()
        first = torch.cat([x for x, _ in tokens.batches(1, order)])
        again = torch.cat([x for x, _ in tokens.batches(1, order.flip(0))]).flip(0)
        assert len(calls) == computed
        assert torch.allclose(first, again, atol=2e-3)  # float16
    centre = torch.cat([x for x, _ in tokens.batches(0, torch.arange(5))])
    plain = encoder(scott.normalise(torch.stack([images[i] for i in range(5)])))
    assert torch.allclose(centre, plain, atol=2e-2)
    assert not torch.allclose(centre[order], first, atol=0.1)  # copy 1 is a random crop
    for part in (tokens, probe.FrozenTokens(encoder, images, range(5), pooled=True)):
        assert torch.allclose(part.vectors(), plain.mean(1), atol=1e-2)

def entries(folder):
    return json.loads((folder / "probe.json").read_text())

def test_probes_of_a_run_are_reported_and_appended(run, tmp_path, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(folder.parent.parent)
    flags = ["--ckpt", str(folder / "last.pt"), "--epochs", "3", "--copies", "2", *PROBE]
    assert probe.main(flags) == 0
    printed = capsys.readouterr().out
    first = entries(folder)
    assert [entry["mode"] for entry in first] == ["linear", "attentive", "knn", "ridge"]
    assert "picked on the test set" in printed and "95 % interval" in printed
    for entry in first:
        result = entry["results"]
        assert f"{result['top1']:.1f}" in printed
        assert result["interval"][0] <= result["top1"] <= result["interval"][1] <= 100
        assert entry["counts"] == {"train": 20, "test": 4, "classes": 2}
        assert entry["settings"]["which"] == "teacher" and entry["seed"] == 0
    assert first[0]["best_on_test"]["top1"] >= first[0]["results"]["top1"]
    assert first[2]["results"]["top1"] == pytest.approx(float(rows_of(folder)[-1]["knn_top1"]))
    assert probe.main([*flags, "--mode", "linear"]) == 0
    again = entries(folder)
    assert again[:4] == first and len(again) == 5
    assert again[4]["results"] == first[0]["results"]  # alone or with others, in memory or pooled
    assert probe.main([*flags, "--mode", "knn", "--which", "student", "--out", str(tmp_path)]) == 0
    assert entries(tmp_path)[0]["settings"]["which"] == "student" and entries(folder) == again

def test_fine_tuning_trains_the_encoder_and_goes_on_where_it_was_stopped(
        run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run[0].parent.parent)
    flags = ["--ckpt", str(run[0] / "last.pt"), "--mode", "finetune", "--dropout", "0.2", *PROBE]
    flags += ["--epochs", "3", "--out"]
    assert probe.main([*flags, f"{tmp_path}/whole"]) == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    write = scott.write_file
    with monkeypatch.context() as patch:
        patch.setattr(scott, "write_file", lambda *args: write(*args) or signal.raise_signal(2))
        assert probe.main([*flags, f"{tmp_path}/cut"]) == 130
    assert probe.main([*flags, f"{tmp_path}/cut", "--lr", "0.1"]) == 2
    assert "cut/finetuning.pt: left by another" in capsys.readouterr().err
    assert probe.main([*flags, f"{tmp_path}/cut"]) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    assert probe.main(["--ckpt", f"{tmp_path}/cut/finetuned.pt", "--which", "teacher"]) == 2
    whole, cut = (scott.load_checkpoint(tmp_path / f"{name}/finetuned.pt")["objective"]
                  for name in ("whole", "cut"))
    assert_equal(cut, whole)
    assert entries(tmp_path / "cut")[0]["results"] == entries(tmp_path / "whole")[0]["results"]
    assert not (tmp_path / "cut/finetuning.pt").exists()
    before = probe.load_encoder(run[0] / "last.pt").state_dict()
    unchanged = [name for name in before if torch.equal(before[name], cut[f"student.{name}"])]
    assert unchanged == ["mask_token"]

def test_an_untrained_encoder_is_probed_and_trained_from_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(120):
        noise = np.random.default_rng(i).integers(-40, 40, (40, 40, 3)) + (40, 200)[i % 2]
        folder = tmp_path / "data" / ("train", "val", "test")[i % 3] / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    flags = ["--random-init", "vit-tiny/16", "--data", "data", "--img-size", "32", *PROBE]
    flags += ["--mode", "finetune", "knn", "--epochs", "15", "--batch-size", "8", "--validate"]
    assert probe.main([*flags, "--dropout", "0.3"]) == 0
    knn, finetuned = entries(tmp_path / "runs/data-vit-tiny-16-untrained")
    assert finetuned["mode"] == "finetune" and finetuned["results"]["top1"] == 100
    assert finetuned["settings"]["which"] is None and finetuned["settings"]["lr"] == 5e-4
    assert knn["best_on_test"] is None and knn["counts"] == {"train": 40, "test": 40, "classes": 2}
    path = "runs/data-vit-tiny-16-untrained/finetuned.pt"
    network, classes = probe.load_classifier(path)
    assert network[0].dropout == finetuned["settings"]["dropout"] == 0.3
    assert probe.open_encoder(probe.ProbeConfig(ckpt=path, dropout=0.4))[0].dropout == 0.4
    shown = scott.normalise(torch.tensor([40, 200]).view(2, 1, 1, 1).expand(2, 3, 32, 32) / 255)
    assert classes == ["dark", "light"] and network(shown).softmax(1).diag().min() > 0.9

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

def test_pca_pictures_and_exports_of_a_run(run, tmp_path, monkeypatch):
    folder, _ = run
    monkeypatch.chdir(folder.parent.parent)
    save_images(tmp_path / "loose", 7)
    paths = [str(path) for path in sorted((tmp_path / "loose").iterdir())]
    (tmp_path / "loose/unreadable.png").write_bytes(b"")  # is left out
    flags = ["--ckpt", str(folder / "last.pt"), *PROBE]
    for _ in range(2):
        assert probe.main([*flags, "--pca", str(tmp_path / "parts.png"), *paths]) == 0
        assert probe.main([*flags, "--export", f"{tmp_path}/v1.a.npz", f"{tmp_path}/loose"]) == 0
    names = {path.name for path in tmp_path.iterdir()}  # nothing was overwritten
    assert names == {"loose", "parts.png", "parts-2.png", "v1.a.npz", "v1.a-2.npz"}
    assert Image.open(tmp_path / "parts.png").size == (7 * 34 + 2, 2 * 34 + 2)
    data = np.load(tmp_path / "v1.a.npz", allow_pickle=False)
    assert data["features"].shape == (7, 192) and data["features"].dtype == np.float32
    assert data["paths"].tolist() == paths and (data["labels"] == -1).all()
    crop = open_folder(tmp_path / "loose")[4]
    expected = probe.load_encoder(folder / "last.pt")(scott.normalise(crop[None])).mean(1)[0]
    assert torch.allclose(torch.tensor(data["features"][4]), expected, atol=1e-4)
    # without images or a folder: some of one class, and all, of the data it was trained on
    assert probe.main([*flags, "--pca", str(tmp_path / "own.png")]) == 0
    assert Image.open(tmp_path / "own.png").size == (10 * 34 + 2, 2 * 34 + 2)
    assert probe.main([*flags, "--export", f"{tmp_path}/own.npz"]) == 0
    assert np.load(tmp_path / "own.npz")["classes"].tolist() == ["a", "b"]

# ---- Command lines -----------------------------------------------------------------------------
class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the checkpoint was run')",))

@pytest.fixture(scope="module")
def wrong(run, tmp_path_factory):
    """A folder of files and folders that are wrong in some way, and good.pt."""
    place, good = tmp_path_factory.mktemp("wrong"), run[0] / "last.pt"
    whole, state = good.read_bytes(), torch.load(good, weights_only=True)
    (place / "good.pt").write_bytes(whole)
    (place / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (place / "text.pt").write_text("epoch 1 loss 0.5")
    state["objective"], state["optimizer"] = {}, {}  # small
    torch.save({"model": {}, "epoch": 3}, place / "foreign.pt")
    torch.save(state | {"format": 3}, place / "older.pt")
    torch.save(state | {"extra": Payload()}, place / "code.pt")
    save_images(place / "loose", 3)
    for name in ("single/only", "damaged/a", "damaged/b", "sound/a", "sound/b"):
        save_images(place / name, 6)
    (place / "damaged/b/image2.png").write_bytes(b"no image")
    save_broken_images(place / "broken")
    (place / "empty").mkdir()
    (place / "bad").mkdir()
    (place / "bad/probe.json").write_text("[{")
    return place

def assert_one_line_and_code_2(main, flags, says, capsys):
    """And nothing is written into the working directory."""
    before = {path for path in Path().rglob("*") if path.is_file()}
    try:
        code = main(flags.split())
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2 and says in printed and printed.count("\n") == 1, printed
    assert {path for path in Path().rglob("*") if path.is_file()} == before

NO_CHECKPOINT = "missing, no checkpoint, cut short, or with code in it"

@pytest.mark.parametrize("flags, says", [
    ("--img-size 100", "multiple of the patch size"),
    ("--mask-ratio 1", "hides none or all"),
    ("--flip-prob 1.5", "not from 0 to 1"),
    ("--epochs 0", "not from 1 to"),
    ("--nosuch 1", "unrecognized"),
    ("--data nosuch", "--data nosuch: no such folder"),
    ("--data empty", "no images in empty"),
    ("--data broken", "none of the 5 images can be read"),
    ("--data flowers102 --root nowhere", "no flowers102 in --root nowhere"),
    ("--model scott-5/16", "3, 7, 9, 12"),
    ("--heads 7", "must divide the width"),
    ("--split valid", "has all test train"),
    ("--batch-size 100000", "choose a smaller --batch-size"),
    ("--device cuda:0", "--device cuda:99"),  # as a checkpoint says; a process has its own
    ("--out text.pt", "text.pt exists"),
    ("--out text.pt/run", "cannot write text.pt/run/source.py"),
    ("--resume text.pt", f"text.pt: {NO_CHECKPOINT}"),
    ("--resume older.pt", "older.pt: of another scott.py; go on with"),
])
def test_mistakes_are_one_line_and_exit_code_2(wrong, monkeypatch, capsys, flags, says):
    def offline(*args, **kwargs):
        raise OSError("no network")
    if "cuda" in flags:
        monkeypatch.setenv("LOCAL_RANK", "99")  # there is none
    monkeypatch.chdir(wrong)
    monkeypatch.setattr("torchvision.datasets.flowers102.download_and_extract_archive", offline)
    monkeypatch.setattr(scott, "draw_flowers", partial(scott.draw_flowers, count=64, size=32))
    assert_one_line_and_code_2(scott.main, flags, says, capsys)

@pytest.mark.parametrize("flags, says", [
    ("", "--ckpt FILE or --random-init MODEL"),
    ("--ckpt good.pt --random-init vit-3/16", "--ckpt FILE or --random-init MODEL"),
    ("--ckpt cut.pt", f"cut.pt: {NO_CHECKPOINT}"),
    ("--ckpt foreign.pt", "foreign.pt: of another scott.py"),
    ("--ckpt code.pt", f"code.pt: {NO_CHECKPOINT}"),
    ("--ckpt good.pt --data loose", "at least two classes"),
    ("--ckpt good.pt --data damaged", "cannot be read"),
    ("--ckpt good.pt --data sound --out bad", "bad/probe.json"),
    ("--ckpt good.pt --data sound --out cut.pt", "--out cut.pt"),
    ("--ckpt good.pt --lr nan", "--lr"),
    ("--ckpt good.pt --pca nowhere/picture.png", "in a folder that exists"),
    ("--ckpt good.pt --pca picture.png damaged/b/image2.png", "damaged/b/image2.png"),
    ("--ckpt good.pt --epochs 0", "--epochs and --lr of a probe: above 0"),
    ("--ckpt good.pt --export vectors.npz loose single", "one folder at most"),
])
def test_mistakes_of_a_probe_are_one_line_and_exit_code_2(wrong, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(wrong)
    assert_one_line_and_code_2(probe.main, flags, says, capsys)

def test_demo_is_the_default_and_a_given_flag_wins():
    demo = scott.parse_config([])
    assert (demo.data, demo.model, demo.img_size) == ("demo", "scott-tiny/16", 64)
    given = scott.parse_config(["--img-size", "96", "--which", "teacher"])
    assert (given.img_size, given.which, given.model) == (96, "teacher", "scott-tiny/16")
    paper = scott.Config(data="flowers102", model="scott-12/16")
    assert scott.parse_config(["--data", "flowers102"]) == paper

@pytest.mark.parametrize("module, config", [(scott, scott.Config), (probe, probe.ProbeConfig)])
def test_help_shows_every_flag_with_its_text(monkeypatch, capsys, module, config):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    lines = inspect.getsource(config).splitlines()
    for name in config.__dataclass_fields__:
        (line,) = (line for line in lines if line.startswith(f"    {name}: "))
        flag, text = re.escape(name.replace("_", "-")), re.escape(line.split("  # ")[1])
        assert re.search(rf"^  --{flag}\b.*\s+{text}", shown, re.MULTILINE), name

@pytest.mark.slow
def test_the_demo_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = rows_of(scott.train(scott.parse_config([])))
    assert float(rows[-1]["knn_top1"]) > float(rows[0]["knn_top1"]) + 3
