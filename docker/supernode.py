"""A SuperNode whose process ends when it can do nothing any more, so that whoever started it can start it again.

Flower's SuperNode keeps its HTTP thread when its message loop has died of one bad answer from the hub: the process lives,
answers "healthy", and is offline for ever. Here the end of the loop is the end of the process.
Enters: flower-supernode's own arguments; $NAME in one of them is that environment variable. Leaves: its exit code, 1 when the loop raised.
"""

import os
import sys
import traceback

from flwr.supernode.cli import flower_supernode

sys.argv = [os.path.expandvars(argument) for argument in sys.argv]
code: int | str | None = 1
try:
    flower_supernode()
except SystemExit as end:
    code = end.code
except BaseException:  # whatever ended the loop: say it, then end the process
    traceback.print_exc()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code if isinstance(code, int) else 1)
