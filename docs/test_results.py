"""Every number in a table of results has its log: README.md and results.md against runs/.

A row whose first cell links to a folder of logs, as [log](runs/NAME), is that run's: each of its
cells under a header of `CELLS` must be what the logs say. A table of results with another row must
say "no log" in the row, in the table, or in the section that it stands in.
"""

import csv
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent
LINK = re.compile(r"\[log\]\(([^)]+)\)")

def probed(mode, validate=False):
    """Cell of a probe's last entry on test, or on val, "47.3 (46.0 to 48.5)"."""
    def cell(folder):
        entries = json.loads((folder / "probe.json").read_text())
        result = [entry["results"] for entry in entries if entry["mode"] == mode
                  and entry["settings"].get("validate", False) == validate][-1]
        return "{:.1f} ({:.1f} to {:.1f})".format(result["top1"], *result["interval"])
    return cell

def monitored(name, digits):
    """Cell of a monitor, before and after the run, "103, 77"."""
    def cell(folder):
        with (folder / "metrics.csv").open() as file:
            values = [float(row[name]) for row in csv.DictReader(file) if row[name]]
        return f"{values[0]:.{digits}f}, {values[-1]:.{digits}f}"
    return cell

def steps(folder):
    with (folder / "metrics.csv").open() as file:
        return "{:,}".format(int(list(csv.DictReader(file))[-1]["step"]))

CELLS = {"linear": probed("linear"), "attentive": probed("attentive"), "k-NN": probed("knn"),
         "ridge": probed("ridge"), "linear on val": probed("linear", True),
         "k-NN on val": probed("knn", True), "all trained": probed("finetune"),
         "effective rank": monitored("effective_rank", 0),
         "k-NN while training": monitored("knn_top1", 1), "steps": steps}

def tables(text):
    """Yields (section, headers, rows) of a Markdown text; a row is a list of its cells."""
    for section in re.split(r"\n(?=## )", text):
        for table in re.findall(r"((?:^\|.*\n)+)", section, re.MULTILINE):
            header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")]
                                for line in table.replace("**", "").splitlines()]
            yield section, [cell.strip("| ") for cell in header], rows

def differences(path):
    """What the tables of a file say other than the logs, as texts."""
    for section, headers, rows in tables(path.read_text()):
        probes = {"linear", "linear on val", "attentive", "all trained"} & {*headers}
        if not probes or "Paper" in headers:
            continue
        for row in rows:
            link = LINK.search(row[0])
            if link is None:
                if "no log" not in section:
                    yield f"{path.name}: {row[0]}: neither a log, nor a word that there is none"
                continue
            for header, said in zip(headers, row):
                said = said.strip("| ")
                if header not in CELLS or said == "-":
                    continue
                expected = CELLS[header](path.parent / link[1])
                if said != expected:
                    yield f"{path.name}: {row[0]}: {header} is {said}, the log says {expected}"

@pytest.mark.parametrize("path", [DOCS.parent / "README.md", DOCS / "results.md"])
def test_tables_say_what_the_logs_say(path):
    assert list(differences(path)) == []
    assert LINK.search(path.read_text())

@pytest.mark.parametrize("before, after", [
    ("47.3", "47.4"), ("48.5", "48.6"), ("30.7", "31.7"), ("103, 94", "103, 95"),
    ("6,096", "6,095"), ("0.2 (0.0", "0.3 (0.0"), ("long [log](runs/long)", "long")])
def test_an_edited_cell_is_noticed(tmp_path, before, after):
    run = tmp_path / "runs/long"
    run.mkdir(parents=True)
    results = {"linear": (47.31, 46.0, 48.5), "attentive": (60.0, 58.8, 61.2),
               "knn": (30.7, 29.6, 31.9)}
    entries = [{"mode": mode, "results": {"top1": top1, "interval": interval},
                "settings": {"validate": validate}}
               for mode, (top1, *interval) in results.items() for validate in (False, True)]
    for entry in entries[1::2]:  # of the val split: not what most tables show
        entry["results"] = {"top1": 0.2, "interval": [0.0, 1.0]}
    (run / "probe.json").write_text(json.dumps(entries))
    (run / "metrics.csv").write_text("step,effective_rank\n0,102.7\n100,\n6096,93.8\n")
    text = """## Results
| Run | linear | attentive | k-NN | effective rank | steps | minutes |
|---|---|---|---|---|---|---|
| long [log](runs/long) | **47.3** (46.0 to 48.5) | - | 30.7 (29.6 to 31.9) | 103, 94 | 6,096 | 61 |

| Run | linear on val |
|---|---|
| the same [log](runs/long) | 0.2 (0.0 to 1.0) |
"""
    path = tmp_path / "results.md"
    path.write_text(text)
    assert list(differences(path)) == []
    assert before in text
    path.write_text(text.replace(before, after))
    assert len(list(differences(path))) == 1
