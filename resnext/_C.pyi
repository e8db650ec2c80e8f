# The compiled extension: the operators of csrc/operators.h, as functions that fill their results.
from typing import Any

def __getattr__(name: str) -> Any: ...
