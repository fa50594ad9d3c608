"""``cml-dist predict``: a trained run and a few examples of each class answer pictures."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cml_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from cml_dist.run.adapted import AdaptedLearner
    from cml_dist.telemetry.console import Console
    from cml_dist.tools.pictures import Examples, PictureFile


def predict(args: argparse.Namespace, console: Console) -> None:
    from cml_dist.tools.pictures import find_examples, find_pictures

    _check(args)
    examples = find_examples(args.support) if args.support else None
    pictures, left = find_pictures(args.images) if args.images else ([], [])
    further, odd = find_pictures(args.unlabelled, "--unlabelled") if args.unlabelled else ([], [])
    left = [*(examples.left if examples else ()), *left, *odd]
    console.loading()
    adapted = _adapted(args, examples, further, console)
    if left:
        console.warn(f"{len(left):,} files are no pictures and are left out, e.g. {left[0]}")
    if args.save:
        adapted.save(args.save)
        console.note(f"Adapted classifier: {args.save}")
    if pictures:
        _answer(args, adapted, pictures, console)


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be, before any work."""
    from cml_dist.tools.answer_files import WRITERS

    if not Path(args.run).exists():
        raise ConfigError(f"there is no {args.run}", "name a run folder, an export, or a file of --save")
    is_file = Path(args.run).is_file()
    adapts = args.support or args.unlabelled or args.leave_one_out or args.inner_steps is not None
    if is_file and (adapts or args.save):
        raise ConfigError(
            f"{args.run} is a file, a classifier that is adapted already",
            "leave --support, --unlabelled, --save, --leave-one-out and --inner-steps out",
        )
    if not is_file and not args.support:
        raise ConfigError(
            f"{args.run} has to learn the classes from examples",
            "give a folder with a folder of pictures for each class: --support EXAMPLES",
        )
    if not (args.images or args.save or args.leave_one_out):
        raise ConfigError("there is nothing to do", "name the pictures to answer: --images NEW")
    if args.out and not args.images:
        raise ConfigError(f"--out {args.out} has nothing to hold", "name the pictures to answer: --images NEW")
    if args.out and Path(args.out).suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {args.out} is of no kind that is written", f"end it in {', '.join(WRITERS)}")
    if not 0 <= args.min_probability <= 1:
        raise ConfigError(f"--min-probability is {args.min_probability:g}", "give a number from 0 to 1")
    if args.inner_steps is not None and args.inner_steps < 0:
        raise ConfigError(f"--inner-steps is {args.inner_steps}", "give 0 or more")
    for option in ("out", "save"):
        path = getattr(args, option)
        if path and Path(path).exists():
            raise ConfigError(f"--{option} {path} exists", "give another name, or remove it")


def _adapted(
    args: argparse.Namespace, examples: Examples | None, further: Sequence[PictureFile], console: Console
) -> AdaptedLearner:
    """The classifier: from a file, or adapted on the examples; what it may be expected to reach is said on the way.

    Args:
        further: pictures without labels.
    """
    import torch

    from cml_dist.data.pixels import in_threads
    from cml_dist.run.adapted import AdaptedLearner
    from cml_dist.run.leave_one_out import leave_one_out
    from cml_dist.run.predict import load
    from cml_dist.run.reading import fitted_shape, reads_pictures
    from cml_dist.telemetry.console import preparing
    from cml_dist.tools.answers import pixels_of

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but there is no GPU that can be used", "leave --device out")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    learner = load(args.run, device, args.overrides)
    if not reads_pictures(learner.description):
        raise ConfigError(
            f"{args.run} reads no pictures, and predict is for pictures", "use it from Python: cml_dist.load"
        )
    if isinstance(learner, AdaptedLearner):
        return learner
    if further and learner.unlabelled is None:
        raise ConfigError(
            f"{args.run} was trained without unlabelled examples",
            "leave --unlabelled out, or train with domain.unlabelled",
        )
    shape = fitted_shape(learner.description)
    with preparing(console) as progress:

        def read(pictures: Sequence[PictureFile], reader: Callable, what: str) -> list:
            found = []
            for pixels in in_threads(partial(reader, shape=shape), pictures):
                found.append(pixels)
                progress(len(found), len(pictures), what)
            return found

        images = read(examples.pictures, pixels_of, "reading examples")
        pool = read(further, _pixels_or_none, "reading unlabelled pictures")
        if lost := [picture.name for picture, pixels in zip(further, pool, strict=True) if pixels is None]:
            console.warn(f"Of {len(pool):,} pictures of --unlabelled {len(lost):,} could not be read, e.g. {lost[0]}")
        pool = [pixels for pixels in pool if pixels is not None]
        adapted = learner.adapt(images, examples.labels, args.inner_steps, pool)
        besides = f", and on {len(pool):,} unlabelled" * bool(pool)
        console.note(f"Adapted on {len(images):,} examples of {len(adapted.classes):,} classes{besides}")
        if args.leave_one_out:
            told = partial(progress, what="leaving examples out")
            right = leave_one_out(learner, images, examples.labels, args.inner_steps, told, pool)
            _expect(right, examples.labels, console)
    return adapted


def _pixels_or_none(picture: PictureFile, shape: Sequence[int]) -> np.ndarray | None:
    from cml_dist.tools.answers import pixels_of

    try:
        return pixels_of(picture, shape)
    except DataError:
        return None


def _expect(right: int, labels: list[str], console: Console) -> None:
    """Say what accuracy the examples let expect."""
    from cml_dist.run.interval import share_interval

    low, high = (100 * end for end in share_interval(right, len(labels)))
    console.note(
        f"Expected accuracy: of the examples, one of each class left out at a time, {100 * right / len(labels):.1f} % "
        f"are right ({right:,} of {len(labels):,}; 95 % interval {low:.1f} to {high:.1f} %; "
        f"chance {100 / len(set(labels)):.1f} %)"
    )


def _answer(args: argparse.Namespace, adapted: AdaptedLearner, pictures: list[PictureFile], console: Console) -> None:
    from cml_dist.telemetry.console import preparing
    from cml_dist.tools.answer_files import CONTACT_SHEET, write_answers
    from cml_dist.tools.answer_table import Tally
    from cml_dist.tools.answers import answers

    tally, out = Tally(), Path(args.out or "")
    with preparing(console) as progress:
        found = tally.of(
            answers(
                adapted,
                pictures,
                min_probability=args.min_probability,
                thumbnails=out.suffix.lower() == CONTACT_SHEET,
                progress=progress,
            )
        )
        if args.out:
            title = f"{', '.join(args.images[:3])}{' ...' if len(args.images) > 3 else ''} by {args.run}"
            write_answers(out, title, adapted.classes, found)
        else:
            for _ in found:
                pass
    if not args.out:
        console.table(tally.title, *tally.first_rows())
    console.table(f"{tally.count:,} pictures", *tally.by_class())
    if tally.unreadable:
        console.warn(f"{tally.unreadable:,} of {tally.count:,} pictures could not be read, e.g. {tally.example}")
    if args.out:
        console.note(f"Predictions: {args.out}")
