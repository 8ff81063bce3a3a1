"""What are an encoder's features worth? Linear, attentive and k-NN probes for scott.py.

    python probe.py --ckpt runs/flowers102-scott-12-16/last.pt    # on the data it was trained on
    python probe.py --random-init scott-12/16 --data flowers102   # untrained: the honest zero line
    python probe.py --ckpt ... --mode finetune                    # unfreeze; with --random-init:
                                                                  # supervised from scratch
    python probe.py --ckpt ... --pca parts.png IMAGES             # what the tokens distinguish
    python probe.py --ckpt ... --export features.npz FOLDER       # vectors for your own tools

The protocol is that of arXiv 2502.18056, sec. 4.3 and App. E.

What is unusual here, in reading order:
- Epoch e trains on copy e % K of every image: the centre crop is copy 0, the others are augmented.
  A copy is keyed by (seed, copy, image), so tokens kept in memory equal those computed again.
- All heads train at once on the same tokens, and fine-tuning is the same loop: there the inputs
  are images, and the head has the encoder in it.
- The last epoch is the result. The best epoch is picked on the test set, and is called that.
"""

import json
import math
import os
import resource
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from torchvision import utils

import scott
from scott import UserError, flag

# ---- The command line --------------------------------------------------------------------------
@dataclass
class ProbeConfig:
    """Every flag; None = as in the run that made the checkpoint, or by mode."""
    ckpt: str | None = flag(None, "checkpoint of a run of scott.py", group="encoder")
    random_init: str | None = flag(None, "instead of it: an untrained model, as scott-12/16")
    which: str | None = flag(None, "default: as the run says", choices=("teacher", "student"))
    mode: tuple[str, ...] = flag(("linear", "attentive", "knn"), "one or more of", group="probes",
                                 nargs="+", choices=("linear", "attentive", "knn", "finetune"))
    data: str | None = flag(None, "as in scott.py (default: the run's)")
    root: str | None = flag(None, "as in scott.py (default: the run's)")
    img_size: int | None = flag(None, "side of the input, pixels (default: the run's)", 16, 8192)
    crop_scale: float | None = flag(None, "as in scott.py (default: the run's)", 0.01, 1)
    views: str | None = flag(None, "colours of the crops that heads learn on (default: the run's)",
                             choices=("different", "same", "none"))
    color_prob: float | None = flag(None, "as in scott.py (default: the run's)", 0, 1)
    flip_prob: float | None = flag(None, "as in scott.py (default: the run's)", 0, 1)
    epochs: int | None = flag(None, "default: 100; 300 from scratch", 1, 10**6)
    batch_size: int | None = flag(None, "default: 64; of a whole network the run's", 1, 10**6)
    lr: float | None = flag(None, "peak (default: 5e-4; fine-tuning 1e-4)", 0, 1)
    copies: int | None = flag(None, "crops of each training image that are encoded once, 1 = the "
                              "centre; 0 = new ones every epoch (default: 0 on a GPU, 20 on a CPU)",
                              0, 10**6)
    cache_gib: float = flag(8.0, "memory for decoded images, and again for tokens, GiB", 0, 1e5)
    seed: int = flag(0, "of heads, order and crops, and of --random-init", 0, 2**31, group="run")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: str = flag("auto", "arithmetic", choices=("auto", "bf16", "fp32"))
    workers: int | None = flag(None, "loader processes (default: by device)", 0, 256)
    out: str | None = flag(None, "folder of probe.json (default: the checkpoint's)")
    pca: tuple[str, ...] = flag((), "OUT.png [IMAGE ...]: draw the tokens' components instead",
                                nargs="+")
    export: tuple[str, ...] = flag((), "OUT.npz [FOLDER]: write mean-pooled features instead",
                                   nargs="+")

