"""`python -m n2n_fast` is the command n2n-fast."""

from n2n_fast.cli.main import main

main()
