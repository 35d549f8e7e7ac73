"""Codebooks against an independent library, alone and on two processes; the code histogram; the
discriminator and its losses; bad input."""

import copy, math, os, socket
import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from brainldm.engineering.devices import all_gather_rows
from brainldm.engineering.covariates import Covariate, encode_covariates
from brainldm.vqgan import (
    FP16_SCALE,
    FSQ,
    VQVAE,
    CodeHistogram,
    PatchDiscriminator,
    VectorQuantizer,
    adaptive_weight,
    code_scores,
    count_codes,
    discriminator_accuracy,
    discriminator_loss,
    feature_loss,
    generator_loss,
    nearest_codes,
    restart_dead_codes,
    smooth_counts,
    start_codebook,
    straight_through,
)

COVARIATES = (
    Covariate('slice', 'continuous', range=(0, 31)),
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
)
TOLD = encode_covariates(dict(slice=[3, 28], diagnosis=['AD', None]), COVARIATES)
SMALL = dict(channels=(8, 16), attention_levels=(False, False), patch=2)


def quantizer(k=7, d=3, **kwargs):
    "A codebook as wide as the vectors that the tests sample."
    q = VectorQuantizer(k, d, **kwargs)
    with torch.no_grad():
        q.cluster_sum.copy_(nn.init.normal_(q.codebook))
    return q


def build(kind='vq', side=4, **kwargs):
    return VQVAE(quantizer(12, 3) if kind == 'vq' else FSQ((5, 4, 3)), side, **SMALL, **kwargs)


def rows(z):
    return rearrange(z, 'b d h w -> (b h w) d')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- the codebook


@pytest.mark.parametrize('n, k, d', [(1, 1, 1), (50, 7, 3), (33, 256, 8), (5, 3, 64)])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 100.0])
def test_nearest_is_nearest(n, k, d, scale):
    vectors, codes = scale * torch.randn(n, d), scale * torch.randn(k, d)
    gaps = torch.cdist(vectors.double(), codes.double()).square()
    indices, gap = nearest_codes(vectors, codes)
    assert indices.dtype == torch.int64 and indices.shape == gap.shape == (n,) and (gap >= 0).all()
    slack = 1e-6 * d * scale**2 * 20  # float32 sums of squares up to about 20 d scale^2
    assert (gaps.gather(1, indices[:, None])[:, 0] - gaps.amin(1)).max() <= slack
    assert (gap - gaps.amin(1)).abs().max() <= slack


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (2, 3, 4, 6), (3, 3, 5, 2)])
@pytest.mark.parametrize('ema', [True, False])
def test_shapes_and_dtypes(shape, dtype, ema):
    q, z = quantizer(ema=ema).eval(), torch.randn(shape).to(dtype)
    zq, indices, loss = q(z)
    assert zq.shape == shape and indices.shape == (shape[0], *shape[2:]) and loss.ndim == 0
    assert (
        zq.dtype == q.lookup(indices).dtype == loss.dtype == torch.float32
        and indices.dtype == torch.int64
    )
    assert_close(zq, q.lookup(indices))
    assert torch.equal(indices, q.nearest(z))
    assert torch.equal(q.nearest(q.lookup(indices)), indices)
    i, j, b = shape[2] - 1, shape[3] - 1, shape[0] - 1
    # rows stay rows
    assert indices[b, i, j] == (q.codebook - z[b, :, i, j].float()).square().sum(1).argmin()


def test_float32_inside_autocast():
    q, z = quantizer(512, 8).eval(), torch.randn(4, 8, 8, 8)
    plain = q(z)
    with torch.autocast('cpu', torch.bfloat16):
        inside = q(z)
    for a, b in zip(inside, plain):
        assert a.dtype == b.dtype and torch.equal(a, b)
    half = rows(z).bfloat16() @ q.codebook.bfloat16().T
    gaps = rows(z).square().sum(1, keepdim=True) - 2 * half + q.codebook.square().sum(1)
    # in bfloat16 some would be confused
    assert (gaps.argmin(1) != plain[1].flatten()).float().mean() > 0.005
    learned = [copy.deepcopy(q).train() for _ in range(2)]
    u = torch.rand(512)
    learned[0](z, u)
    with torch.autocast('cpu', torch.bfloat16):
        learned[1](z, u)
    for a, b in zip(*(o.state_dict().values() for o in learned)):
        assert torch.equal(a, b)


def test_codes_of_a_model_inside_autocast_are_those_of_its_latents():
    model = build().eval()
    with torch.autocast('cpu', torch.bfloat16):
        z, codes = model.encode(torch.randn(2, 1, 16, 16))
    assert z.dtype == torch.float32 and torch.equal(codes, model.quantizer.nearest(z))


