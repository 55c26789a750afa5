"""The names of the forms, for those who ask for one: recipes and the command line. Imports nothing heavy.

`forms.FORMATS` has what stands behind each; a test holds the two together.
"""

from __future__ import annotations

from typing import Literal

# A folder that transformers loads.
CheckpointName = Literal["native", "bitnet", "nemotron-nas", "surgeon"]
FormName = Literal[CheckpointName, "gguf"]
# As recipes ask for it: `auto` is the first that the model fits into.
WantedForm = Literal["auto", CheckpointName]
