"""The paper's ablations (Table 5) in one command: every variant with several seeds, one table.

    python train.py --task seg --ablate                    embedded scenes, 9 variants x 3 seeds
    python train.py --task depth --ablate --iterations 60 --ablate-seeds 2
    python train.py --task seg --ablate --ablate-variants no-rearrangement static-timestep

Each run is an ordinary one in RUN/ablation/VARIANT-seedK, with its output in log.txt.  The same
command goes on where it was stopped: finished runs are skipped, unfinished ones resumed.
What counts is the metric after the last step, not the best one seen on the way.
Writes RUN/ablation/ablation.{json,md,png} after every run.
"""
import json
import math
import statistics
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor

import eval as evaluation
from ops.errors import InputError
from tasks.recipes import Recipe, check, read_recipe

PROMPTS = "prompts.safetensors"  # in the folder of a run with fixed prompts


@dataclass(frozen=True)
class Variant:
    """One change of the recipe, and what the paper's Table 5 has for it."""

    name: str  # of its folders
    text: str
    changes: dict  # fields of Recipe
    paper: tuple[str, str] = ("-", "-")  # Cityscapes mIoU in %, NYU RMSE in m
    note: str = ""


VARIANTS = (
    Variant("baseline", "as the recipe has it", {}, ("84.7", "0.223"),
            "paper: Table 5, Cityscapes mIoU in % for seg and NYU v2 RMSE for depth, where one "
            "thing is changed from T = 3 and N = 150 (seg) or 50 (depth)."),
    Variant("prompts-8", "N = 8 prompts", {"num_prompts": 8}),
    Variant("prompts-32", "N = 32 prompts", {"num_prompts": 32}),
    Variant("prompts-64", "N = 64 prompts", {"num_prompts": 64}),
    Variant("passes-1", "T = 1 pass", {"refine_steps": 1}, ("84.1", "0.243")),
    Variant("passes-2", "T = 2 passes", {"refine_steps": 2}, ("84.5", "0.227")),
    Variant("passes-3", "T = 3 passes", {"refine_steps": 3}, ("84.7", "0.223")),
    Variant("no-rearrangement", "head reads the features", {"rearrange": False}, ("84.2", "0.226")),
    Variant("static-timestep", "embedding of t = 0 in each pass", {"modulated_timestep": False},
            ("84.3", "0.227")),
    Variant("latent-scale", "latents x 0.18215", {"latent_scale": 0.18215},
            note="latent-scale is not in the paper: Stable Diffusion scales its latents, the "
            "official code does not."),
    Variant("fixed-prompts", "random orthogonal, adapter trained",
            {"prompts": PROMPTS, "prompt_adapter": True}, ("83.6", "0.258"),
            "fixed-prompts: there is no text encoder here; random orthogonal vectors stand in for "
            "text embeddings. Beside them the paper's value for label prompts."),
)
TINY_NOTE = ("The backbone is a tiny one from random weights and its encoder is trained, too: what "
             "is shown need not hold on Stable Diffusion, and can disagree with the paper.")
FREE = ("out", "prompts", "device", "workers")  # may change between calls: places, not settings


# ------------------------------------------------------------------------------------------------
# The runs

def choose(base: Recipe, names: list[str] | None) -> list[Variant]:
    """The baseline and what differs from it, or those of `names`; InputError for an unknown one."""
    known = [v for v in VARIANTS if not v.changes or replace(base, **v.changes) != base]
    unknown = sorted({*(names or ())} - {v.name for v in known})
    if unknown:
        raise InputError(f"--ablate-variants {unknown[0]}: choose from "
                         f"{', '.join(v.name for v in known)}")
    return [v for v in known if names is None or v.name in names or not v.changes]


