"""What are an encoder's features worth? Linear, attentive, k-NN and ridge probes for scott.py.

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
- k-NN and ridge have no epochs, rates or seeds: two encoders differ in nothing else there.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import utils

import scott
from scott import UserError

# ---- The command line --------------------------------------------------------------------------
Mode = Literal["linear", "attentive", "knn", "ridge", "finetune"]
DROPOUTS = "dropout", "attention_dropout", "drop_path"

@dataclass
class ProbeConfig:
    """Every flag, with its help beside it; None = as in the run that made the checkpoint, or by
    mode."""
    ckpt: str | None = None  # checkpoint of a run of scott.py
    random_init: str | None = None  # instead of it: an untrained model, as scott-12/16
    which: Literal["teacher", "student"] | None = None  # default: as the run says
    mode: tuple[Mode, ...] = ("linear", "attentive", "knn", "ridge")  # one or more of
    validate: bool = False  # test on val, so that the test images choose no setting
    data: str | None = None  # as in scott.py (default: the run's)
    root: str | None = None  # as in scott.py (default: the run's)
    img_size: int | None = None  # side of the input, pixels (default: the run's)
    crop_scale: float | None = None  # as in scott.py (default: the run's)
    value_range: tuple[float, ...] = ()  # as in scott.py (default: the run's)
    views: Literal["different", "same", "none"] | None = None  # colours (default: the run's)
    color_prob: float | None = None  # as in scott.py (default: the run's)
    flip_prob: float | None = None  # as in scott.py (default: the run's)
    epochs: int | None = None  # default: 100; 300 from scratch
    batch_size: int | None = None  # default: 64; of a whole network the run's
    lr: float | None = None  # peak (default: 5e-4; fine-tuning 1e-4)
    dropout: float | None = None  # as in scott.py, while fine-tuning (default: the run's)
    attention_dropout: float | None = None  # likewise
    drop_path: float | None = None  # likewise
    copies: int | None = None  # crops an image, encoded once; 0: new every epoch (CPU: 20, GPU: 0)
    cache_gib: float = 8.0  # memory for decoded images, and again for tokens, GiB
    seed: int = 0  # of heads, order and crops, and of --random-init
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    amp: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic
    workers: int | None = None  # loader processes (default: by device)
    out: str | None = None  # folder of probe.json (default: the checkpoint's)
    pca: tuple[str, ...] = ()  # OUT.png [IMAGE ...]: draw the tokens' components instead
    export: tuple[str, ...] = ()  # OUT.npz [FOLDER]: write mean-pooled features instead

def load_encoder(path, device="cpu", which=None, **changes):
    """The frozen `scott.ViT`, in eval mode, of a checkpoint; which: None = as its run says;
    changes: settings other than the run's, as dropout=0.1 for who trains it on. Raises UserError
    for other files, TypeError for what is no setting."""
    return encoder_in(scott.load_checkpoint(path), which, **changes).to(device)

def encoder_in(checkpoint, which=None, **changes):
    """`load_encoder` of a checkpoint that has been read."""
    config, weights = checkpoint["config"], checkpoint["objective"]
    if unknown := changes.keys() - config.keys():
        raise TypeError(f"load_encoder: no setting of a run: {', '.join(sorted(unknown))}")
    encoder, which = scott.encoder_of(config | changes), which or config["which"]
    if f"{which}.mask_token" not in weights:
        raise UserError(f"the checkpoint holds no {which}: of a fine-tuned network, one without a "
                        "teacher, or one that is not done; try --which student")
    encoder.load_state_dict({name: weights[f"{which}.{name}"] for name in encoder.state_dict()})
    return encoder.eval().requires_grad_(False)

def open_encoder(options):
    """(frozen encoder in eval mode, `scott.Config`): the run's settings, and what was given."""
    if bool(options.ckpt) == bool(options.random_init):
        raise UserError("give either --ckpt FILE or --random-init MODEL")
    names = {item.name for item in fields(scott.Config)}
    given = {name: value for name, value in asdict(options).items()
             if name in names and name not in ("out", "epochs", "lr") and value not in (None, ())}
    if options.random_init:
        preset = scott.Config.demo if given.get("data", "demo") == "demo" else {}
        config = scott.resolve(scott.Config(**preset | given | {"model": options.random_init}))
        torch.manual_seed(config.seed)
        encoder = scott.encoder_of(asdict(config)).eval().requires_grad_(False)
    else:
        checkpoint = scott.load_checkpoint(options.ckpt)
        of_run = {name: value for name, value in checkpoint["config"].items() if name in names}
        own = {"workers": None, "grad_accum_steps": 1}
        config = scott.resolve(scott.Config(**of_run | own | given))
        dropouts = {name: getattr(config, name) for name in DROPOUTS}
        encoder = encoder_in(checkpoint, config.which, **dropouts)
    return encoder.to(config.device, memory_format=torch.channels_last), config