def open_encoder(options):
    """(frozen encoder in eval mode, `scott.Config`): the run's settings, and what was given."""
    if bool(options.ckpt) == bool(options.random_init):
        raise UserError("give either --ckpt FILE or --random-init MODEL")
    names = {item.name for item in fields(scott.Config)}
    given = {name: value for name, value in asdict(options).items()
             if name in names and name not in ("out", "epochs", "lr") and value is not None}
    if options.random_init:
        preset = scott.DEMO if given.get("data", "demo") == "demo" else {}
        config = scott.resolve(scott.Config(**preset | given | {"model": options.random_init}))
        torch.manual_seed(config.seed)
        encoder = scott.encoder_of(asdict(config)).eval().requires_grad_(False)
    else:
        checkpoint = scott.load_checkpoint(options.ckpt)
        of_run = {name: value for name, value in checkpoint["config"].items() if name in names}
        config = scott.resolve(scott.Config(**of_run | {"workers": None} | given))
        encoder = scott.load_encoder(options.ckpt, which=config.which)
    return encoder.to(config.device, memory_format=torch.channels_last), config

# ---- Inputs: images, and tokens that are computed once -----------------------------------------
def view_batches(images, indices, copy, order, config):
    """Yields (normalised images (B, 3, S, S), rows (B,)), both on the device, in the given order.
    indices: of the images; order: (n,) rows of `indices`; copy: 0 = centre crops, otherwise the
    number of a random crop, flip and colour treatment, as in pretraining."""
    device, done = torch.device(config.device), 0
    keys = [int(i) if copy == 0 else (copy, int(i)) for i in indices]
    batches = order.split(config.batch_size)
    kind = "none" if config.views == "none" else "same"  # one treatment, or none
    crops_of = scott.Crops(images, config.img_size, config.crop_scale, seed=config.seed,
                           flip=config.flip_prob)
    sampler = [[keys[row] for row in rows] for rows in batches]
    for rows, batch in zip(batches, scott.make_loader(crops_of, config, batch_sampler=sampler)):
        crops = (batch if copy == 0 else batch[0]).to(device, non_blocking=True)
        if copy == 0:
            views = scott.normalise(crops)
        else:  # one order of the colours a copy: an image's view does not depend on its batch
            rng = np.random.default_rng([config.seed, copy])
            views = scott.make_views(crops, batch[1], kind, config.color_prob, rng)[0]
        yield views, rows.to(device)
        done += len(rows)
        scott.status(f"{done:,} of {len(order):,} images encoded", final=False)

class FrozenTokens:
    """The tokens that a frozen encoder makes of some images' copies; float16 in memory, which is
    enough for what comes out of a LayerNorm. A copy is computed at its first use; those that do not
    fit into `gib` GiB, and those numbered `copies` or more, are computed again each time.
    pooled: keep one token an image, the mean."""
    def __init__(self, encoder, images, indices, config, copies=1, gib=8.0, pooled=False):
        self.encoder, self.images, self.indices, self.config = encoder, images, indices, config
        count = 1 if pooled else (config.img_size // 16) ** 2
        self.shape, self.memory = (len(indices), count, encoder.embed_dim), {}
        self.gib = 2 * math.prod(self.shape) / 2**30  # of one copy
        self.kept = min(copies, int(gib / self.gib))

    def __len__(self):
        return len(self.indices)

    def batches(self, copy, order):
        """Yields (tokens (B, N, D) float32, rows (B,)) of the copy, in the given order of rows."""
        if copy in self.memory:
            for rows in order.to(self.config.device).split(self.config.batch_size):
                yield self.memory[copy][rows].float(), rows
            return
        device, amp = torch.device(self.config.device), self.config.amp == "bf16"
        keep = copy < self.kept
        store = torch.empty(self.shape if keep else 0, dtype=torch.float16, device=device)
        for views, rows in view_batches(self.images, self.indices, copy, order, self.config):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                tokens = self.encoder(views).float()
            tokens = tokens.mean(1, keepdim=True) if self.shape[1] == 1 else tokens
            if keep:
                store[rows] = tokens.half()
            yield tokens, rows
        if keep:
            self.memory[copy] = store

    def vectors(self):
        """Mean-pooled tokens of the centre crops, (n, D) float32."""
        batches = self.batches(0, torch.arange(len(self)))
        return torch.cat([tokens.mean(1) for tokens, _ in batches])

# ---- Heads (App. E.2) --------------------------------------------------------------------------
class LinearHead(nn.Module):
    """Average pool, LayerNorm, Linear: tokens (B, N, D) -> logits (B, classes)."""
    def __init__(self, dim, classes):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens):
        return self.head(self.norm(tokens.mean(1)))

