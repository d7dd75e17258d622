"""Street scenes in Cityscapes' 19 classes: Cityscapes, its extra images, Mapillary Vistas.

    cityscapes         leftImg8bit/{train,val}/CITY/*_leftImg8bit.png,
                       gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png, or ..._labelIds.png
    cityscapes-extra   for training these and leftImg8bit/train_extra/CITY/*_leftImg8bit.png,
                       convert_autolabelled/CITY/*_gtFine_labelTrainIds.png
    mapillary          {training,validation}/images/*.jpg, .../labels/*.png (Vistas 1.2), or
                       .../v1.2/labels/*.png (Vistas 2.0, which holds both versions)

The extra labels' place and names are settings.  Other labels than those above:

    released as                                extra_labels                  extra_suffix
    Cityscapes' coarse labels                  gtCoarse/train_extra          _gtCoarse_labelIds.png
    NVIDIA's automatic labels (label ids:      refinement_final/train_extra  _leftImg8bit.png
    extra_label_ids as well)
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sets.ade20k import SegFiles
from sets.files import (IGNORE, Classes, Cut, class_table, find_root, inverse, list_pairs,
                        plain_classes)

Files = tuple[list[tuple[Path, Path]], Classes]  # (image, label) pairs, and how to read the labels


@dataclass(frozen=True)
class Cityscapes:
    """The finely labelled part: 2,975 training and 500 validation images."""

    data: str | None = None  # folder of leftImg8bit/ and gtFine/

    def classes(self, names: tuple[str, ...] = ()) -> Classes:
        """The 19."""
        return cityscapes_classes(label_ids=False)

    def open(self, cut: Cut) -> SegFiles:
        """The split; InputError if its files are missing."""
        return SegFiles(*cityscapes_files(find_root(self.data), cut.split), cut)


@dataclass(frozen=True)
class CityscapesExtra(Cityscapes):
    """Cityscapes with its 19,998 extra images for training."""

    extra_images: str = "leftImg8bit/train_extra"  # folder below --data
    extra_labels: str = "convert_autolabelled"  # folder below --data; official
    extra_suffix: str = "_gtFine_labelTrainIds.png"  # of a label, instead of _leftImg8bit.png
    extra_label_ids: bool = False  # they hold label ids although their names don't say so

    def open(self, cut: Cut) -> SegFiles:
        """The split; InputError if its files are missing."""
        fine = super().open(cut)
        if not cut.training:
            return fine
        root = find_root(self.data)
        extra = city_files(root / self.extra_images, root / self.extra_labels, self.extra_suffix,
                           self.extra_label_ids)
        return Joined([fine, SegFiles(*extra, cut)])


@dataclass(frozen=True)
class Mapillary(Cityscapes):
    """Mapillary Vistas, 66 classes mapped to the 19: 18,000 training, 2,000 validation images."""

    data: str | None = None  # folder of training/ and validation/

    def open(self, cut: Cut) -> SegFiles:
        """The split; InputError if its files are missing."""
        return SegFiles(*mapillary_files(find_root(self.data), cut.split), cut)


def cityscapes_classes(label_ids: bool) -> Classes:
    """The 19 classes; label files hold train ids 0..18 or label ids 0..33, and 255 = ignored.

    The 15 label ids that are not evaluated become 255.  Label ids are exported, as the benchmark's
    server wants them.
    """
    table = class_table("cityscapes")
    classes = plain_classes(tuple(table["names"]), tuple(map(tuple, table["palette"])))
    lut = np.full(256, IGNORE, np.uint8)
    lut[table["label_ids"]] = np.arange(19)
    if label_ids:
        return replace(classes, lut=lut, raw_values=frozenset((*range(34), IGNORE)),
                       export=inverse(lut))
    return replace(classes, export=inverse(lut), hint="; label ids, 0..33, are read from "
                   "*_labelIds.png, or from any extra file with --extra-label-ids")


def mapillary_classes() -> Classes:
    """The 19 classes; files hold the ids 0..65 of Vistas 1.2, or more (official: mapillary_v1.py).

    DEVIATION: ids above 65 are ignored; the official code makes them road.
    """
    table = class_table("mapillary")
    lut = np.full(256, IGNORE, np.uint8)
    classes = cityscapes_classes(label_ids=False)
    for name, members in table["cityscapes"].items():
        lut[[table["names"].index(member) for member in members]] = classes.names.index(name)
    return replace(classes, lut=lut, raw_values=frozenset(range(256)), hint="")


def city_files(images: Path, labels: Path, suffix: str, label_ids: bool = False) -> Files:
    """Files of one Cityscapes folder; `suffix` replaces _leftImg8bit.png in a label's name.

    labelTrainIds files are not released, cityscapesScripts makes them.  Where there is none the
    released labelIds files are read, which gives the same labels.
    """
    if not any(labels.rglob(f"*{suffix}")):
        suffix = suffix.replace("labelTrainIds", "labelIds")
    pairs = list_pairs(images, labels, "_leftImg8bit", suffix)
    return pairs, cityscapes_classes(label_ids or "labelIds" in suffix)


def cityscapes_files(root: Path, split: str) -> Files:
    """Files of Cityscapes' finely labelled part (2,975 training, 500 validation)."""
    return city_files(root / "leftImg8bit" / split, root / "gtFine" / split,
                      "_gtFine_labelTrainIds.png")


def mapillary_files(root: Path, split: str) -> Files:
    """Files of Mapillary Vistas (18,000 training, 2,000 validation)."""
    folder = root / {"train": "training", "val": "validation"}[split]
    version = folder / "v1.2"
    labels = (version if version.is_dir() else folder) / "labels"
    return list_pairs(folder / "images", labels), mapillary_classes()


class Joined(SegFiles):
    """Sets of files laid end to end, one pipeline for all; each reads labels in its own way.

    As in the official cityscapes_extra.py no set is weighted.
    """

    def __init__(self, parts: list[SegFiles]):
        super().__init__([pair for part in parts for pair in part.pairs], parts[0].classes,
                         parts[0].cut)
        self.parts = parts

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 RGB, labels uint8) from the part that `index` falls into."""
        for part in self.parts:
            if index < len(part):
                return part.load(index)
            index -= len(part)
        raise IndexError(index)
