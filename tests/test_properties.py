"What must hold for any input: searched by hypothesis, the same cases every time."

import dataclasses
import gzip
import io
import json
import re
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from brainldm.engineering.checks import DataFault
from brainldm.engineering.configs import PREDICTION_TYPES, AEConfig, DataConfig
from brainldm.engineering.covariates import Covariate
from brainldm.scheduler import NoiseSchedule, add_noise, sampling_timesteps, targets, to_x0_eps
from brainldm.engineering.runs import load_weights
from brainldm.sampling import BrainLDM
from brainldm.engineering import checks, covariates, files, layouts, tables
from brainldm import data

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# what: what arrived. Expected what. Try what.
FORM = re.compile(r"\S.*?: .+?[.\n] ?Expected .+?\.\s+\S.+", re.DOTALL)
QUICK = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)

names = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=12)
BLANK = {*pd._libs.parsers.STR_NA_VALUES}  # what pandas reads as missing: "NA", "None", ...


# --- tables


@settings(max_examples=50, **QUICK)
@given(
    st.lists(
        st.tuples(
            names, names, st.integers(0, 10**9), st.one_of(st.none(), names), st.floats(0, 120)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_manifest_comes_back(rows):
    """Whatever subjects and diagnoses are called: written as CSV, read again, nothing is lost; a
    name that means 'missing' is refused."""
    table = pd.DataFrame(
        [
            (f"p/{i}_{path.replace('/', '').replace(chr(92), '')}.png", who, k, what, age)
            for i, (path, who, k, what, age) in enumerate(rows)
        ],
        columns=["path", "subject", "slice", "diagnosis", "age"],
    )
    with tempfile.TemporaryDirectory() as folder:
        table.to_csv(Path(folder) / "manifest.csv", index=False)
        if table.subject.isin(BLANK).any():
            with pytest.raises(ValueError, match="subject"):
                layouts.list_manifest(Path(folder) / "manifest.csv")
            return
        back = layouts.list_manifest(Path(folder) / "manifest.csv")[0]
    assert (
        back[["path", "subject", "slice"]].values.tolist()
        == table[["path", "subject", "slice"]].values.tolist()
    )
    assert [None if pd.isna(o) else o for o in back.diagnosis] == [
        None if pd.isna(o) or o in BLANK else o for o in table.diagnosis
    ]
    np.testing.assert_allclose(back.age, table.age, rtol=1e-15)


@settings(max_examples=50, **QUICK)
@given(
    st.binary(max_size=80),
    st.sampled_from(
        [
            b"",
            b"path,subject,slice\n",
            b"subject,age\n",
            b"\xef\xbb\xbfpath,subject,slice,age\na.png,1,2,",
        ]
    ),
)
def test_any_bytes_as_a_table(content, start):
    "A table, or a refusal that says what to do."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.csv"
        path.write_bytes(start + content)
        for read in (layouts.list_manifest, tables.read_subjects):
            try:
                read(path)
            except ValueError as e:
                assert FORM.match(str(e)), str(e)


@settings(max_examples=50, **QUICK)
@given(
    st.dictionaries(names, st.sampled_from(["AD", "NC", None]), min_size=1, max_size=30),
    st.floats(0, 0.6),
    st.floats(0, 0.39),
    st.integers(0, 2**40),
    st.randoms(use_true_random=False),
)
def test_no_person_sits_in_two_splits(people, validate, test, seed, random):
    "For any subjects, shares and seed; and the order of the rows does not matter."
    rows = [(s, d, k) for s, d in people.items() for k in range(1 + len(s) % 3)]
    fractions = dict(validate=validate, test=test)
    dealt = data.split_by_subject(
        pd.DataFrame(rows, columns=["subject", "diagnosis", "slice"]), fractions, seed
    )
    by = dealt.groupby("subject").split.agg(set)
    assert (by.map(len) == 1).all() and set(dealt.split) <= set(data.SPLITS)
    assert len(data.find_leaks(dealt.assign(path="x"))) == 0
    count, requested = by.map(min).value_counts(), [k for k, v in fractions.items() if v > 0]
    assert count.get("train", 0) >= 1
    if len(people) > len(requested):
        assert all(count.get(k, 0) >= 1 for k in requested)
    random.shuffle(rows)
    again = data.split_by_subject(
        pd.DataFrame(rows, columns=["subject", "diagnosis", "slice"]), fractions, seed
    )
    assert again.groupby("subject").split.agg(set).equals(by)


# --- settings

whole = st.integers(8, 4096)
data_configs = st.builds(
    DataConfig,
    size=whole,
    crop=st.one_of(st.none(), st.just("auto"), whole),
    to_gray=st.booleans(),
    skip_faulty=st.booleans(),
    planes=st.one_of(st.none(), st.tuples(st.integers(0, 90), st.integers(91, 300))),
    split_seed=st.integers(-9, 2**70),
    validate_fraction=st.floats(0, 0.5),
    test_fraction=st.floats(0, 0.49),
    subjects=st.one_of(st.none(), names.map(Path)),
)


@settings(max_examples=50, **QUICK)
@given(data_configs)
def test_config_comes_back_from_json(config):
    "As a run writes it into config.json."
    assert DataConfig(**json.loads(json.dumps(dataclasses.asdict(config), default=str))) == config
    written = json.loads(json.dumps(dataclasses.asdict(AEConfig(data=config)), default=str))
    assert DataConfig(**written["data"]) == config


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda o: st.one_of(
        st.lists(o, max_size=3), st.dictionaries(st.text(max_size=3), o, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=50, **QUICK)
@given(st.sampled_from([f.name for f in dataclasses.fields(DataConfig)]), anything)
def test_any_setting_is_taken_or_refused(name, value):
    try:
        config = DataConfig(**{name: value})
    except (ValueError, TypeError) as e:
        assert FORM.match(str(e)), str(e)
    else:
        assert (
            DataConfig(**json.loads(json.dumps(dataclasses.asdict(config), default=str))) == config
        )


@settings(max_examples=50, **QUICK)
@given(st.sampled_from(["name", "kind", "values", "range"]), anything)
def test_any_covariate_is_taken_or_refused(name, value):
    try:
        covariate = Covariate(**{"name": "x", "kind": "continuous", "range": (0, 1), name: value})
    except (ValueError, TypeError) as e:
        assert FORM.match(str(e)), str(e)
    else:
        assert covariate.kind in ("categorical", "continuous")


# --- schedules

schedules = st.builds(
    dict,
    num_train_timesteps=st.integers(2, 1500),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "cosine"]),
    zero_terminal_snr=st.booleans(),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    beta_start=st.floats(1e-5, 1e-3),
    beta_end=st.floats(1e-3, 0.05),
)


@settings(max_examples=50, **QUICK)
@given(schedules, st.floats(0, 1), st.integers(0, 9))
def test_schedule(requested, at, seed):
    "Signal falls all the way; what was mixed can be taken apart; the file brings back the same."
    if requested["zero_terminal_snr"] and requested["prediction_type"] == "epsilon":
        requested["zero_terminal_snr"] = False
    s = NoiseSchedule(**requested)
    assert NoiseSchedule(**json.loads(json.dumps(dataclasses.asdict(s)))) == s
    T, abar = s.num_train_timesteps, s.abar
    assert (
        abar.shape == (T,)
        and (abar >= 0).all()
        and (abar < 1).all()
        and (abar[1:] < abar[:-1]).all()
    )
    assert (
        (s.betas > 0).all() and (s.betas <= 1).all() and (not s.zero_terminal_snr or abar[-1] == 0)
    )
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 1, 2, 3, 4, generator=generator, dtype=torch.float64)
    t = round(at * (T - 1))
    xt = add_noise(x0, eps, t, abar)
    back = to_x0_eps(targets(x0, eps, t, abar, s.prediction_type), xt, t, abar, s.prediction_type)
    # rounding errors are divided by these roots
    size = float(max(abar[t] ** -0.5, (1 - abar[t]) ** -0.5)) if abar[t] > 0 else 1e3
    torch.testing.assert_close(back[0], x0, rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(back[1], eps, rtol=0, atol=1e-13 * size)


@settings(max_examples=50, **QUICK)
@given(st.integers(2, 1200), st.floats(0, 1), st.sampled_from(["trailing", "leading", "linspace"]))
def test_timesteps_fall(T, share, spacing):
    steps = [
        int(o)
        for o in sampling_timesteps(max(1 + (spacing == "linspace"), round(share * T)), T, spacing)
    ]
    assert steps == sorted(set(steps), reverse=True) and 0 <= steps[-1] and steps[0] < T


# --- broken files: each is either read, or refused with the error that the reader documents


def mutate(content, edits, cut):
    "Some bytes changed, the end cut off."
    out = bytearray(content)
    for at, value in edits:
        out[at % len(out)] = value
    return bytes(out[: max(0, len(out) - cut)])


edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=8)
cuts = st.one_of(st.just(0), st.integers(0, 600))
# headers sit in front
front = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)


