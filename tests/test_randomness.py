import torch

from memloc import randomness


def test_one_seed_and_purpose_always_give_the_same_numbers():
    first, again = (torch.rand(5, generator=randomness.generator(3, "order", 7)) for _ in range(2))
    assert torch.equal(first, again)


def test_another_purpose_or_seed_gives_other_numbers():
    draws = {
        tuple(torch.rand(3, generator=randomness.generator(seed, *purpose)).tolist())
        for seed in (0, 1)
        for purpose in (("flips",), ("order",), ("order", 1), ("order", 2))
    }
    assert len(draws) == 8


def test_a_seeded_block_restores_every_gpu_without_a_warning(monkeypatch):
    states = {0: torch.tensor(5), 1: torch.tensor(6)}
    restored = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state}))
    with randomness.seeded(0, "init"):
        assert restored == {}
    assert restored == states


def test_a_seeded_block_restores_the_global_generator_even_after_an_error():
    before = torch.get_rng_state()
    try:
        with randomness.seeded(0, "init"):
            torch.rand(1)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)
