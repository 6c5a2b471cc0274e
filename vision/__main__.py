"""``python -m contrastive_mm.vision`` is ``contrastive-mm vision``."""

import sys

from contrastive_mm.cli import main

sys.exit(main(["vision", *sys.argv[1:]]))
