"""The doctor on a real GPU: PyTorch's choice is the kernel that it runs, and the kernels that refuse say why."""

import pytest
import torch
from torch.nn.attention import sdpa_kernel

from flash_ladder.kernels import attention
from flash_ladder.machine import doctor
from flash_ladder.machine.sdpa_choice import KERNELS, AttentionCall, ask_sdpa
from flash_ladder.script_schema import DoctorConfig


def asked(features=("is_causal",), **change):
    shape = {"device": torch.device("cuda"), "dtype": torch.float16, "batch_size": 2, "n_head": 8, "n_kv_head": 8}
    return AttentionCall(**shape | {"seq_len": 256, "head_dim": 64} | change, features=frozenset(features))


@pytest.mark.parametrize(
    "call",
    [
        asked(),
        asked(()),
        asked(n_kv_head=2),
        asked(dtype=torch.float32),
        asked(dtype=torch.float64),
        asked(head_dim=320),
        asked(("is_causal", "document_ids")),
        asked(("alibi_slopes",)),
    ],
    ids=["causal", "full", "grouped heads", "float32", "float64", "head_dim 320", "documents", "alibi"],
)
def test_every_kernel_is_accounted_for(call):
    """Those in the order run alone; those refused fail alone, with a reason."""
    choice = ask_sdpa(call)
    assert {*choice.order} | {*choice.refused} == {*KERNELS} and "math" in choice.order
    inputs = [
        torch.randn(2, h, 256, call.head_dim, device="cuda", dtype=call.dtype, requires_grad=True)
        for h in (8, call.n_kv_head, call.n_kv_head)
    ]
    meaning = {
        "alibi_slopes": torch.ones(8, device="cuda"),
        "document_ids": torch.zeros(2, 256, dtype=torch.int32, device="cuda"),
    }
    used = {name: value for name, value in meaning.items() if name in call.features}
    for name, backend in KERNELS.items():
        with sdpa_kernel(backend):
            if name in choice.order:
                attention(*inputs, is_causal="is_causal" in call.features, backend="sdpa", **used)
            else:
                with pytest.raises(RuntimeError, match="No available kernel"):
                    attention(*inputs, is_causal="is_causal" in call.features, backend="sdpa", **used)
    assert all(choice.refused.values()) and "PyTorch gives no reason" not in choice.refused.values()


def test_the_report():
    found = doctor.diagnose(DoctorConfig())
    text = doctor.report(found)
    assert found.sdpa and found.gpus[0].free_gib and found.gpus[0].shared_memory_kib and found.gpus[0].built_for
    assert found.driver and torch.cuda.get_device_name() in text
