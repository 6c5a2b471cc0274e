"""``python -m contrastive_mm.nlp`` is ``contrastive-mm nlp``."""

import sys

from contrastive_mm.cli import main

sys.exit(main(["nlp", *sys.argv[1:]]))
