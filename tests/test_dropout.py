import copy
import io
import itertools
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from memloc import evaluation, models, training
from memloc.dropout import MODES, ExampleTiedDropout, FixedDropout, Slot, examples, insert, slots
from memloc.randomness import derive, generator
from memloc.recipes import Recipe

SVHN = 73_257
INDICES = torch.tensor([5, 0, 99, 5, 42])


def masks(shape=64, count=100, indices=INDICES, **keywords):
    return ExampleTiedDropout(shape, count, **keywords).masks_of(indices)


def network(kind="tied", device="cpu", **keywords):
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=8, seed=0)
    return insert(model, kind, **keywords).to(device)


def tied_layers(model):
    return [module for module in model.modules() if isinstance(module, ExampleTiedDropout)]


# Masks.


def masks_of_the_reference_code(indices, channels, p_gen, p_mem):
    """The published recipe, one example after the other, with a generator of its own."""
    shared, rows = int(p_gen * channels), []
    for index in indices:
        rng = torch.Generator().manual_seed(index)
        bits = torch.bernoulli(torch.full((1, channels - shared), p_mem), generator=rng)
        rows.append(torch.cat([torch.ones(1, shared), bits], dim=1))
    return torch.cat(rows).bool()


@pytest.mark.parametrize("count", [100, None])
@pytest.mark.parametrize(
    ("channels", "p_gen", "p_mem"), [(64, 0.2, 0.1), (128, 0.2, 0.1), (10, 0.5, 0.2), (1, 0.2, 0.5)]
)
def test_parity_masks_are_those_of_the_reference_code_bit_for_bit(channels, p_gen, p_mem, count):
    found = masks(channels, count, p_gen=p_gen, p_mem=p_mem, parity=True, seed=7, salt=3)
    assert torch.equal(found, masks_of_the_reference_code(INDICES.tolist(), channels, p_gen, p_mem))


def test_parity_masks_repeat_their_beginning_in_wider_layers_and_salted_ones_do_not():
    few, many = masks(64, parity=True)[:, 12:], masks(128, parity=True)[:, 25:]
    assert torch.equal(few, many[:, :52])
    own, other = masks(64, p_gen=0, p_mem=0.5, salt=0), masks(128, p_gen=0, p_mem=0.5, salt=1)
    assert 0.35 < (own == other[:, :64]).double().mean() < 0.65


