"""Draws curves.png from the logs in runs/: k-NN and effective rank over the epochs, and the probes.

    python docs/curves.py [OUT.png]
"""

import csv
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parent
RUNS = (  # folder, what it is, colour (Okabe and Ito's, told apart by the colour-blind)
    ("default-48", "SCOTT-3/16", "#0072B2"),
    ("seed-1-48", "SCOTT-3/16, seed 1", "#56B4E9"),
    ("vit-24", "ViT-3/16", "#D55E00"),
    ("random-48", "SCOTT, random masks", "#009E73"),
)
PANELS = (  # title, column of metrics.csv, what probe.json has beside it
    ("k-NN, linear and attentive top-1, %", "knn_top1", ("linear", "attentive")),
    ("effective rank", "effective_rank", ()),
)
SCALE = 3  # drawn three times as large, then shrunk: smooth lines
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 300, 36, 60, 34, 36  # of a panel, pixels

def read_run(folder):
    """(rows of metrics.csv, {mode: top-1} of probe.json)."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    entries = json.loads((folder / "probe.json").read_text())
    return rows, {entry["mode"]: entry["results"]["top1"] for entry in entries}

class Panel:
    """A plot of (epoch, value) points with its axes, on a part of a picture."""
    def __init__(self, draw, offset, title, epochs, highest):
        self.draw, self.offset, self.epochs, self.highest = draw, offset, epochs, highest
        self.font, self.marks = ImageFont.load_default(11 * SCALE), []
        self.text((LEFT, 8), title)
        step = 10 if highest <= 80 else 20
        for value in range(0, highest + 1, step):
            self.line([(0, value), (epochs, value)], "#DDDDDD", 1)
            x, y = self.place(0, value)
            self.draw.text((x - 6 * SCALE, y), str(value), "black", self.font, "rm")
        for epoch in range(0, epochs + 1, max(1, epochs // 6)):
            x, y = self.place(epoch, 0)
            self.draw.text((x, y + 5 * SCALE), str(epoch), "black", self.font, "ma")
        x, y = self.place(epochs / 2, 0)
        self.draw.text((x, y + 18 * SCALE), "epoch", "black", self.font, "ma")

    def place(self, epoch, value):
        """The point on the picture."""
        x = self.offset + LEFT + epoch / self.epochs * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - value / self.highest * (HEIGHT - TOP - BOTTOM)
        return x * SCALE, y * SCALE

    def text(self, place, words, color="black"):
        x, y = place
        self.draw.text(((self.offset + x) * SCALE, y * SCALE), words, color, self.font)

    def line(self, points, color, width=2):
        self.draw.line([self.place(*point) for point in points], color, width * SCALE, "curve")

    def dashes(self, value, color):
        """The level of the untrained encoder."""
        for dash in range(0, 60, 2):
            ends = [(self.epochs * part / 60, value) for part in (dash, dash + 1)]
            self.line(ends, color, 1)

    def mark(self, epoch, value, color, words):
        """A point at the end of a run, with what it is; another of that name is close: without."""
        x, y = self.place(epoch, value)
        radius = 3.5 * SCALE
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
        close = [(other, name) for end, other, name in self.marks
                 if end == epoch and abs(other - value) < 3]
        self.marks.append((epoch, value, words))
        if words in [name for _, name in close]:
            return
        if close:  # beside another name: above it or below
            y += 9 * SCALE if value < close[0][0] else -9 * SCALE
        self.draw.text((x + 6 * SCALE, y), words, color, self.font, "lm")

def draw_curves(folder, path):
    """Draw the runs of RUNS that are in `folder` to `path`; the others are named."""
    runs = [(folder / name, label, color) for name, label, color in RUNS]
    for run, label, _ in runs:
        if not run.is_dir():
            print(f"left out: {label}, there is no {run}")
    runs = [(*read_run(run), label, color) for run, label, color in runs if run.is_dir()]
    epochs = max(int(rows[-1]["epoch"]) for rows, *_ in runs)
    size = (WIDTH * len(PANELS) * SCALE, HEIGHT * SCALE)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, column, modes) in enumerate(PANELS):
        tops = [float(row[column]) for rows, *_ in runs for row in rows if row[column]]
        tops += [probes[mode] for _, probes, *_ in runs for mode in modes]
        panel = Panel(draw, WIDTH * number, title, epochs, 10 * (int(max(tops)) // 10 + 1))
        for line, (rows, probes, label, color) in enumerate(runs):
            points = [(int(row["epoch"]), float(row[column])) for row in rows if row[column]]
            panel.dashes(points[0][1], color)
            panel.line(points, color)
            for mode in modes:
                panel.mark(points[-1][0], probes[mode], color, mode)
            if not modes:  # the legend, where there is room
                panel.text((LEFT + 10, HEIGHT - BOTTOM - 20 - 16 * line), label, color)
    panel.text((LEFT + 10, HEIGHT - BOTTOM - 20 - 16 * len(runs)), "dashed: untrained")
    shrunk = picture.resize((size[0] // SCALE, size[1] // SCALE), Image.Resampling.LANCZOS)
    shrunk.save(path, optimize=True)
    print(f"{len(runs)} runs: {path}")

if __name__ == "__main__":
    draw_curves(DOCS / "runs", sys.argv[1] if len(sys.argv) > 1 else DOCS / "curves.png")