@pytest.mark.parametrize('ema', [True, False])
def test_learning_starts_at_the_first_step(ema):
    """The fault: a quantiser's loss behind the discriminator's gate leaves the codebook without
    gradient."""
    model = VQVAE(quantizer(12, 3, ema=ema), 4, **SMALL).train()
    before = model.quantizer.codebook.detach().clone()
    x = torch.randn(3, 1, 16, 16)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    recon, codes, loss = model(x)
    ((recon - x).abs().mean() + loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for part in ('stem', 'head'):
        assert all(p.grad.abs().sum() > 0 for n, p in model.encoder.named_parameters() if part in n)
    opt.step()
    moved = (model.quantizer.codebook - before).abs().sum(1) > 0
    used = count_codes(codes, 12) > 0
    assert moved[used].all() and used.any()
    assert isinstance(model.quantizer.codebook, nn.Parameter) != ema


def test_straight_through():
    z, zq = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    g = torch.randn(3, 4)
    out = straight_through(z, zq)
    out.backward(g)
    assert_close(out.detach(), zq.detach(), atol=1e-6, rtol=1e-6)
    assert_close(z.grad, g)
    assert zq.grad is None


@pytest.mark.parametrize('decay', [0.0, 0.5, 0.99])
@pytest.mark.parametrize('steps', [1, 6])
def test_moving_average_is_its_closed_form(decay, steps):
    q = quantizer(9, 2, decay=decay, restart_below=0)
    start = q.codebook.double()
    N, m = decay**steps * torch.ones(9).double(), decay**steps * start
    for t in range(steps):
        z = torch.randn(2, 2, 3, 4)
        _, codes, _ = q(z)
        chosen = F.one_hot(codes.flatten(), 9).double()
        old = (1 - decay) * decay ** (steps - 1 - t)
        N, m = N + old * chosen.sum(0), m + old * chosen.T @ rows(z).double()
    # float32, sums of up to 24 vectors, divided by counts of 0.01 and more
    same = dict(check_dtype=False, atol=1e-4, rtol=1e-5)
    assert_close(q.cluster_size, N, **same)
    assert_close(q.cluster_sum, m, **same)
    if decay:
        assert_close(q.codebook, m / smooth_counts(N)[:, None], **same)


def test_nothing_is_learned_in_evaluation():
    q = quantizer().eval()
    before = copy.deepcopy(q.state_dict())
    q(torch.randn(2, 3, 4, 4), torch.rand(7))
    for k, v in q.state_dict().items():
        assert torch.equal(v, before[k])


@pytest.mark.parametrize('ema', [True, False])
@pytest.mark.parametrize('dead', [1, 3, 6])
def test_restart_revives_the_dead_and_resets_their_statistics(dead, ema):
    q = quantizer(7, 3, ema=ema, restart_below=0.1)
    planted = torch.arange(7) >= 7 - dead
    with torch.no_grad():
        q.codebook[planted] = 100 + torch.randn(dead, 3)
        q.cluster_size[planted] = 0
        q.cluster_sum[planted] = 0
    alive = (~planted).nonzero().flatten()
    z = torch.randn(4, 3, 5, 5)
    q.train()(z, torch.rand(7))
    # each sits on one of the encoder's vectors
    assert nearest_codes(q.codebook[planted].detach(), rows(z))[1].max() < 1e-4
    share = q.cluster_size[planted]
    # an equal fraction of what was counted
    assert_close(share, q.cluster_size[alive].sum().div(7).expand(dead))
    assert_close(q.cluster_sum[planted], q.codebook[planted].detach() * share[:, None])
    used = count_codes(q(z, torch.rand(7))[1], 7)  # the next step: they are in use, and stay
    assert nearest_codes(q.codebook[planted].detach(), rows(z))[1].max() < 2 and (
        used[planted] > 0
    ).sum() >= max(1, dead - 2)


def test_restart_leaves_the_living_alone_and_needs_chance():
    q = quantizer()
    z = torch.randn(2, 3, 4, 4)
    twin, silent = copy.deepcopy(q), copy.deepcopy(q)
    silent.restart_below = 0
    twin(z)
    silent(z, torch.rand(7))
    q(z, torch.rand(7))  # all codes are fresh: nobody is dead
    for a, b, c in zip(*(o.state_dict().values() for o in (q, twin, silent))):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_restart_prefers_the_worst_fit():
    # squared distances 0, 1, 9
    vectors = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, -3.0]])
    chosen = []
    u = (torch.arange(1000) + 0.5) / 1000
    q = VectorQuantizer(1001, 2)
    q.codebook.fill_(1e6)
    q.codebook[0] = 0
    q.cluster_size.zero_()
    q.cluster_size[0] = 100
    restart_dead_codes(q, vectors, torch.cat([torch.zeros(1), u]))
    chosen = q.codebook[1:, 1]
    assert ((chosen == 1).sum().item(), (chosen == -3).sum().item()) == (100, 900) and (
        q.codebook[0] == 0
    ).all()


def test_start_codebook():
    centres = 10 * torch.randn(5, 4)
    who = torch.arange(200) % 5
    vectors = (centres[who] + 0.01 * torch.randn(200, 4)).requires_grad_()
    for ema in (True, False):
        q = VectorQuantizer(5, 4, ema=ema)
        start_codebook(q, vectors, seed=1)
        means = torch.stack([vectors[who == k].mean(0) for k in range(5)]).detach()
        assert nearest_codes(means, q.codebook.detach())[1].max() < 1e-4
        assert_close(q.cluster_size, torch.ones(5))
        assert_close(q.cluster_sum, q.codebook.detach())
        again = VectorQuantizer(5, 4, ema=ema)
        start_codebook(again, vectors, seed=1)
        assert torch.equal(again.codebook, q.codebook)


