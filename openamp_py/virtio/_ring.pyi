# The compiled extension: its functions are declared and described in csrc/*.h.
from typing import Any

ffi: Any
lib: Any
