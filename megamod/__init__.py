"""megamod: training content-moderation language models on megatron-core, every part of the run open to the researcher.

The road from the launch line to the loss: `configs/<run>.py` → `megamod/train.py` → `megamod/step.py` → `megamod/losses.py`.
"""

import warnings

__version__ = "0.1.0"

# megatron-core advises on each import of what is not installed; who attends and multiplies is said once, in the run's log.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")  # its calls, under their former names
