"""Training: the recipe of each data set, and the loop, in execution order.

    python train.py --task seg                                       embedded scenes, tiny backbone
    python train.py --task seg --dataset ade20k --data PATH          the paper's recipe on SD1.5
    python train.py --task seg --dataset folder --data PATH          your own images and masks
    python train.py --task depth                                     the same scenes, metres
    python train.py --task depth --dataset nyu --data PATH --train-list FILE --val-list FILE
    python train.py --task pose                                      the same people, 17 joints
    python train.py --task pose --dataset coco --data PATH           the paper's size on SD1.5
    python train.py --task seg --dataset cityscapes --data PATH --init-from runs/seg-mapillary
    python train.py --task seg --ablate                              the paper's Table 5 (ablate.py)
    python train.py --resume runs/seg-ade20k                         go on, exact to the bit
    torchrun --nproc-per-node 8 train.py ...                         many GPUs, see parallel.py

Every field of Recipe (recipes.py) is a flag.
Writes RUN/{recipe.json, metrics.jsonl, last/, best/, pictures/}.
"""
import json
import math
import resource
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from tools import ablate
from weights import checkpoint
import data
import eval as evaluation
from tools import memory
from ops import muon
from ops import parallel
import predict
from weights import files as weights
from ops.errors import InputError, run_command
from ops.settings import leaves
from model import Config, MetaPromptModel, read_config
from tasks.recipes import Recipe, lr_factor, parse, read_prompts, resolve
from unet import UNetConfig
from vae import VAEConfig


# ------------------------------------------------------------------------------------------------
# Pieces of the loop

def model_config(recipe: Recipe, class_names: tuple[str, ...]) -> Config:
    """What the recipe says about the model."""
    return Config(
        task=recipe.task, num_prompts=recipe.num_prompts, refine_steps=recipe.refine_steps,
        shared_prompts=recipe.shared_prompts, prompt_adapter=recipe.prompt_adapter,
        fixed_prompts=recipe.prompts is not None, modulated_timestep=recipe.modulated_timestep,
        rearrange=recipe.rearrange, latent_scale=recipe.latent_scale,
        num_classes=len(class_names), class_names=class_names,
        head_channels=recipe.head_channels, max_depth=recipe.max_depth,
        resize_scale=recipe.resize_scale, deconv_channels=recipe.deconv_channels,
        sigma=recipe.sigma, dropout=recipe.dropout,
        train_encoder=recipe.backbone == "tiny" or recipe.init == "random",
        unet=UNetConfig(recipe.unet_channels, recipe.unet_layers, recipe.num_heads,
                        recipe.context_dim, recipe.latent_channels, recipe.norm_groups),
        vae=VAEConfig(recipe.vae_channels, recipe.vae_layers, recipe.latent_channels,
                      recipe.norm_groups))


def build_model(recipe: Recipe, class_names: tuple[str, ...]) -> MetaPromptModel:
    """A new model: on pretrained weights, on another run's, or from random ones (whose encoder is
    trained, too).
    """
    config = model_config(recipe, class_names)
    torch.manual_seed(recipe.seed)
    if recipe.init_from:
        model = second_stage(config, recipe.init_from)
    elif config.train_encoder:
        print("backbone   RANDOM weights (no Stable Diffusion): the VAE encoder is trained, too")
        model = MetaPromptModel(config)
    else:
        model = MetaPromptModel.from_stable_diffusion(config, recipe.backbone)
        print(f"backbone   {recipe.backbone}: pretrained, VAE encoder frozen")
    if recipe.prompts:
        prompts = read_prompts(Path(recipe.prompts), model.config.unet.context_dim)
        model.prompts.data.copy_(prompts)                # (N, D) -> (1 or T, N, D)
        print(f"prompts    {recipe.prompts}: fixed, {'an' if recipe.prompt_adapter else 'no'} "
              "adapter is trained")
    return model.train()


MAY_DIFFER = ("num_classes", "class_names", "refine_steps", "dropout", "max_depth", "resize_scale",
              "sigma")  # between two stages


