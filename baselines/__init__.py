"""I-JEPA, CAPI and Bootleg in the training loop of scott.py: what the three share.

A method is a `Config`, whose `paper` says what its paper sets, and an objective, a subclass of
`scott.MIMJEPA` with its own masks, predictor, targets and loss, whose `departures` says what is
other than in the paper. A mask is boolean, True = hidden from the student; `visible` and `targets`
are indices of patches.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import scott

SCOTT = scott.Config.__dataclass_fields__

def by_recipe(name):
    """The flag `name` of scott.py, with a default that --recipe decides."""
    meta = SCOTT[name].metadata
    return field(default=None, metadata=meta | {"text": meta["text"] + " (default: by --recipe)"})

@dataclass
class Config(scott.Config):
    """The flags of scott.py, with a recipe: the method's own optimiser and views, or MIM-JEPA's.
    Masks, predictor, targets, loss and teacher momentum are the method's own in both."""
    model: str = scott.flag("vit-12/16", SCOTT["model"].metadata["text"], group="model")
    crop_scale: float = by_recipe("crop_scale")
    views: str = by_recipe("views")
    flip_prob: float = by_recipe("flip_prob")
    dropout: float = by_recipe("dropout")
    attention_dropout: float = by_recipe("attention_dropout")
    drop_path: float = by_recipe("drop_path")
    lr: float = by_recipe("lr")
    lr_start: float = by_recipe("lr_start")
    lr_end: float = by_recipe("lr_end")
    lr_flat: float = by_recipe("lr_flat")
    beta2: float = by_recipe("beta2")
    wd_start: float = by_recipe("wd_start")
    wd_end: float = by_recipe("wd_end")
    recipe: str = scott.flag("paper", "optimiser and views: the method's own, or MIM-JEPA's",
                             choices=("paper", "controlled"), group="the method")

    def paper(self):
        """{flag: value} of the method's own recipe."""
        raise NotImplementedError

    def settled(self):
        """The config with every flag that --recipe decides."""
        values = {name: SCOTT[name].default for name in SCOTT}
        values |= self.paper() if self.recipe == "paper" else {}
        return replace(self, **{name: value for name, value in values.items()
                                if getattr(self, name) is None})

def run(config, objective, name):
    """Train `objective(encoder, config)` as the command line says. Raises `scott.UserError`."""
    config = scott.resolve(config.settled())
    torch.manual_seed(config.seed)
    method = objective(scott.encoder_of(asdict(config)), config)
    if os.environ.get("RANK", "0") == "0":
        for text in method.departures():
            print(f"{name}, other than in its paper: {text}")
    data = Path(config.data).resolve().name
    out = config.out or f"runs/{data}-{name}-{config.model.replace('/', '-')}"
    return scott.train(replace(config, out=out), method)
