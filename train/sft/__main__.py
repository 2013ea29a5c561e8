"""`python -m train.sft RUN`: go on with a supervised run."""

import os
import sys

from engine.threads import limit_spinning

limit_spinning(os.environ)  # before torch is imported

from train.sft.trainer import main  # noqa: E402

sys.exit(main())
