"""``python -m gsalign.cli``: the command line without the installed script, as for torchrun."""

from __future__ import annotations

import sys

from gsalign.cli.main import main

sys.exit(main())
