"""Frozen tensors in parts: whole while their block runs, gone behind it, whole again in the end."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from spectrim import job
from spectrim.engines import sharded as module
from spectrim.engines.recompute import recomputed
from spectrim.engines.sharded import Sharded, is_sharded, take_weights, training_bytes
from spectrim.engines.spread import even_spans
from spectrim.errors import UsageError
from spectrim.models.load import meta_model
from spectrim.models.walk import Walk, find_layers, weight_of
from spectrim.processes import Group
from spectrim.registry import make_method
from spectrim.request import Request
from tiny_models import tiny, token_ids

IDS = token_ids(2, 8)


class Together(Sharded):
    """Rank 0, to which all others answer: they are in this process."""

    def __init__(self, model: PreTrainedModel, walk: Walk, world: int) -> None:
        super().__init__()
        self.others: list[Sharded] = []
        for rank in range(1, world):
            other = Sharded()
            other.group = Group(rank=rank, world=world)
            take_weights(other, copy.deepcopy(model), walk)
            self.others.append(other)
        self.group = Group(rank=0, world=world)
        take_weights(self, model, walk)
        self.asked: list[int] = []

    def _sent(self, index: int):
        self.asked.append(index)
        parts = [own.blocks[index].part for own in (self, *self.others)]
        return module._Ahead(index, torch.cat(parts), None)


def logits_and_gradient(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of the embedding: what the way back gives through all blocks."""
    embedding = model.get_input_embeddings().weight
    embedding.grad = None
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), embedding.grad


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2"])
def test_a_model_in_parts_computes_what_it_computes_whole(architecture: str, world: int):
    model = tiny(architecture)
    walk = find_layers(model)
    weights = {la.name: weight_of(model.get_submodule(la.name)).clone() for la in walk.layers}
    model.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    wanted = logits_and_gradient(model)

    parts = Together(model, walk, world)
    assert (
        sum(w.nbytes for w in weights.values()) <= parts.nbytes * world < 1.1 * sum(w.nbytes for w in weights.values())
    )
    assert all(not model.get_submodule(name).weight.numel() for name in weights)
    with parts.running(), recomputed(model, walk):
        for _ in range(2):
            found = logits_and_gradient(model)
            assert torch.equal(found[0], wanted[0])
            assert torch.equal(found[1], wanted[1])
    assert all(not model.get_submodule(name).weight.numel() for name in weights)
    blocks = len(walk.block_names)
    there_and_back = [*range(blocks), *reversed(range(blocks))]
    # The first time each block is asked for when it runs, the second time ahead of it; either way once for each run.
    assert parts.asked[: len(there_and_back)] == there_and_back
    assert len(parts.asked) <= 2 * len(there_and_back) + 1

    parts.give_back(model)
    assert all(torch.equal(weight_of(model.get_submodule(name)), weight) for name, weight in weights.items())
    assert torch.equal(logits_and_gradient(model)[0], wanted[0])


def test_of_two_models_only_the_one_that_is_wanted_comes_back():
    model, other = tiny("llama"), tiny("llama")
    walk, parts = find_layers(model), Sharded()
    take_weights(parts, model, walk)
    take_weights(parts, other, walk)
    parts.give_back(model)
    name = walk.layers[0].name
    assert model.get_submodule(name).weight.numel()
    assert not other.get_submodule(name).weight.numel()
    assert not parts.nbytes


@pytest.mark.parametrize(
    ("width", "inner", "depth", "wanted"), [(4096, 11008, 32, 46.4e9), (5120, 13824, 40, 90.8e9)], ids=["7B", "13B"]
)
def test_what_training_holds_is_what_the_documents_say(width: int, inner: int, depth: int, wanted: float):
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=width // 128,
        num_key_value_heads=width // 128, vocab_size=32_000,
    )  # fmt: skip
    assert training_bytes(find_layers(meta_model(config)), 2) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize(("method", "says"), [("soco", "and there is one"), ("svd", "svd learns no scores")])
def test_it_is_refused_before_weights_are_read(method: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def load_dense(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(job, "load_dense", load_dense)
    asked = Request(model="builtin:tiny", keep=0.5, method=method, shard_weights=True, device="cpu", eval="none")
    with pytest.raises(UsageError, match=says):
        job.run(asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_who_is_asked_to_share_weights_out_must_be_able_to(monkeypatch: pytest.MonkeyPatch):
    model, soco = tiny("llama"), make_method("soco", "balanced", {})
    walk = find_layers(model)
    assert not is_sharded(model, walk, soco, None)
    with pytest.raises(UsageError, match="--shard-weights shares weights out among processes, and there is one"):
        is_sharded(model, walk, soco, True)
    with pytest.raises(UsageError, match="--shard-weights: method svd learns no scores"):
        is_sharded(model, walk, make_method("svd", None, {}), True)

    class Two(Group):
        def objects(self, value):
            return [value, value]

    monkeypatch.setattr(module, "present", lambda: Two(rank=0, world=2))
    assert not is_sharded(model, walk, soco, None)
    assert is_sharded(model, walk, soco, True)
    monkeypatch.setattr(module, "fits_whole", lambda *_: False)
    assert is_sharded(model, walk, soco, None)
    assert not is_sharded(model, walk, soco, False)


@pytest.mark.parametrize(("windows", "batch", "world"), [(7, 4, 2), (9, 4, 2), (8, 4, 2), (1, 4, 3), (16, 3, 5)])
def test_all_ranks_have_as_many_batches_and_all_windows_one(monkeypatch, windows: int, batch: int, world: int):
    spans = []
    for rank in range(world):
        monkeypatch.setattr("spectrim.engines.spread.present", lambda rank=rank: Group(rank=rank, world=world))
        spans.append(even_spans(windows, batch))
    assert len({len(own) for own in spans}) == 1
    assert all(0 <= stop - start <= batch for own in spans for start, stop in own)
    assert sorted(w for own in spans for start, stop in own for w in range(start, stop)) == [*range(windows)]
