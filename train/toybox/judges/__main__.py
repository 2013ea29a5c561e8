"""`python -m train.toybox.judges`."""

import sys

from train.toybox.judges.teach import main

if __name__ == "__main__":
    sys.exit(main())
