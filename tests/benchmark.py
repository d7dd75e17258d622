"""Speed and memory, side by side with diffusers in one run: not a test, prints a table.

    python tests/benchmark.py                                   on a GPU in less than nine minutes
    python tests/benchmark.py --items unet vae --mode eager     some of it
    python tests/benchmark.py --items seg train-seg --T 1 2 3 --memory
    python tests/benchmark.py --items growth --picture FILE     time and memory against T, N, pixels
    python tests/benchmark.py --items checkpointing lovasz loading oks
    python tests/benchmark.py --small                           tries the first in a minute

unet, vae: a forward pass; seg, depth, pose, vpd: a prediction with T passes; train-*: a training
step.  The peer is what a user would write instead, from diffusers' UNet and VAE: eager against
eager, compiled against diffusers compiled and channels last.  Both share weights and inputs, their
outputs are compared first, and they take turns (A B, B A, ...), so that a machine whose speed
drifts treats both alike.  +-: the distance of a side's quartiles over its median, the noise; a
ratio that differs from 1 by less is not told.  Below 1, ours is faster.  `peak`: FLOPs of eager
code, what checkpointing computes again counted again, per second, over those of a big matmul of the
same type in this run.  `first`: the first call, which compiles; no earlier run's files help it.
The last line is all of it as JSON, before it the table for docs/RESULTS.md.
"""
import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import benchmark_growth  # noqa: E402
from benchmark_measure import gpu_peak, measure, process_peak  # noqa: E402
from composition import (  # noqa: E402
    N_CLASSES, ROWS, WIDTHS, compile_both, composed, forward_of, loss_and_gradient,
    lovasz_by_class, our_model, sized_recipe, step_calls, unet_case, vae_case)
from oracles import diffusers_unet, diffusers_vae  # noqa: E402
from trees import pycocotools_evaluation, random_case, write_case  # noqa: E402

import train  # noqa: E402
from heads import lovasz_softmax  # noqa: E402
from ops import oks  # noqa: E402
from unet import UNetConfig  # noqa: E402
from vae import VAEConfig  # noqa: E402

STEPS = (*ROWS, *(f"train-{row}" for row in ROWS))  # of whole models
ITEMS = ("unet", "vae", *STEPS, "growth", "checkpointing", "lovasz", "loading", "oks")
TOUR = ("unet", "vae", "seg", "train-seg", "vpd", "depth", "pose")  # without --items
TOUR_COMPILED = ("unet", "vae", "seg", "train-seg")  # the others' graphs are alike
GPU_SECONDS = 360  # a tour begins no further item after that
HEADER = ("| case | type | mode | batch | ours, s | diffusers, s | ratio | of the matmul's peak "
          "| first call, s | GB |")
LOADERS = {  # run in a process of their own; every weight is read once, so that mapping is no trick
    "ours": "from unet import UNet; from vae import VAEEncoder; import sys; "
            "models = UNet.from_pretrained(sys.argv[1]), VAEEncoder.from_pretrained(sys.argv[1])",
    "peer": "from diffusers import UNet2DConditionModel as U, AutoencoderKL as A; import sys; "
            "models = (U.from_pretrained(sys.argv[1], subfolder='unet'), "
            "A.from_pretrained(sys.argv[1], subfolder='vae'))",
}
READ_AND_REPORT = """
for model in models:
    for p in model.parameters():
        p.detach().sum()
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


# ------------------------------------------------------------------------------------------------
# UNet and VAE encoder

def short(dtype: torch.dtype) -> str:
    """float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def flops_of(row: dict, flops: dict) -> dict | None:
    """What the eager row of a compiled one has counted, 0 where there was none; None if eager."""
    found = flops.setdefault((row["case"], row["dtype"]), {"ours": 0.0, "peer": 0.0})
    return None if row["mode"] == "eager" else found


def keep_flops(row: dict, flops: dict) -> None:
    """Note what an eager row has counted."""
    found = flops[row["case"], row["dtype"]]
    found.update({side: row.get(f"{side}_gflop", 0.0) for side in found})


