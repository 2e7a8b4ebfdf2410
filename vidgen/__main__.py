# SPDX-License-Identifier: Apache-2.0
import sys

from vidgen.cli import main

sys.exit(main())
