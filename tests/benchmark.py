"""Speed and memory, side by side with diffusers in one run: not a test, prints a table.

    python tests/benchmark.py                          SD1.5's width on the CPU, or the GPU if any
    python tests/benchmark.py --size 32 --rounds 3     smaller latents, fewer rounds
    python tests/benchmark.py --loading                time and peak memory of loading the files
    python tests/benchmark.py --oks                    COCO's evaluation against pycocotools

Ours and the peer share weights and inputs, their outputs are compared first, and they take turns
(A B A B ...), so that a machine whose speed drifts treats both alike.  A ratio below 1 means that
ours is faster.  The last line is the table as JSON.
"""
import argparse
import json
import resource
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

import test_oks  # noqa: E402
from oracles import diffusers_unet, diffusers_vae, relative_error  # noqa: E402

import oks  # noqa: E402
from unet import CHANNELS, UNet  # noqa: E402
from vae import CHANNELS as VAE_CHANNELS  # noqa: E402
from vae import VAEEncoder  # noqa: E402

N_PROMPTS = 150
LOADERS = {  # run in a process of their own; every weight is read once, so that mapping is no trick
    "ours": "from unet import UNet; from vae import VAEEncoder; import sys; "
            "models = UNet.from_pretrained(sys.argv[1]), VAEEncoder.from_pretrained(sys.argv[1])",
    "diffusers": "from diffusers import UNet2DConditionModel as U, AutoencoderKL as A; import sys; "
                 "models = (U.from_pretrained(sys.argv[1], subfolder='unet'), "
                 "A.from_pretrained(sys.argv[1], subfolder='vae'))",
}
READ_AND_REPORT = """
for model in models:
    for p in model.parameters():
        p.detach().sum()
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


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
    """(median of ours, median of the peer, median of the ratios round by round)."""
    ours(), peer()  # warm-up
    pairs = []
    for i in range(rounds):
        first, second = (ours, peer) if i % 2 == 0 else (peer, ours)
        a, b = seconds(first, device), seconds(second, device)
        pairs.append((a, b) if i % 2 == 0 else (b, a))
    mine, theirs = zip(*pairs)
    return (statistics.median(mine), statistics.median(theirs),
            statistics.median(a / b for a, b in pairs))


def forward_of(module, inputs):
    """A call without gradients."""
    def call():
        with torch.inference_mode():
            module(*inputs)
    return call


def backward_of(module, inputs):
    """A call with gradients of all parameters."""
    def call():
        module.zero_grad(set_to_none=True)
        output = module(*inputs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        output.float().square().mean().backward()
    return call


class OurNoise(torch.nn.Module):
    """Our UNet up to the predicted noise, as diffusers returns it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timesteps, context):
        features = self.unet(latents, self.unet.embed_timestep(timesteps), context)
        return self.unet.to_latents(features[0])


class PeerNoise(torch.nn.Module):
    """diffusers' UNet, output as a tensor."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timesteps, context):
        return self.unet(latents, timesteps, context, return_dict=False)[0]


class PeerMean(torch.nn.Module):
    """diffusers' encoder up to the posterior mean."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, images):
        return self.vae.encode(images).latent_dist.mean


def cases(args, device):
    """(name, ours, peer, inputs, with backward) at the asked width and size."""
    peer, ours = diffusers_unet(CHANNELS, context_dim=768), UNet()
    ours.load_state_dict(peer.state_dict())
    latents = torch.randn(args.batch, 4, args.size, args.size, device=device)
    timesteps = torch.zeros(args.batch, dtype=torch.long, device=device)
    context = torch.randn(1, N_PROMPTS, 768, device=device).expand(args.batch, -1, -1)
    inputs = (latents, timesteps, context)
    yield "UNet forward", OurNoise(ours), PeerNoise(peer), inputs, False
    yield "UNet forward+backward", OurNoise(ours), PeerNoise(peer), inputs, True
    del peer, ours
    peer, ours = diffusers_vae(VAE_CHANNELS), VAEEncoder()
    ours.load_state_dict({k: v for k, v in peer.state_dict().items()
                          if not k.startswith(("decoder.", "post_quant_conv."))})
    images = torch.rand(args.batch, 3, 8 * args.size, 8 * args.size, device=device) * 2 - 1
    yield "VAE encode", ours, PeerMean(peer), (images,), False


