"""SCOTT + MIM-JEPA: train a Vision Transformer from scratch on a few thousand unlabelled images.

A reference implementation of "Escaping the Big Data Paradigm in Self-Supervised Representation
Learning" (arXiv 2502.18056) in one file; section, table and equation numbers are the paper's.

    python scott.py                                  # demo: built-in data, minutes on a CPU
    python scott.py --data flowers102 --root data    # the paper's run
    python scott.py --data path/to/images            # your own folder, labels not needed

What is unusual here, in reading order:
- Crop, flip, colours and mask are keyed by (seed, epoch, image): worker processes change nothing.
- A mask (True = hidden from the student) is always an argument. Sparse means: hidden pixels are
  zeroed before each layer, and its result is divided by the share of the kernel that saw others.
- The encoder has no biases, and ends in a LayerNorm whose output loss, monitors and probes share.
- A run tells whether it collapses: k-NN, rank and deviation beside the untrained encoder's.
"""

import argparse
import copy
import csv
import itertools
import json
import math
import os
import pickle
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from timeit import repeat

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, ops, transforms as T, utils
from torchvision.transforms.v2 import functional as TF

# ---- Config: the command line ------------------------------------------------------------------
class UserError(ValueError):
    """A mistake in arguments or data; `main` prints it as one line and exits with code 2."""

def flag(default, text, low=None, high=None, **more):
    """A field that is a command-line flag; more: `choices`, `group` (a new section of --help)."""
    return field(default=default, metadata={"text": text, "low": low, "high": high} | more)

@dataclass
class Config:
    """Every setting of a run. The defaults are the paper's (Table 6) for SCOTT-12/16."""
    data: str = flag("demo", "demo, flowers102, pets37, imagenet100 or a folder", group="data")
    root: str = flag("data", "folder that holds, or receives, the named data sets")
    split: str = flag("all", "images to train on: all, or train, val, test, trainval joined by +")
    img_size: int = flag(224, "side of the input, pixels, a multiple of 16", 16, 8192)
    crop_scale: float = flag(0.2, "smallest crop, share of the image's area", 0.01, 1)
    views: str = flag("different", "colours of the views", choices=("different", "same", "none"))
    color_prob: float = flag(0.6, "probability of a colour pipeline, per view", 0, 1)
    workers: int | None = flag(None, "loader processes (default: by device)", 0, 256)
    cache_gib: float = flag(8.0, "memory for decoded images, GiB", 0, 1e5)
    model: str = flag("scott-12/16", "scott- or vit- and tiny, 3, 7, 9 or 12 /16", group="model")
    heads: int | None = flag(None, "attention heads (default: the model's)", 1, 384)
    dropout: float = flag(0.2, "after the positions and the attention projection", 0, 0.9)
    attention_dropout: float = flag(0.1, "on the attention weights", 0, 0.9)
    drop_path: float = flag(0.1, "stochastic depth of the last block, linear from 0", 0, 0.9)
    predictor_depth: int = flag(3, "blocks of the predictor", 1, 48)
    renormalise: bool = flag(True, "divide by the visible share of each kernel")
    residual_norm: bool = flag(False, "LayerNorm on the residual stream, as the released code")
    which: str = flag("teacher", "encoder to monitor and load", choices=("teacher", "student"))
    mask: str = flag("blockwise", "how patches are hidden", group="masks",
                     choices=("blockwise", "inverse", "random"))
    mask_ratio: float = flag(0.6, "share of the patches hidden from the student", 0, 1)
    epochs: int = flag(300, "passes over the data", 1, 10**6, group="optimisation")
    batch_size: int = flag(128, "images a step", 1, 10**6)
    lr: float = flag(5e-4, "peak learning rate", 0, 1)
    lr_start: float = flag(1e-6, "learning rate of the first step", 0, 1)
    lr_end: float = flag(1e-5, "learning rate of the last step", 0, 1)
    lr_flat: float = flag(0.72, "share of the steps after warm-up at the peak", 0, 1)
    warmup_epochs: float | None = flag(None, "default: 40, at most 40/300 of --epochs", 0, 10**6)
    wd_start: float = flag(0.04, "weight decay of the first step", 0, 10)
    wd_end: float = flag(0.4, "weight decay of the last step", 0, 10)
    ema_start: float = flag(0.996, "teacher momentum of the first step", 0, 1)
    ema_end: float = flag(1.0, "teacher momentum of the last step", 0, 1)
    seed: int = flag(0, "of weights, order, crops, colours and masks", 0, 2**31)
    out: str | None = flag(None, "run folder (default: runs/<data>-<model>)", group="run")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: str = flag("auto", "arithmetic", choices=("auto", "bf16", "fp32"))
    compile: bool = flag(False, "torch.compile (on a CPU it needs a C++ compiler)")
    knn_every: int | None = flag(None, "epochs between monitors (default: ten a run)", 1, 10**6)
    save_minutes: float = flag(10.0, "minutes between checkpoints", 0, 10**6)

DEMO = dict(model="scott-tiny/16", img_size=64, crop_scale=0.5, dropout=0.0, attention_dropout=0.0,
            drop_path=0.0, predictor_depth=2, which="student", epochs=20, batch_size=32)

def parse_config(argv=None, cls=Config):
    """Command line -> `cls`: its defaults, the demo's preset, then the flags that were given."""
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}; see --help\n")
    preset = DEMO if issubclass(cls, Config) else {}
    for item in fields(cls):
        meta, kind = item.metadata, (typing.get_args(item.type) or [item.type])[0]
        group = parser.add_argument_group(meta["group"]) if "group" in meta else group
        demo = f"; demo: {preset[item.name]}" if item.name in preset else ""
        default = "" if item.default in (None, ()) else f" (default: {item.default}{demo})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": kind, "choices": meta.get("choices"),
            "nargs": "+" if typing.get_origin(item.type) is tuple else None}
        group.add_argument("--" + item.name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=meta["text"] + default, **how)
    given = vars(parser.parse_args(argv))
    return cls(**((preset if given.get("data", cls.data) == "demo" else {}) | given))

