"Runs that are handed on: small, whole, without names; and the ones that ship."

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import brainldm
from brainldm.engineering import sharing
from brainldm.engineering.cli import main
from brainldm.advanced.prior import CodeSampler
from brainldm.sampling import BrainLDM

SHELF = Path(brainldm.__file__).parent / 'pretrained'


@pytest.fixture(scope='module')
def reported(tiny_run, tmp_path_factory):
    "A tiny trained run with a card."
    run = tmp_path_factory.mktemp('reported') / 'run'
    shutil.copytree(tiny_run[0], run)
    (run / 'README.md').write_text('# card')
    return run


def test_what_ships_is_small_whole_and_free_of_pickles():
    files = [o for o in SHELF.rglob('*') if o.is_file()]
    assert sum(o.stat().st_size for o in files) <= 28e6
    assert {o.suffix for o in files} == {'.safetensors', '.json', '.md'}
    for run in SHELF.iterdir():
        card, settings = (run / 'README.md').read_text(), json.loads(
            (run / 'config.json').read_text()
        )
        assert 'not for clinical use' in card and 'Synthetic subjects' in card
        for stage in settings.values():  # the command, seed and data that made it
            assert stage['data']['layout'] == 'phantom' and len(stage['data']['hash']) == 32
            assert {'seed', 'total_images'} <= set(stage['config']) and stage['versions'][
                'brainldm'
            ]


@pytest.mark.parametrize(
    'cls, name', [(BrainLDM, 'phantom-128'), (CodeSampler, 'phantom-128-codes')]
)
def test_shipped_runs_draw_brains(cls, name):
    model = cls.load_pretrained(name, device='cpu')
    requested = dict(diagnosis='AD', slice=16, age=75, seed=3)
    images = model.sample(
        2, **requested, **(dict(steps=10, sampler='dpmpp') if cls is BrainLDM else {})
    )
    assert images.shape == (2, 1, 128, 128) and images.isfinite().all()
    assert (images[..., :8, :] < -0.9).float().mean() > 0.9  # air above the head
    assert (images[..., 48:80, 32:96] > -0.5).float().mean() > 0.5  # tissue in its middle
    assert cls.from_pretrained(name).run == model.run


@pytest.mark.parametrize('half', [True, False])
def test_a_packed_run_draws_the_same(half, reported, tmp_path):
    whole = BrainLDM.load(reported, device='cpu', precision='no')
    packed = BrainLDM.load(
        whole.save_pretrained(tmp_path / 'out', half=half, without_audit='a test'),
        device='cpu',
        precision='no',
    )
    names = {c.name: c.values[0] if c.values else c.range[0] for c in whole.covariates}
    ours, theirs = (o.sample(2, **names, steps=4, seed=1) for o in (whole, packed))
    assert_close(theirs, ours, rtol=0, atol=0.02 if half else 0)
    with pytest.raises(ValueError, match="weights='ema'"):
        BrainLDM.load(tmp_path / 'out', weights='raw')


