"""flash_ladder.model.sequence: processes that hold a sequence together compute what one does. Four of them, joined by gloo."""

import math
import multiprocessing
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flash_ladder.kernels import attention
from flash_ladder.model import gpt, sequence
from flash_ladder.model.sequence import SharedSequence, exchange, heads_of_a_device
from flash_ladder.model_schema import ModelConfig
from flash_ladder.schema import Config, TrainerConfig
from flash_ladder.training.module import GPTModule
from flash_ladder.training.sharding import shard
from tests.helpers.once import made_once

# Heads, key/value heads, processes to a sequence: MHA, GQA, and key/value heads that have to be repeated.
HEADS = [(4, 4, 2), (8, 8, 4), (8, 4, 2), (8, 4, 4), (8, 2, 4), (12, 6, 4)]
MEANINGS = {
    "causal": {},
    "documents": {"document_ids": torch.arange(64).ge(torch.tensor([[21], [32]])).int()},
    "window": {"window_size": 9, "softcap": 2.0, "alibi_slopes": True},
}
LEARNED = {"position": "learned", "mlp": "gelu", "norm": "layernorm", "bias": True}
ALIBI = {"position": "alibi", "window_size": 9, "softcap": 2.0}
# The model's parts, whether it has documents, and its activation checkpointing.
MODELS = {
    "rotary": ({}, False, False),
    "gqa": ({"n_kv_head": 2}, True, True),
    "repeated": ({"n_kv_head": 1, "qk_norm": True}, False, "keep_attention"),
    "learned": (LEARNED, True, "keep_attention"),
    "alibi": (ALIBI, True, False),
}
FAULTS = {"positions": "rotary", "heads": "rotary", "labels": "rotary", "slopes": "alibi"}


# ---- in each process ----


def attends(sizes: tuple[int, int, int], meaning: dict, group: dist.ProcessGroup, compiled: bool = False) -> list[float]:
    """How far the output and the gradients of q, k and v are from one process's, at most."""
    H, K, _ = sizes
    shared, generator = SharedSequence.over(group), torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 64, heads, 16, generator=generator) for heads in (H, K, K, H))
    slopes = torch.arange(1, H + 1) / 8 if "alibi_slopes" in meaning else None
    meaning = {**meaning, "alibi_slopes": slopes, "is_causal": True, "backend": "eager", "deterministic": True}

    def run(attend, *inputs):
        q, k, v, grad = (x.transpose(1, 2) for x in inputs)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        output = attend(*inputs, **meaning)
        return output, *torch.autograd.grad(output, inputs, grad)

    expected = run(attention, q, k, v, grad)
    attend = torch.compile(shared.attention, fullgraph=True, backend="aot_eager") if compiled else shared.attention
    ours = run(attend, *(shared.own(x) for x in (q, k, v, grad)))
    parts = [shared.own(x.transpose(1, 2)).transpose(1, 2) for x in expected]
    return [(x - y).abs().max().item() for x, y in zip(ours, parts, strict=True)]


