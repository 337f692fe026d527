"""Too little memory, said in terms of what the user can lower."""

from collections.abc import Iterator
from contextlib import contextmanager

_SIGNS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is Python's or XLA's way to say that memory, of the host or of the device, is used up."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explained(advice: str) -> Iterator[None]:
    """Raise `MemoryError` with the advice where memory is used up; other errors pass."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"Not enough memory {advice}") from error