def second_stage(config: Config, run: str) -> MetaPromptModel:
    """A model of `config` with the weights of RUN/best, else RUN/last, else RUN; says what is new.

    Other numbers of classes and of passes are possible, see `adapt`.  InputError if anything else
    that the weights depend on differs.
    """
    folder = evaluation.find_checkpoint(run, "--init-from")
    theirs = read_config(folder / "config.json")
    if not config.train_encoder:                         # a pretrained backbone's sizes: the files'
        config = replace(config, unet=theirs.unet, vae=theirs.vae)
    there = leaves(theirs)
    differing = [f"{'.'.join(path)} {there[path]} (here {value})"
                 for path, value in leaves(config).items()
                 if path[0] not in MAY_DIFFER and there[path] != value]
    if differing:
        raise InputError(f"--init-from {folder} has {', '.join(differing)}: only "
                         f"{', '.join(MAY_DIFFER)} may differ; give the same flags as there")
    source, model = MetaPromptModel.from_pretrained(folder), MetaPromptModel(config)
    print(f"backbone   and all other weights: those of {folder}")
    model.load_state_dict(adapt(source, model))
    return model


def adapt(source: MetaPromptModel, model: MetaPromptModel) -> dict[str, torch.Tensor]:
    """Tensors of `source` for `model`; whatever does not fit is new, as `model` has it: the
    classifier if the number of classes differs, the rows of temb, prompts and the adapters of
    passes that `source` has not.
    """
    old, new = source.state_dict(), model.state_dict()
    theirs, ours = source.config, model.config
    tensors = {name: old.get(name, value) for name, value in new.items()}
    if theirs.num_classes != ours.num_classes:
        layers = [name for name in new if ".conv_seg." in name]
        tensors.update({name: new[name] for name in layers})
        print(f"classes    {theirs.num_classes} there, {ours.num_classes} here: new random values "
              f"for {', '.join(layers)}")
    elif theirs.class_names != ours.class_names:
        print("classes    as many, but other names: the classifier is taken over as it is")
    if theirs.refine_steps != ours.refine_steps:
        rows = [n for n in ("temb", "prompts") if n in new and len(new[n]) != len(old[n])]
        for name in rows:                                # adapters come and go by their names
            tensors[name] = torch.cat([old[name][:len(new[name])], new[name][len(old[name]):]])
        kept = min(theirs.refine_steps, ours.refine_steps)
        print(f"passes     {theirs.refine_steps} there, {ours.refine_steps} here: first {kept} of "
              f"{', '.join(rows) or 'nothing'}" + ("; the later ones are new random values"
                                                   if ours.refine_steps > kept else ""))
    return tensors


def build_optimizer(model: MetaPromptModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the model's groups; fused, which is faster and rounds the same on every call.

    With recipe.muon_lr the weights of its layers take Muon's steps instead (muon.py).
    """
    groups = model.param_groups(recipe.lr, recipe.unet_lr_mult, recipe.weight_decay)
    if recipe.muon_lr > 0:
        groups = muon.split(groups, model, recipe.lr, recipe.muon_lr)
        return muon.Muon(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999), fused=True)


def train_step(loss_of, optimizer, batches, recipe: Recipe, step: int, device, dtype) -> dict:
    """One optimiser step from `recipe.batch` images; returns its mean losses over all processes.

    Raises FloatingPointError with the images' names if a loss is not finite; the weights are then
    still those of the step before.
    """
    # Dropout: a function of step and process alone.
    torch.manual_seed((recipe.seed + 1009 * parallel.rank()) * 1_000_003 + step)
    accumulate, means = parallel.accumulation(recipe.batch, recipe.micro_batch), {}
    for i in range(accumulate):
        batch = next(batches)
        images = batch["image"].to(device, non_blocking=True)
        target = batch["target"].to(device, non_blocking=True)
        with parallel.exchange_gradients(loss_of, now=i == accumulate - 1):
            with predict.autocast(device, dtype):
                losses = loss_of(images, target)
            values = parallel.mean({name: value.item() for name, value in losses.items()})
            if not math.isfinite(sum(values.values())):
                optimizer.zero_grad()
                names = sum(parallel.gather(batch["name"]), [])
                raise FloatingPointError(f"the loss is {sum(values.values())} at step {step}; the "
                                         f"images: {', '.join(names)}")
            (sum(losses.values()) / accumulate).backward()
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + value / accumulate
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
    """metrics.jsonl: one line per record; on resuming, records after the checkpoint are dropped.

    The first of several processes writes it.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if parallel.rank() > 0:
            return
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))

    def write(self, record: dict) -> None:
        """Append a record."""
        if parallel.rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------