def modules(args, device, item: str, mode: str, flops: dict):
    """Rows of UNet or VAE encoder on its own, weights and inputs in the same precision."""
    ours, peer, inputs = (unet_case if item == "unet" else vae_case)(args, device)
    for dtype in args.dtype:
        row = {"case": {"unet": "UNet forward", "vae": "VAE encode"}[item], "dtype": short(dtype),
               "mode": mode, "batch": len(inputs[0])}
        cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        calls = {}
        torch.compiler.reset()
        for side, module in (("ours", ours), ("peer", peer)):
            module.to(dtype)
            if mode == "compiled":
                module.to(memory_format=torch.channels_last)
                module = torch.compile(module)
            calls[side] = forward_of(module, cast)
        yield measure(row, calls, dtype, args.rounds, device, flops_of(row, flops))
        keep_flops(row, flops)


# ------------------------------------------------------------------------------------------------
# Whole training steps and whole inference

def steps(args, device, item: str, mode: str, flops: dict):
    """Rows of a prediction or a training step by T and precision."""
    training, name = item.startswith("train-"), item.removeprefix("train-")
    for passes in args.T if name != "vpd" else [1]:
        recipe = sized_recipe(args, name, passes, training)
        case = f"{name}{'' if name == 'vpd' else f' T={passes}'} " \
               f"{'training' if training else 'inference'}"
        for dtype in args.dtype:
            ours = our_model(recipe, device)
            models = {"ours": ours, "peer": composed(ours)}
            if mode == "compiled":
                compile_both(models)
            row = {"case": case, "dtype": short(dtype), "mode": mode, "batch": recipe.batch}
            yield step_row(row, models, recipe, args, device, dtype, flops)


def step_row(row: dict, models: dict, recipe, args, device, dtype, flops: dict) -> dict:
    """Complete a row; if the GPU's memory does not suffice, say so in it."""
    training = row["case"].endswith("training")
    try:
        calls = step_calls(models, recipe, training, device, dtype)
        measure(row, calls, dtype, args.rounds, device, flops_of(row, flops))
        if args.memory and device.type == "cpu" and row["mode"] == "eager":
            item = ("train-" if training else "") + row["case"].split()[0]
            for side in models:
                row[f"{side}_gb"] = peak_alone(args, side, item, recipe, row["dtype"],
                                               args.gradient_checkpointing)
        keep_flops(row, flops)
    except torch.cuda.OutOfMemoryError as error:
        row["ratio"] = "out of memory"
        print(str(error).split(". ")[0])
    return row


# ------------------------------------------------------------------------------------------------
# Memory of one side, in a process of its own

def peak_alone(args, side: str, item: str, recipe, dtype: str, checkpointing: bool) -> float | None:
    """Peak GB of a process that does this item on one side; None if the GPU's don't suffice."""
    command = [sys.executable, "-W", "ignore", __file__, "--alone", side, "--items", item,
               "--T", str(getattr(recipe.model, "refine_steps", 1)), "--dtype", dtype,
               "--device", args.device, "--width", args.width,
               "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"]
    for flag, value in (("--size", args.size), ("--batch", args.batch)):
        command += [flag, str(value)] if value else []
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])["peak_gb"]


def alone(args, device) -> float | None:
    """In that process: build one side, twice the step (AdamW's state comes with the first)."""
    training = args.items[0].startswith("train-")
    recipe = sized_recipe(args, args.items[0].removeprefix("train-"), args.T[0], training)
    try:
        ours = our_model(recipe, device)
        models = {"ours": ours, "peer": composed(ours)} if args.alone == "peer" else {"ours": ours}
        call = step_calls(models, recipe, training, device, args.dtype[0])[args.alone]
        call()
        if device.type == "cuda":
            return gpu_peak(call, device)
        call()
    except torch.cuda.OutOfMemoryError:
        return None
    return process_peak()


def checkpointing(args):
    """A segmentation training step's memory with gradient checkpointing (ours) and without."""
    recipe = sized_recipe(args, "seg", max(args.T), training=True)
    for dtype in map(short, args.dtype):
        kept, full = (peak_alone(args, "ours", "train-seg", recipe, dtype, wanted)
                      for wanted in (True, False))
        yield {"case": f"seg T={max(args.T)} training, checkpointing against none", "dtype": dtype,
               "mode": "eager", "batch": recipe.batch, "ours_gb": kept, "peer_gb": full}


# ------------------------------------------------------------------------------------------------
# The Lovasz loss, loading, COCO's evaluation

def lovasz(args, device):
    """Rows of the loss on 2 images of 150 classes, of which all or 15 are present."""
    side = 8 * (args.size or 64)
    logits = torch.randn(2, N_CLASSES, side, side, device=device, requires_grad=True)
    for present in (N_CLASSES, 15):
        target = torch.randint(0, present, (2, side, side), device=device)
        calls = {"ours": loss_and_gradient(lovasz_softmax, logits, target),
                 "peer": loss_and_gradient(lovasz_by_class, logits, target)}
        row = {"case": f"Lovasz, {present} of {N_CLASSES} classes, against a loop over classes",
               "dtype": "float32", "mode": "eager", "batch": 2}
        yield measure(row, calls, torch.float32, args.rounds, device)


