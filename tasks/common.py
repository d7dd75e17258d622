"""What the tasks share: a set's batches in order, the size of the user's own pictures."""
import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from data import eval_loader
from heads import resize
from ops import parallel
from ops.draw import fit
from ops.errors import InputError
from sets.files import UNREADABLE_SHARE

PICTURES = 8  # images of the set drawn in a report, evenly spread
SMALLEST = 64  # sides below are enlarged: the UNet's coarsest stride


def batches(dataset, batch: int, workers: int, device: torch.device):
    """This process's share of the set in order, with a progress bar: (samples, images, target,
    positions of those to draw).

    A batch has one size; smaller images than the model's smallest are enlarged, targets are not.
    Files that cannot be read are skipped and reported; InputError if they are more than 1 %.
    """
    chosen, skipped = {len(dataset) * i // PICTURES for i in range(PICTURES)}, []
    loader = eval_loader(dataset, batch, workers)
    with tqdm(total=sum(map(len, loader.batch_sampler)), desc="evaluate", unit="image",
              leave=False, disable=parallel.rank() > 0) as bar:
        for number, (groups, messages) in enumerate(loader):
            for message in messages:
                skipped.append(message)
                tqdm.write(f"skipped    {message}")
            if len(skipped) > UNREADABLE_SHARE * len(dataset):
                raise InputError(f"{len(skipped)} of {len(dataset)} images to validate on cannot "
                                 f"be read, more than 1 %; the last: {skipped[-1]}")
            first = batch * (number * parallel.world() + parallel.rank())
            for samples in groups:
                images = samples["image"].to(device, non_blocking=True)
                drawn = [i for i in range(len(images)) if first + i in chosen]
                first += len(images)
                yield samples, enlarged(images), samples["target"].to(device), drawn
            bar.update(len(messages) + sum(len(samples["image"]) for samples in groups))
    if skipped:
        tqdm.write(f"skipped    {len(skipped)} unreadable images: the metrics are of the others")


def merged(parts: list[list]) -> list:
    """Items of the whole set in order, from lists for each batch of this process."""
    return [item for part in parallel.in_order(parts) for item in part]


def enlarged(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) with no side below 64 pixels."""
    size = [max(side, SMALLEST) for side in images.shape[-2:]]
    return images if size == [*images.shape[-2:]] else resize(images, size)


def bounded(image: np.ndarray, max_side: int) -> np.ndarray:
    """An image (H, W, 3) uint8 reduced to a longer side of `max_side`, no side below 64 pixels.

    Its aspect is kept unless it is too long for both.
    """
    sides = image.shape[:2]
    factor = max(min(1.0, max_side / max(sides)), SMALLEST / min(sides))
    return fit(image, *(min(max(round(side * factor), SMALLEST), max_side) for side in sides))
