"""SCOTT + MIM-JEPA: train a Vision Transformer from scratch on a few thousand unlabelled images.

A reference implementation of "Escaping the Big Data Paradigm in Self-Supervised Representation
Learning" (arXiv 2502.18056), whose section, table and equation numbers are given.

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

import copy
import ctypes
import difflib
import json
import math
import os
import pickle
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision import datasets, ops
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF

# ---- Config: the command line ------------------------------------------------------------------
class UserError(ValueError):
    """A mistake in arguments or data; `main` prints it as one line and exits with code 2."""

def unknown(name, known):
    """What to tell of an unknown name."""
    closest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
    return f"unknown, the closest is {closest}; there are {', '.join(known)}"

def flag(default, text, low=None, high=None, group=None, **how):
    """A field that is a command-line flag; group: a new section of --help; how: for argparse."""
    return field(default=default, metadata=locals())

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
    flip_prob: float = flag(0.5, "probability of a horizontal flip", 0, 1)
    workers: int | None = flag(None, "loader processes (default: 1, GPU: 16)", 0, 256)
    cache_gib: float = flag(8.0, "memory for decoded images, GiB", 0, 1e5)
    model: str = flag("scott-12/16", "scott- or vit- and tiny, 3, 7, 9 or 12 /16", group="model")
    heads: int | None = flag(None, "attention heads (default: the model's)", 1, 384)
    dropout: float = flag(0.2, "after the positions and the attention projection", 0, 0.9)
    attention_dropout: float = flag(0.1, "on the attention weights", 0, 0.9)
    drop_path: float = flag(0.1, "stochastic depth of the last block, linear from 0", 0, 0.9)
    registers: int = flag(0, "learnable tokens beside the patches", 0, 64)
    predictor_depth: int = flag(3, "blocks of the predictor", 1, 48)
    hidden_targets: bool = flag(False, "predict four blocks of the teacher, as Bootleg, not one")
    renormalise: bool = flag(True, "divide by the visible share of each kernel")
    residual_norm: bool = flag(False, "LayerNorm on the residual stream, as the released code")
    which: str = flag("teacher", "encoder to monitor and load", choices=("teacher", "student"))
    mask: str = flag("blockwise", "how patches are hidden", group="masks",
                     choices=("blockwise", "inverse", "random"))
    mask_ratio: float = flag(0.6, "share of the patches hidden from the student", 0, 1)
    epochs: int = flag(300, "passes over the data", 1, 10**6, group="optimisation")
    batch_size: int = flag(128, "images a step", 1, 10**6)
    grad_accum_steps: int = flag(1, "parts of a step, one after the other: less memory", 1, 10**6)
    lr: float = flag(5e-4, "peak learning rate", 0, 1)
    lr_start: float = flag(1e-6, "learning rate of the first step", 0, 1)
    lr_end: float = flag(1e-5, "learning rate of the last step", 0, 1)
    lr_flat: float = flag(0.72, "share of the steps after warm-up at the peak", 0, 1)
    beta2: float = flag(0.999, "AdamW's memory of squared gradients", 0, 0.9999)
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
    max_minutes: float = flag(1e6, "stop after so long; --resume goes on", 0, 1e6)
    benchmark: bool = flag(False, "measure the speed for a minute; writes no run")
    resume: str | None = flag(None, "go on: --out's run, or this file", nargs="?", const="")

    def schedule(self, step, total, warmup):
        """Learning rate, weight decay and teacher momentum of a step (Table 6)."""
        return (lr_schedule(step, total, warmup, self.lr_start, self.lr, self.lr_end, self.lr_flat),
                weight_decay_schedule(step, total, start=self.wd_start, end=self.wd_end),
                ema_schedule(step, total, start=self.ema_start, end=self.ema_end))

DEMO = dict(model="scott-tiny/16", img_size=64, crop_scale=0.5, dropout=0.0, attention_dropout=0.0,
            drop_path=0.0, predictor_depth=2, which="student", epochs=30, batch_size=32)

def parse_config(argv=None, cls=Config):
    """Command line -> `cls`: its defaults, the demo's preset, then the flags that were given."""
    parser = ArgumentParser(description=sys.modules[cls.__module__].__doc__,
                            formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}; see --help\n")
    for item in fields(cls):
        meta, kind = item.metadata, getattr(item.type, "__args__", [item.type])[0]
        group = parser.add_argument_group(meta["group"]) if meta["group"] else group
        default = "" if item.default in (None, ()) else f" (default: {item.default})"
        how = {"action": BooleanOptionalAction} if kind is bool else {"type": kind} | meta["how"]
        group.add_argument("--" + item.name.replace("_", "-"), help=meta["text"] + default, **how)
    given = vars(parser.parse_args(argv))
    preset = DEMO if issubclass(cls, Config) and given.get("data", cls.data) == "demo" else {}
    if "resume" in given:
        given["resume"] = given["resume"] or os.path.join(given.get("out", ""), "last.pt")
        saved = load_checkpoint(given["resume"])["config"] | {"max_minutes": 1e6}
        preset = {item.name: saved[item.name] for item in fields(cls) if item.name in saved}
    return cls(**(preset | given))

