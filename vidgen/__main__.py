# SPDX-License-Identifier: Apache-2.0
import os
import sys

from vidgen.cli import main

code = main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    from vidgen.parallel.launch import leave

    leave(code)
sys.exit(code)
