import pytest
import torch
from torch import nn

from memloc import evaluation, models, vit
from memloc.randomness import seeded
from memloc.recipes import Settings
from memloc.training import train


def small(seed=0, **keywords):
    with seeded(seed, "test"):
        return models.vit_small(**{"in_channels": 1, "width": 16, "size": 8} | keywords)


@pytest.mark.parametrize(("in_channels", "size", "count"), [(3, 32, 9_628_296), (1, 28, 9_577_016)])
def test_it_has_the_papers_number_of_parameters(in_channels, size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in models.vit_small(in_channels, size=size).parameters()) == count


def test_it_has_eight_groups_and_class_token_and_positions_are_with_the_patches():
    groups = models.layer_groups(small())
    assert list(groups) == ["patch_embedding", *(f"block{i}" for i in range(6)), "head"]
    assert {"patch_embedding.class_token", "patch_embedding.positions"} <= set(groups["patch_embedding"])
    assert sum(len(names) for names in groups.values()) == 82


def test_a_patch_sees_its_pixels_and_those_of_the_image_shifted_by_one_each_way():
    embedding, image = vit._PatchEmbedding(2, 8, 6), torch.randn(1, 2, 6, 6)
    seen = []
    embedding.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    tokens = embedding.eval()(image)
    framed = nn.functional.pad(image[0], (1, 1, 1, 1))
    for patch in range(9):
        top, left = 2 * (patch // 3), 2 * (patch % 3)
        pixels = [
            framed[:, 1 + top + down : 3 + top + down, 1 + left + right : 3 + left + right].flatten()
            for down, right in ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
        ]
        torch.testing.assert_close(seen[0][patch], torch.cat(pixels))
    torch.testing.assert_close(tokens[0, 0], (embedding.class_token + embedding.positions)[0, 0])
    projected = embedding.projection(embedding.norm(seen[0]))
    torch.testing.assert_close(tokens[0, 1:], projected + embedding.positions[0, 1:])


def test_attention_is_that_of_an_explicit_loop_over_heads_and_tokens():
    attention, tokens = vit._LocalityAttention(12, heads=3).eval(), torch.randn(2, 5, 12)
    attention.log_temperature.data.fill_(0.3)
    weights = attention.queries_keys_values.weight.chunk(3)
    expected = torch.zeros(2, 5, 12)
    for image in range(2):
        q, k, v = (nn.functional.layer_norm(tokens[image], (12,)) @ weight.T for weight in weights)
        for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
            for i in range(5):
                others = [j for j in range(5) if j != i]
                scores = torch.stack([(q[i, head] * k[j, head]).sum() for j in others]) * torch.tensor(0.3).exp()
                for share, j in zip(scores.softmax(0), others, strict=True):
                    expected[image, i, head] += share * v[j, head]
    torch.testing.assert_close(attention(tokens), attention.output(expected))


def test_the_temperature_begins_at_the_root_of_the_length_of_a_head():
    model = models.vit_small(in_channels=1, width=128, size=4)
    assert model.block3.attention.log_temperature.exp().item() == pytest.approx(64**-0.5)
    assert model.block3.attention.heads == 2


def test_every_block_adds_to_its_input_and_the_head_reads_the_class_token():
    model, images = small().eval(), torch.randn(2, 1, 8, 8)
    tokens = model.patch_embedding(images)
    for number in range(6):
        block = model.get_submodule(f"block{number}")
        tokens = tokens + block.attention(tokens)
        tokens = tokens + block.perceptron(tokens)
    torch.testing.assert_close(model(images), model.head(tokens[:, 0]))


@pytest.mark.parametrize("width", [65, 100, 130])
def test_a_width_without_whole_heads_is_refused(width):
    with pytest.raises(ValueError, match=f"width of SmallViT must be below 64 or a multiple of it, got {width}"):
        models.build("vit_small", in_channels=1, size=8, num_classes=10, width=width, seed=0)


def test_a_size_without_whole_patches_is_refused():
    with pytest.raises(ValueError, match="size must be a multiple of the patch of SmallViT, 2 pixels, got 9"):
        models.build("vit_small", in_channels=1, size=9, num_classes=10, width=8, seed=0)


@pytest.mark.parametrize("shape", [(10, 10), (4, 16), (9, 8)])
def test_images_of_another_size_are_refused_even_with_as_many_patches(shape):
    with pytest.raises(ValueError, match=r"do not fit SmallViT \(it takes 8×8 pixels\)"):
        models.check_images(small(), torch.zeros(1, 1, *shape))


def test_dropout_depends_on_the_seed_of_the_training_alone_and_ends_with_it(tiny):
    def trained(seed):
        model = small()
        train(model, tiny, Settings(epochs=1, batch_size=32, seed=seed))
        return model

    first, again, other = trained(0), trained(0), trained(1)
    with seeded(5, "test"):
        logits = [evaluation.predict(model, tiny.train.images) for model in (first, first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[3])


def test_it_drops_in_training_in_each_of_its_parts():
    model, tokens = small(), torch.randn(2, 17, 16)
    attention = model.block0.attention
    attention.output[1].p = 0.0  # what is left is dropout of the attention itself
    for part, inputs in ((attention, tokens), (model.block0.perceptron, tokens), (model.patch_embedding, tokens)):
        inputs = inputs if part is not model.patch_embedding else torch.randn(2, 1, 8, 8)
        assert not torch.equal(part(inputs), part(inputs))
        part.eval()
        assert torch.equal(part(inputs), part(inputs))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_digits_in_either_precision(tiny, precision):
    settings = Settings(epochs=15, batch_size=8, learning_rate=0.05, precision=precision, channels_last=True)
    history = train(small(width=64), tiny, settings)
    assert history.loss.iloc[-1] < 0.8 * history.loss.iloc[0]