def mixed(number):
    """SplitMix64's finaliser on an unsigned number of 64 bits, after Steele et al. (2014)."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


def test_masks_agree_with_an_explicit_loop_over_examples_and_channels():
    step, key = 0x9E3779B97F4A7C15, derive(3, "masks", 2)
    found = masks(20, None, indices=torch.tensor([0, 9, 10**12]), p_gen=0.25, p_mem=0.3, seed=3, salt=2)
    for row, index in zip(found.tolist(), (0, 9, 10**12), strict=True):
        for channel, is_on in enumerate(row):
            number = mixed((mixed((index * step + key) % 2**64) + channel * step) % 2**64)
            assert is_on == (channel < 5 or (number >> 11) / 2**53 < 0.3)


@pytest.mark.parametrize("parity", [False, True])
def test_a_mask_depends_on_seed_salt_and_index_alone(parity, device, global_generator_untouched):
    expected = masks(parity=parity)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(masks(count=None, parity=parity), expected)
    torch.testing.assert_close(masks(count=4097 if not parity else 200, parity=parity), expected)
    torch.testing.assert_close(masks(indices=INDICES[order], parity=parity), expected[order])
    torch.testing.assert_close(masks(indices=INDICES[2:3], parity=parity), expected[2:3])
    for count in (100, None):
        layer = ExampleTiedDropout(64, count, parity=parity).to(device)
        found = layer.masks_of(INDICES.to(device))
        assert found.device.type == device.type
        torch.testing.assert_close(found.cpu(), expected)
    torch.testing.assert_close(ExampleTiedDropout(64, 100, parity=parity).masks_of(INDICES.to(device)).cpu(), expected)


def test_other_seeds_salts_and_indices_have_other_masks():
    drawn = [masks(count=None, p_mem=0.5, seed=seed, salt=salt) for seed, salt in itertools.product(range(3), repeat=2)]
    rows = [tuple(row) for mask in drawn for row in mask[[0, 1, 2, 4]].tolist()]
    assert len(set(rows)) == len(rows)


def test_the_default_type_of_floats_does_not_decide_the_masks():
    expected = masks(parity=True), FixedDropout(64, 0.3).mask
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(masks(parity=True), expected[0])
        assert torch.equal(FixedDropout(64, 0.3).mask, expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("p_mem", [0.0, 0.1, 0.5, 1.0])
def test_memorization_channels_are_on_as_often_as_said_in_every_channel_and_example(p_mem):
    own = masks(64, None, torch.arange(20_000), p_gen=0.2, p_mem=p_mem)[:, 12:].double()
    spread = (p_mem * (1 - p_mem)) ** 0.5
    assert abs(own.mean() - p_mem) <= 5 * spread / own.numel() ** 0.5
    assert ((own.mean(0) - p_mem).abs() <= 5 * spread / 20_000**0.5).all()
    torch.testing.assert_close(own.sum(1).var().item(), 52 * spread**2, atol=0.0, rtol=0.1)


def test_masks_of_neighbours_and_of_neighbouring_channels_are_unrelated():
    own = masks(64, None, torch.arange(20_000), p_gen=0, p_mem=0.5).double() - 0.5
    for a, b in ((own[1:], own[:-1]), (own[:, 1:], own[:, :-1]), (own[:-1, 1:], own[1:, :-1])):
        assert abs((a * b).mean() * 4) <= 5 / a.numel() ** 0.5


def test_the_table_serves_more_examples_than_the_reference_code_and_takes_a_bit_a_channel():
    layer = ExampleTiedDropout(128, SVHN)
    assert layer.masks.nbytes == SVHN * 16
    assert layer.masks_of(torch.tensor([SVHN - 1])).shape == (1, 128)
    channels = slots(models.resnet9()).values()
    assert sum(-(-count // 8) * 60_000 for (count,) in channels) == 7_200_000


# Modes.


@pytest.mark.parametrize("rescale", [1.0, 1.5])
def test_every_mode_multiplies_as_the_table_says(rescale):
    layer = ExampleTiedDropout(10, 100, p_gen=0.2, p_mem=0.4, rescale=rescale)
    activations = torch.randn(5, 10, 3, 2)
    table = {"own": 1.0, "all": 1.0, "scaled": 1.0, "drop": rescale}, {"all": 1.0, "scaled": 0.4, "drop": 0.0}
    for mode in MODES:
        with examples(layer, INDICES, mode):
            found = layer(activations)
        for row, channel in itertools.product(range(5), range(10)):
            factor = table[0][mode]
            if channel >= 2:
                factor = float(layer.masks_of(INDICES)[row, channel]) if mode == "own" else table[1][mode]
            torch.testing.assert_close(found[row, channel], activations[row, channel] * factor)


@pytest.mark.parametrize(("p_gen", "p_mem"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_shares_of_none_and_all_are_what_they_say(p_gen, p_mem):
    layer, activations = ExampleTiedDropout(6, 100, p_gen=p_gen, p_mem=p_mem, rescale=3.0), torch.ones(5, 6)
    expected = {"own": max(p_gen, p_mem), "all": 1.0, "scaled": max(p_gen, p_mem), "drop": p_gen}
    for mode, value in expected.items():
        with examples(layer, INDICES, mode):
            assert layer(activations).tolist() == [[value] * 6] * 5


@pytest.mark.parametrize("is_training", [True, False])
def test_training_and_evaluation_mode_are_the_same(is_training):
    layer, activations = ExampleTiedDropout(64, 100).train(is_training), torch.ones(5, 64)
    with examples(layer, INDICES):
        assert torch.equal(layer(activations).bool(), masks())


@pytest.mark.parametrize(
    ("mask", "activations"),
    [((3, 4, 4), (5, 3, 4, 4)), ((1, 12), (5, 7, 12)), (12, (5, 12)), (1, (5, 1, 4, 4)), ((1, 4, 4), (5, 3, 4, 4))],
)
def test_masks_of_any_shape_spread_over_the_axes_that_they_lack(mask, activations):
    layer = ExampleTiedDropout(mask, 100, p_gen=0.25, p_mem=0.5)
    with examples(layer, INDICES):
        found = layer(torch.ones(activations))
    rows = layer.masks_of(INDICES)
    assert rows.shape == (5, *layer.shape)
    for row, on in zip(found, rows, strict=True):
        spread = on.reshape(on.shape + (1,) * (row.ndim - on.ndim))
        assert torch.equal(row, torch.ones_like(row) * spread)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_type_and_layout_of_the_activations_are_kept(dtype, mode):
    layer = ExampleTiedDropout(16, 100, p_mem=0.3)
    activations = torch.randn(5, 16, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    with examples(layer, INDICES, mode):
        found = layer(activations)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    if mode == "scaled":
        assert torch.equal(found[:, 15], activations[:, 15] * torch.tensor(0.3, dtype=dtype))


def test_a_layer_converted_to_another_type_keeps_its_masks():
    layer = ExampleTiedDropout(64, 100).to(torch.bfloat16).half()
    assert torch.equal(layer.masks_of(INDICES), masks())


@pytest.mark.parametrize("mode", MODES)
def test_activations_are_left_as_they_were(mode):
    layer, activations = ExampleTiedDropout(16, 100), torch.randn(5, 16, 2, 2)
    before, version = activations.clone(), activations._version
    with examples(layer, INDICES, mode):
        found = layer(activations)
    assert torch.equal(activations, before)
    assert activations._version == version
    assert mode == "all" or found.data_ptr() != activations.data_ptr()


def test_gradients_pass_through_the_channels_that_are_on_and_no_others():
    layer, activations = ExampleTiedDropout(64, 100), torch.randn(5, 64, 2, 2, requires_grad=True)
    with examples(layer, INDICES):
        layer(activations).sum().backward()
    assert torch.equal(activations.grad.bool(), masks()[:, :, None, None].expand(5, 64, 2, 2))


def test_weights_are_trained_by_the_examples_whose_channels_they_feed_alone():
    layer = nn.Sequential(nn.Linear(4, 64), ExampleTiedDropout(64, 100, p_gen=0))
    with examples(layer, INDICES[:1]):
        layer(torch.randn(1, 4)).sum().backward()
    assert torch.equal(layer[0].weight.grad.any(1), masks(p_gen=0)[0])


def test_one_network_has_a_layer_for_every_shape_and_no_two_share_masks():
    model = network(count=100, p_mem=0.5, p_gen=0.0)
    with examples(model, INDICES):
        assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    drawn = [tuple(layer.masks_of(INDICES)[:, :8].flatten().tolist()) for layer in tied_layers(model)]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("parity", [False, True])
def test_masks_of_a_table_are_drawn_once(monkeypatch, parity):
    layer, activations = ExampleTiedDropout(8, count=4, parity=parity), torch.ones(2, 8)
    monkeypatch.delattr(ExampleTiedDropout, "_draw")
    with examples(layer, torch.tensor([1, 3])):
        assert layer(activations).equal(layer(activations))


def test_nothing_draws_from_or_seeds_the_global_generator(global_generator_untouched):
    for kind in ("tied", "tied-parity", "fixed"):
        layer = insert(nn.Sequential(Slot(8)), kind, count=20)
        with examples(layer, torch.arange(3)):
            layer(torch.ones(3, 8))


# Whose activations these are.


def test_a_forward_in_mode_own_without_a_word_of_whose_it_is_is_an_error():
    model = network(count=100)
    with pytest.raises(RuntimeError, match=r"run the network inside `with dropout.examples\(model, indices\):`"):
        model(torch.zeros(2, 1, 8, 8))


def test_blocks_are_nested_and_put_back_what_was_also_after_an_exception():
    layer, ones = ExampleTiedDropout(64, 100), torch.ones(5, 64)
    with examples(layer, INDICES):
        own = layer(ones)
        with pytest.raises(KeyError), examples(layer, mode="drop"):
            assert layer(ones).sum() == 5 * 12
            with examples(layer, INDICES.flip(0)):
                assert torch.equal(layer(ones), own.flip(0))
            assert layer(ones).sum() == 5 * 12
            raise KeyError
        assert torch.equal(layer(ones), own)
    with pytest.raises(RuntimeError, match="must know whose activations"):
        layer(ones)


def test_a_network_without_tied_dropout_is_not_concerned():
    model = nn.Linear(2, 2)
    for mode in MODES:
        with examples(model, torch.tensor([10**9]), mode):
            model(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("indices", "mode", "message"),
    [
        (INDICES, "test", "mode must be one of own, all, scaled, drop, got 'test'"),
        (None, "own", r"indices must be int64 \(B,\) for mode 'own', got None"),
        (INDICES.int(), "own", r"indices must be int64 \(B,\) for mode 'own', got torch.int32 \(5,\)"),
        (INDICES[None], "own", r"got torch.int64 \(1, 5\)"),
        (INDICES + 1, "own", "indices must be from 0 to 99, got 1 to 100"),
        (INDICES - 1, "own", "indices must be from 0 to 99, got -1 to 98"),
    ],
)
def test_wrong_modes_and_indices_are_refused_before_anything_changes(indices, mode, message):
    layer = ExampleTiedDropout(64, 100)
    with pytest.raises(ValueError, match=message), examples(layer, indices, mode):
        pass
    with pytest.raises(RuntimeError):
        layer(torch.ones(5, 64))


def test_masks_of_no_example_of_the_layer_are_refused():
    with pytest.raises(ValueError, match="indices must be from 0 to 99, got -1 to -1"):
        ExampleTiedDropout(4, 100).masks_of(torch.tensor([-1]))


def test_without_a_table_any_index_will_do_but_a_negative_one():
    layer = ExampleTiedDropout(64)
    with examples(layer, torch.tensor([2**40])):
        layer(torch.ones(1, 64))
    with pytest.raises(ValueError, match="indices must be from 0 to …, got -1 to -1"), examples(layer, INDICES[:1] - 6):
        pass


def test_another_number_of_images_than_of_indices_is_refused():
    layer = ExampleTiedDropout(4, 100)
    with examples(layer, INDICES), pytest.raises(ValueError, match="indices must be one per image, 3, got 5"):
        layer(torch.ones(3, 4))


@pytest.mark.parametrize("shape", [(5, 3, 4), (5,), (5, 5)])
def test_activations_that_do_not_fit_the_masks_are_refused(shape):
    for layer in (ExampleTiedDropout(4, 100), FixedDropout(4)):
        with examples(layer, INDICES), pytest.raises(ValueError, match=r"activations must have shape \(B, 4, …\), got"):
            layer(torch.ones(shape))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shape": 0}, "shape must be a number of channels or a shape of positive integers, got 0"),
        ({"shape": ()}, "shape must be a number of channels"),
        ({"shape": (4, 0.5)}, "shape must be a number of channels"),
        ({"p_gen": 1.1}, "p_gen must be a fraction from 0 to 1, got 1.1"),
        ({"p_mem": float("nan")}, "p_mem must be a fraction from 0 to 1, got nan"),
        ({"count": 0}, "count must be the number of examples, at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        ExampleTiedDropout(**{"shape": 4, "count": 10} | keywords)


# What a module has to stand.


def test_the_state_dict_holds_the_table_and_takes_it_back(tmp_path):
    model, other = network(count=100, seed=1), network(count=100, seed=2)
    assert not torch.equal(tied_layers(model)[0].masks, tied_layers(other)[0].masks)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    images = torch.randn(5, 1, 8, 8)
    with examples(model, INDICES), examples(other, INDICES):
        assert torch.equal(model.eval()(images), other.eval()(images))
    assert not any("masks" in name for name in network().state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda layer: pickled(layer)])
def test_a_copy_has_the_masks_and_is_outside_of_the_block(copied):
    layer = ExampleTiedDropout(64, 100, salt=3)
    with examples(layer, INDICES, "drop"):
        other = copied(layer)
    assert torch.equal(other.masks, layer.masks)
    with pytest.raises(RuntimeError, match="must know whose activations"):
        other(torch.ones(5, 64))
    with examples(other, INDICES):
        assert torch.equal(other(torch.ones(5, 64)).bool(), layer.masks_of(INDICES))


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_functional_call_and_vmap_over_weights_see_the_block():
    model = nn.Sequential(nn.Linear(4, 8), ExampleTiedDropout(8, 100), nn.Linear(8, 2))
    images, weights = torch.randn(5, 4), {name: 2 * value for name, value in model.named_parameters()}
    stacked = {name: torch.stack([value, 2 * value]) for name, value in model.named_parameters()}
    with examples(model, INDICES):
        once = torch.func.functional_call(model, weights, (images,))
        both = torch.func.vmap(lambda each: torch.func.functional_call(model, each, (images,)))(stacked)
        torch.testing.assert_close(both, torch.stack([model(images), once]))


def test_a_compiled_network_follows_the_block():
    model = insert(models.mlp(64, width=8), "tied", count=100)
    compiled, images = torch.compile(model, backend="eager"), torch.randn(5, 1, 8, 8)
    for indices, mode in ((INDICES, "own"), (INDICES.flip(0), "own"), (None, "drop")):
        with examples(compiled, indices, mode):
            assert torch.equal(compiled(images), model(images))


# The dropouts it is compared with.


def test_fixed_dropout_is_one_mask_for_all_rows_modes_and_batches_and_divides_by_what_is_left():
    layer = FixedDropout(200, rate=0.3, seed=1)
    rows = layer(torch.ones(4, 200, 2, 2))
    assert torch.equal(rows, rows[:1].expand_as(rows))
    assert torch.equal(rows[:1], layer.eval()(torch.ones(1, 200, 2, 2)))
    assert torch.equal(rows[0, :, 0, 0], layer.mask / torch.tensor(0.7))
    assert 0.55 < layer.mask.double().mean() < 0.85


def test_fixed_masks_depend_on_seed_and_salt():
    drawn = [tuple(FixedDropout(64, seed=seed, salt=salt).mask.tolist()) for seed in range(2) for salt in range(2)]
    assert len(set(drawn)) == 4
    assert torch.equal(FixedDropout(64).mask, FixedDropout(64).mask)


def test_fixed_dropout_of_features_leaves_tokens_and_types_alone():
    layer = FixedDropout((1, 12), rate=0.5)
    found = layer(torch.ones(2, 7, 12, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (layer.mask * 2.0).expand(2, 7, 12).to(torch.bfloat16))
    assert torch.equal(FixedDropout(3, rate=0)(torch.ones(1, 3)), torch.ones(1, 3))


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_fixed_dropout_that_leaves_nothing_is_refused(rate):
    with pytest.raises(ValueError, match="rate must be a fraction from 0 to less than 1"):
        FixedDropout(4, rate)


# Places.


def test_the_networks_have_the_papers_places_and_slots_do_nothing():
    assert slots(models.resnet9(width=4)) == {
        "after.conv0": (4,), "after.conv1": (8,), "after.sum1": (8,), "after.conv4": (16,), "after.sum2": (16,),
        "after.conv7": (8,),
    }  # fmt: skip
    activations = torch.randn(2, 8)
    assert Slot(8)(activations) is activations


@pytest.mark.parametrize(
    ("kind", "type_"),
    [
        ("tied", ExampleTiedDropout),
        ("tied-parity", ExampleTiedDropout),
        ("standard", nn.Dropout),
        ("fixed", FixedDropout),
    ],
)
def test_dropout_goes_where_it_is_sent(kind, type_):
    model = network(kind, places=["after1", "after3"], rate=0.25, p_gen=0.5, p_mem=0.3, count=20)
    assert [type(model.get_submodule(f"after{place}")) for place in range(4)] == [Slot, type_, Slot, type_]
    layer = model.after1
    settings = {"standard": ("p",), "fixed": ("rate",)}.get(kind, ("p_gen", "p_mem", "count", "parity"))
    expected = {"p": 0.25, "rate": 0.25, "p_gen": 0.5, "p_mem": 0.3, "count": 20, "parity": kind == "tied-parity"}
    assert all(getattr(layer, name) == expected[name] for name in settings)


@pytest.mark.parametrize(("kind", "name"), [("tied", "masks"), ("fixed", "mask")])
def test_the_seed_decides_the_masks_that_are_inserted(kind, name):
    drawn = [getattr(network(kind, count=20, p_mem=0.5, seed=seed).after3, name) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_kind_none_leaves_the_network_alone():
    assert slots(network("none")) == slots(network("none", places=["after0"])) != {}


def test_slots_that_are_filled_later_have_masks_of_their_own_and_the_same_as_at_once():
    later = insert(network(places=["after0"], p_mem=0.5), "tied", places=["after1"], p_mem=0.5)
    assert later.after0.salt != later.after1.salt
    apart = insert(insert(network("fixed", places=["after2"]), "standard", places=["after0"]), "tied")
    assert sorted([apart.after2.salt, apart.after1.salt, apart.after3.salt]) == [2, 3, 4]
    assert [layer.salt for layer in tied_layers(network())] == [0, 1, 2, 3]
    assert network(places=["after2"]).after2.salt == 2


@pytest.mark.parametrize(
    ("kind", "places", "message"),
    [
        ("spatial", None, "kind must be one of none, tied, tied-parity, standard, fixed, got 'spatial'"),
        ("tied", ["after9"], "places must be among after0, after1, after2, after3, got 'after9'"),
        ("none", ["after9"], "got 'after9'"),
        ("tied", [], "places must be at least one of after0, after1, after2, after3, got none"),
    ],
)
def test_an_unknown_kind_or_place_is_refused(kind, places, message):
    with pytest.raises(ValueError, match=message):
        network(kind, places=places)


def test_a_network_without_places_is_refused():
    with pytest.raises(ValueError, match="model must have a place for dropout, Linear has none"):
        insert(nn.Linear(2, 2), "tied")


# In evaluation and training.


def test_accuracies_under_every_mode_agree_with_a_loop_over_examples(tiny):
    model = network(device=tiny.train.images.device, count=64, p_gen=0.5, p_mem=0.5).eval()
    for mode in MODES:
        found = evaluation.evaluate(model, tiny, mode=mode, batch_size=10)
        for index, image in enumerate(tiny.train.images[:12]):
            with examples(model, torch.tensor([index]), mode), torch.no_grad():
                assert model(image[None]).argmax() == found.predictions[index]
        with examples(model, mode="drop" if mode == "own" else mode), torch.no_grad():
            right = model(tiny.test.images).argmax(1) == tiny.test.labels
        assert found.accuracies.test == pytest.approx(right.double().mean().item())


def test_an_image_can_be_seen_under_the_mask_of_another_example(tiny):
    model, order = network(device=tiny.train.images.device, count=64, p_mem=0.5), torch.arange(64).flip(0)
    images = tiny.train.images
    others = evaluation.predict(model, images, mode="own", indices=order.to(images.device), batch_size=10)
    own = evaluation.predict(model, images.flip(0), mode="own", indices=None, batch_size=64)
    mirrored = evaluation.predict(model, images.flip(0), mode="own", indices=order.to(images.device))
    torch.testing.assert_close(others.flip(0), own)
    torch.testing.assert_close(mirrored.flip(0), evaluation.predict(model, images, mode="own"))
    assert not torch.allclose(own, mirrored)


def test_predictions_are_made_in_mode_drop_unless_another_is_asked_for(tiny):
    model, images = network(device=tiny.train.images.device, count=64), tiny.test.images[:20]
    with examples(model, mode="drop"), torch.no_grad(), models.evaluation_mode(model):
        torch.testing.assert_close(evaluation.predict(model, images), model(images))


def test_another_number_of_indices_than_of_images_is_refused_by_name(tiny):
    with pytest.raises(ValueError, match="indices must be one per image, 64, got 63"):
        evaluation.predict(nn.Flatten(), tiny.train.images, indices=torch.arange(63))


TIED = Recipe(
    examples=64, noise_rate=0.25, epochs=3, batch_size=20, learning_rate=0.1, width=8, dropout="tied", p_gen=0.5,
    p_mem=0.2,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["tied", "tied-parity", "standard", "fixed"])
def test_the_recipe_decides_the_dropout_of_the_network(kind):
    recipe = Recipe(dropout=kind, dropout_places="after1,after3", p_gen=0.4, p_mem=0.3, dropout_rate=0.2, seed=5)
    shape = {"in_channels": 1, "size": 8, "num_classes": 10}
    found = training._build(recipe, shape, 30)
    plain = models.build("small_cnn", seed=5, **shape)
    expected = insert(plain, kind, places=["after1", "after3"], count=30, p_gen=0.4, p_mem=0.3, rate=0.2, seed=5)
    assert str(found) == str(expected)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(value.equal(expected.state_dict()[name]) for name, value in found.state_dict().items())


def test_a_step_of_a_tied_training_is_that_of_an_explicit_loop(tiny):
    recipe = Recipe(epochs=1, batch_size=64, learning_rate=0.1)
    model, other = (network(device=tiny.train.images.device, count=64) for _ in range(2))
    training.train(model, tiny, recipe)
    optimizer = torch.optim.SGD(other.parameters(), training.learning_rate(recipe, 0.5), 0.9, weight_decay=5e-4)
    order = torch.randperm(64, generator=generator(0, "order", 1)).to(tiny.train.images.device)
    with examples(other, order):
        nn.functional.cross_entropy(other.train()(tiny.train.images[order]), tiny.train.labels[order]).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], msg=name)


def test_a_tied_training_goes_on_where_it_was_interrupted_and_ends_with_the_same_bits(monkeypatch, own_run_store):
    whole = training.fit(TIED)
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "interrupted"))
    evaluate, left = training._Loop.evaluate, [0, 1]

    def stopping(loop, epoch):
        if epoch not in left:
            raise KeyboardInterrupt
        return evaluate(loop, epoch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training._Loop, "evaluate", stopping)
        training.fit(TIED)
    left += [2, 3]
    resumed = training.fit(TIED)
    for epoch in whole.epochs:
        state = resumed.checkpoint(epoch)
        assert all(value.equal(state[name]) for name, value in whole.checkpoint(epoch).items())


def test_a_loaded_tied_network_predicts_what_the_trained_one_did(device):
    run = training.fit(TIED, device=device, checkpoints=[3])
    data, model = training.prepare(TIED, device), training.load_model(run, device=device)
    found = evaluation.evaluate(model, data).accuracies
    last = run.history.iloc[-1]
    assert (found.clean, found.noisy) == (last.clean_accuracy, last.noisy_accuracy)
    assert found.test == last.test_accuracy
    with pytest.raises(RuntimeError, match="must know whose activations"):
        model(data.test.images[:2])


def test_masks_of_a_run_do_not_depend_on_how_many_examples_there_are():
    counts = (64, 90)
    few, many = (training.fit(replace(TIED, examples=count, epochs=0)) for count in counts)
    name = "after0.masks"
    assert torch.equal(few.checkpoint(0)[name], many.checkpoint(0)[name][:64])
