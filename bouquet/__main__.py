"""`python -m bouquet`."""

import sys

from bouquet.cli import main
from bouquet.ended import quietly

sys.exit(quietly(main))
