"""What is installed beside the app: the commands of the hub's and the sites' operators, and Flower's programs with our
parts in them.

The app itself (app/) is what is signed and sent to the sites; nothing of this package is.
"""

import gc
from pathlib import Path

__version__ = "0.1.0"  # pyproject.toml has the same: Flower reads it there, and the image has no pyproject.toml
COLLECTED = gc.get_threshold()  # Python's own, for a process that is to work for long (superexec.settle)
# Our programs import thousands of modules, none of which is garbage: looking for some is a tenth of a start.
gc.set_threshold(10_000, 10, 100)
ROOT = Path(__file__).resolve().parent.parent  # the checkout, or the image's folder of the same parts
