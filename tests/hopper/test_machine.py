"""The simulated Hopper itself: two warpgroups, what one of them leaves out, and the words that say so. What is in order passes."""

from types import SimpleNamespace

import pytest
import torch

from tests.hopper import machine as machine_of
from tests.hopper.machine import Machine
from tests.hopper.memory import Pointer, Tiles
from tests.hopper.values import HardwareFault, Value
from tests.hopper.words import Words

SEEDS = range(8)
ONES = Value(torch.ones(4, 4))


class House(SimpleNamespace):
    """What two warpgroups share: x and y in shared memory, the barriers `ready` and `free`, a tensor in global memory."""

    def ready(self):
        return self.barriers.index(0)

    def free(self):
        return self.barriers.index(1)

    def named(self, operation, number=6, total=256, form="bar"):
        threads = Value(torch.zeros(128, dtype=torch.int32))
        self.words.inline_asm(f"{form}.{operation} {number}, {total}; mov.b32 $0, $1;", "=r,r", [threads], None, False, 1)


def run(first, second, seed=0):
    """Two warpgroups; what is in global memory then."""
    machine, tensor = Machine(seed), torch.zeros(4, 4)
    words = Words(machine, 1, [tensor], False)
    gl = words.names["gl"]

    def body():
        house = House(words=words, gl=gl, tensor=tensor, tiles=Tiles(tensor, [4, 4]))
        memory = gl.allocate_shared_memory(gl.float32, [2, 4, 4], None)
        house.x, house.y = memory.index(0), memory.index(1)
        house.barriers = gl.allocate_shared_memory(gl.int64, [2, 1], None)
        words.init(house.ready(), count=1)
        words.init(house.free(), count=1)
        words.fence()
        gl.warp_specialize([(first, (house,)), (second, (house,))], [4], [24])

    machine.run(body, 1, 1)
    return tensor


def nothing(h):
    pass


def store_and_say(h):
    h.x.store(ONES)
    h.words.fence()
    h.words.arrive(h.ready(), count=1)


def wait_and_write(h):
    h.words.wait(h.ready(), 0)
    h.words.store_tile(h.tiles, [0, 0], h.x, add=False)
    h.words.store_wait(0)


def bring(h):
    h.words.expect(h.ready(), h.tiles.block_type.nbytes)
    h.words.load_tile(h.tiles, [0, 0], h.ready(), h.x)


def multiply(h):
    h.words.wait(h.ready(), 0)
    return h.words.product(h.x, h.x.permute((1, 0)), ONES, use_acc=True, is_async=True)


