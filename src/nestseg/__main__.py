"""``python -m nestseg`` is the ``nestseg`` command."""

import sys

from nestseg.cli import main

sys.exit(main())