def picture_bytes(kind):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20), np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@settings(max_examples=100, **QUICK)
@given(edits=edits, more=front, cut=cuts)
def test_mutated_picture(kind, edits, more, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        path.write_bytes(mutate(picture_bytes(kind), edits + more, cut))
        try:
            image = files.decode_image(path)
        except DataFault as e:
            assert e.kind and str(e)
        else:
            assert image.dtype == np.uint8 and image.ndim == 2


VOLUME = nib.Nifti1Image(
    np.random.default_rng(0).random((5, 6, 4)).astype(np.float32), np.diag([2.0, 2.0, 3.0, 1.0])
).to_bytes()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, **QUICK)
@given(edits=edits, more=front, cut=cuts, packed=st.booleans())
def test_mutated_volume(suffix, edits, more, cut, packed):
    content = mutate(VOLUME, edits + more, 0 if packed else cut)
    if suffix == ".nii.gz":
        content = (
            mutate(gzip.compress(content, mtime=0), edits, cut)
            if packed
            else gzip.compress(content)
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        try:
            vol, done = files.load_volume(path)
        except DataFault as e:
            assert e.kind and str(e)
        else:
            assert vol.dtype == np.uint8 and vol.ndim == 3 and 0 <= done["clipped"] <= 1


def archive_bytes(suffix):
    members = {"AD_NC/train/AD/1_0.png": picture_bytes("png"), "AD_NC/read me.txt": b"words " * 50}
    out = io.BytesIO()
    if suffix == ".zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members.items():
                z.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w" if suffix == ".tar" else "w:gz") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@settings(max_examples=100, **QUICK)
@given(edits=edits, more=front, cut=cuts)
def test_mutated_archive(suffix, edits, more, cut):
    "Unpacked below its folder, or refused; nothing beside it either way."
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / f"a{suffix}", Path(folder) / "in" / "out"
        path.write_bytes(mutate(archive_bytes(suffix), edits + more, cut))
        out.mkdir(parents=True)
        try:
            files.unpack_into(path, out)
        except ValueError as e:
            assert FORM.match(str(e)), str(e)
        assert sorted(o.name for o in Path(folder).iterdir()) == sorted([path.name, "in"]) and [
            o.name for o in out.parent.iterdir()
        ] == ["out"]
        assert not any(o.is_symlink() for o in out.rglob("*"))


headers = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(str.encode),
    st.dictionaries(st.sampled_from(["a", "__metadata__"]), anything, max_size=2).map(
        lambda o: json.dumps(o).encode()
    ),
    st.builds(
        lambda kind, shape, at: json.dumps(
            {"a": dict(dtype=kind, shape=shape, data_offsets=at)}
        ).encode(),
        st.sampled_from(["F32", "I64", "BOOL", "F99"]),
        st.lists(st.integers(-2, 2**64), max_size=3),
        st.lists(st.integers(-2, 2**64), min_size=2, max_size=2),
    ),
)


