"""``python -m contrastive_mm.rl`` is ``contrastive-mm rl``."""

import sys

from contrastive_mm.cli import main

sys.exit(main(["rl", *sys.argv[1:]]))