# The loop

def train(recipe: Recipe, resume: bool) -> dict:
    """Train to the end of the recipe, or until a signal.

    Returns {"best": of the main metric, "metric": its name, "run": folder, "steps": steps done}.
    """
    run = Path(recipe.out)
    device = predict.pick_device(recipe.device)
    parallel.check_device(device)
    parallel.accumulation(recipe.batch, recipe.micro_batch)  # refuses what does not divide
    dtype = predict.pick_precision(recipe.precision, device)

    # Data, checked before anything slow; then the model.
    train_set, val_set = (evaluation.open_set(asdict(recipe), split) for split in ("train", "val"))
    print(f"training   {train_set.check()}\nvalidation {val_set.check()}")
    class_names = train_set.classes.names if recipe.task == "seg" else ()
    model, optimizer, state = begin(recipe, resume, class_names, device)
    recipe = with_memory(recipe, resume, model, train_set, device, dtype)
    print_plan(recipe, run, model, device, dtype)
    if parallel.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    done = state["step"] * parallel.accumulation(recipe.batch, recipe.micro_batch)
    batches = Timed(data.train_loader(train_set, recipe.micro_batch, recipe.seed, done,
                                      recipe.workers), len(train_set))
    with Stop() as stop:
        loop(recipe, model, optimizer, state, batches, val_set, dtype, stop)
    if batches.unreadable and parallel.rank() == 0:
        (run / "unreadable.txt").write_text("".join(f"{m}\n" for m in batches.unreadable))
        print(f"skipped    {len(batches.unreadable)} unreadable images, see {run}/unreadable.txt")
    return {"best": state["best"], "metric": evaluation.MAIN_METRIC[recipe.task][0],
            "run": str(run), "steps": state["step"]}


