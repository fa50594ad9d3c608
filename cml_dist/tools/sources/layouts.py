"""The layouts that are known, and which of them a source has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cml_dist.errors import DataError
from cml_dist.tools.sources import cifar100, folders, omniglot, ravi
from cml_dist.tools.sources.lists import Splits
from cml_dist.tools.sources.tree import Item, SourceTree


@dataclass(frozen=True)
class Layout:
    """A way to keep an image set.

    Attributes:
        name: as in ``--layout``.
        looks_for: what it is known by, for the error where nothing fits.
        fits: whether a source has this layout (splits as given by the user).
        items: the images, ordered by split and class.
        image_size: pixels a side to which images are resized if nothing else is said; None: as they are.
    """

    name: str
    looks_for: str
    fits: Callable[[SourceTree, Splits], bool]
    items: Callable[[SourceTree, Splits], list[Item]]
    image_size: int | None = None


def recognise(tree: SourceTree, layout: str | None, splits: Splits) -> Layout:
    """The layout that is asked for, or the one that the source has.

    Raises:
        DataError: if none or several fit, or the name is unknown.
    """
    if layout is not None:
        if layout not in LAYOUTS:
            raise DataError(f"layout {layout!r} is unknown", f"use one of {', '.join(LAYOUTS)}")
        return LAYOUTS[layout]
    fitting = [candidate for candidate in LAYOUTS.values() if candidate.fits(tree, splits)]
    if len(fitting) > 1:
        names = ", ".join(candidate.name for candidate in fitting)
        raise DataError(f"{tree.where} fits several layouts: {names}", "say which with --layout NAME")
    if not fitting:
        looked = "; ".join(f"{candidate.name}: {candidate.looks_for}" for candidate in LAYOUTS.values())
        raise DataError(
            f"{tree.where} has no layout that is known. Looked for: {looked}",
            "arrange it like one of these, or give --layout and --splits",
        )
    return fitting[0]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "folders",
            "class folders of images with train.txt, val.txt, test.txt that list them, or below train/, val/, test/",
            folders.fits,
            folders.items,
        ),
        Layout("ravi", "train.csv, val.csv, test.csv with filename,label beside images/", ravi.fits, ravi.items),
        Layout("cifar100", "cifar-100-python with train, test, meta, or its tar.gz", cifar100.fits, cifar100.items),
        Layout(
            "omniglot",
            "images_background and images_evaluation, as zips or folders",
            omniglot.fits,
            omniglot.items,
            image_size=28,
        ),
    )
}
