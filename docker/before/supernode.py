"""For join kits of version 0.1, whose compose.yaml starts this file; new ones start the module. Goes with 0.3."""

import runpy

runpy.run_module("bouquet.flower.supernode", run_name="__main__", alter_sys=True)
