import pytest
import torch

from sora_lightning.layers.patch import Patch
from sora_lightning.layers.positions.absolute import sinusoidal_3d
from sora_lightning.layers.positions.coordinates import axis_widths, grid_coordinates
from sora_lightning.layers.positions.rotary import rotary_angles, rotate
from sora_lightning.types import TokenGrid


def test_rotated_products_depend_on_displacement_alone():
    q, k = torch.randn(2, 1, 12)
    a, b = torch.tensor([[3, 1, 4]]), torch.tensor([[1, 5, 9]])
    shift = torch.tensor([[7, 2, 30]])

    def product(x, y):
        return (rotate(q, rotary_angles(x, 12)) * rotate(k, rotary_angles(y, 12))).sum()

    torch.testing.assert_close(product(a, b), product(a + shift, b + shift), atol=1e-4, rtol=0)
    assert not torch.isclose(product(a, b), product(a + shift, b), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_precision_turns_by_the_rotation_matrix(dtype):
    angles = 7 * torch.randn(5, 4)
    # Heads as a projection gives them: a third of its output, transposed.
    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    heads = x.chunk(3, dim=-1)[1].unflatten(-1, (2, 8)).transpose(1, 2)
    matrix = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
    matrix = matrix.unflatten(-1, (2, 2)).double()
    pairs = heads.double().unflatten(-1, (4, 2))
    expected = (matrix @ pairs[..., None]).flatten(-3)
    actual = rotate(heads, angles)
    assert actual.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)
    direction = torch.randn_like(expected)
    given, wanted = (
        torch.autograd.grad((y.double() * direction).sum(), x)[0] for y in (actual, expected)
    )
    torch.testing.assert_close(given, wanted, atol=tolerance, rtol=0)


def test_rotation_keeps_lengths_and_origin():
    x = torch.randn(5, 24)
    coordinates = torch.randint(0, 50, (5, 3))
    turned = rotate(x, rotary_angles(coordinates, 24))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, rotary_angles(torch.zeros_like(coordinates), 24)), x)


@pytest.mark.parametrize("width", [8, 32, 64, 128, 384, 1152])
def test_axis_widths_are_even_and_add_up(width):
    parts = axis_widths(width)
    assert sum(parts) == width
    assert all(part % 2 == 0 for part in parts)


def test_every_place_has_its_own_embedding():
    coordinates = grid_coordinates(TokenGrid(5, 6, 7), torch.device("cpu"))
    embedding = sinusoidal_3d(coordinates, 96)
    distances = torch.cdist(embedding, embedding) + torch.eye(len(embedding))
    assert distances.min() > 0.05


def test_coordinates_follow_the_order_of_patches():
    patch = Patch(1, 2, 3)
    grid = patch.grid(2, 4, 6)
    frames, rows, columns = torch.meshgrid(
        torch.arange(2.0), torch.arange(4.0), torch.arange(6.0), indexing="ij"
    )
    latents = torch.stack([frames, rows, columns])[None]
    tokens = patch.patchify(latents)
    first_corner = tokens[0, :, :3] / torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(first_corner, grid_coordinates(grid, torch.device("cpu")).float())
    assert torch.equal(patch.unpatchify(tokens, grid), latents)


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="5 latent positions along h are no multiple of 2"):
        Patch(1, 2, 2).grid(3, 5, 4)
