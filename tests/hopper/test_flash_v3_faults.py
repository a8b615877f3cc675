"""The tests of the simulated flash_v3 must be able to fail: each fault below is planted in a copy of it, and the check that passes
without it must go red; where somebody does not wait for another, with the words that say so."""

import pytest
import torch

from tests.helpers.mutants import Fault, planted
from tests.helpers.reference import check, check_unrounded, documents, make_case, n_unlike, run, slopes
from tests.hopper.run import on_hopper

pytestmark = pytest.mark.filterwarnings("ignore")  # of arithmetic with infinities and NaN

FP16 = torch.float16
NAMES = (
    "state", "barriers", "hopper_ops", "schedule", "scores", "softmax", "protocol", "backward_dq", "forward", "backward", "launch",
)  # fmt: skip
FILES = tuple(f"flash_v3/{name}" for name in NAMES)
STATE, BARRIERS, HOPPER_OPS, SCHEDULE, SCORES, SOFTMAX, PROTOCOL, DQ, FORWARD, BACKWARD, HOST = FILES


def rising(rung, monkeypatch) -> None:
    """From the last keys, which are looked at first, to the first ones two rows' scores rise, in places apart of two warps: their
    maxima have to be taken again."""
    case = make_case(1, 1, 1, 70, 400, 128, FP16)
    case.key.mul_(torch.linspace(30.0, 0.1, 400)[:, None]).copy_(case.key.to(FP16))
    others = torch.ones(70, dtype=torch.bool)
    others[[5, 27]] = False
    case.query[:, :, others] /= 64
    check(case, "mutant")


def far_below(rung, monkeypatch) -> None:
    """All scores are so low that a key beyond the end, which has a score of zero, would be infinitely likely."""
    case = make_case(1, 1, 1, 70, 100, 64, FP16)
    case.query.abs_().add_(3).copy_(case.query.to(FP16))
    case.key.abs_().add_(3).neg_().copy_(case.key.to(FP16))
    check(case, "mutant")


def in_any_order(rung, monkeypatch) -> None:
    """Deterministic gradients of four heads, whichever block goes first."""
    case, results = make_case(1, 4, 2, 400, 400, 64, FP16), []
    for seed, programs, at_once in ((0, 1, 1), (1, 3, 3), (2, 5, 5), (3, 5, 2)):
        on_hopper(rung, monkeypatch, seed=seed, programs=programs, at_once=at_once)
        results.append(run(case, FP16, backend="mutant", deterministic=True))
        assert n_unlike("flash_v3", results[0], results[-1], deterministic=True) == 0, "another order, other bits"


def of(*sizes: int, **meaning):
    return lambda rung, monkeypatch: check(make_case(*sizes, FP16), "mutant", **meaning)


def unrounded(rung, monkeypatch) -> None:
    """A float32 output, which at head_dim 256 leaves in halves."""
    check_unrounded(rung, make_case(1, 2, 1, 200, 230, 256, FP16))


CHECKS = {
    "causal 64": of(1, 2, 1, 130, 150, 64, is_causal=True),
    "causal 128": of(1, 2, 1, 200, 330, 128, is_causal=True),
    "causal 256": of(1, 2, 1, 130, 150, 256, is_causal=True),
    "full 64": of(1, 2, 1, 100, 300, 64),
    "full 128": of(1, 6, 3, 100, 300, 128),
    "window 64": of(1, 2, 2, 200, 230, 64, window_size=40),
    "documents 64": of(2, 1, 1, 200, 200, 64, document_ids=documents(200, (20, 130), (64, 150))),
    "softcap 64": of(1, 1, 1, 100, 70, 64, is_causal=True, softcap=1.0),
    "slopes 64": of(1, 2, 1, 100, 140, 64, is_causal=True, alibi_slopes=slopes(2)),
    "many tiles 64": of(2, 3, 1, 260, 200, 64, is_causal=True),
    "many tiles 256": of(2, 3, 1, 260, 200, 256, is_causal=True),
    "tiny tiles 64": of(2, 5, 5, 60, 60, 64),
    "unseen keys 64": of(1, 2, 1, 65, 700, 64, window_size=40),
    "documents 128": of(2, 2, 1, 260, 260, 128, document_ids=documents(260, (20, 130), (64, 150))),
    "rising": rising,
    "far below": far_below,
    "unrounded": unrounded,
    "in any order": in_any_order,
}
CAUSAL, CAUSAL_128, CAUSAL_256, FULL, FULL_128, WINDOW, DOCUMENTS, SOFTCAP, SLOPES, *OTHERS = CHECKS
MANY, MANY_256, TINY, UNSEEN, DOCUMENTS_128, RISING, BELOW, UNROUNDED, ORDER = OTHERS