def loading(rounds: int):
    """Time and peak memory of loading SD1.5-size files, each loader in a process of its own."""
    row = {"case": "loading UNet and VAE", "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        for part, model in (("unet", diffusers_unet(UNetConfig().channels, context_dim=768)),
                            ("vae", diffusers_vae(VAEConfig().channels))):
            model.save_pretrained(Path(folder) / part)
        del model
        for side, code in LOADERS.items():
            times, peaks = [], []
            for _ in range(rounds):
                start = time.perf_counter()
                out = subprocess.run([sys.executable, "-W", "ignore", "-c",
                                      code + READ_AND_REPORT, folder],
                                     cwd=ROOT, capture_output=True, text=True, check=True).stdout
                times.append(time.perf_counter() - start)
                peaks.append(int(out.split()[-1]) * 1024 / 1e9)  # of that process alone
            row[f"{side}_s"], row[f"{side}_gb"] = statistics.median(times), max(peaks)
    yield {**row, "ratio": row["ours_s"] / row["peer_s"]}


def evaluation_of_people():
    """Time of COCO's keypoint evaluation on a set of val's size, files to statistics, one run."""
    with tempfile.TemporaryDirectory() as folder:
        case = random_case(np.random.default_rng(0), 5000, 11004, 104_125)
        truth, results = write_case(Path(folder), *case)
        start = time.perf_counter()
        ours = oks.evaluate(*(json.loads(Path(path).read_text()) for path in (truth, results)))
        mine, start = time.perf_counter() - start, time.perf_counter()
        peer = pycocotools_evaluation(truth, results).stats
        theirs = time.perf_counter() - start
    yield {"case": "COCO evaluation of 104,125 people, against pycocotools", "ours_s": mine,
           "peer_s": theirs, "ratio": mine / theirs,
           "error": max(abs(a - b) for a, b in zip(ours.values(), peer))}


# ------------------------------------------------------------------------------------------------
# The table

def modes_of(args, item: str) -> tuple[str, ...]:
    """How an item is measured; a tour compiles TOUR_COMPILED only."""
    if item not in ("unet", "vae", *STEPS):
        return ("eager",)
    return args.mode or (("eager", "compiled") if item in TOUR_COMPILED else ("eager",))


def rows_of(args, device, item: str, mode: str, flops: dict):
    """The rows of an item, but for growth, which has a table of its own."""
    if item in ("unet", "vae"):
        return modules(args, device, item, mode, flops)
    if item in STEPS:
        return steps(args, device, item, mode, flops)
    return {"checkpointing": lambda: checkpointing(args), "lovasz": lambda: lovasz(args, device),
            "loading": lambda: loading(args.rounds), "oks": evaluation_of_people}[item]()


def measured(args, device):
    """The rows that the flags ask for, eager ones first, which take no time to compile; a tour on a
    GPU ends in time, and says what it left out.
    """
    start, flops = time.perf_counter(), {}
    seconds = GPU_SECONDS if args.items is None and device.type == "cuda" else float("inf")
    for mode in ("eager", "compiled"):
        for item in args.items or TOUR:
            if item == "growth" or mode not in modes_of(args, item):
                continue
            if time.perf_counter() - start > seconds:
                print(f"time is up, left out: --items {item} --mode {mode}")
                continue
            yield from rows_of(args, device, item, mode, flops)
            gc.collect()                                 # a peer and its hooks know each other


def number(value, digits: str) -> str:
    """A number as the table shows it; a dash where there is none."""
    return "-" if value is None else value if isinstance(value, str) else format(value, digits)


def line(row: dict) -> str:
    """A row of the table, in Markdown."""
    def both(name: str, digits: str) -> str:
        return " / ".join(number(row.get(f"{side}_{name}"), digits) for side in ("ours", "peer"))

    def timed(side: str) -> str:
        noise = row.get(f"{side}_spread")
        return number(row.get(f"{side}_s"), ".4g") + (f" ±{noise:.0%}" if noise is not None else "")

    cells = (row["case"], row.get("dtype", "-"), row.get("mode", "-"), str(row.get("batch", "-")),
             timed("ours"), timed("peer"), number(row.get("ratio"), ".2f"), both("peak", ".0%"),
             both("first_s", ".1f"), both("gb", ".2f"))
    return f"| {' | '.join(cells)} |"


