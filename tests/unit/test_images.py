"""Episodes of images: pure in (seed, split, index), true to the pixels, checked before training, normalised."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import CLASSES, pixels, real_data, seed_of, write_set
from PIL import ImageEnhance
from torch.utils.data import DataLoader, Dataset

from cml_dist.config.schema import AugmentConfig, ImagesConfig
from cml_dist.data.build import build_domain
from cml_dist.data.free_memory import available_bytes
from cml_dist.data.images import ImageDomain
from cml_dist.data.pixels import as_png, to_array, to_image
from cml_dist.data.sampling import crop_and_resize, jitter, pad_and_crop
from cml_dist.data.shard_writer import new_shard_set
from cml_dist.data.shards import ShardSet
from cml_dist.errors import ConfigError, DataError
from cml_dist.tools.pack import pack
from cml_dist.tools.sources.known_splits import known_sets
from cml_dist.types import Episode

WAYS, SHOTS, QUERIES, IMAGES = 3, 2, 3, 7


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "small", images=IMAGES)


def make(root: Path, *, train_seed: int = 5, eval_seed: int = 9, processes: int = 1, **settings) -> ImageDomain:
    defaults = {"name": "images", "root": str(root), "ways": WAYS, "shots": SHOTS, "queries": QUERIES}
    config = ImagesConfig(**{**defaults, **settings})
    return build_domain(config, train_seed=train_seed, eval_seed=eval_seed, processes=processes)


def same(one: Episode, other: Episode) -> bool:
    pairs = [(one.support, other.support), (one.query, other.query)]
    return (one.split, one.index) == (other.split, other.index) and all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in pairs
    )


def identify(domain: ImageDomain, image: torch.Tensor, split: str) -> tuple[int, int]:
    """Class number and image number of an unchanged image of the small set."""
    known = {
        pixels(seed_of(split, number, place)).tobytes(): (number, place)
        for number in range(CLASSES[split])
        for place in range(IMAGES)
    }
    return known[image.numpy().tobytes()]


# --------------------------------------------------------------------------- what an episode is


@pytest.mark.parametrize("split", CLASSES)
@pytest.mark.parametrize("index", [0, 1, 17])
def test_an_episode_holds_different_images_of_different_classes_in_order(root, split, index):
    domain = make(root)
    episode = domain.episode(split, index)
    assert (episode.split, episode.index, dict(episode.support.context)) == (split, index, {})
    assert episode.support.inputs.dtype == episode.query.inputs.dtype == torch.uint8
    assert episode.support.inputs.shape == (WAYS * SHOTS, 3, 8, 8)
    assert episode.query.inputs.shape == (WAYS * QUERIES, 3, 8, 8)
    assert episode.support.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert episode.query.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    batches = (episode.support, episode.query)
    labelled = [
        (int(label), identify(domain, image, split))
        for batch in batches
        for image, label in zip(batch.inputs, batch.targets, strict=True)
    ]
    assert len({found for _, found in labelled}) == WAYS * (SHOTS + QUERIES)  # no image twice
    classes = {label: {number for other, (number, _) in labelled if other == label} for label in range(WAYS)}
    assert all(len(numbers) == 1 for numbers in classes.values())
    assert len(set.union(*classes.values())) == WAYS  # no class twice


def test_what_the_domain_says_of_itself(root):
    domain = make(root)
    assert domain.input_shape == (3, 8, 8) and domain.output_dim == WAYS
    assert domain.score_name == "accuracy" and domain.higher_is_better and domain.chance == 1 / 3
    assert domain.describe()["splits"] == {
        split: {"classes": count, "images": 7 * count, "bytes": 7 * count * 192, "kept": "memory"}
        for split, count in CLASSES.items()
    }


def test_train_follows_one_seed_and_val_and_test_the_other(root):
    base, other_run, other_eval = make(root), make(root, train_seed=6), make(root, eval_seed=10)
    for split in CLASSES:
        index = 3
        is_train = split == "train"
        assert same(base.episode(split, index), other_run.episode(split, index)) is not is_train
        assert same(base.episode(split, index), other_eval.episode(split, index)) is is_train
    indices = [base.episode("train", index).support.inputs.numpy().tobytes() for index in range(20)]
    assert len(set(indices)) == 20


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_the_support_set_is_the_same_whatever_queries_is(root, memory_gib):
    """Its images, and how they are mirrored, cropped and turned."""

    def episodes(queries, **settings):
        domain = make(root, queries=queries, memory_gib=memory_gib, augment=AUGMENT, **settings)
        return [domain.episode(split, index) for split in CLASSES for index in range(3)]

    def is_paired(a, b):
        return torch.equal(a.support.inputs, b.support.inputs)

    assert all(map(is_paired, episodes(1), episodes(5)))
    assert not any(map(is_paired, episodes(1, draw=1), episodes(5, draw=1)))  # as earlier versions drew


# --------------------------------------------------------------------------- purity

AUGMENT = AugmentConfig(flip=True, crop_padding=2, rotate_classes=True, random_resized_crop=0.3, color_jitter=0.4)


class _Episodes(Dataset):
    def __init__(self, domain: ImageDomain, split: str) -> None:
        self.domain, self.split = domain, split

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Episode:
        return self.domain.episode(self.split, index)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
@pytest.mark.parametrize("loaded", [True, False])
def test_episodes_are_the_same_in_any_order_and_worker(root, memory_gib, loaded):
    reference = make(root, augment=AUGMENT)
    expected = {split: [reference.episode(split, index) for index in range(8)] for split in CLASSES}
    domain = make(root, augment=AUGMENT, memory_gib=memory_gib)
    for split in CLASSES:
        if loaded:
            assert domain.load(split) is (memory_gib > 0)
        workers = DataLoader(
            _Episodes(domain, split), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=600
        )
        assert all(same(*pair) for pair in zip(workers, expected[split], strict=True))
        for index in (5, 2, 7, 2):
            assert same(domain.episode(split, index), expected[split][index])


def test_a_spawned_worker_gets_the_same_episodes_and_no_pixels(root):
    domain = make(root, augment=AUGMENT)
    domain.load("train")
    sent = pickle.dumps(domain)
    assert len(sent) < 20_000 < domain.describe()["splits"]["train"]["bytes"] * 10
    assert pixels(seed_of("train", 0, 0)).tobytes() not in sent
    loader = DataLoader(
        _Episodes(domain, "train"), batch_size=None, num_workers=1, multiprocessing_context="spawn", timeout=600
    )
    for index, episode in enumerate(loader):
        assert same(episode, domain.episode("train", index))


def test_loading_reports_progress_and_happens_once(root, monkeypatch):
    domain = make(root)
    reports = []
    assert domain.load("train", lambda *values: reports.append(values)) is True
    assert reports == [(42, 42, "decoding train images")]
    monkeypatch.setattr(ShardSet, "decode", lambda *arguments: pytest.fail("decoded twice"))
    assert domain.load("train") is True
    domain.episode("train", 0)


def test_a_split_above_the_limit_is_streamed_and_said_so(root):
    limit = 30 * 192 / 2**30  # val and test have 28 images, train 42
    domain = make(root, memory_gib=limit)
    assert {s: entry["kept"] for s, entry in domain.describe()["splits"].items()} == {
        "train": "streamed", "val": "memory", "test": "memory",
    }  # fmt: skip
    assert domain.load("train") is False and domain.load("val") is True
    assert same(domain.episode("train", 1), make(root).episode("train", 1))


def test_half_of_the_free_memory_is_shared_by_the_processes_and_the_splits(root, monkeypatch):
    """val and test take 28 x 192 bytes each, train 42 x 192: with room for 70 images, train and val are kept."""
    monkeypatch.setattr("cml_dist.data.images.available_bytes", lambda: 2 * 3 * 70 * 192)
    built = make(root, processes=3)
    kept = {split: entry["kept"] for split, entry in built.describe()["splits"].items()}
    assert kept == {"train": "memory", "val": "memory", "test": "streamed"}
    assert same(built.episode("test", 1), make(root).episode("test", 1))


def test_free_memory_is_what_the_kernel_says():
    with open("/proc/meminfo") as file:
        total = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) * 1024
    assert 2**20 < available_bytes() <= total


# --------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize(
    "asked", [{"flip": True, "crop_padding": 2}, {"random_resized_crop": 0.3}, {"color_jitter": 0.4}], ids=str
)
def test_augmentation_changes_train_alone_and_not_which_images(root, asked):
    plain, changed = make(root), make(root, augment=AugmentConfig(**asked))
    for split in ("val", "test"):
        assert all(same(plain.episode(split, i), changed.episode(split, i)) for i in range(5))
    assert not same(plain.episode("train", 0), changed.episode("train", 0))
    assert same(changed.episode("train", 0), make(root, augment=AugmentConfig(**asked)).episode("train", 0))


@pytest.mark.parametrize("change", [crop_and_resize, jitter])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_change_of_strength_0_is_none(change, channels):
    images = np.stack([pixels(seed, 6, channels) for seed in range(9)])
    rng = np.random.default_rng(0)
    assert np.array_equal(change(rng, images, 1.0 if change is crop_and_resize else 0.0), images)


def test_windows_have_the_area_and_the_aspect_that_was_asked_for():
    """Read from pictures whose channels say in which column and row a pixel lies."""
    height, width, scale = 40, 60, 0.25
    columns, rows = np.meshgrid(4 * np.arange(width), 4 * np.arange(height))
    images = np.broadcast_to(np.stack([columns, rows, 0 * rows]).astype(np.uint8), (2000, 3, height, width))
    cut = crop_and_resize(np.random.default_rng(0), images, scale)
    first, last = (cut[:, :2].min(axis=(2, 3)) / 4).round(), (cut[:, :2].max(axis=(2, 3)) / 4).round()
    wide, high = (last - first + 1).T
    assert cut.shape == images.shape and (first >= 0).all() and wide.max() <= width and high.max() <= height
    area, aspect = wide * high / (width * height), wide / high
    is_whole = area == 1  # where no window fitted
    assert is_whole.mean() < 0.02 and area.min() > scale - 0.05 and np.quantile(area, 0.2) < 0.45
    assert aspect[~is_whole].min() > 0.75 - 0.07 and aspect[~is_whole].max() < 4 / 3 + 0.07
    assert (first[:, 0] == 0).mean() < 0.2 and len(np.unique(first[:, 0])) > 20


def test_jitter_is_that_of_pillow():
    images, strength = np.stack([pixels(seed, 16) // 2 + 60 for seed in range(50)]), 0.4
    changed = jitter(np.random.default_rng(0), images, strength)
    factors = 1 + strength * (2 * np.random.default_rng(0).random((3, 50)) - 1)  # as earlier versions drew
    for image, found, each in zip(images, changed, factors.T, strict=True):
        expected = to_image(image)
        for kind, factor in zip(("Brightness", "Contrast", "Color"), each, strict=True):
            expected = getattr(ImageEnhance, kind)(expected).enhance(factor)
        assert np.abs(to_array(expected).astype(int) - found).max() <= 5  # Pillow rounds down in between


def test_flip_mirrors_each_image_of_train_with_probability_one_half(root):
    plain, flipping = make(root), make(root, augment=AugmentConfig(flip=True))
    mirrored, count = 0, 0
    for index in range(40):
        before, after = plain.episode("train", index), flipping.episode("train", index)
        assert torch.equal(before.query.targets, after.query.targets)
        for one, other in zip(before.query.inputs, after.query.inputs, strict=True):
            is_mirrored = torch.equal(other, one.flip(-1))
            assert is_mirrored or torch.equal(other, one)
            mirrored, count = mirrored + is_mirrored, count + 1
    assert abs(mirrored / count - 0.5) < 5 * 0.5 / count**0.5


def test_each_crop_is_a_window_of_the_reflected_image():
    images = np.stack([pixels(seed, 6) for seed in range(200)])
    cropped = pad_and_crop(np.random.default_rng(0), images, 2)
    assert cropped.shape == images.shape and cropped.dtype == np.uint8
    places = set()
    for image, crop in zip(images, cropped, strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        found = [(t, x) for t in range(5) for x in range(5) if np.array_equal(padded[:, t : t + 6, x : x + 6], crop)]
        assert len(found) >= 1
        places.add(found[0])
    assert len(places) == 25


def test_turned_classes_are_whole_classes_turned(root):
    domain = make(root, augment=AugmentConfig(rotate_classes=True))
    assert domain.describe()["splits"]["train"]["classes"] == 24
    assert domain.describe()["splits"]["val"]["classes"] == 4
    known = {
        torch.rot90(torch.from_numpy(pixels(seed_of("train", number, place))), turns, (1, 2)).numpy().tobytes():
        (number, turns, place)
        for number in range(CLASSES["train"]) for turns in range(4) for place in range(IMAGES)
    }  # fmt: skip
    seen = set()
    for index in range(60):
        episode = domain.episode("train", index)
        inputs = torch.cat([episode.support.inputs, episode.query.inputs])
        targets = torch.cat([episode.support.targets, episode.query.targets])
        classes = set()
        for label in range(WAYS):
            found = [known[image.numpy().tobytes()] for image in inputs[targets == label]]
            assert len(set(found)) == SHOTS + QUERIES
            assert len({found_class[:2] for found_class in found}) == 1  # a class is turned as a whole
            classes.add(found[0][:2])
        assert len(classes) == WAYS
        seen |= classes
    assert len(seen) == 24
    plain = make(root)
    assert all(same(domain.episode(split, 0), plain.episode(split, 0)) for split in ("val", "test"))


def test_turning_makes_up_for_few_classes_in_train_alone(root, tmp_path):
    few = _uneven(tmp_path, dict.fromkeys("abc", 2), dict.fromkeys("abcdefghij", 2))
    turned = AugmentConfig(rotate_classes=True)
    domain = make(few, ways=10, queries=1, shots=1, augment=turned)
    assert domain.episode("train", 0).support.inputs.shape[0] == 10
    with pytest.raises(DataError, match="domain.ways is 20, but split 'val' .* has 4 classes"):
        make(root, ways=20, queries=1, shots=1, augment=turned)


# --------------------------------------------------------------------------- prepare, loss, score


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prepare_normalises_by_the_measured_statistics(root, dtype):
    domain = make(root)
    episode = domain.episode("train", 0)
    prepared = domain.prepare(episode, torch.device("cpu"), dtype)
    mean, std = domain.shards.info.mean, domain.shards.info.std
    for before, after in ((episode.support, prepared.support), (episode.query, prepared.query)):
        assert after.inputs.dtype == dtype and torch.equal(after.targets, before.targets)
        for channel in range(3):
            expected = (before.inputs[:, channel].double().numpy() / 255 - mean[channel]) / std[channel]
            np.testing.assert_allclose(after.inputs[:, channel].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert episode.support.inputs.dtype == torch.uint8  # the compact episode is left as it was


def test_the_whole_training_split_is_standardised(root):
    domain = make(root)
    whole = torch.from_numpy(np.stack([domain.shards.decode(at) for at in range(42)]))
    normal = domain.normalise(whole, torch.float64)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        normal.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_given_statistics_take_precedence_and_must_fit(root):
    domain = make(root, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    white = domain.normalise(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), torch.float64)
    assert white[0, :, 0, 0].tolist() == [2.0, 1.0, 0.5]
    with pytest.raises(ConfigError, match="domain.mean is 1 numbers, but images of small have 3 channels"):
        make(root, mean=(0.5,))
    with pytest.raises(ConfigError, match="domain.std is 2 numbers"):
        make(root, std=(0.5, 0.5))


def test_loss_is_cross_entropy_with_two_derivatives_and_score_is_accuracy(root):
    domain = make(root)
    outputs = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1])
    loss = domain.loss(outputs, targets)
    by_hand = -(outputs.log_softmax(1)[0, 0] + outputs.log_softmax(1)[1, 1]) / 2
    torch.testing.assert_close(loss, by_hand)
    assert torch.autograd.gradgradcheck(lambda o: domain.loss(o, targets), (outputs,))
    score = domain.score(outputs, targets)
    assert score.item() == 0.5 and not score.requires_grad


# --------------------------------------------------------------------------- what is refused before training


def _uneven(
    tmp_path: Path, train: dict[str, int], others: dict[str, int] | None = None, image=lambda seed: pixels(seed, 8, 1)
) -> Path:
    """A set whose classes have so many images."""
    size = image(0).shape[1:]
    with new_shard_set(tmp_path / "set", name="own", image_size=size, channels=1) as writer:
        for split, counts in {"train": train, "val": others or train, "test": others or train}.items():
            for number, (name, count) in enumerate(counts.items()):
                for place in range(count):
                    writer.add(split, name, f"{split}/{name}/{place}", as_png(image(100 * number + place)))
    return tmp_path / "set"


def test_a_split_with_too_few_classes_is_named(root):
    with pytest.raises(DataError, match="domain.ways is 5, but split 'val' of small has 4 classes; lower .* at most 4"):
        make(root, ways=5)


def test_classes_with_too_few_images_are_named_three_of_them(tmp_path):
    root = _uneven(tmp_path, {"ant": 4, "bee": 2, "cat": 3, "dog": 1, "eel": 2, "fox": 4})
    with pytest.raises(DataError) as refused:
        make(root, ways=2, shots=1, queries=3)
    assert "takes 1 + 3 images a class" in refused.value.what
    assert "class 'bee' has 2, 'cat' has 3, 'dog' has 1 and 1 more" in refused.value.what
    assert "at most 1" in refused.value.remedy
    make(_uneven(tmp_path / "b", {"ant": 4, "bee": 4}), ways=2, shots=1, queries=3)


def test_a_missing_split_is_named(tmp_path):
    with new_shard_set(tmp_path / "set", name="own", image_size=(8, 8), channels=1) as writer:
        for seed in range(4):
            writer.add("train", "ab"[seed % 2], f"{seed}", as_png(pixels(seed, 8, 1)))
    with pytest.raises(DataError, match="has no split 'val' .it has train"):
        make(tmp_path / "set", ways=2, shots=1, queries=1)


def test_a_constant_channel_and_a_set_without_statistics_are_named(tmp_path):
    flat = _uneven(tmp_path, {"a": 2, "b": 2}, image=lambda seed: np.zeros((1, 8, 8), np.uint8))
    small = {"ways": 2, "shots": 1, "queries": 1}
    with pytest.raises(ConfigError, match="measured std of own is .*constant; set domain.std"):
        make(flat, **small)
    description = json.loads((flat / "dataset.json").read_text())
    (flat / "dataset.json").write_text(json.dumps({**description, "mean": None, "std": None}))
    with pytest.raises(ConfigError, match="domain.mean is not set, and was not measured.*training split"):
        make(flat, **small)
    make(flat, mean=(0.5,), std=(0.5,), **small).episode("test", 0)


def test_turning_needs_square_images(tmp_path):
    wide = _uneven(tmp_path, {"a": 2, "b": 2}, image=lambda seed: pixels(seed, 8, 1)[:, :4])
    small = {"ways": 2, "shots": 1, "queries": 1}
    assert make(wide, **small).episode("train", 0).support.inputs.shape == (2, 1, 4, 8)
    with pytest.raises(ConfigError, match="rotate_classes needs square images, but those of own are 8x4 px"):
        make(wide, augment=AugmentConfig(rotate_classes=True), **small)


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_an_undecodable_image_is_named_with_its_shard(tmp_path, memory_gib):
    root = write_set(tmp_path / "set", images=5)
    shards = ShardSet.open(root)
    data = shards.read(7)
    shard = root / "train-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(data, bytes(len(data))))
    domain = make(root, memory_gib=memory_gib)
    with pytest.raises(DataError, match="image 'train-1/2' in shard .*train-000000.tar cannot be decoded"):
        for index in range(50):
            domain.episode("train", index)


# --------------------------------------------------------------------------- the real thing


def test_real_cifar_fs_episodes(tmp_path):
    source = real_data("cifar-fs.zip")
    if not source.is_file():
        pytest.skip("cifar-fs.zip is not in ../shared/data")
    some = {split: list(names)[:6] for split, names in known_sets()["cifar_fs"].splits.items()}
    pack(source, tmp_path / "set", splits=some)
    settings = {"ways": 5, "shots": 5, "queries": 15, "augment": AugmentConfig(flip=True, crop_padding=4)}
    domain, streamed = make(tmp_path / "set", **settings), make(tmp_path / "set", memory_gib=0.0, **settings)
    for split in CLASSES:
        episode = domain.episode(split, 0)
        assert episode.support.inputs.shape == (25, 3, 32, 32) and episode.query.inputs.shape == (75, 3, 32, 32)
        assert same(episode, streamed.episode(split, 0))
    prepared = domain.prepare(domain.episode("train", 1), torch.device("cpu"), torch.float32)
    assert abs(prepared.query.inputs.mean().item()) < 1 and 0.5 < prepared.query.inputs.std().item() < 2
