"""Parquet of images with labels, as Hugging Face keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from cml_dist.errors import DataError
from cml_dist.tools.sources.archives import Member, Spool
from cml_dist.tools.sources.shape import Found, Layout, Row, gathered
from cml_dist.tools.sources.splits import files_of_splits
from cml_dist.tools.sources.tree import SourceTree

_IMAGES = ("image", "img", "images", "picture", "jpg", "png")
_LABELS = ("label", "fine_label", "labels", "class", "class_name", "label_name", "category", "species", "target")
_ROWS = 64  # at once: more are not held in memory


def _read(tree: SourceTree, own_splits: bool) -> Found:
    try:
        import pyarrow.parquet
    except ImportError as error:
        what = f"{tree.where} is Parquet, for which pyarrow is missing"
        raise DataError(what, "pip install 'cml-dist[parquet]'") from error
    return gathered(tree, _rows(tree, own_splits, pyarrow.parquet.ParquetFile), own_splits)


def _rows(tree: SourceTree, own_splits: bool, parquet_file: Any) -> Iterator[Row]:
    spool = Spool(tree.scratch, tree.where)
    for split, paths in files_of_splits(tree, (".parquet",), own_splits).items():
        for path in paths:
            with tree.reading(path), tree.open(path) as stream, parquet_file(stream) as file:
                for group in range(file.num_row_groups):
                    tree.check_size(path, file.metadata.row_group(group).total_byte_size)
                columns = file.schema_arrow.names
                chosen = [next((name for name in names if name in columns), None) for names in (_IMAGES, _LABELS)]
                if None in chosen:
                    what = f"{path} in {tree.where} has the columns {', '.join(columns)}, and no image and label"
                    raise DataError(what, "name them image and label")
                names = _class_names(file.schema_arrow.metadata, chosen[1])
                number = 0
                for batch in file.iter_batches(_ROWS, columns=chosen):
                    for image, label in zip(*(batch.column(name).to_pylist() for name in chosen), strict=True):
                        data = image["bytes"] if isinstance(image, dict) else image
                        if not isinstance(data, bytes) or label is None or isinstance(label, int) and label < 0:
                            raise ValueError(f"row {number} has no bytes of an image, or no label ({label})")
                        member = Member(len(data), partial(spool.open, spool.append(data), len(data)))
                        name = names[label] if names and isinstance(label, int) else str(label)
                        yield Row(split, name, f"{path.replace('/', '-')}-{number}.png", member)
                        number += 1


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The names that Hugging Face keeps of the numbers in a column."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None


PARQUET = Layout(
    {"train-*.parquet and its like": lambda tree, own_splits: files_of_splits(tree, (".parquet",), own_splits)}, _read
)