class AttentiveHead(nn.Module):
    """One learned query gathers the tokens: (B, N, D) -> logits (B, classes).
    z = q + CrossAttention(q, LayerNorm(x)); z = z + SwiGLU(LayerNorm(z)); Linear(LayerNorm(z))."""
    def __init__(self, dim, classes, num_heads=4, dropout=0.2):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.norm_tokens, self.norm_ffn, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.ffn = scott.SwiGLU(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens):
        x = self.norm_tokens(tokens)[:, None]  # (B, 1, N, D), for all attention heads
        # The query is the same for all images, so it is taken through the keys' projection once,
        # and values are projected after averaging: 2 h N D products an image instead of 2 N D^2.
        q = self.q(self.query).view(self.num_heads, 1, -1)
        q = q @ self.k.weight.view(self.num_heads, -1, len(self.query))  # (h, 1, D)
        rate, scale = self.dropout if self.training else 0.0, (len(self.query) / self.num_heads)
        q, x = q.expand(len(x), -1, -1, -1), x.expand(-1, self.num_heads, -1, -1)
        mean = F.scaled_dot_product_attention(q, x, x, dropout_p=rate, scale=scale**-0.5)
        v = self.v.weight.view(self.num_heads, -1, len(self.query))
        z = (mean @ v.mT).flatten(1)  # (B, D)
        z = self.query + F.dropout(self.proj(z), self.dropout, self.training)
        z = z + self.ffn(self.norm_ffn(z))
        return self.head(self.norm(z))

HEADS = {"linear": LinearHead, "attentive": AttentiveHead}

# ---- Quick looks: what scott.py prints and logs while it trains --------------------------------
def evaluation_split(images, seed=0):
    """(train, test) indices of labelled images; None with fewer than two classes.
    Tested on is the test split, otherwise val, otherwise a seeded and stratified fifth."""
    labels, splits = np.array(images.labels), np.array(images.splits)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 0))
    test = order[splits[order] == ("test" if "test" in splits[order] else "val")]
    if len(test) in (0, len(order)):
        test = order[np.argsort(labels[order], kind="stable")][4::5]
    train = np.setdiff1d(order, test)
    return (train, np.sort(test)) if len(test) and len(set(labels[train])) > 1 else None

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