def test_scores_of_codes():
    assert code_scores(torch.eye(9)[0]) == dict(codebook_usage=1 / 9, perplexity=1.0)
    p = torch.rand(50)
    p[:5] = 0
    scores = code_scores(p)
    assert scores['codebook_usage'] == 0.9
    assert math.isclose(
        scores['perplexity'],
        torch.distributions.Categorical(p[5:].double()).entropy().exp().item(),
        rel_tol=1e-6,
    )
    for counts in (torch.zeros(3), torch.full((3,), math.nan)):
        with pytest.raises(
            ValueError,
            match=(
                r'^code_scores: 3 codes, none used\. Expected counts of at least one image\. Encode'
                r' some first\.$'
            ),
        ):
            code_scores(counts)
    codes = torch.randint(0, 30, (4, 5, 6))
    assert torch.equal(
        count_codes(codes, 40), torch.bincount(codes.flatten(), minlength=40).float()
    )


# ---------------------------------------------------------------- against vector-quantize-pytorch


def oracle():
    return pytest.importorskip('vector_quantize_pytorch')


@pytest.mark.parametrize('k, d, size', [(7, 3, 4), (64, 8, 6), (512, 4, 8)])
def test_quantiser_agrees_with_the_library(k, d, size):
    """Codes, loss and gradient of encoder and codebook; and, with a moving average, the codebook
    after three steps."""
    lib, q = oracle().VectorQuantize(
        d,
        k,
        ema_update=False,
        learnable_codebook=True,
        commitment_weight=1.0,
        rotation_trick=False,
        accept_image_fmap=True,
    ), quantizer(k, d, ema=False, commitment_cost=1.0, restart_below=0)
    theirs = next(p for n, p in lib.named_parameters() if 'embed' in n)
    with torch.no_grad():
        theirs.copy_(q.codebook.view_as(theirs))
    z1 = torch.randn(2, d, size, size + 1, requires_grad=True)
    z2 = z1.detach().clone().requires_grad_()
    g = torch.randn_like(z1)
    a, codes, theirs_loss = lib.train()(z1)
    b, mine, loss = q(z2)
    # theirs has one term, with both gradients
    assert torch.equal(codes, mine)
    assert_close(a, b)
    assert_close(2 * theirs_loss.sum(), loss)
    # straight through
    b.backward(g, retain_graph=True)
    a.backward(g, retain_graph=True)
    assert_close(z1.grad, z2.grad)
    z1.grad = z2.grad = q.codebook.grad = theirs.grad = None
    loss.backward()
    theirs_loss.sum().backward()
    assert_close(z1.grad, z2.grad)
    assert_close(theirs.grad.view_as(q.codebook), q.codebook.grad)


@pytest.mark.parametrize('beta', [0.25, 1.0])
def test_moving_average_agrees_with_the_library(beta):
    k, d = 16, 4
    lib = oracle().VectorQuantize(
        d,
        k,
        decay=0.9,
        eps=1e-5,
        commitment_weight=beta,
        rotation_trick=False,
        accept_image_fmap=True,
    )
    q, book = quantizer(k, d, decay=0.9, commitment_cost=beta, restart_below=0), lib._codebook
    book.embed.data.copy_(q.codebook.view_as(book.embed))
    book.embed_avg.data.copy_(q.codebook.view_as(book.embed_avg))
    book.cluster_size.data.fill_(1)
    for _ in range(3):
        z1 = torch.randn(3, d, 6, 5, requires_grad=True)
        z2 = z1.detach().clone().requires_grad_()
        a, codes, theirs = lib.train()(z1)
        b, mine, loss = q(z2)
        assert torch.equal(codes, mine)
        assert_close(a, b)
        assert_close(theirs.sum(), loss)
        (a.square().sum() + theirs.sum()).backward()
        (b.square().sum() + loss).backward()
        assert_close(z1.grad, z2.grad)
    assert_close(book.embed.view(k, d), q.codebook, atol=1e-5, rtol=1e-5)
    assert_close(book.cluster_size.view(k), q.cluster_size)


@pytest.mark.parametrize('levels', [(3,), (8, 5, 5, 5), (8, 6, 5), (7, 5, 5, 5, 5), (4, 3)])
def test_fsq_agrees_with_the_library(levels):
    """The same vectors, the same gradient, and the same numbers of the codes: in both the first
    channel counts fastest."""
    lib, fsq = oracle().FSQ(list(levels)), FSQ(levels)
    z1 = 2 * torch.randn(2, len(levels), 6, 7)
    z1.requires_grad_()
    z2 = z1.detach().clone().requires_grad_()
    a, codes = lib(z1)
    b, mine, loss = fsq(z2)
    assert_close(a, b)
    assert torch.equal(codes.long(), mine) and loss == 0
    g = torch.randn_like(a)
    a.backward(g)
    b.backward(g)
    assert_close(z1.grad, z2.grad)
    every = torch.arange(min(fsq.num_embeddings, 2000)).view(1, -1, 1)
    assert_close(
        rearrange(lib.indices_to_codes(every.flatten()), 'n d -> 1 d n 1'), fsq.lookup(every)
    )


# ---------------------------------------------------------------- two processes


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def learner():
    torch.manual_seed(5)
    model = build().train()
    with torch.no_grad():
        model.quantizer.codebook[9:] = 50
        model.quantizer.cluster_size[9:] = 0
        model.quantizer.cluster_sum[9:] = 0
    return model, torch.randn(3, 4, 1, 16, 16), torch.rand(3, 4), torch.rand(3, 12)


