"""The paper's ablations (Table 5) in one command: every variant with several seeds, one table.

    python -m tools.ablate --task seg                    embedded scenes, 13 variants x 3 seeds
    python -m tools.ablate --task depth --iterations 150 --seeds 2
    python -m tools.ablate --task seg --variants no-rearrangement static-timestep

Takes train.py's flags, too.  Each run is an ordinary one in OUT/VARIANT-seedK, its output in
log.txt.  The same command goes on where it was stopped: finished runs are skipped, unfinished ones
resumed.  What counts is the metric after the last step, not the best one seen on the way.
Writes OUT/ablation.{json,md,png} after every run; they hold all finished runs of the same settings
in OUT, those of earlier commands with other variants or seeds included.
"""
import json
import statistics
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from torch import Tensor

from ops import draw, parallel
from ops.errors import InputError, run_command
from ops.settings import checked, fits, leaves
from tasks import TASKS
from tasks.captioned import CAPTIONS
from tasks.flags import Parser, finish, has_captions, read_prompts, resolve, with_flags
from tasks.recipes import Recipe, read_recipe
from train import train
from vpd.prompts import ONE, embed_names
from weights.runs import RunFolder, read_log

PROMPTS = "prompts.safetensors"  # in the folder of a run with fixed prompts


@dataclass(frozen=True)
class Variant:
    """One change of the recipe, and what the paper's Table 5 has for it."""

    name: str  # of its folders
    text: str
    changes: dict  # flags
    paper: tuple[str, str] = ("-", "-")  # Cityscapes mIoU in %, NYU RMSE in m
    note: str = ""


VARIANTS = (
    Variant("baseline", "as the recipe has it", {}, ("84.7", "0.223"),
            "paper: Table 5, Cityscapes mIoU in % for seg and NYU v2 RMSE for depth, where one "
            "thing is changed from T = 3 and N = 150 (seg) or 50 (depth)."),
    Variant("label-prompts", "class names, adapter trained",
            {"prompts": PROMPTS, "prompt_adapter": True}, ("83.6", "0.258"),
            "label-prompts: \"a photo of a NAME\" through the backbone's own text encoder, one "
            "prompt per class of the data set."),
    Variant("caption-prompts", "the image's caption, adapter trained",
            {"prompts": CAPTIONS, "prompt_adapter": True}, ("83.4", "0.225"),
            "caption-prompts: the states of all tokens of a true caption, which says nothing of "
            "left and right, by the backbone's own text encoder; N is their number."),
    Variant("fixed-prompts", "random orthogonal, adapter trained",
            {"prompts": PROMPTS, "prompt_adapter": True},
            note="fixed-prompts: ours, what a fixed prompt is worth that means nothing."),
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
            note="latent-scale: ours; Stable Diffusion scales its latents, the official code does "
            "not."),
    Variant("random-unet", "UNet from random weights", {"init": "random-unet"},
            note="random-unet, trained-encoder: ours; what pretraining is worth, and what a frozen "
            "encoder costs."),
    Variant("trained-encoder", "encoder trained, too", {"train_encoder": True}),
)
VERDICT = ("verdict: vs baseline is the mean difference over common seeds, 95 % its interval; if "
           "that holds 0, nothing is decided. std: standard deviation over the seeds.")
# Those that need --init pretrained.
PRETRAINED = ("label-prompts", "caption-prompts", "random-unet", "trained-encoder")
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; 2.0 beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
FREE = ("out", "prompts", "device", "workers")  # may change between calls: places, not settings
FROM_DATA = ("class_names", "num_classes")  # known when the data set has been opened
WIDTHS = (("model", "unet"), ("model", "vae"))  # pretrained: when their files have been


def main() -> None:
    """Run what is missing, seed by seed; write and print the table."""
    own = Parser(__doc__)
    own.add_argument("--seeds", type=int, default=3, metavar="K",
                     help="runs of each variant: --seed, --seed + 1, ... [3]")
    own.add_argument("--variants", nargs="+", metavar="NAME", help="beside the baseline [all]")
    args, rest = own.parse_known_args(sys.argv[1:])
    base, resumed = resolve(rest)
    if resumed or base.prompts or base.init_from or parallel.world() > 1:
        raise InputError("an ablation starts anew, has prompts of its own and is one process: "
                         "leave out --resume, --prompts, --init-from and torchrun")
    if base.method == "vpd":
        raise InputError("--method vpd: Table 5 is about Meta Prompts")
    if not any(word.split("=")[0] == "--out" for word in rest):  # goes on where it was stopped
        base = replace(base, out=f"runs/ablation-{base.task}-{base.dataset}")
    ablate(base, args.seeds, args.variants)


# ------------------------------------------------------------------------------------------------
# The runs

