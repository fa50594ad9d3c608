"""One reading of a picture: by path it is what was packed, whatever kind of file it is, and the rule holds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import pixels
from PIL import Image

from cml_dist.config.schema import ModelConfig
from cml_dist.data.pixels import read_pixels, size_and_channels
from cml_dist.data.shard_writer import new_shard_set
from cml_dist.data.shards import ShardSet
from cml_dist.errors import DataError
from cml_dist.nets.build import build_net
from cml_dist.run.predict import Learner
from cml_dist.tools.fit_image import fit_image

SIZE = (16, 16)
GREY = pixels(1, 16, 1)
COLOUR = pixels(2, 16, 3)
OTHER = Image.fromarray(255 - GREY[0])
DEEP = (GREY[0].astype(np.uint16) << 8) + np.arange(256, dtype=np.uint16).reshape(SIZE)
"""16 bits, of which the lower eight say nothing."""


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(image: Image.Image, colours: np.ndarray, **options) -> bytes:
    image = image.copy()
    image.putpalette(colours.astype(np.uint8).tobytes())
    return encode(image, **options)


def lying(orientation: int) -> bytes:
    """A PNG that a viewer shows as GREY."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions, each the inverse of EXIF's
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(GREY[0]).transpose(Image.Transpose(back[orientation])), exif=exif)


