"""The pixel decoder: each latent becomes a square of pixels."""
import pytest
import torch
from torch import nn

from vtp_min.decoder import PixelDecoder


def tiny(**fields):
    torch.manual_seed(0)
    fields = dict(latent_dim=6, D=16, depth=1, heads=2, upscale=4) | fields
    return PixelDecoder(**fields).eval()


@pytest.mark.parametrize("upscale", [4, 16])
def test_a_latent_grid_of_any_shape_becomes_an_image(upscale):
    img = tiny(upscale=upscale)(torch.randn(2, 6, 3, 5))
    assert img.shape == (2, 3, 3 * upscale, 5 * upscale)


def test_channel_color_dy_dx_is_the_pixel_at_dy_dx_in_the_square_of_its_latent():
    decoder, u = tiny(depth=0), 4
    nn.init.zeros_(decoder.proj_out.weight)
    decoder.proj_out.bias.data = torch.arange(3.0 * u * u)      # channel i has the value i
    img = decoder(torch.randn(1, 6, 2, 3))[0]                   # (3, 2u, 3u)
    for c, y, x in ((0, 0, 0), (1, 2, 3), (2, 7, 5), (0, 4, 11)):
        assert img[c, y, x] == (c * u + y % u) * u + x % u


def test_without_blocks_a_latent_changes_only_its_own_square():
    decoder, z = tiny(depth=0), torch.randn(1, 6, 3, 3)
    other = z.clone()
    other[..., 1, 2] += 1
    change = (decoder(other) - decoder(z)).abs().amax(1)[0]     # (12, 12)
    squares = change.view(3, 4, 3, 4).amax((1, 3))
    assert (squares > 0).nonzero().tolist() == [[1, 2]]


def test_with_blocks_a_latent_changes_all_pixels():
    decoder, z = tiny(), torch.randn(1, 6, 2, 2)
    other = z.clone()
    other[..., 0, 0] += 5
    assert ((decoder(other) - decoder(z)).abs() > 0).float().mean() > 0.99


def test_pixels_are_not_clamped():
    decoder = tiny()
    decoder.proj_out.bias.data += 100
    assert decoder(torch.randn(1, 6, 1, 1)).min() > 50


def test_a_decoder_learns_eight_images_from_eight_latents():
    decoder, z, img = tiny(D=48), torch.randn(8, 6, 1, 1), torch.rand(8, 3, 4, 4)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    for _ in range(120):
        loss = (decoder(z) - img).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.03
