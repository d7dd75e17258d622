"""Street scenes in Cityscapes' 19 classes: Cityscapes, its extra images, Mapillary Vistas.

    cityscapes         leftImg8bit/{train,val}/CITY/*_leftImg8bit.png,
                       gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png, or ..._labelIds.png
    cityscapes-extra   for training these and leftImg8bit/train_extra/CITY/*_leftImg8bit.png,
                       convert_autolabelled/CITY/*_gtFine_labelTrainIds.png
    mapillary          {training,validation}/images/*.jpg, .../labels/*.png (Vistas 1.2), or
                       .../v1.2/labels/*.png (Vistas 2.0, which holds both versions)

The extra labels' place and names are options (spec["extra_..."]).  Other labels than those above:

    released as                                extra_labels                  extra_suffix
    Cityscapes' coarse labels                  gtCoarse/train_extra          _gtCoarse_labelIds.png
    NVIDIA's automatic labels (label ids:      refinement_final/train_extra  _leftImg8bit.png
    extra_label_ids as well)
"""
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import IGNORE, Classes, SegFiles, class_table, find_root, inverse, list_pairs, \
    plain_classes

NAMES = ("cityscapes", "cityscapes-extra", "mapillary")
Files = tuple[list[tuple[Path, Path]], Classes]  # (image, label) pairs, and how to read the labels


def cityscapes_classes(label_ids: bool) -> Classes:
    """The 19 classes; label files hold train ids 0..18 or label ids 0..33, and 255 = ignored.

    The 15 label ids that are not evaluated become 255.  Label ids are exported (spec A.6).
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

    DEVIATION: ids above 65 are ignored; the official code makes them road (decisions 18).
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
    released labelIds files are read, which gives the same labels (spec A.6).
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
        first = parts[0]
        super().__init__([pair for part in parts for pair in part.pairs], first.classes,
                         training=first.training, crop=first.crop, scale=first.scale,
                         seed=first.seed)
        self.parts = parts

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 RGB, labels uint8) from the part that `index` falls into."""
        for part in self.parts:
            if index < len(part):
                return part.load(index)
            index -= len(part)
        raise IndexError(index)


def open_dataset(spec: dict, split: str, scale: tuple[int, int] | None) -> SegFiles:
    """The set that `spec`, a recipe as a dict, names, for "train" or "val"; `scale`: see SegFiles.

    Raises InputError if files or folders aren't there.
    """
    name, root = spec["dataset"], find_root(spec["data"], spec["dataset"])
    sources = [(mapillary_files if name == "mapillary" else cityscapes_files)(root, split)]
    if name == "cityscapes-extra" and split == "train":
        sources.append(city_files(root / spec["extra_images"], root / spec["extra_labels"],
                                  spec["extra_suffix"], spec["extra_label_ids"]))
    sets = [SegFiles(pairs, classes, training=split == "train", crop=spec["crop"], scale=scale,
                     seed=spec["seed"]) for pairs, classes in sources]
    return sets[0] if len(sets) == 1 else Joined(sets)
