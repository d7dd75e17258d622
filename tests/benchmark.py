"""Speed and memory, side by side with diffusers in one run: not a test, prints a table.

    python tests/benchmark.py                          UNet and VAE; on a GPU a tour of 9 minutes
    python tests/benchmark.py --size 32 --rounds 3     smaller latents, fewer rounds
    python tests/benchmark.py --steps                  training steps and inference, T = 1, 2, 3
    python tests/benchmark.py --steps --task seg --T 3 --dtype bfloat16 --compile --memory
    python tests/benchmark.py --checkpointing          a training step's memory with and without
    python tests/benchmark.py --lovasz                 the loss against the loop over classes
    python tests/benchmark.py --loading                time and peak memory of loading the files
    python tests/benchmark.py --oks                    COCO's evaluation against pycocotools
    python tests/benchmark.py --steps --width tiny     tries the same in seconds

Ours and the peer share weights and inputs, their outputs are compared first, and they take turns
(A B A B ...), so that a machine whose speed drifts treats both alike.  A ratio below 1 means that
ours is faster, or smaller.  FLOPs are those of eager code, what checkpointing computes again is
counted again; `peak`: FLOPs per second over those of a big matmul of the same type in this run.
The last line is the table as JSON.
"""
import argparse
import functools
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from composition import (  # noqa: E402
    N_CLASSES, cases, compiled, composed, loss_and_gradient, lovasz_by_class, our_model,
    sized_recipe, step_calls)
from oracles import diffusers_unet, diffusers_vae  # noqa: E402
from trees import pycocotools_evaluation, random_case, write_case  # noqa: E402

import train  # noqa: E402
from heads import lovasz_softmax  # noqa: E402
from ops import oks  # noqa: E402
from unet import UNetConfig  # noqa: E402
from vae import VAEConfig  # noqa: E402

for of, kernel in (  # torch's counter doesn't know the CPU's attention
        (flop_counter.sdpa_flop, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu),
        (flop_counter.sdpa_backward_flop,
         torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)):
    flop_counter.register_flop_formula(kernel, get_raw=True)(of)

COLUMNS = {"case": "<34", "dtype": "<8", "mode": "<8", "batch": "5", "ours_s": "9.4f",
           "peer_s": "9.4f", "ratio": "6.3f", "ours_gb": "7.2f", "peer_gb": "7.2f",
           "ours_gflop": "10.1f", "peer_gflop": "10.1f", "ours_peak": "9.1%", "peer_peak": "9.1%",
           "ours_first_s": "12.1f", "peer_first_s": "12.1f", "error": "7.0e"}
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
# Measuring

def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def alternate(ours, peer, rounds: int, device: torch.device) -> tuple[float, float, float]:
    """(median of ours, median of the peer, median of the ratios round by round); both are warm."""
    pairs = []
    for i in range(rounds):
        first, second = (ours, peer) if i % 2 == 0 else (peer, ours)
        a, b = seconds(first, device), seconds(second, device)
        pairs.append((a, b) if i % 2 == 0 else (b, a))
    mine, theirs = zip(*pairs)
    return (statistics.median(mine), statistics.median(theirs),
            statistics.median(a / b for a, b in pairs))


@functools.lru_cache(maxsize=None)
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a big square matmul, the best of ten: what the machine can do."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side ** 3 / min(seconds(lambda: a @ a, device) for _ in range(10))


def gpu_peak(call, device: torch.device) -> float | None:
    """GB of GPU memory in use at most during a call; None on a CPU, where --memory asks for it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return train.peak_gb(device)


def process_peak() -> float:
    """Peak memory of this process in GB; unlike ru_maxrss it knows nothing of the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024 / 1e9


