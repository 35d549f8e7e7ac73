"""Hostile and broken input, all in one table: every case goes through the door that a user would
use, and must be refused in the words of the house (`what: what arrived. Expected what. Try
what.`) with nothing lost and nothing half-written."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from brainldm.engineering.configs import DataConfig
from brainldm.engineering.covariates import Covariate
from brainldm.engineering.runs import load_weights, save_weights
from brainldm.engineering import cli, covariates
from brainldm import data

# what: what arrived. Expected what. Try what.
FORM = re.compile(r"\S.*?: .+?[.\n] ?Expected .+?\.\s+\S.+", re.DOTALL)


@pytest.fixture(autouse=True)
def plain_errors(monkeypatch):
    monkeypatch.delenv("BRAINLDM_DEBUG", raising=False)


def snapshot(*folders):
    "Every file below some folders with its content; links as where they point."
    return {
        p: os.readlink(p) if p.is_symlink() else p.read_bytes()
        for o in folders
        for p in Path(o).rglob("*")
        if p.is_symlink() or p.is_file()
    }


def refused(capsys, *words):
    "Run a command that must fail with one clear message; gives the message."
    capsys.readouterr()
    assert cli.main([str(w) for w in words]) == 1
    err = capsys.readouterr().err
    message = err.rpartition("brainldm: error: ")[2]
    assert "Traceback" not in err and message != err and FORM.match(message), err
    return message


def noise(seed, h=32, w=32, **kw):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w), np.uint8), **kw)


def as_bytes(image, **kw):
    out = io.BytesIO()
    image.save(out, **{"format": "png", **kw})
    return out.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height):
    "A PNG that promises an image of any size and holds none."
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def oasis(tmp_path):
    "A sound OASIS folder of noise: 4 subjects, 2 slices each."
    root = tmp_path / "data"
    for i, (split, subject) in enumerate(dict(train=(1, 2), validate=(3,), test=(4,)).items()):
        folder = root / f"keras_png_slices_{split}"
        folder.mkdir(parents=True)
        for s in subject:
            for k in range(2):
                (folder / f"case_{s:03d}_slice_{k}.nii.png").write_bytes(
                    as_bytes(noise(10 * s + k))
                )
    return root


# --- images: each is put instead of one sound file


def many_frames():
    frames = [noise(i) for i in range(3)]
    return as_bytes(frames[0], format="gif", save_all=True, append_images=frames[1:])


ONE = "keras_png_slices_train/case_001_slice_1.nii.png"
PICTURES = {  # name: bytes of the file, kind of fault
    "no bytes at all": (b"", "empty"),
    "a truncated PNG": (as_bytes(noise(1))[:700], "truncated"),
    "a truncated JPEG": (as_bytes(noise(1), format="jpeg")[:500], "truncated"),
    "a PNG cut within its header": (as_bytes(noise(1))[:20], "unreadable|truncated"),
    "a PNG with flipped bytes": (
        as_bytes(noise(1))[:300] + b"\xff" * 40 + as_bytes(noise(1))[340:],
        "unreadable|truncated",
    ),
    "text called PNG": (b"subject,age\n1,80\n", "unreadable"),
    "a page of HTML called PNG": (b"<html><script>alert(1)</script></html>", "unreadable"),
    "a pickle called PNG": (pickle.dumps(os.getcwd), "unreadable"),
    "a zip called PNG": (b"PK\x03\x04" + b"\0" * 60, "unreadable"),
    "a decompression bomb": (png_header(60_000, 60_000), "unreadable"),
    "a large bomb below Pillow's own limit": (png_header(12_000, 12_000), "size"),
    "a header of no size": (png_header(0, 0), "unreadable"),
    "one pixel": (as_bytes(noise(1, 1, 1)), "empty"),
    "one row": (as_bytes(noise(1, 1, 32)), "size"),
    "colour": (as_bytes(noise(1).convert("RGB")), "color"),
    "transparency": (as_bytes(noise(1).convert("RGBA")), "color"),
    "gray with transparency": (as_bytes(noise(1).convert("LA")), "color"),
    "a palette": (as_bytes(noise(1).convert("P")), "color"),
    "one bit": (as_bytes(noise(1).convert("1")), "color"),
    "sixteen bits": (
        as_bytes(
            Image.fromarray(
                np.random.default_rng(1).integers(0, 60_000, (32, 32)).astype(np.uint16)
            )
        ),
        "16-bit",
    ),
    "floating point": (as_bytes(noise(1).convert("F"), format="tiff"), "16-bit|unreadable"),
    "an animation": (many_frames(), "unreadable|animated|color"),
    "the image of somebody else": (as_bytes(noise(20)), "duplicate"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture(name, oasis, tmp_path, capsys):
    content, kinds = PICTURES[name]
    (oasis / ONE).write_bytes(content)
    before = snapshot(tmp_path)
    assert cli.main(["check", str(oasis)]) == 1
    out = capsys.readouterr()
    found = re.search(r"fault: (.+) \(", out.out)[1]
    assert (
        re.fullmatch(kinds, found) and "case_001_slice_1" in out.out and "Traceback" not in out.err
    )
    assert re.search("expected|the same image|most are|0 bytes|every pixel", out.out)
    message = refused(
        capsys, "train", "autoencoder", oasis, "--run", tmp_path / "run", "--preset", "tiny"
    )
    assert "case_001_slice_1" in message and "--skip-faulty" in message
    assert snapshot(tmp_path) == before


def rename(name):
    return lambda root: (root / ONE).rename((root / ONE).with_name(name))


def folder(root):
    (root / ONE).unlink()
    (root / ONE).mkdir()


def link_to_nothing(root):
    (root / ONE).unlink()
    (root / ONE).symlink_to(root / "gone.png")


def pipe(root):
    (root / ONE).unlink()
    os.mkfifo(root / ONE)


def loop(root):
    (root / "keras_png_slices_train" / "again").symlink_to(root)


def loops(root):
    for o in "ab":
        (root / f"{o}1").mkdir()
        for p in "xyz":
            (root / f"{o}1" / p).symlink_to(root / ("b1" if o == "a" else "a1"))


NAMES = {  # name: change, what `check` says (None: it is fine)
    "a name that says nothing": (rename("brain.png"), "does not parse"),
    "a slice that is no number": (rename("case_001_slice_x.nii.png"), "does not parse"),
    "a slice of thirty digits": (rename(f"case_001_slice_{'9' * 30}.nii.png"), "does not parse"),
    "a name with a newline": (rename("case_0\n01_slice_1.nii.png"), r"case_0\n01"),
    "a name with a terminal's escape": (rename("case_\x1b[2J_slice_1.nii.png"), r"\x1b"),
    "a folder called PNG": (folder, None),
    "a link to nothing": (link_to_nothing, "no such file"),
    "a pipe called PNG": (pipe, "no such file"),
    "a link to the folder above": (loop, None),
    "links that lead to each other": (loops, None),
    "a name with markup": (rename("case_<script>alert(1)<_slice_1.nii.png"), None),
    "a name in another script": (rename("case_病人ü_slice_1.nii.png"), None),
    "a very long name": (rename(f"case_{'x' * 200}_slice_1.nii.png"), None),
    "a leading dash": (rename("case_-rf_slice_1.nii.png"), None),
    "two dots": (rename("case_.._slice_1.nii.png"), None),
}


@pytest.mark.parametrize("name", NAMES)
def test_name(name, oasis, capsys):
    change, said = NAMES[name]
    change(oasis)
    before = snapshot(oasis) if name != "a pipe called PNG" else None
    status = cli.main(["check", str(oasis)])
    out = capsys.readouterr()
    assert status == (said is not None) and "Traceback" not in out.err
    assert said is None or said in out.out
    assert "\x1b" not in out.out and "\n01" not in out.out
    assert before is None or snapshot(oasis) == before


# --- volumes

VOL = np.random.default_rng(0).random((12, 14, 5)).astype(np.float32) * 100


def save(vol, affine=np.diag([2.0, 2.0, 2.0, 1.0]), name="sub-03.nii.gz", **header):
    def write(root):
        image = nib.Nifti1Image(vol, affine)
        for k, v in header.items():
            image.header[k] = v
        nib.save(image, root / name)

    return write


def raw(content, name="sub-03.nii.gz"):
    return lambda root: (root / name).write_bytes(content)


def patched(at, form, *values, good=VOL, affine=np.diag([2.0, 2.0, 2.0, 1.0])):
    "A sound volume with some bytes of its header overwritten."

    def write(root):
        content = bytearray(nib.Nifti1Image(good, affine).to_bytes())
        struct.pack_into(form, content, at, *values)
        (root / "sub-03.nii").write_bytes(content)

    return write


def zipped(write):
    def both(root):
        write(root)
        (root / "sub-03.nii.gz").write_bytes(gzip.compress((root / "sub-03.nii").read_bytes()))
        (root / "sub-03.nii").unlink()

    return both


def holed(value):
    vol = VOL.copy()
    vol[3, 3, 3] = value
    return save(vol)


SOUND = gzip.compress(nib.Nifti1Image(VOL, np.diag([2.0, 2.0, 2.0, 1.0])).to_bytes())
NAN = float("nan")
VOLUMES = {  # name: writer, kind of fault
    "gzip of nothing": (raw(gzip.compress(b"")), "unreadable"),
    "no bytes": (raw(b""), "unreadable"),
    "not gzip at all": (raw(b"a scan, honestly"), "unreadable"),
    "a truncated volume": (raw(SOUND[: len(SOUND) // 2]), "truncated|unreadable"),
    "a volume cut before its voxels": (
        raw(gzip.compress(gzip.decompress(SOUND)[:352])),
        "truncated",
    ),
    "two dimensions": (save(VOL[:, :, 0]), "shape"),
    "four dimensions": (save(np.stack([VOL, VOL], -1)), "shape"),
    "voxels that are NaN": (holed(NAN), "nan"),
    "voxels that are infinite": (holed(float("inf")), "nan"),
    "voxels of color": (
        save(np.zeros(VOL.shape, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))),
        "unreadable",
    ),
    "complex voxels": (save(VOL.astype(np.complex64)), "unreadable"),
    "absurd dimensions": (patched(40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), "shape"),
    "absurd dimensions, compressed": (
        zipped(patched(40, "<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)),
        "shape",
    ),
    "negative dimensions": (patched(40, "<8h", 3, -4, 14, 5, 1, 1, 1, 1), "unreadable|shape"),
    "a dimension of 0": (patched(40, "<8h", 3, 12, 0, 5, 1, 1, 1, 1), "unreadable|shape"),
    "voxels far behind the end": (patched(108, "<f", 1e30), "truncated|unreadable"),
    "voxels at NaN": (patched(108, "<f", NAN), "truncated|unreadable"),
    "an unknown data type": (patched(70, "<h", 999), "unreadable"),
    "an affine of NaN": (patched(280, "<4f", NAN, NAN, NAN, NAN), "orientation"),
    "an affine without volume": (patched(280, "<4f", 0.0, 0.0, 0.0, 0.0), "orientation|unreadable"),
    "an affine with next to no volume": (
        patched(296, "<4f", 0.0, 2.0, 1e30, 0.0),
        "orientation|oblique",
    ),
    "voxels of no size": (patched(76, "<4f", 1.0, 0.0, 0.0, 0.0), None),
    # beside volumes of square ones
    "oblong voxels": (save(VOL, np.diag([2.0, 3.0, 2.0, 1.0])), "grid"),
    "a scale of NaN": (patched(112, "<2f", NAN, NAN), None),
    "a scale of 1e38": (patched(112, "<2f", 1e38, 0.0), "nan"),
    "nothing but air": (save(VOL * 0), "empty"),
    "nothing but negative numbers": (save(-VOL), "negative"),
    "a second volume of a subject": (save(VOL, name="sub-01_run-2.nii.gz"), "two volumes"),
}


@pytest.mark.parametrize("name", VOLUMES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_volume(name, tmp_path, capsys):
    write, kinds = VOLUMES[name]
    root = tmp_path / "data"
    root.mkdir()
    for i in (1, 2):
        save(np.roll(VOL, i, 0)[::-1] ** i, name=f"sub-{i:02d}.nii.gz")(root)
    write(root)
    before = snapshot(tmp_path)
    status = cli.main(["check", str(root)])
    out = capsys.readouterr()
    assert status == (kinds is not None) and "Traceback" not in out.err
    if kinds:
        assert (
            re.fullmatch(kinds, re.search(r"fault: (.+) \(", out.out)[1])
            and "sub-0" in out.out.partition("fault:")[2]
        )
        refused(capsys, "train", "autoencoder", root, "--run", tmp_path / "run", "--preset", "tiny")
    assert snapshot(tmp_path) == before


# --- tables: manifest.csv and subjects.csv


@pytest.fixture
def listed(tmp_path):
    "A sound manifest: 4 subjects, 2 slices each; and an image of somebody else outside the folder."
    root = tmp_path / "data"
    (root / "png").mkdir(parents=True)
    rows = [
        f"png/{s}_{k}.png,{s},{k},{'AD' if s % 2 else 'NC'}" for s in range(1, 5) for k in range(2)
    ]
    for s in range(1, 5):
        for k in range(2):
            (root / "png" / f"{s}_{k}.png").write_bytes(as_bytes(noise(10 * s + k)))
    (tmp_path / "private.png").write_bytes(as_bytes(noise(99)))
    (root / "manifest.csv").write_text("\n".join(["path,subject,slice,diagnosis", *rows, ""]))
    return root


def swap(old, new):
    return lambda text: text.replace(old, new)


def column(name, *values):
    "Add a column; the first values as given, the rest 1."

    def change(text):
        lines = text.splitlines()
        return "\n".join(f"{o},{v}" for o, v in zip(lines, [name, *values, *["1"] * len(lines)]))

    return change


HEAD = "path,subject,slice,diagnosis\n"
MANIFESTS = {  # name: change of the text, words of the refusal
    "no bytes": (lambda t: "", "table"),
    "a header alone": (lambda t: HEAD, "no scan"),
    "a binary file": (lambda t: b"\x80\x02\xff\xfe\x00", "table"),
    "zero bytes in the text": (lambda t: t.replace("AD", "A\0D"), "text|table"),
    "UTF-16": (lambda t: t.encode("utf-16"), "table"),
    "Latin letters not in UTF-8": (swap("AD", "ä"), None),
    "a column missing": (swap("slice", "height"), "slice"),
    "a column twice": (swap("diagnosis", "slice "), "two columns"),
    "semicolons and commas": (lambda t: t.replace(",", ";", 8), "table"),
    "more cells than columns": (swap("AD", "AD,1,2,3"), "table"),
    "an open quote": (swap("AD", '"AD'), "quotes"),
    "a path outside the folder": (swap("png/1_0.png", "../private.png"), "../private.png"),
    "a path outside the folder, hidden": (
        swap("png/1_0.png", "png/../../private.png"),
        "private.png",
    ),
    "an absolute path": (swap("png/1_0.png", "/etc/hostname"), "/etc/hostname"),
    "a blank path": (swap("png/1_0.png", ""), "path"),
    "a blank subject": (swap("png,1,", "png,,"), "subject"),
    "a slice of text": (swap("png,1,0", "png,1,top"), "top"),
    "a slice of 1.5": (swap("png,1,0", "png,1,1.5"), "whole numbers"),
    "a negative slice": (swap("png,1,0", "png,1,-3"), "whole numbers"),
    "an infinite slice": (swap("png,1,0", "png,1,inf"), "inf"),
    "a slice of 1e400": (swap("png,1,0", "png,1,1e400"), "1e400"),
    "a slice of 1e300": (swap("png,1,0", "png,1,1e300"), "whole numbers"),
    "a row twice": (lambda t: t + "png/1_0.png,1,0,AD\n", "duplicate"),
    "an image of two subjects": (lambda t: t + "png/1_0.png,9,0,AD\n", "duplicate|leak"),
    "a missing file": (swap("png/1_0.png", "png/gone.png"), "gone.png"),
    "a folder as an image": (swap("png/1_0.png", "png"), "--skip-faulty"),
    "a subject in two splits": (
        column(
            "split", "train", "test", "train", "train", "validate", "validate", "train", "train"
        ),
        "each subject in one split",
    ),
    "a split nobody knows": (column("split", *["holdout"] * 8), "holdout"),
    "a split for some": (column("split", "train", ""), "split"),
    "an age of text": (column("age", "old"), "old"),
    "an age below 0": (column("age", "-1"), "-1"),
    "an infinite age": (column("age", "inf"), "inf"),
    "an age of 1e400": (column("age", "1e400"), "1e400"),
    "a column that brainldm uses inside": (column("_side", "3"), "_side"),
    "nobody to validate with": (lambda t: "\n".join(t.splitlines()[:2]), "validate"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest(name, listed, tmp_path, capsys):
    change, said = MANIFESTS[name]
    text = change((listed / "manifest.csv").read_text())
    if said is None:
        text, said = text.encode("latin-1"), "UTF-8"
    (listed / "manifest.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = snapshot(tmp_path)
    message = refused(
        capsys, "train", "autoencoder", listed, "--run", tmp_path / "run", "--preset", "tiny"
    )
    assert re.search(said, message), message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name, change",
    {
        "a byte order mark": lambda t: "\ufeff" + t,
        "line ends of Windows": swap("\n", "\r\n"),
        "blanks": swap(",", " , "),
        "semicolons": swap(",", ";"),
        "tabs": swap(",", "\t"),
        "blank rows": lambda t: t + ",,,\n\n",
        "quotes": lambda t: re.sub(r"([^,\n]+)", r'"\1"', t),
        "a column called order": column("order", "3"),
        "an age that is blank for some": column("age", "", "NaN"),
    }.items(),
    ids=lambda o: o if isinstance(o, str) else "",
)
def test_manifest_that_is_odd_and_sound(name, change, listed, capsys):
    (listed / "manifest.csv").write_bytes(change((listed / "manifest.csv").read_text()).encode())
    assert cli.main(["check", str(listed)]) == 0 and "no fault" in capsys.readouterr().out


SUBJECTS = {  # name: text, words of the refusal
    "no bytes": ("", "table"),
    "no column of subjects": ("name,age\n1,80\n", "subject"),
    "a subject twice": ("subject,age\n1,80\n1,81\n", "several rows"),
    "a nameless subject": ("subject,age\n,80\n", "subject"),
    "an age of text": ("subject,age\n1,eighty\n", "eighty"),
    "an age of 1e400": ("subject,age\n1,1e400\n", "1e400"),
    "another diagnosis than the manifest": ("subject,diagnosis\n1,NC\n", "diagnosis"),
    "facts about slices": ("subject,slice\n1,3\n", "slice"),
    "a column that brainldm uses inside": ("subject,_fault\n1,3\n", "_fault"),
    "semicolons and commas": ("subject;age,sex\n1;80,F\n", "commas"),
    "an age that hides": ("subject,age\n1,89+\n", "89+"),
    "two columns for one thing": ("subject,Group,DX\n1,AD,AD\n", "two columns"),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_subjects_table(name, listed, tmp_path, capsys):
    text, said = SUBJECTS[name]
    (listed / "subjects.csv").write_text(text)
    before = snapshot(tmp_path)
    assert said in refused(capsys, "check", listed)
    assert snapshot(tmp_path) == before


COLUMNS = {  # name: values of a column, word of the refusal
    "text among numbers": (["24", "29", "unknown", "30"], "unknown"),
    "infinity among numbers": (["24", "29", "inf", "30"], "inf"),
    "1e400 among numbers": (["24", "29", "1e400", "30"], "1e400"),
    "nothing at all": (["", "", "", ""], "mmse"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_covariate_of_ones_own(name, listed, capsys):
    values, said = COLUMNS[name]
    (listed / "subjects.csv").write_text(
        "subject,mmse\n" + "".join(f"{i},{v}\n" for i, v in enumerate(values, 1))
    )
    with pytest.raises(ValueError, match=said) as e:
        covariates.find_covariates(data.read_manifest(listed), data.DataConfig(columns=("mmse",)))
    assert FORM.match(str(e.value))


# --- archives: `brainldm check` unpacks them, or refuses and leaves nothing


def tar_of(*members, mode="w:gz"):
    "A tar of (name, content, changes of the header)."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content, *changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for k, v in (changes[0] if changes else {}).items():
                setattr(info, k, v)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(*members, damage=lambda o: o):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members:
            z.writestr(name, content)
    return damage(out.getvalue())


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = 0o120777 << 16
    return info, target


def encrypted(content):
    "Set the bit that says so, in both headers."
    out = bytearray(content)
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        out[content.index(sign) + at] |= 1
    return bytes(out)


def lying(content):
    "The directory of the archive promises ten bytes."
    out = bytearray(content)
    struct.pack_into("<I", out, content.index(b"PK\x01\x02") + 24, 10)
    return bytes(out)


PNG = as_bytes(noise(1))
LINK, HARD, DEVICE, FIFO = (
    dict(type=o, linkname="/etc/passwd")
    for o in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
)
GOOD = ("AD_NC/train/AD/1_0.png", PNG)
BOMB = b"\0" * 40_000_000
ARCHIVES = {  # file name: maker of the bytes, words of the refusal
    "climbs.tar.gz": (lambda: tar_of(GOOD, ("../../escaped.png", PNG)), "escaped"),
    "climbs_late.tar": (
        lambda: tar_of(GOOD, ("AD_NC/../../escaped.png", PNG), mode="w"),
        "escaped",
    ),
    "absolute.tgz": (lambda: tar_of(GOOD, ("/tmp/escaped.png", PNG)), "escaped"),
    "link.tar.gz": (lambda: tar_of(GOOD, ("x.png", b"", LINK)), "x.png"),
    "link_then_file.tar.gz": (
        lambda: tar_of(("AD_NC", b"", dict(LINK, linkname="/tmp")), ("AD_NC/escaped.png", PNG)),
        "AD_NC",
    ),
    "hard_link.tar.gz": (lambda: tar_of(GOOD, ("x.png", b"", HARD)), "x.png"),
    "device.tar.gz": (lambda: tar_of(GOOD, ("x.png", b"", DEVICE)), "x.png"),
    "pipe.tar.gz": (lambda: tar_of(GOOD, ("x.png", b"", FIFO)), "x.png"),
    "twice.tar.gz": (lambda: tar_of(GOOD, GOOD), "1_0.png"),
    "file_and_folder.tar": (lambda: tar_of(("a", PNG), ("a/b.png", PNG), mode="w"), "a"),
    "bomb.tar.gz": (lambda: tar_of(GOOD, ("bomb.nii", BOMB)), "unpacks to"),
    "bomb_in_a_header.tar.gz": (
        lambda: tar_of(
            ("x.png", PNG, dict(pax_headers={"comment": "a" * 40_000_000})), mode="w:gz"
        ),
        "unpacks to",
    ),
    "truncated.tar.gz": (
        lambda: tar_of(GOOD, *[(f"{i}.png", as_bytes(noise(i))) for i in range(9)])[:3000],
        "whole",
    ),
    "truncated.tar": (lambda: tar_of(GOOD, GOOD[:0] + ("b.png", PNG), mode="w")[:2000], "whole"),
    "cut_between.tar": (
        lambda: tar_of(GOOD, ("b.png", PNG), mode="w")[: 512 + -(-len(PNG) // 512) * 512],
        "whole",
    ),
    "broken_header.tar": (
        lambda: (lambda t: t[: 512 + -(-len(PNG) // 512) * 512] + b"\xff" * 512 + t[-2048:])(
            tar_of(GOOD, ("b.png", PNG), mode="w")
        ),
        "whole",
    ),
    "empty.tar.gz": (lambda: b"", "whole"),
    "nothing_in_it.tar": (lambda: tar_of(mode="w"), "nothing"),
    "no_archive.zip": (lambda: b"just text", "whole"),
    "truncated.zip": (lambda: zip_of(GOOD, damage=lambda o: o[:-30]), "whole"),
    "flipped.zip": (
        lambda: zip_of(GOOD, damage=lambda o: o[:100] + b"\xff\xfe\xfd" + o[103:]),
        "whole",
    ),
    "climbs.zip": (lambda: zip_of(GOOD, ("../escaped.png", PNG)), "escaped"),
    "backslash.zip": (lambda: zip_of(GOOD, ("..\\escaped.png", PNG)), "escaped"),
    "absolute.zip": (lambda: zip_of(GOOD, ("/tmp/escaped.png", PNG)), "escaped"),
    "drive.zip": (lambda: zip_of(GOOD, ("C:escaped.png", PNG)), "escaped"),
    "link.zip": (lambda: zip_of(zip_link("x.png", "/etc/passwd")), "x.png"),
    "encrypted.zip": (lambda: zip_of(GOOD, damage=encrypted), "password"),
    "lying.zip": (lambda: zip_of(("x.nii", b"\0" * 100_000), damage=lying), "whole"),
    "bomb.zip": (lambda: zip_of(GOOD, ("bomb.nii", BOMB)), "unpacks to"),
    "archive_in_an_archive.zip": (lambda: zip_of(("inner.zip", zip_of(GOOD))), "inner.zip"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive(name, tmp_path, capsys, monkeypatch):
    make, said = ARCHIVES[name]
    monkeypatch.setenv("BRAINLDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_bytes(make())
    before = snapshot(tmp_path)
    message = refused(capsys, "check", tmp_path / name)
    assert said in message and len(message) < 1000, message
    assert name.startswith("archive_in") or snapshot(tmp_path) == before
    assert not list(tmp_path.rglob("*escaped*")) and not Path("/tmp/escaped.png").exists()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz", ".ZIP"])
def test_sound_archive_is_unpacked_once_and_trained_on(
    suffix, oasis, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("BRAINLDM_CACHE", str(tmp_path / "cache"))
    files = [
        (p.relative_to(tmp_path).as_posix(), p.read_bytes()) for p in sorted(oasis.rglob("*.png"))
    ]
    archive = tmp_path / f"oasis{suffix}"
    archive.write_bytes(
        zip_of(*files)
        if suffix.lower() == ".zip"
        else tar_of(*files, mode="w" if suffix == ".tar" else "w:gz")
    )
    shutil.rmtree(oasis)
    for _ in range(2):
        assert cli.main(["check", str(archive)]) == 0
        out = capsys.readouterr().out
        assert "layout oasis: 4 subjects, 8 slices" in out and str(archive.name) in out
    dataset = data.open_dataset(archive, DataConfig(size=32), progress=False)
    assert len(dataset) == 8
    # records of looks come when files are old enough
    shutil.rmtree(tmp_path / "cache" / "looks", ignore_errors=True)
    first = snapshot(tmp_path / "cache")
    data.open_dataset(archive, DataConfig(size=32), progress=False)
    shutil.rmtree(tmp_path / "cache" / "looks", ignore_errors=True)
    assert snapshot(tmp_path / "cache") == first


def test_archive_that_the_disk_cannot_hold(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BRAINLDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.zip").write_bytes(zip_of(GOOD))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 50))
    assert "free" in refused(capsys, "check", tmp_path / "a.zip")
    assert not list((tmp_path / "cache").rglob("*.png"))


# --- flags


@pytest.mark.parametrize(
    "flags, named",
    {
        "a size below 0": ("--size -5", "size=-5"),
        "a size of 0": ("--size 0", "size=0"),
        "an absurd size": ("--size 1000000", "size=1000000"),
        "a crop below 0": ("--crop -1", "crop=-1"),
        "a fraction of NaN": ("--validate-fraction nan", "validate_fraction=nan"),
        "shares above 1": ("--test-fraction 1.5", "test_fraction=1.5"),
        "planes backwards": ("--planes 9 3", "planes=(9, 3)"),
        "a table that is not there": ("--subjects nowhere.csv", "nowhere.csv"),
    }.values(),
    ids=[
        "size below 0",
        "size 0",
        "absurd size",
        "crop below 0",
        "fraction of NaN",
        "shares above 1",
        "planes backwards",
        "no such table",
    ],
)
def test_flags_of_data(flags, named, listed, capsys):
    before = snapshot(listed)
    assert named in refused(capsys, "check", listed, *flags.split())
    assert snapshot(listed) == before


@pytest.mark.parametrize(
    "words",
    [
        "check DATA --size big",
        "check DATA --planes 3",
        "train ldm DATA --preset enormous",
        "sample RUN --n many",
        "sample RUN --sampler magic",
    ],
)
def test_words_that_are_no_command(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(words.split())
    assert e.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_subjects", 0),
        ("num_subjects", 10**9),
        ("size", -1),
        ("noise_sigma", NAN),
        ("seed", -1),
        ("format", "dicom"),
        ("age_min", 200),
    ],
)
def test_phantoms_that_cannot_be(field, value, tmp_path, capsys):
    words = ["phantom", tmp_path / "out", f"--{field.replace('_', '-')}", value]
    assert field in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_phantoms_overwrite_nothing(listed, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert "not empty" in refused(capsys, "phantom", listed, "--num-subjects", "1")
    assert "not empty" in refused(capsys, "phantom", listed / "manifest.csv", "--num-subjects", "1")
    assert snapshot(tmp_path) == before


# --- run folders: config.json


@pytest.fixture
def run(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run[0], tmp_path / "run"))


def edit(change, stage="autoencoder"):
    "Change the parsed config.json."

    def write(path):
        settings = json.loads(path.read_text())
        change(settings)
        path.write_text(json.dumps(settings))

    return write


def part(**values):
    return edit(lambda s: s["autoencoder"]["config"]["data"].update(values))


CONFIGS = {  # name: change of the file, words of the refusal
    "no bytes": (lambda p: p.write_bytes(b""), "config.json"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:200]), "config.json"),
    "binary": (lambda p: p.write_bytes(b"\xff\xfe\x00\x80"), "config.json"),
    "a list": (lambda p: p.write_text("[1, 2]"), "config.json"),
    "a number": (lambda p: p.write_text("7"), "config.json"),
    "null": (lambda p: p.write_text("null"), "config.json"),
    "of another project": (
        lambda p: p.write_text('{"model_type": "bert", "hidden_size": 768}'),
        "config.json",
    ),
    "nested a hundred thousand deep": (lambda p: p.write_text("[" * 100_000), "config.json"),
    "nothing in it": (lambda p: p.write_text("{}"), "config.json|autoencoder"),
    "no autoencoder": (edit(lambda s: s.pop("autoencoder")), "autoencoder"),
    "no settings of the data": (edit(lambda s: s["autoencoder"]["config"].pop("data")), "data"),
    "no size of the images": (
        edit(lambda s: s["autoencoder"]["config"]["data"].pop("size")),
        "size",
    ),
    "a setting too many": (part(flavour="mint"), "flavour"),
    "a size of text": (part(size="large"), "size"),
    "a size below 0": (part(size=-64), "size"),
    "a size of 1.5": (part(size=1.5), "size"),
    "a fraction of NaN": (part(validate_fraction=NAN), "validate_fraction"),
    "a fraction of text": (part(test_fraction="half"), "test_fraction"),
    "planes of text": (part(planes="ab"), "planes"),
    "a table that is a number": (part(subjects=5), "subjects"),
    "settings that are a list": (
        edit(lambda s: s["autoencoder"].update(config=[1])),
        "config.json",
    ),
    "data that are a list": (edit(lambda s: s["autoencoder"]["config"].update(data=[1])), "data"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file(name, run, tiny_run, tmp_path, capsys):
    change, said = CONFIGS[name]
    change(run / "config.json")
    before = snapshot(tmp_path)
    assert re.search(said, refused(capsys, "reconstruct", run, tiny_run[1], "--json"))
    assert snapshot(tmp_path) == before


# --- run folders: checkpoints


def header(text, body=b""):
    return struct.pack("<Q", len(text)) + text + body


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def all_nan(path):
    tensors, about = load_weights(path)
    save_weights(
        path,
        {k: torch.full_like(v, NAN) if v.is_floating_point() else v for k, v in tensors.items()},
        about,
    )


def one_nan(path):
    tensors, about = load_weights(path)
    k = next(k for k, v in tensors.items() if v.is_floating_point() and v.ndim > 1)
    tensors[k].view(-1)[0] = NAN
    save_weights(path, tensors, about)


def about(change):
    def write(path):
        tensors, info = load_weights(path)
        save_weights(path, tensors, change(info) or info)

    return write


def first_weight(change):
    def write(path):
        tensors, info = load_weights(path)
        name = next(k for k in tensors if k.endswith("weight"))
        change(tensors, name)
        save_weights(path, tensors, info)

    return write


def pickled(path):
    torch.save({"weight": torch.zeros(3)}, path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pickle_was_run",))


def evil(path):
    path.write_bytes(pickle.dumps(Evil()))


def swap_files(path):
    shutil.copy(
        path.parent
        / ("ldm.safetensors" if path.stem == "autoencoder" else "autoencoder.safetensors"),
        path,
    )


def only_pt(path):
    torch.save({}, path.with_suffix(".pt"))
    path.unlink()


def is_folder(path):
    path.unlink()
    path.mkdir()


CHECKPOINTS = {  # name: change of a .safetensors file
    "no bytes": lambda p: p.write_bytes(b""),
    "seven bytes": lambda p: p.write_bytes(b"\0" * 7),
    "truncated": cut,
    "a header of 2**63 bytes": lambda p: p.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "a header of a gigabyte": lambda p: p.write_bytes(struct.pack("<Q", 2**30) + b"{}"),
    "a header that is not JSON": lambda p: p.write_bytes(header(b"not json at all.")),
    "a header that is not UTF-8": lambda p: p.write_bytes(header(b"\xff" * 16)),
    "a header that is a list": lambda p: p.write_bytes(header(b"[1, 2]  ")),
    "tensors beyond the end": lambda p: p.write_bytes(
        header(b'{"a":{"dtype":"F32","shape":[999999999],"data_offsets":[0,3999999996]}}')
    ),
    "tensors that overlap": lambda p: p.write_bytes(
        header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        )
    ),
    "nobody's description": lambda p: p.write_bytes(
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4)
    ),
    "a pickle": pickled,
    "a pickle that acts": evil,
    "text": lambda p: p.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    ),
    "only a .pt beside it": only_pt,
    "a folder": is_folder,
    "the other stage's file": swap_files,
    "weights of NaN": all_nan,
    "one weight of NaN": one_nan,
    "a weight missing": first_weight(lambda t, k: t.pop(k)),
    "a weight too many": first_weight(lambda t, k: t.update({k + "_too": t[k].clone()})),
    "a weight of another shape": first_weight(lambda t, k: t.update({k: t[k][:1].clone()})),
    "no description of the network": about(lambda i: i.pop("args") and i),
    "a description of another network": about(lambda i: i["args"].update(channels=[8, 8])),
    "a description with words unknown": about(lambda i: i["args"].update(flavour="mint")),
    "a description of text": about(lambda i: "an autoencoder"),
    "covariates without names": about(
        lambda i: i["args"].update(covariates=[{"kind": "categorical"}])
    ),
    "covariates that are numbers": about(lambda i: i["args"].update(covariates=[1, 2])),
    "channels below 0": about(lambda i: i["args"].update(channels=[-16])),
    "channels of text": about(lambda i: i["args"].update(channels="many")),
}


@pytest.mark.parametrize("stage", ["autoencoder", "ldm"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name, stage, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CHECKPOINTS[name](run / f"{stage}.safetensors")
    before = snapshot(tmp_path)
    message = refused(capsys, "sample", run, "--n", 1, "--steps", 1)
    assert f"{stage}.safetensors" in message, message
    assert snapshot(tmp_path) == before and not (tmp_path / "pickle_was_run").exists()


@pytest.mark.parametrize(
    "name",
    [
        "train_mean.safetensors",
        "metrics.json",
        "log.jsonl",
        "feature_net.safetensors",
        "prior.safetensors",
        "volume.safetensors",
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        header(
            b'{"__metadata__":{"brainldm":"{}"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        b"",
        b"\xff\xfe\x00\n\xff\n",
        b"[1, 2]\n[3, 4]",
        b'{"a": 1}\n{"b": 2}',
    ],
    ids=["no description", "no bytes", "binary", "lists", "other records"],
)
def test_other_files_of_a_run(name, content, run, tiny_run, tmp_path, capsys):
    (run / name).write_bytes(content)
    before = snapshot(tmp_path)
    words = {
        "train_mean.safetensors": ("reconstruct", run, tiny_run[1], "--json"),
        "metrics.json": ("report", run),
        "log.jsonl": ("report", run),
        "prior.safetensors": ("sample", run, "--generator", "prior"),
        "volume.safetensors": ("volume", run, "--spacing-mm", 1, 1),
        "feature_net.safetensors": ("evaluate", run, tiny_run[1], "--no-utility", "--steps", 1),
    }[name]
    if name == "log.jsonl" and content.count(b"\n") < 1:
        pytest.skip("one line, cut short by a crash: that is no fault")
    if name == "feature_net.safetensors":
        from brainldm.advanced.fidelity import feature_net

        with pytest.raises(ValueError) as e:
            feature_net(run, data.open_dataset(tiny_run[1], cli.data_config(run), progress=False))
        assert FORM.match(str(e.value)) and name in str(e.value)
    else:
        assert name.partition(".")[0] in refused(capsys, *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "metrics",
    [
        {"reconstruction test": 1},
        {"reconstruction test": {}},
        {"samples ldm": {}},
        {"samples ldm": []},
        {"samples ldm": {"memorization": {"share": 1}}},
    ],
    ids=str,
)
def test_metrics_of_another_shape(metrics, run, tmp_path, capsys):
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "metrics.json" in refused(capsys, "report", run, "--steps", 1)
    assert not (run / "report.html").exists()


# --- requests

REQUESTS = {  # name: flags, words of the refusal
    "a covariate nobody knows": ("--condition apoe=e4", "apoe"),
    "a covariate without a value": ("--condition apoe=", "name=value"),
    "a value without a covariate": ("--condition =e4", "name=value"),
    "a covariate twice": ("--condition a=1 a=2", "each name once"),
    "a covariate in two ways": ("--diagnosis AD --condition diagnosis=NC", "diagnosis"),
    "a covariate called like a flag": ("--condition steps=3", "steps"),
    "a covariate called like an argument": ("--condition self=3", "self"),
    "a covariate called n": ("--condition n=3", "n=3"),
    "a level nobody knows": ("--diagnosis FTD", "FTD"),
    "a level of markup": ("--diagnosis <script>", "<script>"),
    "another case": ("--diagnosis ad", "'ad'"),
    "a number for a level": ("--diagnosis 3", "'3'"),
    "text for a number": ("--condition slice=top", "slice=top"),
    "a slice of NaN": ("--slice nan", "slice=nan"),
    "an infinite slice": ("--slice inf", "slice=inf"),
    "a slice above all": ("--slice 99", "slice=99"),
    "a slice below 0": ("--slice -1", "slice=-1"),
    "an age above all": ("--age 400", "age=400"),
    "n of 0": ("--n 0", "n=0"),
    "n below 0": ("--n -3", "n=-3"),
    "no steps": ("--steps 0", "steps=0"),
    "steps below 0": ("--steps -1", "steps=-1"),
    "more steps than the chain": ("--steps 5000", "5000"),
    "a guidance of NaN": ("--guidance-scale nan", "guidance_scale"),
    "an infinite guidance": ("--guidance-scale inf", "guidance_scale"),
    "a guidance below 0": ("--guidance-scale -1", "guidance_scale"),
    "a scale of NaN": ("--diagnosis AD --scale diagnosis=nan", "nan"),
    "a scale of text": ("--diagnosis AD --scale diagnosis=much", "much"),
    "an interval backwards": ("--guidance-interval .8 .2", "guidance_interval"),
    "an interval of NaN": ("--guidance-interval nan nan", "guidance_interval"),
    "a rescale of NaN": ("--guidance-rescale nan", "guidance_rescale"),
    "an autoguidance of NaN": ("--autoguidance nan", "autoguidance"),
    "an autoguidance without an early network": ("--autoguidance 2", "early network"),
    "a seed below 0": ("--seed -1", "seed"),
    "a knob of another generator": ("--temperature 2", "temperature"),
    "a generator that was not trained": ("--generator prior", "prior.safetensors"),
    "a folder with something in it": ("--out .", "not empty"),
    "a file for a folder": ("--out kept.txt", "not empty"),
    "a folder below a file": ("--out kept.txt/new", "kept.txt"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_request(name, tiny_run, tmp_path, capsys, monkeypatch):
    flags, said = REQUESTS[name]
    monkeypatch.chdir(tmp_path)
    Path("kept.txt").write_text("keep me")
    before = snapshot(tmp_path, tiny_run[0])
    out = () if "--out" in flags else ("--out", "new")
    steps = (
        () if "--steps" in flags or "--generator" in flags or "--temp" in flags else ("--steps", 1)
    )
    assert said in refused(capsys, "sample", tiny_run[0], *flags.split(), *out, *steps)
    assert snapshot(tmp_path, tiny_run[0]) == before and not Path("new").exists()


@pytest.fixture(scope="module")
def model(tiny_run):
    from brainldm.sampling import BrainLDM

    return BrainLDM.load(tiny_run[0], "cpu", precision="no")


CALLS = {  # name: arguments of `sample`, words of the refusal
    "lists of unequal length": (dict(n=3, slice=[1, 2]), "2 values"),
    "no values": (dict(n=3, slice=[]), "0 values"),
    "a list in a list": (dict(n=2, slice=[[1, 2], [3, 4]]), "slice"),
    "a dictionary": (dict(slice={"at": 3}), "slice"),
    "bytes": (dict(diagnosis=b"AD"), "diagnosis"),
    "a number for a name": (dict(diagnosis=0), "diagnosis=0"),
    "a name for a number": (dict(slice="top"), "top"),
    "truth for a number": (dict(n=True), "n=True"),
    "n of 2.5": (dict(n=2.5), "n=2.5"),
    "n of text": (dict(n="two"), "n='two'"),
    "steps of text": (dict(steps="few"), "steps='few'"),
    "a guidance of text": (dict(guidance_scale="strong"), "strong"),
    "a guidance of nothing": (dict(guidance_scale=None), "guidance_scale"),
    "an interval of one number": (dict(guidance_interval=(0.5,)), "guidance_interval"),
    "a sampler nobody knows": (dict(sampler="magic"), "magic"),
    "an eta of NaN": (dict(eta=NAN), "eta"),
    "a batch of 0": (dict(batch_size=0), "batch_size=0"),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name, model):
    requested, said = CALLS[name]
    with pytest.raises((ValueError, TypeError)) as e:
        model.sample(**{"n": 1, "steps": 1, **requested})
    assert said in str(e.value) and FORM.match(str(e.value)), e.value


# --- other tables and networks that a reader hands over

FAULTY = {  # name: call, error, words
    "a covariate without values": (lambda: Covariate("sex", "categorical"), ValueError, "values"),
    "a covariate of another kind": (
        lambda: Covariate("sex", "text", values=("a",)),
        ValueError,
        "kind",
    ),
    "a range backwards": (
        lambda: Covariate("age", "continuous", range=(3, 1)),
        ValueError,
        "range",
    ),
    "a range of NaN": (
        lambda: Covariate("age", "continuous", range=(NAN, NAN)),
        ValueError,
        "range",
    ),
    "an infinite range": (
        lambda: Covariate("age", "continuous", range=(0, float("inf"))),
        ValueError,
        "range",
    ),
    "a range of text": (
        lambda: Covariate("age", "continuous", range=("a", "b")),
        ValueError,
        "range",
    ),
    "a range of one number": (lambda: Covariate("age", "continuous", range=3), ValueError, "range"),
    "values twice": (
        lambda: Covariate("sex", "categorical", values=("F", "F")),
        ValueError,
        "values",
    ),
    "a size of text": (lambda: DataConfig(size="128"), TypeError, "size"),
    "a size of 12.5": (lambda: DataConfig(size=12.5), TypeError, "size"),
    "fraction of text": (
        lambda: DataConfig(validate_fraction="half"),
        TypeError,
        "validate_fraction",
    ),
    "planes of 1.5": (lambda: DataConfig(planes=(0, 1.5)), TypeError, "planes"),
    "one plane": (lambda: DataConfig(planes=5), TypeError, "planes"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_object(name):
    make, error, said = FAULTY[name]
    with pytest.raises(error, match=said) as e:
        make()
    assert FORM.match(str(e.value)), e.value


# --- markup in what a report shows


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_data(self, text):
        self.text += text


NASTY = '"><script>alert(1)</script><img src=x onerror=alert(1)>\'$\\frac{$ `|'


def rename_level(path, old, new):
    "Give a level of a covariate another name, in the files that a run is loaded from."

    def walk(o):
        if isinstance(o, dict):
            return {k: walk(v) for k, v in o.items()}
        return [walk(v) for v in o] if isinstance(o, list) else new if o == old else o

    tensors, info = load_weights(path)
    save_weights(path, tensors, walk(info))


@pytest.mark.parametrize("where", ["run", "level", "subject", "metric", "stage", "version"])
def test_markup_stays_text_in_a_report(where, tiny_run, tmp_path, capsys):
    run = shutil.copytree(
        tiny_run[0], tmp_path / ("run" if where != "run" else NASTY.replace("/", "|"))
    )
    if where == "level":
        rename_level(run / "ldm.safetensors", "AD", NASTY)
    path = run / "config.json"
    if where == "subject":
        edit(lambda s: s["autoencoder"].update(train_subjects=[NASTY]))(path)
    if where == "version":
        edit(lambda s: s["autoencoder"]["versions"].update({NASTY: NASTY}))(path)
    if where == "stage":
        edit(lambda s: s.update({NASTY: s["ldm"]}))(path)
    if where == "metric":
        (run / "metrics.json").write_text(json.dumps({f"something {NASTY}": {"a": 1}}))
    assert cli.main(["report", str(run), "--steps", "1"]) == 0
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "iframe", "a", "link", "form", "object"}
    assert where in ("subject", "metric") or "script>" in page.text
    assert "<script" not in (run / "README.md").read_text(encoding="utf-8").split("```")[-1]


# --- what is generated carries nothing of those it was learned from


def drawn_files(folder):
    return {
        p: gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def secrets(tiny_run):
    """What must not be found in a generated file: the subjects, where their scans lie, who ran it
    where."""
    settings = json.loads((tiny_run[0] / "config.json").read_text())
    people = pd.read_csv(tiny_run[1] / "subjects.csv", dtype=str)
    words = {
        *settings["autoencoder"]["train_subjects"],
        *people.subject,
        *people.age,
        str(tiny_run[1]),
        str(tiny_run[0]),
        str(Path.home()),
        os.uname().nodename,
        settings["autoencoder"]["data"]["hash"],
    }
    return [w.encode() for w in words if len(w) > 3]


def test_drawn_pictures_name_nobody(tiny_run, tmp_path, secrets):
    assert (
        cli.main(
            [
                "sample",
                str(tiny_run[0]),
                "--n",
                "2",
                "--steps",
                "2",
                "--diagnosis",
                "AD",
                "--slice",
                "3",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    files = drawn_files(tmp_path / "out")
    assert {p.suffix for p in files} == {".png", ".gif", ".csv"} and len(secrets) > 5
    for path, content in files.items():
        assert not [o for o in secrets if o in content], path
        if path.suffix == ".png":
            image = Image.open(path)
            assert not image.getexif() and set(image.info) <= {
                "Description",
                "Software",
                "brainldm",
                "dpi",
            }
            if path.name != "grid.png":
                assert set(json.loads(image.info["brainldm"])) <= {
                    "path",
                    "subject",
                    "slice",
                    "diagnosis",
                    "generator",
                    "steps",
                    "guidance_scale",
                    "guidance_interval",
                    "guidance_rescale",
                    "autoguidance",
                    "sampler",
                    "seed",
                    "synthetic",
                    "audit",
                }
    assert set(pd.read_csv(tmp_path / "out" / "manifest.csv").subject) == {
        "synthetic_0000",
        "synthetic_0001",
    }


def test_drawn_volumes_name_nobody(tiny_run, tmp_path, secrets):
    words = [
        "volume",
        tiny_run[0],
        "--shared-noise",
        ".5",
        "--spacing-mm",
        1,
        1,
        "--n",
        1,
        "--steps",
        1,
        "--diagnosis",
        "NC",
        "--out",
        tmp_path / "out",
    ]
    assert cli.main([str(o) for o in words]) == 0
    files = drawn_files(tmp_path / "out")
    for path, content in files.items():
        assert not [o for o in secrets if o in content], path
    image = nib.load(tmp_path / "out" / "brain_0000.nii.gz")
    assert (
        b"SYNTHETIC" in image.header["descrip"].item()
        and not image.header["db_name"].item()
        and not image.header["aux_file"].item()
    )
    assert [o.get_code() for o in image.header.extensions] == [6] and not image.header[
        "intent_name"
    ].item()


def test_report_names_nobody(tiny_run, tmp_path, secrets):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    assert cli.main(["report", str(run), "--steps", "1"]) == 0
    # it says on which data, by their hash,
    known = json.loads((run / "config.json").read_text())["autoencoder"]["data"]["hash"].encode()
    for name in ("report.html", "README.md"):  # and from which age to which
        found = [
            o
            for o in secrets
            if o in (run / name).read_bytes() and o != known and not re.fullmatch(rb"[\d.]+", o)
        ]
        assert not found, name


# --- the command as a program


def test_as_a_program(tmp_path, words="check . --size -5", kept="broken.zip"):
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 nothing")
    out = subprocess.run(
        [Path(sys.executable).parent / "brainldm", *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", BRAINLDM_CACHE=str(tmp_path / "cache")),
    )
    assert out.returncode == 1 and out.stdout == "" and "Traceback" not in out.stderr
    assert FORM.match(out.stderr.removeprefix("brainldm: error: ")), out.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == [kept]
