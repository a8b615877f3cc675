"""What a backend is called in the benchmark's pictures."""

from flash_ladder.benchmark.looks import full_name
from tests.helpers.made_up_benchmark import made_up


def test_names_say_whose_it_is():
    result = made_up(packages={"fa3": "fa3-fwd 0.0.3"})
    assert full_name("flash_v1", result) == "flash_v1 (ours)"
    assert full_name("fa2", result) == "fa2: FlashAttention-2 (PyTorch's)"
    assert full_name("cudnn", result) == "cudnn: cuDNN (PyTorch's)"
    assert full_name("fa3", result) == "fa3: FlashAttention-3 (fa3-fwd 0.0.3)"
    assert full_name("fa4", result) == "fa4: FlashAttention-4 (flash-attn-4)" and full_name("new", result) == "new"