def check_ranges(config):
    """Raises UserError for a number outside its flag's range."""
    for f in fields(config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if low is not None and value is not None and not low <= value <= high:
            raise UserError(f"--{f.name.replace('_', '-')} {value}: must be from {low} to {high}")

def resolve(config):
    """Check every setting, and settle what was left open (None, "auto"). Raises UserError."""
    check_ranges(config)
    patches = (config.img_size // 16) ** 2
    if config.img_size % 16:
        raise UserError(f"--img-size {config.img_size}: must be a multiple of the patch size, 16")
    if not 0 < int(config.mask_ratio * patches) < patches:
        raise UserError(f"--mask-ratio {config.mask_ratio}: hides none or all of {patches} patches")
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    name = str(best) if config.device == "auto" else config.device
    name += f":{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else ""  # torchrun: a GPU each
    try:  # a first use, which --compile needs a compiler for
        (torch.compile(torch.neg) if config.compile else torch.neg)(torch.ones(1, device=name))
    except (RuntimeError, AssertionError) as error:
        used = f"--device {name}" + " --compile" * config.compile
        raise UserError(f"{used}: {' '.join(str(error).splitlines()[:2])}") from None
    linux = sys.platform == "linux"
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if name.startswith("cuda")
            else linux and "bf16" in Path("/proc/cpuinfo").read_text())  # AVX512-BF16, AMX, ARM
    workers = 0 if not linux else 1 if name == "cpu" else min(16, os.cpu_count())
    settled = dict(device=name, workers=workers, amp="bf16" if fast else "fp32",
                   knn_every=max(1, config.epochs // 10),
                   warmup_epochs=min(40, config.epochs * 40 / 300))
    given = {key: value for key, value in asdict(config).items() if value not in (None, "auto")}
    return replace(config, **(settled | given))

# ---- Data: image sets, decoding, crops ---------------------------------------------------------
TORCHVISION = {  # class, where it keeps the paths (it has no public way to them), splits, files
    "flowers102": (datasets.Flowers102, "_image_files", ("train", "val", "test"),
                   "flowers-102/ with jpg/, imagelabels.mat, setid.mat"),
    "pets37": (datasets.OxfordIIITPet, "_images", ("trainval", "test"),
               "oxford-iiit-pet/ with images/, annotations/")}

def status(text, final=True):
    """Print a line; what is not final is for terminals only, where the next line replaces it."""
    start = "\r\x1b[2K" if sys.stdout.isatty() else ""
    if start or final:
        print(start + text, end="\n" if final else "", flush=True)

@dataclass
class ImageSet:
    """Images, one list item each: labels (-1 = unknown) and splits ("" = none) with their file.
    classes: names of the labels; side: the shorter side, in pixels, to which decoding shrinks
    larger images; images: those in memory, {index: uint8 (3, H, W)}."""
    paths: list
    labels: list
    splits: list
    classes: list
    side: int = 10**6
    images: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.paths)

    def load(self, index):
        """Image `index`, uint8 (3, H, W), not to be written to. Raises UserError if unreadable."""
        if index in self.images:
            return self.images[index]
        try:
            with Image.open(self.paths[index]) as image:
                image.draft("RGB", (self.side, self.side))  # JPEG: decode at 1/2, 1/4 or 1/8
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits: scaled, not clipped
                    image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype("u1"))
                if image.has_transparency_data:
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image.convert("RGBA"))
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {self.paths[index]}: {error}") from None
        if min(image.size) > self.side:
            image = ImageOps.cover(image, (self.side, self.side), Image.Resampling.BICUBIC)
        long = 8 * min(image.size)  # beyond that only the middle, as RandomResizedCrop
        return TF.center_crop(TF.pil_to_tensor(image), [min(n, long) for n in image.size[::-1]])

    def cache(self, indices, gib):
        """Read images, keep about `gib` GiB. Where one is unreadable, the next takes its place,
        without its label. Returns what was wrong; UserError for more than one and 1 % of all."""
        used, wrong, total = 0, {}, len(indices)
        with ThreadPoolExecutor() as pool:
            for start in range(0, total, 256):
                chunk = [(i, pool.submit(self.load, i)) for i in indices[start : start + 256]]
                for i, image in chunk:
                    if isinstance(image.exception(), UserError):
                        wrong[i] = image.exception()
                        status(f"skipped: {wrong[i]}")
                    elif used + image.result().numel() < gib * 2**30:
                        self.images[i], used = image.result(), used + image.result().numel()
                done = min(start + 256, total)
                status(f"{done:,} of {total:,} images read, {used / 2**30:.1f} GiB", done == total)
        if len(wrong) > max(1, total // 100) or len(wrong) == total:
            raise UserError(f"{len(wrong)} of {total} images are unreadable, above the 1 % that is "
                            f"skipped; first: {next(iter(wrong.values()))}")
        for i in wrong:
            other = next(j for j in [*range(i + 1, len(self)), *range(i)] if j not in wrong)
            self.paths[i], self.labels[i] = self.paths[other], -1
        return [*wrong.values()]

    def select(self, split):
        """Indices of `split`: "all", or names joined by +. Raises UserError for unknown names."""
        known = {"all", *self.splits, "trainval" if "train" in self.splits else ""} - {""}
        wanted = set(split.replace("trainval", "trainval+train+val").split("+"))
        if not known >= set(split.split("+")):
            raise UserError(f"--split {split}: the data has {', '.join(sorted(known))}")
        return [i for i, name in enumerate(self.splits) if split == "all" or name in wanted]

def open_data(config):
    """The `ImageSet` that `--data` and `--root` name. Raises UserError if there is none."""
    side = math.ceil(config.img_size * max(256 / 224, config.crop_scale**-0.5))  # fits all crops
    if config.data == "demo":
        from probe import draw_flowers  # not at the top: probe.py imports this file
        return draw_flowers()
    if config.data not in TORCHVISION:
        return image_folder(config, side)
    dataset, attribute, splits, files = TORCHVISION[config.data]
    try:
        parts = [dataset(config.root, split, download=True) for split in splits]
    except (OSError, RuntimeError) as error:
        raise UserError(f"no {config.data}: put {files} into {config.root} ({error})") from None
    names = [split for part, split in zip(parts, splits) for _ in range(len(part))]
    paths = [str(path) for part in parts for path in getattr(part, attribute)]
    labels = [label for part in parts for label in part._labels]
    classes = getattr(parts[0], "classes", range(max(labels) + 1))  # unnamed in torchvision 0.21
    return ImageSet(paths, labels, names, [str(name) for name in classes], side)

def image_folder(config, side):
    """Any folder of images: train/ and val/ or test/ are splits; within a split, or without any,
    sub-folders that hold images are labels; images loose or nested deeper are unlabelled."""
    folder = Path(config.root if config.data == "imagenet100" else "", config.data)
    if not folder.is_dir():
        known = ["demo", *TORCHVISION, "imagenet100"]
        raise UserError(f"--data {config.data}: no folder, and {unknown(config.data, known)}")
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
    classes, numbers = np.unique(["", *labels], return_inverse=True)  # "" is 0, to become -1
    return ImageSet(paths, (numbers[1:] - 1).tolist(), splits, classes[1:].tolist(), side)

class Crops(torch.utils.data.Dataset):
    """Item (epoch, index), keyed by both and the seed: a random crop and flip (App. C), uint8
    (3, S, S); uniform numbers (2, 10) for the colours of its two views; a mask (N,) bool.
    Item index: the centre crop of the image resized to 256/224 of the size."""
    def __init__(self, images, size, crop_scale=0.2, mask=None, ratio=0.6, seed=0, flip=0.5):
        self.images, self.seed, bicubic = images, seed, T.InterpolationMode.BICUBIC
        self.mask = partial(mask or blockwise_mask, (size // 16, size // 16), ratio)
        self.centre = T.Compose([T.Resize(round(size * 256 / 224), bicubic), T.CenterCrop(size)])
        self.crop = T.Compose([T.RandomResizedCrop(size, (crop_scale, 1), interpolation=bicubic),
                               T.RandomHorizontalFlip(flip)])

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            return self.centre(self.images.load(key))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the default generator
            torch.default_generator.manual_seed(hash((self.seed, *key)))
            return self.crop(self.images.load(key[1])), torch.rand(2, 10), self.mask().flatten()

def epoch_batches(indices, batch_size, start, total, seed, rank=0, processes=1):
    """For the steps `start` to `total`, the (epoch, index) of one process; a rest is dropped."""
    steps = len(indices) // batch_size
    for step in range(start, total):
        epoch, position = divmod(step, steps)
        if position == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(indices).tolist()
        batch = order[position * batch_size : (position + 1) * batch_size]
        yield [(epoch, i) for i in batch[rank::processes]]

def make_loader(crops, config, objective=None, **batching):
    """A DataLoader whose processes are forked on Linux, so that they share the decoded images."""
    def detach(_):  # what ends the group is for the main process, which finishes its step
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    context = "fork" if config.workers and sys.platform == "linux" else None
    batching |= {"multiprocessing_context": context, "pin_memory": config.device.startswith("cuda"),
                 "collate_fn": getattr(objective, "collate", None)}
    return torch.utils.data.DataLoader(crops, num_workers=config.workers,
                                       worker_init_fn=detach, **batching)

# ---- Views: colour pipelines in batches (sec. 3.2, App. C) -------------------------------------
def adjust_hue(images, shift):
    """HSV and back: channel n = 5, 3, 1 is V - C min(k, 4 - k, 1) with k = n + 6 H mod 6."""
    value, brightest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    n = 5 - 2 * torch.arange(3, device=images.device).view(3, 1, 1)  # 5, 3, 1; a copy would wait
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
    """Jitter, blur and grayscale in random order, each image with `probability` (App. C).
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
    """uint8, or float in [0, 1] -> float32 standardised by ImageNet's colours, channels last."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    colors = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    mean, deviation = colors.to(images.device, non_blocking=True)
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)

def make_views(crops, draws, kind="different", probability=0.6, rng=None):
    """uint8 crops (B, 3, S, S), draws (B, 2, 10) on the CPU -> normalised views a and b."""
    count, crops = {"none": 0, "same": 1, "different": 2}[kind], crops.float() / 255
    views = [color_pipeline(crops, draws[:, i], probability, rng) for i in range(count)] or [crops]
    return normalise(views[0]), normalise(views[-1])

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
            y, x = int(tries[2] * (height - h + 1)), int(tries[3] * (width - w + 1))
            block = mask[y : y + h, x : x + w]
            if h <= height and w <= width and 0 < int((~block).sum()) <= left:
                block.fill_(True)
                break
        else:  # ten tries in vain: single patches fill up to the exact count
            free = (~mask).flatten().nonzero().squeeze(1)
            mask.view(-1)[free[torch.randperm(len(free), generator=generator)[:left]]] = True
    return ~mask if inverse else mask

def random_mask(grid, ratio=0.6, generator=None):
    """Hidden patches anywhere: (Gh, Gw) bool."""
    order = torch.randperm(grid[0] * grid[1], generator=generator).view(grid)
    return order < int(ratio * grid[0] * grid[1])

inverse_blockwise_mask = partial(blockwise_mask, inverse=True)
MASKS = {"blockwise": blockwise_mask, "inverse": inverse_blockwise_mask, "random": random_mask}

# ---- Encoder: tokenizers, sparse (Table 3) or plain, and transformer (sec. 3.1, App. A.2) ------
def enlarge(mask, x):
    """Patch mask (B, 1, Gh, Gw) at the resolution of x (B, C, H, W): (B, 1, H, W)."""
    mask = mask.repeat_interleave(x.shape[-2] // mask.shape[-2], -2)
    return mask.repeat_interleave(x.shape[-1] // mask.shape[-1], -1)

class SparseConv2d(nn.Conv2d):
    """A convolution that neither sees nor fills hidden patches (sec. 3.1).
    forward(x (B, C, H, W), mask (B, 1, Gh, Gw) bool or None): hidden sites are zeroed, the dense
    result is divided by the visible share of the kernel's in-image taps (`renormalise`), and hidden
    sites are zeroed again: the pattern neither grows nor shrinks. Without a mask: nn.Conv2d."""
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False,
                 renormalise=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.renormalise = renormalise

    def forward(self, x, mask=None):
        if mask is None:
            return super().forward(x)
        hidden = enlarge(mask, x)  # `where` and products keep the channels-last layout
        x = self._conv_forward(torch.where(hidden, x.new_zeros(()), x), self.weight, None)
        scale = (~enlarge(mask, x)).float()
        if self.renormalise:
            window = (self.kernel_size, self.stride, self.padding)
            share = F.avg_pool2d((~hidden).float(), *window, count_include_pad=False)
            scale = scale / share.masked_fill(share == 0, 1)
        x = x * scale.to(x.dtype)
        return x if self.bias is None else x + self.bias[:, None, None] * (scale > 0)

class SparseMaxBlurPool2d(nn.Module):
    """Anti-aliased max pooling (Zhang 2019), (B, C, H, W) -> (B, C, H/2, W/2), masks as above.
    Max of 2x2 at stride 1, where hidden sites never win, then a 3x3 binomial blur at stride 2.
    Nothing to renormalise: as patches have an even side, all taps around a visible site see one."""
    def __init__(self, channels, renormalise=True):
        super().__init__()

    def forward(self, x, mask=None):
        if mask is not None:  # low enough to lose, but not to overflow in a mean
            x = torch.where(enlarge(mask, x), x.new_full((), torch.finfo(x.dtype).min / 16), x)
        x = F.max_pool2d(x, 2, 1)
        # Two means of 2x2 are the binomial 3x3, [1 2 1] = [1 1] * [1 1], with a fast gradient.
        x = F.avg_pool2d(F.avg_pool2d(x, 2, 1, 1), 2)
        return x if mask is None else x * ~enlarge(mask, x)

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

class PatchEmbed(nn.Conv2d):
    """ViT's patch embedding, one 16x16 convolution; `forward` as in `SparseConvTokenizer`."""
    def __init__(self, embed_dim=384):
        super().__init__(3, embed_dim, 16, 16, bias=False)
        nn.init.kaiming_normal_(self.weight)

    def forward(self, images, mask=None):
        tokens = super().forward(images).flatten(2).transpose(1, 2)
        return tokens if mask is None else tokens.masked_fill(mask[..., None], 0)

def sincos_positions(height, width, dim, device="cpu"):
    """Fixed 2-D sin-cos positions of the integer grid indices: (height * width, dim) float32."""
    frequency = 10000 ** (-torch.arange(dim // 4, device=device) / (dim // 4))
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    angle = torch.cartesian_prod(rows, columns)[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)

def dropout(x, rate, training=True):
    """F.dropout; on a CPU from 16 random bits an element, which are cheaper than a float."""
    if x.device.type != "cpu" or rate == 0 or not training:
        return F.dropout(x, rate, training)
    bits = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 4 + 1,)).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape) >= round(rate * 2**16) - 2**15
    return x * keep * (1 / (1 - rate))

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
        if x.device.type == "cpu":  # in training several times faster than torch's fused one
            x = dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), rate) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)  # (B, heads, N, D / heads)
        return dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)

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
    def __init__(self, dim, num_heads, layer=1, drop_path=0.0, residual_norm=False, **dropouts):
        super().__init__()
        self.drop_path, self.residual_norm = drop_path, residual_norm
        self.attention = Attention(dim, num_heads, **dropouts)
        self.ffn = SwiGLU(dim)
        for name, weight in self.named_parameters():
            nn.init.trunc_normal_(weight, std=0.02)
            weight.data /= math.sqrt(2 * layer) if name.endswith("proj.weight") else 1

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
    for any H and W divisible by 16, otherwise ValueError. Further `options` go to every `Block`.
    visible (B, K), indices: only these patches are encoded -> (B, R + K, D), R registers first;
    layers, from 1: the outputs of these blocks, LayerNormed and joined -> (B, N, len(layers) D)."""
    def __init__(self, tokenizer, embed_dim=384, depth=12, num_heads=6, registers=0, **options):
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            raise UserError(f"heads, {num_heads}, and 4 must divide the width, {embed_dim}")
        self.tokenizer, self.embed_dim, self.num_heads = tokenizer, embed_dim, num_heads
        self.block_options, self.dropout, self.depth = options, options.get("dropout", 0.0), depth
        self.mask_token = nn.Parameter(torch.randn(embed_dim) * 1e-6)
        self.blocks = make_blocks(depth, embed_dim, num_heads, **options)
        self.registers = nn.Parameter(torch.randn(registers, embed_dim) / 50) if registers else None

    def grid_positions(self, images):
        """Positions (N, D) of the patches of `images`."""
        height, width = images.shape[-2] // 16, images.shape[-1] // 16
        return sincos_positions(height, width, self.embed_dim, images.device)

    def forward(self, images, mask=None, visible=None, layers=None):
        if images.shape[-2] % 16 or images.shape[-1] % 16:
            raise ValueError(f"image size {tuple(images.shape[-2:])} is not divisible by 16")
        tokens = self.tokenizer(images, mask)
        if mask is not None and visible is None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = dropout(tokens + self.grid_positions(images), self.dropout, self.training)
        if visible is not None:
            tokens = tokens.take_along_dim(visible[..., None], 1)
        if self.registers is not None:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], 1)
        outputs, first = [], len(self.registers) if self.registers is not None else 0
        for layer, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            if layer in (layers or [self.depth]):
                outputs.append(F.layer_norm(tokens, (self.embed_dim,)))
        return torch.cat(outputs, -1)[:, first if visible is None else 0 :]

SIZES = {  # width, depth, heads (Tables 4 and 11; the heads of 3 and 9 blocks are not stated)
    "tiny": (192, 4, 3), "3": (384, 3, 4), "7": (384, 7, 4), "9": (384, 9, 4), "12": (384, 12, 6)}

def create_encoder(name, img_size=224, heads=None, renormalise=True, **overrides):
    """A new `ViT`: "scott-12/16" (sparse tokenizer), "vit-12/16" (patch embedding), ...; UserError
    for other names. Works at any img_size; overrides: `embed_dim`, `depth`, a `Block`'s options."""
    models = {f"{kind}-{size}/16": (kind, size) for kind in ("scott", "vit") for size in SIZES}
    if name not in models:
        raise UserError(f"--model {name}: {unknown(name, models)}")
    kind, size = models[name]
    options = dict(zip(("embed_dim", "depth", "num_heads"), SIZES[size])) | overrides
    options |= {"num_heads": heads} if heads else {}
    stem = partial(SparseConvTokenizer, renormalise=renormalise) if kind == "scott" else PatchEmbed
    return ViT(stem(options["embed_dim"]), **options)