def loop(recipe: Recipe, model: MetaPromptModel, optimizer, state: dict, batches, val_set,
         dtype: torch.dtype, stop) -> None:
    """The steps from state["step"] on, each in the order that it happens in."""
    run, device = Path(recipe.out), next(model.parameters()).device
    loss_of = parallel.distribute(model)
    loss_of = torch.compile(loss_of) if recipe.compile else loss_of
    log = Log(run / "metrics.jsonl", state["step"])
    bar = tqdm(total=recipe.iterations, initial=state["step"], desc="train", unit="step",
               disable=parallel.rank() > 0,
               leave=None)                               # not left behind below an ablation's bar
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
        stopping = parallel.anyone(stop.asked)
        if done % recipe.save_every == 0 or last or stopping:
            state["step"] = done
            if parallel.rank() == 0:
                checkpoint.save_last(run, model, optimizer, state)
        if stopping:
            break
    bar.close()


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
        """Give the signals back to who had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def begin(recipe: Recipe, resume: bool, class_names: tuple[str, ...], device: torch.device):
    """(model, optimiser, state): new, or where the run left off.

    state: {"step": steps done, "best": best value of the main metric or None}.
    """
    if resume:
        folder = checkpoint.find_last(Path(recipe.out))
        state = weights.read_json(folder / "state.json")
        model = checkpoint.own_memory(MetaPromptModel.from_pretrained(folder)).train().to(device)
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
    sheet = run / "pictures" / f"step_{done:06d}.png" if parallel.rank() == 0 else None
    metrics = evaluation.evaluate(model, val_set, protocol, dtype, workers=recipe.workers,
                                  sheet=sheet)
    name, sign = evaluation.MAIN_METRIC[recipe.task]
    if state["best"] is None or sign * (metrics[name] - state["best"]) > 0:
        state["best"] = metrics[name]
        card = checkpoint.model_card(asdict(recipe), metrics, done)
        if parallel.rank() == 0:
            checkpoint.save_best(run, model, card)
    return metrics


class Timed:
    """Iterator over a loader that knows its rate, how long it kept the loop waiting, and which of
    the set's `length` images could not be read: rates and images are those of all processes.
    """

    def __init__(self, loader, length: int):
        self.iterator, self.length, self.unreadable = iter(loader), length, {}
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def __next__(self):
        start = time.perf_counter()
        batch = next(self.iterator)
        self.waited += time.perf_counter() - start
        self.images += len(batch["image"]) * parallel.world()
        for message in filter(None, sum(parallel.gather(batch["unreadable"]), [])):
            self.skip(message)
        return batch

    def skip(self, message: str) -> None:
        """Note an unreadable image; InputError when they are more than 1 % of the set."""
        if message not in self.unreadable:
            self.unreadable[message] = True              # a set that keeps its order
            tqdm.write(f"skipped    {message}")
        if len(self.unreadable) > 0.01 * self.length:
            raise InputError(f"{len(self.unreadable)} of {self.length} training images cannot be "
                             f"read, more than 1 %; the last: {message}")

    def rates(self) -> dict[str, float]:
        """Images per second and share of the time spent waiting for data, since the last call."""
        seconds = time.perf_counter() - self.start
        rates = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.restart()
        return rates


def with_memory(recipe: Recipe, resume: bool, model: MetaPromptModel, train_set, device,
                dtype) -> Recipe:
    """The recipe with the micro-batch that --memory allows; says what a big model's step needs."""
    setting = (model.config, lambda: data.Tolerant(train_set)[0, 0]["image"].shape,
               lambda model: build_optimizer(model, recipe), device, dtype)
    if recipe.memory and not resume:                     # a resumed run keeps its micro-batch
        return memory.fit(recipe, *setting)
    if sum(p.numel() for p in model.parameters()) > 1e8 and parallel.world() == 1:
        memory.tell(recipe, *setting)
    return recipe


def print_plan(recipe: Recipe, run: Path, model: MetaPromptModel, device, dtype) -> None:
    """Say what is about to happen."""
    print("recipe     " + json.dumps(asdict(recipe)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    every = sum(p.numel() for p in model.parameters()) / 1e6
    devices = f"{parallel.world()} x {device}" if parallel.world() > 1 else device
    print(f"model      {every:.1f} M parameters, {trained:.1f} M trained; T = "
          f"{recipe.refine_steps}, N = {recipe.num_prompts}\ndevice     {devices}, {dtype}, torch "
          f"{torch.__version__}\nout        {run}", flush=True)


def main() -> None:
    """Parse, train, say where the result is."""
    args = parse(sys.argv[1:], __doc__)
    with parallel.group():
        recipe = parallel.first(resolve(args))           # one name for the run's folder
        if args.ablate and parallel.world() > 1:
            raise InputError("--ablate: without torchrun, its runs are small")
        if args.ablate:
            ablate.ablate(recipe, args.ablate_seeds, args.ablate_variants, train)
            return
        if parallel.anyone(not args.resume and (Path(recipe.out) / "recipe.json").exists()):
            raise InputError(f"--out {recipe.out} holds a run already: --resume {recipe.out}, or "
                             "give another folder")
        start = time.perf_counter()
        result = train(recipe, resume=bool(args.resume))
        report(recipe, result, time.perf_counter() - start)


def report(recipe: Recipe, result: dict, seconds: float) -> None:
    """Say where the result of `train` is, or how to go on."""
    if result["steps"] < recipe.iterations:
        print(f"stopped after {result['steps']} of {recipe.iterations} steps; go on with\n"
              f"python train.py --resume {result['run']}")
        return
    minutes, seconds = divmod(round(seconds), 60)
    print(f"best {result['metric']} {result['best']:.4f} after {recipe.iterations} steps "
          f"in {minutes}:{seconds:02d}\n"
          f"wrote {result['run']}/ (best/, last/, metrics.jsonl, pictures/)")


if __name__ == "__main__":
    run_command(main)
