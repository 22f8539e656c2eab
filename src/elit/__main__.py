"""`python -m elit`, and so `torchrun ... -m elit train ...`."""

import sys

from elit.cli.main import main

sys.exit(main())
