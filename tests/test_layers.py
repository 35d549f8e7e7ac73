"""The blocks against slow versions and PyTorch's own attention, over shapes, precisions, missing
values and bad input."""

import ast
from pathlib import Path
import pytest, torch
from accelerate import DistributedType, PartialState
from torch import nn
from torch.testing import assert_close
from brainldm.engineering.checks import check_divides
from brainldm.engineering.devices import pick_device, process_device
from brainldm.engineering.covariates import Covariate, encode_covariates
from brainldm.engineering.layers import AttentionBlock, Conditioner, CrossAttention, ScalarEmbedding
from brainldm.vae import Downsample, ResBlock, Upsample

COVARIATES = (
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
    Covariate('age', 'continuous', range=(50, 90)),
    Covariate('sex', 'categorical', values=('F', 'M')),
)


def awake(block, std=0.1):
    "Fill the last layer, which starts at zero, so that a block does something."
    last = block.conv2 if isinstance(block, ResBlock) else block.proj
    nn.init.normal_(last.weight, std=std)
    nn.init.normal_(last.bias, std=std)
    return block


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('c_in, c_out', [(8, 8), (8, 24), (24, 8), (16, 16)])
@pytest.mark.parametrize('size', [(1, 1), (5, 7), (16, 8)])
@pytest.mark.parametrize('emb', [None, 6])
def test_resblock_shapes_and_gradient(c_in, c_out, size, emb):
    block = awake(ResBlock(c_in, c_out, emb))
    x = torch.randn(3, c_in, *size, requires_grad=True)
    told = () if emb is None else (torch.randn(3, emb),)
    out = block(x, *told)
    assert out.shape == (3, c_out, *size)
    out.square().sum().backward()
    assert (
        all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
        and x.grad.any()
    )


def test_fresh_blocks_are_their_skip_path():
    x, tokens = torch.randn(2, 8, 5, 7), torch.randn(2, 3, 6)
    for out in (
        ResBlock(8, 8)(x),
        ResBlock(8, 8, 6)(x, tokens[:, 0]),
        AttentionBlock(8)(x),
        CrossAttention(8, 6)(x, tokens),
    ):
        assert_close(out, x)
    block = ResBlock(8, 16)
    assert_close(block(x), block.skip(x))


def test_resblock_rows_of_a_batch_do_not_meet():
    block, x, emb = awake(ResBlock(8, 16, 6)), torch.randn(4, 8, 5, 7), torch.randn(4, 6)
    assert_close(block(x, emb)[2:3], block(x[2:3], emb[2:3]), atol=1e-5, rtol=1e-4)


def test_embedding_acts_as_scale_and_shift():
    block, x, emb = awake(ResBlock(8, 8, 6)), torch.randn(2, 8, 5, 7), torch.randn(2, 6)
    scale, shift = block.emb_proj(nn.functional.silu(emb)).chunk(2, 1)
    h = (
        block.norm2(block.conv1(nn.functional.silu(block.norm1(x)))) * (1 + scale)[..., None, None]
        + shift[..., None, None]
    )
    assert_close(block(x, emb), x + block.conv2(nn.functional.silu(h)))


def torch_attention(block, q_in, kv_in, wq, bq, wkv, bkv):
    "The same attention by torch.nn.MultiheadAttention."
    c = len(wq)
    mha = nn.MultiheadAttention(
        c, block.num_heads, batch_first=True, kdim=kv_in.shape[2], vdim=kv_in.shape[2]
    )
    if mha.in_proj_weight is None:
        mha.q_proj_weight.data, mha.k_proj_weight.data, mha.v_proj_weight.data = (
            wq,
            wkv[:c],
            wkv[c:],
        )
    else:
        mha.in_proj_weight.data = torch.cat([wq, wkv])
    mha.in_proj_bias.data = torch.cat([bq, bkv])
    mha.out_proj.weight.data, mha.out_proj.bias.data = (
        block.proj.weight.data[..., 0, 0],
        block.proj.bias.data,
    )
    return mha(q_in, kv_in, kv_in, need_weights=False)[0]


