"""Stanford Cars as published: numbered pictures, and MATLAB files that say the class of each."""

from __future__ import annotations

import posixpath
from fnmatch import fnmatch

from cml_dist.errors import DataError
from cml_dist.tools.sources.matlab import read_variable
from cml_dist.tools.sources.numbered import one_picture
from cml_dist.tools.sources.shape import Found, Layout
from cml_dist.tools.sources.tree import SourceTree, plain_name

_WHOLE = {"cars_annos.mat": "car_ims"}
_PARTS = {"cars_train_annos.mat": "cars_train", "cars_test_annos_withlabels.mat": "cars_test"}
"""Lists, and the folder of pictures that each is of: the older archive, or those of train and test."""


def _folders(tree: SourceTree) -> set[str]:
    """The names of the set's folders that hold pictures themselves, as a folder for each class does not."""
    folders = {posixpath.basename(posixpath.dirname(path)) for path in tree.images}
    return folders.intersection({**_WHOLE, **_PARTS}.values())


def _path(tree: SourceTree, name: str, gives: str) -> str:
    path = next((path for path in tree.files if posixpath.basename(path) == name), None)
    if path is None:
        raise DataError(f"{tree.where} has no {name}, which gives {gives}", "add that file to it")
    return path


def _read(tree: SourceTree, _: bool) -> Found:
    """The pictures of train and test together: in few-shot learning it is classes that are divided."""
    placed: dict[str, list[str]] = {}  # by folder and file: both folders have a 00001.jpg
    for picture in tree.images:
        placed.setdefault("/".join(picture.split("/")[-2:]), []).append(picture)
    lists = _WHOLE if "car_ims" in _folders(tree) else _PARTS
    paths = {_path(tree, name, f"the classes of the pictures in {folder}"): folder for name, folder in lists.items()}
    # The older archive keeps the names beside the annotations.
    source = next(iter(paths)) if lists is _WHOLE else _path(tree, "cars_meta.mat", "the names of the classes")
    with tree.reading(source):
        names = [plain_name(name) for name in read_variable(tree, source, "class_names")]
    classes: dict[str, list[str]] = {}
    for path, folder in paths.items():
        with tree.reading(path):
            rows = read_variable(tree, path, "annotations")
            files = rows.get("fname") or rows["relative_im_path"]
            for file, number in zip(files, (int(number.item()) for number in rows["class"]), strict=True):
                picture = f"{folder}/{posixpath.basename(file)}"
                if not 1 <= number <= len(names):
                    has = f"has class {number}, but {source} names 1 to {len(names)}"
                    raise DataError(f"{picture} of {path} in {tree.where} {has}", "give both of one version")
                found = one_picture(tree, placed.get(picture, ()), picture, path, f"all pictures of {folder}")
                classes.setdefault(names[number - 1], []).append(found)
    return Found(classes, None, tree)


CARS = Layout(
    {
        "annotations such as cars_train_annos.mat": lambda tree, _: any(
            fnmatch(posixpath.basename(path), "cars_*annos*.mat") for path in tree.files
        ),
        "pictures in cars_train and cars_test, or in car_ims": lambda tree, _: _folders(tree),
    },
    _read,
)
