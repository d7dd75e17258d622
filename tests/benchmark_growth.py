"""How time and memory of a prediction grow with passes, prompts and pixels, against T x UNet.

Of tests/benchmark.py --items growth.  Segmentation, of which one of T, N and the image's side is
changed at a time.  T x UNet is what T passes of the UNet alone take, on the same latents and
prompts; what is left are encoder, neck, head, and the way back to the latents.
Time: on a CPU that of its cores, added up, which other processes do not lengthen much.
Memory: of the tensors that a call makes, at their peak, without the weights.
"""
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmark_measure import spread, synchronize, take_turns
from composition import our_model, sized_recipe
from ops import draw
from ops.device import autocast, cast_weights
from tools.memory import Alive

PASSES, PROMPTS, SIDES = (1, 2, 3), (1, 50, 150, 600), (256, 384, 512, 768, 1024)
HEADER = ("| T | N | pixels | all, s | T x UNet, s | rest | all, GB | UNet, GB |\n"
          "|---|---|---|---|---|---|---|---|")
AXES = {"T": "passes T", "N": "prompts N", "pixels": "side of the image, pixels"}
VALUES = {"s": ("seconds", "unet_s", "T x UNet"), "gb": ("GB of activations", "unet_gb", "UNet")}
WIDTH, HEIGHT, LEFT, BOTTOM = 330, 250, 52, 40  # pixels of a chart, and of its margins
MARGIN = 14  # above and right of it


# ------------------------------------------------------------------------------------------------
# Measuring

def settings(side: int) -> list[tuple[str, int, int, int]]:
    """(what is changed, T, N, side of the image) around T = 3, N = 150 and `side`."""
    sides = sorted({max(64, s * side // 512 // 64 * 64) for s in SIDES})
    return [*(("T", T, 150, side) for T in PASSES), *(("N", 3, N, side) for N in PROMPTS),
            *(("pixels", 3, 150, s) for s in sides)]


def measured(args, device: torch.device) -> list[dict]:
    """A row per setting, printed when it is there."""
    print(HEADER)
    rows, known = [], {}
    for axis, *setting in settings(8 * (args.size or 64)):
        T, N, side = setting
        if tuple(setting) not in known:                  # the middle is on all three axes
            known[tuple(setting)] = point(args, device, T, N, side)
        row = {"axis": axis, "T": T, "N": N, "pixels": side, **known[tuple(setting)]}
        rows.append(row)
        noise = "" if row["spread"] is None else f" ±{row['spread']:.0%}"
        print(f"| {T} | {N} | {side} | {row['s']:.4g}{noise} | "
              f"{row['unet_s']:.4g} | {row['s'] / row['unet_s'] - 1:.0%} | {row['gb']:.3g} | "
              f"{row['unet_gb']:.3g} |", flush=True)
    return rows


@torch.no_grad()
def point(args, device: torch.device, T: int, N: int, side: int) -> dict:
    """Seconds and GB of one setting, whole and UNet; the best of the rounds, which noise can't
    better.
    """
    recipe = sized_recipe(args, "seg", T, training=False)
    recipe = replace(recipe, model=replace(recipe.model, num_prompts=N, refine_steps=T))
    dtype = args.dtype[-1]
    model = our_model(recipe, device).eval()
    cast_weights(model, dtype)
    images = torch.rand(1, 3, side, side, device=device)
    latents = torch.randn(1, recipe.model.unet.latent_channels, side // 8, side // 8, device=device)

    def whole():
        with autocast(device, dtype):
            return model(images)

    def unet():
        with autocast(device, dtype):
            return model.unet(latents, model.timestep(0), model.context(0))

    found = {"gb": activations(model, whole, device), "unet_gb": activations(model, unet, device)}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = take_turns({"whole": whole, "unet": unet}, args.rounds, device, clock)
    return {**found, "s": min(times["whole"]), "unet_s": T * min(times["unet"]),
            "spread": spread(times["whole"])}


def activations(model: torch.nn.Module, call, device: torch.device) -> float:
    """Peak GB of the tensors that a call makes, on either device; its second call."""
    call()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
    alive = Alive()
    alive.known.update(p.untyped_storage()._cdata for p in model.parameters())
    with alive:
        call()
    return alive.peak / 1e9


# ------------------------------------------------------------------------------------------------
# The picture

def draw_growth(path: Path, rows: list[dict], title: str) -> None:
    """Write six charts as a PNG: time and memory, against T, N and pixels."""
    charts = [chart([r for r in rows if r["axis"] == axis], axis, value)
              for value in VALUES for axis in AXES]
    width = 3 * WIDTH
    sheet = np.concatenate([np.concatenate(charts[i:i + 3], axis=1) for i in (0, 3)])
    draw.save(path, draw.caption(sheet[:, :width], title))


def chart(rows: list[dict], axis: str, value: str) -> np.ndarray:
    """One chart (HEIGHT, WIDTH, 3) from 0 on: measured dark, what the UNet takes light."""
    label, second, name = VALUES[value]
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    right, top = 1.05 * max(r[axis] for r in rows), 1.1 * max(max(r[value], r[second])
                                                              for r in rows)

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (WIDTH - LEFT - MARGIN) * x / right,
                HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 2 * MARGIN) * y / top)

    for y in draw.ticks(top):
        pen.line((*at(0, y), *at(right, y)), fill=draw.PALE)
        pen.text((LEFT - 6 - font.getlength(f"{y:g}"), at(0, y)[1] - 7), f"{y:g}", fill=draw.FAINT,
                 font=font)
    for x in sorted({r[axis] for r in rows}):
        pen.line((*at(x, 0), at(x, 0)[0], at(x, 0)[1] + 4), fill=draw.FAINT)
        pen.text((at(x, 0)[0] - font.getlength(f"{x}") / 2, HEIGHT - BOTTOM + 5), f"{x}",
                 fill=draw.FAINT, font=font)
    pen.line((*at(0, 0), *at(right, 0)), fill=draw.FAINT)
    for key, colour, told, place in ((second, draw.BLUE, name, 1), (value, draw.DARK, "all", 0)):
        places = [at(r[axis], r[key]) for r in rows]
        pen.line([xy for place_ in places for xy in place_], fill=colour, width=2)
        for x, y in places:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        pen.text((LEFT + 8 + 46 * place, MARGIN + 6), told, fill=colour, font=font)
    pen.text((4, 2), label, fill=draw.INK, font=font)
    pen.text((WIDTH - MARGIN - font.getlength(AXES[axis]), HEIGHT - 17), AXES[axis], fill=draw.INK,
             font=font)
    return np.asarray(image)
