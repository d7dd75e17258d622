"""Training: one run, in execution order.

    python train.py --task seg                                       embedded scenes, small backbone
    python train.py --task seg --dataset ade20k --data PATH          the paper's recipe on SD1.5
    python train.py --task seg --dataset folder --data PATH          your own images and masks
    python train.py --task depth                                     the same scenes, metres
    python train.py --task depth --dataset nyu --data PATH --train-list FILE --val-list FILE
    python train.py --task pose                                      the same people, 17 joints
    python train.py --task pose --dataset coco --data PATH           the paper's size on SD1.5
    python train.py --task seg --dataset cityscapes --data PATH --init-from runs/seg-mapillary
    python train.py --task depth --dataset nyu --help                every setting, and its value
    python train.py --resume runs/seg-ade20k                         go on, exact to the bit
    torchrun --nproc-per-node 8 train.py ...                         many GPUs, see ops/parallel.py

Writes RUN/{recipe.json, metrics.jsonl, last/, best/, pictures/}.
"""
import json
import math
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

try:
    import resource
except ImportError:                                      # Windows
    resource = None

import torch
from huggingface_hub.utils import tqdm

import data
import eval as evaluation
from model import Config, MetaPromptModel
from ops import muon, parallel, rounding
from ops.device import (autocast, cast_weights, compiles, device_of, pick_device,
                        pick_precision)
from ops.errors import InputError, run_command
from ops.settings import leaves
from sets.ade20k import read_names
from sets.files import check_outside
from sets.nyu_kitti import SCENES
from tasks import TASKS, card, depth, methods
from tasks.captioned import CAPTIONS
from tasks.flags import read_prompts, resolve
from tasks.recipes import Recipe, backbone_of, check_model, lr_factor, read_recipe
from vae import VAEEncoder
from weights import checkpoint
from weights.checkpoint import State
from weights.runs import Log, RunFolder


def main() -> None:
    """Parse, train, say where the result is."""
    with parallel.group():
        recipe, resume = parallel.first(resolve(sys.argv[1:], __doc__))  # one name for the folder
        start = time.perf_counter()
        try:
            with RunFolder(Path(recipe.out), resume):
                result = train(recipe, resume)
        except torch.OutOfMemoryError as error:
            raise InputError(f"out of GPU memory ({str(error).splitlines()[0]}): python -m "
                             f"tools.memory --task {recipe.task} --dataset {recipe.dataset} --fit "
                             "GB says which flags fit") from None
        report(recipe, result, time.perf_counter() - start)


def train(recipe: Recipe, resume: bool) -> dict:
    """Train to the end of the recipe, or until a signal.

    Returns {"best": of the main metric, "metric": its name, "run": folder, "steps": steps done}.
    """
    run, device = Path(recipe.out), pick_device(recipe.device)
    parallel.check_device(device)
    parallel.accumulation(recipe.batch, recipe.micro_batch)  # refuses what does not divide
    dtype = pick_precision(recipe.precision, device)
    check_outside(run, getattr(recipe.files, "data", None))

    # Data, checked before anything slow; then the model.
    train_set, val_set = (data.open_set(recipe, split) for split in ("train", "val"))
    print(f"training   {train_set.check()}\nvalidation {val_set.check()}")
    if recipe.task == "depth":
        depth.check_range(val_set, recipe)
    model, optimizer, state = begin(recipe, resume, class_names(recipe, train_set), device)
    recipe = replace(recipe, model=model.config)
    print_plan(recipe, model, device, dtype)
    if parallel.rank() == 0 and not resume:
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(run / "recipe.json", asdict(recipe))

    done = state.step * parallel.accumulation(recipe.batch, recipe.micro_batch)
    batches = data.Timed(data.train_loader(train_set, recipe.micro_batch, recipe.seed, done,
                                           recipe.workers), len(train_set),
                         partial(methods.text_of, model))
    with Stop() as stop:
        state = loop(recipe, model, optimizer, state, batches, val_set, dtype, stop)
    if batches.unreadable and parallel.rank() == 0:
        checkpoint.write_text(run / "unreadable.txt",
                              "".join(f"{message}\n" for message in batches.unreadable))
        print(f"skipped    {len(batches.unreadable)} unreadable images, see {run}/unreadable.txt")
    return {"best": state.best, "metric": TASKS[recipe.task].METRIC[0], "run": str(run),
            "steps": state.step}


# ------------------------------------------------------------------------------------------------
# The start

