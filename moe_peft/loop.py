"""What a callback can find out about the training loop that calls it."""

import math
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FrameType
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.training_args import TrainingArguments


def micro_batches(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """How many backward passes the optimizer step that begins now has; the last one of an epoch may have fewer."""
    accumulated = args.gradient_accumulation_steps
    try:
        batches = len(dataloader)
    except TypeError:  # None, or a stream without length
        return accumulated
    steps = max(math.ceil(batches / accumulated), 1)
    return batches % accumulated or accumulated if state.global_step % steps == steps - 1 else accumulated


def still_training() -> Callable[[], bool] | None:
    """A question to ask later: is the trainer's `train` that runs now still running? None where none runs.

    No event tells a callback that training ended with an error, so the answer is read from the call stack. It holds
    nothing of the trainer alive. Another thread's stack is not seen, and there the answer is yes.
    """
    code = next((frame.f_code for frame in _stack() if frame.f_code.co_name == "train"), None)
    return None if code is None else partial(_runs, code, threading.get_ident())


def _runs(code: CodeType, thread: int) -> bool:
    return threading.get_ident() != thread or any(frame.f_code is code for frame in _stack())


def _stack() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
