"""Entry point of torch.hub: a trained model in three lines, from any folder.

    import torch
    model = torch.hub.load("FOLDER", "metaprompts", "RUN", source="local")
    answer = model.predict("photo.jpg")

torch.hub puts this folder on sys.path while it loads.  The files beside this one are no package:
they are imported as `data`, `model`, ... and keep these names in the process.  One that has other
modules of these names is refused, instead of mixing the two.
"""
import importlib.util
import sys
from pathlib import Path

dependencies = ["torch", "safetensors", "huggingface_hub", "numpy", "PIL"]  # torch.hub's word
HERE = Path(__file__).resolve().parent
NAMES = ("data", "heads", "model", "ops", "sets", "tasks", "unet", "vae", "vpd", "weights")


def metaprompts(checkpoint: str, device: str = "auto", precision: str = "auto"):
    """A tasks.predictor.Predictor: predict(image), features(image); `model`, in evaluation mode.

    checkpoint: a run folder of train.py, a saved model's folder, or OWNER/NAME on the Hub.
    device: auto, cpu, cuda; precision: auto, float32, bfloat16.
    Raises ImportError, see `check_names`, and what Predictor.from_pretrained raises.
    """
    check_names()
    from tasks.predictor import Predictor
    return Predictor.from_pretrained(checkpoint, device, precision)


def check_names() -> None:
    """ImportError naming a module of this process, or one that Python finds before ours, which has
    a name of ours.
    """
    found = {name: importlib.util.find_spec(name) for name in NAMES if name not in sys.modules}
    found.update({name: getattr(module, "__spec__", None) for name, module in sys.modules.items()
                  if name.split(".")[0] in NAMES})
    for name, place in found.items():
        places = [place.origin, *(place.submodule_search_locations or ())] if place else []
        own = HERE / name.split(".")[0]                  # not in a venv/ of this folder, say
        files = {Path(text).resolve() for text in places if text}
        if not any({own, own.with_suffix(".py")} & {file, *file.parents} for file in files):
            raise ImportError(f"the module {name} of this process is {places or 'made by hand'}, "
                              f"not the one in {HERE}: load the model in a process without it, or "
                              "rename it")
