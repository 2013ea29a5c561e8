"""`python -m train.toybox STAGE`: one stage of the recipe, or all of them."""

import sys

from train.toybox.recipe import main

sys.exit(main())