def one_of_two(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    model, xs, heights, us = learner()
    for x, h, u in zip(xs, heights, us):
        mine = slice(2 * rank, 2 * rank + 2)
        # the first process decides on chance
        model(x[mine], {'slice': h[mine]}, u if rank == 0 else torch.rand(12))
    w = torch.ones(3, requires_grad=True)
    a = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    weight = adaptive_weight((w * a).sum(), (w * (a - 1)).sum(), w)
    torch.save(
        (model.state_dict(), all_gather_rows(torch.full((2, 1), float(rank))), weight),
        f'{folder}/{rank}.pt',
    )
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    mp.spawn(one_of_two, (free_port(), str(tmp_path)), nprocs=2)
    model, xs, heights, us = learner()
    for x, h, u in zip(xs, heights, us):
        model(x, {'slice': h}, u)
    assert model.quantizer.codebook.max() < 50  # the restart took part
    (first, gathered, weight), (second, _, weight2) = (
        torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1)
    )
    assert gathered.flatten().tolist() == [0.0, 0.0, 1.0, 1.0] and torch.equal(weight, weight2)
    mean = torch.tensor([1.0, 2.0, 3.0]) * 1.5
    # of the gradients that the processes share
    assert_close(weight, mean.norm() / ((mean - 1).norm() + 1e-6))
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value, atol=1e-5, rtol=1e-5, msg=lambda m: f'{name}: {m}')
    assert model.histogram.counts.sum() > 0 and torch.equal(
        first['histogram.counts'].sum((1, 2, 3)), model.histogram.counts.sum((1, 2, 3))
    )


# ---------------------------------------------------------------- FSQ

LEVELS = [
    (3,),
    (4,),
    (5, 3),
    (3, 4),
    (8, 6, 5),
    (8, 5, 5, 5),
    (7, 5, 5, 5, 5),
    (16, 3),
    (3, 3, 3, 3, 3, 3),
]