MATHEMATICS = {
    "causal mask one to the right": Fault(CAUSAL, SCORES, "interval",
        "(n_other - n_own) + ahead", "(n_other - n_own + 1) + ahead"),
    "causal mask aligned top-left": Fault(CAUSAL, SCORES, "interval", "index + (n_other - n_own) + ahead", "index + ahead"),
    "window one too long": Fault(WINDOW, SCORES, "interval", "(n_other - n_own) - behind", "(n_other - n_own) - behind - 1"),
    "documents of another batch entry": Fault(DOCUMENTS, SCORES, "interval", "batch.to(gl.int64) * n_own + ", "0 + "),
    "positions beyond the end not clipped": Fault(DOCUMENTS, SCORES, "interval", "gl.minimum(index, n_own - 1)", "index"),
    "tanh of half the score": Fault(SOFTCAP, SCORES, "tanh_of_ratio", "2.885390", "1.442695"),
    "distance with its sign": Fault(SLOPES, SCORES, "with_distance", "gl.maximum(distance, -distance)", "distance"),
    "heads mixed up": Fault(MANY, SCHEDULE, "locate", "rest - tile * heads", "(rest - tile * heads) // 2"),
    "the maximum never taken again": Fault(RISING, SOFTMAX, "_in_range_text", "0f46800000", "0f7F800000"),
    "of the second row never": Fault(RISING, SOFTMAX, "_in_range_text", "{sums[1]}, 0f46800000", "{sums[1]}, 0f7F800000"),
    "row sums not rescaled": Fault(RISING, SOFTMAX, "softmax_of_next", "l * rescale", "l"),
    "output not rescaled": Fault(RISING, FORWARD, "_mainloop", "rescaled(acc, rescale)", "acc"),
    "output's other row not rescaled": Fault(RISING, SOFTMAX, "_rescaled_text", "{2 * n + i}", "{2 * n}"),
    "halves of a pair swapped": Fault(CAUSAL, SOFTMAX, "as_operand",
        "p.to(gl.int16), (p >> 16).to(gl.int16)", "(p >> 16).to(gl.int16), p.to(gl.int16)"),
    "last key hidden": Fault(CAUSAL, SCORES, "mask", "<= rows.last", "< rows.last"),
    "window's start not masked": Fault(WINDOW, SCORES, "mask", "if FROM", "if False"),
    "one unmasked block too many": Fault(WINDOW, FORWARD, "_blocks", "// BLOCK_K - 1", "// BLOCK_K"),
    "diagonal off the corners not masked": Fault(CAUSAL_128, HOST, "forward_constants", "% QUERIES != 0", "% QUERIES > 64"),
    "halves of the output swapped": Fault(UNROUNDED, FORWARD, "_store_in_halves", "halves[i]", "halves[1 - i]"),
    "half a block where the diagonal misses it": Fault(CAUSAL_128, HOST, "forward_constants", "% chosen.block_k == 0", ">= 0"),
    "wrong key/value head": Fault(CAUSAL, FORWARD, "_produce",
        "[batch, head // GROUP, row, 0], rings.v_full", "[batch, head, row, 0], rings.v_full"),
    "slope of another head": Fault(SLOPES, FORWARD, "_consume", "slopes_ptr + head", "slopes_ptr + head // CONSTANTS.GROUP"),
    "distance aligned top-left": Fault(SLOPES, FORWARD, "_consume",
        "positions=index + (sizes.seq_k - sizes.seq_q)", "positions=index"),
    "lse in base 2": Fault(CAUSAL, FORWARD, "_consume", "gl.log2(sums)) * LN2", "gl.log2(sums))"),
    "another row's lse": Fault(CAUSAL, FORWARD, "_consume", "* sizes.seq_q + index, lse", "* sizes.seq_q + index // 2, lse"),
    "delta dropped": Fault(CAUSAL, BACKWARD, "_dp_minus_delta", "zero - delta", "zero"),
    "softcap's derivative dropped": Fault(SOFTCAP, BACKWARD, "_mainloop", "ds = ds * (1.0 - tanh * tanh)", "ds = ds * 1.0"),
    "no scale in dk": Fault(CAUSAL, BACKWARD, "_consume", "(dk * asked.scale)", "dk"),
    "dv and dk swapped": Fault(FULL, BACKWARD, "_consume", "_store_rows(tensors.dv", "_store_rows(tensors.dk"),
    "slope of the key/value head in dk": Fault(SLOPES, BACKWARD, "_consume", "kv_head * GROUP + member", "kv_head"),
    "mask dropped in the backward": Fault(CAUSAL, BACKWARD, "_mainloop", "if MASKED", "if False"),
    "keys beyond the end seen in the backward": Fault(BELOW, PROTOCOL, "tiles_of",
        "key + ROWS > sizes.seq_k", "key + ROWS > sizes.seq_k + 64"),
    "statistics of another tile": Fault(CAUSAL, BACKWARD, "_produce", "[stats_row + q_tile, 0]", "[stats_row, 0]"),
    "dq of the first columns twice": Fault(CAUSAL_128, DQ, "sum_dq",
        "64 * strip, 64, dim=1)\n                        dq", "0, 64, dim=1)\n                        dq"),
    "dq of another head": Fault(CAUSAL, DQ, "sum_dq", "* GROUP + member) * gl.cdiv", "* GROUP) * gl.cdiv"),
    "the other half of dk's columns": Fault(CAUSAL_256, BACKWARD, "_consume", "128 * W if WIDE", "128 * (1 - W) if WIDE"),
    "the first columns' dv and dk in both": Fault(CAUSAL_256, BACKWARD, "_mainloop", "if WIDE and W == 1:", "if False:"),
    "the first warpgroup's keys in both": Fault(CAUSAL_128, BACKWARD, "_mainloop",
        "memory.k.index(HALF + opaque_zero)", "memory.k.index(opaque_zero)"),
    "a step taken for a tile": Fault(CAUSAL, BACKWARD, "_mainloop", "(step - offset) * QUERIES", "step * QUERIES"),
    "dq of the first keys twice": Fault(FULL, DQ, "sum_dq", "memory.ds.index(2 + slot)", "memory.ds.index(slot)"),
}  # fmt: skip

