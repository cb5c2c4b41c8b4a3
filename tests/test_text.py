"""The text tower: causal, read at the end token, padding-free; the same function as torch's own encoder."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtp_min import VTPConfig, VTPModel
from vtp_min.text import TextTransformer, pool, quick_gelu_

END = 60


def tower(**fields):
    torch.manual_seed(0)
    return VTPModel(VTPConfig(train_reconstruction=False, vision_embed_dim=16, vision_depth=1, vision_num_heads=1, text_context_length=10, text_vocab_size=64,
                              text_embed_dim=24, text_num_heads=3, text_depth=2, **fields)).eval()


def captions(rows=4):
    """Random words, an end token at 3, 4, 5, ..., zeros behind it"""
    text = torch.randint(1, 50, (rows, 10), generator=torch.Generator().manual_seed(1))
    for row, end in zip(text, range(3, 10)):
        row[end], row[end + 1:] = END, 0
    return text


def test_a_later_token_changes_nothing_before_it():
    x = torch.randn(1, 6, 24)
    other = x.clone()
    other[:, 4] = torch.randn(24)
    text = TextTransformer(24, 2, 3)
    change = (text(other) - text(x)).abs().amax((0, 2))
    assert change[:4].max() < 1e-6 and change[4:].min() > 1e-3


def test_without_the_causal_mask_every_token_sees_every_other():
    x = torch.randn(1, 6, 24)
    other = x.clone()
    other[:, 4] = torch.randn(24)
    text = TextTransformer(24, 2, 3, causal=False)
    assert (text(other) - text(x)).abs().amax((0, 2)).min() > 1e-5


def test_cutting_the_padding_changes_nothing():
    model, text = tower(), captions()
    whole, cut = (model.get_clip_text_feature(t, normalize=True) for t in (text, text[:, :7]))
    assert torch.allclose(whole, cut, atol=1e-6)


def test_what_stands_behind_the_end_token_is_not_read():
    model, text = tower(), captions()
    other = text.clone()
    other[0, 4:] = 7
    assert torch.allclose(*(model.get_clip_text_feature(t, normalize=False) for t in (text, other)), atol=1e-6)


def test_features_have_unit_length_when_asked_and_point_the_same_way():
    model, text = tower(), captions()
    raw, unit = (model.get_clip_text_feature(text, normalize=asked) for asked in (False, True))
    assert torch.allclose(unit.norm(dim=-1), torch.ones(4)) and torch.allclose(F.normalize(raw, dim=-1), unit)


def test_pool_takes_the_first_end_token_the_first_or_the_last():
    x, text = torch.arange(8.0).view(2, 4, 1), torch.tensor([[1, 9, 9, 0], [1, 2, 9, 0]])
    assert pool(x, text, "argmax").flatten().tolist() == [1, 6]
    assert pool(x, text, "first").flatten().tolist() == [0, 4]
    assert pool(x, text, "last").flatten().tolist() == [3, 7]


def test_pool_none_gives_every_token():
    x = torch.randn(2, 4, 3)
    assert pool(x, torch.ones(2, 4, dtype=torch.long), "none") is x


def test_a_text_longer_than_the_context_is_refused_with_what_cuts_it():
    with pytest.raises(ValueError, match=r"11 tokens long, wanted at most 10; get_tokenizer\(context_length=10\)"):
        tower().get_clip_text_feature(torch.ones(1, 11, dtype=torch.long))


def test_the_tower_is_torch_s_transformer_encoder():
    torch.manual_seed(0)
    ours, x = TextTransformer(24, 2, 3), torch.randn(2, 7, 24)
    layer = nn.TransformerEncoderLayer(24, 3, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for a, b in zip(ours.resblocks, theirs.layers):
        names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
        b.load_state_dict({new + k.removeprefix(old): v for k, v in a.state_dict().items() for old, new in names.items() if k.startswith(old)})
    wanted = theirs(x, mask=nn.Transformer.generate_square_subsequent_mask(7), is_causal=True)
    assert torch.allclose(ours(x), wanted, atol=1e-5)


def test_activations_are_the_reference_s(golden):
    u = np.load(golden / "units.npz")
    x = torch.from_numpy(u["act.x"])
    assert np.allclose(quick_gelu_(x), u["act.quick_gelu"], atol=1e-6) and np.allclose(F.gelu(x), u["act.gelu"], atol=1e-6)


@pytest.mark.parametrize("fields, shape", [({"text_proj_bias": True}, (4, 24)), ({"text_proj_type": "none"}, (4, 24)), ({"text_pool_type": "none"}, (4, 10, 24)),
                                           ({"text_quick_gelu": True, "text_ls_init_value": 0.1}, (4, 24))])
def test_every_official_option_of_the_tower_runs(fields, shape):
    assert tower(**fields).get_clip_text_feature(captions(), normalize=False).shape == shape


def test_the_paper_s_tower_has_85_05_million_parameters():
    with torch.device("meta"):
        assert round(sum(p.numel() for p in TextTransformer(768, 12, 12).parameters()) / 1e6, 2) == 85.05