@pytest.mark.parametrize('levels', LEVELS)
def test_fsq_round_trip(levels):
    fsq = FSQ(levels)
    n = math.prod(levels)
    assert (fsq.num_embeddings, fsq.embedding_dim) == (n, len(levels))
    every = torch.arange(n).view(1, n, 1)
    codes = fsq.lookup(every)
    assert torch.equal(fsq.nearest(codes), every) and codes.abs().max() <= 1 and (codes == 0).any()
    assert len(rows(codes).unique(dim=0)) == n  # all combinations occur, each once
    wide = 20 * torch.randn(2, len(levels), 40, 30)
    assert set(fsq(wide)[1].unique().tolist()) <= set(range(n))
    for c, size in enumerate(levels):  # every level of every channel can be reached
        z = torch.zeros(1, len(levels), 400, 1)
        z[0, c, :, 0] = torch.linspace(-6, 6, 400)
        digits = ((fsq(z)[1] - fsq(0 * z)[1]) // math.prod(levels[:c])).unique()
        assert len(digits) == size
        assert fsq.bound(z)[0, c, :, 0].diff().min() > -1e-6


def test_fsq_gradient_and_autocast():
    fsq, z = FSQ((8, 5, 3)), torch.randn(2, 3, 4, 5, requires_grad=True)
    g = torch.randn_like(z)
    zq, codes, loss = fsq(z)
    zq.backward(g)
    slope = z.grad
    z.grad = None
    fsq.bound(z).backward(g)
    assert_close(slope, z.grad)
    assert slope.abs().min() > 0
    with torch.autocast('cpu', torch.bfloat16):
        again = fsq(z)
    assert torch.equal(again[1], codes) and again[0].dtype == torch.float32
    assert not list(fsq.parameters()) and not fsq.state_dict() and not loss.requires_grad
    far = 3 * torch.randn(2, 3, 4, 5)  # a sampler may leave [-1, 1]
    assert torch.equal(fsq.nearest(far), fsq.nearest(far.clamp(-1, 1)))


# ---------------------------------------------------------------- histogram


@pytest.mark.parametrize('side, bins', [(3, 1), (5, 4), (8, 8)])
def test_drawn_maps_are_not_transposed(side, bins):
    h, gen = CodeHistogram(side * side, side, bins), torch.Generator().manual_seed(0)
    own = torch.arange(side * side).view(side, side)  # each place has its own code
    heights = (torch.arange(bins) + 0.5) / bins
    for b, position in enumerate(heights):
        h.update((own.roll(b, 1)).expand(2, -1, -1), position.expand(2))
    drawn = h.sample(heights, gen)
    for b in range(bins):
        assert torch.equal(drawn[b], own.roll(b, 1))


def test_draws_follow_the_counts():
    from scipy.stats import chisquare

    h, gen = CodeHistogram(4, side=2, bins=2), torch.Generator().manual_seed(0)
    counts = torch.tensor(
        [[3.0, 0.0, 1.0, 6.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0], [10.0, 20.0, 0.0, 70.0]]
    )
    h.counts[1] = counts.view(2, 2, 4)
    n, drawn = 4000, h.sample(torch.full((4000,), 0.9), gen)
    for place, expected in zip(range(4), counts):
        seen, expected = (
            count_codes(drawn[:, place // 2, place % 2], 4).double().numpy(),
            expected.double().numpy(),
        )
        used = expected > 0
        assert seen[~used].sum() == 0
        if used.sum() > 1:
            assert chisquare(seen[used], n * expected[used] / expected.sum()).pvalue > 1e-4
    assert torch.equal(drawn, h.sample(torch.full((4000,), 0.9), torch.Generator().manual_seed(0)))
    # a height never seen: every code is equally likely
    never = count_codes(h.sample(torch.full((n,), 0.1), gen), 4)
    assert chisquare(never.double().numpy()).pvalue > 1e-4


def test_heights_decay_and_the_unknown():
    h, gen = CodeHistogram(5, side=2, bins=4, decay=0.5), torch.Generator().manual_seed(0)
    assert h.stretch(torch.tensor([0.0, 0.24, 0.26, 0.99, 1.0, math.nan, -0.1, 1.2])).tolist() == [
        0,
        0,
        1,
        3,
        3,
        4,
        0,
        3,
    ]
    one = lambda c, n=1: torch.full((n, 2, 2), c)
    h.update(one(1, 3), torch.zeros(3))
    h.update(one(2), torch.zeros(1))
    h.update(one(3), torch.tensor([math.nan]))
    h.update(one(4), torch.ones(1))
    assert h.counts[0, 0, 0].tolist() == [0, 1.5, 1, 0, 0]  # a step halves what was there, once
    assert h.counts[4, 1, 0].tolist() == [0, 0, 0, 1, 0] and h.counts[3, 0, 1].tolist() == [
        0,
        0,
        0,
        0,
        1,
    ]
    drawn = h.sample(torch.full((500,), math.nan), gen).unique().tolist()
    assert drawn == [1, 2, 3, 4]  # of any position, and of none
    with pytest.raises(
        ValueError,
        match=(
            r'^CodeHistogram: codes of shape \(1, 2, 3\)\. Expected maps of \(2, 2\)\. Build the'
            r' VQVAE with map_side = size of the images / factor\.$'
        ),
    ):
        h.update(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1))


def counted_by_hand(h, batches):
    "What the histogram should hold, image by image and place by place."
    counts = torch.zeros_like(h.counts)
    for indices, position in batches:
        bins = h.stretch(position)
        counts[bins.unique()] *= h.decay
        for codes, b in zip(indices, bins):
            for i in range(codes.shape[0]):
                for j in range(codes.shape[1]):
                    counts[b, i, j, codes[i, j]] += 1
    return counts


@pytest.mark.parametrize('n', [1, 2, 17])
def test_counting_is_what_it_is_by_hand(n):
    h = CodeHistogram(9, side=3, bins=4, decay=0.7)
    heights = torch.rand(5, n).masked_fill(torch.rand(5, n) < 0.2, math.nan)
    batches = [(torch.randint(9, (n, 3, 3)), o) for o in heights]
    for o in batches:
        h.update(*o)
    assert torch.equal(h.counts, counted_by_hand(h, batches))


class Largest(TorchDispatchMode):
    "The most numbers that any tensor made meanwhile holds of its own."

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.data_ptr() not in {
            o.data_ptr() for o in args if isinstance(o, torch.Tensor)
        }:
            self.most = max(self.most, out.numel())
        return out


def test_counting_copies_no_table():
    """64 images of one map with 256 codes at 8 x 8 places: in place, and nothing as large as a
    table of one stretch is made."""
    h = CodeHistogram(256, side=8)
    where = h.counts.data_ptr()
    with Largest() as seen:
        h.update(torch.randint(256, (64, 8, 8)), torch.rand(64))
    assert (
        seen.most <= 64 * 8 * 8 < h.counts[0].numel()
        and h.counts.data_ptr() == where
        and h.counts.sum() == 64 * 64
    )


def test_data_parallel_broadcasts_no_counts(tmp_path):
    """Each process counts what all saw: the table, by far the largest buffer, does not travel at
    each step. The codebook does."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(build().train())
        model(torch.randn(2, 1, 16, 16))
        sent = {o.data_ptr() for o in model.modules_buffers}
        assert sent == {
            o.data_ptr() for k, o in model.module.named_buffers() if k != 'histogram.counts'
        }
        assert model.module.histogram.counts.sum() == 2 * 4 * 4
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize('kind', ['vq', 'fsq'])
@pytest.mark.parametrize('told', [False, True])
def test_model(kind, told):
    model = build(kind, covariates=COVARIATES if told else (), cond_channels=8).eval()
    cond = TOLD if told else None
    x = torch.randn(2, 1, 16, 24)
    recon, codes, loss = model(x, cond)
    z, again = model.encode(x, cond)
    assert (
        recon.shape == x.shape
        and codes.shape == (2, 4, 6)
        and z.shape == (2, 3, 4, 6)
        and model.latent_channels == 3
    )
    # evaluation does not count
    assert torch.equal(codes, again) and model.histogram.counts.sum() == 0
    assert_close(model.decode(z, cond), recon)
    assert_close(model.decode_codes(codes, cond), recon)
    noisy = z + 0.3 * z.std() * torch.randn_like(z)  # as from a diffusion model
    assert_close(
        model.decode(noisy, cond), model.decode_codes(model.quantizer.nearest(noisy), cond)
    )


@pytest.mark.parametrize('kind', ['vq', 'fsq'])
def test_random_latents_are_codes(kind):
    model, gen = build(kind).train(), torch.Generator().manual_seed(0)
    x, heights = torch.randn(6, 1, 16, 16), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, math.nan])
    _, codes, _ = model(x, {'slice': heights})
    model.eval()
    z = model.random_latents(40, 4, gen, {'slice': torch.zeros(40)})
    drawn = model.quantizer.nearest(z)
    assert z.shape == (40, 3, 4, 4) and torch.equal(model.quantizer.lookup(drawn), z)
    seen = torch.stack([(drawn == codes[i]) for i in range(3)]).any(0)
    assert seen.all()  # only what was seen at that place and height
    assert_close(model.decode(z), model.decode_codes(drawn))
    assert model.random_latents(2, 4, gen).shape == (2, 3, 4, 4)
    assert torch.equal(
        *(model.random_latents(5, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    )
    with pytest.raises(
        ValueError,
        match=(
            r'^VQVAE\.random_latents: side=5\. Expected 4, the side of the maps trained on\. Try'
            r' side=4\.$'
        ),
    ):
        model.random_latents(1, 5, gen)


def test_training_counts_by_height_or_without():
    model, x = build().train(), torch.randn(2, 1, 16, 16)
    model(x)
    assert model.histogram.counts[-1].sum() == 2 * 16
    model(x, {'slice': torch.tensor([0.0, 1.0])})
    assert model.histogram.counts.sum((1, 2, 3))[[0, 7]].tolist() == [16.0, 16.0]


@pytest.mark.parametrize('kind', ['vq', 'fsq'])
def test_state_restores_everything(kind):
    model = build(kind).train()
    model(torch.randn(3, 1, 16, 16), {'slice': torch.rand(3)}, torch.rand(12))
    again = build(kind)
    again.load_state_dict(model.state_dict())
    x, u = torch.randn(3, 1, 16, 16), torch.rand(12)
    for a, b in zip(model(x, None, u), again.train()(x, None, u)):
        assert torch.equal(a, b)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    gens = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(*(m.random_latents(2, 4, g) for m, g in zip((model, again), gens)))


@pytest.mark.parametrize('kind', ['vq', 'fsq'])
def test_traces_as_one_graph_in_evaluation(kind):
    "Training: test_gpu_ready.py, test_one_graph."
    torch._dynamo.reset()
    model = build(kind, covariates=COVARIATES, cond_channels=8).eval()
    twin = copy.deepcopy(model)
    x, u = torch.randn(2, 1, 16, 16), torch.rand(12)
    out = torch.compile(model, fullgraph=True, backend='eager')(x, TOLD, u)
    for a, b in zip(out, twin(x, TOLD, u)):
        assert_close(a, b)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values()):
        assert_close(a, b)


@pytest.mark.skipif(
    not os.environ.get('BRAINLDM_SLOW'), reason='compiles C++ for a minute; set BRAINLDM_SLOW=1'
)
@pytest.mark.parametrize('train', [False, True])
def test_compiles(train):
    torch._dynamo.reset()
    model = build().train(train)
    twin = copy.deepcopy(model)
    x, u = torch.randn(2, 1, 16, 16), torch.rand(12)
    out = torch.compile(model, fullgraph=True)(x, None, u)
    ref = twin(x, None, u)
    assert_close(out[0], ref[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(out[1], ref[1])
    if train:
        for m, o in ((model, out), (twin, ref)):
            (o[0].square().mean() + o[2]).backward()
        for a, b in zip(model.parameters(), twin.parameters()):
            assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values()):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', ['vq', 'fsq'])
def test_meta_device(kind):
    with torch.device('meta'):
        model = build(kind)
        discriminator = PatchDiscriminator(COVARIATES, (8, 16), 8)
    assert {
        p.device.type for p in [*model.parameters(), *model.buffers(), *discriminator.parameters()]
    } == {'meta'}
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in build(kind).state_dict().items()
    }


# ---------------------------------------------------------------- the discriminator


def test_critic_depends_on_the_condition_and_reaches_every_parameter():
    discriminator, x = PatchDiscriminator(COVARIATES, (8, 16, 24), 8), torch.randn(
        1, 1, 24, 40
    ).expand(2, -1, -1, -1)
    logits, features = discriminator(x, {**TOLD, 'image': x})
    assert logits.shape == (2, 1, 3, 5) and [o.shape[1:] for o in features] == [
        (8, 12, 20),
        (16, 6, 10),
        (24, 3, 5),
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    for name in TOLD:
        assert (discriminator(x, {name: TOLD[name]})[0] - discriminator(x)[0]).abs().max() > 1e-4
    nothing = encode_covariates(dict(slice=[None, None], diagnosis=[None, None]), COVARIATES)
    assert_close(discriminator(x, nothing)[0], discriminator(x)[0])
    # no batch statistics
    assert_close(
        discriminator(x[:1], {k: v[:1] for k, v in TOLD.items()})[0],
        logits[:1],
        atol=1e-5,
        rtol=1e-5,
    )
    logits.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.any()
        for n, p in discriminator.named_parameters()
        if n != 'conditioner.null'
    )
    free = PatchDiscriminator(channels=(8,))
    assert_close(free(x, TOLD)[0], free(x)[0])
    assert free(x)[0].shape == (2, 1, 12, 20)


def test_critic_under_autocast():
    discriminator, x = PatchDiscriminator(COVARIATES, (8, 16), 8), torch.randn(2, 1, 16, 16)
    with torch.autocast('cpu', torch.bfloat16):
        logits, _ = discriminator(x, TOLD)
    assert_close(logits.float(), discriminator(x, TOLD)[0], atol=0.1, rtol=0.05)


@pytest.mark.parametrize('channels', [(8, 12), (0,)])
def test_critic_refuses_channels(channels):
    with pytest.raises(
        ValueError,
        match=f'^PatchDiscriminator: channels={channels[-1]} is not a positive multiple of 8',
    ):
        PatchDiscriminator(channels=channels)


@pytest.mark.parametrize('kind', ['hinge', 'nonsaturating'])
@pytest.mark.parametrize('reals, fakes', [(1, 1), (4, 8), (2, 14), (9, 3)])
def test_losses_are_balanced(kind, reals, fakes):
    "The fault: one real and two fake terms make a constant -1 a stable optimum."

    def slope(c):
        c = torch.tensor(c, requires_grad=True)
        discriminator_loss(c.expand(reals), c.expand(fakes), kind).backward()
        return c.grad.item()

    assert abs(slope(0.0)) < 1e-7 and slope(-1.5) < 0 < slope(1.5)
    assert math.isclose(slope(-1.5), -slope(1.5), rel_tol=1e-5)
    if kind == 'nonsaturating':
        assert slope(-0.5) < 0 < slope(0.5)
    # flat in between: nothing to gain from a constant
    else:
        assert abs(slope(-0.5)) < 1e-7 and abs(slope(0.5)) < 1e-7
    assert discriminator_accuracy(torch.full((reals,), -1.0), torch.full((fakes,), -1.0)) == 0.5
    assert (
        discriminator_accuracy(torch.ones(reals), -torch.ones(fakes)) == 1
        and discriminator_accuracy(-torch.ones(reals), torch.ones(fakes)) == 0
    )


def test_losses_by_hand():
    real, fake = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([-3.0, 0.0])
    assert math.isclose(
        discriminator_loss(real, fake).item(), ((0.5 + 0 + 2) / 3 + (0 + 1) / 2) / 2, rel_tol=1e-6
    )
    assert math.isclose(generator_loss(fake).item(), 1.5, rel_tol=1e-6)
    soft = lambda o: math.log1p(math.exp(o))
    assert math.isclose(
        discriminator_loss(real, fake, 'nonsaturating').item(),
        ((soft(-0.5) + soft(-2) + soft(1)) / 3 + (soft(-3) + soft(0)) / 2) / 2,
        rel_tol=1e-6,
    )
    assert math.isclose(
        generator_loss(fake, 'nonsaturating').item(), (soft(3) + soft(0)) / 2, rel_tol=1e-6
    )
    with pytest.raises(
        ValueError,
        match=(
            r"^discriminator_loss: kind='w'\. Expected 'hinge' or 'nonsaturating'\. Try"
            r" kind='hinge'\.$"
        ),
    ):
        discriminator_loss(real, fake, 'w')
    with pytest.raises(
        ValueError,
        match=(
            r"^generator_loss: kind='w'\. Expected 'hinge' or 'nonsaturating'\. Try kind='hinge'\.$"
        ),
    ):
        generator_loss(fake, 'w')


def test_feature_loss():
    real = [torch.rand(2, 4, 8, 8) + 0.5, torch.rand(2, 8, 4, 4) + 0.5]
    fake = [(1.25 * real[0]).requires_grad_(), (0.5 * real[1]).requires_grad_()]
    assert_close(feature_loss(real, fake).detach(), torch.tensor((0.25 + 0.5) / 2))
    # in units of the features
    assert_close(
        feature_loss([1e3 * o for o in real], [1e3 * o for o in fake]), feature_loss(real, fake)
    )
    for o in real:
        o.requires_grad_()
    feature_loss(real, fake).backward()
    assert all(o.grad is None for o in real) and all(o.grad.any() for o in fake)


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e4])
def test_adaptive_weight_by_hand(scale):
    model, discriminator, x = (
        build().eval(),
        PatchDiscriminator(channels=(8, 16)),
        torch.randn(2, 1, 16, 16),
    )
    last = model.decoder.head[-1].weight
    recon, _, _ = model(x)
    rec, gan = (recon - x).abs().mean(), scale * generator_loss(discriminator(recon)[0])
    weight = adaptive_weight(rec, gan, last, max_weight=1e9)
    a, b = (
        torch.autograd.grad(o, last, retain_graph=True)[0].double().square().sum().sqrt().item()
        for o in (rec, gan)
    )
    assert (
        math.isclose(weight.item(), a / (b + 1e-6), rel_tol=1e-5)
        and not weight.requires_grad
        and last.grad is None
    )
    assert adaptive_weight(rec, gan, last, max_weight=0.5 * weight.item()).item() == pytest.approx(
        0.5 * weight.item()
    )
    (rec + weight * gan).backward()  # the graph is still there


def pulls(dtype, loud, scale):
    """The adaptive weight of a fresh decoder and discriminator, both in some precision, when both
    losses are so loud."""
    torch.manual_seed(0)
    net, discriminator, x = (
        VQVAE(FSQ((5, 4, 3)), 8, (16, 16), 1, (False, False), 4),
        PatchDiscriminator(channels=(8, 16)),
        torch.rand(2, 1, 64, 64) * 2 - 1,
    )
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        recon = net(x)[0].float()
        logits = discriminator(recon)[0].float()
    rec, gan = F.l1_loss(recon, x) * loud, generator_loss(logits, 'nonsaturating') * loud
    return adaptive_weight(rec, gan, net.decoder.head[-1].weight, scale=scale)


@pytest.mark.parametrize('loud', [1.0, 1e-3, 3e-4])
def test_adaptive_weight_in_16_bits_is_that_of_32(loud):
    """Gradients of large images and of a discriminator that is sure are small: unscaled, fp16
    rounds them to 0. Both losses are scaled, so the weight stays."""
    whole = pulls(torch.float32, loud, 1.0)
    assert_close(pulls(torch.float16, loud, FP16_SCALE), whole, rtol=0.03, atol=0)
    assert_close(pulls(torch.float32, loud, FP16_SCALE), whole, rtol=1e-3, atol=0)
    # the trap: this is what it was
    if loud < 1e-3:
        assert not abs(pulls(torch.float16, loud, 1.0) / whole - 1) < 0.1


@pytest.mark.parametrize('scale', [2.0**k for k in (0, 10, 16)])
def test_adaptive_weight_does_not_feel_the_scale(scale):
    w = torch.randn(3, 4, requires_grad=True)
    rec, gan = (w * torch.randn(3, 4)).sum(), (w * torch.randn(3, 4)).sum()
    assert_close(
        adaptive_weight(rec, gan, w, scale=scale), adaptive_weight(rec, gan, w), rtol=1e-6, atol=0
    )


def test_adaptive_weight_of_a_silent_critic_is_clamped():
    w = torch.ones(3, requires_grad=True)
    assert (
        adaptive_weight(w.sum(), 0 * w.sum(), w).item() == 1e4
        and adaptive_weight(0 * w.sum(), w.sum(), w).item() == 0
    )
    assert adaptive_weight(1e-3 * w.sum(), 0 * w.sum(), w, max_weight=1e9).item() == pytest.approx(
        1e-3 * 3**0.5 / 1e-6
    )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize('shape', [(2, 4, 4, 4), (3, 4, 4), (2, 3, 4)])
@pytest.mark.parametrize(
    'make, name', [(lambda: quantizer(7, 3), 'VectorQuantizer'), (lambda: FSQ((5, 4, 3)), 'FSQ')]
)
def test_other_maps_are_refused(make, name, shape):
    with pytest.raises(
        ValueError,
        match=(
            rf'^{name}: a map of shape \({", ".join(map(str, shape))}\)\. Expected \(b, 3, h, w\)\.'
            r' Give the encoder '
        ),
    ):
        make()(torch.zeros(shape))


@pytest.mark.parametrize('levels', [(), (1,), (8, 2), (0, 5)])
def test_fsq_refuses_levels(levels):
    with pytest.raises(
        ValueError,
        match=(
            r'^FSQ: levels=\(.*\)\. Expected three or more for each channel\. Try \(8, 5, 5, 5\)'
            r' for 1,000 codes\.$'
        ),
    ):
        FSQ(levels)


def test_too_few_vectors_are_refused():
    with pytest.raises(
        ValueError,
        match=(
            r'^start_codebook: 6 vectors for 7 codes\. Expected at least as many\. Encode more'
            r' images, or use fewer codes\.$'
        ),
    ):
        start_codebook(quantizer(), torch.randn(6, 3))


@pytest.mark.parametrize('shape', [(1, 1, 18, 16), (1, 2, 16, 16), (16, 16)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(ValueError, match=r'^VQVAE\.encode: images of shape .* multiples of 4\. '):
        build().encode(torch.zeros(shape))


def test_a_gate_around_the_codebook_loss_stops_it():
    """The adversarial term is switched on late by a factor of 0 or 1. Where the codebook's loss is
    within that factor, the codes do not learn at all while the error falls."""

    def pull_on_codes(gate):
        model = build()
        model.quantizer = quantizer(12, 3, ema=False, restart_below=0)
        x = torch.randn(2, 1, 16, 16)
        recon, _, loss = model(x)
        (F.l1_loss(recon, x) + gate * loss).backward()
        return model.quantizer.codebook.grad.abs().sum().item()

    assert pull_on_codes(0.0) == 0 < pull_on_codes(1.0)


def test_a_logit_looks_at_38_pixels():
    discriminator = PatchDiscriminator(channels=(8, 16, 24))
    x = torch.randn(2, 1, 64, 40)
    logits, features = discriminator(x)
    assert logits.shape == (2, 1, 8, 5)
    assert [f.shape[1:] for f in features] == [(8, 32, 20), (16, 16, 10), (24, 8, 5)]
    for level in discriminator.levels[1:]:
        level[1] = nn.Identity()  # the norms see everything
    x = torch.zeros(1, 1, 96, 96, requires_grad=True)
    discriminator(x)[0][0, 0, 6, 6].backward()
    seen = x.grad[0, 0].nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [38, 38]


def test_each_loss_names_its_kinds():
    for loss in (
        lambda: discriminator_loss(*[torch.zeros(2)] * 2, 'wgan'),
        lambda: generator_loss(torch.zeros(2), 'wgan'),
    ):
        with pytest.raises(ValueError, match="kind='wgan'"):
            loss()
    constant = torch.full((4,), -1.0), torch.full((8,), -1.0)
    assert discriminator_accuracy(*constant) == 0.5  # knows nothing
