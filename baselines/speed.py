"""How fast is a training step, and where does its time go? About a minute; writes nothing.

    python -m baselines.speed                                # the demo; and any flag of scott.py
    python -m baselines.speed --data flowers102 --root data --model scott-3/16 --img-size 96
    python -m baselines.speed --plain ...                    # beside a plain step, in turn
    python -m baselines.speed --method capi ...              # of another method

It runs the set-up and the step of `scott.train`, not copies of them. The bare step gets random
tensors; data ends with the views on the device. The last line is JSON, for scripts.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser
from dataclasses import asdict, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import scott
from baselines import bootleg, capi, ijepa

METHODS = {
    "mimjepa": (scott.Config, None),
    "ijepa": (ijepa.Config, ijepa.IJEPA),
    "capi": (capi.Config, capi.CAPI),
    "bootleg": (bootleg.Config, bootleg.Bootleg),
}
WINDOWS, SECONDS = 5, 3.0  # how often, and how long, something is measured

# ---- A plain step: dense layers, torch's defaults, fp32 ----------------------------------------
class PlainTokenizer(scott.SparseConvTokenizer):
    """The tokenizer as one would write it first: masks by multiplication, the blur as a depthwise
    convolution, nothing renormalised."""
    def forward(self, images, mask=None):
        x = images
        for conv in (self.conv1, self.conv2):
            x = F.relu(self.keep(F.conv2d(self.keep(x, mask), conv.weight, None, 2, 3), mask))
            x = F.max_pool2d(x, 2, 1)
            kernel = x.new_tensor([1.0, 2.0, 1.0]) / 4
            kernel = torch.outer(kernel, kernel).expand(x.shape[1], 1, 3, 3)
            x = self.keep(F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1]), mask)
        return x.flatten(2).transpose(1, 2)

    def keep(self, x, mask):
        """x (B, C, H, W) with zeros where mask (B, N) hides."""
        if mask is None:
            return x
        side = int(mask.shape[1] ** 0.5)
        return x * ~scott.enlarge(mask.view(-1, 1, side, side), x)

def plain_step(config):
    """A function that trains the same network on random images, without dropout; returns it."""
    config = replace(config, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
    objective = scott.MIMJEPA(scott.encoder_of(asdict(config)), config.predictor_depth)
    for module in [*objective.modules()]:
        if isinstance(module, scott.SparseConvTokenizer):
            module.__class__ = PlainTokenizer
    objective.to(config.device)
    optimizer = torch.optim.AdamW(p for p in objective.parameters() if p.requires_grad)
    images = torch.randn(config.batch_size, 3, config.img_size, config.img_size)
    images = images.to(config.device)
    grid = scott.grid_of(images)
    masks = [scott.random_mask(grid, config.mask_ratio).flatten() for _ in images]
    masks = torch.stack(masks).to(config.device)

    def step():
        objective(images, images, masks).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            pairs = zip(objective.teacher.parameters(), objective.student.parameters())
            for teacher, student in pairs:
                teacher.mul_(0.996).add_(student, alpha=0.004)

    return step

# ---- Measuring ---------------------------------------------------------------------------------
def calls_per_second(work, seconds=SECONDS):
    """How often work() runs in a second, in one window of time."""
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        work()
        calls += 1
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return calls / (time.perf_counter() - started)

def rates(*works):
    """Calls a second of each work, in turn, over WINDOWS windows, after a call to warm up."""
    for work in works:
        calls_per_second(work, 0)
    return [[calls_per_second(work) for work in works] for _ in range(WINDOWS)]

def seconds_by_name(work, device, calls=2):
    """{name: seconds of one work()} of everything under `record_function`, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it need not tell that there is no GPU
    with torch.profiler.profile() as profile:
        for _ in range(calls):
            work()
        if device != "cpu":
            torch.accelerator.synchronize()
    clock = "cpu_time_total" if device == "cpu" else "device_time_total"
    return {event.key: getattr(event, clock) / calls / 1e6 for event in profile.key_averages()}

def peak_memory(device):
    """Bytes: of the GPU, otherwise of this process; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def matrix_flops(config):
    """FLOP/s of a product of large matrices, the machine's practical limit."""
    side = 2048 if config.device == "cpu" else 8192
    dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32
    matrix = torch.randn(side, side, device=config.device, dtype=dtype)
    return 2 * side**3 * median(rate for rate, in rates(lambda: matrix @ matrix))

