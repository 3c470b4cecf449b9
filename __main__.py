"""``python -m kolors_nodes`` is the ``kolors`` command."""

from .headless.command import main

raise SystemExit(main())