def monitor(name, encoder, images, config, untrained=None):
    """Print and return an encoder's feature_std, effective_rank and, with labels, knn_top1 in %;
    warn where one of the first two is far below that of the `untrained` encoder."""
    split = evaluation_split(images)
    train, test = split or (np.random.default_rng(0).permutation(len(images))[:2048], [])
    encoder = deepcopy(encoder).eval()
    features = FrozenTokens(encoder, images, [*train, *test], config, pooled=True).vectors().cpu()
    sample = features[:: max(1, len(features) // 2048)][:2048]
    result = {"feature_std": sample.std(0).mean().item(), "effective_rank": effective_rank(sample)}
    text = "rank {effective_rank:.1f}, deviation {feature_std:.3f}".format(**result)
    if split:
        labels, parts = torch.tensor(images.labels), features.split([len(train), len(test)])
        scores = knn_scores(parts[0], labels[train], parts[1], len(images.classes))
        result["knn_top1"] = 100 * (scores.argmax(1) == labels[test]).float().mean().item()
        text = f"k-NN {result['knn_top1']:.1f} %, {text}"
    scott.status(f"{name}: {text}")
    keys = ("feature_std", "effective_rank")
    if untrained and any(result[key] < 0.4 * untrained[key] for key in keys):
        print("warning: the features collapse, rank or deviation is below 40 % of the untrained "
              "encoder's. Try a lower --lr or an --ema-start closer to 1.")
    return result

def report(row, left, final):
    """Print a step's `row` of metrics; left: seconds; final: as in `scott.status`."""
    text = "epoch {epoch} step {step} loss {loss:.4f} {images_per_s} images/s".format(**row)
    scott.status(f"{text}, {left / 60:.1f} min left", final)

COLUMNS = ("epoch step loss lr weight_decay ema images_per_s feature_std effective_rank "
           "knn_top1").split()

def write_metrics(path, rows):
    """metrics.csv: a line an epoch; what a row (dict) has not is blank."""
    lines = [COLUMNS, *([str(row.get(name, "")) for name in COLUMNS] for row in rows)]
    scott.write_file(path, "\n".join(map(",".join, lines)) + "\n")

def draw_views(path, view_a, view_b, mask):
    """Picture of what the model sees: views a and b (B, 3, S, S), and a without what is hidden."""
    hidden = scott.enlarge(mask.unflatten(1, (1, view_a.shape[-2] // 16, -1)), view_a)
    pictures = torch.cat([view_a, view_b, view_a.masked_fill(hidden, 0)])
    scott.write_file(path, partial(utils.save_image, pictures, format="png", nrow=len(mask),
                                   normalize=True))

# ---- The demo's images ------------------------------------------------------------------------
def draw_flowers(count=3072, size=128):
    """The demo: flowers of 3 to 6 petals, round or pointed (8 classes); the last third is test."""
    generator = torch.Generator().manual_seed(0)
    axis, images, labels = torch.linspace(-1, 1, size), {}, torch.arange(count) % 8
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
        petal = 1 - 0.75 * torch.minimum(hue, 4 - hue).clamp(0, 1)
        petal = petal * (0.9 - 0.25 * across - 0.25 * radius + 0.05 * texture(24))
        light = uniform(0.3, 0.54) + 0.1 * texture(5) + 0.1 * texture(20)
        ground = light * torch.cat([uniform(0.5, 0.9), uniform(0.9, 1.2), uniform(0.3, 0.6)], 1)
        disk = yellow * (0.9 + 0.3 * texture(40))
        picture = torch.where(radius < 0.24, disk, torch.where(radius < edge, petal, ground))
        images |= enumerate((picture.clamp(0, 1) * 255).byte(), len(images))
    classes = [f"{n} {shape} petals" for n in (3, 4, 5, 6) for shape in ("round", "pointed")]
    splits = ["train" if i < count * 2 / 3 else "test" for i in range(count)]
    paths = [f"demo {i}" for i in images]
    return scott.ImageSet(paths, labels.tolist(), splits, classes, images=images)

# ---- Training and measuring --------------------------------------------------------------------
def accuracies(scores, labels):
    """Scores (n, C), labels (n,) -> top-1 and its 95 % interval (Wilson's), top-5 and mean
    per-class accuracy, all in %."""
    scores, labels = scores.cpu(), labels.cpu()  # float64 below, which not every device has
    n, classes, z = len(labels), scores.shape[1], 1.96
    hits = scores.topk(min(5, classes)).indices == labels[:, None]
    first, top1 = hits[:, 0].double(), hits[:, 0].double().mean().item()
    middle, half = top1 + z * z / 2 / n, z * math.sqrt(top1 * (1 - top1) / n + (z / 2 / n) ** 2)
    interval = [100 * (middle + side * half) / (1 + z * z / n) for side in (-1, 1)]
    counts, right = labels.bincount(), labels.bincount(first)
    top5 = hits.any(1).double().mean().item()
    return {"top1": 100 * top1, "interval": interval, "top5": 100 * top5,
            "per_class": 100 * (right / counts)[counts > 0].mean().item()}

def fit(heads, train, test, labels, config, evaluations):
    """Train all `heads` in one pass by cross-entropy, with the optimiser and schedules of
    pretraining (App. E.2); returns {head: [(epoch, accuracies)]}. Raises UserError.
    heads: {name: module}; train(epoch, order), test(order): generators of (inputs, rows), in that
    order of rows; labels: of the training and the test rows, on the device; config: epochs,
    warmup_epochs, batch_size, lr; evaluations: how often, at most, the test set is looked at."""
    device, started, curves = torch.device(config.device), time.time(), {name: [] for name in heads}
    heads = nn.ModuleDict(heads).to(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.amp == "bf16")
    optimizer = scott.create_optimizer(heads, config.lr)
    steps = math.ceil(len(labels[0]) / config.batch_size)
    total, warmup = config.epochs * steps, round(config.warmup_epochs * steps)
    for epoch in range(config.epochs):
        heads.train()
        order = np.random.default_rng([config.seed, epoch]).permutation(len(labels[0]))
        for step, (inputs, rows) in enumerate(train(epoch, torch.tensor(order)), epoch * steps):
            lr = scott.lr_schedule(step, total, warmup, peak=config.lr)
            decay = scott.weight_decay_schedule(step, total)
            for group in optimizer.param_groups:
                group.update(lr=lr, weight_decay=decay * group["decayed"])
            with autocast():
                logits = [head(inputs).float() for head in heads.values()]
            loss = sum(F.cross_entropy(x, labels[0][rows]) for x in logits)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not loss.isfinite():
            raise UserError(f"the loss is not finite in epoch {epoch + 1}: try a lower --lr")
        done = epoch + 1
        if done * evaluations // config.epochs == epoch * evaluations // config.epochs:
            continue
        heads.eval()
        scores = {name: [] for name in heads}
        with torch.no_grad(), autocast():
            for inputs, _ in test(torch.arange(len(labels[1]))):
                for name, head in heads.items():
                    scores[name].append(head(inputs).float())
        for name in heads:
            curves[name].append((done, accuracies(torch.cat(scores[name]), labels[1])))
        text = ", ".join(f"{name} {curves[name][-1][1]['top1']:.1f} %" for name in heads)
        left = (time.time() - started) / done * (config.epochs - done) / 60
        scott.status(f"epoch {done} of {config.epochs}: {text}, {left:.1f} min left",
                     final=done * 10 // config.epochs > epoch * 10 // config.epochs)
    return curves

def probe_frozen(encoder, images, split, labels, options, config):
    """Linear, attentive and k-NN, as options.mode says: {mode: (settings, curve)} as of `fit`."""
    epochs, modes = options.epochs or 100, options.mode
    config = replace(config, epochs=epochs, warmup_epochs=min(20, epochs / 5),
                     batch_size=options.batch_size or 64, lr=options.lr or 5e-4)
    copies = options.copies
    if copies is None:
        copies = 20 if config.device == "cpu" else 0
    pooled, gib = "attentive" not in modes, options.cache_gib
    test = FrozenTokens(encoder, images, split[1], config, 1, gib, pooled)
    gib = max(0, gib - test.gib)
    train = FrozenTokens(encoder, images, split[0], config, max(1, copies), gib, pooled)

    def train_batches(epoch, order):
        return train.batches(epoch % copies if copies else epoch + 1, order)

    classes, results = len(images.classes), {}
    heads = {mode: HEADS[mode](encoder.embed_dim, classes) for mode in HEADS if mode in modes}
    if heads:
        print(f"{' and '.join(heads)}: {epochs} epochs; crops of each training image: "
              f"{copies or 'new every epoch'}, in memory: {min(train.kept, copies)}", flush=True)
        test_batches = partial(test.batches, 0)
        curves = fit(heads, train_batches, test_batches, labels, config, evaluations=epochs)
        settings = {"epochs": epochs, "batch_size": config.batch_size, "lr": config.lr,
                    "copies": copies}
        results = {mode: (settings, curve) for mode, curve in curves.items()}
    if "knn" in modes:
        scores = knn_scores(train.vectors(), labels[0], test.vectors(), classes)
        results["knn"] = {"k": 20, "temperature": 0.07}, [(None, accuracies(scores, labels[1]))]
    return results

def finetune(encoder, images, split, labels, options, config):
    """The whole network with a linear head; from scratch with pretraining's recipe (Table 6)."""
    epochs = options.epochs or (300 if options.random_init else 100)
    warmup = min(40, epochs * 40 / 300) if options.random_init else min(20, epochs / 5)
    lr = options.lr or (5e-4 if options.random_init else 1e-4)
    config = replace(config, epochs=epochs, warmup_epochs=warmup, lr=lr)
    print(f"finetune: {epochs} epochs of the whole network", flush=True)

    def train_batches(epoch, order):
        return view_batches(images, split[0], epoch + 1, order, config)

    def test_batches(order):
        return view_batches(images, split[1], 0, order, config)

    head = LinearHead(encoder.embed_dim, len(images.classes))
    whole = {"finetune": nn.Sequential(encoder.requires_grad_(True), head)}
    curves = fit(whole, train_batches, test_batches, labels, config, evaluations=20)
    settings = {"epochs": epochs, "batch_size": config.batch_size, "lr": config.lr, "copies": 0}
    return {"finetune": (settings, curves["finetune"])}

# ---- Reports -----------------------------------------------------------------------------------
def open_report(options, config):
    """The path of probe.json, and the list that it holds. Raises UserError."""
    name = f"runs/{Path(config.data).resolve().name}-{config.model.replace('/', '-')}-untrained"
    folder = Path(options.out or (Path(options.ckpt).parent if options.ckpt else name))
    path = folder / "probe.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = json.loads(path.read_text()) if path.exists() else []
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no longer JSON ({error}): move it away") from None
    if not isinstance(entries, list) or not os.access(folder, os.W_OK):
        raise UserError(f"{path}: not a list, or not to be written; choose another --out")
    return path, entries

def best_point(curve):
    """(epoch, accuracies) of the highest top-1, of equals the earliest."""
    return max(curve, key=lambda point: point[1]["top1"])

def table(results):
    """The results of `probe_frozen` and `finetune` as text, last epoch first."""
    lines = [f"{'':10} {'top-1':>6} {'95 % interval':>15} {'top-5':>6} {'per class':>9}   "
             "best epoch, picked on the test set"]
    for mode, (_, curve) in results.items():
        last, best = curve[-1][1], best_point(curve)
        low, high = last["interval"]
        text = "-" if best[0] is None else f"{best[1]['top1']:.1f} (epoch {best[0]})"
        lines.append(f"{mode:10} {last['top1']:6.1f} {f'{low:.1f} to {high:.1f}':>15} "
                     f"{last['top5']:6.1f} {last['per_class']:9.1f}   {text}")
    return "\n".join(lines)

def probe(encoder, options, config):
    """Measure what `options.mode` asks for; print the table and append it to probe.json."""
    images = scott.open_data(config)
    split = evaluation_split(images)
    if split is None:
        raise UserError(f"{config.data}: a probe needs labelled images of at least two classes")
    open_report(options, config)
    labels = [torch.tensor(np.array(images.labels)[rows], device=config.device) for rows in split]
    what = f"untrained, seed {config.seed}" if options.random_init else config.which
    print(f"{config.model} ({what}) on {config.data}, {config.img_size} px: {len(split[0]):,} "
          f"training and {len(split[1]):,} test images of {len(images.classes)} classes, "
          f"{config.device} {config.amp}", flush=True)
    if wrong := images.cache([*split[0], *split[1]], config.cache_gib):
        raise wrong[0]  # a result is of all images, or of none
    torch.manual_seed(config.seed)
    results, started = {}, time.time()
    if set(options.mode) - {"finetune"}:
        results |= probe_frozen(encoder, images, split, labels, options, config)
    if "finetune" in options.mode:
        results |= finetune(encoder, images, split, labels, options, config)
    print(table(results))
    counts = {"train": len(split[0]), "test": len(split[1]), "classes": len(images.classes)}
    shared = ("model", "data", "root", "img_size", "crop_scale", "views", "color_prob", "device",
              "amp")
    settings = {"ckpt": options.ckpt, "which": None if options.random_init else config.which}
    settings |= {name: getattr(config, name) for name in shared}
    path, entries = open_report(options, config)  # another probe may have written meanwhile
    for mode, (recipe, curve) in results.items():
        epoch, best = best_point(curve)
        entries.append({
            "mode": mode, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "results": curve[-1][1],
            "best_on_test": None if epoch is None else best | {"epoch": epoch},
            "settings": settings | recipe, "seed": config.seed, "counts": counts,
            "minutes": round((time.time() - started) / 60, 2), "torch": torch.__version__})
    scott.write_file(path, json.dumps(entries, indent=1) + "\n")
    print(f"{(time.time() - started) / 60:.1f} min; appended to {path}")

# ---- Pictures and features ---------------------------------------------------------------------
def output_path(wanted, ending):
    """Where to write: `wanted`, or with a number where that exists. Raises UserError."""
    stem = wanted.removesuffix(ending)
    names = (f"{stem}-{n}{ending}" if n > 1 else wanted for n in range(1, sys.maxsize))
    path = next(path for path in map(Path, names) if not path.exists())
    if path.suffix != ending or not path.parent.is_dir():
        raise UserError(f"{wanted}: must end in {ending}, in a folder that exists")
    return path

def principal_components(x, count):
    """The first `count` principal components of the rows of x: (n, D) -> (n, count)."""
    x = x - x.mean(0)
    return x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -count:].flip(1)

def token_colors(tokens):
    """Tokens (n, Gh, Gw, D) of all images -> colours (n, Gh, Gw, 3) in [0, 1] (Figures 1 and 3).
    The first component, signed so that borders are negative, tells the foreground; of the
    foreground, the first three components are red, green and blue; the background is black."""
    first = principal_components(tokens.flatten(0, 2), 1).view(tokens.shape[:3])
    border = torch.ones(tokens.shape[1:3], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    first = -first if first[:, border].mean() > 0 else first
    foreground = first >= 0
    colors = principal_components(tokens[foreground], 3)
    low, high = colors.quantile(0.02, 0), colors.quantile(0.98, 0)
    picture = torch.zeros(*tokens.shape[:3], 3)
    picture[foreground] = ((colors - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return picture

def draw_pca(encoder, options, config):
    """--pca: the images in rows of ten, below each its tokens in the colours of `token_colors`."""
    wanted, *paths = options.pca
    path = output_path(wanted, ".png")
    if paths:
        images = scott.ImageSet(paths, [-1] * len(paths), [""] * len(paths), [])
        indices = range(len(paths))
    else:
        images = scott.open_data(config)
        rows = np.random.default_rng(config.seed).permutation(len(images))
        labels = np.array(images.labels)
        indices = rows[labels[rows] == labels[rows[0]]][:10]
    crops_of, side = scott.Crops(images, config.img_size), config.img_size // 16
    crops = torch.stack([crops_of[int(i)] for i in indices])
    with torch.no_grad():
        tokens = torch.cat([encoder(scott.normalise(part.to(config.device))).cpu()
                            for part in crops.split(64)])
    colors = token_colors(tokens.unflatten(1, (side, side))).permute(0, 3, 1, 2)
    colors = F.interpolate(colors, scale_factor=16)
    rows = zip((crops / 255).split(10), colors.split(10))
    pictures = [picture for pair in rows for row in pair for picture in row]
    grid = utils.make_grid(pictures, nrow=min(10, len(crops)), padding=2, pad_value=1)
    scott.write_file(path, partial(utils.save_image, grid, format="png"))
    print(f"components of {len(crops)} images' tokens: {path}")

def export(encoder, options, config):
    """--export: features (N, D) float32, paths, labels (-1 = unknown) and classes, as .npz."""
    wanted, *folders = options.export
    path = output_path(wanted, ".npz")
    if len(folders) > 1:
        raise UserError(f"--export: one folder at most, not {len(folders)}")
    config = replace(config, data=folders[0] if folders else config.data,
                     batch_size=options.batch_size or 64)
    images = scott.open_data(config)
    tokens = FrozenTokens(encoder, images, range(len(images)), config, gib=0.0, pooled=True)
    features = tokens.vectors().cpu().numpy()
    arrays = {"features": features, "paths": np.array(images.paths, dtype=str),
              "labels": np.array(images.labels), "classes": np.array(images.classes, dtype=str)}
    scott.write_file(path, partial(np.savez, **arrays))
    scott.status(f"features {features.shape}, paths, labels and classes: {path}")

# ---- Speed: scott.py --benchmark ---------------------------------------------------------------
WINDOW = 3.0  # seconds

def calls_per_second(work, device, windows=5):
    """How often work() runs in a second: (median, lowest, highest) of some windows of time."""
    rates = []
    for window in range(windows + 1):  # the first, one call, warms up
        calls, started = 0, time.perf_counter()
        while calls == 0 or window and time.perf_counter() - started < WINDOW:
            work()
            calls += 1
        if device.type != "cpu":
            torch.accelerator.synchronize()
        rates.append(calls / (time.perf_counter() - started))
    return np.median(rates[1:]), min(rates[1:]), max(rates[1:])

def seconds_by_name(work, device, calls=2):
    """{name: seconds of one work()} of everything under `record_function`, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it need not tell that there is no GPU
    with torch.profiler.profile() as profile:
        for _ in range(calls):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    clock = "cpu_time_total" if device.type == "cpu" else "device_time_total"
    return {event.key: getattr(event, clock) / calls / 1e6 for event in profile.key_averages()}

def benchmark(config, objective=None):
    """Print how fast `train` is with this resolved config, and where its time goes; writes nothing.
    The bare step has random tensors; data ends with the views on the device. Last line: JSON."""
    device, bf16, batch = torch.device(config.device), config.amp == "bf16", config.batch_size
    images = scott.open_data(config)
    indices, rng = images.select(config.split), np.random.default_rng(config.seed)
    if len(indices) < batch:
        raise UserError(f"--batch-size {batch}: more than the {len(indices)} images")
    images.cache(range(len(images)), config.cache_gib)
    torch.manual_seed(config.seed)
    encoder = scott.encoder_of(asdict(config))
    objective = objective or scott.MIMJEPA(encoder, config.predictor_depth, config.hidden_targets)
    objective.to(device, memory_format=torch.channels_last)
    optimizer = scott.create_optimizer(objective, config.lr, config.beta2)
    compiled = torch.compile(objective) if config.compile else objective
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    mask = getattr(objective, "draw_mask", scott.MASKS.get(config.mask))
    crops_of = scott.Crops(images, config.img_size, config.crop_scale, mask, config.mask_ratio,
                           config.seed, config.flip_prob)
    keys = scott.epoch_batches(indices, batch, 0, 10**9, config.seed)
    loader = scott.make_loader(crops_of, config, objective, batch_sampler=keys)
    batches, collate = iter(loader), loader.collate_fn

    def to_views(crops, draws, *masks):
        crops, *masks = (x.to(device, non_blocking=True) for x in (crops, *masks))
        return *scott.make_views(crops, draws, config.views, config.color_prob, rng), *masks

    def step(view_a, view_b, *masks, model=compiled):
        with record_function("gradients"):
            scott.backward(model, (view_a, view_b, *masks), config.grad_accum_steps, autocast)
        with record_function("optimiser and EMA"):
            optimizer.step()
            optimizer.zero_grad()
            objective.update_teacher(0.996)

    def profiled():
        with record_function("data"):
            views = to_views(*collate([crops_of[key] for key in next(keys)]))
        step(*views, model=objective)

    view = torch.randn(batch, 3, config.img_size, config.img_size, device=device)
    view = view.contiguous(memory_format=torch.channels_last)
    masks, rates = to_views(*next(batches))[2:], {}
    for name, work in (("step", partial(step, view, view, *masks)),
                       ("data", lambda: to_views(*next(batches))),
                       ("train", lambda: step(*to_views(*next(batches))))):
        rates[name], low, high = (batch * x for x in calls_per_second(work, device))
        print(f"{name:6}{rates[name]:10.1f} images/s ({low:.1f} to {high:.1f})", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak

    side = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else None)
    product = 2 * side**3 * calls_per_second(lambda: matrix @ matrix, device)[0]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(view, view, *masks, model=objective)
    flops = counter.get_total_flops() / batch
    speed = rates["step"] * flops
    print(f"{flops / 1e9:.1f} GFLOP an image: {speed / 1e9:,.0f} GFLOP/s in the step, "
          f"{100 * speed / product:.0f} % of the {product / 1e9:,.0f} of a {config.amp} product of "
          f"matrices; memory at its peak: {peak / 1e9:.1f} GB")

    for part in (objective.student, objective.teacher):
        part.tokenizer.forward = record_function("tokenizer")(part.tokenizer.forward)
    for name in ("student", "teacher", "predictor"):
        part = getattr(objective, name)
        part.forward = record_function(name)(part.forward)
    crops_of.mask = record_function("masks")(crops_of.mask)
    seconds = seconds_by_name(profiled, device)
    forward = sum(seconds[name] for name in ("student", "teacher", "predictor"))
    seconds["backward"] = seconds["gradients"] - forward
    names = ("data", "masks", "student", "teacher", "tokenizer", "predictor", "backward",
             "optimiser and EMA")
    print("milliseconds a step, in one process: " + ", ".join(
        f"{name} {1e3 * seconds[name]:.0f}" for name in names)
        + " (masks are part of data, the tokenizer of student and teacher)")
    results = {f"{name}_images_per_s": rate for name, rate in rates.items()}
    results |= {"flops_per_s": speed, "matmul_flops_per_s": product}
    print(json.dumps(results | {"peak_memory_bytes": peak}))

def run(options):
    """Do what the command line says. Raises UserError."""
    scott.check_ranges(options)
    encoder, config = open_encoder(options)
    task = draw_pca if options.pca else export if options.export else probe
    task(encoder, options, config)

def main(argv=None):
    """The command line; returns the exit code."""
    return scott.main(argv, run, ProbeConfig)

if __name__ == "__main__":
    sys.exit(main())