def choose(base: Recipe, names: list[str] | None) -> list[Variant]:
    """The baseline and what differs from it, or those of `names`; InputError for an unknown one."""
    known = [v for v in VARIANTS if not v.changes or with_flags(base, v.changes) != base]
    if base.init != "pretrained":
        known = [v for v in known if v.name not in PRETRAINED]
    if not hasattr(base.files, "classes"):               # nothing has a name in it
        known = [v for v in known if v.name != "label-prompts"]
    if not has_captions(base):
        known = [v for v in known if v.name != "caption-prompts"]
    unknown = sorted({*(names or ())} - {v.name for v in known})
    if unknown:
        raise InputError(f"--variants {unknown[0]}: choose from "
                         f"{', '.join(v.name for v in known)}")
    return [v for v in known if names is None or v.name in names or not v.changes]


def run_recipe(base: Recipe, variant: Variant, seed: int) -> Recipe:
    """The recipe of one run, its prompts written; InputError if it cannot work or its folder holds
    another one.
    """
    folder = Path(base.out) / f"{variant.name}-seed{seed}"
    recipe = replace(with_flags(base, variant.changes), seed=seed, out=str(folder))
    if recipe.prompts == PROMPTS:
        recipe = replace(recipe, prompts=str(folder / PROMPTS))
        write_prompts(recipe, variant, seed)
    recipe = finish(recipe, variant.changes)
    if (folder / "recipe.json").is_file():
        started = read_recipe(folder / "recipe.json")
        old, new = leaves(started), leaves(recipe)
        for path in new:
            found = path[-1] in FROM_DATA or recipe.init != "random" and path[:-1] in WIDTHS
            if path[-1] not in FREE and not found and old.get(path) != new[path]:
                raise InputError(f"{folder}/recipe.json has {path[-1]} {old.get(path)}, this "
                                 f"command {new[path]}: give the same flags, or another --out")
        recipe = replace(recipe, model=started.model)    # with what the start found out
    return recipe


def write_prompts(recipe: Recipe, variant: Variant, seed: int) -> None:
    """The file of a run with fixed prompts, unless it is there; InputError if it holds others."""
    path, D = Path(recipe.prompts), recipe.model.unet.context_dim
    if variant.name == "label-prompts":
        prompts = embed_names(recipe.files.classes().names, ONE, recipe.backbone)
    else:
        prompts = orthogonal_prompts(recipe.model.num_prompts, D, seed)
    if path.is_file() and len(read_prompts(path, D)) != len(prompts):
        raise InputError(f"{path} does not hold {len(prompts)} prompts: give the same flags, or "
                         "another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"prompts": prompts}, path)


def orthogonal_prompts(count: int, dim: int, seed: int) -> Tensor:
    """(count, dim) random orthogonal rows of length sqrt(dim), as learned prompts have at first.

    InputError if there is no room for so many.
    """
    if count > dim:
        raise InputError(f"--num-prompts {count}: fixed-prompts has orthogonal ones, at most "
                         f"--unet-context-dim {dim}")
    noise = torch.randn(dim, count, generator=torch.Generator().manual_seed(seed))
    return dim ** 0.5 * torch.linalg.qr(noise).Q.T.contiguous()


def final_metric(recipe: Recipe) -> float | None:
    """The main metric after the run's last step; None if the run has not got there."""
    name = TASKS[recipe.task].METRIC[0]
    found = [record[name] for record in read_log(Path(recipe.out) / "metrics.jsonl")
             if record["step"] == recipe.iterations and fits(float, record.get(name))]
    return found[-1] if found else None


def find_finished(base: Recipe) -> dict[tuple[str, int], float]:
    """(variant name, seed) -> metric of every finished run in OUT, but those of other settings."""
    found = {}
    for variant in choose(base, None):
        start = f"{variant.name}-seed"
        for folder in Path(base.out).glob(f"{start}*"):
            number = folder.name.removeprefix(start)
            if not (number.isdecimal() and len(number) < 12 and (folder / "recipe.json").is_file()):
                continue
            try:
                value = final_metric(run_recipe(base, variant, int(number)))
            except InputError:
                continue
            if value is not None:
                found[variant.name, int(number)] = value
    return found


def run_one(recipe: Recipe) -> float | None:
    """Start or resume one run, its output in log.txt; returns its metric, None if it diverged."""
    folder = Path(recipe.out)
    folder.mkdir(parents=True, exist_ok=True)
    saved = any((folder / name).exists() for name in ("last", "last.tmp", "last.previous"))
    with (RunFolder(folder, saved),
          (folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as log,
          redirect_stdout(log)):
        try:
            result = train(recipe, resume=saved)
        except FloatingPointError as error:
            print(error)
            return None
    if result["steps"] < recipe.iterations:              # a signal: its run is saved
        raise KeyboardInterrupt
    return final_metric(recipe)


def ablate(base: Recipe, seeds: int, names: list[str] | None) -> None:
    """Run what is missing, seed by seed; write and print the table.

    A run that diverges has no value; called again, it is tried again.
    """
    checked(int, seeds, "--seeds", "seeds")
    if (Path(base.out) / "recipe.json").exists():
        raise InputError(f"--out {base.out} holds a run of train.py: give another folder")
    last = base.seed + seeds - 1
    checked(int, last, f"--seed {base.seed} --seeds {seeds}: the last seed", "seed")
    chosen, numbers = choose(base, names), range(base.seed, base.seed + seeds)
    jobs = {(v.name, seed): run_recipe(base, v, seed) for seed in numbers for v in chosen}
    results = find_finished(base)
    missing = [key for key in jobs if key not in results]
    variants = [v for v in choose(base, None)
                if v in chosen or any(name == v.name for name, _ in results)]
    numbers = sorted({*numbers, *(seed for _, seed in results)})
    root, metric = Path(base.out), TASKS[base.task].METRIC[0]
    print(f"ablation   {len(jobs)} runs of {base.iterations} steps ({len(chosen)} variants, "
          f"{seeds} seeds), {len(jobs) - len(missing)} of them finished\nout        {root}",
          flush=True)
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="ablation", unit="run",
              smoothing=0) as bar:                       # time left: from the mean over all runs
        for key in missing:
            name = f"{key[0]}-seed{key[1]}"
            bar.set_postfix_str(name)
            results[key] = run_one(jobs[key])
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

def summarise(base: Recipe, variants: list[Variant], seeds, results: dict) -> dict:
    """What ablation.json holds: per variant its values by seed, their mean and standard deviation
    (n - 1), and the mean difference to the baseline over the seeds that both have, with half the
    width of its 95 % interval and the verdict on it; else None.

    results: (variant name, seed) -> metric, None for a run that diverged, no key for one to come.
    """
    metric, sign = TASKS[base.task].METRIC
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
            "interval": half_width(differences) if v.changes else None,
            "verdict": verdict(v, base, sign, differences) if v.changes else "",
            "paper": paper_value(v, base.task)})
    return {"task": base.task, "dataset": base.dataset, "backbone": base.backbone,
            "metric": metric, "better": "higher" if sign > 0 else "lower",
            "iterations": base.iterations, "num_prompts": base.model.num_prompts,
            "refine_steps": base.model.refine_steps, "seeds": list(seeds), "rows": rows,
            "notes": [v.note for v in variants if v.note]
                     + [VERDICT]}