RACE, UNFENCED, HANG = "a race for {}", "without fence_async_shared", "a hang"
TOO_SOON, EARLY = "cannot know that its last (phase|round) is over", "adds where .* may not be done"
SYNCHRONISATION = {
    # forward
    "K not awaited": (RACE.format("k_s"), Fault(CAUSAL, FORWARD, "_mainloop",
        "mbarrier.wait(rings.k_full.index(k_slot), (step // BUFFERS) & 1)", "pass")),
    "V not awaited": (RACE.format("v_s"), Fault(CAUSAL, FORWARD, "_mainloop",
        "mbarrier.wait(rings.v_full.index(v_slot), v_phase)", "pass")),
    "Q not awaited": ("a race for q_s|q_s.* has never been written", Fault(CAUSAL, FORWARD, "_consume",
        "mbarrier.wait(rings.q_full.index(W), n & 1)", "pass")),
    "K replaced under a product": ("a race for k_s|_produce . arrives at k_full", Fault(FULL, FORWARD, "_produce",
        "mbarrier.wait(rings.k_empty.index(slot), phase ^ 1)", "pass")),
    "Q replaced under a product": ("a race for q_s|_produce . arrives at q_full", Fault(MANY, FORWARD, "_produce",
        "mbarrier.wait(rings.q_empty.index(w), (n & 1) ^ 1)", "pass")),
    "V released under its product": (RACE.format("v_s"), Fault(FULL_128, FORWARD, "_consume",
        "acc = warpgroup_mma_wait(0, deps=(acc,))\n        mbarrier.arrive(rings.v_empty.index(slot), count=1)",
        "mbarrier.arrive(rings.v_empty.index(slot), count=1)\n        acc = warpgroup_mma_wait(0, deps=(acc,))")),
    "scores not awaited": ("has not been awaited", Fault(CAUSAL_128, FORWARD, "_mainloop",
        "warpgroup_mma_wait(1, deps=(s_later,))", "warpgroup_mma_wait(2, deps=(s_later,))")),
    "output not awaited": ("has not been awaited", Fault(CAUSAL_128, FORWARD, "_mainloop",
        "warpgroup_mma_wait(0, deps=(o_later,))", "warpgroup_mma_wait(1, deps=(o_later,))")),
    "a phase of its own": ("a hang|a race", Fault(WINDOW, FORWARD, "_skip_blocks", "(step // BUFFERS) & 1", "1")),
    "too few to release K": ("a hang|may end before", Fault(FULL, FORWARD, "forward_kernel",
        "mbarrier.init(k_empty.index(i), count=WARPGROUPS)", "mbarrier.init(k_empty.index(i), count=1)")),
    "too many to release K": (HANG, Fault(FULL, FORWARD, "forward_kernel",
        "mbarrier.init(k_empty.index(i), count=WARPGROUPS)", "mbarrier.init(k_empty.index(i), count=WARPGROUPS + 1)")),
    "half of K's bytes expected": ("that nobody expected", Fault(FULL, FORWARD, "_produce",
        "tensors.k.block_type.nbytes", "tensors.k.block_type.nbytes // 2")),
    "twice V's bytes expected": (HANG, Fault(FULL, FORWARD, "_produce",
        "tensors.v.block_type.nbytes", "tensors.v.block_type.nbytes * 2")),
    "no fence before the output's store": (UNFENCED, Fault(CAUSAL, FORWARD, "_consume", "            fence_async_shared()\n", "")),
    "output replaced under its store": (RACE.format("o_s"), Fault(MANY, FORWARD, "_consume",
        "        tma.store_wait(0)\n        acc", "        acc")),
    "the last store not awaited": ("may still read what it stores", Fault(CAUSAL, FORWARD, "_consume",
        "passed on\n    tma.store_wait(0)", "passed on")),
    "O in Q's place released too early": (RACE.format("o_s"), Fault(MANY_256, FORWARD, "_consume",
        "tma.store_wait(0)  # O lies in Q's place", "pass")),
    "half the output replaced under its store": (RACE.format("o_s"), Fault(UNROUNDED, FORWARD, "_store_in_halves",
        "tma.store_wait(0)", "pass")),
    "no fence before half the output's store": (UNFENCED, Fault(UNROUNDED, FORWARD, "_store_in_halves",
        "fence_async_shared()", "pass")),
    "barriers that TMA may not see": (UNFENCED, Fault(FULL, FORWARD, "forward_kernel", "fence_async_shared()", "pass")),
    "the last turn not taken": ("barrier 10 is left", Fault(CAUSAL, FORWARD, "_consume",
        "take_tensor_cores(W)  # what the last", "pass  # what the last")),
    "no first turn": (HANG, Fault(CAUSAL, FORWARD, "_consume", "if W == WARPGROUPS - 1", "if W == WARPGROUPS")),
    "turns left out where blocks are handed on": (TOO_SOON, Fault(CAUSAL, FORWARD, "_skip_blocks",
        "take_tensor_cores(W)", "pass")),
    "blocks not handed on": (HANG, Fault(WINDOW, FORWARD, "_skip_blocks",
        "mbarrier.arrive(rings.v_empty.index(slot), count=1)", "pass")),
    "a load that nobody awaits": ("may still come", Fault(FULL, FORWARD, "_produce",
        "        n += 1\n        q_tile, batch, head = draw(state.schedule, n, state.sizes, FROM_LAST=True)",
        "        n += 1\n        q_tile, batch, head = draw(state.schedule, n, state.sizes, FROM_LAST=True)\n"
        "    slot = step % BUFFERS\n"
        "    mbarrier.wait(rings.k_empty.index(slot), ((step // BUFFERS) & 1) ^ 1)\n"
        "    mbarrier.expect(rings.k_full.index(slot), tensors.k.block_type.nbytes)\n"
        "    tma_load(tensors.k, [0, 0, 0, 0], rings.k_full.index(slot), memory.k.index(slot))")),
    "a block handed on before its V has come": (TOO_SOON, Fault(DOCUMENTS_128, FORWARD, "_skip_blocks",
        "mbarrier.wait(rings.v_full.index(slot), phase)", "pass")),
    # the schedule
    "a tile drawn over another": (RACE.format("drawn"), Fault(TINY, SCHEDULE, "draw",
        "mbarrier.wait(schedule.taken.index(slot), ((n // 2) & 1) ^ 1)", "pass")),
    "a tile taken before it is drawn": ("drawn", Fault(MANY, SCHEDULE, "take",
        "mbarrier.wait(schedule.published.index(slot), (n // 2) & 1)", "pass")),
    # backward
    "Q not awaited in the backward": ("a race for q_s|q_s.* has never been written", Fault(CAUSAL, BACKWARD, "_mainloop",
        "mbarrier.wait(rings.q_full.index(slot), phase)", "pass")),
    "dO not awaited": (RACE.format("do_s"), Fault(CAUSAL_128, BACKWARD, "_mainloop",
        "mbarrier.wait(rings.do_full.index(slot), phase)", "pass")),
    "K not awaited in the backward": (RACE.format("k_s"), Fault(CAUSAL, BACKWARD, "_consume",
        "mbarrier.wait(rings.kv_full.index(2 * kv), phase)", "pass")),
    "Q released under its product": (RACE.format("q_s"), Fault(FULL, BACKWARD, "_mainloop",
        "dv, dk = warpgroup_mma_wait(0, deps=(dv_later, dk_later))\n        arrive_tile_empty(slot)",
        "arrive_tile_empty(slot)\n        dv, dk = warpgroup_mma_wait(0, deps=(dv_later, dk_later))")),
    "Q replaced under a product in the backward": ("a race for q_s|_produce . arrives at q_full", Fault(FULL, BACKWARD, "_produce",
        "wait_tile_empty(slot)\n                mbarrier", "mbarrier")),
    "the last release not awaited": ("is left", Fault(FULL, BACKWARD, "_produce",
        "released last\n        wait_tile_empty(slot)", "released last\n        pass")),
    "a warp too few at the ring": ("a hang|288 threads", Fault(FULL, BARRIERS, "arrive_tile_empty",
        "2 * WARPGROUP + WARP", "2 * WARPGROUP")),
    "K and V replaced while dQ reads K": ("a race for [kv]_s", Fault(MANY_256, BACKWARD, "backward_kernel",
        "kv_empty.index(i), count=3", "kv_empty.index(i), count=2")),
    "the wrong phase of K and V": ("k_s", Fault(MANY, PROTOCOL, "kv_slot", "(n // BUFFERS) & 1", "n & 1")),
    "V's buffer released under dk's store": (RACE.format("v_s"), Fault(CAUSAL, BACKWARD, "_store_rows",
        "tma.store_wait(0)", "pass")),
    "no fence before dk's store": (UNFENCED, Fault(CAUSAL, BACKWARD, "_store_rows", "fence_async_shared()", "pass")),
    "dv over V that the other one reads": (RACE.format("v_s"), Fault(CAUSAL_256, BACKWARD, "_consume",
        "wait_other_consumer(W)", "pass")),
    "two wait at one barrier": ("bar.sync is for one", Fault(CAUSAL_256, BARRIERS, "wait_other_consumer",
        '_barrier("arrive", OTHER_CONSUMER + 2 * (1 - W), 2 * WARPGROUP)\n'
        '    _barrier("sync", OTHER_CONSUMER + 2 * W, 2 * WARPGROUP)',
        '_barrier("sync", OTHER_CONSUMER, 2 * WARPGROUP)')),
    "no fence after dS": (UNFENCED, Fault(CAUSAL, PROTOCOL, "hand_over_ds", "fence_async_shared()", "pass")),
    "dS not awaited": ("ds_s", Fault(FULL, DQ, "sum_dq", "wait_ds_full(slot, HALVES)", "pass")),
    "dS of both warpgroups in one place": ("ds_s", Fault(FULL, PROTOCOL, "hand_over_ds", "2 * W + slot", "slot")),
    "dS stored under its product": (TOO_SOON, Fault(FULL, PROTOCOL, "hand_over_ds",
        "wait_ds_empty(W, slot)", "pass")),
    "dq's buffer stored over": (RACE.format("dq_s"), Fault(FULL, DQ, "sum_dq",
        "tma.store_wait(memory.dq.shape[0] - 1)", "tma.store_wait(memory.dq.shape[0])")),
    "no fence before dq is added": (UNFENCED, Fault(FULL, DQ, "sum_dq", "fence_async_shared()", "pass")),
    "dq's last addition not awaited": ("may still read", Fault(FULL, DQ, "sum_dq",
        "kv_head = take(state.schedule, n)\n    tma.store_wait(0)", "kv_head = take(state.schedule, n)")),
    "barriers that TMA may not see in the backward": (UNFENCED, Fault(FULL, BACKWARD, "backward_kernel",
        "fence_async_shared()", "pass")),
    "a tile handed on before its Q has come": ("a race for q_s|cannot know|an older one's", Fault(UNSEEN, BACKWARD, "_skip_tiles",
        "mbarrier.wait(rings.q_full.index(slot), phase)", "pass")),
    "keys that nobody sees, replaced too early": ("may still come|cannot know|a race for", Fault(UNSEEN, DQ, "sum_dq",
        "mbarrier.wait(rings.kv_full.index(2 * kv), phase)", "pass")),
    "a fence after the word that dS is there": (UNFENCED, Fault(CAUSAL, PROTOCOL, "hand_over_ds",
        "fence_async_shared()\n        arrive_ds_full(slot, HALVES)",
        "arrive_ds_full(slot, HALVES)\n        fence_async_shared()")),
    "dk used beside its wait": ("awaited under another name", Fault(CAUSAL, BACKWARD, "_mainloop",
        "dv, dk = warpgroup_mma_wait(0, deps=(dv_later, dk_later))",
        "dv, dk = warpgroup_mma_wait(0, deps=(dv_later,)), dk_later")),
    # deterministic gradients
    "nobody waits for his turn": (EARLY, Fault(ORDER, DQ, "sum_dq", "await_at_least(passed + q_tile, turn)", "pass")),
    "a sum published before it is there": (EARLY, Fault(ORDER, DQ, "sum_dq", "PENDING=STRIPS", "PENDING=STRIPS + 2")),
    "the last tile of another's out of turn": (EARLY, Fault(ORDER, DQ, "sum_dq",
        "q_tile <= next_tiles.highest", "q_tile < next_tiles.highest")),
    "no fence after the turn has come": ("a fence is missing", Fault(ORDER, HOPPER_OPS, "await_at_least",
        "fence.proxy.async; mov.b32 $0, $1;", "shfl.sync.idx.b32 $0, $1, 0, 31, -1;")),
    "a block that waits for one not begun": (HANG, Fault(ORDER, SCHEDULE, "draw", "if IN_ORDER:", "if False:")),
}  # fmt: skip


def mutant(fault, folder, monkeypatch):
    rung = planted(FILES, fault, folder, monkeypatch)
    on_hopper(rung, monkeypatch)
    return rung


@pytest.mark.parametrize("name", CHECKS)
def test_without_a_fault(name, tmp_path, monkeypatch):
    CHECKS[name](mutant(None, tmp_path, monkeypatch), monkeypatch)


@pytest.mark.parametrize("what", MATHEMATICS)
def test_wrong_mathematics_is_caught(what, tmp_path, monkeypatch):
    rung = mutant(MATHEMATICS[what], tmp_path, monkeypatch)
    with pytest.raises(
        AssertionError, match=r"rms error|max error|NaN in the result|infinities differ|outside a tensor|not the same"
    ):
        CHECKS[MATHEMATICS[what].caught_by](rung, monkeypatch)


@pytest.mark.parametrize("what", SYNCHRONISATION)
def test_who_does_not_wait_is_caught(what, tmp_path, monkeypatch):
    words, fault = SYNCHRONISATION[what]
    rung = mutant(fault, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=words):
        CHECKS[fault.caught_by](rung, monkeypatch)