def run_recipe(base: Recipe, variant: Variant, seed: int) -> Recipe:
    """The recipe of one run; InputError if it cannot work or its folder holds another one."""
    folder = Path(base.out) / "ablation" / f"{variant.name}-seed{seed}"
    recipe = replace(base, **variant.changes, seed=seed, out=str(folder))
    if recipe.prompts:
        recipe = replace(recipe, prompts=str(folder / PROMPTS))
        if recipe.num_prompts > recipe.context_dim:
            raise InputError(f"--num-prompts {recipe.num_prompts}: {variant.name} has orthogonal "
                             f"ones, at most --context-dim {recipe.context_dim}")
    check(recipe)
    if (folder / "recipe.json").is_file():
        old = read_recipe(folder / "recipe.json")
        for name in (f.name for f in fields(Recipe) if f.name not in FREE):
            if getattr(old, name) != getattr(recipe, name):
                raise InputError(f"{folder}/recipe.json has {name} {getattr(old, name)}, this "
                                 f"command {getattr(recipe, name)}: give the same flags, or "
                                 "another --out")
    return recipe


def orthogonal_prompts(count: int, dim: int, seed: int) -> Tensor:
    """(count, dim) random orthogonal rows of length sqrt(dim), as learned prompts have at first."""
    noise = torch.randn(dim, count, generator=torch.Generator().manual_seed(seed))
    return dim ** 0.5 * torch.linalg.qr(noise).Q.T.contiguous()


def final_metric(recipe: Recipe) -> float | None:
    """The main metric after the run's last step; None if the run has not got there."""
    path, name = Path(recipe.out) / "metrics.jsonl", evaluation.MAIN_METRIC[recipe.task][0]
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    found = [r[name] for r in records if r["step"] == recipe.iterations and name in r]
    return found[-1] if found else None


def finish(recipe: Recipe, train) -> float | None:
    """Start or resume one run, its output in log.txt; returns its metric, None if it diverged."""
    folder = Path(recipe.out)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.prompts:
        prompts = orthogonal_prompts(recipe.num_prompts, recipe.context_dim, recipe.seed)
        save_file({"prompts": prompts}, recipe.prompts)
    saved = any((folder / last / "state.json").is_file() for last in ("last", "last.previous"))
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
        try:
            train(recipe, resume=saved)
        except FloatingPointError as error:
            print(error)
            return None
    return final_metric(recipe)


def ablate(base: Recipe, seeds: int | None, names: list[str] | None, train) -> None:
    """Run what is missing (`train`: train.train), seed by seed; write and print the table.

    A run that diverges has no value; called again, it is tried again.
    """
    seeds = 3 if seeds is None else seeds
    if seeds < 1:
        raise InputError(f"--ablate-seeds {seeds}: at least 1")
    if base.prompts or base.init_from:
        raise InputError("--ablate has its own --prompts and starts anew: leave out --prompts and "
                         "--init-from")
    variants, numbers = choose(base, names), range(base.seed, base.seed + seeds)
    jobs = {(v.name, seed): run_recipe(base, v, seed) for seed in numbers for v in variants}
    done = {key: final_metric(recipe) for key, recipe in jobs.items()}
    results = {key: value for key, value in done.items() if value is not None}
    root, metric = Path(base.out) / "ablation", evaluation.MAIN_METRIC[base.task][0]
    print(f"ablation   {len(jobs)} runs of {base.iterations} steps ({len(variants)} variants, "
          f"{seeds} seeds), {len(results)} of them finished\nout        {root}", flush=True)
    with tqdm(total=len(jobs), initial=len(results), desc="ablation", unit="run",
              smoothing=0) as bar:                       # time left: from the mean over all runs
        for key in [key for key in jobs if key not in results]:
            name = f"{key[0]}-seed{key[1]}"
            bar.set_postfix_str(name)
            results[key] = finish(jobs[key], train)
            bar.update()
            bar.write(f"{name}: " + ("diverged, see its log.txt" if results[key] is None else
                                     f"{metric} {results[key]:.4f}"))
            write(root, summarise(base, variants, numbers, results))
    report = summarise(base, variants, numbers, results)
    write(root, report)
    print("\n".join(["  ".join(line) for line in padded(cells(report))] + report["notes"]))
    print(f"wrote {root}/ (ablation.json, ablation.md, ablation.png, a folder per run)")


