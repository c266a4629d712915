"""Photographs, packs and feeding: bad files, other processes, full disks, and that nothing but seed and epoch decides what is fed."""

import io
import json
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as TF

from cadm_paper.data import feed, images
from cadm_paper.data import pack as packing
from cadm_paper.data.feed import Feeder, batch_plan, epoch_order, flip_mask, prepare, random_words
from cadm_paper.data.images import ImageError, decode_rgb, load_image, resize_square
from cadm_paper.data.pack import Pack, PackError, pack, verify_pack
from cadm_paper.data.split import DataError, Split

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("CADM_SHARED_DATA", ROOT.parent / "shared" / "data"))
COCO = sorted((SHARED / "coco-tiny").glob("*/*.jpg"))
needs_photographs = pytest.mark.skipif(not COCO, reason=f"no photographs in {SHARED}")


def noise(h, w, seed=0):
    """A smooth random picture, uint8 h x w x 3: what JPEG is made for, but nowhere constant."""
    small = np.random.default_rng(seed).integers(0, 256, (max(h // 8, 2), max(w // 8, 2), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC))


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


@pytest.fixture
def split(tmp_path):
    """Ten JPEGs of different shapes."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(jpeg(noise(40 + 3 * i, 70 - 3 * i, i)))
    return split_of(folder, 10)


def split_of(folder, n):
    labels = (np.arange(n)[:, None] % 4 == np.arange(4)).astype(np.int8)
    return Split(
        "toy",
        "train",
        Path(folder),
        tuple("abcd"),
        tuple(map(str, range(n))),
        [Path(folder) / f"{i}.jpg" for i in range(n)],
        labels,
    )


# Photographs


def announcing(width, height):
    """A PNG whose header announces a picture of this size, in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def as_file(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


BAD = {
    "empty": (b"", "an empty file"),
    "a page": (b"<!DOCTYPE html><title>404</title>", "not one of JPEG"),
    "header only": (jpeg(noise(64, 64))[:40], "not one of|cannot be decoded"),
    "cut short": (jpeg(noise(64, 64))[:-50], "cannot be decoded"),
    "cut in half": (jpeg(noise(200, 200))[:4000], "cannot be decoded"),
    "progressive, cut": (jpeg(noise(64, 64), progressive=True)[:-50], "cannot be decoded"),
    "png, cut": (as_file(Image.fromarray(noise(64, 64)), "PNG")[:2000], "cannot be decoded"),
    "cmyk, cut": (as_file(Image.new("CMYK", (64, 64), (9, 90, 200, 30)), "JPEG")[:-20], "cannot be decoded"),
    "floats": (as_file(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of JPEG"),
    "bomb": (announcing(60_000, 60_000), "pixels; shrink"),
    "too large": (announcing(10_000, 9_000), "10000 x 9000 is larger"),  # Pillow itself would only warn
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_photograph_is_one_error_that_names_it(split, case, workers):
    data, reason = BAD[case]
    split.paths[7].write_bytes(data)
    feeder = Feeder(split, 16, workers=workers)
    batches = feeder.epoch(2)
    good = [next(batches) for _ in range(3)]
    with pytest.raises(ImageError, match=reason) as error:
        next(batches)
    assert (
        str(split.paths[7]) in str(error.value)
        and "\n" not in str(error.value)
        and isinstance(error.value, DataError)
    )
    assert [b.indices.tolist() for b in good] == [[0, 1], [2, 3], [4, 5]]
    assert next(iter(feeder.epoch(5))).indices.tolist() == [0, 1, 2, 3, 4]  # the feeder itself lives on


@pytest.mark.parametrize(
    "make", [lambda p: p.unlink(), lambda p: (p.unlink(), p.mkdir())], ids=["missing", "a folder"]
)
def test_no_file_at_all(split, make):
    make(split.paths[3])
    with pytest.raises(ImageError, match=str(split.paths[3])):
        list(Feeder(split, 16).epoch(10))


COLOUR = (200, 40, 90)
ODD = {
    "grey": (as_file(Image.new("L", (9, 5), 77), "JPEG"), (77, 77, 77)),
    "grey and alpha": (as_file(Image.new("LA", (9, 5), (77, 10)), "PNG"), (77, 77, 77)),
    "two levels": (as_file(Image.new("1", (9, 5), 1), "PNG"), (255, 255, 255)),
    "16 bit": (as_file(Image.fromarray(np.full((5, 9), 77 * 257, np.uint16)), "PNG"), (77, 77, 77)),
    "16 bit, big-endian": (as_file(Image.fromarray(np.full((5, 9), 77 * 257, ">u2")), "TIFF"), (77, 77, 77)),
    "palette": (as_file(Image.new("RGB", (9, 5), COLOUR).quantize(4), "PNG"), COLOUR),
    "alpha": (as_file(Image.new("RGBA", (9, 5), (*COLOUR, 3)), "PNG"), COLOUR),
    "one pixel": (as_file(Image.new("RGB", (1, 1), COLOUR), "PNG"), COLOUR),
    "one line": (as_file(Image.new("RGB", (500, 1), COLOUR), "PNG"), COLOUR),
    "webp": (as_file(Image.new("RGB", (9, 5), COLOUR), "WEBP"), COLOUR),
}


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("case", ODD)
def test_odd_photographs_become_rgb(tmp_path, case, resize):
    data, colour = ODD[case]
    (tmp_path / "x.jpg").write_bytes(data)  # the name says JPEG; the content decides
    got = load_image(tmp_path / "x.jpg", 12, resize=resize)
    assert got.shape == (3, 12, 12) and got.dtype == torch.uint8
    assert (got.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3  # JPEG's and WebP's rounding


def test_palette_with_transparency(tmp_path):
    image = Image.new("RGB", (9, 5), COLOUR).quantize(4)
    image.info["transparency"] = bytes([0, 0, 0, 0])
    image.save(tmp_path / "x.png", transparency=bytes([0, 0, 0, 0]))
    got = load_image(tmp_path / "x.png", 4)
    assert (got == torch.tensor(COLOUR, dtype=torch.uint8).view(3, 1, 1)).all()


def test_cmyk_is_what_pillow_makes_of_it(tmp_path):
    Image.fromarray(noise(30, 40)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    theirs = np.asarray(Image.open(tmp_path / "x.jpg").convert("RGB"))
    assert (decode_rgb((tmp_path / "x.jpg").read_bytes(), "x").numpy() == theirs).all()
    assert abs(theirs.astype(int) - noise(30, 40)).mean() < 12  # and not its negative


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_unless_asked_for(tmp_path, orientation):
    pixels = noise(40, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "x.jpg").write_bytes(jpeg(pixels, exif=exif))
    (tmp_path / "y.jpg").write_bytes(jpeg(pixels))
    stored, turned = load_image(tmp_path / "y.jpg", 32), load_image(tmp_path / "x.jpg", 32, exif=True)
    assert (load_image(tmp_path / "x.jpg", 32) == stored).all()
    # squashed to a square, turning before resizing or after is the same up to rounding
    turns = [
        lambda x: x,
        lambda x: x.flip(2),
        lambda x: x.flip(1, 2),
        lambda x: x.flip(1),
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(1, 2).flip(2),
        lambda x: x.transpose(1, 2).flip(1, 2),
        lambda x: x.transpose(1, 2).flip(1),
    ]
    assert (turned.int() - turns[orientation - 1](stored).int()).abs().max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 70),
    w=st.integers(1, 70),
    size=st.integers(1, 48),
    resize=st.sampled_from(["squash", "crop"]),
    seed=st.integers(0, 9),
)
def test_resizing_stays_between_darkest_and_brightest(h, w, size, resize, seed):
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))
    got = resize_square(pixels, size, resize)
    assert got.shape == (size, size, 3) and got.is_contiguous()
    part = pixels if resize == "squash" else images.central_square(pixels)
    assert (got.amin((0, 1)) >= part.amin((0, 1))).all() and (got.amax((0, 1)) <= part.amax((0, 1))).all()
    pillow = np.asarray(Image.fromarray(part.numpy()).resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(got.numpy().astype(int) - pillow).max() <= 1


@pytest.mark.parametrize(
    "options", [dict(subsampling=s, progressive=p) for s in (0, 1, 2) for p in (False, True)], ids=str
)
def test_both_decoders_give_the_same_bytes(monkeypatch, options):
    if images.torchvision_decoder() is None:
        pytest.skip("this torchvision has no JPEG decoder")
    data = jpeg(noise(51, 37), **options)
    fast = decode_rgb(data, "x")
    monkeypatch.setattr(images, "torchvision_decoder", lambda: None)
    assert (decode_rgb(data, "x") == fast).all()


@needs_photographs
def test_both_decoders_give_the_same_bytes_on_photographs(monkeypatch):
    fast = [decode_rgb(p.read_bytes(), p) for p in COCO[::4]]
    monkeypatch.setattr(images, "torchvision_decoder", lambda: None)
    assert all((decode_rgb(p.read_bytes(), p) == f).all() for p, f in zip(COCO[::4], fast))


def test_draft_changes_large_jpegs_a_little_and_small_ones_not(tmp_path):
    (tmp_path / "large.jpg").write_bytes(jpeg(noise(600, 800)))
    (tmp_path / "small.jpg").write_bytes(jpeg(noise(150, 180)))

    def both(name):
        return [load_image(tmp_path / name, 80, draft=d).int() for d in (False, True)]

    exact, draft = both("large.jpg")
    assert 0 < (exact - draft).abs().float().mean() < 2
    exact, draft = both("small.jpg")
    assert (exact == draft).all()


# Order, chance, batches


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 60),
    batch=st.integers(1, 17),
    seed=st.integers(-5, 2**40),
    epoch=st.integers(0, 99),
    world=st.integers(1, 5),
    start=st.integers(0, 9),
)
def test_every_image_once_whatever_the_number_of_processes(n, batch, seed, epoch, world, start):
    how = dict(seed=seed, epoch=epoch, shuffle=True)
    whole = batch_plan(n, batch, **how)
    assert sorted(i for b in whole for i in b) == list(range(n)) and all(len(b) == batch for b in whole[:-1])
    ranks = [batch_plan(n, batch, **how, rank=r, world=world, start=start) for r in range(world)]
    joined = [np.concatenate(parts).tolist() for parts in zip(*ranks, strict=True)]
    assert joined == [b.tolist() for b in whole[start:]]
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*ranks))


@pytest.mark.parametrize(
    "wrong",
    [dict(batch_size=0), dict(start=-1), dict(rank=2, world=2), dict(rank=-1), dict(shuffle=True)],
    ids=str,
)
def test_impossible_batches_are_refused_before_anything_is_read(split, wrong):
    with pytest.raises(ValueError):
        Feeder(split, 16).epoch(**{"batch_size": 4, **wrong})  # not at the first batch: at the call


def test_chance_is_fair_and_unrelated():
    n = 40_000
    words = np.stack(
        [random_words(np.arange(n), *key) for key in [(0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1), (1, 1, 1)]]
    )
    bits = np.unpackbits(words.view(np.uint8).reshape(len(words), n, 8), axis=2).astype(float)
    assert np.abs(bits.mean(1) - 0.5).max() < 5 * 0.5 / np.sqrt(n)  # each of 64 bits, each key
    assert np.abs(np.corrcoef(bits.reshape(len(words), -1)) - np.eye(len(words))).max() < 5 / np.sqrt(64 * n)
    first = np.array([epoch_order(7, seed, 0)[0] for seed in range(7000)])
    counts = np.bincount(first, minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 30  # chi-squared with 6 degrees: p < 1e-4


def test_flips_belong_to_the_image_not_the_batch():
    order = epoch_order(50, 3, 2)
    assert (flip_mask(order, 3, 2) == flip_mask(np.arange(50), 3, 2)[order]).all()
    assert (flip_mask(torch.from_numpy(order), 3, 2) == flip_mask(order, 3, 2)).all()


def fed(split, size=24, batch=4, *, start=0, **how):
    return list(Feeder(split, size, **how).epoch(batch, seed=5, epoch=3, shuffle=True, start=start))


def same(a, b):
    return len(a) == len(b) and all((x == y).all() for one, other in zip(a, b) for x, y in zip(one, other))


def test_nothing_but_seed_and_epoch_decides(split, tmp_path):
    plain = fed(split, in_memory=False)
    raw = pack(split, tmp_path / "raw", 24, encoding="raw")
    for how in [
        dict(workers=1),
        dict(workers=4, prefetch=1),
        dict(workers=4, prefetch=50),
        dict(workers=3, in_memory=False),
        dict(in_memory=True),
        dict(pack=raw),
        dict(pack=raw, workers=2, in_memory=False),
        dict(pack=Pack(raw)),
    ]:
        assert same(plain, fed(split, **how)), how
    assert not same(plain, list(Feeder(split, 24).epoch(4, seed=6, epoch=3, shuffle=True)))
    assert not same(plain, list(Feeder(split, 24).epoch(4, seed=5, epoch=4, shuffle=True)))


def test_batches_that_are_kept_stay_as_they_are(split):
    feeder = Feeder(split, 24, workers=2, in_memory=False)
    kept, sums = [], []
    for _ in range(3):
        for batch in feeder.epoch(3, seed=0, shuffle=True):
            kept.append(batch.images[1:] if len(kept) % 2 else batch.images.numpy()[..., 1:])
            sums.append(np.asarray(kept[-1]).astype(np.int64).sum())
            del batch
    assert [np.asarray(k).astype(np.int64).sum() for k in kept] == sums


def test_memory_of_batches_is_used_again(split):
    feeder, places = Feeder(split, 24, workers=2, prefetch=2, in_memory=False), set()
    for epoch in range(6):
        for batch in feeder.epoch(2, seed=0, epoch=epoch, shuffle=True):
            places.add(batch.images.data_ptr())
    assert (
        len(places) <= 2 + 2 + 2
    )  # the one in use, those ahead, the one just begun, what threads still hold; not thirty


def test_skipped_batches_are_not_read(split):
    whole = [b.images.clone() for b in Feeder(split, 16).epoch(3)]
    for path in split.paths[:6]:
        path.unlink()
    rest = list(Feeder(split, 16, workers=2).epoch(3, start=2))
    assert [b.indices.tolist() for b in rest] == [[6, 7, 8], [9]] and all(
        (a.images == b).all() for a, b in zip(rest, whole[2:])
    )


def test_stopping_early_leaves_no_work_behind(split):
    before = set(threading.enumerate())
    feeder = Feeder(split, 24, workers=2, prefetch=3, in_memory=False)
    batches = feeder.epoch(1)
    next(batches)
    batches.close()
    assert len(list(feeder.epoch(4))) == 3
    ours = set(threading.enumerate()) - before
    feeder.close()
    assert ours and not any(thread.is_alive() for thread in ours)


def test_threads_end_with_their_feeder(split):
    before = threading.active_count()
    feeder = Feeder(split, 24, workers=3)
    list(feeder.epoch(4))
    assert threading.active_count() > before
    del feeder
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_small_sets_are_decoded_once(split):
    feeder = Feeder(split, 16)
    first = list(feeder.epoch(4))
    for path in split.paths:
        path.unlink()
    assert same(first, list(feeder.epoch(4)))
    with pytest.raises(ImageError):
        list(Feeder(split, 16, in_memory=False).epoch(4))


@settings(max_examples=30, deadline=None)
@given(
    b=st.integers(0, 4),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    seed=st.integers(0, 99),
    how=st.sampled_from(["imagenet", "half"]),
    last=st.booleans(),
    contiguous=st.booleans(),
)
def test_prepare_is_torchvisions_normalisation(b, h, w, seed, how, last, contiguous):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(0, 256, (b, 3, h, w), dtype=np.uint8))
    x = x if contiguous else x.contiguous(memory_format=torch.channels_last)
    flip, before = rng.random(b) < 0.5, x.clone()
    got = prepare(x, normalise=how, flip=flip, channels_last=last)
    want = torch.where(torch.from_numpy(flip).view(-1, 1, 1, 1), x.flip(3), x).float() / 255
    torch.testing.assert_close(got, TF.normalize(want, *feed.PIXELS[how]) if b else want, atol=1e-5, rtol=0)
    assert (x == before).all() and got.is_contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    assert prepare(x, normalise=how, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_prepared_batches_that_are_kept_stay_as_they_are():
    batches = [torch.full((4, 3, 8, 8), value, dtype=torch.uint8) for value in range(0, 200, 20)]
    kept = [prepare(b, normalise="half")[i % 2 :, :2] for i, b in enumerate(batches)]
    assert all(((k + 1) * 127.5 - b[0, 0, 0, 0]).abs().max() < 1e-3 for k, b in zip(kept, batches))
    places = {prepare(b).data_ptr() for b in batches}
    assert len(places) <= 2  # nobody kept these: the same memory again


def test_decoding_on_a_device_gives_the_same_up_to_rounding(split, tmp_path):
    """With the CPU as device; the GPU's decoder is another one (benchmarks/loading.py compares it where there is a GPU)."""
    split.paths[3].write_bytes(ODD["grey"][0])
    split.paths[6].write_bytes(ODD["alpha"][0])
    made = pack(split, tmp_path / "p", 24)
    for how in [dict(), dict(resize="crop"), dict(exif=True), dict(pack=made)]:
        for workers in (0, 2):
            ours, theirs = (
                feed.DeviceFeeder(split, 24, "cpu", workers=workers, **how),
                Feeder(split, 24, **how),
            )
            for a, b in zip(
                ours.epoch(4, seed=1, shuffle=True), theirs.epoch(4, seed=1, shuffle=True), strict=True
            ):
                assert (
                    (a.images.int() - b.images.int()).abs().max() <= 1
                    and (a.targets == b.targets).all()
                    and (a.indices == b.indices).all()
                )
    split.paths[5].write_bytes(split.paths[5].read_bytes()[:-30])
    batches = feed.DeviceFeeder(split, 24, "cpu", workers=2).epoch(4)
    next(batches)
    with pytest.raises(ImageError, match="5.jpg: cannot be decoded"):
        next(batches)
    with pytest.raises(ValueError, match="nothing to decode"):
        feed.DeviceFeeder(
            split.take([0]), 24, "cpu", pack=pack(split.take([0]), tmp_path / "raw", 24, encoding="raw")
        )


# Packs


def test_a_pack_feeds_what_files_feed_up_to_its_stated_loss(split, tmp_path):
    made = Pack(pack(split, tmp_path / "p", 24, workers=2))
    files, packed = fed(split), fed(split, pack=made)
    for a, b in zip(files, packed, strict=True):
        assert (a.indices == b.indices).all() and (a.targets == b.targets).all()
    error = (
        np.mean(
            [
                (a.images.float() - b.images.float()).abs().mean().item() * len(a.images)
                for a, b in zip(files, packed)
            ]
        )
        * len(files)
        / 10
    )
    assert error == pytest.approx(made.loss["mean_absolute_error"], abs=1e-5) and made.loss["images"] == 10
    part = split.take([8, 1, 4])
    assert same(
        list(Feeder(part, 24, pack=made).epoch(2)), list(Feeder(part, 24, pack=tmp_path / "p").epoch(2))
    )
    assert (
        next(iter(Feeder(part, 24, pack=made).epoch(1))).images
        == torch.from_numpy(made.image(8).copy()).permute(2, 0, 1)
    ).all()


@pytest.mark.parametrize(
    "asked",
    [dict(image_size=32), dict(image_size=24, resize="crop"), dict(image_size=24, exif=True)],
    ids=str,
)
def test_another_geometry_is_refused(split, tmp_path, asked):
    made = pack(split, tmp_path / "p", 24)
    with pytest.raises(PackError, match="packed as 24 x 24, squash, EXIF orientation ignored, but"):
        Feeder(split, pack=made, **asked)


def test_other_photographs_are_refused(split, tmp_path):
    made = pack(split.take(range(8)), tmp_path / "p", 24)
    with pytest.raises(PackError, match="lacks 2 of 10 images of toy train, e.g. 8"):
        Feeder(split, 24, pack=made)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packing, "SHARD_BYTES", 3 * 3 * 24**2 // 10)  # three images each


def test_an_interrupted_pack_goes_on_where_it_stopped(split, tmp_path, small_shards):
    good = split.paths[7].read_bytes()
    whole = pack(split, tmp_path / "whole", 24)
    split.paths[7].write_bytes(good[:-30])
    monkey = packing.sample_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            packing, "sample_loss", lambda split, load, plan: dict(mean_bytes=1.0)
        )  # it would meet the bad one first
        with pytest.raises(ImageError, match="7.jpg: cannot be decoded"):
            pack(split, tmp_path / "p", 24, workers=2)
    assert packing.sample_loss is monkey and not (tmp_path / "p").exists()
    work = tmp_path / ".p.part"
    kept = {p: p.stat().st_mtime_ns for p in work.glob("shard-*.bin")}
    assert sorted(p.name for p in kept) == ["shard-00000.bin", "shard-00001.bin"] and not list(
        work.glob(".*.part")
    )
    split.paths[7].write_bytes(good)
    made = pack(split, tmp_path / "p", 24)
    assert all((made / p.name).stat().st_mtime_ns == when for p, when in kept.items()) and not work.exists()
    assert {p.name: p.read_bytes() for p in made.iterdir() if p.suffix != ".npz"} == {
        p.name: p.read_bytes() for p in whole.iterdir() if p.suffix != ".npz"
    }
    verify_pack(made)


def test_what_an_interrupted_pack_left_is_not_trusted_blindly(split, tmp_path, small_shards):
    whole = pack(split, tmp_path / "whole", 24)
    work = tmp_path / ".p.part"
    packing.write_json(work / "plan.json", packing.pack_plan(split, 24, "squash", False, False, "jpeg", 90))
    packing.write_shard(work, 0, [b"x", b"y", b"z"])
    (work / "shard-00000.bin").write_bytes(b"xyZ")  # damaged since
    (work / "shard-00001.json").write_text("{}")
    made = pack(split, tmp_path / "p", 24)
    assert [p.read_bytes() for p in sorted(made.glob("*.bin"))] == [
        p.read_bytes() for p in sorted(whole.glob("*.bin"))
    ]
    packing.write_json(tmp_path / ".q.part" / "plan.json", {"schema": 0})  # another request's leftovers
    packing.write_shard(tmp_path / ".q.part", 0, [b"x", b"y", b"z"])
    verify_pack(pack(split, tmp_path / "q", 24))


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_a_full_disk_leaves_nothing_half_written(split, tmp_path, encoding):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = sum(len(packing.encode(load_image(p, 24).permute(1, 2, 0), encoding)) for p in split.paths) - 50
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(PackError, match="cannot be written: File too large") as error:
            pack(split, tmp_path / "p", 24, encoding=encoding)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "p") in str(error.value) and not (tmp_path / "p").exists()
    assert [p.name for p in (tmp_path / ".p.part").iterdir()] == ["plan.json"]
    verify_pack(pack(split, tmp_path / "p", 24, encoding=encoding))  # there is room again


def test_too_little_room_is_said_before_the_work(split, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: type("Usage", (), dict(free=1000))())
    with pytest.raises(PackError, match="the pack needs about"):
        pack(split, tmp_path / "p", 24)
    assert not (tmp_path / "p").exists() and not list((tmp_path / ".p.part").glob("shard*"))


def test_a_place_that_cannot_be_written(split, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PackError, match="cannot be written"):
        pack(split, tmp_path / "file" / "p", 24)
    folder = tmp_path / "readonly"
    folder.mkdir(mode=0o500)
    if not os.access(folder, os.W_OK):  # root may write anywhere
        with pytest.raises(PackError, match="cannot be written: Permission denied"):
            pack(split, folder / "p", 24)
        assert not list(folder.iterdir())


def test_something_else_in_the_way_is_left_alone(split, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.tex").write_text("years of work")
    with pytest.raises(PackError, match="exists and is no pack"):
        pack(split, tmp_path / "p", 24)
    assert (tmp_path / "p" / "thesis.tex").read_text() == "years of work"


def _pack_in_child(split, out, queue):
    torch.set_num_threads(1)
    queue.put((str(pack(split, out, 24)), (Path(out) / "pack.json").stat().st_mtime_ns))


def test_processes_that_pack_the_same_folder_at_once_make_one_pack(split, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_pack_in_child, args=(split, tmp_path / "p", queue)) for _ in range(4)]
    for child in children:
        child.start()
    results = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join(60)
    assert (
        all(child.exitcode == 0 for child in children) and len(results) == 1
    )  # one wrote it, three found it
    verify_pack(tmp_path / "p")


@pytest.mark.parametrize("damage", ["json cut", "json emptied", "index cut", "shard missing"])
def test_a_damaged_pack_is_refused_when_opened(split, tmp_path, damage):
    made = pack(split, tmp_path / "p", 24)
    if damage == "shard missing":
        (made / "shard-00000.bin").unlink()
    else:
        path = made / ("index.npz" if damage == "index cut" else "pack.json")
        path.write_bytes(path.read_bytes()[:100] if damage != "json emptied" else b"{}")
    with pytest.raises(PackError, match=str(made)):
        Pack(made)


def test_a_flipped_bit_is_found(split, tmp_path):
    made = pack(split, tmp_path / "p", 24, encoding="raw")
    path = made / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[4 * 3 * 24**2 + 5] ^= 64  # in the fifth image
    path.write_bytes(data)
    batches = Feeder(split, 24, pack=made, workers=2).epoch(2)
    assert [next(batches).indices.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(PackError, match="image 4 is damaged"):
        next(batches)
    with pytest.raises(PackError, match="shard-00000.bin: its bytes"):
        verify_pack(made)


@pytest.mark.slow
def test_a_killed_pack_goes_on(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.jpg").write_bytes(jpeg(noise(300, 400, i)))
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_feed import *
packing.SHARD_BYTES = 5 * 3 * 224**2 // 10
packing.encode = lambda *a, encode=packing.encode: (time.sleep(0.02), encode(*a))[1]
pack(split_of({str(folder)!r}, 60), {str(tmp_path / "p")!r}, 224)
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    work = tmp_path / ".p.part"
    while child.poll() is None and not (work / "shard-00002.json").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "p").exists()
    finished = [p.stem for p in work.glob("shard-*.json")]
    when = {name: (work / f"{name}.bin").stat().st_mtime_ns for name in finished}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHARD_BYTES", 5 * 3 * 224**2 // 10)
        made = pack(split_of(folder, 60), tmp_path / "p", 224)
    assert len(finished) >= 2 and all(
        (made / f"{name}.bin").stat().st_mtime_ns == t for name, t in when.items()
    )
    assert json.loads((made / "pack.json").read_text())["plan"]["images"] == 60 and verify_pack(made)
    assert not [p for p in made.iterdir() if p.name.startswith(".")]