def load_classifier(path, device="cpu"):
    """(network, classes) of a finetuned.pt: normalised images (B, 3, H, W) -> logits (B, classes),
    in eval mode, and the classes' names. Raises UserError."""
    checkpoint = scott.load_checkpoint(path)
    if "classes" not in checkpoint:
        raise UserError(f"{path}: an encoder alone; --mode finetune makes a finetuned.pt of it")
    encoder, weights = encoder_in(checkpoint), checkpoint["objective"]
    head = LinearHead(encoder.embed_dim, len(checkpoint["classes"]))
    head.load_state_dict({name: weights[f"head.{name}"] for name in head.state_dict()})
    return nn.Sequential(encoder, head).eval().to(device), checkpoint["classes"]

# ---- Inputs: images, and tokens that are computed once -----------------------------------------
def view_batches(images, indices, copy, order):
    """Yields (normalised images (B, 3, S, S), rows (B,)), both on the device, in the given order.
    indices: of the images; order: (n,) rows of `indices`; copy: 0 = centre crops, otherwise the
    number of a random crop, flip and colour treatment, as in pretraining."""
    config = images.config
    keys = [int(i) if copy == 0 else (copy, int(i)) for i in indices]
    batches = order.split(config.batch_size)
    loader = scott.make_loader(images, [[keys[row] for row in rows] for rows in batches])
    for rows, batch in zip(batches, loader):
        crops = batch if copy == 0 else batch[0]  # view a
        crops = crops.to(config.device, non_blocking=True)
        yield scott.normalise(crops), rows.to(config.device)

class FrozenTokens:
    """The tokens that a frozen encoder makes of some images' copies; float16 in memory, which is
    enough for what comes out of a LayerNorm. A copy is computed at its first use; those that do not
    fit into `gib` GiB, and those numbered `copies` or more, are computed again each time.
    pooled: keep one token an image, the mean."""
    def __init__(self, encoder, images, indices, copies=1, gib=8.0, pooled=False):
        self.encoder, self.images, self.indices = encoder, images, indices
        self.config = images.config
        count = 1 if pooled else (self.config.img_size // 16) ** 2
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
        keep, device = copy < self.kept, self.config.device
        store = torch.empty(self.shape if keep else 0, dtype=torch.float16, device=device)
        for views, rows in view_batches(self.images, self.indices, copy, order):
            with torch.no_grad(), scott.autocast(self.config):
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

def restore(path, owner, heads, optimizer):
    """Load what `fit` saved; returns how many epochs were done, and their curves. Raises UserError
    if it is of another owner."""
    state = scott.load_checkpoint(path)
    if state.get("owner") != owner:
        raise UserError(f"{path}: left by another fine-tuning, which its own command would end; "
                        "choose another --out, or remove it")
    heads.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"going on after epoch {state['epoch']}, by {path}", flush=True)
    return state["epoch"], state["curves"]

