"""All pictures of a set are looked at before one is packed: their sizes, colours, and whether enough can be read."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import NamedTuple, TypeVar

from PIL import Image

from cml_dist.data.base import Progress
from cml_dist.data.pixels import in_threads, size_and_channels
from cml_dist.errors import DataError
from cml_dist.tools.accounts import DAMAGED, Accounts
from cml_dist.tools.sources.tree import OverLimit, SourceTree

_AT_ONCE = 256 * 2**20  # bytes of files and pixels that are in work at once, or one picture

_SIDES = (32, 64, 84)  # usual in the field, and trained within minutes on a CPU
_LARGE = 224  # the usual size of pre-trained backbones

_Result = TypeVar("_Result")


class Item(NamedTuple):
    """A picture to pack: where it goes, and the bytes that it takes while it is in work."""

    split: str
    class_name: str
    path: str
    num_bytes: int
    group: str | None = None

    @property
    def what(self) -> str:
        """Its name in errors."""
        return f"image {self.path} of class {self.class_name!r}"


class Facts(NamedTuple):
    """Height and width of a picture, as displayed, and its channels."""

    size: tuple[int, int]
    channels: int


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Pillow refuses larger images, also those at which it only warns."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def by_threads(function: Callable[[Item], _Result], items: Sequence[Item]) -> Iterator[_Result]:
    """Results in order, of a bounded number of bytes at once."""
    start = held = 0
    for at, item in enumerate(items):
        held += item.num_bytes
        if held > _AT_ONCE and at > start:
            yield from in_threads(function, items[start:at])
            start, held = at, item.num_bytes
    yield from in_threads(function, items[start:])


def survey(
    tree: SourceTree, items: Sequence[Item], accounts: Accounts, progress: Progress | None
) -> tuple[list[Item], Mapping[str, Facts]]:
    """The items whose headers can be read, and what these say, by path; the others are left out.

    Raises:
        OverLimit: if one is larger than the limits allow.
    """

    def look(item: Item) -> Facts | DataError:
        try:
            return Facts(*size_and_channels(tree.read(item.path), item.what))
        except OverLimit:
            raise
        except DataError as error:
            if isinstance(error.__cause__, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
                what = f"{item.what} has more than {tree.limits.pixels:,} pixels"
                raise OverLimit(what, "where that is right, raise the limit: --max-pixels NUMBER") from error
            return error

    found, facts = [], {}
    for done, (item, seen) in enumerate(zip(items, by_threads(look, items), strict=True), start=1):
        if isinstance(seen, DataError):
            accounts.leave_out(item.path, DAMAGED, seen)
        else:
            facts[item.path] = seen
            found.append(item._replace(num_bytes=item.num_bytes + 4 * seen.size[0] * seen.size[1]))
        if progress is not None:
            progress(done, len(items), "looking at images")
    return found, facts


def large_enough(items: Sequence[Item], accounts: Accounts, min_images: int) -> list[Item]:
    """The items of classes with so many images, and two groups where they have such; the others are left out.

    Raises:
        DataError: if that leaves none.
    """
    counts = Counter(item.class_name for item in items)
    small = {name for name, count in counts.items() if count < min_images}
    if len(small) == len(counts):
        most, cause = max(counts.values(), default=0), f": {accounts.damage.what}" if accounts.damage else ""
        remedy = f"add images, or pack with --min-images {most}" if most else "mend the images"
        raise DataError(f"no class has {min_images} images, but at most {most}{cause}", remedy)
    kept = _without(small, items, accounts, f"fewer than {min_images} images", "--min-images")
    groups: dict[str, set[str | None]] = {}
    for item in kept:
        groups.setdefault(item.class_name, set()).add(item.group)
    alone = {name for name, some in groups.items() if len(some) == 1 and some != {None}}
    if len(alone) == len(groups):
        what = "no class has images of 2 groups, so that none could be on both sides of an episode"
        raise DataError(what, "give --group-by another pattern, or leave it out")
    return _without(alone, kept, accounts, "fewer than 2 groups", "--group-by")


def _without(names: set[str], items: Sequence[Item], accounts: Accounts, lack: str, option: str) -> list[Item]:
    """The items of other classes; those of ``names`` are left out, for what they lack by an option."""
    kept = [item for item in items if item.class_name not in names]
    left = [item for item in items if item.class_name in names]
    for item in left:
        accounts.leave_out(item.path, f"its class has {lack} ({option})")
    if left:
        some = list(dict.fromkeys(item.class_name for item in left))
        shown = ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")
        lost = sorted({item.split for item in items} - {item.split for item in kept})
        none = f"; that leaves none in {' and '.join(lost)}" if lost else ""
        accounts.notes.append(f"{len(some)} classes of {lack} are left out: {shown}{none}")
    return kept


def chosen_size(items: Sequence[Item], facts: Mapping[str, Facts]) -> tuple[tuple[int, int], str]:
    """The height and width for a set of these items, and where they must be brought to it, why, in words.

    Pictures of one size keep it, up to ``_LARGE``. Others become squares of the largest of ``_SIDES`` that is not above
    the median of their shorter sides.
    """
    sizes = [facts[item.path].size for item in items]
    if len(set(sizes)) == 1 and min(sizes[0]) <= _LARGE:
        return sizes[0], ""
    shorter = median_low(map(min, sizes))
    side = max((side for side in _SIDES if side <= shorter), default=_SIDES[0])
    height, width = (median_low(size[axis] for size in sizes) for axis in (0, 1))
    found = f"{len(set(sizes)):,} sizes, in the median {width}x{height}"
    if len(set(sizes)) == 1:
        found = f"{width}x{height} px, more than small networks gain from"
    how = f"scaled to cover {side}x{side} px and cut at the centre, never squeezed"
    return (side, side), f"The pictures have {found}: {how}. For another size: --image-size PIXELS"