def begin(recipe: Recipe, resume: bool, names: tuple[str, ...], device: torch.device):
    """(model, optimiser, State): new, or where the run left off; `names` of the classes."""
    if resume:
        model, optimizer, state = continued(recipe, names, device)
    else:
        state = State()
        model = build_model(recipe, names)
        model = cast_weights(model, pick_precision(recipe.weights, device)).to(device)
        optimizer = build_optimizer(model, recipe)
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    return methods.with_reader(model, recipe.backbone), optimizer, state


def continued(recipe: Recipe, names: tuple[str, ...], device: torch.device):
    """(model, optimiser, State) of the newest checkpoint that can be read; says if one can't.

    InputError if it does not fit the recipe or the data set.
    """
    folders = checkpoint.find_last(Path(recipe.out))
    for folder in folders:
        try:
            state = checkpoint.read_state(folder)
            model = checkpoint.own_memory(methods.load(folder)).train()
            model = cast_weights(model, pick_precision(recipe.weights, device)).to(device)
            optimizer = build_optimizer(model, recipe)
            checkpoint.load_optimizer(folder, model, optimizer, state.step)
            edited = edits(recipe, folder / "recipe.json")
        except InputError as error:
            if folder == folders[-1]:
                raise
            print(f"unreadable {error}; taking {folders[-1]}")
            continue
        check_model(recipe, Path(recipe.out) / "recipe.json", model.config, folder)
        if names != model.config.class_names:
            raise InputError(f"{recipe.out} was trained on the classes {model.config.class_names}, "
                             f"the data set now has {names}")
        metric, sign = TASKS[recipe.task].METRIC
        low, high = (-1, 1) if sign > 0 else (0, math.inf)  # -1: nobody was annotated
        if state.step > recipe.iterations or not low <= (state.best or 0) <= high:
            raise InputError(f"{folder}/state.json: step {state.step} of {recipe.iterations}, best "
                             f"{metric} {state.best}: no run gets there")
        print(f"resuming   {folder} at step {state.step}{edited}")
        return model, optimizer, state


def edits(recipe: Recipe, path: Path) -> str:
    """What differs from the recipe of a checkpoint, in words; older checkpoints hold none."""
    before, now = leaves(read_recipe(path)) if path.is_file() else {}, leaves(recipe)
    found = [f"{name[-1]} {before[name]} is now {now[name]}" for name in now
             if name in before and before[name] != now[name] and name[-1] != "out"]
    return f"; recipe.json was edited since: {', '.join(found)}" if found else ""


def class_names(recipe: Recipe, train_set) -> tuple[str, ...]:
    """Names of a segmentation set's classes, of scene types for VPD's depth, () for other tasks."""
    if recipe.method == "vpd" and recipe.task == "depth":
        return read_names(Path(recipe.scene_types)) if recipe.scene_types else SCENES
    return train_set.classes.names if hasattr(train_set, "classes") else ()


def build_model(recipe: Recipe, names: tuple[str, ...]) -> MetaPromptModel:
    """A new model: on pretrained weights, on another run's, or from random ones."""
    torch.manual_seed(recipe.seed)
    if recipe.method == "vpd":
        prompts = recipe.prompts and read_prompts(Path(recipe.prompts),
                                                  recipe.model.unet.context_dim)
        print(f"backbone   {backbone_of(recipe)}; VPD")
        return methods.new_vpd(recipe.model, names, recipe.backbone, prompts,
                               recipe.unet).train()
    config = replace(recipe.model, num_classes=len(names), class_names=names)
    if recipe.init_from:
        model = second_stage(recipe, config)
    elif recipe.init == "random":
        print("backbone   RANDOM weights: the VAE encoder is trained, too")
        model = MetaPromptModel(config)
    elif recipe.init == "random-unet":
        encoder = VAEEncoder.from_pretrained(recipe.backbone)
        unet = replace(config.unet, latent_channels=encoder.config.latent_channels)
        model = MetaPromptModel(replace(config, unet=unet, vae=encoder.config), encoder)
        print(f"backbone   RANDOM UNet; VAE encoder of {recipe.backbone}, frozen")
    else:
        model = methods.kind_of(config).from_stable_diffusion(config, recipe.backbone,
                                                              recipe.unet)
        print(f"backbone   {backbone_of(recipe)}")
    if recipe.prompts not in (None, CAPTIONS):
        prompts = read_prompts(Path(recipe.prompts), model.config.unet.context_dim)
        model.prompts.data.copy_(prompts)                # (N, D) -> (1 or T, N, D)
        print(f"prompts    {recipe.prompts}: fixed, {'an' if config.prompt_adapter else 'no'} "
              "adapter is trained")
    return model.train()


