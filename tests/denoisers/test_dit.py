import pytest
import torch

from sora_lightning.conditioning import TextConditioner, Unconditional
from sora_lightning.denoisers import DiT
from sora_lightning.denoisers.conditioning_embedding import BlockContext, ConditioningEmbedding
from sora_lightning.generation import GuidanceConfig, SamplingConfig, VideoGenerator
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import Alternating, FactorisedSelfAttention, Joint
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import Condition, VideoSize

LAYOUTS = [Joint(), FactorisedSelfAttention(), Alternating()]


def small_dit(layout=None, patch=(1, 2, 2), trained=True):
    dit = DiT(4, 16, size=TransformerSize(2, 24, 2), patch=patch, layout=layout)
    if trained:
        for parameter in dit.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return dit


def text(b):
    return Condition(torch.randn(b, 3, 16), torch.ones(b, 3, dtype=torch.bool), torch.randn(b, 16))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize("extent", [(3, 4, 4), (1, 2, 6), (5, 6, 2)])
def test_any_extent_comes_back_in_its_shape(layout, extent):
    x = torch.randn(2, 4, *extent)
    assert small_dit(layout)(x, torch.rand(2), text(2)).shape == x.shape


def test_an_untrained_network_predicts_zero_and_its_blocks_are_the_identity():
    dit = small_dit(trained=False)
    x = torch.randn(2, 4, 3, 4, 4)
    assert torch.equal(dit(x, torch.rand(2), text(2)), torch.zeros_like(x))
    tokens = torch.randn(2, 12, 24)
    embedding = torch.randn(2, 24)
    context = BlockContext(
        PackedSequence([dit.patch.grid(3, 4, 4)]),
        ConditioningEmbedding(
            embedding, None, embedding, None, torch.nn.functional.silu(embedding)
        ),
        torch.randn(12, 6),
        torch.randn(2, 3, 24),
        torch.ones(2, 3, dtype=torch.bool),
    )
    assert torch.equal(dit.blocks[0](tokens, context), tokens)


def test_clips_of_a_batch_do_not_see_each_other():
    dit = small_dit()
    x, t, condition = torch.randn(3, 4, 3, 4, 4), torch.rand(3), text(3)
    whole = dit(x, t, condition)
    for i in range(3):
        one = Condition(
            *(v[i : i + 1] for v in (condition.tokens, condition.mask, condition.pooled))
        )
        torch.testing.assert_close(dit(x[i : i + 1], t[i : i + 1], one), whole[i : i + 1])


@pytest.mark.parametrize(
    ("layout", "reaches"),
    [
        (Joint(), "everything"),
        (FactorisedSelfAttention(), "everything"),
        (Alternating(), "its frame"),
    ],
)
def test_layouts_decide_how_far_one_block_reaches(layout, reaches):
    dit = DiT(4, 16, size=TransformerSize(1, 24, 2), patch=(1, 1, 1), layout=layout)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, condition = torch.randn(1, 4, 3, 2, 2), torch.rand(1), text(1)
    changed = x.clone()
    changed[:, :, 0, 0, 0] += 1
    moved = (dit(changed, t, condition) - dit(x, t, condition)).abs().amax((0, 1)) > 1e-7
    expected = torch.ones(3, 2, 2, dtype=torch.bool)
    if reaches == "its frame":
        expected[1:] = False
    assert torch.equal(moved, expected)


def test_time_text_and_pooled_vector_all_matter_and_padding_does_not():
    dit = small_dit()
    x, t, condition = torch.randn(2, 4, 1, 4, 4), torch.rand(2), text(2)
    base = dit(x, t, condition)
    torch.testing.assert_close(dit(x, t, condition.pad(9)), base)
    other = text(2)
    for changed in (
        Condition(other.tokens, condition.mask, condition.pooled),
        Condition(condition.tokens, condition.mask, other.pooled),
    ):
        assert not torch.allclose(dit(x, t, changed), base)
    assert not torch.allclose(dit(x, t + 0.1, condition), base)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 latent positions along h are no multiple of 2"):
        small_dit()(torch.zeros(1, 4, 1, 5, 4), torch.rand(1), text(1))
    with pytest.raises(ValueError, match="num_heads = 5: must divide width = 24"):
        DiT(4, 16, TransformerSize(12, 24, 5))
    with pytest.raises(ValueError, match="must be three positive numbers"):
        DiT(4, 16, patch=(2, 2))


