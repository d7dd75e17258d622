"""Training: the recipe of each data set, and the loop, in execution order.

    python train.py --task seg                                       embedded scenes, tiny backbone
    python train.py --task seg --dataset ade20k --data PATH          the paper's recipe on SD1.5
    python train.py --task seg --dataset folder --data PATH          your own images and masks
    python train.py --task depth                                     the same scenes, metres
    python train.py --task depth --dataset nyu --data PATH --train-list FILE --val-list FILE
    python train.py --task pose                                      the same people, 17 joints
    python train.py --task pose --dataset coco --data PATH           the paper's size on SD1.5
    python train.py --resume runs/seg-ade20k                         go on, exact to the bit

Every field of Recipe (recipes.py) is a flag.
Writes RUN/{recipe.json, metrics.jsonl, last/, best/, pictures/}.
"""
import json
import math
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

import checkpoint
import data
import eval as evaluation
import predict
import weights
from errors import InputError, run_command
from model import Config, MetaPromptModel
from recipes import Recipe, lr_factor, parse, resolve


# ------------------------------------------------------------------------------------------------
# Pieces of the loop

def build_model(recipe: Recipe, class_names: tuple[str, ...]) -> MetaPromptModel:
    """A new model: on pretrained weights, or from random ones (whose encoder is trained, too)."""
    tiny = recipe.backbone == "tiny"
    config = Config(
        task=recipe.task, num_prompts=recipe.num_prompts, refine_steps=recipe.refine_steps,
        shared_prompts=recipe.shared_prompts, prompt_adapter=recipe.prompt_adapter,
        latent_scale=recipe.latent_scale, num_classes=len(class_names), class_names=class_names,
        head_channels=recipe.head_channels, max_depth=recipe.max_depth,
        resize_scale=recipe.resize_scale, deconv_channels=recipe.deconv_channels,
        sigma=recipe.sigma, dropout=recipe.dropout,
        train_encoder=tiny or recipe.init == "random", unet_channels=recipe.unet_channels,
        vae_channels=recipe.vae_channels, context_dim=recipe.context_dim,
        num_heads=recipe.num_heads, latent_channels=recipe.latent_channels,
        norm_groups=recipe.norm_groups, unet_layers=recipe.unet_layers,
        vae_layers=recipe.vae_layers)
    torch.manual_seed(recipe.seed)
    if config.train_encoder:
        print("backbone   RANDOM weights (no Stable Diffusion): the VAE encoder is trained, too")
        model = MetaPromptModel(config)
    else:
        model = MetaPromptModel.from_stable_diffusion(config, recipe.backbone)
        print(f"backbone   {recipe.backbone}: pretrained, VAE encoder frozen")
    return model.train()


