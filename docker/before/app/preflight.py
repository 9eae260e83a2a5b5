"""For join kits of version 0.1, whose `./site` runs this module; new ones run `bouquet site check`. Goes with version
0.3.
"""

import sys

from bouquet.cli import main

sys.exit(main(["site", "check", *sys.argv[1:]]))
