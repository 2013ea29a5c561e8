"""`python -m train.sft RUN`: go on with a supervised run."""

import sys

from train.sft.trainer import main

sys.exit(main())