def wait_for_product(h):
    done = h.words.await_products(0, (multiply(h),))
    assert (done.data == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_in_order_passes(seed):
    assert (run(store_and_say, wait_and_write, seed) == 1).all()
    run(bring, wait_for_product, seed)
    run(lambda h: h.named("sync"), lambda h: h.named("arrive"), seed)
    run(lambda h: h.named("sync", form="barrier"), lambda h: h.named("sync", form="barrier"), seed)


def to_and_fro(h, mine, other, first):
    """Ten messages each way."""
    for i in range(10):
        if first:
            h.words.arrive(mine, count=1)
        h.words.wait(other, i % 2)
        if not first:
            h.words.arrive(mine, count=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_phases_go_on(seed):
    run(lambda h: to_and_fro(h, h.ready(), h.free(), True), lambda h: to_and_fro(h, h.free(), h.ready(), False), seed)


def say_too_early(h):
    h.x.store(ONES)
    h.words.arrive(h.ready(), count=1)
    h.words.fence()


def say(h):
    h.words.arrive(h.ready(), count=1)


def through_phases(h, n):
    for i in range(n):
        h.words.arrive(h.ready(), count=1)
        h.words.wait(h.ready(), i % 2)


def use_beside_wait(h):
    product = multiply(h)
    h.words.await_products(0, (ONES,))
    product.to(h.gl.float16)


def store_and_leave(h):
    h.x.store(ONES)
    h.words.fence()
    h.words.store_tile(h.tiles, [0, 0], h.x, add=False)


def replace_under_store(h):
    store_and_leave(h)
    h.x.store(ONES)


def wait_without_end(h):
    while True:
        h.words.machine.pause()


FAULTS = {
    "nobody waits": (store_and_say, lambda h: h.x.load(None), "a race for memory|has never been written"),
    "a parent is not ahead of its child": (lambda h: h.y.store(ONES), lambda h: h.y.store(ONES), "a race for"),
    "the fence comes late": (say_too_early, wait_and_write, "without fence_async_shared"),
    "no fence at all": (lambda h: (h.x.store(ONES), h.words.arrive(h.ready(), 1)), wait_and_write, "without fence_async_shared"),
    "a load is used before it has come": (bring, lambda h: h.x.load(None), "a race for|has never been written"),
    "a load is stored over": (lambda h: (bring(h), h.x.store(ONES)), wait_for_product, "a race for"),
    "a load comes when all have gone": (bring, nothing, "may still come"),
    "fewer bytes are expected": (lambda h: (h.words.expect(h.ready(), 4), h.words.load_tile(h.tiles, [0, 0], h.ready(), h.x)),
                                 lambda h: h.words.wait(h.ready(), 0), "that nobody expected"),
    "nobody arrives": (nothing, wait_and_write, "a hang: .* wait_and_write 1 of block 0 for phase 0 of"),
    "two arrive for one": (say, say, "cannot know that its last phase is over"),
    "a phase is missed": (lambda h: through_phases(h, 2), lambda h: h.words.wait(h.ready(), 0), "a hang|may end before"),
    "a parity two phases old": (lambda h: through_phases(h, 3), lambda h: h.words.wait(h.ready(), 0), "older one's|may end before"),
    "a product that nobody awaits": (bring, lambda h: (multiply(h), None)[1], "a product that nobody awaits"),
    "a product used beside its wait": (bring, use_beside_wait, "has not been awaited"),
    "a store that nobody awaits": (store_and_leave, nothing, "may still read what it stores"),
    "a buffer replaced under its store": (replace_under_store, nothing, "a race for"),
    "a barrier of Triton's": (lambda h: h.named("sync", number=1), nothing, "barrier 1 is not free"),
    "a barrier for more than come": (lambda h: h.named("arrive"), nothing, "barrier 6 is left with"),
    "a barrier for fewer than come": (lambda h: h.named("arrive", total=192), lambda h: h.named("sync", total=192),
                                      "256 threads come"),
    "two ideas of a barrier": (lambda h: h.named("arrive"), lambda h: h.named("sync", total=384), "for 384 threads|for 256"),
    "two wait at a barrier": (lambda h: h.named("sync"), lambda h: h.named("sync"), "bar.sync is for one"),
    "one comes twice to a barrier": (lambda h: (h.named("arrive"), h.named("arrive")), lambda h: (h.named("sync"), h.named("sync")),
                                     "cannot know that its last round is over"),
    "a pointer beside its tensor": (lambda h: Pointer(h.tensor, 16).where(None), nothing, "outside a tensor of 16"),
    "no end": (wait_without_end, nothing, "no end after"),
    "PTX that is not known": (lambda h: h.words.inline_asm("trap;", "", [ONES], None, False, 1), nothing, "PTX that is not known"),
}  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_seen_whatever_the_order(what, seed, monkeypatch):
    monkeypatch.setattr(machine_of, "ENDLESS", 1000)
    first, second, words = FAULTS[what]
    with pytest.raises(HardwareFault, match=words):
        run(first, second, seed)


def test_a_seed_is_an_order():
    """The same seed has the same threads run, in the same order; another has not."""

    def order(seed):
        seen = []

        def body(name):
            return lambda h: [(seen.append(name), h.words.machine.pause()) for _ in range(20)] and None

        run(body("a"), body("b"), seed)
        return seen

    orders = [order(seed) for seed in SEEDS]
    assert orders == [order(seed) for seed in SEEDS]
    assert any(one != orders[0] for one in orders)


def test_numbers_are_divided_as_in_c():
    minus_one = Value(torch.tensor(-1, dtype=torch.int32))
    assert int(minus_one // 64) == 0 and int(minus_one % 64) == -1 and int(minus_one >> 1) == -1
    wide = Value(torch.tensor(2**40))
    assert (wide + Value(torch.ones(2, dtype=torch.int32))).data.tolist() == [2**40 + 1] * 2