# ------------------------------------------------------------------------------------------------
# The report

def summarise(base: Recipe, variants: list[Variant], seeds: range, results: dict) -> dict:
    """What ablation.json holds: per variant its values by seed, their mean and standard deviation
    (n - 1), and the mean difference to the baseline over the seeds that both have; else None.

    results: (variant name, seed) -> metric, None for a run that diverged, no key for one to come.
    """
    metric, sign = evaluation.MAIN_METRIC[base.task]
    of_baseline = {seed: results.get((variants[0].name, seed)) for seed in seeds}
    rows = []
    for v in variants:
        by_seed = {seed: results.get((v.name, seed)) for seed in seeds}
        values = [value for value in by_seed.values() if value is not None]
        pairs = [(value, of_baseline[seed]) for seed, value in by_seed.items()]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        rows.append({
            "variant": v.name, "text": v.text, "changes": v.changes, "values": by_seed,
            "diverged": [seed for seed in seeds if results.get((v.name, seed), 0) is None],
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "difference": statistics.fmean(differences) if differences else None,
            "paper": {"seg": v.paper[0], "depth": v.paper[1]}.get(base.task, "-")})
    return {"task": base.task, "dataset": base.dataset, "backbone": base.backbone,
            "metric": metric, "better": "higher" if sign > 0 else "lower",
            "iterations": base.iterations, "num_prompts": base.num_prompts,
            "refine_steps": base.refine_steps, "seeds": list(seeds), "rows": rows,
            "notes": [v.note for v in variants if v.note]
                     + ([TINY_NOTE] if base.backbone == "tiny" else [])}


def title(report: dict) -> str:
    """What the table shows, in one line."""
    return (f"{report['task']} on {report['dataset']}: {report['metric']} ({report['better']} is "
            f"better) after {report['iterations']} steps; baseline N = {report['num_prompts']}, "
            f"T = {report['refine_steps']}")


def cells(report: dict) -> list[list[str]]:
    """The table as text: a header, then a row per variant."""
    def number(value: float | None, sign: str = "") -> str:
        return "n/a" if value is None else f"{value:{sign}.4f}"

    table = [["variant", "what it changes", "mean", "std", "vs baseline", "seeds", "paper"]]
    for row in report["rows"]:
        finished = sum(value is not None for value in row["values"].values())
        count = f"{finished}/{len(report['seeds'])}"
        if row["diverged"]:
            count += f", {len(row['diverged'])} diverged"
        table.append([row["variant"], row["text"], number(row["mean"]), number(row["std"]),
                      number(row["difference"], "+") if row["changes"] else "", count,
                      row["paper"]])
    return table


