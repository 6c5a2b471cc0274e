from contrastive_mm.losses._old import *
from contrastive_mm.losses._old import info_nce, nt_xent
