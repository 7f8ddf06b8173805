import torch
from torch import Tensor

from hawqtool.rounding.kernels.cuda_graph import Function, Repeated


def test_a_function_is_recorded_at_the_second_call_on_a_shape() -> None:
    recorded: list[tuple[int, ...]] = []

    def record(function: Function, example: Tensor) -> Function:
        recorded.append(tuple(example.shape))
        return lambda value: (function(value)[0] + 10,)

    doubled = Repeated(lambda value: (2 * value,), record)
    found = [doubled(torch.ones(rows)) for rows in (2, 2, 2, 1, 1)]
    assert recorded == [(2,), (1,)]
    assert [float(parts[0][0]) for parts in found] == [2, 12, 12, 2, 12]


def test_without_memory_for_a_recording_there_is_none() -> None:
    def record(_function: Function, _example: Tensor) -> Function:
        raise torch.OutOfMemoryError("no room")

    doubled = Repeated(lambda value: (2 * value,), record)
    assert [float(doubled(torch.ones(2))[0][0]) for _ in range(3)] == [2, 2, 2]