def padded(table: list[list[str]]) -> list[list[str]]:
    """Cells of one width per column: text to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [[cell.ljust(w) if i < 2 else cell.rjust(w)
             for i, (cell, w) in enumerate(zip(row, widths))] for row in table]


def write(root: Path, report: dict) -> None:
    """Write ablation.json, ablation.md and ablation.png into `root`."""
    (root / "ablation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    header, *rows = padded(cells(report))
    rule = ["-" * len(c) if i < 2 else "-" * (len(c) - 1) + ":" for i, c in enumerate(header)]
    lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
    notes = [f"- {note}" for note in report["notes"]]
    (root / "ablation.md").write_text("\n".join(
        [f"Ablation, {title(report)}.", "", *lines, "",
         "std: standard deviation over the seeds; a difference below it says little.", "", *notes])
        + "\n", encoding="utf-8")
    draw(root / "ablation.png", report)


# ------------------------------------------------------------------------------------------------
# The picture

ROW, GAP, MARGIN, BAR = 30, 22, 16, 420  # pixels: heights and widths of the table's parts
TEXT, FAINT, BASE, OTHER, LIGHT = (20, 20, 30), (120, 120, 130), (40, 70, 120), (120, 160, 210), \
    (244, 245, 248)


def draw(path: Path, report: dict) -> None:
    """Write the table with a bar per row: mean, standard deviation as whisker, seeds as dots."""
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    table = cells(report)
    widths = [int(max(font.getlength(row[i]) for row in table)) for i in range(len(table[0]))]
    left = MARGIN + sum(widths) + GAP * len(widths)      # where the bars begin
    top, size = MARGIN + ROW, ROW * len(table)
    notes = ["bars: mean, whiskers: standard deviation over seeds, dots: single seeds",
             *report["notes"]]
    image = Image.new("RGB", (left + BAR + MARGIN, top + size + 40 + 20 * len(notes)), "white")
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN - 4), title(report), fill=TEXT, font=ImageFont.load_default(18))
    for i, row in enumerate(table):
        y = top + i * ROW
        if i % 2:
            pen.rectangle((MARGIN - 6, y, image.width - MARGIN, y + ROW - 1), fill=LIGHT)
        x = MARGIN
        for column, (cell, width) in enumerate(zip(row, widths)):
            shift = 0 if column < 2 else width - font.getlength(cell)
            pen.text((x + shift, y + 6), cell, fill=TEXT if i else FAINT, font=font)
            x += width + GAP
    draw_bars(pen, report, left, top + ROW, small)
    for i, note in enumerate(notes):
        pen.text((MARGIN, top + size + 34 + 20 * i), note, fill=FAINT, font=small)
    image.save(path)


def draw_bars(pen: ImageDraw.ImageDraw, report: dict, left: int, top: int, font) -> None:
    """Bars from 0 at (left, top) and an axis below them; the baseline's mean is a line."""
    rows = report["rows"]
    values = [v for row in rows for v in row["values"].values() if v is not None]
    ends = [(row["mean"] or 0) + (row["std"] or 0) for row in rows]
    high = max([*values, *ends, 1e-9]) * 1.05
    bottom = top + ROW * len(rows)

    def at(value: float) -> float:
        return left + BAR * min(max(value / high, 0), 1)

    for row, y in zip(rows, range(top + ROW // 2, bottom, ROW)):
        if row["mean"] is not None:
            pen.rectangle((left, y - 9, at(row["mean"]), y + 9),
                          fill=OTHER if row["changes"] else BASE)
        for value in (v for v in row["values"].values() if v is not None):
            pen.ellipse((at(value) - 3, y - 7, at(value) + 3, y - 1), fill="white", outline=TEXT)
        if row["std"] is not None:
            ends = at(row["mean"] - row["std"]), at(row["mean"] + row["std"])
            for box in ((ends[0], y + 4, ends[1], y + 4), *((x, y + 1, x, y + 7) for x in ends)):
                pen.line(box, fill="white", width=4)     # a rim, visible on dark bars
                pen.line(box, fill=TEXT, width=2)
    if rows[0]["mean"] is not None:
        pen.line((at(rows[0]["mean"]), top, at(rows[0]["mean"]), bottom), fill=BASE)
    pen.line((left, bottom, left + BAR, bottom), fill=FAINT)
    for value in ticks(high):
        pen.line((at(value), bottom, at(value), bottom + 4), fill=FAINT)
        x = at(value) - font.getlength(f"{value:g}") / 2
        pen.text((x, bottom + 6), f"{value:g}", fill=FAINT, font=font)


def ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high`, three to six of them."""
    power = 10.0 ** math.floor(math.log10(high))
    step = next(s * power for s in (0.1, 0.2, 0.5, 1, 2) if high / (s * power) < 6)
    return [round(i * step, 12) for i in range(int(high / step) + 1)]