def machine(args, device) -> str:
    """Where, with what, when, and how busy: what every quoted number needs beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{processor()}, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT,
                            capture_output=True, text=True).stdout.strip() or "unknown"
    size = f", latents {args.size} x {args.size}" if args.size else ""
    return (f"{name}; torch {torch.__version__}; commit {commit}; {datetime.date.today()}; width "
            f"{args.width}{size}; {args.rounds} rounds")


def processor() -> str:
    """The CPU's name, and its units for bfloat16."""
    path = Path("/proc/cpuinfo")
    words = path.read_text(encoding="utf-8") if path.is_file() else ""
    names = [s.split(":")[1].strip() for s in words.splitlines() if s.startswith("model name")]
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in words]
    return " ".join([names[0] if names else "CPU", *units[:1]])


def noise_line(rows: list[dict], before: float) -> str:
    """How quiet the machine was, by the peer's own times and by the system's load."""
    spreads = [row["peer_spread"] for row in rows if row.get("peer_spread") is not None]
    told = f"the peer's own times spread by {statistics.median(spreads):.1%} in the median row, " \
           f"{max(spreads):.1%} at most" if spreads else "not known: three rounds or more show it"
    return f"noise: {told}; load {before:.1f} at the start, {os.getloadavg()[0]:.1f} at the end, " \
           f"{os.cpu_count()} cores"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; types by name become torch's."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", choices=ITEMS, help=f"default: {' '.join(TOUR)}")
    parser.add_argument("--mode", nargs="+", choices=("eager", "compiled"),
                        help=f"default: eager; {' '.join(TOUR_COMPILED)} compiled, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", choices=tuple(WIDTHS), default="sd15")
    parser.add_argument("--size", type=int, help="side of the latents, a multiple of 8; default: "
                                                 "the recipe's, 64 for segmentation; tiny: 16")
    parser.add_argument("--batch", type=int, help="default: the recipe's micro-batch, or the "
                                                  "protocol's batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"],
                        choices=("float32", "bfloat16"))
    parser.add_argument("--T", type=int, nargs="+", default=[3])
    parser.add_argument("--small", action="store_true", help="--width tiny --size 8 --rounds 3")
    parser.add_argument("--memory", action="store_true",
                        help="on a CPU: each side's peak memory, in a process of its own")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                        default=True, help="of training steps, both sides; on in the recipes")
    parser.add_argument("--picture", type=Path, help="of growth: draw it there")
    parser.add_argument("--json", type=Path, help="write the rows there, after each one")
    parser.add_argument("--alone", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.small:
        args.width, args.size, args.rounds = "tiny", 8, 3
    if args.size and args.size % 8:
        parser.error(f"--size {args.size} is no multiple of 8, the UNet's coarsest stride")
    if args.picture and "growth" not in (args.items or ()):
        parser.error("--picture is of --items growth")
    args.dtype = [getattr(torch, name) for name in args.dtype]
    return args


def run(args, device) -> dict:
    """Measure; print each row when it is there, and how far it can be trusted."""
    rows, start, load = [], time.perf_counter(), os.getloadavg()[0]
    report = {"torch": torch.__version__, "machine": machine(args, device), "rows": rows}
    print(report["machine"])
    if args.items != ["growth"]:
        print(HEADER, "|---" * HEADER.count(" | ") + "|---|", sep="\n")
    for row in measured(args, device):
        rows.append(row)
        print(line(row), flush=True)
        report["seconds"] = time.perf_counter() - start
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    if rows:
        print(report.setdefault("noise", noise_line(rows, load)))
    if "growth" in (args.items or ()):
        report["growth"] = benchmark_growth.measured(args, device)
        if args.picture:
            clock = "" if device.type == "cuda" else "; time: of the CPU's cores"
            benchmark_growth.draw_growth(args.picture, report["growth"], report["machine"] + clock)
    return report


def main() -> None:
    """The table, then all as JSON; compiled files of earlier runs are not found."""
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(0)
    if args.alone:
        print(json.dumps({"peak_gb": alone(args, device)}))
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        if any("compiled" in modes_of(args, item) for item in args.items or TOUR):
            torch.compile(lambda x: x.sin())(torch.ones(2, device=device))  # loads the compiler
        report = run(args, device)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
