"""Photographs and batches: unusable files, several processes, dependence on seed and epoch only."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cadm_paper.data import loading
from cadm_paper.data.check import undecodable
from cadm_paper.data.loading import (
    ImageError,
    Loader,
    batch_plan,
    central_window,
    decode_rgb,
    flip_mask,
    load_image,
    resized,
)
from cadm_paper.data.split import Split

COLOUR = (200, 40, 90)


def noise(h, w, seed=0):
    """A smooth random image, uint8 h x w x 3, which JPEG compresses well."""
    small = np.random.default_rng(seed).integers(0, 256, (max(h // 8, 2), max(w // 8, 2), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


@pytest.fixture
def split(tmp_path):
    """Ten JPEGs of different shapes."""
    (folder := tmp_path / "photographs").mkdir()
    paths = [folder / f"{i}.jpg" for i in range(10)]
    for i, path in enumerate(paths):
        path.write_bytes(encoded(noise(40 + 3 * i, 70 - 3 * i, i)))
    labels = np.arange(10)[:, None] % 4 == np.arange(4)
    return Split("toy", "train", folder, "abcd", map(str, range(10)), paths, labels)


def announcing(width, height):
    """A PNG of a few bytes whose header declares this size."""
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


BAD = {
    "missing": (None, "No such file"),
    "empty": (b"", "an empty file"),
    "a page": (b"<!DOCTYPE html><title>404</title>", "not one of JPEG"),
    "header only": (encoded(noise(64, 64))[:40], "not one of|cannot be decoded"),
    "cut short": (encoded(noise(64, 64))[:-50], "cannot be decoded"),
    "progressive, cut": (encoded(noise(64, 64), progressive=True)[:-50], "cannot be decoded"),
    "png, cut": (encoded(noise(64, 64), "PNG")[:2000], "cannot be decoded"),
    "cmyk, cut": (encoded(Image.new("CMYK", (64, 64), (9, 90, 200, 30)))[:-20], "cannot be decoded"),
    "floats": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "neither 8 nor 16 bits"),
    "jpeg 2000": (encoded(Image.new("RGB", (8, 8)), "JPEG2000"), "not one of JPEG"),
    "ico": (encoded(Image.new("RGB", (16, 16)), "ICO"), "not one of JPEG"),
    "tga": (encoded(Image.new("RGB", (8, 8)), "TGA"), "not one of JPEG"),
    "32 bit": (encoded(Image.new("I", (4, 4), 10**6), "TIFF"), "neither 8 nor 16 bits"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of JPEG"),
    "bomb": (announcing(60_000, 60_000), "exceeds limit"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_photograph_is_one_error_that_names_it(split, case):
    data, reason = BAD[case]
    split.paths[7].unlink() if data is None else split.paths[7].write_bytes(data)
    assert undecodable(split.root, ["6.jpg", "7.jpg"])[0].startswith("7.jpg (")  # the check agrees
    batches = Loader(split, 16, cache=False, workers=1 if case == "cut short" else 0).epoch(2)
    assert [next(batches).indices.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    for start in (
        lambda: next(batches),
        lambda: Loader(split, 16),
    ):  # at its batch, or with the cache at once
        with pytest.raises((ImageError, FileNotFoundError), match=reason) as error:
            start()
        assert str(split.paths[7]) in str(error.value) and "\n" not in str(error.value)


ODD = {
    "grey": (encoded(Image.new("L", (9, 5), 77)), (77, 77, 77)),
    "grey and alpha": (encoded(Image.new("LA", (9, 5), (77, 10)), "PNG"), (77, 77, 77)),
    "two levels": (encoded(Image.new("1", (9, 5), 1), "PNG"), (255, 255, 255)),
    "16 bit": (encoded(np.full((5, 9), 77 * 257, np.uint16), "PNG"), (77, 77, 77)),
    "16 bit, big-endian": (encoded(np.full((5, 9), 77 * 257, ">u2"), "TIFF"), (77, 77, 77)),
    "palette": (encoded(Image.new("RGB", (9, 5), COLOUR).quantize(4), "PNG"), COLOUR),
    "transparent palette": (
        encoded(Image.new("RGB", (9, 5), COLOUR).quantize(4), "PNG", transparency=bytes(4)),
        COLOUR,
    ),
    "alpha": (encoded(Image.new("RGBA", (9, 5), (*COLOUR, 3)), "PNG"), COLOUR),
    "one pixel": (encoded(Image.new("RGB", (1, 1), COLOUR), "PNG"), COLOUR),
    "one line": (encoded(Image.new("RGB", (500, 1), COLOUR), "PNG"), COLOUR),
    "gif": (encoded(Image.new("RGB", (9, 5), COLOUR).quantize(4), "GIF"), COLOUR),
    "webp": (encoded(Image.new("RGB", (9, 5), COLOUR), "WEBP"), COLOUR),
}


@pytest.mark.parametrize("case", ODD)
def test_other_pixel_formats_become_rgb(tmp_path, case):
    data, colour = ODD[case]
    (tmp_path / "x.jpg").write_bytes(data)  # the content decides, not the name
    assert undecodable(tmp_path, ["x.jpg"]) == []
    for resize in ("squash", "crop"):
        got = load_image(tmp_path / "x.jpg", 12, resize=resize)
        assert got.shape == (3, 12, 12) and got.dtype == torch.uint8
        assert (got.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3  # JPEG's and WebP's rounding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_request(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "x.jpg").write_bytes(encoded(noise(40, 64), exif=exif))
    stored = resized(decode_rgb(encoded(noise(40, 64)), "x"), 32)
    assert (load_image(tmp_path / "x.jpg", 32) == stored).all()
    # squashed to a square, turning before resizing or after is the same up to rounding
    turned = stored if orientation <= 4 else stored.transpose(1, 2)
    want = turned.flip([(), (2,), (1, 2), (1,)][(orientation - 1) % 4])
    assert (load_image(tmp_path / "x.jpg", 32, exif=True).int() - want.int()).abs().max() <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 48), st.booleans(), st.integers(0, 9))
def test_resizing_equals_pillow_up_to_rounding(h, w, size, crop, seed):
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))
    image = pixels.permute(2, 0, 1)
    got = resized(image, size, "crop" if crop else "squash").permute(1, 2, 0).numpy()
    part = Image.fromarray((central_window(image, 1, 1) if crop else image).permute(1, 2, 0).numpy())
    pillow = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
    assert got.shape == (size, size, 3) and np.abs(got.astype(int) - pillow).max() <= 2  # two roundings


@pytest.mark.parametrize("options", [dict(subsampling=s, progressive=p) for s in (0, 1, 2) for p in (0, 1)])
def test_jpegs_are_decoded_as_by_pillow(options):
    data = encoded(noise(51, 37), **options)
    assert (decode_rgb(data, "x").permute(1, 2, 0).numpy() == np.asarray(Image.open(io.BytesIO(data)))).all()


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 60),
    batch=st.integers(1, 17),
    seed=st.integers(-5, 2**40),
    epoch=st.integers(0, 99),
    world=st.integers(1, 5),
    start=st.integers(0, 9),
)
def test_each_image_once_for_any_number_of_processes(n, batch, seed, epoch, world, start):
    how = dict(seed=seed, epoch=epoch, shuffle=True)
    whole = batch_plan(n, batch, **how)
    assert sorted(i for b in whole for i in b) == list(range(n)) and all(len(b) == batch for b in whole[:-1])
    ranks = [batch_plan(n, batch, **how, rank=r, world=world, start=start) for r in range(world)]
    joined = [np.concatenate(parts).tolist() for parts in zip(*ranks, strict=True)]
    assert joined == [b.tolist() for b in whole[start:]]
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*ranks))
    flips = flip_mask(np.arange(n), seed, epoch)  # of the image, not of its batch
    assert all((flip_mask(torch.from_numpy(b), seed, epoch) == flips[b]).all() for b in whole)


@pytest.mark.parametrize("wrong", [dict(batch_size=0), dict(start=-1), dict(rank=2, world=2), dict(rank=-1)])
def test_invalid_batches_are_rejected_at_once(split, wrong):
    with pytest.raises(ValueError):
        Loader(split, 16, cache=False).epoch(**{"batch_size": 4, **wrong})  # at the call, not the first batch


def passed(split, start=0, seed=5, **how):
    return list(Loader(split, 24, **how).epoch(4, seed=seed, epoch=3, shuffle=True, start=start))


def same(a, b):
    return len(a) == len(b) and all((x == y).all() for one, other in zip(a, b) for x, y in zip(one, other))


def test_batches_depend_on_seed_and_epoch_only(split):
    plain, state = passed(split, cache=False), torch.random.get_rng_state()
    for how in (dict(workers=2, cache=False), dict(workers=2), dict()):
        assert same(plain, passed(split, **how)) and same(plain[1:], passed(split, start=1, **how)), how
    assert not same(plain, passed(split, seed=6)) and torch.equal(state, torch.random.get_rng_state())
    loader = Loader(split, 24, workers=1, cache=False)
    next(loader.epoch(3))  # stopped early: the next pass starts again
    assert same(plain, list(loader.epoch(4, seed=5, epoch=3, shuffle=True)))


def test_skipped_batches_are_not_read(split):
    whole = list(Loader(split, 16, cache=False).epoch(3))
    for path in split.paths[:6]:
        path.unlink()
    assert same(whole[2:], list(Loader(split, 16, workers=1, cache=False).epoch(3, start=2)))


# The array of decoded images


def test_the_array_is_built_once_and_never_stale(split):
    photograph = split.paths[4]
    photograph.write_bytes(encoded(noise(40, 64, 1), "BMP"))
    before, [array], status = passed(split), split.root.glob(".cadm-index/*.raw"), photograph.stat()
    made = array.stat()
    (array.parent / ".lock").unlink()
    assert same(before, passed(split)) and array.stat() == made
    assert not (array.parent / ".lock").exists()  # reading takes no lock: the folder may be read-only
    photograph.write_bytes(encoded(noise(40, 64, 2), "BMP"))  # of the same size, at the same time
    os.utime(photograph, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, [array] = passed(split), split.root.glob(".cadm-index/*.raw")
    assert photograph.stat().st_size == status.st_size and same(after, passed(split, cache=False))
    assert not same(before, after) and not same(after, passed(split, resize="crop"))


def test_a_damaged_array_is_replaced(split):
    before, [array] = passed(split), split.root.glob(".cadm-index/*.raw")
    whole = array.read_bytes()
    for cut in (0, 1000):
        array.write_bytes(whole[:cut])
        assert same(before, passed(split)) and array.read_bytes() == whole


def test_in_a_read_only_folder_the_array_is_elsewhere_or_nowhere(split, tmp_path, monkeypatch):
    before = passed(split, cache=False)
    monkeypatch.setenv("CADM_OUTPUTS", str(tmp_path / "outputs"))
    split.root.chmod(0o555)
    assert same(before, passed(split)) and len(list((tmp_path / "outputs/cache").glob("*.raw"))) == 1
    split.root.chmod(0o755)
    shutil.rmtree(tmp_path / "outputs")
    passed(split)
    split.root.chmod(0o555)  # read-only with an array: no second one
    assert same(before, passed(split)) and not (tmp_path / "outputs").exists()
    split.root.chmod(0o755)
    shutil.rmtree(split.root / ".cadm-index")
    (split.root / ".cadm-index").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot store decoded images"):
        assert same(before, passed(split))
    monkeypatch.setattr(loading, "CACHE_BYTES", 100)
    assert same(before, passed(split))  # too large: no array, no warning
