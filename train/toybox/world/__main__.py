"""`python -m train.toybox.world`: contact sheets of the drawn world, its sample subjects, its speed."""

from train.toybox.world.sheet import main

main()