def trains(name: str, pair: dist.ProcessGroup, fault: str | None = None, sharded: bool = False) -> float:
    """How far loss and gradients of two pairs with a batch each are from one process's with both, over the largest value."""
    parts, documents, checkpointing = MODELS[name]
    model = ModelConfig(**{"n_layer": 2, "n_head": 4, "n_kv_head": 4, "d_model": 32, "vocab_size": 80, **parts})
    torch.manual_seed(0)
    module = GPTModule(asdict(Config(model=model, trainer=TrainerConfig(activation_checkpointing=checkpointing))), "eager")
    batch = {"tokens": torch.randint(80, (4, 33))}
    if documents:
        batch["document_ids"] = torch.randint(3, (4, 32), dtype=torch.int32).sort(1)[0]
    weights = list(module.net.parameters())
    loss = module.loss(batch)
    expected = [loss.detach(), *torch.autograd.grad(loss, weights)]

    module.net.sequence = SharedSequence.over(pair)
    if sharded:
        shard(module.net, dist.init_device_mesh("cpu", (4,)))
    with pytest.MonkeyPatch.context() as patch:
        plant(fault, module, patch)
        loss = module.loss({key: rows.chunk(2)[dist.get_rank() // 2] for key, rows in batch.items()})
        loss.backward()
    ours = [loss.detach(), *(p.grad for p in module.net.parameters())]
    if sharded:
        ours = [loss.detach(), *(grad.full_tensor() * 4 for grad in ours[1:])]  # they are means already
        dist.all_reduce(ours[0])
    else:
        for x in ours:
            dist.all_reduce(x)
    return max(((x / 4 - y).abs().max() / y.abs().max()).item() for x, y in zip(ours, expected, strict=True))


def plant(fault: str | None, module: GPTModule, patch: pytest.MonkeyPatch) -> None:
    """Makes the mistake of that name."""
    shared = module.net.sequence
    if fault == "positions":
        angles = gpt.rotary_angles
        patch.setattr(gpt, "rotary_angles", lambda tokens, start, *others: angles(tokens, 0, *others))
    elif fault == "heads":
        back = (2, 2, 16, 2, 8)  # of the exchange after attention
        patch.setattr(sequence, "exchange", lambda x, group: exchange(x, group).roll(int(x.shape == back), 0))
    elif fault == "labels":

        def loss(batch):
            own = shared.own(batch["tokens"][:, :-1])
            return module.net(own[:, :-1], own[:, 1:])

        patch.setattr(module, "loss", loss)
    elif fault == "slopes":
        real = SharedSequence.attention
        patch.setattr(SharedSequence, "attention", lambda *x, alibi_slopes, **y: real(*x, alibi_slopes=alibi_slopes.flip(0), **y))


def work(rank: int, folder: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=4)
    groups = {2: dist.new_subgroups(2)[0], 4: dist.group.WORLD}
    found = {}
    for sizes in HEADS:
        for name, meaning in MEANINGS.items():
            found[sizes, name] = attends(sizes, meaning, groups[sizes[2]])
    if rank < 2:
        found["compiled"] = attends(HEADS[2], MEANINGS["window"], groups[2], compiled=True)
    for name in MODELS:
        found[name] = trains(name, groups[2])
    found["fsdp"] = trains("gqa", groups[2], sharded=True)
    for fault, name in FAULTS.items():
        found[f"{fault} wrong"] = trains(name, groups[2], fault)
    results.put(found)
    dist.destroy_process_group()


# ---- here ----


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process measured."""
    return pickle.loads((made_once(tmp_path_factory, "sequences", measure) / "found").read_bytes())


def measure(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=work, args=(rank, str(folder), results), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    (folder / "found").write_bytes(pickle.dumps([results.get(timeout=120) for _ in processes]))


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_attention_has_the_bits_of_one_process(found, sizes, meaning):
    differences = torch.tensor([each[sizes, meaning] for each in found]).amax(0).tolist()
    repeated = sizes[1] % sizes[2] != 0  # then the gradients of a key/value head are added up in another order
    assert differences[:2] == [0, 0] and max(differences[2:]) <= (2e-6 if repeated else 0)


def test_it_compiles_as_one_graph(found):
    assert max(max(each["compiled"]) for each in found if "compiled" in each) < 2e-6


@pytest.mark.parametrize("name", [*MODELS, "fsdp"])
def test_two_pairs_have_the_loss_and_gradients_of_one_process(found, name):
    assert max(each[name] for each in found) < 2e-6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(found, fault):
    assert min(each[f"{fault} wrong"] for each in found) > 1e-3


def test_the_exchange_is_registered_as_torch_wants_it(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.library.opcheck(exchange, (torch.randn(1, 3).requires_grad_(), dist.group.WORLD.group_name))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_a_device_has_whole_groups_of_heads(sizes):
    n_head, n_kv_head = heads_of_a_device(*sizes)
    assert n_head * sizes[2] == sizes[0] and n_head % n_kv_head == 0
    assert n_kv_head * sizes[2] == math.lcm(sizes[1], sizes[2])
