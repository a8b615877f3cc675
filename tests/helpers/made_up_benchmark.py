"""A benchmark's result with round figures, as if from a GPU with a known peak."""

from flash_ladder.benchmark.result import GIB, Cell, Error, Masked, Result

CONFIG = {"dtype": "bfloat16", "tokens": 4096, "width": 128, "baseline": "fa2", "seq_len": [1024, 4096], "error_seq_len": 512}
SPEED = {"eager": 50.0, "flash_v2": 400.0, "fa2": 200.0}


def made_up(**changes) -> Result:
    """Two masks, three lengths, three backends: eager's memory grows with the square and ends at 8192, fa3 has no backward."""
    result = Result(
        "NVIDIA H200, Hopper sm_90",
        "2.11.0",
        CONFIG,
        triton="3.6.0",
        cudnn="9.19.0",
        driver="580.1",
        date="2026-11-23",
        device_gib=140.0,
        left_out={"fa4": "not installed"},
        host_us={"eager": 57.0, "flash_v2": 18.0, "fa2": None},
    )
    for causal in (True, False):
        for seq_len in (1024, 4096, 8192):
            batch = max(1, 4096 // seq_len)
            for backend, speed in SPEED.items():
                cell = Cell(backend, 64, seq_len, causal)
                cell.peak_gib = batch * (seq_len**2 * 64 if backend == "eager" else seq_len * 4096) / GIB
                if seq_len == 8192 and backend == "eager":
                    cell.peak_gib, cell.note = None, "out of memory"
                if seq_len != 8192:
                    cell.forward_tflops, cell.backward_tflops = speed, speed / 2
                result.cells.append(cell)
            fa3 = Cell("fa3", 64, seq_len, causal, note="no backward")
            fa3.forward_tflops = 500.0 if seq_len != 8192 else None
            result.cells.append(fa3)
        result.errors += [
            Error("eager", 64, causal, output=2e-3, dq=3e-3, dk=3e-3, dv=2e-3),
            Error("flash_v2", 64, causal, output=1e-3, dq=3e-3, dk=6e-3, dv=2e-3),
            Error("fa3", 64, causal, output=4e-3, note="no backward"),
        ]
    result.masks += [
        Masked("window_1024", "flash_v2", 64, 16384, 0.125, 1.0, 3.0, dense_forward_ms=8.0, dense_backward_ms=20.0),
        Masked("ragged_2048", "flash_v2", 64, 16384, 0.25, 3.0, 5.0, dense_forward_ms=8.0, dense_backward_ms=20.0),
        Masked("window_1024", "eager", 64, 16384, 0.125, 8.0, None, 8.0, None, "out of memory"),
    ]
    for name, value in changes.items():
        setattr(result, name, value)
    return result