def paper_value(variant: Variant, task: str) -> str:
    """What Table 5 has, "-" for nothing."""
    return {"seg": variant.paper[0], "depth": variant.paper[1]}.get(task, "-")


def half_width(differences: list[float]) -> float | None:
    """Half the width of the mean's 95 % interval (Student's t); None for fewer than two values."""
    n = len(differences)
    if n < 2:
        return None
    quantile = T95[n - 2] if n - 2 < len(T95) else 2.0
    return quantile * statistics.stdev(differences) / n ** 0.5


def verdict(variant: Variant, base: Recipe, sign: int, differences: list[float]) -> str:
    """Whether a change is for the better, and whether the paper says so, too.

    sign: 1 if a higher metric is better, -1 if a lower one.  Passes are compared with the paper's
    value for as many as the baseline has, all else with its T = 3.
    """
    half = half_width(differences)
    gain = sign * statistics.fmean(differences) if differences else 0.0
    if half is None or abs(gain) <= half:
        return "not decided"
    own = [v for v in VARIANTS if v.changes == {"refine_steps": base.model.refine_steps}]
    same = own[0] if own and "refine_steps" in variant.changes else VARIANTS[0]
    theirs, baseline = paper_value(variant, base.task), paper_value(same, base.task)
    if "-" in (theirs, baseline) or theirs == baseline:
        return "better" if gain > 0 else "worse"
    return "agrees" if (sign * (float(theirs) - float(baseline)) > 0) == (gain > 0) else "disagrees"


def title(report: dict) -> str:
    """What the table shows, in one line."""
    return (f"{report['task']} on {report['dataset']}: {report['metric']} ({report['better']} is "
            f"better) after {report['iterations']} steps; baseline N = {report['num_prompts']}, "
            f"T = {report['refine_steps']}")


def cells(report: dict) -> list[list[str]]:
    """The table as text: a header, then a row per variant."""
    def number(value: float | None, sign: str = "") -> str:
        """A value as text."""
        return "n/a" if value is None else f"{value:{sign}.4f}"

    table = [["variant", "what it changes", "mean", "std", "vs baseline", "95 %", "seeds", "paper",
              "verdict"]]
    for row in report["rows"]:
        finished = sum(value is not None for value in row["values"].values())
        count = f"{finished}/{len(report['seeds'])}"
        if row["diverged"]:
            count += f", {len(row['diverged'])} diverged"
        half = number(row["interval"])
        table.append([row["variant"], row["text"], number(row["mean"]), number(row["std"]),
                      number(row["difference"], "+") if row["changes"] else "",
                      ("n/a" if half == "n/a" else f"+-{half}") if row["changes"] else "", count,
                      row["paper"], row["verdict"]])
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
        [f"Ablation, {title(report)}.", "", *lines, "", *notes]) + "\n", encoding="utf-8")
    values = [[v for v in row["values"].values() if v is not None] for row in report["rows"]]
    draw.save_table(root / "ablation.png", title(report), cells(report), values,
                    ["bars: mean, whiskers: standard deviation over seeds, dots: single seeds",
                     *report["notes"]])


if __name__ == "__main__":
    run_command(main)
