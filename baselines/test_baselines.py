"""Tests of baselines/: behaviour that someone relies on. `pytest -q baselines` takes seconds."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import baselines
import probe
import scott
from baselines import bootleg, capi, ijepa, speed

METHODS = {
    "ijepa": (ijepa, ijepa.IJEPA),
    "capi": (capi, capi.CAPI),
    "bootleg": (bootleg, bootleg.Bootleg),
}
TOKENIZERS = {"scott": scott.SparseConvTokenizer, "vit": scott.PatchEmbed}
TINY = ["--data", "loose", "--model", "scott-tiny/16", "--img-size", "64", "--batch-size", "8",
        "--epochs", "3", "--predictor-depth", "2", "--dropout", "0.1", "--save-minutes", "0",
        "--workers", "0", "--device", "cpu", "--amp", "fp32"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small encoder as scott-tiny/16; Bootleg's predictor, half as wide, has 16 heads."""
    monkeypatch.setitem(scott.SIZES, "tiny", (96, 2, 2))
    torch.manual_seed(0)


def save_images(folder, count, size=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{i}.png")


def make_baseline(name, tokenizer="vit", size=96, count=4, **options):
    """(method with an encoder of 3 blocks, its arguments: two views, then the masks)."""
    module, objective = METHODS[name]
    config = module.Config(img_size=size, batch_size=count, device="cpu", amp="fp32", **options)
    config = config.settled()
    encoder = scott.ViT(TOKENIZERS[tokenizer](96), 96, 3, 6, registers=config.registers)
    method = objective(encoder, config)
    views = torch.rand(2, count, 3, size, size)
    generator = torch.Generator().manual_seed(0)
    masks = method.draw_masks(count, scott.grid_of(views), generator)
    return method, [*views, *masks]


# ---- Masks -------------------------------------------------------------------------------------


def rectangle(patches, width):
    """(height, width) of the block that the sorted indices are; None if they are no block."""
    rows, columns = patches // width, patches % width
    h, w = (int(x.max() - x.min()) + 1 for x in (rows, columns))
    return (h, w) if h * w == len(set(patches.tolist())) else None


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
    batches = multi_block_batches(ijepa.multi_block, 60)
    for side, (visible, targets) in zip(sides, batches, strict=True):
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
    generator = torch.Generator().manual_seed(1)
    *_, order, _, _ = bootleg.alternating_blocks(1, (14, 14), generator)
    patches = torch.arange(196)
    kept = order(patches // 14, patches % 14).tolist()
    assert sorted(kept) == patches.tolist()
    assert kept[0] in (0, 13, 182, 195)  # what is dropped first lies in the corner across


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


@pytest.mark.parametrize("name", METHODS)
def test_the_masks_of_a_batch_are_the_same_for_two_processes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose", 8)
    module, objective = METHODS[name]
    config = scott.parse_config([*TINY, "--warmup-epochs", "0"], module.Config)
    run = scott.Run(scott.resolve(config.settled()), objective)
    views = next(iter(run.batches()))[:2]
    masks = run.views(3, *views)[2:]
    assert masks[0].shape == (8, 16) and masks[0].dtype == torch.bool
    assert all(torch.equal(*pair) for pair in zip(masks, run.views(3, *views)[2:]))
    assert not torch.equal(masks[0], run.views(4, *views)[2])
    monkeypatch.setattr(scott, "PROCESSES", 2)
    for rank in (0, 1):
        monkeypatch.setattr(scott, "RANK", rank)
        mine = run.views(3, *(view[rank::2] for view in views))[2:]
        for part, whole in zip(mine, masks, strict=True):
            assert torch.equal(part, whole[rank::2])


# ---- What a method sees, learns and predicts ---------------------------------------------------


def randomise(views, hidden):
    """The views with other pixels where `hidden` (B, N)."""
    mask = hidden.view(-1, 1, *scott.grid_of(views))
    return torch.where(scott.enlarge(mask, views), torch.rand(()), views)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_the_student_does_not_see_hidden_pixels_and_the_teacher_does(name, tokenizer):
    method, (view_a, view_b, hidden, *masks) = make_baseline(name, tokenizer, drop_path=0.0)
    wanted = {"ijepa": 0.2, "bootleg": 0.2, "capi": 0.35}[name]
    assert (~hidden).float().mean() > wanted - 0.15

    def loss(a, b):
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
    encoder, image = scott.create_encoder("scott-tiny/16"), torch.rand(1, 3, 96, 96)
    tokens = baselines.encode_visible(encoder, image, mask, visible)
    assert tokens.shape == (1, 12, 96)
    other = baselines.encode_visible(encoder, randomise(image, mask), mask, visible)
    assert torch.equal(tokens, other)


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_has_no_gradient_and_everything_else_has(name):
    method, batch = make_baseline(name)
    method.train()
    method(*batch).backward()
    assert not method.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    trained = {n: p for n, p in method.named_parameters() if not n.startswith("teacher.")}
    without = {n for n, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0}
    assert without == {"student.mask_token"}


@pytest.mark.parametrize("name", ["ijepa", "bootleg"])
def test_target_blocks_are_predicted_each_on_its_own(name):
    method, (view, _, hidden, visible, targets) = make_baseline(name)
    layers, registers = {"ijepa": (1, 0), "bootleg": (3, 5)}[name]
    context = baselines.encode_visible(method.student, view, hidden, visible)
    assert context.shape == (4, registers + visible.shape[1], 96)

    def predict(targets):
        return method.predictor(context, visible, targets, (6, 6))

    whole = predict(targets)
    assert whole.shape == (*targets.shape, 96 * layers)
    assert not torch.allclose(whole[..., 0, :], whole[..., 1, :], atol=1e-3)
    assert torch.allclose(predict(targets[:, :1]), whole[:, :1], atol=1e-5)
    others = torch.cat([targets[:, :1], targets[:, 1:].roll(1, 0)], 1)
    assert torch.allclose(predict(others)[:, 0], whole[:, 0], atol=1e-5)
    assert torch.allclose(predict(targets.flip(-1)), whole.flip(-2), atol=1e-5)


def test_bootlegs_predictor_gets_the_class_token_and_no_registers():
    method, (view, _, hidden, visible, targets) = make_baseline("bootleg")
    context = baselines.encode_visible(method.student, view, hidden, visible)
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
    assert bootleg.hidden_layers(12) == [1, 4, 8, 12]
    assert bootleg.hidden_layers(3) == [1, 2, 3] and bootleg.hidden_layers(1) == [1]
    method, (_, view, *_) = make_baseline("bootleg")
    outputs = []
    for block in method.teacher.blocks:
        block.register_forward_hook(lambda m, a, out: outputs.append(out[:, 5:]))
    target = method.target(view)
    assert target.shape == (4, 36, 3 * 96)
    for part, output in zip(target.chunk(3, -1), outputs, strict=True):
        assert torch.allclose(part, F.layer_norm(3 * output + 2, (96,)), atol=1e-3)
    assert method.loss(torch.zeros_like(target), target).item() == pytest.approx(1, abs=1e-2)
    assert torch.equal(target[..., -96:], method.teacher(view))


def test_bootleg_without_hidden_targets_predicts_the_output():
    method, batch = make_baseline("bootleg", hidden_targets=False)
    assert torch.equal(method.target(batch[1]), method.teacher(batch[1]))
    assert method(*batch).isfinite()
    assert any("[3] of 3" in text for text in method.departures())


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
        method(*batch).backward()
        return method.prototypes.weight.grad.clone(), method.predictor.head.weight.grad.clone()

    prototypes, head = gradients()
    losses = []
    monkeypatch.setattr(capi, "cross_entropy", lambda t, x: losses.append((t, x)) or x.sum() * 0)
    method(*batch)
    monkeypatch.undo()
    (targets, logits), (_, predicted) = losses
    assert not targets.requires_grad and predicted.shape == (4, 7, 16)
    clustering = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    alone, = torch.autograd.grad(clustering, method.prototypes.weight)
    assert torch.allclose(alone, prototypes, atol=1e-6)
    method.predictor.head.weight.data = torch.randn_like(method.predictor.head.weight)
    other_prototypes, other_head = gradients()
    assert torch.equal(other_prototypes, prototypes) and not torch.equal(other_head, head)


def test_capi_predicts_hidden_positions_each_on_its_own():
    method, (view, _, mask, wanted) = make_baseline("capi", drop_path=0.0)
    asked = []
    method.predictor.register_forward_hook(lambda m, args, out: asked.append((args, out)))
    method(view, view, mask, wanted)
    (context, visible, _, grid), whole = asked[0]
    assert context.shape == (4, 16 + 13, 96) and wanted.shape == (4, 7)
    assert mask.gather(1, wanted).all() and all(len(set(row.tolist())) == 7 for row in wanted)
    alone = method.predictor(context, visible, wanted[:, 3:4], grid)
    assert torch.allclose(alone, whole[:, 3:4], atol=1e-5)

def test_capis_keys_know_where_their_tokens_are():
    """A token elsewhere is another key; the registers have no place."""
    method, (_, _, mask, wanted) = make_baseline("capi", drop_path=0.0)
    for block in method.predictor.blocks:  # attention that is not almost uniform
        block.attention.q.weight.data *= 20
        block.attention.k.weight.data *= 20
    context, visible = torch.randn(4, 16 + 13, 96), (~mask).nonzero()[:, 1].view(4, 13)
    before = method.predictor(context, visible, wanted, (6, 6))
    moved = method.predictor(context, visible.roll(1, 1), wanted, (6, 6))
    assert not torch.allclose(moved, before, atol=1e-4)
    both = torch.cat([context[:, :16], context[:, 16:].roll(1, 1)], 1)
    together = method.predictor(both, visible.roll(1, 1), wanted, (6, 6))
    assert torch.allclose(together, before, atol=1e-5)  # the order says nothing
    registers = torch.cat([context[:, :16].roll(1, 1), context[:, 16:]], 1)
    assert torch.allclose(method.predictor(registers, visible, wanted, (6, 6)), before, atol=1e-5)

def test_capis_head_fits_soft_targets():
    """Rows as long as those of a standard normal cannot turn: they end 0.8 above the entropy."""
    x = F.normalize(torch.randn(512, 48), dim=-1)
    targets = (x @ F.normalize(torch.randn(64, 48), dim=-1).T / 0.12).softmax(-1)
    entropy = capi.cross_entropy(targets, targets.log()).item()
    head = capi.CosineHead(48, 64)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
    for _ in range(300):
        loss = capi.cross_entropy(targets, head(x) / 0.12)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < entropy + 0.1
    assert (head.scale != 1).all()

def test_capis_drop_path_is_constant_and_the_same_in_both_parts():
    method, _ = make_baseline("capi")
    blocks = [*method.student.blocks, *method.predictor.blocks]
    assert {block.drop_path for block in blocks} == {0.2}
    method.train()
    block, x = method.predictor.blocks[0], torch.randn(64, 2, 96)
    context = torch.randn(64, 5, 96)
    changed = (block(x, context, 0 * context) != x).flatten(1).any(1)
    assert 0 < (~changed).sum() < 12  # both halves dropped: 0.04 of the images


@pytest.mark.parametrize("name", ["ijepa", "bootleg"])
def test_a_step_in_parts_is_the_same_step(name):
    gradients, losses = [], []
    for parts in (1, 2):
        torch.manual_seed(0)
        method, batch = make_baseline(name, grad_accum_steps=parts)
        losses.append(scott.backward(method, batch, method.config))
        trained = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        gradients.append(trained)
    assert torch.allclose(*losses)
    assert len(gradients[0]) > 20
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, rtol=1e-3, atol=1e-6), key


# ---- Settings ----------------------------------------------------------------------------------


def test_capis_schedule_groups_and_depth():
    config = capi.Config(epochs=100).settled()
    total, warmup = 1000, 100
    values = [config.schedule(step, total, warmup) for step in range(total)]
    assert values[0] == (0, 0.1, 1) and values[warmup][0] == config.lr
    assert values[-1][0] / config.lr == pytest.approx(0.0955, abs=1e-4)
    assert all(momentum == pytest.approx(1 - lr, abs=1e-12) for lr, _, momentum in values)
    faster = capi.Config(epochs=100, ema_start=0.996).settled()  # Table 8
    assert faster.schedule(warmup, total, warmup)[2] == pytest.approx(0.996)
    assert faster.schedule(0, total, warmup)[2] == 1
    for batch, clusters in ((32, 128), (64, 256), (128, 512), (8192, 16384)):
        assert capi.Config(batch_size=batch).settled().prototypes == clusters
    for recipe, scale in (("paper", 0.2), ("controlled", 1)):
        method, _ = make_baseline("capi", "scott", recipe=recipe)
        groups = [(p, group) for group in method.parameter_groups() for p in group["params"]]
        scales = {p: group["lr_scale"] for p, group in groups}
        assert scales.keys() == {p for p in method.parameters() if p.requires_grad}
        assert len(scales) == len(groups)  # each weight once
        for weight, group in groups:  # of the clustering a tenth: 0.01 of 0.1
            clustering = 0.1 if weight is method.prototypes.weight else 1
            assert group["decayed"] == clustering * (weight.ndim > 1)
        assert scales[method.prototypes.weight] == 0.5
        assert {scales[p] for p in method.student.tokenizer.parameters()} == {scale}
        assert scales[method.predictor.head.weight] == 1
        assert len(method.predictor.blocks) == 2  # half of three, but at least two


def test_a_recipe_decides_what_no_flag_does():
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
        assert config.model == "vit-12/16"
    assert parse([*flags, "--lr", "0.01", "--views", "same"]).settled().lr == 0.01

@pytest.mark.parametrize("name, start, end", [("ijepa", 5, 1000), ("bootleg", 30, 30)])
def test_a_given_peak_moves_the_whole_schedule(name, start, end):
    parse = partial(scott.parse_config, cls=METHODS[name][0].Config)
    config = parse(["--data", "flowers102", "--lr", "0.02"]).settled()
    assert config.lr_start == pytest.approx(0.02 / start)
    assert config.lr_end == pytest.approx(0.02 / end)
    config = parse(["--data", "flowers102", "--lr", "0.02", "--lr-end", "0.001"]).settled()
    assert config.lr_end == 0.001

def test_a_recipe_wins_over_the_demo():
    for name, (module, _) in METHODS.items():
        demo, paper = (scott.parse_config(flags, module.Config).settled()
                       for flags in ([], ["--data", "flowers102", "--batch-size", "32"]))
        for field in ("crop_scale", "drop_path", "dropout", "predictor_depth", "views", "lr"):
            assert getattr(demo, field) == getattr(paper, field), (name, field)
        assert (demo.model, demo.img_size, demo.which) == ("scott-tiny/16", 64, "student")
        controlled = scott.parse_config(["--recipe", "controlled"], module.Config).settled()
        plain = scott.parse_config([])  # python scott.py
        for field in ("crop_scale", "drop_path", "dropout", "views", "lr", "epochs"):
            assert getattr(controlled, field) == getattr(plain, field), (name, field)

@pytest.mark.parametrize("depth, half, five_sixths", [(12, 6, 10), (3, 2, 3), (7, 4, 6)])
def test_a_predictors_depth_follows_the_encoders(depth, half, five_sixths):
    encoder = scott.ViT(scott.PatchEmbed(96), 96, depth, 6, registers=5)
    for name, expected in (("ijepa", half), ("bootleg", five_sixths)):
        module, objective = METHODS[name]
        config = module.Config(img_size=96).settled()
        assert len(objective(encoder, config).predictor.blocks) == expected
        config = module.Config(img_size=96, predictor_depth=1).settled()
        assert len(objective(encoder, config).predictor.blocks) == 1

@pytest.mark.parametrize("epochs, warmup", [(600, 105), (300, 69), (100, 23)])
def test_bootlegs_warmup_is_its_papers_and_fits_into_short_runs(epochs, warmup):
    assert bootleg.Config(epochs=epochs).settled().warmup_epochs == pytest.approx(warmup)

@pytest.mark.parametrize("name, draw", [("ijepa", ijepa.multi_block),
                                        ("bootleg", bootleg.alternating_blocks)])
def test_blocks_have_the_papers_share_of_the_image_or_the_run_says_so(name, draw):
    for grid, patches, says in ((6, {6}, False), (14, None, False), (4, None, True)):
        generator, (low, high) = torch.Generator().manual_seed(0), METHODS[name][1].shares
        sizes = {draw(2, (grid, grid), generator)[1].shape[-1] for _ in range(60)}
        assert patches is None or sizes == patches
        assert says or all(low <= size / grid**2 <= high for size in sizes)
        method, _ = make_baseline(name, size=16 * grid)
        assert any("target blocks of" in text for text in method.departures()) == says


@pytest.mark.parametrize("name, flags, says", [
    ("capi", ["--grad-accum-steps", "2"], "--grad-accum-steps"),
    ("capi", ["--ema-end", "0.9"], "--ema-end 0.9"),
    ("ijepa", ["--mask-ratio", "0.4"], "--mask-ratio 0.4"),
    ("bootleg", ["--mask-ratio", "0.4"], "--mask-ratio 0.4"),
    ("ijepa", ["--drop-path", "2"], "--drop-path 2.0: not from 0 to 1"),
    ("bootleg", ["--registers", "0"], "--registers 0: not from 1"),
])
def test_mistakes_are_one_line(name, flags, says, capsys):
    assert METHODS[name][0].main(flags) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1


@pytest.mark.parametrize("flags", [["--mask", "random"], ["--hidden-targets"]])
def test_flags_of_another_method_are_unknown(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        ijepa.main(flags)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- Runs --------------------------------------------------------------------------------------


def assert_equal(a, b):
    """Bit for bit, whatever is nested in dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, (dict, list)):
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_stops_resumes_and_is_probed(name, tmp_path, monkeypatch, capsys):
    module, objective = METHODS[name]
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "loose" / "a", 17)
    save_images(tmp_path / "loose" / "b", 8)
    assert module.main(TINY) == 0
    path = f"runs/loose-{name}-scott-tiny-16/last.pt"
    assert "other than in its paper" in capsys.readouterr().out
    update, calls = objective.update_teacher, []

    def update_and_signal(self, momentum):
        update(self, momentum)
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(objective, "update_teacher", update_and_signal)
    with pytest.raises(SystemExit):
        module.main([*TINY, "--out", "cut"])
    monkeypatch.setattr(objective, "update_teacher", update)
    assert scott.load_checkpoint("cut/last.pt")["step"] == 4
    capsys.readouterr()
    assert scott.main(["--resume", "cut/last.pt"]) == 2
    printed = capsys.readouterr().err
    assert "another method" in printed and printed.count("\n") == 1
    assert module.main(["--resume", "cut/last.pt"]) == 0
    whole, again = scott.load_checkpoint(path), scott.load_checkpoint("cut/last.pt")
    for part in ("objective", "optimizer", "step"):
        assert_equal(again[part], whole[part])
    groups = whole["optimizer"]["param_groups"]
    rates = {(group["lr_scale"], round(group["lr"] / group["lr_scale"], 12)) for group in groups}
    assert len({rate for _, rate in rates}) == 1  # each its share of one learning rate
    assert len(rates) == {"ijepa": 1, "bootleg": 1, "capi": 3}[name]
    assert probe.load_encoder(path)(torch.rand(1, 3, 32, 48)).shape == (1, 6, 96)
    assert probe.main(["--ckpt", path, "--mode", "knn", "--workers", "0"]) == 0
    assert json.loads(Path(path).with_name("probe.json").read_text())[0]["mode"] == "knn"


@pytest.mark.parametrize("name", ["mimjepa", "capi"])
def test_a_step_of_each_method_is_measured(name, tmp_path, monkeypatch, capsys):
    """That it prints all it promises; its seconds are no test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "WINDOWS", 1)
    monkeypatch.setattr(speed, "calls_per_second", lambda work, seconds=0: len([work()]))
    monkeypatch.setattr(speed, "matrix_flops", lambda config: 1.0)
    save_images(tmp_path / "loose", 17)
    assert speed.main(["--method", name, *TINY]) == 0
    *_, parts, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["step_images_per_s"] == 8
    named = ["data", "AdamW"] if name != "mimjepa" else ["masks", "student", "teacher", "backward"]
    assert all(f" {part} " in parts for part in named)
    assert not Path("runs").exists()