def kinds() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """Files by kind, and the pixels that the rule gives them as they are; None: equality by path and packed is all."""
    grey, colour = Image.fromarray(GREY[0]), Image.fromarray(COLOUR.transpose(1, 2, 0))
    deep, big = Image.fromarray(DEEP), Image.frombytes("I;16B", SIZE, DEEP.astype(">u2").tobytes())
    veil = Image.fromarray(pixels(3, 16, 1)[0])
    ramp, shades = np.arange(256), pixels(4, 16, 3).reshape(-1, 3)
    indexed = Image.frombytes("P", SIZE, GREY[0].tobytes())
    rows = {"append_images": [OTHER, OTHER], "save_all": True}
    exact: dict[str, tuple[bytes, np.ndarray]] = {
        "grey PNG": (encode(grey), GREY),
        "grey BMP": (encode(grey, "BMP"), GREY),
        "PGM": (encode(grey, "PPM"), GREY),
        "GIF": (encode(grey, "GIF"), GREY),
        "grey, opaque": (encode(Image.merge("LA", (grey, Image.new("L", SIZE, 255)))), GREY),
        "palette of greys": (palette(indexed, np.stack([ramp] * 3, 1)), GREY),
        "palette of colours": (palette(indexed, shades), shades[GREY[0]].transpose(2, 0, 1)),
        "two colours": (encode(grey.point(lambda v: 255 * (v > 99), "1")), np.where(GREY > 99, 255, 0)),
        "PNG of 16 bits": (encode(deep), GREY),
        "PGM of 16 bits": (encode(deep, "PPM"), GREY),
        "TIFF of 16 bits": (encode(deep, "TIFF"), GREY),
        "TIFF of 16 bits, big-endian": (encode(big, "TIFF"), GREY),
        "animated GIF": (encode(grey, "GIF", **rows), GREY),
        "animated PNG": (encode(grey, "PNG", **rows), GREY),
        "animated WebP": (encode(grey.convert("RGB"), "WEBP", lossless=True, **rows), np.repeat(GREY, 3, 0)),
        "TIFF of several pages": (encode(grey, "TIFF", **rows), GREY),
        **{f"orientation {number}": (lying(number), GREY) for number in range(2, 9)},
        "colour PNG": (encode(colour), COLOUR),
        "colour BMP": (encode(colour, "BMP"), COLOUR),
        "PPM": (encode(colour, "PPM"), COLOUR),
        "TIFF": (encode(colour, "TIFF"), COLOUR),
        "CMYK TIFF": (encode(Image.merge("CMYK", [*Image.eval(colour, lambda v: 255 - v).split(),
                                                  Image.new("L", SIZE)]), "TIFF"), COLOUR),
        "all transparent": (encode(Image.merge("RGBA", [*colour.split(), Image.new("L", SIZE)])), 0 * COLOUR + 255),
        "one grey transparent": (encode(grey, transparency=int(GREY[0, 0, 0])),
                                 np.where(GREY == GREY[0, 0, 0], 255, GREY)),
        "one grey of 16 bits transparent": (encode(deep, transparency=int(DEEP[0, 0])),
                                            np.where(DEEP == DEEP[0, 0], 255, GREY)),
    }  # fmt: skip
    alike = {
        "grey JPEG": encode(grey, "JPEG"),
        "colour JPEG": encode(colour, "JPEG"),
        "CMYK JPEG": encode(colour.convert("CMYK"), "JPEG"),
        "WebP": encode(colour, "WEBP"),
        "half transparent": encode(Image.merge("RGBA", [*colour.split(), veil])),
        "half transparent grey": encode(Image.merge("LA", [grey, veil])),
        "transparent palette": palette(indexed, shades, transparency=bytes(ramp.astype(np.uint8))),
        "lab": encode(Image.merge("LAB", colour.split()), "TIFF"),
        "wide": encode(Image.fromarray(pixels(5, 40, 3).transpose(1, 2, 0)[:17])),
        "tall, on its side": encode(Image.fromarray(pixels(5, 64, 1)[0, :, :9]), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08"
                                    b"\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "one pixel": encode(Image.new("RGB", (1, 1), "teal")),
        "large, 16 bits": encode(Image.fromarray(np.kron(DEEP, np.ones((5, 5), np.uint16)))),
    }  # fmt: skip
    return {**exact, **{kind: (data, None) for kind, data in alike.items()}}


REFUSED = {
    "32-bit integers": (encode(Image.fromarray(GREY[0].astype(np.int32)), "TIFF"), "pixels of mode I, whose range"),
    "floats": (encode(Image.fromarray(GREY[0].astype(np.float32)), "TIFF"), "pixels of mode F, whose range"),
    "cut off": (encode(Image.fromarray(GREY[0]))[:200], "cannot be decoded"),
    "no picture": (b"no picture", "cannot be decoded .it is not an image"),
}


def learner(channels: int) -> Learner:
    """A network whose inputs are the pixels / 255."""
    model, shapes = ModelConfig(backbone="conv4", filters=4), {"input_shape": (channels, *SIZE), "output_dim": 2}
    net = build_net(model, **shapes, seed=0, colearner=False)
    plain = {"mean": [0.0] * channels, "std": [1.0] * channels}
    about = {"score": "accuracy", "inner_steps": 1, "body_lr": 0.1, "head_lr": 0.1, "preprocessing": plain, **shapes}
    return Learner({"model": model.model_dump(mode="json"), **about}, net.state_dict(), torch.device("cpu"))


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def served(request) -> Learner:
    return learner(request.param)


def test_by_path_it_is_what_was_packed(served, tmp_path):
    channels, files = served.description["input_shape"][0], kinds()
    with new_shard_set(tmp_path / "set", name="kinds", image_size=SIZE, channels=channels) as writer:
        for number, (kind, (data, _)) in enumerate(files.items()):
            (tmp_path / f"{number}").write_bytes(data)
            writer.add("test", "all", f"{number}", fit_image(data, kind, SIZE, channels, resize=True))
    shards = ShardSet.open(tmp_path / "set")
    by_path = (served.inputs([tmp_path / f"{number}" for number in range(len(files))]) * 255).round()
    packed = np.stack([shards.decode(number) for number in range(len(files))])
    for kind, one, other in zip(files, by_path.numpy(), packed, strict=True):
        assert np.array_equal(one, other), kind


@pytest.mark.parametrize(("kind", "found"), kinds().items(), ids=list(kinds()))
def test_the_rule(kind, found):
    data, expected = found
    own = expected is not None and len(expected) == 1
    size, channels = size_and_channels(data, kind)
    pixels = read_pixels(data, kind, channels)
    assert pixels.dtype == np.uint8 and pixels.shape == (channels, *size)
    if expected is not None:
        assert channels == len(expected)
        assert np.array_equal(pixels, expected)
    if own:  # grey in a colour set
        assert np.array_equal(read_pixels(data, kind, 3), np.repeat(expected, 3, 0))
    else:
        luma = np.asarray(Image.fromarray(read_pixels(data, kind, 3).transpose(1, 2, 0)).convert("L"))
        assert np.array_equal(read_pixels(data, kind, 1)[0], luma)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_alike(kind, served, tmp_path):
    data, said = REFUSED[kind]
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(DataError, match=said) as packed:
        fit_image(data, str(path), SIZE, 1, resize=True)
    with pytest.raises(DataError) as by_path:
        served.inputs([path])
    assert str(packed.value) == str(by_path.value) and str(path) in str(by_path.value)


def test_another_aspect_is_cut_at_the_centre_also_by_path(served, tmp_path):
    wide = np.zeros((16, 48), dtype=np.uint8)
    wide[:, 16:32] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (served.inputs([tmp_path / "wide.png"]) * 255).round().unique().tolist() == [200]


def test_a_file_that_is_not_there_is_named(served, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/none.png cannot be read .No such file"):
        served.inputs([Path(tmp_path) / "none.png"])


# --------------------------------------------------------------------------- labels


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda y: [np.int64(one) for one in y]])
def test_labels_count_by_their_values(make):
    adapted = learner(1).adapt(list(pixels(6, 16, 3)), make([7, 7, 3]))
    assert adapted.classes == [7, 3] and [type(one) for one in adapted.classes] == [int, int]
    assert adapted.probabilities(list(GREY)).shape == (1, 2)
    assert adapted.predict(list(GREY))[0] in (7, 3)


def test_labels_that_name_no_class_are_refused():
    images = list(pixels(6, 16, 2))
    for labels, said in ((torch.eye(2), "label tensor.* cannot name a class"), ([[1], [2]], r"label \[1\] cannot")):
        with pytest.raises(DataError, match=said):
            learner(1).adapt(images, labels)