def encoder_of(config):
    """The new, untrained encoder that the dict of a `Config` describes."""
    names = "heads renormalise registers dropout attention_dropout drop_path residual_norm".split()
    return create_encoder(config["model"], **{name: config[name] for name in names})

# ---- MIM-JEPA (sec. 3.2) and its schedules (sec. 4.2, Table 6) ---------------------------------
def hidden_layers(depth):
    """Blocks whose outputs Bootleg predicts: 1, 4, 8 and 12 of 12, in proportion of others."""
    return sorted({1, round(depth / 3), round(2 * depth / 3), depth} - {0})

class MIMJEPA(nn.Module):
    """Predict what the teacher says about patches that the student does not see (Eq. 2).
    student: context encoder f_theta; teacher: target encoder, its average; predictor: f_phi.
    hidden_targets: predict what four blocks of the teacher say (Bootleg, arXiv 2603.15553)."""
    def __init__(self, encoder, predictor_depth=3, hidden_targets=False):
        super().__init__()
        self.student = encoder
        self.layers = hidden_layers(encoder.depth) if hidden_targets else [encoder.depth]
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        width = encoder.embed_dim
        head = nn.Linear(width, width * len(self.layers))
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        blocks = make_blocks(predictor_depth, width, encoder.num_heads, **encoder.block_options)
        self.predictor = nn.Sequential(blocks, nn.LayerNorm(width, elementwise_affine=False), head)
        self.train()

    def train(self, mode=True):
        super().train(mode).teacher.eval()  # no dropout in the targets
        return self

    def forward(self, view_a, view_b, mask):
        """Views (B, 3, H, W), mask (B, N) bool -> Smooth-L1 loss, mean over the hidden tokens."""
        with torch.no_grad():
            target = self.teacher(view_b, layers=self.layers)  # N(s_y): it ends in a LayerNorm
        context = self.student(view_a, mask) + self.student.grid_positions(view_a)  # s_x
        prediction = self.predictor(dropout(context, self.student.dropout, self.training))  # s^_y
        loss = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none").mean(-1)
        return (loss * mask).sum() / mask.sum()

    @torch.no_grad()
    def update_teacher(self, momentum):
        """theta_bar <- momentum * theta_bar + (1 - momentum) * theta."""
        weights = [list(part.parameters()) for part in (self.teacher, self.student)]
        torch._foreach_lerp_(*weights, 1 - momentum)  # all in one call

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
    share = (step - decay_start) / max(1e-9, last - decay_start) if step < last else 1
    return peak if share <= 0 else end + (peak - end) * (1 + math.cos(math.pi * share)) / 2

