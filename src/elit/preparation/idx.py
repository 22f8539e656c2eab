"""Folders of idx files, as tables of Hugging Face datasets."""

from pathlib import Path
from typing import Any

from elit.data.fashion_mnist import CLASS_NAMES
from elit.data.idx import read_split


def idx_tables(datasets: Any, folder: Path) -> dict[str, Any]:
    """Splits "train" and "test" of a folder as `datasets` would read them from the hub.

    Each picture is a PGM file in memory: a header in front of its pixels, which costs no encoding.
    """
    columns = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=list(CLASS_NAMES))
    )
    tables = {}
    for name, split in (("train", "train"), ("test", "validation")):
        images, labels = read_split(folder, split, len(CLASS_NAMES))
        header = "P5 {1} {0} 255\n".format(*images.shape[1:]).encode()
        pictures = [{"bytes": header + pixels.tobytes(), "path": None} for pixels in images]
        rows = {"image": pictures, "label": labels.tolist()}
        tables[name] = datasets.Dataset.from_dict(rows, features=columns)
    return tables