MAY_DIFFER = ("num_classes", "class_names", "refine_steps", "dropout", "max_depth", "resize_scale",
              "sigma")  # between two stages


def second_stage(recipe: Recipe, config: Config) -> MetaPromptModel:
    """A model of `config` with the weights of RUN/best, else RUN/last, else RUN of --init-from RUN;
    says what is new.

    Other numbers of classes and of passes are possible, see checkpoint.adapt.  InputError if
    anything else that the weights depend on differs.
    """
    folder = evaluation.find_checkpoint(recipe.init_from, "--init-from")
    theirs = methods.read_config(folder / "config.json")
    if recipe.init == "pretrained":                      # its widths were not asked for
        config = replace(config, unet=theirs.unet, vae=theirs.vae)
    before = asdict(theirs)
    differing = [f"{name} {before[name]} (here {value})" for name, value in asdict(config).items()
                 if name not in MAY_DIFFER and before[name] != value]
    if differing:
        raise InputError(f"--init-from {folder} has {', '.join(differing)}: only "
                         f"{', '.join(MAY_DIFFER)} may differ; give the same flags as there")
    source, model = MetaPromptModel.from_pretrained(folder), MetaPromptModel(config)
    print(f"backbone   and all other weights: those of {folder}")
    model.load_state_dict(checkpoint.adapt(source, model))
    return model


def build_optimizer(model: MetaPromptModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the model's groups; fused, which is faster and rounds the same on every call.

    With recipe.muon_lr the weights of its layers take Muon's steps instead (ops/muon.py).
    """
    groups = model.param_groups(recipe.lr, recipe.unet_lr_mult, recipe.weight_decay)
    if recipe.muon_lr > 0:
        groups = muon.split(groups, model, recipe.lr, recipe.muon_lr)
        return muon.Muon(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)
    return rounding.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)


def print_plan(recipe: Recipe, model: MetaPromptModel, device, dtype) -> None:
    """Say what is about to happen."""
    print("recipe     " + json.dumps(asdict(recipe)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    every = sum(p.numel() for p in model.parameters()) / 1e6
    devices = f"{parallel.world()} x {device}" if parallel.world() > 1 else device
    asked = "VPD" if recipe.method == "vpd" else \
        f"T = {recipe.model.refine_steps}, N = {recipe.model.num_prompts}"
    how = "compiled, " if compiles(recipe.compile, device, recipe.iterations) else ""
    print(f"model      {every:.1f} M parameters, {trained:.1f} M trained; {asked}\n"
          f"device     {devices}, {dtype}, {how}torch {torch.__version__}\nout        {recipe.out}",
          flush=True)


# ------------------------------------------------------------------------------------------------
# The loop

def loop(recipe: Recipe, model: MetaPromptModel, optimizer, state: State, batches, val_set,
         dtype: torch.dtype, stop) -> State:
    """The steps from state.step on, each in the order that it happens in."""
    run, device = Path(recipe.out), device_of(model)
    if compiles(recipe.compile, device, recipe.iterations):
        methods.compile_parts(model)
    loss_of = parallel.distribute(model)
    log = Log(run / "metrics.jsonl", state.step)
    if state.step and due(state.step, recipe.eval_every, recipe) and state.evaluated < state.step:
        state = validate(recipe, model, val_set, dtype, state, log)  # it was killed before that
    bar = tqdm(total=recipe.iterations, initial=state.step, desc="train", unit="step",
               disable=parallel.rank() > 0,
               leave=None)                               # not left behind below an ablation's bar
    for step in range(state.step, recipe.iterations):
        # One optimiser step at this step's learning rate.
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * group["lr_scale"] * lr_factor(step, recipe)
        losses = train_step(loss_of, optimizer, batches, recipe, step, device, dtype)
        state = replace(state, step=step + 1)
        bar.update()
        bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
        if due(state.step, recipe.log_every, recipe):
            log.write({"step": state.step, **losses, "lr": recipe.lr * lr_factor(step, recipe),
                       **batches.rates(), "peak_gb": peak_gb(device)})
        # Save before validating: whatever goes wrong there, the steps are not lost.
        stopping = parallel.anyone(stop.asked)
        validating = due(state.step, recipe.eval_every, recipe)
        if due(state.step, recipe.save_every, recipe) or stopping or validating:
            if parallel.rank() == 0:
                checkpoint.save_last(run, model, optimizer, state, asdict(recipe))
        if stopping:
            break
        if validating:
            state = validate(recipe, model, val_set, dtype, state, log)
            batches.restart()
    bar.close()
    return state


def due(step: int, every: int, recipe: Recipe) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens now."""
    return step % every == 0 or step == recipe.iterations


def train_step(loss_of, optimizer, batches, recipe: Recipe, step: int, device, dtype) -> dict:
    """One optimiser step from `recipe.batch` images; returns its mean losses over all processes.

    Raises FloatingPointError with the images' names if a loss or the gradient is not finite; the
    weights are then still those of the step before.
    """
    # Dropout: a function of step and process alone.
    torch.manual_seed((recipe.seed + 1009 * parallel.rank()) * 1_000_003 + step)
    accumulate, means, names = parallel.accumulation(recipe.batch, recipe.micro_batch), {}, []
    for i in range(accumulate):
        batch = next(batches)
        names += batch["name"]
        images = batch["image"].to(device, non_blocking=True)
        target = batch["target"].to(device, non_blocking=True)
        text = batch.get("text")                         # VPD's
        with parallel.exchange_gradients(loss_of, now=i == accumulate - 1):
            with autocast(device, dtype):
                losses = loss_of(images, target, *([] if text is None else [text]))
            values = parallel.mean({name: value.item() for name, value in losses.items()})
            require_finite(sum(values.values()), "loss", step, batch["name"], optimizer)
            (sum(losses.values()) / accumulate).backward()
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + value / accumulate
    norm = torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]],
        recipe.clip or math.inf)                         # infinity: the norm only
    require_finite(norm.item(), "gradient's norm", step, names, optimizer)
    torch.manual_seed(~(recipe.seed * 1_000_003 + step))  # rounding: the same in all processes
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": sum(means.values()), **means}


