"""The benchmark's tables, from figures made up."""

import pytest

from flash_ladder.benchmark.result import Cell
from flash_ladder.benchmark.tables import header, row_lines, summary, table_head
from tests.helpers.made_up_benchmark import CONFIG, made_up


def words(line: str) -> list[str]:
    return line.split()


def test_one_shape():
    result = made_up()
    lines = row_lines(result.rows()[0], result)
    eager = "causal D=64 S=1024 B=4 eager 50 5.1 % 0.25 25 2.5 % 0.25 256 MiB"
    assert words(lines[0]) == words(eager)
    assert words(lines[1]) == words("flash_v2 400 40.4 % 2.00 200 20.2 % 2.00 16 MiB")
    assert words(lines[2]) == words("fa2 200 20.2 % 1.00 100 10.1 % 1.00 16 MiB")
    assert words(lines[3]) == words("fa3 500 50.6 % 2.50 - - - - no backward")
    assert lines[1].index("400") + 3 == lines[2].index("200") + 3 == table_head(result)[1].index("TFLOP/s") + len("TFLOP/s")


def test_a_shape_without_speed():
    result = made_up()
    (line,) = row_lines(result.rows()[2], result)
    assert words(line) == words(
        "causal D=64 S=8192 B=1 memory alone: eager out of memory, flash_v2 32 MiB, fa2 32 MiB, fa3 no backward"
    )


def test_an_unknown_gpu_has_no_share():
    result = made_up(device="A GPU, sm_70")
    assert words(row_lines(result.rows()[0], result)[1]) == words("flash_v2 400 - 2.00 200 - 2.00 16 MiB")
    assert "no peak known for this GPU" in " ".join(header(result))


def test_a_backend_that_came_to_nothing():
    result = made_up(cells=[Cell("flash_v2", 64, 1024, True, note="refused: " + "why " * 100), Cell("fa2", 64, 1024, True)])
    lines = row_lines(result.cells, result)
    assert "refused: why" in lines[0] and lines[0].endswith("…") and len(lines[0]) <= 150
    assert words(lines[1]) == ["fa2"]


def test_a_table_fits_in_150_columns():
    result = made_up()
    result.cells += [Cell("efficient", 128, 16384, True, 999.0, 999.0, 123.4, "failed: " + "x" * 200, n_kv_head=4)]
    result.config = {**CONFIG, "baseline": "efficient", "seq_len": [*CONFIG["seq_len"], 16384]}
    lines = [*header(result), *table_head(result), *(line for row in result.rows() for line in row_lines(row, result))]
    assert max(map(len, [*lines, *summary(result)])) <= 150


def test_summary():
    lines = [words(line) for line in summary(made_up())]
    text = "\n".join(summary(made_up()))
    assert words("eager 2.00 (1024 to 4096) 2.00 (1024 to 4096)") in lines
    assert words("flash_v2 1.00 (1024 to 8192) 1.00 (1024 to 8192)") in lines
    assert words("fa3 - -") in lines
    assert words("causal D=64 eager 2.00e-03 (1.00) 3.00e-03 (1.00) 3.00e-03 (1.00) 2.00e-03 (1.00)") in lines
    assert words("flash_v2 1.00e-03 (0.50) 3.00e-03 (1.00) 6.00e-03 (2.00) 2.00e-03 (1.00)") in lines
    assert words("fa3 4.00e-03 (2.00) - - - no backward") in lines
    assert words("over eager 8.00 / 8.00") in lines and words("over fa3 0.80 / -") in lines
    assert not any(line[:2] == ["over", "flash_v2"] for line in lines)
    assert "µs: eager 57, flash_v2 18, fa2 -" in text


def test_masks():
    """A mask's lines stand together, its name on the first."""
    lines = summary(made_up())
    start = next(number for number, line in enumerate(lines) if line.startswith("mask "))
    assert "causal, one sequence, S=16384" in lines[start - 1]
    assert [words(line) for line in lines[start : start + 4]] == [
        words("mask backend D area forward backward"),
        words("window_1024 flash_v2 64 12.5 % 1.000 (1.00) 3.000 (1.20)"),
        words("eager 64 12.5 % 8.000 (8.00) - out of memory"),
        words("ragged_2048 flash_v2 64 25.0 % 3.000 (1.50) 5.000 (1.00)"),
    ]
    assert lines[start].index("backward") + 8 == lines[start + 1].index("(1.20)") + 6
    assert lines[start].index("area") + 4 == lines[start + 1].index("12.5 %") + 6
    assert "mask" not in "\n".join(summary(made_up(masks=[])))


def test_without_a_gpu():
    result = made_up(device="CPU", config={**CONFIG, "baseline": "eager", "dtype": "float32"}, host_us={}, masks=[])
    for cell in result.cells:
        cell.forward_tflops = cell.backward_tflops = None
    assert "no GPU: speed is not measured" in "\n".join(header(result))
    assert words(row_lines(result.rows()[0], result)[1]) == words("flash_v2 16 MiB 0.062")
    assert "TFLOP" not in "\n".join([*table_head(result), *summary(result)])


def test_an_interrupted_run_says_so():
    assert "interrupted" in "\n".join(header(made_up(finished=False)))
    assert "interrupted" in "\n".join(header(made_up(finished=False, cells=[])))  # among the masks
    assert "interrupted" not in "\n".join(header(made_up()))


@pytest.mark.parametrize("empty", [{"cells": []}, {"errors": []}, {"cells": [], "errors": [], "host_us": {}, "masks": []}])
def test_what_is_missing_leaves_its_table_out(empty):
    result = made_up(**empty)
    assert [*header(result), *table_head(result)]
    summary(result)