def build_optimizer(model: MetaPromptModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the model's groups; fused, which is faster and rounds the same on every call."""
    groups = model.param_groups(recipe.lr, recipe.unet_lr_mult, recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)


def train_step(loss_of, optimizer, batches, recipe: Recipe, step: int, device, dtype) -> dict:
    """One optimiser step from batch / micro_batch micro-batches; returns its mean losses.

    Raises FloatingPointError with the images' names if a loss is not finite; the weights are then
    still those of the step before.
    """
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout: a function of the step alone
    accumulate, means = recipe.batch // recipe.micro_batch, {}
    for _ in range(accumulate):
        batch = next(batches)
        images = batch["image"].to(device, non_blocking=True)
        target = batch["target"].to(device, non_blocking=True)
        with predict.autocast(device, dtype):
            losses = loss_of(images, target)
        total = sum(losses.values()) / accumulate
        if not math.isfinite(total.item()):
            optimizer.zero_grad()
            raise FloatingPointError(f"the loss is {total.item()} at step {step}; the images: "
                                     f"{', '.join(batch['name'])}")
        total.backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.item() / accumulate
    if recipe.clip:
        torch.nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": sum(means.values()), **means}


def peak_gb(device: torch.device) -> float:
    """Peak memory so far in GB: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Log:
    """metrics.jsonl: one line per record; on resuming, records after the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
        self.path = path

    def write(self, record: dict) -> None:
        """Append a record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------
# The loop

def train(recipe: Recipe, resume: bool) -> dict:
    """Train to the end of the recipe; returns the best metric and where everything was written."""
    run = Path(recipe.out)
    device = predict.pick_device(recipe.device)
    dtype = predict.pick_precision(recipe.precision, device)

    # Data, checked before anything slow; then the model.
    train_set, val_set = (evaluation.open_set(asdict(recipe), split) for split in ("train", "val"))
    print(f"training   {train_set.check()}\nvalidation {val_set.check()}")
    class_names = train_set.classes.names if recipe.task == "seg" else ()
    model, optimizer, state = start(recipe, resume, class_names, device)
    loss_of = torch.compile(model.loss) if recipe.compile else model.loss
    print_plan(recipe, run, model, device, dtype)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    log = Log(run / "metrics.jsonl", state["step"])
    accumulate = recipe.batch // recipe.micro_batch
    batches = Timed(data.train_loader(train_set, recipe.micro_batch, recipe.seed,
                                      state["step"] * accumulate, recipe.workers))
    bar = tqdm(total=recipe.iterations, initial=state["step"], desc="train", unit="step")
    for step in range(state["step"], recipe.iterations):
        # One optimiser step at this step's learning rate.
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * group["lr_scale"] * lr_factor(step, recipe)
        losses = train_step(loss_of, optimizer, batches, recipe, step, device, dtype)
        bar.update()
        bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
        done, last = step + 1, step + 1 == recipe.iterations
        if done % recipe.log_every == 0 or last:
            log.write({"step": done, **losses, "lr": recipe.lr * lr_factor(step, recipe),
                       **batches.rates(), "peak_gb": peak_gb(device)})
        if done % recipe.eval_every == 0 or last:
            metrics = judge(recipe, model, val_set, dtype, done, state)
            log.write({"step": done, **{k: v for k, v in metrics.items() if isinstance(v, float)}})
            bar.write(f"step {done}: {evaluation.summary(metrics)}  loss {losses['loss']:.3f}")
            batches.restart()
        # Save, after the evaluation: a resumed run does not repeat it.
        if done % recipe.save_every == 0 or last:
            state["step"] = done
            checkpoint.save_last(run, model, optimizer, state)
    bar.close()
    return {"best": state["best"], "metric": evaluation.MAIN_METRIC[recipe.task][0],
            "run": str(run)}


def start(recipe: Recipe, resume: bool, class_names: tuple[str, ...], device: torch.device):
    """(model, optimiser, state): new, or where the run left off.

    state: {"step": steps done, "best": best value of the main metric or None}.
    """
    if resume:
        folder = checkpoint.find_last(Path(recipe.out))
        state = weights.read_json(folder / "state.json")
        model = checkpoint.load_model(folder).to(device)
        optimizer = build_optimizer(model, recipe)
        checkpoint.load_optimizer(folder, model, optimizer)
        print(f"resuming   {folder} at step {state['step']}")
    else:
        state = {"step": 0, "best": None}
        model = build_model(recipe, class_names).to(device)
        optimizer = build_optimizer(model, recipe)
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    return model, optimizer, state


def judge(recipe: Recipe, model: MetaPromptModel, val_set, dtype: torch.dtype, done: int,
          state: dict) -> dict:
    """Metrics on the validation set; draws pictures, keeps the best model, updates state."""
    run = Path(recipe.out)
    protocol = predict.find_protocol(recipe.task, recipe.dataset)
    metrics = evaluation.evaluate(model, val_set, protocol, dtype, workers=recipe.workers,
                                  sheet=run / "pictures" / f"step_{done:06d}.png")
    name, sign = evaluation.MAIN_METRIC[recipe.task]
    if state["best"] is None or sign * (metrics[name] - state["best"]) > 0:
        state["best"] = metrics[name]
        checkpoint.save_best(run, model)
    return metrics


class Timed:
    """Iterator over a loader that knows its rate, and how long it kept the loop waiting."""

    def __init__(self, loader):
        self.iterator = iter(loader)
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def __next__(self):
        start = time.perf_counter()
        batch = next(self.iterator)
        self.waited += time.perf_counter() - start
        self.images += len(batch["image"])
        return batch

    def rates(self) -> dict[str, float]:
        """Images per second and share of the time spent waiting for data, since the last call."""
        seconds = time.perf_counter() - self.start
        rates = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.restart()
        return rates


def print_plan(recipe: Recipe, run: Path, model: MetaPromptModel, device, dtype) -> None:
    """Say what is about to happen."""
    print("recipe     " + json.dumps(asdict(recipe)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    every = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"model      {every:.1f} M parameters, {trained:.1f} M trained; T = "
          f"{recipe.refine_steps}, N = {recipe.num_prompts}\ndevice     {device}, {dtype}, torch "
          f"{torch.__version__}\nout        {run}", flush=True)


def main() -> None:
    """Parse, train, say where the result is."""
    args = parse(sys.argv[1:], __doc__)
    recipe = resolve(args)
    if not args.resume and (Path(recipe.out) / "recipe.json").exists():
        raise InputError(f"--out {recipe.out} holds a run already: --resume {recipe.out}, or give "
                         "another folder")
    start = time.perf_counter()
    result = train(recipe, resume=bool(args.resume))
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"best {result['metric']} {result['best']:.4f} after {recipe.iterations} steps "
          f"in {minutes}:{seconds:02d}\n"
          f"wrote {result['run']}/ (best/, last/, metrics.jsonl, pictures/)")


if __name__ == "__main__":
    run_command(main)