weight_decay_schedule = partial(linear, start=0.04, end=0.4)
ema_schedule = partial(linear, start=0.996, end=1.0)

def create_optimizer(module, lr, beta2=0.999):
    """AdamW of what needs gradients; vectors and biases are not `decayed`. A weight may have an
    attribute `lr_scale`, its share of the learning rate."""
    groups = {}
    for p in (p for p in module.parameters() if p.requires_grad):
        groups.setdefault((p.ndim > 1, getattr(p, "lr_scale", 1.0)), []).append(p)
    groups = [{"params": weights, "decayed": decayed, "lr_scale": scale}
              for (decayed, scale), weights in sorted(groups.items(), reverse=True)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)

# ---- Training: files, and the run --------------------------------------------------------------
FORMAT = 2  # of last.pt; to be raised when its keys change
SIGNALS = (signal.SIGINT, signal.SIGTERM)
FREE = ("out root device workers cache_gib compile grad_accum_steps which knn_every save_minutes "
        "max_minutes resume benchmark").split()  # settings that do not change the weights

def write_file(path, content):
    """Write a text, or what content(file) writes: at any moment the old or the new file is there,
    and complete. Raises UserError, for a full disk say. Of several processes, the first writes."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's own
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        raise UserError(f"cannot write {path} (what was there is untouched): {error}") from None

def load_checkpoint(path):
    """The dict of a checkpoint; code in it is not run. Raises UserError for any other file."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"PK"  # torch.save writes a zip archive
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if packed else None
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds code, which would be run; refused") from None
    except RuntimeError:
        raise UserError(f"{path}: cut short or damaged") from None
    if not isinstance(checkpoint, dict) or not {"format", "config", "teacher"} <= set(checkpoint):
        raise UserError(f"{path}: of other software, not a checkpoint of scott.py")
    if (n := checkpoint["format"]) != FORMAT:
        raise UserError(f"{path}: of a{' newer' if n > FORMAT else 'n older'} scott.py, format {n}")
    checkpoint["config"] = asdict(Config()) | checkpoint["config"]  # flags that are newer than it
    return checkpoint