@pytest.mark.parametrize(
    'text, match', [('{"samples ldm": ', 'is not JSON'), ('[1]', 'holds something else')]
)
def test_broken_metrics_are_named(text, match, reported, tmp_path):
    run = shutil.copytree(reported, tmp_path / 'run')
    (run / 'metrics.json').write_text(text)
    with pytest.raises(ValueError, match=f'read_metrics: .*{match}'):
        sharing.pack_run(run, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


PASSED = dict(
    verdict='passed', reason='no copy', copies=0, power={}, near=0.01, n=640, allowed=0.02
)


@pytest.mark.parametrize(
    'audit, said',
    [
        (None, 'ldm: not audited'),
        (dict(PASSED, verdict='unclear'), 'ldm: unclear'),
        (dict(PASSED, verdict='failed'), 'ldm: failed'),
        (dict(share=0.01875, allowed=0.02, verdict='passed', n=640), 'ldm: not audited'),
    ],
    ids=['never', 'unclear', 'failed', 'earlier rule'],
)
def test_only_a_passed_audit_is_shared(audit, said, reported, tmp_path, capsys):
    run = shutil.copytree(reported, tmp_path / 'run')
    (run / 'metrics.json').write_text(
        json.dumps({'samples ldm': dict(memorization=audit)} if audit else {})
    )
    with pytest.raises(ValueError, match=said):
        sharing.pack_run(run, tmp_path / 'out')
    assert (
        main(['share', str(run), '--out', str(tmp_path / 'out')]) == 1
        and not (tmp_path / 'out').exists()
    )
    error = capsys.readouterr().err
    assert (
        said in error
        and '--without-audit' in error
        and ('brainldm evaluate' in error or 'evaluate again' in error or 'held-out' in error)
    )
    assert (
        main(['share', str(run), '--out', str(tmp_path / 'out'), '--without-audit', '  ']) == 1
        and not (tmp_path / 'out').exists()
    )
    assert (
        main(
            [
                'share',
                str(run),
                '--out',
                str(tmp_path / 'out'),
                '--without-audit',
                'a <b>class</b> of synthetic subjects',
            ]
        )
        == 0
    )
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert (
        said in card
        and 'of synthetic subjects' in card
        and '<b>' not in card
        and 'may repeat' in card
    )


def test_an_audit_of_weights_replaced_since_is_none(reported, tmp_path):
    run = shutil.copytree(reported, tmp_path / 'run')
    audit = dict(PASSED, weights=sharing.generator_hash(run, 'ldm'))
    (run / 'metrics.json').write_text(json.dumps({'samples ldm': dict(memorization=audit)}))
    packed = sharing.pack_run(run, tmp_path / 'packed')
    # rounding is no other training
    assert sharing.open_verdicts(packed, json.loads((packed / 'metrics.json').read_text())) == {}
    tensors, info = sharing.load_weights(run / 'ldm.safetensors')
    sharing.save_weights(
        run / 'ldm.safetensors',
        {k: v + 1 if v.is_floating_point() else v for k, v in tensors.items()},
        info,
    )
    with pytest.raises(ValueError, match='ldm: not audited'):
        sharing.pack_run(run, tmp_path / 'out')


def test_a_passed_audit_is_shared_without_a_word(reported, tmp_path):
    run = shutil.copytree(reported, tmp_path / 'run')
    (run / 'metrics.json').write_text(json.dumps({'samples ldm': dict(memorization=PASSED)}))
    out = sharing.pack_run(run, tmp_path / 'out', without_audit='nothing to excuse')
    assert (out / 'README.md').read_text() == (run / 'README.md').read_text()
    # another generator, never audited
    (run / 'prior.safetensors').write_bytes((run / 'ldm.safetensors').read_bytes())
    with pytest.raises(ValueError, match='prior: not audited'):
        sharing.pack_run(run, tmp_path / 'more')


def test_no_path_travels(reported):
    settings = json.loads((reported / 'config.json').read_text())
    settings['autoencoder']['config']['data']['subjects'] = '/home/anna/table.csv'
    bare = sharing.strip_settings(settings)
    # a phantom's
    assert (
        'anna' not in json.dumps(bare)
        and bare['autoencoder']['train_subjects'] == settings['autoencoder']['train_subjects']
    )


def test_nothing_is_sent_when_packing_is_refused(reported, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr('huggingface_hub.HfApi', lambda **_: calls.append('hub'))
    bad = tmp_path / 'bad'
    shutil.copytree(reported, bad)
    (bad / 'metrics.json').write_text(
        json.dumps({'samples ldm': dict(memorization=dict(PASSED, verdict='failed'))})
    )
    with pytest.raises(ValueError, match='audit of ldm: failed'):
        sharing.push_run(bad, 'a/b')
    (bad / 'README.md').unlink()
    with pytest.raises(FileNotFoundError, match='brainldm report'):
        BrainLDM.load(bad).push_to_hub('a/b')
    assert not calls


def test_the_hub_gets_a_private_run_and_gives_it_back(reported, tmp_path, monkeypatch):
    seen = {}

    def create_repo(repo_id, private, exist_ok):
        seen.update(private=private)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / 'hub' / repo_id)
        return SimpleNamespace(commit_url='url')

    def download(repo_id, allow_patterns, **_):
        assert not any('pt' in o or 'bin' in o or '*' in o for o in allow_patterns)
        return tmp_path / 'hub' / repo_id

    monkeypatch.setattr(
        'huggingface_hub.HfApi',
        lambda token: SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder),
    )
    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    assert (
        main(['share', str(reported), '--repo', 'me/brain', '--without-audit', 'a test']) == 0
        and seen['private']
    )
    assert main(['fetch', 'me/brain', '--run', str(tmp_path / 'mine')]) == 0
    model = BrainLDM.from_pretrained('me/brain', device='cpu')
    for k, v in model.unet.state_dict().items():
        assert_close(v, BrainLDM.load(tmp_path / 'mine').unet.state_dict()[k], rtol=0, atol=0)


def test_no_word_about_people_travels(reported, tmp_path):
    clinic = tmp_path / 'clinic'
    shutil.copytree(reported, clinic)
    settings = json.loads((clinic / 'config.json').read_text())
    for stage in settings.values():
        stage['data']['layout'] = 'oasis'
        stage['train_subjects'] = ['OAS1_0042']
        if 'data' in stage['config']:
            stage['config']['data']['subjects'] = 'anna/patients.csv'
    (clinic / 'config.json').write_text(json.dumps(settings))
    out = sharing.pack_run(clinic, tmp_path / 'out', without_audit='a test')
    for path in out.iterdir():
        for word in (b'OAS1_0042', b'anna', b'patients.csv'):
            assert word not in path.read_bytes()
    assert {o.name for o in out.iterdir()} <= {
        'README.md',
        'config.json',
        'metrics.json',
        *(f'{o}.safetensors' for o in sharing.WEIGHTS),
    }
    assert BrainLDM.load(out).unet is not None


@pytest.mark.parametrize(
    'line, said',
    [
        ('share {run}', 'Expected one of them'),
        ('share {run} --out {run}', 'not empty'),
        ('share {run} --out x --repo a/b', 'Expected one of them'),
        ('fetch phantom-129 --run x', 'phantom-128'),
        ('fetch phantom-128 --run {run}', 'not empty'),
        ('fetch a/b/c --run x', 'Check the spelling'),
    ],
)
def test_refusals_on_the_command_line(line, said, reported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {o: o.read_bytes() for o in reported.rglob('*') if o.is_file()}
    assert main(line.format(run=reported).split()) != 0
    assert said in capsys.readouterr().err and not (tmp_path / 'x').exists()
    assert {o: o.read_bytes() for o in reported.rglob('*') if o.is_file()} == before


def test_a_weight_too_large_for_half_is_refused():
    with pytest.raises(ValueError, match='at most 65504'):
        sharing.to_half(dict(w=torch.tensor([7e4])), 'ldm.safetensors')


def test_a_model_that_says_not_how_it_is_loaded():
    with pytest.raises(TypeError, match='SharedModel.load: .*Try BrainLDM'):
        sharing.SharedModel.load_pretrained('phantom-128')