def compute(args, device) -> list[dict]:
    """The table's rows for every case and precision."""
    rows = []
    for name, ours, peer, inputs, backward in cases(args, device):
        if args.case not in (None, name):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            ours.to(device, dtype), peer.to(device, dtype)
            cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
            with torch.inference_mode():
                error = relative_error(ours(*cast).float(), peer(*cast).float())
            assert error < (1e-4 if dtype == torch.float32 else 0.1), f"{name}: {error}"
            wrap = backward_of if backward else forward_of
            mine, theirs, ratio = alternate(wrap(ours, cast), wrap(peer, cast), args.rounds, device)
            rows.append({"case": name, "dtype": str(dtype).removeprefix("torch."), "ours_s": mine,
                         "diffusers_s": theirs, "ratio": ratio, "error": error})
            print(f"{name:24} {rows[-1]['dtype']:9} ours {mine:7.3f} s   diffusers {theirs:7.3f} s"
                  f"   ratio {ratio:.3f}   outputs differ by {error:.0e}", flush=True)
            for module in (ours, peer):
                module.zero_grad(set_to_none=True)
    return rows


def loading(rounds: int) -> list[dict]:
    """Time and peak memory of loading SD1.5-size files, each loader in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part, model in (("unet", diffusers_unet(CHANNELS, context_dim=768)),
                            ("vae", diffusers_vae(VAE_CHANNELS))):
            model.save_pretrained(Path(folder) / part)
        del model
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors")) / 1e9
        for name, code in LOADERS.items():
            times, peaks = [], []
            for _ in range(rounds):
                start = time.perf_counter()
                out = subprocess.run([sys.executable, "-W", "ignore", "-c",
                                      code + READ_AND_REPORT, folder],
                                     cwd=ROOT, capture_output=True, text=True, check=True).stdout
                times.append(time.perf_counter() - start)
                peaks.append(int(out.split()[-1]) * 1024 / 1e9)  # of that process alone
            rows.append({"case": f"loading: {name}", "seconds": statistics.median(times),
                         "peak_gb": max(peaks), "files_gb": size})
            print(f"{name:18} {rows[-1]['seconds']:6.2f} s   peak {rows[-1]['peak_gb']:5.2f} GB   "
                  f"files {size:.2f} GB", flush=True)
    return rows


def evaluation_of_people() -> list[dict]:
    """Time of COCO's keypoint evaluation on a set of val's size, files to statistics, one run."""
    with tempfile.TemporaryDirectory() as folder:
        case = test_oks.random_case(np.random.default_rng(0), 5000, 11004, 104_125)
        truth, results = test_oks.write_files(Path(folder), *case)
        start = time.perf_counter()
        ours = oks.evaluate(json.loads(Path(truth).read_text()), oks.read_results(results))
        mine, start = time.perf_counter() - start, time.perf_counter()
        peer = test_oks.pycocotools_evaluation(truth, results).stats
        theirs = time.perf_counter() - start
    difference = max(abs(a - b) for a, b in zip(ours.values(), peer))
    print(f"COCO evaluation, 5,000 images, 104,125 people   ours {mine:.1f} s   pycocotools "
          f"{theirs:.1f} s   ratio {mine / theirs:.3f}   statistics differ by {difference:.0e}")
    return [{"case": "COCO evaluation", "ours_s": mine, "pycocotools_s": theirs,
             "ratio": mine / theirs, "error": difference}]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help="only this one, such as 'UNet forward'")
    parser.add_argument("--loading", action="store_true")
    parser.add_argument("--oks", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.oks:
        print(json.dumps({"rows": evaluation_of_people()}))
        return
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, latents "
          f"{args.batch}x4x{args.size}x{args.size}, N = {N_PROMPTS}")
    rows = loading(args.rounds) if args.loading else compute(args, torch.device(args.device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"rows": rows, "process_peak_gb": peak}))


if __name__ == "__main__":
    main()
