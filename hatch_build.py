# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What hatchling does beside packing files: a wheel gets the compiled core, an sdist the C that it is compiled from.

Without a compiler, or without Python's headers, the wheel is one of Python alone, and serves slower; the build says so.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CYTHON = "cython>=3.0,<4"
PLANTS = "FOREBAY_CORE_PLANTS"
"""In the environment: tests/README.md. Only tools/setup.sh sets it."""


class Core(BuildHookInterface[Any]):
    """For the targets wheel and sdist."""

    def dependencies(self) -> list[str]:
        """Cython, but not where an sdist has what it would make."""
        return [] if Path(self.root, "PKG-INFO").exists() else [CYTHON]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Have it compiled, in place, before files are packed."""
        build = self._build()
        try:
            if self.target_name == "sdist":
                build.generate()
                return
            build.build(plants=bool(os.environ.get(PLANTS)))
        except build.CannotCompileError as why:
            self.app.display_warning(f"the compiled core is left out: {why}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _build(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            "build_core", Path(self.root, "fast/build.py")
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
