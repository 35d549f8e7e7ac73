"""What a training was given and what it stands on: data compared column by column, weights below
by their hash, longer trainings, and weights of other runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainldm.engineering.configs import DataConfig, PriorConfig, TrainConfig, VolumeConfig
from brainldm.engineering.devices import device_name
from brainldm.engineering.covariates import find_covariates
from brainldm.engineering.cache import fingerprint
from brainldm.data import SliceDataset
from brainldm.engineering.runs import (
    Checkpoint,
    compare_given,
    load_weights,
    read_config,
    read_log,
    save_weights,
    weights_hash,
)
from brainldm.engineering.sharing import pack_weights, strip_settings
from brainldm.engineering.stage1 import load_autoencoder
from brainldm.engineering.stage2 import load_unet, note_changes, refuse_leak
from brainldm.training import train_autoencoder, train_ldm
from brainldm.sampling import BrainLDM
from brainldm.advanced.volume import BrainVolumes, train_volume
from brainldm.advanced.prior import CodeSampler, load_prior, train_prior
from brainldm.advanced.fidelity import feature_net
from brainldm.engineering import runs
from test_training import AE, LDM, Crash, dataset, quick_figures, same, strike, weights

VQ = replace(AE, kind="vq", num_embeddings=12)
PRIOR = PriorConfig(
    total_images=48,
    batch_size=4,
    log_every=2,
    warmup_images=8,
    validate_every=24,
    checkpoint_every=24,
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    ema_images=16,
)
VOLUME = VolumeConfig(
    total_images=48,
    batch_size=4,
    log_every=2,
    warmup_images=8,
    validate_every=48,
    checkpoint_every=24,
    ema_images=16,
    preview_steps=1,
)


def aged(dataset, **changes):
    "The data with an age for each subject; changes: other values, by column, as {subject: value}."
    rows = dataset.manifest.assign(age=dataset.manifest.subject.str[4:].astype(int) * 2.0 + 60)
    for column, values in changes.items():
        rows[column] = rows.subject.map(values).fillna(rows[column])
    return SliceDataset(dataset.images, rows)


@pytest.fixture(scope="module")
def told(dataset):
    return aged(dataset)


@pytest.fixture(scope="module")
def made(told, tmp_path_factory):
    "A run with autoencoder, ldm and volume."
    run = tmp_path_factory.mktemp("origins") / "run"
    train_autoencoder(told, run, AE, progress=False)
    train_ldm(told, run, LDM, progress=False)
    train_volume(told, run, VOLUME, progress=False)
    return run


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def edit(run, change):
    "Change config.json."
    settings = read_config(run)
    change(settings)
    (run / "config.json").write_text(json.dumps(settings))


def interrupted(dataset, run, monkeypatch, config=AE):
    "A run whose autoencoder stopped at 40 of 80 images."
    strike(monkeypatch, "autoencoder_loss", 36, "ctrl-c")
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(dataset, run, config, progress=False)


# ------------------------------------------------------------------ what a stage was given


def test_an_age_that_stage_1_never_saw_blocks_nothing(told, dataset, tmp_path, monkeypatch):
    "Corrected after stage 1, in the middle of stage 1, and for stage 2, which has not begun."
    new = aged(dataset, age={"sub-1": 71.5})
    assert fingerprint(new.manifest)["hash"] != fingerprint(told.manifest)["hash"]
    interrupted(told, tmp_path / "run", monkeypatch)
    train_autoencoder(new, tmp_path / "run", AE, resume=True, progress=False)
    train_ldm(new, tmp_path / "run", replace(LDM, total_images=8, early_images=0), progress=False)
    with pytest.raises(
        ValueError, match="begun with other settings: age of sub-1: 62 now, 71.5 then"
    ):
        train_ldm(
            told,
            tmp_path / "run",
            replace(LDM, total_images=8, early_images=0),
            resume=True,
            progress=False,
        )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(age={"sub-1": 90.0}), "age of sub-1: 90 now, 62 then"),
        (dict(age={"sub-1": np.nan, "sub-2": 50.0}), "age of sub-2: 50 now, 64 then"),
        (dict(diagnosis={"sub-3": "NC"}), "diagnosis of sub-3: NC now, AD then"),
        (dict(split={"sub-3": "test"}), "split of sub-3: test now, train then"),
        (
            dict(hash={"sub-4": "other"}),
            (
                "image of sub-4 slice 0: other pixels, sub-4 slice 1: other pixels, sub-4 slice 2:"
                " other pixels and 2 more"
            ),
        ),
    ],
)
def test_what_was_given_and_differs_is_named(change, words, dataset, made):
    with pytest.raises(ValueError, match="open_run: .*was begun with other settings") as e:
        runs.open_run(made, "ldm", LDM, aged(dataset, **change), resume=True)
    assert words in str(e.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(split={"sub-3": "test"}), "split of sub-3: test now, train then"),
        (dict(hash={"sub-0": "0"}), "image of sub-0 slice 0"),
    ],
)
def test_stage_2_refuses_other_pixels_and_splits_by_name(change, words, dataset, made):
    with pytest.raises(
        ValueError, match="refuse_leak: the data is not what the autoencoder was trained on"
    ) as e:
        refuse_leak(read_config(made), aged(dataset, **change), made)
    assert words in str(e.value)


def test_new_and_lost_images_are_named(told, made):
    rows = told.manifest
    fewer = SliceDataset(
        told.images[rows.subject != "sub-2"], rows[rows.subject != "sub-2"].reset_index(drop=True)
    )
    with pytest.raises(ValueError, match="5 images are gone, of sub-2"):
        refuse_leak(read_config(made), fewer, made)
    turned = SliceDataset(told.images[::-1], rows[::-1].reset_index(drop=True), told.covariates)
    with pytest.raises(ValueError, match="the order of the images"):
        refuse_leak(read_config(made), turned, made)


def test_renamed_subjects_and_other_columns_are_not_what_was_given(told, made):
    "For slices; whole brains stand on who is whose neighbor, and so on the subjects."
    rows = told.manifest.assign(subject=told.manifest.subject + "x", note="new")
    renamed = SliceDataset(told.images, rows, told.covariates)
    for stage in ("autoencoder", "ldm"):
        assert compare_given(made, stage, read_config(made)[stage]["data"], renamed) == []
    assert (
        "subject of sub-0x: sub-0x now, sub-0 then"
        in compare_given(made, "volume", read_config(made)["volume"]["data"], renamed)[0]
    )


def test_a_column_that_reads_as_whole_numbers_now_is_the_same(told, dataset, made):
    "A spreadsheet wrote 61 where 61.0 stood."
    whole = SliceDataset(dataset.images, told.manifest.assign(age=told.manifest.age.astype(int)))
    assert compare_given(made, "ldm", read_config(made)["ldm"]["data"], whole) == []


def test_a_packed_run_names_columns_and_nobody(dataset, made, tmp_path):
    settings = strip_settings(read_config(made))
    assert "sub-1" not in json.dumps(settings)
    differ = compare_given(
        tmp_path, "ldm", settings["ldm"]["data"], aged(dataset, age={"sub-1": 99.0})
    )
    assert differ == ["age (a packed run does not say of whom)"]


def test_a_run_from_before_knows_its_fingerprint_only(told, dataset, copy):
    def old(settings):
        for o in settings.values():
            for k in ("columns", "covariates"):
                del o["data"][k]

    edit(copy, old)
    assert train_ldm(told, copy, LDM, resume=True, progress=False) is not None
    with pytest.raises(ValueError, match="refuse_leak: .*data fingerprint"):
        train_ldm(aged(dataset, age={"sub-1": 99.0}), copy, LDM, resume=True, progress=False)


def test_the_table_of_subjects_may_move(tmp_path, capsys):
    """From the command line: stage 1 is resumed, and stage 2 begun, with the table elsewhere and
    an age corrected in it."""
    from brainldm.engineering.cli import main
    from brainldm.engineering.configs import PhantomConfig
    from brainldm.engineering.phantom import make_cohort

    data = make_cohort(
        tmp_path / "data", PhantomConfig(num_subjects=12, num_slices=4, size=32), progress=False
    )
    old, new = data / "subjects.csv", tmp_path / "moved.csv"
    run = str(tmp_path / "run")
    sizes = (
        "--preset tiny --channels 8 --attention-levels False --total-images 16 --batch-size 4"
        " --warmup-images 4".split()
    )
    first = ["train", "autoencoder", str(data), "--run", run, "--size", "32", *sizes]
    assert main([*first, "--subjects", str(old)]) == 0
    Path(run, "autoencoder.safetensors").unlink()  # as if it had died before the end
    lines = old.read_text().splitlines()
    age = lines[0].split(",").index("age")
    cells = lines[1].split(",")
    cells[age] = "77.5"
    new.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    old.unlink()
    # where is the table now?
    assert main(["train", "ldm", str(data), "--run", run, *sizes]) == 1
    assert "--subjects" in capsys.readouterr().err
    assert main([*first, "--subjects", str(new), "--resume"]) == 0
    assert (
        main(
            [
                "train",
                "ldm",
                str(data),
                "--run",
                run,
                *sizes,
                "--num-heads",
                "2",
                "--cond-channels",
                "8",
                "--subjects",
                str(new),
            ]
        )
        == 0
    )


# ------------------------------------------------------------------ the weights below


def another_autoencoder(run):
    "One more step of training, say."
    tensors, info = load_weights(run / "autoencoder.safetensors")
    key = next(k for k, v in tensors.items() if v.ndim == 4)
    save_weights(run / "autoencoder.safetensors", {**tensors, key: tensors[key] + 1e-2}, info)


def test_another_autoencoder_is_refused_everywhere(told, copy):
    """Sampling, whole brains, evaluation (which loads the run), going on with stage 2, and going
    on with whole brains."""
    BrainVolumes.load(copy)
    another_autoencoder(copy)
    for load in (BrainLDM.load, BrainVolumes.load):
        with pytest.raises(
            ValueError,
            match=(
                "check_trained_on: .*ldm.safetensors was trained on another autoencoder than the"
                " one beside it.*Put back"
            ),
        ):
            load(copy)
    with pytest.raises(
        ValueError,
        match="ldm of .* was begun on another autoencoder than the one that lies there now",
    ):
        train_ldm(told, copy, LDM, resume=True, progress=False)
    with pytest.raises(ValueError, match="another autoencoder"):
        train_volume(told, copy, VOLUME, resume=True, progress=False)
    (copy / "ldm.safetensors").unlink()
    BrainLDM.load(copy)  # the autoencoder alone may be used


def test_another_ldm_is_refused_for_whole_brains(told, copy):
    tensors, info = load_weights(copy / "ldm.safetensors")
    key = next(k for k in tensors if k.startswith("ema.") and tensors[k].ndim == 4)
    save_weights(copy / "ldm.safetensors", {**tensors, key: tensors[key] + 1e-2}, info)
    with pytest.raises(ValueError, match="not trained on the diffusion model beside it"):
        BrainVolumes.load(copy)
    with pytest.raises(ValueError, match="volume of .* was begun on another ldm"):
        train_volume(told, copy, VOLUME, resume=True, progress=False)


def test_a_prior_stands_on_its_codes(told, tmp_path):
    run = tmp_path / "run"
    train_autoencoder(told, run, VQ, progress=False)
    train_prior(told, run, PRIOR, progress=False)
    CodeSampler.load(run)
    another_autoencoder(run)
    with pytest.raises(ValueError, match="prior.safetensors was trained on another autoencoder"):
        CodeSampler.load(run)
    with pytest.raises(ValueError, match="prior of .* was begun on another autoencoder"):
        train_prior(told, run, PRIOR, resume=True, progress=False)


def test_runs_from_before_load_and_say_what_is_not_known(told, copy):
    for name in ("ldm", "volume"):
        tensors, info = load_weights(copy / f"{name}.safetensors")
        save_weights(
            copy / f"{name}.safetensors",
            tensors,
            {k: v for k, v in info.items() if k != "trained_on"},
        )
    edit(copy, lambda s: [o.pop("trained_on", None) for o in s.values()])
    BrainLDM.load(copy)
    BrainVolumes.load(copy)
    with pytest.warns(UserWarning, match="does not say on which weights its ldm was begun"):
        train_ldm(told, copy, LDM, resume=True, progress=False)


def test_a_packed_run_keeps_its_hashes(made, tmp_path):
    for name in ("autoencoder", "ldm", "volume"):
        pack_weights(made / f"{name}.safetensors", tmp_path / f"{name}.safetensors")  # 16 bits
    shutil.copy(made / "config.json", tmp_path / "config.json")
    BrainVolumes.load(tmp_path)


# ------------------------------------------------------------------ longer


def test_a_finished_training_is_lengthened(told, tmp_path, capsys):
    """The rate rises again from 0 over the warm-up, meets that of a training of the new length,
    and ends at 0; everything else goes on."""
    run = tmp_path / "run"
    train_autoencoder(told, run, AE, progress=False)
    train_autoencoder(told, run, replace(AE, total_images=160), resume=True)
    rates = {
        o["images"]: o["learning_rate"] for o in read_log(run / "log.jsonl") if "learning_rate" in o
    }
    high = AE.learning_rate
    assert rates[80] == 0 and rates[160] == 0
    assert rates[88] == pytest.approx(high * 12 / 16 * (1 - (88 / 160) ** 0.5)) and rates[
        120
    ] == pytest.approx(high * (1 - 0.75**0.5))
    assert (
        read_config(run)["autoencoder"]["stretches"] == [[0, 80], [80, 160]]
        and read_config(run)["autoencoder"]["config"]["total_images"] == 160
    )
    assert load_weights(run / "autoencoder.safetensors")[1]["images"] == 160
    said = capsys.readouterr()
    assert (
        "lengthened from 80 to 160 images at 80. The learning rate rises again to 0.00045 and falls"
        " to 0"
        in said.out + said.err
    )


CRITIC = replace(
    AE,
    adversarial=True,
    adversarial_start=40,
    discriminator_warmup=16,
    discriminator_channels=(8, 16),
)


@pytest.mark.parametrize(
    "name, config, at",
    [
        ("autoencoder", AE, 100),
        ("autoencoder", AE, 84),
        ("autoencoder", CRITIC, 116),
        ("ldm", LDM, 100),
    ],
)
def test_a_lengthened_training_resumes_exactly(name, config, at, told, made, tmp_path, monkeypatch):
    """Killed after it was lengthened, before or after its first checkpoint: the run that was never
    stopped."""
    train = dict(autoencoder=train_autoencoder, ldm=train_ldm)[name]
    if name == "ldm":
        train_autoencoder(told, tmp_path / "a", AE, progress=False)
    train(told, tmp_path / "a", config, progress=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    longer = replace(config, total_images=160)
    train(told, tmp_path / "a", longer, resume=True, progress=False)
    strike(monkeypatch, f"{name}_loss", at, "crash")
    with pytest.raises(Crash):
        train(told, tmp_path / "b", longer, resume=True, progress=False)
    train(told, tmp_path / "b", longer, resume=True, progress=False)
    same(tmp_path / "a", tmp_path / "b", name)
    train(told, tmp_path / "b", replace(config, total_images=200), resume=True, progress=False)
    assert read_config(tmp_path / "b")[name]["stretches"] == [[0, 80], [80, 160], [160, 200]]


def test_an_older_state_takes_the_old_schedule_up_again(told, tmp_path):
    """The newest state was lost after the training was lengthened: what lies before that place is
    done as it was."""
    for name in ("a", "b"):
        train_autoencoder(told, tmp_path / name, AE, progress=False)
    longer = replace(AE, total_images=160)
    train_autoencoder(told, tmp_path / "a", longer, resume=True, progress=False)
    state = Checkpoint(tmp_path / "b" / "state" / "autoencoder").files()[-1]
    edit(
        tmp_path / "b",
        lambda s: s["autoencoder"].update(
            stretches=[[0, 80], [80, 160]],
            config=dict(s["autoencoder"]["config"], total_images=160),
        ),
    )
    state.write_bytes(b"")
    with pytest.warns(UserWarning, match="going back to an older state"):
        train_autoencoder(told, tmp_path / "b", longer, resume=True, progress=False)
    a, b = weights(tmp_path / "a", "autoencoder"), weights(tmp_path / "b", "autoencoder")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_others_stand_on_is_not_lengthened(told, copy):
    for train, config, name, above in (
        (train_autoencoder, AE, "autoencoder", "ldm, volume"),
        (train_ldm, LDM, "ldm", "volume"),
    ):
        with pytest.raises(
            ValueError,
            match=(
                f"a longer {name} would leave the {above} of .*Start another run from its weights:"
                " --run NEW --init-from"
            ),
        ):
            train(told, copy, replace(config, total_images=160), resume=True, progress=False)
        assert read_config(copy)[name]["config"]["total_images"] == 80
    train_volume(told, copy, replace(VOLUME, total_images=64), resume=True, progress=False)


def test_a_training_is_not_shortened(told, copy):
    with pytest.raises(ValueError, match="total_images=40, was 80"):
        train_ldm(told, copy, replace(LDM, total_images=40), resume=True, progress=False)


def test_a_stage_2_waits_for_a_lengthened_autoencoder(told, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train_autoencoder(told, run, AE, progress=False)
    strike(monkeypatch, "autoencoder_loss", 100, "crash")
    with pytest.raises(Crash):
        train_autoencoder(told, run, replace(AE, total_images=160), resume=True, progress=False)
    with pytest.raises(ValueError, match="has seen 96 of 160"):
        train_ldm(told, run, LDM, progress=False)


# ------------------------------------------------------------------ from the weights of another run

# weights stay where they began
FROZEN = dict(total_images=8, batch_size=4, learning_rate=1e-12)


def test_a_run_starts_from_another_one(told, made, tmp_path):
    "Autoencoder and ldm begin where the other run ended, and config.json says from where."
    run = tmp_path / "run"
    auto = train_autoencoder(told, run, replace(AE, init_from=str(made), **FROZEN), progress=False)
    want = load_autoencoder(made)[0].state_dict()
    for k, v in auto.state_dict().items():
        torch.testing.assert_close(v, want[k], rtol=0, atol=1e-6)
    unet = train_ldm(
        told, run, replace(LDM, init_from=str(made), early_images=0, **FROZEN), progress=False
    )
    want = load_unet(made)[0].state_dict()
    for k, v in unet.state_dict().items():
        torch.testing.assert_close(v, want[k], rtol=0, atol=1e-6)
    for stage, net in (("autoencoder", load_autoencoder(made)[0]), ("ldm", load_unet(made)[0])):
        origin = read_config(run)[stage]["origin"]
        assert origin == dict(run=str(made), weights=weights_hash(net), notes=[])
    BrainLDM.load(run)
    text = json.dumps(strip_settings(read_config(run)))
    # a path leaves no machine
    assert str(made) not in text and weights_hash(load_autoencoder(made)[0]) in text


def test_a_prior_starts_from_another_one(told, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    train_autoencoder(told, a, VQ, progress=False)
    train_prior(told, a, PRIOR, progress=False)
    train_autoencoder(told, b, replace(VQ, init_from=str(a), total_images=40), progress=False)
    prior = train_prior(told, b, replace(PRIOR, init_from=str(a), **FROZEN), progress=False)
    want = load_prior(a)[0].state_dict()
    for k, v in prior.state_dict().items():
        if k != "vectors":  # those of this run's codes
            torch.testing.assert_close(v, want[k], rtol=0, atol=1e-6)
    other = tmp_path / "other"
    train_autoencoder(told, other, replace(VQ, seed=5), progress=False)
    with pytest.raises(
        ValueError,
        match="init_from: the autoencoder of .* is neither that of .* nor what it started from",
    ):
        train_prior(told, other, replace(PRIOR, init_from=str(a)), progress=False)


def test_it_goes_on_exactly_and_without_the_source(told, made, tmp_path, monkeypatch):
    "Resumed with the flag, without it, and after the source is gone."
    config = replace(AE, init_from=str(made))
    train_autoencoder(told, tmp_path / "a", config, progress=False)
    for name, again in (("b", config), ("c", AE)):
        interrupted(told, tmp_path / name, monkeypatch, config)
        with monkeypatch.context() as patch:
            patch.setattr(
                "brainldm.engineering.stage1.locate_run",
                lambda *_: pytest.fail("the source is not needed"),
            )
            train_autoencoder(told, tmp_path / name, again, resume=True, progress=False)
        same(tmp_path / "a", tmp_path / name, "autoencoder")
        assert read_config(tmp_path / name)["autoencoder"]["config"]["init_from"] == str(made)


def test_without_a_state_the_source_is_asked_for_again(told, made, tmp_path, monkeypatch):
    run, config = tmp_path / "run", replace(AE, init_from=str(made))
    strike(monkeypatch, "autoencoder_loss", 4, "crash")
    with pytest.raises(Crash):
        train_autoencoder(told, run, config, progress=False)
    with pytest.raises(ValueError, match="was begun from the weights of .*Add --init-from"):
        train_autoencoder(told, run, AE, resume=True, progress=False)
    other = shutil.copytree(made, tmp_path / "other")
    another_autoencoder(other)
    with pytest.raises(ValueError, match="init_from="):
        train_autoencoder(told, run, replace(AE, init_from=str(other)), resume=True, progress=False)
    train_autoencoder(told, run, config, resume=True, progress=False)


def test_another_network_is_refused_by_name(told, made, tmp_path):
    for change, words in (
        (dict(channels=(8, 24)), r"channels=\[8, 24\], there \[8, 16\]"),
        (dict(patch=4), "patch=4, there 2"),
        (dict(kind="vq"), "kind='vq', there 'kl'"),
        (dict(covariates=("age",)), "Expected covariates in both, or in none"),
    ):
        with pytest.raises(ValueError, match=f"init_from: .*{words}"):
            train_autoencoder(
                told, tmp_path / "run", replace(AE, init_from=str(made), **change), progress=False
            )
        assert not (tmp_path / "run").exists()
    schedule = replace(LDM.schedule, beta_schedule="linear")
    with pytest.raises(ValueError, match="schedule.beta_schedule='linear', there 'cosine'"):
        train_autoencoder(told, tmp_path / "run", AE, progress=False)
        train_ldm(
            told,
            tmp_path / "run",
            replace(LDM, init_from=str(made), schedule=schedule),
            progress=False,
        )


def test_an_ldm_of_other_latents_is_refused(told, made, tmp_path):
    train_autoencoder(told, tmp_path / "run", replace(AE, seed=3), progress=False)
    with pytest.raises(
        ValueError,
        match="neither that of .* Train this run's autoencoder with the same --init-from first",
    ):
        train_ldm(told, tmp_path / "run", replace(LDM, init_from=str(made)), progress=False)


def test_covariates_are_matched_by_name(dataset, made, tmp_path):
    """Another level, another range, one more and one fewer: what is known is taken by name, and
    the rest is said."""
    rows = aged(dataset, age={"sub-0": 40.0}).manifest
    # sorts first: every index moves
    rows["diagnosis"] = rows.diagnosis.where(rows.subject != "sub-2", "AA")
    rows["site"] = np.where(rows.subject.isin(["sub-0", "sub-3"]), "x", "y")
    data = SliceDataset(dataset.images, rows, find_covariates(rows, DataConfig(columns=("site",))))
    run = tmp_path / "run"
    train_autoencoder(data, run, replace(AE, init_from=str(made), **FROZEN), progress=False)
    config = replace(
        LDM,
        init_from=str(made),
        early_images=0,
        covariates=("diagnosis", "age", "site"),
        **FROZEN,
    )
    with pytest.warns(
        UserWarning,
        match=(
            "started from .*diagnosis: AA starts fresh; age: 40 to 66 stand where 60 to 66 stood;"
            " site starts fresh; slice is not learned any more"
        ),
    ):
        unet = train_ldm(data, run, config, progress=False)
    old, new = load_unet(made)[0].told.conditioner, unet.told.conditioner
    places = {c.name: i for i, c in enumerate(old.covariates)}
    assert [c.values for c in new.covariates if c.name == "diagnosis"] == [("AA", "AD", "NC")]
    torch.testing.assert_close(
        new.embed["diagnosis"].weight[1:], old.embed["diagnosis"].weight, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        new.embed["age"].net[0].weight, old.embed["age"].net[0].weight, rtol=0, atol=1e-6
    )
    for i, c in enumerate(new.covariates):
        if c.name in places:
            torch.testing.assert_close(new.null[i], old.null[places[c.name]], rtol=0, atol=1e-6)


def test_a_shipped_run_can_be_started_from(tmp_path):
    "phantom-128, by its name, from the command line: the first step begins at its weights."
    from brainldm.engineering.cli import main
    from brainldm.engineering.configs import PhantomConfig
    from brainldm.engineering.phantom import make_cohort
    from brainldm.engineering.sharing import pretrained_run

    data = make_cohort(
        tmp_path / "data", PhantomConfig(num_subjects=12, num_slices=2, size=128), progress=False
    )
    words = [
        "train",
        "autoencoder",
        str(data),
        "--run",
        str(tmp_path / "run"),
        "--init-from",
        "phantom-128",
        "--total-images",
        "4",
        "--no-adversarial",
        "--crop",
        "None",
        "--learning-rate",
        "1e-12",
    ]
    assert main(words) == 0
    got, want = (load_autoencoder(o)[0].state_dict() for o in (tmp_path / "run", pretrained_run()))
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=0, atol=1e-6)
    assert read_config(tmp_path / "run")["autoencoder"]["origin"]["run"] == "phantom-128"


def test_whole_brains_start_from_their_own_run(told, copy):
    with pytest.raises(ValueError, match="train_volume: init_from='phantom-128'. Expected None"):
        train_volume(
            told, copy, replace(VOLUME, init_from="phantom-128"), resume=True, progress=False
        )


# ------------------------------------------------------------------ on what machine


def test_precision_and_machine_are_written_down(made, copy, told):
    for stage in ("autoencoder", "ldm", "volume"):
        (row,) = read_config(made)[stage]["computed"]
        assert row == dict(
            images=0,
            device=device_name(torch.device("cpu")),
            precision=row["precision"],
            threads=torch.get_num_threads(),
            processes=1,
        )
        assert row["precision"] in ("float32", "bf16") and row["device"]


def test_a_change_of_machine_is_noted_and_said(told, tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupted(told, run, monkeypatch)
    other = dict(bf16="float32", float32="bf16")[
        read_config(run)["autoencoder"]["computed"][0]["precision"]
    ]
    edit(
        run,
        lambda s: s["autoencoder"]["computed"][0].update(precision=other, device="another chip"),
    )
    with pytest.warns(UserWarning, match=f"was trained in precision '{other}' and goes on in"):
        train_autoencoder(told, run, AE, resume=True, progress=False)
    rows = read_config(run)["autoencoder"]["computed"]
    assert [o["images"] for o in rows] == [0, 40] and rows[1]["device"] != "another chip"


def test_an_evaluation_says_what_was_corrected_since(made, dataset, told):
    autoencoder, _ = load_autoencoder(made)
    note_changes(made, "ldm", told, autoencoder)
    with pytest.warns(
        UserWarning,
        match=(
            "trained with other covariates: age of sub-1: 90 now, 62 then. Scores are those for the"
            " values now"
        ),
    ):
        note_changes(made, "ldm", aged(dataset, age={"sub-1": 90.0}), autoencoder)


def test_the_evaluator_knows_what_it_was_given(told, dataset, tmp_path):
    "A column that it does not learn may change; an age that it learned may not, and is named."
    config = TrainConfig(total_images=8, batch_size=4, precision="no")
    feature_net(tmp_path, told, config, (8,))
    more = SliceDataset(told.images, told.manifest.assign(note="new"), told.covariates)
    feature_net(tmp_path, more, config, (8,))
    with pytest.raises(ValueError, match="feature_net: .*other columns: age"):
        feature_net(tmp_path, aged(dataset, age={"sub-1": 90.0}), config, (8,))