class Flops(TorchDispatchMode):
    """Adds up torch's FLOP formulas, as FlopCounterMode does, which also follows the modules and
    fails where they are given learned tensors without gradients.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, inputs=(), named=None):
        result = function(*inputs, **(named or {}))
        formula = flop_counter.flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*inputs, **(named or {}), out_val=result)
        return result


def counted(call):
    """(result, GFLOPs) of a call in eager mode."""
    with Flops() as flops:
        result = call()
    return result, flops.total / 1e9


def difference(ours, peer) -> float:
    """|ours - peer| / |peer| in the Euclidean norm; the largest of several named tensors."""
    if isinstance(ours, dict):
        return max(difference(torch.as_tensor(ours[name]), torch.as_tensor(peer[name]))
                   for name in peer)
    return ((ours.float() - peer.float()).norm() / peer.float().norm()).item()


def measure(row: dict, calls: dict, dtype: torch.dtype, rounds: int, device: torch.device,
            gflops: dict | None = None) -> dict:
    """Complete a row from calls = {"ours": call, "peer": call}: equality, FLOPs, times, memory.

    `gflops` are given where the calls are compiled, which can't be counted; the time of the first
    calls, which compile, is kept then.
    """
    results = {}
    for side, call in calls.items():
        start = time.perf_counter()
        if gflops is None:
            results[side], row[f"{side}_gflop"] = counted(call)
        else:
            results[side], row[f"{side}_gflop"] = call(), gflops[side]
            row[f"{side}_first_s"] = time.perf_counter() - start
    row["error"] = difference(results.pop("ours"), results.pop("peer"))
    # Passes multiply rounding errors, a GPU's convolutions use TF32: gross mistakes only are found
    # here; tests/test_benchmark.py compares in float64.
    exact = 1e-2 if device.type == "cuda" else 1e-3
    assert row["error"] < (exact if dtype == torch.float32 else 0.3), row
    row["ours_s"], row["peer_s"], row["ratio"] = alternate(*calls.values(), rounds, device)
    for side, call in calls.items():
        row[f"{side}_gb"] = gpu_peak(call, device)
        if row[f"{side}_gflop"] > 0:
            speed = row[f"{side}_gflop"] * 1e9 / row[f"{side}_s"]
            row[f"{side}_peak"] = speed / matmul_peak(device, dtype)
    return row


# ------------------------------------------------------------------------------------------------
# UNet and VAE encoder

def modules(args, device):
    """Rows of UNet and VAE encoder on their own, weights and inputs in the same precision."""
    for name, ours, peer, inputs, wrap in cases(args, device):
        if args.case not in (None, name):
            continue
        for dtype in args.dtype:
            ours.to(dtype), peer.to(dtype)
            cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
            row = {"case": name, "dtype": short(dtype), "mode": "eager", "batch": len(inputs[0])}
            yield measure(row, {"ours": wrap(ours, cast), "peer": wrap(peer, cast)}, dtype,
                          args.rounds, device)
            ours.zero_grad(set_to_none=True)             # the peer's are the same


# ------------------------------------------------------------------------------------------------
# Whole training steps and whole inference

def short(dtype: torch.dtype) -> str:
    """float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def steps(args, device):
    """Rows of every task, T and precision, inference and training: eager, then compiled."""
    for task, passes in itertools.product(args.task, args.T):
        ours, gflops = our_model(sized_recipe(args, task, passes, True), device), {}
        models = {"ours": ours, "peer": composed(ours)}
        for mode in filter(None, ("eager", args.compile)):
            if mode != "eager":
                models = {side: compiled(model, mode) for side, model in models.items()}
            for training, dtype in itertools.product((False, True), args.dtype):
                name = f"{task} T={passes} {'training' if training else 'inference'}"
                if args.case in (None, name):
                    recipe = sized_recipe(args, task, passes, training)
                    row = {"case": name, "dtype": short(dtype), "mode": mode,
                           "batch": recipe.batch, "checkpointing": training
                           and recipe.gradient_checkpointing}
                    yield step_row(row, models, recipe, args, device, dtype, gflops)


def step_row(row: dict, models: dict, recipe, args, device, dtype, gflops: dict) -> dict:
    """Complete a row; if the GPU's memory does not suffice, say so in it.

    `gflops` holds both sides' counts of the eager rows, by case and precision.
    """
    key = row["case"], row["dtype"]
    try:
        training = row["case"].endswith("training")
        calls = step_calls(models, recipe, training, device, dtype)
        measure(row, calls, dtype, args.rounds, device, gflops.get(key))
        gflops[key] = {side: row[f"{side}_gflop"] for side in models}
        if args.memory and device.type == "cpu" and row["mode"] == "eager":
            for side in models:
                row[f"{side}_gb"] = peak_alone(args, side, row["case"], row["dtype"],
                                               args.gradient_checkpointing)
    except torch.cuda.OutOfMemoryError as error:
        row["out_of_memory"] = str(error).split(". ")[0]
    models["ours"].zero_grad(set_to_none=True)           # left behind by a step that failed
    return row


# ------------------------------------------------------------------------------------------------
# Memory of one side, in a process of its own

def peak_alone(args, side: str, name: str, dtype: str, checkpointing: bool) -> float | None:
    """Peak GB of a process that does this case on one side; None if the GPU's don't suffice."""
    task, passes = name.split()[0], name.split()[1].removeprefix("T=")
    command = [sys.executable, "-W", "ignore", __file__, "--alone", side, "--task", task,
               "--T", passes, "--case", name, "--dtype", dtype, "--device", args.device,
               "--width", args.width,
               "--gradient-checkpointing" if checkpointing else "--no-gradient-checkpointing"]
    for flag, value in (("--size", args.size), ("--batch", args.batch)):
        command += [flag, str(value)] if value else []
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])["peak_gb"]


def alone(args, device) -> float | None:
    """In that process: build one side, twice the step (AdamW's state comes with the first)."""
    training = args.case.endswith("training")
    recipe = sized_recipe(args, args.task[0], args.T[0], training)
    try:
        ours = our_model(recipe, device)
        models = {"ours": ours, "peer": composed(ours)} if args.alone == "peer" else {"ours": ours}
        calls = step_calls(models, recipe, training, device, args.dtype[0])
        calls[args.alone](), calls[args.alone]()
    except torch.cuda.OutOfMemoryError:
        return None
    return train.peak_gb(device) if device.type == "cuda" else process_peak()


