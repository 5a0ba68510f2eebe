"""What a thread that works for a caller has of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch


def as_caller(devices: Iterable[torch.device]) -> Callable[[], AbstractContextManager[None]]:
    """Called in the caller's thread; gives what makes another one work as that does, with no gradients: on its current
    streams of CUDA devices (a thread begins on the default ones), and in inference mode if it is."""
    streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]
    is_inference = torch.is_inference_mode_enabled()

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(torch.inference_mode(is_inference))
            stack.enter_context(torch.no_grad())
            yield

    return entered
