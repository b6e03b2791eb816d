from typing import Final

DEFAULT: Final = "fss"
"""The backend that commands take when none is named."""