def fit(heads, train, test, labels, config, evaluations, kept=None):
    """Train all `heads` in one pass by cross-entropy, with the optimiser and schedules of
    pretraining (App. E.2); returns {head: [(epoch, accuracies)]}. Raises UserError.
    heads: {name: module}; train(epoch, order), test(order): generators of (inputs, rows), in that
    order of rows; labels: of the training and the test rows, on the device; config: epochs,
    warmup_epochs, batch_size, lr; evaluations: how often, at most, the test set is looked at;
    kept: (path, dict that says whose it is) of a file to save to each time, and to go on from."""
    started, first, curves = time.time(), 0, {name: [] for name in heads}
    heads = nn.ModuleDict(heads).to(config.device)
    optimizer = torch.optim.AdamW(scott.parameter_groups(heads.parameters()), fused=True)
    steps = math.ceil(len(labels[0]) / config.batch_size)
    total, warmup = config.epochs * steps, round(config.warmup_epochs * steps)
    if kept and kept[0].exists():
        first, curves = restore(*kept, heads, optimizer)
    for epoch in range(first, config.epochs):
        heads.train()
        torch.manual_seed(hash((config.seed, epoch)))  # of dropout
        order = np.random.default_rng([config.seed, epoch]).permutation(len(labels[0]))
        for step, (inputs, rows) in enumerate(train(epoch, torch.tensor(order)), epoch * steps):
            lr = scott.lr_schedule(step, total, warmup, peak=config.lr)
            decay = scott.linear(step, total, 0.04, 0.4)
            for group in optimizer.param_groups:
                group.update(lr=lr, weight_decay=decay * group["decayed"])
            with scott.autocast(config):
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
        with torch.no_grad(), scott.autocast(config):
            for inputs, _ in test(torch.arange(len(labels[1]))):
                for name, head in heads.items():
                    scores[name].append(head(inputs).float())
        for name in heads:
            curves[name].append((done, accuracies(torch.cat(scores[name]), labels[1])))
        text = ", ".join(f"{name} {curves[name][-1][1]['top1']:.1f} %" for name in heads)
        left = (time.time() - started) / (done - first) * (config.epochs - done) / 60
        if done * 10 // config.epochs > epoch * 10 // config.epochs:
            print(f"epoch {done} of {config.epochs}: {text}, {left:.1f} min left", flush=True)
        if kept:
            path, owner = kept
            state = {"format": scott.FORMAT, "config": {}, "owner": owner,
                     "epoch": done, "curves": curves, "objective": heads.state_dict(),
                     "optimizer": optimizer.state_dict()}
            scott.write_file(path, partial(torch.save, state))
    return curves

def ridge_scores(train, labels, test, classes):
    """Ridge regression of one-hot labels on standardised vectors: scores (n, classes) of `test`.
    The penalty is the one by which most training vectors, each left out in turn, are right; the
    least squared error would ask for far more of it where classes are many and vectors few."""
    train, labels, test = train.cpu().double(), labels.cpu(), test.cpu().double()
    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
    targets = F.one_hot(labels, classes).double()
    intercept = targets.mean(0)
    u, sigma, v = torch.linalg.svd((train - mean) / deviation, full_matrices=False)
    projected, solutions = u.T @ (targets - intercept), []
    for penalty in (10.0**power for power in range(-2, 7)):
        kept = (sigma**2 / (sigma**2 + penalty))[:, None]
        residual = targets - intercept - u @ (kept * projected)
        leverage = u**2 @ kept + 1 / len(train)
        left_out = targets - residual / (1 - leverage).clamp_min(1e-6)
        solutions.append(((left_out.argmax(1) == labels).sum().item(), penalty))
    weights = v.T @ ((sigma / (sigma**2 + max(solutions)[1]))[:, None] * projected)
    return (test - mean) / deviation @ weights + intercept

def probe_frozen(encoder, images, split, labels, options, config):
    """All but fine-tuning, as options.mode says: {mode: (settings, curve)} as of `fit`."""
    epochs, modes = options.epochs or 100, options.mode
    config = replace(config, epochs=epochs, warmup_epochs=min(20, epochs / 5),
                     batch_size=options.batch_size or 64, lr=options.lr or 5e-4)
    images.config = config
    copies = options.copies
    if copies is None:
        copies = 20 if config.device == "cpu" else 0
    pooled, gib = "attentive" not in modes, options.cache_gib
    test = FrozenTokens(encoder, images, split[1], 1, gib, pooled)
    gib = max(0, gib - test.gib)
    train = FrozenTokens(encoder, images, split[0], max(1, copies), gib, pooled)

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
    if {"knn", "ridge"} & {*modes}:
        vectors = train.vectors(), test.vectors()
    if "knn" in modes:
        scores = scott.knn_scores(vectors[0], labels[0], vectors[1], classes)
        results["knn"] = {"k": 20, "temperature": 0.07}, [(None, accuracies(scores, labels[1]))]
    if "ridge" in modes:
        scores = ridge_scores(vectors[0], labels[0], vectors[1], classes)
        results["ridge"] = {}, [(None, accuracies(scores, labels[1]))]
    return results

