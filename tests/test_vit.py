"""The vision transformer: norms, RoPE, attention, SwiGLU, stochastic depth, the trunk."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtp_min.vit import FFNS, NORMS, Attention, Block, Mlp, RMSNorm, RoPE, StochasticDepth, SwiGLU, VisionTransformer, residual, rotate

NO_TURN = torch.zeros(1), torch.ones(1)                                  # sin and cos of the angle 0


def close(a, b, atol=1e-6):
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=0, atol=atol)


def tiny(seed=0, **fields):
    """A trunk whose parameters are all random: no zero or one by accident"""
    torch.manual_seed(seed)
    trunk = VisionTransformer(**dict(D=32, depth=2, heads=2, patch=4, latent_dim=8) | fields).eval()
    with torch.no_grad():
        for p in trunk.parameters():
            p.copy_(0.3 * torch.randn_like(p) + (p.ndim == 1))
    return trunk


# ---------------------------------------------------------------- norms
def test_rmsnorm_gives_unit_mean_square_whatever_the_scale():
    x = torch.randn(5, 64)
    assert close(RMSNorm(64)(1000 * x).square().mean(-1), torch.ones(5), 1e-4)
    assert close(RMSNorm(64)(1000 * x), RMSNorm(64)(10 * x), 1e-4)


def test_rmsnorm_of_bfloat16_is_taken_in_float32_and_rounded_before_the_weight():
    norm, x = RMSNorm(40), torch.randn(6, 40).bfloat16()
    nn.init.normal_(norm.weight)
    exact = F.rms_norm(x.float(), (40,), eps=1e-5).bfloat16()
    assert torch.equal(norm(x), exact * norm.weight)


def test_norms_are_the_reference_s_on_inputs_so_small_that_eps_shows(golden):
    u = {k: torch.from_numpy(v) for k, v in np.load(golden / "units.npz").items()}
    for name in NORMS:
        norm = NORMS[name](40)
        norm.load_state_dict({"weight": u["norm.weight"]} | ({} if name == "rmsnorm" else {"bias": u["norm.bias"]}))
        assert close(norm(u["norm.x"]), u[f"norm.{name}"], 1e-6 * u[f"norm.{name}"].abs().max())


# ---------------------------------------------------------------- where a patch stands
def heads(n, c=16, seed=0):
    return torch.randn(1, 1, n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(h, w, c=16, prefix=0):
    return RoPE(c, torch.float64)(h, w, prefix)


def test_rotation_keeps_the_length_of_every_pair():
    x = heads(12)
    y = rotate(x, *tables(3, 4))
    pairs = lambda x: x[..., :8].square() + x[..., 8:].square()
    assert close(pairs(y), pairs(x), 1e-12) and not close(y, x, 1e-2)


@pytest.mark.parametrize("dy, dx", [(1, 0), (0, 2), (2, 1)])
def test_attention_sees_only_where_patches_stand_relative_to_each_other(dy, dx):
    q, k = heads(1).expand(1, 1, 36, 16), heads(1, seed=1).expand(1, 1, 36, 16)              # the same words everywhere on a 6 x 6 grid
    q, k = (rotate(x, *tables(6, 6)).view(6, 6, 16) for x in (q, k))
    near, far = (q[1, 0] @ k[3, 2]), (q[1 + dy, 0 + dx] @ k[3 + dy, 2 + dx])                 # both ends moved alike
    assert close(near, far, 1e-12) and not close(near, q[1, 0] @ k[3 + dy, 2 + dx], 1e-3)


def test_first_quarter_of_the_channels_follows_y_and_the_second_x():
    sin, _ = tables(5, 7)
    sin = sin.view(5, 7, 4, 4)                                                               # quarters: y, x, y, x
    assert (sin[..., 0, :] == sin[:, :1, 0, :]).all() and (sin[..., 1, :] == sin[:1, :, 1, :]).all()
    assert torch.equal(sin[..., :2, :], sin[..., 2:, :])


def test_class_token_is_not_turned():
    x = heads(13)
    assert torch.equal(rotate(x, *tables(3, 4, prefix=1))[..., 0, :], x[..., 0, :])


def test_angles_span_the_same_range_on_any_grid():
    for n in (2, 4, 16):
        sin, cos = tables(1, n)
        assert close(torch.atan2(sin, cos)[:, 6], torch.pi / 5 * ((2 * torch.arange(n) + 1) / n - 1))   # the third period is 10 half-grids


def test_a_head_that_rope_cannot_split_is_refused_with_advice():
    with pytest.raises(ValueError, match="multiple of 4"):
        RoPE(18)


def test_rope_tables_are_the_reference_s_bit_for_bit_in_both_precisions(golden):
    u = np.load(golden / "units.npz")
    for name in {k.removesuffix(".sin") for k in u.files if k.endswith(".sin")}:              # rope.hd64_4x5, rope_fp32.hd24_1x5, ...
        kind, _, c_grid = name.partition(".hd")
        c, grid = c_grid.split("_")
        sin, cos = RoPE(int(c), torch.bfloat16 if kind == "rope" else torch.float32)(*map(int, grid.split("x")))
        for table, wanted in ((sin, u[name + ".sin"]), (cos, u[name + ".cos"])):
            assert np.abs(table.float().numpy() - wanted).max() <= (0 if kind == "rope" else 1e-6), name
    for c in (64, 32, 24):
        assert np.array_equal(RoPE(c).periods.float(), u[f"rope.hd{c}.periods"])
    rope = RoPE(64, torch.bfloat16)(4, 5, prefix=1)
    for x in "qk":
        assert np.array_equal(rotate(torch.from_numpy(u[f"rotate.{x}_in"]), *rope), u[f"rotate.{x}_out"])


# ---------------------------------------------------------------- what looks at what
def test_attention_without_rope_is_torch_s_multihead_attention():
    torch.manual_seed(0)
    ours, theirs, x = Attention(24, 3, qk_norm=False), nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 7, 24)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    assert close(ours(x, NO_TURN), theirs(x, x, x)[0])


def test_qk_norm_bounds_the_logits_by_the_square_root_of_the_head_width():
    attention, x, seen = Attention(32, 2, qk_norm=True), 1e4 * torch.randn(2, 9, 32), {}
    attention.q_norm.register_forward_hook(lambda m, i, o: seen.update(q=o))
    attention.k_norm.register_forward_hook(lambda m, i, o: seen.update(k=o))
    attention(x, NO_TURN)
    logits = seen["q"] @ seen["k"].transpose(-1, -2) / 16 ** 0.5
    assert logits.abs().max() <= 16 ** 0.5 * 1.0001                                           # |q| = |k| = sqrt(c)


def test_attention_does_not_care_for_the_order_of_tokens_when_nothing_turns():
    attention, x, order = Attention(16, 2, qk_norm=True), torch.randn(1, 8, 16), torch.randperm(8)
    assert close(attention(x, NO_TURN)[:, order], attention(x[:, order], NO_TURN))


# ---------------------------------------------------------------- what is thought about it
@pytest.mark.parametrize("D, hidden", [(20, 56), (64, 176), (384, 1024), (768, 2048), (1024, 2736)])
def test_swiglu_is_two_thirds_as_wide_as_an_mlp_rounded_up_to_eight(D, hidden):
    with torch.device("meta"):
        assert FFNS["swiglu"](D, 4.0).w1.out_features == hidden
        assert FFNS["swiglu64"](D, 4.0).w1.out_features == -(-hidden // 64) * 64


def test_swiglu_has_about_as_many_parameters_as_an_mlp():
    with torch.device("meta"):
        ours, plain = (sum(p.numel() for p in ffn(768, 4.0).parameters()) for ffn in (FFNS["swiglu"], Mlp))
    assert abs(ours / plain - 1) < 1e-3


def test_swiglu_is_the_reference_s(golden):
    u = np.load(golden / "units.npz")
    for name in {k.split(".")[0] for k in u.files if k.startswith("swiglu")}:
        ffn = FFNS[name](20, 4.0)
        ffn.load_state_dict({k: torch.from_numpy(u[f"{name}.{k}"]) for k in ffn.state_dict()})
        assert close(ffn(torch.from_numpy(u[f"{name}.x"])), u[f"{name}.y"])


def test_swiglu_says_nothing_where_its_gate_is_closed():
    ffn = SwiGLU(8, 4.0, 8)
    nn.init.zeros_(ffn.w1.weight), nn.init.zeros_(ffn.w1.bias), nn.init.zeros_(ffn.w3.bias)
    assert ffn(torch.randn(3, 8)).abs().max() == 0


# ---------------------------------------------------------------- a block, and stochastic depth
def test_a_block_is_the_identity_when_its_branches_end_in_zero():
    block, x = Block(16, 2, 4.0, "swiglu", "rmsnorm", True, None), torch.randn(2, 4, 16)
    for last in (block.attn.proj, block.mlp.w3):
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    assert torch.equal(block(x, RoPE(8)(2, 2)), x)


def test_layer_scale_one_is_no_layer_scale():
    scaled, bare = (Block(16, 2, 4.0, "mlp", "layernorm", False, init) for init in (1.0, None))
    bare.load_state_dict({k: v for k, v in scaled.state_dict().items() if "gamma" not in k})
    x, rope = torch.randn(2, 4, 16), RoPE(8)(2, 2)
    assert torch.equal(scaled(x, rope), bare(x, rope))


def test_stochastic_depth_keeps_the_branch_in_the_mean():
    x, branch, draws = torch.randn(6, 3), torch.tanh, 600
    mean = sum(residual(x, branch, StochasticDepth(0.5, range(6), 6, 0, step, 0)(0)[0]) for step in range(draws)) / draws
    assert close(mean, x + branch(x), 4 / draws ** 0.5)                                       # four standard deviations


def test_stochastic_depth_of_rate_zero_changes_nothing():
    trunk, img = tiny(), torch.randn(4, 3, 8, 8)
    assert all(map(close, trunk(img, drop=StochasticDepth(0.0, range(4), 4, 0)), trunk(img)))


def test_stochastic_depth_drops_a_fixed_share_of_the_rows_and_at_most_all_but_one():
    for rate, kept in ((0.3, 7), (0.5, 5), (0.99, 1)):
        rows, scale = StochasticDepth(rate, range(10), 10, 0, 0, 0)(3)[0]
        assert len(rows.unique()) == kept and scale == 10 / kept


def test_draws_of_ranks_together_are_the_draw_of_one_process():
    number = np.arange(12)
    whole = StochasticDepth(0.3, number, 12, 5, 9, 1)
    for block in range(3):
        for branch in range(2):
            parts = [StochasticDepth(0.3, number[rank::3], 12, 5, 9, 1)(block)[branch] for rank in range(3)]
            assert sorted(number[rank::3][i] for rank, (rows, _) in enumerate(parts) for i in rows) == whole(block)[branch][0].tolist()
            assert {scale for _, scale in parts} == {12 / 8}


def test_branches_blocks_steps_and_objectives_draw_apart():
    draws = [StochasticDepth(0.5, range(64), 64, 0, step, objective)(block)[branch][0].tolist()
             for step in range(2) for objective in range(2) for block in range(2) for branch in range(2)]
    assert len(set(map(tuple, draws))) == 16


def test_a_process_whose_rows_are_all_dropped_passes_them_through_and_its_gradients_are_zeros():
    block, x = Block(16, 2, 4.0, "swiglu", "rmsnorm", True, None), torch.randn(2, 4, 16)
    nobody = torch.tensor([], dtype=torch.long), 1.5
    y = block(x, RoPE(8)(2, 2), (nobody, nobody))
    y.sum().backward()
    assert torch.equal(y, x) and all(p.grad.abs().max() == 0 for p in block.parameters())    # zeros, not None: DDP waits for each


# ---------------------------------------------------------------- the trunk
def test_pixels_under_a_mask_are_not_seen():
    trunk, img = tiny(), torch.randn(2, 3, 8, 12)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1], mask[1, 5] = True, True                                                      # patch (0, 1) of the first, (1, 2) of the second
    other = img.clone()
    other[0, :, 0:4, 4:8], other[1, :, 4:8, 8:12] = 7.0, -7.0
    assert all(torch.equal(a, b) for a, b in zip(trunk(img, mask), trunk(other, mask)))
    assert not close(trunk(img)[0], trunk(other)[0], 1e-3)


def test_an_empty_mask_is_no_mask():
    trunk, img = tiny(), torch.randn(2, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(trunk(img, torch.zeros(2, 4, dtype=torch.bool)), trunk(img)))


def test_pictures_of_a_batch_do_not_see_each_other():
    trunk, img = tiny(), torch.randn(3, 3, 8, 8)
    assert all(close(a[1:2], b, 1e-5) for a, b in zip(trunk(img), trunk(img[1:2])))


def test_the_trunk_takes_any_whole_number_of_patches():
    for h, w in ((1, 1), (2, 5), (7, 3)):
        cls, patches = tiny()(torch.randn(1, 3, 4 * h, 4 * w))
        assert cls.shape == (1, 32) and patches.shape == (1, h * w, 32)


def test_all_parameters_but_the_bottleneck_get_a_gradient_and_the_mask_token_where_something_is_hidden():
    for mask, deaf in ((None, {"mask_token"}), (torch.tensor([[True, False, False, False]]), set())):
        trunk = tiny()
        sum(x.square().sum() for x in trunk(torch.randn(1, 3, 8, 8), mask)).backward()
        assert {k for k, p in trunk.named_parameters() if p.grad is None} == {"feature_bottleneck.weight"} | deaf


def test_float64_differs_from_float32_by_rounding_alone():
    trunk, img = tiny(), torch.randn(1, 3, 8, 8)
    narrow = trunk(img)[1]
    assert close(trunk.double()(img.double())[1], narrow, 2e-4)
