"""What a sample is, which data sets there are, and in which order samples come.

    seg     ade20k      sets/ade20k.py       depth   nyu, kitti   sets/nyu_kitti.py
            cityscapes, cityscapes-extra,            folder       your own images and depth maps
            mapillary   sets/cityscapes.py           shapes       sets/embedded.py
            folder      your own, ade20k.py  pose    coco         sets/coco.py
            shapes      sets/embedded.py             folder       your own people, coco.py
    refer   refcoco, refcoco+, refcocog,             shapes       sets/embedded.py
            folder      sets/refcoco.py
            shapes      sets/embedded.py

A sample is a dict: "image" (3, H, W) float32 RGB in [0, 1]; "target"; "name".  The target is
    seg     (H, W) int64 labels, 255 = ignore
    depth   (H, W) float32 metres, 0 = unknown
    pose    (17, 3) float32, see sets/coco.py: the image is one person's crop
    refer   (H, W) int64, 1 on the object that "sentence" means, else 0
In evaluation the image is at the protocol's scale, labels and depth at their own size.

Every random draw for a training sample comes from (seed, epoch, index): the sample does not depend
on which worker makes it or when, which makes an interrupted run resumable to the bit.
"""
import signal
import time
from itertools import groupby

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ops import parallel
from ops.errors import InputError
from sets.files import UNREADABLE_SHARE, Cut

STAND_INS = 8  # samples tried in place of an unreadable one


def open_set(recipe, split: str) -> Dataset:
    """The data set of a recipe (tasks/recipes.py), for "train" or "val".

    Besides samples it has check(), which opens some files and returns a summary.  Raises InputError
    if files are missing or broken.
    """
    crop = (recipe.crop, recipe.crop_width or recipe.crop)
    return recipe.files.open(Cut(split, crop, getattr(recipe.protocol, "scale", None), recipe.seed,
                                 getattr(recipe.model, "caption_prompts", False)))


class Stream(Sampler):
    """Endless micro-batches of (epoch, index): shuffled epochs laid end to end, from `start` on.

    `part` = (r, W): of each group of W * batch keys, which `start` counts, the r-th batch.
    DEVIATION: a batch may span two epochs; mmsegmentation drops an epoch's last partial batch.
    """

    def __init__(self, length: int, batch: int, seed: int, start: int = 0,
                 part: tuple[int, int] = (0, 1)):
        self.length, self.batch, self.seed, self.start = length, batch, seed, start
        self.part = part

    def order(self, epoch: int) -> np.ndarray:
        """Permutation of the indices in `epoch`: a function of (seed, epoch) alone."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def __iter__(self):
        number, parts = self.part
        together = self.batch * parts
        epoch, position = divmod(self.start * together, self.length)
        keys = []
        while True:
            for index in self.order(epoch)[position:].tolist():
                keys.append((epoch, index))
                if len(keys) == together:
                    yield keys[number * self.batch:][:self.batch]
                    keys = []
            epoch, position = epoch + 1, 0


class Tolerant(Dataset):
    """A training set in which the next sample stands in for one whose file cannot be read.

    "unreadable" of a sample says why it was needed, "" if it was not; train.py counts.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample of key = (epoch, index); InputError if `STAND_INS` in a row are unreadable."""
        epoch, index = key
        message = ""
        for place in range(index, index + STAND_INS):
            try:
                sample = self.dataset[epoch, place % len(self.dataset)]
                return {**sample, "unreadable": message}
            except InputError as error:
                message = message or str(error)
        raise InputError(message)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the main one, which saves, minds it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train_loader(dataset: Dataset, batch: int, seed: int, start: int, workers: int) -> DataLoader:
    """This process's micro-batches from number `start` on, without end."""
    stream = Stream(len(dataset), batch, seed, start, (parallel.rank(), parallel.world()))
    return DataLoader(Tolerant(dataset), worker_init_fn=ignore_interrupts,
                      batch_sampler=stream, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None)


class Timed:
    """Iterator over a loader that knows its rate, how long it kept the loop waiting, and which of
    the set's `length` images could not be read: rates and images are those of all processes.

    A batch has "text", what the model reads beside the images, or None.
    """

    def __init__(self, loader, length: int, text_of):
        self.iterator, self.length, self.text_of = iter(loader), length, text_of
        self.unreadable = {}
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
        return {**batch, "text": self.text_of(batch)}

    def skip(self, message: str) -> None:
        """Note an unreadable image; InputError when they are more than 1 % of the set."""
        if message not in self.unreadable:
            self.unreadable[message] = True              # a set that keeps its order
            tqdm.write(f"skipped    {message}")
        if len(self.unreadable) > UNREADABLE_SHARE * self.length:
            raise InputError(f"{len(self.unreadable)} of {self.length} training images cannot be "
                             f"read, more than 1 %; the last: {message}")

    def rates(self) -> dict[str, float]:
        """Images per second and share of the time spent waiting for data, since the last call."""
        seconds = time.perf_counter() - self.start
        rates = {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.restart()
        return rates


class Counted(Dataset):
    """A validation set in which a file that cannot be read becomes its message."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict | str:
        """Sample of key = (epoch, index), or why there is none."""
        try:
            return self.dataset[key]
        except InputError as error:
            return str(error)


def collate_readable(items: list) -> tuple[list[dict], list[str]]:
    """(batches of neighbours of one size; messages of those that could not be read)."""
    samples = [item for item in items if not isinstance(item, str)]
    groups = groupby(samples, lambda sample: (sample["image"].shape, sample["target"].shape))
    return ([default_collate(list(group)) for _, group in groups],
            [item for item in items if isinstance(item, str)])


def eval_loader(dataset: Dataset, batch: int, workers: int) -> DataLoader:
    """The whole set once, in order, `batch` images at a time, as `collate_readable` gives them.

    Of several processes, the r-th of W has batches r, r + W, r + 2W, ...
    """
    keys = [(0, index) for index in range(len(dataset))]
    batches = [keys[i:i + batch] for i in range(0, len(keys), batch)]
    batches = batches[parallel.rank()::parallel.world()]
    return DataLoader(Counted(dataset), batch_sampler=batches, num_workers=workers,
                      collate_fn=collate_readable, pin_memory=torch.cuda.is_available())