def checkpointing(args):
    """A segmentation training step's memory with gradient checkpointing (ours) and without."""
    name = f"seg T={max(args.T)} training"
    for dtype in map(short, args.dtype):
        kept, full = (peak_alone(args, "ours", name, dtype, wanted) for wanted in (True, False))
        yield {"case": f"{name}, checkpointing", "peer": "without checkpointing", "dtype": dtype,
               "ours_gb": kept, "peer_gb": full, "ratio": kept / full if kept and full else None}


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
        row = {"case": f"Lovasz, {present} of {N_CLASSES} classes", "peer": "loop over classes",
               "dtype": "float32", "mode": "eager", "batch": 2}
        yield measure(row, calls, torch.float32, args.rounds, device)


def loading(rounds: int):
    """Time and peak memory of loading SD1.5-size files, each loader in a process of its own."""
    row = {"case": "loading UNet and VAE", "peer": "diffusers", "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        for part, model in (("unet", diffusers_unet(UNetConfig().channels, context_dim=768)),
                            ("vae", diffusers_vae(VAEConfig().channels))):
            model.save_pretrained(Path(folder) / part)
        del model
        row["files_gb"] = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors")) / 1e9
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
    yield {"case": "COCO evaluation, 104,125 people", "peer": "pycocotools", "ours_s": mine,
           "peer_s": theirs, "ratio": mine / theirs,
           "error": max(abs(a - b) for a, b in zip(ours.values(), peer))}


# ------------------------------------------------------------------------------------------------
# The table

def tour(args, device):
    """What is measured on a GPU without any flag; compiling, which takes longest, comes last."""
    bfloat16 = argparse.Namespace(**{**vars(args), "dtype": [torch.bfloat16], "T": [3]})
    yield from modules(argparse.Namespace(**{**vars(args), "case": "UNet forward"}), device)
    yield from checkpointing(bfloat16)
    bfloat16.task = ["depth", "pose"]
    yield from steps(bfloat16, device)
    bfloat16.task, bfloat16.compile = ["seg"], args.compile or "parts"
    yield from steps(bfloat16, device)


def measured(args, device):
    """The rows that the flags ask for."""
    if not (args.steps or args.checkpointing or args.lovasz or args.loading or args.oks):
        yield from (tour if device.type == "cuda" and not args.case else modules)(args, device)
    if args.steps:
        yield from steps(args, device)
    if args.checkpointing:
        yield from checkpointing(args)
    if args.lovasz:
        yield from lovasz(args, device)
    if args.loading:
        yield from loading(args.rounds)
    if args.oks:
        yield from evaluation_of_people()


def line(row: dict) -> str:
    """A row of the table; a dash where there is no number."""
    cells = []
    for name, layout in COLUMNS.items():
        value = row.get(name)
        if value is None or isinstance(value, str):
            layout = re.match(r"<?\d+", layout)[0]
            value = ("-" if value is None else value).rjust(0 if "<" in layout else int(layout))
        cells.append(format(value, layout))
    return " ".join(cells) + ("  " + row["out_of_memory"] if "out_of_memory" in row else "")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; types by name become torch's."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--size", type=int, help="side of the latents, a multiple of 8; default: "
                                                 "the recipe's, 64 for segmentation; tiny: 16")
    parser.add_argument("--batch", type=int, help="default: the recipe's micro-batch, or the "
                                                  "protocol's batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"],
                        choices=("float32", "bfloat16"))
    parser.add_argument("--case", help="only this one, such as 'UNet forward', 'seg T=3 training'")
    parser.add_argument("--task", nargs="+", choices=("seg", "depth", "pose"),
                        default=["seg", "depth", "pose"])
    parser.add_argument("--T", type=int, nargs="+", default=[1, 2, 3])
    for flag in ("steps", "checkpointing", "lovasz", "loading", "oks"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--compile", nargs="?", const="parts", choices=("parts", "whole"),
                        help="compiled rows, too: by parts (default), or whole as train.py does")
    parser.add_argument("--memory", action="store_true",
                        help="on a CPU: each side's peak memory, in a process of its own")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                        default=True, help="of training steps, both sides; on in the recipes")
    parser.add_argument("--json", type=Path, help="write the rows there, after each one")
    parser.add_argument("--alone", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.size and args.size % 8:
        parser.error(f"--size {args.size} is no multiple of 8, the UNet's coarsest stride")
    args.dtype = [getattr(torch, name) for name in args.dtype]
    return args


def main() -> None:
    """Measure, print each row when it is there, the whole as JSON."""
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(0)
    if args.alone:
        print(json.dumps({"peak_gb": alone(args, device)}))
        return
    rows, start = [], time.perf_counter()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report = {"torch": torch.__version__, "device": gpu, "threads": torch.get_num_threads(),
              "width": args.width, "size": args.size, "rounds": args.rounds, "rows": rows}
    print(", ".join(f"{name} {value}" for name, value in report.items() if name != "rows"))
    print(line({name: name for name in COLUMNS}))
    for row in measured(args, device):
        rows.append(row)
        print(line(row), flush=True)
        report["seconds"] = time.perf_counter() - start
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