@pytest.mark.parametrize('num_heads', [1, 2, 4])
@pytest.mark.parametrize('size', [(1, 1), (3, 5), (8, 4)])
def test_self_attention_is_that_of_torch(num_heads, size):
    block, x = awake(AttentionBlock(16, num_heads)), torch.randn(2, 16, *size)
    flat, (w, b) = block.norm(x).flatten(2).mT, (
        block.qkv.weight.data[..., 0, 0],
        block.qkv.bias.data,
    )
    want = torch_attention(block, flat, flat, w[:16], b[:16], w[16:], b[16:])
    assert_close(block(x), x + want.mT.unflatten(2, size), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('num_heads', [1, 2, 4])
@pytest.mark.parametrize('num_tokens', [1, 3, 9])
def test_cross_attention_is_that_of_torch(num_heads, num_tokens):
    block, x, tokens = (
        awake(CrossAttention(16, 6, num_heads)),
        torch.randn(2, 16, 3, 5),
        torch.randn(2, num_tokens, 6),
    )
    q_in = block.norm(x).flatten(2).mT
    want = torch_attention(
        block,
        q_in,
        tokens,
        block.to_q.weight.data[..., 0, 0],
        block.to_q.bias.data,
        block.to_kv.weight.data,
        block.to_kv.bias.data,
    )
    assert_close(block(x, tokens), x + want.mT.unflatten(2, (3, 5)), atol=1e-5, rtol=1e-4)


def test_self_attention_is_permutation_equivariant():
    block, x, shuffle = awake(AttentionBlock(16)), torch.randn(2, 16, 3, 5), torch.randperm(15)
    moved = x.flatten(2)[..., shuffle].unflatten(2, (3, 5))
    assert_close(block(moved).flatten(2), block(x).flatten(2)[..., shuffle], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('copies', [1, 2, 64])
def test_equal_tokens_give_one_answer_whatever_the_picture(copies):
    block, x = awake(CrossAttention(16, 6)), torch.randn(2, 16, 3, 5)
    answer = block(x, torch.randn(2, 1, 6).expand(2, copies, 6)) - x
    assert_close(answer, answer[..., :1, :1].expand_as(answer), atol=1e-5, rtol=1e-4)
    varied = block(x, torch.randn(2, 4, 6)) - x
    assert varied.std((2, 3)).max() > 1e-3


@pytest.mark.parametrize('size', [(2, 2), (6, 10), (16, 4)])
def test_down_and_up(size):
    x = torch.randn(2, 3, *size)
    assert Downsample(3, 5)(x).shape == (2, 5, size[0] // 2, size[1] // 2)
    assert Upsample(3, 5)(x).shape == (2, 5, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize(
    'make',
    [
        lambda: ResBlock(12, 16),
        lambda: ResBlock(16, 12),
        lambda: ResBlock(0, 8),
        lambda: AttentionBlock(12),
        lambda: AttentionBlock(16, num_heads=3),
        lambda: CrossAttention(16, 4, num_heads=5),
        lambda: CrossAttention(4, 4),
    ],
)
def test_channels_that_do_not_divide(make):
    with pytest.raises(
        ValueError, match=r'is not a positive multiple of \d+\. Expected .* Try \w+=\d+'
    ):
        make()


@pytest.mark.parametrize('bad, hint', [(12, 16), (1, 8), (0, 8), (-3, 8)])
def test_check_divides_names_a_value_that_works(bad, hint):
    with pytest.raises(ValueError, match=f'here: n={bad} .* Try n={hint}'):
        check_divides('here', 8, n=bad)
    check_divides('here', 8, n=hint)


def test_scalar_embedding_separates_neighbouring_slices():
    emb = ScalarEmbedding(16, num_waves=6)
    waves = []
    emb.net.register_forward_pre_hook(lambda _, args: waves.append(args[0]))
    emb(torch.linspace(0, 1, 32))
    assert waves[0].shape == (32, 13) and torch.pdist(waves[0]).min() > 0.1
    assert 'freqs' not in emb.state_dict()  # a formula, not a weight


def every_way_to_be_missing():
    full = encode_covariates(dict(diagnosis=['AD', 'NC'], age=[60, 80], sex=['F', 'M']), COVARIATES)
    hide = {
        'diagnosis': torch.full((2,), -1),
        'age': torch.full((2,), float('nan')),
        'sex': torch.full((2,), -1),
    }
    for i, name in enumerate(hide):
        drop = torch.zeros(2, 3, dtype=torch.bool)
        drop[:, i] = True
        yield (
            i,
            full,
            {**full, name: hide[name]},
            {k: v for k, v in full.items() if k != name},
            drop,
        )


def test_missing_absent_and_dropped_are_the_null_token():
    teller = Conditioner(COVARIATES, 8)
    for i, full, missing, absent, drop in every_way_to_be_missing():
        want = teller(full, 2).clone()
        want[:, i] = teller.null[i]
        for got in (
            teller(missing, 2),
            teller(absent, 2),
            teller(full, 2, drop),
            teller(missing, 2, drop),
        ):
            assert_close(got, want)
    assert_close(teller({}, 4), teller.null.expand(4, -1, -1))
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert_close(teller(full, 2, everything), teller({}, 2))


def test_conditioner_gradients_are_finite_with_missing_values():
    teller = Conditioner(COVARIATES, 8)
    told = encode_covariates(
        dict(diagnosis=['AD', None], age=[None, 80], sex=['F', 'M']), COVARIATES
    )
    teller(told, 2).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in teller.parameters())
    assert not teller.null.grad[2].any()  # sex was told in both rows


def test_conditioner_refuses_a_stranger():
    with pytest.raises(ValueError, match=r"unknown covariate \['weight'\].*diagnosis"):
        Conditioner(COVARIATES, 8)({'weight': torch.zeros(2)}, 2)


def test_bfloat16_autocast():
    x, told = torch.randn(2, 16, 6, 10), encode_covariates(
        dict(diagnosis=['AD', None], age=[60, 70]), COVARIATES
    )
    teller, res, attn, cross = (
        Conditioner(COVARIATES, 8),
        awake(ResBlock(16, 16, 8)),
        awake(AttentionBlock(16)),
        awake(CrossAttention(16, 8)),
    )

    def run():
        tokens = teller(told, 2)
        return cross(attn(res(x, tokens.mean(1))), tokens)

    with torch.autocast('cpu', torch.bfloat16):
        half = run()
    # bfloat16 keeps 8 bits: 0.4 % an operation
    assert_close(half.float(), run(), atol=0.1, rtol=0.05)
    half.float().square().sum().backward()
    assert all(
        p.grad.isfinite().all()
        for m in (teller, res, attn, cross)
        for p in m.parameters()
        if p.grad is not None
    )


@pytest.mark.parametrize(
    'environment, place',
    [
        ({}, 'cuda'),
        (dict(LOCAL_RANK='0'), 'cuda:0'),
        (dict(LOCAL_RANK='1'), 'cuda:1'),
        (dict(LOCAL_RANK='3'), 'cuda:1'),
        (dict(LOCAL_RANK='1', ACCELERATE_USE_CPU='true'), 'cpu'),
    ],
)
def test_device_of_a_process(environment, place, monkeypatch):
    """Two GPUs: which one depends on the number of the process on this machine; more processes
    than GPUs share them."""
    monkeypatch.setattr(PartialState, '_shared_state', {})
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for k in ('LOCAL_RANK', 'ACCELERATE_USE_CPU'):
        monkeypatch.delenv(k, raising=False)
    for k, v in environment.items():
        monkeypatch.setenv(k, v)
    assert process_device() == place


def test_device_of_a_host_program(monkeypatch):
    "Where accelerate is set up already, its device is taken, and nothing is set up by asking."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(PartialState, '_shared_state', {})
    process_device()
    assert not PartialState._shared_state
    monkeypatch.setattr(
        PartialState,
        '_shared_state',
        dict(
            device=torch.device('cpu'), _cpu=True, distributed_type=DistributedType.NO, debug=False
        ),
    )
    assert pick_device() == torch.device('cpu')


def test_one_place_chooses_the_device():
    "No other function asks which accelerators there are, but to pin memory or to name one."
    asks = {}
    for path in (Path(__file__).parents[1] / 'brainldm').rglob('[a-z]*.py'):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and 'is_available()' in ast.unparse(node):
                asks.setdefault(path.stem, []).append(node.name)
    asks['devices'].remove('all_gather_rows')  # of torch.distributed
    assert {k: v for k, v in asks.items() if v} == dict(
        devices=['process_device'], loop=['train_batches']
    )