def load_encoder(path, device="cpu", which=None):
    """The frozen `ViT`, in eval mode, of a checkpoint; which: None = as its run was configured."""
    checkpoint = load_checkpoint(path)
    encoder = encoder_of(checkpoint["config"])
    encoder.load_state_dict(checkpoint[which or checkpoint["config"]["which"]])
    return encoder.eval().requires_grad_(False).to(device)

def noting_signals(batches, noted):
    """The batches; meanwhile SIGNALS do not end the program, but are added to the list `noted`."""
    before = {n: signal.signal(n, lambda number, _: noted.append(number)) for n in SIGNALS}
    try:
        yield from batches
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def backward(model, batch, parts, autocast):
    """Gradients of the mean loss over a batch (tensors with the images first) that is computed in
    equal `parts`, one after the other; returns that loss. Raises UserError if memory runs out."""
    total, pieces = 0.0, list(zip(*(x.chunk(parts) for x in batch)))
    try:
        for done, piece in enumerate(pieces, 1):
            wait = done < parts and hasattr(model, "no_sync")  # the processes agree once a step
            with model.no_sync() if wait else nullcontext():
                with autocast():
                    loss = model(*piece) / parts
                loss.backward()
            total += loss.detach()
    except torch.OutOfMemoryError:
        raise UserError(f"the device has not enough memory for {len(pieces[0][0])} images at once: "
                        f"try --grad-accum-steps {2 * parts}, the same step in {2 * parts} parts "
                        "(more, if that is not enough)") from None
    return total

