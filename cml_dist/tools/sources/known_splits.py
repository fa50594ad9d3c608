"""Class lists of published splits: CIFAR-FS and FC100 of CIFAR-100, and Vinyals' split of Omniglot.

*Source*: Bertinetto et al. 2019 (CIFAR-FS), Oreshkin et al. 2018 (FC100), Vinyals et al. 2016 (Omniglot).
"""

from __future__ import annotations

_CIFAR_FS = {
    "train": (
        "apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud "
        "cockroach couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower "
        "lion lizard lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate "
        "porcupine possum rabbit raccoon ray road seal shrew skunk skyscraper snake spider squirrel streetcar "
        "sunflower tank tiger train trout tulip turtle willow_tree wolf"
    ).split(),
    "val": (
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea "
        "shark television tractor"
    ).split(),
    "test": (
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper "
        "table telephone wardrobe whale woman worm"
    ).split(),
}
_FC100 = {
    "val": (
        "bear camel cattle chimpanzee crab elephant hamster kangaroo leopard lion lobster mouse rabbit shrew "
        "snail spider squirrel tiger wolf worm"
    ).split(),
    "test": (
        "baby beaver bee beetle boy butterfly caterpillar cockroach dolphin fox girl man otter porcupine "
        "possum raccoon seal skunk whale woman"
    ).split(),
}
_REST = {name for names in _CIFAR_FS.values() for name in names}.difference(*_FC100.values())

CIFAR100_SPLITS = {"cifar_fs": _CIFAR_FS, "fc100": {"train": sorted(_REST), **_FC100}}

_OMNIGLOT_VAL = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
_OMNIGLOT_TEST = (
    "Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti",
    "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG",
)  # fmt: skip
_OMNIGLOT_SHARED = {f"Gurmukhi/character{number}" for number in (42, 43, 44, 45)}


def omniglot_split(class_name: str) -> str:
    """The split of a character ``Alphabet/characterNN``: 1028 train, 172 val, 423 test.

    The rule is by alphabet: five for val, twelve for test, the others for train; of Gurmukhi the last four characters
    belong to test.
    """
    alphabet = class_name.split("/")[0]
    if alphabet in _OMNIGLOT_VAL:
        return "val"
    if alphabet in _OMNIGLOT_TEST or class_name in _OMNIGLOT_SHARED:
        return "test"
    return "train"
