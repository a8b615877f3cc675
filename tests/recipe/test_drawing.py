"""How a backend looks in a picture, and where the labels of lines go."""

import pytest

from flash_ladder.drawing import LOOKS, looks, spread
from flash_ladder.kernels import BACKENDS
from flash_ladder.names import PEERS


def test_every_backend_has_its_own_look():
    assert {*BACKENDS, *PEERS} <= LOOKS.keys()
    assert len({colour for colour, _ in LOOKS.values()}) == len(LOOKS)
    assert len({marker for name, (_, marker) in LOOKS.items() if name not in ("eager", "sdpa")}) == len(LOOKS) - 2


def test_a_new_peer_gets_a_spare_look():
    found = looks(["flash_v2", "new", "eager", "newer"])
    assert found["flash_v2"] == LOOKS["flash_v2"] and found["eager"] == LOOKS["eager"]
    assert len(set(found.values())) == 4 and not {found["new"], found["newer"]} & {*LOOKS.values()}
    assert len(looks(f"new_{number}" for number in range(12))) == 12


def test_labels_stay_where_they_are_wanted_if_they_can():
    assert spread([0.8, 0.2, 0.5], 0.1, 0, 1) == pytest.approx([0.8, 0.2, 0.5])
    assert spread([], 0.1, 0, 1) == []


def test_labels_too_near_each_other_move_apart_around_their_mean():
    assert spread([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert spread([0.5, 0.9, 0.52, 0.48], 0.1, 0, 1) == pytest.approx([0.5, 0.9, 0.6, 0.4])


def test_labels_keep_within_the_axis():
    assert spread([1.0, 1.0], 0.1, 0, 1) == pytest.approx([0.9, 1.0])
    assert spread([0.0, 0.01], 0.1, 0, 1) == pytest.approx([0.0, 0.1])
    assert spread([0.5] * 3, 0.5, 0, 0.9) == pytest.approx([0, 0.5, 1.0])  # no room: they go beyond rather than over each other