@settings(max_examples=60, **QUICK)
@given(
    header=headers,
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    body=st.binary(max_size=40),
)
def test_any_bytes_as_weights(header, length, body):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(
            struct.pack("<Q", len(header) if length is None else length) + header + body
        )
        # nobody guesses a description by chance
        with pytest.raises(ValueError) as e:
            load_weights(path)
        assert FORM.match(str(e.value)), e.value


@settings(max_examples=15, **QUICK)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 2**20), st.sampled_from([*b'0123456789"[]{}-,:ae', 0, 255])),
        min_size=1,
        max_size=5,
    ),
    cut=cuts,
    stage=st.sampled_from(["autoencoder", "ldm"]),
    share=st.floats(0, 1),
)
def test_mutated_checkpoint(tiny_run, edits, cut, stage, share):
    "A run is loaded, or refused as the loaders document."
    content = {p.name: p.read_bytes() for p in tiny_run[0].glob("*.*") if p.is_file()}
    name = f"{stage}.safetensors"
    (size,) = struct.unpack_from("<Q", content[name])
    about = content[name].index(b"__metadata__") if b"__metadata__" in content[name][:size] else 8
    span = size if share > 0.5 else 700  # often in the description, at its beginning
    content[name] = mutate(
        content[name], [(about + at % span, v) for at, v in edits], cut if share < 0.2 else 0
    )
    with tempfile.TemporaryDirectory() as folder:
        for k, v in content.items():
            (Path(folder) / k).write_bytes(v)
        try:
            model = BrainLDM.load(folder, "cpu")
        except ValueError as e:
            assert FORM.match(str(e)), str(e)
        else:
            assert model.autoencoder is not None