def require_finite(value: float, what: str, step: int, names: list[str], optimizer) -> None:
    """FloatingPointError that names the images of all processes, unless `value` is finite."""
    if not math.isfinite(value):
        optimizer.zero_grad()
        raise FloatingPointError(f"the {what} is {value} at step {step}; the images: "
                                 f"{', '.join(sum(parallel.gather(names), []))}")


def validate(recipe: Recipe, model: MetaPromptModel, val_set, dtype: torch.dtype, state: State,
             log: Log) -> State:
    """Metrics on the validation set, logged; pictures; keeps the best model."""
    run, task = Path(recipe.out), TASKS[recipe.task]
    sheet = run / "pictures" / f"step_{state.step:06d}.png" if parallel.rank() == 0 else None
    model.eval()
    with torch.compiler.set_stance("force_eager"):       # images have many sizes: a graph for each
        metrics = task.evaluate(model, val_set, recipe.protocol, dtype, workers=recipe.workers,
                                sheet=sheet)
    model.train()
    log.write({"step": state.step, **{k: v for k, v in metrics.items() if isinstance(v, float)}})
    tqdm.write(f"step {state.step}: {evaluation.summary(metrics)}")
    name, sign = task.METRIC
    if state.best is None or sign * (metrics[name] - state.best) > 0:
        state = replace(state, best=metrics[name] if math.isfinite(metrics[name]) else None)
        if parallel.rank() == 0:
            checkpoint.save_best(run, model, card.model_card(recipe, metrics, state.step),
                                 asdict(card.shareable(recipe)))
    state = replace(state, evaluated=state.step)
    if parallel.rank() == 0:
        checkpoint.write_json(run / "last" / "state.json", vars(state))
    return state


def peak_gb(device: torch.device) -> float:
    """Peak memory so far in GB: the GPU's, or this process's; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Stop:
    """SIGTERM and SIGINT (Ctrl-C) ask training to end after this step; a second one ends it now."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask)
                       for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame) -> None:
        """Handle a signal."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping   after this step (again: at once, without saving)")

    def __exit__(self, *error) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# The end

def report(recipe: Recipe, result: dict, seconds: float) -> None:
    """Say where the result of `train` is, or how to go on."""
    if result["steps"] < recipe.iterations or result["best"] is None:
        print(f"stopped after {result['steps']} of {recipe.iterations} steps; go on with\n"
              f"python train.py --resume {result['run']}")
        return
    minutes, seconds = divmod(round(seconds), 60)
    print(f"best {result['metric']} {result['best']:.4f} after {recipe.iterations} steps "
          f"in {minutes}:{seconds:02d}\n"
          f"wrote {result['run']}/ (best/, last/, metrics.jsonl, pictures/)")


if __name__ == "__main__":
    run_command(main)
