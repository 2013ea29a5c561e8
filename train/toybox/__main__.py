"""`python -m train.toybox STAGE`: one stage of the recipe, or all of them."""

import os
import sys

from engine.threads import limit_spinning

limit_spinning(os.environ)  # before torch is imported

from train.toybox.recipe import main  # noqa: E402

sys.exit(main())