@pytest.fixture(scope="module")
def conditioner():
    torch.manual_seed(1)
    conditioner = TextConditioner(width=16, depth=1, num_heads=2, max_words=6)
    torch.nn.init.normal_(conditioner.embedding.weight)
    return conditioner.eval()


def test_a_caption_means_the_same_in_any_batch(conditioner):
    together = conditioner(["a red circle", "a very long caption with many words"])
    alone = conditioner(["a red circle"])
    torch.testing.assert_close(together.pooled[:1], alone.pooled)
    torch.testing.assert_close(together.tokens[:1, :4], alone.tokens)
    assert together.mask[0].tolist() == [True] * 4 + [False] * 3  # cut after max_words


def test_words_order_and_dropping_matter_case_and_points_do_not(conditioner):
    def pooled(caption, drop=None):
        return conditioner([caption], drop).pooled

    base = pooled("a red circle chases a blue square")
    torch.testing.assert_close(pooled("A red circle, chases a blue square."), base)
    assert not torch.allclose(pooled("a blue circle chases a red square"), base)
    assert not torch.allclose(pooled("a red circle chases a red square"), base)
    torch.testing.assert_close(
        pooled("a red circle", torch.tensor([True])), conditioner.null(1).pooled
    )


def test_a_bag_of_words_composes():
    """Without blocks, a word changes the pooled vector alike whatever words stand beside it."""
    conditioner = TextConditioner(width=16, depth=0, num_heads=2)
    torch.nn.init.normal_(conditioner.embedding.weight)
    captions = ["a red circle", "a blue circle", "a red square", "a blue square"]
    pooled = conditioner(captions).pooled
    torch.testing.assert_close(pooled[0] - pooled[1], pooled[2] - pooled[3])
    assert not torch.allclose(pooled[0], pooled[1])


def test_words_that_share_a_row_of_a_small_table_still_differ():
    conditioner = TextConditioner(width=16, depth=1, num_heads=2, num_rows=64)
    words = [f"word{i}" for i in range(40)]
    rows = [conditioner.rows(word)[1] for word in words]
    assert len({first for first, _ in rows}) < len(words)  # there are collisions,
    assert len(set(rows)) == len(words)  # and two hashes part them


def test_unconditional_ignores_captions():
    conditioner = Unconditional(8)
    torch.testing.assert_close(conditioner(["a", "b"]).pooled, conditioner.null(2).pooled)


def test_a_video_depends_on_its_seed_and_prompt_and_not_on_its_batch(conditioner):
    tokenizer = ConvTokenizer(
        latent_channels=4, widths=(8, 8), down_time=(True,), down_space=(True,), blocks_per_level=1
    ).eval()
    dit = small_dit(patch=(1, 1, 1))
    size = VideoSize(5, 8, 12)

    sampling = SamplingConfig(num_steps=4, guidance=GuidanceConfig(3.0))
    generator = VideoGenerator(tokenizer, conditioner, dit, sampling=sampling)

    def videos(prompts, seeds):
        return generator.videos(prompts, size, seeds)

    three = videos(["red", "blue", "red"], [7, 8, 9])
    assert three.shape == (3, 3, 5, 8, 12)
    assert three.abs().max() <= 1
    torch.testing.assert_close(videos(["blue"], [8]), three[1:2], atol=1e-5, rtol=0)
    assert not torch.allclose(three[0], three[2])
    assert not torch.allclose(videos(["blue"], [7]), three[:1])
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        videos(["a", "b"], [1])
    with pytest.raises(ValueError, match="height 9 is not a multiple of 2"):
        generator.videos(["a"], VideoSize(5, 9, 12), [0])