def finetune(encoder, images, split, labels, options, config, path):
    """The whole network with a linear head; from scratch with pretraining's recipe (Table 6).
    path: of the file by which the same command goes on if it was stopped.
    Returns ({"finetune": (settings, curve)}, network), a dict of `student` and `head`."""
    epochs = options.epochs or (300 if options.random_init else 100)
    warmup = min(40, epochs * 40 / 300) if options.random_init else min(20, epochs / 5)
    lr = options.lr or (5e-4 if options.random_init else 1e-4)
    config = replace(config, epochs=epochs, warmup_epochs=warmup, lr=lr)
    images.config = config
    print(f"finetune: {epochs} epochs of the whole network", flush=True)

    def train_batches(epoch, order):
        return view_batches(images, split[0], epoch + 1, order)

    def test_batches(order):
        return view_batches(images, split[1], 0, order)

    network = nn.ModuleDict({"student": encoder.requires_grad_(True),
                             "head": LinearHead(encoder.embed_dim, len(images.classes))})
    whole = {"finetune": nn.Sequential(network["student"], network["head"])}
    free = "out", *scott.FREE
    asked = {name: value for name, value in asdict(options).items() if name not in free}
    counts = [len(rows) for rows in split]
    owner = asked | {"which": config.which, "epochs": epochs, "images": counts}
    curves = fit(whole, train_batches, test_batches, labels, config, 20, (path, owner))
    recorded = ("epochs", "batch_size", "lr", *DROPOUTS)
    settings = {name: getattr(config, name) for name in recorded} | {"copies": 0}
    return {"finetune": (settings, curves["finetune"])}, network

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
    unused = "test" if options.validate else None
    images.keep((images.labels >= 0) & (images.splits != unused))  # need not even be readable
    split = scott.evaluation_split(images)
    if split is None:
        raise UserError(f"{config.data}: a probe needs labelled images of at least two classes")
    unfinished = open_report(options, config)[0].with_name("finetuning.pt")
    labels = [torch.tensor(images.labels[rows], device=config.device) for rows in split]
    what = f"untrained, seed {config.seed}" if options.random_init else config.which
    print(f"{config.model} ({what}) on {config.data}, {config.img_size} px: {len(split[0]):,} "
          f"training and {len(split[1]):,} test images of {len(images.classes)} classes, "
          f"{config.device} {config.amp}", flush=True)
    if wrong := images.read(config.cache_gib):
        raise UserError(f"{wrong} of the labelled images cannot be read, see above: mend or remove "
                        "them; a result is of all images, or of none")
    torch.manual_seed(config.seed)
    results, started = {}, time.time()
    one_view = replace(config, views="none" if config.views == "none" else "same")  # b is not used
    if set(options.mode) - {"finetune"}:
        results |= probe_frozen(encoder, images, split, labels, options, one_view)
    if "finetune" in options.mode:
        finetuned, network = finetune(encoder, images, split, labels, options, one_view, unfinished)
        results |= finetuned
    print(table(results))
    counts = {"train": len(split[0]), "test": len(split[1]), "classes": len(images.classes)}
    shared = ("model", "data", "root", "img_size", "crop_scale", "views", "color_prob", "device",
              "amp")
    settings = {"ckpt": options.ckpt, "which": None if options.random_init else config.which,
                "validate": options.validate}
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
    if "finetune" in options.mode:  # after the report, which a full disk must not cost
        path = output_path(f"{path.parent}/finetuned.pt", ".pt")
        state = {"format": scott.FORMAT, "config": asdict(config) | {"which": "student"},
                 "images": len(images.paths), "classes": images.classes,
                 "objective": network.state_dict()}
        scott.write_file(path, partial(torch.save, state))
        unfinished.unlink()
        print(f"the network: {path}")

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
        images = scott.ImageSet(config, paths, [-1] * len(paths), [""] * len(paths), [])
        indices = range(len(paths))
    else:
        images = scott.open_data(config)
        rows = np.random.default_rng(config.seed).permutation(len(images.paths))
        indices = rows[images.labels[rows] == images.labels[rows[0]]][:10]
    crops, side = torch.stack([images[int(i)] for i in indices]), config.img_size // 16
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
    images.read(config.cache_gib)
    features = scott.encode(encoder, images, range(len(images.paths))).numpy()
    arrays = {"features": features, "paths": images.paths.astype(str), "labels": images.labels,
              "classes": np.array(images.classes, dtype=str)}
    scott.write_file(path, partial(np.savez, **arrays))
    print(f"features {features.shape}, paths, labels and classes: {path}")

# ---- Command line ------------------------------------------------------------------------------
def run(options):
    """Do what the command line says. Raises UserError."""
    scott.check_ranges(options)
    if 0 in (options.epochs, options.lr):
        raise UserError("--epochs and --lr of a probe: above 0")
    encoder, config = open_encoder(options)
    task = draw_pca if options.pca else export if options.export else probe
    task(encoder, options, config)

def main(argv=None):
    """The command line; returns the exit code."""
    return scott.main(argv, run, ProbeConfig)

if __name__ == "__main__":
    sys.exit(main())