def check_ranges(config):
    """Raises UserError for a number outside its flag's range."""
    for item in fields(config):
        value, low, high = getattr(config, item.name), item.metadata["low"], item.metadata["high"]
        if low is not None and value is not None and not low <= value <= high:
            name = item.name.replace("_", "-")
            raise UserError(f"--{name} {value}: must be from {low} to {high}")

def resolve(config):
    """Check every setting, and settle what was left open (None, "auto"). Raises UserError."""
    check_ranges(config)
    side = config.img_size // 16
    if config.img_size % 16:
        raise UserError(f"--img-size {config.img_size}: must be a multiple of the patch size, 16")
    if not 0 < int(config.mask_ratio * side * side) < side * side:
        raise UserError(f"--mask-ratio {config.mask_ratio}: hides none or all of {side**2} patches")
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    name = str(best) if config.device == "auto" else config.device
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    # A CPU that trains has no cores to spare.
    workers = 0 if sys.platform != "linux" else 1 if name == "cpu" else min(16, os.cpu_count())
    amp = "bf16" if config.amp == "auto" and bf16_pays(device) else "fp32"
    settled = dict(device=name, workers=workers, amp=amp, knn_every=max(1, config.epochs // 10),
                   warmup_epochs=min(40, config.epochs * 40 / 300))
    given = {key: value for key, value in asdict(config).items() if value not in (None, "auto")}
    return replace(config, **(settled | given))

def bf16_pays(device):
    """True where bf16 matrix products are far ahead of fp32 ones: AVX512-BF16, AMX, most GPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    a = torch.ones(512, 512, device=device)
    runs = [repeat(lambda x=x: (x @ x)[0, 0].item(), number=1, repeat=9) for x in (a, a.bfloat16())]
    return min(runs[0]) > 1.5 * min(runs[1])

# ---- Data: image sets, decoding, crops ---------------------------------------------------------
TORCHVISION = {  # class, where it keeps the paths (it has no public way to them), splits, files
    "flowers102": (datasets.Flowers102, "_image_files", ("train", "val", "test"),
                   "flowers-102/ with jpg/, imagelabels.mat, setid.mat"),
    "pets37": (datasets.OxfordIIITPet, "_images", ("trainval", "test"),
               "oxford-iiit-pet/ with images/, annotations/")}

def status(text, final=False):
    """Print a line that renews itself on a terminal; a log gets its final version only."""
    terminal = sys.stdout.isatty()
    if terminal or final:
        print(f"\r\x1b[2K{text}" if terminal else text, end="\n" if final else "", flush=True)

def time_left(started, done, total):
    """The time left, as text, at the rate since `started`."""
    return f"{(time.time() - started) / done * (total - done) / 60:.1f} min left"

@dataclass
class ImageSet:
    """Images, one list item each: labels (-1 = unknown) and splits ("" = none) with their file.
    classes: names of the labels; images: uint8 (3, H, W) tensors where in memory, otherwise None;
    side: the shorter side, in pixels, to which decoding shrinks larger images."""
    paths: list
    labels: list
    splits: list
    classes: list
    images: list = None
    side: int = 10**6

    def __len__(self):
        return len(self.paths)

    def load(self, index):
        """Image `index`, uint8 (3, H, W), not to be written to. Raises UserError if unreadable."""
        if self.images and self.images[index] is not None:
            return self.images[index]
        try:
            with Image.open(self.paths[index]) as image:
                image.draft("RGB", (self.side, self.side))  # JPEG: decode at 1/2, 1/4 or 1/8
                image = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {self.paths[index]}: {error}") from None
        scale = min(1, self.side / min(image.size))
        size = [max(1, round(length * scale)) for length in image.size]
        return TF.pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))

    def cache(self, indices, gib):
        """Decode images into memory, up to about `gib` GiB, so that no epoch decodes them again."""
        self.images, used, done = self.images or [None] * len(self), 0, 0
        started, total = time.time(), len(indices)
        with ThreadPoolExecutor() as pool:
            while done < total and used < gib * 2**30:
                chunk = indices[done : done + 256]
                for i, image in zip(chunk, pool.map(self.load, chunk)):
                    self.images[i], used, done = image, used + image.numel(), done + 1
                final = done == total or used >= gib * 2**30
                text = f"{done:,} of {total:,} images in memory, {used / 2**30:.1f} GiB"
                status(text if final else f"{text}, {time_left(started, done, total)}", final)

    def select(self, split):
        """Indices of `split`: "all", or names joined by +. Raises UserError for unknown names."""
        known, wanted = set(self.splits) - {""}, set(split.split("+"))
        if "trainval" in wanted - known:
            wanted = wanted - {"trainval"} | {"train", "val"}
        if split != "all" and wanted - known:
            raise UserError(f"--split {split}: the data has {', '.join(sorted(known)) or 'none'}")
        return [i for i, name in enumerate(self.splits) if split == "all" or name in wanted]

    def evaluation_split(self, seed=0):
        """(train, test) indices of labelled images; None with fewer than two classes.
        Tested on is the test split, otherwise val, otherwise a seeded and stratified fifth."""
        labels, splits = np.array(self.labels), np.array(self.splits)
        order = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
        held_out = "test" if "test" in splits[order] else "val"
        if held_out in splits[order] and {"train", "trainval"} & set(splits[order]):
            order = order[splits[order] != ""]
            test = order[splits[order] == held_out]
        else:
            test = order[np.argsort(labels[order], kind="stable")][4::5]
        train = np.setdiff1d(order, test)
        return (train, np.sort(test)) if len(test) and len(set(labels[train])) > 1 else None

def open_data(data, root="data"):
    """The `ImageSet` that `--data` and `--root` name. Raises UserError if it is not there."""
    if data == "demo":
        return draw_flowers()
    if data not in TORCHVISION:
        return image_folder(Path(root, data) if data == "imagenet100" else Path(data))
    dataset, attribute, splits, files = TORCHVISION[data]
    try:
        parts = [dataset(root, split, download=True) for split in splits]
    except (OSError, RuntimeError) as error:
        raise UserError(f"no {data}: put {files} into {root} ({error})") from None
    paths = [str(path) for part in parts for path in getattr(part, attribute)]
    if absent := [path for path in paths if not os.path.isfile(path)]:
        raise UserError(f"{data}: {len(absent)} of {len(paths)} images missing: {absent[0]} ...")
    labels = [label for part in parts for label in part._labels]
    names = [split for part, split in zip(parts, splits) for _ in range(len(part))]
    classes = getattr(parts[0], "classes", range(max(labels) + 1))  # unnamed in torchvision 0.21
    return ImageSet(paths, labels, names, [str(name) for name in classes])

def decoding_side(config):
    """`ImageSet.side` that enlarges no crop of `config.crop_scale`, in pixels."""
    return math.ceil(config.img_size * max(256 / 224, config.crop_scale**-0.5))

def image_folder(folder):
    """Any folder of images: train/ and val/ or test/ are splits; within a split, or without any,
    sub-folders that hold images are labels; images loose or nested deeper are unlabelled."""
    if not folder.is_dir():
        known = ", ".join(["demo", *TORCHVISION, "imagenet100"])
        raise UserError(f"no folder {folder}, and no data set of that name among {known}")
    known = ("train", "val", "test") if (folder / "train").is_dir() else ("",)
    found, endings = [], (*datasets.folder.IMG_EXTENSIONS, ".gif")
    walk = os.walk(folder, followlinks=True)
    for path in sorted(Path(place, name) for place, _, names in walk for name in names):
        parts = path.relative_to(folder).parts
        split = parts[0] if len(parts) > 1 and parts[0] in known else ""
        label = parts[-2] if len(parts) == 2 + bool(split) and split in known else ""
        if path.suffix.lower() in endings and not any(part.startswith(".") for part in parts):
            found.append((str(path), label, split))
    if not found:
        raise UserError(f"no images in {folder} (looked for {' '.join(endings)})")
    paths, labels, splits = map(list, zip(*found))
    classes = sorted(set(labels) - {""})
    numbers = {name: i for i, name in enumerate(classes)}
    return ImageSet(paths, [numbers.get(label, -1) for label in labels], splits, classes)

def draw_flowers(count=3072, size=128):
    """The demo: flowers of 3 to 6 petals, round or pointed (8 classes); the last third is test."""
    generator = torch.Generator().manual_seed(0)
    axis, images, labels = torch.linspace(-1, 1, size), [], torch.arange(count) % 8
    sector, yellow = torch.tensor([[5.0, 3, 1], [0.85, 0.65, 0.1]]).view(2, 3, 1, 1)
    def uniform(low, high, cells=1):
        return low + (high - low) * torch.rand(len(kind), 1, cells, cells, generator=generator)
    def texture(cells):
        return F.interpolate(uniform(-1, 1, cells), (size, size), mode="bicubic")
    for kind in labels.view(-1, 1, 1, 1).split(256):
        x, y = axis - uniform(-0.25, 0.25), axis[:, None] - uniform(-0.25, 0.25)
        radius, turn = torch.hypot(x, y) / uniform(0.6, 0.9), torch.atan2(y, x) / math.pi
        across = ((turn + uniform(0, 2)) * (3 + kind // 2) % 2 - 1).abs()  # 1: between petals
        edge = 1 - 0.75 * torch.where(kind % 2 == 1, across, across**4)
        hue = (sector + uniform(0, 6).floor() + uniform(-0.2, 0.2)) % 6
        shade = 0.9 - 0.25 * across - 0.25 * radius + 0.05 * texture(24)
        petal = shade * (1 - 0.75 * torch.minimum(hue, 4 - hue).clamp(0, 1))
        light = uniform(0.3, 0.54) + 0.1 * texture(5) + 0.1 * texture(20)
        ground = light * torch.cat([uniform(0.5, 0.9), uniform(0.9, 1.2), uniform(0.3, 0.6)], 1)
        picture = torch.lerp(ground, petal, ((edge - radius) * 25).clamp(0, 1))
        disk = ((0.24 - radius) * 40).clamp(0, 1)
        picture = torch.lerp(picture, yellow * (0.9 + 0.3 * texture(40)), disk)
        images += (picture.clamp(0, 1) * 255).byte().unbind()
    classes = [f"{n} {shape} petals" for n in (3, 4, 5, 6) for shape in ("round", "pointed")]
    splits = ["train" if i < count * 2 / 3 else "test" for i in range(count)]
    return ImageSet([f"demo {i}" for i in range(count)], labels.tolist(), splits, classes, images)

class Crops(Dataset):
    """Item (epoch, index), keyed by both and the seed: a random crop and flip (App. C), uint8
    (3, S, S); uniform numbers (2, 10) for the colours of its two views; a mask (N,) bool.
    Item index: the centre crop of the image resized to 256/224 of the size."""
    def __init__(self, images, size, crop_scale=0.2, mask=None, ratio=0.6, seed=0):
        self.images, self.size, self.crop_scale, self.seed = images, size, crop_scale, seed
        self.mask, self.ratio = mask or blockwise_mask, ratio

    def __getitem__(self, key):
        size, bicubic = [self.size, self.size], T.InterpolationMode.BICUBIC
        if not isinstance(key, tuple):
            image = TF.resize(self.images.load(key), round(self.size * 256 / 224), bicubic)
            return TF.center_crop(image, size)
        image = self.images.load(key[1])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the default generator
            seed = np.random.SeedSequence([self.seed, *key]).generate_state(1)[0]
            torch.default_generator.manual_seed(int(seed))
            box = T.RandomResizedCrop.get_params(image, (self.crop_scale, 1), (3 / 4, 4 / 3))
            flip, draws = torch.rand(()) < 0.5, torch.rand(2, 10)
            mask = self.mask((self.size // 16, self.size // 16), self.ratio)
        crop = TF.resized_crop(image, *box, size, bicubic)
        return TF.horizontal_flip(crop) if flip else crop, draws, mask.flatten()

def epoch_batches(indices, batch_size, start, total, seed):
    """Lists of (epoch, index) for the steps `start` to `total`; an epoch's last bit is dropped."""
    steps = len(indices) // batch_size
    for step in range(start, total):
        epoch, position = divmod(step, steps)
        if position == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(indices).tolist()
        yield [(epoch, i) for i in order[position * batch_size : (position + 1) * batch_size]]

def make_loader(crops, config, **batching):
    """A DataLoader whose processes are forked on Linux, so that they share the decoded images."""
    context = "fork" if config.workers and sys.platform == "linux" else None
    return DataLoader(crops, num_workers=config.workers, multiprocessing_context=context,
                      pin_memory=config.device.startswith("cuda"), **batching)

# ---- Views: colour pipelines in batches (sec. 3.2, App. C) -------------------------------------
def adjust_hue(images, shift):
    """HSV and back: channel n = 5, 3, 1 is V - C min(k, 4 - k, 1) with k = n + 6 H mod 6."""
    value, brightest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    n = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(3, 1, 1)
    hues = 5 - n + (images.roll(-1, 1) - images.roll(-2, 1)) * (1 / chroma.clamp_min(1e-8))
    k = (n + hues.gather(1, brightest) + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

def gaussian_blur(images, sigma):
    """The kernel is 9 pixels wide at 224 px, in proportion (odd, at least 3) elsewhere."""
    groups, radius = 3 * len(images), max(1, round((images.shape[-1] * 9 / 224 - 1) / 2))
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(3, 0)  # (3B, 1, 1, K)
    x = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    return F.conv2d(F.conv2d(x, kernel, groups=groups), kernel.mT, groups=groups).view_as(images)

gray = partial(TF.rgb_to_grayscale, num_output_channels=3)
COLORS = {  # as in torchvision, of images (B, 3, H, W) in [0, 1] and a strength each, (B, 1, 1, 1)
    "brightness": lambda x, f: (f * x).clamp(0, 1),
    "contrast": lambda x, f: gray(x).mean((1, 2, 3), True).lerp(x, f).clamp(0, 1),
    "saturation": lambda x, f: gray(x).lerp(x, f).clamp(0, 1),
    "hue": adjust_hue,
    "blur": gaussian_blur,
    "grayscale": lambda x, _: gray(x)}

def color_pipeline(images, draws, probability, rng):
    """Jitter, blur and grayscale in random order, an image at a time with `probability` (App. C).
    images: (B, 3, H, W) in [0, 1]; draws: an image's own uniform numbers, (B, 10), on the CPU; rng:
    numpy Generator for the order, one a batch. An operation touches the images that drew it."""
    chance = torch.tensor([0.8, 0.8, 0.8, 0.8, 0.3, 0.1])
    low, high = torch.tensor([[0.6, 0.6, 0.8, -0.1, 0.1, 0.0], [1.4, 1.4, 1.2, 0.1, 2.0, 1.0]])
    on = (draws[:, :1] < probability) & (draws[:, [1, 1, 1, 1, 2, 3]] < chance)
    strengths, groups = low + (high - low) * draws[:, 4:], [rng.permutation(4), [4], [5]]
    images = images.clone()
    for k in (k for i in rng.permutation(3) for k in groups[i]):
        rows = on[:, k].nonzero().squeeze(1)
        if len(rows):
            strength = strengths[rows, k].view(-1, 1, 1, 1).to(images.device, non_blocking=True)
            rows = rows.to(images.device, non_blocking=True)
            images[rows] = list(COLORS.values())[k](images[rows], strength)
    return images

def normalise(images):
    """uint8, or float in [0, 1] -> standardised by ImageNet's mean and deviation, float32."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return TF.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

def make_views(crops, draws, kind="different", probability=0.6, rng=None):
    """uint8 crops (B, 3, S, S), draws (B, 2, 10) on the CPU -> normalised views a and b."""
    if kind == "none":
        return (normalise(crops),) * 2
    colored = draws.unbind(1)[: 1 if kind == "same" else 2]
    views = [normalise(color_pipeline(crops.float() / 255, d, probability, rng)) for d in colored]
    return views[0], views[-1]

# ---- Masks: True = hidden from the student, exactly int(ratio * Gh * Gw) patches (sec. 3.2) ----
def blockwise_mask(grid, ratio=0.6, generator=None, inverse=False):
    """Hidden (inverse: visible, as the released code) patches in BEiT's blocks: (Gh, Gw) bool."""
    height, width = grid
    smallest = max(1, round(16 * height * width / 196))
    count = int(ratio * height * width)
    count = height * width - count if inverse else count
    mask = torch.zeros(grid, dtype=torch.bool)
    while left := count - int(mask.sum()):
        for tries in torch.rand(10, 4, generator=generator).tolist():
            area = smallest + tries[0] * (left - smallest)
            aspect = 0.3 ** (2 * tries[1] - 1)  # log-uniform in [0.3, 1 / 0.3]
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h <= height and w <= width:
                y, x = int(tries[2] * (height - h + 1)), int(tries[3] * (width - w + 1))
                block = mask[y : y + h, x : x + w]
                if 0 < int((~block).sum()) <= left:
                    block.fill_(True)
                    break
        else:  # ten tries in vain: single patches fill up to the exact count
            free = (~mask).flatten().nonzero().squeeze(1)
            mask.view(-1)[free[torch.randperm(len(free), generator=generator)[:left]]] = True
    return ~mask if inverse else mask

def random_mask(grid, ratio=0.6, generator=None):
    """Hidden patches anywhere: (Gh, Gw) bool."""
    height, width = grid
    order = torch.randperm(height * width, generator=generator)
    return (order < int(ratio * height * width)).view(grid)

MASKS = {"blockwise": blockwise_mask, "inverse": partial(blockwise_mask, inverse=True),
         "random": random_mask}

# ---- Encoder: tokenizers, sparse (Table 3) or plain, and transformer (sec. 3.1, App. A.2) ------
def enlarge(mask, x):
    """Patch mask (B, 1, Gh, Gw) at the resolution of x (B, C, H, W): (B, 1, H, W)."""
    mask = mask.repeat_interleave(x.shape[-2] // mask.shape[-2], -2)
    return mask.repeat_interleave(x.shape[-1] // mask.shape[-1], -1)

class SparseConv2d(nn.Conv2d):
    """A convolution without bias that neither sees nor fills hidden patches (sec. 3.1).
    forward(x (B, C, H, W), mask (B, 1, Gh, Gw) bool or None): hidden sites are zeroed, the dense
    result is divided by the visible share of the kernel's in-image taps (`renormalise`), and hidden
    sites are zeroed again: the pattern neither grows nor shrinks. Without a mask: nn.Conv2d."""
    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, renormalise=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.renormalise = renormalise

    def forward(self, x, mask=None):
        if mask is None:
            return super().forward(x)
        hidden = enlarge(mask, x)
        x = super().forward(x.masked_fill(hidden, 0))
        if self.renormalise:
            window = (self.kernel_size, self.stride, self.padding)
            share = F.avg_pool2d((~hidden).to(x.dtype), *window, count_include_pad=False)
            x = x / share.masked_fill(share == 0, 1)
        return x.masked_fill(enlarge(mask, x), 0)

class SparseMaxBlurPool2d(nn.Module):
    """Anti-aliased max pooling (Zhang 2019), (B, C, H, W) -> (B, C, H/2, W/2), masks as above.
    Max of 2x2 at stride 1, where hidden sites never win, then a 3x3 binomial blur at stride 2.
    Nothing to renormalise: patches cover an even number of sites, so that each of the nine taps
    around a visible site has a visible site in its window."""
    def __init__(self, channels):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = (row[:, None] * row / 16).expand(channels, 1, 3, 3)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x.masked_fill(enlarge(mask, x), torch.finfo(x.dtype).min)
        x = F.max_pool2d(x, 2, 1)
        x = F.conv2d(x, self.kernel.to(x.dtype), stride=2, padding=1, groups=len(self.kernel))
        return x if mask is None else x.masked_fill(enlarge(mask, x), 0)

class SparseConvTokenizer(nn.Module):
    """SCOTT's stem (Table 3): twice sparse convolution, ReLU, sparse MaxBlurPool.
    forward(images (B, 3, H, W), mask (B, N) bool or None) -> tokens (B, N, D), N = H/16 * W/16.
    Tokens of hidden patches are zero; hidden pixels have no influence on the others."""
    def __init__(self, embed_dim=384, hidden_dim=None, renormalise=True):
        super().__init__()
        hidden_dim = hidden_dim or embed_dim // 6  # 64 for the width of 384
        self.conv1 = SparseConv2d(3, hidden_dim, 7, 2, 3, renormalise=renormalise)
        self.pool1 = SparseMaxBlurPool2d(hidden_dim)
        self.conv2 = SparseConv2d(hidden_dim, embed_dim, 7, 2, 3, renormalise=renormalise)
        self.pool2 = SparseMaxBlurPool2d(embed_dim)
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.kaiming_normal_(self.conv2.weight)

    def forward(self, images, mask=None):
        if mask is not None:
            mask = mask.view(-1, 1, images.shape[-2] // 16, images.shape[-1] // 16)
        x = self.pool1(F.relu(self.conv1(images, mask)), mask)
        x = self.pool2(F.relu(self.conv2(x, mask)), mask)
        return x.flatten(2).transpose(1, 2)

class PatchEmbed(nn.Module):
    """ViT's patch embedding, one 16x16 convolution; `forward` as in `SparseConvTokenizer`."""
    def __init__(self, embed_dim=384):
        super().__init__()
        self.conv = nn.Conv2d(3, embed_dim, 16, 16, bias=False)
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, images, mask=None):
        tokens = self.conv(images).flatten(2).transpose(1, 2)
        return tokens if mask is None else tokens.masked_fill(mask[..., None], 0)

@cache
def sincos_positions(height, width, dim, device="cpu"):
    """Fixed 2-D sin-cos positions of the integer grid indices: (height * width, dim) float32."""
    frequency = 10000 ** (-torch.arange(dim // 4, device=device) / (dim // 4))
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    angle = torch.cartesian_prod(rows, columns)[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)

class Attention(nn.Module):
    """Multi-head self-attention without bias: (B, N, D) -> (B, N, D)."""
    def __init__(self, dim, num_heads, dropout=0.0, attention_dropout=0.0):
        super().__init__()
        self.num_heads, self.dropout, self.attention_dropout = num_heads, dropout, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.attention_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)  # (B, heads, N, D / heads)
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
    """Pre-norm transformer block, (B, N, D) -> (B, N, D); `layer`, from 1, scales its start.
    residual_norm: LayerNorm the residual stream itself between the halves, as the released code."""
    def __init__(self, dim, num_heads, layer=1, dropout=0.0, attention_dropout=0.0, drop_path=0.0,
                 residual_norm=False):
        super().__init__()
        self.drop_path, self.residual_norm = drop_path, residual_norm
        self.attention = Attention(dim, num_heads, dropout, attention_dropout)
        self.ffn = SwiGLU(dim)
        for part in (self.attention.qkv, self.attention.proj, self.ffn.gate_value, self.ffn.proj):
            nn.init.trunc_normal_(part.weight, std=0.02)
        self.attention.proj.weight.data /= math.sqrt(2 * layer)
        self.ffn.proj.weight.data /= math.sqrt(2 * layer)

    def forward(self, x):
        drop = partial(ops.stochastic_depth, p=self.drop_path, mode="row", training=self.training)
        x = x + drop(self.attention(F.layer_norm(x, x.shape[-1:])))
        inner = F.layer_norm(x, x.shape[-1:])
        return (inner if self.residual_norm else x) + drop(self.ffn(inner))

def make_blocks(depth, dim, num_heads, drop_path=0.0, **options):
    """`depth` blocks whose stochastic depth grows linearly from 0 to `drop_path`."""
    rates = np.linspace(0, drop_path, depth).tolist()
    blocks = (Block(dim, num_heads, i + 1, drop_path=rates[i], **options) for i in range(depth))
    return nn.Sequential(*blocks)

class ViT(nn.Module):
    """Vision Transformer over a tokenizer: no class token, fixed positions, one mask token (Eq. 1).
    forward(images (B, 3, H, W), mask (B, N) bool or None) -> (B, N, D) after the final LayerNorm,
    for any H and W divisible by 16, otherwise ValueError. Further `options` go to every `Block`."""
    def __init__(self, tokenizer, embed_dim=384, depth=12, num_heads=6, **options):
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            raise UserError(f"heads, {num_heads}, and 4 must divide the width, {embed_dim}")
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.block_options, self.dropout = options, options.get("dropout", 0.0)
        self.tokenizer = tokenizer
        self.mask_token = nn.Parameter(torch.randn(embed_dim) * 1e-6)
        self.blocks = make_blocks(depth, embed_dim, num_heads, **options)

    def grid_positions(self, images):
        """Positions (N, D) of the patches of `images`."""
        height, width = images.shape[-2] // 16, images.shape[-1] // 16
        return sincos_positions(height, width, self.embed_dim, images.device)

    def forward(self, images, mask=None):
        if images.shape[-2] % 16 or images.shape[-1] % 16:
            raise ValueError(f"image size {tuple(images.shape[-2:])} is not divisible by 16")
        tokens = self.tokenizer(images, mask)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = F.dropout(tokens + self.grid_positions(images), self.dropout, self.training)
        return F.layer_norm(self.blocks(tokens), (self.embed_dim,))

SIZES = {  # width, depth, heads (Tables 4 and 11; the heads of 3 and 9 blocks are not stated)
    "tiny": (192, 4, 3), "3": (384, 3, 4), "7": (384, 7, 4), "9": (384, 9, 4), "12": (384, 12, 6)}

def create_encoder(name, renormalise=True, **overrides):
    """A new `ViT`: "scott-12/16" (sparse tokenizer), "vit-12/16" (patch embedding), other depths.
    overrides: `embed_dim`, `depth`, `num_heads`, a `Block`'s. Raises UserError for other names."""
    models = {f"{kind}-{size}/16": (kind, size) for kind in ("scott", "vit") for size in SIZES}
    if name not in models:
        raise UserError(f"--model {name}: unknown; there are {', '.join(models)}")
    kind, size = models[name]
    options = dict(zip(("embed_dim", "depth", "num_heads"), SIZES[size])) | overrides
    stem = partial(SparseConvTokenizer, renormalise=renormalise) if kind == "scott" else PatchEmbed
    return ViT(stem(options["embed_dim"]), **options)

# ---- MIM-JEPA (sec. 3.2) and its schedules (sec. 4.2, Table 6) ---------------------------------
class MIMJEPA(nn.Module):
    """Predict what the teacher says about patches that the student does not see (Eq. 2).
    student: context encoder f_theta; teacher: target encoder, its average; predictor: f_phi."""
    def __init__(self, encoder, predictor_depth=3):
        super().__init__()
        self.student = encoder
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        width = encoder.embed_dim
        head = nn.Linear(width, width)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        blocks = make_blocks(predictor_depth, width, encoder.num_heads, **encoder.block_options)
        norm = nn.LayerNorm(width, elementwise_affine=False)
        self.predictor = nn.Sequential(nn.Dropout(encoder.dropout), blocks, norm, head)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # no dropout in the targets
        return self

    def forward(self, view_a, view_b, mask):
        """Views (B, 3, H, W), mask (B, N) bool -> Smooth-L1 loss, mean over the hidden tokens."""
        with torch.no_grad():
            target = self.teacher(view_b)  # N(s_y): the encoder ends in the LayerNorm of Eq. 2
        context = self.student(view_a, mask)  # s_x
        prediction = self.predictor(context + self.student.grid_positions(view_a))  # s^_y
        loss = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none").mean(-1)
        return (loss * mask).sum() / mask.sum()

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_bar <- momentum * theta_bar + (1 - momentum) * theta."""
        for target, source in zip(self.teacher.parameters(), self.student.parameters()):
            target.lerp_(source, 1 - momentum)

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
    if step < last and step <= decay_start:
        return peak
    share = 1 if step >= last else (step - decay_start) / (last - decay_start)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2

weight_decay_schedule = partial(linear, start=0.04, end=0.4)
ema_schedule = partial(linear, start=0.996, end=1.0)

def create_optimizer(module, lr):
    """AdamW of what needs gradients; vectors and biases are the group that is not `decayed`."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == decayed], "decayed": decayed}
              for decayed in (True, False)]
    return torch.optim.AdamW(groups, lr=lr)

# ---- Training: checkpoints, monitors (does it learn, does it collapse?), the run ---------------
FORMAT = 1  # of last.pt; to be raised when its keys change

def write_file(path, write):
    """Call write(file) so that at any moment either the old or the new file is complete."""
    with open(f"{path}.tmp", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)

def free_path(wanted, ending=""):
    """The path, or where that exists the first of "path-2", "path-3" ... (before the ending)."""
    stem = str(wanted).removesuffix(ending)
    numbered = (Path(f"{stem}-{number}{ending}") for number in itertools.count(2))
    return next(path for path in itertools.chain([Path(wanted)], numbered) if not path.exists())

def save_checkpoint(path, config, epoch, step, objective, optimizer):
    """Write all that a run needs to go on."""
    rng = {"cpu": torch.get_rng_state()}  # dropout; all other randomness is keyed by the seed
    if config.device.startswith("cuda"):
        rng["cuda"] = torch.cuda.get_rng_state(config.device)
    state = {"format": FORMAT, "config": asdict(config), "epoch": epoch, "step": step, "rng": rng}
    parts = {name: getattr(objective, name) for name in ("student", "teacher", "predictor")}
    state |= {name: part.state_dict() for name, part in (parts | {"optimizer": optimizer}).items()}
    write_file(path, partial(torch.save, state))

def encoder_of(config):
    """The new, untrained encoder that the dict of a `Config` describes."""
    names = ("dropout", "attention_dropout", "drop_path", "renormalise", "residual_norm")
    options = {name: config[name] for name in names}
    options |= {"num_heads": config["heads"]} if config["heads"] else {}
    return create_encoder(config["model"], **options)

def load_checkpoint(path):
    """The dict of a checkpoint; code in it is not run. Raises UserError for any other file."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":  # torch.save writes a zip archive
                raise UserError(f"{path}: no checkpoint of scott.py; not loaded")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds code, which would be run; refused") from None
    except RuntimeError:
        raise UserError(f"{path}: cut short or damaged") from None
    if not isinstance(checkpoint, dict) or not {"format", "config", "teacher"} <= set(checkpoint):
        raise UserError(f"{path}: a checkpoint of other software, not of scott.py")
    if checkpoint["format"] > FORMAT:
        raise UserError(f"{path}: format {checkpoint['format']} is newer than this scott.py's")
    return checkpoint

def load_encoder(checkpoint, device="cpu", which=None):
    """The frozen `ViT`, in eval mode, of a checkpoint or its path; which: None = as configured."""
    checkpoint = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    encoder = encoder_of(checkpoint["config"])
    encoder.load_state_dict(checkpoint[which or checkpoint["config"]["which"]])
    return encoder.eval().requires_grad_(False).to(device)

@torch.no_grad()
def encode(encoder, images, indices, config):
    """Mean-pooled tokens of centre crops in eval mode: (len(indices), D) float32 on the CPU."""
    training, device, features = encoder.training, torch.device(config.device), []
    encoder.eval()
    crops_of, started = Crops(images, config.img_size), time.time()
    for crops in make_loader(crops_of, config, sampler=indices, batch_size=config.batch_size):
        crops = crops.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            features += encoder(normalise(crops)).float().mean(1)
        done, total = len(features), len(indices)
        status(f"encoding: {done:,} of {total:,} images, {time_left(started, done, total)}")
    encoder.train(training)
    return torch.stack(features).cpu()

def knn_scores(train, labels, test, classes, k=20, temperature=0.07):
    """Votes (n, classes) of the `k` nearest by cosine, each exp(similarity / temperature)."""
    train, test = F.normalize(train, dim=-1), F.normalize(test, dim=-1)
    similarity, nearest = zip(*((t @ train.T).topk(min(k, len(train))) for t in test.split(1024)))
    votes = (torch.cat(similarity) / temperature).exp()
    return votes.new_zeros(len(test), classes).scatter_add(1, labels[torch.cat(nearest)], votes)

def effective_rank(features):
    """exp of the entropy of the singular values' shares, centred features (n, D) (RankMe 2023)."""
    sigma = torch.linalg.svdvals((features - features.mean(0)).double())
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()

def monitor(encoder, images, config):
    """An encoder's feature_std, effective_rank and, with labels, knn_top1 in %; and as text."""
    split = images.evaluation_split()
    sample = np.random.default_rng(0).permutation(len(images))[:2048]
    train, test = split or (sample, sample[:0])
    features = encode(encoder, images, [*train, *test], config)
    sample = features[:: max(1, len(features) // 2048)][:2048]
    result = {"feature_std": sample.std(0).mean().item(), "effective_rank": effective_rank(sample)}
    text = "rank {effective_rank:.1f}, deviation {feature_std:.3f}".format(**result)
    if split:
        labels, parts = torch.tensor(images.labels), features.split([len(train), len(test)])
        scores = knn_scores(parts[0], labels[train], parts[1], len(images.classes))
        result["knn_top1"] = 100 * (scores.argmax(1) == labels[test]).float().mean().item()
        text = f"k-NN {result['knn_top1']:.1f} %, {text}"
    return result, text

COLUMNS = ("epoch", "step", "loss", "lr", "weight_decay", "ema", "images_per_s", "feature_std",
           "effective_rank", "knn_top1")

def train(config, objective=None):
    """Pretrain as `config` says; returns the run's folder. Raises UserError.
    objective: another method with the calls and parts of `MIMJEPA`."""
    config = resolve(config)
    device = torch.device(config.device)
    images = open_data(config.data, config.root)
    images.side = decoding_side(config)
    indices = images.select(config.split)
    steps = len(indices) // config.batch_size
    total, warmup = config.epochs * steps, round(config.warmup_epochs * steps)
    if steps == 0:
        raise UserError(f"--batch-size {config.batch_size}: more than the {len(indices)} images")
    if warmup >= total:
        raise UserError(f"--warmup-epochs {config.warmup_epochs}: must be less than --epochs")

    torch.manual_seed(config.seed)
    objective = objective or MIMJEPA(encoder_of(asdict(config)), config.predictor_depth)
    objective.to(device, memory_format=torch.channels_last)
    model = torch.compile(objective) if config.compile else objective
    optimizer = create_optimizer(objective, config.lr)

    name = f"runs/{Path(config.data).resolve().name}-{config.model.replace('/', '-')}"
    folder = free_path(config.out or name)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    config = replace(config, out=str(folder))
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    (folder / "config.json").write_text(json.dumps(asdict(config) | versions, indent=2) + "\n")
    size = sum(p.numel() for p in objective.student.parameters())
    print(f"{config.model} ({size:,} parameters) on {len(indices):,} images of {config.data}, "
          f"{config.img_size} px: {config.epochs} epochs of {steps} steps, {config.device} "
          f"{config.amp}, to {folder}", flush=True)
    images.cache(range(len(images)), config.cache_gib)
    untrained, text = monitor(objective.student, images, config)
    status(f"untrained: {text}", final=True)
    log = open(folder / "metrics.csv", "w", buffering=1, newline="")
    metrics = csv.DictWriter(log, COLUMNS)
    metrics.writeheader()
    metrics.writerow({"epoch": 0, "step": 0} | untrained)

    crops_of = Crops(images, config.img_size, config.crop_scale, MASKS[config.mask],
                     config.mask_ratio, config.seed)
    batches = epoch_batches(indices, config.batch_size, 0, total, config.seed)
    loader = make_loader(crops_of, config, batch_sampler=batches)
    started = saved = shown = clock = time.time()
    losses = torch.zeros((), device=device)  # summed on the device: no step waits for its loss
    for step, (crops, draws, mask) in enumerate(loader):
        lr = lr_schedule(step, total, warmup, config.lr_start, config.lr, config.lr_end,
                         config.lr_flat)
        decay = weight_decay_schedule(step, total, start=config.wd_start, end=config.wd_end)
        momentum = ema_schedule(step, total, start=config.ema_start, end=config.ema_end)
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=decay * group["decayed"])
        crops = crops.to(device, non_blocking=True, memory_format=torch.channels_last)
        mask = mask.to(device, non_blocking=True)
        order = np.random.default_rng([config.seed, step])
        view_a, view_b = make_views(crops, draws, config.views, config.color_prob, order)
        if step == 0:
            hidden = enlarge(mask.unflatten(1, (1, config.img_size // 16, -1)), view_a)
            rows = torch.cat([view_a[:8], view_b[:8], view_a.masked_fill(hidden, 0)[:8]]).cpu()
            utils.save_image(rows, folder / "preview.png", nrow=len(rows) // 3, normalize=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            loss = model(view_a, view_b, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.update_teacher(momentum)
        losses += loss.detach()
        done, now = step % steps + 1, time.time()
        if done == steps or (sys.stdout.isatty() and now - shown > 1):
            row = {"epoch": step // steps + 1, "step": step + 1, "loss": losses.item() / done,
                   "lr": lr, "weight_decay": decay, "ema": momentum,
                   "images_per_s": round(done * config.batch_size / (time.time() - clock), 1)}
            text = "epoch {epoch} step {step} loss {loss:.4f} {images_per_s} images/s".format(**row)
            text += ", " + time_left(started, step + 1, total)
            status(text)
            shown = now
        if done == steps:
            if row["epoch"] % config.knn_every == 0 or step + 1 == total:
                result, words = monitor(getattr(objective, config.which), images, config)
                row, text = row | result, f"{text} | {config.which}: {words}"
            status(text, final=True)
            metrics.writerow(row)
            if any(row.get(key, math.inf) < 0.4 * untrained[key] for key in COLUMNS[7:9]):
                print("warning: the features collapse, rank or deviation is below 40 % of the "
                      "untrained encoder's. Try a lower --lr or an --ema-start closer to 1.")
            losses.zero_()
            clock = time.time()
        if step + 1 == total or now - saved > 60 * config.save_minutes:
            save_checkpoint(folder / "last.pt", config, (step + 1) // steps, step + 1, objective,
                            optimizer)
            saved = now
    log.close()
    other = {"teacher": "student", "student": "teacher"}[config.which]
    status(f"{other}: {monitor(getattr(objective, other), images, config)[1]}", final=True)
    print(f"{config.which}: {words}")  # measured after the last epoch
    print(f"""trained in {(time.time() - started) / 60:.1f} min; curves, views, checkpoint: {folder}
A rising loss is no bad sign, the targets become richer: compare k-NN and rank with the untrained.
next: python probe.py --ckpt {folder}/last.pt, or python scott.py --data path/to/images""")
    return folder

def main(argv=None, run=train, cls=Config):
    """The command line of a program, `run(cls)`; returns the exit code."""
    try:
        run(parse_config(argv, cls))
    except UserError as error:
        text = str(error).split("UserError: ")[-1].strip()  # of a loader process: without its trace
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