def where_time_goes(run, step):
    """{part: seconds a step}, the data prepared in this process."""
    config, objective = run.config, run.objective
    for part in (objective.student, objective.teacher):
        part.tokenizer.forward = record_function("tokenizer")(part.tokenizer.forward)
    for name in ("student", "teacher", "predictor"):
        part = getattr(objective, name)
        part.forward = record_function(name)(part.forward)
    mask = scott.MASKS.get(config.mask, scott.random_mask)
    scott.MASKS[config.mask] = record_function("masks")(mask)
    run.update_student = record_function("gradients and AdamW")(run.update_student)
    run.optimizer.step = record_function("AdamW")(run.optimizer.step)
    keys = iter(run.batches().batch_sampler)

    def work():
        with record_function("data"):
            views = run.views(0, *default_collate([run.images[key] for key in next(keys)]))
        step(views)

    seconds = seconds_by_name(work, config.device)
    models = ("student", "teacher", "predictor")
    if seconds.keys() >= {*models}:  # some methods call the blocks of a model, and not the whole
        forward = sum(seconds[name] for name in models)
        seconds["backward"] = seconds["gradients and AdamW"] - seconds["AdamW"] - forward
    names = ("data", "masks", *models, "tokenizer", "backward", "AdamW")
    return {name: seconds[name] for name in names if name in seconds}

def measure(config, method=None, plain=False):
    """Print how fast `scott.train` is with this config; the last line is JSON."""
    config = scott.resolve(config)
    config = replace(config, epochs=10**6, warmup_epochs=0.0)  # batches without an end
    run = scott.Run(config, method)
    lr, decay, momentum = config.schedule(0, run.total, 0)
    batches = iter(run.batches())
    view = torch.randn(config.batch_size, 3, config.img_size, config.img_size, device=config.device)
    view = view.contiguous(memory_format=torch.channels_last)

    def data():
        return run.views(0, *next(batches))

    def step(views):
        run.update_student(0, views, lr, decay)
        run.objective.update_teacher(momentum)

    def train():
        step(data())

    views = (view, view, *data()[2:])
    results = {}
    for name, work in (("step", partial(step, views)), ("data", data), ("train", train)):
        speeds = [config.batch_size * rate for rate, in rates(work)]
        results[f"{name}_images_per_s"] = median(speeds)
        print(f"{name:6}{median(speeds):10.1f} images/s ({min(speeds):.1f} to {max(speeds):.1f})",
              flush=True)
    peak = peak_memory(config.device)
    if plain:
        pairs = rates(partial(step, views), plain_step(config))
        ratios = [ours / other for ours, other in pairs]
        speed = config.batch_size * median(other for _, other in pairs)
        print(f"plain {speed:10.1f} images/s; ours is {median(ratios):.2f} times as fast "
              f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
        results |= {"plain_images_per_s": speed, "ratio_to_plain": median(ratios)}

    product = matrix_flops(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(views)
    flops = counter.get_total_flops() / config.batch_size
    speed = results["step_images_per_s"] * flops
    memory = "" if peak is None else f"; memory at its peak: {peak / 1e9:.1f} GB"
    print(f"{flops / 1e9:.1f} GFLOP an image: {speed / 1e9:,.0f} GFLOP/s in the step, "
          f"{100 * speed / product:.0f} % of the {product / 1e9:,.0f} of a {config.amp} product of "
          f"matrices{memory}")
    parts = [f"{name} {1e3 * time:.0f}" for name, time in where_time_goes(run, step).items()]
    print(f"milliseconds a step, in one process: {', '.join(parts)} (masks are part of data, the "
          "tokenizer of student and teacher)")
    results |= {"flops_per_s": speed, "matmul_flops_per_s": product, "peak_memory_bytes": peak}
    print(json.dumps(results))

def main(argv=None):
    """The command line; returns the exit code."""
    parser = ArgumentParser(prog="python -m baselines.speed", add_help=False)
    parser.add_argument("--method", choices=METHODS, default="mimjepa")
    parser.add_argument("--plain", action="store_true")
    own, others = parser.parse_known_args(argv)
    cls, objective = METHODS[own.method]

    def run(config):
        if objective is None:
            return measure(config, plain=own.plain)
        return measure(config.settled(), objective, own.plain)

    return scott.main(others, run, cls)

if __name__ == "__main__":
    sys.exit(main())