# --- conditions


@settings(max_examples=50, **QUICK)
@given(st.lists(names, min_size=1, max_size=8, unique_by=covariates.level_text), st.data())
def test_categories_come_back(values, source):
    c = Covariate("kind", "categorical", values=tuple(values))
    requested = source.draw(
        st.lists(st.one_of(st.none(), st.sampled_from(values)), min_size=1, max_size=10)
    )
    codes = covariates.encode_column(requested, c)
    assert (
        codes.dtype == torch.int64
        and [None if k < 0 else values[k] for k in codes.tolist()] == requested
    )
    assert c.values == tuple(map(covariates.level_text, values))
    stranger = "".join(values) + "x"
    with pytest.raises(ValueError) as e:
        covariates.encode_column([*requested, stranger], c)
    assert FORM.match(str(e.value)) and repr(stranger) in str(e.value)


@settings(max_examples=50, **QUICK)
@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=10),
)
def test_numbers_come_back(low, width, shares):
    c = Covariate("age", "continuous", range=(low, low + width))
    requested = [None if u is None else low + u * width for u in shares]
    codes = covariates.encode_column(requested, c)
    assert codes.dtype == torch.float32 and [bool(o) for o in codes.isnan()] == [
        o is None for o in requested
    ]
    for v, k in zip(requested, codes.tolist()):
        # float32 shares
        if v is not None:
            assert abs(low + k * width - v) <= 1e-6 * width + 1e-9 * abs(low)
    for bad in (float("inf"), "text"):
        with pytest.raises(ValueError):
            covariates.encode_column([bad], c)
    assert Covariate(**json.loads(json.dumps(dataclasses.asdict(c)))) == c


@settings(max_examples=50, **QUICK)
@given(st.text(max_size=30))
def test_printable(text):
    out = checks.printable(text)
    assert out.isprintable() and (out == text or not text.isprintable())
