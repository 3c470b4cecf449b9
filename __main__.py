"""``python -m kolors_nodes`` is the ``kolors`` command, and so is ``python FOLDER`` with this folder, uninstalled."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __package__:
    from .headless.command import main
else:  # started as a folder, so that it is in no package: make it one
    _folder = Path(__file__).parent
    del sys.path[0]  # this folder, whose own would hide modules of the same names
    _spec = spec_from_file_location("kolors_nodes", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    sys.modules["kolors_nodes"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["kolors_nodes"])
    from kolors_nodes.headless.command import main

raise SystemExit(main())
