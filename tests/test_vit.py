"""The vision transformer: norms, RoPE, attention, SwiGLU, stochastic depth, the trunk.

A test with the fixture `form` runs on the textbook forms and on those of extras/fast.py.

B images    H heads of c channels    L tokens    D width of the trunk    h x w grid of patches
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtp_min import vit
from vtp_min.augment import kept_rows
from vtp_min.vit import (FFNS, NORMS, Attention, Block, Mlp, RMSNorm, RoPE, SwiGLU,
                         VisionTransformer, residual)

NO_ROTATION = torch.zeros(1), torch.ones(1)                     # sin and cos of the angle 0


def close(a, b, atol=1e-6):
    """True if a and b differ by at most atol"""
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double()
    return torch.allclose(a, b, rtol=0, atol=atol)


def tiny(seed=0, **fields):
    """A trunk in which all parameters are random: an initial 0 or 1 could hide an error"""
    torch.manual_seed(seed)
    fields = dict(D=32, depth=2, heads=2, patch=4, latent_dim=8) | fields
    trunk = VisionTransformer(**fields).eval()
    with torch.no_grad():
        for p in trunk.parameters():
            # vectors (weights of norms, biases) are around 1, matrices around 0
            p.copy_(0.3 * torch.randn_like(p) + (p.ndim == 1))
    return trunk


# ---------------------------------------------------------------- norms
def test_rmsnorm_gives_unit_mean_square_for_any_scale_of_its_input():
    x = torch.randn(5, 64)
    assert close(RMSNorm(64)(1000 * x).square().mean(-1), torch.ones(5), 1e-4)
    assert close(RMSNorm(64)(1000 * x), RMSNorm(64)(10 * x), 1e-4)


def test_rmsnorm_of_bfloat16_is_computed_in_float32_and_rounded_before_the_weight(form):
    norm = RMSNorm(40)
    x = torch.randn(6, 40).bfloat16()
    nn.init.normal_(norm.weight)
    exact = F.rms_norm(x.float(), (40,), eps=1e-5).bfloat16()
    assert torch.equal(norm(x), exact * norm.weight)


def test_norms_equal_the_reference_on_inputs_so_small_that_eps_matters(golden, form):
    u = {k: torch.from_numpy(v) for k, v in np.load(golden / "units.npz").items()}
    for name in NORMS:
        norm = NORMS[name](40)
        state = {"weight": u["norm.weight"]}
        if name != "rmsnorm":
            state["bias"] = u["norm.bias"]
        norm.load_state_dict(state)
        wanted = u[f"norm.{name}"]
        assert close(norm(u["norm.x"]), wanted, 1e-6 * wanted.abs().max())


# ---------------------------------------------------------------- position embedding
def random_heads(n, c=16, seed=0):
    """-> (1, 1, n, c): queries or keys of one image and one head"""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, n, c, generator=g, dtype=torch.float64)


def tables(h, w, c=16, prefix=0):
    """-> sin, cos (prefix + h*w, c)"""
    return RoPE(c, torch.float64)(h, w, prefix)


def test_rotation_keeps_the_length_of_every_pair_of_channels(form):
    def squared_lengths(x):                                     # of the pairs (i, i + 8)
        return x[..., :8].square() + x[..., 8:].square()

    x = random_heads(12)
    y = vit.rotate(x, *tables(3, 4))
    assert close(squared_lengths(y), squared_lengths(x), 1e-12)
    assert not close(y, x, 1e-2)


@pytest.mark.parametrize("dy, dx", [(1, 0), (0, 2), (2, 1)])
def test_attention_logits_depend_on_relative_positions_only(form, dy, dx):
    # the same query and the same key at all positions of a 6 x 6 grid
    q = random_heads(1).expand(1, 1, 36, 16)
    k = random_heads(1, seed=1).expand(1, 1, 36, 16)
    q = vit.rotate(q, *tables(6, 6)).view(6, 6, 16)
    k = vit.rotate(k, *tables(6, 6)).view(6, 6, 16)
    logit = q[1, 0] @ k[3, 2]
    assert close(logit, q[1 + dy, 0 + dx] @ k[3 + dy, 2 + dx], 1e-12)      # both are moved
    assert not close(logit, q[1, 0] @ k[3 + dy, 2 + dx], 1e-3)             # only the key is moved


def test_rope_angles_of_the_first_quarter_of_channels_depend_on_y_and_of_the_second_on_x():
    sin, _ = tables(5, 7)
    sin = sin.view(5, 7, 4, 4)                                  # quarters: y, x, y, x
    assert (sin[..., 0, :] == sin[:, :1, 0, :]).all()
    assert (sin[..., 1, :] == sin[:1, :, 1, :]).all()
    assert torch.equal(sin[..., :2, :], sin[..., 2:, :])


def test_the_class_token_is_not_rotated(form):
    x = random_heads(13)
    assert torch.equal(vit.rotate(x, *tables(3, 4, prefix=1))[..., 0, :], x[..., 0, :])


def test_rope_angles_cover_the_same_range_on_any_grid():
    for n in (2, 4, 16):
        sin, cos = tables(1, n)
        x = (2 * torch.arange(n) + 1) / n - 1
        # Channel 6 has the third period of x, which is 100^(2/4) = 10; x itself is from -1 to 1.
        assert close(torch.atan2(sin, cos)[:, 6], torch.pi / 5 * x)


def test_a_head_whose_channels_are_not_a_multiple_of_4_raises_an_error():
    with pytest.raises(ValueError, match="multiple of 4; change the width or the number of heads"):
        RoPE(18)


def test_rope_tables_equal_the_reference_in_both_precisions(golden):
    """In bfloat16, to the bit"""
    u = np.load(golden / "units.npz")
    for key in u.files:                                         # rope_fp32.hd24_1x5.sin, ...
        if not key.endswith(".sin"):
            continue
        name = key.removesuffix(".sin")
        kind, _, c_grid = name.partition(".hd")                 # "rope_fp32", "24_1x5"
        c, grid = c_grid.split("_")
        h, w = map(int, grid.split("x"))
        dtype = torch.bfloat16 if kind == "rope" else torch.float32
        limit = 0 if kind == "rope" else 1e-6
        sin, cos = RoPE(int(c), dtype)(h, w)
        assert np.abs(sin.float().numpy() - u[name + ".sin"]).max() <= limit, name
        assert np.abs(cos.float().numpy() - u[name + ".cos"]).max() <= limit, name
    for c in (64, 32, 24):
        assert np.array_equal(RoPE(c).periods.float(), u[f"rope.hd{c}.periods"])


def test_rotation_by_bfloat16_tables_equals_the_reference_to_the_bit(golden, form):
    u = np.load(golden / "units.npz")
    sin, cos = RoPE(64, torch.bfloat16)(4, 5, prefix=1)
    for x in "qk":
        rotated = vit.rotate(torch.from_numpy(u[f"rotate.{x}_in"]), sin, cos)
        assert np.array_equal(rotated, u[f"rotate.{x}_out"])


# ---------------------------------------------------------------- attention
def test_attention_without_rope_equals_the_multihead_attention_of_pytorch():
    torch.manual_seed(0)
    ours = Attention(24, 3, qk_norm=False)
    x = torch.randn(2, 7, 24)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    assert close(ours(x, NO_ROTATION), theirs(x, x, x)[0])


def test_causal_attention_does_not_depend_on_later_tokens(form):
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    found = vit.attention(q, k, v, causal=True)
    for n in range(1, 6):
        prefix = vit.attention(q[..., :n, :], k[..., :n, :], v[..., :n, :])
        assert close(found[..., n - 1, :], prefix[..., -1, :])


def test_qk_norm_bounds_the_logits_by_the_square_root_of_the_head_width():
    attention = Attention(32, 2, qk_norm=True)
    x = 1e4 * torch.randn(2, 9, 32)
    outputs = {}
    attention.q_norm.register_forward_hook(lambda m, i, o: outputs.update(q=o))
    attention.k_norm.register_forward_hook(lambda m, i, o: outputs.update(k=o))
    attention(x, NO_ROTATION)
    logits = outputs["q"] @ outputs["k"].transpose(-1, -2) / 16 ** 0.5
    # |q| = |k| = sqrt(c), so |q k| / sqrt(c) is at most sqrt(c)
    assert logits.abs().max() <= 16 ** 0.5 * 1.0001


def test_attention_without_rope_permutes_its_outputs_if_its_inputs_are_permuted():
    attention = Attention(16, 2, qk_norm=True)
    x = torch.randn(1, 8, 16)
    order = torch.randperm(8)
    assert close(attention(x, NO_ROTATION)[:, order], attention(x[:, order], NO_ROTATION))


# ---------------------------------------------------------------- feed-forward
# width of the trunk, hidden width
WIDTHS = [(20, 56), (64, 176), (384, 1024), (768, 2048), (1024, 2736)]


@pytest.mark.parametrize("D, hidden", WIDTHS)
def test_swiglu_is_two_thirds_as_wide_as_an_mlp_rounded_up_to_a_multiple_of_8(D, hidden):
    with torch.device("meta"):
        assert FFNS["swiglu"](D, 4.0).w1.out_features == hidden
        assert FFNS["swiglu64"](D, 4.0).w1.out_features == -(-hidden // 64) * 64


def test_swiglu_has_about_as_many_parameters_as_an_mlp():
    with torch.device("meta"):
        swiglu = FFNS["swiglu"](768, 4.0)
        mlp = Mlp(768, 4.0)
    swiglu_parameters = sum(p.numel() for p in swiglu.parameters())
    mlp_parameters = sum(p.numel() for p in mlp.parameters())
    assert abs(swiglu_parameters / mlp_parameters - 1) < 1e-3


def test_swiglu_equals_the_reference(golden, form):
    u = np.load(golden / "units.npz")
    for name in {key.split(".")[0] for key in u.files if key.startswith("swiglu")}:
        ffn = FFNS[name](20, 4.0)
        ffn.load_state_dict({k: torch.from_numpy(u[f"{name}.{k}"]) for k in ffn.state_dict()})
        assert close(ffn(torch.from_numpy(u[f"{name}.x"])), u[f"{name}.y"])


def test_swiglu_is_zero_if_its_gate_is_zero(form):
    ffn = SwiGLU(8, 4.0, 8)
    # silu(w1 x) is the gate; w3 must not add a bias
    for p in (ffn.w1.weight, ffn.w1.bias, ffn.w3.bias):
        nn.init.zeros_(p)
    assert ffn(torch.randn(3, 8)).abs().max() == 0


# ---------------------------------------------------------------- block, stochastic depth
def tiny_block():
    return Block(16, 2, 4.0, "swiglu", "rmsnorm", True, None)


def test_a_block_is_the_identity_if_the_last_layer_of_each_branch_is_zero():
    block = tiny_block()
    x = torch.randn(2, 4, 16)
    for last in (block.attn.proj, block.mlp.w3):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    assert torch.equal(block(x, RoPE(8)(2, 2)), x)


def test_a_layer_scale_of_1_changes_nothing():
    scaled = Block(16, 2, 4.0, "mlp", "layernorm", False, 1.0)
    unscaled = Block(16, 2, 4.0, "mlp", "layernorm", False, None)
    unscaled.load_state_dict({k: v for k, v in scaled.state_dict().items() if "gamma" not in k})
    x = torch.randn(2, 4, 16)
    rope = RoPE(8)(2, 2)
    assert torch.equal(scaled(x, rope), unscaled(x, rope))


def test_stochastic_depth_does_not_change_the_mean_of_a_branch():
    x = torch.randn(6, 3)
    branch = torch.tanh
    draws = 600
    total = 0
    for step in range(draws):
        (keep, _), = kept_rows(0.5, 1, range(6), 6, 0, step, 0)
        total = total + residual(x, branch, keep)
    # A draw adds 0 or 2 branch(x), so its standard deviation is at most 1. That of the mean is at
    # most 1 / sqrt(draws), and the limit is four times as large.
    assert close(total / draws, x + branch(x), 4 / draws ** 0.5)


def test_dropped_images_pass_a_block_unchanged_and_the_branches_of_kept_images_are_scaled():
    block = tiny_block()
    x = torch.randn(4, 4, 16)
    rope = RoPE(8)(2, 2)
    rows = torch.tensor([1, 3])
    y = block(x, rope, ((rows, 2.0), (rows, 2.0)))
    assert torch.equal(y[[0, 2]], x[[0, 2]])
    wanted = x[rows] + 2 * block.attention_branch(x[rows], rope)
    assert close(y[rows], wanted + 2 * block.mlp_branch(wanted))


def test_the_trunk_uses_a_separate_draw_for_each_block_and_branch():
    """One branch of one block keeps the first image only, all others keep all images: only the
    output of the first image is that without stochastic depth."""
    trunk = tiny()
    img = torch.randn(3, 3, 8, 8)
    all_rows = torch.arange(3), 1.0
    first_row = torch.tensor([0]), 1.0
    plain = trunk(img)[0]
    assert close(trunk(img, keep=[(all_rows, all_rows)] * 2)[0], plain)
    for block in range(2):
        for branch in range(2):
            keep = [[all_rows, all_rows], [all_rows, all_rows]]
            keep[block][branch] = first_row
            found = trunk(img, keep=keep)[0]
            assert close(found[0], plain[0])
            assert not close(found[1:], plain[1:], 1e-3)


def test_rate_0_means_no_stochastic_depth():
    trunk = tiny()
    img = torch.randn(4, 3, 8, 8)
    keep = kept_rows(0.0, 2, range(4), 4, 0)
    assert keep is None
    assert all(torch.equal(a, b) for a, b in zip(trunk(img, keep=keep), trunk(img)))


def test_a_fixed_fraction_of_the_images_is_dropped_but_never_all():
    for rate, kept in ((0.3, 7), (0.5, 5), (0.99, 1)):
        (rows, scale), _ = kept_rows(rate, 4, range(10), 10, 0, 0, 0)[3]
        assert len(rows.unique()) == kept
        assert scale == 10 / kept


def test_the_draws_of_all_ranks_together_are_the_draw_of_one_process():
    images = np.arange(12)                                      # of the global batch
    one_process = kept_rows(0.3, 3, images, 12, 5, 9, 1)
    ranks = [kept_rows(0.3, 3, images[r::3], 12, 5, 9, 1) for r in range(3)]
    for block in range(3):
        for branch in range(2):
            rows, scale = one_process[block][branch]
            found = []
            for r in range(3):
                rank_rows, rank_scale = ranks[r][block][branch]
                # positions within the rank -> numbers in the global batch
                found += [images[r::3][i] for i in rank_rows]
                assert rank_scale == scale == 12 / 8
            assert sorted(found) == rows.tolist()


def test_steps_objectives_blocks_and_branches_have_different_draws():
    draws = set()                                               # 2 x 2 x 2 x 2
    for step in range(2):
        for objective in range(2):
            for block in kept_rows(0.5, 2, range(64), 64, 0, step, objective):
                draws |= {tuple(rows.tolist()) for rows, _ in block}
    assert len(draws) == 16


def test_a_process_without_kept_rows_has_gradients_of_zero(form):
    """Zeros, not None: average_gradients needs a gradient from every rank."""
    block = tiny_block()
    x = torch.randn(2, 4, 16)
    no_rows = torch.tensor([], dtype=torch.long), 1.5
    y = block(x, RoPE(8)(2, 2), (no_rows, no_rows))
    y.sum().backward()
    assert torch.equal(y, x)
    assert all(p.grad.abs().max() == 0 for p in block.parameters())


# ---------------------------------------------------------------- trunk
def test_the_trunk_does_not_see_the_pixels_of_masked_patches():
    trunk = tiny()
    img = torch.randn(2, 3, 8, 12)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1] = True                                           # patch (0, 1) of the first image
    mask[1, 5] = True                                           # patch (1, 2) of the second
    other = img.clone()
    other[0, :, 0:4, 4:8] = 7.0
    other[1, :, 4:8, 8:12] = -7.0
    assert all(torch.equal(a, b) for a, b in zip(trunk(img, mask), trunk(other, mask)))
    assert not close(trunk(img)[0], trunk(other)[0], 1e-3)


def test_a_mask_without_masked_patches_changes_nothing():
    trunk = tiny()
    img = torch.randn(2, 3, 8, 8)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    assert all(torch.equal(a, b) for a, b in zip(trunk(img, mask), trunk(img)))


def test_images_of_a_batch_do_not_influence_each_other():
    trunk = tiny()
    img = torch.randn(3, 3, 8, 8)
    assert all(close(a[1:2], b, 1e-5) for a, b in zip(trunk(img), trunk(img[1:2])))


def test_the_trunk_accepts_any_number_of_rows_and_columns_of_patches():
    for h, w in ((1, 1), (2, 5), (7, 3)):
        cls, patches = tiny()(torch.randn(1, 3, 4 * h, 4 * w))
        assert cls.shape == (1, 32)
        assert patches.shape == (1, h * w, 32)


def test_layers_yields_the_tokens_after_each_block_before_the_norm():
    trunk = tiny(depth=3)
    img = torch.randn(2, 3, 8, 8)
    layers = list(trunk.layers(img))
    assert [x.shape for x in layers] == [(2, 5, 32)] * 3
    assert torch.equal(trunk.norm(layers[-1])[:, 0], trunk(img)[0])
    assert torch.equal(trunk.norm(layers[-1])[:, 1:], trunk(img)[1])


@pytest.mark.parametrize("mask, unused", [
    (None, {"mask_token"}), (torch.tensor([[True, False, False, False]]), set())])
def test_exactly_the_parameters_that_are_used_have_gradients(mask, unused):
    """The trunk uses the mask token if there is a mask. Only the decoder uses the bottleneck."""
    trunk = tiny()
    sum(x.square().sum() for x in trunk(torch.randn(1, 3, 8, 8), mask)).backward()
    no_gradient = {name for name, p in trunk.named_parameters() if p.grad is None}
    assert no_gradient == {"feature_bottleneck.weight"} | unused


def test_float64_differs_from_float32_by_rounding_only():
    trunk = tiny()
    img = torch.randn(1, 3, 8, 8)
    single = trunk(img)[1]
    assert close(trunk.double()(img.double())[1], single, 2e-4)