def continue_from(checkpoint, config, parts, images):
    """Load the states of all `parts`, {name: module}. Raises UserError if it is another run."""
    saved, now = checkpoint["config"], asdict(config) | {"images": images}
    if config.epochs > saved["epochs"]:
        print(f"{config.epochs} epochs instead of {saved['epochs']}: the schedules are new from "
              f"step {checkpoint['step']}")
        saved = saved | {"epochs": config.epochs}
    other = [f"{name} {now.get(name)} (there {saved.get(name)})" for name in now | saved
             if name not in FREE and now.get(name) != saved.get(name)]
    if other:
        raise UserError(f"{config.resume} is a run with other settings: {', '.join(other)}")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])

def train(config, objective=None):
    """Pretrain as `config` says, alone or under torchrun; returns the run's folder. Raises
    UserError. objective: another method with the calls and parts of `MIMJEPA`; it may draw the
    masks itself, in draw_mask(grid, ratio) of an image and collate(items of `Crops`) of a batch."""
    from probe import benchmark, draw_views, monitor, report, write_metrics
    begun, config = time.time(), resolve(config)
    if config.benchmark:
        return benchmark(config, objective)
    device, cuda = torch.device(config.device), config.device.startswith("cuda")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % processes:
        raise UserError(f"--batch-size {config.batch_size}: {processes} processes cannot share it")
    if config.batch_size // processes % config.grad_accum_steps:
        raise UserError(f"--grad-accum-steps {config.grad_accum_steps}: must divide the images of "
                        f"a process, {config.batch_size // processes} a step")
    if processes > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    sys.stdout = open(os.devnull, "w") if rank else sys.stdout
    images = open_data(config)
    indices = images.select(config.split)
    steps = len(indices) // config.batch_size
    total, warmup = config.epochs * steps, round(config.warmup_epochs * steps)
    if steps == 0:
        raise UserError(f"--batch-size {config.batch_size}: more than the {len(indices)} images")
    if warmup >= total:
        raise UserError(f"--warmup-epochs {config.warmup_epochs}: must be less than --epochs")

    torch.manual_seed(config.seed)
    objective = objective or MIMJEPA(encoder_of(asdict(config)), config.predictor_depth,
                                     config.hidden_targets)
    objective.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer(objective, config.lr, config.beta2)
    parts = dict(objective.named_children()) | {"optimizer": optimizer}
    out = config.out or f"runs/{Path(config.data).resolve().name}-{config.model.replace('/', '-')}"
    if os.path.isfile(out):
        raise UserError(f"--out {out}: is a file, not a folder")
    folders = (Path(f"{out}-{n}" if n > 1 else out) for n in range(1, sys.maxsize))
    folder = next(folder for folder in folders if not folder.exists())
    state = {"step": 0, "rows": [], "loss": 0.0}
    if config.resume:
        folder, state = Path(config.resume).parent, load_checkpoint(config.resume)
        continue_from(state, config, parts, len(indices))
    config, start, rows = replace(config, out=str(folder)), state["step"], state["rows"]
    if start == total:
        print(f"{folder} is finished, {config.epochs} epochs; a larger --epochs goes on")
        return folder
    model = objective if processes == 1 else nn.parallel.DistributedDataParallel(objective)
    model = torch.compile(model) if config.compile else model
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.amp == "bf16")
    images.cache(range(len(images)), config.cache_gib)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    write_file(folder / "config.json", json.dumps(asdict(config) | versions, indent=2) + "\n")
    print(f"{config.model} ({sum(p.numel() for p in objective.student.parameters()):,} parameters) "
          f"on {len(indices):,} images of {config.data}, {config.img_size} px: {config.epochs} "
          f"epochs of {steps} steps, {config.device} {config.amp}, to {folder}", flush=True)
    if not rows:
        rows = [{"epoch": 0, "step": 0} | monitor("untrained", objective.student, images, config)]

    mask = getattr(objective, "draw_mask", MASKS.get(config.mask))
    crops_of = Crops(images, config.img_size, config.crop_scale, mask, config.mask_ratio,
                     config.seed, config.flip_prob)
    batches = epoch_batches(indices, config.batch_size, start, total, config.seed, rank, processes)
    loader, noted = make_loader(crops_of, config, objective, batch_sampler=batches), []
    started = saved = shown = clock = time.time()
    since, losses = start, torch.tensor(state["loss"], device=device)
    for step, (crops, draws, *masks) in enumerate(noting_signals(loader, noted), start):
        lr, decay, momentum = config.schedule(step, total, warmup)
        for group in optimizer.param_groups:
            group.update(lr=lr * group.get("lr_scale", 1), weight_decay=decay * group["decayed"])
        crops, *masks = (x.to(device, non_blocking=True) for x in (crops, *masks))
        rng = np.random.default_rng([config.seed, step])
        view_a, view_b = make_views(crops, draws, config.views, config.color_prob, rng)
        if step == 0:
            draw_views(folder / "preview.png", view_a[:8], view_b[:8], masks[0][:8])
        torch.manual_seed(hash((config.seed, step, rank)))  # of dropout
        losses += backward(model, (view_a, view_b, *masks), config.grad_accum_steps, autocast)
        optimizer.step()
        optimizer.zero_grad()
        objective.update_teacher(momentum)
        done, now = step % steps + 1, time.time()
        stop = noted[0] if noted else int(now - begun > 60 * config.max_minutes)
        if processes > 1:  # all stop after the same step
            agreed = torch.tensor(stop)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            stop = agreed.item()
        save = step + 1 == total or stop or now - saved > 60 * config.save_minutes
        if save or done == steps or now - shown > 1:  # only here the device is waited for
            sizes = torch._foreach_norm([losses, *objective.parameters()])
            if not torch.stack(sizes).isfinite().all():
                raise UserError(f"the loss or a weight is not finite by step {step + 1}, learning "
                                f"rate {lr:g}. Try a lower --lr or --amp fp32; last.pt is older")
            shown, row = now, {
                "epoch": step // steps + 1, "step": step + 1, "loss": losses.item() / done,
                "lr": lr, "weight_decay": decay, "ema": momentum,
                "images_per_s": round((step + 1 - since) * config.batch_size / (now - clock), 1)}
            left = (now - started) / (step + 1 - start) * (total - step - 1)
            report(row, left, final=done == steps)
        if done == steps:
            if step + 1 == total or row["epoch"] % config.knn_every == 0:
                row |= monitor(config.which, parts[config.which], images, config, rows[0])
            rows.append(row)
            write_metrics(folder / "metrics.csv", rows)
            since, clock, losses = step + 1, time.time(), torch.zeros_like(losses)
        if save:  # no generator's state: all draws are keyed by the seed and the step
            state = {"format": FORMAT, "config": asdict(config) | {"images": len(indices)},
                     "epoch": (step + 1) // steps, "step": step + 1, "rng": config.seed,
                     "rows": rows, "loss": losses.item()}
            state |= {name: part.state_dict() for name, part in parts.items()}
            write_file(folder / "last.pt", partial(torch.save, state))
            saved = now
        if stop and step + 1 < total:
            print(f"stopped after step {step + 1} of {total}; to go on: --resume {folder}/last.pt")
            if stop in SIGNALS:
                raise SystemExit(128 + stop)
            return folder
    other = {"teacher": "student", "student": "teacher"}[config.which]
    monitor(other, parts[other], images, config)
    print(f"""trained in {(time.time() - started) / 60:.1f} min; curves, views, checkpoint: {folder}
A rising loss is no bad sign, the targets become richer: compare k-NN and rank with the untrained.
next: python probe.py --ckpt {folder}/last.pt, or python scott.py --data path/to/images""")
    return folder

def main(argv=None, run=train, cls=Config):
    """The command line of a program, `run(cls)`; returns the exit code."""
    def stop(number, _):
        print("stopped: no step was under way, there is nothing to save", file=sys.stderr)
        raise SystemExit(128 + number)
    for number in SIGNALS:
        signal.signal(number, stop)
    if sys.platform == "linux":  # keep freed memory: fresh pages are a fifth of a CPU's step
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    try:
        run(parse_config(argv, cls))
    except UserError as error:
        text = str(error).split("UserError: ")[-1].strip()  # of a loader process: without its trace
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    import scott  # this file under the name by which probe.py knows it
    sys.exit(scott.main())
