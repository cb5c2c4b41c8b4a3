"""The text transformer: it is causal, padding has no effect, and it equals torch's encoder."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtp_min import VTPConfig, VTPModel
from vtp_min.text import TextTransformer, pool, quick_gelu

END = 60


def tower(**fields):
    torch.manual_seed(0)
    config = VTPConfig(train_reconstruction=False, vision_embed_dim=16, vision_depth=1,
                       vision_num_heads=1, text_context_length=10, text_vocab_size=64,
                       text_embed_dim=24, text_num_heads=3, text_depth=2, **fields)
    return VTPModel(config).eval()


def captions(rows=4):
    """(rows, 10) ids: random tokens, an end token at position 3, 4, 5, ..., zeros after it"""
    text = torch.randint(1, 50, (rows, 10), generator=torch.Generator().manual_seed(1))
    for row, end in zip(text, range(3, 10)):
        row[end] = END
        row[end + 1:] = 0
    return text


def change_of_token_4(text):
    """-> (6,) largest change of each output token if input token 4 changes"""
    x = torch.randn(1, 6, 24)
    other = x.clone()
    other[:, 4] = torch.randn(24)
    return (text(other) - text(x)).abs().amax((0, 2))


def test_a_token_does_not_influence_earlier_ones():
    change = change_of_token_4(TextTransformer(24, 2, 3))
    assert change[:4].max() < 1e-6 and change[4:].min() > 1e-3


def test_without_the_causal_mask_each_token_influences_all_others():
    assert change_of_token_4(TextTransformer(24, 2, 3, causal=False)).min() > 1e-5


def test_removing_the_padding_changes_nothing():
    model, text = tower(), captions()
    whole, cut = model.get_clip_text_feature(text), model.get_clip_text_feature(text[:, :7])
    assert torch.allclose(whole, cut, atol=1e-6)


def test_tokens_after_the_end_token_have_no_influence():
    model, text = tower(), captions()
    other = text.clone()
    other[0, 4:] = 7
    one, two = (model.get_clip_text_feature(t, normalize=False) for t in (text, other))
    assert torch.allclose(one, two, atol=1e-6)


def test_normalized_features_have_unit_length_and_the_same_direction():
    model, text = tower(), captions()
    raw, unit = (model.get_clip_text_feature(text, normalize=n) for n in (False, True))
    assert torch.allclose(unit.norm(dim=-1), torch.ones(4))
    assert torch.allclose(F.normalize(raw, dim=-1), unit)


def test_pool_selects_the_first_end_token_the_first_token_or_the_last_token():
    x, text = torch.arange(8.0).view(2, 4, 1), torch.tensor([[1, 9, 9, 0], [1, 2, 9, 0]])
    assert pool(x, text, "argmax").flatten().tolist() == [1, 6]
    assert pool(x, text, "first").flatten().tolist() == [0, 4]
    assert pool(x, text, "last").flatten().tolist() == [3, 7]


def test_pool_none_returns_all_tokens():
    x = torch.randn(2, 4, 3)
    assert pool(x, torch.ones(2, 4, dtype=torch.long), "none") is x


def test_the_error_for_a_text_longer_than_the_context_names_the_function_that_cuts_it():
    sentence = r"11 tokens long, wanted at most 10; get_tokenizer\(context_length=10\)"
    with pytest.raises(ValueError, match=sentence):
        tower().get_clip_text_feature(torch.ones(1, 11, dtype=torch.long))


def test_the_tower_equals_torch_s_transformer_encoder(form):
    torch.manual_seed(0)
    ours, x = TextTransformer(24, 2, 3), torch.randn(2, 7, 24)
    layer = nn.TransformerEncoderLayer(24, 3, 96, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn",
             "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "linear1",
             "mlp.c_proj": "linear2"}
    for a, b in zip(ours.resblocks, theirs.layers):
        state = {}
        for name, value in a.state_dict().items():
            # the part after the last dot is the parameter: ln_1.weight, attn.in_proj_bias
            module, _, parameter = name.rpartition(".")
            state[f"{names[module]}.{parameter}"] = value
        b.load_state_dict(state)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    assert torch.allclose(ours(x), theirs(x, mask=mask, is_causal=True), atol=1e-5)


def test_activations_equal_the_reference(golden):
    u = np.load(golden / "units.npz")
    x = torch.from_numpy(u["act.x"])
    assert np.allclose(quick_gelu(x), u["act.quick_gelu"], atol=1e-6)
    assert np.allclose(F.gelu(x), u["act.gelu"], atol=1e-6)


@pytest.mark.parametrize("fields, shape", [
    ({"text_proj_bias": True}, (4, 24)),
    ({"text_proj_type": "none"}, (4, 24)),
    ({"text_pool_type": "none"}, (4, 10, 24)),
    ({"text_quick_gelu": True, "text_ls_init_value": 0.1}, (4, 24)),
])
def test_every_official_option_of_the_tower_works(fields, shape):
    assert tower(**fields).get_clip_text_feature(captions(), normalize=False).shape == shape


def test_the_paper_s_tower_has_85_05_million_parameters():
    with torch.device("meta"):
        text = TextTransformer(768, 12, 12)
    assert round(sum(p.numel() for p in text.parameters()) / 1e6, 2) == 85.05
